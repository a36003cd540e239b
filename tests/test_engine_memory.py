"""Memory of many requests: what each really holds, who gives way, what is refused, and how many run."""

import random
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, random_model
from slots_in_place import use_slots
from test_memory_limits import plan

import openelm_mlx as om
from openelm_mlx.engine.active import ActiveRequest
from openelm_mlx.engine.handle import Channel
from openelm_mlx.engine.lifecycle import Lifecycle
from openelm_mlx.engine.memory import BatchMemory
from openelm_mlx.engine.runner import Runner
from openelm_mlx.engine.single import new_sequence
from openelm_mlx.errors import MemoryLimitError
from openelm_mlx.memory.admission import RequestMemory
from openelm_mlx.models.slots import SlotBank
from openelm_mlx.runtime import runtime_of

ENDLESS = om.SamplingParams(logit_bias={2: -1e9})  # never the end-of-text token


@pytest.fixture
def openelm():
    model = random_model(context_length=2048, head_dim=64)
    mx.eval([layer.prepare_constants() for layer in model.layers])
    mx.synchronize()
    return model


@pytest.fixture(scope="module")
def gpt_oss():
    return load_fixture(FIXTURES / "gpt_oss_tiny")


def give_plan(model, room, chunk=64, **fields):
    """A plan whose budget is `room` bytes more than what is in use now."""
    made = plan(budget=mx.get_active_memory() + room)
    runtime_of(model).plan = replace(made, prefill_chunk=chunk, **fields)


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, 500, length).tolist()


def memory_of(model, bank=None, **options):
    return BatchMemory(model, SlotBank(model.spec) if bank is None else bank, **options)


def active(model, prompt, **options):
    """A request that has just been admitted."""
    request = ActiveRequest(0, new_sequence(model, None, prompt, **options), Channel(lambda: None))
    request.begin(model, None)
    return request


def feed(model, request, length):
    """Let its cache hold so many tokens more."""
    model(mx.array([[5] * length]), request.cache)
    mx.eval([layer.buffers for layer in request.cache])
    request.job.chunks.clear()


def allocated(request):
    return sum(layer.nbytes for layer in request.cache)


def kv_of(model, num_tokens):
    return memory_of(model).admission.kv_bytes(num_tokens)


# Samplers, tokens and the like.
SMALL = 150_000


def room_for(model, *lengths, chunk=64):
    """Bytes that requests of these lengths take beside each other."""
    return memory_of(model).admission.needed(0, [RequestMemory(0, length) for length in lengths], chunk) + SMALL


# --- what they hold ---


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("openelm", {}),
        ("openelm", {"kv_bits": 8}),
        ("openelm", {"sliding_window": 12}),
        ("gpt_oss", {}),
        ("gpt_oss", {"kv_bits": 8}),
    ],
)
@pytest.mark.parametrize("length", [3, 250])
def test_what_a_request_grows_by_is_what_its_caches_then_have(request, family, kind, length):
    model = request.getfixturevalue(family)
    memory = memory_of(model)
    one = active(model, prompt_of(length), max_tokens=200, **kind)
    held = memory._memories.of(one)
    assert held == RequestMemory(0, length + 65, 0, 0, memory._memories.caches_of(one.sequence.request))
    planned = memory.admission.growth([held]).more
    feed(model, one, length)
    memory.reserve(one)
    assert allocated(one) == planned
    assert memory.admission.growth([memory._memories.of(one)]).more == 0


def test_a_fork_is_planned_for_as_what_it_really_comes_to_take(openelm):
    """It shares what it has with the one it came from until it is written to: then all of it is its own."""
    memory = memory_of(openelm)
    leader = active(openelm, prompt_of(300), max_tokens=100)
    feed(openelm, leader, 300)
    follower = ActiveRequest(1, new_sequence(openelm, None, prompt_of(300), max_tokens=100), Channel(lambda: None))
    waiting = memory.admission.growth([memory._memories.of(follower)]).more
    before = mx.get_active_memory()
    follower.begin_with(openelm, None, leader.turn.forked())
    follower.job.chunks.clear()
    assert mx.get_active_memory() - before < 10_000  # of the sampler
    planned = memory.admission.growth([memory._memories.of(follower)]).more
    assert planned == waiting == kv_of(openelm, 365)
    memory.reserve(follower)
    assert allocated(follower) == planned
    assert memory.admission.growth([memory._memories.of(follower)]).more == 0


