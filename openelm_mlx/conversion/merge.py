"""An adapter merged into a checkpoint's weights, and by how much what it changes survives the rounding that follows.

A delta is small beside its weight. In 16 bits it is kept; in 8 bits mostly; in MXFP4 the rounding is larger than most
deltas, and a merged model answers as if it had never been trained. So it is measured, on the very arrays that would be
written, before any of them is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import mlx.core as mx
import numpy as np

from ..adapters import adapter_id
from ..checkpoint.layouts import Contents, Parameter
from ..checkpoint.quantize import PARTS, Quantization, unpacked
from ..errors import ConversionError
from ..models.adapter_targets import Target, targets_of
from ..models.adapters import check_belongs
from ..models.low_rank import Adapter, Pair

# The rounding of a merged weight may be at most this share of the delta: with more, little of what was learnt is left.
LARGEST_ERROR = 0.5
_HEAD = "lm_head"


@dataclass(frozen=True)
class Merge:
    """The pairs beside one parameter, with the rows of it that each one changes."""

    pairs: tuple[tuple[Target, Pair], ...]

    def rows(self, plain: mx.array, start: int) -> mx.array:
        """The merged rows in float32. plain: the parameter's rows from `start` on; of experts, whole matrices."""
        merged = plain.astype(mx.float32)
        stop = start + plain.shape[0]
        for target, pair in self.pairs:
            first, last = target.first_row, target.first_row + (target.num_experts or target.rows)
            begin, end = max(start, first), min(stop, last)
            if begin >= end:
                continue
            mine, own = slice(begin - start, end - start), slice(begin - first, end - first)
            changed = merged[mine] + pair.scale * _delta(target, pair, own)
            if pair.magnitude is not None:
                lengths = mx.linalg.norm(changed, axis=-1, keepdims=True)
                changed = pair.magnitude.astype(mx.float32)[own, None] * changed / lengths
            merged = mx.concatenate([merged[: mine.start], changed, merged[mine.stop :]])
        return merged


def _delta(target: Target, pair: Pair, rows: slice) -> mx.array:
    """Rows of B A."""
    a, b = pair.a.astype(mx.float32), pair.b.astype(mx.float32)
    if target.is_embedding:
        return a[rows] @ b
    if target.num_experts:
        return b[rows].swapaxes(1, 2) @ a[rows].swapaxes(1, 2)
    return b[:, rows].T @ a.T


@dataclass(frozen=True)
class AdapterToMerge:
    """An adapter for a checkpoint: what is merged into which parameter. Raises CheckpointError for another model's."""

    name: str
    adapter: Adapter
    contents: Contents

    def __post_init__(self) -> None:
        check_belongs(self.adapter, self.contents.spec)

    @cached_property
    def id(self) -> str:
        return adapter_id(self.adapter)

    @cached_property
    def merges(self) -> Mapping[str, Merge]:
        """Parameter -> what is merged into it."""
        found: dict[str, list[tuple[Target, Pair]]] = {}
        for name, target in targets_of(self.contents.spec).items():
            if name in self.adapter.pairs:
                found.setdefault(f"{target.site}.weight", []).append((target, self.adapter.pairs[name]))
        return {name: Merge(tuple(pairs)) for name, pairs in found.items()}

    @cached_property
    def unmerged(self) -> Contents:
        """The checkpoint, with a head of its own where the embedding alone is adapted: a tied head goes on without it."""
        spec = self.contents.spec
        embedding = next(iter(spec.parameter_shapes())).removesuffix(".weight")
        if not spec.tied_head or f"{embedding}.weight" not in self.merges or self.adapter.ties_head:
            return self.contents
        parameters = dict(self.contents.parameters)
        for part in PARTS:
            stored = parameters.get(f"{embedding}.{part}")
            if stored is not None:
                parameters[f"{_HEAD}.{part}"] = replace(stored, name=f"{_HEAD}.{part}")
        quantized = dict(self.contents.quantized)
        if embedding in quantized:
            quantized[_HEAD] = quantized[embedding]
        return Contents(replace(spec, tied_head=False), self.contents.layout, parameters, quantized)


