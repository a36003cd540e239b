"""Chat Completions as the openai package uses it: its streams, its parsed answers, its tools, its errors."""

import pydantic
import pytest
from late_imports import late
from server_app import served_demos

from openelm_mlx.server.wire import chat, completions, models

MODEL = "demo-gpt-oss"
WORD = [{"role": "user", "content": "What is a boat?"}]
SUM = [{"role": "user", "content": "What is 12 * 34?"}]


class Calculator(pydantic.BaseModel):
    """Evaluates arithmetic."""

    expression: str


@pytest.fixture(scope="module")
def client():
    routes = [route for api in (chat, completions, models) for route in api.routes()]
    with (
        served_demos(routes, MODEL) as (address, _),
        late("openai:OpenAI")(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield client


def test_its_stream_helper_puts_the_same_answer_together(client):
    asked = {"model": MODEL, "messages": WORD, "temperature": 0, "reasoning_effort": "low"}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert found.choices[0].message.content == whole.choices[0].message.content
    assert found.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_a_parsed_answer(client):
    class Thing(pydantic.BaseModel):
        name: str
        size: int

    answer = client.chat.completions.parse(
        model=MODEL, messages=WORD, temperature=0, response_format=Thing, max_completion_tokens=120
    )
    assert isinstance(answer.choices[0].message.parsed, Thing)


def test_a_tool_and_its_result(client):
    tools = [late("openai:pydantic_function_tool")(Calculator)]
    with client.chat.completions.stream(model=MODEL, messages=SUM, temperature=0, tools=tools) as stream:
        arguments = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        message = stream.get_final_completion().choices[0].message
    [call] = message.tool_calls
    assert "".join(arguments) == call.function.arguments
    assert isinstance(call.function.parsed_arguments, Calculator)
    result = {"role": "tool", "tool_call_id": call.id, "content": "408"}
    said = message.model_dump(exclude={"parsed": True, "tool_calls": {"__all__": {"function": {"parsed_arguments"}}}})
    last = client.chat.completions.create(model=MODEL, messages=[*SUM, said, result], tools=tools, temperature=0)
    assert "408" in last.choices[0].message.content


def test_its_errors(client):
    with pytest.raises(late("openai:NotFoundError")) as missing:
        client.chat.completions.create(model="gpt-6", messages=WORD)
    assert missing.value.code == "model_not_found"
    with pytest.raises(late("openai:BadRequestError")) as wrong:
        client.chat.completions.create(model=MODEL, messages=WORD, temperature=1.5, top_p=1.5)
    assert wrong.value.param == "top_p"
    with pytest.raises(late("openai:BadRequestError")) as long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "banjo " * 1000}])
    assert long.value.code == "context_length_exceeded"


def test_models_and_completions(client):
    [model] = client.models.list()
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(late("openai:NotFoundError")):
        client.models.retrieve("someone/else")
    texts = [
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt="banjo: a", temperature=0, max_tokens=6, stream=True)
    ]
    whole = client.completions.create(model=MODEL, prompt="banjo: a", temperature=0, max_tokens=6)
    assert "".join(texts) == whole.choices[0].text


def test_a_stream_that_is_closed_ends(client):
    stream = client.chat.completions.create(model=MODEL, messages=WORD, temperature=0, stream=True, max_tokens=300)
    next(stream)
    stream.close()