def test_a_kept_prefix_and_the_snapshots_to_come_are_part_of_what_is_planned(gpt_oss):
    memory, store = memory_of(gpt_oss), om.PrefixCache()
    rings = memory.admission.caches.rings
    assert rings
    new = active(gpt_oss, prompt_of(100), max_tokens=20, prefix_cache=store, prefill_chunk=30)
    assert memory._memories.of(new).snapshots == 4  # after 30, 60, 90 and 99 tokens
    list(om.stream_generate(gpt_oss, None, prompt_of(100), max_tokens=20, prefix_cache=store, prefill_chunk=30))
    longer = [*prompt_of(100)[:95], *prompt_of(50, 7)]
    again = active(gpt_oss, longer, max_tokens=20, prefix_cache=store, prefill_chunk=30)
    assert again.turn.is_fork
    held = memory._memories.of(again)
    assert held.places == 0  # what it has is the store's
    assert memory.admission.growth([held]).more == kv_of(gpt_oss, 165) + held.snapshots * rings


def test_slots_are_counted_whole_and_their_requests_not_twice(gpt_oss):
    bank = SlotBank(gpt_oss.spec, evaluate=mx.eval)
    memory = memory_of(gpt_oss, bank)
    requests = [active(gpt_oss, prompt_of(length), max_tokens=300) for length in (20, 250)]
    for each, length in zip(requests, (20, 250), strict=True):
        feed(gpt_oss, each, length)
    for each in reversed(requests):
        each.join(bank)
    memory.changed(requests)
    assert memory.held_bytes == bank.nbytes
    assert memory.admission.growth([memory._memories.of(each) for each in requests]).more == 0
    # The longest is to have 315 places: the bank grows, for all of its slots.
    growth = memory._growth([memory._memories.of(each) for each in requests])
    assert growth.more == bank.nbytes_with(0, 315, memory._itemsize) - bank.nbytes > 0
    in_use = mx.get_active_memory()
    needed = memory._needed(
        [memory._memories.of(each) for each in requests],
        [memory._memories.row(each) for each in requests],
        2,
    )
    assert needed >= in_use + growth.more + growth.copied
    runtime_of(gpt_oss).plan = replace(plan(budget=needed), prefill_chunk=64)
    try:
        assert memory.can_grow(requests)
        runtime_of(gpt_oss).plan = replace(plan(budget=needed - 1000), prefill_chunk=64)
        assert not memory.can_grow(requests)
    finally:
        runtime_of(gpt_oss).plan = None


def test_what_a_pass_took_beyond_its_plan_counts_until_nobody_runs(openelm):
    give_plan(openelm, 10**9)
    memory = memory_of(openelm)
    one = active(openelm, prompt_of(50), max_tokens=10)
    before = memory._needed([], [memory._memories.row(one)], 1)
    memory.pass_took(10, [(one, 50, 0)])
    assert memory._needed([], [memory._memories.row(one)], 1) == before
    memory.pass_took(50_000_000, [(one, 50, 0)])
    assert memory._needed([], [memory._memories.row(one)], 1) > before + 49_000_000
    memory.changed([])
    assert memory._needed([], [memory._memories.row(one)], 1) == before


def test_freed_buffers_are_kept_within_the_budget(openelm, monkeypatch):
    from openelm_mlx.engine import memory as module

    memory = memory_of(openelm, active_memory=lambda: 1000)
    cached = [500]
    monkeypatch.setattr(module.mx, "get_cache_memory", lambda: cached[0])
    for limit, is_enough in ((None, True), (8000, True), (7999, False), (10**12, True)):
        monkeypatch.setattr(BatchMemory, "limit", property(lambda _, limit=limit: limit))
        assert memory.may_keep_cache() == is_enough
    cached[0] = module.KEPT_IN_CACHE + 1
    assert not memory.may_keep_cache()
    monkeypatch.setattr(BatchMemory, "limit", None)
    assert not memory.may_keep_cache()
    memory = memory_of(openelm, active_memory=lambda: 7600)
    cached[0] = 500
    monkeypatch.setattr(BatchMemory, "limit", 8000)
    assert not memory.may_keep_cache()


