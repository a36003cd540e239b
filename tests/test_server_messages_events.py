"""Parts of an answer as events of Anthropic's stream, and as the message: order, indices, and what the client sums up."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from late_imports import late, late_validator
from server_fakes import CALL, THOUGHT_AND_ANSWER, end, item

from openelm_mlx.server.call_reasoning import CallReasoning
from openelm_mlx.server.wire.messages_events import MessageEvents


def run(parts, batch=1, **options):
    """All events of a stream, each of Anthropic's own type, and the builder."""
    builder = MessageEvents("demo", 12, **options)
    events = sent(builder.start())
    for i in range(0, len(parts), batch):
        events += sent(builder.more(parts[i : i + batch]))
    for event in events:
        late_validator("anthropic.types:RawMessageStreamEvent").validate_python(event)
    late("anthropic.types:Message").model_validate(builder.message)
    return events, builder


def sent(events):
    """As they are now: what has been sent does not change when more is written."""
    return json.loads(json.dumps(events))


def summed_up(events):
    """The message that Anthropic's own client makes of a stream."""
    message, buffers = None, {}
    accumulate_event = late("anthropic.lib.streaming._messages:accumulate_event")
    for event in events:
        parsed = late_validator("anthropic.types:RawMessageStreamEvent").validate_python(event)
        message = accumulate_event(event=parsed, current_snapshot=message, json_bufs=buffers)
    return message


def plain(message):
    """A message as JSON, without what each form of it leaves out."""
    return (
        late("anthropic.types:Message")
        .model_validate(message if isinstance(message, dict) else message.to_dict())
        .to_dict(exclude_none=True)
    )


def shapes(events):
    return [
        event.get("delta", event.get("content_block", event))["type"]
        for event in events
        if event["type"] != "message_delta"
    ]


def test_the_order_of_a_thought_and_an_answer():
    events, builder = run(THOUGHT_AND_ANSWER, thinking="shown")
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start", *["content_block_delta"] * 3, "content_block_stop",
        "content_block_start", *["content_block_delta"] * 2, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert shapes(events) == [
        "message_start",
        "thinking", "thinking_delta", "thinking_delta", "signature_delta", "content_block_stop",
        "text", "text_delta", "text_delta", "content_block_stop",
        "message_stop",
    ]  # fmt: skip
    assert [event["index"] for event in events if "index" in event] == [0] * 5 + [1] * 4
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["input_tokens"]) == ([], None, 12)
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"] == {
        "input_tokens": 8,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 9,
        "output_tokens_details": {"thinking_tokens": 5},
    }
    blocks = builder.message["content"]
    assert (blocks[0]["thinking"], blocks[1]["text"]) == ("Let me think.", "2 + 2 = 4.")
    assert blocks[0]["signature"]


def test_a_call_is_a_block_and_so_is_what_was_said_before_it():
    events, builder = run(CALL, thinking="shown")
    blocks = builder.message["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert (blocks[2]["name"], blocks[2]["input"]) == ("calculator", {"expression": "2+2"})
    assert builder.message["stop_reason"] == "tool_use"
    started = next(event["content_block"] for event in events if event.get("index") == 2)
    assert started == {"type": "tool_use", "id": blocks[2]["id"], "name": "calculator", "input": {}}


def test_thinking_that_nobody_asked_for_is_not_shown_and_not_lost():
    known = CallReasoning()
    events, builder = run(CALL, known=known)
    assert [block["type"] for block in builder.message["content"]] == ["text", "tool_use"]
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1]
    assert known.before([builder.message["content"][1]["id"]]) == "I need the tool."


def test_sealed_thinking_has_a_signature_and_no_text():
    events, builder = run(THOUGHT_AND_ANSWER, thinking="sealed")
    assert "thinking_delta" not in shapes(events)
    assert builder.message["content"][0]["thinking"] == ""
    assert len(builder.message["content"][0]["signature"]) > 30


