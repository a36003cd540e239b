"""OpenAI's Responses over HTTP, with a script instead of a model: requests, the store, errors, and the official client."""

import asyncio
import json

import pytest
from late_imports import late, late_validator
from pydantic import BaseModel
from server_fakes import CALL, THOUGHT_AND_ANSWER, FakeGenerations, end, item
from server_running import served
from starlette.testclient import TestClient

from openelm_mlx.server.app import Services, make_app
from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.generation import NamedTool
from openelm_mlx.server.responses_store import ResponseStore
from openelm_mlx.server.wire import responses

CALCULATOR = {
    "type": "function",
    "name": "calculator",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    "strict": True,
}
ANSWER = [*item("message", "Yes."), end()]


class Server:
    """The application, its fake generations, and its store."""

    def __init__(self, script=THOUGHT_AND_ANSWER, batch=1, **limits):
        self.generations = FakeGenerations(script, batch)
        self.store = ResponseStore(**limits)
        self.app = make_app(Services(self.generations), responses.routes(self.store))
        self.http = TestClient(self.app, raise_server_exceptions=False)

    @property
    def asked(self):
        """What the last request asked of the model."""
        return self.generations.requests[-1]

    def create(self, **body):
        """The response, of OpenAI's own type."""
        answer = self.http.post("/v1/responses", json={"model": "demo", "input": "Hi", **body})
        assert answer.status_code == 200, answer.text
        late("openai.types.responses:Response").model_validate(answer.json())
        return answer.json()

    def stream(self, **body):
        answer = self.http.post("/v1/responses", json={"model": "demo", "input": "Hi", "stream": True, **body})
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        return events(answer.text)

    def refused(self, status=400, **body):
        """The error of a refused request: its param and its message."""
        answer = self.http.post("/v1/responses", json={"model": "demo", "input": "Hi", **body})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        return error["param"], error["message"]

    def messages(self, given, **body):
        self.create(input=given, **body)
        return self.asked.messages


def events(text):
    """The events of a stream, each checked against OpenAI's types and its own name."""
    found = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        late_validator("openai.types.responses:ResponseStreamEvent").validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


# --- What is asked of the model -----------------------------------------------------------------------------------------


def test_a_plain_question():
    server = Server()
    response = server.create(instructions="Be brief.")
    assert server.asked.messages == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert server.asked.max_tokens is None
    assert server.asked.sampling.temperature == 1.0
    assert response["instructions"] == "Be brief."
    assert (response["status"], response["store"], response["truncation"]) == ("completed", True, "disabled")


def test_every_field_reaches_the_model_and_is_repeated():
    server = Server()
    response = server.create(
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        top_k=5,
        stop="END",
        logit_bias={"11": -100},
        presence_penalty=0.5,
        reasoning={"effort": "high", "summary": "auto"},
        parallel_tool_calls=False,
        metadata={"a": "b"},
        top_logprobs=2,
        user="me",
        prompt_cache_key="k",
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
    )
    asked, sampling = server.asked, server.asked.sampling
    assert (asked.max_tokens, asked.stop, asked.logprobs, asked.reasoning_effort) == (50, ("END",), 2, "high")
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k) == (0.5, 0.9, 7, 5)
    assert (sampling.logit_bias, sampling.presence_penalty) == ({11: -100}, 0.5)
    assert asked.answer_schema.schema == {"type": "object"}
    assert not asked.parallel_tool_calls
    repeated = {
        "max_output_tokens": 50, "temperature": 0.5, "top_p": 0.9, "parallel_tool_calls": False, "metadata": {"a": "b"},
        "top_logprobs": 2, "user": "me", "prompt_cache_key": "k", "reasoning": {"effort": "high", "summary": "auto"},
    }  # fmt: skip
    assert {key: response[key] for key in repeated} == repeated
    assert response["text"]["format"]["schema"] == {"type": "object"}


def test_nulls_and_unknown_fields_are_not_given():
    names = [
        "instructions", "previous_response_id", "tools", "tool_choice", "temperature", "top_p", "max_output_tokens", "text",
        "reasoning", "metadata", "include", "store", "stream", "background", "truncation", "user", "conversation", "prompt",
        "stream_options", "service_tier", "prompt_cache_retention", "top_logprobs", "parallel_tool_calls",
    ]  # fmt: skip
    server = Server()
    plain = server.create()
    asked = server.asked
    nulls = server.create(**dict.fromkeys(names), client_metadata={"x": 1}, nonsense=[1])
    assert server.asked == asked
    assert {key: nulls[key] for key in plain if key not in ("id", "output", "created_at", "completed_at")} == {
        key: plain[key] for key in plain if key not in ("id", "output", "created_at", "completed_at")
    }


