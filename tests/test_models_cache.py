"""Caches against a list that forgets nothing: every chunking, every rewind, padding, growth, and mlx-lm's words.

The slow, obvious form: `Remembered` keeps each token's key and value in a Python list and attends with NumPy loops.
"""

import copy

import mlx.core as mx
import numpy as np
import pytest
from conftest import max_difference, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models_gpt_oss import TOLERANCE, greedy, load_gpt_oss, release_config

from openelm_mlx.models.attention import BlockMask, attend
from openelm_mlx.models.cache import KVCache, SlidingKVCache, make_cache
from openelm_mlx.specs import KV_STEP, kv_capacity, spec_from_config

H, K, D = 4, 2, 8


class Remembered:
    """All tokens so far in a list; attention over the last `window` of them by the definition, one query at a time."""

    def __init__(self, window=None, padding=(0,)):
        self.window, self.padding, self.tokens = window, padding, []

    def extend(self, queries, keys, values):
        """Arrays (B, heads, L, D) -> (B, H, L, D); rows that are padding come back as zeros."""
        out = np.zeros(queries.shape)
        for i in range(queries.shape[2]):
            self.tokens.append((keys[:, :, i], values[:, :, i]))
            position = len(self.tokens) - 1
            for b, padding in enumerate(self.padding):
                first = max(padding, 0 if self.window is None else position - self.window + 1)
                if position >= padding:
                    out[b, :, i] = self.one(queries[b, :, i], b, range(first, position + 1))
        return out

    def one(self, query, b, positions):
        out = np.zeros((H, D))
        for h in range(H):
            keys, values = (np.stack([self.tokens[p][part][b, h * K // H] for p in positions]) for part in (0, 1))
            weights = np.exp(keys @ query[h] / np.sqrt(D))
            out[h] = weights / weights.sum() @ values
        return out


class Stream:
    """One cache and the list beside it, fed with the same random tokens."""

    def __init__(self, cache, padding=(0,), seed=0):
        self.cache = cache
        self.known = Remembered(getattr(cache, "window", None), padding)
        self.rng = np.random.default_rng(seed)

    def extend(self, L, window_size=None):
        """Append L tokens and compare what their queries see."""
        B = len(self.known.padding)
        queries, keys, values = (self.rng.normal(size=(B, heads, L, D)) for heads in (H, K, K))
        mask = self.cache.make_mask(L) if window_size is None else self.cache.make_mask(L, window_size=window_size)
        fetched = self.cache.update_and_fetch(*(mx.array(x, mx.float32) for x in (keys, values)))
        ours = np.array(attend(mx.array(queries, mx.float32), *fetched, mask))
        theirs = self.known.extend(queries, keys, values)
        positions = np.arange(len(self.known.tokens) - L, len(self.known.tokens))
        is_text = positions >= np.array(self.known.padding)[:, None]
        assert np.isfinite(ours).all()
        assert np.abs((ours - theirs) * is_text[:, None, :, None]).max() < 2e-6
        assert self.cache.offset == len(self.known.tokens)

    def rewind(self, n):
        self.cache.rewind(n)
        del self.known.tokens[len(self.known.tokens) - n :]
        assert self.cache.offset == len(self.known.tokens)


def kinds(padding=None):
    left_padding = None if padding is None else mx.array(padding)
    return [KVCache(left_padding), *(SlidingKVCache(w, r, left_padding) for w in (1, 2, 3, 5, 8) for r in (0, 1, 4))]


# --- every way to the same attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 8, 9, 13, 26])
def test_every_chunk_size(chunk):
    for cache in kinds():
        stream = Stream(cache)
        for start in range(0, 26, chunk):
            stream.extend(min(chunk, 26 - start))


@pytest.mark.parametrize(
    "chunks", [[1, 5, 1, 1, 9, 1, 2], [9, 1, 1, 1, 1, 4, 1], [17, 1, 17, 1], [3] + [1] * 20 + [6, 1]]
)
@pytest.mark.parametrize("padding", [None, [0, 1, 7], [12, 3]])
def test_mixed_chunks_and_left_padding(chunks, padding):
    for cache in kinds(padding):
        stream = Stream(cache, tuple(padding or [0]))
        for L in chunks:
            stream.extend(L)


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("written", ["one by one", "at one go", "one, then the rest"])
@pytest.mark.parametrize(("window", "room"), [(1, 0), (1, 2), (2, 0), (2, 1), (4, 0), (4, 3)])
def test_rewind_at_every_point_and_go_on(window, room, written):
    """Up to the room and one more can be taken back at any offset, and everything: exactly. More is refused."""
    capacity = window + room
    for offset in range(1, 2 * capacity + 3):
        chunks = {"one by one": [1] * offset, "at one go": [offset], "one, then the rest": [1, offset - 1]}[written]
        for n in {*range(1, min(room + 3, offset) + 1), offset}:
            for then in ([1, 1, 1], [3, 1], [capacity + 1, 1]):
                stream = Stream(SlidingKVCache(window, room))
                for L in filter(None, chunks):
                    stream.extend(L)
                if n > room + 1 and n < offset and offset > capacity and window > 1:
                    with pytest.raises(ValueError, match=f"cannot take back {n} of {offset}"):
                        stream.rewind(n)
                else:
                    stream.rewind(n)
                for L in then:  # also after a refusal, which has changed nothing
                    stream.extend(L)


def check_story(window, room, padding, actions):
    """Extending (n > 0) and rewinding (n < 0): exact, or refused just when a needed token is overwritten."""
    left_padding = mx.array(padding) if any(padding) else None
    stream = Stream(SlidingKVCache(window, room, left_padding), padding)
    capacity, slots = window + room, {}  # slot -> (position, a number of its own for each token ever written)
    true: list[int] = []
    written = 0
    for n in actions:
        if n < 0:
            offset = len(true) + n
            needed = range(max(0, offset - window + 1), max(offset, 0))
            if offset < 0 or any(slots[p % capacity] != (p, true[p]) for p in needed):
                with pytest.raises(ValueError, match="cannot take back"):
                    stream.rewind(-n)
            else:
                stream.rewind(-n)
                del true[offset:]
            continue
        for _ in range(n):
            slots[len(true) % capacity] = (len(true), written)
            true.append(written)
            written += 1
        stream.extend(n)


@settings(max_examples=100, deadline=None)
@given(
    window=st.integers(1, 6),
    room=st.integers(0, 4),
    padding=st.sampled_from([(0,), (0, 2), (5, 0, 9)]),
    actions=st.lists(st.one_of(st.integers(1, 13), st.just(1), st.integers(-6, -1)), max_size=14),
)
def test_any_story(window, room, padding, actions):
    check_story(window, room, padding, actions)


@pytest.mark.parametrize("first", range(-4, 0))
@pytest.mark.parametrize("between", [1, 2, 3])
def test_rewinding_twice(first, between):
    """What the first rewind rejected is still in its slots, and what that had overwritten is gone for the second."""
    for second in range(-6, 0):
        check_story(3, 3, (0,), [10, first, between, second, 1, 2])


def test_rewind_of_a_cache_that_keeps_everything():
    stream = Stream(KVCache())
    for L in (5, 1, 300):
        stream.extend(L)
    stream.rewind(306)
    stream.extend(7)
    stream.rewind(3)
    stream.extend(1)
    stream.extend(4)
    for n in (-1, 10):
        with pytest.raises(ValueError, match="of 9 tokens"):
            stream.cache.rewind(n)


def test_rings_refuse_what_makes_no_sense():
    stream = Stream(SlidingKVCache(4, 2))
    stream.extend(3)
    for n in (-1, 4):
        with pytest.raises(ValueError, match="of 3 tokens"):
            stream.cache.rewind(n)
    stream.rewind(0)
    stream.extend(1)


@pytest.mark.parametrize("kept", [4, 9])
def test_a_narrower_window_than_the_cache_keeps(kept):
    """A layer may ask for fewer keys than its cache has: one that keeps everything, or a ring made for more."""
    for cache in (KVCache(), SlidingKVCache(kept)):
        stream = Stream(cache)
        stream.known.window = 3
        for L in (1, 2, 8, 1, 5, 1, 1):
            stream.extend(L, window_size=3)


def test_what_comes_back_is_the_cheapest():
    """A step sees the ring as it lies, a chunk window - 1 older tokens; a full ring without room needs no mask."""
    cache = SlidingKVCache(4)
    token, chunk = mx.zeros((1, K, 1, D)), mx.zeros((1, K, 3, D))
    assert cache.make_mask(3) == "causal"
    assert cache.update_and_fetch(chunk, chunk)[0].shape == (1, K, 3, D)
    assert cache.make_mask(1) is None  # it will be full with it
    assert cache.update_and_fetch(token, token)[0] is cache.keys
    assert cache.update_and_fetch(chunk, chunk)[0].shape == (1, K, 6, D)
    assert isinstance(cache.make_mask(8), BlockMask)
    assert SlidingKVCache(4, 1).make_mask(1).shape == (1, 5)


# --- growth and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_growth_by_steps(dtype):
    cache, rng = KVCache(), np.random.default_rng(0)
    known = np.zeros((1, K, 0, D))
    for L in (1, KV_STEP - 2, 1, 1, 3 * KV_STEP, 1, KV_STEP - 1, 7):
        keys = mx.array(rng.normal(size=(1, K, L, D))).astype(dtype)
        fetched, values = cache.update_and_fetch(keys, -keys)
        known = np.concatenate([known, np.array(keys.astype(mx.float32))], axis=2)
        assert fetched.dtype == values.dtype == dtype
        assert (np.array(fetched.astype(mx.float32)) == known).all()
        assert (np.array(values.astype(mx.float32)) == -known).all()
        places = kv_capacity(cache.offset)
        assert cache.keys.shape == (1, K, places, D)
        assert cache.nbytes == 2 * K * places * D * dtype.size == sum(buffer.nbytes for buffer in cache.buffers)
        assert [array.shape[2] for array in cache.state] == [cache.offset] * 2


def test_places_are_few_sizes_and_never_far_too_many():
    sizes = sorted({kv_capacity(n) for n in range(1, 131_073)})
    assert sizes[:12] == [*range(256, 2049, 256), 2560, 3072, 3584, 4096]
    assert sizes[-5:] == [65536, 81920, 98304, 114688, 131072]
    for n in range(1, 131_073):
        assert n <= kv_capacity(n) <= max(256 * -(-n // 256), 1.25 * n + 1)


def test_growing_to_n_tokens_copies_a_multiple_of_n():
    """A token at a time and by chunks of prefill; by steps of 256 it would be n * n / 512, 33 million here."""
    n = 131_072
    for chunk in (1, 512):
        copied = places = 0
        for offset in range(0, n, chunk):
            if offset + chunk > places:
                copied, places = copied + offset, kv_capacity(offset + chunk)
        assert copied < 6 * n


@pytest.mark.parametrize(("context_length", "places"), [(2600, 2816), (2817, 3072), (9000, 3072)])
def test_no_places_beyond_the_context(context_length, places):
    cache = KVCache(context_length=context_length)
    cache.update_and_fetch(*[mx.zeros((1, 1, 2600, 1))] * 2)
    assert cache.keys.shape[2] == places
    assert kv_capacity(context_length + 8, context_length) <= -(-context_length // 256) * 256 + 256
    cache.update_and_fetch(*[mx.zeros((1, 1, 8000, 1))] * 2)  # past the context it goes on, as without one
    assert cache.keys.shape[2] == 12288


def test_what_a_growth_takes():
    """All places anew and the old ones while they are copied; of a model's layers, one after the other."""
    cache = [KVCache() for _ in range(4)]
    for layer in cache:
        layer.update_and_fetch(mx.random.normal((1, K, 4096, D)), mx.random.normal((1, K, 4096, D)))
    mx.eval([layer.buffers for layer in cache])
    before, grown = cache[0].nbytes, cache[0].nbytes * 5 // 4
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    for layer in cache:
        assert layer.reserve(4096) == []
        mx.eval(layer.reserve(4097))
    assert mx.get_active_memory() - active == pytest.approx(4 * (grown - before), abs=1024)
    assert mx.get_peak_memory() - active <= 4 * (grown - before) + 2 * before + 1024


def test_a_ring_never_grows():
    cache = SlidingKVCache(5, 2)
    assert cache.nbytes == 0
    for L in (1, 300, 2):
        cache.update_and_fetch(*[mx.zeros((3, K, L, D), mx.bfloat16)] * 2)
        assert cache.nbytes == 2 * 3 * K * 7 * D * 2


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_real_caches_are_those_of_the_spec(fixtures, batch):
    """Where the tokens fill whole steps and the window; a ring of more room costs the room."""
    model = load_gpt_oss(fixtures / "gpt_oss_tiny", mx.bfloat16)
    cache, roomy = model.make_cache(), make_cache(model.spec, room=8)
    for each in (cache, roomy):
        model(mx.zeros((batch, KV_STEP), mx.int32), each)
    assert sum(layer.nbytes for layer in cache) == model.spec.kv_cache_bytes(KV_STEP, batch_size=batch)
    extra = sum(layer.kv_bytes_per_token() * 8 for layer in model.spec.layers if layer.window is not None)
    assert sum(layer.nbytes for layer in roomy) == sum(layer.nbytes for layer in cache) + batch * extra


def test_caches_of_the_releases():
    spec = spec_from_config(release_config("20b"))
    cache = make_cache(spec, room=8)
    assert [type(layer) for layer in cache[:2]] == [SlidingKVCache, KVCache]
    assert (len(cache), cache[0].window, cache[0].capacity) == (24, 128, 136)
    assert all(isinstance(layer, SlidingKVCache) for layer in make_cache(spec, window=1024))
    assert [layer.window for layer in make_cache(spec, window=1024)[:2]] == [128, 1024]
    assert make_cache(spec, left_padding=[0, 0])[0].left_padding is None
    assert make_cache(spec, left_padding=[0, 2])[1].left_padding.tolist() == [0, 2]


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("offset", [5, 11, 12, 15, 16, 17, 20, 21, 22, 37, 50])
def test_a_model_takes_back_rejected_tokens(fixtures, n, offset):
    """Four drafts and one token verified together, some or all of them taken back, around the window of 16."""
    model, known = load_gpt_oss(fixtures / "gpt_oss_tiny"), oracle(fixtures / "gpt_oss_tiny")
    tokens, cache = mx.array(known["tokens"]), make_cache(model.spec, room=4)
    model(tokens[:, :offset], cache)
    model(mx.full((1, 5), 9, mx.int32), cache)  # wrong guesses
    for layer in cache:
        layer.rewind(5)
    rest = [model(tokens[:, offset : offset + n], cache)]
    for layer in cache:
        layer.rewind(n)
    rest = [model(tokens[:, t : t + 1], cache) for t in range(offset, offset + n)]
    rest.append(model(tokens[:, offset + n :], cache))
    assert max_difference(mx.concatenate(rest, axis=1), known["logits_fp32"][:, offset:]) <= TOLERANCE
    assert {layer.offset for layer in cache} == {61}


@pytest.mark.parametrize("chunk", [1, 4, 30])
@pytest.mark.parametrize("padding", [None, [0, 6, 20]])
def test_rings_in_place_of_full_layers(fixtures, chunk, padding):
    """make_cache(window=5) is a model whose full layers have a window of 5."""
    import dataclasses

    folder = fixtures / "gpt_oss_odd"
    spec = load_gpt_oss(folder).spec
    narrow = tuple(dataclasses.replace(layer, window=layer.window or 5) for layer in spec.layers)
    model, known = load_gpt_oss(folder), load_gpt_oss(folder, spec=dataclasses.replace(spec, layers=narrow))
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (len(padding or [0]), 30)))
    cache = model.make_cache(window=5, left_padding=padding)
    ours = mx.concatenate([model(tokens[:, start : start + chunk], cache) for start in range(0, 30, chunk)], axis=1)
    theirs = np.array(known(tokens, left_padding=None if padding is None else mx.array(padding)))
    for row, first in enumerate(padding or [0]):
        assert max_difference(ours[row, first:], theirs[row, first:]) <= TOLERANCE


# --- mlx-lm's words ---------------------------------------------------------------------------------------------------


def test_what_mlx_lm_asks_of_a_cache():
    from mlx_lm.models.base import create_attention_mask
    from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

    full, ring = KVCache(), SlidingKVCache(4)
    assert full.empty()
    assert ring.empty()
    assert full.state == ring.state == ()
    for cache in (full, ring):
        cache.update_and_fetch(mx.ones((1, K, 6, D)), mx.ones((1, K, 6, D)))
        assert not cache.empty()
    assert (full.size(), ring.size()) == (6, 4)
    assert can_trim_prompt_cache([full])
    assert not can_trim_prompt_cache([full, ring])  # it cannot promise any number
    assert trim_prompt_cache([full], 2) == 2
    assert (full.offset, full.trim(9), full.offset) == (4, 4, 0)
    hidden = mx.zeros((1, 3, 8))
    assert create_attention_mask(hidden, full) == "causal"
    assert create_attention_mask(hidden, ring, return_array=True).shape == (3, 6)
    assert create_attention_mask(hidden, ring, window_size=4).shape == (3, 6)
    assert create_attention_mask(hidden[:, :1], ring, window_size=4) is None
    assert create_attention_mask(hidden[:, :1], ring, return_array=True).shape == (1, 4)


def test_array_masks_say_the_same():
    """mlx-lm may ask for an array: the same attention as by the cheapest form."""
    for make in (KVCache, lambda: SlidingKVCache(3), lambda: SlidingKVCache(3, 2)):
        for L in (1, 2, 7):
            one, other = make(), make()
            rng = np.random.default_rng(L)
            for cache in (one, other):
                cache.update_and_fetch(*[mx.array(np.random.default_rng(9).normal(size=(1, K, 5, D)), mx.float32)] * 2)
            queries = mx.array(rng.normal(size=(1, H, L, D)), mx.float32)
            keys = mx.array(rng.normal(size=(1, K, L, D)), mx.float32)
            masks = one.make_mask(L), other.make_mask(L, return_array=True)
            assert isinstance(masks[1], mx.array)
            outs = [
                attend(queries, *c.update_and_fetch(keys, keys), m) for c, m in zip((one, other), masks, strict=True)
            ]
            assert max_difference(outs[0], np.array(outs[1])) < 1e-6


@pytest.mark.parametrize("used", [3, 11])
def test_state_and_copies_are_whole(fixtures, used):
    """A cache rebuilt from `state` and `meta_state`, and a deep copy, go on alone and alike."""
    model = load_gpt_oss(fixtures / "gpt_oss_odd")
    tokens = mx.array(oracle(fixtures / "gpt_oss_odd")["tokens"])
    cache = model.make_cache()
    model(tokens[:, :used], cache)
    rebuilt = model.make_cache()
    for new, old in zip(rebuilt, cache, strict=True):
        new.state = [mx.array(array) for array in old.state]
        new.meta_state = old.meta_state
    copied = copy.deepcopy(cache)
    expected = model(tokens[:, used : used + 9], cache)
    assert [layer.offset for layer in copied] == [used] * 3
    for other in (rebuilt, copied):
        for start in range(used, used + 9):
            logits = model(tokens[:, start : start + 1], other)
        assert max_difference(logits[:, -1], np.array(expected[:, -1])) <= TOLERANCE


def test_mlx_lms_prompt_store_keeps_whole_prompts(fixtures):
    """Stored caches are copied, so two continuations of one prompt do not touch each other."""
    from mlx_lm.models.cache import LRUPromptCache

    model = load_gpt_oss(fixtures / "gpt_oss_tiny")
    prompt = oracle(fixtures / "gpt_oss_tiny")["tokens"][0, :25].tolist()
    cache = model.make_cache()
    model(mx.array([prompt]), cache)
    store = LRUPromptCache(max_size=4)
    store.insert_cache("model", prompt, cache)
    for more in ([3], [5, 6]):
        found, rest = store.fetch_nearest_cache("model", prompt + more)
        assert rest == more
        token = int(mx.argmax(model(mx.array([rest]), found)[0, -1]))
        assert [token] == greedy(model, prompt + more, 1)
        assert found[0].offset == len(prompt) + len(more)


@pytest.mark.parametrize("spare", [0, 8])
@pytest.mark.parametrize("limit", [None, 300, 2100])
def test_a_cache_says_how_many_places_it_will_have(spare, limit):
    """Also where it was copied, taken back, or given places before."""

    def appended(cache, count):
        places = cache.capacity_for(count)
        cache.update_and_fetch(mx.ones((1, 1, count, 2)), mx.ones((1, 1, count, 2)))
        assert cache.keys.shape[2] == places
        keys, values = cache.places(places)
        assert keys.shape == values.shape == (1, 1, places, 2)
        assert mx.isfinite(keys).all()
        return cache

    cache = KVCache(None, limit, spare)
    for count in (3, 250, 9, 40, 1800):
        appended(cache, count)
    forked = cache.fork(cache.snapshot())
    forked.rewind(7)
    for count in (3, 4, 1):
        appended(forked, count)
    cache.reserve(2500)
    appended(cache, 100)


def test_a_fork_grows_as_the_cache_that_it_is_of():
    """No further than the model's context, and with the same spare places."""
    cache = KVCache(None, context_length=2100, spare_places=8)
    cache.update_and_fetch(*[mx.zeros((1, K, 2059, D))] * 2)
    fork = cache.fork(cache.snapshot())
    fork.update_and_fetch(*[mx.zeros((1, K, 1, D))] * 2)
    assert fork.keys.shape[2] == cache.keys.shape[2] == kv_capacity(2060, 2100) + 8 < kv_capacity(2060)
