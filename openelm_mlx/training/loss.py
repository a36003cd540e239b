"""Losses over the tokens that are learned: cross entropy in pieces, z-loss, and preferences (DPO).

Logits are large (gpt-oss has 201,088 columns, 0.8 MB a token), so they are made for a piece of the targets at a time, and
a piece is differentiated before the next one is made: nothing of it stays but its loss and the gradient of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

# What the logits of a piece may take, in float32; computing takes some three times as much.
LOGITS_BYTES = 64 * 2**20


class HeadLoss(NamedTuple):
    """Of all targets: the sum of weighted losses (), each target's log-probability (M,), the gradient of the hidden states
    (M, hidden_size), and gradients of the head's own parameters (a tree, empty where they are frozen).
    """

    loss: mx.array
    logprobs: mx.array
    hidden_gradient: mx.array
    gradients: dict[str, Any]


# Parameters of the head, hidden states (M, hidden_size) -> logits (M, V).
Head = Callable[[dict[str, Any], mx.array], mx.array]


def targets_at_once(vocab_size: int) -> int:
    """How many targets' logits are made at once: a power of two."""
    return 2 ** max(4, (LOGITS_BYTES // (4 * vocab_size)).bit_length() - 1)


def token_losses(logits: mx.array, targets: mx.array, z_loss: float = 0.0) -> tuple[mx.array, mx.array]:
    """Each target's loss, and its log-probability, both (M,) in float32, from logits (M, V) and targets (M,).

    z_loss: so many times the square of logsumexp is added to the loss (CoreNet's, which keeps logits from drifting).
    """
    logits = logits.astype(mx.float32)
    normalizer = mx.logsumexp(logits, axis=-1)
    logprobs = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1) - normalizer
    losses = -logprobs
    if z_loss:
        losses = losses + z_loss * mx.square(normalizer)
    return losses, logprobs


def head_loss(
    head: Head,
    parameters: dict[str, Any],
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    z_loss: float = 0.0,
    at_once: int | None = None,
) -> HeadLoss:
    """The loss of hidden states (M, hidden_size), sum of weights * losses, and its gradients, `at_once` targets at a time.

    None: all at once. Nothing that is differentiated later sees inside; `surrogate` hands the gradients on.
    """
    count = hidden.shape[0]
    at_once = count if at_once is None else at_once

    def piece(parameters: dict[str, Any], hidden: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
        losses, logprobs = token_losses(head(parameters, hidden), rest[0], z_loss)
        return (rest[1] * losses).sum(), logprobs

    differentiated = mx.value_and_grad(piece, argnums=(0, 1))
    hidden, parameters = mx.stop_gradient(hidden), _stopped(parameters)
    losses: list[mx.array] = []
    logprobs: list[mx.array] = []
    gradients_of_hidden: list[mx.array] = []
    gradients: dict[str, Any] = {}
    for start in range(0, count, at_once):
        part = slice(start, start + at_once)
        inputs = hidden[part]
        if gradients_of_hidden:  # one piece after the other: MLX would else have the logits of several at once
            inputs = mx.depends([inputs], [gradients_of_hidden[-1]])[0]
        (loss, logprob), (of_parameters, of_hidden) = differentiated(parameters, inputs, targets[part], weights[part])
        gradients = _sum(gradients, of_parameters)
        losses.append(loss)
        logprobs.append(logprob)
        gradients_of_hidden.append(of_hidden)
    total = losses[0] if len(losses) == 1 else mx.stack(losses).sum()
    return HeadLoss(total, mx.concatenate(logprobs), mx.concatenate(gradients_of_hidden), gradients)


def head_logprobs(
    head: Head, parameters: dict[str, Any], hidden: mx.array, targets: mx.array, at_once: int | None = None
) -> mx.array:
    """Each target's log-probability, (M,) in float32, without a gradient."""
    at_once = hidden.shape[0] if at_once is None else at_once
    hidden, parameters = mx.stop_gradient(hidden), _stopped(parameters)
    found: list[mx.array] = []
    for start in range(0, hidden.shape[0], at_once):
        inputs = hidden[start : start + at_once]
        if found:
            inputs = mx.depends([inputs], [found[-1]])[0]
        found.append(token_losses(head(parameters, inputs), targets[start : start + at_once])[1])
    return mx.concatenate(found)


def surrogate(found: HeadLoss, hidden: mx.array, parameters: dict[str, Any]) -> mx.array:
    """A number without a meaning whose gradient, with respect to what `hidden` and `parameters` come from, is the loss's."""
    total = (mx.stop_gradient(found.hidden_gradient) * hidden).sum()
    known = dict(tree_flatten(parameters))
    for name, gradient in tree_flatten(found.gradients):
        total = total + (mx.stop_gradient(gradient) * known[name]).sum()
    return total


def preference_loss(margins: mx.array, kind: str) -> mx.array:
    """Each pair's loss from beta * ((policy's chosen - rejected) - (reference's chosen - rejected)), (P,) -> (P,).

    kind: "sigmoid" (DPO, arXiv 2305.18290) or "hinge" (SLiC, arXiv 2305.10425).
    """
    if kind == "hinge":
        return mx.maximum(0.0, 1.0 - margins)
    return mx.logaddexp(0.0, -margins)


def _stopped(parameters: dict[str, Any]) -> dict[str, Any]:
    stopped: dict[str, Any] = tree_map(mx.stop_gradient, parameters)
    return stopped


def _sum(gradients: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    if not gradients:
        return more
    total: dict[str, Any] = tree_map(lambda a, b: a + b, gradients, more)
    return total
