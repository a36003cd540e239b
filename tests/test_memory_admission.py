"""Admission without arrays: bytes of a request as its caches allocate them, and which requests may run beside each other."""

import random
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx.bench.against import shape_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.errors import MemoryLimitError
from openelm_mlx.memory.admission import LEAST_CHUNK, Admission, RequestMemory
from openelm_mlx.memory.cache_bytes import CacheBytes, Growth, growth_of, most_that
from openelm_mlx.memory.machine import find_mac
from openelm_mlx.memory.measured import Calibration
from openelm_mlx.memory.plan import make_plan
from openelm_mlx.memory.plan_types import PlanRequest, Weights
from openelm_mlx.memory.scratch import PassPart, parts_bytes
from openelm_mlx.models.cache import make_cache
from openelm_mlx.specs import spec_from_config

GPT_OSS = spec_from_config({
    **released_gpt_oss_config("20b"), "num_hidden_layers": 4, "hidden_size": 64, "num_local_experts": 8,
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320,
    "sliding_window": 8, "eos_token_id": 3,
})  # fmt: skip
OPENELM = spec_from_config({**shape_config("openelm-270m", 3), "vocab_size": 320})
SPECS = {"gpt-oss": GPT_OSS, "OpenELM": OPENELM}


# --- what the simulated engine below decides by the arithmetic ---


def longest_chunk(found, in_use, running, prompt, wanted=None):
    """How many tokens of a prompt to read at once: `wanted`, or half of it, or a quarter ...; 0 when not even 16 fit.

    prompt: the request that reads it, `reserved` tokens of it in all.
    """
    chunk = found.chunk if wanted is None else wanted
    while found.limit is not None and found.shortage(in_use, [*running, prompt], chunk):
        if chunk <= LEAST_CHUNK:
            return 0
        chunk = max(LEAST_CHUNK, chunk // 2)
    return chunk


def to_put_back(found, in_use, running, kept=0, chunk=0):
    """How many of the youngest requests have to leave so that the others can go on; never the oldest one.

    running: the oldest first. kept: bytes of kept prompts, all of which are gone before a request leaves.
    """
    in_use -= kept
    for leaving in range(len(running)):
        staying = running[: len(running) - leaving]
        if leaving:
            last = running[len(running) - leaving]
            caches = found.caches if last.caches is None else last.caches
            in_use -= caches.bytes_of(caches.places(last.num_tokens) if last.places is None else last.places)
        if not found.shortage(in_use, staying, chunk):
            return leaving
    return max(0, len(running) - 1)


def seen(found, computed, rows, chunk=0, offset=0):
    """What to go on with after a pass that took `computed` bytes beside what was in use: itself, or a larger factor."""
    planned = found.pass_bytes(rows, chunk, offset)
    if computed <= planned:
        return found
    return replace(found, scratch_factor=found.scratch_factor * computed / planned)


# --- tests ---


def allocated(cache):
    return [layer.nbytes for layer in cache]


def append(spec, cache, length):
    for layer, kept in zip(spec.layers, cache, strict=True):
        new = mx.zeros((1, layer.num_kv_heads, length, layer.head_dim))
        kept.update_and_fetch(new, new)
        mx.eval(kept.buffers)


@pytest.mark.parametrize(
    "options", [{}, {"kv_bits": 8}, {"window": 16}, {"room": 4}, {"spare_places": 8}, {"context_length": 300}]
)
@pytest.mark.parametrize("name", SPECS)
def test_a_request_has_the_bytes_that_its_caches_allocate(name, options):
    spec = SPECS[name]
    if name == "gpt-oss" and "window" in options:
        options = {}  # it has windows of its own
    caches, cache = CacheBytes(spec, 4, **options), make_cache(spec, **options)
    assert caches.total(0) == sum(allocated(cache)) == 0
    places = 0
    for length in (1, 6, 249, 1, 40, 900):
        before, offset = allocated(cache), cache[0].offset
        for layer in cache:
            mx.eval(layer.reserve(offset + length))
        append(spec, cache, length)
        after = allocated(cache)
        if not caches.spare_places:  # with these it depends on when it last grew
            assert caches.total(offset + length) == sum(after)
        assert caches.total(offset + length) >= sum(after)
        growth = caches.growth(places, offset + length)
        assert growth.more == sum(after) - sum(before)
        assert growth == growth_of(zip(before, after, strict=True))
        places = caches.places(offset + length) if growth.more else places
    snapshots = [array for layer in cache for array in layer.snapshot().arrays]
    assert caches.rings == sum(array.nbytes for array in snapshots)


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"window": 16}, {"context_length": 300}])
@pytest.mark.parametrize("spare_places", [0, 8])
@pytest.mark.parametrize("name", SPECS)
def test_each_layer_says_before_it_grows_what_it_then_has(name, options, spare_places):
    """`spare_places`: as on CUDA, where a growing buffer has eight more."""
    spec = SPECS[name]
    if name == "gpt-oss" and "window" in options:
        options = {}
    cache = make_cache(spec, **options, spare_places=spare_places)
    for length in (1, 255, 1, 300):
        total = cache[0].offset + length
        said = [each.nbytes_for(total, layer, 4) for layer, each in zip(spec.layers, cache, strict=True)]
        append(spec, cache, length)
        assert said == allocated(cache)


