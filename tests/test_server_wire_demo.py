"""Responses and Anthropic's messages with demo-gpt-oss, which really calls its calculator, through the official clients."""

import json
import time

import pytest
from late_imports import late
from pydantic import BaseModel
from server_app import served_demos

from openelm_mlx.server.responses_store import ResponseStore
from openelm_mlx.server.wire import messages, responses

MODEL = "demo-gpt-oss"
QUESTION = "What is 123 + 456?"
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
DESCRIPTION = "Computes an expression."
FUNCTION = {
    "type": "function",
    "name": "calculator",
    "description": DESCRIPTION,
    "parameters": PARAMETERS,
    "strict": True,
}
TOOL = {"name": "calculator", "description": DESCRIPTION, "input_schema": PARAMETERS}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def demos():
    store = ResponseStore()
    routes = [*responses.routes(store), *messages.routes()]
    with served_demos(routes, MODEL, "demo-openelm") as (address, registry):
        yield address, registry, store


@pytest.fixture
def openai(demos):
    with late("openai:OpenAI")(base_url=f"{demos[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic(demos):
    with late("anthropic:Anthropic")(base_url=demos[0], api_key="none", max_retries=0) as client:
        yield client


def computed(arguments):
    left, right = arguments["expression"].split("+")
    return str(int(left) + int(right))


# --- Responses ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("way", ["previous_response_id", "items", "references", "stateless"])
def test_a_tool_is_called_and_its_result_answered(openai, way):
    """All ways in which clients bring the first turn back."""
    options = {"model": MODEL, "tools": [FUNCTION], **GREEDY}
    if way == "stateless":
        options |= {"store": False, "include": ["reasoning.encrypted_content"]}
    first = openai.responses.create(input=QUESTION, **options)
    assert [each.type for each in first.output] == ["reasoning", "function_call"]
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": computed(json.loads(call.arguments))}
    said = [each.to_dict() for each in first.output]
    if way == "stateless":
        said[0].pop("content")
    if way == "references":
        said = [{"type": "item_reference", "id": each["id"]} for each in said]
    asked = [{"role": "user", "content": QUESTION}, *said]
    if way == "previous_response_id":
        second = openai.responses.create(input=[result], previous_response_id=first.id, **options)
    else:
        second = openai.responses.create(input=[*asked, result], **options)
    assert "579" in second.output_text
    # The prompt of the second turn begins as the first one did, and the reasoning before the call is a part of it.
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens_details.reasoning_tokens
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens // 2


@pytest.mark.slow
def test_streamed_is_whole(openai):
    for options in ({"input": "What is a boat?"}, {"input": QUESTION, "tools": [FUNCTION]}):
        options = {"model": MODEL, **GREEDY, **options}
        whole = openai.responses.create(**options)
        with openai.responses.stream(**options) as stream:
            seen = list(stream)
            final = stream.get_final_response()
        assert nameless(final) == nameless(whole)
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        deltas = [
            event.delta for event in seen if event.type.endswith("text.delta") or event.type.endswith("arguments.delta")
        ]
        assert "".join(deltas) == "".join(texts(whole))


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("seed", range(6))
def test_streamed_is_whole_where_the_model_writes_nonsense(openai, anthropic, seed):
    """Drawn hot, it writes headers that do not exist, calls nobody, and breaks off."""
    asked = {"temperature": 2.0, "seed": seed}
    options = {"model": MODEL, "input": QUESTION, "tools": [FUNCTION], "max_output_tokens": 24}
    whole = openai.responses.create(**options, extra_body=asked)
    with openai.responses.create(**options, extra_body=asked, stream=True) as stream:
        seen = list(stream)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert nameless(seen[-1].response) == nameless(whole)
    done = [event.item.to_dict() for event in seen if event.type == "response.output_item.done"]
    assert done == [each.to_dict() for each in seen[-1].response.output]
    # The same draws as a message: one block for each item, and it can all be sent back.
    chat = [{"role": "user", "content": QUESTION}]
    options = {"model": MODEL, "tools": [TOOL], "max_tokens": 24, "thinking": {"type": "adaptive"}}
    asked["temperature"] = 1.0
    message = anthropic.messages.create(messages=chat, **options, extra_body=asked)
    with anthropic.messages.stream(messages=chat, **options, extra_body=asked) as stream:
        final = stream.get_final_message()
    assert bare(final) == bare(message)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "4"}
        for block in message.content
        if block.type == "tool_use"
    ]
    answer = {"role": "user", "content": [*results, {"type": "text", "text": "Go on."}]}
    chat += [{"role": "assistant", "content": message.content}, answer]
    assert anthropic.messages.count_tokens(model=MODEL, messages=chat, tools=[TOOL]).input_tokens > 40
    said = [{"role": "user", "content": QUESTION}, *(each.to_dict() for each in whole.output)]
    outputs = [
        {"type": "function_call_output", "call_id": each.call_id, "output": "4"}
        for each in whole.output
        if each.type == "function_call"
    ]
    counted = openai.responses.input_tokens.count(model=MODEL, input=[*said, *outputs], tools=[FUNCTION])
    assert counted.input_tokens > 40


