"""A model cut into functions that can be compiled: each has the same shapes for every token, whatever the cache holds.

Attention and the writes into the cache stay outside: they depend on the number of tokens, and MLX's attention is fastest
with exactly the existing keys and no mask. The rest is traced only once for a model, whatever the cache is: growing, a
ring, in 8 bits, a row a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import mlx.core as mx
from mlx import nn

from ..models.adapter_sets import AdaptersForm, RowChoice
from ..models.adapter_sites import Adapted
from ..models.block import Projected
from ..models.gpt_oss import GptOss, Routed
from ..models.slot_attention import write_in_slots
from ..models.slot_step import slot_logits, through_layers
from ..models.slots import SlotBank
from ..models.tracing import compile_apart
from ..runtime import Traced, runtime_of
from .sampling import Sampler

if TYPE_CHECKING:
    from ..experts.residency import Residency
    from ..models import Model

# How many last pieces are kept for a model, one for each form of sampler; the others are few.
MOST_CHOICES = 32
# Shapes of steps that `SlotPieces` stay traced for: a trace takes up to 60 kB a layer, and MLX looks through them one by one.
MOST_SHAPES = 32
TRACED_AFTER = 8
MOST_COUNTED = 4096
# Layers in one of their pieces: to trace a layer takes about a millisecond, in which everybody waits.
LAYERS_IN_A_PIECE = 4


class Pieces:
    """The base of both kinds of pieces: a `head` after all layers, for each form of sampler.

    Where other machines have the layers after the model's own, the residual stream takes the logits' place.

    The model's parameters are part of the pieces, so `pieces_of` makes new ones when a parameter has been replaced.
    compile: False leaves them uncompiled, for comparisons in tests.
    """

    def __init__(self, model: Model, compile: bool) -> None:
        self.model = model
        self._compile, self._by_row = compile, model.adapters.selection.rows is not None
        self._heads: dict[Any, Callable[..., Any]] = {}
        mx.eval([layer.prepare_constants() for layer in model.layers])

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` compiled. Where each row has an adapter of its own, which one it has is an argument of the trace."""
        if not self._compile:
            return function
        if not self._by_row:
            return compile_apart(function)
        adapters = self.model.adapters

        def traced(rows: mx.array, *arguments: Any) -> Any:
            with adapters.using(replace(adapters.selection, rows=RowChoice(rows))):
                return function(*arguments)

        by_row = compile_apart(traced)

        def call(*arguments: Any) -> Any:
            chosen = adapters.selection.rows
            assert chosen is not None
            return by_row(chosen.rows, *arguments)

        return call

    def last_layer(self, *state: mx.array) -> mx.array:
        """The residual stream after the last layer, from the state before the last piece."""
        raise NotImplementedError

    def head(self, state: Sequence[mx.array], sampler: Sampler | None) -> tuple[Any, ...]:
        """The logits (V,); with a sampler also its choice and its next state."""
        form = None if sampler is None else sampler.form
        if form not in self._heads:
            self._heads[form] = self.compiled(self._make_head(sampler))
            if len(self._heads) > MOST_CHOICES:
                del self._heads[next(iter(self._heads))]  # the oldest
        found: tuple[Any, ...] = self._heads[form](list(state), () if sampler is None else sampler.arrays)
        return found

    def _make_head(self, sampler: Sampler | None) -> Callable[..., tuple[Any, ...]]:
        # Only the form of this sampler stays with the piece: its arrays are as large as the vocabulary.
        form = None if sampler is None else sampler.without_arrays()

        def head(state: Sequence[mx.array], arrays: Sequence[mx.array]) -> tuple[Any, ...]:
            logits = self.model.finish(self.last_layer(*state))[0]
            if form is None:
                return (logits,)
            chooser = form.with_arrays(arrays)
            return (logits, chooser(logits), *chooser.state)

        return head


