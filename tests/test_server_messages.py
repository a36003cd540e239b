"""Anthropic's messages over HTTP with a script for a model: requests, errors, what Claude Code sends, the official client."""

import asyncio
import json

import pytest
from late_imports import late, late_validator
from pydantic import BaseModel
from server_fakes import CALL, THOUGHT_AND_ANSWER, FakeGenerations, end, item
from server_running import served
from starlette.testclient import TestClient

from openelm_mlx.server.app import Services, make_app
from openelm_mlx.server.call_reasoning import CallReasoning
from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.generation import NamedTool
from openelm_mlx.server.wire import messages

CALCULATOR = {
    "name": "calculator",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
}
USER = {"role": "user", "content": "Hi"}


class Server:
    """The application and its fake generations."""

    def __init__(self, script=THOUGHT_AND_ANSWER, batch=1):
        self.generations = FakeGenerations(script, batch)
        self.http = TestClient(make_app(Services(self.generations), messages.routes()), raise_server_exceptions=False)

    @property
    def asked(self):
        """What the last request asked of the model."""
        return self.generations.requests[-1]

    def post(self, path="/v1/messages", **body):
        return self.http.post(path, json={"model": "demo", "max_tokens": 100, "messages": [USER], **body})

    def create(self, **body):
        """The message, of Anthropic's own type."""
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        late("anthropic.types:Message").model_validate(answer.json())
        return answer.json()

    def refused(self, status=400, kind="invalid_request_error", **body):
        """The message of a refused request."""
        answer = self.post(**body)
        assert answer.status_code == status, answer.text
        assert sorted(answer.json()) == ["error", "request_id", "type"]
        assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", kind)
        return answer.json()["error"]["message"]

    def chat(self, *messages, **body):
        self.create(messages=list(messages), **body)
        return self.asked.messages


# --- What is asked of the model -----------------------------------------------------------------------------------------


def test_a_plain_question():
    server = Server()
    message = server.create(system="Be brief.", stop_sequences=["END"], temperature=0.5, top_p=0.9, top_k=5)
    asked = server.asked
    assert asked.messages == [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (asked.max_tokens, asked.stop, asked.reasoning_effort) == (100, ("END",), None)
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k) == (0.5, 0.9, 5)
    # Nobody asked for thinking, and many programs take the first block.
    assert message["content"] == [{"type": "text", "text": "2 + 2 = 4."}]
    assert message["model"] == "demo"


def test_what_claude_code_sends():
    """Blocks with cache_control, a system prompt of several, accounting, server tools, metadata, betas in the address."""
    server = Server(CALL)
    cached = {"cache_control": {"type": "ephemeral"}}
    answer = server.http.post(
        "/v1/messages?beta=true",
        headers={"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219", "x-api-key": "none"},
        json={
            "model": "demo",
            "max_tokens": 32000,
            "stream": False,
            "temperature": 1,
            "metadata": {"user_id": "user_x_account__session_y"},
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=12345;"},
                {"type": "text", "text": "You are a coding agent.", **cached},
                {"type": "text", "text": "Long rules. " * 2000, **cached},
            ],
            "thinking": {"type": "enabled", "budget_tokens": 31999},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "<system-reminder>Be careful.</system-reminder>"},
                        {"type": "text", "text": "Add.", **cached},
                    ],
                }
            ],
            "tools": [
                {**CALCULATOR, **cached, "eager_input_streaming": True},
                {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
                {"type": "bash_20250124", "name": "bash"},
            ],
        },
    )
    assert answer.status_code == 200, answer.text
    assert [block["type"] for block in answer.json()["content"]] == ["thinking", "text", "tool_use"]
    asked = server.asked
    assert [tool.name for tool in asked.tools] == ["calculator"]
    assert asked.lenient_tools == {"calculator"}
    assert asked.reasoning_effort == "high"
    instructions, question = asked.messages
    assert instructions["content"].startswith("You are a coding agent.\n\nLong rules.")
    assert question["content"] == "<system-reminder>Be careful.</system-reminder>\n\nAdd."


def test_nulls_are_not_given():
    server = Server()
    server.create()
    asked = server.asked
    names = [
        "system",
        "tools",
        "tool_choice",
        "thinking",
        "output_config",
        "stop_sequences",
        "stream",
        "temperature",
        "top_k",
    ]
    server.create(**dict.fromkeys(names), service_tier="auto", nonsense=1)
    assert server.asked == asked


@pytest.mark.parametrize(
    ("body", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "disabled"}, "tools": [CALCULATOR]}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 4000}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10000}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 31999}}, "high"),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low"),
        ({"output_config": {"effort": "max"}}, "high"),
    ],
)
def test_thinking_is_an_effort(body, effort):
    server = Server()
    message = server.create(**body)
    assert server.asked.reasoning_effort == effort
    shows = body.get("thinking", {}).get("type") in ("enabled", "adaptive")
    assert [block["type"] for block in message["content"]] == ["thinking", "text"][not shows :]