def bare(message):
    blocks = [block.to_dict(exclude_none=True) for block in message.content]
    return [{key: value for key, value in block.items() if key != "id"} for block in blocks], message.stop_reason


def texts(response):
    return [each.arguments if each.type == "function_call" else each.content[0].text for each in response.output]


def nameless(response):
    kept = response.to_dict()
    output = [
        {key: value for key, value in each.items() if key not in ("id", "call_id", "parsed_arguments")}
        for each in kept["output"]
    ]
    for each in output:
        for part in each.get("content", ()):
            part.pop("parsed", None)
    return output, {key: kept["usage"][key] for key in ("input_tokens", "output_tokens", "total_tokens")}


class Meaning(BaseModel):
    word: str
    meaning: str


@pytest.mark.slow
def test_an_answer_in_a_schema(openai):
    parsed = openai.responses.parse(model=MODEL, input="What is a boat?", text_format=Meaning, **GREEDY)
    assert isinstance(parsed.output_parsed, Meaning)
    assert parsed.status == "completed"


def test_a_limit_leaves_the_response_incomplete(openai):
    response = openai.responses.create(model=MODEL, input="What is a boat?", max_output_tokens=5, **GREEDY)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[-1].status == "incomplete"
    assert response.usage.output_tokens == 5


@pytest.mark.slow
def test_efforts_and_none(openai):
    counts = {}
    for effort in ("none", "low", "high"):
        response = openai.responses.create(
            model=MODEL, input="What is a boat?", reasoning={"effort": effort}, max_output_tokens=100, **GREEDY
        )
        counts[effort] = response.usage.output_tokens_details.reasoning_tokens
        assert response.output_text
    assert counts["none"] == 0 < counts["low"] < counts["high"]


@pytest.mark.slow(first=1)
@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ("required", "function_call"),
        ({"type": "function", "name": "calculator"}, "function_call"),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "calculator"}]},
            "function_call",
        ),
        ("none", "message"),
    ],
)
def test_a_call_that_has_to_be_or_must_not(openai, choice, kind):
    response = openai.responses.create(
        model=MODEL, input="What is a boat?", tools=[FUNCTION], tool_choice=choice, max_output_tokens=60, **GREEDY
    )
    assert response.output[-1].type == kind


@pytest.mark.slow
def test_a_custom_tool_gets_text(openai):
    tool = {"type": "custom", "name": "note", "description": "Keeps a note."}
    options = {"model": MODEL, "tools": [tool], **GREEDY}
    response = openai.responses.create(
        input="What is a boat?", tool_choice={"type": "custom", "name": "note"}, max_output_tokens=60, **options
    )
    call = response.output[-1]
    assert (call.type, call.name) == ("custom_tool_call", "note")
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Kept."}
    assert openai.responses.create(input=[result], previous_response_id=response.id, **options).output_text


