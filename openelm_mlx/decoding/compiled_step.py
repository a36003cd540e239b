"""The decode step in compiled pieces: all that lies between one layer's attention and the next one's is one graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..models.attention import Mask
from ..models.cache import Cache
from ..models.precision import choices
from .pieces import ResidentPieces, pieces_of
from .sampling import Sampler
from .step import PlainStep, Step
from .streamed_step import StreamedStep

if TYPE_CHECKING:
    from ..models import Model


class CompiledStep(Step):
    """`PlainStep` in `mx.compile`d pieces: the same arithmetic in fewer kernels, and far less work for the host.

    model, compile: see `Pieces`.
    """

    runs_ahead = True

    def __init__(self, model: Model, cache: Cache, compile: bool = True) -> None:
        self.model, self.cache = model, cache
        self._pieces = pieces_of(model, ResidentPieces, compile)

    def __call__(self, token: mx.array) -> mx.array:
        return self._pieces.head(self.run_layers(token[None]), None)[0]

    def many(self, tokens: mx.array) -> mx.array:
        """As every step's; the pieces are traced once more for each number of tokens, of which there are few."""
        return self._pieces.head(self.run_layers(tokens[None]), None)[0]

    def choose(self, token: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
        """As every step's; the choice is part of the last piece."""
        logits, chosen, *state = self._pieces.head(self.run_layers(token[None]), sampler)
        sampler.state = tuple(state)
        return logits, chosen

    def run_layers(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """What the last layer began with, (B, hidden_size), and what its attention gave, (B, H, 1, D); tokens (B,).

        For several tokens a row, (B, L), they are (B, L, hidden_size) and (B, H, L, D).
        """
        length = 1 if tokens.ndim == 1 else tokens.shape[1]
        masks: dict[int | None, Mask] = {}
        layers, position = cast("list[Any]", self.model.layers), mx.array(self.cache[0].offset)
        x, queries, keys, values = self._pieces.first(tokens, position)
        for i, (layer, cache) in enumerate(zip(layers, self.cache, strict=True)):
            window = self.model.spec.layers[i].window
            if window not in masks:
                masks[window] = cache.make_mask(length, window_size=window)
            out = layer.attention.attend(queries, keys, values, masks[window], cache)
            if i + 1 < len(layers):
                x, queries, keys, values = self._pieces.between[i](x, out, position)
        return x, out


def make_step(model: Model, cache: Cache) -> Step:
    """The fastest step for a model here.

    On the CPU backend that is the plain one, unless experts are streamed: there `mx.compile` calls the machine's C++
    compiler and saves nothing. On a GPU it is the compiled one, unless it was found slower (`selfcheck`).
    """
    if model.residency is not None:
        return StreamedStep(model, cache)
    return CompiledStep(model, cache) if choices().compiled_step else PlainStep(model, cache)
