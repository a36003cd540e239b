"""The ways in which rows meet their experts: each gives what a loop over rows and experts gives, and the table chooses."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

import openelm_mlx as om
from openelm_mlx.models import moe as moe_module
from openelm_mlx.models import precision
from openelm_mlx.models.groups import groups_on_host, make_groups
from openelm_mlx.models.moe import Experts, MoE, weighted_sum
from openelm_mlx.models.routing_ways import (
    BY_SORTING,
    MOST_ROUTES_OF_A_TABLE,
    WAYS,
    is_checked,
    most_places,
    num_groups,
    rows_in_a_group,
    way_for,
)

GROUPING = [way for way in WAYS if way.startswith(("grouped", "blocks"))]
HIDDEN, INNER, K = 64, 32, 4
LIMIT, ALPHA = 7.0, 1.702


def forced(way):
    return ((1, way),)


def made_experts(num_experts, form, dtype=mx.float32, seed=0):
    """Experts with random numbers, and a function that gives an expert's matrices in float64."""
    model, _ = om.load("demo-gpt-oss", dtype="float32")
    layer = replace(model.spec.layers[0], num_experts=num_experts, intermediate_size=INNER, experts_per_token=K)
    spec = replace(model.spec, hidden_size=HIDDEN, layers=(layer,))
    experts, keys = Experts(spec, layer), iter(mx.random.split(mx.random.key(seed), 4))
    for name in ("gate_up_proj", "down_proj"):
        projection = experts[name]
        shape = projection.weight.shape
        # Large enough for the clamp to be met.
        projection.weight = (mx.random.normal(shape, key=next(keys)) * 2.5 * shape[-1] ** -0.5).astype(dtype)
        projection.bias = mx.random.normal(projection.bias.shape, key=next(keys)).astype(dtype)
    if form is not None:
        mode, bits = form
        holder = nn.Sequential(experts)
        nn.quantize(holder, group_size=32, bits=bits, mode=mode)
        experts = holder.layers[0]
    experts.eval()
    return experts, spec, layer


def matrices(experts):
    found = []
    for name in ("gate_up_proj", "down_proj"):
        p = experts[name]
        weight = p.weight
        if "scales" in p:
            weight = mx.dequantize(p.weight, p.scales, p.get("biases"), p.group_size, p.bits, mode=p.mode)
        found += [np.array(weight.astype(mx.float32), np.float64), np.array(p.bias.astype(mx.float32), np.float64)]
    return found


def one_by_one(experts, x, chosen):
    """(N, k, hidden) by a loop over rows and experts in float64."""
    gate_up, gate_up_bias, down, down_bias = matrices(experts)
    out = np.zeros((*chosen.shape, HIDDEN))
    for n, row in enumerate(np.array(x.astype(mx.float32), np.float64)):
        for j, e in enumerate(chosen[n]):
            both = gate_up[e] @ row + gate_up_bias[e]
            gate, up = np.minimum(both[::2], LIMIT), np.clip(both[1::2], -LIMIT, LIMIT)
            out[n, j] = down[e] @ (gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)) + down_bias[e]
    return out


def choices_of(kind, num_rows, num_experts, k=K, seed=0):
    """(N, k) different experts a row: at random, always the same ones, or all but a few never chosen."""
    random = np.random.default_rng(seed + num_rows)
    among = {"random": num_experts, "one for all": num_experts, "few": k + 1}[kind]
    chosen = np.array([random.permutation(among)[:k] for _ in range(num_rows)])
    if kind == "one for all":
        for row in chosen:  # expert 3 in a place of its own in each row
            if 3 not in row:
                row[random.integers(k)] = 3
    return chosen


FORMS = {"float32": None, "mxfp4": ("mxfp4", 4), "affine 4": ("affine", 4), "affine 8": ("affine", 8)}


@pytest.fixture(scope="module")
def made():
    return {name: made_experts(16, form)[0] for name, form in FORMS.items()}


@pytest.mark.parametrize("kind", ["random", "one for all", "few"])
@pytest.mark.parametrize("form", FORMS)
def test_every_way_gives_what_a_loop_gives(made, form, kind):
    experts = made[form]
    for num_rows in (1, 2, 5, 16, 17, 33, 128):
        x = mx.random.normal((num_rows, HIDDEN), key=mx.random.key(num_rows))
        chosen = choices_of(kind, num_rows, 16)
        known = one_by_one(experts, x, chosen)
        assert np.abs(known).max() > 1
        for way in WAYS:
            # In full, where the table itself would pass it over.
            if way in GROUPING:
                found = experts.of_groups(x, make_groups(mx.array(chosen), way, 16)).reshape(known.shape)
            else:
                experts.ways = forced(way)
                assert experts.way_for(chosen.shape) == way
                found = experts(x, mx.array(chosen))
            assert found.dtype == mx.float32
            assert np.abs(np.array(found) - known).max() < 2e-5 * np.abs(known).max(), (way, num_rows)


