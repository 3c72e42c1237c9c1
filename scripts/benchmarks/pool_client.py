"""Mooncake Store's own client, beside `scripts/bench pool`: loads the objects it is asked for.

MASTER_ADDRESS      {"keys": [...], "size": bytes} a line in, bytes per second out
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time

from mooncake.store import MooncakeDistributedStore


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", sys.argv[1])
    assert code == 0, code
    memory: mmap.mmap | None = None
    base = 0
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        keys, size = question["keys"], question["size"]
        if memory is None:
            memory = mmap.mmap(-1, len(keys) * size)
            memory.write(bytes(len(keys) * size))  # its pages are there
            base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            assert store.register_buffer(base, len(keys) * size) == 0
        started = time.perf_counter()
        codes = store.batch_get_into(
            keys, [base + i * size for i in range(len(keys))], [size] * len(keys)
        )
        seconds = time.perf_counter() - started
        assert codes == [size] * len(keys), codes
        print(json.dumps(len(keys) * size / seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
