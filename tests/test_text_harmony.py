"""Harmony against openai-harmony's token ids, and the parser against everything a model may write.

The ids come from openai-harmony 0.0.8 (harmony_golden.py says how). Where that library and the whole vocabulary are
installed, the last tests compare with it directly.
"""

import os
import random
from pathlib import Path

import pytest
from harmony_golden import (
    FOLDER,
    SAMPLE_COMPLETION,
    TEXTS,
    Oracle,
    is_history_agreed,
    ours,
    random_conversation,
    read_golden,
    read_ranks,
    without_finished_reasoning,
    write_tokenizer_json,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx.errors import PromptError, SettingError, TokenizerError, UserError
from openelm_mlx.text.builtin_tools import BROWSER, PYTHON
from openelm_mlx.text.conversation import (
    DeveloperContent,
    Message,
    ResponseFormat,
    SystemContent,
    resolve_recipient,
    tool_recipients,
    without_old_analysis,
)
from openelm_mlx.text.harmony import Delta, HarmonyFormat, developer_text, system_text
from openelm_mlx.text.openai_chat import conversation
from openelm_mlx.text.schema import Tool, ToolNamespace
from openelm_mlx.text.tokenizer import load_tokenizer


class ByteTokenizer:
    """Any tokenizer with Harmony's tokens will do: here a token is a byte, and the special ones stand in front."""

    def __init__(self):
        names = ("return", "call", "end", "channel", "start", "message", "constrain", "endoftext", "reserved_0")
        self.special_tokens = {f"<|{name}|>": token for token, name in enumerate(names)}

    def encode(self, text, *, continuation=False):
        # Like Llama's, it puts a space before a text unless told that something comes before.
        return [byte + 100 for byte in (text if continuation else f" {text}").encode()]

    def token_bytes(self, token):
        if not 0 <= token < 356:
            raise TokenizerError(f"There is no token {token}.")
        return bytes([token - 100]) if token >= 100 else b""


@pytest.fixture(scope="module")
def harmony():
    """The format over a part of gpt-oss's vocabulary."""
    return HarmonyFormat(load_tokenizer(FOLDER))


@pytest.fixture(scope="module")
def byte_harmony():
    return HarmonyFormat(ByteTokenizer())


def assistant(content, channel, recipient=None, content_type=None):
    return Message("assistant", content, None, channel, recipient, content_type)


# --- Rendering --------------------------------------------------------------------------------------------------------

DATED = SystemContent(current_date="2025-06-28")
HI = [
    *(200006, 17360, 200008, 3575, 553, 17554, 162016, 11, 261, 4410, 6439, 2359, 22203, 656, 7788, 17527, 558, 87447),
    *(100594, 25, 220, 1323, 19, 12, 3218, 198, 6576, 3521, 25, 220, 1323, 20, 12, 3218, 12, 2029, 279, 30377, 289, 25),
    *(14093, 279, 2, 13888, 18403, 25, 8450, 11, 49159, 11, 1721, 13, 21030, 2804, 413, 7360, 395, 1753, 3176, 13),
    *(200007, 200006, 1428, 200008, 12194, 200007, 200006, 173781),
]
HI_WITH_FUNCTION = [
    *(200006, 17360, 200008, 3575, 553, 17554, 162016, 11, 261, 4410, 6439, 2359, 22203, 656, 7788, 17527, 558, 87447),
    *(100594, 25, 220, 1323, 19, 12, 3218, 198, 6576, 3521, 25, 220, 1323, 20, 12, 3218, 12, 2029, 279, 30377, 289, 25),
    *(4465, 279, 2, 13888, 18403, 25, 8450, 11, 49159, 11, 1721, 13, 21030, 2804, 413, 7360, 395, 1753, 3176, 558),
    *(63446, 316, 1879, 8437, 2804, 810, 316, 290, 49159, 9334, 25, 461, 44580, 6120, 200007, 200006, 77944, 200008, 2),
    *(20574, 279, 877, 9964, 279, 4797, 9964, 95359, 21733, 290, 11122, 558, 2493, 717, 170154, 314, 11350, 25, 405),
    *(17500, 25, 1621, 412, 9263, 871, 1062, 502, 92, 602, 9819, 9964, 200007, 200006, 1428, 200008, 12194, 200007),
    *(200006, 173781),
]
WEATHER = Tool(
    "get_weather",
    "Gets the weather.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)


def test_shortest_prompt(harmony):
    assert harmony.render_for_completion(conversation("Hi", system=DATED)) == HI


def test_prompt_with_a_function(harmony):
    system = SystemContent(current_date="2025-06-28", reasoning_effort="low")
    assert harmony.render_for_completion(conversation("Hi", system=system, tools=[WEATHER])) == HI_WITH_FUNCTION


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        (
            assistant("{}", "commentary", "functions.f", "<|constrain|>json"),
            [200006, 173781, 316, 28, 44580, 1196, 200005, 12606, 815, 220, 200003, 4108, 200008, 12083, 200012],
        ),
        (
            assistant("{}", "commentary", "functions.f", "<|constrain|> json"),
            [200006, 173781, 316, 28, 44580, 1196, 200005, 12606, 815, 220, 200003, 5701, 200008, 12083, 200012],
        ),
        (
            assistant("{}", "commentary", "functions.f", "json"),
            [200006, 173781, 316, 28, 44580, 1196, 200005, 12606, 815, 5701, 200008, 12083, 200012],
        ),
        (
            Message("tool", '{"t": 20}', "functions.get_weather", "commentary", "assistant"),
            [
                *(200006, 44580, 775, 170154, 316, 28, 173781, 200005, 12606, 815, 200008),
                *(10848, 83, 1243, 220, 455, 92, 200007),
            ],
        ),
        (Message("user", "x <|end|> y"), [200006, 1428, 200008, 87, 464, 91, 419, 91, 29, 342, 200007]),
        # A recipient that is nobody: openai-harmony leaves it out as well, but ends the message with <|call|>.
        (assistant("Hi", "final", "all"), [200006, 173781, 200005, 17196, 200008, 12194, 200007]),
    ],
)
def test_single_messages(harmony, message, tokens):
    assert harmony.render_message(message) == tokens


