"""Page-aligned memory for blocks: what O_DIRECT and page-locking want, in huge pages if there are.

Not from torch or numpy, whose large allocations begin a few bytes into a page.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

import numpy as np

from xllm.cache.slab_format import Buffer
from xllm.cache.threads import lower_priority

_MADV_POPULATE_WRITE = 23
"""Linux 5.14."""

_SLICE_BYTES = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_pages(num_bytes: int) -> Buffer:
    """[num_bytes] zeros, freed with the last view of it; a page is taken when it is first touched.

    Raises: OSError.
    """
    mapping = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE)
    pages = np.frombuffer(mapping, dtype=np.uint8)[:num_bytes]
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _advise(pages, mmap.MADV_HUGEPAGE)
    return pages


def populate(pages: Buffer) -> None:
    """Takes all pages now, without changing what they hold: what is not there shows at once, and no
    copy pays for page faults later. Blocks, but not the interpreter."""
    _advise(pages, _MADV_POPULATE_WRITE)


def populate_in_background(pages: Buffer) -> None:
    """`populate` on a thread that only gets what nobody else wants of the cores, slice by slice."""

    def work() -> None:
        lower_priority()
        for start in range(0, pages.nbytes, _SLICE_BYTES):
            populate(pages[start : start + _SLICE_BYTES])

    threading.Thread(target=work, name="populate", daemon=True).start()


def _advise(pages: Buffer, advice: int) -> None:
    """A kernel that does not know the advice does without: nothing depends on it."""
    if pages.nbytes:
        # By ctypes, because mmap.madvise keeps the interpreter's lock.
        _libc.madvise(pages.ctypes.data, pages.nbytes, advice)
