"""Records in etcd that carry a proof: registrations, load, commands, the leader's word.

    {"worker_id": ...,"proof":{"nonce":"16 hex digits","mac":"64 hex digits"}}

The proof is the last field of the JSON object, so a process without the secret reads the record as
it would without. It covers the key, the lease that the key hangs on (of a worker, its epoch), the
nonce, and all that comes before: a record cannot be changed, put under another name or kept after
its epoch. Within one, nonces only grow, so a record cannot be put back over a newer one.

Whoever can write to etcd can still delete keys, or keep leases: that is what etcd's own
authentication is for. Batches of the cache index carry no proof: a forged one makes a request go
to a worker that then has to compute.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from xllm.security.secret import ClusterSecret, mac_of

logger = logging.getLogger(__name__)

MAX_RECORD_BYTES = 1 << 20
SEALED_FOLDERS = frozenset({"workers", "masters", "load", "commands", "leader"})
SINGLE_WRITER_FOLDERS = SEALED_FOLDERS - {"commands"}
"""A command is answered under its own key: its worker sees to it that none is executed twice."""
MAX_REMEMBERED = 10_000

_PROOF: Final = re.compile(
    rb'(?s)(.*),"proof":\{"nonce":"([0-9a-f]{16})","mac":"([0-9a-f]{64})"\}\}'
)


@dataclass(frozen=True, slots=True)
class _Seen:
    lease_id: int
    nonce: int
    revision: int


class Seal:
    """Of one process. Values that are not right are read as empty ones, which nothing decodes."""

    def __init__(
        self, secret: ClusterSecret | None, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        """Without a secret, records are written and read as they are, within bounds."""
        self._clock_ns = clock_ns
        self._key = None if secret is None else secret.key("record")
        self._nonce = 0
        self._seen: dict[str, _Seen] = {}
        self._distrusted: set[str] = set()

    def close(self, key: str, value: bytes, lease_id: int) -> bytes:
        """What is to be put for `value`, a JSON object."""
        if self._key is None or not value or _folder(key) not in SEALED_FOLDERS:
            return value
        assert value.endswith(b"}")
        assert value != b"{}"
        # As wide as a clock, so that a process that is started again goes on where it was.
        self._nonce = max(self._nonce + 1, self._clock_ns())
        nonce = b"%016x" % self._nonce
        mac = self._mac(key, lease_id, nonce, value).hex().encode()
        return value[:-1] + b',"proof":{"nonce":"' + nonce + b'","mac":"' + mac + b'"}}'

    def open(self, key: str, value: bytes, lease_id: int, revision: int) -> bytes:
        """The value that was closed, or nothing, and one line in the log."""
        if not value or _folder(key) not in SEALED_FOLDERS:
            return value
        if len(value) > MAX_RECORD_BYTES:
            return self._distrust(key, f"{len(value)} bytes are over {MAX_RECORD_BYTES}")
        if self._key is None:
            return value
        found = _PROOF.fullmatch(value)
        if found is None:
            return self._distrust(key, "it has no proof")
        payload, nonce = found[1] + b"}", found[2]
        mac = self._mac(key, lease_id, nonce, payload)
        if not hmac.compare_digest(mac.hex().encode(), found[3]):
            return self._distrust(key, "its proof is wrong")
        if not self._is_news(key, lease_id, int(nonce, 16), revision):
            return self._distrust(key, "it was said before")
        self._distrusted.discard(key)
        return payload

    def _is_news(self, key: str, lease_id: int, nonce: int, revision: int) -> bool:
        """False: an older record was put over a newer one. Readers may come in any order, so it is
        the revision that tells which was put last."""
        if _folder(key) not in SINGLE_WRITER_FOLDERS:
            return True
        seen = self._seen.get(key)
        if seen is not None and seen.lease_id == lease_id:
            if revision <= seen.revision:
                return True
            if nonce < seen.nonce:
                return False
        self._seen.pop(key, None)
        self._seen[key] = _Seen(lease_id, nonce, revision)
        if len(self._seen) > MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return True

    def _distrust(self, key: str, reason: str) -> bytes:
        if key not in self._distrusted:
            if len(self._distrusted) >= MAX_REMEMBERED:
                self._distrusted.clear()
            self._distrusted.add(key)
            logger.error(
                "record_not_trusted key=%s reason='%s' fix='who wrote it needs the same"
                " --cluster_secret_file; else somebody else writes to etcd'",
                *(key, reason),
            )
        return b""

    def _mac(self, key: str, lease_id: int, nonce: bytes, payload: bytes) -> bytes:
        assert self._key is not None
        lease = lease_id.to_bytes(8, "little", signed=True)
        return mac_of(self._key, key.encode(), lease, nonce, payload)


def _folder(key: str) -> str:
    """Of /xllm/{namespace}/{folder}/...; empty for other keys."""
    parts = key.split("/", 4)
    return parts[3] if len(parts) > 3 and parts[1] == "xllm" else ""
