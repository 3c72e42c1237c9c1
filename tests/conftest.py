"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm.model_store import resolve_model


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """The real default model, from the user's cache; prepared now if it is not there."""
    return resolve_model(None, progress=print)
