"""What is read from and written to etcd, without grpc's types."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int
    """0: none, the key stays until somebody deletes it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything under a prefix as it was at one revision, sorted by key."""

    revision: int
    kvs: Sequence[KeyValue]


class ChangeKind(enum.Enum):
    PUT = "put"
    DELETE = "delete"


PUT = ChangeKind.PUT
DELETE = ChangeKind.DELETE


@dataclass(frozen=True, slots=True)
class Change:
    """One event of a watch; of a DELETE, `kv` has the key and the revision and no value."""

    kind: ChangeKind
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


@dataclass(frozen=True, slots=True)
class DeleteRange:
    """Deletes `first` <= key < `end`."""

    first: str
    end: str


@dataclass(frozen=True, slots=True)
class Get:
    key: str


Op: TypeAlias = Put | Delete | DeleteRange | Get


@dataclass(frozen=True, slots=True)
class CompareLease:
    """The key is there and hangs on this lease; with 0: it is absent or has no lease."""

    key: str
    lease_id: int


@dataclass(frozen=True, slots=True)
class CompareModRevision:
    """The key was last written at `revision`; 0: it does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class CompareCreateRevision:
    """The key came into being at `revision`; 0: it does not exist."""

    key: str
    revision: int


Compare: TypeAlias = CompareLease | CompareModRevision | CompareCreateRevision


@dataclass(frozen=True, slots=True)
class TxnResult:
    succeeded: bool
    """All compares held: the first branch ran, else the second."""
    revision: int
    gets: tuple[KeyValue | None, ...]
    """The answers to the `Get`s of the branch that ran, in their order."""


@dataclass(frozen=True, slots=True)
class EtcdStatus:
    """One member's view of itself."""

    version: str
    revision: int
    db_size_bytes: int
    db_size_in_use_bytes: int
    has_leader: bool
    is_leader: bool
    quota_bytes: int
    """That `db_size_bytes` may reach; 0: this version of etcd does not tell."""
    no_space: bool
    """The quota is full: writes are refused until somebody compacts, defragments and disarms."""


def prefix_end(prefix: str) -> bytes:
    """The first key after all keys that start with `prefix`.

    Raises: ValueError for an empty prefix, which would be the whole of etcd.
    """
    raw = bytearray(prefix.encode())
    while raw:
        if raw[-1] < 0xFF:
            raw[-1] += 1
            return bytes(raw)
        raw.pop()
    raise ValueError("an empty prefix would be the whole of etcd")
