"""An engine under a memory limit that not all of its requests have room in: nobody fails, and the limit holds."""

import dataclasses
import gc
import threading

import mlx.core as mx
import pytest
from conftest import random_model
from test_decoding_budget import plan_with
from test_engine_many import prompt_of, seen
from test_engine_pressure import read_all

import openelm_mlx as om
from openelm_mlx.engine import memory
from openelm_mlx.errors import MemoryLimitError
from openelm_mlx.runtime import runtime_of

ENDLESS = {2: -1e9}


@pytest.fixture
def model():
    model = random_model(context_length=4096)
    mx.synchronize()
    return model


def kv(model, places):
    return model.spec.kv_cache_bytes(places, itemsize=4)


def requests_of(lengths, max_tokens):
    kinds = [
        {},
        {"sampling": om.SamplingParams(temperature=1.1, seed=3, logit_bias=ENDLESS)},
        {"sampling": om.SamplingParams(repetition_penalty=1.3, logit_bias=ENDLESS)},
        {"draft": om.PromptLookup(ngram=1), "sampling": om.SamplingParams(logit_bias=ENDLESS)},
    ]
    greedy = {"sampling": om.SamplingParams(logit_bias=ENDLESS)}
    return [
        (prompt_of(length, at % 5), {"max_tokens": max_tokens, **greedy, **kinds[at % len(kinds)]})
        for at, length in enumerate(lengths)
    ]


def spied(engine):
    """How often somebody has given way, and who was the oldest then."""
    life, given = engine._runner.life, []
    real = life.let_youngest_give_way

    def let_give_way(finish_host_work):
        oldest = min(each.job.number for each in engine._scheduler.running())
        has = real(finish_host_work)
        if has:
            given.append(oldest)
            assert oldest in [each.job.number for each in engine._scheduler.running()]
        return has

    life.let_youngest_give_way = let_give_way
    return given


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "places"),
    [
        ((180, 190, 170), 110, 1485),
        pytest.param((40, 400, 60, 30), 230, 1900, marks=pytest.mark.slow),
    ],
)
def test_nobody_fails_where_each_has_room_alone(model, monkeypatch, lengths, max_tokens, places):
    monkeypatch.setattr(memory, "ADMITTED_TOKENS", 0)  # admitted early, so that it gets tight
    requests = requests_of(lengths, max_tokens)
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    gc.collect()  # what other tests left behind would be room that the plan does not know of
    mx.clear_cache()
    runtime_of(model).plan = dataclasses.replace(plan_with(model, kv(model, places)), prefill_chunk=64)
    for _ in range(5):  # what a pass is just using may keep the last one out until another has ended
        with om.Engine(model, max_running=8) as engine:
            given = spied(engine)
            admit, all_are_there = engine._runner.life.admit, threading.Event()
            engine._runner.life.admit = lambda admit=admit, there=all_are_there: admit() if there.is_set() else None
            handles = [engine.submit(prompt, **options) for prompt, options in requests]
            all_are_there.set()
            found = read_all(handles)
            assert engine._runner.memory.held_bytes == 0
        assert found == alone
        if given:
            break
    assert given


def test_kept_prefixes_give_way_before_requests_do(model):
    store = om.PrefixCache()
    runtime_of(model).plan = dataclasses.replace(plan_with(model, kv(model, 256 * 7)), prefill_chunk=64)
    for seed in range(4):
        list(om.stream_generate(model, None, prompt_of(200, seed + 10), max_tokens=2, prefix_cache=store))
    assert len(store) == 4
    requests = requests_of((100, 100, 100), 60)
    with om.Engine(model, max_running=8) as engine:
        given = spied(engine)
        found = read_all([engine.submit(prompt, prefix_cache=store, **options) for prompt, options in requests])
    assert [len(each) for each in found] == [60] * 3
    assert not given
    assert len(store) < 7


def test_a_request_that_can_never_fit_is_told_what_would(model):
    runtime_of(model).plan = dataclasses.replace(plan_with(model, kv(model, 700)), prefill_chunk=64)
    with om.Engine(model) as engine:
        first = engine.submit(prompt_of(100), max_tokens=200, sampling=om.SamplingParams(logit_bias=ENDLESS))
        with pytest.raises(MemoryLimitError, match=r"can never fit into the memory.*or raise memory_limit"):
            engine.submit(prompt_of(900), max_tokens=100)
        assert len(list(first)) == 200