@pytest.mark.parametrize("where", ["output_config", "output_format"])
def test_the_format_of_an_answer(where):
    server = Server()
    form = {"type": "json_schema", "schema": {"type": "object"}}
    server.create(**{where: {"format": form} if where == "output_config" else form})
    assert server.asked.answer_schema.schema == {"type": "object"}


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "calculator"}, NamedTool("calculator")),
        ({"type": "none"}, "none"),
    ],
)
@pytest.mark.parametrize("is_parallel", [True, False])
def test_every_tool_choice(choice, wanted, is_parallel):
    server = Server()
    server.create(tools=[CALCULATOR], tool_choice={**choice, "disable_parallel_tool_use": not is_parallel})
    assert (server.asked.tool_choice, server.asked.parallel_tool_calls) == (wanted, is_parallel)


def test_a_strict_tool_is_enforced():
    server = Server()
    server.create(tools=[{**CALCULATOR, "strict": True, "type": "custom"}])
    assert server.asked.lenient_tools == frozenset()


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"model": None}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "image"}]}]}, "messages[1].content[0]"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": "JVB"}}]}
                ]
            },
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t"}]}, USER]},
            "messages[0].content[0].name",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "{"}]}, "last message"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "a b"),
        ({"tools": [{"name": "f", "input_schema": {"type": 5}}]}, "'f'"),
        ({"tools": [{"name": "f" * 129, "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [CALCULATOR, CALCULATOR]}, "calculator"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "'f'"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"stop_sequences": ["END", ""]}, "stop_sequences"),
        ({"stop_sequences": ["END"] * 65}, "stop_sequences"),
    ],
)
def test_a_wrong_field_is_a_400_in_anthropics_words(body, place):
    server = Server()
    message = server.refused(**body)
    assert place in message
    assert message.endswith(".")
    assert not server.generations.requests


def test_errors_of_the_model_have_anthropics_types():
    assert Server([ApiError(404, "No model 'x'.", code="model_not_found")]).refused(404, "not_found_error")
    assert Server([ApiError(503, "Full.", "server_error", retry_after=5)]).refused(503, "overloaded_error", stream=True)
    answer = Server().http.post("/v1/messages", content=b"{")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


# --- Content ------------------------------------------------------------------------------------------------------------


def test_a_history_of_all_kinds_of_blocks():
    chat = Server().chat(
        {"role": "user", "content": "Sum it."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "gAAAA"},
                {"type": "text", "text": "One "},
                {"type": "text", "text": "moment."},
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                {"type": "tool_use", "id": "t1", "name": "calculator", "input": {"expression": "2+2"}},
                {"type": "tool_use", "id": "t2", "name": "calculator", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "4"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "empty"}, {"type": "image", "source": {}}],
                },
                {"type": "text", "text": "Go on."},
            ],
        },
        {"role": "assistant", "content": "Four."},
        {"role": "system", "content": "Now in French."},
        {"role": "user", "content": "Thanks"},
    )
    calls = [
        {"id": "t1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2+2"}'}},
        {"id": "t2", "type": "function", "function": {"name": "calculator", "arguments": "{}"}},
    ]
    said = {"content": "One \n\nmoment.", "phase": "commentary"}
    assert chat == [
        {"role": "user", "content": "Sum it."},
        {"role": "assistant", "reasoning": "Hm.", **said, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "4"},
        {
            "role": "tool",
            "tool_call_id": "t2",
            "content": "Error: empty\n\n[image: left out, since this model reads text only]",
        },
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "Four."},
        {"role": "developer", "content": "Now in French."},
        {"role": "user", "content": "Thanks"},
    ]


def test_documents_and_search_results_of_text_are_read():
    document = {
        "type": "document",
        "title": "A",
        "source": {"type": "text", "media_type": "text/plain", "data": "One."},
    }
    blocks = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "Two."}]}}
    found = {
        "type": "search_result",
        "title": "B",
        "source": "http://b",
        "content": [{"type": "text", "text": "Three."}],
    }
    content = [document, blocks, found, {"type": "text", "text": "Compare."}]
    text = "A\n\nOne.\n\nTwo.\n\nB\n\nhttp://b\n\nThree.\n\nCompare."
    assert Server().chat({"role": "user", "content": content}) == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "thinking",
    [{"type": "adaptive"}, {"type": "adaptive", "display": "omitted"}, None],
    ids=["shown", "sealed", "hidden"],
)
def test_the_thinking_before_a_call_comes_back_however_it_was_shown(thinking):
    """gpt-oss needs it until the turn has its answer."""
    server = Server(CALL)
    first = server.create(tools=[CALCULATOR], thinking=thinking)
    call = first["content"][-1]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": "4"}]}
    assistant = server.chat(USER, {"role": "assistant", "content": first["content"]}, result, tools=[CALCULATOR])[1]
    assert assistant["reasoning"] == "I need the tool."
    assert assistant["content"] == "One moment."
    assert assistant["tool_calls"][0]["function"]["arguments"] == '{"expression": "2+2"}'


