"""The demo's page in a real browser, on a real cluster with its private Redis."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.cluster_process import Cluster
from tests.redis_process import find_redis_server

WORKERS = 3
BROWSER_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Cluster]:
    """One cluster, with a private Redis, for the tests of the page."""
    find_redis_server()
    cluster = Cluster("demo_app", "-w", str(WORKERS), env={"SECRET_KEY": "a key of this test"})
    try:
        yield cluster.start()
        assert cluster.stop() == 0, cluster.output()
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; without one these tests skip on a laptop and fail on CI."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        message = "chromium is not on PATH (Debian: apt-get install chromium)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=BROWSER_OPTIONS)
        yield running
        running.close()


class Visitor:
    """One person with a browser profile of their own, who notices what goes wrong behind the page."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.url = url
        self.context = context
        self.errors: list[str] = []
        self.page: Page = context.new_page()
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._see)
        self.page.goto(url)
        self.wait_until_live()

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _see(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.errors.append(f"a request to {request.url}")

    def wait_until_live(self) -> None:
        """Wait for the stream of messages."""
        expect(self.page.locator("#live")).to_have_text("live", timeout=15_000)

    def write(self, text: str) -> None:
        """Send a message with the form."""
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.get_by_role("button", name="Send").click()

    def sees(self, text: str) -> None:
        """Wait until the message is there, once."""
        expect(self.page.locator("#messages li").filter(has_text=text)).to_have_count(1, timeout=15_000)

    def cookie(self) -> str:
        """The session cookie."""
        [cookie] = [one for one in self.context.cookies() if one["name"] == "session"]
        return cookie["value"]


VisitFunction = Callable[..., Visitor]


@pytest.fixture
def visit(browser: Browser, demo: Cluster) -> Iterator[VisitFunction]:
    """Open the page in a new profile; at the end no visitor may have noticed an error."""
    visitors: list[Visitor] = []
    url = f"http://127.0.0.1:{demo.port}/"

    def open_page(**options: Any) -> Visitor:
        visitors.append(Visitor(browser.new_context(**options), url))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()
    assert [visitor.errors for visitor in visitors] == [[] for _ in visitors]


def test_two_visitors_see_each_other_s_messages_once(visit: VisitFunction) -> None:
    """A message posted by one is shown to both, once each and in order, with the name of who wrote it."""
    ada, bob = visit(), visit()
    ada.write("hello Bob, this is Ada")
    bob.sees("hello Bob, this is Ada")
    bob.write("hello Ada <b>this is Bob</b>")
    for visitor in (ada, bob):
        visitor.sees("hello Ada <b>this is Bob</b>")
        texts = visitor.page.locator("#messages li").all_inner_texts()
        assert [("Bob, this" in text, "Ada <b>" in text) for text in texts[-2:]] == [(True, False), (False, True)]


def test_the_counter_counts_on_whichever_worker(visit: VisitFunction) -> None:
    """Every click counts one, all workers take turns, and a reload finds the count again."""
    visitor = visit()
    button, count = visitor.page.get_by_role("button", name="Count"), visitor.page.locator("#count")
    for expected in range(1, 7):
        button.click()
        expect(count).to_have_text(str(expected))
    visitor.page.reload()
    expect(count).to_have_text("6")
    visitor.wait_until_live()
    slots = visitor.page.locator("#strip li.worker").all_inner_texts()
    assert len(set(slots[-8:])) == WORKERS


@pytest.mark.alone
def test_answers_are_spread_evenly(visit: VisitFunction) -> None:
    """Twenty questions are answered by all workers, six or seven times each."""
    visitor = visit()
    visitor.page.get_by_role("button", name="Ask 20 times").click()
    spread = visitor.page.locator("#spread")
    expect(spread).to_contain_text("20 answers")
    counts = sorted(int(part.rpartition(": ")[2].rstrip(".")) for part in spread.inner_text().split(", "))
    assert counts == [6, 7, 7]


def test_login_gives_the_session_a_new_id(visit: VisitFunction) -> None:
    """After the login the old cookie is another's; the name goes with messages; logout forgets it all."""
    visitor = visit()
    page = visitor.page
    page.get_by_role("button", name="Count").click()
    expect(page.locator("#count")).to_have_text("1")
    before = visitor.cookie()
    page.get_by_label("Your name").fill("Grace")
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#me")).to_have_text("Grace")
    assert visitor.cookie() != before
    expect(page.locator("#count")).to_have_text("1")
    visitor.write("signed by Grace")
    expect(page.locator("#messages li").filter(has_text="signed by")).to_contain_text("Grace: signed by Grace")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Your name")).to_be_visible()
    expect(page.locator("#count")).to_have_text("0")


def test_the_cached_value_is_the_same_for_everybody(visit: VisitFunction) -> None:
    """Two visitors on different workers read one value, computed by one worker."""
    readings = []
    for visitor in (visit(), visit()):
        for _ in range(2):
            visitor.page.get_by_role("button", name="Read").click()
            expect(visitor.page.locator("#cache-note")).to_contain_text("Computed by worker")
        note = visitor.page.locator("#cache-note").inner_text()
        readings.append((visitor.page.locator("#value").inner_text(), note.partition(",")[0]))
    assert readings[0] == readings[1]


def test_the_page_reconnects_when_all_workers_are_killed(visit: VisitFunction, demo: Cluster) -> None:
    """`kill -9` of every worker: the stream comes back by itself, and what was said meanwhile arrives once."""
    visitor = visit()
    visitor.write("before the crash")
    visitor.sees("before the crash")
    for worker in demo.workers():
        os.kill(worker["pid"], signal.SIGKILL)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert demo.post("/broadcast", body=b"text=while+it+was+away", headers=form).status == 200
    visitor.sees("while it was away")
    visitor.wait_until_live()
    visitor.write("after the crash")
    visitor.sees("after the crash")
    visitor.sees("before the crash")
    noticed, visitor.errors = visitor.errors, []
    assert all("net::ERR_" in error for error in noticed), noticed  # the browser reports the broken stream


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_narrow_screen(visit: VisitFunction, scheme: str) -> None:
    """At 320 px nothing is cut off, in light and dark; every field has a label."""
    visitor = visit(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 320
    assert visitor.page.evaluate("[...document.querySelectorAll('input')].every((field) => field.labels.length === 1)")


def test_the_page_needs_no_inline_code(demo: Cluster) -> None:
    """The policy the page is served with forbids scripts and styles from anywhere but the app's own files."""
    answer = demo.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for inline in (b"style=", b"<script>", b"onclick", b"http://", b"https://"):
        assert inline not in answer.body
