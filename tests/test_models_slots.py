"""Keys and values of many requests in one buffer a layer: against caches apart, and in how few operations."""

from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_fixture, max_difference, random_model
from primitive_counts import forms_of_a_gpu, primitives
from slots_in_place import slots_in_place

from openelm_mlx.decoding import pieces as pieces_module
from openelm_mlx.decoding.batch_step import BatchStep
from openelm_mlx.decoding.pieces import LatestPieces, ResidentPieces, SlotPieces
from openelm_mlx.models import rows as rows_module
from openelm_mlx.models import slot_attention
from openelm_mlx.models import slot_step as slot_step_module
from openelm_mlx.models.attention import attend, attend_by_products
from openelm_mlx.models.prompt_products import num_padding
from openelm_mlx.models.rows import Rows, flat_logits
from openelm_mlx.models.slot_sizes import RING_ROOM, rows_for
from openelm_mlx.models.slots import SlotBank

FAMILIES = {"openelm": "openelm_tiny", "gpt_oss": "gpt_oss_tiny"}
# The first one has gone round the ring of layers with a window: new tokens have other columns there than in full layers.
LENGTHS = [17, 3, 9, 140, 12]
FORMS = ["slots alone", "beside a request apart", "a cache first"]


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
    for buffer in bank.buffers:
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
    """It takes slots and positions as they are, and the window of the layer."""
    told = []

    def noted(queries, buffer, rows, scale, sinks=None, window=None, written=None):
        told.append((buffer, rows, window))
        return slot_attention.attend_with_mask(queries, buffer, rows, scale, sinks, window)

    monkeypatch.setattr(slot_step_module, "attend_in_slots", noted)
    bank, caches = filled(model, has_kernel=True)
    expected = [[slot, length] for slot, length in enumerate(bank.lengths)]
    bank.begin()
    if form == "alone":
        SlotPieces(model, compile=False)(mx.arange(3, 3 + len(bank)), bank)
    else:
        flat_logits(model, mx.arange(3, 6 + len(bank)), [Rows(caches[0], 3, True)], bank=bank)
    assert len(told) == len(model.layers)
    for layer, (buffer, rows, window) in zip(model.spec.layers, told, strict=True):
        assert rows.tolist() == expected
        assert window == layer.window
        assert buffer.shape[3] == (window or bank.shape[1])


