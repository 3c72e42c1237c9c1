"""The cluster's secret: what its members know and nobody else.

It is never sent and never used as it is: each purpose has a key derived from it, so that what is
proven for one means nothing for another.

    handshake of a connection          whoever connects proves first: a stranger learns nothing
        caller  Hello(.., nonce)     >
                                     <    Challenge(nonce)
        caller  Proof(mac)           >    mac over both messages as they were sent
                                     <    Welcome(.., mac)   over all that was said before

Both nonces are new for each connection, so nothing that was recorded can be said again; the
purpose and the speaker are part of what is proven, so nothing can be said back to who said it.

It authenticates, and does not encrypt: whoever can change what is on the wire may wait for the
handshake to pass and then speak for either side. Against that there is TLS.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from typing import Final

MIN_SECRET_CHARS = 32
NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32

_LENGTH: Final = struct.Struct("<Q")


class ClusterSecret:
    """`secret` may be empty for a cluster without one: then only `salt` is of use."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def key(self, purpose: str) -> bytes:
        """32 bytes, for this purpose alone."""
        return hmac.digest(self._secret, b"xllm/1/" + purpose.encode(), "sha256")

    def salt(self, key_name: str, request_salt: str) -> str:
        """What stands for the `cache_salt` of a request that came with the API key `key_name`.

        No two pairs have the same, and without the secret nobody can name another's.
        """
        mac = mac_of(
            self.key("salt"), key_name.encode(), request_salt.encode(errors="surrogatepass")
        )
        return mac.hex()


class HandshakeKey:
    """Proves and checks that both ends of a connection know the secret."""

    def __init__(self, secret: ClusterSecret, purpose: str) -> None:
        self._key = secret.key(f"handshake/{purpose}")

    def prove(self, speaker: str, *said: bytes) -> bytes:
        """`speaker`'s proof; `said`: every message before it, as its bytes were sent."""
        return mac_of(self._key, speaker.encode(), *said)

    def check(self, proof: bytes, speaker: str, *said: bytes) -> bool:
        return hmac.compare_digest(proof, self.prove(speaker, *said))


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def mac_of(key: bytes, *parts: bytes) -> bytes:
    """Each part with its length before it, so that no two lists of parts look the same."""
    message = b"".join(_LENGTH.pack(len(part)) + part for part in parts)
    return hmac.digest(key, message, "sha256")
