"""JSON bodies with a very long prompt of token ids, parsed a slice at a time.

A JSON parser keeps the interpreter to itself until it is done, on whatever thread: 5 ms for 131,072
token ids, in which no other client gets a token. So such an array is cut out, parsed in slices, and
put back; between slices the event loop runs.

The array is recognised by the bytes in front of it: a quote that no backslash precedes cannot be
inside a string and stand before a name and `":` at once, so nothing in a text is taken for it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import Any

import orjson

LONG_BODY_BYTES = 128 << 10
SLICE_BYTES = 64 << 10
_NAMES = (b"prompt", b"tokens")
_ARRAY = re.compile(rb"\s*:\s*\[(?=\s*[0-9])")
_NUMBERS = b"0123456789, \t\r\n"


async def loads(raw: bytes) -> Any:
    """As `orjson.loads`. Raises: orjson.JSONDecodeError."""
    if len(raw) > LONG_BODY_BYTES:
        for name in _NAMES:
            start, end = _find_array(raw, name)
            if end - start > SLICE_BYTES:
                try:
                    return await _in_slices(raw, name.decode(), start, end)
                except (orjson.JSONDecodeError, _NotSoSimple):
                    break  # then the whole is parsed, for what is wrong with it
    return orjson.loads(raw)


def _find_array(raw: bytes, name: bytes) -> tuple[int, int]:
    """Where the inside of the first array of numbers called `name` starts and ends; (0, 0): there
    is none."""
    quoted, at = b'"%b"' % name, -1
    while (at := raw.find(quoted, at + 1)) >= 0:
        match = _ARRAY.match(raw, at + len(quoted))
        if match is not None and raw[at - 1 : at] != b"\\":
            return match.end(), raw.find(b"]", match.end())
    return 0, 0


class _NotSoSimple(Exception):
    """The array holds something else, or is not where it seemed to be."""


async def _in_slices(raw: bytes, name: str, start: int, end: int) -> Any:
    """start, end: of the array's inside."""
    mark = secrets.token_hex(16)
    body = orjson.loads(b'%b"%b"%b' % (raw[: start - 1], mark.encode(), raw[end + 1 :]))
    if not isinstance(body, dict) or body.get(name) != mark:
        raise _NotSoSimple
    numbers: list[int] = []
    while start < end:
        stop = end
        if start + SLICE_BYTES < end and (stop := raw.find(b",", start + SLICE_BYTES, end)) < 0:
            stop = end
        piece = raw[start:stop]
        if piece.translate(None, _NUMBERS):
            raise _NotSoSimple
        parsed = orjson.loads(b"[%b]" % piece)
        if not parsed:
            raise _NotSoSimple
        numbers += parsed
        start = stop + 1
        await asyncio.sleep(0)
    if raw[end - 1 : end] == b",":
        raise _NotSoSimple
    body[name] = numbers
    return body