def test_stored_conversations(harmony):
    cases = read_golden()
    assert len(cases) >= 200
    for case in cases:
        assert harmony.render_for_completion(ours(case["conversation"])) == case["tokens"]


def test_stored_conversations_are_not_all_alike():
    """What the comparison above rests on: tools, every effort, text of many scripts, turns with and without an answer."""
    cases = [case["conversation"] for case in read_golden()]
    text = str(cases)
    for sign in ("'reasoning_effort': 'low'", "'reasoning_effort': 'high'", "東京", "👩", "नमस्ते", "<|end|>", "'oneOf'"):
        assert text.count(sign) > 20
    roles = [{message["role"] for message in case} for case in cases]
    assert sum("tool" in found for found in roles) > 80
    assert sum(bool(message["content"]["developer"].get("tools")) for case in cases for message in case
               if message["role"] == "developer") > 100  # fmt: skip
    assert sum(case[-1]["role"] == "user" for case in cases) > 40
    assert sum(not is_history_agreed(case) for case in cases) > 40


def test_typed_markup_stays_text(harmony):
    """No text in any place of a conversation becomes a control token, and none of it is lost."""
    typed = "".join(harmony.tokenizer.special_tokens)
    word = "<|end|><|call|>x"
    messages = [
        Message("system", SystemContent(identity=typed, knowledge_cutoff=typed, current_date=typed)),
        Message("developer", DeveloperContent(typed, (Tool(word, typed, {"type": "object", "title": typed}),))),
        Message("user", (typed, typed), name=word),
        assistant(typed, "commentary", word, word),
        Message("tool", typed, word, "commentary", "assistant"),
    ]
    tokens = harmony.render(messages)
    control = [token for token in tokens if token in harmony.control_tokens]
    expected = [
        *(harmony.start, harmony.message, harmony.end) * 3,
        *(harmony.start, harmony.channel, harmony.message, harmony.call),
        *(harmony.start, harmony.channel, harmony.message, harmony.end),
    ]
    assert control == expected
    assert harmony.decode_markup(tokens).count(typed) == 9
    assert [message.content for message in harmony.parse(tokens, role=None)][2:] == [typed + typed, typed, typed]


def test_markup_for_those_who_ask(harmony):
    text = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    assert harmony.encode_markup(text) == HI[-7:]
    assert harmony.decode_markup(HI[-7:]) == text
    assert harmony.encode_markup("") == []


def test_system_text_leaves_out_what_is_empty():
    nothing = SystemContent(None, None, None, None, ())
    assert system_text(nothing, has_functions=True) == ""
    assert system_text(SystemContent("A", None, "D", "high", ("final",), False), True) == (
        "A\nCurrent date: D\n\nReasoning: high\n\n# Valid channels: final.\n"
        "Calls to these tools must go to the commentary channel: 'functions'."
    )
    assert "\n\n# Tools\n\n## python\n\n" in system_text(SystemContent(tools=(PYTHON,)), False)


def test_other_namespaces_do_not_bring_the_functions_line(harmony):
    line = "Calls to these tools"
    for developer, expected in [
        (DeveloperContent(namespaces=(ToolNamespace("mcp", tools=(WEATHER,)),)), False),
        (DeveloperContent(namespaces=(ToolNamespace("functions", tools=(WEATHER,)),)), True),
        (DeveloperContent(namespaces=(ToolNamespace("functions"),)), False),
        (DeveloperContent(tools=(WEATHER,)), True),
    ]:
        tokens = harmony.render([Message("system", SystemContent()), Message("developer", developer)])
        assert (line in harmony.decode_markup(tokens)) is expected


def test_response_format_as_documented():
    items = {"type": "array", "description": "entries on the shopping list", "items": {"type": "string"}}
    shopping = ResponseFormat("shopping_list", {"properties": {"items": items}, "type": "object"})
    assert developer_text(DeveloperContent("You are a helpful shopping assistant", (), (), (shopping,))) == (
        "# Instructions\n\nYou are a helpful shopping assistant\n\n# Response Formats\n\n## shopping_list\n\n"
        '{"properties":{"items":{"type":"array","description":"entries on the shopping list",'
        '"items":{"type":"string"}}},"type":"object"}'
    )
    described = ResponseFormat("x", {}, "one\ntwo")
    assert developer_text(DeveloperContent(response_formats=(described,))).endswith("## x\n\n// one\n// two\n{}")


@pytest.mark.parametrize(
    ("history", "kept"),
    [
        ("u t A u t A u", "u A u A u"),
        ("u t A u t c o", "u A u t c o"),
        ("u t A u t c o t A u", "u A u c o A u"),
        ("u t c o t A u", "u c o A u"),
        ("u t u", "u t u"),
        ("u t c o t c o t p", "u t c o t c o t p"),
        ("u t A", "u A"),
        ("u T O t A u", "u A u"),
    ],
)
def test_history_rule(harmony, history, kept):
    """u = user, t = analysis, c, o = call and result, T, O = those on analysis, p = preamble, A = final."""
    message = {
        "u": Message("user", "u"),
        "t": assistant("t", "analysis"),
        "c": assistant("c", "commentary", "functions.f"),
        "o": Message("tool", "o", "functions.f", "commentary", "assistant"),
        "T": assistant("T", "analysis", "python"),
        "O": Message("tool", "O", "python", "analysis", "assistant"),
        "p": assistant("p", "commentary"),
        "A": assistant("A", "final"),
    }
    messages = [message[letter] for letter in history.split()]
    expected = [message[letter] for letter in kept.split()]
    assert without_old_analysis(messages) == expected
    assert harmony.render(messages) == [token for m in expected for token in harmony.render_message(m)]
    assert harmony.render(messages, keep_analysis=True) == [t for m in messages for t in harmony.render_message(m)]


def test_beginning_the_answer(harmony):
    prompt = harmony.render_for_completion(conversation("Hi", system=DATED), channel="final", text="Hi")
    assert prompt == [*HI, 200005, 17196, 200008, 12194]
    parser = harmony.parser(channel="final", text="Hi")
    assert (parser.channel, parser.text) == ("final", "Hi")
    assert parser.push(13) == Delta(".", "assistant", "final")
    parser.push(harmony.return_)
    parser.finish()
    assert parser.messages == [assistant("Hi.", "final")]


