"""What operators want of workers, as it stands in etcd. Pure.

    PENDING ──the worker claims it──> RUNNING ──> DONE or FAILED
       │                                 └──the worker has ended──> FAILED, by its next run
       └──its worker has another epoch: FAILED; nobody is there: dropped

Every change is a transaction on the key's mod_revision, so a command is executed at most once. It
hangs on a lease of its own, of `LEASE_S`, and is deleted by who gave it as soon as the outcome is
read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from xllm.cache.block_hash import HASH_BYTES, split_hashes
from xllm.protocol import BlockHash, Command, CommandState, decode_json

logger = logging.getLogger(__name__)

LEASE_S = 600
ABSENT_S = 20.0
"""A command for a worker that was not there for so long is dropped: it had better not be executed
when, much later, a worker of that name comes."""
READ_S = 60.0
"""An outcome that nobody has read by then will not be read any more."""


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a command."""

    outcome: dict[str, Any]
    then: Callable[[], object] | None = None
    """Called once the outcome is in etcd: what would end the process before."""


def encode_command(command: Command) -> bytes:
    return msgspec.json.encode(command)


def decode_command(value: bytes) -> Command | None:
    """None, and a line in the log, for what is no command; an empty one had no right proof, and
    its line."""
    if not value:
        return None
    try:
        return decode_json(value, Command)
    except ValueError as error:
        logger.warning("bad_command error=%r", str(error))
        return None


def is_ended(command: Command) -> bool:
    return command.state in (CommandState.DONE, CommandState.FAILED)


def is_stale(value: bytes, absent_s: float, now: float | None = None) -> bool:
    """Whether a command may be dropped whose worker was not there for `absent_s`.

    `now`: Unix seconds.
    """
    command = decode_command(value)
    if command is None or absent_s > ABSENT_S:
        return True
    now = time.time() if now is None else now
    return is_ended(command) and now - command.ended_at > READ_S


def join_names(names: Sequence[BlockHash]) -> bytes:
    """`Command.blocks`."""
    return b"".join(names)


def split_names(blocks: bytes) -> list[BlockHash]:
    """Raises: ValueError."""
    if len(blocks) % HASH_BYTES:
        raise ValueError(f"blocks has {len(blocks)} bytes, expected {HASH_BYTES} for each")
    return split_hashes(blocks)
