"""Commands as they stand in etcd."""

from __future__ import annotations

import msgspec
import pytest

from xllm.protocol import (
    BlockHash,
    Command,
    CommandKind,
    CommandState,
    Epoch,
    FetchRange,
    MasterId,
    WorkerId,
)
from xllm.roles.commands import (
    ABSENT_S,
    READ_S,
    decode_command,
    encode_command,
    is_stale,
    join_names,
    split_names,
)

NAMES = [BlockHash(bytes([i]) * 16) for i in range(3)]
COMMAND = Command(
    command_id="c",
    worker_id=WorkerId("w"),
    epoch=Epoch(7),
    kind=CommandKind.MOVE,
    master_id=MasterId("m"),
    created_at=1000.0,
    blocks=join_names(NAMES),
    fetch=[FetchRange(WorkerId("v"), "10.0.0.1:5", 1, 2)],
)


def test_a_command_survives_json() -> None:
    assert decode_command(encode_command(COMMAND)) == COMMAND
    assert split_names(COMMAND.blocks) == NAMES


def test_half_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 16"):
        split_names(b"0" * 17)


def test_what_is_no_command_is_none(caplog: pytest.LogCaptureFixture) -> None:
    assert decode_command(b"{}") is None
    assert "bad_command" in caplog.text


@pytest.mark.parametrize(
    ("state", "absent_s", "age_s", "stale"),
    [
        (CommandState.PENDING, 0.0, 500.0, False),
        (CommandState.RUNNING, 0.0, 500.0, False),
        (CommandState.PENDING, ABSENT_S + 1, 0.0, True),
        (CommandState.DONE, 0.0, READ_S - 1, False),
        (CommandState.DONE, 0.0, READ_S + 1, True),
        (CommandState.FAILED, 0.0, READ_S + 1, True),
    ],
)
def test_what_nobody_executes_or_reads_any_more_is_stale(
    state: CommandState, absent_s: float, age_s: float, stale: bool
) -> None:
    command = msgspec.structs.replace(COMMAND, state=state, ended_at=2000.0)
    assert is_stale(encode_command(command), absent_s, now=2000.0 + age_s) is stale


def test_what_cannot_be_read_is_stale() -> None:
    assert is_stale(b"nonsense", 0.0)
