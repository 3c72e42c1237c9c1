"""What has to hold of a cluster that is whole and has nothing to do.

What can be asked is asked of operators' ports, as an operator would; of etcd's members each by
itself.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

import grpc
from etcd3aio import _protobuf as pb

from tests.chaos.cluster import ChaosCluster, EtcdMember, Master
from tests.chaos.load import Case

INDEX_LAG_S = 20.0
"""Until the last blocks are published; a worker's share of the budget may be small."""


class EtcdDiverged(AssertionError):
    """Members of etcd hold different histories: nothing that xllm shows afterwards is its fault."""


async def check_etcd(members: Sequence[EtcdMember]) -> str:
    """Compares what all members say of the revision that each of them has; returns a line.

    Raises: EtcdDiverged. A member that does not answer is left out.
    """
    running = [member for member in members if member.is_running]
    latest = await asyncio.gather(*(_hash_kv(member, 0) for member in running))
    answering = [m for m, answer in zip(running, latest, strict=True) if answer is not None]
    revisions = [answer.header.revision for answer in latest if answer is not None]
    if not revisions:
        return "etcd does not answer"
    revision = min(revisions)
    found = await asyncio.gather(*(_hash_kv(member, revision) for member in answering))
    # A hash is of what compaction has left, which members do each in their own time.
    hashes: dict[int, dict[str, int]] = {}
    for member, answer in zip(answering, found, strict=True):
        if answer is not None:
            hashes.setdefault(answer.compact_revision, {})[member.name] = answer.hash
    for compacted, by_member in hashes.items():
        if len(set(by_member.values())) > 1:
            raise EtcdDiverged(
                f"etcd's members differ at revision {revision}, compacted at {compacted}: "
                f"{by_member}; see etcd #13766, and blame xllm for nothing"
            )
    return f"etcd revision={revision} members={len(answering)} hashes={hashes}"


async def _hash_kv(member: EtcdMember, revision: int) -> Any:
    """HashKV up to a revision, 0 for the present one; None if there is no answer.

    Not by etcd's JSON gateway: there the same path is the hash of all that a member has on disk.
    """
    async with grpc.aio.insecure_channel(member.address) as channel:
        try:
            return await pb.MaintenanceStub(channel).HashKV(
                pb.HashKVRequest(revision=revision), timeout=5
            )
        except grpc.RpcError:
            return None


async def check_indexes(cluster: ChaosCluster, cases: Sequence[Case]) -> str:
    """Every master's index is what the workers hold, by count of each worker's tiers and by name
    of each prompt's blocks; returns a line.

    Raises: AssertionError if it does not become so within `INDEX_LAG_S`.
    """
    deadline = time.monotonic() + INDEX_LAG_S
    num_blocks = 0
    for master in cluster.masters:
        while True:
            num_blocks, differences = await asyncio.to_thread(_compare_counts, master)
            if not differences:
                break
            assert time.monotonic() < deadline, f"{master.name}: {differences}"
            await asyncio.sleep(0.5)
        for case in cases:
            await asyncio.to_thread(_compare_prompt, master, case)
    assert num_blocks, "nothing is indexed"
    return f"indexes masters={len(cluster.masters)} blocks={num_blocks} prompts={len(cases)}"


def _compare_counts(master: Master) -> tuple[int, list[str]]:
    """Blocks in the index of one master, and where it differs from what workers report."""
    with urllib.request.urlopen(f"{master.operator_url}/admin/cluster", timeout=10) as response:
        workers = json.load(response)["workers"]
    num_blocks, differences = 0, []
    for worker in workers:
        for tier, counts in worker["tiers"].items():
            indexed, used = counts.get("indexed_blocks", 0), counts.get("used_blocks", 0)
            num_blocks += indexed
            if indexed != used:
                differences.append(f"{worker['worker_id']} {tier}: {used} held, {indexed} indexed")
    return num_blocks, differences


def _compare_prompt(master: Master, case: Case) -> None:
    prompt = {name: case.body[name] for name in ("messages",) if name in case.body}
    body = prompt or {"text": case.body["prompt"]}
    answer = _post(f"{master.operator_url}/admin/cache/lookup", body)
    assert answer["complete"], answer
    for worker_id, found in answer["workers"].items():
        held = {tier: n for tier, n in found["matched_tokens_by_tier"].items() if n}
        assert found["indexed_tokens_by_tier"] == held, (
            f"{master.name} about {case.name} at {worker_id}: {found}"
        )


def _post(url: str, body: object) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        answer: dict[str, Any] = json.load(response)
        return answer
