"""Keys and values of many requests in one buffer a layer: against caches apart, and in how few operations."""

from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_fixture, max_difference, random_model
from primitive_counts import forms_of_a_gpu, primitives

from openelm_mlx.decoding import pieces as pieces_module
from openelm_mlx.decoding.batch_step import BatchStep, logits_of_slots
from openelm_mlx.decoding.pieces import LatestPieces, ResidentPieces, SlotPieces
from openelm_mlx.models import rows as rows_module
from openelm_mlx.models import slot_attention
from openelm_mlx.models import slots as slots_module
from openelm_mlx.models.attention import attend, attend_by_products
from openelm_mlx.models.prompt_products import num_padding
from openelm_mlx.models.rows import Rows, flat_logits
from openelm_mlx.models.slots import SlotBank

FAMILIES = {"openelm": "openelm_tiny", "gpt_oss": "gpt_oss_tiny"}
# The first one has gone round the ring of layers with a window: new tokens have other columns there than in full layers.
LENGTHS = [17, 3, 9, 140, 12]


@pytest.fixture(params=FAMILIES)
def model(fixtures, request):
    return load_fixture(fixtures / FAMILIES[request.param])


def filled(model, lengths=LENGTHS, **options):
    """A bank of requests of these lengths, and the same ones' own caches."""
    bank, caches = SlotBank(model.spec, evaluate=mx.eval, **options), []
    draw = np.random.default_rng(3)
    for owner, length in enumerate(lengths):
        prompt = mx.array(draw.integers(3, 250, (1, length)))
        both = model.make_cache(), model.make_cache()
        for cache in both:
            mx.eval(model(prompt, cache)[0, -1, 0])
        bank.join(owner, both[0])
        caches.append(both[1])
    return bank, caches


@pytest.mark.parametrize("form", ["masks", "kernel", "pieces"])
def test_slots_are_caches_apart(model, form, monkeypatch):
    """pieces: with the attention of each layer in the piece between two writes, as on a GPU that has the kernel."""
    monkeypatch.setattr(model, "choices", replace(model.choices, slot_kernel=form == "pieces"))
    bank, caches = filled(model, has_kernel=form != "masks")
    step, count = BatchStep(model, compile=False), len(caches)
    if form == "pieces":
        step = BatchStep(model, compile=True)
        step._slot_pieces = LatestPieces(model, SlotPieces, False)  # MLX's compiler would call the machine's
    draw = np.random.default_rng(4)
    for _ in range(8):
        tokens = mx.array(draw.integers(3, 250, (len(bank),)))
        bank.begin()
        found = step(tokens, [], bank)[:count]
        bank.end()
        known = flat_logits(model, tokens[:count], [Rows(cache) for cache in caches])
        assert max_difference(found, np.array(known)) <= 1e-4
        assert mx.array_equal(mx.argmax(found, axis=-1), mx.argmax(known, axis=-1))


@pytest.mark.parametrize("has_kernel", [False, True])
def test_what_was_in_a_slot_does_not_reach_whoever_has_it_next(model, has_kernel):
    """NaN in columns that it does not see: those of a request whose numbers had become too large."""
    bank, caches = filled(model, LENGTHS[:4], has_kernel=has_kernel)
    gone, step = 1, BatchStep(model, compile=False)
    for buffer in bank._buffers:
        buffer[:, gone] = mx.nan
    draw = np.random.default_rng(5)

    def stepped() -> tuple[mx.array, mx.array]:
        tokens = mx.array(draw.integers(3, 250, (len(bank),)))
        bank.begin()
        found = step(tokens, [], bank)
        bank.end()
        return found, flat_logits(model, tokens, [Rows(cache) for cache in caches])

    found, known = stepped()
    others = mx.array([0, 2, 3])
    assert mx.isnan(found[gone]).all()
    assert max_difference(found[others], np.array(known[others])) <= 1e-4
    bank.leave(gone)
    stepped()  # nobody's row writes NaN once more
    own, caches[gone] = model.make_cache(), model.make_cache()
    for cache in (own, caches[gone]):
        mx.eval(model(mx.array([[7, 8, 9, 10, 11]]), cache)[0, -1, 0])
    assert bank.join("new", own) == gone
    for _ in range(3):
        found, known = stepped()
        assert max_difference(found, np.array(known)) <= 1e-4


