"""All targets by name."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.block_targets import FetchingEndTarget, ServingEndTarget
from tests.fuzz.cache_targets import EventTarget, IndexTarget, SlabTarget
from tests.fuzz.etcd_targets import RegistryTarget, SealTarget, WordTarget
from tests.fuzz.runner import Target
from tests.fuzz.store_targets import StoreObjectTarget
from tests.fuzz.stream_targets import FrameTarget, MasterEndTarget, WorkerEndTarget
from tests.fuzz.text_targets import BodyTarget, FlagTarget

TARGETS: dict[str, Callable[[], Target]] = {
    "frames": FrameTarget,
    "worker_stream": WorkerEndTarget,
    "master_stream": MasterEndTarget,
    "block_server": ServingEndTarget,
    "block_client": FetchingEndTarget,
    "events": EventTarget,
    "index": IndexTarget,
    "slab": SlabTarget,
    "store_objects": StoreObjectTarget,
    "registry": RegistryTarget,
    "words": WordTarget,
    "seals": SealTarget,
    "flags": FlagTarget,
    "http": BodyTarget,
}