# --- who gives way ---


def alone(model, prompts, **options):
    return [[chunk.token for chunk in om.stream_generate(model, None, each, **options)] for each in prompts]


@pytest.fixture
def spied(monkeypatch):
    """How often somebody gave way, and the most that was in use after a step."""
    seen = {"gave way": 0}
    give_way = Lifecycle.let_youngest_give_way

    def spy(self, finish):
        gave = give_way(self, finish)
        seen["gave way"] += gave
        return gave

    monkeypatch.setattr(Lifecycle, "let_youngest_give_way", spy)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("form", ["apart", "slots", "prompts in slots"])
def test_whoever_came_last_gives_way_and_no_request_dies(openelm, monkeypatch, spied, form):
    if form != "apart":
        use_slots(monkeypatch, openelm, form == "prompts in slots")
    prompts = [prompt_of(200 + 9 * seed, seed) for seed in range(4)]
    options = {"max_tokens": 350, "sampling": ENDLESS}
    expected = alone(openelm, prompts, **options)
    mx.clear_cache()
    # All four fit at first, and as long as they become, two do.
    give_plan(openelm, room_for(openelm, 600, 600, 300))
    limit = openelm.plan.budget_bytes
    are_all_there, step = threading.Event(), Runner.step
    # Else the first may end before the others make it tight.
    monkeypatch.setattr(Runner, "step", lambda self: are_all_there.wait() and step(self))
    with om.Engine(openelm, max_running=4) as engine:
        handles = [engine.submit(prompt, **options) for prompt in prompts]
        are_all_there.set()
        assert [[chunk.token for chunk in handle] for handle in handles] == expected
        peaks = [handle.statistics.peak_memory_bytes for handle in handles]
    assert spied["gave way"] > 0
    assert max(peaks) <= limit + SMALL


@pytest.mark.slow
def test_kept_prefixes_give_way_before_any_request_whoever_left_them(openelm, spied):
    """Also those of a store that no running request has to do with."""
    store = om.PrefixCache()
    prompts = [prompt_of(200, seed) for seed in range(3)]
    options = {"max_tokens": 80, "sampling": ENDLESS}
    expected = alone(openelm, prompts, **options)
    give_plan(openelm, room_for(openelm, 300, 300, 300) + kv_of(openelm, 256))
    with om.Engine(openelm, max_running=3) as engine:
        for seed in (7, 8):
            list(engine.submit(prompt_of(260, seed), max_tokens=2, prefix_cache=store))
        assert len(store) == 2
        handles = [engine.submit(prompt, **options) for prompt in prompts]
        assert [[chunk.token for chunk in handle] for handle in handles] == expected
    assert len(store) < 2
    assert spied["gave way"] == 0


# --- what is refused ---


@pytest.mark.slow
def test_what_can_never_fit_is_refused_at_once_with_what_would(openelm):
    give_plan(openelm, room_for(openelm, 700, chunk=16))
    with om.Engine(openelm) as engine:
        with pytest.raises(MemoryLimitError, match="can never fit into the memory, not even alone") as caught:
            engine.submit(prompt_of(300), max_tokens=1500)
        fits = int(str(caught.value).split("max_tokens=")[1].split()[0])
        assert 300 < fits < 1500
        with pytest.raises(MemoryLimitError):
            engine.submit(prompt_of(300), max_tokens=fits + 1)
        assert len(list(engine.submit(prompt_of(300), max_tokens=fits, sampling=ENDLESS))) == fits
        with pytest.raises(MemoryLimitError, match="tokens together fit"):
            engine.submit(prompt_of(1900), max_tokens=10)
        assert engine.num_running == engine.num_waiting == 0


