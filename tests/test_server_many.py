"""Sixty-four clients at once, of which many leave when they like: nobody's answer changes, and nothing is left behind."""

import asyncio
import gc
import json
import os
import random
import threading
import time
from urllib.parse import urlsplit

import mlx.core as mx
import pytest
from server_app import served_demos

import openelm_mlx as om
from openelm_mlx.server.wire import chat

MODEL = "demo-gpt-oss"
NUM_CLIENTS, NUM_TOKENS, ROUNDS = 64, 8, 3
WORDS = ["banjo", "horse", "cello", "river", "tower", "lamp"]


def chat_of(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is a {word}?"}]


@pytest.fixture(scope="module")
def demo():
    with served_demos(chat.routes(), MODEL, max_running=16) as (address, registry):
        yield address, registry.models[MODEL]


async def client(address: str, word: str, seed: int) -> str | None:
    """What came of it: the text, or None where the client has left."""
    draw = random.Random(seed)
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = {"model": MODEL, "messages": chat_of(word), "stream": True, "temperature": 0, "max_tokens": NUM_TOKENS}
    if draw.random() < 0.3:  # requests of another kind among them
        body |= {"logprobs": True, "seed": 3, "frequency_penalty": 1e-9}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    leaves_after = draw.randrange(0, 3000) if draw.random() < 0.5 else None
    text, length = "", 0
    try:
        await asyncio.sleep(draw.random() * 0.2)
        if leaves_after == 0 or draw.random() < 0.1:
            return None
        while line := await reader.readline():
            length += len(line)
            if leaves_after is not None and length > leaves_after:
                return None
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                text += delta.get("reasoning", "") + delta.get("content", "")
            if line == b"data: [DONE]\n":
                return text
        raise AssertionError("the answer has no end")
    finally:
        writer.close()


def left(model) -> tuple[int, int, int]:
    """Threads, open files, and bytes of MLX's in use."""
    end = time.monotonic() + 60
    while model.engine.num_running or model.engine.num_waiting or model.num_leases:
        assert time.monotonic() < end, "something is left"
        time.sleep(0.01)
    model.prefix_cache.clear()
    gc.collect()
    mx.clear_cache()
    return threading.active_count(), len(os.listdir("/dev/fd")), mx.get_active_memory()


@pytest.mark.slow
def test_sixty_four_clients_of_which_many_leave(demo):
    address, model = demo
    alone = {}
    for word in WORDS:
        chunks = list(model.engine.submit(chat_of(word), max_tokens=NUM_TOKENS, sampling=om.SamplingParams()))
        alone[word] = "".join(chunk.reasoning + chunk.text for chunk in chunks)

    async def all_clients(number):
        words = [WORDS[at % len(WORDS)] for at in range(NUM_CLIENTS)]
        found = await asyncio.gather(
            *(client(address, word, number * NUM_CLIENTS + at) for at, word in enumerate(words))
        )
        return [(word, text) for word, text in zip(words, found, strict=True) if text is not None]

    counts = []
    for number in range(ROUNDS):
        finished = asyncio.run(all_clients(number))
        assert 10 < len(finished) < NUM_CLIENTS
        for word, text in finished:
            assert text == alone[word]
        counts.append(left(model))
        # The last connections may still be closing, and a thread that waited for work ends when it gets none.
        end = time.monotonic() + 30
        while any(now > first for now, first in zip(counts[-1][:2], counts[0][:2], strict=True)):
            assert time.monotonic() < end, counts
            time.sleep(0.05)
            counts[-1] = left(model)
    active = [count[2] for count in counts]
    assert max(active) - active[0] <= 64 << 10, counts
