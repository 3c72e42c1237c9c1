"""What a peer process does: loads its engine, then measures what it is asked for on stdin.

Both sides give one function, `generate(prompts, max_tokens)`, which returns when every prompt has
its greedy tokens; the measurements are made of it here, so they are the same for both. Standard
library only: this also runs in the other engine's environment.

    {"kind": "decode", "size": sequences}    -> tokens per second at a context of about 512
    {"kind": "prefill", "size": tokens}      -> tokens per second
    {"kind": "hit", "size": tokens}          -> seconds to the first token of a cached prompt
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], None]

DECODE_CONTEXT = 512
DECODE_TOKENS = 48


def serve(load: Callable[[], tuple[Generate, int]]) -> None:
    """`load` returns the function and the size of the vocabulary. What libraries print goes to
    stderr; "ready", and then one number per request, to stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench = _Bench(*load())
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        value = getattr(bench, request["kind"])(request["size"])
        print(json.dumps(value), file=answers, flush=True)


class _Bench:
    def __init__(self, generate: Generate, vocab_size: int) -> None:
        self._generate = generate
        self._vocab_size = vocab_size
        self._random = random.Random(0)
        self._cached: dict[int, list[int]] = {}
        self._contexts: list[list[int]] = []

    def decode(self, num_seqs: int) -> float:
        """The difference of a long and a short output of prompts that are in the cache."""
        while len(self._contexts) < num_seqs:
            self._contexts.append(self._prompt(DECODE_CONTEXT))
            self._generate(self._contexts[-1:], 1)
        prompts = self._contexts[:num_seqs]
        short_s = self._seconds(prompts, 1)
        long_s = self._seconds(prompts, 1 + DECODE_TOKENS)
        return num_seqs * DECODE_TOKENS / (long_s - short_s)

    def prefill(self, num_tokens: int) -> float:
        return num_tokens / self._seconds([self._prompt(num_tokens)], 1)

    def hit(self, num_tokens: int) -> float:
        prompt = self._cached.get(num_tokens)
        if prompt is None:
            prompt = self._cached[num_tokens] = self._prompt(num_tokens)
        # Once more each time: others' prompts may have driven it out.
        self._generate([prompt], 1)
        return self._seconds([prompt], 1)

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(num_tokens)]

    def _seconds(self, prompts: list[list[int]], max_tokens: int) -> float:
        started = time.perf_counter()
        self._generate(prompts, max_tokens)
        return time.perf_counter() - started
