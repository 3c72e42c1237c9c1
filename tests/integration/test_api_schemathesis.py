"""Random requests made from our own OpenAPI document: whatever comes, no 5xx and no surprise."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fakes import FakeBackend, says, tiny_tokenizer
from xllm.config import ApiConfig
from xllm.roles.api.openapi import openapi_document
from xllm.roles.openai_api import build_app, make_runner
from xllm.telemetry import Metrics


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The API on a thread of its own, since schemathesis blocks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    script = says(tiny_tokenizer().encode("the quick brown fox"), stop_token_id=1)
    # Large enough for most numbers that are drawn, so that many requests get as far as an answer.
    backend = FakeBackend(script, max_model_len=1 << 31, vocab_size=1 << 31)
    app = build_app(backend, ApiConfig(), Metrics())
    runner = make_runner(app)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


_MAX_EXAMPLES = {
    "/v1/chat/completions": 15,
    "/v1/responses": 15,
    "/v1/messages": 10,
    "/v1/messages/count_tokens": 5,
}
"""Where bodies take long to make up."""

CASES = [
    (mode, method, path)
    for path, methods in openapi_document()["paths"].items()
    for method, operation in methods.items()
    # Only a body can be wrong.
    for mode in GenerationMode
    if mode.is_positive or "requestBody" in operation
]


@pytest.mark.parametrize(("mode", "method", "path"), CASES)
def test_the_api_is_what_its_document_says(
    url: str, mode: GenerationMode, method: str, path: str
) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=_MAX_EXAMPLES.get(path, 30),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ]
        )

    check()