@pytest.mark.parametrize(
    ("ending", "reason", "sequence"),
    [
        (end(), "end_turn", None),
        (end("length"), "max_tokens", None),
        (end("tool_calls"), "tool_use", None),
        (end("stop", stop_string="END"), "stop_sequence", "END"),
    ],
)
def test_every_reason_to_stop(ending, reason, sequence):
    _, builder = run([*item("message", "x"), ending])
    assert (builder.message["stop_reason"], builder.message["stop_sequence"]) == (reason, sequence)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"a": 1, "b": "two"}', {"a": 1, "b": "two"}),
        ("", {}),
        (" \n", {}),
        ('{"a": 1, "b": "tw', {"a": 1}),  # cut off
        ('{"a": [1, {"c": tru', {"a": [1, {}]}),
        ("ls -l", {"INVALID_JSON": "ls -l"}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ('"x"', {"INVALID_JSON": '"x"'}),
        ("{'a': 1}", {"INVALID_JSON": "{'a': 1}"}),
        ('{"a": NaN}', {"INVALID_JSON": '{"a": NaN}'}),  # which the answer could not say
        ('{"a": 1e999}', {"INVALID_JSON": '{"a": 1e999}'}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ('{"a": "\\ud800"}', {"INVALID_JSON": '{"a": "\\ud800"}'}),  # half a character
    ],
)
def test_any_arguments_are_an_object_that_clients_can_read(arguments, wanted):
    """Anthropic's client fails on a piece that is not the beginning of JSON, and an input is always an object."""
    _, whole = run([*item("call", arguments, name="f"), end("tool_calls")])
    assert whole.message["content"][0]["input"] == wanted
    json.dumps(whole.message, allow_nan=False)
    events, pieces = run([*item("call", *arguments, name="f"), end("tool_calls")])
    assert isinstance(pieces.message["content"][0]["input"], dict)
    assert summed_up(events).content[0].input == pieces.message["content"][0]["input"]


def test_arguments_that_go_wrong_in_the_middle_end_there():
    events, builder = run([*item("call", '{"a": 1, ', "b: 2}", name="f"), end("tool_calls")])
    assert builder.message["content"][0]["input"] == {"a": 1} == summed_up(events).content[0].input


def test_long_arguments_come_in_pieces_and_whole():
    text = json.dumps({"content": "line\n" * 2000})
    events, builder = run([*item("call", *text, name="f"), end("tool_calls")])
    pieces = [event["delta"]["partial_json"] for event in events if "partial_json" in event.get("delta", {})]
    assert "".join(pieces) == text
    assert 10 < len(pieces) < 100
    assert builder.message["content"][0]["input"] == json.loads(text)


# --- Any row of items ---------------------------------------------------------------------------------------------------

VALUES = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5) | st.lists(st.booleans()), max_size=3)


@st.composite
def answers(draw):
    """The parts of any answer, and what its items are: kind and text."""
    parts, items = [], []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["reasoning", "message", "call"]))
        texts = draw(st.lists(st.text(max_size=4), max_size=4))
        if kind == "call":
            arguments = draw(st.one_of(VALUES.map(json.dumps), st.text(max_size=6)))
            texts = [arguments[i : i + 3] for i in range(0, len(arguments), 3)]
        items.append((kind, "".join(texts)))
        parts += item(kind, *texts, name="f" if kind == "call" else None)
    return [*parts, end(draw(st.sampled_from(["stop", "length", "tool_calls"])))], items


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(answers(), st.integers(1, 30), st.sampled_from(["shown", "sealed", "hidden"]))
def test_any_stream_has_one_open_block_and_sums_up_to_the_message(answer, batch, thinking):
    parts, items = answer
    events, builder = run(parts, batch, thinking=thinking)
    open_index, num_blocks = None, 0
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert (open_index, event["index"]) == (None, num_blocks)
            open_index, num_blocks = event["index"], num_blocks + 1
            continue
        assert event["index"] == open_index
        if event["type"] == "content_block_stop":
            open_index = None
    assert open_index is None
    assert plain(summed_up(events)) == plain(builder.message)
    shown = [(kind, text) for kind, text in items if kind != "reasoning" or thinking != "hidden"]
    blocks = builder.message["content"]
    kinds = {"reasoning": "thinking", "message": "text", "call": "tool_use"}
    assert [block["type"] for block in blocks] == [kinds[kind] for kind, _ in shown]
    for block, (kind, text) in zip(blocks, shown, strict=True):
        if kind == "message":
            assert block["text"] == text
        elif kind == "reasoning":
            assert block["thinking"] == (text if thinking == "shown" else "")
    _, again = run(parts, len(parts), thinking=thinking)
    assert nameless(again.message) == nameless(builder.message)


def nameless(message):
    """A message without the names that are new each time; inputs of calls that were cut or wrong depend on their pieces."""
    blocks = [
        {key: value for key, value in block.items() if key not in ("id", "input")} for block in message["content"]
    ]
    return {**message, "id": "", "content": blocks}
