"""Every layout that gpt-oss comes in gives the same parameters, byte for byte where nothing has to be computed."""

import copy
import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from conftest import config_of, max_difference, oracle
from mlx import nn
from mlx.utils import tree_flatten

from openelm_mlx.checkpoint.gpt_oss_layouts import MXFP4, gpt_oss_contents, gpt_oss_layout
from openelm_mlx.checkpoint.quantize import Quantization
from openelm_mlx.checkpoint.reader import ITEM_SIZES, SafetensorsCheckpoint, TensorEntry
from openelm_mlx.errors import CheckpointError
from openelm_mlx.models import build_model
from openelm_mlx.specs import spec_from_config

MODELS = ["gpt_oss_tiny", "gpt_oss_odd"]
TOLERANCE = 1e-4


@pytest.fixture(params=MODELS)
def folder(request, fixtures):
    return fixtures / request.param


class Opened:
    """A file's parameters by canonical name, every source checked against what the assembly says of it."""

    def __init__(self, file, config):
        self.spec = spec_from_config(config)
        checkpoint = SafetensorsCheckpoint([file])
        self.contents = gpt_oss_contents(checkpoint.entries, config, self.spec)
        self.arrays, used = {}, set()
        for name, assembly in self.contents.assemblies.items():
            sources = []
            for source in assembly.sources:
                entry = checkpoint.entries[source.name]
                assert entry.shape == source.shape
                assert entry.dtype in (source.dtype or ("F32", "BF16"))
                sources.append(checkpoint.read(source.name))
            array = sources[0] if assembly.make is None else assembly.make(*sources)
            assert array.shape == assembly.shape
            assert assembly.dtype in (None, {mx.uint32: "U32", mx.uint8: "U8", mx.bfloat16: "BF16"}.get(array.dtype))
            self.arrays[name] = array
            used |= {source.name for source in assembly.sources}
        assert used == set(checkpoint.entries)  # nothing is left over

    def logits(self, tokens):
        model = build_model(self.spec)
        packed = self.contents.quantized
        nn.quantize(model, class_predicate=lambda path, _: packed[path].as_config() if path in packed else False)
        floating = {n: a.astype(mx.float32) for n, a in self.arrays.items() if mx.issubdtype(a.dtype, mx.floating)}
        model.load_weights(list({**self.arrays, **floating}.items()))
        return model(mx.array(tokens))


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def hf(folder):
    return Opened(folder / "model.safetensors", config_of(folder))


def saved(tmp_path, weights):
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    return tmp_path / "model.safetensors"


def test_hugging_face_and_original_files_hold_the_same(folder):
    known, original = hf(folder), Opened(folder / "original" / "model.safetensors", config_of(folder / "original"))
    assert (known.contents.layout, original.contents.layout) == ("openai-hf", "openai-original")
    assert same(known.arrays, original.arrays)
    assert known.contents.quantized == original.contents.quantized
    assert set(known.contents.quantized.values()) == {MXFP4}
    assert len(known.contents.quantized) == 2 * len(known.spec.layers)


def test_packed_words_are_the_files_bytes(folder):
    """Nothing is converted: an expert's words are its blocks, in their place."""
    raw, ours = mx.load(str(folder / "model.safetensors")), hf(folder).arrays
    prefix = "model.layers.1.mlp.experts.gate_up_proj"
    assert np.array(ours[f"{prefix}.weight"]).tobytes() == np.array(raw[f"{prefix}_blocks"]).tobytes()
    assert np.array(ours[f"{prefix}.scales"]).tobytes() == np.array(raw[f"{prefix}_scales"]).tobytes()
    unpacked = MXFP4.dequantize(
        {part: ours[f"model.layers.0.mlp.experts.gate_up_proj.{part}"] for part in ("weight", "scales")}, mx.float32
    )
    assert (np.array(unpacked) == oracle(folder)["layer0_gate_up_dequantized"]).all()


def dense_weights(folder, suffix):
    """A dequantized repository: experts in bf16, (E, in, out), under transformers' names."""
    weights = mx.load(str(folder / "model.safetensors"))
    for i in range(len(spec_from_config(config_of(folder)).layers)):
        for part in ("gate_up_proj", "down_proj"):
            prefix = f"model.layers.{i}.mlp.experts.{part}"
            words = weights.pop(f"{prefix}_blocks").view(mx.uint32).flatten(-2)
            dense = MXFP4.dequantize({"weight": words, "scales": weights.pop(f"{prefix}_scales")}, mx.bfloat16)
            weights[prefix + suffix] = mx.contiguous(dense.swapaxes(1, 2))
    return weights


@pytest.mark.parametrize("suffix", ["", "_blocks"])  # transformers 5 writes bf16 under the packed names
def test_dequantized_repositories(folder, tmp_path, suffix):
    config = {k: v for k, v in config_of(folder).items() if k != "quantization_config"}
    opened = Opened(saved(tmp_path, dense_weights(folder, suffix)), config)
    assert (opened.contents.layout, opened.contents.quantized) == ("hf-dense", {})
    known = oracle(folder)
    down = opened.arrays["model.layers.0.mlp.experts.down_proj.weight"]
    assert max_difference(down, known["layer0_down_dequantized"]) == 0
    assert max_difference(opened.logits(known["tokens"]), known["logits_fp32"]) <= TOLERANCE