def test_the_largest_number_that_fits():
    assert [most_that(lambda n, limit=limit: n <= limit, 100) for limit in (0, 1, 57, 99, 100, 500)] == [
        0,
        1,
        57,
        99,
        100,
        100,
    ]


def admission(limit, name="gpt-oss", chunk=64, **options):
    return Admission(limit, CacheBytes(SPECS[name], 4, **options), "cpu", chunk)


def kv(name, tokens):
    return CacheBytes(SPECS[name], 4).total(tokens)


lengths = st.integers(0, 1500)
held = st.tuples(lengths, st.integers(0, 600)).map(lambda pair: RequestMemory(pair[0], pair[0] + pair[1]))
batches = st.lists(held, min_size=1, max_size=6)
names = st.sampled_from([*SPECS])


@given(names, batches, held, st.integers(0, 3_000_000), st.sampled_from([0, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_more_of_anything_never_needs_less(name, requests, new, in_use, chunk):
    found = admission(None, name)
    needed = found.needed(in_use, requests, chunk)
    assert needed <= found.needed(in_use, [*requests, new], chunk)
    assert needed <= found.needed(in_use + 1, requests, chunk)
    assert needed <= found.needed(in_use, requests, 2 * chunk)
    longer = [each._replace(reserved=each.reserved + 300) for each in requests]
    assert needed <= found.needed(in_use, longer, chunk)
    assert needed >= in_use + sum(found.kv_bytes(each.reserved) - found.kv_bytes(each.num_tokens) for each in requests)


@given(names, batches, held, st.integers(200_000, 9_000_000), st.integers(0, 400_000))
@settings(max_examples=60, deadline=None)
def test_what_fits_is_within_the_limit_and_kept_prompts_count_as_room(name, requests, new, limit, kept):
    found = admission(limit, name)
    in_use = kept + sum(found.kv_bytes(each.num_tokens) for each in requests)
    fits = found.fits(in_use, requests, new, kept)
    assert fits == (found.needed(in_use - kept, [*requests, new], 16) <= limit)
    assert fits or not found.fits(in_use, requests, new)
    assert found.shortage(in_use, requests) == max(0, found.needed(in_use, requests) - limit)


@given(names, batches, st.integers(200_000, 9_000_000), lengths)
@settings(max_examples=60, deadline=None)
def test_the_longest_that_a_request_may_become_is_the_longest(name, running, limit, num_tokens):
    found = admission(limit, name)
    in_use = sum(found.kv_bytes(each.num_tokens) for each in running) + found.kv_bytes(num_tokens)
    longest = found.longest(in_use, running, RequestMemory(num_tokens, num_tokens))
    if longest:
        assert found.fits(in_use, running, RequestMemory(num_tokens, longest))
    if longest < SPECS[name].context_length:
        assert not found.fits(in_use, running, RequestMemory(num_tokens, longest + 1))


@given(names, batches, st.integers(200_000, 9_000_000), st.integers(0, 500_000))
@settings(max_examples=80, deadline=None)
def test_as_few_of_the_youngest_leave_as_it_takes_and_never_the_oldest(name, running, limit, kept):
    found = admission(limit, name)
    in_use = kept + sum(found.kv_bytes(each.num_tokens) for each in running)
    leaving = to_put_back(found, in_use, running, kept)
    assert 0 <= leaving < len(running)

    def fits(count):
        gone = running[len(running) - count :]
        left = in_use - kept - sum(found.kv_bytes(each.num_tokens) for each in gone)
        return not found.shortage(left, running[: len(running) - count])

    assert fits(leaving) or leaving == len(running) - 1
    assert not any(fits(count) for count in range(leaving))


def test_a_fork_has_the_places_that_it_was_cut_to():
    """Its first token makes buffers of its own: the old ones and the new ones are there at once, a layer at a time."""
    found = admission(None, "OpenELM")
    grown, forked = RequestMemory(300, 301), RequestMemory(300, 301, places=300)
    assert found.needed(0, [grown]) == found.pass_bytes([301])
    assert found.needed(0, [forked]) > found.needed(0, [grown])
    assert CacheBytes(OPENELM, 4).growth(300, 301).more == kv("OpenELM", 301) // 512 * 212
    assert CacheBytes(OPENELM, 4).growth(512, 301) == Growth(0, 0)


def test_rings_do_not_grow_and_8_bits_take_less():
    window = admission(None, "OpenELM", window=16)
    assert window.kv_bytes(1) == window.kv_bytes(2000) == window.caches.rings
    assert window.needed(0, [RequestMemory(20, 2000)]) == window.pass_bytes([2000])
    assert admission(None, "OpenELM", kv_bits=8).kv_bytes(2000) < 0.4 * kv("OpenELM", 2000)


def test_snapshots_of_rings_count_while_a_request_is_to_be_kept():
    found = admission(None)
    running = [RequestMemory(100, 200)] * 2
    kept = [each._replace(snapshots=3) for each in running]
    assert found.needed(0, kept) == found.needed(0, running) + 6 * found.caches.rings
    assert admission(None, "OpenELM").caches.rings == 0


def test_a_window_that_was_asked_for_is_attended_to_as_one():
    """Four rows with long caches see sixteen keys each, in a model that would keep everything."""
    full, ring = admission(None, "OpenELM"), admission(None, "OpenELM", window=16)
    assert ring.pass_bytes([1900] * 40) < full.pass_bytes([1900] * 40)
    assert ring.pass_bytes([1900] * 40) == ring.pass_bytes([100] * 40)


def test_a_chunk_is_halved_until_it_fits():
    free = admission(None)
    assert longest_chunk(free, 0, [], RequestMemory(0, 900)) == 64
    prompt, running = RequestMemory(0, 900), [RequestMemory(100, 200)] * 3
    needs = {chunk: free.needed(0, [*running, prompt], chunk) for chunk in (16, 32, 64)}
    assert needs[16] < needs[32] < needs[64]
    for chunk, needed in needs.items():
        assert longest_chunk(admission(needed), 0, running, prompt) == chunk
    assert longest_chunk(admission(needs[64]), 0, running, prompt, wanted=32) == 32
    assert longest_chunk(admission(needs[16] - 1), 0, running, prompt) == 0


def test_what_a_pass_really_took_counts_from_then_on():
    found = admission(10**9)
    planned = found.pass_bytes([100, 200], 64, 300)
    assert seen(found, planned, [100, 200], 64, 300) is found
    wiser = seen(found, 2 * planned, [100, 200], 64, 300)
    assert wiser.pass_bytes([100, 200], 64, 300) == pytest.approx(2 * planned, rel=1e-6)
    assert wiser.needed(0, [RequestMemory(0, 500)], 64) > found.needed(0, [RequestMemory(0, 500)], 64)


# --- refusals ---


def test_a_request_that_can_never_fit_says_what_would():
    limit = 50_000 + kv("gpt-oss", 768) + admission(None).pass_bytes([], 16, 1000)
    found = replace(admission(limit), weights=50_000)
    found.check(500, 200)
    with pytest.raises(MemoryLimitError) as caught:
        found.check(500, 2000)
    message = str(caught.value)
    assert (
        "A prompt of 500 tokens and an answer of up to 2,000 can never fit into the memory, not even alone" in message
    )
    assert "the keys and values of 2,500 tokens take" in message
    fits = int(message.split("max_tokens=")[1].split()[0])
    found.check(500, fits)
    with pytest.raises(MemoryLimitError):
        found.check(500, fits + 1)
    with pytest.raises(MemoryLimitError, match=r"a prompt and an answer of .* tokens together fit"):
        found.check(5000, 10)
    with pytest.raises(MemoryLimitError, match="not one token fits"):
        replace(found, limit=1000).check(5, 10)
    admission(None).check(10**6, 10**6)  # nothing planned, nothing refused


# --- with a plan ---


@pytest.mark.parametrize("backend", ["cpu", "metal"])
@pytest.mark.parametrize("name", SPECS)
def test_requests_that_are_alike_take_what_they_take_one_by_one(name, backend):
    """Those with the very same layers are counted once: here are some whose layers are equal, and so counted apart."""
    spec = SPECS[name]
    alike = [PassPart(1, 300, spec.layers, 8)] * 3
    apart = [PassPart(1, 300, (*spec.layers,), 8) for _ in range(3)]
    prompt = PassPart(40, 7, spec.layers)
    one, three, known = (parts_bytes(spec, [prompt, *each], 2, backend) for each in (alike[:1], alike, apart))
    assert one < three == known


@pytest.mark.parametrize("num_tokens", [1024, 2048, 8192])
@pytest.mark.parametrize("name", ["M4 16GB", "M4 Max 64GB"])
def test_the_engine_admits_what_the_plan_promises(name, num_tokens):
    config = shape_config("openelm-1.1b") if num_tokens < 8192 else released_gpt_oss_config("20b")
    spec = spec_from_config(config)
    plan = make_plan(
        "m",
        spec,
        Weights(dense=2_000_000_000),
        find_mac(name),
        PlanRequest(memory_limit=7_000_000_000),
        with_requests=True,
    )
    (promised,) = [fit.most for fit in plan.requests.lengths if fit.num_tokens == num_tokens]
    found = Admission.of(plan, CacheBytes(spec, 2), "metal")
    assert 1 < promised <= found.most_requests(num_tokens) <= promised + 1
    assert found.fits(plan.weights_bytes, [RequestMemory(0, num_tokens)] * promised, chunk=plan.prefill_chunk)
    assert not found.fits(plan.weights_bytes, [RequestMemory(0, num_tokens)] * (promised + 2), chunk=plan.prefill_chunk)


def test_a_calibrated_machine_corrects_what_a_pass_takes():
    plan = make_plan("m", GPT_OSS, Weights(dense=10**6), find_mac("M4 16GB"), PlanRequest())
    calibration = Calibration(scratch={"gpt_oss": 2.0})
    corrected = replace(plan, machine=replace(plan.machine, calibration=calibration))
    caches = CacheBytes(GPT_OSS, 2)
    twice, once = (Admission.of(each, caches, "cpu").pass_bytes([50] * 4, 64) for each in (corrected, plan))
    assert twice == 2 * once
    assert Admission.of(None, caches, "cpu").fits(10**12, [], RequestMemory(0, 10**6))


# --- an engine in simulated time ---


class Simulated:
    """An engine that computes nothing: it admits, grows caches, puts back and ends requests, and watches the memory."""

    def __init__(self, admission: Admission, kept: int) -> None:
        self.admission, self.kept, self.peak = admission, kept, 0
        self.running: list[dict] = []
        self.num_put_back = 0

    @property
    def in_use(self) -> int:
        caches = self.admission.caches
        return self.admission.weights + self.kept + sum(caches.total(each["tokens"]) for each in self.running)

    def state(self, each, ahead=8):
        return RequestMemory(each["tokens"], min(max(each["tokens"], each["prompt"]) + ahead, each["length"]))

    def room(self, requests, new=None):
        """Let kept prompts go until it fits; whether it does."""
        short = self.admission.shortage(self.in_use, [*map(self.state, requests), *([] if new is None else [new])], 16)
        freed = min(short, self.kept)
        self.kept -= freed
        return freed == short

    def step(self, waiting):
        while waiting and self.room(self.running, self.state(waiting[0])):
            self.running.append(waiting.pop(0))
        leaving = to_put_back(self.admission, self.in_use, [*map(self.state, self.running)], self.kept, 16)
        for _ in range(leaving):
            put_back = self.running.pop()
            waiting.insert(0, {**put_back, "tokens": 0, "prompt": max(put_back["prompt"], put_back["tokens"])})
            self.num_put_back += 1
        self.room(self.running)
        prompts = [each for each in self.running if each["tokens"] < each["prompt"]]
        chunk, offset = 0, 0
        if prompts:
            first = prompts[0]
            others = [self.state(each) for each in self.running if each is not first]
            wanted = longest_chunk(self.admission, self.in_use, others, self.state(first))
            assert wanted
            chunk, offset = min(wanted, first["prompt"] - first["tokens"]), first["tokens"]
        rows = [each for each in self.running if each not in prompts]
        # Room is made first, a layer at a time; then the pass.
        for each, new in [*((each, 1) for each in rows), *([(prompts[0], chunk)] if prompts else [])]:
            places = self.admission.caches.places(each["tokens"])
            copied = self.admission.caches.growth(places, each["tokens"] + new).copied
            each["tokens"] += new
            self.peak = max(self.peak, self.in_use + copied)
        self.peak = max(
            self.peak, self.in_use + self.admission.pass_bytes([each["tokens"] for each in rows], chunk, offset)
        )
        self.running = [each for each in self.running if each["tokens"] < each["length"]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", SPECS)
def test_whatever_comes_no_pass_is_above_the_limit_and_every_request_ends(name, seed):
    chance = random.Random(seed)
    waiting = []
    for _ in range(12):
        prompt = chance.choice([5, 40, 300])
        waiting.append({"prompt": prompt, "length": prompt + chance.choice([4, 30, 260]), "tokens": 0})
    kept = 400_000
    alone = admission(None, name).needed(100_000, [RequestMemory(0, 640)], 64)
    engine = Simulated(replace(admission(alone + chance.choice([50_000, 900_000]), name), weights=100_000), kept)
    most, steps = 0, 0
    while waiting or engine.running:
        engine.step(waiting)
        most, steps = max(most, len(engine.running)), steps + 1
        assert steps < 6000
    assert engine.peak <= engine.admission.limit
    assert most > 1 or engine.num_put_back == 0