class ResidentPieces(Pieces):
    """`first`, one `between` each layer's attention and the next one's, and the heads."""

    def __init__(self, model: Model, compile: bool) -> None:
        super().__init__(model, compile)
        layers = model.layers

        def first(tokens: mx.array, position: mx.array) -> Projected:
            x = model.embed(tokens)
            return (x, *layers[0].before_attention(x, position))

        def between(i: int) -> Callable[..., Projected]:
            def piece(x: mx.array, out: mx.array, position: mx.array) -> Projected:
                h = layers[i].after_attention(x, out)
                return (h, *layers[i + 1].before_attention(h, position))

            return piece

        self.first = self.compiled(first)
        self.between = [self.compiled(between(i)) for i in range(len(layers) - 1)]
        # The logits (M, V) of many rows.
        self.head_of_rows = self.compiled(lambda x, out: model.finish(layers[-1].after_attention(x, out)))

    def last_layer(self, *state: mx.array) -> mx.array:
        x, out = state
        return self.model.layers[-1].after_attention(x, out)


class SlotPieces(Pieces):
    """Rows that are all in slots, whose buffers are written as they are (`write_in_slots`): a step is a few pieces, from the
    tokens to the logits (S, V). They are traced anew for each number of rows, of slots and of columns, which takes longer
    than several steps: so only once a shape has come `TRACED_AFTER` times, and then one piece in each step.
    """

    def __init__(self, model: Model, compile: bool) -> None:
        super().__init__(model, compile)
        mx.eval([layer.prepare_constants(for_slots=True) for layer in model.layers])
        count = len(model.layers)
        starts = range(0, count, LAYERS_IN_A_PIECE)
        self._spans = [(start, min(start + LAYERS_IN_A_PIECE, count)) for start in starts]
        self._times: dict[tuple[int, ...], int] = {}  # how often a shape has come
        self._num_traced: dict[tuple[int, ...], int] = {}  # of each shape, how many of the first pieces
        self._make()

    def __call__(self, tokens: mx.array, bank: SlotBank) -> mx.array:
        """The logits (S, V) of a step that has begun."""
        shape = (bank.num_rows, *bank.shape)
        if len(self._times) > MOST_COUNTED:
            self._times.clear()
        self._times[shape] = times = self._times.get(shape, 0) + 1
        if times <= TRACED_AFTER or not bank.is_in_place or len(bank.buffers) < len(self.model.layers):
            return slot_logits(self.model, tokens, bank)
        if shape not in self._num_traced and len(self._num_traced) >= MOST_SHAPES:
            self._make()
        self._num_traced[shape] = num_traced = min(self._num_traced.get(shape, 0) + 1, len(self._spans))
        x, buffers = tokens, bank.buffers
        for (start, stop), piece in zip(self._spans[:num_traced], self._pieces, strict=False):
            x = piece(x, bank.rows, bank.positions, bank.last, buffers[start:stop])
        for start, stop in self._spans[num_traced:]:
            x = through_layers(self.model, x, bank, start, stop)
        return x

    def _make(self) -> None:
        self._num_traced.clear()
        self._pieces = [self.compiled(self._piece(*span)) for span in self._spans]

    def _piece(self, start: int, stop: int) -> Callable[..., mx.array]:
        def piece(
            x: mx.array, rows: mx.array, positions: mx.array, last: mx.array | None, buffers: list[mx.array]
        ) -> mx.array:
            return through_layers(self.model, x, _TracedStep(rows, positions, last, start, buffers), start, stop)

        return piece


