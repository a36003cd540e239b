"""Adapters on disk: three formats read and written, and what is refused in one sentence."""

import contextlib
import io
import json
import pickle
import shutil
import struct
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture

from openelm_mlx.checkpoint.adapter_corenet import write_corenet
from openelm_mlx.checkpoint.adapter_files import adapter_format, read_adapter, write_adapter
from openelm_mlx.checkpoint.reader import read_config
from openelm_mlx.checkpoint.torch_file import refuse_harmful
from openelm_mlx.checkpoint.torch_writer import torch_file
from openelm_mlx.errors import CheckpointError, ConfigError, DestinationError, SettingError, UserError
from openelm_mlx.models.adapters import AdapterConfig, attach
from openelm_mlx.models.low_rank import Adapter, Pair
from openelm_mlx.specs import spec_from_config

ADAPTERS = FIXTURES / "adapters"
CASES = sorted(path.name for path in ADAPTERS.iterdir() if (path / "peft_final").is_dir())
BOTH = ("openelm_lora", "gpt_oss_experts")


def spec_of(name):
    case = json.loads((ADAPTERS / name / "case.json").read_text())
    return spec_from_config(read_config(FIXTURES / case["base"]))


def assert_same(one, other):
    assert list(one.pairs) == list(other.pairs)
    for name, pair in one.pairs.items():
        its = other.pairs[name]
        assert mx.array_equal(pair.a, its.a), name
        assert mx.array_equal(pair.b, its.b), name
        assert abs(pair.scale - its.scale) <= 1e-12 * pair.scale
        assert (pair.magnitude is None) == (its.magnitude is None)
        assert pair.magnitude is None or mx.array_equal(pair.magnitude, its.magnitude)
    assert (one.use_rslora, one.dropout, one.ties_head) == (other.use_rslora, other.dropout, other.ties_head)


@pytest.mark.parametrize("name", CASES)
def test_peft_to_ours_to_peft(tmp_path, name):
    spec, folder = spec_of(name), ADAPTERS / name / "peft_final"
    adapter = read_adapter(folder, spec)
    written = write_adapter(tmp_path / "adapter", adapter, spec)
    known, found = (mx.load(str(each / "adapter_model.safetensors")) for each in (folder, written))
    assert set(found) == set(known)
    assert all(mx.array_equal(found[key], known[key]) for key in known)
    assert_same(read_adapter(written, spec), adapter)
    theirs, ours = (json.loads((each / "adapter_config.json").read_text()) for each in (folder, written))
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_dropout"):
        assert ours[key] == theirs[key], key
    assert set(ours) <= set(theirs)  # nothing that PEFT would not know
    assert bool(ours["target_parameters"]) == bool(theirs["target_parameters"])
    if theirs["layers_to_transform"] is None:
        assert {each.rpartition(".")[2] for each in ours["target_modules"]} == set(theirs["target_modules"])


@pytest.mark.parametrize("name", BOTH)
def test_mlx_lm_to_ours_to_mlx_lm(tmp_path, name):
    spec, folder = spec_of(name), ADAPTERS / name / "mlx_lm_final"
    adapter = read_adapter(folder, spec)
    assert_same(adapter, read_adapter(ADAPTERS / name / "peft_final", spec))
    written = write_adapter(tmp_path / "adapter", adapter, spec, "mlx-lm")
    known, found = (mx.load(str(each / "adapters.safetensors")) for each in (folder, written))
    assert set(found) == set(known)
    assert all(mx.array_equal(found[key], known[key]) for key in known)
    assert json.loads((written / "adapter_config.json").read_text()) == json.loads(
        (folder / "adapter_config.json").read_text()
    )
    assert_same(read_adapter(written, spec), adapter)


