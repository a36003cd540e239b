"""How the page looks and what it says of the server: states, key, sizes, directions, colours, keyboard. In a real browser."""

from __future__ import annotations

import threading

import pytest
from page_server import PageServer, failure

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

ANSWER = [
    ("reasoning", "The user asks."),
    ("text", "# Title\n\nText with `code`, $x^2$ and [a link](https://example.org).\n\n> Quote\n\n"),
    ("text", "```python\n# comment\ndef f(x: int) -> str:\n    return 'a' + str(1.5)\n```\n\n| a | b |\n|--|--:|\n| 1 | 2 |\n"),
]  # fmt: skip

PLAN = {"total_bytes": 13.2e9, "weights_bytes": 12.5e9, "kv_cache_bytes": 6e8, "scratch_bytes": 1e8}
READY = {
    "id": "demo-gpt-oss", "state": "ready", "running": 1, "waiting": 0, "context_length": 8192, "kept_bytes": 3e7, "plan": PLAN,
}  # fmt: skip


# --- what the server does


def test_a_server_that_goes_and_comes_back(server, chat):
    chat.expected.append("ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET")
    chat.say("cats")
    server.stop()
    chat.page.evaluate("dispatchEvent(new Event('focus'))")
    chat.wait_for_state("gone")
    assert chat.page.locator("#gone-banner").is_visible()
    assert chat.page.locator("#state-text").inner_text() == "Server gone"
    # What is written now is not lost, and nothing pretends to be sent
    chat.page.fill("#prompt", "dogs")
    chat.page.press("#prompt", "Enter")
    chat.page.locator(".notice").wait_for()
    assert chat.page.input_value("#prompt") == "dogs"
    assert chat.page.locator(".bubble").count() == 1
    server.start()
    chat.wait_for_state("ready")  # by itself
    assert not chat.page.locator("#gone-banner").is_visible()
    chat.page.press("#prompt", "Enter")
    chat.wait_until_answered()
    assert chat.answers() == ["Hello.", "Hello."]


def test_a_connection_that_breaks_keeps_the_beginning(server, chat):
    chat.expected.append("ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET")
    server.script = lambda body: [("text", "The beginning"), ("hold", threading.Event())]
    chat.say("Go on", wait=False)
    chat.page.wait_for_selector(".message.answer p")
    server.stop()
    chat.page.locator(".trouble").wait_for()
    assert chat.answers() == ["The beginning"]
    assert "The connection to the server broke." in chat.page.locator(".trouble").inner_text()
    chat.wait_for_state("gone")
    server.script = lambda body: [("text", "All of it")]
    server.start()
    chat.wait_for_state("ready")
    chat.page.get_by_role("button", name="Try again").click()
    chat.page.locator(".message.answer", has_text="All of it").wait_for()
    chat.wait_until_answered()


def test_an_answer_that_ends_without_its_end_is_told(server, chat):
    server.script = lambda body: [("text", "The beginning"), ("break",)]
    chat.say("Go on")
    assert "The connection to the server broke." in chat.page.locator(".trouble").inner_text()


def test_loading_is_told_by_name_and_requests_wait(server, new_chat):
    server.health = {"status": "loading", "models": [{"id": "demo-gpt-oss", "state": "loading", "seconds": 1.0}]}
    chat = new_chat().open("loading")
    chat.expected.append("status of 503")
    assert chat.page.locator("#state-text").inner_text() == "Loading demo-gpt-oss"
    answers = iter(
        [failure(503, "demo-gpt-oss is being loaded.", "model_loading", retry_after=30), [("text", "Ready now")]]
    )
    server.script = lambda body: next(answers)
    chat.say("Hi", wait=False)
    chat.wait_for("document.querySelector('.waiting-text')?.textContent.startsWith('The server is loading the model')")
    server.health = {"status": "ok", "models": [{"id": "demo-gpt-oss", "state": "ready"}]}
    chat.wait_until_answered()  # long before the 30 seconds are over
    assert chat.answers() == ["Ready now"]
    assert chat.page.locator("#state-text").inner_text() == "Ready"


def test_busy_is_told(server, new_chat):
    server.health = {"models": [{"id": "demo-gpt-oss", "state": "ready", "running": 8, "waiting": 3}]}
    chat = new_chat().open("busy")
    assert chat.page.locator("#state-text").inner_text() == "Busy, 3 waiting"


