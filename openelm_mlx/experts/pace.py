"""How many layers of a token to run before the host checks whether an expert was missing."""

from __future__ import annotations

from ..models.precision import runs_on_cpu

# The cost of a read-back, in layers of computation. On an H200 it is about one (0.29 ms; a layer of gpt-oss-20b takes
# 0.25 ms); for an M4, 0.2 to 0.35 ms are reported, a sixth of a layer's time there. On the CPU it is nearly free.
READ_BACK_COST = 0.5
READ_BACK_COST_ON_CPU = 0.02
# Weight of the newest layer in the moving average of the miss rate.
FORGETTING = 0.98


class Pace:
    """How many layers to run before a read-back: always `layers_at_once`, or adapted to the miss rate.

    read_back_cost: in layers; None: the backend's usual cost.
    """

    def __init__(self, layers_at_once: int | None = None, read_back_cost: float | None = None) -> None:
        assert layers_at_once is None or layers_at_once > 0
        self._layers_at_once = layers_at_once
        self._cost = read_back_cost or (READ_BACK_COST_ON_CPU if runs_on_cpu() else READ_BACK_COST)
        self._miss_rate = 0.5

    def next(self, first: int, num_layers: int) -> int:
        """Where to stop: layers `first` ... stop - 1 are run next and checked together."""
        stride = self._layers_at_once
        if stride is None:
            stride = best_stride(self._miss_rate, self._cost)
        return min(num_layers, first + stride)

    def saw(self, is_missing: bool) -> None:
        """Note whether a layer lacked an expert."""
        self._miss_rate = FORGETTING * self._miss_rate + (1 - FORGETTING) * is_missing


def best_stride(miss_rate: float, read_back_cost: float, most: int = 64) -> int:
    """How many layers to run before a read-back, when each lacks an expert with probability `miss_rate`.

    The number with the least cost per confirmed layer: a read-back, and the layers after the first miss, which are wasted.
    """
    best, least = 1, read_back_cost
    reach, wasted, confirmed = (
        1.0,
        0.0,
        0.0,
    )  # probability of reaching layer i without a miss; expectations for a stride of i
    for stride in range(1, most + 1):
        # One more layer: wasted if an expert was missing before it.
        wasted += 1 - reach
        confirmed += reach
        reach *= 1 - miss_rate
        cost = (read_back_cost + wasted) / confirmed
        if cost < least - 1e-12:
            best, least = stride, cost
    return best