def test_who_is_not_in_a_slot_is_computed_beside(model, monkeypatch):
    """One token of a request apart, as one has that is longer than slots are."""
    monkeypatch.setattr(model, "choices", replace(model.choices, slot_kernel=True))
    bank, caches = filled(model, LENGTHS[:3], has_kernel=True)
    step = BatchStep(model, compile=True)
    step._latest = LatestPieces(model, ResidentPieces, False)
    step._slot_pieces = LatestPieces(model, SlotPieces, False)
    apart = model.make_cache()
    mx.eval(model(mx.arange(3, 40)[None], apart))
    tokens = mx.array([5, 6, 7, 0, 8])
    bank.begin()
    found = step(tokens, [Rows(apart)], bank)
    mx.eval(apart[0].buffers)
    for layer in apart:
        layer.rewind(1)
    known = flat_logits(model, tokens[mx.array([0, 1, 2, 4])], [Rows(cache) for cache in [*caches, apart]])
    assert max_difference(found[mx.array([0, 1, 2, 4])], np.array(known)) <= 1e-4


@pytest.mark.parametrize("form", ["alone", "beside a prompt"])
def test_what_the_kernel_is_told_is_where_the_new_tokens_are(model, form, monkeypatch):
    """It takes the newest column as it is: the other form of attention would not notice one beyond the buffer."""
    told = []

    def noted(queries, buffer, state, scale, sinks=None):
        told.append((buffer, state))
        return slot_attention.attend_with_mask(queries, buffer, state, scale, sinks)

    for module in (slots_module, pieces_module):
        monkeypatch.setattr(module, "attend_in_slots", noted)
    bank, caches = filled(model, has_kernel=True)
    rounds = 300  # past the end of 256 columns
    bank._full_column += 256 * rounds
    bank._ring_column += 16 * rounds
    lengths = list(bank.lengths)
    bank.begin()
    if form == "alone":
        logits_of_slots(SlotPieces(model, compile=False), mx.arange(3, 3 + len(bank)), bank)
    else:
        flat_logits(model, mx.arange(3, 6 + len(bank)), [Rows(caches[0], 3, True)], bank=bank)
    assert len(told) == len(model.layers)
    for i, (buffer, state) in enumerate(told):
        newest, *known = state.tolist()
        assert known == lengths
        assert newest == bank._new_column(i) < buffer.shape[3]


def test_few_shapes_of_slots_stay_traced(model, monkeypatch):
    """A server that runs for days would keep a trace of every layer for each number of slots and of columns."""
    made = []
    monkeypatch.setattr(pieces_module.mx, "compile", lambda function: made.append(function) or function)
    pieces = SlotPieces(model, compile=True)
    num_pieces = len(made)
    assert num_pieces == len(model.layers) + 1
    for columns in range(pieces_module.MOST_SHAPES):
        pieces.prepare((2, columns))
    pieces.prepare((2, 0))
    assert len(made) == num_pieces
    pieces.prepare((4, 0))
    assert len(made) == 2 * num_pieces
    pieces.prepare((4, 0)), pieces.prepare((2, 0))
    assert len(made) == 2 * num_pieces
    bank, _ = filled(model, [6, 4], has_kernel=True)
    bank.begin()
    assert bank.shape == (2, bank._buffers[-1].shape[3])
    shapes = []
    monkeypatch.setattr(pieces, "prepare", shapes.append)
    logits_of_slots(pieces, mx.array([5, 6]), bank)
    assert shapes == [bank.shape]


@pytest.mark.parametrize("has_kernel", [False, True])
def test_a_prompt_beside_slots_changes_nothing(model, has_kernel):
    bank, _ = filled(model, LENGTHS[:2], has_kernel=has_kernel)
    other, caches = filled(model, LENGTHS[:2], has_kernel=has_kernel)
    tokens = mx.array([5, 6])
    bank.begin(), other.begin()
    alone = flat_logits(model, tokens, [], bank=bank)
    beside = flat_logits(model, mx.array([5, 6, 7, 8]), [Rows(caches[0], 2, True)], bank=other)
    assert max_difference(alone, np.array(beside[:2])) <= 1e-5


