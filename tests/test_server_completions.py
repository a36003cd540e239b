"""Completions: text that both families go on with, echoed and scored, against OpenAI's own types."""

import json

import mlx.core as mx
import pytest
from httpx2 import Client
from late_imports import late
from server_app import served_demos

from openelm_mlx.server.wire import completions

OPENELM, GPT_OSS = "demo-openelm", "demo-gpt-oss"
TEXT = "What is a banjo? It is"


@pytest.fixture(scope="module")
def demos():
    with (
        served_demos(completions.routes(), OPENELM, GPT_OSS) as (address, registry),
        Client(base_url=address, timeout=300) as client,
    ):
        yield client, registry


def post(demos, **body):
    return demos[0].post("/v1/completions", json={"model": OPENELM, "prompt": TEXT, "temperature": 0, **body})


def ask(demos, **body):
    answer = post(demos, **body)
    assert answer.status_code == 200, answer.text
    copy = answer.json()
    for scores in (choice["logprobs"] for choice in copy["choices"] if choice["logprobs"] is not None):
        # OpenAI sends null for a first token, which its own type has forgotten.
        scores["token_logprobs"] = [0.0 if each is None else each for each in scores["token_logprobs"]]
        scores["top_logprobs"] = [each or {} for each in scores["top_logprobs"]]
    late("openai.types:Completion").model_validate(copy)
    return answer.json()


def streamed(demos, **body):
    """The choices put together, and the usage."""
    body = {"model": OPENELM, "prompt": TEXT, "temperature": 0, "stream": True, **body}
    body["stream_options"] = {"include_usage": True}
    with demos[0].stream("POST", "/v1/completions", json=body) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    choices = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        found = choices.setdefault(choice["index"], {"index": choice["index"], "text": "", "logprobs": None})
        found["text"] += choice["text"]
        found["finish_reason"] = choice["finish_reason"]
        for key, values in (choice["logprobs"] or {}).items():
            found["logprobs"] = found["logprobs"] or {}
            found["logprobs"].setdefault(key, []).extend(values)
    return [choices[index] for index in sorted(choices)], chunks[-1]["usage"]


REQUESTS = {
    "plain": {"max_tokens": 12},
    "OpenAI's limit": {},
    "log-probabilities": {"logprobs": 2, "max_tokens": 8},
    "echo": {"echo": True, "max_tokens": 8},
    "echo, scored": {"echo": True, "logprobs": 1, "max_tokens": 4},
    "the prompt alone, scored": {"echo": True, "logprobs": 0, "max_tokens": 0},
    "several": {"prompt": ["One", "The people"], "n": 2, "seed": 3, "temperature": 1.0, "max_tokens": 6},
    "tokens": {"prompt": [[5, 6, 7], [8, 9]], "echo": True, "logprobs": 0, "max_tokens": 2},
    "gpt-oss": {"model": GPT_OSS, "prompt": "banjo: a kind", "max_tokens": 6, "echo": True, "logprobs": 1},
}


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("name", REQUESTS)
def test_streamed_is_whole(demos, name):
    body = REQUESTS[name]
    answer = ask(demos, **body)
    choices, usage = streamed(demos, **body)
    assert choices == answer["choices"]
    for each in (usage, answer["usage"]):
        each["prompt_tokens_details"].pop("cached_tokens")
    assert usage == answer["usage"]


def test_it_is_the_text_of_the_engine(demos):
    model = demos[1].models[OPENELM]
    answer = ask(demos, max_tokens=17)
    assert answer["choices"][0]["text"] == model.engine.submit(TEXT, max_tokens=17, raw=True).text()
    assert ask(demos)["usage"]["completion_tokens"] == 16
    assert ask(demos, prompt=model.tokenizer.encode_prompt(TEXT), max_tokens=17)["choices"] == answer["choices"]


@pytest.mark.parametrize("name", [OPENELM, GPT_OSS])
def test_the_prompt_s_log_probabilities_are_the_model_s(demos, name):
    model = demos[1].models[name]
    tokens = model.tokenizer.encode_prompt(TEXT)
    choice = ask(demos, model=name, prompt=tokens, echo=True, logprobs=1, max_tokens=1, n=2)["choices"][1]
    scores = choice["logprobs"]
    logits = model.model(mx.array([tokens]))[0].astype(mx.float32)
    wanted = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    for place, token in enumerate(tokens[1:], 1):
        assert scores["token_logprobs"][place] == pytest.approx(wanted[place - 1, token].item(), abs=1e-5)
        best = max(scores["top_logprobs"][place].values())
        assert best == pytest.approx(mx.max(wanted[place - 1]).item(), abs=1e-5)


def test_an_echo_s_tokens_are_where_its_text_is(demos):
    choice = ask(demos, echo=True, logprobs=0, max_tokens=4)["choices"][0]
    scores, text = choice["logprobs"], choice["text"]
    assert text.startswith(TEXT)
    assert "".join(scores["tokens"]).lstrip() == text
    assert ask(demos, echo=True, max_tokens=0)["choices"][0]["text"] == TEXT
    assert ask(demos, echo=True, max_tokens=0)["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": "the end."}, "suffix"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99_999_999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 129}, "n"),
        ({"echo": "yes"}, "echo"),
    ],
    ids=str,
)
def test_what_is_wrong_is_a_400_that_names_the_field(demos, body, param):
    body = {"model": OPENELM, "prompt": TEXT, **body}
    answer = demos[0].post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
