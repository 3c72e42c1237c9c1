"""Twenty prompts of 5 to 3,000 tokens: prose, code, other scripts, numbers.

Only `scripts/golden --regenerate` reads this; the token ids it makes are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

PROMPT_LENGTHS = (
    5, 9, 17, 31, 32, 33, 50, 64, 97, 150, 220, 333, 450, 640, 800, 1000, 1280, 1500, 2200, 3000,
)  # fmt: skip

_OPENINGS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils at 100 degrees Celsius because",
    "Q: Why is the sky blue?\nA:",
]

_SUBJECTS = [
    "The old lighthouse keeper", "A physicist from Kraków", "My neighbour's grey cat",
    "The committee", "Every morning the baker", "An engineer named Ada", "The river",
    "Nobody in the harbour", "The youngest of the three sisters", "A travelling musician",
]  # fmt: skip
_VERBS = [
    "remembered", "measured", "carefully described", "lost sight of", "argued about",
    "repaired", "painted", "carried", "dreamed of", "wrote down",
]  # fmt: skip
_OBJECTS = [
    "the storm of 1987", "a box of forgotten letters", "the temperature of the sea",
    "an unfinished bridge", "seven kinds of bread", "the meaning of the word 'home'",
    "a map without names", "the longest night of the year", "two identical keys",
    "a question that nobody had asked",
]  # fmt: skip
_LINKS = [". Then ", ", although ", "; after that ", ".\n\nMeanwhile, ", ", because ", ". Later "]

_UNICODE = [
    "Größe und Maß: der Fluß fließt über die Straße. ", "Ελλάδα είναι μια όμορφη χώρα. ",
    "東京は日本の首都です。人口は約千四百万人。", "Привет, как дела? Всё хорошо. ",
    "🙂🚀 ∑∫√ π≈3.14159 ", "नमस्ते दुनिया। ", "مرحبا بالعالم. ", "Łódź, Ångström, naïve café, ½ ¼ ¾. ",
]  # fmt: skip


def _prose(seed: int) -> Iterator[str]:
    yield _OPENINGS[seed % len(_OPENINGS)] + " "
    for i in count(seed * 13):
        yield _SUBJECTS[i * 7 % 10] + " " + _VERBS[i * 3 % 10 - i // 10 % 10] + " "
        yield _OBJECTS[(i * 9 + i // 10) % 10] + _LINKS[i * 5 % 6]


def _code(seed: int) -> Iterator[str]:
    yield '"""Statistics of measurements."""\n\nimport math\n\n\n'
    for i in count(seed):
        name = ("mean", "variance", "median", "quantile", "histogram")[i % 5]
        yield f"def {name}_{i}(values: list[float], weight: float = {i * 0.25}) -> float:\n"
        yield f"    total = sum(value ** {i % 3 + 1} for value in values)\n"
        yield f"    if len(values) < {i % 7 + 1}:\n        raise ValueError('too few: {i}')\n"
        yield f"    return math.sqrt(total / len(values)) * weight + {i * i}\n\n\n"


def _unicode(seed: int) -> Iterator[str]:
    for i in count(seed):
        yield _UNICODE[i * 3 % 8] + (f"({i}) " if i % 4 == 0 else "")


def _numbers(seed: int) -> Iterator[str]:
    yield "year,month,rainfall_mm,temperature_c\n"
    for i in count(seed * 100):
        rainfall, temperature = i * 7919 % 2000 / 10, i * 104729 % 350 / 10 - 5
        yield f"{1900 + i // 12},{i % 12 + 1},{rainfall},{temperature:.1f}\n"


_KINDS: list[Callable[[int], Iterator[str]]] = [_prose, _code, _prose, _unicode, _numbers]


def build_prompts(encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Token ids of each prompt, exactly as long as `PROMPT_LENGTHS` says."""
    return [
        _exactly(length, _KINDS[number % len(_KINDS)](number), encode)
        for number, length in enumerate(PROMPT_LENGTHS)
    ]


def _exactly(length: int, pieces: Iterator[str], encode: Callable[[str], list[int]]) -> list[int]:
    text = ""
    while len(token_ids := encode(text)) < length:
        text += "".join(next(pieces) for _ in range(max(1, (length - len(token_ids)) // 8)))
    return token_ids[:length]


def prose_prompt(length: int, seed: int, encode: Callable[[str], list[int]]) -> list[int]:
    """`length` token ids of prose; other seeds begin differently."""
    return _exactly(length, _prose(seed), encode)
