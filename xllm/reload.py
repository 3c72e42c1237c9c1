"""What a process reads again when it gets SIGHUP: keys and certificates."""

from __future__ import annotations

import logging
from collections.abc import Callable

from xllm.errors import ConfigError

logger = logging.getLogger(__name__)


class Reload:
    """One per process; a role adds what it can read again."""

    def __init__(self) -> None:
        self._readers: dict[str, Callable[[], None]] = {}

    def add(self, what: str, read: Callable[[], None]) -> None:
        """`read` raises ConfigError and changes nothing if what it finds cannot be used."""
        self._readers[what] = read

    def run(self) -> None:
        """On the event loop: small local files, and nobody sees half of a change."""
        for what, read in self._readers.items():
            try:
                read()
            except ConfigError as error:
                logger.error("reload_failed what=%s kept=previous reason=%r", what, str(error))
            else:
                logger.info("reloaded what=%s", what)
