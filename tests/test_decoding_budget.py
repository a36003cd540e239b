"""The loop within a budget: refused before work, stopped at a chunk or a token, shrunk, out of memory, watchdog."""

import dataclasses
import weakref

import mlx.core as mx
import pytest
from conftest import random_model
from test_memory_limits import plan

from openelm_mlx.checks import size
from openelm_mlx.decoding import budget as budget_module
from openelm_mlx.decoding.budget import Budget, chunk_of_plan, keeping_to_plan
from openelm_mlx.decoding.gpu_errors import is_out_of_memory, is_watchdog
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.decoding.sampling import SamplingParams
from openelm_mlx.errors import MemoryLimitError, SettingError
from openelm_mlx.generate import generate, stream_generate
from openelm_mlx.models import buffers
from openelm_mlx.models import cache as cache_module
from openelm_mlx.runtime import runtime_of

ENDLESS = SamplingParams(logit_bias={2: -1e9})  # never the end-of-text token


@pytest.fixture
def model():
    model = random_model(context_length=4096)
    mx.synchronize()
    return model


def plan_with(model, room: int, scratch: int = 0, chunk: int = 512):
    """A plan whose budget is `room` bytes more than what is in use now."""
    made = plan(budget=mx.get_active_memory() + room)
    return dataclasses.replace(made, scratch_bytes=scratch, prefill_chunk=chunk)


def kv_bytes(model, places: int) -> int:
    return model.spec.kv_cache_bytes(places, itemsize=4)


def tokens_of(chunks):
    return [chunk.token for chunk in chunks]


PROMPT = [(7 * i) % 599 + 1 for i in range(600)]


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_cuda", "on_cpu", "chunk"), [(True, False, 2048), (True, True, 512), (False, False, 512)])
def test_a_chunk_without_a_plan_is_long_where_a_pass_costs_much_by_itself(model, monkeypatch, is_cuda, on_cpu, chunk):
    backend = "cpu" if on_cpu else "cuda" if is_cuda else "metal"
    monkeypatch.setattr(budget_module, "backend_name", lambda: backend)
    assert chunk_of_plan(model) == chunk
    runtime_of(model).plan = plan_with(model, 10**9, chunk=64)
    assert chunk_of_plan(model) == 64


@pytest.mark.parametrize("num_tokens", [1, 256, 257, 2049, 4096])
def test_growth_is_what_the_caches_then_have(model, num_tokens):
    runtime_of(model).plan = plan_with(model, 10**9)
    cache = model.make_cache()
    budget = Budget(model, cache, active_memory=lambda: 0)
    assert budget._needed(num_tokens, 1) == kv_bytes(
        model, -(-num_tokens // 512) * 512 if num_tokens > 2048 else -(-num_tokens // 256) * 256
    )
    predicted = budget._needed(num_tokens, 1)
    model(mx.ones((1, num_tokens), mx.int32), cache)
    assert sum(layer.nbytes for layer in cache) == predicted


def test_growing_counts_one_layer_twice(model):
    runtime_of(model).plan = plan_with(model, 10**9)
    cache = model.make_cache()
    model(mx.ones((1, 256), mx.int32), cache)
    budget = Budget(model, cache, active_memory=lambda: 0)
    assert budget._needed(256, 1) == 0
    assert budget._needed(257, 1) == kv_bytes(model, 256) + max(layer.nbytes for layer in cache)


def test_rings_do_not_grow(model):
    runtime_of(model).plan = plan_with(model, 10**9)
    cache = model.make_cache(window=32)
    budget = Budget(model, cache, active_memory=lambda: 0)
    assert budget._needed(4000, 1) == kv_bytes(model, 32)
    model(mx.ones((1, 100), mx.int32), cache)
    assert budget._needed(4000, 1) == 0


def test_scratch_is_learned_where_the_plan_had_too_little(model):
    """The second chunk is measured by what the first one took."""
    runtime_of(model).plan = plan_with(model, 10**9)
    cache = model.make_cache()
    with keeping_to_plan(model, cache) as (budget, _):
        assert budget.scratch(100) == 0
        prefill(model, PROMPT[:201], cache, 100, budget)
        scores = 4 * 100 * 100 * 4
        assert budget.scratch(100) > scores


# --- refused, shrunk, stopped -----------------------------------------------------------------------------------------


def test_refused_before_any_work_with_the_arithmetic(model, monkeypatch):
    runtime_of(model).plan = plan_with(model, kv_bytes(model, 512) + 1000)
    monkeypatch.setattr(type(model), "run_layers", None)  # nothing may run
    with pytest.raises(MemoryLimitError) as caught:
        stream_generate(model, None, PROMPT[:300], max_tokens=400)
    message = str(caught.value)
    assert "A prompt of 300 tokens and an answer of up to 400" in message
    assert f"keys and values of 700 tokens take {size(kv_bytes(model, 768))} more" in message
    assert f"of the {size(model.plan.budget_bytes)} allowed" in message
    assert "max_tokens=212 fits" in message
    with pytest.raises(MemoryLimitError, match="a prompt and an answer of 512 tokens together fit"):
        stream_generate(model, None, PROMPT, max_tokens=400)
    runtime_of(model).plan = plan_with(model, 10)
    with pytest.raises(MemoryLimitError, match="not one token fits"):
        stream_generate(model, None, [1], max_tokens=1)


def test_what_the_refusal_says_does_fit(model):
    runtime_of(model).plan = plan_with(model, kv_bytes(model, 512) + 100_000)
    assert len(list(stream_generate(model, None, PROMPT[:300], max_tokens=212, sampling=ENDLESS))) == 212


def test_chunks_shrink_and_the_logits_stay(model):
    """With room for the scratch of 64 tokens, not of 512."""
    expected = prefill(model, PROMPT, model.make_cache(), 512)
    mx.eval(expected)
    runtime_of(model).plan = plan_with(model, kv_bytes(model, 768) + 90_000_000, scratch=512_000_000)
    lengths = []
    cache = model.make_cache()
    with keeping_to_plan(model, cache) as (budget, _):
        real = budget.chunk_is_done
        budget.chunk_is_done = lambda length: (lengths.append(length), real(length))
        logits = prefill(model, PROMPT, cache, 512, budget)
        assert mx.allclose(logits, expected, atol=1e-4)
    assert set(lengths) == {64, 88}  # 8 * 64 + 88: the last ones fit at once


def test_the_plan_s_chunk_is_the_default(model):
    runtime_of(model).plan = plan_with(model, 10**9, chunk=37)
    seen = []
    real = type(model).run_layers

    def watch(self, h, *arguments, **options):
        seen.append(1 if h.ndim == 2 else h.shape[1])
        return real(self, h, *arguments, **options)

    type(model).run_layers = watch
    try:
        list(stream_generate(model, None, PROMPT[:80], max_tokens=1))
        list(stream_generate(model, None, PROMPT[:80], max_tokens=1, prefill_chunk=50))
    finally:
        type(model).run_layers = real
    assert seen == [37, 37, 6, 50, 30]


def test_stopped_at_a_chunk_when_memory_goes_away_and_usable_again(model, monkeypatch):
    expected = tokens_of(stream_generate(model, None, PROMPT, max_tokens=3))
    runtime_of(model).plan = plan_with(model, 50_000_000)
    stream = stream_generate(model, None, PROMPT, max_tokens=3, prefill_chunk=100)
    other = mx.zeros((49_700_000,), mx.uint8)  # something else in the process
    mx.eval(other)
    with pytest.raises(MemoryLimitError, match=r"stopped after [0-9]+ tokens.*can be used again"):
        list(stream)
    del other
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=3)) == expected


