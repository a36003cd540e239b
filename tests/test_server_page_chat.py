"""Chatting on the page, in a real browser: answers as they come, and what can be done with them."""

from __future__ import annotations

import threading

import pytest
from page_server import USAGE, held, pieces

from openelm_mlx.server.generation import Progress
from openelm_mlx.server.sse import comment

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

MARKDOWN = """# A title

Some *text* with `code`, and $a^2 + b^2$.

```python
def double(x):
    return 2 * x  # twice
```

\\[ \\int_0^1 x\\,dx = \\tfrac12 \\]

| a | b |
|:--|--:|
| 1 | 22 |

- one
- two

See [the pages][site].

[site]: https://example.org/pages
"""


def test_an_answer_is_streamed_as_markdown(server, chat):
    hold, go_on = held()
    server.script = lambda body: [*pieces(MARKDOWN[:120]), hold, *pieces(MARKDOWN[120:])]
    chat.say("Show all you can", wait=False)
    chat.page.wait_for_selector(".message.answer pre")  # before the answer's end
    assert chat.page.get_attribute("#send", "aria-label") == "Stop"
    assert chat.page.locator(".message.answer h1").inner_text() == "A title"
    go_on()
    chat.wait_until_answered()
    answer = chat.page.locator(".message.answer > .markdown")
    assert answer.locator("pre .hljs-keyword").all_inner_texts() == ["def", "return"]
    assert answer.locator(".code-bar span").inner_text() == "Python"
    assert answer.locator(".katex").count() == 2
    assert answer.locator(".formula.display annotation").text_content().strip() == "\\int_0^1 x\\,dx = \\tfrac12"
    assert answer.locator("td.align-right").inner_text() == "22"
    assert answer.locator("li").all_inner_texts() == ["one", "two"]
    assert answer.locator("a").get_attribute("href") == "https://example.org/pages"
    assert [request["stream"] for request in server.requests] == [True]
    assert server.requests[0]["stream_options"] == {"include_usage": True}


def test_streamed_and_shown_later_are_the_same(server, chat):
    server.script = lambda body: pieces(MARKDOWN, 1)
    chat.say("Show all you can")
    streamed = (
        chat.page.locator(".message.answer > .markdown")
        .inner_html()
        .replace('<div class="tail">', "")
        .replace("</div>", "")
    )
    chat.saved()
    chat.page.reload()
    chat.page.wait_for_selector(".message.answer .katex")
    shown = chat.page.locator(".message.answer > .markdown").inner_html().replace("</div>", "")
    assert shown == streamed


def test_blocks_that_are_done_are_not_drawn_again(server, chat):
    hold, go_on = held()
    rest = "".join(f"Paragraph {i} with *words* and `code`.\n\n- item {i}\n\n" for i in range(400))
    server.script = lambda body: [("text", "# First\n\nSecond.\n\nThird.\n\n"), hold, *pieces(rest, 40)]
    chat.say("Write a lot", wait=False)
    chat.page.wait_for_selector(".message.answer h1")
    chat.page.evaluate("document.querySelector('.message.answer h1').isTheFirst = true")
    go_on()
    chat.wait_until_answered()
    assert chat.page.evaluate("document.querySelector('.message.answer h1').isTheFirst") is True
    assert chat.page.locator(".message.answer p").count() == 402
    assert chat.page.locator(".message.answer > .markdown li").count() == 400


def test_long_code_grows_without_being_drawn_again(server, chat):
    (first, go_on), (second, go_further) = held(), held()
    code = "".join(f"value_{i} = {i}  # a line of code\n" for i in range(1500))
    begin, middle, end = code[:20_000], code[20_000:40_000], code[40_000:] + "```\nDone."
    server.script = lambda body: [
        ("text", "```python\n" + begin),
        first,
        *pieces(middle, 200),
        second,
        *pieces(end, 200),
    ]
    chat.say("Write code", wait=False)
    grown = "(length) => document.querySelector('.message.answer code')?.textContent.length >= length"
    chat.wait_for(grown, 20_000)
    chat.page.evaluate("document.querySelector('.message.answer code').firstChild.isTheFirst = true")
    go_on()
    chat.wait_for(grown, 40_000)
    assert chat.page.evaluate("document.querySelector('.message.answer code').firstChild.isTheFirst") is True
    go_further()
    chat.wait_until_answered()
    assert chat.page.locator(".message.answer code").first.text_content() == code
    assert chat.page.locator(".message.answer .hljs-comment").count() == 1500  # coloured at its end
    assert chat.answers()[0].endswith("Done.")


def test_code_is_copied(server, new_chat):
    chat = new_chat(permissions=["clipboard-read", "clipboard-write"]).open()
    server.script = lambda body: [("text", "```sh\necho <hi> && ls\n```")]
    chat.say("A command")
    chat.page.get_by_role("button", name="Copy this code").click()
    chat.wait_for("document.querySelector('#announcer').textContent === 'Copied'")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "echo <hi> && ls\n"


