"""Parts of an answer as events of a Responses stream, and as the response: names, order, numbers, and what a client sums up."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from late_imports import late, late_validator
from server_fakes import CALL, THOUGHT_AND_ANSWER, end, item

from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.parts import ItemDone, ItemStarted, ItemText, TokenLogprob
from openelm_mlx.server.wire.custom_input import CustomInput, wrapped
from openelm_mlx.server.wire.responses_events import ResponseEvents
from openelm_mlx.server.wire.responses_tools import read_tools

FIELDS = {"model": "demo", "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
TOOLS = [
    {"type": "function", "name": "calculator", "parameters": {"type": "object", "properties": {}}},
    {"type": "custom", "name": "patch"},
    {"type": "namespace", "name": "mail", "description": "", "tools": [{"type": "function", "name": "send"}]},
]


def tools():
    return read_tools([(f"tools[{i}]", tool) for i, tool in enumerate(TOOLS)])


def run(parts, batch=1, **options):
    """All events of a stream, each of OpenAI's own type, and the builder."""
    builder = ResponseEvents(FIELDS, tools(), **options)
    events = sent(builder.start())
    for i in range(0, len(parts), batch):
        events += sent(builder.more(parts[i : i + batch]))
    return check(events), builder


def sent(events):
    """As they are now: what has been sent does not change when more is written."""
    return json.loads(json.dumps(events))


def check(events):
    for event in events:
        late_validator("openai.types.responses:ResponseStreamEvent").validate_python(event)
        if "response" in event:
            late("openai.types.responses:Response").model_validate(event["response"])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def names(events):
    return [event["type"].removeprefix("response.") for event in events]


TEXT = ["output_item.added", "content_part.added", "{0}.delta", "{0}.done", "content_part.done", "output_item.done"]


def test_the_order_of_a_thought_and_an_answer():
    events, builder = run(THOUGHT_AND_ANSWER)
    reasoning = [name.format("reasoning_text") for name in TEXT]
    text = [name.format("output_text") for name in TEXT]
    # The model writes each in two pieces.
    assert names(events) == [
        "created", "in_progress", *reasoning[:3], *reasoning[2:], *text[:3], *text[2:], "completed",
    ]  # fmt: skip
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [(each["type"], each["status"], each["content"]) for each in added] == [
        ("reasoning", "in_progress", []),
        ("message", "in_progress", []),
    ]
    parts = [event["part"] for event in events if event["type"] == "response.content_part.added"]
    assert parts[0] == {"type": "reasoning_text", "text": ""}
    assert parts[1] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert [event["response"]["status"] for event in events if "response" in event] == [
        "in_progress", "in_progress", "completed",
    ]  # fmt: skip
    assert events[0]["response"]["output"] == []
    response = events[-1]["response"]
    assert response["usage"] == {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 5},
        "total_tokens": 21,
    }
    assert response == builder.response
    assert late("openai.types.responses:Response").model_validate(response).output_text == "2 + 2 = 4."


def test_the_order_of_a_call_and_what_is_said_before_it():
    events, builder = run(CALL)
    call = events[names(events).index("output_item.done", 12) + 1 :]
    assert names(call) == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert call[0]["item"]["arguments"] == ""
    assert call[3]["arguments"] == '{"expression": "2+2"}'
    assert call[3]["name"] == "calculator"
    assert {call[0]["item"][key] == call[4]["item"][key] for key in ("id", "call_id", "name")} == {True}
    kinds = [(each["type"], each.get("phase")) for each in builder.response["output"]]
    assert kinds == [("reasoning", None), ("message", "commentary"), ("function_call", None)]