def test_memory_and_the_plan_are_told(server, new_chat):
    memory = {"used_bytes": 12_100_000_000, "cached_bytes": 0, "limit_bytes": 16_400_000_000}
    server.health = {"status": "ok", "memory": memory, "models": [READY, {"id": "demo-openelm", "state": "unloaded"}]}
    chat = new_chat().open()
    line = chat.page.locator("#memory")
    assert line.inner_text() == "Memory 12.1 GB of 16.4 GB, planned 13.2 GB"
    plan = "A context of 8,192 tokens, weights 12.5 GB, keys and values 600 MB, scratch 100 MB, beginnings of prompts 30 MB"
    assert line.get_attribute("title") == plan
    chat.page.click("#settings")
    assert chat.page.locator(".plan").inner_text() == f"demo-gpt-oss: {plan}."
    chat.page.keyboard.press("Escape")
    chat.page.select_option("#model", "demo-openelm")  # which is not in memory
    assert line.inner_text() == "Memory 12.1 GB of 16.4 GB"


def test_tools_that_the_server_runs_are_told(server, new_chat):
    names = ["calculator", "browser.search", "browser.open"]
    server.health = {"status": "ok", "models": [READY], "memory": {"used_bytes": 12_100_000_000}, "tools": names}
    line = new_chat().open().page.locator("#memory")
    assert line.inner_text() == "Memory 12.1 GB, planned 13.2 GB · The server runs calculator, browser"


def test_a_download_is_told(server, new_chat):
    loading = {"id": "demo-gpt-oss", "state": "loading", "seconds": 3.0, "downloaded": 30, "total": 120}
    server.health = {"status": "loading", "models": [loading]}
    chat = new_chat().open("loading")
    assert chat.page.locator("#state-text").inner_text() == "Loading demo-gpt-oss, 25 %"


def test_without_the_key_the_state_alone_is_known(server, new_chat):
    server.health = {"status": "loading"}
    chat = new_chat().open("loading")
    assert chat.page.locator("#state-text").inner_text() == "Loading the model"


def test_a_key_is_asked_for_once(server, new_chat):
    server.key = "secret"
    chat = new_chat()
    chat.expected.append("status of 401")
    chat.open("locked")
    dialog = chat.page.get_by_role("dialog", name="API key")
    for wrong in ("wrong", "Schlüssel", "a b", "🔑"):
        dialog.get_by_label("Key", exact=True).fill(wrong)
        chat.page.keyboard.press("Enter")
        dialog.get_by_text("The server does not take this key.").wait_for()
    assert chat.page.get_attribute("#key", "type") == "password"
    chat.page.keyboard.type("secret")  # the wrong one is selected
    chat.page.keyboard.press("Enter")
    chat.wait_for_state("ready")
    dialog.wait_for(state="detached")
    chat.say("Hi")
    assert chat.answers() == ["Hello."]
    chat.page.reload()
    chat.wait_for_state("ready")
    assert chat.page.locator("dialog").count() == 0
    chat.page.click("#settings")
    chat.page.get_by_role("button", name="Forget the API key").click()
    chat.page.reload()
    dialog.wait_for()


def test_a_key_that_is_needed_in_the_middle_is_asked_for_then(server, chat):
    chat.expected.append("status of 401")
    server.key = "secret"
    chat.say("Hi", wait=False)
    dialog = chat.page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key", exact=True).fill("secret")
    dialog.get_by_label("Keep it in this browser").uncheck()
    dialog.get_by_role("button", name="Continue").click()
    chat.wait_until_answered()
    assert chat.answers() == ["Hello."]
    chat.page.reload()
    dialog.wait_for()  # it was for this tab only


# --- how it looks


