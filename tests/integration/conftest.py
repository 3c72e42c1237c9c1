"""Fixtures of all integration tests. A missing etcd fails them; it does not skip them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from etcd_server import EtcdServer

from xllm.coordination import EtcdClient


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """A running etcd with fresh data, for one test."""
    server = EtcdServer(tmp_path / "etcd")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama with random weights."""
    # Only now, because it imports torch.
    from tests.golden.tiny_models import TINY_MODELS, write_model

    return write_model(tmp_path_factory.mktemp("model") / "llama", TINY_MODELS["llama"])


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[EtcdClient]:
    client = EtcdClient([etcd.address])
    await client.connect(5.0)
    yield client
    await client.close()