@pytest.mark.parametrize(
    "parts",
    [
        item("reasoning", "I was about"),
        [*item("reasoning", "Fine."), *item("message", "The answ")],
        item("call", '{"expr', name="calculator"),
        item("call", '{"input": "*** Begin', name="patch"),
        [],
    ],
    ids=["reasoning", "message", "call", "custom", "nothing"],
)
def test_an_answer_that_was_cut_off_is_incomplete_and_so_is_its_last_item(parts):
    events, builder = run([*parts, end("length")])
    assert names(events)[-1] == "incomplete"
    response = builder.response
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [each["status"] for each in response["output"]][-1:] == ["incomplete"] * bool(parts)
    assert all(each["status"] == "completed" for each in response["output"][:-1])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == response["output"]


@pytest.mark.parametrize("at", range(len(CALL)))
def test_a_failure_ends_the_stream_with_what_there_is(at):
    builder = ResponseEvents(FIELDS, tools())
    events = builder.start() + builder.more(CALL[:at])
    events = check(events + builder.failed(ApiError(500, "the engine has ended", "server_error")))
    assert names(events)[-1] == "failed"
    assert names(events).count("output_item.added") == names(events).count("output_item.done")
    response = builder.response
    assert response["status"] == "failed"
    assert response["error"] == {"code": "server_error", "message": "the engine has ended"}
    assert "".join(delta_texts(events)) == "".join(part.text for part in CALL[:at] if isinstance(part, ItemText))
    codes = {}
    for status in (429, 400, 503):
        failing = ResponseEvents(FIELDS)
        failing.failed(ApiError(status, "no"))
        codes[status] = failing.response["error"]["code"]
    assert codes == {429: "rate_limit_exceeded", 400: "invalid_prompt", 503: "server_error"}


def delta_texts(events):
    return [event["delta"] for event in events if event["type"].endswith(".delta")]


def test_log_probabilities_stand_with_their_text():
    token = TokenLogprob("4", -0.25, [52], (TokenLogprob("4", -0.25, [52]), TokenLogprob("5", -1.5, [53])))
    parts = [ItemStarted(0, "message"), ItemText(0, "4", (token,)), ItemDone(0, "4"), end()]
    events, builder = run(parts, with_logprobs=True)
    wanted = [
        {
            "token": "4",
            "logprob": -0.25,
            "bytes": [52],
            "top_logprobs": [
                {"token": "4", "logprob": -0.25, "bytes": [52]},
                {"token": "5", "logprob": -1.5, "bytes": [53]},
            ],
        }
    ]
    for event in events:
        if event["type"] in ("response.output_text.delta", "response.output_text.done"):
            assert event["logprobs"] == wanted
    assert builder.response["output"][0]["content"][0]["logprobs"] == wanted
    _, without = run(parts)
    assert without.response["output"][0]["content"][0]["logprobs"] == []


def test_sealed_reasoning_is_in_the_finished_item_only():
    events, builder = run(THOUGHT_AND_ANSWER, with_sealed=True)
    added, done = (
        next(event["item"] for event in events if event["type"] == f"response.output_item.{which}")
        for which in ("added", "done")
    )
    assert "encrypted_content" not in added
    assert done["encrypted_content"] == builder.response["output"][0]["encrypted_content"]


def test_a_tool_of_a_namespace_is_called_by_its_own_name():
    _, builder = run([*item("call", "{}", name="send"), end("tool_calls")])
    call = builder.response["output"][0]
    assert (call["name"], call["namespace"]) == ("send", "mail")


def test_a_function_that_is_not_known_is_a_call_all_the_same():
    _, builder = run([*item("call", "{}", name="invented"), end("tool_calls")])
    assert builder.response["output"][0]["name"] == "invented"


# --- Custom tools -------------------------------------------------------------------------------------------------------


