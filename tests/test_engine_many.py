"""Many requests at once: each gets, bit for bit, the answer that it gets alone."""

import asyncio
import gc
import os
import random
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, random_model
from short_demos import short_demo
from slots_in_place import slots_in_place

import openelm_mlx as om
from openelm_mlx.decoding.pieces import SlotPieces, forget_pieces
from openelm_mlx.engine.active import Pending
from openelm_mlx.engine.flat_pass import joined_tokens
from openelm_mlx.errors import EngineClosedError, EngineFullError, MemoryLimitError, PromptError, SettingError

WINDOW = 16  # of the gpt-oss fixture's sliding layers


@pytest.fixture(scope="module")
def models():
    return {"openelm": random_model(context_length=256), "gpt_oss": load_fixture(FIXTURES / "gpt_oss_tiny")}


@pytest.fixture(scope="module")
def demo():
    return om.load(short_demo("demo-openelm"), dtype="float32")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, length).tolist()


def seen(chunks):
    """All of an answer that must not depend on its company."""
    return [(c.token, c.text, c.logprob, c.top_logprobs, c.finish_reason) for c in chunks]


def random_request(draw: random.Random, family: str):
    options = {"max_tokens": draw.choice([1, 2, 5, 12, 30]), "logprobs": draw.choice([None, 0, 2])}
    kind = draw.choice(["greedy", "greedy", "sampled", "filtered", "penalized", "biased", "8 bits", "window", "chunks"])
    seed = draw.randrange(100)
    if kind == "sampled":
        options["sampling"] = om.SamplingParams(temperature=1.3, seed=seed)
    elif kind == "filtered":
        options["sampling"] = om.SamplingParams(temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, seed=seed)
    elif kind == "penalized":
        options["sampling"] = om.SamplingParams(
            temperature=draw.choice([0.0, 1.0]), repetition_penalty=1.4, frequency_penalty=0.3, seed=seed
        )
    elif kind == "biased":
        options["sampling"] = om.SamplingParams(logit_bias={7: 3.0, 9: -float("inf")})
    elif kind == "8 bits" and family == "gpt_oss":
        options["kv_bits"] = 8
    elif kind == "window" and family == "openelm":
        options["sliding_window"] = 12
    elif kind == "chunks":
        options["prefill_chunk"] = draw.choice([1, 2, 7, 16])
    return prompt_of(draw.choice([1, 2, 3, 9, 17, 40, 90]), draw.randrange(6)), options


@pytest.mark.slow
@pytest.mark.parametrize("family", ["openelm", "gpt_oss"])
@pytest.mark.parametrize("seed", range(4))
def test_no_answer_depends_on_its_company(models, family, seed):
    """Any mixture, order of arrival, cancellation and chunk size, past the window, with seeds and penalties."""
    model, draw = models[family], random.Random(seed)
    requests = [random_request(draw, family) for _ in range(14)]
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    gone = {draw.randrange(len(requests)) for _ in range(3)}
    with om.Engine(model, max_running=draw.choice([2, 5, 32])) as engine:
        engine._scheduler.pace.longest = draw.choice([2, 5, 16, 2**20])
        handles = []
        for prompt, options in requests:
            handles.append(engine.submit(prompt, **options))
            if draw.random() < 0.3:
                time.sleep(0.01)
        for at in gone:
            handles[at].cancel()
        for at, handle in enumerate(handles):
            found = seen(handle)
            assert found == alone[at][: len(found)]
            assert at in gone or len(found) == len(alone[at])
        assert engine.num_running == engine.num_waiting == 0


