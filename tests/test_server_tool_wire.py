"""Tools of this machine through every API: streamed and whole, with the client's own calls, and with the demo."""

import asyncio
import json
import logging
from functools import partial

import pytest
from httpx2 import Client
from server_app import LoadedModels
from server_fakes import (
    ASKED,
    FakeGenerations,
    FakeModels,
    FakePython,
    after,
    asked,
    calling,
    end,
    item,
)
from server_running import served

import openelm_mlx as om
from openelm_mlx.engine.calling import calling_of
from openelm_mlx.engine.prompt import encode_prompt
from openelm_mlx.server import own_tools
from openelm_mlx.server.answering import ModelGenerations
from openelm_mlx.server.app import Services, make_app
from openelm_mlx.server.own_tools import OwnTools
from openelm_mlx.server.tool_running import ToolGenerations
from openelm_mlx.server.wire import chat, messages, responses
from openelm_mlx.text.conversation import Message
from openelm_mlx.tools.toolbox import Toolbox


@pytest.fixture(scope="module")
def tools():
    with OwnTools("calculator") as found:
        yield found


# --- The demo ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tools):
    """A client of the demo with a calculator, its model, and what each completion took."""
    registry, usages = LoadedModels("demo-gpt-oss"), []
    inner = ModelGenerations(registry, lambda name, usage, seconds: usages.append(usage))
    routes = [*chat.routes(), *responses.routes(), *messages.routes()]
    app = make_app(Services(ToolGenerations(inner, registry, tools, 16), registry), routes)
    with served(app) as address, Client(base_url=address, timeout=300) as client:
        yield client, registry.models["demo-gpt-oss"], usages
    assert registry.models["demo-gpt-oss"].num_leases == 0
    inner.close()
    registry.close()


def test_the_demo_really_has_its_sum_computed(demo):
    client, _, usages = demo
    body = {"model": "demo-gpt-oss", "messages": [{"role": "user", "content": "What is 12 + 30?"}], "temperature": 0,
            "reasoning_effort": "low"}  # fmt: skip
    whole = client.post("/v1/chat/completions", json=body).json()
    message = whole["choices"][0]["message"]
    assert message["content"] == "12 + 30 = 42"
    assert message["reasoning"] == 'A sum: I call the tool.\n\n[calculator {"expression":"12 + 30"}]\n[= 42]'
    first, second = usages
    # Only what the tool said was computed: the prompt has the tokens that the model wrote.
    assert second.cached_tokens >= first.prompt_tokens + first.completion_tokens - 1
    assert whole["usage"]["prompt_tokens"] == first.prompt_tokens
    assert whole["usage"]["completion_tokens"] == first.completion_tokens + second.completion_tokens
    found = events(client, "/v1/chat/completions", body)
    deltas = [each["choices"][0]["delta"] for each in found]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == message["reasoning"]


def test_the_prompt_is_that_of_a_chat_with_the_same_tools(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("openelm_mlx.tools.python_tool.PythonTool", FakePython)
    _, model, _ = demo
    names = f"calculator,python,files={tmp_path}"
    with OwnTools(names) as tools, Toolbox(names) as toolbox:
        chatting = om.Chat(model.model, model.tokenizer, tools=toolbox.tools)
        added, ours = asyncio.run(tools.added_to(asked(), model.tokenizer))
    calling = calling_of((*added.tools, *added.built_in), None)
    found = encode_prompt(model.model, model.tokenizer, ASKED, calling=calling).tokens
    assert found == chatting.harmony_prompt([Message("user", ASKED[0]["content"])])
    assert ours == {"calculator", "python", "browser.search", "browser.open", "browser.find"}
    assert set(added.tool_formats) == set(chatting.tool_schemas)


# --- Over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def http(tools):
    """A client, and the fakes, of a server that has a calculator."""
    inner = FakeGenerations(after(calling("20+3")))
    generations = ToolGenerations(inner, FakeModels(), tools, 16)
    routes = [*chat.routes(), *responses.routes(), *messages.routes()]
    with served(make_app(Services(generations), routes)) as address, Client(base_url=address, timeout=60) as client:
        yield client, inner


def events(client, path, body):
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


RAN = '[calculator {"expression": "20+3"}]\n[= 23]'


def test_chat_completions_streamed_and_whole(http):
    client, _ = http
    body = {"model": "gpt-oss", "messages": ASKED}
    whole = client.post("/v1/chat/completions", json=body).json()
    message = whole["choices"][0]["message"]
    assert message["content"] == "2 + 2 = 4."
    assert message["reasoning"] == f"I need it.\n\n{RAN}\n\nLet me think."
    assert "tool_calls" not in message
    assert whole["usage"]["completion_tokens"] == 18
    found = events(client, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    deltas = [each["choices"][0]["delta"] for each in found if each["choices"]]
    for key in ("content", "reasoning"):
        assert "".join(delta.get(key) or "" for delta in deltas) == message[key]
    assert not any("tool_calls" in delta for delta in deltas)
    assert found[-1]["usage"] == whole["usage"]


def test_responses_streamed_and_whole(http):
    client, _ = http
    body = {"model": "gpt-oss", "input": "What is 20 + 3?"}
    whole = client.post("/v1/responses", json=body).json()
    last = events(client, "/v1/responses", body)[-1]

    def texts(response):
        return [(each["type"], [part["text"] for part in each["content"]]) for each in response["output"]]

    assert last["type"] == "response.completed"
    assert texts(last["response"]) == texts(whole)
    assert texts(whole) == [
        ("reasoning", ["I need it."]),
        ("reasoning", [RAN]),
        ("reasoning", ["Let me think."]),
        ("message", ["2 + 2 = 4."]),
    ]
    assert last["response"]["usage"] == whole["usage"]


@pytest.mark.parametrize("thinking", [{"type": "enabled", "budget_tokens": 1024}, None])
def test_messages_streamed_and_whole(http, thinking):
    client, _ = http
    body = {"model": "gpt-oss", "max_tokens": 2000, "messages": ASKED}
    body |= {} if thinking is None else {"thinking": thinking}
    whole = client.post("/v1/messages", json=body).json()
    found = events(client, "/v1/messages", body)
    shown = [each.get("thinking", each.get("text")) for each in whole["content"]]
    assert shown == ["2 + 2 = 4."] if thinking is None else ["I need it.", RAN, "Let me think.", "2 + 2 = 4."]
    streamed = ["" for _ in shown]
    for event in found:
        if event["type"] == "content_block_delta":
            streamed[event["index"]] += event["delta"].get("thinking", event["delta"].get("text", ""))
    assert streamed == shown
    assert whole["stop_reason"] == "end_turn"
    assert next(each for each in found if each["type"] == "message_delta")["usage"]["output_tokens"] == 18


OWN_CALL = [*item("reasoning", "Ours first."), *item("message", "First.", is_preamble=True), *calling("20+3")[3:]]
THEIR_CALL = [
    *item("reasoning", "Now theirs."),
    *item("message", "One moment.", is_preamble=True),
    *item("call", "{}", name="look_up"),
    end("tool_calls"),
]


def chat_completions_round_trip(client):
    function = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}
    body = {"model": "gpt-oss", "tools": [{"type": "function", "function": function}]}
    said = client.post("/v1/chat/completions", json={**body, "messages": ASKED}).json()["choices"][0]["message"]
    said = {key: said[key] for key in ("role", "content", "tool_calls")}  # as clients send it back
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "found"}
    return client.post("/v1/chat/completions", json={**body, "messages": [*ASKED, said, result]})