@pytest.mark.parametrize("way", GROUPING)
def test_half_precision_in_groups(way):
    experts, _, _ = made_experts(16, None, mx.bfloat16)
    x = mx.random.normal((24, HIDDEN), key=mx.random.key(1)).astype(mx.bfloat16)
    chosen = choices_of("random", 24, 16)
    known = one_by_one(experts, x, chosen)
    experts.ways = forced(way)
    assert experts.way_for(chosen.shape) == way
    found = experts(x, mx.array(chosen))
    assert found.dtype == mx.bfloat16
    assert np.abs(np.array(found.astype(mx.float32)) - known).max() < 0.02 * np.abs(known).max()


@pytest.mark.parametrize("way", GROUPING)
def test_shapes_of_prompts_and_of_rows(made, way):
    """(B, L, hidden) as (N, hidden), and rows of down_proj beyond hidden_size are left out."""
    experts, _, _ = made_experts(8, FORMS["mxfp4"], seed=3)
    experts.ways = forced(way)
    x = mx.random.normal((4, 6, HIDDEN), key=mx.random.key(2))
    chosen = mx.array(choices_of("random", 24, 8)).reshape(4, 6, K)
    plain = experts(x, chosen)
    assert plain.shape == (4, 6, K, HIDDEN)
    assert mx.array_equal(plain.reshape(24, K, -1), experts(x.reshape(24, -1), chosen.reshape(24, K)))
    down = experts.down_proj
    for part in ("weight", "scales"):
        filler = mx.full((8, 128 - HIDDEN, down[part].shape[2]), 77, down[part].dtype)
        down[part] = mx.concatenate([down[part], filler], axis=1)
    assert mx.array_equal(experts(x, chosen), plain)