def test_log_probabilities(openai):
    response = openai.responses.create(
        model=MODEL,
        input="What is a boat?",
        top_logprobs=2,
        include=["message.output_text.logprobs"],
        reasoning={"effort": "low"},
        **GREEDY,
    )
    part = response.output[-1].content[0]
    assert "".join(bytes(each.bytes).decode() for each in part.logprobs) == part.text
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in part.logprobs)


def test_counting_is_what_is_used(openai, anthropic):
    options = {"model": MODEL, "input": QUESTION, "tools": [FUNCTION], "instructions": "Be brief."}
    counted = openai.responses.input_tokens.count(**options).input_tokens
    assert openai.responses.create(max_output_tokens=1, **options).usage.input_tokens == counted
    chat = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "tools": [TOOL], "system": "Be brief."}
    counted = anthropic.messages.count_tokens(**chat).input_tokens
    usage = anthropic.messages.create(max_tokens=1, **chat).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted


def test_a_prompt_that_is_too_long_is_a_400(openai, anthropic):
    words = "word " * 132_000
    with pytest.raises(late("openai:BadRequestError")) as failure:
        openai.responses.create(model=MODEL, input=words)
    assert failure.value.code == "context_length_exceeded"
    assert failure.value.param == "input"


def test_truncation_leaves_out_the_oldest_turns(openai, demos, monkeypatch):
    model = demos[1].models[MODEL].model
    monkeypatch.setattr(model, "context_length", 256)
    chat = [{"role": "user", "content": f"What is {number} + {number}?"} for number in range(40)]
    options = {"model": MODEL, "input": chat, "max_output_tokens": 20, **GREEDY}
    with pytest.raises(late("openai:BadRequestError")) as failure:
        openai.responses.create(**options)
    assert failure.value.code == "context_length_exceeded"
    response = openai.responses.create(truncation="auto", **options)
    assert 150 < response.usage.input_tokens <= 236
    assert openai.responses.input_tokens.count(model=MODEL, input=chat, truncation="auto").input_tokens <= 192


def test_openelm_answers_and_says_what_it_cannot_do(openai, anthropic):
    options = {"model": "demo-openelm", "input": QUESTION, "instructions": "Be brief.", "max_output_tokens": 8}
    first = openai.responses.create(**options)
    assert [each.type for each in first.output] == ["message"]
    assert first.usage.output_tokens_details.reasoning_tokens == 0
    second = openai.responses.create(**options, previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens
    for more, param in (({"tools": [FUNCTION]}, "tools"), ({"reasoning": {"effort": "high"}}, "reasoning.effort")):
        with pytest.raises(late("openai:BadRequestError")) as failure:
            openai.responses.create(**options, **more)
        assert failure.value.param == param
    chat = {"model": "demo-openelm", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}
    for thinking in ({"type": "adaptive"}, {"type": "disabled"}):
        message = anthropic.messages.create(system="Be brief.", thinking=thinking, **chat)
        assert [block.type for block in message.content] == ["text"]


# --- Messages -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow(first=1)
@pytest.mark.parametrize(
    "thinking",
    [{"type": "adaptive"}, {"type": "adaptive", "display": "omitted"}, None],
    ids=["shown", "sealed", "hidden"],
)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_messages_call_a_tool_and_answer_its_result(anthropic, thinking, is_streamed):
    options = {"model": MODEL, "max_tokens": 300, "tools": [TOOL], "extra_body": GREEDY}
    if thinking is not None:
        options["thinking"] = thinking

    def ask(chat):
        if not is_streamed:
            return anthropic.messages.create(messages=chat, **options)
        with anthropic.messages.stream(messages=chat, **options) as stream:
            return stream.get_final_message()

    chat = [{"role": "user", "content": QUESTION}]
    first = ask(chat)
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["thinking", "tool_use"][thinking is None :]
    call = first.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": computed(call.input)}
    second = ask([*chat, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}])
    assert second.stop_reason == "end_turn"
    assert "579" in second.content[-1].text
    assert second.usage.cache_read_input_tokens > 0
    thought = first.usage.output_tokens_details.thinking_tokens
    whole = second.usage.input_tokens + second.usage.cache_read_input_tokens
    assert whole > first.usage.input_tokens + first.usage.cache_read_input_tokens + thought


