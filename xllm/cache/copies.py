"""What mover threads run: copies between device, host and disk, with their checksums.

A block's checksum is computed when it first leaves the device and verified whenever it comes back.
Nothing here knows names, states or pins, and nothing here is called on the engine's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from xllm.cache.disk_tier import Attachment
from xllm.cache.host_tier import DeviceBlocks, HostTier
from xllm.cache.slab import aligned_buffer, is_aligned
from xllm.cache.slab_format import Buffer, checksum_of


def store(device: DeviceBlocks, block_ids: Sequence[int], targets: Sequence[Buffer]) -> list[bytes]:
    """Copies blocks off the device; returns their checksums.

    targets: at least `block_bytes` each.
    """
    device.copy_out(block_ids, targets)
    return [checksum_of(target[: device.block_bytes]) for target in targets]


def load_from_host(
    host: HostTier,
    slots: Sequence[int],
    checksums: Sequence[bytes],
    device: DeviceBlocks,
    block_ids: Sequence[int],
) -> list[bool]:
    """Copies slots to the device, and says which are sound; what others then hold is undefined."""
    sound = []
    for slot, checksum, block_id in zip(slots, checksums, block_ids, strict=True):
        source = host.slot(slot)
        device.copy_in([block_id], [source])
        # The copy is still in this core's cache, where it is on the CPU.
        copied = device.view(block_id)
        payload = source[: device.block_bytes] if copied is None else copied
        sound.append(checksum_of(payload) == checksum)
    return sound


def load_from_disk(
    attachment: Attachment,
    slots: Sequence[int],
    checksums: Sequence[bytes],
    device: DeviceBlocks,
    block_ids: Sequence[int],
) -> list[bool]:
    """Reads slots to the device; says which are sound. Raises: TierIOError.

    Straight into the device's blocks where the disk can address them: what an unsound block then
    holds is undefined.
    """
    stride = attachment.slot_stride
    views = [view for view in map(device.view, block_ids) if view is not None]
    if len(views) == len(block_ids) and all(
        view.nbytes == stride and (is_aligned(view) or not attachment.is_direct) for view in views
    ):
        return attachment.read_blocks(slots, views, checksums)
    scratch = _scratch(stride * len(block_ids))
    targets = [scratch[start : start + stride] for start in range(0, scratch.nbytes, stride)]
    sound = attachment.read_blocks(slots, targets, checksums)
    _copy_sound(device, targets, block_ids, sound)
    return sound


def _copy_sound(
    device: DeviceBlocks, sources: Sequence[Buffer], block_ids: Sequence[int], sound: list[bool]
) -> None:
    wanted = [i for i, is_sound in enumerate(sound) if is_sound]
    device.copy_in([block_ids[i] for i in wanted], [sources[i] for i in wanted])


_thread = threading.local()


def _scratch(num_bytes: int) -> Buffer:
    """Aligned memory of this thread, until its next call: fresh pages cost as much as a copy."""
    buffer: Buffer | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.nbytes < num_bytes:
        buffer = _thread.buffer = aligned_buffer(num_bytes)
    return buffer[:num_bytes]