def test_a_phone(server, new_chat):
    chat = new_chat(viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True).open()
    server.script = lambda body: [
        *ANSWER,
        ("text", "\n\n| " + "wide | " * 30 + "\n|" + "--|" * 30 + "\n\n" + "long" * 200),
    ]
    chat.say("A question that is long enough for more than one line on a phone")
    parts = "[...document.querySelectorAll('body, main, #scroller, #messages, .message')]"
    assert (
        chat.page.evaluate(f"{parts}.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))")
        == []
    )
    assert not chat.page.locator("#sidebar").is_visible()
    chat.page.tap("#toggle-sidebar")
    assert chat.page.locator("#conversations li").is_visible()
    for selector in ("#new-chat", "#close-sidebar", "#toggle-sidebar", "#settings", "#conversations .open"):
        assert chat.page.locator(selector).bounding_box()["height"] >= 38, selector
    chat.page.tap("#conversations .open")
    assert not chat.page.locator("#sidebar").is_visible()
    chat.page.tap("#settings")
    box = chat.page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def test_text_from_right_to_left(server, chat):
    server.script = lambda body: [
        ("text", "مرحبا `code` بك\n\nAnd English.\n\n- שלום\n- עולם\n\n```python\nx = 1\n```\n")
    ]
    chat.say("اكتب شيئا")
    direction = "(e) => getComputedStyle(e).direction"
    chosen = {selector: chat.page.eval_on_selector(selector, direction) for selector in (
        ".bubble", ".message.answer p >> nth=0", ".message.answer p >> nth=1", ".message.answer ul", ".message.answer pre",
    )}  # fmt: skip
    assert list(chosen.values()) == ["rtl", "rtl", "ltr", "rtl", "ltr"]
    chat.page.fill("#prompt", "שלום")
    assert chat.page.eval_on_selector("#prompt", direction) == "rtl"
    chat.page.fill("#prompt", "hello")
    assert chat.page.eval_on_selector("#prompt", direction) == "ltr"


def test_dark_by_the_system_and_by_hand(server, new_chat):
    ground = "getComputedStyle(document.body).backgroundColor"
    chat = new_chat(color_scheme="dark").open()
    dark = chat.page.evaluate(ground)
    chat.page.emulate_media(color_scheme="light")
    light = chat.page.evaluate(ground)
    assert light == "rgb(255, 255, 255)" != dark
    chat.page.click("#settings")
    chat.page.get_by_label("Dark").check()
    assert chat.page.evaluate(ground) == dark
    chat.page.reload()
    assert chat.page.evaluate(ground) == dark
    chat.page.click("#settings")
    chat.page.get_by_label("As the system").check()
    assert chat.page.evaluate(ground) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_by_axe(server, new_chat, axe, scheme):
    chat = new_chat(color_scheme=scheme, bypass_csp=True, reduced_motion="reduce").open()
    # Between the two schemes nothing changes but colours.
    rules = {"resultTypes": ["violations"]}
    if scheme == "dark":
        rules["runOnly"] = {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}

    def violations() -> list[str]:
        found = axe.run(chat.page, options=rules).response["violations"]
        return [f"{each['id']}: {node['html'][:120]} {node['any'][:1]}" for each in found for node in each["nodes"]]

    assert violations() == []
    server.script = lambda body: ANSWER
    chat.say("Hi")
    chat.page.click(".reasoning summary")
    chat.page.hover(".message.answer")
    server.script = lambda body: [("call", "call_1", "calculator", "{}")]
    chat.say("Calculate")
    assert violations() == []
    chat.menu("Hi", "Rename")
    chat.page.keyboard.press("Escape")
    chat.page.click("#settings")
    chat.page.get_by_text("Tools", exact=True).click()
    assert violations() == []


def test_motion_is_reduced_where_it_is_not_wanted(server, new_chat):
    chat = new_chat(reduced_motion="reduce").open()
    server.script = lambda body: [("hold", threading.Event())]
    chat.say("Hi", wait=False)
    chat.page.wait_for_selector(".pulse")
    assert chat.page.eval_on_selector(".pulse", "(e) => getComputedStyle(e).animationName") == "none"


def test_a_reader_is_told_states_and_the_whole_answer_but_no_tokens(server, chat):
    event = threading.Event()
    server.script = lambda body: [("reasoning", "Hm"), ("hold", event), *[("text", each) for each in "A whole answer."]]
    chat.page.evaluate(
        """() => {
            window.told = [];
            const told = document.querySelector("#announcer");
            new MutationObserver(() => window.told.push(told.textContent)).observe(told, { childList: true });
        }"""
    )
    chat.say("Hi", wait=False)
    chat.wait_for("window.told.includes('The model is thinking')")
    assert chat.page.get_attribute(".message.answer", "aria-busy") == "true"
    event.set()
    chat.wait_until_answered()
    told = chat.page.evaluate("window.told")
    written = [each for each in told if each != "The answer is being written"]  # which may take no time
    assert written == ["Waiting for the answer", "The model is thinking", "Answer: A whole answer."]
    assert chat.page.get_attribute(".message.answer", "aria-busy") == "false"
    assert chat.page.get_attribute("#announcer", "aria-live") == "polite"


