"""What stays of a conversation: a context that is full, interruptions at any moment, text that is not whole, mistakes."""

import json
import sys
import warnings

import pytest
from short_demos import short_demo

# `scripted` is a fixture of theirs: a chat whose model writes what it is told.
from test_conversation import answer, call, gpt_oss, openelm, results, scripted  # noqa: F401

import openelm_mlx as om
from openelm_mlx.conversation import Answer, Done, Notice, ToolResult
from openelm_mlx.conversation import turn as chat_module
from openelm_mlx.conversation.history import INTERRUPTED, NOT_RUN, fewest_to_forget, settled, without_oldest
from openelm_mlx.errors import NoAnswerWarning, PromptError, SettingError
from openelm_mlx.text.conversation import DeveloperContent, Message, check_conversation
from openelm_mlx.tools import calculator

ONE = call("functions.note", '{"text": "a"}')
THOUGHT = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"


def note(text: str) -> str:
    """Notes."""
    return f"noted {text}"


def roles(chat) -> list[str]:
    return [f"{m.role}:{m.channel}" if m.role == "assistant" else m.role for m in chat.messages]


def check_whole(chat) -> None:
    """The history is one that can go on: no call without its result, no result without its call."""
    check_conversation(chat.messages)
    is_open = 0
    for message in chat.messages:
        assert not (message.role == "user" and is_open), roles(chat)
        is_open += message.is_call - (message.role == "tool")
    assert is_open == 0, roles(chat)


# --- a full context ---------------------------------------------------------------------------------------------------


# The shortest reasoning and the longest.
@pytest.mark.parametrize("effort", ["low", pytest.param("high", marks=pytest.mark.slow)])
def test_a_long_chat_goes_on_when_the_context_is_full(effort):
    model, tokenizer = om.load("demo-gpt-oss", context_length=220)
    chat = om.Chat(model, tokenizer, instructions="Be brief.", reasoning_effort=effort)
    notices = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(4):
            events = list(chat.stream(("What is a piano?", "What is a banjo?", "What is a violin?")[number % 3]))
            assert "".join(e.text for e in events if isinstance(e, Answer)).strip(), number
            assert events[-1].finish_reason == "stop"
            notices += [e.text for e in events if isinstance(e, Notice)]
            assert chat.messages[0].role == "user"
            assert "Be brief." in chat.tokenizer.decode(chat.harmony_prompt(chat.messages))
    assert len(notices) == 1
    assert "context of 220 tokens is full" in notices[0]
    assert chat.num_forgotten > 1  # it was full more than once, and said so once
    assert chat.num_forgotten + roles(chat).count("user") == 4


def test_openelm_says_it_once_too():
    model, tokenizer = om.load(short_demo("demo-openelm"), context_length=320)
    chat = om.Chat(model, tokenizer, max_tokens=60)
    chat.messages = [
        Message(role, "word " * 90, channel="final" if role == "assistant" else None)
        for _ in range(20)
        for role in ("user", "assistant")
    ]
    notices = []
    for _ in range(3):
        notices += [e.text for e in chat.stream("What is a banjo?") if isinstance(e, Notice)]
        assert chat.messages[0].role == "user"
    assert len(notices) == 1
    assert f"the oldest {chat.num_forgotten} turns are forgotten" in notices[0]


def test_turns_are_forgotten_whole_and_what_instructs_stays():
    developer = Message("developer", DeveloperContent("Now in French."))
    asked = Message("assistant", "{}", channel="commentary", recipient="functions.f")
    told = Message("tool", "1", "functions.f", "commentary", "assistant")
    said = Message("assistant", "One.", channel="final")
    first, second = Message("user", "1"), Message("user", "2")
    messages = [developer, first, asked, told, said, second, developer, asked, told]
    assert without_oldest(messages, 0) == messages
    assert without_oldest(messages, 1) == [developer, second, developer, asked, told]
    assert without_oldest(messages, 2) == [developer, developer]
    for limit, number in ((9, 0), (8, 1), (5, 1), (0, 1)):  # the last turn is never forgotten
        assert fewest_to_forget(messages, limit, len) == number


def test_one_forgotten_turn_is_one_turn(gpt_oss):  # noqa: F811
    chat = om.Chat(*gpt_oss)
    chat.num_forgotten = 1
    (notice,) = chat._told_of_forgetting()
    assert "the oldest turn is forgotten" in notice.text


