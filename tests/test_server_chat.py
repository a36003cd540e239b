"""Chat Completions with the trained demos behind a real server, and every answer against OpenAI's own types."""

import json

import pytest
from httpx2 import Client
from late_imports import late
from pydantic import ValidationError
from server_app import served_demos

import openelm_mlx as om
from openelm_mlx.engine.handle import Handle
from openelm_mlx.errors import EngineClosedError, EngineFullError, MemoryLimitError
from openelm_mlx.server.call_reasoning import CallReasoning
from openelm_mlx.server.wire import chat
from openelm_mlx.text.openai_chat import conversation

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates arithmetic.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
OTHER = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
SUM = [{"role": "user", "content": "What is 12 * 34?"}]
WORD = [{"role": "user", "content": "What is a boat?"}]  # of all words one of the shortest answers


@pytest.fixture(scope="module")
def demos():
    with served_demos(chat.routes(), "demo-gpt-oss", "demo-openelm") as (address, registry):
        with Client(base_url=address, timeout=300) as client:
            yield client, registry
        for model in registry.models.values():
            assert model.num_leases == 0
            assert model.engine.num_running == model.engine.num_waiting == 0


def post(demos, **body):
    body = {"model": "demo-gpt-oss", "messages": WORD, "temperature": 0, **body}
    return demos[0].post("/v1/chat/completions", json=body)


def thinking_little(body):
    """The request with the shortest reasoning, where it says nothing of it: most tests are of what comes around the text."""
    return body if body.get("model", "demo-gpt-oss") == "demo-openelm" else {"reasoning_effort": "low", **body}


def ask(demos, **body):
    answer = post(demos, **thinking_little(body))
    assert answer.status_code == 200, answer.text
    late("openai.types.chat:ChatCompletion").model_validate(answer.json())
    return answer.json()


def stream(demos, **body):
    """The chunks, checked: their form, their order, and the end."""
    body = {"model": "demo-gpt-oss", "messages": WORD, "temperature": 0, "stream": True, **thinking_little(body)}
    chunks, lines = [], []
    with demos[0].stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                chunks.append(json.loads(line[6:]))
                late("openai.types.chat:ChatCompletionChunk").model_validate(chunks[-1])
            if line and not line.startswith(":"):
                lines.append(line)
    assert lines[-1] == "data: [DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    return chunks


def put_together(chunks):
    """What a client makes of the chunks, by answer: message, finish_reason, logprobs; and the usage."""
    answers, usage = {}, None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            found = answers.setdefault(choice["index"], {"content": "", "reasoning": "", "calls": [], "logprobs": []})
            delta = choice["delta"]
            found["content"] += delta.get("content") or ""
            found["reasoning"] += delta.get("reasoning") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(found["calls"])
                    found["calls"].append({"name": call["function"]["name"], "arguments": ""})
                found["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            if choice["logprobs"] is not None:
                found["logprobs"] += choice["logprobs"]["content"]
            assert "finish" not in found, "a chunk came after the last one"
            if choice["finish_reason"] is not None:
                assert delta == {}
                found["finish"] = choice["finish_reason"]
    return answers, usage


def whole(answer):
    """The same of an answer that was not streamed."""
    answers = {}
    for choice in answer["choices"]:
        message = choice["message"]
        assert message.get("reasoning") == message.get("reasoning_content")
        answers[choice["index"]] = {
            "content": message["content"] or "",
            "reasoning": message.get("reasoning") or "",
            "calls": [call["function"] for call in message.get("tool_calls", ())],
            "logprobs": (choice["logprobs"] or {"content": []})["content"],
            "finish": choice["finish_reason"],
        }
    return answers, answer["usage"]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
REQUESTS = {
    "a word": {},
    "a call": {"messages": SUM, "tools": [CALCULATOR]},
    "a call that has to be": {"tools": [CALCULATOR], "tool_choice": "required", "max_tokens": 80},
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}},
    "cut in its reasoning": {"max_tokens": 5},
    "a stop string": {"stop": ["vessel", "kind"], "max_tokens": 60},
    "log-probabilities": {"logprobs": True, "top_logprobs": 2},
    "three answers": {"n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 24},
    "without reasoning": {"reasoning_effort": "none", "max_tokens": 12},
    "OpenELM": {"model": "demo-openelm", "max_tokens": 24, "logprobs": True},
}


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("name", REQUESTS)
def test_streamed_is_whole(demos, name):
    body = REQUESTS[name]
    found, usage = put_together(stream(demos, stream_options={"include_usage": True}, **body))
    wanted, wanted_usage = whole(ask(demos, **body))
    assert found == wanted
    for each in (usage, wanted_usage):
        each["prompt_tokens_details"].pop("cached_tokens")  # the second one finds the first one's prompt
    assert usage == wanted_usage


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("model", ["demo-gpt-oss", "demo-openelm"])
def test_greedy_text_is_that_of_generate(demos, model):
    loaded = demos[1].models[model]
    options = thinking_little({"model": model, "max_tokens": 30})
    del options["model"]
    for messages in (WORD, [{"role": "system", "content": "Be brief."}, *SUM]):
        answer = ask(demos, model=model, messages=messages, **options)
        handle = loaded.engine.submit(messages, **options, prefix_cache=loaded.prefix_cache)
        assert answer["choices"][0]["message"]["content"] == handle.text()
        assert answer["usage"]["completion_tokens"] == handle.statistics.completion_tokens
    assert answer["choices"][0]["message"]["content"] == om.generate(
        loaded.model, loaded.tokenizer, messages, **options
    )


