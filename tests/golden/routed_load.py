"""The oracle's prompts through a whole cluster under load: routed, fetched from peers, moved away
from a worker that is killed."""

from __future__ import annotations

import random
import re
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tests.e2e.processes import Launcher, Master, Worker, post_json, wait_until
from tests.golden.fixtures import GoldenPrompt
from xllm.tokenizer import Tokenizer

REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Ask:
    prompt: GoldenPrompt
    salt: str


@dataclass
class Load:
    """What came of all requests."""

    problems: list[str] = field(default_factory=list)
    cached_by_tier: Counter[str] = field(default_factory=Counter)
    num_answered: int = 0


def asks(prompts: Sequence[GoldenPrompt], num_salts: int, times: int, seed: int = 1) -> list[Ask]:
    """Each prompt with each salt so many times, shuffled."""
    rng = random.Random(seed)
    salts = [f"tenant {number}" for number in range(num_salts)]
    every = [Ask(prompt, salt) for prompt in prompts for salt in salts] * times
    rng.shuffle(every)
    return every


def run_load(
    masters: Sequence[Master],
    tokenizer: Tokenizer,
    every: Sequence[Ask],
    *,
    num_tokens: int,
    num_clients: int,
    at: dict[int, Callable[[], None]] | None = None,
) -> Load:
    """Sends all, `num_clients` at a time, to the masters in turn. `at`: what is done once so many
    are answered, by whoever has the answer."""
    load = Load()
    lock = threading.Lock()
    events = dict(at or {})

    def ask(numbered: tuple[int, Ask]) -> None:
        number, wanted = numbered
        master = masters[number % len(masters)]
        body = {
            "prompt": wanted.prompt.prompt_ids,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "cache_salt": wanted.salt,
        }
        answer = post_json(f"{master.http_url}/v1/completions", body, REQUEST_TIMEOUT_S)
        names = answer["choices"][0]["logprobs"]["tokens"]
        problem = wanted.prompt.mismatch(_ids(names, wanted.prompt, tokenizer))
        if len(names) != num_tokens:
            problem = f"{len(names)} tokens instead of {num_tokens}"
        details = answer["usage"]["prompt_tokens_details"]
        with lock:
            load.num_answered += 1
            load.cached_by_tier.update(details["cached_tokens_by_tier"])
            if problem is not None:
                load.problems.append(f"request {number} ({wanted.salt}): {problem}")
            action = events.pop(load.num_answered, None)
        if action is not None:
            action()

    with ThreadPoolExecutor(num_clients) as clients:
        for future in [clients.submit(ask, item) for item in enumerate(every)]:
            future.result()
    return load


def _ids(names: Sequence[str], prompt: GoldenPrompt, tokenizer: Tokenizer) -> list[int]:
    """The API gives names: those of the oracle's tokens, and -1 for another one."""
    return [
        token_id if tokenizer.token_name(token_id) == name else -1
        for name, token_id in zip(names, prompt.output_ids, strict=False)
    ]


def start_cluster(
    procs: Launcher, num_workers: int, *flags: str
) -> tuple[list[Master], list[Worker]]:
    """Two masters over one etcd: one estimates costs, the other takes each worker in turn, so
    that every worker comes to want what another one has."""
    etcd = procs.etcd()
    all_flags = ("--dtype=float32", "--num_threads=1", "--enable_cache_upload=true", *flags)
    workers = [procs.worker(etcd, *all_flags, wait_ready=False) for _ in range(num_workers)]
    masters = [procs.master(etcd, f"--load_balance_policy={policy}") for policy in ("CAR", "RR")]
    for master in masters:
        wait_until(lambda master=master: _num_ready(master) == num_workers, "the workers", 120)  # type: ignore[misc]
    return masters, workers


def _num_ready(master: Master) -> int:
    with urllib.request.urlopen(f"{master.operator_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.search(r'^xllm_workers\{state="ready"\} (\S+)$', text, re.MULTILINE)
    return int(float(found[1])) if found is not None else 0
