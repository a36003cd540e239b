"""The page before the real server and its demo models, as a person would use both. In a real browser."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


@dataclass
class RunningServer:
    """What a tab needs to know of a server."""

    url: str


@pytest.fixture
def server(tmp_path) -> Iterator[RunningServer]:
    """`openelm_mlx serve` with both demos, in a process of its own; it has to end by itself when it is told to."""
    said = tmp_path / "stderr"
    with said.open("w") as stderr:
        command = [
            sys.executable,
            "-m",
            "openelm_mlx",
            "serve",
            "--model",
            "demo-gpt-oss",
            "--model",
            "demo-openelm",
            "--port",
            "0",
        ]
        process = subprocess.Popen(command, stderr=stderr)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said.read_text())):
            assert process.poll() is None, said.read_text()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05)
        yield RunningServer(f"{found[0]}/")
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert "Traceback" not in said.read_text()
    finally:
        process.kill()
        process.wait()


def test_a_chat_with_the_demo_models(server, new_chat):
    chat = new_chat().open()
    chat.say("What does the word river mean?")
    assert chat.answers()[0].strip()
    assert chat.page.locator(".reasoning summary").count() == 1
    chat.say("And the word lake?")
    assert re.search(r"prompt of \d+, \d+ of them cached", chat.page.locator(".statistics").last.inner_text())
    assert re.fullmatch(r"Memory .+ of .+, planned .+", chat.page.locator("#memory").inner_text())

    # The demo calls its calculator, and goes on with the result
    chat.page.click("#new-chat")
    chat.page.click("#settings")
    chat.page.get_by_text("Tools", exact=True).click()
    chat.page.fill("#tools", json.dumps([CALCULATOR]))
    chat.page.keyboard.press("Escape")
    chat.say("What is 17 * 23?")
    assert json.loads(chat.page.locator(".call pre").inner_text()) == {"expression": "17 * 23"}
    chat.page.get_by_label("Result of calculator").fill("391")
    chat.page.get_by_role("button", name="Send the result").click()
    chat.page.locator(".message.answer > .markdown", has_text="391").wait_for()
    chat.wait_until_answered()

    # Another model is loaded when it is asked for
    chat.page.click("#new-chat")
    chat.page.click("#settings")
    chat.page.fill("#tools", "")
    chat.page.keyboard.press("Escape")
    chat.page.select_option("#model", "demo-openelm")
    chat.say("What does the word lantern mean?")
    assert chat.answers()[0].strip()
    assert chat.page.locator(".statistics").inner_text().startswith("demo-openelm · ")