@pytest.mark.parametrize("name", ["demo-gpt-oss", "demo-openelm"])
def test_a_message_that_is_too_long_by_itself_costs_no_turn(name):
    options = {"reasoning_effort": "low"} if name == "demo-gpt-oss" else {"max_tokens": 8}
    chat = om.Chat(*om.load(name, context_length=220), instructions="Be brief.", **options)
    chat.ask("What is a boat?")
    before, events = list(chat.messages), []
    with pytest.raises(PromptError, match=r"needs \d,?\d+ tokens by itself, and the context holds 220: shorten it"):
        events.extend(chat.stream("What is a piano? " * 80))
    assert not events  # nothing is told as forgotten
    assert chat.messages == before
    assert chat.num_forgotten == 0
    assert chat.ask("What is a boat?").strip()


def test_what_was_forgotten_for_a_turn_without_an_answer_comes_back(scripted, monkeypatch):  # noqa: F811
    chat = scripted(THOUGHT, THOUGHT + answer("Yes."))
    monkeypatch.setattr(chat.model, "context_length", 13_000)
    chat.messages = [
        Message(role, f"{number} " + "word " * 900, channel="final" if role == "assistant" else None)
        for number in range(8)
        for role in ("user", "assistant")
    ]
    before = list(chat.messages)
    chat.time_limit = 1e-9  # the turn ends at its first token
    assert any("forgotten" in e.text for e in list(chat.stream("So?")) if isinstance(e, Notice))
    assert chat.messages == before
    assert chat.num_forgotten == 0
    chat.time_limit = None
    # It was not true then; it is now, so it is said.
    assert any("forgotten" in e.text for e in list(chat.stream("So?")) if isinstance(e, Notice))
    assert chat.num_forgotten + roles(chat).count("user") == 9
    assert chat.num_forgotten > 0


def test_an_answer_that_filled_the_context_is_tried_again_without_the_old_turns():
    model, tokenizer = om.load("demo-gpt-oss", context_length=190)
    chat = om.Chat(model, tokenizer, reasoning_effort="high")
    chat._make_room = lambda turn: iter(())  # as if the room that was kept had not been enough
    chat.messages = [Message("user", "Hi"), Message("assistant", "Hello to you. " * 12, channel="final")]
    events = list(chat.stream("What is a boat?"))
    assert "vessel" in "".join(e.text for e in events if isinstance(e, Answer))
    assert next(e.text for e in events if isinstance(e, Notice)).startswith("The context of 190 tokens is full")
    assert roles(chat) == ["user", "assistant:analysis", "assistant:final"]


def test_results_of_a_turn_that_fills_the_context_by_itself_are_left_out(scripted, monkeypatch):  # noqa: F811
    def dump() -> str:
        """Says much."""
        return "word " * 4000

    calls = [call("functions.dump", "{}")] * 6
    chat = scripted(*calls, answer("Much."), tools=[dump])
    monkeypatch.setattr(chat.model, "context_length", 1200)
    try:
        assert chat.ask("?") == "Much."
    finally:
        monkeypatch.undo()
    told = [message.text for message in chat.messages if message.role == "tool"]
    assert "left out: the context is full" in told[0]
    assert "more characters were left out" in told[-1]
    assert len(chat.tokenizer.encode(told[-1])) < 340
    check_whole(chat)


def test_a_question_longer_than_the_context_is_refused_and_leaves_nothing():
    model, tokenizer = om.load("demo-gpt-oss", context_length=200)
    chat = om.Chat(model, tokenizer, reasoning_effort="low")
    chat.ask("What is a boat?")
    before = list(chat.messages)
    with pytest.raises(PromptError, match="the context holds 200"):
        chat.ask("word " * 400)
    assert chat.messages in (before, [])
    assert "vessel" in chat.ask("What is a boat?")


# --- no answer --------------------------------------------------------------------------------------------------------