def test_mlx_lm_reads_ours(tmp_path):
    """Its own model with our file gives the logits of our model with the adapter."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    known = dict(np.load(ADAPTERS / "openelm_lora" / "oracle.npz"))
    spec = spec_of("openelm_lora")
    adapter = read_adapter(ADAPTERS / "openelm_lora" / "peft_final", spec)
    write_adapter(tmp_path / "adapter", adapter, spec, "mlx-lm")
    theirs, _ = load_model(FIXTURES / "openelm_tiny")
    theirs = load_adapters(theirs, str(tmp_path / "adapter"))
    found = np.array(theirs(mx.array(known["eval_tokens"])))[..., known["columns"]]
    assert np.abs(found - known["logits_final"]).max() < 1e-4


def test_gate_and_up_of_mlx_lm_with_factors_of_their_own():
    """Ranks are added, and one side alone is read too."""
    spec = spec_of("gpt_oss_experts")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}}
    layer, rng = "model.layers.1.mlp.experts", np.random.default_rng(0)
    shapes = {"lora_a": (8, 2, 64), "lora_b": (8, 96, 2)}
    tensors = {f"{layer}.{side}_proj.{which}": mx.array(rng.normal(size=shape).astype(np.float32))
               for side in ("gate", "up") for which, shape in shapes.items()}  # fmt: skip

    def read(names):
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            mx.save_safetensors(f"{folder}/adapters.safetensors", {name: tensors[name] for name in names})
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
            return read_adapter(folder, spec).pairs[f"{layer}.gate_up_proj"]

    deltas = {
        side: tensors[f"{layer}.{side}_proj.lora_b"] @ tensors[f"{layer}.{side}_proj.lora_a"] for side in ("gate", "up")
    }
    both = read(list(tensors))
    assert both.rank == 4
    delta = (both.a @ both.b).swapaxes(1, 2)
    assert mx.allclose(delta[:, ::2], deltas["gate"], atol=1e-5)
    assert mx.allclose(delta[:, 1::2], deltas["up"], atol=1e-5)
    alone = read([name for name in tensors if ".up_proj" in name])
    delta = (alone.a @ alone.b).swapaxes(1, 2)
    assert mx.allclose(delta[:, 1::2], deltas["up"], atol=1e-5)
    assert mx.abs(delta[:, ::2]).max().item() == 0


def test_a_fused_projection_is_divided(tmp_path):
    """mlx-lm's tuner beside our own model adapts q, k and v as one matrix: they share the first factor."""
    spec = spec_of("gpt_oss_attention")
    a, b = mx.random.normal((64, 4)), mx.random.normal((4, 384))
    site = "model.layers.2.self_attn.qkv_proj"
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {f"{site}.lora_a": a, f"{site}.lora_b": b})
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pairs = read_adapter(tmp_path, spec).pairs
    assert [name.rpartition(".")[2] for name in pairs] == ["q_proj", "k_proj", "v_proj"]
    assert mx.array_equal(mx.concatenate([pair.b for pair in pairs.values()], axis=-1), b)
    assert all(mx.array_equal(pair.a, a) and pair.scale == 20.0 for pair in pairs.values())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_corenet_is_read_beside_its_base(kind):
    known = dict(np.load(FIXTURES / "openelm_lora" / kind / "oracle.npz"))
    model = load_fixture(FIXTURES / "openelm_lora")
    attach(model, AdapterConfig(), read_adapter(FIXTURES / "openelm_lora" / kind, model.spec))
    found = np.array(model(mx.array(known["tokens"])))
    assert np.abs(found - known["logits_fp32"][..., : found.shape[-1]]).max() < 1e-4


class Storage:
    """What a storage stands for until its bytes are known."""


class Unpickler(pickle.Unpickler):
    """torch.load in a few lines: every name that a state_dict has."""

    def __init__(self, archive):
        super().__init__(io.BytesIO(archive.read("archive/data.pkl")))
        self.archive = archive

    def find_class(self, module, name):
        import collections

        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuilt
        return collections.OrderedDict if module == "collections" else (module, name)

    def persistent_load(self, pid):
        kind, (_, name), key, device, count = pid
        assert (kind, device) == ("storage", "cpu")
        data = self.archive.read(f"archive/data/{key}")
        types = {"FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": np.uint16}
        found = np.frombuffer(data, types[name])
        assert len(found) == count
        return found

    def rebuilt(self, storage, offset, shape, strides, requires_grad, hooks):
        assert (offset, requires_grad, dict(hooks)) == (0, False, {})
        return np.lib.stride_tricks.as_strided(storage, shape, [each * storage.itemsize for each in strides])