def test_stopped_at_a_token_when_memory_goes_away(model):
    expected = tokens_of(stream_generate(model, None, PROMPT[:250], max_tokens=180, sampling=ENDLESS))
    runtime_of(model).plan = plan_with(model, 20_000_000)
    stream = stream_generate(model, None, PROMPT[:250], max_tokens=180, sampling=ENDLESS)
    got = [next(stream).token for _ in range(70)]
    other = mx.zeros((30_000_000,), mx.uint8)
    mx.eval(other)
    with pytest.raises(MemoryLimitError, match=r"answer was stopped after 128 tokens.*can be used again") as caught:
        got.extend(chunk.token for chunk in stream)
    assert got == expected[:128]
    assert f"of the {size(model.plan.budget_bytes)} allowed" in str(caught.value)
    del other
    assert tokens_of(stream_generate(model, None, PROMPT[:250], max_tokens=180, sampling=ENDLESS)) == expected


def test_no_cache_grows_inside_a_pass(model, monkeypatch):
    """The loop has made the places before, one layer after the other, so no two layers are there twice."""
    inside, grew = [False], []
    run_layers, grown, evaluate = type(model).run_layers, buffers.grown, mx.eval

    def watched(self, *arguments, **options):
        inside[0] = True
        h = run_layers(self, *arguments, **options)
        inside[0] = False
        return h

    def growing(buffer, used, *rest):
        grew.append((used, inside[0]))
        return grown(buffer, used, *rest)

    monkeypatch.setattr(type(model), "run_layers", watched)
    for module in (buffers, cache_module):
        monkeypatch.setattr(module, "grown", growing)
    monkeypatch.setattr(mx, "eval", lambda *arrays: grew.append("evaluated") or evaluate(*arrays))
    list(stream_generate(model, None, PROMPT * 2, max_tokens=300, sampling=ENDLESS, prefill_chunk=500))
    assert [each for each in grew if each != "evaluated" and each[0] and each[1]] == []
    layers = [i for i, each in enumerate(grew) if each != "evaluated" and each[0] > 2 * len(PROMPT)]
    assert len(layers) == 6, "keys and values of three layers"
    assert all(grew[i + 1] == "evaluated" for i in layers[1::2])


# --- when the backend fails -------------------------------------------------------------------------------------------