@pytest.mark.slow
def test_constraints_and_drafts_in_one_batch(demo):
    model, tokenizer = demo
    requests = [
        ("A banjo is", {"regex": "[a-z ]{5,20}"}),
        ("A river is", {}),
        ("The color of the sky is the color of the sky is", {"draft": om.PromptLookup(ngram=1)}),
        ("An animal", {"schema": {"enum": ["cat", "dog"]}}),
        ("A house is", {"sampling": om.SamplingParams(temperature=0.9, seed=4)}),
        ("A list of lists of", {"regex": "(one|two)( three)*", "draft": om.PromptLookup(ngram=1)}),
    ]
    requests = [(prompt, {"max_tokens": 24, "logprobs": 1, **options}) for prompt, options in requests]
    alone = [seen(om.stream_generate(model, tokenizer, prompt, **options)) for prompt, options in requests]
    with om.Engine(model, tokenizer) as engine:
        together = [seen(handle) for handle in [engine.submit(prompt, **options) for prompt, options in requests]]
    assert together == alone


@pytest.mark.slow
def test_a_list_of_prompts_gives_a_list_of_answers(demo):
    model, tokenizer = demo
    prompts = ["What is a banjo?", "What is a river?", "What is a cat?"]
    together = om.generate(model, tokenizer, prompts, max_tokens=8)
    assert together == [om.generate(model, tokenizer, prompt, max_tokens=8) for prompt in prompts]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    assert om.generate(model, tokenizer, ids, max_tokens=3) == [
        om.generate(model, tokenizer, each, max_tokens=3) for each in ids
    ]


@pytest.mark.slow
def test_a_prompt_that_several_share_is_computed_once(models):
    model, prompt = models["gpt_oss"], prompt_of(60)
    expected = [
        seen(om.stream_generate(model, None, prompt, max_tokens=9, sampling=om.SamplingParams(temperature=1, seed=s)))
        for s in range(5, 9)
    ]
    with om.Engine(model) as engine:
        blocker = engine.submit(prompt_of(5, 9), max_tokens=60)
        next(blocker)
        several = engine.submit_several(prompt, 4, max_tokens=9, sampling=om.SamplingParams(temperature=1, seed=5))
        assert [seen(handle) for handle in several] == expected
        cached = [handle.statistics.cached_tokens for handle in several]
    assert sorted(cached) == [0, 60, 60, 60]


def test_who_decodes_has_steps_of_its_own_while_prompts_come_and_come(models):
    """Else it would never be known what a step takes without a chunk, and chunks would stay short."""
    with om.Engine(models["openelm"]) as engine:
        pace, steps = engine._scheduler.pace, []
        pace.longest, learn = 8, pace.step_took

        def step_took(seconds, chunk_length, is_alone=False):
            steps.append((bool(engine._scheduler.prompts), chunk_length > 0))
            learn(seconds, chunk_length, is_alone)

        pace.step_took = step_took
        blocker = engine.submit(prompt_of(5, 9), max_tokens=400)
        next(blocker)
        for handle in [engine.submit(prompt_of(60, seed), max_tokens=2) for seed in range(3)]:
            list(handle)
        blocker.cancel()
    assert steps.count((True, True)) > 10
    assert 2 <= steps.count((True, False)) <= 20


@pytest.mark.slow
def test_whoever_waits_for_a_prompt_goes_on_when_its_first_asker_leaves(models):
    model, prompt = models["gpt_oss"], prompt_of(90)
    expected = seen(om.stream_generate(model, None, prompt, max_tokens=5))
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 8
        blocker = engine.submit(prompt_of(5, 9), max_tokens=80)
        next(blocker)
        first, second, third = engine.submit_several(prompt, 3, max_tokens=5)
        first.cancel()
        third.cancel()
        assert seen(second) == expected


def test_chunks_in_asyncio(models):
    model = models["openelm"]
    prompts = [prompt_of(9, seed) for seed in range(5)]
    expected = [seen(om.stream_generate(model, None, prompt, max_tokens=7)) for prompt in prompts]

    async def ask(engine, prompt):
        return [chunk async for chunk in engine.submit(prompt, max_tokens=7)]

    async def ask_all():
        with om.Engine(model) as engine:
            return await asyncio.gather(*(ask(engine, prompt) for prompt in prompts))

    assert [seen(chunks) for chunks in asyncio.run(ask_all())] == expected


