"""GGUF's blocks against the package's own arithmetic, and headers that lie."""

import re
import shlex
import struct

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import random_model, save_folder

import openelm_mlx as om
from openelm_mlx.checkpoint.gguf_blocks import TYPES, carrier, codes_of, from_blocks, to_blocks, words_of
from openelm_mlx.checkpoint.gguf_checkpoint import GgufCheckpoint
from openelm_mlx.checkpoint.gguf_file import read_gguf
from openelm_mlx.checkpoint.gguf_names import gguf_name, mlx_name
from openelm_mlx.checkpoint.quantize import Quantization
from openelm_mlx.errors import CheckpointError

GGML = gguf.GGMLQuantizationType
PACKED = [kind for kind in TYPES.values() if kind.bits is not None]


@pytest.fixture(scope="module")
def numbers() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 5, 128)).astype(np.float32)


def wide(parts: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a for name, a in parts.items()}


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_blocks_are_the_same_numbers_in_mlx_and_come_back_as_they_were(numbers, kind):
    """Against gguf's own dequantization, which knows nothing of MLX."""
    blocks = gguf.quants.quantize(numbers, GGML[kind.name])
    parts = {part: mx.array(from_blocks(kind, blocks, part)) for part in kind.packing.parts(numbers.shape, "F16")}
    ours = kind.packing.dequantize(wide(parts), mx.float32)
    assert np.array_equal(np.array(ours), gguf.quants.dequantize(blocks, GGML[kind.name]))
    scales, *biases = [np.array(wide(parts)[part]) for part in list(parts)[1:]]
    found = carrier(kind.packing, scales, biases[0] if biases else None)
    assert found == kind
    again = to_blocks(kind, np.array(parts["weight"]), scales, biases[0] if biases else None, kind.packing)
    assert np.array_equal(again, blocks)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_mlx_s_affine_groups_go_over_bit_for_bit(numbers, bits, group_size):
    packing = Quantization(bits, group_size)
    parts = packing.quantize(mx.array(numbers).astype(mx.float16))
    scales, biases = (np.array(parts[part].astype(mx.float32)) for part in ("scales", "biases"))
    kind = carrier(packing, scales, biases)
    assert kind.name == ("Q5_1" if bits == 5 else "Q4_1")
    blocks = to_blocks(kind, np.array(parts["weight"]), scales, biases, packing)
    ours = packing.dequantize(wide(parts), mx.float32)
    assert np.array_equal(gguf.quants.dequantize(blocks, GGML[kind.name]), np.array(ours))


def test_what_has_no_carrier():
    ones = np.ones((2, 4), np.float32)
    assert carrier(Quantization(8, 64), ones, ones) is None  # 8 bits with a least number
    assert carrier(Quantization(6, 64), ones, ones) is None
    assert carrier(Quantization(4, 64), ones * (1 + 2**-12), ones) is None  # a scale between float16's numbers
    assert carrier(Quantization(4, 64), ones * 1e6, ones) is None  # beyond them
    assert carrier(Quantization(4, 64), ones, ones * 2**-25) is None
    assert carrier(Quantization(4, 64), ones, ones) == TYPES["Q4_1"]
    assert carrier(Quantization(4, 64), ones, -8 * ones) == TYPES["Q4_0"]
    assert carrier(Quantization(8, 32, "mxfp8"), ones, None) is None


