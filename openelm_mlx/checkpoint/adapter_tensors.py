"""What the formats of adapters share: tensors by name, parts of fused matrices, numbers of a config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checks import is_number, is_whole
from ..errors import CheckpointError, ConfigError
from ..files import open_regular, shown, unreadable
from ..models.adapter_targets import Target, by_site, targets_of
from ..models.low_rank import Pair, factor
from ..specs import ModelSpec
from .reader import SafetensorsCheckpoint

FLOATS = ("F32", "F16", "BF16")


@dataclass
class AdapterTensors:
    """The tensors of an adapter's file, each to be taken once; `metadata` is what its header says beside them."""

    file: Path
    checkpoint: SafetensorsCheckpoint
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._left = dict(self.checkpoint.entries)

    @property
    def names(self) -> list[str]:
        """Those that nobody took yet."""
        return list(self._left)

    def take(self, name: str, num_dimensions: tuple[int, ...]) -> mx.array:
        """The tensor of that name. Raises CheckpointError where it is missing, or has another type or number of dimensions."""
        entry = self._left.pop(name, None)
        if entry is None:
            raise CheckpointError(f"{self.file} has no tensor {shown(name)}: a part of the adapter is missing.")
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"Tensor {shown(name)} of {self.file} has the type {entry.dtype}: {' or '.join(FLOATS)} is needed there."
            )
        if len(entry.shape) not in num_dimensions or 0 in entry.shape:
            raise CheckpointError(
                f"Tensor {shown(name)} of {self.file} has shape {list(entry.shape)}: the factor of an adapter has "
                f"{' or '.join(map(str, num_dimensions))} dimensions, none of them empty."
            )
        return self.checkpoint.read(name)

    def refuse_leftovers(self) -> None:
        """Raise CheckpointError for tensors that nobody took."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{self.file} has tensors that belong to no adapter read here: {', '.join(map(shown, names[:3]))}{more}."
            )


def open_tensors(file: Path) -> AdapterTensors:
    """The tensors of a safetensors file. Raises CheckpointError."""
    checkpoint = SafetensorsCheckpoint([file])
    try:
        with open_regular(file, CheckpointError) as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))  # has just been checked
    except OSError as error:
        raise unreadable(file, error, CheckpointError) from error
    metadata = header.get("__metadata__")
    texts = metadata if isinstance(metadata, dict) else {}
    return AdapterTensors(file, checkpoint, {str(k): v for k, v in texts.items() if isinstance(v, str)})


def base_of(metadata: Mapping[str, str], name: Any = None) -> dict[str, str]:
    """What a file says about the model it belongs to."""
    found = {key.removeprefix("base_"): value for key, value in metadata.items() if key.startswith("base_")}
    if isinstance(name, str) and name:
        found.setdefault("name", name)
    return found


class Placer:
    """Puts pairs where the model has them: under a target's name, or beside a fused matrix under the names of its parts."""

    def __init__(self, spec: ModelSpec, origin: Path) -> None:
        self.targets = targets_of(spec)
        self.pairs: dict[str, Pair] = {}
        self._spec, self._origin = spec, origin
        self._parts = by_site(self.targets.values())

    def target(self, name: str) -> Target:
        """The target of that name. Raises CheckpointError where the model has none."""
        found = self.targets.get(name)
        if found is None:
            raise self.other_model(name)
        return found

    def other_model(self, name: str) -> CheckpointError:
        """The error for a matrix that this model does not have."""
        return CheckpointError(
            f"{self._origin} belongs to another model: it adapts {shown(name)}, which this {self._spec.family} model of "
            f"{len(self._spec.layers)} layers has not."
        )

    def put(self, name: str, pair: Pair) -> None:
        """Keep a pair; one beside a matrix of several parts is divided, and they share the first factor."""
        parts = self._parts.get(name, [])
        if name in self.targets or len(parts) < 2:
            self.target(name)
            self.pairs[name] = pair
            return
        rows = sum(part.rows for part in parts)
        if pair.b.shape[-1] != rows:
            raise CheckpointError(
                f"{self._origin} belongs to another model: its factor of {name} has {pair.b.shape[-1]} rows, and this model "
                f"needs {rows}."
            )
        for part in parts:
            mine = slice(part.first_row, part.first_row + part.rows)
            magnitude = None if pair.magnitude is None else pair.magnitude[mine]
            self.pairs[part.name] = Pair(pair.a, pair.b[:, mine], pair.scale, magnitude)

    def in_order(self) -> dict[str, Pair]:
        """The pairs in the order of the forward pass. Raises CheckpointError where there are none."""
        if not self.pairs:
            raise CheckpointError(f"{self._origin} holds no adapter: there are no factors of any matrix in it.")
        return {name: self.pairs[name] for name in self.targets if name in self.pairs}


def plain_pair(module: str, file: Path, a: mx.array, b: mx.array, magnitude: mx.array | None) -> Pair:
    """The pair of A (r, columns) and B (rows, r), without its factor. Raises CheckpointError where they do not fit together."""
    if a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"The factors of {module} in {file} have the ranks {a.shape[0]} and {b.shape[1]}: the file is damaged."
        )
    check_magnitude(module, file, b.shape[0], magnitude)
    return Pair(mx.contiguous(a.T), mx.contiguous(b.T), 1.0, magnitude)


def check_magnitude(module: str, file: Path, rows: int, magnitude: mx.array | None) -> None:
    """Raise CheckpointError where DoRA has not one number a row."""
    if magnitude is not None and magnitude.shape != (rows,):
        raise CheckpointError(f"The magnitudes of {module} in {file} are {magnitude.size}, and it has {rows} rows.")


def alpha_of(pair: Pair, use_rslora: bool) -> float | int:
    """The alpha of a pair's factor (`low_rank.factor`)."""
    return rounded(pair.scale / factor(1.0, pair.rank, use_rslora))


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number above 0 of a config. Raises ConfigError."""
    value = config.get(key, default)
    if not is_whole(value) or not 0 < value <= 2**20:
        raise ConfigError(f"The adapter's config has {key} {shown(value)}: it must be a whole number above 0.")
    return int(value)


def number(value: Any, key: str, low: float = 0.0, *, may_be_low: bool = False) -> float:
    """A finite number above `low`. Raises ConfigError."""
    is_fine = (
        is_number(value) and math.isfinite(value) and (value > low or (may_be_low and value == low)) and value < 1e6
    )
    if not is_fine:
        at_least = "at least" if may_be_low else "above"
        raise ConfigError(f"The adapter's config has {key} {shown(value)}: it must be a number {at_least} {low:g}.")
    return float(value)


def rounded(value: float) -> float | int:
    """A factor as people write it: without the noise of the last digits, whole where it is."""
    short = float(f"{value:.12g}")
    return int(short) if short.is_integer() else short
