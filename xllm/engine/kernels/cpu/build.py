"""Compiles `src/*.cpp` for this machine's instruction set, once, on first use.

The library lies in `$XDG_CACHE_HOME|~/.cache/xllm/kernels/<key>/`, where the key hashes everything
it depends on: sources, flags, the compiler's version. A file lock lets one of several processes
that start together build while the others wait, and the library appears by a rename, so it is
whole or not there. Nothing is ever built twice or removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
_ISA_VARIABLE = "XLLM_CPU_ISA"
_COMPILE_TIMEOUT_S = 300
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    # gcc's own AVX-512 headers
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


class BuildError(Exception):
    """There is no working compiler; the message says why."""


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set: what the compiler is told and what the CPU must have."""

    name: str
    flags: tuple[str, ...] = ()
    cpu_flags: frozenset[str] = frozenset()
    """As /proc/cpuinfo spells them."""


_V3 = frozenset({"avx2", "fma", "bmi2", "f16c", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_X86 = (
    Isa("avx512bf16", ("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    Isa("avx512", ("-march=x86-64-v4",), _V4),
    Isa("avx2", ("-march=x86-64-v3",), _V3),
    Isa("portable"),
)
_OTHER = (Isa("portable", ("-mcpu=native",)),)


def supported_isas() -> tuple[Isa, ...]:
    """What this CPU can run, the fastest first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return _OTHER
    flags = _cpu_flags()
    return tuple(isa for isa in _X86 if isa.cpu_flags <= flags)


def select_isa() -> Isa:
    """The fastest, or the one that the environment variable XLLM_CPU_ISA names.

    Raises:
        BuildError: it names one that this CPU cannot run.
    """
    supported = supported_isas()
    wanted = os.environ.get(_ISA_VARIABLE)
    if not wanted:
        return supported[0]
    for isa in supported:
        if isa.name == wanted:
            return isa
    names = ", ".join(isa.name for isa in supported)
    raise BuildError(f"{_ISA_VARIABLE}={wanted}: this CPU runs {names}")


def build_library(isa: Isa, extra_flags: tuple[str, ...] = ()) -> Path:
    """The shared library for `isa`, compiled if it is not in the cache folder yet.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = _find_compiler()
    flags = (*_FLAGS, *isa.flags, *extra_flags)
    folder = _cache_folder() / _key(compiler, flags)
    library = folder / "xllm_kernels.so"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                _compile(compiler, flags, library)
    except OSError as error:
        raise BuildError(f"cannot build in {folder}: {error}") from error
    return library


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """One compiler per source file side by side, then the linker."""
    started = time.monotonic()
    sources = sorted(SOURCES.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        _run_all(
            [
                [compiler, *flags, "-c", str(source), "-o", str(target)]
                for source, target in zip(sources, objects, strict=True)
            ]
        )
        linked = Path(scratch) / library.name
        _run_all([[compiler, *flags, "-shared", "-pthread", *map(str, objects), "-o", str(linked)]])
        os.replace(linked, library)
    logger.info("kernels_built seconds=%.1f path=%s", time.monotonic() - started, library)


def _run_all(commands: list[list[str]]) -> None:
    """Runs the commands at the same time.

    Raises:
        BuildError: with what the first failing one said.
    """
    with ExitStack() as stack:
        processes = []
        for command in commands:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            processes.append(stack.enter_context(process))  # its exit waits for the process
            stack.callback(process.kill)
        try:
            for process in processes:
                _, stderr = process.communicate(timeout=_COMPILE_TIMEOUT_S)
                if process.returncode:
                    raise BuildError(f"the compiler failed: {stderr.strip()[-2000:]}")
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"the compiler took more than {_COMPILE_TIMEOUT_S} s") from error


def _find_compiler() -> str:
    candidates = [os.environ.get("CXX", ""), "g++", "c++", "clang++"]
    for candidate in candidates:
        if candidate and (path := shutil.which(candidate)):
            return path
    raise BuildError("no C++ compiler (CXX, g++, c++, clang++) on PATH")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} --version failed: {error}") from error
    digest = hashlib.sha256(version)
    for flag in flags:
        digest.update(flag.encode() + b"\0")
    if "native" in " ".join(flags):
        digest.update(" ".join(sorted(_cpu_flags())).encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "xllm" / "kernels"


def _cpu_flags() -> frozenset[str]:
    """Of the first CPU; empty where /proc/cpuinfo does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
