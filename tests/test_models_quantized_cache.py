"""8-bit keys and values against the definition: unpack each byte, then plain attention, one query at a time.

And in the models: everything equals a model whose keys and values were rounded that way before plain attention.
"""

import copy
import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import max_difference, random_model
from test_models_gpt_oss import TOLERANCE, load_gpt_oss

import openelm_mlx as om
from openelm_mlx.errors import SettingError
from openelm_mlx.models import attention, block, packed
from openelm_mlx.models.attention import BlockMask, attend
from openelm_mlx.models.cache import KVCache, SlidingKVCache, make_cache
from openelm_mlx.models.packed import UNPACK_FROM, Packed, pack
from openelm_mlx.models.quantized_cache import QuantizedKVCache
from openelm_mlx.specs import kv_capacity, spec_from_config

H, K = 4, 2


def numbers(x: Packed) -> np.ndarray:
    """What packed numbers stand for, from their bytes: q * scale + bias, group by group."""
    q = np.array(x.weight).view(np.uint8).astype(np.float64)
    scales, biases = (np.repeat(np.array(part, np.float64), x.group_size, axis=-1) for part in (x.scales, x.biases))
    return q * scales + biases


def slow_attend(queries, keys, values, sees, sinks=None, scale=None):
    """queries (B, H, L, D); sees(b, i, t): whether query i of row b sees key t."""
    B, _, L, D = queries.shape
    out = np.zeros(queries.shape)
    for b, h, i in np.ndindex(B, H, L):
        seen = [t for t in range(keys.shape[2]) if sees(b, i, t)]
        scores = keys[b, h * K // H, seen] @ queries[b, h, i] * (D**-0.5 if scale is None else scale)
        top = max([*scores, *([] if sinks is None else [sinks[h]])])
        weights = np.exp(scores - top)
        total = weights.sum() + (0 if sinks is None else math.exp(sinks[h] - top))
        out[b, h, i] = weights @ values[b, h * K // H, seen] / total
    return out


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "group_size"), [(32, 32), (64, 64), (96, 32), (128, 64)])
def test_packing_rounds_by_less_than_a_step(head_dim, group_size):
    x = random(2, K, 9, head_dim) * 10.0
    x[0, 0, 0] = 0
    x[0, 0, 1] = 7.5  # a group of one value
    ours = pack(mx.array(x))
    assert ours.group_size == group_size
    groups = x.reshape(-1, group_size)
    step = (groups.max(1) - groups.min(1)) / 255
    error = np.abs(numbers(ours) - x).reshape(-1, group_size).max(1)
    assert (error <= step + 1e-6).all()
    assert np.median(error / np.maximum(step, 1e-9)) < 0.6
    assert np.abs(np.array(ours.unpack(mx.float32)) - numbers(ours)).max() < 1e-5
    assert ours.scales.dtype == pack(mx.array(x).astype(mx.bfloat16)).scales.dtype == mx.float32


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("few_at_a_time", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    ("L", "T", "D"), [(1, 1, 64), (1, 21, 32), (3, 3, 64), (5, 17, 32), (15, 40, 64), (16, 40, 64), (24, 24, 128)]
)
def test_attention_is_that_of_the_unpacked_numbers(L, T, D, with_sinks, few_at_a_time, monkeypatch):
    if few_at_a_time:
        monkeypatch.setattr(packed, "SCORES_BYTES", 2 * 4 * 2 * H * T)  # two queries at a time
    queries, sinks = random(2, H, L, D), 2 * random(H, seed=3) if with_sinks else None
    keys, values = (pack(mx.array(random(2, K, T, D, seed=seed))) for seed in (1, 2))
    expected = slow_attend(queries, numbers(keys), numbers(values), lambda b, i, t: t <= T - L + i, sinks, 0.3)
    mask = None if L == 1 else "causal"
    ours = attend(mx.array(queries), keys, values, mask, 0.3, None if sinks is None else mx.array(sinks))
    assert max_difference(ours, expected) < 6e-6
    # The same said by an array: (L, T), and (B, 1, L, T) for a padded batch.
    positions = mx.arange(T)
    array = attention.visible_keys(positions[T - L :], positions)
    ours = attend(mx.array(queries), keys, values, array, 0.3, None if sinks is None else mx.array(sinks))
    assert max_difference(ours, expected) < 6e-6
    padding = [0, min(4, T - L)]
    array = attention.visible_keys(positions[T - L :], positions, None, mx.array(padding))
    ours = attend(mx.array(queries), keys, values, array, 0.3, None if sinks is None else mx.array(sinks))
    expected = slow_attend(
        queries, numbers(keys), numbers(values), lambda b, i, t: padding[b] <= t <= T - L + i, sinks, 0.3
    )
    assert max_difference(ours, expected) < 6e-6


