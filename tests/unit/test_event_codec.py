"""The format of the index in etcd: round trips, the documented example, and garbage."""

from __future__ import annotations

import contextlib
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cache import event_codec as codec
from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import BadValue, EventBatch, Head, Section, TierCode
from xllm.protocol import BlockHash

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "index-format.md"

hashes = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9).map(tuple)
tiers = st.sampled_from(TierCode)
stored_sections = st.builds(Section, tiers, st.just(BlockEventKind.STORED), hashes)
sections = st.one_of(
    stored_sections,
    st.builds(Section, tiers, st.just(BlockEventKind.REMOVED), hashes),
    st.builds(Section, tiers, st.just(BlockEventKind.CLEARED)),
)


def batches(of: st.SearchStrategy[Section]) -> st.SearchStrategy[EventBatch]:
    return st.builds(EventBatch, st.lists(of, max_size=6).map(tuple))


@given(batch=batches(sections))
def test_a_delta_is_what_it_was(batch: EventBatch) -> None:
    value = codec.encode_delta(batch)
    assert codec.decode_delta(value) == batch
    assert len(value) == batch.num_bytes


@given(batch=batches(stored_sections))
def test_a_chunk_is_what_it_was(batch: EventBatch) -> None:
    assert codec.decode_chunk(codec.encode_chunk(batch)) == batch


@given(
    st.builds(Head, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
)
def test_a_head_is_what_it_was(head: Head) -> None:
    assert codec.decode_head(codec.encode_head(head)) == head


@given(value=st.binary(max_size=200), prefix=st.sampled_from([b"", b"\1\1", b"\1\2", b"\1\3"]))
def test_garbage_is_refused_or_is_the_one_encoding_of_what_it_says(
    value: bytes, prefix: bytes
) -> None:
    value = prefix + value
    with contextlib.suppress(BadValue):
        assert codec.encode_delta(codec.decode_delta(value)) == value
    with contextlib.suppress(BadValue):
        assert codec.encode_chunk(codec.decode_chunk(value)) == value
    with contextlib.suppress(BadValue):
        assert codec.encode_head(codec.decode_head(value)) == value


@given(batch=batches(sections), data=st.data())
def test_what_is_cut_short_is_never_read_as_more_than_it_is(
    batch: EventBatch, data: st.DataObject
) -> None:
    value = codec.encode_delta(batch)
    cut = value[: data.draw(st.integers(0, len(value)))]
    try:
        read = codec.decode_delta(cut)
    except BadValue:
        return
    assert read.sections == batch.sections[: len(read.sections)]


def test_a_count_that_lies_costs_nothing() -> None:
    value = b"\1\1\x10" + (0xFFFFFFFF).to_bytes(4, "little") + b"\0" * 64
    tracemalloc.start()
    with pytest.raises(BadValue, match="4294967295 hashes in 64 bytes"):
        codec.decode_delta(value)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10_000


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "0 bytes"),
        ("0201", "format version 2"),
        ("0102", "value kind 2"),
        ("010110", "a section has 5"),
        ("01014001000000" + 8 * "00", "unknown section 0x40"),
        ("01011401000000" + 8 * "00", "unknown section 0x14"),
        ("01011000000000", "stored with 0 hashes"),
        ("01013001000000" + 8 * "00", "cleared with 1 hashes"),
    ],
)
def test_a_bad_delta_says_what_is_wrong(value: str, reason: str) -> None:
    with pytest.raises(BadValue, match=reason):
        codec.decode_delta(bytes.fromhex(value))


def test_a_chunk_holds_nothing_but_stored_blocks() -> None:
    with pytest.raises(BadValue, match="removed in a snapshot chunk"):
        codec.decode_chunk(bytes.fromhex("01022001000000" + 8 * "00"))


def test_a_head_has_one_size() -> None:
    with pytest.raises(BadValue, match="a head of 3 bytes"):
        codec.decode_head(b"\1\3\0")


def test_a_chunk_is_as_large_as_allowed_and_no_larger() -> None:
    chunks = list(codec.split_stored(TierCode.HOST, range(10), max_bytes=7 + 8 * 4))
    assert [chunk.num_blocks for chunk in chunks] == [4, 4, 2]
    assert max(len(codec.encode_chunk(chunk)) for chunk in chunks) == 7 + 8 * 4
    assert [h for chunk in chunks for s in chunk.sections for h in s.hashes] == list(range(10))


def test_short_hashes_are_the_first_eight_bytes() -> None:
    names = [BlockHash(bytes(range(i, i + 16))) for i in (0, 100)]
    assert codec.short_hashes(names) == tuple(codec.short_hash(name) for name in names)
    assert codec.short_hash(names[0]) == 0x0706050403020100


def test_the_page_about_the_format_shows_what_the_code_writes() -> None:
    blocks = re.findall(r"^```hex\n(.*?)^```", FORMAT_PAGE.read_text(), re.DOTALL | re.MULTILINE)
    delta, chunk, head = (
        bytes.fromhex("".join(line.partition("#")[0] for line in block.splitlines()))
        for block in blocks
    )
    first, second = 0x0706050403020100, 0x1716151413121110
    assert codec.decode_delta(delta) == EventBatch(
        (
            Section(TierCode.HOST, BlockEventKind.CLEARED),
            Section(TierCode.DEVICE, BlockEventKind.REMOVED, (second,)),
            Section(TierCode.DEVICE, BlockEventKind.STORED, (first, second)),
        )
    )
    assert codec.decode_chunk(chunk) == EventBatch(
        (Section(TierCode.DISK, BlockEventKind.STORED, (first,)),)
    )
    assert codec.decode_head(head) == Head(gen=3, chunks=1, base_seq=258)