# --- where routes go --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", GROUPING)
@pytest.mark.parametrize("kind", ["random", "one for all", "few"])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 33, 64, 128])
def test_each_route_has_a_place_of_its_own_in_a_group_of_its_expert(way, kind, num_rows):
    chosen = choices_of(kind, num_rows, 12)
    groups = make_groups(mx.array(chosen), way, 12)
    rows, experts, places = np.array(groups.rows), np.array(groups.experts), np.array(groups.places)
    assert rows.shape == (num_groups(way, num_rows, chosen.size, 12), rows_in_a_group(way, num_rows))
    assert len(set(places.tolist())) == chosen.size
    assert rows.ravel()[places].tolist() == np.repeat(np.arange(num_rows), K).tolist()
    assert experts[places // rows.shape[1]].tolist() == chosen.ravel().tolist()
    assert rows.max() < num_rows
    if way == "grouped":
        assert groups.slots is None
        assert experts.tolist() == list(range(12))
    else:
        assert np.array(groups.slots).tolist() == experts.tolist()


@pytest.mark.parametrize("way", GROUPING)
def test_there_are_always_enough_groups(way):
    """The worst that routes can do: experts whose last block has one route only."""
    random = np.random.default_rng(0)
    for _ in range(300):
        num_experts, num_rows, k = (int(each) for each in random.integers((4, 1, 1), (40, 129, 5)))
        chosen = np.array([random.permutation(num_experts)[:k] for _ in range(num_rows)])
        size = rows_in_a_group(way, num_rows)
        used = sum(-(-count // size) for count in np.bincount(chosen.ravel()) if count)
        bound = num_groups(way, num_rows, chosen.size, num_experts)
        assert used <= bound
    # And it is met: 31 experts with one route each, the other one with 16 + 1.
    assert num_groups("blocks_16", 17, 48, 32) == 33


@pytest.mark.parametrize("way", GROUPING)
def test_the_host_finds_the_same_places(way):
    """Slots in another order than experts; a part of the routes; groups in the bank's own number where all are taken."""
    chosen = choices_of("random", 20, 12)
    slot_of = np.random.default_rng(1).permutation(12)
    order = np.argsort(slot_of[chosen.ravel()], kind="stable")
    routes, slots = chosen.ravel()[order], slot_of[chosen.ravel()][order]
    found = groups_on_host(order // K, routes, slots, way, 20, 12)
    known = make_groups(mx.array(chosen), way, 12, mx.array(slot_of[chosen]))
    assert np.array(found.places).tolist() == np.array(known.places)[order].tolist()
    used = found.rows.shape[0]
    filled = np.unique(np.array(found.places) // found.rows.shape[1])
    assert used <= known.rows.shape[0]
    assert np.array(found.experts)[filled].tolist() == np.array(known.experts)[filled].tolist()
    assert (found.slots is None) == (known.slots is None) == (way == "grouped")
    if found.slots is not None:
        assert np.array(found.slots).tolist() == np.array(known.slots)[:used].tolist()


def test_slots_that_experts_share_stay_within_the_groups():
    """Experts that are not in memory: what is computed is thrown away, and must not be read from elsewhere."""
    chosen = choices_of("random", 40, 32)
    for way in GROUPING:
        groups = make_groups(mx.array(chosen), way, 4, mx.zeros(chosen.shape, mx.int32))
        assert np.array(groups.places).max() < groups.rows.size


# --- which way --------------------------------------------------------------------------------------------------------

TABLE = ((1, "unsorted"), (8, "grouped"), (16, "blocks_16"), (96, "sorted"))


@pytest.mark.parametrize(
    ("num_rows", "k", "num_experts", "way"),
    [
        (1, 4, 32, "unsorted"), (7, 4, 16, "unsorted"), (8, 4, 16, "grouped"), (15, 4, 32, "grouped"),
        (16, 4, 32, "blocks_16"), (95, 4, 32, "blocks_16"), (96, 4, 32, "sorted"), (4000, 4, 32, "sorted"),
        # As many groups as routes would gain nothing.
        (8, 4, 32, "unsorted"), (16, 4, 128, "unsorted"), (40, 4, 128, "unsorted"), (48, 4, 128, "blocks_16"),
        # What counts is routes: half as many experts a token, twice as many rows.
        (14, 2, 16, "unsorted"), (32, 2, 16, "blocks_16"), (192, 2, 16, "sorted"), (1, 1, 4, "unsorted"),
    ],
)  # fmt: skip
def test_the_table_chooses_by_shapes(num_rows, k, num_experts, way):
    assert way_for(num_rows, k, num_experts, TABLE) == way


def test_more_routes_than_the_table_speaks_of_are_sorted():
    """A prompt: padding would be memory for nothing."""
    most = MOST_ROUTES_OF_A_TABLE // 4
    for way in WAYS:
        assert way_for(most + 1, 4, 32, forced(way)) == "sorted"
        assert way_for(most, 4, 32, forced(way)) == ("unsorted" if way == "grouped" else way)


def test_without_a_measurement_routes_are_sorted_from_64_on(monkeypatch):
    for num_rows, k in ((1, 4), (15, 4), (31, 2), (21, 3)):
        assert way_for(num_rows, k, 32, BY_SORTING) == "unsorted"
    for num_rows, k in ((16, 4), (32, 2), (22, 3)):
        assert way_for(num_rows, k, 32, BY_SORTING) == "sorted"
    assert precision.default_choices().expert_ways == BY_SORTING
    monkeypatch.setattr(precision, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(precision.mx.cuda, "is_available", lambda: False)
    assert precision.default_choices().expert_ways == BY_SORTING
    monkeypatch.setattr(precision.mx.cuda, "is_available", lambda: True)
    assert is_checked(precision.default_choices().expert_ways)


def test_the_places_that_the_plan_counts():
    """Never fewer than any number of rows up to then takes."""
    assert most_places(64, 4, 32, BY_SORTING) == 256
    assert most_places(15, 4, 32, forced("unsorted")) == 60
    # 128 rows are 512 routes: 32 blocks and 480 / 16 more.
    assert most_places(128, 4, 32, forced("blocks_16")) == 62 * 16
    assert most_places(200, 4, 32, forced("blocks_16")) == 62 * 16
    assert most_places(2048, 4, 32, forced("blocks_16")) == 8192
    assert most_places(32, 4, 32, forced("grouped")) == 32 * 32
    assert most_places(100, 4, 32, forced("grouped")) == 32 * 32


@pytest.mark.parametrize(
    ("ways", "right"),
    [
        (BY_SORTING, True), ([[1, "unsorted"], [4, "blocks_32"]], True), ((), False), ([[2, "sorted"]], False),
        ([[1, "unsorted"], [1, "sorted"]], False), ([[1, "quickly"]], False), ([[True, "sorted"]], False),
        ([[1, "sorted", 3]], False), (None, False), ("unsorted", False), ([[1.0, "sorted"]], False), ([[1, []]], False),
    ],
)  # fmt: skip
def test_what_is_a_table(ways, right):
    assert is_checked(ways) is right


def test_a_model_goes_by_its_choices():
    from openelm_mlx.models import build_model

    model, _ = om.load("demo-gpt-oss", dtype="float32")
    chosen = replace(model.choices, expert_ways=forced("blocks_16"))
    other = build_model(model.spec, chosen)
    assert {layer.mlp.experts.way_for((1, 24, 4)) for layer in other.layers} == {"blocks_16"}
    assert {layer.mlp.experts.way_for((1, 24, 4)) for layer in model.layers} == {"sorted"}


# --- the CPU: no answer depends on its company ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_layer():
    model, _ = om.load("demo-gpt-oss", dtype="float32")
    return model.layers[1].mlp, model.spec


@pytest.mark.parametrize("num_rows", [*range(2, 20), 31, 32, 33, 48, 63, 64])
def test_on_the_cpu_a_row_has_the_bits_that_it_has_alone(demo_layer, num_rows):
    moe, spec = demo_layer
    x = mx.random.normal((num_rows, spec.hidden_size), key=mx.random.key(num_rows))
    together = moe(x, mx.float32)
    as_prompt = moe(x[None], mx.float32)[0]
    for n in {0, 1, num_rows // 2, num_rows - 1}:
        assert mx.array_equal(together[n], moe(x[n : n + 1], mx.float32)[0])
        assert mx.array_equal(as_prompt[n], together[n])


@pytest.mark.parametrize("form", FORMS)
def test_on_the_cpu_every_kind_of_weights_has_the_bits_of_one_row(form):
    experts, spec, layer = made_experts(16, FORMS[form], seed=5)
    moe = MoE(spec, layer)
    moe.router.weight = mx.random.normal(moe.router.weight.shape, key=mx.random.key(9))
    moe.experts = experts
    moe.eval()
    for num_rows in (2, 9, 15, 16, 17, 40, 64):
        x = mx.random.normal((num_rows, HIDDEN), key=mx.random.key(num_rows))
        together = moe(x, mx.float32)
        for n in (0, num_rows // 2, num_rows - 1):
            assert mx.array_equal(together[n], moe(x[n : n + 1], mx.float32)[0]), num_rows


@pytest.mark.parametrize("num_rows", [2, 16, 33, 128])
def test_on_the_cpu_half_precision_depends_on_no_other_row_either(num_rows):
    """The experts' sum is in float32 for as many rows as requests may run together."""
    experts, spec, layer = made_experts(16, FORMS["mxfp4"], mx.bfloat16, seed=6)
    moe = MoE(spec, layer)
    moe.router.weight = mx.random.normal(moe.router.weight.shape, key=mx.random.key(9))
    moe.experts = experts
    moe.eval()
    x = mx.random.normal((num_rows, HIDDEN), key=mx.random.key(num_rows))
    together = moe(x, mx.bfloat16)
    for n in (0, num_rows // 2, num_rows - 1):
        assert mx.array_equal(together[n], moe(x[n : n + 1], mx.bfloat16)[0])


@pytest.mark.parametrize("num_rows", [16, 64])
def test_rows_that_ride_in_a_prompt_s_chunk_have_the_bits_that_they_have_alone(demo_layer, num_rows):
    moe, spec = demo_layer
    x = mx.random.normal((200 + num_rows, spec.hidden_size), key=mx.random.key(num_rows))
    assert moe.experts.way_for((len(x), 4)) == "sorted"
    together = moe(x, mx.float32)
    for n in (0, 199, 200, len(x) - 1):
        assert mx.array_equal(together[n], moe(x[n : n + 1], mx.float32)[0])


@pytest.mark.parametrize("shape", [(1, 4), (6, 4), (2, 3, 2), (1, 300, 4), (5, 1), (1, 1, 3)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_sum_on_a_gpu_is_in_float32_whatever_is_beside_a_row(shape, dtype, monkeypatch):
    """Computed here without being compiled: a row's sum is elementwise, so it has nothing to do with other rows."""
    outputs = mx.random.normal((*shape, 32), key=mx.random.key(0)).astype(dtype)
    weights = mx.softmax(mx.random.normal(shape, key=mx.random.key(1)), axis=-1)
    known = (np.array(outputs.astype(mx.float32), np.float64) * np.array(weights, np.float64)[..., None]).sum(-2)
    monkeypatch.setattr(moe_module, "runs_on_cpu", lambda: False)
    found = weighted_sum(outputs, weights, dtype)
    assert found.dtype == mx.float32
    assert np.abs(np.array(found) - known).max() < 1e-6
