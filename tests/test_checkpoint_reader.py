"""Headers are checked before tensors are read; whatever is wrong with a file is one sentence."""

import json
import os
import struct
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import FIXTURES, random_model, save_folder

from openelm_mlx.checkpoint.reader import SafetensorsCheckpoint, open_checkpoint, read_config, read_header, weight_files
from openelm_mlx.checkpoint.torch_file import refuse_harmful
from openelm_mlx.errors import CheckpointError, ConfigError, UserError


def write(file: Path, header: dict | bytes, data: bytes = b"", claimed_length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if claimed_length is None else claimed_length) + text + data)
    return file


def tensor(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_header_without_the_tensors(tmp_path):
    arrays = {"a": mx.arange(6).astype(mx.float32).reshape(2, 3), "b": mx.ones((4,), mx.bfloat16)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    before = mx.get_active_memory()
    checkpoint = open_checkpoint(tmp_path)
    assert mx.get_active_memory() == before
    assert {n: (e.dtype, e.shape, e.nbytes) for n, e in checkpoint.entries.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
    }
    for name, array in arrays.items():
        entry = checkpoint.entries[name]
        raw = entry.file.read_bytes()[entry.start : entry.start + entry.nbytes]
        assert raw == bytes(memoryview(array.view(mx.uint8)))
        assert mx.array_equal(checkpoint.read(name), array)


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": tensor(0, 8, [2])}, b"\0" * 4, "describes"),  # truncated
        ({"a": tensor(0, 8, [2])}, b"\0" * 12, "describes"),  # over-long
        ({"a": tensor(0, 12, [2])}, b"\0" * 12, "offsets span"),  # a lie about the size
        ({"a": tensor(4, 12, [2])}, b"\0" * 12, "instead of"),  # a hole
        ({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"\0" * 12, "instead of"),  # an overlap
        ({"a": tensor(-8, 0, [2])}, b"", "offsets"),
        ({"a": tensor(0, 8, [-2])}, b"\0" * 8, "shape"),
        ({"a": tensor(0, 8, [2], "F31")}, b"\0" * 8, "F31"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "not in the format"),
        ({"a": 3}, b"", "not in the format"),
        (b"[1, 2]", b"", "not in the format"),
        (b"not json", b"", "not in the format"),
        (b"\xff\xfe", b"", "not in the format"),
        (b"[" * 100_000, b"", "nested too deep"),
        (b'{"a":' * 100_000, b"", "nested too deep"),
        (b'{"__metadata__": ' + b"[" * 100_000, b"", "nested too deep"),
        ({"a": tensor(0, 8, [True, 2])}, b"\0" * 8, "shape"),
        ({"a": tensor(0, 8, [2**61])}, b"\0" * 8, "shape"),
        ({"a": tensor(0, 8, [1] * 1000)}, b"\0" * 8, "shape"),
        ({"a": tensor(0, 8, "ab")}, b"\0" * 8, "shape"),
        ({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "not in the format"),
        ({"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, b"\0" * 4, None),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"\0" * 4, "not in the format"),
        ({"a" * 10**6: tensor(0, 8, [3])}, b"\0" * 8, "offsets span"),
        ({"\x1b]0;x\x07": tensor(0, 8, [3])}, b"\0" * 8, r"x1b"),
    ],
)
def test_damaged_headers(tmp_path, header, data, said):
    file = write(tmp_path / "model.safetensors", header, data)
    if said is None:  # an object without members is as good as a list without any
        assert read_header(file)["a"].shape == ()
        return
    with pytest.raises(CheckpointError, match=said) as error:
        read_header(file)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 1500
    assert str(error.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 50) + b"{}"])
def test_files_too_short_for_their_header(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(file)


def test_file_that_shrinks_after_its_header_was_read(tmp_path):
    from openelm_mlx.weights import _evaluate

    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.ones((1000,))})
    checkpoint = open_checkpoint(tmp_path)
    array = checkpoint.read("a")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _evaluate([array], checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _evaluate([checkpoint.read("a")], checkpoint)


def shards(folder: Path) -> dict[str, str]:
    mx.save_safetensors(str(folder / "model-00001-of-00002.safetensors"), {"a": mx.ones((2,))})
    mx.save_safetensors(str(folder / "model-00002-of-00002.safetensors"), {"b": mx.zeros((3,))})
    return {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def test_shards_with_an_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards(tmp_path)}))
    # A stray file beside the shards is not part of the checkpoint.
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"c": mx.zeros((3,))})
    assert set(open_checkpoint(tmp_path).entries) == {"a", "b"}


def test_a_shard_that_the_index_names_is_missing(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards(tmp_path)}))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2 shards.*model-00002-of-00002"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../../etc/passwd"}}'])
def test_broken_indexes(tmp_path, index):
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises((CheckpointError, ConfigError), match=r"index\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": {"a": "../x"}}', "pipe"]
)
def test_a_stale_index_beside_the_whole_model(tmp_path, index):
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.ones((2,)), "b": mx.zeros((3,))})
    if index == "pipe":
        os.mkfifo(tmp_path / "model.safetensors.index.json")
    else:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    assert set(open_checkpoint(tmp_path).entries) == {"a", "b"}


