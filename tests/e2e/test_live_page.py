"""People look at a cluster: a real browser, a master, two workers, of which one is killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from browser import TIMEOUT_MS, Viewer, chromium
from playwright.sync_api import Browser, Locator, Page, expect
from processes import Launcher, Master, Worker, ask

WORKER_FLAGS = (
    *("--dtype=float32", "--max_cache_size=128M", "--max_model_len=1024", "--num_threads=1"),
    *("--host_cache_size=64M", "--max_tokens_per_batch=256", "--max_seqs_per_batch=8"),
    *("--enable_cache_upload=true", "--lease_ttl=3"),
)
SEEN_WITHIN_S = 5.0
"""What is promised of a killed worker."""


@dataclass
class Rig:
    browser: Browser
    master: Master
    workers: list[Worker]

    def open(self, **options: object) -> Viewer:
        viewer = Viewer(self.browser, self.master.operator_url, **options)
        expect(viewer.page.locator("#status")).to_have_text("live", timeout=TIMEOUT_MS)
        return viewer


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def rig(browser: Browser, module_launcher: Launcher, default_model_folder: Path) -> Rig:
    etcd = module_launcher.etcd()
    workers = [module_launcher.worker(etcd, *WORKER_FLAGS, wait_ready=False) for _ in range(2)]
    return Rig(browser, module_launcher.master(etcd), workers)


def card(page: Page, worker: Worker) -> Locator:
    return page.locator(f".worker[data-worker='{worker.worker_id}']")


def ask_here(page: Page, times: int) -> None:
    """Presses the button, until the answer of the `times`-th time is complete."""
    page.click("#ask")
    expect(page.locator(".ask-line")).to_have_count(times, timeout=TIMEOUT_MS)
    expect(page.locator("#ask")).to_have_text("Ask", timeout=TIMEOUT_MS)


def test_the_cluster_is_seen(rig: Rig) -> None:
    viewer = rig.open()
    page = viewer.page
    for worker in rig.workers:
        expect(card(page, worker).locator(".chip")).to_have_text("ready", timeout=TIMEOUT_MS)
        for tier in ("device", "host"):
            expect(card(page, worker).locator(f"[data-tier={tier}] .used")).to_contain_text("/ ")
    expect(page.locator(".master.leads")).to_have_count(1, timeout=TIMEOUT_MS)
    expect(page.locator("#facts")).to_contain_text("SmolLM2-135M-Instruct")
    expect(page.locator(".slo")).to_have_count(2)
    expect(page.locator("#no-requests")).to_be_visible()
    assert viewer.problems == []


def test_asked_again_the_first_token_comes_sooner(rig: Rig) -> None:
    viewer = rig.open()
    page = viewer.page
    page.fill("#prompt", "What does <img src=x onerror=alert(1)> do? " * 20)
    page.fill("#max-tokens", "4")
    for times in (1, 2):
        ask_here(page, times)
    late, first = (
        float(page.locator(".ask-line").nth(i).get_attribute("data-ttft") or 0) for i in (0, 1)
    )
    assert 0 < late < first
    asked = page.locator(".ask-line").first
    # From the device that has it; or, if that one is still busy, from there to the other.
    expect(asked.locator(".source")).to_contain_text("tokens from", timeout=TIMEOUT_MS)
    expect(asked.locator(".blocks").locator(".device, .remote").first).to_be_visible()
    assert page.locator("#answer").inner_text() != ""

    row = page.locator(".request").first
    expect(row).to_have_attribute("data-state", "done", timeout=TIMEOUT_MS)
    for phase in ("prefill", "decode"):
        expect(row.locator(f".line .{phase}")).to_have_count(1)
    row.locator("summary").click()
    expect(row.locator(".because")).to_contain_text("First token expected after")
    expect(row.locator("tr.chosen")).to_have_count(1)
    assert {worker.worker_id for worker in rig.workers} == {
        text for text in row.locator("table").first.locator("td.id").all_inner_texts()
    }
    page.click("#lookup")
    held = page.locator(".found-line .stacked .device")
    expect(held.first).to_be_visible(timeout=TIMEOUT_MS)
    viewer.keep("live-page")
    assert viewer.problems == []


def test_clearing_asks_first(rig: Rig) -> None:
    viewer = rig.open()
    page = viewer.page
    page.fill("#prompt", "Remember this until it is cleared. " * 30)
    page.fill("#max-tokens", "2")
    ask_here(page, 1)
    page.click("#lookup")
    device = page.locator(".found-line .stacked .device")
    expect(device).to_have_count(1, timeout=TIMEOUT_MS)

    page.click("#clear-all")
    expect(page.locator("#confirm")).to_be_visible()
    page.click("#confirm-no")
    expect(page.locator("#confirm")).to_be_hidden()
    page.click("#lookup")
    expect(device).to_have_count(1)

    page.click("#clear-all")
    page.click("#confirm-yes")
    expect(page.locator("#toast")).to_contain_text("blocks cleared", timeout=TIMEOUT_MS)
    page.click("#lookup")
    expect(device).to_have_count(0, timeout=TIMEOUT_MS)
    assert viewer.problems == []


def test_a_phone_shows_it_without_scrolling_sideways(rig: Rig) -> None:
    phone = {"viewport": {"width": 360, "height": 780}, "has_touch": True, "is_mobile": True}
    viewer = rig.open(color_scheme="dark", **phone)
    page = viewer.page
    expect(page.locator(".worker")).to_have_count(2, timeout=TIMEOUT_MS)
    page.locator(".request summary").first.click()
    expect(page.locator(".because")).to_be_visible()
    assert page.locator("html").evaluate("html => html.scrollWidth") == 360
    viewer.keep("live-page-phone")
    assert viewer.problems == []


def test_a_killed_worker_is_seen_and_its_requests_go_on(rig: Rig) -> None:
    """Last, because it kills."""
    viewer = rig.open()
    page = viewer.page
    answers: list[str] = []
    question = "Count from one to three hundred in words, one after the other."
    asking = threading.Thread(
        target=lambda: answers.append(
            ask(rig.master.http_url, question, max_tokens=100, ignore_eos=True)
        )
    )
    asking.start()
    running = page.locator(".request[data-state=running]")
    expect(running).to_have_count(1, timeout=TIMEOUT_MS)
    expect(running.locator(".ttft")).to_contain_text("s", timeout=TIMEOUT_MS)
    busy = running.locator(".to").inner_text()
    [victim] = [worker for worker in rig.workers if worker.worker_id == busy]
    [other] = [worker for worker in rig.workers if worker.worker_id != busy]
    victim.kill()
    killed_at = time.monotonic()
    lost = page.locator(f".worker.lost[data-worker='{busy}']")
    lost.wait_for(timeout=TIMEOUT_MS)
    assert time.monotonic() - killed_at < SEEN_WITHIN_S
    moved = page.locator(".request.moved").first
    expect(moved.locator(".to")).to_have_text(f"{busy} → {other.worker_id}", timeout=TIMEOUT_MS)
    viewer.keep("live-page-killed")
    expect(moved).to_have_attribute("data-state", "done", timeout=TIMEOUT_MS)
    asking.join(TIMEOUT_MS / 1e3)
    assert len(answers) == 1
    moved.locator("summary").click()
    expect(moved.locator("table").last.locator("td.id")).to_have_count(2)
    expect(lost.locator(".chip")).to_have_text("gone", timeout=TIMEOUT_MS)
    assert viewer.problems == []


def test_with_a_key_the_page_asks_and_reconnects(browser: Browser, launcher: Launcher) -> None:
    key_file = launcher.folder / "key"
    key_file.write_text("correct-horse-battery\n")
    key_file.chmod(0o600)
    etcd, key_flag = launcher.etcd(), f"--operator_key_file={key_file}"
    master = launcher.master(etcd, key_flag)
    viewer = Viewer(browser, master.operator_url)
    page = viewer.page
    for key in ("wrong-horse-battery", "correct-horse-battery"):
        expect(page.locator("#key-dialog")).to_be_visible(timeout=TIMEOUT_MS)
        page.fill("#key", key)
        page.click("#key-ok")
        if key.startswith("wrong"):
            expect(page.locator("#key-error")).to_have_text("That is not the key.")
    expect(page.locator("#status")).to_have_text("live", timeout=TIMEOUT_MS)
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator(".master.here")).to_have_count(1)
    page.reload()
    status = page.locator("#status")
    expect(status).to_have_text("live", timeout=TIMEOUT_MS)

    master.stop()
    expect(status).to_have_text("reconnecting", timeout=TIMEOUT_MS)
    port = master.operator_url.rpartition(":")[2]
    launcher.master(etcd, key_flag, f"--rpc_server_port={port}")
    expect(status).to_have_text("live", timeout=TIMEOUT_MS)

    page.click("#forget-key")
    expect(page.locator("#key-dialog")).to_be_visible(timeout=TIMEOUT_MS)
    expected = ("401", "ERR_CONNECTION", "ERR_INCOMPLETE_CHUNKED", "ERR_EMPTY_RESPONSE")
    assert [p for p in viewer.problems if not any(part in p for part in expected)] == []