@pytest.mark.parametrize(
    ("effort", "wanted"),
    [("none", "none"), ("minimal", "low"), ("low", "low"), ("medium", "medium"), ("xhigh", "high"), ("max", "high")],
)
def test_all_of_openais_efforts_are_taken(effort, wanted):
    server = Server()
    assert server.create(reasoning={"effort": effort})["reasoning"]["effort"] == effort
    assert server.asked.reasoning_effort == wanted


@pytest.mark.parametrize(("kind", "wanted"), [("text", None), ("json_object", {"type": "object"})])
def test_a_format_without_a_schema(kind, wanted):
    server = Server()
    response = server.create(text={"format": {"type": kind}, "verbosity": "low"})
    assert response["text"] == {"format": {"type": kind}, "verbosity": "low"}
    schema = server.asked.answer_schema
    assert (None if schema is None else schema.schema) == wanted


def test_top_p_of_zero_is_the_likeliest_token_alone():
    server = Server()
    server.create(top_p=0)
    assert (server.asked.sampling.top_p, server.asked.sampling.top_k) == (1.0, 1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": 7}, "input"),
        ({"input": [7]}, "input[0]"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [{"type": "massage", "role": "user", "content": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": ["x"]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_image"}]}]},
            "input[0].content[1]",
        ),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "n", "input": 5}]}, "input[0].input"),
        ({"input": [{"type": "reasoning", "content": [{"type": "image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "additional_tools", "tools": 5}]}, "input[0].tools"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"truncation": "some"}, "truncation"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"seed": "x"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["END", ""]}, "stop"),
        ({"stop": ["END"] * 65}, "stop"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": 5}}]}, "tools[0].parameters"),
        ({"tools": [{"type": "function", "name": "f" * 129}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "tools"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
        ({"tools": [{"type": "custom", "name": "f", "format": {"type": "grammar"}}]}, "tools[0].format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(body, param):
    server = Server()
    found, message = server.refused(**body)
    assert found == param
    assert message.endswith(".")
    assert not server.generations.requests


@pytest.mark.parametrize(
    ("chats", "ours"),
    [
        ("messages", "input"),
        ("reasoning_effort", "reasoning.effort"),
        ("response_format", "text.format"),
        ("tools", "tools"),
    ],
)
def test_what_the_model_cannot_do_is_told_in_the_words_of_responses(chats, ours):
    error = ApiError(400, "It cannot be.", param=chats)
    assert Server([error]).refused() == (ours, "It cannot be.")


def test_truncation_lets_old_turns_be_left_out():
    server = Server()
    assert server.create(truncation="auto")["truncation"] == "auto"
    assert server.asked.may_forget
    server.create(truncation="disabled")
    assert not server.asked.may_forget


# --- Items --------------------------------------------------------------------------------------------------------------


def test_a_history_of_all_kinds_of_items():
    server = Server()
    given = [
        {"type": "message", "role": "system", "content": "Rules."},
        {"role": "user", "content": [{"type": "input_text", "text": "Sum "}, {"type": "text", "text": "it."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One moment."}]},
        {"type": "function_call", "call_id": "c1", "name": "calculator", "arguments": '{"expression":"2+2"}'},
        {"type": "function_call", "call_id": "c2", "name": "calculator", "arguments": {"expression": "3"}},
        {"type": "function_call_output", "call_id": "c1", "output": "4"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Thanks"},
    ]
    call = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression":"2+2"}'}}
    assert server.messages(given, tools=[CALCULATOR]) == [
        {"role": "developer", "content": "Rules."},
        {"role": "user", "content": "Sum it."},
        {
            "role": "assistant",
            "reasoning": "Hm.",
            "content": "One moment.",
            "phase": "commentary",
            "tool_calls": [
                {"id": "c1", **call},
                {
                    "id": "c2",
                    "type": "function",
                    "function": {"name": "calculator", "arguments": '{"expression": "3"}'},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
        {"role": "tool", "tool_call_id": "c2", "content": "3"},
        {"role": "assistant", "reasoning": "So.", "content": "Four."},
        {"role": "user", "content": "Thanks"},
    ]


def test_what_was_said_before_a_call_does_not_end_the_turn():
    """With reasoning between them they are two messages; taken for an answer, the first would end the turn."""
    server = Server()
    given = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "First I look."},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    ]
    assert [message.get("phase") for message in server.messages(given)] == [None, "commentary", None]
    final = [{**given[1], "phase": "final_answer"}, *given[2:]]
    assert server.messages(final)[0]["phase"] == "final_answer"


def test_items_of_tools_that_ran_elsewhere_are_left_out():
    server = Server()
    given = [
        {"type": "web_search_call", "id": "ws", "status": "completed"},
        {"type": "mcp_list_tools", "id": "m", "server_label": "x", "tools": []},
        {"role": "user", "content": "Hi"},
    ]
    assert server.messages(given) == [{"role": "user", "content": "Hi"}]


def test_a_picture_among_a_tools_results_does_not_end_the_conversation():
    server = Server()
    given = [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": "data:"}]},
    ]
    assert "input_image: left out" in server.messages(given)[-1]["content"]


def test_reasoning_comes_back_in_every_form():
    server = Server()
    sealed = server.create(include=["reasoning.encrypted_content"], store=False)["output"][0]
    texts = [
        {"type": "reasoning", "id": "rs", "content": sealed["content"], "summary": []},
        {"type": "reasoning", "id": "rs", "encrypted_content": sealed["encrypted_content"], "summary": []},
        {"type": "reasoning", "id": "rs", "encrypted_content": "Let me think.", "summary": []},
        {
            "type": "reasoning",
            "id": "rs",
            "content": None,
            "summary": [{"type": "summary_text", "text": "Let me think."}],
        },
    ]
    for given in texts:
        assert server.messages([given])[0]["reasoning"] == "Let me think."
    # Nothing that could be read: the rest of the conversation is.
    for given in (
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "reasoning", "id": "rs_2", "encrypted_content": "gAAAAABkZmFrZQ==", "summary": []},
        {"type": "reasoning", "id": "rs_3", "encrypted_content": "openelm-mlx-reasoning:???", "summary": []},
    ):
        assert server.messages([given, {"role": "user", "content": "Hi"}]) == [{"role": "user", "content": "Hi"}]


def test_reasoning_without_its_text_is_looked_up_in_the_store():
    server = Server()
    stored = server.create()["output"][0]
    assert (
        server.messages([{"type": "reasoning", "id": stored["id"], "summary": []}])[0]["reasoning"] == "Let me think."
    )


# --- Tools --------------------------------------------------------------------------------------------------------------


def test_tools_of_kinds_that_run_elsewhere_are_left_out():
    server = Server()
    tools = [CALCULATOR, {"type": "web_search"}, {"type": "mcp", "server_label": "x"}, {"type": "something_new"}]
    response = server.create(tools=tools, tool_choice="required")
    assert [tool.name for tool in server.asked.tools] == ["calculator"]
    assert server.asked.lenient_tools == frozenset()
    assert [tool["name"] for tool in response["tools"]] == ["calculator"]
    assert server.asked.tool_choice == "required"


def test_namespaces_and_custom_tools_are_functions_of_the_model():
    def script(request):
        names = [tool.name for tool in request.tools]
        return [*item("call", '{"input": "*** Begin"}', name=names[-1]), end("tool_calls")]

    server = Server(script)
    tools = [
        {"type": "namespace", "name": "mail", "description": "Mail.", "tools": [{"type": "function", "name": "send"}]},
        {"type": "namespace", "name": "chat", "tools": [{"type": "function", "name": "send", "description": "Say."}]},
        {
            "type": "custom",
            "name": "patch",
            "description": "Edits.",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: WORD"},
        },
    ]
    response = server.create(tools=tools)
    assert [tool.name for tool in server.asked.tools] == ["mail__send", "chat__send", "patch"]
    assert server.asked.tools[2].description == "Edits.\n\nThe input follows this lark grammar:\nstart: WORD"
    assert server.asked.tools[2].parameters["required"] == ["input"]
    assert server.asked.lenient_tools == {"mail__send", "chat__send", "patch"}
    call = response["output"][0]
    assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "patch", "*** Begin")
    # And back: the calls under the model's names.
    items = [
        call,
        {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "Done"},
        {"type": "function_call", "call_id": "c", "name": "send", "namespace": "chat", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "Sent"},
    ]
    calls = [message["tool_calls"][0]["function"] for message in server.messages(items, tools=tools)[::2]]
    assert calls == [
        {"name": "patch", "arguments": '{"input": "*** Begin"}'},
        {"name": "chat__send", "arguments": "{}"},
    ]


def test_a_name_without_a_namespace_is_the_tool_that_has_none():
    server = Server()
    tools = [
        {"type": "namespace", "name": "mail", "tools": [{"type": "function", "name": "send"}]},
        {"type": "function", "name": "send"},
    ]
    choice = {"type": "function", "name": "send"}
    server.create(tools=tools, tool_choice=choice)
    assert [tool.name for tool in server.asked.tools] == ["mail__send", "send"]
    assert server.asked.tool_choice == NamedTool("send")
    server.create(tools=tools, tool_choice={**choice, "namespace": "mail"})
    assert server.asked.tool_choice == NamedTool("mail__send")
    server.create(tools=tools[:1], tool_choice=choice)
    assert server.asked.tool_choice == NamedTool("send")


def test_a_pattern_of_a_custom_tool_is_one_of_its_schema():
    server = Server()
    layout = {"type": "grammar", "syntax": "regex", "definition": "a|b"}
    server.create(tools=[{"type": "custom", "name": "pick", "format": layout}])
    assert server.asked.tools[0].parameters["properties"]["input"]["pattern"] == "^(?:a|b)$"


def test_tools_that_an_item_brings_stay_for_the_conversation():
    server = Server()
    brought = {"type": "additional_tools", "role": "developer", "tools": [CALCULATOR]}
    first = server.create(input=[brought, {"role": "user", "content": "Hi"}])
    server.create(previous_response_id=first["id"])
    assert [tool.name for tool in server.asked.tools] == ["calculator"]


@pytest.mark.parametrize(
    ("choice", "offered", "wanted"),
    [
        ("auto", ["calculator", "other"], "auto"),
        ("none", ["calculator", "other"], "none"),
        ("required", ["calculator", "other"], "required"),
        ({"type": "function", "name": "other"}, ["calculator", "other"], NamedTool("other")),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]},
            ["other"],
            "auto",
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]},
            ["other"],
            "required",
        ),
    ],
)
def test_every_tool_choice(choice, offered, wanted):
    server = Server()
    response = server.create(tools=[CALCULATOR, {"type": "function", "name": "other"}], tool_choice=choice)
    assert [tool.name for tool in server.asked.tools] == offered
    assert server.asked.tool_choice == wanted
    assert response["tool_choice"] == choice


# --- The store ----------------------------------------------------------------------------------------------------------


def test_a_response_is_kept_and_gone_on_from_without_its_instructions():
    server = Server()
    first = server.create(instructions="Be brief.")
    assert server.http.get(f"/v1/responses/{first['id']}").json() == first
    second = server.create(input="And 3 + 3?", previous_response_id=first["id"])
    assert server.asked.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "reasoning": "Let me think.", "content": "2 + 2 = 4.", "phase": "final_answer"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    assert second["previous_response_id"] == first["id"]
    assert second["instructions"] is None
    server.create(input="Again", previous_response_id=second["id"])
    assert len(server.asked.messages) == 5


def test_a_streamed_response_is_kept_too_and_one_that_is_not_to_be_is_not():
    server = Server()
    streamed = server.stream()[-1]["response"]
    assert server.http.get(f"/v1/responses/{streamed['id']}").json() == streamed
    unkept = server.create(store=False)
    assert unkept["store"] is False
    assert server.http.get(f"/v1/responses/{unkept['id']}").status_code == 404
    assert server.refused(404, previous_response_id=unkept["id"])[0] == "previous_response_id"
    assert len(server.store) == 1


def test_a_response_can_be_deleted():
    server = Server()
    first = server.create()
    path = f"/v1/responses/{first['id']}"
    second = server.create(previous_response_id=first["id"])
    assert server.http.delete(path).json() == {"id": first["id"], "object": "response", "deleted": True}
    for answer in (server.http.get(path), server.http.delete(path), server.http.post(f"{path}/cancel")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "response_not_found"
    # What came after it still knows the conversation.
    server.create(previous_response_id=second["id"])
    assert len(server.asked.messages) == 5


def test_what_cannot_be_cancelled_or_streamed_again_says_so():
    server = Server()
    path = f"/v1/responses/{server.create()['id']}"
    for answer in (server.http.post(f"{path}/cancel"), server.http.get(f"{path}?stream=true")):
        assert answer.status_code == 400
        assert "background" in answer.json()["error"]["message"]


def test_input_items_are_those_before_the_output():
    server = Server()
    first = server.create(input=[{"role": "user", "content": f"{number}"} for number in range(3)])
    second = server.create(input="last", previous_response_id=first["id"])
    path = f"/v1/responses/{second['id']}/input_items"

    def page(query=""):
        answer = server.http.get(path + query).json()
        late("openai.types.responses:ResponseItemList").model_validate(answer)
        return answer

    newest = page()
    assert newest["data"][0]["content"] == [{"type": "input_text", "text": "last"}]
    assert [each["type"] for each in newest["data"]] == [
        "message",
        "message",
        "reasoning",
        "message",
        "message",
        "message",
    ]
    assert page("?order=asc")["data"] == newest["data"][::-1]
    two = page("?limit=2")
    assert (len(two["data"]), two["has_more"], two["first_id"]) == (2, True, newest["first_id"])
    rest = page(f"?after={two['last_id']}")
    assert two["data"] + rest["data"] == newest["data"]
    assert not rest["has_more"]
    for limit in ("0", "101", "x"):
        assert server.http.get(f"{path}?limit={limit}").json()["error"]["param"] == "limit"


def test_items_are_referred_to_instead_of_being_sent_again():
    """Vercel's SDK does, for all but the new ones."""
    server = Server(CALL)
    first = server.create(tools=[CALCULATOR])
    references = [{"type": "item_reference", "id": each["id"]} for each in first["output"]]
    references[0].pop("type")  # which is allowed to be missing
    result = {"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "4"}
    server.create(input=[{"role": "user", "content": "Hi"}, *references, result], tools=[CALCULATOR])
    assistant, tool = server.asked.messages[1:]
    assert (assistant["reasoning"], assistant["content"]) == ("I need the tool.", "One moment.")
    assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"]
    # In the conversation that it is a part of, an item stands once.
    server.create(input=[*references, result], previous_response_id=first["id"])
    assert [message["role"] for message in server.asked.messages] == ["user", "assistant", "tool"]
    param, message = server.refused(404, input=[{"type": "item_reference", "id": "rs_none"}])
    assert (param, "not stored" in message) == ("input[0].id", True)


def test_the_store_drops_the_least_used_and_knows_its_bytes():
    server = Server(ANSWER, most_responses=3)
    ids = [server.create(input=f"{number}")["id"] for number in range(3)]
    server.http.get(f"/v1/responses/{ids[0]}")
    server.create()
    assert [server.http.get(f"/v1/responses/{each}").status_code for each in ids] == [200, 404, 200]
    for each in list(server.store):
        server.store.delete(each)
    assert server.store.num_bytes == 0
    assert server.store._items == {}


def test_the_store_is_limited_in_bytes_also_where_conversations_are_long():
    server = Server(ANSWER, most_bytes=40_000)
    last = None
    for _ in range(30):
        last = server.create(input="x" * 2_000, previous_response_id=last)["id"]
        assert server.store.num_bytes <= 40_000
        if last not in list(server.store):
            last = None  # the conversation had become too large
    assert 1 <= len(server.store) < 20


def test_a_chain_that_lost_its_beginning_is_whole_and_its_items_are_counted_once():
    server = Server(ANSWER, most_responses=2)
    last = None
    for number in range(6):
        last = server.create(input=f"{number}", previous_response_id=last)["id"]
    assert [message["content"] for message in server.asked.messages[::2]] == [str(number) for number in range(6)]
    assert len(server.store) == 2
    for each in list(server.store):
        server.store.delete(each)
    assert (server.store.num_bytes, server.store._items) == (0, {})


def test_counting_the_input():
    server = Server()
    answer = server.http.post(
        "/v1/responses/input_tokens", json={"model": "demo", "input": "Hi", "tools": [CALCULATOR]}
    )
    assert answer.json() == {"object": "response.input_tokens", "input_tokens": 12}
    assert server.asked.messages == [{"role": "user", "content": "Hi"}]
    assert server.http.post("/v1/responses/input_tokens", json={"model": "demo"}).status_code == 400


# --- Streams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [THOUGHT_AND_ANSWER, CALL], ids=["answer", "call"])
def test_a_stream_is_what_the_whole_answer_is(script):
    server = Server(script)
    streamed, whole = server.stream(tools=[CALCULATOR])[-1]["response"], server.create(tools=[CALCULATOR])
    for response in (streamed, whole):
        for key in ("id", "created_at", "completed_at"):
            response.pop(key)
        for each in response["output"]:
            each.pop("id")
            each.pop("call_id", None)
    assert streamed == whole


def test_a_failure_in_a_stream_is_its_last_event_and_before_it_a_status():
    failing = [*THOUGHT_AND_ANSWER[:3], ApiError(503, "The engine has ended.", "server_error")]
    server = Server(failing)
    last = server.stream()[-1]
    assert last["type"] == "response.failed"
    assert server.http.get(f"/v1/responses/{last['response']['id']}").json()["status"] == "failed"
    assert server.generations.generations[-1].is_closed
    answer = server.http.post("/v1/responses", json={"model": "demo", "input": "Hi"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "The engine has ended.")
    assert Server([ApiError(404, "No such model.", code="model_not_found")]).refused(404, stream=True)[1]


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes_away_ends_its_answer_and_nothing_is_kept(is_streamed):
    server = Server([*THOUGHT_AND_ANSWER[:3], 3600.0, *THOUGHT_AND_ANSWER[3:]])
    body = json.dumps({"model": "demo", "input": "Hi", "stream": is_streamed}).encode()

    async def run():
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if received:
                return received.pop()
            while not server.generations.generations:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {
            "type": "http", "method": "POST", "path": "/v1/responses", "headers": [], "query_string": b"",
            "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 80), "root_path": "", "client": None,
        }  # fmt: skip
        await server.app(scope, receive, send)

    asyncio.run(run())
    assert server.generations.generations[0].is_closed
    assert len(server.store) == 0


# --- The official client ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address():
    def script(request):
        if any(tool.name == "calculator" for tool in request.tools) and request.messages[-1]["role"] != "tool":
            return CALL
        if request.answer_schema is not None:
            return [*item("reasoning", "Hm."), *item("message", '{"sum":', " 4}"), end()]
        return THOUGHT_AND_ANSWER

    with served(make_app(Services(FakeGenerations(script)), responses.routes())) as url:
        yield f"{url}/v1"


class Sum(BaseModel):
    sum: int


def test_openais_client_over_a_socket(address):
    client = late("openai:OpenAI")(base_url=address, api_key="none", max_retries=0)
    first = client.responses.create(model="demo", input="What is 2 + 2?", tools=[CALCULATOR])
    call = next(each for each in first.output if each.type == "function_call")
    assert json.loads(call.arguments) == {"expression": "2+2"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    second = client.responses.create(model="demo", input=[result], previous_response_id=first.id, tools=[CALCULATOR])
    assert second.output_text == "2 + 2 = 4."
    assert client.responses.retrieve(second.id) == second
    assert client.responses.input_items.list(second.id).data[0].type == "function_call_output"
    assert client.responses.input_tokens.count(model="demo", input="Hi").input_tokens == 12
    client.responses.delete(second.id)
    with pytest.raises(late("openai:APIStatusError")) as failure:
        client.responses.retrieve(second.id)
    assert failure.value.status_code == 404
    parsed = client.responses.parse(model="demo", input="2 + 2", text_format=Sum)
    assert parsed.output_parsed == Sum(sum=4)


def test_openais_stream_helper(address):
    client = late("openai:OpenAI")(base_url=address, api_key="none", max_retries=0)
    with client.responses.stream(model="demo", input="2 + 2", text_format=Sum) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert final.output_parsed == Sum(sum=4)
    texts = [event for event in seen if event.type == "response.output_text.delta"]
    assert [event.snapshot for event in texts] == ['{"sum":', '{"sum": 4}']
    with client.responses.stream(model="demo", input="2 + 2?", tools=[CALCULATOR]) as stream:
        arguments = [e.snapshot for e in stream if e.type == "response.function_call_arguments.delta"]
        assert [each.type for each in stream.get_final_response().output] == ["reasoning", "message", "function_call"]
    assert arguments[-1] == '{"expression": "2+2"}'


def test_openais_async_client(address):
    async def run():
        async with late("openai:AsyncOpenAI")(base_url=address, api_key="none", max_retries=0) as client:
            return [event.type async for event in await client.responses.create(model="demo", input="Hi", stream=True)]

    types = asyncio.run(run())
    assert (types[0], types[-1]) == ("response.created", "response.completed")