def test_a_sink_takes_its_share():
    """So that a path without sinks cannot pass: the outputs differ by the sink's probability exactly."""
    queries, keys, values = (random(1, heads, 5, 32, seed=heads) for heads in (H, K, K))
    keys, values = pack(mx.array(keys)), pack(mx.array(values))
    queries = mx.array(queries)[:, :, -1:]
    with_sinks = attend(queries, keys, values, None, sinks=mx.full((H,), 20.0))
    assert mx.abs(with_sinks).max() < 1e-4 < mx.abs(attend(queries, keys, values, None)).max()


def test_the_scores_in_memory_are_bounded(monkeypatch):
    """A query at a time takes far less than all fifteen at once. (MLX allocates some steps ahead of the work.)"""
    T, heads = 20_000, 16
    queries = mx.random.normal((1, heads, 15, 32))
    keys, values = (pack(mx.random.normal((1, K, T, 32))) for _ in range(2))
    mx.eval(queries, keys, values)

    def peak(queries_at_a_time):
        monkeypatch.setattr(packed, "SCORES_BYTES", queries_at_a_time * 4 * heads * T)
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attend(queries, keys, values, "causal", sinks=mx.zeros((heads,))))
        return mx.get_peak_memory() - active

    assert peak(15) >= 2 * 15 * 4 * heads * T
    assert peak(1) < peak(15) / 2.5


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("L", [1, 20])
def test_half_precision_in_half_precision_out(dtype, L):
    queries = mx.array(random(1, H, L, 64)).astype(dtype)
    keys, values = (pack(mx.array(random(1, K, L, 64, seed=s)).astype(dtype)) for s in (1, 2))
    ours = attend(queries, keys, values, None if L == 1 else "causal")
    assert ours.dtype == dtype
    expected = slow_attend(np.array(queries.astype(mx.float32)), numbers(keys), numbers(values), lambda b, i, t: t <= i)
    assert max_difference(ours, expected) < 0.02


# --- the cache --------------------------------------------------------------------------------------------------------


class RoundedKVCache(KVCache):
    """The slow truth: a plain cache of keys and values that went through the bytes and back."""

    def update_and_fetch(self, keys, values):
        rounded = (mx.array(numbers(pack(x)).astype(np.float32)).astype(x.dtype) for x in (keys, values))
        return super().update_and_fetch(*rounded)


class Pair:
    """A quantized cache and the slow one, fed with the same tokens."""

    def __init__(self, padding=None, D=32):
        left_padding = None if padding is None else mx.array(padding)
        self.rows, self.D = len(padding or [0]), D
        self.ours, self.slow = QuantizedKVCache(left_padding), RoundedKVCache(left_padding)
        self.rng = np.random.default_rng(0)

    def extend(self, L, window_size=None):
        q, k, v = (mx.array(self.rng.normal(size=(self.rows, heads, L, self.D)), mx.float32) for heads in (H, K, K))
        outs = []
        for cache in (self.ours, self.slow):
            mask = cache.make_mask(L, window_size=window_size)
            outs.append(attend(q, *cache.update_and_fetch(k, v), mask, sinks=mx.array([0.5, -1.0, 2.0, 0.0])))
        assert max_difference(outs[0], np.array(outs[1])) < 3e-6
        assert self.ours.offset == self.slow.offset


@pytest.mark.parametrize("chunk", [1, 2, 7, 15, 16, 17, 60])
@pytest.mark.parametrize("padding", [None, [0, 3, 20]])
def test_every_chunk_size(chunk, padding):
    pair = Pair(padding)
    for start in range(0, 60, chunk):
        pair.extend(min(chunk, 60 - start))


@pytest.mark.parametrize("L", [1, 4, 14, 30])
def test_a_layer_with_a_window_over_a_cache_that_keeps_everything(L):
    pair = Pair()
    for _ in range(4):
        pair.extend(L, window_size=5)
    assert isinstance(pair.ours.make_mask(30, window_size=5), BlockMask)


def test_rewind_at_any_point_and_growth():
    pair = Pair(D=64)
    for L, back in ((5, 5), (270, 14), (1, 1), (1, 0), (255, 2), (20, 19), (1, 0)):
        pair.extend(L)
        pair.ours.rewind(back)
        pair.slow.rewind(back)
        pair.extend(1)
    for n in (-1, 10**6):
        with pytest.raises(ValueError, match="cannot take back"):
            pair.ours.rewind(n)


