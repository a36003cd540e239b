"""The gradients of a step's rows: each batch of them through the model and the loss, compiled by shape on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from ..models.adapter_sites import LowRank
from ..models.base import LanguageModel
from ..models.precision import runs_on_cpu
from ..models.tracing import compile_apart
from .batches import Batch
from .forward import Places, hidden_states
from .loss import HeadLoss, head_logprobs, head_loss, preference_loss, surrogate, targets_at_once

# Compiled functions that are kept: a new one is traced and compiled, which takes seconds.
MOST_COMPILED = 32

Tree = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """What is minimized. z_loss: see `token_losses`. preference: None, or "sigmoid" or "hinge" with DPO's `beta`.

    at_once: how many targets' logits are made at once; None: as many as `LOGITS_BYTES` hold.
    """

    z_loss: float = 0.0
    preference: str | None = None
    beta: float = 0.1
    at_once: int | None = None


class Gradients:
    """Sums of losses and gradients over batches, with respect to a model's trainable parameters.

    dtype: the type that trained weights are computed in, where they are kept in float32 (all weights are trained); None: as
    they are. checkpointing: see `hidden_states`. The model's own arrays are those handed in, whenever it is not called.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        dtype: mx.Dtype | None = None,
        checkpointing: bool = False,
        compiled: bool | None = None,
    ) -> None:
        self.model, self.objective, self.dtype, self.checkpointing = model, objective, dtype, checkpointing
        self.compiled = not runs_on_cpu() if compiled is None else compiled
        self.at_once = objective.at_once or targets_at_once(model.spec.vocab_size)
        self._functions: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, parameters: Tree, batch: Batch, reference: np.ndarray | None = None, key: mx.array | None = None
    ) -> tuple[mx.array, Tree]:
        """The weighted sum of the losses of a batch's targets, (), and its gradients; nothing is evaluated.

        reference: for preferences, the reference's log-probability of each row, (rows,); rows alternate, chosen and
        rejected, and the loss is the sum over pairs. key: of random numbers, where there is dropout.
        """
        function = self._function(batch, reference is not None)
        arrays = _on_device(batch)
        arrays.append(mx.random.key(0) if key is None else key)
        if reference is not None:
            arrays.append(mx.array(reference.astype(np.float32)))
        try:
            (_, loss), gradients = function(parameters, arrays)
        finally:
            self.model.update(parameters)
        return loss, gradients

    def logprobs(self, batch: Batch, num_rows: int) -> mx.array:
        """The sum of the log-probabilities of each row's targets, (num_rows,), by the model as it is."""
        return _sums(*self._weighted_logprobs(batch), num_rows)

    def measured(self, batch: Batch, reference: np.ndarray | None = None) -> tuple[mx.array, mx.array]:
        """The loss of a batch without z-loss, (), by the model as it is; of preferences also how many pairs it gets right."""
        logprobs, owners = self._weighted_logprobs(batch)
        if reference is None:
            return -logprobs.sum(), mx.array(0.0)
        sums = _sums(logprobs, owners, len(reference))
        margins = self._margins(sums, mx.array(reference.astype(np.float32)))
        return preference_loss(margins, self.objective.preference or "").sum(), (margins > 0).sum()

    def _margins(self, sums: mx.array, reference: mx.array) -> mx.array:
        """Of each pair: beta * (how much more the policy prefers the chosen answer than the reference does)."""
        ratios = sums - reference
        return self.objective.beta * (ratios[::2] - ratios[1::2])

    def _function(self, batch: Batch, has_reference: bool) -> Callable[..., Any]:
        key = (batch.rows.shape, batch.is_rows, batch.tokens.size, batch.targets.size, has_reference)
        if not self.compiled:
            return self._differentiated(key)
        if key not in self._functions:
            if len(self._functions) >= MOST_COMPILED:
                self._functions.clear()
            self._functions[key] = compile_apart(self._differentiated(key))
        return self._functions[key]

    def _differentiated(self, key: Any) -> Callable[..., Any]:
        return mx.value_and_grad(partial(self._objective, key))

    def _objective(self, key: Any, parameters: Tree, arrays: list[mx.array]) -> tuple[mx.array, mx.array]:
        model = self.model
        model.update(self.cast(parameters))
        _set_dropout_keys(model, arrays[8])
        selected = hidden_states(model, arrays[0], _places(arrays, *key[:2]), self.checkpointing)[arrays[4]]
        of_head = head_parameters(model)
        weights = arrays[6]
        if self.objective.preference is not None:
            weights, loss = self._preference(selected, of_head, arrays)
        found: HeadLoss = head_loss(self._head, of_head, selected, arrays[5], weights, self._z_loss(), self.at_once)
        model.update(of_head)
        if self.objective.preference is None:
            loss = found.loss
        return surrogate(found, selected, of_head), mx.stop_gradient(loss)

    def _z_loss(self) -> float:
        return self.objective.z_loss if self.objective.preference is None else 0.0

    def _preference(self, selected: mx.array, of_head: Tree, arrays: list[mx.array]) -> tuple[mx.array, mx.array]:
        """How much each target's log-probability counts, as a loss's weight (M,), and the pairs' loss itself."""
        logprobs = head_logprobs(self._head, of_head, selected, arrays[5], self.at_once)
        reference, is_target = arrays[9], arrays[6]
        sums = _sums(logprobs * is_target, arrays[7], reference.shape[0])

        def loss(sums: mx.array) -> mx.array:
            return preference_loss(self._margins(sums, reference), self.objective.preference or "").sum()

        value, by_row = mx.value_and_grad(loss)(mx.stop_gradient(sums))
        # `head_loss` sums weights * -logprobs.
        return -by_row[arrays[7]] * is_target, value

    def _head(self, parameters: Tree, hidden: mx.array) -> mx.array:
        self.model.update(parameters)
        return self.model.head(hidden)

    def cast(self, parameters: Tree) -> Tree:
        """Trained parameters in the type that they are computed in."""
        if self.dtype is None:
            return parameters
        dtype, spec = self.dtype, self.model.spec
        cast: Tree = tree_map_with_path(lambda name, p: p if spec.keeps_float32(name) else p.astype(dtype), parameters)
        return cast

    def _weighted_logprobs(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """By the model as it is: each target's log-probability times its weight, and the number of its row, both (M,)."""
        arrays = _on_device(batch)
        where = _places(arrays, batch.rows.shape, batch.is_rows)
        selected = hidden_states(self.model, arrays[0], where)[arrays[4]]
        return head_logprobs(self._head, {}, selected, arrays[5], self.at_once) * arrays[6], arrays[7]


def _on_device(batch: Batch) -> list[mx.array]:
    """All of a batch but its length, which nothing is computed from."""
    return [mx.array(each) for each in batch[:8]]


def _places(arrays: Sequence[mx.array], shape: tuple[int, int], is_rows: bool) -> Places:
    """Where the tokens of a batch's arrays stand."""
    _, positions, rows, places = arrays[:4]
    return Places(positions, None if is_rows else rows, None if is_rows else places, shape)


def _set_dropout_keys(model: LanguageModel, key: mx.array) -> None:
    """What each part of the adapter draws its dropout with, the same when its layer is computed again."""
    parts = [part for part in model.modules() if isinstance(part, LowRank) and part.dropout > 0]
    for part, own in zip(parts, mx.random.split(key, len(parts)) if parts else (), strict=True):
        part.draw_with(own)


def head_parameters(model: LanguageModel) -> Tree:
    """The trainable parameters that the head uses: all that are in no layer, and the embedding only where it is the head."""
    found = []
    for name, array in tree_flatten(model.trainable_parameters()):
        is_embedding = "embed" in name
        if ".layers." not in name and (model.spec.tied_head or not is_embedding):
            found.append((name, array))
    tree: Tree = tree_unflatten(found)
    return tree


def add_gradients(total: Tree | None, more: Tree) -> Tree:
    """The sum of two trees of gradients, in float32."""
    if total is None:
        first: Tree = tree_map(lambda gradient: gradient.astype(mx.float32), more)
        return first
    summed: Tree = tree_map(lambda a, b: a + b.astype(mx.float32), total, more)
    return summed


def divided_by(gradients: Tree, count: float | mx.array) -> Tree:
    """Each gradient over `count`."""
    mean: Tree = tree_map(lambda gradient: gradient / count, gradients)
    return mean


def _sums(values: mx.array, owners: mx.array, count: int) -> mx.array:
    """Of the values (M,) of each owner 0 ... count - 1: (count,)."""
    belongs = owners[None] == mx.arange(count)[:, None]
    return mx.where(belongs, values[None], 0.0).sum(axis=1)
