"""The decode step: one more token through the model, however it is computed.

`PlainStep` is the slow, obvious form that every other one is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from ..models.cache import Cache
from .sampling import Sampler

if TYPE_CHECKING:
    from ..models import Model


class Step(Protocol):
    """A model together with the cache that it extends.

    runs_ahead: whether a step may be built on a token that the host has not read yet. Where it may, the device computes
    the next token while the host makes text of this one.
    """

    cache: Cache
    runs_ahead: bool

    def __call__(self, token: mx.array) -> mx.array:
        """The logits (V,) that follow one more `token` (a scalar array). Lazy where `runs_ahead`."""

    def many(self, tokens: mx.array) -> mx.array:
        """The logits (L, V) after each of several `tokens` (L,)."""

    def choose(self, token: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
        """The same logits, and the token that `sampler` chooses from them; it remembers its choice."""
        logits = self(token)
        return logits, sampler.agree(sampler(logits))


class PlainStep(Step):
    """The model called on one token, without compiled pieces.

    As every step of one machine it ends where the model's own layers do: `RemoteStep` goes on from there.
    """

    runs_ahead = True

    def __init__(self, model: Model, cache: Cache) -> None:
        self.model, self.cache = model, cache
        is_part = model.is_followed or model.spec.only_layers
        self._throttle = _begun_at_once if is_part else None

    def __call__(self, token: mx.array) -> mx.array:
        return self.model.own(token[None], self.cache, throttle=self._throttle)[0]

    def many(self, tokens: mx.array) -> mx.array:
        return self.model.own(tokens[None], self.cache)[0]


def _begun_at_once(arrays: Sequence[mx.array], is_complete: bool) -> None:
    """Where the host waits for a part of the layers anyway, it builds one layer while the one before is computed."""
    if is_complete:
        mx.async_eval(arrays)


class RemoteStep(Step):
    """A step whose last layers are on other machines. own: what computes this machine's, up to the residual stream.

    The host carries each token's residual stream to and fro, so that nothing runs ahead of it.
    """

    runs_ahead = False

    def __init__(self, model: Model, own: Step) -> None:
        assert model.remote is not None
        self.cache, self._own = own.cache, own
        self._head, self._remote = model.head, model.remote

    def __call__(self, token: mx.array) -> mx.array:
        return self._head(self._remote.step(self._own(token), self.cache)[None])[0]

    def many(self, tokens: mx.array) -> mx.array:
        return self._head(self._remote.many(self._own.many(tokens), self.cache)[None])[0]
