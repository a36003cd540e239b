"""Adapters beside matrices: what PEFT and PyTorch say (fixtures/adapters), and what an adapter must leave alone."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture
from mlx import nn
from mlx.utils import tree_flatten

import openelm_mlx as om
from openelm_mlx.checkpoint.adapter_files import read_adapter
from openelm_mlx.checkpoint.adapter_peft import PREFIX, peft_files
from openelm_mlx.errors import SettingError
from openelm_mlx.models.adapter_sites import LowRank, module_at, unpacked
from openelm_mlx.models.adapters import AdapterConfig, attach, detach, trained_adapter
from openelm_mlx.models.low_rank import Adapter, Pair

ADAPTERS = FIXTURES / "adapters"
CASES = sorted(path.name for path in ADAPTERS.iterdir() if (path / "peft_final").is_dir())
TOLERANCE = 1e-4


def case_of(name):
    case = json.loads((ADAPTERS / name / "case.json").read_text())
    return case, dict(np.load(ADAPTERS / name / "oracle.npz")), load_fixture(FIXTURES / case["base"])


def difference(model, known, which):
    found = np.array(model(mx.array(known["eval_tokens"])))[..., known["columns"]]
    return np.abs(found - known[f"logits_{which}"]).max()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_peft(name):
    _, known, model = case_of(name)
    assert difference(model, known, "base") < TOLERANCE
    for which in ("initial", "final"):
        attach(model, AdapterConfig(), read_adapter(ADAPTERS / name / f"peft_{which}", model.spec))
        assert difference(model, known, which) < TOLERANCE
        detach(model)
    assert difference(model, known, "base") < TOLERANCE


def cross_entropy(model, tokens, mask, z_loss=0.0):
    logits = model(tokens)[:, :-1]
    wanted = mask[:, 1:]
    norms = mx.logsumexp(logits, axis=-1)
    chosen = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1).squeeze(-1)
    return ((norms - chosen + z_loss * norms**2) * wanted).sum() / wanted.sum()


@pytest.mark.parametrize("name", [name for name in CASES if "dpo" not in name])
def test_gradients_are_those_of_pytorch(name):
    case, known, model = case_of(name)
    attach(model, AdapterConfig(), read_adapter(ADAPTERS / name / "peft_initial", model.spec))
    model.train()
    tokens, mask = (mx.array(known[key][0]) for key in ("tokens", "loss_mask"))
    loss, grads = nn.value_and_grad(model, cross_entropy)(model, tokens, mask, case.get("z_loss", 0.0))
    if not case.get("accumulate"):
        assert abs(loss.item() - known["losses"][0]) < TOLERANCE
    model.update(grads)  # as if they were the factors, so that they can be written under the file's names
    pairs = {}
    for module in model.modules():
        if isinstance(module, LowRank):
            pairs[module.target.name] = Pair(module.lora_a, module.lora_b, 1.0, module.get("magnitude"))
    _, found = peft_files(Adapter(pairs), model.spec)
    expected = mx.load(str(ADAPTERS / name / "grads.safetensors"))
    assert set(found) == set(expected)
    assert all(key.startswith(PREFIX) for key in found)
    for key, value in expected.items():
        error = mx.linalg.norm(found[key] - value) / mx.linalg.norm(value)
        assert error.item() < TOLERANCE, key


EVERYTHING = ("attention", "experts", "router", "embedding", "head")  # of gpt-oss
UNTOUCHED = [
    ("openelm_tiny", "lora", None), ("openelm_tiny", "dora", None), ("openelm_untied", "lora", ("head", "embedding")),
    ("gpt_oss_tiny", "lora", EVERYTHING), ("gpt_oss_odd", "dora", ("q_proj", "v_proj", "o_proj", "router")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "targets"), UNTOUCHED)
def test_an_untouched_adapter_changes_no_bit(name, kind, targets):
    model = load_fixture(FIXTURES / name)
    tokens = mx.array(np.random.default_rng(0).integers(0, 90, (2, 20)))
    known, one = model(tokens), model(tokens[:, 0])
    names = attach(model, AdapterConfig(kind=kind, targets=targets))
    assert mx.array_equal(model(tokens), known)
    assert mx.array_equal(model(tokens[:, 0]), one)
    assert {key for key, _ in tree_flatten(model.trainable_parameters())} == set(names)
    detach(model)
    assert mx.array_equal(model(tokens), known)
    assert not any(".adapter." in key or ".base." in key for key, _ in tree_flatten(model.parameters()))


def test_experts_with_an_adapter_share_their_biases_as_without():
    """Beside experts of a model that has not computed yet: the table of biases is made through the adapter's module."""
    tokens = mx.array(np.random.default_rng(0).integers(0, 90, (2, 3)))
    known = load_fixture(FIXTURES / "gpt_oss_tiny")(tokens)
    model = load_fixture(FIXTURES / "gpt_oss_tiny")
    names = {key for key, _ in tree_flatten(model.parameters())}
    attach(model, AdapterConfig(targets=("experts",)))
    assert mx.array_equal(model(tokens), known)
    experts = model.layers[0].mlp.experts
    table = experts.bias_table()
    for module in (experts.gate_up_proj, experts.down_proj):
        assert "bias" not in module
        assert module.bias is module.base.bias
    assert experts.bias_table() is table
    detach(model)
    assert {key for key, _ in tree_flatten(model.parameters())} == names