def test_statistics_say_what_a_request_took(models):
    with om.Engine(models["openelm"], max_running=1) as engine:
        first, second = (engine.submit(prompt_of(9, seed), max_tokens=20) for seed in range(2))
        assert first.statistics is None
        chunks = list(first)
        assert chunks[-1].statistics == first.statistics
        assert first.is_done
        list(second)
    assert second.statistics.time_queued > first.statistics.time_queued >= 0
    assert second.statistics.completion_tokens == 20
    assert second.statistics.time_to_first_token > 0


def test_a_prefix_cache_serves_requests_of_an_engine(models):
    model, store = models["gpt_oss"], om.PrefixCache()
    prompt = prompt_of(40)
    longer = [*prompt, *prompt_of(9, 3)]
    expected = seen(om.stream_generate(model, None, longer, max_tokens=6))
    with om.Engine(model) as engine:
        list(engine.submit(prompt, max_tokens=6, prefix_cache=store))
        again = engine.submit(longer, max_tokens=6, prefix_cache=store)
        others = [engine.submit(prompt_of(20, seed), max_tokens=8, prefix_cache=store) for seed in range(3)]
        tokens = [each[0] for each in seen(again)]
        for other in others:
            list(other)
    assert tokens == [each[0] for each in expected]
    assert again.statistics.cached_tokens >= 39
    assert len(store) == 4  # the first went on in the second


