"""Records in etcd: what is believed, and what somebody who can write there may try."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.protocol import Epoch, WorkerLoad
from xllm.security.seal import MAX_RECORD_BYTES, MAX_REMEMBERED, Seal
from xllm.security.secret import ClusterSecret

KEY = "/xllm/default/workers/w1"
VALUE = b'{"worker_id":"w1","proof":"of nothing"}'
LEASE = 0x7FFF_0000_0000_0001


def make_seal(secret: str = "s" * 32) -> Seal:
    return Seal(ClusterSecret(secret))


def opened(value: bytes, key: str = KEY, lease: int = LEASE, revision: int = 1) -> bytes:
    """By a process that knows the secret and nothing else."""
    return make_seal().open(key, value, lease, revision)


def test_a_record_comes_back_as_it_was() -> None:
    sealed = make_seal().close(KEY, VALUE, LEASE)
    assert opened(sealed) == VALUE
    assert Seal(None).open(KEY, sealed, LEASE, 1) == sealed


def test_who_has_no_secret_reads_the_record_all_the_same() -> None:
    load = WorkerLoad(epoch=Epoch(LEASE), running_requests_num=3)
    sealed = make_seal().close("/xllm/default/load/w1", msgspec.json.encode(load), LEASE)
    assert msgspec.json.decode(sealed, type=WorkerLoad) == load


@pytest.mark.parametrize(
    "forged",
    [
        VALUE,
        make_seal("t" * 32).close(KEY, VALUE, LEASE),
        make_seal().close("/xllm/default/workers/w2", VALUE, LEASE),
        make_seal().close("/xllm/other/workers/w1", VALUE, LEASE),
        make_seal().close(KEY, VALUE, LEASE + 1),
        make_seal().close(KEY, VALUE, LEASE).replace(b"w1", b"w2"),
        make_seal().close(KEY, VALUE, LEASE) + b"}",
        make_seal().close(KEY, VALUE, LEASE)[:-2] + b'","x":1}}',
        b'{"proof":{}}',
        b"\xff" * 100,
        b"{" + b" " * MAX_RECORD_BYTES + b"}",
    ],
    ids=lambda value: None,
)
def test_a_forged_record_is_not_read(forged: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert opened(forged) == b""
    assert caplog.text.count("record_not_trusted") == 1


@given(st.integers(0, 400), st.integers(1, 255))
def test_no_bit_can_be_changed(position: int, change: int) -> None:
    sealed = bytearray(make_seal().close(KEY, VALUE, LEASE))
    sealed[position % len(sealed)] ^= change
    assert opened(bytes(sealed)) == b""


def test_an_older_record_cannot_be_put_back_over_a_newer_one() -> None:
    writer, reader = make_seal(), make_seal()
    first, second = (writer.close(KEY, VALUE, LEASE) for _ in range(2))
    assert reader.open(KEY, first, LEASE, 5) == VALUE
    assert reader.open(KEY, second, LEASE, 6) == VALUE
    assert reader.open(KEY, first, LEASE, 7) == b""
    assert reader.open(KEY, first, LEASE, 5) == VALUE, "another reader, that is behind"
    assert reader.open(KEY, second, LEASE, 8) == VALUE
    assert reader.open(KEY, make_seal().close(KEY, VALUE, 9), 9, 9) == VALUE, "a new epoch"


def test_a_command_is_answered_by_somebody_whose_clock_is_behind() -> None:
    key = "/xllm/default/commands/w1/c"
    late, early = make_seal(), make_seal()
    late._nonce = 1 << 62
    reader = make_seal()
    assert reader.open(key, late.close(key, VALUE, LEASE), LEASE, 1) == VALUE
    assert reader.open(key, early.close(key, VALUE, LEASE), LEASE, 2) == VALUE


def test_it_is_said_once_until_it_is_right_again(caplog: pytest.LogCaptureFixture) -> None:
    reader = make_seal()
    for _ in range(3):
        reader.open(KEY, VALUE, LEASE, 1)
    assert caplog.text.count("record_not_trusted") == 1
    reader.open(KEY, make_seal().close(KEY, VALUE, LEASE), LEASE, 2)
    reader.open(KEY, VALUE, LEASE, 3)
    assert caplog.text.count("record_not_trusted") == 2


@pytest.mark.parametrize("key", ["/xllm/default/cache/w1/1/d/1", "/other/workers/w1", "x", ""])
def test_other_keys_are_left_alone(key: str) -> None:
    assert make_seal().close(key, b"\x00binary", LEASE) == b"\x00binary"
    assert make_seal().open(key, b"\x00binary", LEASE, 1) == b"\x00binary"


def test_what_is_remembered_is_bounded() -> None:
    writer, reader = make_seal(), make_seal()
    for i in range(1500):
        key = f"/xllm/default/workers/{i}"
        reader.open(key, writer.close(key, VALUE, LEASE), LEASE, i)
        reader.open(f"{key}x", VALUE, LEASE, i)
    assert len(reader._seen) <= MAX_REMEMBERED
    assert len(reader._distrusted) <= MAX_REMEMBERED
