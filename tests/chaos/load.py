"""Clients that know what every answer has to be.

Each case was answered once by an undisturbed cluster. From then on it is asked again and again,
streamed or plain, of any master that runs, and each answer has to be the same, whole and ended
exactly once. The only excuse is a master that was killed meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.chaos.model import MODEL_ID

MIN_MARGIN = 1e-4
"""Between the two likeliest tokens of a greedy case: far above the noise of float32."""

_WORDS = (
    *("river", "stone", "cloud", "engine", "paper", "garden", "winter", "signal", "copper"),
    *("island", "market", "silver", "window", "thunder", "harbor", "lantern", "meadow", "orbit"),
)


@dataclass(frozen=True)
class Case:
    name: str
    path: str
    body: dict[str, Any]


@dataclass
class Answer:
    """The parts of a response that must not depend on what happened meanwhile."""

    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[str]] = field(default_factory=dict)
    """Where log-probabilities were asked for."""
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: tuple[int, int] = (0, 0)
    """Prompt and completion tokens."""

    def add_choice(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        message = choice.get("delta") or choice.get("message") or choice
        self.texts[index] = self.texts.get(index, "") + (
            message.get("content") or message.get("text") or ""
        )
        scores = choice.get("logprobs") or {}
        found = scores.get("tokens") or [item["token"] for item in scores.get("content") or ()]
        if found:
            self.tokens.setdefault(index, []).extend(found)
        if choice.get("finish_reason"):
            if index in self.finish_reasons:
                raise WrongAnswer(f"choice {index} ended twice")
            self.finish_reasons[index] = choice["finish_reason"]

    def add_usage(self, usage: dict[str, Any]) -> None:
        self.usage = (usage["prompt_tokens"], usage["completion_tokens"])


class WrongAnswer(Exception):
    """A client saw something that it must not see."""


class NotAccepted(Exception):
    """429: try again later."""


def make_cases(rng: random.Random, count: int, max_tokens: int) -> list[Case]:
    """Prompts with a few beginnings in common, asked in every way that the API has."""
    beginnings = [" ".join(rng.choices(_WORDS, k=60)) for _ in range(3)]
    greedy: dict[str, Any] = {"temperature": 0}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("greedy", greedy),
        ("chat", greedy),
        ("sampled", {"temperature": 1.0, "seed": 11, "top_p": 0.95}),
        ("samples", {"temperature": 1.0, "seed": 12, "n": 3}),
        ("scored", {**greedy, "logprobs": 2, "echo": True}),
        ("penalties", {"temperature": 0.8, "seed": 13, "frequency_penalty": 0.5}),
    ]
    cases = []
    for number in range(count):
        kind, options = kinds[number % len(kinds)]
        prompt = f"{rng.choice(beginnings)} {' '.join(rng.choices(_WORDS, k=rng.randint(1, 40)))}"
        body: dict[str, Any] = {
            "model": MODEL_ID,
            "max_tokens": rng.randint(max_tokens // 2, max_tokens),
            "ignore_eos": True,
            **options,
        }
        if kind == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
        cases.append(Case(f"{kind}-{number}", path, body))
    return cases


class Client:
    """Asks, and assembles answers. One HTTP session for all."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.gaps: list[tuple[float, float]] = []
        """(when it ended, its length) of each pause over 0.3 s within a streamed answer."""

    async def ask(self, url: str, case: Case, *, stream: bool) -> Answer:
        """Raises: WrongAnswer, NotAccepted, and what aiohttp raises for a broken connection."""
        body = dict(case.body)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._session.post(f"{url}{case.path}", json=body) as response:
            if response.status == 429:
                raise NotAccepted(response.headers["Retry-After"])
            if response.status != 200:
                raise WrongAnswer(f"status {response.status}: {await response.text()}")
            if stream:
                return await self._read_stream(response)
            whole = await response.json()
        answer = Answer()
        for choice in whole["choices"]:
            answer.add_choice(choice)
        answer.add_usage(whole["usage"])
        return answer

    async def _read_stream(self, response: aiohttp.ClientResponse) -> Answer:
        answer = Answer()
        last: float | None = None
        is_done = False
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if is_done:
                raise WrongAnswer(f"after the end: {line!r}")
            if line.strip() == b"data: [DONE]":
                is_done = True
                continue
            now = time.monotonic()
            if last is not None and now - last > 0.3:
                self.gaps.append((now, now - last))
            last = now
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                raise WrongAnswer(f"error event: {chunk['error']}")
            for choice in chunk["choices"]:
                answer.add_choice(choice)
            if chunk.get("usage"):
                answer.add_usage(chunk["usage"])
        if not is_done:
            raise aiohttp.ClientPayloadError("the stream ended without [DONE]")
        return answer

    async def learn(self, url: str, cases: Sequence[Case]) -> dict[str, Answer]:
        """The answers of an undisturbed cluster, without the cases that are too close to a tie."""
        known: dict[str, Answer] = {}
        for case in cases:
            if case.body["temperature"] == 0 and await self._margin(url, case) < MIN_MARGIN:
                continue
            known[case.name] = await self.ask(url, case, stream=False)
        return known

    async def _margin(self, url: str, case: Case) -> float:
        """The least distance between the two likeliest tokens, in log-probability."""
        is_chat = "messages" in case.body
        scores = {"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2}
        async with self._session.post(
            f"{url}{case.path}", json={**case.body, **scores, "echo": False}
        ) as response:
            found = (await response.json())["choices"][0]["logprobs"]
        if is_chat:
            tops = [[top["logprob"] for top in item["top_logprobs"]] for item in found["content"]]
        else:
            tops = [list(top.values()) for top in found["top_logprobs"]]
        return min((max(top) - min(top) for top in tops if len(top) > 1), default=1.0)


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Load:
    """Clients that ask one after the other until they are stopped."""

    def __init__(
        self,
        client: Client,
        cases: Sequence[Case],
        known: dict[str, Answer],
        pick_master: Callable[[], tuple[str, Callable[[], bool]]],
        seed: int,
    ) -> None:
        """`pick_master` gives a URL, and whether that master was killed since."""
        self._client = client
        self._cases = [case for case in cases if case.name in known]
        self._known = known
        self._pick_master = pick_master
        self._seed = seed
        self._is_stopping = False
        self.tally = Tally()

    def stop(self) -> None:
        """After the requests that run."""
        self._is_stopping = True

    async def run(self, num_clients: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_clients):
                rng = random.Random(self._seed * 1000 + number)
                tasks.create_task(self._ask_on_and_on(rng))

    async def _ask_on_and_on(self, rng: random.Random) -> None:
        while not self._is_stopping:
            case = rng.choice(self._cases)
            stream = rng.random() < 0.6
            url, was_killed = self._pick_master()
            outcome = await self._ask_once(case, url, was_killed, stream=stream)
            self.tally.outcomes[outcome] += 1
            if outcome in ("not_accepted", "master_killed"):
                await asyncio.sleep(0.2)

    async def _ask_once(
        self, case: Case, url: str, was_killed: Callable[[], bool], *, stream: bool
    ) -> str:
        wrong = self.tally.wrong
        try:
            answer = await self._client.ask(url, case, stream=stream)
        except NotAccepted:
            return "not_accepted"
        except WrongAnswer as error:
            wrong.append(f"{case.name} stream={stream}: {error}")
            return "wrong"
        except (aiohttp.ClientError, TimeoutError) as error:
            if was_killed():
                return "master_killed"
            wrong.append(f"{case.name} stream={stream} at {url}: {error!r}")
            return "broken"
        if answer != self._known[case.name]:
            wrong.append(
                f"{case.name} stream={stream}: {_difference(answer, self._known[case.name])}"
            )
            return "different"
        return "streamed" if stream else "plain"


def _difference(answer: Answer, known: Answer) -> str:
    for name in ("finish_reasons", "usage", "texts", "tokens"):
        got, wanted = getattr(answer, name), getattr(known, name)
        if got != wanted:
            return f"{name}: got {got!r}, not {wanted!r}"
    return "nothing"
