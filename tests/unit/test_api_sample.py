from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import tiny_tokenizer
from xllm.protocol import FinishReason, TokenDelta, TokenLogprob
from xllm.roles.api.sample import Part, Sample, TextOptions

TOKENIZER = tiny_tokenizer()
END = 1


def delta(
    token_ids: list[int],
    *,
    finish_reason: FinishReason | None = None,
    stop_token_id: int | None = None,
    scored: bool = False,
    prompt_logprobs: list[TokenLogprob | None] | None = None,
) -> TokenDelta:
    return TokenDelta(
        request_id="r",
        attempt=0,
        index=0,
        offset=0,
        token_ids=token_ids,
        finish_reason=finish_reason,
        stop_token_id=stop_token_id,
        logprobs=[TokenLogprob(i, -1.0, []) for i in token_ids] if scored else None,
        prompt_logprobs=prompt_logprobs,
    )


def run(sample: Sample, token_ids: list[int], *, scored: bool = False) -> list[Part]:
    """One token a delta, the last one with the reason LENGTH."""
    parts = []
    for i, token_id in enumerate(token_ids):
        is_last = i == len(token_ids) - 1
        reason = FinishReason.LENGTH if is_last else None
        parts.append(sample.push(delta([token_id], finish_reason=reason, scored=scored)))
        if sample.finished:
            break
    return parts


def text_of(parts: list[Part]) -> str:
    return "".join(part.text for part in parts)


def test_the_stop_tokens_text_is_not_shown_but_counted() -> None:
    sample = Sample(TOKENIZER, TextOptions(skip_special_tokens=False))
    ids = TOKENIZER.encode("fox")
    part = sample.push(delta([*ids, END], finish_reason=FinishReason.STOP, stop_token_id=END))
    assert (part.text, part.finish_reason) == ("fox", "stop")
    assert sample.num_tokens == len(ids) + 1


def test_a_stop_string_ends_the_sample_and_what_follows_is_ignored() -> None:
    sample = Sample(TOKENIZER, TextOptions(stops=["ick"]))
    parts = run(sample, TOKENIZER.encode("the quick brown"))
    assert text_of(parts) == "the qu"
    assert parts[-1].finish_reason == "stop"
    num_tokens = sample.num_tokens
    assert not sample.push(delta([2, 3]))
    assert sample.num_tokens == num_tokens


def test_held_back_text_is_shown_when_the_tokens_end() -> None:
    sample = Sample(TOKENIZER, TextOptions(stops=["brownie"]))
    parts = run(sample, TOKENIZER.encode("the brown"))
    assert text_of(parts) == "the brown"
    assert parts[-1].finish_reason == "length"


def test_stop_strings_count_only_after_min_tokens() -> None:
    ids = TOKENIZER.encode("the fox the fox")
    half = len(TOKENIZER.encode("the fox"))
    sample = Sample(TOKENIZER, TextOptions(stops=["fox"], min_tokens=half))
    assert text_of(run(sample, ids)) == "the fox the "
    # However the tokens are divided into deltas.
    sample = Sample(TOKENIZER, TextOptions(stops=["fox"], min_tokens=half))
    assert sample.push(delta(ids)).text == "the fox the "


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    [first, *_] = TOKENIZER.encode("🦊")
    assert text_of(run(Sample(TOKENIZER, TextOptions()), [first])) == "\ufffd"


def test_without_any_token_there_is_still_an_end() -> None:
    part = Sample(TOKENIZER, TextOptions()).push(delta([], finish_reason=FinishReason.LENGTH))
    assert part == Part(finish_reason=FinishReason.LENGTH)


IDS = st.lists(st.integers(2, TOKENIZER.vocab_size - 1), min_size=1, max_size=20)


@given(IDS, st.lists(st.text("ehot ", min_size=1, max_size=3), max_size=2))
def test_scores_come_with_the_text_of_their_tokens(ids: list[int], stops: list[str]) -> None:
    parts = run(Sample(TOKENIZER, TextOptions(stops=stops, with_scores=True)), ids, scored=True)
    plain = run(Sample(TOKENIZER, TextOptions(stops=stops)), ids)
    assert [part.text for part in parts] == [part.text for part in plain]
    scores = [score for part in parts for score in part.scores]
    shown = text_of(parts)
    # In order, without gaps; only tokens of a stop string are missing at the end.
    assert [score.token_id for score in scores] == ids[: len(scores)]
    offsets = [score.offset for score in scores]
    assert offsets == sorted(offsets)
    assert all(offset <= len(shown) for offset in offsets)
    if parts[-1].finish_reason == "length":
        assert len(scores) == len(ids)
    # A part never scores a token that begins after the text shown so far.
    length = 0
    for part in parts:
        length += len(part.text)
        assert all(score.offset <= length for score in part.scores)


def test_offsets_and_scores_of_a_stopped_text() -> None:
    ids = TOKENIZER.encode("the fox.the")
    sample = Sample(TOKENIZER, TextOptions(stops=["x."], with_scores=True))
    parts = run(sample, ids, scored=True)
    assert text_of(parts) == "the fo"
    scored = [
        (TOKENIZER.token_name(score.token_id), score.offset)
        for part in parts
        for score in part.scores
    ]
    assert scored == [("the", 0), (" fo", 3)]


def test_an_echoed_prompt_comes_first_with_its_scores() -> None:
    prompt = TOKENIZER.encode("the fox")
    sample = Sample(TOKENIZER, TextOptions(with_scores=True), echo_text="the fox", echo_ids=prompt)
    prompt_logprobs = [None, *(TokenLogprob(i, -2.0, [(i, -2.0)]) for i in prompt[1:])]
    [dog] = TOKENIZER.encode("d")
    part = sample.push(delta([dog], scored=True, prompt_logprobs=prompt_logprobs))
    assert part.text == "the foxd"
    assert [score.token_id for score in part.scores] == [*prompt, dog]
    assert [score.logprob for score in part.scores] == [None, -2.0, -2.0, -1.0]
    assert [score.offset for score in part.scores] == [0, 3, 6, 7]
