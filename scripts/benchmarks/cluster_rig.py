"""A cluster of real processes for `bench cluster`: two workers, and one master per policy in turn.

The workers stay, their caches are cleared between runs, so that a run differs from another in its
master alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.e2e.processes import Etcd, Launcher, Master, Worker, http_status, post_json, wait_until

KV_BYTES_PER_TOKEN = 23_040
"""Of the default model in bfloat16."""


@dataclass(frozen=True, slots=True)
class Setting:
    policy: str
    peers: bool

    @property
    def name(self) -> str:
        return f"{self.policy} {'with' if self.peers else 'without'} peers"


SETTINGS = [
    Setting(policy, peers) for policy in ("RR", "CAR", "LEAST_LOAD") for peers in (False, True)
]


class Rig:
    def __init__(self, procs: Launcher, cache_tokens: int, max_model_len: int) -> None:
        self._procs = procs
        self._flags = (
            *("--num_threads=1", "--dtype=bfloat16", "--enable_cache_upload=true"),
            f"--max_cache_size={cache_tokens * KV_BYTES_PER_TOKEN}",
            f"--max_model_len={max_model_len}",
        )
        self.etcd: Etcd = procs.etcd()
        self.workers: list[Worker] = []
        self._master: Master | None = None

    def start_workers(self, count: int) -> None:
        """Until there are so many."""
        while len(self.workers) < count:
            self.workers.append(self._procs.worker(self.etcd, *self._flags))

    def stop_workers(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()

    def use(self, setting: Setting) -> str:
        """A fresh master over empty caches; its URL."""
        if self._master is not None:
            self._master.stop()
        for worker in self.workers:
            post_json(f"{worker.operator_url}/admin/cache/clear", {})
        master = self._procs.master(
            self.etcd,
            f"--load_balance_policy={setting.policy}",
            f"--enable_peer_fetch={'true' if setting.peers else 'false'}",
        )
        self._master = master
        wait_until(
            lambda: http_status(f"{master.http_url}/health") == 200, "the cluster", timeout_s=60
        )
        # For the first load reports, and for workers that the master has not met yet.
        time.sleep(2)
        return master.http_url
