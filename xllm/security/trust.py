"""What both ends of a connection between processes ask of each other."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.security.secret import ClusterSecret, HandshakeKey
from xllm.security.tls import Tls


@dataclass(frozen=True, slots=True)
class Trust:
    """For one kind of connection; without anything, whoever connects is believed."""

    key: HandshakeKey | None = None
    """Both prove that they know the cluster's secret."""
    tls: Tls | None = None
    """Both show a certificate of the cluster's authority, and nobody listens in."""

    @classmethod
    def of(cls, secret: ClusterSecret | None, tls: Tls | None, purpose: str) -> Trust:
        return cls(None if secret is None else HandshakeKey(secret, purpose), tls)


ANYBODY = Trust()

NO_SECRET_HERE = "proof of a cluster secret is wanted, and none is given here"
"""What a side without a secret says to one that has one."""
NO_PROOF = "no proof of the cluster's secret"
WRONG_PROOF = "wrong proof of the cluster's secret"
FIX = "start both with the same --cluster_secret_file"