def steps_until_traced(model: Model) -> int:
    """After so many steps of one shape all of `SlotPieces` are traced for it."""
    return TRACED_AFTER + -(-len(model.layers) // LAYERS_IN_A_PIECE)


@dataclass
class _TracedStep:
    """A `SlotStep` of arrays that a trace is made of. buffers: of the layers from `start` on."""

    rows: mx.array
    positions: mx.array
    last: mx.array | None
    start: int
    buffers: list[mx.array]

    def write(self, i: int, new: mx.array) -> tuple[mx.array, mx.array]:
        buffer = self.buffers[i - self.start]
        return buffer, write_in_slots(buffer, new, self.rows)


class StreamedPieces(Pieces):
    """Each piece of `ResidentPieces` in two, with host work in between: `to_experts` and `from_experts` of every layer."""

    def __init__(self, model: Model, compile: bool) -> None:
        super().__init__(model, compile)
        self._gpt_oss = cast("GptOss", model)
        layers = self._gpt_oss.layers

        def to_experts(i: int) -> Callable[..., Routed]:
            def piece(x: mx.array, out: mx.array) -> tuple[mx.array, ...]:
                return tuple(layers[i].to_experts(x, out))

            return self.compiled(piece)

        def from_experts(i: int) -> Callable[..., Projected]:
            def piece(position: mx.array, table: mx.array, *routed: mx.array) -> Projected:
                x = self._layer(i, table, *routed)
                return (x, *layers[i + 1].before_attention(x, position))

            return self.compiled(piece)

        self.first = self.compiled(lambda x, position: layers[0].before_attention(x, position))
        self.to_experts = [to_experts(i) for i in range(len(layers))]
        self.from_experts = [from_experts(i) for i in range(len(layers) - 1)]

    def _layer(self, i: int, table: mx.array, *routed: mx.array) -> mx.array:
        residency: Residency = self._gpt_oss.residency
        given = Routed(*routed)
        outputs = residency.layers[i].compute_from_slots(given.x, given.expert_indices, table)
        return self._gpt_oss.layers[i].from_experts(given, outputs)

    def last_layer(self, *state: mx.array) -> mx.array:
        return self._layer(len(self._gpt_oss.layers) - 1, *state)


def _traced(model: Model) -> Traced:
    """The pieces traced for a model, without those whose parameters have been replaced."""
    found = runtime_of(model).traced
    weights = _weights_of(model)
    if len(weights) != len(found.weights) or any(a is not b for a, b in zip(weights, found.weights, strict=True)):
        found.pieces.clear()
        found.weights = weights
        found.version += 1
    return found


def _weights_of(model: Model) -> list[Any]:
    """Every module and every array in it. They are compared by identity: an update replaces them."""
    for layer in model.layers:
        layer.prepare_constants()  # which may put views of one array in the places of two
    found: list[Any] = []
    _collect(model, found)
    return found


def _collect(value: Any, found: list[Any]) -> None:
    if isinstance(value, mx.array):
        found.append(value)
    elif isinstance(value, Adapted):  # those that are served are no parameters, and each pass chooses among them
        _collect(value.base, found)
        _collect(list(value.trained.values()), found)
    elif isinstance(value, nn.Module):
        found.append(value)
        for name, each in value.items():
            if not name.startswith("_"):  # what a module keeps for itself is made of its parameters
                _collect(each, found)
    elif isinstance(value, dict):
        for each in value.values():
            _collect(each, found)
    elif isinstance(value, list | tuple):
        for each in value:
            _collect(each, found)


def weights_version(model: Model) -> int:
    """A number that changes once a parameter of the model has been replaced, in whatever way.

    Results computed with the old parameters, such as keys and values in a prefix cache, are then invalid.
    """
    return _traced(model).version


def forget_pieces(model: Model) -> None:
    """Discard the traced pieces, after something other than a parameter that they use has been replaced."""
    _traced(model).pieces.clear()


def forget_other_adapters(model: Model) -> None:
    """Discard the pieces of adapters that have come or gone since: what they were traced with is in memory as long as they."""
    made, there = _traced(model).pieces, model.adapters.served.ids
    for old in list(made):
        if old[2] is not None and old[2][0] != there:
            made.pop(old, None)


P = TypeVar("P", bound=Pieces)


def pieces_of(model: Model, kind: type[P], compile: bool) -> P:
    """The pieces of a model: those traced for an earlier request if the parameters are the same, else new ones.

    They are for passes with the adapters that the one at work here uses.
    """
    made = _traced(model).pieces
    selection = model.adapters.selection
    key = kind, compile, selection.form
    if key not in made:
        for old in [each for each in made if each[2] is not None and each[2][0] != selection.served.ids]:
            del made[old]  # of adapters that have come or gone since
        made[key] = kind(model, compile)
    return cast("P", made[key])


class LatestPieces(Generic[P]):
    """The pieces for one step: those of the model's parameters as they are now. kind, compile: as for `pieces_of`.

    An update of the model is noticed at once, and so are other adapters; what is put into a part of the model, when the next
    step is made.
    """

    def __init__(self, model: Model, kind: type[P], compile: bool) -> None:
        self._model, self._kind, self._compile = model, kind, compile
        self._made, self._known = pieces_of(model, kind, compile), self._state

    @property
    def _state(self) -> tuple[int, AdaptersForm]:
        return self._model.num_updates, self._model.adapters.selection.form

    def get(self) -> P:
        state = self._state
        if self._known != state:
            self._made, self._known = pieces_of(self._model, self._kind, self._compile), state
        return self._made