def test_a_call_and_its_result(demos):
    answer = ask(demos, messages=SUM, tools=[CALCULATOR])
    message = answer["choices"][0]["message"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert message["content"] is None
    assert "reasoning" in message
    [call] = message["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "calculator"
    assert json.loads(call["function"]["arguments"]) == {"expression": "12 * 34"}
    for name in ("reasoning", "reasoning_content"):
        said = {key: value for key, value in message.items() if not key.startswith("reasoning")}
        said[name] = message["reasoning"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "408"}
        last = ask(demos, messages=[*SUM, said, result], tools=[CALCULATOR])
        assert "408" in last["choices"][0]["message"]["content"]
        assert last["choices"][0]["finish_reason"] == "stop"
        # The call's prompt and what was written of it are known; the result is new.
        assert last["usage"]["prompt_tokens_details"]["cached_tokens"] > answer["usage"]["prompt_tokens"]


@pytest.mark.slow
def test_every_tool_choice(demos):
    tools = [OTHER, CALCULATOR]

    def called(messages, choice):
        answer = ask(demos, messages=messages, tools=tools, tool_choice=choice, max_tokens=90)
        return [call["function"]["name"] for call in answer["choices"][0]["message"].get("tool_calls", ())]

    assert called(SUM, "auto") == ["calculator"]
    assert called(SUM, "none") == []
    assert len(called(WORD, "required")) == 1
    assert called(WORD, {"type": "function", "function": {"name": "look_up"}}) == ["look_up"]
    assert called(SUM, {"type": "function", "function": {"name": "look_up"}}) == ["look_up"]
    only = {"mode": "required", "tools": [{"type": "function", "function": {"name": "look_up"}}]}
    assert called(SUM, {"type": "allowed_tools", "allowed_tools": only}) == ["look_up"]


def test_a_call_s_arguments_follow_its_schema_and_end_within_the_limit(demos):
    size = {
        "type": "object",
        "properties": {"size": {"enum": [3, 5]}},
        "required": ["size"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "resize", "parameters": size, "strict": True}}
    for seed in range(3):
        answer = ask(demos, tools=[tool], tool_choice="required", temperature=1.5, seed=seed, max_tokens=60)
        choice = answer["choices"][0]
        if choice["finish_reason"] == "length":  # it was still thinking
            assert "tool_calls" not in choice["message"]
            continue
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["size"] in (3, 5)


@pytest.mark.slow
def test_json_is_enforced_and_reasoning_stays_free(demos):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    message = ask(demos, response_format=form)["choices"][0]["message"]
    assert set(json.loads(message["content"])) == {"name", "size"}
    assert message["reasoning"]
    anything = ask(demos, response_format={"type": "json_object"}, max_tokens=80)["choices"][0]["message"]
    assert isinstance(json.loads(anything["content"]), dict)
    with_tools = ask(demos, messages=SUM, tools=[CALCULATOR], response_format=form, tool_choice="required")["choices"][
        0
    ]
    assert with_tools["finish_reason"] == "tool_calls"
    plain = ask(demos, model="demo-openelm", response_format=form, max_tokens=60)["choices"][0]["message"]
    assert set(json.loads(plain["content"])) == {"name", "size"}


def test_logprobs_are_of_the_answer_alone(demos):
    answer = ask(demos, logprobs=True, top_logprobs=3)
    choice = answer["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == choice["message"]["content"]
    for token in tokens:
        assert len(token["top_logprobs"]) == 3
        assert token["token"] == token["top_logprobs"][0]["token"]
        assert token["logprob"] == pytest.approx(token["top_logprobs"][0]["logprob"])
    assert ask(demos)["choices"][0]["logprobs"] is None


def test_a_stop_string_ends_the_answer_and_not_the_reasoning(demos):
    text = ask(demos)["choices"][0]["message"]
    stop = text["content"].split()[3]
    message = ask(demos, stop=stop)["choices"][0]["message"]
    assert message["content"] == text["content"][: text["content"].index(stop)]
    within = text["reasoning"].split()[1]
    assert ask(demos, stop=[within])["choices"][0]["message"]["reasoning"] == text["reasoning"]


def test_several_answers_come_of_one_prompt_and_a_seed_repeats_them(demos):
    hard = [{"role": "user", "content": "What is a banjo?"}]  # it does not know that word, and so hesitates
    body = {"messages": hard, "n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 14}
    first, second = ask(demos, **body), ask(demos, **body)
    assert [each["index"] for each in first["choices"]] == [0, 1, 2]
    texts = [each["message"] for each in first["choices"]]
    assert texts == [each["message"] for each in second["choices"]]
    assert len({json.dumps(text) for text in texts}) > 1
    one = ask(demos, **body | {"n": 1, "seed": 8})
    assert one["choices"][0]["message"] == texts[1]


def test_the_second_turn_computes_only_what_is_new(demos):
    talk = [{"role": "user", "content": "What is a cello? " + "Tell me in a few words. " * 20}]
    first = ask(demos, messages=talk, max_tokens=12)
    said = first["choices"][0]["message"]
    again = [*talk, {"role": "assistant", "content": said["content"]}, {"role": "user", "content": "And a horse?"}]
    second = ask(demos, messages=again, max_tokens=2)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    # The reasoning is not told again, so the first turn's prompt is what can be known, up to its last token.
    assert first["usage"]["prompt_tokens"] - 8 <= cached <= first["usage"]["prompt_tokens"]


def test_reasoning_tokens_are_the_reasoning(demos):
    usage = ask(demos)["usage"]
    details = usage["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < usage["completion_tokens"]
    assert (
        ask(demos, reasoning_effort="none", max_tokens=8)["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    )
    assert ask(demos, max_tokens=5)["choices"][0]["message"]["content"] == ""


def test_penalties_and_biases_reach_the_sampler(demos):
    tokenizer = demos[1].models["demo-gpt-oss"].tokenizer
    asked = {"messages": [{"role": "user", "content": "What is a cello?"}]}
    plain = ask(demos, **asked)
    word = plain["choices"][0]["message"]["content"].split()[0]
    bias = {str(token): -100 for token in tokenizer.encode(word, continuation=True)}
    assert not ask(demos, logit_bias=bias, **asked)["choices"][0]["message"]["content"].startswith(word)
    penalized = ask(demos, repetition_penalty=50.0, max_tokens=16, **asked)
    assert penalized["choices"][0]["message"]["reasoning"] != plain["choices"][0]["message"]["reasoning"]


def test_penalties_change_the_answer_as_they_do_without_a_server(demos):
    loaded = demos[1].models["demo-gpt-oss"]
    asked = [{"role": "user", "content": "What is a harbor?"}]
    options, known = {"max_tokens": 28, "reasoning_effort": "low"}, om.PrefixCache()
    # It does not end by itself, and repeats itself then.
    ends = {
        *loaded.tokenizer.eos_tokens,
        *map(loaded.tokenizer.special_tokens.get, ("<|return|>", "<|call|>", "<|end|>")),
    }
    bias = dict.fromkeys(ends, -100.0)
    said = set()
    for penalties in ({}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        body = {**options, **penalties, "logit_bias": {str(token): value for token, value in bias.items()}}
        message = ask(demos, messages=asked, **body)["choices"][0]["message"]
        sampling = om.SamplingParams(temperature=0, logit_bias=bias, **penalties)
        chunks = [
            *om.stream_generate(loaded.model, loaded.tokenizer, asked, sampling=sampling, prefix_cache=known, **options)
        ]
        alone = "".join(chunk.reasoning for chunk in chunks), "".join(chunk.text for chunk in chunks)
        assert (message["reasoning"], message["content"]) == alone
        said.add(alone)
    assert len(said) == 3


def test_nulls_are_not_given_and_unknown_fields_are_passed_over(demos):
    wanted = ask(demos, max_tokens=10, reasoning_effort="medium")["choices"]  # which is OpenAI's usual one
    nulls = dict.fromkeys(
        ("tools", "tool_choice", "stream", "stream_options", "response_format", "n", "stop", "logprobs", "top_logprobs", "seed",
         "logit_bias", "presence_penalty", "top_p", "user", "metadata", "reasoning_effort", "max_completion_tokens")
    )  # fmt: skip
    unknown = {
        "mirostat": 2,
        "options": {"num_ctx": 1},
        "service_tier": "auto",
        "store": False,
        "tools": [{"type": "web_search"}],
    }
    assert post(demos, max_tokens=10, **nulls).json()["choices"] == wanted
    assert post(demos, max_tokens=10, **unknown).json()["choices"] == wanted
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a boat?"}]}]
    assert ask(demos, max_tokens=2, messages=parts)["choices"][0]["finish_reason"]


WRONG = [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "1"}]}, "messages"),
    (
        {"messages": [*SUM, {"role": "assistant", "tool_calls": [{"id": [], "function": {"name": "f"}}]}]},
        "messages[1].tool_calls[0].id",
    ),
    ({"tools": ["f"]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function"),
    ({"tools": [CALCULATOR, CALCULATOR]}, "tools"),
    ({"tools": [CALCULATOR], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [CALCULATOR], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wrong"}}}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["word" * 20_000]}}}},
        "response_format",
    ),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"reasoning_effort": 3}}, "chat_template_kwargs.reasoning_effort"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"seed": 2**70}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"model": "demo-openelm", "tools": [CALCULATOR]}, "tools"),
    ({"model": "demo-openelm", "reasoning_effort": "low"}, "reasoning_effort"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda value: json.dumps(value)[:60])
def test_what_is_wrong_is_a_400_that_names_the_field(demos, body, param):
    for stream in (False, True):
        answer = post(demos, **{"stream": stream, **body})
        error = answer.json()["error"]
        assert answer.status_code == 400, error
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param, error
        assert error["message"].endswith(".")


def test_errors_that_clients_look_for(demos):
    missing = post(demos, model="gpt-6")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    long = post(demos, messages=[{"role": "user", "content": "banjo " * 1000}])
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    client = demos[0]
    for body in (b"", b"{", b"[]", b"\xff", b'{"model": NaN}', b"[" * 100_000):
        answer = client.post("/v1/chat/completions", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert client.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert client.get("/v1/chat/completions").status_code == 405


@pytest.mark.slow
def test_a_client_that_leaves_reasoning_out_gets_the_same_answer(demos):
    """What was thought before a call is remembered by the call's name, streamed or not."""
    first = ask(demos, messages=SUM, tools=[CALCULATOR])["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "408"}
    expected = ask(demos, messages=[*SUM, first, result], tools=[CALCULATOR])
    for chunks in (None, stream(demos, messages=SUM, tools=[CALCULATOR])):
        calls = first["tool_calls"]
        if chunks is not None:
            [opened] = [
                call for chunk in chunks for choice in chunk["choices"]
                for call in choice["delta"].get("tool_calls", ()) if "id" in call
            ]  # fmt: skip
            calls = [{**calls[0], "id": opened["id"]}]
        bare = {"role": "assistant", "content": None, "tool_calls": calls}
        answer = ask(demos, messages=[*SUM, bare, {**result, "tool_call_id": calls[0]["id"]}], tools=[CALCULATOR])
        assert answer["choices"][0]["message"]["content"] == expected["choices"][0]["message"]["content"]
        assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    stranger = {"role": "assistant", "content": None, "tool_calls": [{**first["tool_calls"][0], "id": "call_x"}]}
    answer = ask(demos, messages=[*SUM, stranger, {**result, "tool_call_id": "call_x"}], tools=[CALCULATOR])
    assert answer["usage"]["prompt_tokens"] < expected["usage"]["prompt_tokens"]


def test_reasoning_is_remembered_within_bounds():
    memory = CallReasoning(most_calls=2, most_bytes=10)

    def known(name):
        [message] = memory.completed([{"role": "assistant", "tool_calls": [{"id": name}]}])
        return message.get("reasoning")

    memory.keep("a", "one")
    memory.keep("b", "two")
    assert known("a") == "one"
    memory.keep("c", "three")
    assert (known("a"), known("b"), known("c")) == ("one", None, "three")
    memory.keep("d", "12345678")
    assert (known("a"), known("c"), known("d")) == (None, None, "12345678")
    memory.keep("e", "x" * 11)
    memory.keep("f", "")
    assert (known("d"), known("e"), known("f")) == ("12345678", None, None)
    said = {"role": "assistant", "reasoning": "own", "tool_calls": [{"id": "d"}]}
    assert memory.completed([said]) == [said]


def test_arguments_come_as_they_are_written(demos):
    chunks = stream(demos, messages=SUM, tools=[CALCULATOR])
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert len(deltas) > 3
    assert [("id" in call, "name" in call["function"]) for call in deltas[:2]] == [(True, True), (False, False)]
    assert not any("id" in call or "name" in call["function"] for call in deltas[1:])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls_of_a_history_are_each_followed_by_their_result(demos, parallel):
    """As OpenAI's models write them: one message with two calls, and two results in any order."""
    calls = [
        {
            "id": f"call_{at}",
            "type": "function",
            "function": {"name": "calculator", "arguments": f'{{"expression": "{at}"}}'},
        }
        for at in range(2)
    ]
    results = [{"role": "tool", "tool_call_id": f"call_{at}", "content": str(at)} for at in (1, 0)]
    said = {"role": "assistant", "content": None, "tool_calls": calls}
    body = {
        "messages": [*SUM, said, *results],
        "tools": [CALCULATOR],
        "parallel_tool_calls": parallel,
        "max_tokens": 2,
    }
    assert ask(demos, **body)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineFullError("The queue is full: ask again later."), 503, "overloaded"),
        (EngineClosedError("The engine has ended."), 503, "engine_closed"),
        (MemoryLimitError("It needs 3 GB, and there is 1 GB."), 400, "memory_limit_exceeded"),
        (RuntimeError("of ours"), 500, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_engine_refuses_has_a_status(demos, monkeypatch, error, status, code):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(demos[1].models["demo-gpt-oss"].engine, "submit_several", refuse)
    for stream in (False, True):
        answer = post(demos, stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert ("retry-after" in answer.headers) == (status == 503)
        assert "of ours" not in answer.text


def test_an_error_within_a_stream_is_its_last_line(demos, monkeypatch):
    engine = demos[1].models["demo-gpt-oss"].engine

    def fail(handle):
        raise RuntimeError("of ours")

    monkeypatch.setattr(Handle, "take", fail)
    body = {"model": "demo-gpt-oss", "messages": WORD, "stream": True}
    with demos[0].stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    monkeypatch.undo()
    assert json.loads(lines[-1][6:])["error"]["type"] == "server_error"
    assert "of ours" not in "".join(lines)
    assert ask(demos)["choices"][0]["finish_reason"] == "stop"
    assert engine.num_waiting == 0


# --- Other spellings of clients -----------------------------------------------------------------------------------------


def asked(**body):
    body = {"model": "demo-gpt-oss", "messages": WORD, **body}
    return chat.ChatRequest.model_validate(body).generation()


def test_a_limit_of_minus_one_is_none():
    assert asked(max_tokens=-1).max_tokens is None
    assert asked(max_completion_tokens=-1.0).max_tokens is None
    assert asked(max_completion_tokens=-1, max_tokens=7).max_tokens == 7
    for wrong in (0, -2, True, False, "-1"):
        with pytest.raises(ValidationError):
            asked(max_tokens=wrong)


def test_no_likely_tokens_are_no_log_probabilities():
    assert asked(top_logprobs=0).logprobs is None
    assert asked(top_logprobs=0, logprobs=True).logprobs == 0


def test_calls_in_the_words_from_before_tools():
    call = {"name": "look_up", "arguments": '{"word": "banjo"}'}
    old = [
        *WORD,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "look_up", "content": "A string instrument."},
        {"role": "assistant", "content": "An instrument.", "function_call": None},
    ]
    new = [
        *WORD,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "a", "content": "A string instrument."},
        {"role": "assistant", "content": "An instrument."},
    ]
    assert conversation(asked(messages=old).messages) == conversation(asked(messages=new).messages)