def responses_round_trip(client, by_name=True):
    function = {"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {}}}
    body = {"model": "gpt-oss", "tools": [function]}
    said = client.post("/v1/responses", json={**body, "input": "What?"}).json()
    result = {"type": "function_call_output", "call_id": said["output"][-1]["call_id"], "output": "found"}
    asked = {"role": "user", "content": "What?"}
    more = (
        {"previous_response_id": said["id"], "input": [result]}
        if by_name
        else {"input": [asked, *said["output"], result]}
    )
    return client.post("/v1/responses", json={**body, **more})


def messages_round_trip(client, **options):
    tool = {"name": "look_up", "input_schema": {"type": "object", "properties": {}}}
    body = {"model": "gpt-oss", "max_tokens": 2000, "tools": [tool], **options}
    said = client.post("/v1/messages", json={**body, "messages": ASKED}).json()["content"]
    result = {"type": "tool_result", "tool_use_id": said[-1]["id"], "content": "found"}
    turns = [*ASKED, {"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    return client.post("/v1/messages", json={**body, "messages": turns})


@pytest.mark.parametrize(
    "round_trip",
    [
        chat_completions_round_trip, responses_round_trip, partial(responses_round_trip, by_name=False), messages_round_trip,
        partial(messages_round_trip, thinking={"type": "enabled", "budget_tokens": 1024}),
    ],
    ids=["chat", "responses", "responses by items", "messages", "messages with thinking"],
)  # fmt: skip
def test_what_ours_said_before_a_call_of_the_clients_is_there_when_it_comes_back(http, monkeypatch, round_trip):
    client, inner = http
    monkeypatch.setattr(inner, "_script", after(OWN_CALL, THEIR_CALL))
    answer = round_trip(client)
    assert answer.status_code == 200, answer.text
    user, *between, theirs, found = inner.requests[-1].messages
    assert user["role"] == "user"
    assert between == [
        Message("assistant", "Ours first.", channel="analysis"),
        Message("assistant", "First.", channel="commentary"),
        Message("assistant", '{"expression": "20+3"}', channel="commentary", recipient="functions.calculator"),
        Message("tool", "23", "functions.calculator", "commentary", "assistant"),
        Message("assistant", "Now theirs.", channel="analysis"),
        Message("assistant", "One moment.", channel="commentary"),
    ]
    assert (theirs["reasoning"], theirs["content"]) == (None, None)
    assert [each["function"]["name"] for each in theirs["tool_calls"]] == ["look_up"]
    assert found["content"] == "found"
    assert "2 + 2 = 4." in answer.text


def test_neither_calls_nor_results_are_logged(http, caplog):
    client, _ = http
    with caplog.at_level(logging.DEBUG):
        client.post("/v1/chat/completions", json={"model": "gpt-oss", "messages": ASKED})
    assert "20+3" not in caplog.text
    assert "2 + 2" not in caplog.text


def test_without_tools_switched_on_nothing_runs(monkeypatch):
    """A request that names ours gets its call back, as for any other function."""
    monkeypatch.setattr(own_tools, "run_tool", lambda *_: pytest.fail("it ran"))
    inner = FakeGenerations(calling())
    function = {"name": "calculator", "parameters": {"type": "object", "properties": {}}}
    with (
        served(make_app(Services(inner), chat.routes())) as address,
        Client(base_url=address, timeout=60) as client,
    ):
        for tools in ([{"type": "function", "function": function}], []):
            body = {"model": "gpt-oss", "messages": ASKED, "tools": tools}
            choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
            assert choice["finish_reason"] == "tool_calls"
    assert [[tool.name for tool in each.tools] for each in inner.requests] == [["calculator"], []]
