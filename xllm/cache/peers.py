"""The remote tier: blocks that other workers hold, and what they get of ours.

    peer_book.py     which peers are worth asking                     engine's thread, pure
    peer_client.py   fetches, one connection to each peer             a thread of its own
    lender.py        what is pinned for peers that fetch here         whoever has the books
    peer_server.py   serves them                                      a thread of its own
    peer_wire.py     what is said                                     pure

Nobody lists what a peer has: a request comes with a hint of who holds which blocks of its prompt
(`protocol.FetchRange`), and a peer that does not have them any more costs computing them.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm.cache.peer_book import PeerBook
from xllm.cache.peer_client import PeerClient

PRIOR_BYTES_PER_S = 500e6
"""Until something was fetched: what a modest network brings. Without a guess nobody would be told
to fetch, and nothing would ever be measured."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Other workers as a source of blocks."""

    client: PeerClient
    book: PeerBook
