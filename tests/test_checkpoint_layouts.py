"""Every layout in circulation gives the same model; what does not belong is refused by name."""

import importlib.util
import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import config_of, load_fixture, max_difference, oracle

from openelm_mlx.checkpoint.layouts import merge_dora, merge_lora, understand
from openelm_mlx.checkpoint.quantize import Quantization
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config
from openelm_mlx.errors import CheckpointError, ConfigError
from openelm_mlx.loading import load
from openelm_mlx.specs import spec_from_config
from openelm_mlx.weights import load_model


def layout_of(folder) -> str:
    config = read_config(folder)
    return understand(open_checkpoint(folder), config, spec_from_config(config)).layout


def write_model(folder, config: dict, arrays: dict[str, mx.array]):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def tiny_arrays(fixtures) -> dict[str, mx.array]:
    return dict(mx.load(str(fixtures / "openelm_tiny" / "model.safetensors")))


def test_names_of_the_layouts(fixtures):
    assert layout_of(fixtures / "openelm_tiny") == "apple-hf"
    assert layout_of(fixtures / "openelm_tiny" / "corenet") == "corenet"
    assert layout_of(fixtures / "openelm_lora" / "dora") == "corenet-adapters"


def quantized(arrays: dict[str, mx.array], quantization: Quantization, embedding: bool, prefix: bool) -> dict:
    """As mlx-lm (embedding included, prefix) or Apple's converter (linear layers only, no prefix) would write it."""
    result = {}
    for name, array in arrays.items():
        stored = name if prefix else name.removeprefix("transformer.")
        if not quantization.fits(array.shape) or (not embedding and "embed" in name):
            result[stored] = array
            continue
        for part, value in quantization.quantize(array).items():
            result[stored.replace("weight", part)] = value
    return result


@pytest.mark.parametrize("layout", ["apple-mlx", "mlx-lm"])
def test_quantized_layouts(fixtures, tmp_path, layout):
    """The packed weights run as the weights they stand for."""
    prefix = layout == "mlx-lm"
    quantization, arrays = Quantization(8, 32), tiny_arrays(fixtures)
    config = config_of(fixtures / "openelm_tiny")
    if not prefix:
        config = json.loads((fixtures / "openelm_tiny" / "corenet" / "corenet.json").read_text()) | {"vocab_size": 300}
    config["quantization"] = {"group_size": 32, "bits": 8}
    packed = quantized(arrays, quantization, embedding=prefix, prefix=prefix)
    folder = write_model(tmp_path / layout, config, packed)
    assert layout_of(folder) == layout
    plain = {}
    for name, array in arrays.items():
        stored = name if prefix else name.removeprefix("transformer.")
        parts = {part: packed[stored.replace("weight", part)] for part in ("weight", "scales", "biases")
                 if stored.replace("weight", part) in packed}  # fmt: skip
        plain[name] = quantization.dequantize(parts, mx.float32) if "scales" in parts else array
    tokens = mx.array(oracle(fixtures / "openelm_tiny")["tokens"])
    expected = load_fixture(write_model(tmp_path / "plain", config_of(fixtures / "openelm_tiny"), plain))(tokens)
    assert max_difference(load_fixture(folder)(tokens), np.array(expected)) < 5e-5


def test_exceptions_by_module_path(fixtures, tmp_path):
    """A mixed conversion: one module packed otherwise than the rest."""
    arrays, module = tiny_arrays(fixtures), "transformer.layers.1.ffn.proj_1"
    packed = quantized(arrays, Quantization(4, 32), embedding=True, prefix=True)
    for part, value in Quantization(8, 32).quantize(arrays[f"{module}.weight"]).items():
        packed[f"{module}.{part}"] = value
    config = config_of(fixtures / "openelm_tiny")
    config["quantization"] = {"group_size": 32, "bits": 4, module: {"group_size": 32, "bits": 8}}
    # In 16 bits: a small packed model is unpacked where it computes in float32 on a CPU.
    model = load_fixture(write_model(tmp_path / "mixed", config, packed), mx.bfloat16)
    assert (model.layers[1].ffn.proj_1.bits, model.layers[1].attn.qkv_proj.bits) == (8, 4)
    tokens = mx.array(oracle(fixtures / "openelm_tiny")["tokens"])
    assert mx.all(mx.isfinite(model(tokens))).item()


def test_untied_head_and_the_unused_classifier(fixtures):
    """Apple's class leaves `transformer.classifier.weight` in untied files; it belongs to nothing."""
    assert "transformer.classifier.weight" in open_checkpoint(fixtures / "openelm_untied").entries
    assert "lm_head" in load_fixture(fixtures / "openelm_untied")


