"""A part of `scripts/fuzz`: every target for a second, and what the runner calls a finding."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator

import pytest

from tests.fuzz.runner import Finding, Target, run_target
from tests.fuzz.targets import TARGETS

SEED = 20
MAX_S = 1.0
MIN_INPUTS = 100


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Bad input is logged, as it should be; here it would be thousands of lines."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_gets_through(name: str) -> None:
    run = run_target(TARGETS[name](), SEED, max_s=MAX_S)
    assert run.num_inputs > MIN_INPUTS


class _Parser(Target):
    """Misbehaves for one input in ten."""

    name = "parser"

    def __init__(self, misdeed: str) -> None:
        self._misdeed = misdeed

    def make(self, rng: random.Random) -> int:
        return rng.randrange(10)

    def feed(self, data: int) -> None:
        if data != 7:
            return
        match self._misdeed:
            case "raises":
                raise KeyError("undeclared")
            case "allocates":
                bytearray(1 << 20)
            case "hangs":
                while True:
                    time.process_time()

    def allowed_bytes(self, data: int) -> int:
        return 1 << 16


@pytest.mark.parametrize(
    ("misdeed", "message"),
    [
        ("raises", r"KeyError: 'undeclared'\n\ninput: 7"),
        ("allocates", r"10\d{5} bytes allocated\ninput: 7"),
        ("hangs", r"more than 0.05 s\ninput: 7"),
    ],
)
def test_a_finding_names_the_input(
    misdeed: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.runner.MAX_CPU_S", 0.05)
    with pytest.raises(Finding, match=message):
        run_target(_Parser(misdeed), SEED, num_inputs=1000)


def test_the_same_seed_makes_the_same_inputs() -> None:
    for make_target in TARGETS.values():
        inputs = []
        for _ in range(2):
            target, rng = make_target(), random.Random(SEED)
            inputs.append([repr(target.make(rng)) for _ in range(20)])
            target.close()
        assert inputs[0] == inputs[1]