def corenet_folder(tmp_path, kind):
    """The fixture's adapters written by us: a .pt, and its YAML."""
    folder = FIXTURES / "openelm_lora"
    model = load_fixture(folder)
    adapter = read_adapter(folder / kind, model.spec)
    config = json.loads((folder / kind / "corenet.json").read_text())["base"]
    base = [(name, value) for name, value in mx.load(str(folder / "model.safetensors")).items()]
    write_corenet(tmp_path / "adapter.pt", adapter, model.spec, base, config)
    return adapter, model.spec


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_corenet_is_written_as_it_was(tmp_path, kind):
    adapter, spec = corenet_folder(tmp_path, kind)
    refuse_harmful(tmp_path / "adapter.pt")
    with zipfile.ZipFile(tmp_path / "adapter.pt") as archive:
        found = Unpickler(archive).load()
    known = mx.load(str(FIXTURES / "openelm_lora" / kind / "corenet.safetensors"))
    assert set(found) == set(known)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in known.items()}
    for key, value in known.items():
        of_tokens = slice(0, 90)  # the base that was given has no rows beyond the vocabulary
        is_table = key == "token_embeddings.base_layer.weight"
        mine, its = (each[of_tokens] if is_table else each for each in (found[key], np.array(value)))
        if key == "token_embeddings.lora_embedding_A.lora":
            mine, its = mine[:, of_tokens], its[:, of_tokens]
        assert np.array_equal(mine, its), key
    mx.save_safetensors(str(tmp_path / "same.safetensors"), {key: mx.array(value) for key, value in found.items()})
    (tmp_path / "adapter.pt").unlink()
    assert_same(read_adapter(tmp_path, spec), adapter)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_corenet_through_torch(tmp_path, kind):
    pytest.importorskip("torch")
    adapter, spec = corenet_folder(tmp_path, kind)
    assert_same(read_adapter(tmp_path / "adapter.pt", spec), adapter)


def test_half_precision_in_a_torch_file():
    stream = io.BytesIO()
    arrays = {"a": mx.arange(6, dtype=mx.bfloat16).reshape(2, 3), "b": mx.array(1.5, mx.float16)}
    torch_file(stream, arrays)
    with zipfile.ZipFile(stream) as archive:
        found = Unpickler(archive).load()
    assert np.array_equal(found["a"], np.array(arrays["a"].view(mx.uint16)))
    assert found["b"] == np.float16(1.5)


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(tmp_path, name="openelm_lora", which="peft_final", config=None, tensors=None, metadata=None):
    """A copy of an adapter with some of its config and tensors replaced; None takes one away."""
    folder = tmp_path / "changed"
    shutil.copytree(ADAPTERS / name / which, folder, copy_function=shutil.copyfile)
    file = next(folder.glob("*.safetensors"))
    found = mx.load(str(file))
    for key, value in (tensors or {}).items():
        found.pop(key, None)
        if value is not None:
            found[key] = value
    mx.save_safetensors(str(file), found, metadata or {})
    known = json.loads((folder / "adapter_config.json").read_text())
    known = {key: value for key, value in {**known, **(config or {})}.items() if value != "GONE"}
    (folder / "adapter_config.json").write_text(json.dumps(known))
    return folder