def test_a_missing_tensor(fixtures, tmp_path):
    arrays = tiny_arrays(fixtures)
    del arrays["transformer.layers.2.ffn.proj_2.weight"]
    folder = write_model(tmp_path / "m", config_of(fixtures / "openelm_tiny"), arrays)
    with pytest.raises(CheckpointError, match=r"no tensor transformer\.layers\.2\.ffn\.proj_2\.weight"):
        load(folder)


def test_an_extra_tensor(fixtures, tmp_path):
    arrays = tiny_arrays(fixtures) | {"transformer.layers.9.attn_norm.weight": mx.ones((64,))}
    folder = write_model(tmp_path / "m", config_of(fixtures / "openelm_tiny"), arrays)
    with pytest.raises(CheckpointError, match=r"transformer\.layers\.9\.attn_norm\.weight"):
        load(folder)


def test_a_wrong_shape(fixtures, tmp_path):
    arrays = tiny_arrays(fixtures) | {"transformer.norm.weight": mx.ones((65,))}
    folder = write_model(tmp_path / "m", config_of(fixtures / "openelm_tiny"), arrays)
    with pytest.raises(CheckpointError, match=r"transformer\.norm\.weight.*\[65\].*\[64\]"):
        load(folder)


def test_a_wrong_type(fixtures, tmp_path):
    arrays = tiny_arrays(fixtures) | {"transformer.norm.weight": mx.ones((64,), mx.int32)}
    folder = write_model(tmp_path / "m", config_of(fixtures / "openelm_tiny"), arrays)
    with pytest.raises(CheckpointError, match=r"transformer\.norm\.weight.*I32"):
        load(folder)


def test_quantized_weights_without_a_quantized_config(fixtures, tmp_path):
    packed = quantized(tiny_arrays(fixtures), Quantization(8, 32), embedding=True, prefix=True)
    folder = write_model(tmp_path / "m", config_of(fixtures / "openelm_tiny"), packed)
    with pytest.raises(ConfigError, match="quantization"):
        load(folder)


@pytest.mark.parametrize(
    "quantization", [{"bits": 7, "group_size": 32}, {"bits": 8, "group_size": 32, "mode": "awq"},
                     {"bits": 8, "group_size": 32, "transformer.layers.0.attn.qkv_proj": {"bits": 4, "group_size": 32}}]
)  # fmt: skip
def test_a_quantized_config_of_other_weights(fixtures, tmp_path, quantization):
    packed = quantized(tiny_arrays(fixtures), Quantization(8, 32), embedding=True, prefix=True)
    folder = write_model(tmp_path / "m", config_of(fixtures / "openelm_tiny") | {"quantization": quantization}, packed)
    with pytest.raises((CheckpointError, ConfigError)):
        load(folder)


@pytest.mark.parametrize("quantization", [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 64}])
def test_settings_for_all_give_way_to_what_the_tensors_are(fixtures, tmp_path, quantization):
    """As in mlx-lm: only settings by a module's own name are held against its tensors."""
    packed = quantized(tiny_arrays(fixtures), Quantization(8, 32), embedding=True, prefix=True)
    config = config_of(fixtures / "openelm_tiny")
    known, _ = load(write_model(tmp_path / "a", config | {"quantization": {"bits": 8, "group_size": 32}}, packed))
    found, _ = load(write_model(tmp_path / "b", config | {"quantization": quantization}, packed))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(found(tokens), known(tokens))


