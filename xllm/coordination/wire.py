"""Records to and from the generated messages: the only place that knows both."""

from __future__ import annotations

from typing import Any

from etcd3aio import _protobuf as pb

from xllm.coordination.records import (
    DELETE,
    PUT,
    Change,
    Compare,
    CompareCreateRevision,
    CompareLease,
    Delete,
    DeleteRange,
    Get,
    KeyValue,
    Op,
    Put,
)


def one_key(key: str, revision: int = 0) -> Any:
    return pb.RangeRequest(key=key.encode(), revision=revision)


def key_value(kv: Any) -> KeyValue:
    # Not everybody who writes to etcd writes what we do.
    key = kv.key.decode(errors="backslashreplace")
    return KeyValue(key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def change(event: Any) -> Change:
    return Change(DELETE if event.type == event.DELETE else PUT, key_value(event.kv))


def compare(condition: Compare) -> Any:
    key = condition.key.encode()
    equal = pb.Compare.EQUAL
    if isinstance(condition, CompareLease):
        return pb.Compare(key=key, result=equal, target=pb.Compare.LEASE, lease=condition.lease_id)
    if isinstance(condition, CompareCreateRevision):
        return pb.Compare(
            key=key, result=equal, target=pb.Compare.CREATE, create_revision=condition.revision
        )
    return pb.Compare(key=key, result=equal, target=pb.Compare.MOD, mod_revision=condition.revision)


def request_op(op: Op) -> Any:
    if isinstance(op, Put):
        put = pb.PutRequest(key=op.key.encode(), value=op.value, lease=op.lease_id)
        return pb.RequestOp(request_put=put)
    if isinstance(op, Get):
        return pb.RequestOp(request_range=one_key(op.key))
    if isinstance(op, Delete):
        delete = pb.DeleteRangeRequest(key=op.key.encode())
    else:
        assert isinstance(op, DeleteRange)
        delete = pb.DeleteRangeRequest(key=op.first.encode(), range_end=op.end.encode())
    return pb.RequestOp(request_delete_range=delete)