def test_reasoning_is_folded_and_says_what_it_does(server, chat):
    hold, go_on = held()
    server.script = lambda body: [("reasoning", "First I think "), ("reasoning", "**hard**."), hold, ("text", "42")]
    chat.say("Think", wait=False)
    summary = chat.page.locator(".reasoning summary")
    summary.wait_for()
    assert summary.locator(".reasoning-label").inner_text().startswith("Thinking")
    chat.wait_for("document.querySelector('.reasoning-last').textContent.endsWith('**hard**.')")
    chat.page.locator(".message.user").hover()
    chat.page.get_by_role("button", name="Edit this message").click()
    chat.page.keyboard.press("Enter")
    chat.page.locator(".notice", has_text="stop it first").wait_for()
    chat.page.keyboard.press("Escape")  # gives up the edit, and not the answer
    assert not chat.page.locator(".reasoning-text").is_visible()
    summary.click()
    chat.page.wait_for_selector(".reasoning-text strong")
    go_on()
    chat.wait_until_answered()
    assert summary.inner_text().startswith("Thought for")
    assert chat.page.locator(".reasoning-text").inner_text() == "First I think hard."
    assert chat.answers() == ["42"]
    # Another turn does not send it
    chat.say("And now?")
    assert chat.sent() == [("user", "Think"), ("assistant", "42"), ("user", "And now?")]
    assert "reasoning" not in server.requests[-1]["messages"][1]


def test_a_line_says_speed_and_tokens(server, chat):
    # Of pieces that come at one moment nobody knows a speed.
    hold, go_on = held()
    server.script = lambda body: [("text", "A short"), hold, *pieces(" answer.")]
    chat.say("Hi", wait=False)
    chat.page.locator(".message.answer", has_text="A short").wait_for()
    chat.page.wait_for_timeout(50)
    go_on()
    chat.wait_until_answered()
    line = chat.page.locator(".message.answer .statistics").inner_text()
    assert line.startswith("demo-gpt-oss · ")
    assert "tokens/s" in line
    assert "42 tokens · prompt of 1,380, 1,024 of them cached" in line
    server.script = lambda body: [
        ("text", "cut"),
        ("finish", "length"),
        ("usage", {**USAGE, "prompt_tokens_details": None}),
    ]
    chat.say("Again")
    line = chat.page.locator(".message.answer .statistics").last.inner_text()
    assert "of them cached" not in line
    assert line.endswith("cut at the limit of tokens")


def test_waiting_says_the_place_in_the_queue_and_how_much_is_read(server, chat):
    (first, go_on), (second, go_further) = held(), held()
    # The server's own words
    queue, prompt = (
        ("comment", comment(progress).decode().strip(": \n"))
        for progress in (Progress(3, 0, 2048), Progress(None, 512, 2048))
    )
    server.script = lambda body: [queue, first, prompt, second, ("text", "Done")]
    chat.say("Hi", wait=False)
    text = chat.page.locator(".waiting-text")
    chat.wait_for("document.querySelector('.waiting-text')?.textContent === 'In the queue: 3 before this one'")
    go_on()
    chat.wait_for("document.querySelector('.waiting-text').textContent.startsWith('Reading')")
    assert text.inner_text() == "Reading the prompt: 512 of 2,048 tokens"
    assert chat.page.eval_on_selector(".waiting progress", "(bar) => [bar.value, bar.max]") == [512, 2048]
    go_further()
    chat.wait_until_answered()
    assert not text.is_visible()


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_closes_the_connection_and_keeps_what_is_there(server, chat, way):
    hold, _ = held()
    server.script = lambda body: [("text", "The beginning"), hold, ("text", "never")]
    chat.say("Go on for ever", wait=False)
    chat.wait_for("document.querySelector('.message.answer > .markdown')?.innerText === 'The beginning'")
    chat.page.click("#send") if way == "button" else chat.page.keyboard.press("Escape")
    chat.wait_until_answered()
    assert chat.answers() == ["The beginning"]
    assert chat.page.locator(".statistics").inner_text().endswith("stopped")
    for _ in range(2000):
        if server.gone:
            break
        threading.Event().wait(0.01)
    assert server.gone == 1
    chat.saved()
    chat.page.reload()
    chat.wait_for_state("ready")
    assert chat.answers() == ["The beginning"]


def test_another_answer_and_back(server, chat):
    texts = iter(["One", "Two", "Three"])
    server.script = lambda body: [("text", next(texts))]
    chat.say("Say a number")
    chat.page.get_by_role("button", name="Answer again").click()
    chat.wait_for("document.querySelector('.message.answer > .markdown').innerText === 'Two'")
    chat.wait_until_answered()
    assert server.requests[0]["messages"] == server.requests[1]["messages"]
    assert chat.page.locator(".versions").inner_text().strip() == "2/2"
    chat.page.get_by_role("button", name="Version before").click()
    assert chat.answers() == ["One"]
    # The conversation goes on from the version that is shown
    chat.say("Next")
    assert chat.sent() == [("user", "Say a number"), ("assistant", "One"), ("user", "Next")]
    chat.page.get_by_role("button", name="Next version").click()
    assert chat.answers() == ["Two"]
    chat.page.get_by_role("button", name="Version before").click()
    assert chat.answers() == ["One", "Three"]