QKV = "base_model.model.transformer.layers.0.attn.qkv_proj"
WRONG_CONFIGS = [
    ({"peft_type": "IA3"}, "'IA3'"),
    ({"r": 8}, "rank 4 and its config says 8"),
    ({"r": "x"}, "whole number"),
    ({"r": 0}, "above 0"),
    ({"lora_alpha": -1}, "above 0"),
    ({"lora_alpha": None}, "above 0"),
    ({"lora_alpha": 1e400}, "above 0"),
    ({"bias": "all"}, "'all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ({"rank_pattern": [1]}, "numbers by name"),
    ({"rank_pattern": {"(": 4}}, "regular expression"),
    ({"lora_dropout": "a"}, "dropout"),
    ({"rank_pattern": {"qkv_proj": 3}}, "config says 3"),
    ({"alpha_pattern": {"qkv_proj": "x"}}, "lora_alpha 'x'"),
    ({"peft_type": "GONE"}, "neither peft_type nor fine_tune_type"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
]


@pytest.mark.parametrize(("config", "said"), WRONG_CONFIGS)
def test_configs_that_are_not_read(tmp_path, config, said):
    with pytest.raises(UserError, match=said) as raised:
        read_adapter(changed(tmp_path, config=config), spec_of("openelm_lora"))
    assert "\n" not in str(raised.value)


WRONG_TENSORS = [
    ({f"{QKV}.lora_A.weight": None}, "a part of the adapter is missing"),
    ({f"{QKV}.lora_B.weight": None}, "missing"),
    ({f"{QKV}.lora_A.weight": mx.zeros((3, 64))}, "ranks 3 and 4"),
    ({f"{QKV}.lora_A.weight": mx.zeros((4, 63))}, "another model"),
    ({f"{QKV}.lora_A.weight": mx.zeros((4,))}, "2 dimensions"),
    ({f"{QKV}.lora_A.weight": mx.zeros((4, 0))}, "none of them empty"),
    ({f"{QKV}.lora_A.weight": mx.zeros((4, 64), mx.int32)}, "type I32"),
    ({f"{QKV}.lora_A.weight": mx.full((4, 64), float("nan"))}, "not finite"),
    (
        {
            "base_model.model.transformer.layers.7.attn.qkv_proj.lora_A.weight": mx.zeros((4, 64)),
            "base_model.model.transformer.layers.7.attn.qkv_proj.lora_B.weight": mx.zeros((96, 4)),
        },
        "layers.7.attn.qkv_proj",
    ),
    ({"lm_head.weight": mx.zeros((3, 3))}, "no factor of LoRA"),
    ({f"{QKV}.lora_magnitude_vector": mx.ones((3,))}, "magnitudes"),
    ({f"{QKV}.lora_embedding_A": mx.ones((4, 4))}, "missing|leftover|embedding"),
]


@pytest.mark.parametrize(("tensors", "said"), WRONG_TENSORS)
def test_tensors_that_do_not_fit(tmp_path, tensors, said):
    with pytest.raises(CheckpointError, match=said) as raised:
        read_adapter(changed(tmp_path, tensors=tensors), spec_of("openelm_lora"))
    assert "\n" not in str(raised.value)


LAYER = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{LAYER}.lora_A.weight": mx.zeros((15, 96))}, "fit neither matrix"),
        (
            {
                f"{LAYER}.base_layer.lora_A.weight": mx.zeros((16, 96)),
                f"{LAYER}.base_layer.lora_B.weight": mx.zeros((64, 16)),
            },
            "two adapters",
        ),
        ({f"{LAYER}.lora_B.weight": None}, "missing"),
    ],
)
def test_experts_that_do_not_fit(tmp_path, tensors, said):
    with pytest.raises(CheckpointError, match=said):
        read_adapter(changed(tmp_path, "gpt_oss_experts", tensors=tensors), spec_of("gpt_oss_experts"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"fine_tune_type": "full"}, "full"),
        ({"lora_parameters": 3}, "rank and scale"),
        ({"lora_parameters": {"rank": 4}}, "no scale"),
        ({"lora_parameters": {"rank": 4, "scale": 0}}, "above 0"),
        ({"lora_parameters": {"rank": 4, "scale": True}}, "above 0"),
    ],
)
def test_mlx_lm_configs_that_are_not_read(tmp_path, config, said):
    with pytest.raises(ConfigError, match=said):
        read_adapter(changed(tmp_path, which="mlx_lm_final", config=config), spec_of("openelm_lora"))


