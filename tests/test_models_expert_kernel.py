"""The experts' kernel: its text against MLX's own operations, and how it is called."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import max_difference
from expert_kernel_on_cpu import known, plain_product, product_on_cpu

import openelm_mlx as om
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.models import base, expert_kernel, moe
from openelm_mlx.models.adapter_sets import AdapterSet
from openelm_mlx.models.adapter_sites import AdaptedExperts
from openelm_mlx.models.expert_kernel import ROWS, SIMDGROUPS, Activation, PackedMatrix, product
from openelm_mlx.models.moe import ExpertLinear
from openelm_mlx.models.precision import KernelChoices
from openelm_mlx.models.routing_ways import KERNEL

LIKE_GPT_OSS = Activation(7.0, 1.702)


def case(num_rows=3, k=2, num_experts=4, columns=96, rows=20, padded=24, shared=True, seed=0):
    """Rows, the packed matrices of some experts, biases that are a part of a larger table, and who goes where."""
    draw = np.random.default_rng(seed)
    plain = mx.array(4 * draw.standard_normal((num_experts, padded, columns)).astype(np.float32))
    weight, scales = mx.quantize(plain, 32, 4, mode="mxfp4")
    bias = draw.standard_normal((num_experts, rows + 4)).astype(np.float32)[:, :rows]
    x = draw.standard_normal((num_rows if shared else num_rows * k, columns)).astype(np.float32)
    # A part of a larger array too, as argpartition leaves it.
    chosen = np.array([draw.permutation(num_experts) for _ in range(num_rows)], np.uint32)[:, -k:]
    return x, np.array(weight), np.array(scales), bias, chosen, chosen


@pytest.mark.parametrize(
    ("language", "activation", "sizes", "shape"),
    [
        ("Metal", LIKE_GPT_OSS, {"W": 1, "R": 4, "B": 8, "D": 1}, {"num_rows": 7, "num_experts": 3}),
        ("CUDA", None, {"W": 2, "R": 2, "B": 8, "D": 1}, {"shared": False, "columns": 544, "num_experts": 40}),
        pytest.param("CUDA", LIKE_GPT_OSS, {"W": 2, "R": 4, "B": 8, "D": 1}, {"num_rows": 40}, marks=pytest.mark.slow),
        pytest.param(
            "Metal", None, {"W": 2, "R": 4, "B": 4, "D": 1}, {"num_rows": 1, "k": 1, "rows": 24}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_kernel_is_a_product_with_experts(language, activation, sizes, shape, tmp_path):
    """Compiled by the machine's C++ compiler: there is no GPU where these tests run."""
    given = case(**shape)
    found = product_on_cpu(tmp_path, language, *given, activation, sizes)
    assert max_difference(mx.array(found), known(*given, activation)) <= 1e-4


def test_a_route_has_the_same_bits_in_any_company(tmp_path):
    """From one to as many as are multiplied together, and more."""
    x, weight, scales, bias, chosen, _ = case(num_rows=11, k=1, num_experts=1)
    sizes = {"W": 1, "R": 2, "B": 8, "D": 1}
    outs = []
    for count in (1, 2, 4, 8, 11):
        (tmp_path / str(count)).mkdir()
        outs.append(
            product_on_cpu(
                tmp_path / str(count),
                "CUDA",
                x[:count],
                weight,
                scales,
                bias,
                chosen[:count],
                chosen[:count],
                None,
                sizes,
            )
        )
    for out in outs:
        assert np.array_equal(out, outs[-1][: len(out)])


