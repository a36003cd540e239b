"""How many layers of a token to run before the host looks whether an expert was missing."""

from __future__ import annotations

from ..models.precision import runs_on_cpu

# What a read-back costs, in layers computed for nothing. On an H200 about one (0.29 ms; a layer of gpt-oss-20b takes
# 0.25 ms); reported for an M4 are 0.2 to 0.35 ms, a sixth of a layer's time there. On the CPU it is nearly free.
READ_BACK_COST = 0.5
READ_BACK_COST_ON_CPU = 0.02
# How fast the measured rate of misses forgets, a layer.
FORGETTING = 0.98


class Pace:
    """How many layers to run before the host looks: always `layers_at_once`, or by how often something was missing.

    read_back_cost: in layers; None takes what holds for the backend.
    """

    def __init__(self, layers_at_once: int | None = None, read_back_cost: float | None = None) -> None:
        assert layers_at_once is None or layers_at_once > 0
        self._layers_at_once = layers_at_once
        self._cost = read_back_cost or (READ_BACK_COST_ON_CPU if runs_on_cpu() else READ_BACK_COST)
        self._miss_rate = 0.5

    def next(self, first: int, num_layers: int) -> int:
        """Where to stop: layers `first` ... stop - 1 are run next and looked at together."""
        stride = self._layers_at_once
        if stride is None:
            stride = best_stride(self._miss_rate, self._cost)
        return min(num_layers, first + stride)

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
