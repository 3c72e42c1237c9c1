"""What the leader says to everybody: the value of `leader`, read by workers and masters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing

import msgspec

from xllm.coordination import PUT, EtcdClient, Keys, Snapshot, watch_prefix
from xllm.protocol import LeaderWord, decode_json

logger = logging.getLogger(__name__)


def encode_word(word: LeaderWord) -> bytes:
    return msgspec.json.encode(word)


def decode_word(value: bytes) -> LeaderWord | None:
    """None, and a line in the log, for what is no word of a leader."""
    if not value:
        return None
    try:
        return decode_json(value, LeaderWord)
    except ValueError as error:
        logger.warning("bad_leader_word error=%r", str(error))
        return None


async def follow_leader(client: EtcdClient, keys: Keys, hear: Callable[[LeaderWord], None]) -> None:
    """Calls `hear` with each new word, until cancelled. While there is no leader, the last word
    holds: the next one has another after a second."""
    async with aclosing(watch_prefix(client, keys.leader)) as updates:
        async for update in updates:
            if isinstance(update, Snapshot):
                kvs = list(update.kvs)
            else:
                kvs = [change.kv for change in update if change.kind is PUT]
            for kv in kvs:
                if kv.key == keys.leader and (word := decode_word(kv.value)) is not None:
                    hear(word)
