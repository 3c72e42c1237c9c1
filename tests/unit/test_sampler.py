"""The sampler against the definition by sorting, and its promises about reproducibility."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.engine.sampler import (
    Draw,
    SampledTokens,
    SamplingBatch,
    Score,
    TokenHistory,
    sample,
    uniform,
)
from xllm.protocol import SamplingParams

VOCAB = 300


def make_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * 3


def sample_one(logits: torch.Tensor, params: SamplingParams, **fields: object) -> SampledTokens:
    entry = Draw(params, index=0, position=0, **fields)  # type: ignore[arg-type]
    return sample(logits.clone().unsqueeze(0), SamplingBatch([entry]))


def kept_by_sorting(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The distribution [V] that min_p, top_k and top_p define, by sorting, in float64."""
    probs = torch.softmax(logits.double() / params.temperature, dim=0).numpy()
    order = np.argsort(-probs, kind="stable")
    by_rank = probs[order]
    by_rank[by_rank < params.min_p * by_rank[0]] = 0
    if params.top_k > 0:
        by_rank[params.top_k :] = 0
    by_rank /= by_rank.sum()
    mass_before = np.cumsum(by_rank) - by_rank
    by_rank[(mass_before >= params.top_p) & (mass_before > 0)] = 0
    result = np.zeros_like(probs)
    result[order] = by_rank / by_rank.sum()
    return result


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 200] = logits[1, 70] = 5.0
    logits[2, VOCAB - 1] = 1.0
    rows = [Draw(SamplingParams(temperature=0.0), 0, 0)] * 3
    assert sample(logits, SamplingBatch(rows)).token_ids == [0, 70, VOCAB - 1]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(SamplingParams(temperature=1.0), id="plain"),
        pytest.param(SamplingParams(temperature=0.7, top_p=0.9), id="top_p"),
        pytest.param(SamplingParams(temperature=1.5, top_p=0.3), id="small_top_p"),
        pytest.param(SamplingParams(top_k=5), id="top_k"),
        pytest.param(SamplingParams(temperature=1.3, min_p=0.05), id="min_p"),
        pytest.param(
            SamplingParams(temperature=1.3, min_p=0.02, top_k=30, top_p=0.95), id="all_three"
        ),
    ],
)
def test_draws_have_the_distribution_that_sorting_defines(params: SamplingParams) -> None:
    """Chi-squared over many positions of one seed: so the positions are independent, too."""
    logits = make_logits(1)[0]
    expected = kept_by_sorting(logits, params)
    num_draws = 4_000
    counts: Counter[int] = Counter()
    for start in range(0, num_draws, 1_000):
        rows = [Draw(params, index=0, position=start + i) for i in range(1_000)]
        counts.update(sample(logits.repeat(1_000, 1), SamplingBatch(rows)).token_ids)
    assert all(expected[token_id] > 0 for token_id in counts)
    frequent = np.flatnonzero(expected * num_draws >= 5)
    rare_share = 1 - expected[frequent].sum()
    observed = [counts[int(token_id)] for token_id in frequent]
    chi_squared = sum(
        (seen - share * num_draws) ** 2 / (share * num_draws)
        for seen, share in zip(observed, expected[frequent], strict=True)
    )
    freedom = len(frequent) - (0 if rare_share > 0 else 1)
    # Six standard deviations of a chi-squared with this many degrees of freedom.
    assert chi_squared < freedom + 6 * math.sqrt(2 * max(freedom, 1)) + 6
    assert num_draws - sum(observed) == pytest.approx(
        rare_share * num_draws, abs=6 * math.sqrt(rare_share * num_draws) + 1
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.0, 1.0),
    top_k=st.integers(0, VOCAB + 5),
    min_p=st.floats(0, 1),
    levels=st.sampled_from([None, 2, 5]),
)
def test_what_is_drawn_is_inside(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float, levels: int | None
) -> None:
    """Also with few distinct logits, where ties at the cut stay together."""
    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    logits = make_logits(1, seed % 1000)[0]
    if levels is not None:
        logits = (logits / 3).clamp(-2, 2).mul(levels / 4).round()
    token_id = sample_one(logits, params).token_ids[0]
    probs = torch.softmax(logits.double() / temperature, dim=0)
    drawn = float(probs[token_id])
    likelier = probs > drawn * (1 + 1e-5)
    assert drawn >= min_p * float(probs.max()) * (1 - 1e-4)
    if top_k > 0:
        assert int(likelier.sum()) < top_k
    floor = torch.sort(probs, descending=True).values[min(top_k or VOCAB, VOCAB) - 1]
    left = probs[(probs >= floor) & (probs >= min_p * probs.max())].sum()
    assert float(probs[likelier].sum() / left) <= top_p + 1e-4


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = make_logits(64)
    kinds = [
        SamplingParams(temperature=0.9, top_p=0.7),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.4, top_k=20, logprobs=2),
        SamplingParams(temperature=1.0),
    ]
    rows = [Draw(kinds[i % 4], index=i % 3, position=i) for i in range(64)]
    together = sample(logits.clone(), SamplingBatch(rows)).token_ids
    alone = [
        sample(logits[i : i + 1].clone(), SamplingBatch([rows[i]])).token_ids[0] for i in range(64)
    ]
    assert together == alone


