"""The decode step of a model with streamed experts, with few read-backs of the routers' choices.

A plain step involves the host at every layer: the router's choice is read back, missing experts are read, the experts are
computed. Here several layers run with slots that the device looks up itself, and then all their choices are read back at
once. If every chosen expert was resident, all results are exact. Otherwise the first layer with a missing expert reads it
and computes its experts again from the kept input, and the results of later layers are discarded. So a result is used only
when all experts before it are known to have been resident, and it comes from the same kernels with the same shapes.

While experts are read, the following graph is built, but not evaluated before they are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from ..experts.bank import ExpertBank
from ..experts.pace import Pace
from ..experts.residency import Residency
from ..models.base import LayerWalk
from ..models.block import Projected
from ..models.cache import Cache
from ..models.gpt_oss import Routed
from .pieces import LatestPieces, StreamedPieces
from .sampling import Sampler
from .step import Step

if TYPE_CHECKING:
    from ..models import Model
    from ..models.gpt_oss import GptOss


class StreamedStep(Step):
    """`Step` for a model with a `residency`.

    layers_at_once: how many layers to run before a read-back; None adapts to the miss rate, 1 reads back at every layer.
    compile: see `Pieces`; None for what is faster here.
    """

    runs_ahead = False

    def __init__(
        self, model: Model, cache: Cache, layers_at_once: int | None = None, compile: bool | None = None
    ) -> None:
        self.model, self.cache = cast("GptOss", model), cache
        self.residency: Residency = model.residency
        self.replayed_layers = 0
        # The miss rate measured in one answer is used in the next.
        self._pace: Pace = self.residency.pace if layers_at_once is None else Pace(layers_at_once)
        # Slots that are not written in place become new arrays each time, which a trace would not see.
        can_compile = self.residency.writes != "copy"
        compile = model.choices.compiled_step if compile is None else compile
        self._latest = LatestPieces(model, StreamedPieces, compile and can_compile)

    def __call__(self, token: mx.array) -> mx.array:
        [logits] = self._run(token, None)
        return logits

    def choose(self, token: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
        """As every step's; the choice is part of the last piece."""
        logits, chosen, *state = self._run(token, sampler)
        sampler.state = tuple(state)
        return logits, chosen

    def many(self, tokens: mx.array) -> mx.array:
        with self.residency.lock:
            return self.model.own(tokens[None], self.cache)[0]

    def _run(self, token: mx.array, sampler: Sampler | None) -> tuple[mx.array, ...]:
        """The logits, and the sampler's choice."""
        with self.residency.lock:
            forward = _ForwardPass(self.model, self.cache, self._pieces, token)
            try:
                first = 0  # the layers before it have their experts, or get them
                while first < forward.num_layers:
                    stop = self._pace.next(first, forward.num_layers)
                    forward.run(first, stop)
                    forward.finish_reading()
                    missing = self._first_missing(first, forward.read_back(first, stop), forward)
                    if missing is not None:  # later results are discarded
                        for cache in self.cache[missing + 1 : stop]:
                            cache.rewind(1)
                        self.replayed_layers += stop - 1 - missing
                    first = stop if missing is None else missing + 1
                return forward.end(sampler)
            finally:
                forward.abandon()

    @property
    def _pieces(self) -> StreamedPieces:
        return self._latest.get()

    def _first_missing(self, first: int, choices: list[np.ndarray], forward: _ForwardPass) -> int | None:
        """The first layer that lacks an expert, whose read has been started; None if nothing is missing."""
        self.residency.banks[first].statistics.read_backs += 1
        for layer, chosen in enumerate(choices, first):
            experts = self.residency.layers[layer]
            if experts.on_choice is not None:
                experts.on_choice(chosen)
            wanted = list(dict.fromkeys(chosen.ravel().tolist()))
            was_there = experts.bank.has(wanted)
            self._pace.saw(not was_there)
            if not was_there:
                forward.begin_reading(layer, wanted)
                return layer
            experts.bank.require(wanted)
        return None


class _ForwardPass(LayerWalk):
    """The forward pass of one token, as far as it has been built. It may be continued from an earlier layer."""

    def __init__(self, model: GptOss, cache: Cache, pieces: StreamedPieces, token: mx.array) -> None:
        super().__init__(model, cache, length=1)
        self._pieces = pieces
        self.num_layers = len(model.layers)
        self._residency: Residency = model.residency
        self._position = mx.array(cache[0].offset)
        self._embedded = model.embed(token[None])
        # Each layer's expert inputs; after the last confirmed layer they may be wrong.
        self._routed: list[tuple[mx.array, ...]] = [()] * self.num_layers
        self._being_read: ExpertBank | None = None

    def enter(self, i: int) -> Projected:
        """Compute the previous layer's experts from the slots in the table."""
        if i == 0:
            return (self._embedded, *self._pieces.first(self._embedded, self._position))
        # No pending read is noted: this layer's router depends on it, and its choice is waited for.
        table = self._residency.banks[i - 1].device_table()
        return self._pieces.from_experts[i - 1](self._position, table, *self._routed[i - 1])

    def leave(self, i: int, x: mx.array, out: mx.array) -> None:
        """Stop before the experts of layer `i`."""
        self._routed[i] = self._pieces.to_experts[i](x, out)

    def read_back(self, first: int, stop: int) -> list[np.ndarray]:
        """The routers' choices of these layers, which evaluates everything before them."""
        return self._residency.read_back([routed[_CHOICE] for routed in self._routed[first:stop]])

    def begin_reading(self, layer: int, wanted: list[int]) -> None:
        """Start reading these experts. A graph built meanwhile must not be evaluated before `finish_reading`."""
        self._being_read = self._residency.banks[layer]
        self._being_read.begin(wanted)

    def finish_reading(self) -> None:
        """Wait for the reads; after that the graph may be evaluated."""
        bank, self._being_read = self._being_read, None
        if bank is not None:
            bank.finish()

    def end(self, sampler: Sampler | None) -> tuple[mx.array, ...]:
        """The logits, and the sampler's choice; all layers are confirmed."""
        bank = self._residency.banks[-1]
        found: tuple[mx.array, ...] = self._pieces.head((bank.device_table(), *self._routed[-1]), sampler)
        self.finish_reading()
        mx.async_eval(found[0])
        bank.note(found[0])
        return found

    def abandon(self) -> None:
        """Cancel the reads after an error."""
        if self._being_read is not None:
            self._being_read.abandon()


_CHOICE = Routed._fields.index("expert_indices")