def test_appending_instead_of_rendering_anew(harmony):
    """How a tool loop keeps its cache: the same tokens, if the model writes its header as the renderer does."""
    chat = [Message("system", DATED), Message("user", "Weather?")]
    completion = harmony.encode_markup(" to=functions.f<|channel|>commentary json<|message|>{}<|call|>")
    result = Message("tool", "20", "functions.f", "commentary", "assistant")
    appended = harmony.render_for_completion(chat) + completion
    appended += harmony.render_message(result) + harmony.render_for_completion([])
    assert appended == harmony.render_for_completion([*chat, *harmony.parse(completion), result])


def test_documentation_runs(harmony):
    page = (Path(__file__).parent.parent / "docs" / "harmony.md").read_text(encoding="utf-8")
    names = {"tokenizer": harmony.tokenizer, "tokens": SAMPLE_COMPLETION}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["parser"].messages == harmony.parse(SAMPLE_COMPLETION)
    assert "Reasoning: low" in harmony.decode_markup(names["prompt"])


# --- Conversations from chat dicts ------------------------------------------------------------------------------------


def test_chat_of_every_kind():
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Łódź"}'}}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "Weather?", "name": "bob"},
        {"role": "assistant", "reasoning": "Ask the tool.", "content": "One moment.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "20"},
        {"role": "assistant", "thinking": "Easy.", "content": "20 degrees."},
        {"role": "system", "content": "Now in French."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    assert conversation(chat, system=DATED, tools=tools) == [
        Message("system", DATED),
        Message("developer", DeveloperContent("Be brief.\n\nBe kind.", (Tool("get_weather"),))),
        Message("user", "Weather?", "bob"),
        assistant("Ask the tool.", "analysis"),
        assistant("One moment.", "commentary"),
        assistant('{"city": "Łódź"}', "commentary", "functions.get_weather", "<|constrain|>json"),
        Message("tool", "20", "functions.get_weather", "commentary", "assistant"),
        assistant("Easy.", "analysis"),
        assistant("20 degrees.", "final"),
        Message("developer", DeveloperContent("Now in French.")),
        Message("user", ("a", "b")),
    ]


def test_a_preamble_without_its_calls():
    """Reasoning may stand between the two. Taken for an answer, it would end the turn, and its reasoning would go."""
    said = {"role": "assistant", "reasoning": "Hm.", "content": "One moment."}
    assert [m.channel for m in conversation([said])[1:]] == ["analysis", "final"]
    assert [m.channel for m in conversation([{**said, "phase": "commentary"}])[1:]] == ["analysis", "commentary"]
    assert [m.channel for m in conversation([{**said, "phase": "final_answer"}])[1:]] == ["analysis", "final"]


def test_chat_of_messages_and_dicts():
    """What a chat session keeps: the parsed messages of the model between the user's dicts."""
    chat = [
        Message("system", DATED),
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        assistant("{}", "commentary", "functions.f"),
        {"role": "tool", "content": "20"},
    ]
    messages = conversation(chat, system=SystemContent(reasoning_effort="high"))
    assert messages[:2] == [Message("system", DATED), Message("developer", DeveloperContent("Be brief."))]
    assert messages[-1] == Message("tool", "20", "functions.f", "commentary", "assistant")


def test_chat_that_brings_its_own_developer_message():
    own = Message("developer", DeveloperContent(namespaces=(ToolNamespace("mcp", tools=(Tool("f"),)),)))
    chat = [own, {"role": "assistant", "tool_calls": [{"function": {"name": "mcp.f"}}]}]
    messages = conversation(chat)
    assert messages[1] is own
    assert messages[2] == assistant("{}", "commentary", "mcp.f", "<|constrain|>json")


def test_results_find_their_calls():
    calls = [{"id": n, "function": {"name": name, "arguments": {"a": 1.0}}} for n, name in ((1, "f"), (2, "python"))]
    system = SystemContent(tools=(PYTHON, BROWSER))
    head = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": calls}]

    def results(*fields):
        answers = [{"role": "tool", "content": "r", **field} for field in fields]
        return [message.name for message in conversation(head + answers, system=system)[4:]]

    assert results({}, {}) == ["functions.f", "python"]
    assert results({"tool_call_id": 2}, {"tool_call_id": 1}) == ["python", "functions.f"]
    assert results({"name": "python"}, {"name": "functions.f"}) == ["python", "functions.f"]
    assert results({"name": "python"}, {}) == ["python", "functions.f"]
    calls = conversation(head, system=system)[2:]
    assert [(call.channel, call.content, call.content_type) for call in calls] == [
        ("commentary", '{"a":1.0}', "<|constrain|>json"),
        ("analysis", '{"a":1.0}', None),
    ]


def names_answered(*items) -> list[str]:
    return [m.name for m in conversation([{"role": "user", "content": "Hi"}, *items]) if m.role == "tool"]


def calls_of(*names, ids):
    calls = [{"id": n, "function": {"name": name}} for n, name in zip(ids, names, strict=True)]
    return {"role": "assistant", "content": None, "tool_calls": calls}


@pytest.mark.parametrize("same", ["call_0", "", 0])
def test_a_result_belongs_to_the_open_call_with_its_id(same):
    """Servers that count anew in each round, or give no ids, write the same one again and again."""

    def result(**more):
        return {"role": "tool", "tool_call_id": same, "content": "r", **more}

    first, second = calls_of("f", ids=[same]), calls_of("g", ids=[same])
    assert names_answered(first, result(), second, result()) == ["functions.f", "functions.g"]
    both = calls_of("f", "g", ids=[same, same])
    assert names_answered(both, result(), result()) == ["functions.f", "functions.g"]
    assert names_answered(both, result(name="g"), result(name="f")) == ["functions.g", "functions.f"]
    # A call that was never answered does not take the next round's result.
    user = {"role": "user", "content": "Again"}
    assert names_answered(first, user, second, result()) == ["functions.g"]
    # One message a call is one round all the same.
    assert names_answered(first, second, result(), result()) == ["functions.f", "functions.g"]
    with pytest.raises(PromptError, match="no open tool call"):
        conversation([user, first, result(), result()])


def test_null_and_parts_are_contents_of_every_role():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for role in ("system", "developer", "user", "assistant", "tool"):
        before = [USER, calls_of("f", ids=["x"])] if role == "tool" else []
        for content, text in ((None, ""), (parts, "ab"), ([], "")):
            (*_, last) = conversation([*before, {"role": role, "content": content}, USER])[:-1]
            if role in ("system", "developer"):
                assert (last.content.instructions if last.role == "developer" else None) == (text or None)
            elif role == "assistant" and content is None:
                assert last.role == "system"  # nothing was said
            else:
                assert (last.role, last.text) == (role, text)
    cut = {"role": "assistant", "content": None, "reasoning": parts}
    assert conversation([USER, cut])[-1].text == "ab"


def test_a_function_may_be_called_python():
    chat = [{"role": "assistant", "tool_calls": [{"function": {"name": "python", "arguments": "{}"}}]}]
    assert conversation(chat)[-1].recipient == "functions.python"
    own = conversation(chat, tools=[Tool("python")], system=SystemContent(tools=(PYTHON,)))
    assert tool_recipients(own) == {"functions.python", "python"}


def test_a_turn_that_was_cut_off_has_no_answer():
    cut = [{"role": "assistant", "thinking": "Hmm", "content": ""}]
    assert conversation(cut)[1:] == [assistant("Hmm", "analysis")]
    assert conversation([{"role": "assistant", "content": ""}])[1:] == [assistant("", "final")]


def test_response_format_of_openai():
    inner = {"name": "x", "schema": {"type": "object"}, "strict": True}
    for given_format in (inner, {"type": "json_schema", "json_schema": inner}, ResponseFormat("x", inner["schema"])):
        developer = conversation("Hi", response_formats=[given_format])[1].content
        assert developer.response_formats == (ResponseFormat("x", {"type": "object"}),)


@pytest.mark.parametrize(
    ("called", "meant"),
    [
        ("functions.f", "functions.f"),
        ("f", "functions.f"),
        ("python", "python"),
        ("functions.python", "python"),
        ("functions.browser.search", "browser.search"),
        ("browser.search", "browser.search"),
        ("search", None),
        ("functions.g", None),
    ],
)
def test_resolve_recipient(called, meant):
    messages = conversation("Hi", system=SystemContent(tools=(PYTHON, BROWSER)), tools=[Tool("f")])
    assert resolve_recipient(called, tool_recipients(messages)) == meant


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([], "no messages"),
        (3, "The chat is a int"),
        ([USER, "Hi"], "Message 2 is 'Hi'"),
        ([{"content": "Hi"}], "Message 1 has role None"),
        ([USER, {"role": "bot", "content": "Hi"}], "Message 2 has role 'bot'"),
        ([{"role": "user"}], "Message 1 has no content"),
        ([{"role": "user", "content": 5}], "The content of message 1 is 5"),
        ([USER, {"role": "assistant", "tool_calls": {"name": "f"}}], "give a list of calls"),
        ([USER, {"role": "assistant", "tool_calls": 7}], "give a list of calls"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": ["Hi"]}], "'Hi'"),
        ([USER, {"role": "assistant"}], "no content, no thinking and no tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], "it needs function.name"),
        ([USER, {"role": "assistant", "tool_calls": ["f"]}], "it needs function.name"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": {1}}}]}], "JSON cannot express"),
        ([USER, {"role": "tool", "content": "20"}], "Message 2 is the result of a tool"),
        ([USER, {"role": "tool", "content": "20", "tool_call_id": "x"}], "tool_call_id 'x'"),
        ([USER, {"role": "tool", "content": "20", "name": "f"}], "tool 'f'"),
    ],
)
def test_chat_that_is_none(chat, words):
    with pytest.raises(PromptError) as error:
        conversation(chat)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": "Hi"}, "is a dict; make Messages with conversation()"),
        (Message("bot", "Hi"), "role 'bot'"),
        (Message("user", SystemContent()), "SystemContent but role 'user'"),
        (Message("system", DeveloperContent()), "DeveloperContent but role 'system'"),
        (Message("user", None), "content of message 2 is None"),
        (Message("user", ("a", 1)), "content of message 2 is ('a', 1)"),
        (Message("tool", "20", recipient="assistant"), "without a name"),
        (Message("tool", "20", "functions.g"), "no message before it calls that tool"),
        (Message("user", "Hi", "two words"), "name of message 2 is 'two words'"),
        (assistant("Hi", ""), "channel of message 2 is ''"),
        (assistant("Hi", "thoughts"), "on channel 'thoughts'"),
        (assistant("Hi", "final", "a\nb"), "recipient of message 2"),
        (assistant("Hi", "final", None, " "), "content_type of message 2"),
    ],
)
def test_conversation_that_breaks_the_rules(byte_harmony, message, words):
    with pytest.raises(PromptError) as error:
        byte_harmony.render([assistant("{}", "commentary", "functions.f"), message])
    assert words in str(error.value)


def test_channels_of_ones_own(byte_harmony):
    byte_harmony.render([Message("system", SystemContent(channels=("thoughts",))), assistant("Hi", "thoughts")])


def test_half_a_character_is_no_text(harmony):
    with pytest.raises(PromptError, match="half a character"):
        harmony.render([Message("user", "\ud83d")])


@pytest.mark.parametrize(
    "make",
    [
        lambda harmony: SystemContent(reasoning_effort="none"),
        lambda harmony: ResponseFormat("x", "object"),
        lambda harmony: ResponseFormat("x", {"type": "x"}),
        lambda harmony: ResponseFormat.from_dict({"type": "json_object"}),
        lambda harmony: conversation("Hi", response_formats=["json"]),
        lambda harmony: DeveloperContent(tools=(Tool("f"),), namespaces=(ToolNamespace("functions"),)),
        lambda harmony: DeveloperContent(tools=(Tool("f"), Tool("f"))),
        lambda harmony: conversation("Hi", tools=["f"]),
        lambda harmony: harmony.parser(channel="thoughts"),
        lambda harmony: harmony.render_for_completion([], text="Hi"),
    ],
)
def test_settings_that_do_not_exist(byte_harmony, make):
    with pytest.raises(SettingError):
        make(byte_harmony)


def test_tokenizer_without_harmony():
    plain = ByteTokenizer()
    plain.special_tokens = {"<s>": 1, "<|end|>": 2}
    with pytest.raises(TokenizerError, match=r"no <\|start\|>, <\|message\|>, <\|channel\|>"):
        HarmonyFormat(plain)
    assert issubclass(TokenizerError, UserError)


def test_prompts_gain_no_spaces(byte_harmony):
    tokens = byte_harmony.render_for_completion(
        [Message("user", "Hi", "bob"), assistant("a", "final")], channel="final", text="b"
    )
    assert byte_harmony.decode_markup(tokens) == (
        "<|start|>user:bob<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>a<|end|>"
        "<|start|>assistant<|channel|>final<|message|>b"
    )


def test_stop_tokens(harmony, byte_harmony):
    assert harmony.stop_tokens == {200002, 200012, 199999}
    assert harmony.end_tokens == {200002, 200012, 199999, 200007}
    assert byte_harmony.stop_tokens == {0, 1, 7}


# --- Parsing ----------------------------------------------------------------------------------------------------------


def test_documented_completion(harmony):
    thought = 'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.'
    assert harmony.parse(SAMPLE_COMPLETION) == [assistant(thought, "analysis"), assistant("2 + 2 = 4.", "final")]


def test_what_a_stream_shows(harmony):
    parser = harmony.parser()
    seen = []
    for token in [200005, 35644, 200008, 1844, 200007, 200006, 173781, 316, 28, 44580, 1196, 200005, 12606, 815]:
        delta = parser.push(token)
        seen.append((delta.text, delta.role, delta.channel, delta.recipient))
        assert (delta.channel, delta.recipient) == (parser.channel, parser.recipient) or token == 200007
    in_header = ("", None, None, None)
    assert seen == [
        *(in_header, in_header, ("", "assistant", "analysis", None), ("User", "assistant", "analysis", None)),
        ("", "assistant", "analysis", None),
        *[in_header] * 9,
    ]
    assert (parser.role, parser.channel, parser.text, len(parser.messages)) == (None, None, "", 1)
    for token in [5701, 200008, 12083]:
        delta = parser.push(token)
    assert delta == Delta("{}", "assistant", "commentary", "functions.f")
    assert (parser.role, parser.content_type, parser.text) == ("assistant", "json", "{}")
    assert parser.push(200012) == Delta("", "assistant", "commentary", "functions.f")
    assert parser.messages[-1] == assistant("{}", "commentary", "functions.f", "json")
    assert parser.finish() == Delta()


def test_characters_come_whole(harmony):
    """Token 9552 is a space and half an emoji."""
    parser = harmony.parser(channel="final")
    assert [parser.push(token).text for token in (9552, 238, 242)] == [" ", "", "🐔"]
    assert [parser.push(token).text for token in (9552, 9552, 44580)] == [" ", "\ufffd ", "\ufffdfunctions"]
    assert parser.push(9552).text == " "
    assert parser.push(harmony.return_).text == "\ufffd"
    assert parser.messages[0].content == " 🐔 \ufffd \ufffdfunctions \ufffd"


MARKERS = {
    "S": "<|start|>",
    "E": "<|end|>",
    "M": "<|message|>",
    "C": "<|channel|>",
    "K": "<|constrain|>",
    "R": "<|return|>",
    "L": "<|call|>",
    "T": "<|endoftext|>",
    "X": "<|reserved_0|>",
}


def tokens_of(harmony, completion):
    """Tokens of a completion in which control tokens are letters in braces."""
    for letter, name in MARKERS.items():
        completion = completion.replace(f"[{letter}]", name)
    return harmony.encode_markup(completion)


def analysis(text):
    return ("analysis", None, None, text)


def final(text):
    return ("final", None, None, text)


def call(recipient="functions.f", content_type=None, text="{}", channel="commentary"):
    return (channel, recipient, content_type, text)


WELL_FORMED = {
    " to=functions.f[C]commentary [K]json[M]{}[L]": [call(content_type="<|constrain|>json")],
    "[C]commentary to=functions.f [K]json[M]{}[L]": [call(content_type="<|constrain|>json")],
    "[C]commentary to=functions.f[K]json[M]{}[L]": [call(content_type="<|constrain|>json")],
    "[C]commentary to=functions.f json[M]{}[L]": [call(content_type="json")],
    "[C]commentary to=functions.f[M]{}[R]": [call()],
    "[C]commentary to=functions.f[M]{}[E]": [call()],
    "[C]commentary to=browser.search code[M]{}[L]": [call("browser.search", "code")],
    "[C]analysis to=python code[M]print()[L]": [call("python", "code", "print()", "analysis")],
    "[C]commentary[M]Plan[E][S]assistant[C]commentary to=functions.f json[M]{}[L]": [
        ("commentary", None, None, "Plan"),
        call(content_type="json"),
    ],
    "[C]analysis[M]a[E][S]assistant[C]final[M]b[R]": [analysis("a"), final("b")],
    "[C]analysis[M]a[E][S]assistant[C]final[M]b[E][S]assistant[C]final[M]c[R]": [analysis("a"), final("b"), final("c")],
    "[C]final [K]json[M]{}[R]": [("final", None, "<|constrain|>json", "{}")],
    "[C]final[M][R]": [final("")],
}
SALVAGED = {
    # No header at all, or one without <|message|>.
    "I cannot help.[E][S]assistant[C]analysis[M]a[E]": [analysis("a"), final("I cannot help.")],
    "word[E][S]assistant[C]final[M]x[R]": [analysis("word"), final("x")],
    "bare text\nto the end": [final("bare text\nto the end")],
    # A line that strays between two messages, or before the first, is not the beginning of the answer.
    "[C]analysis[M]a[E]\nHm.\n[S]assistant[C]final[M]x[R]": [analysis("a"), analysis("Hm.\n"), final("x")],
    "[C]analysis[M]a[E]\n[S]assistant[C]final[M]x[R]": [analysis("a"), final("x")],
    "[C]analysis[M]a[E]Hm.[E][S]assistant[C]final[M]x[R]": [analysis("a"), analysis("Hm."), final("x")],
    "[C]analysis[M]a[E]Hm.[S][S]assistant[M]x[R]": [analysis("a"), analysis("Hm."), final("x")],
    "[C]analysis[M]a[E]Hm.[M]x[R]": [analysis("a"), analysis("Hm."), final("x")],
    "[C]analysis[M]a[E]b[S]c[S]assistant[C]final[M]x": [analysis("a"), analysis("b"), analysis("c"), final("x")],
    "[C]analysis[M]a[E]Hm.[S]assistant[C]commentary to=functions.f[M]{}[L]": [analysis("a"), analysis("Hm."), call()],
    "[C]analysis[M]a[E]Hm.[S]assistant to=functions.f[L]": [analysis("a"), call(text=""), analysis("Hm.")],
    "[C]analysis[M]a[E]Hm.[E][C]final y[E]": [analysis("a"), final("y"), analysis("Hm.")],
    "Hm.[S]assistant[C]analysis[M]a[E][S]assistant[C]final[M]x": [analysis("a"), analysis("Hm."), final("x")],
    "[C]analysis[M]a[E]Hm.[S]assistant[C]analysis[M]b": [analysis("a"), analysis("b"), analysis("Hm.")],
    # But what no answer follows is one.
    "[C]analysis[M]a[E]Hm.[R]": [analysis("a"), final("Hm.")],
    "[C]analysis[M]a[E]Hm.[E][S]assistant": [analysis("a"), final("Hm.")],
    "[C]analysis[M]a[E]One.[E]Two.": [analysis("a"), final("One."), final("Two.")],
    "[C]analysis text[E][S]assistant[C]final[M]x[R]": [analysis("text"), final("x")],
    "[C]analysis two  words\n[E]": [analysis("two  words\n")],
    "[C]final text[R]": [final("text")],
    '[C]final{"a":1}[R]': [final('{"a":1}')],
    "[C]thinking about it[E]": [final("thinking about it")],
    '[C]commentary to=functions.f [K]json{"a":1}[L]': [call(content_type="<|constrain|>json", text='{"a":1}')],
    '[C]commentary to=functions.f json {"a":1}[L]': [call(content_type="json", text='{"a":1}')],
    "[C]commentary to=functions.f[L]": [call(text="")],
    "[C]final[E]": [],
    "[E][E] [R]": [],
    # Missing and unknown channels.
    "[M]x": [final("x")],
    "[C][M]x": [final("x")],
    "[C] [M]x": [final("x")],
    " to=functions.f[M]{}[L]": [call()],
    "[C]weird[M]x": [analysis("weird"), final("x")],
    "[C]weird to=functions.f[M]{}[L]": [analysis("weird"), call()],
    "[C]weird[C]final[M]x": [analysis("weird"), final("x")],
    "[C]??[M]x": [analysis("??"), final("x")],
    "[C]commentary?[M]x": [("commentary", None, None, "x")],
    "[C]comment[M]x": [("commentary", None, None, "x")],
    "[C]finalx[M]x": [final("x")],
    "assistant commentary[M]x": [("commentary", None, None, "x")],
    "assistantfinal[M]x": [final("x")],
    # Fields twice, apart, or without their markers.
    "[C]analysis[C]commentary to=f[M]{}[L]": [call("f")],
    "[C]commentary to=assistant[C]commentary?[M]x": [("commentary", None, None, "x")],
    "[C]commentary to=functions.f[C]analysis[M]{}[L]": [call(channel="analysis")],
    " to=f to=f[C]commentary[M]{}[L]": [call("f")],
    " to= f json[C]commentary[M]{}[L]": [call("f", "json")],
    " to=f [K] json[M]{}[L]": [call("f", "<|constrain|>json")],
    " to=f\n[K]json\n[M]{}[L]": [call("f", "<|constrain|>json")],
    "[C]commentary functions.f [K]json[M]{}[L]": [call(content_type="<|constrain|>json")],
    "functions.f[C]commentary [K]json[M]{}[L]": [call(content_type="<|constrain|>json")],
    "[C]commentary get_weather json[M]{}[L]": [call("get_weather", "json")],
    "[C]commentary get_weather [K]json[M]{}[L]": [call("get_weather", "<|constrain|>json")],
    "[C]commentaryto=functions.f[M]{}[L]": [call()],
    "[C]analysis python[M]print()[L]": [call("python", None, "print()", "analysis")],
    "[C]analysis code[M]x": [("analysis", None, "code", "x")],
    "[C]final json[M]{}[R]": [("final", None, "json", "{}")],
    "[K][M]{}": [("final", None, "<|constrain|>", "{}")],
    # Words that mean nothing.
    "––commentary[C]final[M]x": [analysis("––commentary"), final("x")],
    "some words [C]final[M]x": [analysis("some words"), final("x")],
    "bogus[M]x": [analysis("bogus"), final("x")],
    "[C]final[M]a[E]junk[C]final[M]x[R][R]": [final("a"), analysis("junk"), final("x")],
    # The role again.
    "[S][S]assistant[C]final[M]x": [final("x")],
    "[S]assistant[C]final[M]x": [final("x")],
    "[S]assistant[S]assistant[C]final[M]x": [final("x")],
    "assistantassistant[C]final[M]x": [final("x")],
    "[C]final[M]a[E]assistant[C]final[M]x": [final("a"), final("x")],
    # Control tokens in the midst of content.
    "[C]analysis[M]a[S]assistant[C]final[M]b[R]": [analysis("a"), final("b")],
    "[C]analysis[M]a[C]final[M]b[R]": [analysis("a"), final("b")],
    "[C]final[M]a[M]b[K]c[X]d[R]": [final("abcd")],
    "[C]final[M]a[T]": [final("a")],
    # Cut off by the token limit.
    "": [],
    "[C]": [],
    "[C]fin": [],
    "[C]comment": [],
    "[C]final": [],
    "[C]analysis[M]a[E][S]": [analysis("a")],
    "[C]analysis[M]a[E][S]assis": [analysis("a")],
    "[C]analysis[M]a[E][S]assistant": [analysis("a")],
    "[C]commentary to": [],
    "[C]commentary to=": [],
    "[C]commentary to=functions.f": [],
    "[C]commentary to=functions.f [K]js": [],
    "[C]analysis[M]a": [analysis("a")],
    '[C]commentary to=functions.f[M]{"a': [call(text='{"a')],
}


@pytest.mark.parametrize("completion", [*WELL_FORMED, *SALVAGED])
def test_completions(byte_harmony, completion):
    expected = {**WELL_FORMED, **SALVAGED}[completion]
    tokens = tokens_of(byte_harmony, completion)
    assert byte_harmony.parse(tokens) == [assistant(m[3], *m[:3]) for m in expected]
    assert_stream_agrees(byte_harmony, tokens)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("[S]user:bob[M]hi[E]", Message("user", "hi", "bob")),
        ("[S]user[M]hi[E]", Message("user", "hi")),
        ("[S]functions.f[C]commentary[M]out[E]", Message("tool", "out", "functions.f", "commentary")),
        ("[S]x to=assistant[C]commentary[M]out[E]", Message("tool", "out", "x", "commentary", "assistant")),
        ("[S]python to=assistant[C]analysis[M]out[E]", Message("tool", "out", "python", "analysis", "assistant")),
        ("[S]system[M]text[E]", Message("system", "text")),
    ],
)
def test_messages_of_others(byte_harmony, completion, expected):
    tokens = tokens_of(byte_harmony, completion)
    assert byte_harmony.parse(tokens, role=None) == [expected]
    assert byte_harmony.parse(tokens_of(byte_harmony, "[C]final[M]a[E]") + tokens)[1:] == [expected]


