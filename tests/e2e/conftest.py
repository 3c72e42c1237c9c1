"""Fixtures of the end-to-end tests: real processes that end with their test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import processes
import pytest


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[processes.Launcher]:
    """Starts etcd, masters and workers for one test; a failure shows their logs."""
    with processes.launcher(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def module_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Launcher]:
    """As `launcher`, for processes that the tests of a module share."""
    with processes.launcher(tmp_path_factory.mktemp("processes")) as started:
        yield started
