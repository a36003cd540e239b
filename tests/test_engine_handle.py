"""A request's handle: several readers, slow readers, cancelling at any moment, in threads and in asyncio."""

import asyncio
import gc
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import FIXTURES, in_threads, load_fixture, random_model
from test_engine_many import prompt_of, seen

import openelm_mlx as om
from openelm_mlx.engine.handle import Channel, Handle, wake_readers
from openelm_mlx.engine.sequence import Chunk
from openelm_mlx.errors import SettingError


@pytest.fixture(scope="module")
def model():
    return random_model(context_length=256)


@pytest.fixture(scope="module")
def rings():
    return load_fixture(FIXTURES / "gpt_oss_tiny")


def test_several_readers_share_a_handle_and_all_come_to_its_end(model):
    expected = seen(om.stream_generate(model, None, prompt_of(9), max_tokens=40))
    with om.Engine(model) as engine:
        handle = engine.submit(prompt_of(9), max_tokens=40)
        parts = in_threads(lambda _: seen(handle), 3)
        assert sorted([each for part in parts for each in part], key=str) == sorted(expected, key=str)
        assert list(handle) == []


def test_several_tasks_share_a_handle_and_all_come_to_its_end(model):
    async def read(handle):
        return [chunk async for chunk in handle]

    async def read_all():
        with om.Engine(model) as engine:
            handle = engine.submit(prompt_of(9), max_tokens=40)
            return await asyncio.wait_for(asyncio.gather(*(read(handle) for _ in range(3))), 60)

    assert sum(len(part) for part in asyncio.run(read_all())) == 40


def test_no_wake_up_is_lost():
    """Chunks that come while a task looks for them, and while it goes to sleep."""
    channel = Channel(lambda: None)
    handle, count = Handle(channel), 2_000
    interval = sys.getswitchinterval()

    def write():
        for token in range(count):
            channel.put(Chunk("", token))
            wake_readers([channel])
        channel.end()
        wake_readers([channel])

    async def read():
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        return [chunk.token async for chunk in handle]

    try:
        sys.setswitchinterval(1e-6)
        assert asyncio.run(asyncio.wait_for(read(), 60)) == list(range(count))
    finally:
        sys.setswitchinterval(interval)


def test_a_reader_that_reads_nothing_holds_nobody(model):
    expected = seen(om.stream_generate(model, None, prompt_of(9), max_tokens=100))
    with om.Engine(model) as engine:
        slow = engine.submit(prompt_of(9), max_tokens=100)
        for seed in range(3):
            assert len(list(engine.submit(prompt_of(5, seed), max_tokens=30))) == 30
        while not slow.is_done:
            time.sleep(0.01)
        assert engine.num_running == 0
        assert seen(slow) == expected


@pytest.mark.slow
def test_tasks_that_are_cancelled_give_their_requests_up(model):
    async def ask(engine, seed):
        return [chunk async for chunk in engine.submit(prompt_of(9, seed), max_tokens=200)]

    async def ask_all(engine):
        tasks = [asyncio.create_task(ask(engine, seed)) for seed in range(6)]
        await asyncio.sleep(0.03)
        for task in tasks[:5]:
            task.cancel()
        await asyncio.gather(*tasks[:5], return_exceptions=True)
        return await asyncio.wait_for(tasks[5], 60)

    with om.Engine(model, max_running=3) as engine:
        assert len(asyncio.run(ask_all(engine))) == 200
        gc.collect()
        assert engine.num_running == engine.num_waiting == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_requests_are_given_up_at_any_moment(rings, seed):
    """From any thread, in the queue, in a shared prompt, in the answer, twice, after the end; or the handle is dropped."""
    draw = random.Random(seed)
    prompts = [prompt_of(length, 7) for length in (5, 40, 40, 40, 90, 90)]
    expected = {len(prompt): seen(om.stream_generate(rings, None, prompt, max_tokens=25)) for prompt in prompts}
    with om.Engine(rings, max_running=4) as engine:
        engine._scheduler.pace.longest = draw.choice([4, 2**20])

        def use(thread):
            mine = random.Random(seed * 100 + thread)
            for _ in range(8):
                prompt = mine.choice(prompts)
                handle = engine.submit(prompt, max_tokens=25)
                how = mine.choice(["read", "cancel", "cancel later", "drop", "after the end"])
                if how == "cancel":
                    handle.cancel()
                    handle.cancel()
                elif how == "cancel later":
                    time.sleep(mine.random() * 0.03)
                    handle.cancel()
                elif how == "drop":
                    time.sleep(mine.random() * 0.03)
                    del handle
                    continue
                found = seen(handle)
                handle.cancel()
                assert found == expected[len(prompt)][: len(found)]
                assert how.startswith("cancel") or len(found) == 25
            return True

        assert in_threads(use, 4) == [True] * 4
        while engine.num_running or engine.num_waiting:
            time.sleep(0.01)
        assert engine._runner.memory.held_bytes == 0