def test_an_answer_without_a_header_stays_one_before_an_invented_question(byte_harmony):
    tokens = tokens_of(byte_harmony, "[C]analysis[M]a[E]The answer.[E][S]user[M]And now?[E]")
    assert [(m.role, m.channel, m.text) for m in assert_stream_agrees(byte_harmony, tokens)] == [
        ("assistant", "analysis", "a"), ("assistant", "final", "The answer."), ("user", None, "And now?"),
    ]  # fmt: skip


def test_a_stray_line_is_held_until_it_is_known_what_it_is(byte_harmony):
    parser = byte_harmony.parser()
    deltas = [parser.push(token) for token in tokens_of(byte_harmony, "[C]analysis[M]a[E]Hm.[S]assistant[C]final[M]")]
    shown = [(delta.channel, delta.text) for delta in deltas if delta.text]
    assert shown == [("analysis", "a"), ("analysis", "Hm.")]


def test_an_answer_without_a_header_is_streamed(byte_harmony):
    text = "A long answer that has no header — " * 10
    parser = byte_harmony.parser()
    pieces = [parser.push(token).text for token in byte_harmony.tokenizer.encode(text, continuation=True)]
    assert len(pieces[95] + pieces[96] + pieces[97]) > 90
    assert "".join(pieces) == text
    assert parser.channel == "final"
    long_call = "[C]commentary to=functions.f json " + '{"a": "' + "ü" * 60 + '"}'
    tokens = tokens_of(byte_harmony, long_call + "[L]")
    assert byte_harmony.parse(tokens) == [assistant('{"a": "' + "ü" * 60 + '"}', "commentary", "functions.f", "json")]


