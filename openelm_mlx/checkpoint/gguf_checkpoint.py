"""A GGUF file as a checkpoint: its tensors under MLX's names, its blocks in MLX's packing.

gpt-oss appears in mlx-lm's layout, OpenELM with canonical names, gate and up joined. The config is made from the
metadata; fields that GGUF does not have get the values of OpenAI's release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..files import open_regular, shown, unreadable
from .gguf_blocks import GgmlType, from_blocks
from .gguf_file import GgufFile, GgufTensor, read_gguf
from .gguf_names import FAMILIES, mlx_name
from .reader import ITEM_SIZES, TensorEntry

# How many numbers are converted at a time.
_SLICE_ELEMENTS = 4 * 2**20
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_ARRAYS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}


@dataclass(frozen=True)
class _Source:
    """What a tensor is made from: GGUF tensors whose rows are concatenated, and the part of their packing.

    part: None for plain numbers; packed tensors are then unpacked to float32.
    """

    tensors: tuple[GgufTensor, ...]
    part: str | None


class GgufCheckpoint:
    """The tensors of a GGUF file of OpenELM or gpt-oss, with the names and types of MLX checkpoints.

    Raises CheckpointError for another architecture, and what `read_gguf` raises.
    """

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def __init__(self, path: Path) -> None:
        self.gguf = read_gguf(path)
        self.files = (path,)
        family = FAMILIES.get(self.gguf.architecture)
        if family is None:
            raise CheckpointError(
                f"{path} holds a model of the architecture {shown(self.gguf.architecture)}, which is not supported: only "
                f"{' and '.join(FAMILIES)} are."
            )
        self.family = family
        # Module path -> GGUF type of its packed weight.
        self.packings: dict[str, GgmlType] = {}
        self._sources: dict[str, _Source] = {}
        for name, tensors in _joined(family, self.gguf).items():
            self._add(name, tensors)
        self.entries = {name: self._entry(name, source) for name, source in self._sources.items()}

    def read(self, name: str) -> mx.array:
        """The tensor of that name, read at once, a slice at a time."""
        entry, source = self.entries[name], self._sources[name]
        array, position = mx.zeros(entry.shape, _ARRAYS[entry.dtype]), 0
        for tensor in source.tensors:
            for rows in self._rows(tensor, source.part):
                array[position : position + len(rows)] = rows
                mx.eval(array)  # evaluated while nothing else refers to it, so that it is updated in place
                position += len(rows)
        return array

    def _add(self, name: str, tensors: tuple[GgufTensor, ...]) -> None:
        kinds = {tensor.kind for tensor in tensors}
        packing = next(iter(kinds)).packing if len(kinds) == 1 else None
        if packing is None or not name.endswith(".weight"):
            self._sources[name] = _Source(tensors, None)
            return
        module = name.removesuffix(".weight")
        self.packings[module] = tensors[0].kind
        for part in packing.parts(_shape(tensors), "F16"):
            self._sources[f"{module}.{part}"] = _Source(tensors, part)

    def _entry(self, name: str, source: _Source) -> TensorEntry:
        shape, kind = _shape(source.tensors), source.tensors[0].kind
        if source.part is None:
            kinds = {tensor.kind.safetensors for tensor in source.tensors}
            dtype = kinds.pop() if len(kinds) == 1 else None
            dtype = dtype or "F32"
        else:
            assert kind.packing is not None
            dtype, shape = kind.packing.parts(shape, "F16")[source.part]
        count = ITEM_SIZES[dtype]
        for length in shape:
            count *= length
        return TensorEntry(name, dtype, shape, self.files[0], source.tensors[0].start, count)

    def _rows(self, tensor: GgufTensor, part: str | None) -> Iterator[mx.array]:
        """The tensor in slices of its first dimension."""
        columns = 1
        for length in tensor.shape[1:]:
            columns *= length
        step = max(1, _SLICE_ELEMENTS // columns)
        row_bytes = tensor.nbytes // tensor.shape[0]
        try:
            with open_regular(self.files[0], CheckpointError) as stream:
                stream.seek(tensor.start)
                for start in range(0, tensor.shape[0], step):
                    count = min(step, tensor.shape[0] - start)
                    data = stream.read(count * row_bytes)
                    if len(data) != count * row_bytes:
                        raise CheckpointError(f"{self.files[0]} ends within {tensor.name}: download or copy it again.")
                    yield self._array(tensor, part, np.frombuffer(data, np.uint8), count)
        except OSError as error:
            raise unreadable(self.files[0], error, CheckpointError) from error

    def _array(self, tensor: GgufTensor, part: str | None, data: np.ndarray, count: int) -> mx.array:
        shape, kind = (count, *tensor.shape[1:]), tensor.kind
        if kind.safetensors is not None:
            plain = mx.array(data.view(_PLAIN[kind.safetensors]).reshape(shape))
            return plain.view(mx.bfloat16) if kind.safetensors == "BF16" else plain
        blocks = data.reshape(*shape[:-1], -1)
        try:
            if part is not None:
                return mx.array(from_blocks(kind, blocks, part))
            packing = kind.packing
            assert packing is not None
            parts = {each: mx.array(from_blocks(kind, blocks, each)) for each in packing.parts(shape, "F16")}
        except ValueError as error:
            raise CheckpointError(f"Tensor {tensor.name} in {self.files[0]} cannot be read: {error}.") from error
        wide = {each: a.astype(mx.float32) if a.dtype == mx.float16 else a for each, a in parts.items()}
        return packing.dequantize(wide, mx.float32)

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the model. Raises CheckpointError where the metadata lacks what it needs."""
        config = _Fields(self.gguf).openelm() if self.family == "openelm" else _Fields(self.gguf).gpt_oss()
        if self.packings:
            packings = {module: kind.packing for module, kind in self.packings.items()}
            settings = {module: each.as_config() for module, each in packings.items() if each is not None}
            first = next(iter(settings.values()))
            config["quantization"] = {**first, **settings}
        return config


