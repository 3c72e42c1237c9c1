"""A step's arrays on their way to a GPU: side by side in page-locked memory, one copy for all.

From pageable memory each array would be a copy of its own that the CPU waits for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16
"""Bytes: what vector loads of kernels want."""


class PinnedStaging:
    """Implements `batch.Staging` with two buffers in turns: while the device reads one step's, the
    next step's is filled. For one thread."""

    def __init__(self, device: torch.device, num_bytes: int = 1 << 20) -> None:
        """num_bytes: of a buffer; it grows when a step needs more."""
        self._device = device
        self._buffers = [_new_buffer(num_bytes) for _ in range(2)]
        self._copied = [_new_event() for _ in range(2)]
        self._turn = 0

    def upload(self, arrays: Sequence[npt.NDArray[np.integer]]) -> list[torch.Tensor]:
        self._turn ^= 1
        offsets, num_bytes = pack_offsets([array.nbytes for array in arrays])
        self._copied[self._turn].synchronize()
        if num_bytes > self._buffers[self._turn].nbytes:
            self._buffers[self._turn] = _new_buffer(2 * num_bytes)
        buffer = self._buffers[self._turn]
        pack(arrays, offsets, buffer.numpy())
        on_device = buffer[:num_bytes].to(self._device, non_blocking=True)
        self._copied[self._turn].record()
        return unpack(arrays, offsets, on_device)


def pack_offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of these sizes in bytes begin, each aligned, and how long they are together."""
    offsets: list[int] = []
    end = 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def pack(
    arrays: Sequence[npt.NDArray[np.integer]],
    offsets: Sequence[int],
    target: npt.NDArray[np.uint8],
) -> None:
    for array, offset in zip(arrays, offsets, strict=True):
        target[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)


def unpack(
    arrays: Sequence[npt.NDArray[np.integer]], offsets: Sequence[int], packed: torch.Tensor
) -> list[torch.Tensor]:
    """Views of `packed` [uint8] with the dtypes and shapes of `arrays`."""
    return [
        packed[offset : offset + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, offset in zip(arrays, offsets, strict=True)
    ]


def _new_buffer(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
