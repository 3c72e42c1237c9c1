"""What etcd may answer beside a result.

XllmError
├── EtcdUnavailable       no endpoint answered in time; the request may still have been applied
│   └── EtcdNoSpace       its quota is full: it refuses writes and leases, reads go on
├── EtcdRefused           it understood the request and will never accept it
│   ├── RequestTooLarge   over etcd's limit for one request
│   ├── Compacted         the revision is no longer in etcd's history
│   ├── LeaseNotFound     the lease has expired or was revoked, or etcd came back empty
│   └── LeaseExists       the lease id is taken
└── ConfigError
    └── Fenced            somebody else, alive, holds the key that must be ours alone
"""

from __future__ import annotations

from typing import Any

import grpc

from xllm.errors import ConfigError, EtcdUnavailable, XllmError


class EtcdNoSpace(EtcdUnavailable):
    """etcd's storage quota is full."""

    label = "etcd_no_space"


class EtcdRefused(XllmError):
    """etcd understood the request and refused it."""

    label = "etcd_refused"


class RequestTooLarge(EtcdRefused):
    """The request is over `MAX_REQUEST_BYTES`."""


class Compacted(EtcdRefused):
    """The revision asked for was compacted: read the present state instead."""


class LeaseNotFound(EtcdRefused):
    """The lease does not exist, or no longer."""


class LeaseExists(EtcdRefused):
    """A lease with this id exists."""


class Fenced(ConfigError):
    """Another live process holds a key that belongs to one process only."""

    label = "fenced"


_BY_MESSAGE: tuple[tuple[str, type[XllmError]], ...] = (
    ("database space exceeded", EtcdNoSpace),
    ("request is too large", RequestTooLarge),
    ("larger than max", RequestTooLarge),
    ("has been compacted", Compacted),
    ("lease not found", LeaseNotFound),
    ("lease already exists", LeaseExists),
)

_PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        # "too many requests" and "not capable"; a full quota was told apart by its message.
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""Another endpoint, or the same one later, may answer the same request."""


def from_message(message: str) -> XllmError | None:
    """The error that etcd's own words name, if they name one of ours."""
    for part, kind in _BY_MESSAGE:
        if part in message:
            return kind(message)
    return None


def from_grpc(error: grpc.aio.AioRpcError, address: str) -> XllmError:
    """What a failed call means; `EtcdUnavailable` itself is worth a try elsewhere."""
    code: Any = error.code()
    message = f"etcd at {address}: {code.name}: {error.details() or 'no details'}"
    named = from_message(message)
    if named is not None:
        return named
    return EtcdUnavailable(message) if code in _PASSING else EtcdRefused(message)
