"""Clients that go away, or do not read: their rows are free at once, and nobody else waits for them."""

import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from httpx2 import Client
from server_app import served_demos

import openelm_mlx as om
from openelm_mlx.server.wire import chat

MODEL = "demo-gpt-oss"
LONG = {"max_tokens": 900, "temperature": 0, "logit_bias": {}}
QUESTION = [{"role": "user", "content": "What is a banjo?"}]


@pytest.fixture(scope="module")
def demo():
    with served_demos(chat.routes(), MODEL, max_running=2) as (address, registry):
        model = registry.models[MODEL]
        stops = [
            *model.tokenizer.eos_tokens,
            *map(model.tokenizer.special_tokens.get, ("<|return|>", "<|call|>", "<|end|>")),
        ]
        LONG["logit_bias"] = {str(token): -100 for token in stops}  # it never ends by itself
        submitted = []
        submit = model.engine.submit

        def noting(*args, **options):
            submitted.append(submit(*args, **options))
            return submitted[-1]

        model.engine.submit = noting
        yield address, model, submitted


@pytest.fixture(autouse=True)
def nothing_is_left(demo):
    yield
    _, model, submitted = demo
    wait_for(lambda: model.num_leases == 0)
    wait_for(lambda: model.engine.num_running == model.engine.num_waiting == 0)
    submitted.clear()


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def connection(address: str, receive_buffer: int | None = None, **body) -> socket.socket:
    """A connection with a request on its way."""
    parts = urlsplit(address)
    found = socket.socket()
    if receive_buffer is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    found.connect((parts.hostname, parts.port))
    content = json.dumps({"model": MODEL, "messages": QUESTION, **LONG, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    found.sendall(head.encode() + content)
    return found


def begun(demo, count):
    """Until so many requests have been submitted: their handles."""
    wait_for(lambda: len(demo[2]) >= count)
    return demo[2][:count]


@pytest.mark.parametrize("stream", [True, False])
def test_while_it_is_written(demo, stream):
    client = connection(demo[0], stream=stream)
    [handle] = begun(demo, 1)
    if stream:
        assert b"200 OK" in client.recv(4096)
    wait_for(lambda: handle.num_prompt_tokens_done == handle.num_prompt_tokens)
    client.close()
    wait_for(lambda: handle.is_done)
    assert handle.statistics is None  # it was given up, and did not come to its end


@pytest.mark.parametrize("stream", [True, False])
def test_while_its_prompt_is_computed(demo, stream):
    words = [{"role": "user", "content": "banjo " * 280}]
    client = connection(demo[0], stream=stream, messages=words)
    [handle] = begun(demo, 1)
    wait_for(lambda: handle.num_prompt_tokens_done > 0)
    client.close()
    wait_for(lambda: handle.is_done)
    assert handle.num_prompt_tokens_done < handle.num_prompt_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_in_the_queue(demo, stream):
    _, model, _ = demo
    running = [connection(demo[0], stream=True) for _ in range(2)]
    first = begun(demo, 2)
    wait_for(lambda: model.engine.num_running == 2)
    waiting = connection(demo[0], stream=stream)
    [*_, handle] = begun(demo, 3)
    assert model.engine.place_in_queue(handle) == 0
    waiting.close()
    wait_for(lambda: handle.is_done)
    assert handle.num_prompt_tokens_done == 0
    assert not any(each.is_done for each in first)
    for each in running:
        each.close()


def test_who_waits_is_told_its_place_and_how_far_its_prompt_is(demo):
    running = [connection(demo[0], stream=True) for _ in range(2)]
    begun(demo, 2)
    wait_for(lambda: demo[1].engine.num_running == 2)
    waiting = connection(demo[0], stream=True)
    begun(demo, 3)
    text = b""
    while b": in the queue, 0 before this one" not in text:
        text += waiting.recv(4096)
    for each in running:
        each.close()
    while b'"reasoning"' not in text:
        text += waiting.recv(4096)
    waiting.close()


def test_an_engine_s_row_is_free_within_one_step_of_the_cancellation(demo):
    engine = demo[1].engine
    step, steps = engine._runner.step, []

    def counting():
        if handle.channel.is_cancelled and not handle.is_done:
            steps.append(1)  # one that began afterwards
        step()

    handle = engine.submit(QUESTION, max_tokens=900, sampling=om.SamplingParams(logit_bias={0: -1.0}))
    next(iter(handle))
    engine._runner.step = counting
    try:
        handle.cancel()
        wait_for(lambda: engine.num_running == 0)
    finally:
        engine._runner.step = step
    assert len(steps) <= 1


@pytest.mark.slow
def test_who_does_not_read_holds_nobody_up(demo):
    """Its answer is written to the end, and it can read all of it later."""
    address, model, _ = demo
    slow = connection(address, 4096, stream=True, logprobs=True, top_logprobs=20, max_tokens=300)
    [handle] = begun(demo, 1)
    with Client(base_url=address, timeout=300) as client:
        for _ in range(2):
            body = {"model": MODEL, "messages": QUESTION, "temperature": 0}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    wait_for(lambda: handle.is_done)
    assert handle.statistics is not None
    text = b""
    while b"[DONE]" not in text:
        text += slow.recv(1 << 16)
    slow.close()
    lines = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: {")]
    assert len(lines) > 10
    assert lines[-1]["choices"][0]["finish_reason"] == "length"
    assert model.engine.num_running == 0
