"""The live page is made of files that cannot turn text into markup, and load nothing from afar."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from xllm.roles.page_files import is_open, page_files

SCRIPTS = sorted(name for name in page_files() if name.endswith(".js"))


def test_all_is_there() -> None:
    assert {"index.html", "style.css", "app.js", "icon.svg"} <= page_files().keys()
    assert sum(map(len, page_files().values())) < 150_000


def test_which_paths_are_for_everybody() -> None:
    assert is_open("/")
    assert is_open("/page/app.js")
    assert not is_open("/page")
    assert not is_open("/admin/live")


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_never_becomes_markup_or_code(name: str) -> None:
    source = page_files()[name].decode()
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    )
    assert re.findall(forbidden, source) == []


@pytest.mark.parametrize("name", sorted(page_files()))
def test_nothing_comes_from_elsewhere(name: str) -> None:
    source = page_files()[name].decode().replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"https?://|url\(|@import", source) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_modules_import_what_there_is(name: str) -> None:
    source = page_files()[name].decode()
    for names, module in re.findall(r'import \{([^}]+)\} from "\./([\w.]+)"', source):
        other = page_files()[module].decode()
        exported = set(re.findall(r"export (?:async )?(?:function\*?|class|const) (\w+)", other))
        assert {one.strip() for one in names.split(",") if one.strip()} <= exported


def test_the_page_has_no_inline_code_or_style() -> None:
    problems = []

    class Look(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names = {name for name, _ in attrs}
            if tag == "style" or (tag == "script" and "src" not in names):
                problems.append(tag)
            problems.extend(n for n in names if n == "style" or n.startswith("on"))

    Look().feed(page_files()["index.html"].decode())
    assert problems == []
