"""A step's arrays side by side in one buffer."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from xllm.engine.staging import pack, pack_offsets, unpack

arrays_of_a_step = st.lists(
    st.tuples(
        st.sampled_from([np.int32, np.int64]),
        st.one_of(st.tuples(st.integers(0, 9)), st.tuples(st.integers(1, 4), st.integers(1, 5))),
    ),
    min_size=1,
    max_size=7,
)


@given(kinds=arrays_of_a_step)
def test_arrays_come_out_as_they_went_in(kinds: list[tuple[type, tuple[int, ...]]]) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-9, 9, shape).astype(dtype) for dtype, shape in kinds]
    offsets, num_bytes = pack_offsets([array.nbytes for array in arrays])
    assert all(offset % 16 == 0 for offset in offsets)
    buffer = torch.full((num_bytes + 8,), 255, dtype=torch.uint8)
    pack(arrays, offsets, buffer.numpy())
    for array, tensor in zip(arrays, unpack(arrays, offsets, buffer), strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(tensor.numpy(), array)
    assert buffer[num_bytes:].tolist() == [255] * 8
