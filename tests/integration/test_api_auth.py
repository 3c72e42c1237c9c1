"""API keys over real sockets, as OpenAI's client and as somebody without a key meets them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import openai
import pytest
from aiohttp.test_utils import unused_port

from tests.fakes import MODEL, FakeBackend, says, tiny_tokenizer
from xllm.config import ApiConfig, MasterConfig
from xllm.net import listen
from xllm.reload import Reload
from xllm.roles.guards import Guards
from xllm.roles.http_server import serve
from xllm.roles.openai_api import build_app, make_runner
from xllm.roles.operator import OperatorPort
from xllm.roles.page_files import page_routes
from xllm.security.operator_key import OperatorKey
from xllm.telemetry import Metrics

ALICE, BOB = "sk-alice-0123456789", "sk-bob-01234567890"
HI = [{"role": "user", "content": "hi"}]
ANSWER_IDS = tiny_tokenizer().encode("the quick fox")


@dataclass
class Served:
    url: str
    backend: FakeBackend
    reload: Reload
    keys: Path

    @asynccontextmanager
    async def client(self, key: str) -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=5.0
        ) as client:
            yield client

    async def salt_of(self, key: str, salt: str | None = None) -> str:
        """The salt that a worker would see."""
        async with self.client(key) as client:
            extra = {} if salt is None else {"cache_salt": salt}
            await client.chat.completions.create(model=MODEL, messages=HI, extra_body=extra)
        return self.backend.generations[-1].request.salt


@asynccontextmanager
async def served(folder: Path, text: str, **config: object) -> AsyncIterator[Served]:
    keys = folder / "keys"
    keys.write_text(text)
    api = ApiConfig(api_keys_file=str(keys), **config)  # type: ignore[arg-type]
    reload = Reload()
    guards = Guards(MasterConfig(api=api), reload)
    backend = FakeBackend(says(ANSWER_IDS))
    app = build_app(backend, api, Metrics(), guards.api)
    port = unused_port()
    with listen("127.0.0.1", port, flag="port") as listening:
        async with serve(make_runner(app), listening):
            yield Served(f"http://127.0.0.1:{port}", backend, reload, keys)


async def test_a_stranger_gets_openais_401_and_nothing_else(tmp_path: Path) -> None:
    async with served(tmp_path, f"alice:{ALICE}") as api, aiohttp.ClientSession() as http:
        for path in ("/v1/models", "/openapi.json", "/nothing", "/tokenize", "/v1/x/../models"):
            async with http.get(f"{api.url}{path}") as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                error = (await response.json())["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", None)
        async with http.get(f"{api.url}/health") as response:
            assert response.status == 200
        async with api.client("sk-wrong-0123456789") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.chat.completions.create(model=MODEL, messages=HI)
        assert caught.value.code == "invalid_api_key"
        assert caught.value.type == "invalid_request_error"
        assert caught.value.body == {
            "message": "Incorrect API key provided.",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
        assert api.backend.generations == []


async def test_anthropics_header_brings_a_key_too(tmp_path: Path) -> None:
    body = {"model": MODEL, "messages": HI, "max_tokens": 5}
    async with served(tmp_path, f"alice:{ALICE}") as api, aiohttp.ClientSession() as http:
        url = f"{api.url}/v1/messages"
        for key, status in ((ALICE, 200), (BOB, 401)):
            async with http.post(url, json=body, headers={"x-api-key": key}) as response:
                assert response.status == status
                answer = await response.json()
        assert answer["error"]["type"] == "authentication_error"
        both = {"x-api-key": ALICE, "Authorization": f"Bearer {BOB}"}
        async with http.post(url, json=body, headers=both) as response:
            assert response.status == 401
        assert len(api.backend.generations) == 1


async def test_two_keys_never_have_the_same_salt(tmp_path: Path) -> None:
    async with served(tmp_path, f"alice:{ALICE}\nbob:{BOB}") as api:
        alice, bob = await api.salt_of(ALICE), await api.salt_of(BOB)
        assert alice == await api.salt_of(ALICE)
        # Bob has seen Alice's, however that may be, and tries to name it.
        salts = [alice, bob, await api.salt_of(BOB, alice), await api.salt_of(ALICE, bob)]
        salts += [await api.salt_of(BOB, "x"), await api.salt_of(ALICE, "x")]
        assert len(set(salts)) == 6


async def test_keys_share_a_cache_where_that_is_asked_for(tmp_path: Path) -> None:
    text = f"alice:{ALICE}\nbob:{BOB}"
    async with served(tmp_path, text, share_cache_across_keys=True) as api:
        assert await api.salt_of(ALICE) == await api.salt_of(BOB) == ""
        assert await api.salt_of(ALICE, "x") == "x"


async def test_requests_over_the_limit_get_429_and_other_keys_do_not(tmp_path: Path) -> None:
    text = f"alice:{ALICE} requests_per_minute=2\nbob:{BOB}"
    async with served(tmp_path, text) as api, api.client(ALICE) as client:
        for _ in range(2):
            await client.chat.completions.create(model=MODEL, messages=HI)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model=MODEL, messages=HI)
        assert (caught.value.type, caught.value.code) == ("requests", "rate_limit_exceeded")
        assert 25 <= int(caught.value.response.headers["Retry-After"]) <= 30
        assert [model.id async for model in client.models.list()] == [MODEL], "no work, no limit"
        await api.salt_of(BOB)


async def test_tokens_of_prompt_and_answer_count(tmp_path: Path) -> None:
    async with served(tmp_path, f"alice:{ALICE}", tokens_per_minute=100) as api:
        async with api.client(ALICE) as client:
            answer = await client.chat.completions.create(model=MODEL, messages=HI)
            assert answer.usage is not None
            long = [{"role": "user", "content": "hi" * 60}]
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model=MODEL, messages=long)
            assert caught.value.type == "tokens"
            left = 100 - answer.usage.total_tokens
            missing = 100 - left
            retry_after_s = int(caught.value.response.headers["Retry-After"])
            assert abs(retry_after_s - missing * 60 / 100) <= 1
            await client.chat.completions.create(model=MODEL, messages=HI)
        assert len(api.backend.generations) == 2


async def test_a_reload_takes_effect_with_the_next_request(tmp_path: Path) -> None:
    async with served(tmp_path, f"alice:{ALICE}") as api:
        await api.salt_of(ALICE)
        api.keys.write_text(f"bob:{BOB}")
        api.reload.run()
        await api.salt_of(BOB)
        with pytest.raises(openai.AuthenticationError):
            await api.salt_of(ALICE)


async def test_a_body_that_unpacks_to_more_than_is_allowed_is_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    assert len(bomb) < 1 << 17
    async with (
        served(tmp_path, f"alice:{ALICE}", max_body_size=1 << 20) as api,
        aiohttp.ClientSession() as http,
    ):
        headers = {
            "Authorization": f"Bearer {ALICE}",
            "Content-Encoding": "gzip",
            "Content-Type": "application/json",
        }
        url = f"{api.url}/v1/completions"
        async with http.post(url, data=bomb, headers=headers) as response:
            assert response.status in (400, 413)


async def test_connections_beyond_the_limit_are_closed() -> None:
    app = build_app(FakeBackend(says(ANSWER_IDS)), ApiConfig(), Metrics())
    port = unused_port()
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with listen("127.0.0.1", port, flag="port") as listening:
        async with serve(make_runner(app), listening, limit=2):
            # Two that ask for nothing are all that is let in, until one of them goes.
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for expected in (b"", b"HTTP/1.1 200 OK\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(health)
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.readline(), 5) == expected
                writer.close()
                for _, other in held:
                    other.close()
                await asyncio.sleep(0.05)


@asynccontextmanager
async def operator_port(key: OperatorKey | None) -> AsyncIterator[str]:
    drains: list[float | None] = []

    def drain(timeout_s: float | None) -> float:
        drains.append(timeout_s)
        return 1.0

    port = unused_port()
    operator = OperatorPort(Metrics(), lambda: True, page_routes(), drain=drain, key=key)
    with listen("127.0.0.1", port, flag="port") as listening:
        async with serve(operator.runner(), listening):
            yield f"http://127.0.0.1:{port}"


async def test_the_operator_port_wants_its_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("an-operators-key")
    wrong = [{}, {"Authorization": "Bearer an-operators-kez"}, {"Authorization": "Basic x"}]
    right = {"Authorization": "Bearer an-operators-key"}
    async with operator_port(OperatorKey(str(path))) as url, aiohttp.ClientSession() as http:
        for headers, status in [*((headers, 401) for headers in wrong), (right, 200)]:
            async with http.get(f"{url}/metrics", headers=headers) as response:
                assert response.status == status
        for headers, status in [*((headers, 401) for headers in wrong), (right, 202)]:
            async with http.post(f"{url}/admin/drain", headers=headers) as response:
                assert response.status == status
        async with http.get(f"{url}/health") as response:
            assert response.status == 200, "for probes"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Host": ""},
    ],
)
async def test_without_a_key_no_other_sites_page_reaches_the_operator_port(
    headers: dict[str, str],
) -> None:
    async with operator_port(None) as url, aiohttp.ClientSession() as http:
        async with http.post(f"{url}/admin/drain", headers=headers) as response:
            assert response.status == 403
        async with http.post(f"{url}/admin/drain") as response:
            assert response.status == 202
        async with http.get(f"{url}/metrics", headers={"Host": "localhost:8889"}) as response:
            assert response.status == 200
        own = {"Origin": url, "Sec-Fetch-Site": "same-origin"}
        async with http.post(f"{url}/admin/drain", headers=own) as response:
            assert response.status == 202, "the live page"


async def test_the_files_of_the_live_page_are_for_everybody_and_say_what_they_may_do(
    tmp_path: Path,
) -> None:
    path = tmp_path / "key"
    path.write_text("an-operators-key")
    async with operator_port(OperatorKey(str(path))) as url, aiohttp.ClientSession() as http:
        for name, kind in (("", "text/html"), ("page/app.js", "text/javascript")):
            async with http.get(f"{url}/{name}") as response:
                assert response.status == 200
                assert response.content_type == kind
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'; script-src 'self'" in policy
                assert "frame-ancestors 'none'" in policy
                assert response.headers["X-Content-Type-Options"] == "nosniff"
        for name in ("page/other.js", "page/..%2f__init__.py"):
            async with http.get(f"{url}/{name}") as response:
                assert response.status == 404