def _joined(family: str, gguf: GgufFile) -> dict[str, tuple[GgufTensor, ...]]:
    """MLX name -> its GGUF tensors. Unknown tensors keep their names and are refused later."""
    found: dict[str, tuple[GgufTensor, ...]] = {}
    halves: dict[str, dict[str, GgufTensor]] = {}
    for tensor in gguf.tensors.values():
        name = mlx_name(family, tensor.name) or tensor.name
        if name.endswith((".ffn.gate.weight", ".ffn.up.weight")):
            prefix, _, half = name.removesuffix(".weight").rpartition(".")
            halves.setdefault(prefix, {})[half] = tensor
        else:
            found[name] = (tensor,)
    for prefix, pair in halves.items():
        if pair.keys() != {"gate", "up"} or pair["gate"].shape != pair["up"].shape:
            raise CheckpointError(
                f"{gguf.path} lacks gate or up of {prefix}, or their shapes differ: download or copy it again."
            )
        found[f"{prefix}.proj_1.weight"] = (pair["gate"], pair["up"])
    return found


def _shape(tensors: tuple[GgufTensor, ...]) -> tuple[int, ...]:
    return (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])


class _Fields:
    """The metadata as the fields of a config."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf
        self._count = self.whole("block_count")

    def openelm(self) -> dict[str, Any]:
        dim, widths = self.whole("embedding_length"), self.per_layer("feed_forward_length")
        heads, kv_heads = self.per_layer("attention.head_count"), self.per_layer("attention.head_count_kv")
        return {
            "model_type": "openelm",
            "architectures": ["OpenELMForCausalLM"],
            **self._tokens(default_bos=1, default_eos=2),
            "ffn_dim_divisor": 1,
            "ffn_multipliers": [width / dim for width in widths],
            "head_dim": self.whole("attention.key_length", "rope.dimension_count"),
            "max_context_length": self.whole("context_length"),
            "model_dim": dim,
            "normalize_qk_projections": True,
            "num_gqa_groups": max(1, heads[0] // max(1, kv_heads[0])),
            "num_kv_heads": kv_heads,
            "num_query_heads": heads,
            "num_transformer_layers": self._count,
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_freq_constant": self.number("rope.freq_base", 10_000.0),
            "share_input_output_layers": True,
            "vocab_size": self._vocab_size(),
        }

    def gpt_oss(self) -> dict[str, Any]:
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(self._count)]
        return {
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            **self._tokens(),
            "head_dim": self.whole("attention.key_length"),
            "hidden_size": self.whole("embedding_length"),
            "intermediate_size": self.whole("expert_feed_forward_length", "feed_forward_length"),
            "layer_types": kinds,
            "max_position_embeddings": self.whole("context_length"),
            "num_attention_heads": self.whole("attention.head_count"),
            "num_experts_per_tok": self.whole("expert_used_count"),
            "num_hidden_layers": self._count,
            "num_key_value_heads": self.whole("attention.head_count_kv"),
            "num_local_experts": self.whole("expert_count"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", 1e-5),
            "rope_scaling": self._yarn(),
            "rope_theta": self.number("rope.freq_base", 150_000.0),
            "sliding_window": self.whole("attention.sliding_window"),
            "tie_word_embeddings": "output.weight" not in self._gguf.tensors,
            "vocab_size": self._vocab_size(),
        }

    def whole(self, *names: str) -> int:
        """A whole number under the first of these names that is there."""
        for name in names:
            value = self._get(name)
            if isinstance(value, list) and value and all(each == value[0] for each in value):
                value = value[0]
            if type(value) is int and 0 < value < 2**31:
                return value
            if value is not None:
                raise self._wrong(name, value)
        raise CheckpointError(
            f'{self._gguf.path} has no field "{self._gguf.architecture}.{names[0]}": it is incomplete; download or copy it '
            "again."
        )

    def per_layer(self, name: str) -> list[int]:
        value = self._get(name)
        values = value if isinstance(value, list) else [self.whole(name)] * self._count
        if len(values) != self._count or any(type(each) is not int or not 0 < each < 2**31 for each in values):
            raise self._wrong(name, value)
        return values

    def number(self, name: str, default: float) -> float:
        """A number, stored as float32, in its shortest form: 1e-06 instead of 9.99999997e-07."""
        value = self._get(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise self._wrong(name, value)
        return float(str(np.float32(value)))

    def _tokens(self, default_bos: int | None = None, default_eos: int | None = None) -> dict[str, int | None]:
        metadata = self._gguf.metadata
        return {
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", default_bos),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id", default_eos),
        }

    def _yarn(self) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type")
        if kind in (None, "none"):
            return None
        if kind != "yarn":
            raise self._wrong("rope.scaling.type", kind)
        return {
            "rope_type": "yarn",
            "factor": self.number("rope.scaling.factor", 32.0),
            "original_max_position_embeddings": self.whole("rope.scaling.original_context_length"),
            "beta_fast": self.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.number("rope.scaling.yarn_beta_slow", 1.0),
            "truncate": False,  # GGUF has no such field
        }

    def _vocab_size(self) -> int:
        embedding = self._gguf.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(f"{self._gguf.path} has no token_embd.weight: download or copy it again.")
        return embedding.shape[0]

    def _get(self, name: str) -> Any:
        return self._gguf.metadata.get(f"{self._gguf.architecture}.{name}")

    def _wrong(self, name: str, value: Any) -> CheckpointError:
        return CheckpointError(
            f'The field "{self._gguf.architecture}.{name}" in {self._gguf.path} is {shown(value)}, which is not possible: '
            "download or copy it again."
        )