SHAPE = {
    **released_gpt_oss_config("20b"), "num_hidden_layers": 2, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64,
    "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "eos_token_id": 319,
    "num_local_experts": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_gpt_oss(tmp_path_factory.mktemp("kernel") / "model", SHAPE, "openai-hf")


@pytest.fixture
def calls(monkeypatch):
    """Models go by the kernel from 2 to 20 rows, of which a plain product takes the place; its calls."""
    seen = []

    def spy(x, matrix, places, experts, activation=None):
        seen.append((places.shape, matrix.weight.shape[0]))
        return plain_product(x, matrix, places, experts, activation)

    monkeypatch.setattr(moe, "product", spy)
    chosen = KernelChoices(compiled_step=False, slots=False, expert_kernel_rows=(2, 20))
    monkeypatch.setattr(base, "default_choices", lambda: chosen)
    return seen


@pytest.mark.parametrize(("num_rows", "goes"), [(1, False), (2, True), (20, True), (21, False)])
def test_so_many_rows_go_by_the_kernel(folder, calls, num_rows, goes):
    model, _ = om.load(folder, dtype="float32")
    experts = model.layers[0].mlp.experts
    x, k = mx.random.normal((num_rows, 64), key=mx.random.key(0)), 4
    chosen = mx.argsort(mx.random.normal((num_rows, 16), key=mx.random.key(1)), axis=-1)[:, -k:]
    found = experts(x, chosen)
    mx.eval(found)
    assert calls == ([((num_rows, k), 16)] * 2 if goes else [])
    experts.kernel_rows = (0, 0)
    assert max_difference(found, np.array(experts(x, chosen))) <= 1e-4


def test_other_matrices_do_not_go_by_the_kernel(folder, calls):
    """Numbers that are not packed, of another packing, with an adapter beside, in training, and those of several machines."""
    experts = om.load(folder, dtype="float32")[0].layers[0].mlp.experts
    shape = (4, 4)
    assert experts.way_for(shape) == KERNEL
    packed = experts.gate_up_proj
    plain = ExpertLinear(16, 64, 128)
    plain.weight, plain.bias = mx.random.normal((16, 128, 64)), packed.bias
    for other in (plain, plain.to_quantized(32, 4), AdaptedExperts(packed, "site", AdapterSet())):
        experts.gate_up_proj = other
        assert experts.way_for(shape) != KERNEL
    experts.gate_up_proj = packed
    assert experts.way_for(shape) == KERNEL
    experts.outputs_float32 = True
    assert experts.way_for(shape) != KERNEL
    experts.outputs_float32 = False
    experts.train()
    assert experts.way_for(shape) != KERNEL


@pytest.mark.parametrize("num_slots", [5, 16])
def test_experts_on_disk_go_by_the_kernel_too(folder, calls, num_slots):
    """With places of their own, in blocks where not all of them fit."""
    resident, streamed = (
        om.load(folder, dtype="float32")[0],
        om.load(folder, dtype="float32", expert_slots=num_slots)[0],
    )
    for num_rows in (2, 7, 20):
        x = mx.random.normal((num_rows, 64), key=mx.random.key(num_rows))
        expected = resident.layers[0].mlp(x, mx.float32)
        mx.eval(expected)
        calls.clear()
        assert max_difference(streamed.layers[0].mlp(x, mx.float32), np.array(expected)) <= 1e-5
        assert calls
        assert {places for _, places in calls} == {num_slots}


def test_requests_together_get_what_each_gets_alone(folder, calls):
    """Alone without the kernel, together with it."""
    model, _ = om.load(folder, dtype="float32")
    prompts = [[5, 6, 7 + i] for i in range(4)]
    with om.Engine(model) as engine:
        handles = [engine.submit(each, max_tokens=6) for each in prompts]
        together = [[chunk.token for chunk in handle] for handle in handles]
    assert calls
    calls.clear()
    alone = [[chunk.token for chunk in om.stream_generate(model, None, each, max_tokens=6)] for each in prompts]
    assert together == alone


@pytest.mark.parametrize("activation", [None, LIKE_GPT_OSS])
def test_how_the_kernel_is_called(monkeypatch, activation):
    given = []

    def kernel(found):
        assert found == activation
        return lambda **call: given.append(call) or [mx.zeros(call["output_shapes"][0], call["output_dtypes"][0])]

    monkeypatch.setattr(expert_kernel, "_kernel", kernel)
    x, weight, scales, bias, places, experts = (mx.array(each) for each in case(num_rows=6, k=2, rows=70, padded=96))
    out = product(x.astype(mx.bfloat16), PackedMatrix(weight, scales, bias), places, experts, activation)
    assert out.shape == (12, 35 if activation else 70)
    assert out.dtype == mx.bfloat16
    (call,) = given
    template = {"T": mx.bfloat16, "COLUMNS": 96, "OUT": 70, "SHARE": 2, "MOST_ROUTES": 512, "MOST_PLACES": 512}
    assert template.items() <= dict(call["template"]).items()
    assert call["grid"] == (32 * SIMDGROUPS * -(-70 // (SIMDGROUPS * ROWS)), 4, 1)  # four places, and more routes
    assert call["threadgroup"] == (32 * SIMDGROUPS, 1, 1)


def test_whole_numbers_of_a_config_are_numbers_of_the_kernel():
    header, _ = expert_kernel.texts_of(expert_kernel.METAL, Activation(7, 2))
    assert "#define LIMIT 7.0f" in header
    assert "#define ALPHA 2.0f" in header


def test_both_languages_have_the_same_names():
    names = [
        {line.split("(")[0].split()[1] for line in text.splitlines() if "#define" in line}
        for text in (expert_kernel.CUDA, expert_kernel.METAL)
    ]
    assert names[0] == names[1]
    texts = "".join(expert_kernel.texts_of(expert_kernel.CUDA, LIKE_GPT_OSS))
    assert all(texts.count(name) > 1 for name in names[0])