def test_tokens_that_do_not_exist(byte_harmony):
    tokens = tokens_of(byte_harmony, "[C]final[M]ab[R]")
    for bad in (-1, 50, 356, 10**9):
        mixed = [token for good in tokens for token in (bad, good)]
        assert byte_harmony.parse(mixed) == [assistant("ab", "final")]


def test_parsing_what_was_rendered(harmony):
    """Every stored conversation comes back, but for what the format cannot say."""
    for case in read_golden():
        messages = ours(case["conversation"])
        tokens = harmony.render(messages, keep_analysis=True)
        contents = [m.content for m in messages]
        has_functions = any(c.has_functions for c in contents if isinstance(c, DeveloperContent))
        assert harmony.parse(tokens, role=None) == [as_parsed(message, has_functions) for message in messages]


def as_parsed(message, has_functions):
    """The message as a parser can know it: one text, no space after <|constrain|>, a channel for the assistant."""
    text = message.text
    if isinstance(message.content, SystemContent):
        text = system_text(message.content, has_functions)
    elif isinstance(message.content, DeveloperContent):
        text = developer_text(message.content)
    channel = message.channel or ("final" if message.role == "assistant" else None)
    content_type = message.content_type and message.content_type.replace("> ", ">")
    return Message(message.role, text, message.name, channel, message.recipient, content_type)


