"""Schemas that bound an answer, and a load of answers that have to be valid.

What `max_tokens` cuts is not JSON. So every string, number and list here is bounded, and
`MAX_TOKENS` is more than the longest answer: a token is at least a byte, white space included.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import jsonschema

_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_read=300)
MAX_TOKENS = 1500


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(length: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": length}


_AGE = {"type": "integer", "minimum": 0, "maximum": 120}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": _object(
        name=_text(20),
        age=_AGE,
        email={"type": "string", "pattern": "^[a-z]{1,8}@[a-z]{1,8}\\.org$"},
    ),
    "list": {
        "type": "array",
        "minItems": 1,
        "maxItems": 4,
        "items": _object(
            id={"type": "integer", "minimum": -9, "maximum": 99}, done={"type": "boolean"}
        ),
    },
    "tree": {
        "$defs": {"leaf": _object(label=_text(8), kind={"enum": ["a", "b", None, 3]})},
        **_object(
            root={"$ref": "#/$defs/leaf"},
            leaves={"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 3},
        ),
    },
    "choice": {
        "anyOf": [
            _object(kind={"const": "text"}, text=_text(30)),
            # Not a date: of these, grammars know no leap years (docs/api.md).
            _object(
                kind={"const": "month"}, month={"type": "string", "pattern": "^[12]\\d{3}-\\d\\d$"}
            ),
        ]
    },
}


@dataclass
class Tally:
    """What became of the answers."""

    num_valid: int = 0
    num_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    """What is wrong with the others, each with its text."""
    workers: set[str] = field(default_factory=set)


async def ask_for_answers(
    url: str,
    model: str,
    count: int,
    *,
    concurrency: int = 32,
    on_answer: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """`count` answers at temperature 1, the schemas in turns, each of another seed.

    `on_answer` is called after each.
    """
    tally = Tally()
    limit = asyncio.Semaphore(concurrency)

    async def ask(number: int) -> None:
        name = list(SCHEMAS)[number % len(SCHEMAS)]
        schema = SCHEMAS[name]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"Make up a {name}, number {number}."}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": name, "schema": schema, "strict": True},
            },
            "temperature": 1.0,
            "seed": number,
            "max_tokens": MAX_TOKENS,
        }
        async with limit:
            answer = await until_accepted(body)
        try:
            [choice] = answer["choices"]
            text = choice["message"]["content"]
            assert choice["finish_reason"] == "stop", choice["finish_reason"]
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
            tally.num_valid += 1
            tally.num_tokens += answer["usage"]["completion_tokens"]
        except (AssertionError, KeyError, ValueError, jsonschema.ValidationError) as error:
            tally.wrong.append(f"{name} {number}: {error!r} in {answer}")
        on_answer(tally)

    async def until_accepted(body: dict[str, Any]) -> dict[str, Any]:
        """As clients do: who is told to try again later does."""
        while True:
            async with http.post(f"{url}/v1/chat/completions", json=body) as response:
                answer: dict[str, Any] = await response.json()
                if response.status not in (429, 503):
                    tally.workers.add(response.headers.get("x-xllm-worker-id", ""))
                    return answer
                seconds = float(response.headers["Retry-After"])
            await asyncio.sleep(seconds)

    async with aiohttp.ClientSession(timeout=_TIMEOUT) as http, asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(ask(number))
    return tally
