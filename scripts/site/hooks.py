"""What mkdocs does not do by itself for our pages: `mkdocs build --strict` calls these.

The page of flags is made from the table that the parser uses, when the site is built. Entries of
the navigation whose page is not there are left out, pages that it does not name are at its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from xllm.flag_table import (
    BOTH_CONCERNS,
    MASTER_CONCERNS,
    WORKER_CONCERNS,
    Concern,
    Flag,
)
from xllm.flags import default_text

FLAGS_PAGE = "flags.md"

_SECTIONS = (
    ("Both roles", BOTH_CONCERNS),
    ("Masters", MASTER_CONCERNS),
    ("Workers", WORKER_CONCERNS),
)

_INTRO = """# Flags

Made from the table that xllm's own parser reads; `xllm --help` shows the same. They are spelled as
xLLM's users know them, and in gflags' language: `--flag=value`, `--flag value`, `--bool`,
`--nobool`, `--flagfile=FILE` with one flag a line. A flag that does not exist, or a value that
cannot work, ends the process with exit code 2 and says what would.
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    folder = Path(config.docs_dir)
    nav = _existing(config.nav or [], folder)
    left_out = sorted({page.name for page in folder.glob("*.md")} - set(_targets(nav)))
    if left_out:
        nav.append({"More": left_out})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, FLAGS_PAGE, content=flags_page()))
    return files


def flags_page() -> str:
    lines = [_INTRO]
    for title, concerns in _SECTIONS:
        lines.append(f"## {title}\n")
        for concern in concerns:
            lines += _table(concern)
    return "\n".join(lines)


def _table(concern: Concern) -> list[str]:
    heading = concern.title[0].upper() + concern.title[1:]
    rows = [_row(flag) for flag in concern.flags]
    return [f"### {heading}\n", "| flag | default | |", "|---|---|---|", *rows, ""]


def _row(flag: Flag) -> str:
    name = f"--[no]{flag.name}" if flag.type.is_boolean else f"--{flag.name}={flag.type.shape}"
    cells = (f"`{name}`", default_text(flag), flag.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _targets(nav: list[Any]) -> list[str]:
    """The pages that it names."""
    targets: list[str] = []
    for entry in nav:
        ((_, target),) = entry.items()
        targets += _targets(target) if isinstance(target, list) else [target]
    return targets


def _existing(nav: list[Any], folder: Path) -> list[Any]:
    """The navigation without pages that are not there, and without sections that are empty."""
    kept: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            if below := _existing(target, folder):
                kept.append({title: below})
        elif target == FLAGS_PAGE or (folder / target).exists():
            kept.append(entry)
    return kept