# --- Any sequence of tokens -------------------------------------------------------------------------------------------


def assert_stream_agrees(harmony, tokens):
    """Deltas are the messages' text, channel by channel, whatever the tokens; a stream may be cut anywhere."""
    parser = harmony.parser()
    deltas = [parser.push(token) for token in tokens]
    deltas.append(parser.finish())
    assert "".join(d.text for d in deltas) == "".join(m.content for m in parser.messages)
    for channel in ("analysis", "commentary", "final"):
        shown = "".join(d.text for d in deltas if d.channel == channel and d.role == "assistant")
        assert shown == "".join(m.text for m in parser.messages if m.channel == channel and m.role == "assistant")
    assert all(d.role is not None for d in deltas if d.text)
    assert all(m.channel in ("analysis", "commentary", "final") for m in parser.messages if m.role == "assistant")
    assert (parser.text, parser.channel, parser.role) == ("", None, None)
    assert parser.finish() == Delta()
    harmony.render([message for message in parser.messages if message.role == "assistant"])  # a next turn is possible
    return parser.messages


PIECES = [
    *(f"[{letter}]" for letter in MARKERS),
    *("assistant", "user", "analysis", "commentary", "final", " to=", "functions.f", "python", "json", " "),
    *("comment", "ary", "\n", "x", '{"a": 1}', "to=assistant", "🐔", "<|end|>"),
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_any_pieces(pieces):
    harmony = HarmonyFormat(ByteTokenizer())
    tokens = [token for piece in pieces for token in tokens_of_piece(harmony, piece)]
    assert_stream_agrees(harmony, tokens)


def tokens_of_piece(harmony, piece):
    if piece[1:2] in MARKERS and piece[0] == "[":
        return [harmony.tokenizer.special_tokens[MARKERS[piece[1]]]]
    return harmony.tokenizer.encode(piece, continuation=True)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-5, 360) | st.integers(0, 8), max_size=150))
