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


class Claim:
    """The connecting side of a handshake: what was said, and what is proven about it.

    `begin` with the hello; if the other side wants it, `prove` and `proven`; then `check`. What
    these return in words is why the other side is not to be spoken with; empty if it is.
    """

    def __init__(self, key: HandshakeKey | None, speaker: str, other: str) -> None:
        """`key`: what both sides have to prove; None: nothing. `speaker`: which side this is."""
        self._key = key
        self._speaker = speaker
        self._other = other
        self._said: list[bytes] = []
        """So far, from both sides, as their bytes were sent."""

    def begin(self, hello: bytes) -> None:
        self._said = [hello]

    def prove(self, challenge: bytes) -> tuple[bytes, str]:
        """-> the mac that answers the challenge, or why there is none."""
        if self._key is None:
            return b"", f"{NO_SECRET_HERE}: {FIX}"
        if len(self._said) != 1:
            return b"", "a second challenge"
        self._said.append(challenge)
        return self._key.prove(self._speaker, *self._said), ""

    def proven(self, proof: bytes) -> None:
        """The message with that mac is on its way."""
        self._said.append(proof)

    def check(self, proof: bytes, unproven: bytes) -> str:
        """Whether the other side knows the secret too, or there is none. `unproven`: its last
        message without the proof."""
        if self._key is None:
            return ""
        if len(self._said) != 3:
            return NO_PROOF
        if not self._key.check(proof, self._other, *self._said, unproven):
            return WRONG_PROOF
        return ""


NO_SECRET_HERE = "proof of a cluster secret is wanted, and none is given here"
"""What a side without a secret says to one that has one."""
NO_PROOF = "no proof of the cluster's secret"
WRONG_PROOF = "wrong proof of the cluster's secret"
FIX = "start both with the same --cluster_secret_file"
