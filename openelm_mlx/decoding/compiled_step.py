"""The decode step in compiled pieces: everything between one layer's attention and the next one's is one graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from ..models.base import LayerWalk
from ..models.block import Projected
from ..models.cache import Cache
from ..runtime import runtime_of
from .pieces import LatestPieces, ResidentPieces
from .sampling import Sampler
from .step import PlainStep, RemoteStep, Step
from .streamed_step import StreamedStep

if TYPE_CHECKING:
    from ..models import Model


class CompiledStep(Step):
    """`PlainStep` in `mx.compile`d pieces: the same arithmetic with fewer kernels and far less work on the host.

    model, compile: see `Pieces`. When the model's parameters change, the next token is computed with the new ones.
    """

    runs_ahead = True

    def __init__(self, model: Model, cache: Cache, compile: bool = True) -> None:
        self.model, self.cache = model, cache
        self._latest = LatestPieces(model, ResidentPieces, compile)

    def __call__(self, token: mx.array) -> mx.array:
        return self._pieces.head(self.run_layers(token[None]), None)[0]

    def many(self, tokens: mx.array) -> mx.array:
        """As every step's; the pieces are traced once more for each number of tokens, of which there are few."""
        return self._pieces.head(self.run_layers(tokens[None], tokens.shape[0]), None)[0]

    def choose(self, token: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
        """As every step's; the choice is part of the last piece."""
        logits, chosen, *state = self._pieces.head(self.run_layers(token[None]), sampler)
        sampler.state = tuple(state)
        return logits, chosen

    def run_layers(self, tokens: mx.array, length: int = 1) -> tuple[mx.array, mx.array]:
        """The last layer's input, (B, hidden_size), and its attention's output, (B, H, 1, D); tokens (B,).

        For several tokens a row, (B, length), they are (B, length, hidden_size) and (B, H, length, D).
        """
        walk = _CompiledWalk(self.model, self.cache, tokens, length, self._pieces)
        walk.run(0, len(self.model.layers))
        return walk.state

    @property
    def _pieces(self) -> ResidentPieces:
        return self._latest.get()


class _CompiledWalk(LayerWalk):
    """The walk in pieces from one layer's attention to the next one's.

    state: the last walked layer's input, and its attention's output.
    """

    state: tuple[mx.array, mx.array]

    def __init__(self, model: Model, cache: Cache, tokens: mx.array, length: int, pieces: ResidentPieces) -> None:
        super().__init__(model, cache, length)
        self._tokens, self._pieces = tokens, pieces
        self._position = mx.array(cache[0].offset)

    def enter(self, i: int) -> Projected:
        if i == 0:
            return self._pieces.first(self._tokens, self._position)
        return self._pieces.between[i - 1](*self.state, self._position)

    def leave(self, i: int, x: mx.array, out: mx.array) -> None:
        self.state = x, out


def make_step(model: Model, cache: Cache) -> Step:
    """The fastest step for a model here.

    On the CPU backend that is the plain one, unless experts are streamed: there `mx.compile` calls the machine's C++
    compiler and saves nothing. On a GPU it is the compiled one, unless it was found slower (`selfcheck`).
    """
    own = _own_step(model, cache)
    return own if model.remote is None else RemoteStep(model, own)


def _own_step(model: Model, cache: Cache) -> Step:
    if runtime_of(model).residency is not None:
        return StreamedStep(model, cache)
    return CompiledStep(model, cache) if model.choices.compiled_step else PlainStep(model, cache)
