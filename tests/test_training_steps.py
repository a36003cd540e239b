"""Gradients and steps against PyTorch's, and every way to compute them against the plain one."""

import json
import threading

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, max_difference, oracle
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from openelm_mlx.models import cores
from openelm_mlx.models.adapter_sites import put_module
from openelm_mlx.training import forward, products
from openelm_mlx.training.batches import Row, divided, make_batch, rounded_up, rows_of_step
from openelm_mlx.training.loop import Part, Trainer
from openelm_mlx.training.optimizer import Schedule, adamw, clipped, global_norm, set_rate
from openelm_mlx.training.state import RunFolder
from openelm_mlx.training.steps import Gradients, Objective, add_gradients, divided_by

CASES = FIXTURES / "adapters"


def case_of(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    return json.loads((CASES / name / "case.json").read_text()), oracle(CASES / name)


def rows_of(tokens: np.ndarray, mask: np.ndarray) -> list[Row]:
    """The rows of an oracle's batch, without their padding."""
    lengths = [int(row.nonzero()[0].max()) + 1 for row in mask]
    return [Row.of(t[:n], m[:n]) for t, m, n in zip(tokens, mask, lengths, strict=True)]


def relative(found: dict, wanted: dict) -> float:
    """The worst distance of an array from the wanted one, over that one's norm."""
    assert found.keys() == wanted.keys()
    return max(float(mx.linalg.norm(found[k] - v) / mx.maximum(mx.linalg.norm(v), 1e-12)) for k, v in wanted.items())


def mean_gradients(gradients: Gradients, parameters: dict, rows: list[Row], parts: list[list[int]] | None = None):
    """(loss, gradients) of the rows, a mean over their targets, in one batch or several."""
    loss, total = 0.0, None
    for part in parts or [list(range(len(rows)))]:
        each, more = gradients(parameters, make_batch([rows[i] for i in part]))
        loss, total = loss + float(each), add_gradients(total, more)
    count = sum(row.num_targets for row in rows)
    return loss / count, divided_by(total, count)


def some_rows(vocab_size: int, lengths: list[int], seed: int = 0) -> list[Row]:
    """Random rows of which the second half is learned."""
    rng = np.random.default_rng(seed)
    return [Row.of(rng.integers(3, vocab_size, n), np.arange(n) >= n // 2) for n in lengths]


def test_all_weights_are_trained_as_pytorch_trains_them():
    case, expected = case_of("openelm_full")
    model = load_fixture(FIXTURES / case["base"])
    initial = dict(tree_flatten(model.parameters()))
    model.train()
    parameters = model.trainable_parameters()
    gradients = Gradients(model, Objective(z_loss=case["z_loss"], at_once=8))
    settings = case["optimizer"]
    optimizer = adamw(tuple(settings["betas"]), settings["eps"], settings["weight_decay"])
    for step, rate in enumerate(case["lr"]):
        rows = rows_of(expected["tokens"][step], expected["loss_mask"][step])
        loss, mean = mean_gradients(gradients, parameters, rows)
        norm = global_norm(mean)
        if step == 0:
            wanted = mx.load(str(CASES / "openelm_full" / "grads.safetensors"))
            assert relative(dict(tree_flatten(mean)), wanted) < 1e-4
        assert abs(loss - expected["losses"][step]) < 1e-4
        assert abs(float(norm) / expected["grad_norms"][step] - 1) < 2e-4
        set_rate(optimizer, rate)
        parameters = optimizer.apply_gradients(clipped(mean, norm, case["clip"]), parameters)
        mx.eval(parameters, optimizer.state)
    final = mx.load(str(CASES / "openelm_full" / "final.safetensors"))
    moved = dict(tree_flatten(parameters))
    for name, wanted in final.items():
        assert float(mx.linalg.norm(moved[name] - wanted) / mx.linalg.norm(wanted - initial[name])) < 2e-3, name
    model.update(parameters)
    assert max_difference(model(mx.array(expected["eval_tokens"])), expected["logits_final"]) < 1e-2


FAMILIES = ["openelm_tiny", "openelm_untied", "gpt_oss_tiny", "gpt_oss_odd"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = load_fixture(FIXTURES / request.param)
    model.train()
    for layer in model.layers:
        if "mlp" in layer:  # the packed experts cannot be trained
            layer.mlp.experts.freeze()
    rows = some_rows(model.spec.vocab_size, [33, 7, 80, 16, 24])  # one past any window, and past some queries at once
    parameters = model.trainable_parameters()
    loss, plain = mean_gradients(Gradients(model, Objective(z_loss=1e-4)), parameters, rows, [[i] for i in range(5)])
    mx.eval(plain)
    return model, rows, loss, dict(tree_flatten(plain))


def test_rows_side_by_side_have_the_gradients_of_rows_alone(family):
    """Packed = separate: in one flat array, in two, and padded to rows of one length."""
    model, rows, loss, plain = family
    gradients, parameters = Gradients(model, Objective(z_loss=1e-4)), model.trainable_parameters()
    for parts in (None, [[2, 0], [4, 1, 3]], [[0, 4], [2], [1], [3]]):
        found, packed = mean_gradients(gradients, parameters, rows, parts)
        assert abs(found - loss) < 1e-5 * loss
        assert relative(dict(tree_flatten(packed)), plain) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("at_once", [None, 16])
def test_recomputed_layers_and_losses_in_pieces_change_nothing(family, checkpointing, at_once):
    model, rows, loss, plain = family
    gradients = Gradients(model, Objective(z_loss=1e-4, at_once=at_once), checkpointing=checkpointing)
    found, other = mean_gradients(gradients, model.trainable_parameters(), rows)
    assert abs(found - loss) < 1e-5 * loss
    assert relative(dict(tree_flatten(other)), plain) < 1e-5


def test_attention_of_a_few_queries_at_a_time_changes_nothing(family, monkeypatch):
    model, rows, loss, plain = family
    monkeypatch.setattr(forward, "QUERIES_AT_ONCE", 32)
    gradients = Gradients(model, Objective(z_loss=1e-4), checkpointing=True)
    found, other = mean_gradients(gradients, model.trainable_parameters(), rows)
    assert abs(found - loss) < 1e-5 * loss
    assert relative(dict(tree_flatten(other)), plain) < 1e-5


def test_attention_of_a_few_queries_at_a_time_takes_less_memory(monkeypatch):
    model = load_fixture(FIXTURES / "openelm_tiny")
    model.train()
    batch, peaks = make_batch(some_rows(model.spec.vocab_size, [320])), []
    for at_once in (512, 64):
        monkeypatch.setattr(forward, "QUERIES_AT_ONCE", at_once)
        gradients = Gradients(model, Objective(at_once=16), checkpointing=True)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradients(model.trainable_parameters(), batch))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.75 * peaks[0]


def test_recomputing_changes_no_class_and_leaves_the_parameters_alone(family):
    """mlx-lm's replaces the layer class's `__call__` in the whole process."""
    model, rows, _, _ = family
    before = {name: id(a) for name, a in tree_flatten(model.parameters())}
    call = type(model.layers[0]).__call__
    gradients = Gradients(model, Objective(), checkpointing=True)
    mx.eval(gradients(model.trainable_parameters(), make_batch(rows)))
    assert type(model.layers[0]).__call__ is call
    assert {name: id(a) for name, a in tree_flatten(model.parameters())} == before


def test_matrices_that_are_multiplied_both_ways_change_nothing(family, monkeypatch):
    """In another module, on three streams: the same parameters, losses and gradients, computed again or not."""
    model, rows, loss, plain = family
    names = [name for name, _ in tree_flatten(model.parameters())]
    monkeypatch.setattr(cores, "num_cores", lambda: 3)
    monkeypatch.setattr(cores, "_of_thread", threading.local())
    replaced = [(path, module) for path, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)]
    products.multiply_both_ways(model)
    try:
        assert [name for name, _ in tree_flatten(model.parameters())] == names
        for checkpointing in (False, True):
            gradients = Gradients(model, Objective(z_loss=1e-4), checkpointing=checkpointing)
            found, other = mean_gradients(gradients, model.trainable_parameters(), rows)
            assert abs(found - loss) < 1e-5 * loss
            assert relative(dict(tree_flatten(other)), plain) < 1e-5
    finally:
        for path, module in replaced:
            put_module(model, path, module)


def test_a_product_on_several_streams_has_the_bits_of_one(monkeypatch):
    monkeypatch.setattr(cores, "num_cores", lambda: 4)
    monkeypatch.setattr(cores, "_of_thread", threading.local())
    keys = mx.random.split(mx.random.key(0), 3)
    x, matrix, cotangent = (
        mx.random.normal(s, key=k) for s, k in zip([(7, 13, 9), (5, 9), (7, 13, 5)], keys, strict=True)
    )
    [y], [of_x, of_matrix] = mx.vjp(products.product, [x, matrix], [cotangent])
    assert bool((y == x @ mx.contiguous(matrix.T)).all())
    assert bool((of_x == cotangent @ matrix).all())
    assert mx.allclose(of_matrix, cotangent.reshape(-1, 5).T @ x.reshape(-1, 9), rtol=1e-5, atol=1e-5)
    half = products.times(x.astype(mx.bfloat16), matrix.astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rows_on_all_cores_have_the_bits_of_a_linear_layer(dtype, monkeypatch):
    monkeypatch.setattr(cores, "num_cores", lambda: 3)
    monkeypatch.setattr(cores, "_of_thread", threading.local())
    x = mx.random.normal((2, 50, 24)).astype(dtype)
    for has_bias in (False, True):
        linear = nn.Linear(24, 40, bias=has_bias)
        linear.set_dtype(dtype)
        found = products.spread(x, linear["weight"], linear.get("bias"))
        assert found.dtype == dtype
        assert bool((found == linear(x)).all())


def test_gradients_need_no_training_mode():
    """In evaluation mode the router's choice was differentiated too, which MLX refuses."""
    model = load_fixture(FIXTURES / "gpt_oss_tiny")
    model.eval()
    tokens = mx.array([[5, 6, 7]])
    gradient = mx.grad(lambda h: model.head(model.run_layers(h)).sum())(model.embed(tokens))
    assert mx.isfinite(gradient).all()


def test_half_precision_is_computed_from_float32_weights():
    """Weights that are kept in float32 are rounded for computing only, and their gradients are float32."""
    model = load_fixture(FIXTURES / "openelm_tiny")
    model.train()
    rows = some_rows(model.spec.vocab_size, [20, 12])
    parameters = model.trainable_parameters()
    loss, _ = mean_gradients(Gradients(model, Objective()), parameters, rows)
    rounded, gradients = mean_gradients(Gradients(model, Objective(), dtype=mx.bfloat16), parameters, rows)
    assert {a.dtype for _, a in tree_flatten(gradients)} == {mx.float32}
    assert 1e-5 * loss < abs(rounded - loss) < 0.02 * loss


def test_compiled_gradients_are_the_same():
    model = load_fixture(FIXTURES / "openelm_untied")
    model.train()
    rows, parameters = some_rows(model.spec.vocab_size, [20, 12, 9]), model.trainable_parameters()
    _, plain = mean_gradients(Gradients(model, Objective()), parameters, rows)
    compiled = Gradients(model, Objective(), checkpointing=True, compiled=True)
    moved = tree_map(lambda p: p + 0.01, parameters)
    mean_gradients(compiled, moved, rows)
    _, again = mean_gradients(compiled, parameters, rows)
    assert relative(dict(tree_flatten(again)), dict(tree_flatten(plain))) < 1e-5


def test_the_schedule_is_corenets():
    case, _ = case_of("openelm_full")
    assert Schedule(0.003, 5).rate(4) == case["lr"][4]
    schedule = Schedule(peak=0.01, steps=5, warmup=2, final=0.001)
    wanted = [1e-06, 0.0050005, 0.01, 0.00775, 0.00325]  # computed by CoreNet's formula for `openelm_lora_patterns`
    assert [schedule.rate(i) for i in range(5)] == pytest.approx(wanted)
    assert schedule.rate(99) == pytest.approx(0.001)


def test_every_row_is_seen_once_before_any_is_seen_again():
    steps = [rows_of_step(i, 4, 10, seed=3) for i in range(5)]
    seen = [i for step in steps for i in step]
    assert all(len(each) == 4 for each in steps)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert [i for step in range(2) for i in rows_of_step(step, 25, 10, seed=3)][:20] == seen


def test_batches_keep_to_their_places_and_to_few_shapes():
    lengths = [5, 90, 17, 30, 200, 8]
    parts = divided(lengths, 100)
    assert sorted([i for part in parts for i in part]) == list(range(6))
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= 100 for part in parts)
    pairs = divided(lengths, 250, together=2)
    assert all(set(part) == {i ^ 1 for i in part} for part in pairs)
    sizes = {rounded_up(n) for n in range(1, 2049)}
    assert len(sizes) <= 32
    assert all(n <= rounded_up(n) <= 1.25 * n for n in range(16, 2049))


def test_shorter_rows_of_a_large_batch_go_apart():
    """Attention would lay each of them out in the places of the longest."""
    lengths = [512] * 20 + [120] * 80
    assert divided(lengths, 65_536) == [list(range(20)), list(range(20, 100))]
    assert len(divided(lengths[:10] + lengths[20:], 65_536)) == 1  # too few of the one
    assert len(divided(lengths[:80], 65_536)) == 1  # and of the other
    assert len(divided(lengths + [20] * 50, 65_536)) == 2
    assert len(divided([512] * 20 + [300] * 20, 65_536)) == 1
    pairs = divided([512, 120] * 20 + [120, 100] * 40, 65_536, together=2)
    assert pairs == [list(range(40)), list(range(40, 120))]


def test_rows_of_one_length_have_few_shapes():
    """A GPU compiles each of them, so their number is rounded up with empty rows."""
    batches = [make_batch([Row.of(np.arange(65), np.ones(65, bool))] * n) for n in range(17, 65)]
    assert all(batch.is_rows for batch in batches)
    assert len({batch.rows.shape for batch in batches}) == 8
    assert [batch.num_tokens for batch in batches] == [64 * n for n in range(17, 65)]
    assert [float(batch.weights.sum()) for batch in batches] == [64.0 * n for n in range(17, 65)]


def test_empty_rows_change_nothing():
    model = load_fixture(FIXTURES / "openelm_tiny")
    model.train()
    rows = some_rows(model.spec.vocab_size, [17] * 18)
    assert make_batch(rows).rows.shape == (20, 16)
    gradients, parameters = Gradients(model, Objective(z_loss=1e-4)), model.trainable_parameters()
    loss, plain = mean_gradients(gradients, parameters, rows, [[i] for i in range(18)])
    found, padded = mean_gradients(gradients, parameters, rows)
    assert abs(found - loss) < 1e-5 * loss
    assert relative(dict(tree_flatten(padded)), dict(tree_flatten(plain))) < 1e-5


def test_weights_say_how_much_a_row_counts():
    """The mean of batches' means, as some trainers accumulate, is a matter of weights."""
    model = load_fixture(FIXTURES / "openelm_untied")
    rows, gradients = some_rows(model.spec.vocab_size, [20, 30]), Gradients(model, Objective())
    model.train()
    parameters = model.trainable_parameters()
    alone = [gradients(parameters, make_batch([row])) for row in rows]
    counts = [row.num_targets for row in rows]
    mean = sum(float(loss) / n for (loss, _), n in zip(alone, counts, strict=True)) / 2
    loss, _ = gradients(parameters, make_batch(rows, [1 / (2 * n) for n in counts]))
    assert float(loss) == pytest.approx(mean, rel=1e-5)


class SameRows:
    """Steps of the same rows; every third has other shapes."""

    def __init__(self, vocab_size: int) -> None:
        self._usual, self._other = some_rows(vocab_size, [20, 12, 9]), some_rows(vocab_size, [31, 5], seed=1)

    def parts(self, step: int) -> list[Part]:
        return [Part(make_batch(self._other if step % 3 == 2 else self._usual))]


def trainer_of(compiled: bool, steps: int, folder: RunFolder | None = None, **options) -> Trainer:
    model = load_fixture(FIXTURES / "openelm_untied")
    model.train()
    gradients = Gradients(model, Objective(), compiled=compiled)
    data, schedule = SameRows(model.spec.vocab_size), Schedule(3e-3, 4, warmup=1, final=1e-3)
    optimizer = adamw((0.9, 0.95), 1e-8, 0.1, lambda _, array: array.ndim > 1)
    return Trainer(model, gradients, optimizer, schedule, data, folder=folder, last_step=steps, **options)


def test_a_compiled_run_is_the_plain_one_and_goes_on_bit_for_bit(tmp_path):
    plain, compiled = (trainer_of(way, 4).run() for way in (False, True))
    moved, wanted = dict(tree_flatten(compiled.parameters)), dict(tree_flatten(plain.parameters))
    assert relative(moved, wanted) < 1e-5
    assert {name: a.shape for name, a in tree_flatten(compiled.optimizer)} == {
        name: a.shape for name, a in tree_flatten(plain.optimizer)
    }
    for steps in (2, 4):
        folder = RunFolder(tmp_path / "out", {}, False)
        try:
            resumed = trainer_of(True, steps, folder).run()
        finally:
            folder.close()
    for name, array in tree_flatten(resumed.parameters):
        assert bool((array == moved[name]).all()), name


@pytest.mark.parametrize(("kept_bytes", "freed_after"), [(0, [1, 3, 4]), (2**40, [])])
def test_a_gpus_buffers_are_kept_for_steps_of_the_same_shapes(kept_bytes, freed_after, monkeypatch):
    trainer = trainer_of(True, 4, kept_bytes=kept_bytes)
    freed: list[int] = []
    monkeypatch.setattr(mx, "clear_cache", lambda: freed.append(trainer.state.step))
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 2**20)
    trainer.run()
    assert freed == freed_after