def test_two_engines_at_once_and_one_after_the_other(model, rings):
    expected = [seen(om.stream_generate(each, None, prompt_of(9), max_tokens=20)) for each in (model, rings)]
    for _ in range(2):
        with om.Engine(model) as first, om.Engine(rings) as second:
            handles = [engine.submit(prompt_of(9), max_tokens=20) for engine in (first, second) for _ in range(3)]
            assert [seen(handle) for handle in handles] == [expected[0]] * 3 + [expected[1]] * 3


def test_replaced_weights_are_used_by_the_next_request():
    first, second = random_model(context_length=256), random_model(context_length=256, seed=5)
    expected = [seen(om.stream_generate(each, None, prompt_of(9), max_tokens=8)) for each in (first, second)]
    store = om.PrefixCache()
    with om.Engine(first) as engine:
        for weights, wanted in ((None, expected[0]), (second.parameters(), expected[1])):
            if weights is not None:
                first.update(weights)
            handles = [engine.submit(prompt_of(9), max_tokens=8, prefix_cache=store) for _ in range(3)]
            assert [seen(handle) for handle in handles] == [wanted] * 3


def test_what_cannot_go_together_is_refused_before_it_waits(model, rings):
    store = om.PrefixCache()
    list(om.stream_generate(rings, None, prompt_of(9), max_tokens=2, prefix_cache=store))
    other = random_model(vocab_size=500, context_length=256)
    with pytest.raises(SettingError, match="belongs to another model"):
        om.stream_generate(model, None, prompt_of(9), max_tokens=2, prefix_cache=store)
    with om.Engine(model) as engine:
        for told, options in (
            ("belongs to another model", {"prefix_cache": store}),
            ("The draft model has 500 tokens and the model 600", {"draft": om.DraftModel(other)}),
            ("cannot be quantized", {"kv_bits": 8}),
        ):
            with pytest.raises(SettingError, match=told):
                engine.submit(prompt_of(9), max_tokens=2, **options)
        assert engine.num_waiting == engine.num_running == 0


def test_several_answers_take_seeds_up_to_the_largest_and_no_other_sampling(model):
    last = om.SamplingParams(temperature=1.2, seed=2**64 - 1)
    expected = [
        seen(om.stream_generate(model, None, prompt_of(9), max_tokens=5, sampling=last.with_seed(seed)))
        for seed in (2**64 - 1, 0)
    ]
    with om.Engine(model) as engine:
        handles = engine.submit_several(prompt_of(9), 2, max_tokens=5, sampling=last)
        assert [seen(handle) for handle in handles] == expected
        with pytest.raises(SettingError, match="sampling is a int"):
            engine.submit_several(prompt_of(9), 2, sampling=3)


READING = """
import openelm_mlx as om
model, _ = om.load("demo-openelm")
with om.Engine(model, None) as engine:
    handles = [engine.submit([5, 6, 7 + i], max_tokens=400) for i in range(4)]
    next(handles[0])
    print("begun", flush=True)
    while True:
        for handle in handles:
            list(handle)
        handles = [engine.submit([5, 6, 7 + i], max_tokens=400) for i in range(4)]
"""
LISTED = """
import openelm_mlx as om
model, tokenizer = om.load("demo-openelm")
print("begun", flush=True)
while True:
    om.generate(model, tokenizer, ["a river", "a cat"] * 20, max_tokens=200)
"""


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("script", [READING, LISTED], ids=["handles", "a list"])
def test_ctrl_c_while_an_engine_answers(script):
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert told.strip().endswith("KeyboardInterrupt")
    assert "terminate called" not in told
    assert told.count("Traceback") == 1
    assert process.returncode in (-signal.SIGINT, 130)
