"""Conversations that the browser keeps: what survives, and what happens when it cannot keep them. In a real browser."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser


@pytest.fixture
def answered(server, chat):
    """A tab with three conversations, and what the server says in each."""
    server.script = lambda body: [("text", f"About {body['messages'][-1]['content']}: Café")]
    for title in ("cats", "dogs", "mice"):
        chat.say(title)
        chat.page.click("#new-chat")
    return chat


def test_conversations_survive_a_reload(answered):
    chat = answered
    chat.page.get_by_role("button", name="dogs", exact=True).click()
    chat.page.fill("#prompt", "not sent yet")
    chat.saved()
    chat.page.reload()
    chat.wait_for_state("ready")
    assert chat.answers() == ["About dogs: Café"]
    assert chat.page.input_value("#prompt") == "not sent yet"
    assert chat.titles() == ["mice", "dogs", "cats"]
    chat.page.click("#new-chat")
    assert chat.page.input_value("#prompt") == ""
    assert chat.page.locator("#welcome").is_visible()


def test_search_looks_into_titles_and_messages(answered):
    chat = answered
    chat.page.keyboard.press("Control+k")
    chat.page.keyboard.type("ABOUT mi")
    chat.wait_for("document.querySelectorAll('#conversations li').length === 1")
    assert chat.titles() == ["mice"]
    chat.page.fill("#search", "cafe")  # without its accent
    chat.wait_for("document.querySelectorAll('#conversations li').length === 3")
    chat.page.fill("#search", "horses")
    chat.page.get_by_text("Nothing found").wait_for()
    chat.page.press("#search", "Escape")
    chat.wait_for("document.querySelectorAll('#conversations li').length === 3")


def test_rename(answered):
    chat = answered
    chat.menu("dogs", "Rename")
    chat.page.keyboard.type("Hounds")
    chat.page.keyboard.press("Enter")
    assert chat.titles() == ["mice", "Hounds", "cats"]
    chat.menu("cats", "Rename")
    chat.page.keyboard.type("Lost")
    chat.page.keyboard.press("Escape")
    assert chat.titles() == ["mice", "Hounds", "cats"]
    chat.saved()
    chat.page.reload()
    chat.page.get_by_role("button", name="Hounds", exact=True).wait_for()


def test_a_menu_stays_open_while_an_answer_ends(server, answered):
    """The list is drawn anew then; it waits until the menu is closed, and shows the new chat after that."""
    chat, end = answered, threading.Event()
    server.script = lambda body: [("text", "About"), ("hold", end), ("text", " horses")]
    chat.say("horses", wait=False)
    chat.wait_for("document.querySelectorAll('#conversations li').length === 4")
    chat.page.locator("#conversations li", has_text="cats").locator("summary").click()
    end.set()
    chat.wait_until_answered()
    assert chat.titles()[0] == "horses"  # two frames later
    opened = chat.page.locator("#conversations details[open]")
    assert opened.count() == 1
    opened.get_by_role("button", name="Rename").click()
    chat.page.keyboard.type("Lions")
    chat.page.keyboard.press("Enter")
    assert chat.titles() == ["horses", "mice", "dogs", "Lions"]


def test_a_search_closes_an_open_menu_and_shows_what_it_found(answered):
    chat = answered
    chat.page.locator("#conversations li", has_text="cats").locator("summary").click()
    chat.page.keyboard.press("Control+k")
    chat.page.keyboard.type("dogs")
    chat.wait_for("document.querySelectorAll('#conversations li').length === 1")
    assert chat.titles() == ["dogs"]


def test_delete_and_undo(answered):
    chat = answered
    chat.menu("dogs", "Delete")
    chat.page.locator(".notice", has_text="dogs").wait_for()
    assert chat.titles() == ["mice", "cats"]
    chat.page.get_by_role("button", name="Undo").click()
    chat.wait_for("document.querySelectorAll('#conversations li').length === 3")
    assert chat.answers() == ["About dogs: Café"]
    chat.menu("cats", "Delete")
    chat.wait_for("document.querySelectorAll('#conversations li').length === 2")
    assert chat.page.evaluate("document.activeElement.className") == "open"  # the keyboard stays in the list
    chat.saved()
    chat.page.reload()
    chat.wait_for("document.querySelectorAll('#conversations li').length === 2")
    assert sorted(chat.titles()) == ["dogs", "mice"]


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(server, chat):
    server.script = lambda body: [("text", "The beginning"), ("hold", threading.Event())]
    chat.say("cats", wait=False)
    chat.page.wait_for_selector(".message.answer p")
    chat.menu("cats", "Delete")
    chat.page.get_by_text("No chats yet").wait_for()
    chat.saved()
    chat.page.reload()
    chat.wait_for_state("ready")
    assert chat.titles() == []


def test_export_and_import(answered, new_chat, tmp_path):
    chat = answered
    chat.page.get_by_role("button", name="dogs", exact=True).click()
    chat.page.get_by_role("button", name="Answer again").click()  # two versions
    chat.wait_until_answered()
    with chat.page.expect_download() as download:
        chat.page.click("#export-all")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    assert download.value.suggested_filename.endswith(".json")
    exported = json.loads(file.read_text())
    assert sorted(each["title"] for each in exported["conversations"]) == ["cats", "dogs", "mice"]

    other = new_chat().open()
    other.page.set_input_files("#import-file", file)
    other.page.locator(".notice", has_text="3 chats are imported").wait_for()
    other.page.get_by_role("button", name="dogs", exact=True).click()
    assert other.answers() == ["About dogs: Café"]
    assert other.page.locator(".versions").inner_text().strip() == "2/2"
    # Twice imported is two copies, and nothing is overwritten
    other.page.set_input_files("#import-file", file)
    other.wait_for("document.querySelectorAll('#conversations li').length === 6")


def test_export_as_markdown(server, chat, tmp_path):
    server.script = lambda body: [
        ("reasoning", "Think."),
        ("text", "Use:\n\n```sh\nls\n```"),
        ("call", "c", "f", '{"a": "```"}'),
    ]
    chat.say("How to list?")
    with chat.page.expect_download() as download:
        chat.menu("How to list?", "Export as Markdown")
    assert download.value.suggested_filename == "How-to-list.md"
    file = tmp_path / "chat.md"
    download.value.save_as(file)
    text = Path(file).read_text()
    assert text == (
        "# How to list?\n\n## You\n\nHow to list?\n\n## demo-gpt-oss\n\n"
        "<details><summary>Reasoning</summary>\n\nThink.\n\n</details>\n\n"
        'Use:\n\n```sh\nls\n```\n\nCalled `f`:\n\n````json\n{"a": "```"}\n````\n'
    )


FULL = """
    const put = IDBObjectStore.prototype.put;
    window.full = true;
    IDBObjectStore.prototype.put = function (...given) {
        if (window.full) throw new DOMException("full", "QuotaExceededError");
        return put.apply(this, given);
    };
    const set = Storage.prototype.setItem;
    Storage.prototype.setItem = function (...given) {
        if (window.full) throw new DOMException("full", "QuotaExceededError");
        return set.apply(this, given);
    };