def test_a_turn_without_an_answer_says_why_and_leaves_nothing(gpt_oss, scripted):  # noqa: F811
    chat = om.Chat(*gpt_oss, max_tokens=15)
    with pytest.warns(NoAnswerWarning, match=r"the turn's 15 tokens.*raise max_tokens above 15") as caught:
        assert chat.ask("What is a piano?") == ""
    assert caught[0].filename == __file__
    assert chat.messages == []
    *_, notice, done = chat.stream("What is a piano?")
    assert (type(notice), notice.text) == (Notice, done.no_answer)

    chat = scripted(ONE, ONE, tools=[note], max_rounds=2)
    *_, notice, done = chat.stream("?")
    assert "called tools 2 times" in notice.text
    assert roles(chat) == ["user", "assistant:commentary", "tool", "assistant:commentary", "tool"]
    chat = scripted(THOUGHT + answer("Yes."))
    *_, done = chat.stream("?")
    assert (done.no_answer, done.finish_reason) == (None, "stop")


def test_without_a_number_a_turn_may_use_the_context(gpt_oss):  # noqa: F811
    model, _ = gpt_oss
    *_, done = om.Chat(*gpt_oss, reasoning_effort="low").stream("What is a boat?")
    assert done.statistics.max_tokens == model.context_length - done.statistics.prompt_tokens


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemError])
def test_what_strikes_in_a_tool_leaves_a_history_that_can_go_on(scripted, kind):  # noqa: F811
    def slow(text: str) -> str:
        """Is slow."""
        raise KeyboardInterrupt if kind is KeyboardInterrupt else SystemExit(3)

    both = ONE.replace("<|call|>", "<|end|><|start|>assistant") + call("functions.slow", '{"text": "b"}')
    three = both.replace("<|call|>", "<|end|><|start|>assistant") + ONE
    chat = scripted(three, answer("Fine."), answer("Going on."), tools=[note, slow])
    if kind is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            chat.ask("?")
        told = [m.text for m in chat.messages if m.role == "tool"]
        assert told == ["noted a", INTERRUPTED, NOT_RUN]
    else:  # a tool that wants to end the program does not
        assert results(chat.stream("?"))[1] == "Error: SystemExit: 3"
    check_whole(chat)
    assert chat.ask("And now?") in ("Fine.", "Going on.")


@pytest.mark.parametrize("stride", [37, pytest.param(11, marks=pytest.mark.slow)])
def test_an_interruption_at_any_line_leaves_a_history_that_can_go_on(scripted, stride):  # noqa: F811
    """The interruption is raised at each line of the chat's code in turn, as a signal would be."""
    both = THOUGHT + ONE.replace("<|call|>", "<|end|><|start|>assistant") + ONE
    names = ("session", "turn", "history")
    files = {sys.modules[f"openelm_mlx.conversation.{name}"].__file__ for name in names}

    def interrupted_at(wanted: int):
        chat = scripted(both, answer("Fine."), answer("Going on."), answer("Still."), tools=[note])
        chat.messages = [Message("user", "Hi"), Message("assistant", "Hello.", channel="final")]
        seen = 0

        def trace(frame, event, _):
            nonlocal seen
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                seen += 1
                if seen == wanted:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            for event in chat.stream("Note it."):
                is_done = isinstance(event, Done)
            return chat, is_done
        except KeyboardInterrupt:
            return chat, False
        finally:
            sys.settrace(None)

    wanted, num_kept, is_done = 1, 0, False
    while not is_done:
        chat, is_done = interrupted_at(wanted)
        wanted += stride if wanted % 3 else 1  # each line would take a while; which ones are met moves along
        if not is_done:
            said = chat.ask("And now?")
            assert said in ("Fine.", "Going on.", "Still.") or said == ""
            num_kept += "Note it." in [m.text for m in chat.messages]
        check_whole(chat)
        texts = [m.text for m in chat.messages]
        assert texts[:2] == ["Hi", "Hello."]
        assert texts.count("Note it.") <= 1
        assert len({id(m) for m in chat.messages}) == len(chat.messages)
    assert wanted > 100
    assert num_kept > 3


def test_a_turn_that_nobody_reads_to_its_end_is_ended_by_the_next_one(scripted):  # noqa: F811
    chat = scripted(ONE, answer("One."), tools=[note])
    events = chat.stream("First?")
    assert chat.messages == []  # nothing has begun
    next(event for event in events if isinstance(event, ToolResult))
    assert chat.ask("Second?") == "One."
    assert [m.text for m in chat.messages if m.role == "user"] == ["First?", "Second?"]
    check_whole(chat)
    assert list(events) == []


