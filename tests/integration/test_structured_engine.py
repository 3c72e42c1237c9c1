"""Grammars in an engine with a model: random weights, so nothing but the grammar makes sense of
what comes out. Everything that may happen to a sample leaves it valid, and the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.fakes import tiny_core, tiny_tokenizer
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.grammar import GrammarCompiler
from xllm.engine.runner import Runner
from xllm.errors import EngineFault, InvalidRequest, RequestError
from xllm.protocol import FinishReason, GenerateRequest, SamplingParams, TokenDelta
from xllm.roles.api import grammars

EOS = 2
TOKENIZER = tiny_tokenizer()
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4
# Bounded, so that no answer is cut: the tokenizer has a token for every byte.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": -5, "maximum": 500},
        "tags": {"type": "array", "items": {"enum": ["red", "green", None]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
GRAMMAR = grammars.json_grammar(SCHEMA, param="x")


@pytest.fixture(params=[300, 20], ids=["roomy", "preempting"])
async def engine(request: pytest.FixtureRequest, tiny_llama: Path) -> AsyncIterator[Engine]:
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        num_threads=1,
        block_size=16,
        max_cache_size=request.param * BLOCK_BYTES,
        max_model_len=300,
        max_seqs_per_batch=16,
    )
    compiler = GrammarCompiler(tiny_core, 320, [EOS])
    engine = Engine(Runner(config, tiny_llama), grammars=compiler)
    await engine.start()
    yield engine
    await engine.stop()


class Answer:
    """All samples of one request."""

    def __init__(
        self, engine: Engine, *, n: int = 1, output_ids: list[int] | None = None, **sampling: Any
    ) -> None:
        params = {"temperature": 1.0, "max_tokens": 250, "grammar": GRAMMAR, "seed": 7}
        self.samples: list[list[int]] = [list(output_ids or ()) for _ in range(n)]
        self.reasons: list[FinishReason | None] = [None] * n
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.handle = engine.submit(
            GenerateRequest(
                request_id="r",
                model_id="m",
                prompt_ids=TOKENIZER.encode("the quick brown fox"),
                n=n,
                output_ids=list(output_ids or ()),
                sampling=SamplingParams(**(params | sampling)),
            ),
            self._hear,
        )

    def _hear(self, item: TokenDelta | RequestError) -> None:
        if isinstance(item, RequestError):
            self._ended.set_exception(item)
            return
        assert item.offset == len(self.samples[item.index])
        self.samples[item.index] += item.token_ids
        self.reasons[item.index] = item.finish_reason
        if None not in self.reasons:
            self._ended.set_result(None)

    async def end(self) -> list[str]:
        """Texts of the samples."""
        await asyncio.wait_for(self._ended, 60)
        texts = []
        for ids, reason in zip(self.samples, self.reasons, strict=True):
            assert reason is FinishReason.STOP
            assert ids[-1] == EOS
            texts.append(TOKENIZER.decode(ids[:-1], skip_special_tokens=False))
        return texts


async def test_all_answers_parse_and_validate_whatever_runs_beside_them(engine: Engine) -> None:
    answers = [
        Answer(engine, seed=seed, n=1 + seed % 4, logprobs=seed % 2 or None) for seed in range(12)
    ]
    texts = [text for answer in answers for text in await answer.end()]
    assert len(texts) == 30
    assert len(set(texts)) > 25
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    is_roomy = engine.kv_cache.pool.num_blocks > 100
    assert (engine.statistics().num_preemptions == 0) == is_roomy
    # The same alone as beside others.
    assert await Answer(engine, seed=3, n=4).end() == await Answer(engine, seed=3, n=4).end()
    again = await Answer(engine, seed=11, n=4, logprobs=1).end()
    assert again == texts[-4:]


async def test_another_worker_goes_on_where_the_first_was_lost(engine: Engine) -> None:
    whole = Answer(engine)
    [text] = await whole.end()
    for cut in (1, len(whole.samples[0]) // 2, len(whole.samples[0]) - 1):
        resubmitted = Answer(engine, output_ids=whole.samples[0][:cut])
        assert await resubmitted.end() == [text]


async def test_min_tokens_and_ignored_eos_give_way_to_the_grammar(engine: Engine) -> None:
    grammar = grammars.regex_grammar("[ab]{2,30}", param="x")
    [text] = await Answer(engine, grammar=grammar, min_tokens=30, max_tokens=40).end()
    assert len(text) == 30
    options: dict[str, Any] = {"min_tokens": 200, "ignore_eos": True}
    [text] = await Answer(engine, grammar=grammar, **options).end()
    assert len(text) == 30


async def test_a_stop_token_ends_an_answer_before_its_grammar_does(engine: Engine) -> None:
    b = TOKENIZER.encode("b")[0]
    grammar = grammars.regex_grammar("a{0,3}b{9}", param="x")
    answer = Answer(engine, grammar=grammar, stop_token_ids=[b], min_tokens=6, max_tokens=40)
    await asyncio.wait_for(answer._ended, 60)
    assert answer.samples[0].count(b) >= 3
    assert len(answer.samples[0]) in (6, 7)


async def test_max_tokens_cuts_an_answer(engine: Engine) -> None:
    answer = Answer(engine, max_tokens=4)
    await asyncio.wait_for(answer._ended, 60)
    assert answer.reasons == [FinishReason.LENGTH]
    assert TOKENIZER.decode(answer.samples[0]).startswith("{")


async def test_what_is_wrong_with_one_request_is_no_matter_to_others(engine: Engine) -> None:
    good = Answer(engine)
    bad = Answer(engine, grammar="start: nothing")
    mismatch = Answer(engine, output_ids=TOKENIZER.encode("xyz"))
    gone = Answer(engine)
    gone.handle.cancel()
    with pytest.raises(InvalidRequest):
        await bad.end()
    with pytest.raises(EngineFault):
        await mismatch.end()
    jsonschema.validate(json.loads((await good.end())[0]), SCHEMA)
    assert gone.samples == [[]]
    assert (await Answer(engine).end()) == (await good.end())


async def test_an_engine_without_grammars_refuses_them(tiny_llama: Path) -> None:
    config = EngineConfig(device="cpu", dtype="float32", num_threads=1, max_cache_size=1 << 24)
    engine = Engine(Runner(config, tiny_llama))
    await engine.start()
    try:
        with pytest.raises(InvalidRequest):
            Answer(engine)
    finally:
        await engine.stop()
