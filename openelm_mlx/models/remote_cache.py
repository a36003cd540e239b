"""The caches of layers that another machine has: kept there, and followed here by how many tokens they hold.

It answers the calls of every other cache, as one for all layers of that machine, and passes on what changes the caches
there. It knows by the same rule as a ring what can be taken back, so that a wrong call is an error before anything is
sent, and the other machine refuses a pass whose number of tokens is not its own: a wrong cache is an error, never wrong text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, final

import mlx.core as mx

from ..specs import LayerSpec, ModelSpec
from .attention import Mask
from .buffers import Snapshot, ring_reaches, seen_before
from .growing_cache import Trimmable

# The epoch of no connection.
LOST = -1


class Keeper(Protocol):
    """Who has the caches (link/chain.py)."""

    def new_number(self) -> int:
        """A number that no cache or snapshot there has had."""

    def is_here(self, epoch: int) -> bool:
        """Whether the caches that were made in this epoch are still there: the connection has not been lost since."""

    def look(self) -> None:
        """Find out whether the machines are still there, where nothing was heard of them for a while."""

    def tell(self, cache: RemoteCache, change: Mapping[str, Any]) -> None:
        """Change a cache that has been given tokens."""

    def forget(self, machine: int, epoch: int, number: int, is_snapshot: bool) -> None:
        """A cache or a snapshot is not needed any more. Any thread may call it, at any time."""


class KeptSnapshot:
    """What another machine keeps of a snapshot. ends: of each kind of ring. It is given up when nobody has this any more."""

    def __init__(self, cache: RemoteCache, epoch: int, number: int, ends: tuple[int, ...]) -> None:
        self.keeper, self.machine = cache.keeper, cache.machine
        self.epoch, self.number, self.ends = epoch, number, ends

    def __del__(self) -> None:
        self.keeper.forget(self.machine, self.epoch, self.number, True)


@final
class RemoteCache(Trimmable):
    """See the module. machine: which one. spec: of the layers there. settings: what its caches are made with.

    epoch: of the connection in which they were made; None as long as they hold nothing.
    """

    def __init__(self, keeper: Keeper, machine: int, spec: ModelSpec, settings: Mapping[str, Any]) -> None:
        self.keeper, self.machine, self.spec, self.settings = keeper, machine, spec, dict(settings)
        window, room = settings["window"], settings["room"]
        windows = dict.fromkeys(layer.window or window for layer in spec.layers)
        self._rings = [(each, each + room) for each in windows if each is not None]
        self._ends = [0] * len(self._rings)
        self.offset = 0
        self.epoch: int | None = None
        self.number = -1
        # Why what it held was given up, where the other machine has said so.
        self.failure: Exception | None = None

    # --- what the machines' link asks and says ---

    def begin(self, epoch: int) -> dict[str, Any] | None:
        """What the other machine has to make before the first tokens; None where it has it."""
        if self.epoch is not None:
            return None
        self.epoch, self.number = epoch, self.keeper.new_number()
        return self.settings

    @property
    def is_lost(self) -> bool:
        """Whether what it held is gone with a connection."""
        return self.epoch is not None and not self.keeper.is_here(self.epoch)

    def advance(self, num_tokens: int) -> None:
        """So many tokens have been sent to be appended."""
        self.offset += num_tokens
        self._ends = [max(end, self.offset) for end in self._ends]

    # --- the calls of every cache ---

    def rewind(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens, exactly. Raises ValueError when a ring has lost what stood before."""
        offset = self.offset - num_tokens
        if not self._reaches(self.offset, self._ends, offset):
            raise ValueError(f"cannot take back {num_tokens} of {self.offset} tokens on another machine")
        if num_tokens:
            self._put(offset, self._ends)
            self._tell({"op": "rewind", "count": num_tokens})

    def snapshot(self) -> Snapshot:
        """What `restore` and `fork` need to come back here; rings are copied on their machine."""
        if not self._rings or self.epoch is None:
            return Snapshot(self.offset, self.offset)
        kept = KeptSnapshot(self, self.epoch, self.keeper.new_number(), tuple(self._ends))
        self._tell({"op": "snapshot", "snapshot": kept.number})
        return Snapshot(self.offset, max(self._ends), (), kept)

    def can_reach(self, snapshot: Snapshot, offset: int) -> bool:
        """Whether a cache brought back to `snapshot` can be rewound to `offset`; never once the machine was lost."""
        self.keeper.look()
        ends = self._ends if snapshot.kept is None else snapshot.kept.ends
        return not self.is_lost and self._reaches(snapshot.offset, ends, offset)

    def restore(self, snapshot: Snapshot) -> None:
        """Be again what these caches were at an earlier `snapshot`."""
        if snapshot.offset == 0:
            self.clear()
        elif snapshot.kept is None:
            self.rewind(self.offset - snapshot.offset)
        else:
            self.offset, self._ends = snapshot.offset, list(snapshot.kept.ends)
            self._tell({"op": "restore", "snapshot": snapshot.kept.number})

    def fork(self, snapshot: Snapshot) -> RemoteCache:
        """Others, as these were at an earlier `snapshot`; what is written to one is not seen by the other."""
        new = RemoteCache(self.keeper, self.machine, self.spec, self.settings)
        if snapshot.offset and self.epoch is not None:
            new.epoch, new.number, new.offset = self.epoch, self.keeper.new_number(), snapshot.offset
            kept = snapshot.kept
            new._ends = [snapshot.end] * len(self._rings) if kept is None else list(kept.ends)
            source = {"end": snapshot.offset} if kept is None else {"snapshot": kept.number}
            self._tell({"op": "fork", "to": new.number, **source})
        return new

    def clear(self) -> None:
        """Forget everything; the other machine gives the memory back."""
        self._give_back()
        self.epoch, self.failure, self.offset, self._ends = None, None, 0, [0] * len(self._rings)

    def give_up(self, failure: Exception) -> None:
        """What it holds is not to be trusted any more, for this reason; it is of use again once it has been cleared."""
        self._give_back()
        self.epoch, self.failure = LOST, failure

    def __del__(self) -> None:
        self._give_back()

    def _give_back(self) -> None:
        if self.epoch is not None and self.epoch != LOST:
            self.keeper.forget(self.machine, self.epoch, self.number, False)

    def reserve(self, num_tokens: int) -> list[mx.array]:
        """Nothing here: the other machine makes places as tokens come."""
        return []

    def nbytes_for(self, num_tokens: int, layer: LayerSpec, itemsize: int) -> int:
        """Nothing of this machine's memory."""
        return 0

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def buffers(self) -> list[mx.array]:
        return []

    @property
    def state(self) -> tuple[mx.array, ...]:
        return ()

    @state.setter
    def state(self, arrays: tuple[mx.array, ...]) -> None:
        raise AssertionError("keys and values of another machine's layers are not here")

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        raise AssertionError("a layer of another machine is computed there")

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        raise AssertionError("a layer of another machine is computed there")

    # --- mlx-lm's words ---

    def is_trimmable(self) -> bool:
        return not self._rings

    def empty(self) -> bool:
        return self.offset == 0

    # --- following ---

    def _reaches(self, offset: int, ends: tuple[int, ...] | list[int], wanted: int) -> bool:
        places = zip(self._rings, ends, strict=True)
        return 0 <= wanted <= offset and all(
            ring_reaches(window, capacity, Snapshot(offset, end), wanted) for (window, capacity), end in places
        )

    def _put(self, offset: int, ends: list[int]) -> None:
        self.offset = offset
        rings = zip(self._rings, ends, strict=True)
        self._ends = [end if seen_before(window, offset) else offset for (window, _), end in rings]

    def _tell(self, change: Mapping[str, Any]) -> None:
        if self.epoch is not None and self.keeper.is_here(self.epoch):
            self.keeper.tell(self, change)