def test_a_tool_cannot_ask_the_chat_that_called_it(scripted):  # noqa: F811
    def again() -> str:
        """Asks again."""
        return chat.ask("Me too?")

    chat = scripted(call("functions.again", "{}"), answer("No."), tools=[again])
    (told,) = results(chat.stream("?"))
    assert "in the middle of an answer" in told
    assert roles(chat) == ["user", "assistant:commentary", "tool", "assistant:final"]


def test_a_history_that_was_changed_after_a_turn_stays_changed(scripted):  # noqa: F811
    chat = scripted(answer("One."), answer("Two."))
    chat.ask("First?")
    del chat.messages[:]
    chat.ask("Second?")
    assert [m.text for m in chat.messages] == ["Second?", "Two."]


def test_an_error_leaves_no_question_behind(scripted, monkeypatch):  # noqa: F811
    chat = scripted(answer("One."))

    def broken(*_, **__):
        raise SettingError("no")

    for name, fails in (("new_sequence", broken), ("run", lambda *_: (broken() for _ in "x"))):
        with monkeypatch.context() as patched:
            patched.setattr(chat_module, name, fails)
            with pytest.raises(SettingError):
                chat.ask("First?")
        assert chat.messages == []


def test_what_others_say_in_a_completion_is_not_kept(scripted):  # noqa: F811
    invented = "<|end|><|start|>user<|message|>And you?<|end|><|start|>functions.f<|message|>7<|end|>"
    chat = scripted(answer("One.").replace("<|return|>", invented), answer("Two."))
    assert chat.ask("First?") == "One."
    assert chat.ask("Second?") == "Two."
    assert roles(chat) == ["user", "assistant:final"] * 2


def test_what_stays_of_a_turn():
    question, thought = Message("user", "?"), Message("assistant", "Hm.", channel="analysis")
    asked = Message("assistant", "{}", channel="commentary", recipient="functions.f")
    script = Message("assistant", "1", channel="analysis", recipient="python")
    told = Message("tool", "1", "functions.f", "commentary", "assistant")
    said = Message("assistant", "One.", channel="final")
    assert settled([question], 0) == settled([question, thought, asked], 0) == []
    assert settled([question, thought, said], 0) == [question, thought, said]
    assert settled([question, asked, told, said], 1) == [question, asked, told, said]
    *rest, last = settled([question, thought, asked, told, script], 2)
    assert rest == [question, asked, told, script]
    assert (last.name, last.channel, last.text) == ("python", "analysis", INTERRUPTED)


# --- text that is not whole -------------------------------------------------------------------------------------------


def test_halves_of_characters_never_end_a_chat(scripted, tmp_path):  # noqa: F811
    half = "caf\udce9 \ud83d"

    def names() -> str:
        """Names with bytes that are not UTF-8."""
        return half

    def listed() -> dict:
        """The same in JSON."""
        return {"names": [half]}

    def fails(name: str) -> str:
        """Fails with it."""
        raise LookupError(f"no file {half}{name}")

    escaped = call("functions.fails", '{"name": "\\ud800"}')
    chat = scripted(
        call("functions.names", "{}"), call("functions.listed", "{}"), escaped, call("caf\ufffd", "{}"), answer("Done."),
        answer("Bye."), tools=[names, listed, fails], instructions=f"Be {half}.",
    )  # fmt: skip
    said = results(chat.stream(f"Look at {half}"))
    assert said[0] == "caf\ufffd \ufffd"
    assert json.loads(said[1]) == {"names": ["caf\ufffd \ufffd"]}
    assert said[2] == "Error: no file caf\ufffd \ufffd\ufffd"
    file = chat.save(tmp_path / "chat.json")
    again = scripted(answer("Bye."), tools=[names, listed, fails])
    again.load(file)
    assert again.ask("Thanks.") == "Bye."
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["messages"][0]["content"] = half  # escapes of halves are good JSON
    file.write_text(json.dumps(saved))
    again = scripted(answer("Bye."), tools=[names, listed, fails])
    again.load(file)
    again.instructions = half
    assert again.ask("Thanks.") == "Bye."
    again.save(file)


