"""The decode step in compiled pieces: all that lies between one layer's attention and the next one's is one graph.

Attention and the writes into the cache are not traced: they depend on how many tokens there are, and MLX's attention is
fastest with exactly the keys that exist and no mask. What is left has the same shapes for every token, so that it is
traced once for a model and never again, whatever the cache is: growing, a ring, in 8 bits, a row a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..models.attention import Mask
from ..models.cache import Cache
from ..models.precision import choices
from .sampling import Sampler
from .step import PlainStep, Step
from .streamed_step import StreamedStep

if TYPE_CHECKING:
    from ..models import Model

# Last pieces kept for a model, one for each way of choosing a token; the others are few.
MOST_CHOICES = 32

# The residual stream and the next layer's queries, keys and values.
Projected = tuple[mx.array, mx.array, mx.array, mx.array]


class CompiledStep(Step):
    """`PlainStep` in `mx.compile`d pieces: the same arithmetic in fewer kernels, and far less work for the host.

    model: its parameters are part of the pieces; changing them afterwards needs a new model. compile: False runs the same
    pieces untraced, which is what the tests compare.
    """

    runs_ahead = True

    def __init__(self, model: Model, cache: Cache, compile: bool = True) -> None:
        self.model, self.cache = model, cache
        self._pieces = _pieces(model, compile)

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


class _Pieces:
    """The pieces of one model: `first`, one `between` two layers' attentions each, and a `head` for each way to choose."""

    def __init__(self, model: Model, compile: bool) -> None:
        self.model = model
        self._compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = mx.compile if compile else lambda f: f
        layers = model.layers
        mx.eval([layer.made_once() for layer in layers])

        def first(tokens: mx.array, position: mx.array) -> Projected:
            x = model.embed(tokens)
            return (x, *layers[0].before_attention(x, position))

        def between(i: int) -> Callable[..., Projected]:
            def piece(x: mx.array, out: mx.array, position: mx.array) -> Projected:
                x = layers[i].after_attention(x, out)
                return (x, *layers[i + 1].before_attention(x, position))

            return piece

        self.first = self._compiled(first)
        self.between = [self._compiled(between(i)) for i in range(len(layers) - 1)]
        self._heads: dict[Any, Callable[..., Any]] = {}

    def head(self, last: tuple[mx.array, mx.array], sampler: Sampler | None) -> tuple[Any, ...]:
        """The logits (V,); with a sampler also its choice and its next state."""
        form = None if sampler is None else sampler.form
        if form not in self._heads:
            self._heads[form] = self._compiled(self._make_head(sampler))
            if len(self._heads) > MOST_CHOICES:
                del self._heads[next(iter(self._heads))]  # the oldest
        found: tuple[Any, ...] = self._heads[form](*last, () if sampler is None else sampler.arrays)
        return found

    def _make_head(self, sampler: Sampler | None) -> Callable[..., tuple[Any, ...]]:
        model = self.model
        # Only the form of this sampler stays with the piece: its arrays are as large as the vocabulary.
        form = None if sampler is None else sampler.with_arrays([mx.array(0)] * len(sampler.arrays))

        def head(x: mx.array, out: mx.array, arrays: Sequence[mx.array]) -> tuple[Any, ...]:
            logits = model.head(model.layers[-1].after_attention(x, out))[0]
            if form is None:
                return (logits,)
            chooser = form.with_arrays(arrays)
            return (logits, chooser(logits), *chooser.state)

        return head


def _pieces(model: Model, compile: bool) -> _Pieces:
    """The pieces that were traced for a model already, whichever request it was for."""
    made: dict[bool, _Pieces] | None = model.__dict__.get("_traced_pieces")
    if made is None:
        made = {}
        object.__setattr__(model, "_traced_pieces", made)
    if compile not in made:
        made[compile] = _Pieces(model, compile)
    return made[compile]