def test_an_edited_message_is_a_branch(server, chat):
    server.script = lambda body: [("text", f"About {body['messages'][-1]['content']}")]
    chat.say("cats")
    chat.say("mice")
    chat.page.locator(".message.user").first.hover()
    chat.page.get_by_role("button", name="Edit this message").first.click()
    field = chat.page.get_by_role("textbox", name="Edit your message")
    assert field.input_value() == "cats"
    field.fill("dogs")
    field.press("Enter")
    chat.wait_for("document.querySelector('.message.answer > .markdown')?.innerText === 'About dogs'")
    chat.wait_until_answered()
    assert chat.sent() == [("user", "dogs")]
    assert chat.answers() == ["About dogs"]
    chat.page.get_by_role("button", name="Version before").click()
    assert chat.answers() == ["About cats", "About mice"]


def test_an_edit_can_be_given_up(server, chat):
    chat.say("cats")
    chat.page.press("#prompt", "ArrowUp")
    field = chat.page.get_by_role("textbox", name="Edit your message")
    field.fill("dogs")
    field.press("Escape")
    assert chat.page.locator(".bubble").inner_text() == "cats"
    assert len(server.requests) == 1
    assert chat.page.evaluate("document.activeElement.title") == "Edit this message"


def test_a_page_that_is_closed_while_it_is_answered_keeps_what_was_there(server, chat):
    hold, _ = held()
    server.script = lambda body: [("reasoning", "Hm."), ("text", "The beginning"), hold]
    chat.say("Go on", wait=False)
    chat.wait_for("document.querySelector('.message.answer > .markdown')?.innerText === 'The beginning'")
    chat.saved()
    chat.page.reload()
    chat.wait_for_state("ready")
    assert chat.answers() == ["The beginning"]
    assert chat.page.locator(".statistics").inner_text().endswith("stopped")
    assert chat.page.get_attribute("#send", "aria-label") == "Send"


def test_a_reader_above_the_end_is_left_alone(server, chat):
    (first, go_on), (second, go_further) = held(), held()
    lines = [("text", f"Line {i}.\n\n") for i in range(80)]
    server.script = lambda body: [*lines, first, *lines, second, *lines]
    chat.say("Write", wait=False)
    at_end = "(s => s.scrollHeight - s.scrollTop - s.clientHeight < 2)(document.querySelector('#scroller'))"
    enough = "(count) => document.querySelectorAll('.message.answer p').length >= count"
    chat.wait_for(enough, 80)
    chat.wait_for(at_end)  # follows
    chat.page.hover("#scroller")
    chat.page.mouse.wheel(0, -30)  # a little is enough
    chat.page.wait_for_selector(".to-end", state="attached")
    chat.wait_for(f"!{at_end}")
    before = chat.page.evaluate("document.querySelector('#scroller').scrollTop")
    go_on()
    chat.wait_for(enough, 160)
    assert chat.page.evaluate("document.querySelector('#scroller').scrollTop") == before
    chat.page.click(".to-end")
    chat.wait_for(at_end)
    go_further()
    chat.wait_until_answered()
    chat.wait_for(at_end)  # follows again


def test_two_conversations_are_answered_at_once(server, chat):
    hold, go_on = held()
    server.script = lambda body: (
        [("text", "Slow"), hold, ("text", " but sure")]
        if body["messages"][0]["content"] == "slow"
        else [("text", "Quick")]
    )
    chat.say("slow", wait=False)
    chat.page.wait_for_selector(".message.answer p")
    chat.page.click("#new-chat")
    chat.say("quick")
    assert chat.answers() == ["Quick"]
    go_on()
    chat.page.get_by_role("button", name="slow", exact=True).click()
    chat.page.locator(".message", has_text="Slow but sure").wait_for()
    chat.wait_until_answered()


def test_a_long_conversation_opens_with_its_end(server, chat):
    messages = {}
    for i in range(300):
        parent, role = str(i - 1) if i else None, "assistant" if i % 2 else "user"
        messages[str(i)] = {"id": str(i), "parent": parent, "role": role, "content": f"Message {i}", "created": i}
    file = {"conversations": [{"id": "long", "title": "Long", "messages": messages, "leaf": "299"}]}
    chat.take_in(file)
    chat.page.get_by_role("button", name="Long", exact=True).click()
    assert chat.page.locator(".message").count() == 40
    assert chat.answers()[-1] == "Message 299"
    chat.page.get_by_role("button", name="Show 260 earlier messages").click()
    assert chat.page.locator(".message").count() == 120
    chat.say("Next")
    assert len(chat.sent()) == 301
