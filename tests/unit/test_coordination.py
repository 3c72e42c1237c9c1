"""What coordination decides without etcd: addresses, keys, ranges, where a batch may be cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xllm.coordination import (
    Compacted,
    EtcdNoSpace,
    EtcdRefused,
    Keys,
    LeaseNotFound,
    RequestTooLarge,
    errors,
    watch,
)
from xllm.coordination.endpoints import Endpoint, parse_endpoints
from xllm.coordination.records import prefix_end
from xllm.errors import ConfigError
from xllm.protocol import MasterId, WorkerId


@pytest.mark.parametrize(
    ("etcd_addr", "endpoints"),
    [
        ("127.0.0.1:2379", (Endpoint("127.0.0.1", 2379),)),
        ("http://etcd-0:10998/", (Endpoint("etcd-0", 10998),)),
        ("etcd", (Endpoint("etcd", 2379),)),
        ("[::1]:1, https://b", (Endpoint("::1", 1), Endpoint("b", 2379, tls=True))),
        ("a:1,,b:2,", (Endpoint("a", 1), Endpoint("b", 2))),
    ],
)
def test_an_address_is_parsed(etcd_addr: str, endpoints: tuple[Endpoint, ...]) -> None:
    assert parse_endpoints(etcd_addr) == endpoints
    plain = ",".join(map(str, endpoints))
    assert [(e.host, e.port) for e in parse_endpoints(plain)] == [
        (e.host, e.port) for e in endpoints
    ]


@pytest.mark.parametrize(
    "etcd_addr", ["", ",", "host:port", "host:0", "host:70000", "ftp://h:1", "a..b:1", "h:1/path"]
)
def test_an_address_that_is_none_names_its_flag(etcd_addr: str) -> None:
    with pytest.raises(ConfigError, match="--etcd_addr"):
        parse_endpoints(etcd_addr)


def test_keys_follow_the_layout() -> None:
    keys = Keys("prod")
    assert keys.worker(WorkerId("10.0.0.1:8010")) == "/xllm/prod/workers/10.0.0.1:8010"
    assert keys.load_of(WorkerId("w")) == "/xllm/prod/load/w"
    assert keys.master(MasterId("m")) == "/xllm/prod/masters/m"
    assert keys.leader == "/xllm/prod/leader"


@pytest.mark.parametrize("namespace", ["", "a/b"])
def test_a_namespace_stays_inside_itself(namespace: str) -> None:
    with pytest.raises(ConfigError, match="--etcd_namespace"):
        Keys(namespace)


def test_a_prefix_ends_before_the_first_key_without_it() -> None:
    assert prefix_end("/t/") == b"/t0"
    assert "/t/\U0010ffff".encode() < prefix_end("/t/")
    with pytest.raises(ValueError, match="whole of etcd"):
        prefix_end("")


@pytest.mark.parametrize(
    ("revisions", "start"), [([], 0), ([4], 0), ([4, 4], 0), ([4, 5], 1), ([4, 4, 5, 6, 6, 6], 3)]
)
def test_a_batch_is_cut_between_revisions(revisions: list[int], start: int) -> None:
    events = [SimpleNamespace(kv=SimpleNamespace(mod_revision=r)) for r in revisions]
    assert watch._start_of_last_revision(events) == start


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("etcdserver: mvcc: database space exceeded", EtcdNoSpace),
        ("etcdserver: request is too large", RequestTooLarge),
        ("etcdserver: mvcc: required revision has been compacted", Compacted),
        ("etcdserver: requested lease not found", LeaseNotFound),
    ],
)
def test_what_etcd_says_becomes_an_error_of_ours(message: str, kind: type[EtcdRefused]) -> None:
    assert type(errors.from_message(message)) is kind
    assert errors.from_message("etcdserver: no leader") is None
