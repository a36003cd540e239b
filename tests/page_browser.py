"""The chat page in a real browser, for tests: Chromium without a window, and a server whose answers are scripts.

Tests share the browser, and those of a file a server and a tab, which are left as new ones would be: what Chromium has read
of the page serves all of them. Who changes the tab has a profile of its own (`new_chat`). At a test's end nothing may have
failed in the page, the policy may not have had to forbid anything, and no other host may have been asked for anything.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from page_server import PageServer

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
# A loaded machine may need long for what takes a moment. Nothing waits for this time to pass.
PATIENCE = 60_000  # ms


def browser_path() -> str | None:
    """Chromium or Chrome on this machine."""
    named = os.environ.get("OPENELM_MLX_CHROMIUM")
    found = (shutil.which(each) or (each if Path(each).is_file() else None) for each in (named, *BROWSERS) if each)
    return next((each for each in found if each), None)


def missing(what: str) -> None:
    """Skips a test, or fails it where the browser's tests are what is run."""
    reason = f"{what} is not installed (openelm_mlx[browser] is what Python needs)"
    if os.environ.get("OPENELM_MLX_REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


def library(name: str) -> Any:
    """A module of the browser's extra."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return missing(name.split(".")[0])


# What is open for the files of browser tests, which follow each other.
_opened = ExitStack()
_browsers: list[Any] = []


@pytest.fixture(scope="module")
def chromium() -> Any:
    if not _browsers:
        path = browser_path()
        if path is None:
            missing("Chromium or Chrome")
        sync_api = library("playwright.sync_api")
        sync_api.expect.set_options(timeout=PATIENCE)
        playwright = _opened.enter_context(sync_api.sync_playwright())
        _browsers.append(playwright.chromium.launch(executable_path=path))
        _opened.callback(_browsers.clear)
        _opened.callback(_browsers[0].close)
    return _browsers[0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Not for longer: Playwright keeps an event loop on its thread, where other tests want their own."""
    if nextitem is None or nextitem.get_closest_marker("browser") is None:
        _opened.close()


@pytest.fixture
def axe() -> Any:
    """Deque's checks of accessibility."""
    return library("axe_playwright_python.sync_playwright").Axe()


@pytest.fixture(scope="module")
def page_server() -> Iterator[PageServer]:
    running = PageServer()
    yield running
    running.stop()


@pytest.fixture
def server(page_server: PageServer) -> PageServer:
    """As a new one: with the usual models, no key, and nothing asked so far."""
    page_server.renew()
    return page_server


class Chat:
    """A tab with the page, and what a person does there."""

    def __init__(self, context: Any, server: PageServer, page: Any = None) -> None:
        self.context, self.server = context, server
        self.page = page or context.new_page()
        # What a test causes on purpose, as patterns of the browser's messages
        self.expected: list[str] = []
        self.messages: list[str] = []
        self.hosts: set[str] = set()
        self._listeners: dict[str, Any] = {
            "console": lambda message: self.messages.append(f"{message.type}: {message.text}"),
            "pageerror": lambda error: self.messages.append(f"error: {error}"),
            "request": lambda request: self.hosts.add(urlsplit(request.url).netloc),
        }
        for event, listener in self._listeners.items():
            self.page.on(event, listener)

    def open(self, state: str = "ready") -> Chat:
        self.page.goto(self.server.url)
        self.wait_for_state(state)
        return self

    def wait_for_state(self, state: str) -> None:
        self.page.wait_for_selector(f"#state[data-state={state}]")

    def say(self, text: str, wait: bool = True) -> None:
        """Types and sends a message; waits until it has been answered."""
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        if wait:
            self.wait_until_answered()

    def wait_until_answered(self) -> None:
        self.page.wait_for_selector("#send[aria-label=Send]")

    def answers(self) -> list[str]:
        return [each.inner_text() for each in self.page.query_selector_all(".message.answer > .markdown")]

    def sent(self) -> list[tuple[str, Any]]:
        """Roles and contents of the newest request."""
        return [(each["role"], each["content"]) for each in self.server.requests[-1]["messages"]]

    def titles(self) -> list[str]:
        """Of the chats in the list, which is drawn in the frame after a change."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return [each.inner_text() for each in self.page.query_selector_all("#conversations .open")]

    def wait_for(self, expression: str, argument: Any = None) -> None:
        """Waits until an expression of the page is true. (Playwright's own wait is forbidden by the page's policy.)"""
        until = time.monotonic() + PATIENCE / 1000
        while not self.page.evaluate(expression, argument):
            assert time.monotonic() < until, f"{expression} has not become true"
            self.page.wait_for_timeout(20)

    def menu(self, title: str, item: str) -> None:
        """Chooses from the menu of a conversation in the list."""
        entry = self.page.locator("#conversations li", has_text=title)
        entry.hover()
        entry.locator("summary").click()
        entry.get_by_role("button", name=item).click()

    def take_in(self, file: Any) -> None:
        """Imports a file: JSON, or bytes as they are."""
        body = file if isinstance(file, bytes) else json.dumps(file).encode()
        self.page.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": body})

    def saved(self) -> None:
        """Waits until the browser has stored all there is to store."""
        self.page.evaluate("new Promise((done) => setTimeout(done, 600))")  # longer than writes are put off

    def check(self) -> None:
        """Nothing failed, nothing was forbidden, and nobody else was asked."""
        known = [*self.expected, r"^(log|info|debug|warning): (?!.*(Content Security Policy|TrustedHTML))"]
        assert [text for text in self.messages if not any(re.search(each, text) for each in known)] == []
        assert self.hosts - {""} == {urlsplit(self.server.url).netloc}

    def leave(self) -> None:
        """Leaves the tab to the next test as a new one would be: nothing stored, nothing listening, no second tab."""
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)
        for each in self.context.pages:
            if each != self.page:
                each.close()
        self.page.mouse.move(0, 0)
        self.server.renew()  # a test that failed may have stopped it
        # A page of the same site and no empty one: for that Chromium takes another process, and then another one again.
        self.page.goto(self.server.url + "health")
        devtools = self.context.new_cdp_session(self.page)
        origin = self.server.url.rstrip("/")
        devtools.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
        devtools.detach()


def new_context(chromium: Any, **options: Any) -> Any:
    """A profile."""
    context = chromium.new_context(**{"viewport": {"width": 1180, "height": 820}, "locale": "en-US", **options})
    context.set_default_timeout(PATIENCE)
    return context


@pytest.fixture
def new_chat(chromium: Any, server: PageServer) -> Iterator[Any]:
    """Makes tabs, each in a profile with the given options; all are checked and closed at the end."""
    chats: list[Chat] = []

    def new(**options: Any) -> Chat:
        chats.append(Chat(new_context(chromium, **options), server))
        return chats[-1]

    yield new
    for chat in chats:
        chat.check()
        chat.context.close()


@pytest.fixture(scope="module")
def tab(chromium: Any) -> Iterator[Any]:
    """One tab for many tests: a new one costs Chromium more than most of them do with it."""
    context = new_context(chromium)
    yield context.new_page()
    context.close()


@pytest.fixture
def chat(tab: Any, server: PageServer) -> Iterator[Chat]:
    """The page, opened. A test that changes the tab or its profile, as a script for each page does, asks for new_chat."""
    chat = Chat(tab.context, server, tab).open()
    try:
        yield chat
        chat.check()
    finally:
        chat.leave()