def test_an_adapter_of_another_model(tmp_path):
    with pytest.raises(CheckpointError, match="another model"):
        read_adapter(ADAPTERS / "openelm_lora" / "peft_final", spec_of("gpt_oss_experts"))
    with pytest.raises(CheckpointError, match="another model"):
        read_adapter(ADAPTERS / "gpt_oss_experts" / "peft_final", spec_of("openelm_lora"))
    with pytest.raises(CheckpointError, match="another model"):
        read_adapter(ADAPTERS / "openelm_lora" / "peft_final", spec_of("openelm_lora_patterns"))
    folder = changed(tmp_path, metadata={"base_hash": "aaaa", "base_name": "demo"})
    assert read_adapter(folder, spec_of("openelm_lora")).base == {"hash": "aaaa", "name": "demo"}


def test_places_without_an_adapter(tmp_path):
    spec = spec_of("openelm_lora")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no")
    for place, said in [("missing", "no adapter at"), ("empty", "holds no adapter"), ("text.pt", "not a PyTorch")]:
        with pytest.raises(CheckpointError, match=said):
            read_adapter(tmp_path / place, spec)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_adapter(FIXTURES / "openelm_tiny", spec)
    for inside in ("adapter_config.json", "adapter_model.safetensors"):
        assert adapter_format(ADAPTERS / "openelm_lora" / "peft_final" / inside)[0] == "peft"


def test_damaged_files(tmp_path):
    """Cut anywhere, or with bytes flipped in the header: one sentence."""
    spec, folder = spec_of("openelm_lora"), changed(tmp_path)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, header + 8, 3):
            data[at] = rng.integers(0, 256)
        if rng.random() < 0.3:
            data = data[: rng.integers(0, len(data))]
        file.write_bytes(data)
        with contextlib.suppress(UserError):  # anything else is a traceback
            read_adapter(folder, spec)
    for config in (b"", b"[]", b"{", b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", b"\xff\xfe"):
        (folder / "adapter_config.json").write_bytes(config)
        with pytest.raises(UserError):
            read_adapter(folder, spec)


def test_nothing_is_overwritten(tmp_path):
    spec = spec_of("openelm_lora")
    adapter = read_adapter(ADAPTERS / "openelm_lora" / "peft_final", spec)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DestinationError, match="exists already"):
        write_adapter(tmp_path / "mine", adapter, spec)
    with pytest.raises(SettingError, match="gguf"):
        write_adapter(tmp_path / "new", adapter, spec, "gguf")
    written = write_adapter(tmp_path / "deep" / "new", adapter, spec, others={"README.md": b"what it is"})
    assert sorted(each.name for each in written.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for file in written.glob("adapter_*"):
        file.write_bytes(b"of an earlier step")
    assert write_adapter(written, adapter, spec, replace=True) == written
    assert (written / "README.md").read_bytes() == b"what it is"
    assert_same(read_adapter(written, spec), adapter)
    assert [each.name for each in written.parent.iterdir()] == ["new"]
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / ".DS_Store").write_bytes(b"Bud1")  # the Finder has shown this empty folder
    assert_same(read_adapter(write_adapter(tmp_path / "shown", adapter, spec), spec), adapter)


def test_what_a_format_cannot_say(tmp_path):
    spec = spec_of("openelm_lora_embedding")
    embedding = read_adapter(ADAPTERS / "openelm_lora_embedding" / "peft_final", spec)
    with pytest.raises(SettingError, match="tied head"):
        write_adapter(tmp_path / "a", embedding, spec, "mlx-lm")
    dora = read_adapter(ADAPTERS / "openelm_dora" / "peft_final", spec)
    name, pair = next(iter(dora.pairs.items()))
    mixed = Adapter({**dora.pairs, name: Pair(pair.a, pair.b, pair.scale)})
    for format in ("peft", "mlx-lm"):
        with pytest.raises(SettingError, match="DoRA"):
            write_adapter(tmp_path / "b", mixed, spec, format)
    assert not list(tmp_path.iterdir())
