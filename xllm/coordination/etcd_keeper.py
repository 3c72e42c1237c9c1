"""Runs etcd for as long as the process that started this script lives; then removes its data.

    python -I -S etcd_keeper.py DATA_DIR ETCD ARGUMENT...

If etcd ends by itself, the last of its log goes to standard output.

The starter's end of our standard input closes when the starter ends, however it ends: that is the
only signal that also comes after a SIGKILL, whichever thread had started us. Should we be killed
ourselves, the kernel kills etcd (Linux only); this process has one thread, so the parent death
signal, which is about the parent's *thread*, can be relied on. Ctrl-C goes to the starter's
process group, which we are not in: etcd outlives the starter's last words.

Nothing but the standard library is imported: start-up takes 30 ms.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1
LOG_NAME = "etcd.log"
MAX_REPORT_BYTES = 4096
"""Fits a pipe that nobody reads."""


def main() -> int:
    data_dir, *command = sys.argv[1:]
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    log_path = os.path.join(data_dir, LOG_NAME)
    try:
        with open(log_path, "wb") as log:
            try:
                etcd = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                )
            except OSError as error:
                print(error)
                return 1
        select.select([sys.stdin, wake_read], [], [])
        if etcd.poll() is not None:
            _report(log_path)
        etcd.kill()
        return etcd.wait()
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


def _report(log_path: str) -> None:
    """The last lines of etcd's log, for a starter who asks why it ended."""
    with open(log_path, "rb") as log:
        log.seek(max(0, os.path.getsize(log_path) - MAX_REPORT_BYTES))
        sys.stdout.buffer.write(log.read())


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