@pytest.mark.parametrize("layers_in_a_piece", [1, 3, 100])
def test_pieces_that_are_traced_in_part_say_the_same(model, layers_in_a_piece, monkeypatch):
    """Of some layers from traces, and of the others not; also where of a prompt's rows the last one alone is wanted."""
    slots_in_place(monkeypatch)
    monkeypatch.setattr(pieces_module, "LAYERS_IN_A_PIECE", layers_in_a_piece)
    monkeypatch.setattr(pieces_module, "compile_apart", lambda function: function)  # MLX's would call the machine's
    pieces = SlotPieces(model, compile=True)
    bank, _ = filled(model, [6, 4], has_kernel=True, takes_prompts=True)
    for counts in (None, [1, 4]):
        for _ in range(pieces_module.TRACED_AFTER + len(model.layers) + 1):
            bank.begin(counts)
            tokens = mx.arange(5, 5 + bank.num_rows)
            known = slot_step_module.slot_logits(model, tokens, bank)
            mx.eval(known)
            found = pieces(tokens, bank)
            assert found.shape == (len(bank), model.spec.vocab_size)
            assert mx.array_equal(found, known)
    assert set(pieces._num_traced.values()) == {-(-len(model.layers) // layers_in_a_piece)}


def test_few_shapes_of_slots_stay_traced(model, monkeypatch):
    """A server that runs for days would keep a trace for each number of rows, slots and columns; and many come only once."""
    made, traced = [], []
    slots_in_place(monkeypatch)
    monkeypatch.setattr(pieces_module, "LAYERS_IN_A_PIECE", 1)

    def compiled(function):
        made.append(function)
        return lambda *arguments: traced.append(arguments) or function(*arguments)

    monkeypatch.setattr(pieces_module.mx, "compile", compiled)
    pieces, count = SlotPieces(model, compile=True), len(model.layers)
    assert len(made) == count > 1
    bank, _ = filled(model, [6, 4], has_kernel=True, takes_prompts=True)
    known = None

    def step(counts=None):
        """How many pieces a step takes from traces."""
        bank.begin(counts)
        traced.clear()
        pieces(mx.arange(5, 5 + bank.num_rows), bank)
        return len(traced)

    for at in range(pieces_module.TRACED_AFTER + count + 2):
        bank.begin()
        traced.clear()
        found = pieces(mx.array([5, 6]), bank)
        assert known is None or mx.array_equal(found, known)
        known = found
        # One piece after the other, so that no step is far longer than the others.
        assert len(traced) == min(count, max(0, at + 1 - pieces_module.TRACED_AFTER))
    pieces._num_traced |= {(2, 2, at): count for at in range(pieces_module.MOST_SHAPES - 1)}
    assert [step([1, 4]) for _ in range(pieces_module.TRACED_AFTER)] == [0] * pieces_module.TRACED_AFTER
    assert len(made) == count
    assert [step([1, 4]) for _ in range(3)] == [min(count, 1), min(count, 2), min(count, 3)]
    assert len(made) == 2 * count
    bank.begin()
    assert mx.array_equal(pieces(mx.array([5, 6]), bank), known)
    assert step() == min(count, 2)
    pieces._times.update(dict.fromkeys(range(pieces_module.MOST_COUNTED), 1))
    assert step() == 0
    assert len(pieces._times) == 1


def in_pieces(draw, bank, given, longest):
    """Of each slot how many tokens it is given next, of those that are left; sometimes none, as one that has to wait."""
    counts = []
    for owner in bank.owners:
        most = 0 if owner is None else min(len(given[owner]), longest)
        counts.append(0 if not most or draw.random() < 0.2 else int(draw.integers(1, most + 1)))
    return counts


@pytest.mark.parametrize("are_in_place", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_prompts_in_slots_are_prompts_apart(model, form, are_in_place, monkeypatch):
    """Pieces of prompts of several requests, beside others that decode or wait: the logits after the last token of each."""
    if are_in_place:
        slots_in_place(monkeypatch)
    draw = np.random.default_rng(FORMS.index(form))
    bank = SlotBank(model.spec, evaluate=mx.eval, has_kernel=True, takes_prompts=True)
    assert bank.is_in_place == are_in_place
    given, alone = {}, {}
    for owner, length in enumerate([41, 3, 230, 60, 1]):
        tokens = draw.integers(3, 250, length).tolist()
        given[owner], alone[owner] = tokens[:], model.make_cache()
        cache = model.make_cache()
        if form == "a cache first" and length > 20:  # as of a prefix that was kept
            for each in (cache, alone[owner]):
                mx.eval(model(mx.array([tokens[:20]]), each)[0, -1, 0])
            del given[owner][:20]
        assert bank.join(owner, cache, length) == owner
    apart = [model.make_cache(), model.make_cache()]
    longest = min(bank.longest_piece, 30)
    while any(given.values()):
        counts = in_pieces(draw, bank, given, longest)
        padding = int(draw.integers(0, 4))
        taken = [given[owner][:count] if count else [] for owner, count in zip(bank.owners, counts, strict=True)]
        tokens = [each[0] if each else 0 for each in taken]
        tokens += [token for each in taken for token in each[1:]] + [0] * padding
        bank.begin(counts, padding)
        beside = [Rows(apart[0], 3, True)] if form == "beside a request apart" else []
        found = flat_logits(model, mx.array(tokens + [7, 8, 9] * len(beside)), beside, bank=bank)
        bank.end()
        mx.eval(found, bank.buffers, [layer.buffers for layer in apart[0]])
        for slot, (owner, own) in enumerate(zip(bank.owners, taken, strict=True)):
            if not own:
                continue
            del given[owner][: len(own)]
            known = model(mx.array([own]), alone[owner])[0, -1]
            assert bank.lengths[slot] == alone[owner][0].offset
            assert max_difference(found[slot], np.array(known)) <= 1e-4
        if beside:
            known = model(mx.array([[7, 8, 9]]), apart[1])[0, -1]
            assert max_difference(found[-1], np.array(known)) <= 1e-4
    # And out again.
    for owner, cache in alone.items():
        own = model.make_cache()
        bank.leave(bank.slot_of(owner), own)
        found, known = (model(mx.array([[5, 6]]), each)[0] for each in (own, cache))
        assert max_difference(found, np.array(known)) <= 1e-4
    assert len(bank) == 0


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
    before = bank.buffers
    bank.leave(bank.slot_of(1))
    assert len(bank) == 2
    assert all(now is then for now, then in zip(bank.buffers, before, strict=True))
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


def test_passes_with_prompts_in_slots_have_fewer_numbers_of_rows():
    numbers = sorted({rows_for(n) for n in range(1, 2049)})
    assert numbers == [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(n <= rows_for(n) < 2 * n for n in range(1, 2049))


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


def test_what_is_written_in_place_is_computed_before_it_is_moved(model, monkeypatch):
    """MLX knows of no write: what a step gives is waited for, which writes, and then the device."""
    slots_in_place(monkeypatch)
    done = []
    bank = SlotBank(model.spec, has_kernel=True, takes_prompts=True)
    bank._evaluate = lambda arrays: (mx.eval(arrays), done.append(arrays))
    bank._settle = lambda: done.append("settled")
    for owner in range(2):
        bank.join(owner, model.make_cache(), 5)
    assert done == []
    bank.begin([5, 3])
    found = flat_logits(model, mx.arange(3, 11), [], bank=bank)
    bank.end(found)
    cache = model.make_cache()
    bank.leave(0, cache)
    assert done[0] is found
    assert done[1] == "settled"
    assert cache[0].offset == 5
    for arrays in done[2:]:
        assert all(each is not buffer for each in arrays for buffer in bank.buffers)
    done.clear()
    bank.begin([0, 1])
    bank.end(known := flat_logits(model, mx.array([0, 7]), [], bank=bank))
    bank.join("more", cache)
    assert known[1].tolist()
    bank.join("one too many", model.make_cache())  # for whom there are more slots
    at = next(i for i, each in enumerate(done) if each is known)
    assert done[at + 1] == "settled"


def test_a_piece_as_long_as_rings_have_room_for(fixtures, monkeypatch):
    """With rows that are nobody's, which lie behind it, in rings that have gone round."""
    model = load_fixture(fixtures / FAMILIES["gpt_oss"])
    slots_in_place(monkeypatch)
    bank = SlotBank(model.spec, evaluate=mx.eval, has_kernel=True, takes_prompts=True)
    for owner in range(2):
        bank.join(owner, model.make_cache(), 2 * RING_ROOM, 2)
    assert bank.longest_piece == RING_ROOM
    tokens = np.random.default_rng(0).integers(3, 250, 2 * RING_ROOM).tolist()
    for piece in (tokens[:RING_ROOM], tokens[RING_ROOM:]):
        bank.begin([RING_ROOM, 0], padding=7)
        found = flat_logits(model, mx.array([piece[0], 0, *piece[1:], *[0] * 7]), [], bank=bank)
        bank.end(found)
        mx.eval(found)
    known = model(mx.array([tokens]), model.make_cache())[0, -1]
    assert max_difference(found[0], np.array(known)) <= 1e-4


def test_buffers_grow_and_are_resized_after_what_writes_them(model, monkeypatch):
    slots_in_place(monkeypatch)
    done = []
    bank = SlotBank(model.spec, has_kernel=True, takes_prompts=True)
    bank._evaluate = lambda arrays: (mx.eval(arrays), done.append(arrays))
    bank._settle = lambda: done.append("settled")
    for owner in range(2):
        bank.join(owner, model.make_cache())
    for counts, change in (([3, 3], lambda: bank.begin([300, 1])), ([1, 1], lambda: bank._resize([0, 1], 4))):
        bank.begin(counts)
        bank.end(found := flat_logits(model, mx.arange(3, 3 + sum(counts)), [], bank=bank))
        done.clear()
        change()
        assert done[0] is found
        assert done[1] == "settled"
        assert len(done) > 2
    bank.clear()
    assert bank._computed is None


def test_where_a_buffer_cannot_be_moved_all_is_lost(model):
    """Buffers of different shapes would be written beyond their end."""
    bank, _ = filled(model, [6, 4], has_kernel=True)
    assert not bank.is_lost
    calls = []

    def fails(arrays):
        calls.append(arrays)
        if len(calls) == 2:
            raise RuntimeError("[malloc_or_wait] Unable to allocate 5 bytes.")

    bank._evaluate = fails
    with pytest.raises(RuntimeError, match="Unable"):
        bank._resize([0, 1], 8)
    assert bank.is_lost
    assert bank.nbytes == 0
    assert len(bank) == 2
    cache = model.make_cache()
    bank.leave(0)
    bank.leave(1)
    assert not bank.is_lost
    bank.join("new", cache, 5)
    assert len(bank) == 2


def test_what_has_left_is_not_a_part_of_the_buffers(model, monkeypatch):
    """It would keep all of a layer in memory, and whoever is in the slot next would write into it."""
    slots_in_place(monkeypatch)
    bank, _ = filled(model, LENGTHS[:3], has_kernel=True)
    cache = model.make_cache()
    length = bank.lengths[1]
    bank.leave(1, cache)
    known = [np.array(buffer) for layer in cache for buffer in layer.buffers]
    for buffer in bank.buffers:
        np.array(buffer, copy=False)[:] = 7
    assert cache[0].offset == length
    for buffer, then in zip((each for layer in cache for each in layer.buffers), known, strict=True):
        assert np.array_equal(np.array(buffer), then)


def test_what_slots_are_given_is_what_caches_are_given(model):
    """Bit for bit, keys and values in one."""
    layer, positions = model.layers[-1], [4, 0, 30]
    x = mx.random.normal((3, model.spec.hidden_size))
    known, keys, values = layer.before_attention(x, mx.array(positions))
    queries, new = layer.before_slots(x, mx.array(positions, mx.float32))
    assert mx.array_equal(queries, known)
    assert mx.array_equal(new, mx.concatenate([keys, values], axis=1).squeeze(2))


def test_a_layer_of_a_step_in_slots_takes_few_operations(fixtures, monkeypatch):
    """One write for keys and values, one attention, nothing copied, and no index that copies a buffer."""
    model = load_fixture(fixtures / FAMILIES["openelm"])
    bank, _ = filled(model, [6, 4], has_kernel=True)
    tokens = mx.array([5, 6])
    pieces = SlotPieces(model, compile=False)

    def one_kernel(queries, buffer, rows, scale, sinks=None, window=None, written=None):
        return mx.depends([queries], [buffer, rows])[0]

    monkeypatch.setattr(slot_step_module, "attend_in_slots", one_kernel)
    mx.eval(tokens)
    with forms_of_a_gpu():
        bank.begin()
        counts = primitives(pieces(tokens, bank))
    groups = Counter({"Compiled": 0})
    for name, number in counts.items():
        groups["Compiled" if name.startswith("Compiled") else name] += number
    layers = len(model.layers)
    assert groups["Scatter"] == layers
    assert groups["SliceUpdate"] == groups["Arange"] == groups["AsType"] == 0
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
        assert mx.array_equal(new, mx.concatenate([keys, values], axis=1).squeeze(2))
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
