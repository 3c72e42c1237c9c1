"""Commands as they stand in etcd."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from xllm.config import IndexConfig
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
from xllm.roles.leader_word import decode_word
from xllm.roles.upload_shares import Need, divide

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


def test_the_examples_of_the_documentation() -> None:
    page = Path(__file__).parents[2] / "docs" / "index-format.md"
    said, given = re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
    word = decode_word(said.encode())
    needs = {WorkerId(f"w{i}"): Need(10**6, 0) for i in range(9)}
    busy = {WorkerId("192.168.1.11:8010"): Need(10**6, 10**5)}
    config = IndexConfig(max_index_blocks=2_500_000)
    assert word == divide(config, MasterId("192.168.1.10:8888"), needs | busy)
    command = decode_command(given.encode())
    assert command is not None
    assert (command.kind, command.state) == (CommandKind.PIN, CommandState.PENDING)
    assert split_names(command.blocks) == [BlockHash(bytes(range(16)))]


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