def test_uniforms_differ_in_every_argument_and_are_uniform() -> None:
    """Fixed values: a request that is retried on a newer worker draws the same tokens."""
    assert uniform(0, 0, 0) == 0.1296456182997474
    assert uniform(1, 2, 3) == 0.07166370763826013
    values = [uniform(*key) for key in product((0, 1, 2**63 - 1, -5), range(5), range(40), (0, 1))]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    assert np.mean(values) == pytest.approx(0.5, abs=0.03)
    assert np.var(values) == pytest.approx(1 / 12, abs=0.01)


def test_penalties_see_output_and_repetition_sees_the_prompt_too() -> None:
    params = SamplingParams(
        temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0
    )
    history = TokenHistory(VOCAB, prompt_ids=[1, 2, 2], output_ids=[2, 3])
    history.append(3)
    history.append(4)
    logits = torch.full((VOCAB,), -1.0)
    logits[2] = 4.0
    history.penalize(logits, params)
    assert logits[:6].tolist() == [-1.0, -2.0, 2.0 - 0.75, -2.0 - 1.0, -2.0 - 0.75, -1.0]


def test_history_grows_past_its_first_capacity() -> None:
    history = TokenHistory(5000, prompt_ids=[7])
    for token_id in range(1000):
        history.append(token_id)
    history.append(999)
    logits = torch.zeros(5000)
    history.penalize(logits, SamplingParams(frequency_penalty=1.0))
    assert logits[:999].eq(-1).all()
    assert logits[999] == -2
    assert logits[1000:].eq(0).all()


def test_bias_and_suppression_decide_a_greedy_draw() -> None:
    logits = make_logits(1)[0]
    best = int(logits.argmax())
    greedy = SamplingParams(temperature=0.0)
    assert sample_one(logits, greedy, suppressed=[best]).token_ids[0] != best
    biased = SamplingParams(temperature=0.0, logit_bias={11: 100.0})
    assert sample_one(logits, biased).token_ids == [11]


def test_logprobs_are_the_models_own() -> None:
    """Before temperature, bias and suppression; the alternatives best first."""
    logits = make_logits(3)
    expected = torch.log_softmax(logits, dim=1)
    rows = [
        Draw(SamplingParams(temperature=0.0, logit_bias={9: 100.0}, logprobs=3), 0, 0),
        Score(token_id=17, num_top=0),
        Draw(SamplingParams(temperature=0.0), 0, 0),
    ]
    sampled = sample(logits.clone(), SamplingBatch(rows))
    assert sampled.token_ids[:2] == [9, 17]
    first, second, third = sampled.logprobs
    assert first is not None
    assert second is not None
    assert third is None
    assert first.logprob == pytest.approx(float(expected[0, 9]), abs=1e-5)
    best = expected[0].topk(3)
    assert [token_id for token_id, _ in first.top] == best.indices.tolist()
    assert [logprob for _, logprob in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert second.logprob == pytest.approx(float(expected[1, 17]), abs=1e-5)
    assert second.top == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_named_and_harms_no_other(temperature: float) -> None:
    logits = make_logits(4)
    params = SamplingParams(temperature=temperature, top_p=0.9)
    rows = [Draw(params, 0, position) for position in range(4)]
    healthy = sample(logits.clone(), SamplingBatch(rows)).token_ids
    logits[1, 5] = math.nan
    logits[3, 5] = math.inf
    sampled = sample(logits, SamplingBatch(rows))
    assert sampled.faulty_rows == {1, 3}
    assert [sampled.token_ids[0], sampled.token_ids[2]] == [healthy[0], healthy[2]]


def test_extreme_parameters_still_draw_the_likeliest() -> None:
    logits = make_logits(1)[0]
    best = int(logits.argmax())
    for params in (
        SamplingParams(temperature=1e-4),
        SamplingParams(temperature=1e-30),
        SamplingParams(top_p=0.0),
        SamplingParams(top_k=1),
        SamplingParams(min_p=1.0),
    ):
        assert sample_one(logits, params).token_ids == [best]


def test_a_token_without_mass_is_never_drawn() -> None:
    """The last chunk is mostly padding, and everything but three tokens is suppressed."""
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [3, 255, 299]] = torch.tensor([0.0, 0.0, 0.0])
    rows = [Draw(SamplingParams(), 0, position) for position in range(500)]
    drawn = Counter(sample(logits.repeat(500, 1), SamplingBatch(rows)).token_ids)
    assert set(drawn) == {3, 255, 299}
    assert min(drawn.values()) > 120
