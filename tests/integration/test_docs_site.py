"""docs/ builds as a site with warnings as errors, and needs nothing from elsewhere."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xllm.flag_table import ROLES, role_flags

ROOT = Path(__file__).parents[2]

_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?([^"'\s>]+)"""
    r"""|<link\b[^>]*\brel=["']?(?:stylesheet|icon|preconnect|preload)\b[^>]*"""
    r"""\bhref=["']?([^"'\s>]+)"""
)
_IN_CSS = re.compile(r"""(?:url\(|@import\s+)["']?(https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        name = f"{page.stem}.html"
        assert (site / name).exists()
        assert name in start, f"{name} is not in mkdocs.yml's nav"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        loaded = [a or b for a, b in _LOADED.findall(page.read_text())]
        assert loaded, "the theme's own"
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == [], page.name
    for sheet in site.rglob("*.css"):
        assert not _IN_CSS.search(sheet.read_text()), sheet.name


def test_the_page_of_flags_has_all_of_them_with_their_meaning(site: Path) -> None:
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "flags.html").read_text()))
    for role in ROLES:
        for flag in role_flags(role):
            assert flag.name in page
            assert flag.help.replace("`", "") in page, flag.name


def test_pictures_are_drawn_from_the_figures() -> None:
    drawn = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import json, plots; print(json.dumps(plots.draw_all()))",
        ],
        cwd=ROOT / "scripts" / "site",
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    pictures: dict[str, str] = json.loads(drawn.stdout)
    assert len(pictures) >= 5
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text()
    for name, picture in pictures.items():
        committed = (ROOT / "docs" / "pictures" / name).read_text()
        assert committed == picture, f"{name}: run scripts/site/plots.py"
        assert name in benchmarks