def test_hidden_thinking_is_kept_within_a_limit():
    known = CallReasoning(most_bytes=1000)
    for number in range(100):
        known.keep(f"toolu_{number}", "x" * 90)
    assert known.num_bytes <= 1000
    assert 5 <= len(known) <= 10
    assert known.before(["toolu_99"])
    assert not known.before(["toolu_0"])


# --- Streams ------------------------------------------------------------------------------------------------------------


def stream(server, **body):
    """The events of a stream, each of Anthropic's type and with its own name."""
    answer = server.post(stream=True, **body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = []
    for block in answer.text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("ping", "error"):
            late_validator("anthropic.types:RawMessageStreamEvent").validate_python(event)
        found.append(event)
    return found


def test_a_stream_that_waits_pings():
    events = stream(Server([0.0, *THOUGHT_AND_ANSWER]))
    assert [event["type"] for event in events[:3]] == ["message_start", "ping", "content_block_start"]


def test_a_failure_in_a_stream_is_an_error_event():
    server = Server([*THOUGHT_AND_ANSWER[:3], ApiError(503, "The engine has ended.", "server_error")])
    last = stream(server)[-1]
    assert last["type"] == "error"
    assert last["error"] == {"type": "overloaded_error", "message": "The engine has ended."}
    assert server.generations.generations[-1].is_closed


def test_counting_tokens():
    server = Server()
    answer = server.post("/v1/messages/count_tokens?beta=true", tools=[CALCULATOR], system="Be brief.")
    assert answer.json() == {"input_tokens": 12}
    assert [tool.name for tool in server.asked.tools] == ["calculator"]


# --- The official client ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address():
    def script(request):
        if request.tools and request.messages[-1]["role"] != "tool":
            return CALL
        if request.answer_schema is not None:
            return [*item("reasoning", "Hm."), *item("message", '{"sum":', " 4}"), end()]
        return THOUGHT_AND_ANSWER

    with served(make_app(Services(FakeGenerations(script)), messages.routes())) as url:
        yield url


class Sum(BaseModel):
    sum: int


def test_anthropics_client_over_a_socket(address):
    client = late("anthropic:Anthropic")(base_url=address, api_key="none", max_retries=0)
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    first = client.messages.create(model="demo", max_tokens=100, messages=chat, tools=[CALCULATOR])
    assert first.stop_reason == "tool_use"
    call = first.content[-1]
    assert call.input == {"expression": "2+2"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "4"}
    chat += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(model="demo", max_tokens=100, messages=chat, tools=[CALCULATOR])
    assert second.content[0].text == "2 + 2 = 4."
    assert (second.usage.input_tokens, second.usage.cache_read_input_tokens) == (8, 4)
    assert client.messages.count_tokens(model="demo", messages=chat).input_tokens == 12
    assert client.beta.messages.create(model="demo", max_tokens=9, messages=chat, betas=["x"]).type == "message"
    parsed = client.messages.parse(model="demo", max_tokens=100, messages=chat, output_format=Sum)
    assert parsed.parsed_output == Sum(sum=4)
    with pytest.raises(late("anthropic:APIStatusError")) as failure:
        client.messages.create(model="demo", max_tokens=0, messages=chat)
    assert failure.value.type == "invalid_request_error"


def test_anthropics_stream_helper(address):
    client = late("anthropic:Anthropic")(base_url=address, api_key="none", max_retries=0)
    options = {"model": "demo", "max_tokens": 100, "thinking": {"type": "adaptive"}}
    with client.messages.stream(messages=[USER], **options) as stream:
        assert "".join(stream.text_stream) == "2 + 2 = 4."
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0].thinking == "Let me think."
    assert (final.usage.input_tokens, final.usage.output_tokens, final.stop_reason) == (8, 9, "end_turn")
    with client.messages.stream(messages=[USER], tools=[CALCULATOR], **options) as stream:
        kinds = [event.type for event in stream]
        call = stream.get_final_message().content[-1]
    assert {"thinking", "signature", "text", "input_json"} <= set(kinds)
    assert call.input == {"expression": "2+2"}


def test_anthropics_async_client(address):
    async def run():
        async with late("anthropic:AsyncAnthropic")(base_url=address, api_key="none", max_retries=0) as client:
            stream = await client.messages.create(model="demo", max_tokens=100, messages=[USER], stream=True)
            return [event.type async for event in stream]

    assert asyncio.run(run())[-1] == "message_stop"