"""


def test_a_full_store_is_told_and_nothing_is_lost_until_the_tab_closes(server, new_chat):
    chat = new_chat()
    chat.page.add_init_script(FULL)
    chat.open()
    server.script = lambda body: [("text", "Answer")]
    chat.say("cats")
    banner = chat.page.locator("#store-banner")
    banner.wait_for()
    assert "storage for this page is full" in banner.inner_text()
    chat.say("dogs")
    assert chat.answers() == ["Answer", "Answer"]
    assert chat.sent() == [("user", "cats"), ("assistant", "Answer"), ("user", "dogs")]
    # There is room again: all of it is stored with the next message
    chat.page.evaluate("window.full = false")
    chat.say("mice")
    banner.wait_for(state="hidden")
    chat.page.reload()
    chat.page.get_by_role("button", name="cats", exact=True).click()
    assert chat.answers() == ["Answer"] * 3


BROKEN = [
    "indexedDB.open = () => { throw new DOMException('no', 'SecurityError'); };",
    "IDBFactory.prototype.open = () => { const asked = { error: 1 }; setTimeout(() => asked.onerror()); return asked; };",
    "Object.defineProperty(window, 'indexedDB', { value: undefined });",
    "for (const name of ['localStorage', 'indexedDB']) Object.defineProperty(window, name, { get() { throw new Error(); } });",
]


@pytest.mark.parametrize("broken", BROKEN, ids=["refused", "fails", "missing", "none at all"])
def test_a_browser_without_storage_chats_all_the_same(server, new_chat, broken):
    chat = new_chat()
    chat.page.add_init_script(broken)
    chat.open()
    assert "does not keep conversations" in chat.page.locator("#store-banner").inner_text()
    server.script = lambda body: [("text", "Answer")]
    chat.say("cats")
    chat.page.click("#new-chat")
    chat.say("dogs")
    assert chat.titles() == ["dogs", "cats"]
    chat.page.get_by_role("button", name="cats", exact=True).click()
    assert chat.answers() == ["Answer"]


def test_two_tabs_know_of_each_other(server, chat):
    server.script = lambda body: [("text", f"About {body['messages'][-1]['content']}")]
    chat.say("cats")
    chat.saved()
    other = chat.context.new_page()
    other.goto(server.url)
    other.get_by_role("button", name="cats", exact=True).click()
    chat.say("dogs")
    other.locator(".message.answer", has_text="About dogs").wait_for()
    # Both have it open: what one of them adds is a branch beside what the other adds, and both are kept
    other.fill("#prompt", "mice")
    other.press("#prompt", "Enter")
    other.locator(".message.answer", has_text="About mice").wait_for()
    chat.page.locator(".message.answer", has_text="About mice").wait_for()
    assert chat.answers() == ["About cats", "About dogs", "About mice"]
    other.hover("#conversations li")
    other.locator("#conversations summary").click()
    other.get_by_role("button", name="Delete").click()
    chat.page.get_by_text("No chats yet").wait_for()


def test_two_tabs_that_do_not_hear_each_other_lose_nothing(server, new_chat):
    chat = new_chat()
    chat.context.add_init_script("delete window.BroadcastChannel")
    chat.open()
    server.script = lambda body: [("text", f"About {body['messages'][-1]['content']}")]
    chat.say("cats")
    chat.saved()
    other = chat.context.new_page()
    other.goto(server.url)
    other.locator(".message.answer", has_text="About cats").wait_for()
    for page, text in ((chat.page, "dogs"), (other, "mice")):
        page.fill("#prompt", text)
        page.press("#prompt", "Enter")
        page.locator(".message.answer", has_text=f"About {text}").wait_for()
        page.wait_for_selector("#send[aria-label=Send]")
        chat.saved()
    chat.page.reload()
    chat.page.locator(".versions").wait_for()
    assert chat.answers() == ["About cats", "About mice"]
    chat.page.get_by_role("button", name="Version before").click()
    assert chat.answers() == ["About cats", "About dogs"]
