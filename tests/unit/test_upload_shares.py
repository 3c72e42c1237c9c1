"""How the budget for writes to etcd is divided."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cache.upload_budget import LOAD_REPORT_BYTES, MIN_BYTES_PER_S, MIN_PUTS_PER_S
from xllm.config import IndexConfig
from xllm.protocol import LeaderWord, MasterId, UploadShare, WorkerId
from xllm.roles.upload_shares import HAS_ENOUGH_BLOCKS, WANTS_MORE_BLOCKS, Need, divide

CONFIG = IndexConfig()
QUIET = Need(1000, 0)


def word_for(
    *needs: Need, config: IndexConfig = CONFIG, before: LeaderWord | None = None
) -> LeaderWord:
    by_id = {WorkerId(f"w{i}"): need for i, need in enumerate(needs)}
    return divide(config, MasterId("m"), by_id, before)


def total(word: LeaderWord, num_workers: int) -> tuple[float, float]:
    """Puts and bytes per second of the whole cluster, load reports included."""
    shares = [word.share_of(WorkerId(f"w{i}")) for i in range(num_workers)]
    reports = num_workers / word.load_period_s
    return (
        reports + sum(share.puts_per_s for share in shares if share),
        reports * LOAD_REPORT_BYTES + sum(share.bytes_per_s for share in shares if share),
    )


@given(
    st.lists(st.integers(0, 3 * WANTS_MORE_BLOCKS), max_size=40),
    st.integers(10, 100_000),
    st.integers(10_000, 100_000_000),
)
def test_nobody_exceeds_the_budget_but_by_the_least_that_everybody_needs(
    pending: list[int], puts_per_s: int, bytes_per_s: int
) -> None:
    config = IndexConfig(max_upload_puts_per_s=puts_per_s, max_upload_bytes_per_s=bytes_per_s)
    word = word_for(*(Need(0, n) for n in pending), config=config)
    puts, num_bytes = total(word, len(pending))
    least_bytes = len(pending) * (LOAD_REPORT_BYTES + MIN_BYTES_PER_S)
    assert puts <= puts_per_s * 1.01 + len(pending) * MIN_PUTS_PER_S
    assert num_bytes <= bytes_per_s * 1.01 + least_bytes


def test_alone_with_the_whole_budget() -> None:
    word = word_for(QUIET)
    assert word.share == UploadShare(puts_per_s=999.0, bytes_per_s=10_000_000 - LOAD_REPORT_BYTES)
    assert word.wanting == []
    assert word.load_period_s == 1.0


def test_all_of_the_budget_is_given_out() -> None:
    needs = [QUIET] * 6 + [Need(10**6, 10**5)] * 2
    puts, num_bytes = total(word_for(*needs), 8)
    assert puts == pytest.approx(1000, rel=0.01)
    assert num_bytes == pytest.approx(10e6, rel=0.01)


def test_who_wants_more_gets_more_and_silent_ones_can_still_speak_at_once() -> None:
    word = word_for(*[QUIET] * 9, Need(10**6, 10**5))
    assert word.wanting == ["w9"]
    quiet, busy = word.share_of(WorkerId("w0")), word.share_of(WorkerId("w9"))
    assert quiet is not None
    assert busy is not None
    assert quiet.puts_per_s == pytest.approx(990 / 20, abs=0.01)
    assert busy.puts_per_s == pytest.approx(990 / 20 + 990 / 2, abs=0.01)


def test_it_does_not_change_its_mind_with_each_report() -> None:
    begins = word_for(QUIET, Need(10**6, WANTS_MORE_BLOCKS))
    assert begins.wanting == ["w1"]
    between = Need(10**6, (WANTS_MORE_BLOCKS + HAS_ENOUGH_BLOCKS) // 2)
    assert word_for(QUIET, between).wanting == []
    assert word_for(QUIET, between, before=begins).wanting == ["w1"]
    assert word_for(QUIET, Need(10**6, 10), before=begins).wanting == []


def test_where_all_want_more_nobody_gets_more() -> None:
    word = word_for(*[Need(10**6, 10**5)] * 4)
    assert word == word_for(*[Need(10**6, 0)] * 4)


def test_reports_become_rarer_before_they_take_all_puts() -> None:
    word = word_for(*[QUIET] * 2000)
    assert word.load_period_s == 4.0
    assert word.share is not None
    assert word.share.puts_per_s == pytest.approx(0.25)


def test_what_does_not_fit_into_masters_is_shared_out_and_small_ones_keep_all() -> None:
    config = IndexConfig(max_index_blocks=10_000)
    word = word_for(Need(1000, 0), Need(50_000, 0), Need(9_000, 0), config=config)
    assert word.share is not None
    assert 4000 <= word.share.max_blocks <= 4500
    assert word_for(Need(1000, 0), Need(9000, 0), config=config).share != word.share
    fits = word_for(Need(1000, 0), Need(9000, 0), config=config).share
    assert fits is not None
    assert fits.max_blocks == 0


def test_nobody_is_there() -> None:
    assert word_for().share is not None