def test_an_index_that_is_right_goes_before_a_file_that_it_does_not_name(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards(tmp_path)}))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"c": mx.ones((2,))})
    assert set(open_checkpoint(tmp_path).entries) == {"a", "b"}


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("F8_E4M3", 8), ("F8_E5M2", 8), ("F8_E8M0", 8), ("BOOL", 8), ("U64", 64), ("F64", 64), ("F4", 4)],
)
def test_types_that_no_weight_has(tmp_path, dtype, bits):
    """The file is sound: its other tensors are read, and a model that does not need this one loads."""
    from openelm_mlx.checkpoint.layouts import understand
    from openelm_mlx.specs import spec_from_config

    model = random_model()
    folder = save_folder(tmp_path / "m", model)
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    for name, odd in (("mask", {}), ("mask", {"norm": "transformer.norm.weight"})):
        header, data = {}, b""
        for each, array in arrays.items():
            raw = bytes(memoryview(mx.contiguous(array).view(mx.uint8)))
            header[each] = tensor(len(data), len(data) + len(raw), list(array.shape))
            data += raw
        if odd:
            name = odd["norm"]
            header = {each: value for each, value in header.items() if each != name}
            header, data = packed_again(header, data)
        header[name] = tensor(len(data), len(data) + 64 * bits // 8, [64], dtype)
        write(folder / "model.safetensors", header, data + bytes(64 * bits // 8))
        checkpoint = open_checkpoint(folder)
        config = read_config(folder)
        if not odd:
            contents = understand(checkpoint, config, spec_from_config(config))
            assert name not in {source for each in contents.parameters.values() for source in each.sources}
            for each in list(arrays)[:3]:
                assert mx.array_equal(checkpoint.read(each), arrays[each])
            continue
        with pytest.raises(CheckpointError, match=f"{name} .*{dtype}"):
            understand(checkpoint, config, spec_from_config(config))


def packed_again(header: dict, data: bytes) -> tuple[dict, bytes]:
    found, kept = {}, b""
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = entry | {"data_offsets": [len(kept), len(kept) + end - begin]}
        kept += data[begin:end]
    return found, kept


def test_a_pointer_of_git_lfs_is_called_so(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(pointer)
    for read in (open_checkpoint, read_config):
        with pytest.raises(UserError, match="git lfs pull"):
            read(tmp_path)


TORCH = FIXTURES / "torch"


@pytest.mark.parametrize("name", ["sd", "bf16", "expanded"])
def test_what_torch_saves_of_tensors_is_harmless(name):
    refuse_harmful(TORCH / f"{name}.pt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bytearray", r"__builtin__ bytearray"),  # two billion bytes, made by a call that the safe loader makes
        ("module", "which is neither a tensor"),
        ("old", "not an archive of torch.save"),
        ("p4", "STACK_GLOBAL"),
        ("packed", "compressed"),
        ("overlapping", "compressed or overlap"),
        ("twice", "twice"),
        ("long pickle", "data.pkl"),
        ("no pickle", "data.pkl"),
        ("cut", "not an archive"),
        ("text", "not an archive"),
    ],
)
def test_harmful_torch_files_are_refused_before_torch_sees_them(tmp_path, name, said):
    import zipfile

    file = tmp_path / "model.pt"
    sound = (TORCH / "sd.pt").read_bytes()
    if (TORCH / f"{name}.pt").exists():
        file = TORCH / f"{name}.pt"
    elif name in ("cut", "text"):
        file.write_bytes(sound[:-100] if name == "cut" else b"hello" * 100)
    else:
        method = zipfile.ZIP_DEFLATED if name == "packed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(file, "w", method) as archive, pytest.warns() if name == "twice" else nullcontext():
            archive.writestr(
                "a/data.pkl" if name != "no pickle" else "a/x", b"." * (10**7 if name == "long pickle" else 10)
            )
            archive.writestr("a/data/0", bytes(10**6))
            if name == "twice":
                archive.writestr("a/data/0", b"x")
            if name == "overlapping":
                archive.infolist()[1].file_size = 10**8
    with pytest.raises(CheckpointError, match=said) as error:
        open_checkpoint(file)
    assert "weights_only" not in str(error.value)


def test_one_tensor_in_two_files(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        mx.save_safetensors(str(tmp_path / name), {"a": mx.ones((2,))})
    with pytest.raises(CheckpointError, match=r"tensor a|Tensor a"):
        SafetensorsCheckpoint([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
    with pytest.raises(CheckpointError, match="several checkpoints"):
        open_checkpoint(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pickle"):
        weight_files(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no weights"):
        weight_files(tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        weight_files(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"), [("config.json", "{,}"), ("config.json", "3"), ("config.json", "\xff"), ("a.yaml", "a: [")]
)
def test_configs_that_cannot_be_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=name):
        read_config(tmp_path)


def test_corenet_s_yaml_config(tmp_path):
    (tmp_path / "270M.yaml").write_text(
        "model:\n  language_modeling:\n    general_gpt:\n      model_name: OpenELM-270M\n"
    )
    config = read_config(tmp_path)
    assert config["model"]["language_modeling"]["general_gpt"]["model_name"] == "OpenELM-270M"
