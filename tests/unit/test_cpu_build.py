"""Building the native kernels: once, for the right CPU, and with a clear reason when it fails.

A shell script stands in for the compiler and counts how often it is run.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from xllm.engine.kernels.cpu import build
from xllm.engine.kernels.cpu.build import BuildError, Isa

PORTABLE = Isa("portable")
NUM_SOURCES = len(list(build.SOURCES.glob("*.cpp")))


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes the file after -o and a line to its log; fails while `broken` exists."""
    script = tmp_path / "compiler"
    script.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && {{ cat {tmp_path}/version; exit 0; }}
[ -e {tmp_path}/broken ] && {{ echo "no such instruction" >&2; exit 1; }}
echo run >> {tmp_path}/log
while [ "$1" != -o ]; do shift; done
echo object > "$2"
"""
    )
    script.chmod(0o755)
    (tmp_path / "version").write_text("compiler 1.0")
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def num_runs(folder: Path) -> int:
    return len((folder / "log").read_text().splitlines())


def test_a_library_is_built_once(compiler: Path) -> None:
    first = build.build_library(PORTABLE)
    assert first.read_text() == "object\n"
    assert num_runs(compiler) == NUM_SOURCES + 1
    assert build.build_library(PORTABLE) == first
    assert num_runs(compiler) == NUM_SOURCES + 1
    assert {path.name for path in first.parent.iterdir()} == {first.name, "lock"}


def test_several_that_start_together_build_once(compiler: Path) -> None:
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(build.build_library(PORTABLE)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 4
    assert num_runs(compiler) == NUM_SOURCES + 1


def test_flags_and_compiler_have_libraries_of_their_own(compiler: Path) -> None:
    first = build.build_library(PORTABLE)
    with_flag = build.build_library(PORTABLE, ("-O1",))
    (compiler / "version").write_text("compiler 2.0")
    upgraded = build.build_library(PORTABLE)
    assert len({first, with_flag, upgraded}) == 3


def test_a_failing_compiler_is_quoted_and_leaves_nothing(compiler: Path) -> None:
    (compiler / "broken").touch()
    with pytest.raises(BuildError, match="no such instruction"):
        build.build_library(PORTABLE)
    (compiler / "broken").unlink()
    assert build.build_library(PORTABLE).is_file()


def test_no_compiler(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(compiler / "nothing"))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        build.build_library(PORTABLE)


def test_a_cache_folder_that_cannot_be_written(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (compiler / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiler / "file"))
    with pytest.raises(BuildError, match="cannot build in"):
        build.build_library(PORTABLE)


def test_the_environment_chooses_among_what_the_cpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    supported = build.supported_isas()
    assert build.select_isa() == supported[0]
    monkeypatch.setenv("XLLM_CPU_ISA", "portable")
    assert build.select_isa().name == "portable"
    monkeypatch.setenv("XLLM_CPU_ISA", "mmx")
    with pytest.raises(BuildError, match="XLLM_CPU_ISA=mmx: this CPU runs"):
        build.select_isa()