def test_a_request_that_raises_ends_alone(models, monkeypatch):
    model = models["openelm"]
    prompts = [prompt_of(9, seed) for seed in range(4)]
    expected = [seen(om.stream_generate(model, None, prompt, max_tokens=12)) for prompt in prompts]
    from openelm_mlx.engine.sequence import Sequence

    accept = Sequence.accept

    def fails_once(self, token, *scores):
        if self.request.prompt_tokens == prompts[1] and len(self.tokens) == 5:
            raise SettingError("this one broke")
        return accept(self, token, *scores)

    monkeypatch.setattr(Sequence, "accept", fails_once)
    with om.Engine(model) as engine:
        handles = [engine.submit(prompt, max_tokens=12) for prompt in prompts]
        with pytest.raises(SettingError, match="this one broke"):
            list(handles[1])
        assert [seen(handles[i]) for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


def test_a_failed_allocation_ends_who_runs_and_the_next_request_works(models, monkeypatch):
    model = models["openelm"]
    expected = seen(om.stream_generate(model, None, prompt_of(9), max_tokens=12))
    from openelm_mlx.engine import runner

    compute, fails = runner.compute, threading.Event()

    def no_memory(model, step, bank, in_slots, parts):
        if fails.is_set() and len(parts) > 1:
            fails.clear()
            raise RuntimeError("[malloc_or_wait] Unable to allocate 123 bytes.")
        return compute(model, step, bank, in_slots, parts)

    monkeypatch.setattr(runner, "compute", no_memory)
    with om.Engine(model) as engine:
        handles = [engine.submit(prompt_of(9, seed), max_tokens=100) for seed in range(3)]
        for handle in handles:
            next(handle)
        fails.set()
        for handle in handles:
            with pytest.raises(MemoryLimitError, match="memory ran out"):
                list(handle)
        assert seen(engine.submit(prompt_of(9), max_tokens=12)) == expected


def test_bad_requests_are_refused_before_they_wait(models):
    with om.Engine(models["openelm"], max_running=1, max_waiting=1) as engine:
        with pytest.raises(PromptError, match="empty"):
            engine.submit([])
        with pytest.raises(SettingError, match="max_tokens"):
            engine.submit([5], max_tokens=0)
        with pytest.raises(SettingError, match=r"engine\.submit"):
            engine.submit([5], max_token=3)
        handles = [engine.submit([5, 6], max_tokens=100) for _ in range(2)]
        with pytest.raises(EngineFullError, match="max_running=1, max_waiting=1"):
            engine.submit([5], max_tokens=2)
        for handle in handles:
            handle.cancel()
    with pytest.raises(EngineClosedError):
        engine.submit([5], max_tokens=2)


def test_what_is_left_is_told_when_an_engine_is_closed(models):
    with om.Engine(models["openelm"], max_running=1) as engine:
        handles = [engine.submit([5, 6], max_tokens=200) for _ in range(3)]
        next(handles[0])
    for handle in handles:
        with pytest.raises(EngineClosedError):
            list(handle)
    engine.close()


@pytest.mark.slow
def test_requests_leave_nothing_behind(models):
    model = models["gpt_oss"]

    def in_use():
        """Bytes, once the engine's thread has nothing to do any more."""
        found = -1
        while found != (found := mx.get_active_memory()) or engine.num_running:
            time.sleep(0.05)
            gc.collect()
        return found

    with om.Engine(model) as engine:
        threads, before = 0, [0]
        # What is made once for so many rows, and kept for all requests, is there after a few rounds.
        while len(before) < 12 and before[-3:] != [before[-1]] * 3:
            handles = [engine.submit(prompt_of(3 + seed, seed), max_tokens=5) for seed in range(25)]
            for handle in handles[len(before) :: 7]:
                handle.cancel()
            for handle in handles:
                list(handle)
            # The tables of the last pass's positions stay: always the same ones.
            list(engine.submit([5, 6], max_tokens=3))
            before.append(in_use())
            threads = threads or threading.active_count()
        assert before[-3:] == [before[-1]] * 3
        assert threading.active_count() == threads
        assert engine._runner.memory.held_bytes == 0


def test_many_requests_leave_no_byte_behind(models):
    """2,000 in CI, where OPENELM_MLX_LONG is set."""
    a_round = 500 if os.environ.get("OPENELM_MLX_LONG") else 50
    model, draw = models["openelm"], random.Random(0)
    store = om.PrefixCache(max_bytes=2**16)
    kinds = [random_request(draw, "openelm") for _ in range(12)]
    kinds = [(prompt[:17], {**options, "max_tokens": min(options["max_tokens"], 5)}) for prompt, options in kinds]
    kinds.append(([5, 6, 7, 8], {"max_tokens": 4, "draft": om.PromptLookup(ngram=1)}))
    kinds.append((prompt_of(16, 9), {"max_tokens": 2, "prefix_cache": store}))
    alone = [
        [each[0] for each in seen(om.stream_generate(model, None, prompt, **options))] for prompt, options in kinds
    ]
    watched = weakref.WeakSet()

    def some(engine, count):
        waiting = []
        for _ in range(count):
            kind = draw.randrange(len(kinds))
            prompt, options = kinds[kind]
            handle = engine.submit(prompt, **options)
            watched.add(handle)
            has_left = draw.random() < 0.2
            if has_left:
                handle.cancel()
            waiting.append((handle, kind, has_left))
        for handle, kind, has_left in waiting:
            found = [chunk.token for chunk in handle]
            assert found == alone[kind] or (has_left and found == alone[kind][: len(found)])

    def in_use(engine):
        while engine.num_running:
            time.sleep(0.01)
        list(engine.submit([5, 6], max_tokens=3))  # the tables of the last pass stay: always the same ones
        while engine.num_running:
            time.sleep(0.01)
        store.clear()
        gc.collect()
        # Those of tests before this one end at any time.
        started = sum(each not in threads_before for each in threading.enumerate())
        return mx.get_active_memory(), started, engine._runner.memory.held_bytes

    threads_before = set(threading.enumerate())
    with om.Engine(model, max_running=24, max_waiting=2000) as engine:
        counts = []
        for _ in range(4):
            some(engine, a_round)
            counts.append(in_use(engine))
        assert not watched
        assert counts[-1][1:] == (counts[0][1], 0)
        assert counts[-1][0] <= counts[0][0] + 2**14, counts


def test_a_handle_that_is_dropped_cancels_its_request(models):
    with om.Engine(models["openelm"], max_running=1) as engine:
        handle = engine.submit([5, 6], max_tokens=200)
        next(handle)
        del handle
        assert len(list(engine.submit([7], max_tokens=2))) == 2
        assert engine.num_running == 0


def test_tokens_that_were_chosen_together_stay_one_array():
    """Where nobody came or went, the next pass is given the last choice as it is."""
    chosen = mx.array([7, 8, 9])
    requests = [SimpleNamespace(pending=Pending(chosen, at)) for at in range(3)]
    assert joined_tokens(requests, []) is chosen
    assert joined_tokens(requests[::-1], []).tolist() == [9, 8, 7]
    assert joined_tokens(requests[:2], []).tolist() == [7, 8]
    assert joined_tokens([None, *requests[:2]], []).tolist()[1:] == [7, 8]
    other = SimpleNamespace(pending=Pending(mx.array([1, 2, 3]), 1))
    assert joined_tokens([requests[0], other, requests[2]], []).tolist() == [7, 2, 9]


@pytest.fixture(params=["as on Metal", "as on CUDA", "in place"])
def with_slots(models, monkeypatch, request):
    """The models as on a GPU, where decoding requests share buffers."""
    is_cuda = request.param != "as on Metal"
    if request.param == "in place":
        slots_in_place(monkeypatch)
    for model in models.values():
        choices = replace(
            model.choices,
            slots=True,
            compiled_step=is_cuda,
            slot_kernel=is_cuda,
            prompts_in_slots=is_cuda,
            prompt_products_to=30_000 if is_cuda else 0,  # not for the longest chunks
            pads_rows=is_cuda,
        )
        monkeypatch.setattr(model, "choices", choices)
        forget_pieces(model)
    monkeypatch.setattr(mx, "compile", lambda function: function)  # which would call the machine's compiler
    yield models
    for model in models.values():
        forget_pieces(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["openelm", "gpt_oss"])
@pytest.mark.parametrize("seed", range(2))
def test_slots_give_the_tokens_of_caches_apart(with_slots, family, seed):
    """The two forms of attention in a batch: what differs is the order in which a row's keys are summed."""
    model, draw = with_slots[family], random.Random(seed + 100)
    requests = [random_request(draw, family) for _ in range(14)]
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    store = om.PrefixCache()
    used = 0
    with om.Engine(model, max_running=draw.choice([5, 32])) as engine:
        engine._scheduler.pace.longest = draw.choice([5, 2**20])
        handles = [engine.submit(prompt, prefix_cache=store, **options) for prompt, options in requests]
        for at, handle in enumerate(handles):
            found = []
            for chunk in handle:
                found.append(chunk)
                used = max(used, len(engine._runner.bank))
            assert [each[0] for each in seen(found)] == [each[0] for each in alone[at]]
            for mine, theirs in zip(seen(found), alone[at], strict=True):
                assert mine[2] == pytest.approx(theirs[2], abs=2e-4)
        assert len(engine._runner.bank) == 0
        assert engine._runner.memory.held_bytes == 0
    assert used >= 2
    # What was kept can be gone on with.
    prompt, options = requests[0]
    again = seen(om.stream_generate(model, None, prompt, prefix_cache=store, **options))
    assert [each[0] for each in again] == [each[0] for each in alone[0]]


@pytest.mark.slow
def test_a_prompt_comes_in_beside_slots(with_slots, monkeypatch):
    model, in_pieces = with_slots["gpt_oss"], []

    call = SlotPieces.__call__

    def noted(*arguments):
        in_pieces.append(arguments)
        return call(*arguments)

    monkeypatch.setattr(SlotPieces, "__call__", noted)
    prompts = [prompt_of(9, 1), prompt_of(30, 2), prompt_of(200, 3)]
    alone = [seen(om.stream_generate(model, None, prompt, max_tokens=40)) for prompt in prompts]
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 16
        first, second = (engine.submit(prompt, max_tokens=40) for prompt in prompts[:2])
        next(first), next(second)
        third = engine.submit(prompts[2], max_tokens=40)
        rest = [seen(handle) for handle in (first, second, third)]
    assert [[each[0] for each in found] for found in rest] == [
        [each[0] for each in found][skip:] for found, skip in zip(alone, (1, 1, 0), strict=True)
    ]
    assert bool(in_pieces) == model.choices.slot_kernel
