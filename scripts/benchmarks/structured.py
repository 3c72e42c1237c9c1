"""What a schema costs a token: eight streams at once with one, and the same without, in turns.

TPOT of a request is (last - first token) / (tokens - 1); of a round, the median of its requests.
Both sides draw at temperature 1 and end by `max_tokens`: the schema wants more items than fit.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from statistics import median
from typing import Any

import uvloop

from benchmarks.engine_steps import random_tokens
from benchmarks.engine_streams import Stream
from benchmarks.report import Row, at_most, plain
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.grammar import GrammarCompiler
from xllm.engine.runner import Runner
from xllm.model_store import resolve_model
from xllm.protocol import GenerateRequest, SamplingParams
from xllm.roles.api.grammars import json_grammar

SUMMARY = "time per output token with a schema against without"

NUM_STREAMS = 8
PROMPT_TOKENS = 128
MAX_RATIO = 1.05
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "size": {"type": "number"},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        },
        "required": ["name", "age", "size", "tags"],
        "additionalProperties": False,
    },
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id; the default model if not given")
    parser.add_argument("--num_threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--max_tokens", type=int, default=128, help="per request")


def run(options: argparse.Namespace) -> list[Row]:
    return uvloop.run(_measure(options))


async def _measure(options: argparse.Namespace) -> list[Row]:
    folder = resolve_model(options.model, progress=lambda line: print(line, file=sys.stderr))
    config = EngineConfig(
        device="cpu", num_threads=options.num_threads, max_cache_size=1 << 30, max_model_len=4096
    )
    runner = Runner(config, folder)
    model = runner.model_config
    grammars = GrammarCompiler.of_folder(folder, model.vocab_size, model.eos_token_ids)
    engine = Engine(runner, grammars=grammars)
    await engine.start()
    try:
        rng = random.Random(0)
        prompts = [random_tokens(rng, PROMPT_TOKENS, model.vocab_size) for _ in range(NUM_STREAMS)]
        sides = {"plain": "", "schema": json_grammar(SCHEMA, param="schema")}
        rounds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(options.rounds + 1):
            for side, grammar in sides.items():
                seconds = await _tpot_s(engine, prompts, grammar, options.max_tokens)
                if number:  # the first is for the tokenizer, the prompts and the code
                    rounds[side].append(seconds)
    finally:
        await engine.stop()
    with_schema, without = (median(rounds[side]) * 1e3 for side in ("schema", "plain"))
    return [
        plain("plain_b8", without, "ms/token"),
        at_most("structured_b8", with_schema, "ms/token", without, MAX_RATIO),
    ]


async def _tpot_s(engine: Engine, prompts: list[list[int]], grammar: str, max_tokens: int) -> float:
    streams = []
    for number, prompt in enumerate(prompts):
        stream = Stream(time.perf_counter())
        request = GenerateRequest(
            request_id=f"bench-{number}",
            model_id="",
            prompt_ids=prompt,
            sampling=SamplingParams(
                temperature=1.0,
                seed=number,
                max_tokens=max_tokens,
                min_tokens=max_tokens,
                ignore_eos=True,
                grammar=grammar,
            ),
        )
        stream.handle = engine.submit(request, stream.listen)
        streams.append(stream)
    for stream in streams:
        await stream.has_ended.wait()
        if stream.error is not None:
            raise stream.error
        assert len(stream.times) == max_tokens
    return median((s.times[-1] - s.times[0]) / (len(s.times) - 1) for s in streams)
