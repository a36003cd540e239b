"""One more token through a model whose experts are not all in memory, with few waits for the router.

The plain way asks the host at every layer: the router's choice is read back, what is missing is fetched, the experts are
computed. Here several layers run with the slots that the device looks up itself, and then all their choices are read back
at once. If every chosen expert was resident, everything was exact. Else the first layer with a missing one gets it and
runs again from the input that was kept, and what the layers behind it computed is thrown
away: a result is used only when every choice before it is known to have been served, and it comes from the same kernels on
the same shapes. Run again, a layer chooses the same experts, which stay: no slot of it changes before the next token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from ..memory.residency import Residency
from ..models.cache import Cache
from ..models.precision import runs_on_cpu
from .step import Step

if TYPE_CHECKING:
    from ..models import Model
    from ..models.gpt_oss import GptOss

# What a read-back costs, in layers computed for nothing. On an H200 about one (0.29 ms; a layer of gpt-oss-20b takes
# 0.25 ms); reported for an M4 are 0.2 to 0.35 ms, a sixth of a layer's time there. On the CPU it is nearly free.
READ_BACK_COST = 0.5
READ_BACK_COST_ON_CPU = 0.02
# How fast the measured rate of misses forgets, a layer.
FORGETTING = 0.98


class StreamedStep(Step):
    """`Step` for a model with a `residency`.

    layers_at_once: run so many layers before the host looks; None adapts to how often something is missing, 1 is the
    form that looks at every layer.
    """

    runs_ahead = False

    def __init__(self, model: Model, cache: Cache, layers_at_once: int | None = None) -> None:
        self.model, self.cache = cast("GptOss", model), cache
        self.residency: Residency = model.residency
        self.replayed_layers = 0
        if self.residency.pace is None:
            self.residency.pace = Pace()
        # What one answer has learned about misses serves the next.
        self._pace: Pace = self.residency.pace if layers_at_once is None else Pace(layers_at_once)

    def __call__(self, token: mx.array) -> mx.array:
        with self.residency.exclusive():
            h = self._run_layers(self.model.embed(token[None, None]))
            logits = self.model.head(h)[0, -1]
            mx.async_eval(logits)  # nothing unstarted may be left in the slots
            return logits

    def many(self, tokens: mx.array) -> mx.array:
        with self.residency.exclusive():
            return self.model(tokens[None], cache=self.cache)[0]

    def _run_layers(self, h: mx.array) -> mx.array:
        start, num_layers = 0, len(self.residency.layers)
        served = -1  # layers up to here have had their experts counted and fetched
        while start < num_layers:
            first, stop = self._pace.next(start, served, num_layers)
            if stop == start + 1 and first == start:
                h, start, served = self._one_layer(start, h), stop, start
                continue
            inputs: list[mx.array] = []
            with self.residency.unseen_choices() as choices:
                after = self.model.run_layers(h, self.cache, start, stop, inputs=inputs)
            missing = self._first_missing(start, choices, served) if stop > first else None
            if missing is None:
                h, start, served = after, stop, max(served, stop - 1)
                continue
            # What was computed from the missing layer on is dropped; the cache forgets its token there.
            for layer in self.cache[missing:stop]:
                layer.rewind(1)
            self.replayed_layers += stop - 1 - missing
            h, start, served = inputs[missing - start], missing, missing
        return h

    def _one_layer(self, layer: int, h: mx.array) -> mx.array:
        """The plain way: nothing is computed for nothing, and the layer waits for its own choice."""
        statistics = self.residency.banks[layer].statistics
        before = statistics.misses
        h = self.model.run_layers(h, self.cache, layer, layer + 1)
        self._pace.saw(statistics.misses > before)
        return h

    def _first_missing(self, start: int, choices: list[mx.array], served: int) -> int | None:
        """The first layer that lacked an expert, which it has now; None when nothing was missing."""
        mx.eval(choices)  # the host needs them; the one wait for all these layers
        self.residency.banks[start].statistics.read_backs += 1
        for layer, choice in enumerate(choices, start):
            if layer <= served:
                continue
            experts = self.residency.layers[layer]
            chosen = np.array(choice)
            if experts.on_choice is not None:
                experts.on_choice(chosen)
            wanted = list(dict.fromkeys(chosen.ravel().tolist()))
            was_there = experts.bank.has(wanted)
            self._pace.saw(not was_there)
            if not was_there:
                # The last of these layers has not been computed, for nothing asked for it: without this a fence would.
                self.residency.banks[start + len(choices) - 1].forget_newest()
            experts.bank.require(wanted)
            if not was_there:
                return layer
        return None


class Pace:
    """How many layers to run before the host looks: always `layers_at_once`, or by how often something was missing.

    read_back_cost: in layers; None takes what holds for the backend.
    """

    def __init__(self, layers_at_once: int | None = None, read_back_cost: float | None = None) -> None:
        self._layers_at_once = layers_at_once
        self._cost = read_back_cost or (READ_BACK_COST_ON_CPU if runs_on_cpu() else READ_BACK_COST)
        self._miss_rate = 0.5

    def next(self, start: int, served: int, num_layers: int) -> tuple[int, int]:
        """(first, stop): to run layers start ... stop - 1 next, and to look at those from `first` on.

        served: the last layer whose experts are there for certain; it runs again, with the layers behind it.
        """
        first = max(start, served + 1)
        stride = self._layers_at_once or best_stride(self._miss_rate, self._cost)
        if stride == 1 and first > start:
            return first, first
        return first, min(num_layers, first + stride)

    def saw(self, is_missing: bool) -> None:
        """A layer lacked an expert, or did not."""
        self._miss_rate = FORGETTING * self._miss_rate + (1 - FORGETTING) * is_missing


def best_stride(miss_rate: float, read_back_cost: float, most: int = 64) -> int:
    """How many layers to run before looking, when each lacks an expert with probability `miss_rate`.

    The number with the least cost for each layer that is confirmed: a read-back, and the layers behind the first missing
    one, which are computed for nothing.
    """
    best, least = 1, read_back_cost
    reach, wasted, confirmed = 1.0, 0.0, 0.0  # probability to get to layer i; expectations for a stride of i
    for stride in range(1, most + 1):
        # One layer more: computed for nothing if something was missing before it.
        wasted += 1 - reach
        confirmed += reach
        reach *= 1 - miss_rate
        cost = (read_back_cost + wasted) / confirmed
        if cost < least - 1e-12:
            best, least = stride, cost
    return best
