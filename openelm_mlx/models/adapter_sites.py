"""Modules that stand in the place of a matrix and add what adapters have beside it. The matrix stays as it is, packed or not.

There are two kinds of adapters. The one in training is part of the model's parameters (`LowRank`, under `adapter`). Served
ones are not: the model has a set of them (adapter_sets.py), and each pass chooses one for all of its rows, or one for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn

from .adapter_sets import AdapterSet, Chosen
from .adapter_targets import Target
from .groups import Groups
from .low_rank import Pair
from .moe import Routes, expert_product, group_product
from .precision import linear

# Below this no row of a matrix is shorter: a norm that DoRA divides by.
_LEAST_NORM_SQUARED = 1e-30


class LowRank(nn.Module):
    """The trainable part beside one matrix, in float32: `Pair` as parameters. target: the matrix. dropout: of its input."""

    def __init__(self, target: Target, pair: Pair, dropout: float = 0.0) -> None:
        super().__init__()
        self.target, self.scale, self.dropout = target, pair.scale, dropout
        self.lora_a, self.lora_b = pair.a.astype(mx.float32), pair.b.astype(mx.float32)
        if pair.magnitude is not None:
            self.magnitude = pair.magnitude.astype(mx.float32)
        # Of the numbers that dropout draws, so that a layer that is computed again draws the same; None: MLX's own.
        self._key: mx.array | None = None

    @property
    def pair(self) -> Pair:
        """What it has learned so far."""
        return Pair(self.lora_a, self.lora_b, self.scale, self.get("magnitude"))

    def draw_with(self, key: mx.array | None) -> None:
        """Draw dropout from `key` from now on, the same numbers each time; None: from MLX's own state."""
        self._key = key

    def dropped(self, x: mx.array) -> mx.array:
        """x in float32, in training without a share of its numbers."""
        x = x.astype(mx.float32)
        if not (self.training and self.dropout > 0):
            return x
        kept = 1.0 - self.dropout
        return x * (mx.random.bernoulli(kept, x.shape, key=self._key) / kept)

    def delta(self, x: mx.array) -> mx.array:
        """scale * B A x; x (..., columns) in float32."""
        return (x @ self.lora_a) * self.scale @ self.lora_b


class Adapted(nn.Module):
    """What all of them share. base: the module that was there. site: its path in the model."""

    def __init__(self, base: Any, site: str, served: AdapterSet) -> None:
        super().__init__()
        self.base, self.site = base, site
        self._served = served

    @property
    def trained(self) -> Mapping[str, LowRank]:
        """Part -> what is in training beside it: q_proj, k_proj, v_proj, or the one part that there is."""
        found: Mapping[str, LowRank] = self.get("adapter") or {}
        return found

    def _chosen(self) -> Chosen | None:
        """What this pass adds here; None for nothing."""
        return self._served.chosen_at(self.site)