def test_mxfp4_words_go_over_nibble_by_nibble():
    """By hand: code i of the first 16 is low, of the last 16 high; MLX has neighbours in a byte."""
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    words = words_of(codes, 4)
    assert words.view(np.uint8).reshape(-1)[:3].tolist() == [0x10, 0x32, 0x54]
    block = to_blocks(TYPES["MXFP4"], words, np.array([[120]], np.uint8), None, Quantization(4, 32, "mxfp4"))
    assert block.reshape(-1).tolist() == [120, *(i | i << 4 for i in range(16))]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_mlx_s(bits):
    weight = mx.random.normal((4, 128), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(weight, 64, bits)
    codes = codes_of(np.array(words), bits)
    assert np.array_equal(words_of(codes, bits), np.array(words))
    plain = codes.reshape(4, 2, 64) * np.array(scales)[..., None] + np.array(biases)[..., None]
    assert np.allclose(plain.reshape(4, 128), np.array(mx.dequantize(words, scales, biases, 64, bits)), atol=1e-6)


def test_a_scale_too_large_for_mlx_is_refused():
    block = np.frombuffer(np.float16(60_000).tobytes() + bytes(32), np.uint8)[None]
    with pytest.raises(ValueError, match="too large"):
        from_blocks(TYPES["Q8_0"], block, "biases")


@pytest.mark.parametrize("family", ["openelm", "gpt_oss"])
def test_names_go_both_ways(family):
    from openelm_mlx.checkpoint.gguf_names import _NAMES

    for module in _NAMES[family]:
        for part in ("weight", "bias"):
            name = f"{module}.{part}".format(i=12)
            assert mlx_name(family, gguf_name(family, name)) == name
    assert mlx_name(family, "rope_freqs.weight") is None
    assert gguf_name("gpt_oss", "model.layers.3.self_attn.sinks") == "blk.3.attn_sinks.weight"
    assert mlx_name("gpt_oss", "blk.3.attn_sinks.weight") == "model.layers.3.self_attn.sinks"


# --- headers ----------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    dimensions = b"".join(struct.pack("<Q", length) for length in reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", kind, offset)


def header(fields=(), tensors=(), version=3, counts=None) -> bytes:
    num_tensors, num_fields = counts or (len(tensors), len(fields))
    start = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + b"".join(fields) + b"".join(tensors)
    return start + bytes(-len(start) % 32)


ARCHITECTURE = field("general.architecture", 8, text("openelm"))
ONE = tensor("a", [2, 8], 0, 0)
LIES = {
    "no GGUF": (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
    "empty": (b"", "does not begin"),
    "a version": (header(version=9), "version is 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
    "counts": (header(counts=(2**40, 1)), "claims"),
    "more fields than there are": (header([ARCHITECTURE], counts=(0, 9)), "claims|left|damaged"),
    "a string's length": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "left"),
    "an array's length": (header([field("x", 9, struct.pack("<IQ", 4, 2**40))]), "array of"),
    "an array of arrays": (header([field("x", 9, struct.pack("<IQ", 9, 1))]), "array of arrays"),
    "a field's type": (header([field("x", 77, b"")]), "type 77"),
    "a field twice": (header([ARCHITECTURE, ARCHITECTURE]), "twice"),
    "a tensor twice": (header([], [ONE, ONE]) + bytes(64), "twice"),
    "an offset behind the end": (header([], [tensor("a", [2, 8], 0, 2**40)]) + bytes(64), "ends at byte"),
    "an offset at the end": (header([], [tensor("a", [2, 8], 0, 32)]) + bytes(64), "ends at byte"),
    "an offset that is no multiple": (header([], [tensor("a", [2, 8], 0, 8)]) + bytes(128), "not a multiple"),
    "tensors over each other": (header([], [ONE, tensor("b", [2, 8], 0, 32)]) + bytes(128), "overlaps"),
    "cut short": (header([], [ONE]) + bytes(63), "ends at byte"),
    "a shape of nothing": (header([], [tensor("a", [0, 8], 0, 0)]), "shape"),
    "a shape beyond all": (header([], [tensor("a", [2**40, 2**40], 0, 0)]), "shape"),
    "dimensions": (header([], [tensor("a", [1] * 9, 0, 0)]), "9 dimensions"),
    "half a block": (header([], [tensor("a", [2, 8], 8, 0)]) + bytes(64), "32 in a block"),
    "a type of llama.cpp's own": (header([], [tensor("a", [1, 256], 12, 0)]) + bytes(200), "Q4_K, which MLX has no equivalent"),
    "a type of no one": (header([], [tensor("a", [1, 256], 999, 0)]) + bytes(200), "number 999"),
    "an alignment": (header([field("general.alignment", 4, struct.pack("<I", 33))], [ONE]) + bytes(64), "alignment is 33"),
    "one part of several": (header([field("split.count", 2, struct.pack("<H", 4))]), "one of 4 files"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n" + bytes(40), "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_headers_that_lie_end_in_a_sentence(tmp_path, case):
    data, match = LIES[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as error:
        read_gguf(path)
    assert "\n" not in str(error.value)


def test_every_prefix_of_a_header_is_cut_short(tmp_path):
    whole = header([ARCHITECTURE, field("x", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b"))], [ONE]) + bytes(64)
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    assert read_gguf(path).metadata == {"general.architecture": "openelm", "x": ["a", "b"]}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_gguf(path)


@pytest.mark.parametrize("name", ["llama", "", "qwen2"])
def test_another_architecture_is_refused(tmp_path, name):
    path = tmp_path / "m.gguf"
    path.write_bytes(header([field("general.architecture", 8, text(name))]))
    with pytest.raises(CheckpointError, match="only openelm and gpt-oss are"):
        GgufCheckpoint(path)


# --- what is missing, or of another model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    save_folder(folder / "m", random_model(), "llama")
    om.convert(folder / "m", folder / "m.gguf")
    return folder / "m.gguf"


def test_version_2_and_another_alignment_are_read_too(sound, tmp_path):
    data = bytearray(sound.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    (tmp_path / "m.gguf").write_bytes(data)
    assert read_gguf(tmp_path / "m.gguf").tensors.keys() == read_gguf(sound).tensors.keys()


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"openelm.block_count", b"openelm.block_kount", 'no field "openelm.block_count"'),
        (b"token_embd.weight", b"token_emba.weight", "token_embd"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_ub.weight", "lacks gate or up"),
        (b"blk.1.attn_qkv.weight", b"blk.1.attn_qkw.weight", "qkv_proj"),
        (b"openelm.rope.freq_base", b"openelm.rope.freq_bas_", None),  # has a default
    ],
)
def test_a_field_or_a_tensor_that_is_missing(sound, tmp_path, old, new, match):
    path = tmp_path / "m.gguf"
    path.write_bytes(sound.read_bytes().replace(old, new, 1))
    if match is None:
        assert om.convert(path, tmp_path / "out").tensors
        return
    with pytest.raises(om.UserError, match=match):
        om.convert(path, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("call", [om.load, om.plan], ids=["load", "plan"])
def test_a_gguf_file_is_converted_before_it_is_run(sound, tmp_path, call):
    with pytest.raises(CheckpointError, match=r"GGUF file.*convert .* FOLDER"):
        call(sound)
    (tmp_path / "it.gguf").symlink_to(sound)
    with pytest.raises(om.UserError, match=r"convert .*it\.gguf FOLDER"):
        call(tmp_path)


def test_the_way_to_a_folder_can_be_pasted_whatever_the_file_is_called(sound, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    path = folder / "my model.gguf"
    path.symlink_to(sound)
    for source in (path, folder):
        with pytest.raises(om.UserError) as caught:
            om.load(source)
        (command,) = re.findall("`(.*)`", str(caught.value))
        assert shlex.split(command) == ["openelm_mlx", "convert", str(path), "FOLDER"]
