"""Draws the pictures of the chat page anew, in Chromium: two with the answer that is written below, one with the demo's.

pip install '.[browser,test]' && python docs/images/make_page.py
"""

import re
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "tests")]

from page_browser import browser_path  # noqa: E402
from page_server import PageServer, Step  # noqa: E402

REASONING = "A dictionary of words and counts is enough; Counter is one. The entropy needs the share of each word."
ANSWER = r"""`Counter` counts whatever it is given, so that one line is enough:

```python
from collections import Counter

def count_words(text: str) -> Counter[str]:
    "How often each word of a text occurs, without case."
    return Counter(word.strip(".,;!?").lower() for word in text.split())
```

With $n_i$ the count of word $i$, the entropy of the text in bits a word is

$$
H = -\sum_{i=1}^{k} p_i \log_2 p_i, \qquad p_i = \frac{n_i}{\sum_j n_j}
$$

| text | words | $H$ |
|:--|--:|--:|
| a telegram | 12 | 3.4 |
| a novel | 98,000 | 9.2 |
"""
CALCULATOR = (
    '[{"type": "function", "function": {"name": "calculator", "description": "Evaluates an arithmetic expression.", '
    '"parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}}}]'
)


class Pause:
    """A step that lets some milliseconds pass, as between tokens."""

    def __init__(self) -> None:
        self.asked = 0

    def is_set(self) -> bool:
        self.asked += 1
        return self.asked > 1


def steps() -> list[Step]:
    tokens = [("reasoning", each) for each in re.findall(r"\S+\s*", REASONING)]
    tokens += [("text", each) for each in re.findall(r"\w+|\W", ANSWER)]
    usage = {"prompt_tokens": 92, "completion_tokens": len(tokens), "prompt_tokens_details": {"cached_tokens": 64}}
    return [("usage", usage), *(step for token in tokens for step in (token, ("hold", Pause())))]


def say(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send[aria-label=Send]", timeout=120_000)
    page.wait_for_timeout(500)


def open_page(browser: Browser, url: str, **options: object) -> Page:
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    page.goto(url)
    page.wait_for_selector("#state[data-state=ready]", timeout=120_000)
    return page


def written(browser: Browser) -> None:
    server = PageServer()
    server.models = ["example"]
    server.script = lambda body: steps()
    phone = {"viewport": {"width": 390, "height": 760}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}
    for name, options in {"page.png": {"viewport": {"width": 1100, "height": 860}}, "page_phone.png": phone}.items():
        page = open_page(browser, server.url, **options)
        say(page, "How do I count the words of a text, and what is its entropy?")
        if "is_mobile" not in options:
            page.click(".reasoning summary")
            page.mouse.move(700, 5)
            page.wait_for_timeout(300)
        page.screenshot(path=HERE / name)
    server.stop()


def demo(browser: Browser) -> None:
    command = [sys.executable, "-m", "openelm_mlx", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found = None
        while not found:
            found = re.search(r"http://[\d.]+:\d+", process.stderr.readline())  # type: ignore[union-attr]
        page = open_page(browser, f"{found[0]}/", viewport={"width": 1000, "height": 640})
        page.click("#settings")
        page.get_by_text("Tools", exact=True).click()
        page.fill("#tools", CALCULATOR)
        page.keyboard.press("Escape")
        say(page, "What is 17 * 23?")
        page.fill(".results textarea", "391")
        page.click(".results button")
        page.locator(".message.answer > .markdown", has_text="391").wait_for()
        page.wait_for_selector("#send[aria-label=Send]")
        page.wait_for_timeout(500)
        page.screenshot(path=HERE / "page_tool.png")
        process.terminate()


if __name__ == "__main__":
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path())
        written(chromium)
        demo(chromium)
