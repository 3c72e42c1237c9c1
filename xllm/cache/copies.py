"""What mover threads run: copies between device, host and disk, with their checksums.

A block's checksum is computed when it first leaves the device and verified whenever it comes back.
Nothing here knows names, states or pins, and nothing here is called on the engine's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from xllm.cache.disk_tier import Attachment
from xllm.cache.host_tier import DeviceBlocks, HostTier
from xllm.cache.slab import aligned_buffer, is_aligned
from xllm.cache.slab_format import Buffer, checksum_of


def store(device: DeviceBlocks, block_ids: Sequence[int], targets: Sequence[Buffer]) -> list[bytes]:
    """Copies blocks off the device; returns their checksums.

    targets: at least `block_bytes` each.
    """
    checksums: list[bytes] = []
    for part in _parts(device, block_ids):
        device.copy_out(block_ids[part], targets[part])
        checksums += [checksum_of(target[: device.block_bytes]) for target in targets[part]]
    return checksums


def load_from_host(
    host: HostTier,
    slots: Sequence[int],
    checksums: Sequence[bytes],
    device: DeviceBlocks,
    block_ids: Sequence[int],
) -> list[bool]:
    """Copies slots to the device, and says which are sound; what others then hold is undefined."""
    return load(device, [host.slot(slot) for slot in slots], checksums, block_ids)


def load(
    device: DeviceBlocks,
    sources: Sequence[Buffer],
    checksums: Sequence[bytes],
    block_ids: Sequence[int],
) -> list[bool]:
    """The same from anywhere in memory. sources: at least `block_bytes` each."""
    sources = [source[: device.block_bytes] for source in sources]
    sound: list[bool] = []
    for part in _parts(device, block_ids):
        device.copy_in(block_ids[part], sources[part])
        sound += [
            checksum_of(source) == checksum
            for source, checksum in zip(sources[part], checksums[part], strict=True)
        ]
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


def _parts(device: DeviceBlocks, block_ids: Sequence[int]) -> Iterator[slice]:
    """What to copy with one call, of one block at least: block by block where the CPU copies, since
    the block is in the core's cache then when its checksum is computed; else all at once, to wait
    for it once."""
    step = len(block_ids) if device.view(block_ids[0]) is None else 1
    for start in range(0, len(block_ids), step):
        yield slice(start, start + step)


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
