"""Names of the keys in etcd: the one place that knows the layout.

    /xllm/{namespace}/masters/{master_id}
    /xllm/{namespace}/leader
    /xllm/{namespace}/workers/{worker_id}
    /xllm/{namespace}/load/{worker_id}
    /xllm/{namespace}/cache/{worker_id}/{epoch}/...     docs/index-format.md
    /xllm/{namespace}/commands/{worker_id}/{command_id}

Names of folders end with a slash, so that they can be used as prefixes; `leader` is a key.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm.errors import ConfigError
from xllm.protocol import Epoch, MasterId, WorkerId


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one namespace, which is one cluster.

    Raises: ConfigError for a namespace that would mix with another one.
    """

    namespace: str

    def __post_init__(self) -> None:
        if not self.namespace or "/" in self.namespace:
            raise ConfigError(
                f"--etcd_namespace is {self.namespace!r}: expected a name without a slash"
            )

    @property
    def root(self) -> str:
        return f"/xllm/{self.namespace}/"

    @property
    def masters(self) -> str:
        return f"{self.root}masters/"

    def master(self, master_id: MasterId) -> str:
        return f"{self.masters}{master_id}"

    @property
    def leader(self) -> str:
        return f"{self.root}leader"

    @property
    def workers(self) -> str:
        return f"{self.root}workers/"

    def worker(self, worker_id: WorkerId) -> str:
        return f"{self.workers}{worker_id}"

    @property
    def load(self) -> str:
        return f"{self.root}load/"

    def load_of(self, worker_id: WorkerId) -> str:
        return f"{self.load}{worker_id}"

    @property
    def cache(self) -> str:
        return f"{self.root}cache/"

    def cache_of(self, worker_id: WorkerId, epoch: Epoch) -> str:
        """The folder of one epoch of a worker."""
        return f"{self.cache}{worker_id}/{epoch:016x}/"

    @property
    def commands(self) -> str:
        return f"{self.root}commands/"

    def commands_of(self, worker_id: WorkerId) -> str:
        return f"{self.commands}{worker_id}/"

    def command(self, worker_id: WorkerId, command_id: str) -> str:
        return f"{self.commands_of(worker_id)}{command_id}"

    def worker_of_command(self, key: str) -> WorkerId:
        return WorkerId(key.removeprefix(self.commands).partition("/")[0])