@pytest.mark.parametrize("block", [3, 7, 100])
def test_a_chunk_of_a_prompt_attends_by_products_in_blocks(model, block, monkeypatch):
    """cuDNN, which a GPU would take else, builds a program for every length."""
    heads, length, before = model.spec.layers[0].num_heads, 20, 5
    tokens = mx.array(np.random.default_rng(5).integers(3, 250, (before + length,)))
    found = []
    for limit in (0, block * heads * (before + length)):
        monkeypatch.setattr(model, "choices", replace(model.choices, prompt_products_to=limit))
        calls = []

        def counted(*arguments, calls=calls):
            calls.append(arguments)
            return attend_by_products(*arguments)

        monkeypatch.setattr(rows_module, "attend_by_products", counted)
        cache = model.make_cache()
        flat_logits(model, tokens[:before], [Rows(cache, before, True)])
        calls.clear()
        found.append(flat_logits(model, tokens[before:], [Rows(cache, length, True)]))
        seen_by = [each[0].shape[1] * each[0].shape[2] * (before + length) for each in calls]
        assert all(scores <= limit for scores in seen_by)
        # Of the last layer only the last token is wanted; OpenELM's layers differ in their heads.
        by_products = [
            each for each in model.spec.layers[:-1] if each.num_heads * length * (before + length) <= 8 * limit
        ]
        assert sum(each[0].shape[2] for each in calls) == length * len(by_products)
        assert not limit or by_products
    assert max_difference(found[0], np.array(found[1])) <= 1e-5


@pytest.mark.parametrize("block", [7, 100])
def test_products_of_few_shapes_give_the_same(model, block, monkeypatch):
    """A chunk's products take queries of whoever comes next and empty places as well, but where there are none."""
    heads, shapes = model.spec.layers[0].num_heads, set()

    def noted(queries, keys, *rest):
        shapes.add((queries.shape[2], keys.shape[2]))
        return attend_by_products(queries, keys, *rest)

    monkeypatch.setattr(rows_module, "attend_by_products", noted)
    draw, found = np.random.default_rng(7), []
    # Of two requests, pass after pass; behind the last chunk there may be fewer rows than its products would like.
    pieces = [[(0, 19), (1, 37)], [(0, 21), (1, 3)], [(1, 33), (0, 5)], [(0, 3), (1, 41)]]
    tokens = [mx.array(draw.integers(3, 250, (sum(n for _, n in each),))) for each in pieces]
    for pads in (False, True):
        limit = block * heads * 60
        choices = replace(model.choices, prompt_products_to=limit, pads_rows=pads)
        monkeypatch.setattr(model, "choices", choices)
        caches = [model.make_cache() for _ in range(2)]
        shapes.clear()
        for each, given in zip(pieces, tokens, strict=True):
            rows = [Rows(caches[owner], length, True) for owner, length in each]
            padding = 4 if len(found) % len(pieces) < 3 else 1
            found.append(flat_logits(model, given, rows, padding=padding * pads))
            mx.eval([layer.buffers for cache in caches for layer in cache])
        if pads and block == 100 and all(each.window is None for each in model.spec.layers):
            assert all(num_padding(keys) == 0 for _, keys in shapes), shapes
            assert {length for length, _ in shapes} >= {20, 40, 24, 42}, shapes
    for known, padded in zip(found[:4], found[4:], strict=True):
        assert max_difference(padded, np.array(known)) <= 1e-5


