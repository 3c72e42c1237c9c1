"""Inputs that are nearly valid: what is right is taken apart and put together wrongly."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

_EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_WIDE_EDGES = (*_EDGES, 2**62, 2**63 - 1, 2**63, 2**64 - 1)

MAX_BYTES = 1 << 14


def random_bytes(rng: random.Random, max_bytes: int = 200) -> bytes:
    """Anything, short things more often."""
    return rng.randbytes(int(max_bytes * rng.random() ** 2))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` after a few small accidents; empty and much longer results are possible."""
    changed = bytearray(data)
    for _ in range(1 + int(4 * rng.random() ** 2)):
        rng.choice(_ACCIDENTS)(rng, changed)
        del changed[MAX_BYTES:]
    return bytes(changed)


def _place(rng: random.Random, data: bytearray) -> int:
    return rng.randrange(len(data) + 1)


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray) -> None:
    """A number that is just at the border of what fits."""
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice(_WIDE_EDGES) + rng.choice((-1, 0, 0, 0, 1))
    start = _place(rng, data)
    order = rng.choice(("little", "big"))
    data[start : start + width] = (value % (1 << 8 * width)).to_bytes(width, order)


def _cut(rng: random.Random, data: bytearray) -> None:
    start = _place(rng, data)
    del data[start : start + rng.choice((1, 2, 8, len(data)))]


def _insert(rng: random.Random, data: bytearray) -> None:
    start = _place(rng, data)
    data[start:start] = random_bytes(rng, 32)


def _repeat(rng: random.Random, data: bytearray) -> None:
    start = _place(rng, data)
    part = data[start : start + rng.choice((1, 2, 4, 16, 64))]
    data[start:start] = part * rng.choice((1, 2, 30))


def _move(rng: random.Random, data: bytearray) -> None:
    start, target = _place(rng, data), _place(rng, data)
    part = data[start : start + rng.choice((1, 4, 8, 32))]
    data[target : target + len(part)] = part


_ACCIDENTS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    *(_flip, _flip, _overwrite, _overwrite),
    *(_cut, _insert, _repeat, _move),
)


def odd_value(rng: random.Random) -> Any:
    """Something that JSON and msgpack can say and that hardly any field expects."""
    return rng.choice(_ODD_VALUES)(rng)


def _number(rng: random.Random) -> int:
    value = rng.choice(_WIDE_EDGES) * rng.choice((-1, 1)) + rng.choice((-1, 0, 1))
    return min(max(value, -(2**63)), 2**64 - 1)


def _float(rng: random.Random) -> float:
    return rng.choice((0.0, -0.0, 0.5, -1.0, 1e-320, 1e308, -1e308))


def odd_text(rng: random.Random) -> str:
    return rng.choice(
        (
            *(
                "",
                "\0",
                "x" * rng.choice((1, 70, 3000, 4000)),
                "é😀‮",
                "\x7f\r\n",
                "../../etc/passwd",
            ),
            *("0", "-1", "1e400", "nan", "true", "null", "{{ 7 * 7 }}", "%s%n", "[]:0", "9" * 5000),
            *("<|im_end|>", "a b", "/", "[" * 3000, '"', "'", "\\", "\u2028", "\ufeff"),
        )
    )


def _nested(rng: random.Random) -> Any:
    """Deep enough to end a recursion that nobody bounded."""
    value: Any = rng.choice((None, 1, "x"))
    as_list = rng.random() < 0.5
    for _ in range(rng.choice((3, 40, 300, 900))):
        value = [value] if as_list else {"a": value}
    return value


_ODD_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    *(_number, _number, _float, odd_text, odd_text),
    lambda rng: None,
    lambda rng: rng.random() < 0.5,
    lambda rng: [],
    lambda rng: {},
    lambda rng: [_number(rng)] * rng.choice((1, 3, 600)),
    lambda rng: [odd_text(rng), _number(rng)],
    lambda rng: {odd_text(rng): odd_text(rng)},
    _nested,
)


def mutate_value(
    rng: random.Random, value: Any, odd: Callable[[random.Random], Any] = odd_value
) -> Any:
    """A copy of lists, dicts and scalars in which a few places are not what they were.

    odd: what is put there.
    """
    for _ in range(1 + int(3 * rng.random() ** 2)):
        value = _mutate_once(rng, value, odd)
    return value


def _mutate_once(rng: random.Random, value: Any, odd: Callable[[random.Random], Any]) -> Any:
    if not value or not isinstance(value, list | dict) or rng.random() < 0.1:
        # Of the right type it gets further.
        same = {int: _number, float: _float, str: odd_text}.get(type(value))
        return same(rng) if same is not None and rng.random() < 0.6 else odd(rng)
    if isinstance(value, list):
        items = list(value)
        place = rng.randrange(len(items))
        match rng.randrange(8):
            case 0:
                del items[place]
            case 1:
                items.insert(place, odd(rng))
            case 2:
                items.append(items[place])
            case _:
                items[place] = _mutate_once(rng, items[place], odd)
        return items
    fields = dict(value)
    name = rng.choice(list(fields))
    match rng.randrange(8):
        case 0:
            del fields[name]
        case 1:
            fields[odd_text(rng)] = odd(rng)
        case _:
            fields[name] = _mutate_once(rng, fields[name], odd)
    return fields
