"""A headless Chromium for tests of the live page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.missing import skip_or_fail

TIMEOUT_MS = 60_000
"""For whatever a test waits for, on a busy machine."""

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def _find_chromium() -> str:
    for name in _NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    reason = "no chromium on this machine, so the live page is not tested: apt install chromium"
    skip_or_fail(reason)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Fails without one where CI=true, and else skips the test, saying so."""
    path = _find_chromium()
    with sync_playwright() as playwright:
        # Its sandbox needs what containers do not have; it only opens pages of this test.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Viewer:
    """One open page, and what went wrong in it."""

    def __init__(self, browser: Browser, url: str, **options: object) -> None:
        context = browser.new_context(**{"viewport": {"width": 1360, "height": 940}, **options})  # type: ignore[arg-type]
        context.set_default_timeout(TIMEOUT_MS)
        self.page: Page = context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.problems.append(said.text) if said.type == "error" else None,
        )
        self.page.goto(url)

    def keep(self, name: str) -> None:
        """A screenshot of the whole page, among the test's artifacts."""
        folder = Path(os.environ.get("XLLM_TEST_ARTIFACTS", "build/artifacts"))
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"{name}.png", full_page=True)