def test_products_go_no_further_than_a_cache_does(fixtures, monkeypatch):
    """A copy of a kept prefix has no places beyond it: taken back a little, it has fewer than products would like."""
    model, shapes, found = load_fixture(fixtures / FAMILIES["openelm"]), set(), []

    def noted(queries, keys, *rest):
        shapes.add((queries.shape[2], keys.shape[2]))
        return attend_by_products(queries, keys, *rest)

    monkeypatch.setattr(rows_module, "attend_by_products", noted)
    for pads in (False, True):
        monkeypatch.setattr(model, "choices", replace(model.choices, prompt_products_to=2**25, pads_rows=pads))
        kept = model.make_cache()
        flat_logits(model, mx.arange(3, 45), [Rows(kept, 42, True)])
        cache = [layer.fork(layer.snapshot()) for layer in kept]
        for layer in cache:
            layer.rewind(5)
        shapes.clear()
        found.append(flat_logits(model, mx.arange(50, 54), [Rows(cache, 4, True)], padding=7 * pads))
        assert shapes == {(4, 41)}  # and not 48 keys
        found.append(flat_logits(model, mx.arange(60, 69), [Rows(cache, 9, True)], padding=7 * pads))
        assert (10, 56) in shapes if pads else (9, 50) in shapes  # it has grown
    for known, padded in zip(found[:2], found[2:], strict=True):
        assert max_difference(padded, np.array(known)) <= 1e-5


def test_packed_keys_are_not_multiplied_as_they_are(monkeypatch):
    model = random_model(head_dim=32)
    monkeypatch.setattr(rows_module, "attend_by_products", pytest.fail)
    found = []
    for limit in (0, 2**25):
        monkeypatch.setattr(model, "choices", replace(model.choices, prompt_products_to=limit, pads_rows=limit > 0))
        found.append(flat_logits(model, mx.arange(3, 24), [Rows(model.make_cache(kv_bits=8), 21, True)]))
    assert mx.array_equal(*found)


def test_slots_are_copied_only_where_fewer_will_do(model):
    """A copy is there beside the buffer for a moment, which memory may be too short for."""
    bank, _ = filled(model, LENGTHS[:3])
    assert len(bank) == 4
    bank.leave(bank.slot_of(0))
    assert len(bank) == 2
    before = list(bank._buffers)
    bank.leave(bank.slot_of(1))
    assert len(bank) == 2
    assert all(now is then for now, then in zip(bank._buffers, before, strict=True))
    assert bank.slot_of(2) is not None


def test_rows_that_are_nobodys_change_nothing(model):
    """Beside slots, a request apart, and chunks of two prompts of which one is not at its end."""
    found = []
    for padding in (0, 1, 7):
        bank, caches = filled(model, LENGTHS[:2])
        rows = [Rows(caches[0]), Rows(model.make_cache(), 5, True, False), Rows(caches[1], 9, True)]
        bank.begin()
        found.append(flat_logits(model, mx.arange(3, 3 + len(bank) + 15), rows, None, bank, padding))
        mx.eval([layer.buffers for each in rows for layer in each.cache])
        bank.end()
        found.append(model(mx.array([[4, 5]]), rows[1].cache)[0])
    assert found[0].shape[0] == len(bank) + 2
    for logits, known in zip(found[2:], found[:2] * 2, strict=True):
        assert mx.array_equal(logits, known)


def test_passes_with_prompts_have_few_numbers_of_rows():
    numbers = {n + num_padding(n) for n in range(1, 2049)}
    assert len(numbers) <= 4 * 11
    assert all(num_padding(n) == 0 for n in numbers)
    assert all(num_padding(n) <= n / 4 for n in range(1, 2049))


@pytest.mark.parametrize(("length", "limit", "pads"), [(20, 20, False), (41, 211, True)])
def test_a_prompt_of_more_blocks_than_that_attends_as_ever(model, monkeypatch, length, limit, pads):
    """Those of 41 tokens would be eight, but are twelve of four queries and 48 keys where shapes are to be few."""
    heads = min(each.num_heads for each in model.spec.layers)
    monkeypatch.setattr(model, "choices", replace(model.choices, prompt_products_to=heads * limit, pads_rows=pads))
    monkeypatch.setattr(rows_module, "attend_by_products", pytest.fail)
    flat_logits(model, mx.arange(3, 3 + length), [Rows(model.make_cache(), length, True)], padding=7 * pads)