def test_any_tokens(tokens):
    assert_stream_agrees(HarmonyFormat(ByteTokenizer()), tokens)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_text_is_lost(data):
    """A word that is not part of a header is in some message, wherever it was written."""
    harmony = HarmonyFormat(ByteTokenizer())
    pieces = data.draw(
        st.lists(st.sampled_from(["[S]", "[E]", "[M]", "[C]", "[R]", "[S]assistant", *HEADS, "w"]), max_size=20)
    )
    words = []
    completion = ""
    for piece in pieces:
        if piece == "w":
            words.append(f"w{len(words)}!")
            completion += f" {words[-1]} "
        else:
            completion += piece
    messages = harmony.parse(tokens_of(harmony, completion))
    found = " ".join(f"{m.content} {m.content_type} {m.name} {m.recipient}" for m in messages).split()
    assert sorted(word for word in found if word.startswith("w")) == words


HEADS = ["[C]final", "[C]analysis", "[C]commentary to=functions.f", "[C]final[M]", "[C]analysis[M]", "[K]json[M]"]


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_cut_anywhere_shows_a_beginning(harmony, cut):
    whole = [(m.channel, m.content) for m in harmony.parse(SAMPLE_COMPLETION)]
    part = [(m.channel, m.content) for m in assert_stream_agrees(harmony, SAMPLE_COMPLETION[:cut])]
    assert [channel for channel, _ in part] == [channel for channel, _ in whole][: len(part)]
    assert all(full.startswith(text) for (_, text), (_, full) in zip(part, whole, strict=False))