@pytest.mark.parametrize("missing", ["lora", "magnitude"])
def test_adapters_without_their_config_or_a_part(fixtures, tmp_path, missing):
    folder = tmp_path / "dora"
    shutil.copytree(fixtures / "openelm_lora" / "dora", folder, copy_function=shutil.copyfile)
    if missing == "lora":
        config = json.loads((folder / "corenet.json").read_text())
        del config["lora"]
        (folder / "corenet.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="lora_alpha"):
            load(folder)
    else:
        arrays = dict(mx.load(str(folder / "corenet.safetensors")))
        name = "layers.0.attn.qkv_proj.lora_B.lora.weight"
        del arrays[name]
        mx.save_safetensors(str(folder / "corenet.safetensors"), arrays)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load(folder)


def test_merging_formulas_on_a_hand_made_example():
    weight, a, b = mx.array([[3.0, 0.0], [0.0, 4.0]]), mx.array([[1.0, 0.0]]), mx.array([[0.0], [3.0]])
    # W + 1 * B A = [[3, 0], [3, 4]]; its rows have norms 3 and 5
    assert merge_lora(weight, a, b, 1.0).tolist() == [[3.0, 0.0], [3.0, 4.0]]
    assert mx.allclose(merge_dora(weight, a, b, mx.array([6.0, 10.0]), 1.0), mx.array([[6.0, 0.0], [6.0, 8.0]]))


def test_load_peak_is_the_weights(tmp_path):
    """Nothing is in memory twice while loading: neither as it is, nor cast (but for one batch of the cast)."""
    from openelm_mlx.specs import openelm_config

    small = {
        "model_name": "x",
        "model_type": "openelm",
        "vocab_size": 20000,
        "max_context_length": 64,
        "model_dim": 512,
    }
    small |= {"num_transformer_layers": 4, "head_dim": 64, "num_gqa_groups": 4, "ffn_dim_divisor": 64}
    small |= {"qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0], "normalize_qk_projections": True}
    small |= {"share_input_output_layers": True, "rope_freq_constant": 10000}
    spec = spec_from_config(small)
    arrays = {name: mx.zeros(shape, mx.float32) for name, shape in spec.parameter_shapes().items()}
    folder = write_model(tmp_path / "m", openelm_config(spec), arrays)
    del arrays
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load(folder)
    nbytes = 4 * spec.num_parameters()
    assert mx.get_active_memory() - base == pytest.approx(nbytes, rel=1e-3)
    assert mx.get_peak_memory() - base <= 1.02 * nbytes
    del model


@pytest.mark.torch
@pytest.mark.skipif(
    not os.environ.get("OPENELM_MLX_REQUIRE_TORCH") and importlib.util.find_spec("torch") is None,
    reason="PyTorch is an optional extra; the project's CI sets OPENELM_MLX_REQUIRE_TORCH",
)
class TestTorchFiles:
    """CoreNet's training checkpoints."""

    @staticmethod
    def corenet_pt(fixtures, tmp_path, wrap=lambda state: state, dtype=None):
        import torch
        from safetensors.torch import load_file

        folder = tmp_path / "pt"
        folder.mkdir()
        source = fixtures / "openelm_tiny" / "corenet"
        shutil.copyfile(source / "corenet.json", folder / "corenet.json")
        state = load_file(str(source / "corenet.safetensors"))
        torch.save(
            wrap({k: v if dtype is None else v.to(dtype) for k, v in state.items()}), folder / "checkpoint_average.pt"
        )
        return folder

    @pytest.mark.parametrize("key", [None, "model_state_dict"])
    def test_state_dict_and_training_checkpoint(self, fixtures, tmp_path, key):
        wrap = (lambda state: state) if key is None else (lambda state: {key: state, "epoch": 3})
        folder = self.corenet_pt(fixtures, tmp_path, wrap)
        known = oracle(fixtures / "openelm_tiny")
        for path in (folder, folder / "checkpoint_average.pt"):
            logits = load_fixture(path)(mx.array(known["tokens"]))
            assert max_difference(logits, known["logits_corenet_fp32"]) <= 5e-5

    def test_bfloat16(self, fixtures, tmp_path):
        import torch

        folder = self.corenet_pt(fixtures, tmp_path, dtype=torch.bfloat16)
        ours = load_fixture(folder, None)
        theirs = load_fixture(fixtures / "openelm_tiny" / "corenet", mx.bfloat16)
        tokens = mx.array(oracle(fixtures / "openelm_tiny")["tokens"])
        assert ours(tokens).dtype == mx.bfloat16
        assert mx.array_equal(ours(tokens), theirs(tokens))

    def test_code_in_the_pickle_does_not_run(self, fixtures, tmp_path):
        import torch

        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "pwned"),))

        folder = self.corenet_pt(fixtures, tmp_path)
        torch.save({"a": Evil()}, folder / "checkpoint_average.pt")
        with pytest.raises(CheckpointError, match="read safely"):
            load(folder)
        assert not (tmp_path / "pwned").exists()

    def test_not_a_checkpoint(self, fixtures, tmp_path):
        folder = self.corenet_pt(fixtures, tmp_path)
        (folder / "checkpoint_average.pt").write_bytes(b"hello")
        with pytest.raises(CheckpointError, match=r"checkpoint_average\.pt"):
            load(folder)


def test_load_model_keeps_float32_master_for_merged_adapters(fixtures):
    folder = fixtures / "openelm_lora" / "lora"
    config = read_config(folder)
    contents = understand(open_checkpoint(folder), config, spec_from_config(config))
    assert not contents.spec.tied_head  # the embedding's adapter changes the input only
    assert load_model(contents, open_checkpoint(folder)).head(mx.zeros((1, 1, 32))).shape[-1] == 96