@pytest.mark.parametrize("name", ["openelm_tiny", "gpt_oss_tiny"])
def test_every_part_gets_a_gradient(name):
    """Both factors of every target, with the second one not zero any more."""
    model = load_fixture(FIXTURES / name)
    names = attach(model, AdapterConfig(targets=("all-linear", "embedding") if name == "openelm_tiny" else EVERYTHING))
    drawn = {key: mx.random.normal(value.shape, key=mx.random.key(len(key))) * 0.1
             for key, value in tree_flatten(model.trainable_parameters())}  # fmt: skip
    model.load_weights(list(drawn.items()), strict=False)
    model.train()
    tokens = mx.array(np.random.default_rng(0).integers(0, 90, (2, 24)))
    _, grads = nn.value_and_grad(model, cross_entropy)(model, tokens, mx.ones_like(tokens))
    moved = {key for key, value in tree_flatten(grads) if mx.abs(value).max().item() > 0}
    assert moved == set(names)


def test_what_was_asked_for_and_is_not_there_is_an_error():
    model = load_fixture(FIXTURES / "openelm_tiny")
    for config, words in [
        (AdapterConfig(targets=("q_proj",)), "qkv_proj, out_proj, proj_1, proj_2"),
        (AdapterConfig(targets=("qkv_prj",)), r"is it qkv_proj\?"),
        (AdapterConfig(targets=("experts",)), "matches no matrix"),
        (AdapterConfig(layers=(9,)), "layers is 9"),
        (AdapterConfig(targets=("embedding",), layers=(0,)), "in none of the layers 0"),
        (AdapterConfig(rank_pattern={"token_embeddings": 4}), "token_embeddings"),
        (AdapterConfig(alpha_pattern={"k_proj": 4}), "k_proj"),
        (AdapterConfig(kind="dora", targets=("embedding",)), "DoRA beside an embedding"),
    ]:
        with pytest.raises(SettingError, match=words):
            attach(model, config)
        assert model.attached is None
    attach(model, AdapterConfig())
    with pytest.raises(SettingError, match="already"):
        attach(model, AdapterConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "qlora"}, {"rank": 0}, {"rank": True}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0},
        {"targets": ()}, {"rank_pattern": {"a": -1}}, {"alpha_pattern": {"a": "b"}}, {"dropout": "x"},
    ],
)  # fmt: skip
def test_configs_out_of_range(wrong):
    with pytest.raises(SettingError):
        AdapterConfig(**wrong)


def test_ranks_alphas_layers_and_dropout():
    model = load_fixture(FIXTURES / "openelm_tiny")
    config = AdapterConfig(rank=4, alpha=8, layers=(1, 2), dropout=0.5, use_rslora=True, targets=("qkv_proj", "ffn.proj_*"),
                           rank_pattern={"layers.1.ffn.proj_1": 2}, alpha_pattern={"proj_2": 3})  # fmt: skip
    attach(model, config)
    pairs = trained_adapter(model).pairs
    assert [name.removeprefix("transformer.layers.") for name in pairs] == [
        "1.attn.qkv_proj", "1.ffn.proj_1", "1.ffn.proj_2", "2.attn.qkv_proj", "2.ffn.proj_1", "2.ffn.proj_2",
    ]  # fmt: skip
    assert [pair.rank for pair in pairs.values()] == [4, 2, 4, 4, 4, 4]
    assert [round(pair.scale, 6) for pair in pairs.values()] == [4.0, round(8 / 2**0.5, 6), 1.5, 4.0, 4.0, 1.5]
    module = next(each for each in model.modules() if isinstance(each, LowRank) and each.lora_a.shape[0] == 64)
    module.lora_b = mx.ones_like(module.lora_b)
    x = mx.ones((1, 64))
    plain = module.delta(module.dropped(x))
    model.train()
    mx.random.seed(1)
    assert not mx.array_equal(module.delta(module.dropped(x)), plain)
    assert abs(mx.mean(mx.stack([module.dropped(x) for _ in range(200)])).item() - 1.0) < 0.1
    model.eval()
    assert mx.array_equal(module.delta(module.dropped(x)), plain)


@pytest.mark.parametrize("bits", [8, 6, 5, 4])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_beside_packed_weights(bits, kind):
    """QLoRA: nothing changes at first, and afterwards it is the adapter beside the unpacked weights; the packed ones stay."""
    model, _ = om.load(FIXTURES / "openelm_tiny", dense_bits=bits, dtype="float32")
    plain = load_fixture(FIXTURES / "openelm_tiny")
    packed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            packed[name] = mx.array(module.weight)
            module_at(plain, name).weight = unpacked(module)
    assert packed
    tokens = mx.array(np.random.default_rng(0).integers(0, 90, (2, 20)))
    known = model(tokens)
    attach(model, AdapterConfig(kind=kind, rank=4))
    assert mx.array_equal(model(tokens), known)
    drawn = {key: value + mx.random.normal(value.shape, key=mx.random.key(len(key))) * 0.1
             for key, value in tree_flatten(model.trainable_parameters())}  # fmt: skip
    model.load_weights(list(drawn.items()), strict=False)
    attach(plain, AdapterConfig(), trained_adapter(model))
    assert mx.allclose(model(tokens), plain(tokens), atol=1e-4)
    model.train()
    ones = mx.ones_like(tokens)
    _, grads = nn.value_and_grad(model, cross_entropy)(model, tokens, ones)
    plain.train()
    _, others = nn.value_and_grad(plain, cross_entropy)(plain, tokens, ones)
    others = dict(tree_flatten(others))
    for key, value in tree_flatten(grads):
        assert mx.linalg.norm(value - others[key]) <= 1e-3 * mx.linalg.norm(others[key]), key
    detach(model)
    assert all(mx.array_equal(module_at(model, name).weight, value) for name, value in packed.items())
