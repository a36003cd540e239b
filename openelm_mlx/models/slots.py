"""The keys and values of many decoding requests in one buffer a layer, so that attention is one call for all of them.

Every request writes its next token into the same column, whatever its length, and its earlier tokens lie in the columns
before: a write is one slice for all, and joining moves nobody else. The column goes round: a request of n tokens has the
n columns up to the current one, modulo the buffer's length. Rotary positions are the requests' own, so where a token lies
means nothing: who sees which columns follows from lengths alone. Layers with a window have rings of just that many columns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast, final

import mlx.core as mx

from ..specs import ModelSpec, kv_capacity
from .attention import Mask
from .block import BlockAttention
from .cache import Cache, KVCache, SlidingKVCache
from .slot_attention import attend_in_slots, keys_and_values

# Numbers of slots: few, since each is a shape for which kernels are chosen and pieces traced.
SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# A buffer is as long as its longest request for all. Longer ones than this stay apart: their attention fills a device by
# itself, and short ones would pay for them.
LONGEST_IN_SLOTS = 8192


def fits_in_slots(cache: Cache, spec: ModelSpec) -> bool:
    """Whether a request with this cache can be in a bank: it keeps what every layer asks for, unquantized, one row."""
    return cache[0].offset <= LONGEST_IN_SLOTS and all(
        (isinstance(layer, KVCache) and each.window is None)
        or (isinstance(layer, SlidingKVCache) and layer.window == layer.capacity == each.window)
        for layer, each in zip(cache, spec.layers, strict=True)
    )


@final
class SlotBank:
    """See the module. owners: who has which slot, None where nobody has. lengths: tokens of each.

    has_kernel: attention is one kernel of our own (`KernelChoices.slot_kernel`). evaluate: given what has been moved, one
    layer after the other, so that only one is there twice (`mx.eval`). settle: waits until nothing is being computed
    (`mx.synchronize`): what a pass still reads would not be written in place, but copied. A step is `begin`, `attend` or
    `write` for every layer, and `end`; without its end it has not been.
    """

    def __init__(
        self,
        spec: ModelSpec,
        spare_places: int = 0,
        evaluate: Callable[[Any], None] = lambda arrays: None,
        has_kernel: bool = False,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.has_kernel = has_kernel
        self.owners: list[Hashable | None] = []
        self.lengths: list[int] = []
        self._spec, self._spare, self._evaluate, self._settle = spec, spare_places, evaluate, settle
        # Of each layer keys and values in one, (2, S, K, T, D): both are written by one operation.
        self._buffers: list[mx.array | None] = [None] * len(spec.layers)
        self._places = 0  # columns of the layers that keep everything
        # The column that the next tokens go to, counted on: modulo the columns that a layer has.
        self._full_column = self._ring_column = 0
        # Of a step, by the layers' window: what the kernel is told, or the masks of attention without it.
        self._states: dict[int | None, mx.array] = {}
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
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)

    def nbytes_with(self, num_more: int, length: int, itemsize: int) -> int:
        """Bytes with so many more requests, the longest of all of `length` tokens."""
        slots = _size_for(self.num_owners + num_more) if num_more else len(self)
        places = max(self._places, self._capacity(max(length, self.longest)))
        columns = (places if each.window is None else each.window for each in self._spec.layers)
        tokens = zip(self._spec.layers, columns, strict=True)
        return slots * sum(count * each.kv_bytes_per_token(itemsize) for each, count in tokens)

    # --- joining and leaving ------------------------------------------------------------------------------------------

    def join(self, owner: Hashable, cache: Cache) -> int:
        """Take over what `cache` holds, which is empty then. Gives the slot."""
        length = cache[0].offset
        was_used = None in self.owners
        slot = self._free_slot()
        self._make_places(length + 1)
        self._settle()
        self._go_round(length)
        for i, layer in enumerate(cache):
            keys, values = cast("KVCache | SlidingKVCache", layer).in_order()
            buffer = self._buffers[i]
            if buffer is None:
                _, heads, _, head_dim = keys.shape
                shape = (2, len(self), heads, self._columns(i), head_dim)
                self._buffers[i] = buffer = mx.zeros(shape, keys.dtype)
            if was_used:
                # What is not seen has a weight of zero, and zero times a NaN of whoever was here is NaN. Only values: scores
                # of keys that are not seen are replaced.
                buffer[1, slot] = 0.0
            for part, new in enumerate((keys, values)):
                self._write_before(i, buffer, part, slot, new)
            layer.clear()
        self._evaluate(self._buffers)  # all in one: each has been written in place
        self.owners[slot], self.lengths[slot] = owner, length
        return slot

    def leave(self, slot: int, cache: Cache | None = None) -> None:
        """Give a slot up; into `cache`, which is empty, where what it holds is still wanted."""
        length = self.lengths[slot]
        if cache is not None:
            for i, layer in enumerate(cache):
                count = length if self._spec.layers[i].window is None else min(length, self._columns(i))
                buffer = cast(mx.array, self._buffers[i])
                keys, values = (self._read_before(i, buffer, part, slot, count) for part in range(2))
                cast("KVCache | SlidingKVCache", layer).put_in_order(keys, values, length)
                self._evaluate(layer.buffers)
        self.owners[slot], self.lengths[slot] = None, 0
        self._compact()

    def slot_of(self, owner: Hashable) -> int | None:
        """Where a request is; None where it is not here."""
        return self.owners.index(owner) if owner in self.owners else None

    def clear(self) -> None:
        """Everybody is gone, and the memory with them."""
        self.owners, self.lengths = [], []
        self._buffers = [None] * len(self._spec.layers)
        self._places = self._full_column = self._ring_column = 0

    # --- a step -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """One more token of everybody: make places for it, and say who sees what."""
        self._make_places(self.longest + 1)
        self._states.clear()
        self._masks.clear()
        for window in {each.window for each in self._spec.layers}:
            if self.has_kernel:
                column = self._column(window) % self._columns_of(window)
                self._states[window] = mx.array([column, *self.lengths], mx.int32)
            else:
                seen = self._num_seen(window)
                self._masks[window] = None if self._sees_all(window, seen) else self._mask(window, seen)

    def _mask(self, window: int | None, seen: int) -> mx.array:
        """Which of the first columns each request sees, (S, 1, 1, seen)."""
        # How many tokens ago a column was written; 0: the new ones.
        ages = (self._column(window) - mx.arange(seen)) % self._columns_of(window)
        return ages <= mx.array(self.lengths)[:, None, None, None]

    def attend(
        self, i: int, attention: BlockAttention, queries: mx.array, keys: mx.array, values: mx.array
    ) -> mx.array:
        """Put the new keys and values (S, K, 1, D) into layer `i`; what the queries (S, H, 1, D) see of all, the same shape."""
        buffer, column = cast(mx.array, self._buffers[i]), self._new_column(i)
        for part, new in enumerate((keys, values)):
            buffer[part : part + 1, :, :, column : column + 1] = new
        if self.has_kernel:
            return attend_in_slots(queries, buffer, self.state(i), attention.full_scale, attention.sinks)
        seen = self._seen(i)
        if seen < self._columns(i):
            buffer = buffer[:, :, :, :seen]
        return attention.attend_over(queries, *keys_and_values(buffer), self._masks[self._spec.layers[i].window])

    def write(self, i: int, new: mx.array) -> mx.array:
        """Put the new keys and values (2, S, K, 1, D) into layer `i`; its buffer, for `attend_in_slots`."""
        buffer, column = cast(mx.array, self._buffers[i]), self._new_column(i)
        buffer[:, :, :, column : column + 1] = new
        return buffer

    def state(self, i: int) -> mx.array:
        """What `attend_in_slots` is told of layer `i` in this step."""
        return self._states[self._spec.layers[i].window]

    def end(self) -> None:
        """The step has been dispatched: everybody is one token longer."""
        self.lengths = [n + (owner is not None) for n, owner in zip(self.lengths, self.owners, strict=True)]
        self._full_column += 1
        self._ring_column += 1

    # --- columns ------------------------------------------------------------------------------------------------------

    def _column(self, window: int | None) -> int:
        return self._full_column if window is None else self._ring_column

    def _columns(self, i: int) -> int:
        return self._columns_of(self._spec.layers[i].window)

    def _columns_of(self, window: int | None) -> int:
        return self._places if window is None else window

    def _new_column(self, i: int) -> int:
        """Where layer `i` puts the next tokens."""
        return self._column(self._spec.layers[i].window) % self._columns(i)

    def _seen(self, i: int) -> int:
        return self._num_seen(self._spec.layers[i].window)

    def _num_seen(self, window: int | None) -> int:
        """How many of the first columns hold anything, the next tokens included."""
        return min(self._column(window) + 1, self._columns_of(window))

    def _sees_all(self, window: int | None, seen: int) -> bool:
        """Whether everybody sees all of these columns: requests of one length, or longer than the ring."""
        return all(n + 1 >= seen for n, owner in zip(self.lengths, self.owners, strict=True) if owner is not None)

    def _runs(self, i: int, count: int) -> list[slice]:
        """The last `count` columns before the current one, in their order: one run, or two around the end."""
        columns = self._columns(i)
        start = (self._column(self._spec.layers[i].window) - count) % columns
        runs = [slice(start, min(start + count, columns)), slice(0, start + count - columns)]
        return [run for run in runs if run.start < run.stop]

    def _write_before(self, i: int, buffer: mx.array, part: int, slot: int, new: mx.array) -> None:
        """The tokens `new` (1, K, n, D) into a slot, up to the current column. part: 0 for keys, 1 for values."""
        start = 0
        for run in self._runs(i, new.shape[2]):
            count = run.stop - run.start
            buffer[part, slot, :, run] = new[0, :, start : start + count]
            start += count

    def _read_before(self, i: int, buffer: mx.array, part: int, slot: int, count: int) -> mx.array:
        pieces = [buffer[part, slot : slot + 1, :, run] for run in self._runs(i, count)]
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)

    # --- sizes --------------------------------------------------------------------------------------------------------

    def _capacity(self, num_tokens: int) -> int:
        return kv_capacity(num_tokens, None) + self._spare

    def _make_places(self, num_tokens: int) -> None:
        """Columns for requests of so many tokens. What is there is laid out anew, oldest first."""
        if not self.num_owners:
            # Nobody's tokens have to stay where they are: those who join lie at the buffer's beginning.
            self._full_column, self._ring_column = num_tokens - 1, num_tokens - 1
        if num_tokens <= self._places:
            return
        before, places = self._places, self._capacity(num_tokens)
        for i, layer in enumerate(self._spec.layers):
            old = self._buffers[i]
            if layer.window is not None or old is None:
                continue
            kept = self._in_order(old, before)
            empty = mx.zeros((*old.shape[:3], places - kept.shape[3], old.shape[4]), old.dtype)
            self._buffers[i] = mx.concatenate([kept, empty], axis=3)
            self._evaluate(self._buffers[i])
        if self.num_owners and before:
            self._full_column = min(self._full_column, before)
        self._places = places

    def _go_round(self, length: int) -> None:
        """Let so many columns before the current ones count as written: a longer request joins, and goes round the end."""
        while self._full_column < length:
            self._full_column += self._places
        for window in {each.window for each in self._spec.layers if each.window is not None}:
            while self._ring_column < min(length, window):
                self._ring_column += window

    def _in_order(self, buffer: mx.array, columns: int) -> mx.array:
        """Of a buffer with so many columns those that hold anything, the oldest first."""
        if self._full_column <= columns:
            return buffer[:, :, :, : self._full_column]
        turn = self._full_column % columns
        return mx.concatenate([buffer[:, :, :, turn:], buffer[:, :, :, :turn]], axis=3)

    def _free_slot(self) -> int:
        if None in self.owners:
            return self.owners.index(None)
        slot = len(self)
        self._resize(list(range(slot)), _size_for(slot + 1))
        return slot

    def _compact(self) -> None:
        """Fewer slots, where they would do."""
        if not self.num_owners:
            self.clear()
            return
        fewer = _size_for(self.num_owners)
        if fewer < len(self) and _size_for(2 * self.num_owners) <= len(self):
            self._resize([i for i, owner in enumerate(self.owners) if owner is not None], fewer)

    def _resize(self, rows: Sequence[int], size: int) -> None:
        """`size` slots, the first of them being those of `rows`."""
        is_prefix = list(rows) == list(range(len(rows)))
        for i in range(len(self._spec.layers)):
            old = self._buffers[i]
            if old is not None:
                kept = old[:, : len(rows)] if is_prefix else old[:, mx.array(list(rows))]
                empty = mx.zeros((2, size - len(rows), *old.shape[2:]), old.dtype)
                self._buffers[i] = mx.concatenate([kept, empty], axis=1)
                self._evaluate(self._buffers[i])
        owners = [self.owners[row] for row in rows]
        lengths = [self.lengths[row] for row in rows]
        self.owners = [*owners, *[None] * (size - len(rows))]
        self.lengths = [*lengths, *[0] * (size - len(rows))]


def _size_for(count: int) -> int:
    return next((size for size in SIZES if size >= count), count)