def test_who_joins_is_written_in_place_and_waited_for_once(model):
    """What a pass still reads would be copied as a whole; and each wait is a way to the device and back."""
    done = []
    bank = SlotBank(
        model.spec, evaluate=lambda arrays: (mx.eval(arrays), done.append("evaluated")),
        settle=lambda: done.append("settled"),
    )  # fmt: skip
    for owner in range(2):
        cache = model.make_cache()
        mx.eval(model(mx.array([[5, 6, 7]]), cache))
        done.clear()
        bank.join(owner, cache)
        assert done == ["settled", "evaluated"]


def test_what_slots_are_given_is_what_caches_are_given(model):
    """Bit for bit, keys and values in one."""
    layer, positions = model.layers[-1], [4, 0, 30]
    x = mx.random.normal((3, model.spec.hidden_size))
    known, keys, values = layer.before_attention(x, mx.array(positions))
    queries, new = layer.before_slots(x, mx.array(positions, mx.float32))
    assert mx.array_equal(queries, known)
    assert mx.array_equal(new, mx.stack([keys, values]))


def test_a_layer_of_a_step_in_slots_takes_few_operations(fixtures, monkeypatch):
    """One write for keys and values, one attention, nothing copied, and no index that copies a buffer."""
    model = load_fixture(fixtures / FAMILIES["openelm"])
    bank, _ = filled(model, [6, 4], has_kernel=True)
    tokens = mx.array([5, 6])
    pieces = SlotPieces(model, compile=False)

    def one_kernel(queries, buffer, state, scale, sinks=None):
        return mx.depends([queries], [buffer, state])[0]

    monkeypatch.setattr(pieces_module, "attend_in_slots", one_kernel)
    mx.eval(tokens)
    with forms_of_a_gpu():
        bank.begin()
        counts = primitives(logits_of_slots(pieces, tokens, bank))
    groups = Counter({"Compiled": 0})
    for name, number in counts.items():
        groups["Compiled" if name.startswith("Compiled") else name] += number
    layers = len(model.layers)
    assert groups["SliceUpdate"] == layers
    assert groups["Concatenate"] == groups["Contiguous"] == 0
    assert groups["Gather"] == 1  # the embedding
    assert groups["Matmul"] + groups["AddMM"] == 4 * layers + 1
    assert groups["Compiled"] == 2 * layers  # the rotation with the norm's gains, the feed-forward's gate
    assert groups["Depends"] == 4 * layers + 1  # norms, attention


def test_slots_are_given_the_gains_of_now(fixtures):
    """What is made of a norm's gains is made again when they are replaced, by an update or one by one."""
    model = load_fixture(fixtures / FAMILIES["openelm"])
    layer, positions = model.layers[-1], [4, 30]
    x = mx.random.normal((2, model.spec.hidden_size))
    for name in ("q_norm", "k_norm"):
        before = layer.before_slots(x, mx.array(positions, mx.float32))
        layer.attn[name].weight = layer.attn[name].weight * 2 + 1
        known, keys, values = layer.before_attention(x, mx.array(positions))
        queries, new = layer.before_slots(x, mx.array(positions, mx.float32))
        assert mx.array_equal(queries, known)
        assert mx.array_equal(new, mx.stack([keys, values]))
        assert not (mx.array_equal(queries, before[0]) and mx.array_equal(new, before[1]))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_products_are_attention_in_every_type(dtype, has_sinks):
    draw = np.random.default_rng(1)
    queries, keys, values = (
        mx.array(draw.normal(size=(3, heads, length, 16))).astype(dtype) for heads, length in ((8, 3), (2, 20), (2, 20))
    )
    sinks = mx.array(draw.normal(size=8)).astype(dtype) if has_sinks else None
    mask = mx.arange(20) < mx.array([[5, 6, 7], [18, 19, 20], [11, 12, 13]])[:, None, :, None]
    found = attend_by_products(queries, keys, values, mask, None, sinks)
    assert found.dtype == dtype
    known = attend(queries, keys, values, mask, None, sinks)
    limit = {mx.float32: 1e-6, mx.bfloat16: 0.03, mx.float16: 4e-3}[dtype]
    assert max_difference(found.astype(mx.float32), np.array(known.astype(mx.float32))) <= limit