# --- openai-harmony itself, where its vocabulary is ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle():
    if "OPENELM_MLX_O200K" not in os.environ:
        pytest.skip("OPENELM_MLX_O200K does not name o200k_base.tiktoken; the stored ids stand for openai-harmony")
    return Oracle(Path(os.environ["OPENELM_MLX_O200K"]))


@pytest.fixture(scope="module")
def whole_harmony(oracle, tmp_path_factory):
    """The format over the whole vocabulary, as gpt-oss's tokenizer.json has it."""
    folder = tmp_path_factory.mktemp("o200k")
    write_tokenizer_json(read_ranks(Path(os.environ["OPENELM_MLX_O200K"])), folder / "tokenizer.json")
    return HarmonyFormat(load_tokenizer(folder))


def test_openai_harmony_renders_the_same(oracle, whole_harmony):
    rng = random.Random(7)
    num_agreed = 0
    for _ in range(300):
        specs = random_conversation(rng)
        messages = ours(specs)
        assert whole_harmony.render_for_completion(messages, keep_analysis=True) == oracle.render(specs)
        tokens = whole_harmony.render_for_completion(messages)
        assert tokens == oracle.render(without_finished_reasoning(specs))
        if is_history_agreed(specs):
            num_agreed += 1
            assert tokens == oracle.render(specs, drop_analysis=True)
    assert num_agreed > 100


@pytest.mark.parametrize("is_text", [True, False])
def test_openai_harmony_reads_the_same(oracle, whole_harmony, is_text):
    """Completions with regular headers: their messages, and for text, as against any tokens in a row, every delta."""
    headers = [
        *("[C]analysis", "[C]commentary", "[C]final", " to=functions.f[C]commentary", "[C]commentary to=functions.f"),
        *("[C]commentary to=functions.f json", " to=python[C]analysis code", "[C]commentary to=f-g.h [K]json"),
    ]
    rng = random.Random(7)
    lib = oracle.package
    for _ in range(100):
        tokens = []
        for _ in range(rng.randint(1, 4)):
            tokens += tokens_of(whole_harmony, ("[S]assistant" if tokens else "") + rng.choice(headers) + "[M]")
            noise = [rng.choice([9552, rng.randrange(199998)]) for _ in range(20)]
            tokens += whole_harmony.tokenizer.encode(rng.choice(TEXTS)) if is_text else noise
            tokens.append(rng.choice([whole_harmony.end, whole_harmony.call, whole_harmony.return_]))
        tokens = tokens[: len(tokens) - rng.randint(0, 1)]
        parser = whole_harmony.parser()
        theirs = lib.StreamableParser(oracle.encoding, lib.Role.ASSISTANT)
        for token in tokens:
            delta = parser.push(token)
            theirs.process(token)
            assert (parser.channel, parser.recipient) == (theirs.current_channel, theirs.current_recipient)
            assert parser.content_type == theirs.current_content_type
            assert not is_text or delta.text == (theirs.last_content_delta or "")
        parser.finish()
        theirs.process_eos()
        assert [(m.channel, m.recipient, m.content_type, m.content) for m in parser.messages] == [
            (m.channel, m.recipient, m.content_type, m.content[0].text) for m in theirs.messages
        ]


def test_openai_harmonys_defects_are_still_there(oracle, whole_harmony):
    """docs/harmony.md lists them; when one is mended, the list and this test are to be shortened."""
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "t", "channel": "analysis"}]
    turn.append({"role": "assistant", "content": "a", "channel": "final"})
    assert oracle.render(turn + turn, drop_analysis=True) != oracle.render(without_finished_reasoning(turn + turn))
    unfinished = turn + turn[:2]
    assert oracle.render(unfinished, drop_analysis=True) != oracle.render(without_finished_reasoning(unfinished))
    everyone = [{"role": "assistant", "content": "Hi", "channel": "final", "recipient": "all"}]
    assert oracle.render(everyone)[-3] == whole_harmony.call
    lib = oracle.package
    for completion in (
        "Sorry.[E]",
        "[C]final text[R]",
        "[C]fin",
        "[C][M]x",
        " to=f to=f[C]commentary[M]{}[L]",
        "[S][S]",
    ):
        tokens = tokens_of(whole_harmony, completion)
        with pytest.raises(lib.HarmonyError):
            oracle.encoding.parse_messages_from_completion_tokens(tokens, lib.Role.ASSISTANT)
    tokens = tokens_of(whole_harmony, "[C]final [K]json[M]{}[R]")
    (answer,) = oracle.encoding.parse_messages_from_completion_tokens(tokens, lib.Role.ASSISTANT)
    assert (answer.recipient, answer.content_type) == ("<|constrain|>json", None)