@dataclass(frozen=True)
class KeptDelta:
    """What is left of a delta D in one weight as it is written: W' = W + D', rounded.

    cosine: of D' and D. error: |D' - D| / |D|. size: |D| / |W|. All by the Frobenius norm.
    """

    name: str
    cosine: float
    error: float
    size: float


@dataclass(frozen=True)
class MergeReport:
    """What merging an adapter keeps of it: each weight, and all together. None where the tensors are not here yet."""

    adapter: str
    num_weights: int
    weights: tuple[KeptDelta, ...] = ()
    total: KeptDelta | None = None

    @property
    def worst(self) -> KeptDelta | None:
        """The weight that keeps least."""
        return max(self.weights, key=lambda each: each.error, default=None)

    def sentence(self) -> str:
        """For people."""
        total, worst = self.total, self.worst
        if total is None or worst is None:
            return f"The adapter {self.adapter} is merged into {self.num_weights} weights; how much is kept is not known yet."
        return (
            f"The adapter {self.adapter} is merged into {self.num_weights} weights, which it changes by {total.size:.1%}; that "
            f"change is kept with a cosine of {total.cosine:.4f} and a relative error of {total.error:.1%} (at most "
            f"{worst.error:.1%}, in {worst.name})."
        )

    def refuse_drowned(self) -> None:
        """Raise ConversionError where rounding loses too much of it."""
        if self.total is None or self.total.error <= LARGEST_ERROR:
            return
        raise ConversionError(
            f"The adapter {self.adapter} would drown: it changes the weights by {self.total.size:.1%}, and rounding them "
            f"afterwards is {self.total.error:.0%} of that (cosine {self.total.cosine:.2f}); leave it beside the weights "
            'as it is used, merge it with dtype="bfloat16" or quantize=8, or write it anyway with '
            "merge_anyway=True."
        )


class DeltaSums:
    """The sums that `KeptDelta` is made of."""

    def __init__(self) -> None:
        self._wanted = self._kept = self._both = self._missed = self._weight = 0.0

    def add(self, base: mx.array, merged: mx.array, written: mx.array) -> None:
        """Some rows: before, merged in float32, and as they will be read."""
        wanted, kept = merged - base, written - base
        sums = [wanted * wanted, kept * kept, wanted * kept, (kept - wanted) ** 2, base * base]
        values = [float(np.array(mx.sum(each))) for each in sums]
        self._wanted += values[0]
        self._kept += values[1]
        self._both += values[2]
        self._missed += values[3]
        self._weight += values[4]

    def plus(self, other: DeltaSums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def kept(self, name: str) -> KeptDelta:
        both = math.sqrt(self._wanted * self._kept)
        return KeptDelta(
            name,
            cosine=self._both / both if both else 1.0,
            error=math.sqrt(self._missed / self._wanted) if self._wanted else 0.0,
            size=math.sqrt(self._wanted / self._weight) if self._weight else math.inf,
        )


def merged_contents(merging: AdapterToMerge) -> Contents:
    """The checkpoint as it is after merging, in float32, to be compared with what was written."""
    before = merging.unmerged
    parameters, quantized = dict(before.parameters), dict(before.quantized)
    for name, merge in merging.merges.items():
        module = name.removesuffix(".weight")
        packing = quantized.pop(module, None)
        shape = before.spec.parameter_shapes()[name]
        stored = [each for part in PARTS if (each := parameters.pop(f"{module}.{part}", None)) is not None]
        make = partial(_merged_whole, merge, stored, packing)
        sources = tuple(source for each in stored for source in each.sources)
        parameters[name] = Parameter(name, shape, "F32", sources, make)
    return Contents(before.spec, before.layout, parameters, quantized)


def _merged_whole(
    merge: Merge,
    stored: Sequence[Parameter],
    packing: Quantization | None,
    *arrays: mx.array,
) -> mx.array:
    """A whole parameter with its pairs, in float32, from the tensors that it is stored as."""
    made, at = {}, 0
    for part, each in zip(PARTS, stored, strict=False):
        own = arrays[at : at + len(each.sources)]
        made[part] = own[0] if each.make is None else each.make(*own)
        at += len(each.sources)
    return merge.rows(made["weight"] if packing is None else unpacked(packing, made), 0)