@given(st.text(), st.integers(0, 2**32), st.booleans())
def test_the_input_of_a_custom_tool_arrives_as_it_was_meant(text, seed, is_ascii):
    """However its JSON is cut into pieces: within escapes, within pairs of surrogates."""
    arguments = json.dumps({"input": text}, ensure_ascii=is_ascii)
    generator, custom, given = random.Random(seed), CustomInput(), ""
    rest = arguments
    while rest:
        count = generator.randint(1, 4)
        given += custom.more(rest[:count])
        rest = rest[count:]
    assert given == text
    assert custom.whole(arguments) == text


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("ls -l", "ls -l"),  # no JSON at all
        ('{"command": "ls"}', '{"command": "ls"}'),  # another name
        ('{"input": "a\\qb"}', "a\\qb"),  # an escape that JSON lacks
        ('{"input": "half', "half"),
        ('{"input": "half\\u00', "half"),
        (' {\n "input" :\t"a" }', "a"),
        ('{"input": 7}', '{"input": 7}'),
        ('{"input": "a", "more": "b"}', "a"),
        ("", ""),
    ],
)
def test_arguments_of_another_form_become_the_input_as_far_as_they_go(arguments, wanted):
    for pieces in ([arguments], list(arguments)):
        events, builder = run([*item("call", *pieces, name="patch"), end("tool_calls")])
        assert builder.response["output"][0]["input"] == wanted
        assert "".join(delta_texts(events)) == wanted
        assert "custom_tool_call_input.done" in names(events)


# --- Any row of items ---------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=4)


@st.composite
def answers(draw):
    """The parts of any answer, and what its items are: kind, name, text."""
    parts, items = [], []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["reasoning", "message", "call", "custom"]))
        texts = draw(st.lists(TEXTS, max_size=4))
        name = {"call": "calculator", "custom": "patch"}.get(kind)
        if kind == "custom":
            arguments = wrapped("".join(texts))
            texts, items = [arguments[i : i + 3] for i in range(0, len(arguments), 3)], [*items, (kind, "".join(texts))]
        else:
            items.append((kind, "".join(texts)))
        parts += item("call" if kind == "custom" else kind, *texts, name=name)
    return [*parts, end(draw(st.sampled_from(["stop", "length", "tool_calls"])))], items


@settings(max_examples=60, deadline=None)
@given(answers(), st.integers(1, 30), st.booleans())
def test_any_stream_is_numbered_has_one_open_item_and_sums_up_to_the_response(answer, batch, with_sealed):
    parts, items = answer
    events, builder = run(parts, batch, with_sealed=with_sealed)
    open_item, sums, finished = None, {}, []
    for event in events[2:-1]:
        index, kind = event["output_index"], event["type"]
        assert index == len(finished)
        if kind == "response.output_item.added":
            assert open_item is None
            open_item, sums[index] = event["item"], ""
            continue
        assert open_item is not None
        if "item_id" in event:
            assert event["item_id"] == open_item["id"]
        if kind.endswith(".delta"):
            assert event["delta"]
            sums[index] += event["delta"]
        for key in ("text", "arguments", "input"):
            if kind.endswith(".done") and key in event:
                assert event[key] == sums[index]
        if kind == "response.output_item.done":
            assert {key: event["item"].get(key) for key in ("id", "type", "call_id")} == {
                key: open_item.get(key) for key in ("id", "type", "call_id")
            }
            finished.append(event["item"])
            open_item = None
    assert open_item is None
    output = events[-1]["response"]["output"]
    assert output == finished
    kinds = {"reasoning": "reasoning", "message": "message", "call": "function_call", "custom": "custom_tool_call"}
    assert [each["type"] for each in output] == [kinds[kind] for kind, _ in items]
    assert [sums[i] for i in range(len(items))] == [text for _, text in items]
    assert len({each["id"] for each in output}) == len(output)
    # The same parts, in pieces of another size: the same response, but for its names and times.
    _, again = run(parts, len(parts), with_sealed=with_sealed)
    assert nameless(again.response) == nameless(builder.response)


def nameless(response):
    """A response without what is new each time."""
    text = {key: value for key, value in response.items() if key not in ("id", "created_at", "completed_at")}
    text["output"] = [
        {key: value for key, value in each.items() if key not in ("id", "call_id")} for each in text["output"]
    ]
    return text