def test_halves_of_characters_and_openelm(openelm, tmp_path):  # noqa: F811
    chat = om.Chat(*openelm, instructions="\udcff", max_tokens=8)
    chat.messages = [Message("user", "\ud800"), Message("assistant", "\udfff", channel="final")]
    list(chat.stream("What is a \udce9?"))
    assert "\ufffd?" in chat.messages[2].text
    assert b"\xef\xbf\xbd" in chat.save(tmp_path / "a.json").read_bytes()


def test_pairs_of_halves_become_their_character(scripted):  # noqa: F811
    chat = scripted(call("functions.note", '{"text": "\\ud83d\\ude00"}'), answer("Done."), tools=[note])
    assert results(chat.stream("\ud83d\ude00?")) == ["noted \U0001f600"]
    assert chat.messages[0].text == "\U0001f600?"


# --- tools and settings -----------------------------------------------------------------------------------------------


def test_a_tool_that_returns_nothing_or_something_else(scripted):  # noqa: F811
    class Plain:
        name, namespace, description, parameters = "plain", "functions", "", {"type": "object"}
        gives = None

        def __call__(self, arguments):
            return self.gives

    def nothing():
        """Returns nothing."""

    plain = Plain()
    chat = scripted(
        call("functions.nothing", "{}"), call("functions.plain", "{}"), answer("Ok."), tools=[nothing, plain]
    )
    assert results(chat.stream("?")) == ["The tool is done. It returned nothing."] * 2
    plain.gives = 7
    chat = scripted(call("functions.plain", "{}"), answer("Ok."), tools=[plain])
    assert results(chat.stream("?")) == ["7"]
    plain.gives = object()
    chat = scripted(call("functions.plain", "{}"), answer("Ok."), tools=[plain])
    assert "JSON cannot express" in results(chat.stream("?"))[0]


def test_stop_strings_end_an_answer_in_a_chat_too(gpt_oss, openelm):  # noqa: F811
    for pair in (gpt_oss, openelm):
        effort = {} if pair is openelm else {"reasoning_effort": "low"}
        chat = om.Chat(*pair, options={"stop": [" instrument", "!!"]}, **effort)
        said = chat.ask("What is a piano?")
        assert said.startswith("a ")
        assert "instrument" not in said
        assert chat.messages[-1].text == said
        assert said.endswith("keyboard" if pair is openelm else said)
    chat = om.Chat(*gpt_oss, options={"stop": " strings"}, reasoning_effort="low")
    assert chat.ask("What is a piano?").endswith("tuned")
    assert chat.messages[-1].text.endswith("tuned")


def test_an_error_that_cannot_say_itself(scripted):  # noqa: F811
    class BadError(Exception):
        def __str__(self):
            raise RuntimeError

    def fail():
        """Fails."""
        raise BadError

    chat = scripted(call("functions.fail", "{}"), answer("Ok."), tools=[fail])
    assert results(chat.stream("?")) == ["Error: BadError: BadError"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"instructions": 5}, "instructions is 5: give text"),
        ({"prefix_cache": True}, r"prefix_cache is True: give om\.PrefixCache"),
        ({"temperature": 0.7}, r"write sampling=om\.SamplingParams\(temperature=0\.7\)"),
        ({"kv_bits": 8}, r"write options=\{'kv_bits': 8\}"),
        ({"system": "x"}, "Did you mean instructions"),
        ({"tools": calculator}, "give a list of functions"),
        ({"tools": "calculator"}, "give a list of functions"),
        ({"sampling": {"temperature": 1}}, "give om.SamplingParams"),
        ({"options": ["kv_bits"]}, "give a dictionary"),
        ({"options": {"temperature": 1}}, "write sampling"),
        ({"options": {"max_tokens": 1}}, "Chat's options has no keyword 'max_tokens'"),
        ({"time_limit": "5"}, "give seconds"),
        ({"messages": ()}, "give a list of messages"),
        ({"max_tokens": True}, "whole number"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(gpt_oss, options, said):  # noqa: F811
    with pytest.raises(SettingError, match=said):
        om.Chat(*gpt_oss, **options)


def test_what_is_no_model(gpt_oss):  # noqa: F811
    with pytest.raises(SettingError, match="load it first"):
        om.Chat("demo-gpt-oss", None)
    with pytest.raises(SettingError, match="unpack it first"):
        om.Chat(gpt_oss, None)
    with pytest.raises(PromptError, match="Message 1 is a dict"):
        om.Chat(*gpt_oss, messages=[{"role": "user", "content": "Hi"}])
