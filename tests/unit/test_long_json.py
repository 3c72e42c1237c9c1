"""Long token arrays parsed in slices: the same as in one go, whatever the body looks like."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest

from xllm.roles.api import long_json

IDS = [random.Random(1).randrange(49152) for _ in range(40_000)]
LONG_TEXT = "x" * (long_json.LONG_BODY_BYTES + 1)
QUOTED_ARRAY = '"prompt": [1,' + "2," * long_json.LONG_BODY_BYTES + "3]"


class Slices:
    """Counts how often the event loop was let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        monkeypatch.setattr(long_json.asyncio, "sleep", self._sleep)

    async def _sleep(self, _: float) -> None:
        self.number += 1


@pytest.mark.parametrize("name", ["prompt", "tokens"])
@pytest.mark.parametrize("is_indented", [True, False])
async def test_a_long_array_is_parsed_in_slices(
    monkeypatch: pytest.MonkeyPatch, name: str, is_indented: bool
) -> None:
    slices = Slices(monkeypatch)
    body = {"model": "m", name: IDS, "user": QUOTED_ARRAY[:100], "max_tokens": 3}
    raw = orjson.dumps(body, option=orjson.OPT_INDENT_2 if is_indented else 0)
    assert await long_json.loads(raw) == body
    assert slices.number >= len(raw) // long_json.SLICE_BYTES


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": LONG_TEXT},
        {"prompt": QUOTED_ARRAY},
        {"messages": [{"content": QUOTED_ARRAY}]},
        {'a\\"prompt': IDS},
        {'"prompt': IDS},
        {"prompt": [IDS[:20_000], IDS[20_000:]]},
        {"inner": {"prompt": IDS}, "prompt": "short"},
        {"prompt": [*IDS, -1]},
        {"prompt": [*IDS, 1.5, "7", None]},
        {"prompt": [*IDS, [3]]},
        {"prompt": [5], "tokens": IDS},
        [{"prompt": IDS}],
        {"prompt": IDS, "tokens": IDS},
    ],
)
async def test_whatever_else_comes_is_as_parsed_in_one_go(body: Any) -> None:
    raw = orjson.dumps(body)
    assert await long_json.loads(raw) == orjson.loads(raw)


@pytest.mark.parametrize(
    ("good", "bad"),
    [(b",", b",,"), (b",", b" "), (b"]", b",]"), (b"]", b""), (b"}", b""), (b"10,", b"010,")],
)
async def test_what_is_no_json_is_refused(good: bytes, bad: bytes) -> None:
    raw = orjson.dumps({"prompt": [*IDS, 10, 0], "max_tokens": 3})
    at = raw.rindex(good, 0, raw.rindex(b"]") + 1) if good != b"}" else len(raw) - 1
    raw = raw[:at] + bad + raw[at + len(good) :]
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(raw)
    with pytest.raises(orjson.JSONDecodeError):
        await long_json.loads(raw)


async def test_the_last_of_two_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = b'{"prompt": %b, "prompt": [1]}' % orjson.dumps(IDS)
    assert await long_json.loads(raw) == {"prompt": [1]}