@pytest.mark.slow
def test_nothing_is_refused_merely_because_others_run_now(openelm):
    give_plan(openelm, room_for(openelm, 1000))
    store = om.PrefixCache()
    with om.Engine(openelm) as engine:
        list(engine.submit(prompt_of(400), max_tokens=2, prefix_cache=store))
        first = engine.submit(prompt_of(500), max_tokens=400, sampling=ENDLESS)
        next(first)
        # Neither what others hold nor what they kept counts, at whatever moment of a pass it is asked.
        handles = [engine.submit(prompt_of(600, seed), max_tokens=150, sampling=ENDLESS) for seed in range(12)]
        limits = [handle for handle in handles[1:] if handle.cancel() is None]
        assert len(list(first)) == 399
        assert len(list(handles[0])) == 150
        assert len(limits) == 11


def test_without_max_tokens_an_answer_may_be_as_long_as_memory_alone_allows(openelm):
    give_plan(openelm, room_for(openelm, 600, chunk=16))
    in_use = mx.get_active_memory()  # MLX may still give back what a test before took
    memory = memory_of(openelm, active_memory=lambda: in_use)
    request = new_sequence(openelm, None, prompt_of(300), memory=memory).request
    assert request.limit == 256
    assert request.limited_by == "max_tokens"
    room = memory.room_for_answer(request, 5000)
    assert 256 <= room < 1000
    memory.check(request, room)
    with pytest.raises(MemoryLimitError):
        memory.check(request, room + 1)


def test_a_pass_that_is_being_computed_is_not_taken_for_what_is_always_there(openelm):
    give_plan(openelm, 1_000_000)
    in_use = [mx.get_active_memory()]
    memory = memory_of(openelm, active_memory=lambda: in_use[0])
    before = memory.without_requests()
    in_use[0] += 900_000  # somebody's pass
    assert memory.without_requests() == before
    in_use[0] -= 1_000_000  # another model is gone
    assert memory.without_requests() == before - 100_000


# --- how many run ---


@pytest.mark.parametrize(("asked", "expected"), [(1, 64), (3, 3), (64, 64)])
def test_as_many_run_as_the_model_was_loaded_for(openelm, asked, expected):
    give_plan(openelm, 10**9, batch_size=asked)
    with om.Engine(openelm) as engine:
        assert engine._scheduler.max_running == expected


def test_without_a_number_as_many_run_as_fit_at_a_usual_length(openelm):
    weights = mx.get_active_memory()
    for count in (1, 2, 5):
        give_plan(openelm, 0)
        admission = memory_of(openelm).admission
        budget = admission.needed(0, [RequestMemory(0, 2048)] * count, 64)
        runtime_of(openelm).plan = replace(plan(budget=budget), prefill_chunk=64)
        with om.Engine(openelm) as engine:
            assert engine._scheduler.max_running == count
    runtime_of(openelm).plan = replace(plan(budget=weights), prefill_chunk=64)
    with om.Engine(openelm, max_running=7) as engine:
        assert engine._scheduler.max_running == 7
    runtime_of(openelm).plan = None
    with om.Engine(openelm) as engine:
        assert engine._scheduler.max_running == 64


# --- experts on disk ---


@pytest.mark.slow
def test_experts_on_disk_with_several_requests_keep_to_the_plan_and_change_no_answer():
    longest = 120
    model, _ = om.load("demo-gpt-oss", expert_slots=4, batch_size=5, context_length=longest)
    chance = random.Random(1)
    requests = [(prompt_of(chance.choice([5, 30, 70]), seed), chance.choice([6, 20])) for seed in range(7)]
    options = {"sampling": om.SamplingParams(temperature=0.8, seed=3)}
    expected = [alone(model, [prompt], max_tokens=most, **options)[0] for prompt, most in requests]
    mx.clear_cache()
    assert model.plan.batch_size == 5
    extra = mx.get_active_memory() - model.plan.weights_bytes  # of other tests, and of what was made once
    with om.Engine(model) as engine:
        assert engine._scheduler.max_running == 5
        handles = [engine.submit(prompt, max_tokens=most, **options) for prompt, most in requests]
        assert [[chunk.token for chunk in handle] for handle in handles] == expected
    for handle in handles:
        assert handle.statistics.peak_memory_bytes <= model.plan.total_bytes + max(0, extra)
        assert handle.statistics.answer_experts.misses > 0