def test_bytes_are_those_of_the_spec(fixtures):
    for folder, batch in (("gpt_oss_tiny", 1), ("gpt_oss_odd", 3)):
        model = load_gpt_oss(fixtures / folder, mx.bfloat16)
        cache = model.make_cache(kv_bits=8)
        model(mx.zeros((batch, 300), mx.int32), cache)
        full = [layer for layer in cache if isinstance(layer, QuantizedKVCache)]
        assert 0 < len(full) < len(cache)
        assert sum(layer.nbytes for layer in cache) == model.spec.kv_cache_bytes(
            kv_capacity(300, model.spec.context_length), batch_size=batch, kv_bits=8
        )
        plain = model.make_cache(kv_bits=16)
        model(mx.zeros((batch, 300), mx.int32), plain)
        ratio = full[0].nbytes / next(layer for layer in plain if isinstance(layer, KVCache)).nbytes
        assert ratio == (0.625 if full[0].keys.group_size == 32 else 0.5625)


def test_reserving_and_clearing():
    cache = QuantizedKVCache()
    assert cache.reserve(5000) == cache.buffers == []
    cache.update_and_fetch(*[mx.ones((1, K, 3, 64))] * 2)
    assert cache.reserve(256) == []
    before = numbers(cache.keys.first(3))
    mx.eval(cache.reserve(3000))
    assert cache.keys.weight.shape[2] == kv_capacity(3000)
    assert (numbers(cache.keys.first(3)) == before).all()
    cache.clear()
    assert (cache.nbytes, cache.offset, cache.empty()) == (0, 0, True)


def test_mlx_lm_s_words_and_copies():
    from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

    pair = Pair()
    pair.extend(9)
    rebuilt = QuantizedKVCache()
    rebuilt.state, rebuilt.meta_state = [mx.array(each) for each in pair.ours.state], pair.ours.meta_state
    copied = copy.deepcopy(pair.ours)
    pair.extend(3)
    assert (copied.offset, rebuilt.offset, pair.ours.size()) == (9, 9, 12)
    for other in (rebuilt, copied):
        assert (numbers(other.keys.first(9)) == numbers(pair.ours.keys.first(9))).all()
    assert can_trim_prompt_cache([copied])
    assert trim_prompt_cache([copied], 4) == 4
    assert (copied.offset, copied.trim(99), copied.offset) == (5, 5, 0)
    assert QuantizedKVCache().state == ()


# --- in the models ----------------------------------------------------------------------------------------------------


