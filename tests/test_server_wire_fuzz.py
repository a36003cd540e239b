"""Requests with anything anywhere: an answer, or a 4xx that says what is wrong; never a failure of the server."""

import copy
import json
import random

import pytest
from server_fakes import CALL, FakeGenerations
from server_fuzz import places
from starlette.testclient import TestClient

from openelm_mlx.server.app import Services, make_app
from openelm_mlx.server.wire import messages, responses

ODD = [
    None, True, False, 0, -1, 1.5, 1e308, 10**30, "", "x", "\ud800", "\x00", "auto", "required", [], {}, [[]], [None], [{}],
    {"type": None}, {"type": []}, {"type": "function"}, {"type": "message"}, {"type": "custom", "name": "x"},
    {"type": "namespace", "name": "n", "tools": [{}]}, {"type": "item_reference", "id": "x"}, {"type": "tool", "name": []},
    {"type": "text", "text": 5}, {"type": "tool_result"}, {"type": "tool_result", "tool_use_id": "t", "content": [[]]},
    {"type": "document", "source": {"type": "content", "content": [5]}}, {"role": "assistant", "content": []},
    {"role": "user", "content": {"a": 1}}, {"a": {"b": {"c": []}}}, "x" * 3000, [1] * 50, {"__class__": "x"},
]  # fmt: skip
FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
RESPONSES = {
    "model": "demo",
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": "n"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "x"},
        {"type": "additional_tools", "tools": [{"type": "custom", "name": "h"}]},
    ],
    "tools": [
        FUNCTION,
        {"type": "custom", "name": "g", "format": {"type": "grammar", "syntax": "regex", "definition": "a"}},
        {"type": "namespace", "name": "n", "tools": [FUNCTION]},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
    "logit_bias": {"1": 1},
    "stop": ["x"],
    "temperature": 1,
    "top_logprobs": 1,
}
MESSAGES = {
    "model": "demo",
    "max_tokens": 10,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "d"},
                {"type": "text", "text": "Yes"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{"type": "text", "text": "x"}],
                    "is_error": True,
                },
                {
                    "type": "document",
                    "title": "T",
                    "source": {"type": "content", "content": [{"type": "text", "text": "x"}]},
                },
                {"type": "search_result", "title": "T", "source": "s", "content": [{"type": "text", "text": "x"}]},
            ],
        },
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}, "strict": True}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 2000},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
    "stop_sequences": ["x"],
}


def changed(body, generator):
    """The body with something else at one to three places."""
    body = copy.deepcopy(body)
    for _ in range(generator.randint(1, 3)):
        path = generator.choice(list(places(body)))
        inner = body
        for key in path[:-1]:
            inner = inner[key]
        what = generator.random()
        if what < 0.15:
            inner.pop(path[-1])
        elif what < 0.25 and isinstance(inner, list):
            inner.insert(path[-1], copy.deepcopy(generator.choice(ODD)))
        else:
            inner[path[-1]] = copy.deepcopy(generator.choice(ODD))
        if not list(places(body)):
            break
    return body


@pytest.mark.slow(first=1)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", RESPONSES),
        ("/v1/responses/input_tokens", RESPONSES),
        ("/v1/messages", MESSAGES),
        ("/v1/messages/count_tokens", MESSAGES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_anywhere(path, body):
    app = make_app(Services(FakeGenerations(CALL)), [*responses.routes(), *messages.routes()])
    http = TestClient(app, raise_server_exceptions=False)
    assert http.post(path, json=body).status_code == 200
    generator, seen = random.Random(5), set()
    for _ in range(250):
        sent = json.dumps(changed(body, generator))
        answer = http.post(path, content=sent)
        assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, sent)
        seen.add(answer.status_code)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"].endswith("."), answer.text
    assert {200, 400} <= seen