# --- without a pointer


def test_all_by_keyboard(server, chat):
    keyboard = chat.page.keyboard
    focused = "(e => e.id || e.getAttribute('aria-label') || e.className)(document.activeElement)"
    assert chat.page.evaluate(focused) == "prompt"  # one can begin to write at once
    keyboard.type("First line")
    keyboard.press("Shift+Enter")
    keyboard.type("second")
    keyboard.press("Enter")
    chat.wait_until_answered()
    assert chat.sent() == [("user", "First line\nsecond")]
    assert chat.page.evaluate(focused) == "prompt"
    # Again, and back to the version before
    keyboard.press("Control+Shift+Enter")
    chat.page.wait_for_selector(".versions")
    chat.wait_until_answered()
    # Edit
    keyboard.press("ArrowUp")
    assert chat.page.evaluate(focused) == "Edit your message"
    keyboard.press("Control+a")
    keyboard.type("third")
    keyboard.press("Enter")
    chat.page.locator(".bubble", has_text="third").wait_for()
    chat.wait_until_answered()
    # Dialogs give the focus back
    keyboard.press("Control+/")
    assert chat.page.get_by_role("dialog", name="Keyboard").is_visible()
    keyboard.press("Escape")
    assert chat.page.evaluate(focused) == "prompt"
    keyboard.press("Control+,")
    assert chat.page.get_by_role("dialog", name="Settings").is_visible()
    keyboard.press("Escape")
    keyboard.press("Control+Shift+O")
    assert chat.page.locator(".message").count() == 0
    # The list: search, down to the entry, open, its menu
    keyboard.press("Control+k")
    assert chat.page.evaluate(focused) == "search"
    keyboard.type("first line")
    chat.wait_for("document.querySelectorAll('#conversations li').length === 1")
    keyboard.press("Tab")
    keyboard.press("Enter")
    assert chat.page.locator(".bubble").inner_text() == "third"
    keyboard.press("Control+b")
    assert not chat.page.locator("#sidebar").is_visible()


def test_everything_can_be_reached_by_tab_and_is_seen_to_be(server, chat):
    server.script = lambda body: ANSWER
    chat.say("Hi")
    chat.page.focus(".skip")
    reached, seen = [], []
    for _ in range(40):
        chat.page.keyboard.press("Tab")
        name, outline = chat.page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
                const ringed = (x) => getComputedStyle(x).outlineStyle !== "none" && getComputedStyle(x).outlineWidth !== "0px";
                return [e.getAttribute("aria-label") || e.textContent.trim().slice(0, 20) || e.tagName,
                        ringed(e) || ringed(e.parentElement) || e.id === "prompt"]; }"""
        )
        reached.append(name)
        if name != "BODY" and not outline:
            seen.append(name)
        if name == "Message":
            break
    for each in (
        "New chat", "Search the chats", "Hi", "More for Hi", "Export all", "Model", "Settings", "Conversation",
        "Copy this code", "Edit this message", "Answer again", "Copy this answer", "Message",
    ):  # fmt: skip
        assert each in reached, (each, reached)
    assert seen == []


def test_words_that_are_still_being_composed_are_not_sent(server, chat):
    """Enter takes a suggestion of a Japanese keyboard; it is not for the page."""
    chat.page.fill("#prompt", "にほん")
    for composing in ({"isComposing": True}, {"keyCode": 229}):
        chat.page.evaluate(
            """(composing) => document.querySelector("#prompt").dispatchEvent(
                new KeyboardEvent("keydown", { key: "Enter", bubbles: true, ...composing }))""",
            composing,
        )
    assert chat.page.input_value("#prompt") == "にほん"
    assert server.requests == []


def test_the_server_of_these_tests_keeps_its_port():
    running = PageServer()
    port = running.port
    running.stop()
    running.start()
    assert running.port == port
    running.stop()
