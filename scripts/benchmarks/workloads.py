"""What clients ask for: sessions with arrival times, the same for the same seed.

    shared_prefix   groups x prompts: a group's requests begin with the same system prompt
    multi_round     users x rounds: each round repeats the conversation so far
    trace           Mooncake's format: prompts with the lengths and the shared beginnings of a trace

Arrivals are a Poisson process (those of a trace its own), and do not wait for answers; only a
session's next turn does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.trace import read_trace

NAMED_TOKENS = 512
"""A name in a trace stands for so many tokens."""

FIRST_TOKEN, END_TOKEN = 1000, 20000
"""Token ids that prompts are made of: ordinary ones in every usual vocabulary."""

_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world"),
    *("school", "state", "family", "student", "group", "country", "problem", "hand", "part"),
)


@dataclass(frozen=True, slots=True)
class Session:
    """Requests one after the other; most sessions have one."""

    start_s: float
    path: str
    body: Callable[[int, Sequence[str]], dict[str, Any]]
    """Of a turn, given its number and the answers before it."""
    num_turns: int = 1
    think_s: float = 0.0
    """Between an answer and the next turn."""


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Seconds from the start."""
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def shared_prefix(
    *, rate: float, seed: int, groups: int, prompts: int, system: int, question: int, output: int
) -> list[Session]:
    """Lengths in tokens. The order of the requests is random."""
    rng = random.Random(seed)
    systems = [_tokens(rng, system) for _ in range(groups)]
    order = [group for group in range(groups) for _ in range(prompts)]
    rng.shuffle(order)
    questions = random.Random(f"{seed} questions {rate}")
    return [
        Session(
            start_s, "completions", _once([*systems[group], *_tokens(questions, question)], output)
        )
        for group, start_s in zip(order, poisson(rate, rng), strict=False)
    ]


def multi_round(
    *, rate: float, seed: int, users: int, rounds: int, question: int, output: int, think_s: float
) -> list[Session]:
    """`rate` is of requests: users come at a `rounds`-th of it."""
    rng = random.Random(seed)
    sessions = []
    for start_s in islice(poisson(rate / rounds, rng), users):
        texts = [" ".join(rng.choices(_WORDS, k=question)) for _ in range(rounds)]
        sessions.append(Session(start_s, "chat/completions", _chat(texts, output), rounds, think_s))
    return sessions


def trace(*, path: Path, seed: int, divide: int, speedup: float, requests: int) -> list[Session]:
    """The first so many requests; lengths are divided, the clock runs faster."""
    sessions = []
    for request in read_trace(path)[:requests]:
        tokens: list[int] = []
        for name in request.blocks:
            rng = random.Random(f"{seed} {name.hex()}")
            tokens += _tokens(rng, NAMED_TOKENS // divide)
        tokens = tokens[: max(1, request.input_length // divide)]
        output = max(1, request.output_length // divide)
        sessions.append(Session(request.time_s / speedup, "completions", _once(tokens, output)))
    return sessions


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(FIRST_TOKEN, END_TOKEN), k=count)


def _once(prompt: list[int], output: int) -> Callable[[int, Sequence[str]], dict[str, Any]]:
    return lambda turn, answers: {"prompt": prompt, "max_tokens": output}


def _chat(questions: Sequence[str], output: int) -> Callable[[int, Sequence[str]], dict[str, Any]]:
    def body(turn: int, answers: Sequence[str]) -> dict[str, Any]:
        messages = []
        for question, answer in zip(questions, answers, strict=False):
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        messages.append({"role": "user", "content": questions[turn]})
        return {"messages": messages, "max_tokens": output}

    return body