class AdaptedLinear(Adapted):
    """Beside `nn.Linear` or `nn.QuantizedLinear`. bias_apart: see `KernelChoices`."""

    def __init__(self, base: nn.Module, site: str, served: AdapterSet, bias_apart: bool = False) -> None:
        super().__init__(base, site, served)
        self._bias_apart = bias_apart
        self._squares: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        return self.beside(linear(self.base, x, self._bias_apart), x, self.base.get("bias"))

    def beside(self, y: mx.array, x: mx.array, added: mx.array | None) -> mx.array:
        """y, the base's output for x, with the adapter. added: what is in y beside the product: a bias, the residual."""
        if self.trained:
            return self._with_trained(y, x, added)
        chosen = self._chosen()
        return y if chosen is None else chosen.add_to(y, x, added)

    def _with_trained(self, y: mx.array, x: mx.array, added: mx.array | None) -> mx.array:
        pieces, at = [], 0
        for part in sorted(self.trained.values(), key=lambda each: each.target.first_row):
            first, stop = part.target.first_row, part.target.first_row + part.target.rows
            if first > at:
                pieces.append(y[..., at:first])
            own = None if added is None else added[..., first:stop]
            pieces.append(self._with_part(part, y[..., first:stop], x, own))
            at = stop
        if at < y.shape[-1]:
            pieces.append(y[..., at:])
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)

    def _with_part(self, part: LowRank, y: mx.array, x: mx.array, added: mx.array | None) -> mx.array:
        inputs = part.dropped(x)
        delta = part.delta(inputs)
        magnitude = part.get("magnitude")
        if magnitude is None:
            return (y + delta).astype(y.dtype)
        gain = magnitude / self.norms(part.pair, part.target)
        if part.training and part.dropout > 0:  # as PEFT: what is dropped is dropped for the base's share too
            rows = slice(part.target.first_row, part.target.first_row + part.target.rows)
            product = self._product(inputs.astype(x.dtype))[..., rows]
        else:
            product = y if added is None else y - added
        return (y + (gain - 1.0) * product + gain * delta).astype(y.dtype)

    def norms(self, pair: Pair, target: Target) -> mx.array:
        """The norm of each row of W + scale * B A, (rows,); a constant for gradients (arXiv 2402.09353, section 4.3).

        |W + D|^2 = |W|^2 + 2 W.D + |D|^2, for which W has to be neither unpacked nor copied.
        """
        a, b = mx.stop_gradient(pair.a.astype(mx.float32)), mx.stop_gradient(pair.b.astype(mx.float32))
        rows = slice(target.first_row, target.first_row + target.rows)
        in_both = mx.sum(self._product(a.T)[:, rows] * b, axis=0)
        own = mx.sum((a.T @ a) @ b * b, axis=0)
        squares = self._row_squares()[rows] + 2.0 * pair.scale * in_both + pair.scale**2 * own
        return mx.stop_gradient(mx.sqrt(mx.maximum(squares, _LEAST_NORM_SQUARED)))

    def _product(self, x: mx.array) -> mx.array:
        """W x without the bias."""
        base = self.base
        if "scales" not in base:
            return x @ base["weight"].T
        return mx.quantized_matmul(
            x, base["weight"], base["scales"], base.get("biases"), transpose=True,
            group_size=base.group_size, bits=base.bits, mode=base.mode,
        )  # fmt: skip

    def _row_squares(self) -> mx.array:
        """|W|^2 of each row in float32, computed once."""
        if self._squares is None:
            weight = unpacked(self.base).astype(mx.float32)
            self._squares = mx.stop_gradient(mx.sum(weight * weight, axis=-1))
        return self._squares


class AdaptedEmbedding(Adapted):
    """Beside an embedding. A tied head goes on with the embedding alone, unless the adapter says otherwise."""

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.base(tokens)
        for part in self.trained.values():
            return (y + part.lora_a[tokens] * part.scale @ part.lora_b).astype(y.dtype)
        chosen = self._chosen()
        return y if chosen is None else chosen.add_to_embedded(y, tokens)

    def as_linear(self, x: mx.array) -> mx.array:
        """The tied head."""
        y = self.base.as_linear(x)
        chosen = None if self.trained else self._chosen()
        return y if chosen is None else chosen.add_to_tied_head(y, x)


class AdaptedExperts(Adapted):
    """Beside one matrix of all experts, `ExpertLinear` or the packed one; the caller adds the bias."""

    @property
    def bias(self) -> mx.array:
        """The base's: each expert's bias."""
        found: mx.array = self.base.bias
        return found

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "bias":  # a module keeps every array that it is given: there would be two biases
            self.base.bias = value
        else:
            super().__setattr__(key, value)

    def __call__(self, x: mx.array, routes: Routes) -> mx.array:
        y = self.base(x, routes)
        for part in self.trained.values():
            delta = expert_product(part.dropped(x), part.lora_a, routes.experts, routes.is_sorted) * part.scale
            return (y + expert_product(delta, part.lora_b, routes.experts, routes.is_sorted)).astype(y.dtype)
        chosen = self._chosen()
        return y if chosen is None else chosen.add_to_experts(y, x, routes)

    def of_groups(self, x: mx.array, groups: Groups) -> mx.array:
        """As `ExpertLinear.of_groups`."""
        y = self.base.of_groups(x, groups)
        for part in self.trained.values():
            delta = group_product(part.dropped(x), part.lora_a, groups.experts) * part.scale
            return (y + group_product(delta, part.lora_b, groups.experts)).astype(y.dtype)
        chosen = self._chosen()
        return y if chosen is None else chosen.add_to_groups(y, x, groups)


def unpacked(module: Any) -> mx.array:
    """The module's matrix as numbers: (rows, columns), or (E, rows, columns)."""
    if "scales" not in module:
        found: mx.array = module["weight"]
        return found
    return mx.dequantize(
        module["weight"], module["scales"], module.get("biases"), module.group_size, module.bits, module.mode
    )


def module_at(model: Any, path: str) -> Any:
    """The module at `path`; experts that are streamed have the layer's own arithmetic inside."""
    found = model
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else getattr(found, part)
        if part == "experts":
            found = getattr(found, "experts", found)
    return found


def put_module(model: Any, path: str, module: Any) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(module_at(model, parent) if parent else model, name, module)