def openelm_with_heads_of(head_dim):
    model = random_model(head_dim=head_dim)
    assert {layer.head_dim for layer in model.spec.layers} == {head_dim}
    return model


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("chunk", [1, 5, 16, 61])
@pytest.mark.parametrize("padding", [None, [0, 3, 30]])
@pytest.mark.parametrize("family", ["gpt_oss_tiny", "openelm"])
def test_a_model_computes_what_it_would_with_rounded_keys_and_values(fixtures, family, chunk, padding, monkeypatch):
    """Every layer's attention, in every chunking, over ragged rows across the edge of the window (16 in gpt_oss_tiny).

    Compared call by call: the last bit of a key decides how it is rounded, and one step of that moves the logits.
    """
    model = openelm_with_heads_of(32) if family == "openelm" else load_gpt_oss(fixtures / family)
    tokens = mx.array(np.random.default_rng(1).integers(0, 256, (len(padding or [0]), 61)))
    compared = []

    def compare(queries, keys, values, *rest):
        ours = attend(queries, keys, values, *rest)
        if isinstance(keys, Packed):
            unpacked = (mx.array(numbers(each).astype(np.float32)) for each in (keys, values))
            compared.append(max_difference(ours, np.array(attend(queries, *unpacked, *rest))))
        return ours

    monkeypatch.setattr(block, "attend", compare)
    cache = model.make_cache(left_padding=padding, kv_bits=8)
    parts = [model(tokens[:, start : start + chunk], cache) for start in range(0, 61, chunk)]
    full = sum(isinstance(layer, QuantizedKVCache) for layer in cache)
    assert len(compared) == full * -(-61 // chunk)
    assert max(compared) < 1e-5
    # Not the unquantized model's logits, and not far from them at the start, where no expert has flipped yet.
    plain = model(tokens, model.make_cache(left_padding=padding))
    assert 1e-4 < max_difference(mx.concatenate(parts, axis=1)[0, :4], np.array(plain[0, :4])) < 0.3


@pytest.mark.parametrize("padding", [[0, 3, 30], [15, 0, 1], [17, 16, 0]])
def test_a_row_of_a_batch_is_the_row_alone(fixtures, padding):
    """Prefill in chunks, then decode: ragged prompts around the window of 16, each beside its own single run.

    Not so in 8 bits: a key is rounded after its rotation, which depends on where the row begins.
    """
    model = load_gpt_oss(fixtures / "gpt_oss_tiny")
    rows = [np.random.default_rng(row).integers(1, 256, 40 - pad).tolist() for row, pad in enumerate(padding)]
    tokens = mx.array([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    cache = model.make_cache(left_padding=padding)
    got = [model(tokens[:, start : start + 9], cache) for start in range(0, 36, 9)]
    got += [model(tokens[:, t : t + 1], cache) for t in range(36, 40)]
    logits = mx.concatenate(got, axis=1)
    for i, (pad, row) in enumerate(zip(padding, rows, strict=True)):
        alone = model(mx.array([row]), model.make_cache())
        assert max_difference(logits[i, pad:], np.array(alone[0])) <= 2 * TOLERANCE


def test_only_layers_that_keep_everything_are_quantized(fixtures):
    cache = load_gpt_oss(fixtures / "gpt_oss_tiny").make_cache(kv_bits=8)
    assert {type(layer) for layer in cache} == {SlidingKVCache, QuantizedKVCache}
    assert {type(layer) for layer in openelm_with_heads_of(64).make_cache(kv_bits=8)} == {QuantizedKVCache}


def test_the_model_s_setting_and_a_request_s_own(monkeypatch):
    model, tokenizer = om.load("demo-gpt-oss", kv_bits=8)
    seen = []
    real = type(model).make_cache

    def watch(self, *arguments, **options):
        cache = real(self, *arguments, **options)
        seen.append({type(layer) for layer in cache})
        return cache

    monkeypatch.setattr(type(model), "make_cache", watch)
    for options, kind in (
        ({}, QuantizedKVCache), ({"kv_bits": 16}, KVCache), ({"kv_bits": 8}, QuantizedKVCache), ({"sliding_window": 64}, None),
    ):  # fmt: skip
        seen.clear()
        list(om.stream_generate(model, tokenizer, "What is a dog?", max_tokens=2, **options))
        assert all(kinds == {SlidingKVCache, *([kind] if kind else [])} for kinds in seen), options
        assert seen


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("source", ["demo-openelm", "demo-gpt-oss"])
def test_the_demos_answer_the_same(source):
    model, tokenizer = om.load(source, dtype="float32")
    for question in ("What is a banjo?", "What is a violin?"):
        options = {"max_tokens": 16 if source == "demo-openelm" else 40}  # of which some are reasoning
        plain = om.generate(model, tokenizer, question, **options)
        assert om.generate(model, tokenizer, question, kv_bits=8, **options) == plain != ""


@pytest.mark.parametrize("kv_bits", [0, 1, 2, 4, 6, 32, -8, True, "8", 8.5])
def test_other_numbers_of_bits(kv_bits):
    model = openelm_with_heads_of(32)
    with pytest.raises(SettingError, match="kv_bits is"):
        om.stream_generate(model, None, [1, 2], kv_bits=kv_bits)
    with pytest.raises(SettingError, match="kv_bits is"):
        om.load("demo-openelm", kv_bits=kv_bits)


def test_what_cannot_be_quantized_is_said_before_any_work():
    with pytest.raises(SettingError, match=r"head has 16 numbers, and MLX packs them by 32 or 64"):
        om.stream_generate(random_model(), None, [1, 2], kv_bits=8)
    with pytest.raises(SettingError, match="with a sliding window none does"):
        om.stream_generate(openelm_with_heads_of(32), None, [1, 2], kv_bits=8, sliding_window=16)


def test_growth_of_a_quantized_cache_is_in_the_budget():
    from openelm_mlx.decoding.budget import Budget

    model = openelm_with_heads_of(32)
    cache = model.make_cache(kv_bits=8)
    budget = Budget(model, cache, active_memory=lambda: 0)
    predicted = sum(budget.growth(60))
    model(mx.ones((1, 60), mx.int32), cache)
    assert sum(layer.nbytes for layer in cache) == predicted
    assert sum(budget.growth(60)) == 0


def test_a_spec_s_bytes_at_the_sizes_of_the_releases():
    from test_models_gpt_oss import release_config

    spec = spec_from_config(release_config("20b"))
    full = sum(layer.window is None for layer in spec.layers)
    plain, packed_bytes = (spec.kv_cache_bytes(131_072, kv_bits=bits) for bits in (None, 8))
    assert plain - packed_bytes == full * 131_072 * 8 * 2 * (128 - 72)
    assert isinstance(make_cache(spec, kv_bits=8)[1], QuantizedKVCache)
    assert UNPACK_FROM > 1