def test_messages_streamed_is_whole(anthropic):
    options = {"model": MODEL, "max_tokens": 300, "thinking": {"type": "adaptive"}, "extra_body": GREEDY}
    chat = [{"role": "user", "content": "What is a boat?"}]
    whole = anthropic.messages.create(messages=chat, **options)
    with anthropic.messages.stream(messages=chat, **options) as stream:
        final = stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text"]
    for key in ("content", "stop_reason"):
        assert getattr(final, key) == getattr(whole, key) or [b.to_dict() for b in final.content] == [
            b.to_dict() for b in whole.content
        ]


@pytest.mark.slow
def test_messages_stop_at_a_string_and_at_a_limit(anthropic):
    options = {"model": MODEL, "messages": [{"role": "user", "content": "What is a boat?"}], "extra_body": GREEDY}
    whole = anthropic.messages.create(max_tokens=300, **options).content[0].text
    word = whole.split()[3]
    stopped = anthropic.messages.create(max_tokens=300, stop_sequences=[word], **options)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert stopped.content[0].text == whole[: whole.index(word)]
    cut = anthropic.messages.create(max_tokens=5, **options)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)


@pytest.mark.slow
def test_messages_in_a_schema_and_without_thinking(anthropic):
    chat = [{"role": "user", "content": "What is a boat?"}]
    parsed = anthropic.messages.parse(
        model=MODEL, max_tokens=300, messages=chat, output_format=Meaning, extra_body=GREEDY
    )
    assert isinstance(parsed.parsed_output, Meaning)
    plain = anthropic.messages.create(
        model=MODEL, max_tokens=300, messages=chat, thinking={"type": "disabled"}, extra_body=GREEDY
    )
    assert plain.usage.output_tokens_details.thinking_tokens == 0
    assert plain.content[0].text


@pytest.mark.parametrize(
    ("choice", "kind"),
    [({"type": "any"}, "tool_use"), ({"type": "tool", "name": "calculator"}, "tool_use"), ({"type": "none"}, "text")],
)
def test_messages_every_tool_choice(anthropic, choice, kind):
    chat = [{"role": "user", "content": "What is a boat?"}]
    answer = anthropic.messages.create(
        model=MODEL, max_tokens=60, messages=chat, tools=[TOOL], tool_choice=choice, extra_body=GREEDY
    )
    assert answer.content[-1].type == kind


# --- Nothing is left behind ---------------------------------------------------------------------------------------------


def test_nothing_runs_on_and_no_model_stays_leased(demos, openai, anthropic):
    _, registry, _ = demos
    with openai.responses.create(model=MODEL, input="What is a boat?", stream=True) as stream:
        next(iter(stream))
    with anthropic.messages.create(
        model=MODEL, max_tokens=300, messages=[{"role": "user", "content": "What is a boat?"}], stream=True
    ) as stream:
        next(iter(stream))
    openai.responses.create(model=MODEL, input="What is a cat?")  # behind which the others have been noticed
    model = registry.models[MODEL]
    for _ in range(6000):  # far longer than it takes
        if not model.num_leases and not model.engine.num_running:
            break
        time.sleep(0.01)
    assert model.num_leases == model.engine.num_running == model.engine.num_waiting == 0
