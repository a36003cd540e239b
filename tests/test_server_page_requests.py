"""What the page sends, and what it makes of refusals and errors. In a real browser."""

from __future__ import annotations

import json

import pytest
from page_server import failure

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser


def test_a_tool_call_is_shown_and_its_result_given_by_hand(server, chat):
    tool = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}
    chat.page.click("#settings")
    chat.page.get_by_text("Tools", exact=True).click()
    chat.page.fill("#tools", "not JSON")
    assert chat.page.locator("#tools-said").inner_text().startswith("The tools are not JSON")
    chat.page.fill("#tools", json.dumps([tool]))
    assert chat.page.locator("#tools-said").inner_text() == ""
    chat.page.keyboard.press("Escape")
    server.script = lambda body: (
        [("text", "It is 391.")]
        if body["messages"][-1]["role"] == "tool"
        else [("reasoning", "I calculate."), ("call", "call_1", "calculator", '{"expression":"17*23"}')]
    )
    chat.say("17 * 23?")
    assert server.requests[0]["tools"] == [tool]
    assert chat.page.locator(".call-name").inner_text() == "calculator"
    assert json.loads(chat.page.locator(".call pre").inner_text()) == {"expression": "17*23"}
    chat.page.get_by_label("Result of calculator").fill("391")
    chat.page.get_by_role("button", name="Send the result").click()
    chat.page.locator(".message", has_text="It is 391.").wait_for()
    chat.wait_until_answered()
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "calculator", "arguments": '{"expression":"17*23"}'},
    }
    assert server.requests[1]["messages"][1:] == [
        {"role": "assistant", "content": None, "reasoning": "I calculate.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "391"},
    ]
    assert chat.page.locator(".results").count() == 0


def test_settings_go_with_the_request_and_into_the_next_chat(server, chat):
    chat.page.click("#settings")
    chat.page.fill("#system", "Be brief.")
    chat.page.select_option("#effort", "low")
    for field, value in {"temperature": "0.5", "top-p": "0.9", "max-tokens": "100", "seed": "7"}.items():
        chat.page.fill(f"#{field}", value)
    chat.page.fill("#temperature", "9")  # not allowed: the last right value stays
    chat.page.keyboard.press("Escape")
    chat.page.select_option("#model", "demo-openelm")
    for _ in range(2):
        chat.say("Hi")
        request = server.requests[-1]
        assert chat.sent() == [("system", "Be brief."), ("user", "Hi")]
        assert request["model"] == "demo-openelm"
        sampling = {
            name: request[name]
            for name in ("reasoning_effort", "temperature", "top_p", "max_completion_tokens", "seed")
        }
        assert sampling == {
            "reasoning_effort": "low", "temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 100, "seed": 7,
        }  # fmt: skip
        chat.page.click("#new-chat")


def test_what_a_model_does_not_have_is_left_out_and_told(server, chat):
    """A chat's effort and tools stay for the next model; OpenELM has neither."""
    chat.expected.append("status of 400")

    def script(body):
        for name in ("reasoning_effort", "tools"):
            if name in body and body["model"] == "demo-openelm":
                return failure(400, f"{name}: leave it out.", "unsupported_parameter", param=name)
        return [("text", "Answer")]

    server.script = script
    chat.page.click("#settings")
    chat.page.select_option("#effort", "high")
    chat.page.get_by_text("Tools", exact=True).click()
    chat.page.get_by_role("button", name="Insert an example").click()
    chat.page.keyboard.press("Escape")
    chat.page.select_option("#model", "demo-openelm")
    chat.say("Hi")
    assert chat.answers() == ["Answer"]
    told = chat.page.locator(".notice").all_inner_texts()
    assert told == [
        "demo-openelm has no reasoning effort: it answers without",
        "demo-openelm cannot call tools: it answers without",
    ]
    chat.say("And now")  # it is known by now
    assert len(server.requests) == 4
    assert set(server.requests[-1]) == {"model", "messages", "stream", "stream_options"}
    chat.page.select_option("#model", "demo-gpt-oss")
    chat.say("And this one")
    assert server.requests[-1]["reasoning_effort"] == "high"
    assert server.requests[-1]["tools"][0]["function"]["name"] == "calculator"


def test_nothing_is_sent_that_was_not_set(server, chat):
    chat.say("Hi")
    assert set(server.requests[0]) == {"model", "messages", "stream", "stream_options"}


def test_an_error_is_shown_with_a_way_on(server, chat):
    chat.expected.append("status of 400")
    answers = iter([failure(400, "The prompt has 9000 tokens, and the context holds 8192."), [("text", "Better")]])
    server.script = lambda body: next(answers)
    chat.say("Hi")
    trouble = chat.page.locator(".trouble")
    assert "the context holds 8192" in trouble.inner_text()
    trouble.get_by_role("button", name="Try again").click()
    chat.page.locator(".message", has_text="Better").wait_for()
    chat.wait_until_answered()
    assert chat.page.locator(".versions").inner_text().strip() == "2/2"  # what failed is still there


def test_a_failure_within_an_answer_keeps_its_beginning(server, chat):
    server.script = lambda body: [("text", "The beginning"), ("error", "The server failed on this request.")]
    chat.say("Hi")
    assert chat.answers() == ["The beginning"]
    assert "The server failed on this request." in chat.page.locator(".trouble").inner_text()


def test_a_busy_server_is_asked_again(server, chat):
    chat.expected.append("status of 503")
    answers = iter([failure(503, "Too many requests wait.", retry_after=1), [("text", "Now")]])
    server.script = lambda body: next(answers)
    chat.say("Hi", wait=False)
    chat.wait_for(
        "document.querySelector('.waiting-text')?.textContent.startsWith('The server is busy: trying again in')"
    )
    chat.wait_until_answered()
    assert chat.answers() == ["Now"]
    assert len(server.requests) == 2
