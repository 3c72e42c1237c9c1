"""What xllm does with etcd: leases, watches that resync, election, an embedded server.

    keys.py       the layout of the keys
    records.py    what is read and written, without grpc's types
    wire.py       records to and from the generated messages
    errors.py     what etcd may answer beside a result
    endpoints.py  where it is
    access.py     how we get in: certificates, a user
    client.py     calls with deadlines and failover
    watch.py      a prefix as a snapshot and the changes after it
    session.py    a lease and the keys that live and die with it
    election.py   one leader among sessions
    embedded.py   a server of our own, for a master without --etcd_addr

Nothing here knows what the values mean.
"""

from __future__ import annotations

import os

# Read by gRPC when it is imported: its log goes to stderr past ours, and its fork handlers, which
# we do not need because children are always new programs, warn whenever one is started.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from xllm.coordination.client import EtcdClient
from xllm.coordination.election import Election
from xllm.coordination.embedded import (
    QUOTA_BYTES,
    EmbeddedEtcd,
    ensure_etcd,
    find_etcd_binary,
    is_embedded,
)
from xllm.coordination.errors import (
    Compacted,
    EtcdNoSpace,
    EtcdRefused,
    Fenced,
    LeaseExists,
    LeaseNotFound,
    RequestTooLarge,
)
from xllm.coordination.keys import Keys
from xllm.coordination.records import (
    DELETE,
    PUT,
    Change,
    ChangeKind,
    CompareCreateRevision,
    CompareLease,
    CompareModRevision,
    Delete,
    DeleteRange,
    EtcdStatus,
    Get,
    KeyValue,
    Put,
    Snapshot,
    TxnResult,
)
from xllm.coordination.session import Session
from xllm.coordination.watch import watch_prefix

__all__ = [
    "DELETE",
    "PUT",
    "QUOTA_BYTES",
    "Change",
    "ChangeKind",
    "Compacted",
    "CompareCreateRevision",
    "CompareLease",
    "CompareModRevision",
    "Delete",
    "DeleteRange",
    "Election",
    "EmbeddedEtcd",
    "EtcdClient",
    "EtcdNoSpace",
    "EtcdRefused",
    "EtcdStatus",
    "Fenced",
    "Get",
    "KeyValue",
    "Keys",
    "LeaseExists",
    "LeaseNotFound",
    "Put",
    "RequestTooLarge",
    "Session",
    "Snapshot",
    "TxnResult",
    "ensure_etcd",
    "find_etcd_binary",
    "is_embedded",
    "watch_prefix",
]
