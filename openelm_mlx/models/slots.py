"""The keys and values of many requests in one buffer a layer, so that attention is one call for all of them.

A request has a slot, and its token at position p the column p of it, modulo the columns of the layer: those with a window
have rings. A step has a row for every slot, its request's next token, and after them more rows for slots whose requests
bring several tokens, as a prompt does. All rows are written by one operation, and who sees which columns follows from
slots and positions alone. Where the kernels are (models/slot_attention.py), buffers are written as they are, and stay the
same arrays from step to step; else each write gives a new one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast, final

import mlx.core as mx
import numpy as np

from ..specs import ModelSpec, kv_capacity
from .attention import Mask
from .block import BlockAttention
from .cache import Cache, KVCache, SlidingKVCache
from .slot_attention import has_kernel_for, keys_and_values, write_in_slots
from .slot_sizes import LONGEST_IN_SLOTS, RING_ROOM, column_runs, flat_columns, slots_for
from .slot_step import attend_to_last

# Bytes that are moved out of a slot together; they are there twice meanwhile.
MOVED_AT_ONCE = 2**23


@final
class SlotBank:
    """See the module. owners: who has which slot, None where nobody has. lengths: tokens of each.

    has_kernel: attention is one kernel of our own (`KernelChoices.slot_kernel`). takes_prompts: prompts are computed in
    slots (`KernelChoices.prompts_in_slots`). evaluate: given what has been moved, one layer after the other or few bytes,
    since that is there twice (`mx.eval`). settle: waits until nothing is being computed (`mx.synchronize`): what a pass still
    reads would not be written in place, but copied. A step is `begin`, `attend` or `write` for every layer, and `end`;
    without its end it has not been.

    Of a step: rows (M, 2), the slot and the position of each row, for `attend_in_slots`; positions (M,), in float32; last: see
    `SlotStep`.
    """

    rows: mx.array
    positions: mx.array
    last: mx.array | None

    def __init__(
        self,
        spec: ModelSpec,
        spare_places: int = 0,
        evaluate: Callable[[Any], None] = lambda arrays: None,
        has_kernel: bool = False,
        settle: Callable[[], None] = lambda: None,
        takes_prompts: bool = False,
    ) -> None:
        self.has_kernel, self.takes_prompts = has_kernel, takes_prompts
        self.owners: list[Hashable | None] = []
        self.lengths: list[int] = []
        self._spec, self._spare, self._evaluate, self._settle = spec, spare_places, evaluate, settle
        self._ring_room = RING_ROOM if takes_prompts else 0
        # Of each layer keys and values in one, (2, S, K, T, D).
        self._buffers: list[mx.array | None] = [None] * len(spec.layers)
        self._is_in_place: bool | None = None
        # Whether a buffer could not be moved: those of some layers are of another shape then, and nobody's tokens are there.
        self.is_lost = False
        self._computed: mx.array | None = None  # of the last step
        self._places = 0  # columns of the layers that keep everything
        # Of a step: how many tokens each slot is given, and the slot and the position of every row.
        self._counts: list[int] = []
        self._row_slots, self._row_positions = np.zeros(0, np.int64), np.zeros(0, np.int64)
        # By the layers' key heads and window: where the rows are written. By their window: the masks without the kernel.
        self._targets: dict[tuple[int, int | None], mx.array] = {}
        self._masks: dict[int | None, Mask] = {}

    def __len__(self) -> int:
        """Slots, those that nobody has included."""
        return len(self.owners)

    @property
    def shape(self) -> tuple[int, int]:
        """Slots, and the columns of layers that keep everything: with one of them the buffers' shapes change."""
        return len(self), self._places

    @property
    def num_owners(self) -> int:
        """Slots that somebody has."""
        return sum(owner is not None for owner in self.owners)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(self.lengths, default=0)

    @property
    def longest_piece(self) -> int:
        """How many tokens a request may bring in a step."""
        has_rings = any(each.window is not None for each in self._spec.layers)
        return RING_ROOM if has_rings else LONGEST_IN_SLOTS

    @property
    def buffers(self) -> list[mx.array]:
        """What the requests' keys and values are in, of each layer (2, S, K, T, D); none before the first of them."""
        return [buffer for buffer in self._buffers if buffer is not None]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def is_in_place(self) -> bool:
        """Whether a step leaves the buffers the same arrays; see `write_in_slots`."""
        if self._is_in_place is None:
            self._is_in_place = self.has_kernel and all(has_kernel_for(each.head_dim) for each in self._spec.layers)
        return self._is_in_place

    def nbytes_with(self, num_more: int, length: int, itemsize: int) -> int:
        """Bytes with so many more requests, the longest of all of `length` tokens."""
        slots = slots_for(self.num_owners + num_more) if num_more else len(self)
        places = max(self._places, self._capacity(max(length, self.longest)))
        columns = (self._columns_of(each.window, places) for each in self._spec.layers)
        tokens = zip(self._spec.layers, columns, strict=True)
        return slots * sum(count * each.kv_bytes_per_token(itemsize) for each, count in tokens)

    # --- joining and leaving ------------------------------------------------------------------------------------------

    def join(self, owner: Hashable, cache: Cache, num_tokens: int = 0, num_owners: int = 0) -> int:
        """Take over what `cache` holds, which is empty then. Gives the slot.

        num_tokens: that one of the requests will have at least. num_owners: how many there will be.
        """
        length = cache[0].offset
        was_used = None in self.owners
        slot = self._free_slot(num_owners)
        self._make_places(max(length, num_tokens) + 1)
        if length or (was_used and not self.is_in_place):
            self._wait()
            self._settle()
            for i, layer in enumerate(cache):
                self._put(i, slot, cast("KVCache | SlidingKVCache", layer), length)
            self._evaluate(self.buffers)  # all in one: each has been written in place
        self.owners[slot], self.lengths[slot] = owner, length
        return slot

    def _put(self, i: int, slot: int, layer: KVCache | SlidingKVCache, length: int) -> None:
        """A cache's layer into a slot."""
        parts = layer.in_order() if length else ()
        if parts:
            self._make_buffer(i, parts[0].shape[3], parts[0].dtype)
        if (buffer := self._buffers[i]) is None:
            return
        if not self.is_in_place:
            # What is not seen has a weight of zero, and zero times a NaN of whoever was here is NaN. Only values: scores of
            # keys that are not seen are replaced. The kernel does not look at it.
            buffer[1, slot] = 0.0
        for part, new in enumerate(parts):
            start = 0
            for run in column_runs(self._columns(i), length, new.shape[2]):
                count = run.stop - run.start
                buffer[part, slot, :, run] = new[0, :, start : start + count]
                start += count
        if parts:
            layer.clear()

    def leave(self, slot: int, cache: Cache | None = None) -> None:
        """Give a slot up; into `cache`, which is empty, where what it holds is still wanted."""
        try:
            if cache is not None and self.lengths[slot]:
                self._move(slot, cache)
        finally:  # also where there was no memory for it: nobody would come back for the slot
            self.owners[slot], self.lengths[slot] = None, 0
        with contextlib.suppress(RuntimeError):  # of what others have in slots, which they will learn
            self._compact()

    def _move(self, slot: int, cache: Cache) -> None:
        """What a slot holds into a cache."""
        length, moved = self.lengths[slot], list[mx.array]()
        self._wait()
        for i, layer in enumerate(cache):
            window, buffer = self._spec.layers[i].window, cast(mx.array, self._buffers[i])
            count = length if window is None else min(length, window)
            runs = column_runs(self._columns(i), length, count)
            keys, values = (
                _joined([buffer[part, slot : slot + 1, :, run] for run in runs], axis=2) for part in range(2)
            )
            cast("KVCache | SlidingKVCache", layer).put_in_order(keys, values, length)
            moved += layer.buffers
            if sum(each.nbytes for each in moved) >= MOVED_AT_ONCE or i == len(cache) - 1:
                self._evaluate(moved)
                moved.clear()

    def _wait(self) -> None:
        """Before something else than a step reads the buffers, where MLX does not know that they are written."""
        if self.is_in_place and self.buffers:
            if self._computed is not None:
                self._evaluate(self._computed)  # which writes them
            self._settle()

    def slot_of(self, owner: Hashable) -> int | None:
        """Where a request is; None where it is not here."""
        return self.owners.index(owner) if owner in self.owners else None

    def clear(self) -> None:
        """Everybody is gone, and the memory with them."""
        self.owners, self.lengths = [], []
        self._buffers = [None] * len(self._spec.layers)
        self._places = 0
        self._computed, self.is_lost = None, False

    # --- a step -------------------------------------------------------------------------------------------------------

    def begin(self, counts: Sequence[int] | None = None, padding: int = 0) -> None:
        """So many more tokens of each slot, by default one of everybody: make places for them, and say who sees what.

        counts: 0 for a slot whose row is nobody's, because it is free or has to wait. What is written for it lies where its
        next token will, and nobody sees it. padding: so many more rows, which are nobody's either, in the first slot.
        """
        owned = [owner is not None for owner in self.owners]
        self._counts = [int(each) for each in owned] if counts is None else list(counts)
        ends = [n + count for n, count in zip(self.lengths, self._counts, strict=True)]
        self._make_places(max(ends) + 1)
        self._computed = None
        many = [(slot, count) for slot, count in enumerate(self._counts) if count > 1]
        slots, positions = [np.arange(len(self))], [np.array(self.lengths)]
        slots += [np.full(count - 1, slot) for slot, count in many]
        positions += [self.lengths[slot] + np.arange(1, count) for slot, count in many]
        slots.append(np.zeros(padding, np.int64))
        positions.append(np.full(padding, ends[0]))
        self._row_slots, self._row_positions = np.concatenate(slots), np.concatenate(positions)
        self.rows = mx.array(np.stack([self._row_slots, self._row_positions], axis=1).astype(np.int32))
        self.positions = mx.array(self._row_positions.astype(np.float32))
        self.last = mx.array(self.last_rows) if self.num_rows > len(self) else None
        self._targets.clear()
        self._masks.clear()
        if not self.has_kernel:
            for window in {each.window for each in self._spec.layers}:
                seen = self._num_seen(window)
                self._masks[window] = None if self._sees_all(window, seen) else self._mask(window, seen)

    @property
    def num_rows(self) -> int:
        """Rows of this step."""
        return len(self._row_slots)

    @property
    def row_positions(self) -> np.ndarray:
        """The position of each row of this step, on the host."""
        return self._row_positions

    @property
    def last_rows(self) -> list[int]:
        """Of each slot the row of its last token in this step."""
        found, after = list(range(len(self))), len(self)
        for slot, count in enumerate(self._counts):
            if count > 1:
                after += count - 1
                found[slot] = after - 1
        return found

    def attend(
        self,
        i: int,
        attention: BlockAttention,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        last: mx.array | None = None,
    ) -> mx.array:
        """Put the new keys and values (M, K, 1, D) into layer `i`; what the queries (M, H, 1, D) see of all, the same shape.

        last: these rows alone are wanted.
        """
        buffer, written = self.write(i, mx.concatenate([keys, values], axis=1).squeeze(2))
        window = self._spec.layers[i].window
        if self.has_kernel:
            return attend_to_last(attention, queries, buffer, self.rows, last, window, written)
        seen = self._num_seen(window)
        if seen < self._columns(i):
            buffer = buffer[:, :, :, :seen]
        return attention.attend_over(queries, *keys_and_values(buffer), self._masks[window])

    def write(self, i: int, new: mx.array) -> tuple[mx.array, mx.array | None]:
        """See `SlotStep`."""
        self._make_buffer(i, new.shape[2], new.dtype)
        buffer = cast(mx.array, self._buffers[i])
        if self.is_in_place:
            return buffer, write_in_slots(buffer, new, self.rows)
        flat = buffer.reshape(-1, new.shape[2])
        flat[self._target(i)] = new
        self._buffers[i] = written = flat.reshape(buffer.shape)
        return written, None

    def end(self, computed: mx.array | None = None) -> None:
        """The step has been built: everybody has the tokens that it was given. computed: what is evaluated of it."""
        self._computed = computed if self.is_in_place else None
        self.lengths = [n + count for n, count in zip(self.lengths, self._counts, strict=True)]

    # --- columns ------------------------------------------------------------------------------------------------------

    def _target(self, i: int) -> mx.array:
        """Which of all columns (2 S K T) of layer `i` this step's keys and values go to, (M, 2 K)."""
        layer = self._spec.layers[i]
        key = layer.num_kv_heads, layer.window
        if key not in self._targets:
            places = self._row_slots, self._row_positions
            self._targets[key] = mx.array(flat_columns(len(self), layer.num_kv_heads, self._columns(i), *places))
        return self._targets[key]

    def _make_buffer(self, i: int, head_dim: int, dtype: mx.Dtype) -> None:
        if self._buffers[i] is None:
            shape = (2, len(self), self._spec.layers[i].num_kv_heads, self._columns(i), head_dim)
            self._buffers[i] = mx.zeros(shape, dtype)

    def _columns(self, i: int) -> int:
        return self._columns_of(self._spec.layers[i].window, self._places)

    def _columns_of(self, window: int | None, places: int) -> int:
        return places if window is None else window + self._ring_room

    def _num_seen(self, window: int | None) -> int:
        """How many of the first columns hold anything, the next tokens included."""
        return min(int(self._row_positions.max()) + 1, self._columns_of(window, self._places))

    def _sees_all(self, window: int | None, seen: int) -> bool:
        """Whether everybody sees all of these columns: requests of one length, or longer than the ring."""
        owned = (n for n, owner in zip(self.lengths, self.owners, strict=True) if owner is not None)
        return (window is None or seen <= window) and all(n + 1 >= seen for n in owned)

    def _mask(self, window: int | None, seen: int) -> mx.array:
        """Which of the first columns each slot sees, (S, 1, 1, seen)."""
        columns, lengths = self._columns_of(window, self._places), mx.array(self.lengths)[:, None, None, None]
        # How many tokens ago a column was written; 0: the new ones.
        ages = (lengths - mx.arange(seen)) % columns
        return ages <= (lengths if window is None else mx.minimum(lengths, window - 1))

    # --- sizes --------------------------------------------------------------------------------------------------------

    def _capacity(self, num_tokens: int) -> int:
        return kv_capacity(num_tokens, None) + self._spare

    def _make_places(self, num_tokens: int) -> None:
        """Columns for requests of so many tokens."""
        if num_tokens <= self._places:
            return
        self._wait()
        places = self._capacity(num_tokens)
        more = places - self._places
        self._move_all(
            lambda old: mx.concatenate([old, mx.zeros((*old.shape[:3], more, old.shape[4]), old.dtype)], axis=3),
            [i for i, layer in enumerate(self._spec.layers) if layer.window is None],
        )
        self._places = places

    def _move_all(self, moved: Callable[[mx.array], mx.array], layers: Sequence[int]) -> None:
        """New buffers for these layers, one after the other: it is there twice."""
        try:
            for i in layers:
                old = self._buffers[i]
                if old is not None:
                    self._buffers[i] = new = moved(old)
                    self._evaluate(new)
        except RuntimeError:  # there was no memory for one
            self._buffers = [None] * len(self._buffers)
            self.is_lost = True
            raise

    def _free_slot(self, num_owners: int) -> int:
        count = max(num_owners, self.num_owners + 1)
        if None not in self.owners or slots_for(count) > len(self):
            self._resize(list(range(len(self))), max(len(self), slots_for(count)))
        return self.owners.index(None)

    def _compact(self) -> None:
        """Fewer slots, where they would do."""
        if not self.num_owners:
            self.clear()
            return
        fewer = slots_for(self.num_owners)
        if fewer < len(self) and slots_for(2 * self.num_owners) <= len(self):
            self._resize([i for i, owner in enumerate(self.owners) if owner is not None], fewer)

    def _resize(self, kept: Sequence[int], size: int) -> None:
        """`size` slots, the first of them being those of `kept`."""
        self._wait()
        is_prefix = list(kept) == list(range(len(kept)))

        def moved(old: mx.array) -> mx.array:
            rows = old[:, : len(kept)] if is_prefix else old[:, mx.array(list(kept))]
            return mx.concatenate([rows, mx.zeros((2, size - len(kept), *old.shape[2:]), old.dtype)], axis=1)

        self._move_all(moved, range(len(self._buffers)))
        owners = [self.owners[slot] for slot in kept]
        lengths = [self.lengths[slot] for slot in kept]
        self.owners = [*owners, *[None] * (size - len(kept))]
        self.lengths = [*lengths, *[0] * (size - len(kept))]


def _joined(pieces: Sequence[mx.array], axis: int) -> mx.array:
    return pieces[0] if len(pieces) == 1 else mx.concatenate(list(pieces), axis=axis)
