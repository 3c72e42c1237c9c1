"""Files with keys in them: small, text, and nobody else's to read."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from xllm.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20


def read_private_file(path: str, flag: str) -> str:
    """The text of the file that `--flag` names.

    A file that others can read or write is used, with a warning: in a container, a mounted secret
    often has no other mode.
    Raises: ConfigError naming the flag.
    """
    name = f"--{flag}={path}"
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}: over {MAX_FILE_BYTES} bytes; expected a file of keys")
    if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning(
            "file_is_not_private flag=%s path=%s mode=%o expected=600 fix='chmod 600 %s'",
            *(flag, path, stat.S_IMODE(mode), path),
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text") from error


def read_private_line(path: str, flag: str, min_chars: int) -> str:
    """The only line of such a file, without the spaces around it.

    Raises: ConfigError.
    """
    text = read_private_file(path, flag).strip()
    if len(text.splitlines()) > 1:
        raise ConfigError(f"--{flag}={path}: expected one line")
    if len(text) < min_chars:
        raise ConfigError(
            f"--{flag}={path}: {len(text)} characters are too few; at least {min_chars}, such as"
            f" from `openssl rand -hex {max(32, min_chars // 2)}`"
        )
    return text