OUT_OF_MEMORY = [
    "[malloc_or_wait] Unable to allocate 123 bytes.",
    "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed buffer size of 9 bytes.",
    "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "std::bad_alloc",
]
TIMEOUT = "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
INTERACTIVITY = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
)


def test_errors_are_told_apart():
    assert all(is_out_of_memory(RuntimeError(text)) for text in OUT_OF_MEMORY)
    assert is_out_of_memory(MemoryError())
    assert is_watchdog(RuntimeError(TIMEOUT))
    assert is_watchdog(RuntimeError(INTERACTIVITY))
    for text in (TIMEOUT, INTERACTIVITY, "[matmul] shapes do not fit"):
        assert not is_out_of_memory(RuntimeError(text))
    assert not any(is_watchdog(RuntimeError(text)) for text in OUT_OF_MEMORY)


def failing(monkeypatch, errors):
    """`mx.eval` as the prefill calls it: raises the next of `errors` (None: works), and works from then on."""
    real, errors = mx.eval, list(errors)

    def evaluate(*arrays):
        real(*arrays)
        if (
            isinstance(arrays[0], list)
            and arrays[0]
            and isinstance(arrays[0][0], list)
            and errors
            and (error := errors.pop(0))
        ):
            raise RuntimeError(error)

    monkeypatch.setattr("openelm_mlx.decoding.prefill.mx.eval", evaluate)


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_when_the_backend_cannot_allocate_the_model_says_it_must_be_reloaded(model, monkeypatch, text):
    failing(monkeypatch, [text])
    kept = []
    real = type(model).make_cache
    monkeypatch.setattr(type(model), "make_cache", lambda self, **kw: kept.append(real(self, **kw)) or kept[-1])
    with pytest.raises(MemoryLimitError, match="must be loaded again") as caught:
        generate(model, None, PROMPT, max_tokens=5)
    assert text.splitlines()[0] in str(caught.value)
    assert all(layer.nbytes == 0 and layer.offset == 0 for cache in kept for layer in cache)
    for _ in range(2):
        with pytest.raises(MemoryLimitError, match="must be loaded again"):
            stream_generate(model, None, PROMPT, max_tokens=5)
    assert runtime_of(random_model()).failure is None


def test_an_error_in_the_answer_is_caught_too(model, monkeypatch):
    stream = stream_generate(model, None, PROMPT, max_tokens=5)
    next(stream)

    def fail(*arrays):
        raise RuntimeError(OUT_OF_MEMORY[2])

    monkeypatch.setattr("openelm_mlx.decoding.tokens.mx.async_eval", fail)
    with pytest.raises(MemoryLimitError, match="must be loaded again"):
        list(stream)


def test_other_errors_pass_and_leave_the_model_usable(model, monkeypatch):
    failing(monkeypatch, ["[matmul] shapes do not fit"])
    with pytest.raises(RuntimeError, match="shapes"):
        generate(model, None, PROMPT, max_tokens=5)
    assert len(list(stream_generate(model, None, PROMPT, max_tokens=5))) == 5


@pytest.mark.parametrize("strike", [0, 2])
@pytest.mark.parametrize("text", [TIMEOUT, INTERACTIVITY])
def test_after_the_watchdog_half_the_chunk_is_tried(model, monkeypatch, text, strike):
    expected = tokens_of(stream_generate(model, None, PROMPT, max_tokens=4))
    lengths = []
    real = Budget.chunk_is_done
    monkeypatch.setattr(Budget, "chunk_is_done", lambda self, n: lengths.append(n) or real(self, n))
    failing(monkeypatch, [None] * strike + [text])
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=4, prefill_chunk=200)) == expected
    assert lengths == [200] * strike + [100] * 6


def test_a_second_strike_ends_it_with_a_sentence(model, monkeypatch):
    failing(monkeypatch, [TIMEOUT, None, TIMEOUT])
    with pytest.raises(
        SettingError, match=r"100 prompt tokens at once took longer than macOS allows.*prefill_chunk=25"
    ):
        generate(model, None, PROMPT, max_tokens=4, prefill_chunk=200)
    assert len(list(stream_generate(model, None, PROMPT, max_tokens=4))) == 4


def test_a_prefix_that_was_there_cannot_be_computed_again(model, monkeypatch):
    cache = model.make_cache()
    prefill(model, PROMPT[:100], cache, 512)
    failing(monkeypatch, [TIMEOUT])
    with pytest.raises(SettingError, match="macOS"):
        prefill(model, PROMPT[100:], cache, 200)
    assert {layer.offset for layer in cache} == {0}


def test_a_dropped_cache_is_given_back_though_a_traceback_holds_it(model):
    cache = model.make_cache()
    model(mx.ones((1, 1500), mx.int32), cache)
    mx.eval([layer.buffers for layer in cache])
    used, alive = mx.get_active_memory(), weakref.ref(cache[0])
    budget_module.drop(cache)
    assert used - mx.get_active_memory() >= kv_bytes(model, 1500)
    assert alive() is not None