def test_dense_experts_the_other_way_round(folder, tmp_path):
    """(E, out, in) is recognised by gate_up's shape, and down_proj follows it, square or not."""
    weights = {
        name: mx.contiguous(array.swapaxes(1, 2)) if name.endswith(("gate_up_proj", "down_proj")) else array
        for name, array in dense_weights(folder, "").items()
    }
    opened = Opened(saved(tmp_path, weights), config_of(folder))
    known = oracle(folder)
    assert max_difference(opened.logits(known["tokens"]), known["logits_fp32"]) <= TOLERANCE


def mlx_lm_weights(folder, **quantization):
    """What mlx-lm saves of the fixture, by its own code; with `quantization` of everything but the experts."""
    from mlx_lm.models import gpt_oss

    config = config_of(folder)
    model = gpt_oss.Model(gpt_oss.ModelArgs.from_dict({**config, "layer_types": config["layer_types"]}))
    weights = model.sanitize(mx.load(str(folder / "model.safetensors")))

    def packing(path, module):
        if f"{path}.scales" in weights:
            return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        return quantization.get(path.rpartition(".")[2], quantization.get("rest", False)) if quantization else False

    nn.quantize(model, class_predicate=lambda p, m: f"{p}.scales" in weights and packing(p, m))
    model.load_weights(list(weights.items()))
    settings = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    if quantization:
        for path, module in model.named_modules():
            if hasattr(module, "to_quantized"):
                settings[path] = {"group_size": 32, "bits": 8, "mode": "affine", **(packing(path, module) or {})}
        nn.quantize(model, class_predicate=lambda p, m: settings.get(p, False) if hasattr(m, "to_quantized") else False)
    return dict(tree_flatten(model.parameters())), {**config, "quantization": settings}, model


def test_mlx_lms_files_with_dense_attention(folder, tmp_path):
    """Split gate and up are interleaved again: the same bytes as OpenAI's."""
    weights, config, _ = mlx_lm_weights(folder)
    opened = Opened(saved(tmp_path, weights), config)
    assert opened.contents.layout == "mlx-lm"
    assert opened.contents.quantized == hf(folder).contents.quantized
    assert same(opened.arrays, hf(folder).arrays)


@pytest.mark.parametrize("mixed", [False, True])
def test_mlx_lms_quantized_files(folder, tmp_path, mixed):
    """The rest in 8 bits; with a mixed recipe v_proj has fewer bits than q_proj and gets as many, of the same numbers."""
    options = {"rest": {"bits": 8, "mode": "affine"}}
    if mixed:
        options["v_proj"] = {"bits": 4, "mode": "affine"}
    weights, config, theirs = mlx_lm_weights(folder, **options)
    opened = Opened(saved(tmp_path, weights), config)
    attention = "model.layers.0.self_attn.qkv_proj"
    assert opened.contents.quantized[attention] == Quantization(8, 32)
    assert opened.contents.quantized["lm_head"] == Quantization(8, 32)
    assert opened.contents.quantized["model.layers.0.mlp.router"] == Quantization(8, 32)
    # The same numbers, unpacked, as in mlx-lm's own modules.
    first = theirs.model.layers[0].self_attn
    wide = [
        (p, p.scales.astype(mx.float32), p.biases.astype(mx.float32))
        for p in map(first.get, ("q_proj", "k_proj", "v_proj"))
    ]
    known = mx.concatenate([mx.dequantize(p.weight, s, b, group_size=32, bits=p.bits) for p, s, b in wide])
    ours = unpacked_but_experts(opened).arrays[f"{attention}.weight"]
    assert mx.array_equal(ours, known)
    tokens = oracle(folder)["tokens"]
    expected = unpacked_but_experts(opened).logits(tokens)
    assert max_difference(opened.logits(tokens), np.array(expected)) <= TOLERANCE


def unpacked_but_experts(opened):
    """The same parameters with every 8-bit matrix as float32."""
    other, quantized = copy.copy(opened), dict(opened.contents.quantized)
    other.arrays = dict(opened.arrays)
    for path, packing in opened.contents.quantized.items():
        if ".experts." not in path:
            parts = {part: other.arrays.pop(f"{path}.{part}") for part in ("weight", "scales", "biases")}
            parts |= {part: parts[part].astype(mx.float32) for part in ("scales", "biases")}
            other.arrays[f"{path}.weight"] = packing.dequantize(parts, mx.float32)
            del quantized[path]
    other.contents = dataclasses.replace(opened.contents, quantized=quantized)
    return other


@pytest.mark.parametrize("dense", [False, True])
def test_our_own_files(folder, tmp_path, dense):
    source = hf(folder) if not dense else Opened(saved(tmp_path, dense_weights(folder, "")), config_of(folder))
    packed = {path: packing.as_config() for path, packing in source.contents.quantized.items()}
    config = {**config_of(folder), "quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4", **packed}}
    opened = Opened(saved(tmp_path, source.arrays), config)
    assert opened.contents.layout == "openelm-mlx"
    assert opened.contents.quantized == source.contents.quantized
    assert same(opened.arrays, source.arrays)


def test_parameters_are_the_specs(folder):
    """Unpacked, each parameter has the shape that the spec gives it."""
    opened = hf(folder)
    shapes = {}
    for name, array in opened.arrays.items():
        module, _, part = name.rpartition(".")
        if part != "scales":
            columns = array.shape[-1] * (8 if module in opened.contents.quantized and part == "weight" else 1)
            shapes[name] = (*array.shape[:-1], columns)
    assert shapes == opened.spec.parameter_shapes()


def test_names_of_no_layout():
    entries = {"transformer.h.0.weight": TensorEntry("transformer.h.0.weight", "F32", (1,), None, 0, ITEM_SIZES["F32"])}
    with pytest.raises(CheckpointError, match="none of its tensors"):
        gpt_oss_layout(entries)
