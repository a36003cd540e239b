"""Keys and values of earlier requests, so that only the new tokens are computed of a prompt with the same beginning.

A `PrefixCache` holds finished requests: their tokens, their caches, and snapshots of the rings at borders of turns and
chunks (full layers are append-only and can be cut anywhere). A `Turn` is one request: which part of its prompt is cached,
where its own snapshots are taken, and how it is kept when it ends. A cache belongs to one request at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, final

import mlx.core as mx
import numpy as np

from ..arguments import FLAG, PATH, checked_call
from ..checks import whole_number
from ..errors import CheckpointError, DestinationError, MemoryLimitError, SettingError
from ..files import expanded
from ..models.buffers import Snapshot
from ..models.cache import Cache
from .pieces import weights_version

if TYPE_CHECKING:
    from ..models import Model

MAX_BYTES = 1_000_000_000
# MLX refuses more than 499,000 buffers in a process.
MAX_BUFFERS = 20_000
# Snapshots of the rings kept for one request; if there are more, those nearest to each other are dropped.
MAX_CHECKPOINTS = 16


class TurnCheckpoint(NamedTuple):
    """A snapshot of all layers at one position of a conversation."""

    layers: tuple[Snapshot, ...]

    @property
    def offset(self) -> int:
        return self.layers[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        return [array for layer in self.layers for array in layer.arrays]


def checkpoint_of(cache: Cache) -> TurnCheckpoint:
    """A snapshot of `cache`; a few megabytes for the rings of a large model, nothing without rings."""
    checkpoint = TurnCheckpoint(tuple(layer.snapshot() for layer in cache))
    mx.eval(checkpoint.arrays)  # a lazy slice would keep the whole array alive
    return checkpoint


class Entry(NamedTuple):
    """A finished request. tokens (T,): those in the cache. num_prompt_tokens: those before its own answer.

    kind: the settings that the cache was made with. checkpoints: in the order of their offsets; the last one is the cache's
    current state.
    """

    tokens: np.ndarray
    num_prompt_tokens: int
    kind: tuple[object, ...]
    cache: Cache
    checkpoints: tuple[TurnCheckpoint, ...]

    @property
    def arrays(self) -> list[mx.array]:
        snapshots = [array for checkpoint in self.checkpoints[:-1] for array in checkpoint.arrays]
        return [buffer for layer in self.cache for buffer in layer.buffers] + snapshots

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def best_cut(self, num_shared: int) -> tuple[int, TurnCheckpoint]:
        """How many of the first `num_shared` tokens can be reused, and from which checkpoint."""
        best, checkpoint = 0, self.checkpoints[0]
        for each in self.checkpoints:
            cut = min(each.offset, num_shared)
            layers = zip(self.cache, each.layers, strict=True)
            if cut > best and all(layer.can_reach(snapshot, cut) for layer, snapshot in layers):
                best, checkpoint = cut, each
        return best, checkpoint


@final
@checked_call("om.PrefixCache")
class PrefixCache:
    """Finished requests of one model, for any number of conversations; the least recently used are evicted first.

    max_bytes, max_buffers: limits for all requests together. A request larger than that is not kept. When the model's
    parameters have been replaced, everything is dropped. Safe to use from several threads.

        cache = om.PrefixCache()
        om.generate(model, tokenizer, messages, prefix_cache=cache)
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_buffers: int = MAX_BUFFERS) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_buffers", max_buffers)):
            whole_number(name, value, low=0)
        self.max_bytes, self.max_buffers = max_bytes, max_buffers
        self._entries: list[Entry] = []  # the least recently used first
        self._model: Model | None = None
        self._weights_version: int | None = None  # that everything kept was computed with
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of all kept requests."""
        return sum(entry.nbytes for entry in self._entries)

    @property
    def num_buffers(self) -> int:
        """How many MLX buffers the kept requests have."""
        return sum(len(entry.arrays) for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drop everything and free the memory."""
        with self._lock:
            self._entries.clear()
        mx.clear_cache()

    def begin(
        self, model: Model, tokens: Sequence[int], kind: tuple[object, ...], borders: Sequence[int] = ()
    ) -> Turn | None:
        """Start a request whose prompt `tokens` has the same beginning as an earlier one; None if there is none.

        At least the prompt's last token is left to be computed: its logits are not kept. kind: the settings of the
        request's cache. borders: offsets in the prompt where a message begins.
        """
        with self._lock:
            self._check_model(model)
            prompt = np.array(tokens, np.int64)
            num_shared, entry = self._longest(prompt, kind)
            if entry is None:
                return None
            num_reused, checkpoint = entry.best_cut(min(num_shared, len(tokens) - 1))
            if not num_reused:
                return None
            cache = self._cache_for(entry, checkpoint, num_reused)
            kept = [each for each in entry.checkpoints if each.offset <= num_reused and each.arrays]
            return Turn(self, tokens, kind, cache, (*borders, num_shared), kept, cache is not entry.cache)

    def borders_for(self, tokens: Sequence[int], kind: tuple[object, ...]) -> tuple[int, ...]:
        """Where earlier prompts start to differ from this one: good positions for snapshots, as the next may differ there."""
        with self._lock:
            num_shared, _ = self._longest(np.array(tokens, np.int64), kind)
        return (num_shared,) if 0 < num_shared < len(tokens) else ()

    def keep(self, entry: Entry) -> None:
        """Add a finished request, and evict others until everything fits."""
        with self._lock:
            if self._model is not None:
                before = self._weights_version
                self._check_model(self._model)
                if before != self._weights_version:
                    return  # the weights have changed meanwhile
            self._entries.append(entry)
            while self._entries and (self.nbytes > self.max_bytes or self.num_buffers > self.max_buffers):
                self._entries.pop(0)

    def make_room(self, check: Callable[[], None]) -> None:
        """Call `check`, and evict a request each time that it raises MemoryLimitError, until none is left."""
        while True:
            try:
                return check()
            except MemoryLimitError:
                with self._lock:
                    if not self._entries:
                        raise
                    self._entries.pop(0)
                mx.clear_cache()

    def forget_oldest(self) -> bool:
        """Forget the request that was used longest ago. False when nothing is kept."""
        with self._lock:
            if not self._entries:
                return False
            self._entries.pop(0)
            return True

    @checked_call("prefix_cache.save", path=PATH, overwrite=FLAG)
    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write everything into the file `path`, completely or not at all.

        overwrite: replace even a file that is not a prompt cache. Raises DestinationError.
        """
        from .prefix_file import save_entries

        _check_is_here(self._model)
        with self._lock:
            save_entries(expanded(path, DestinationError), self._entries, self._model, overwrite)

    @checked_call("prefix_cache.load", path=PATH)
    def load(self, path: str | os.PathLike[str], model: Model) -> None:
        """Replace the kept requests with those of a file that `save` wrote.

        Raises CheckpointError when the file is damaged, of another version, or of another model.
        """
        from .arguments import check_model
        from .prefix_file import load_entries

        check_model(model)
        _check_is_here(model)
        with self._lock:
            self._check_model(model)
            found = list(
                load_entries(expanded(path, CheckpointError), model)
            )  # if the file cannot be read, nothing is lost
            self._entries.clear()
            for entry in found:
                self.keep(entry)

    def check_model(self, model: Model) -> None:
        """Raise SettingError where what is kept was computed by another model."""
        if self._model is not None and self._model is not model:
            raise SettingError("This PrefixCache belongs to another model: make one for each model.")

    def _check_model(self, model: Model) -> None:
        self.check_model(model)
        version = weights_version(model)
        if self._model is not None and version != self._weights_version:
            self._entries.clear()
        self._model, self._weights_version = model, version

    def _longest(self, prompt: np.ndarray, kind: tuple[object, ...]) -> tuple[int, Entry | None]:
        """The entry that shares the most reusable tokens with the prompt, and how many it shares."""
        best: tuple[int, int, Entry | None] = (-1, 0, None)
        for entry in self._entries:
            if entry.kind == kind:
                num_shared = shared(entry.tokens, prompt)
                num_reused, _ = entry.best_cut(min(num_shared, len(prompt) - 1))
                if (num_reused, num_shared) >= best[:2]:  # of equal ones, the last used
                    best = num_reused, num_shared, entry
        return best[1], best[2]

    def _cache_for(self, entry: Entry, checkpoint: TurnCheckpoint, num_reused: int) -> Cache:
        """The entry's cache cut to `num_reused` tokens: the cache itself if only its own answer is lost, else a copy."""
        at = next(i for i, each in enumerate(self._entries) if each is entry)
        del self._entries[at]
        # No copy either if there is no memory for two.
        is_continued = num_reused >= entry.num_prompt_tokens - 1 or 2 * entry.nbytes > self.max_bytes
        if is_continued:
            cache = entry.cache
            for layer, snapshot in zip(cache, checkpoint.layers, strict=True):
                layer.restore(snapshot)
        else:
            self._entries.append(entry)
            cache = [layer.fork(snapshot) for layer, snapshot in zip(entry.cache, checkpoint.layers, strict=True)]
        for layer in cache:
            layer.rewind(checkpoint.offset - num_reused)
        return cache


@final
class Turn:
    """One running request: `cache` has the first `num_reused` of its prompt's tokens already.

    tokens: prompt and answer so far; the loop appends to it. stops: offsets at which the prompt's chunks end. is_fork:
    whether the cache shares what it has with another one, until it is written to.
    """

    def __init__(
        self,
        store: PrefixCache | None,
        prompt: Sequence[int],
        kind: tuple[object, ...],
        cache: Cache,
        borders: Sequence[int] = (),
        checkpoints: Sequence[TurnCheckpoint] = (),
        is_fork: bool = False,
    ) -> None:
        self.cache, self.tokens, self.is_fork = cache, list(prompt), is_fork
        self.num_reused, self.num_prompt_tokens = cache[0].offset, len(prompt)
        self.stops = sorted({border for border in borders if self.num_reused < border < len(prompt)})
        self._store, self._kind = store, kind
        self._checkpoints = list(checkpoints)
        self._last_border: TurnCheckpoint | None = None
        self.at_border()

    @property
    def new_tokens(self) -> list[int]:
        """The part of the prompt that is left to be computed; at least one token."""
        return self.tokens[self.num_reused : self.num_prompt_tokens]

    @property
    def num_checkpoints(self) -> int:
        """Snapshots that it holds so far."""
        return len(self._checkpoints)

    def at_border(self) -> None:
        """Take a snapshot here: where the cached part of the prompt ends, or after a chunk of it."""
        if self._store is None or self.cache[0].offset == 0:
            return
        self._last_border = checkpoint = checkpoint_of(self.cache)
        if not checkpoint.arrays:
            return  # without rings, the final cache can be cut at any earlier position
        self._checkpoints = [each for each in self._checkpoints if each.offset < checkpoint.offset]
        self._checkpoints.append(checkpoint)
        if len(self._checkpoints) > MAX_CHECKPOINTS:
            self._thin_out()

    def forked(self) -> Turn:
        """Another request with the same prompt, which is in the cache: what is written to one is not seen by the other."""
        cache = [layer.fork(layer.snapshot()) for layer in self.cache]
        new = Turn(self._store, self.tokens[: self.num_prompt_tokens], self._kind, cache, is_fork=True)
        new._checkpoints = list(self._checkpoints)
        return new

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the request when the block ends, or when the caller stops early; not after an error.

        After Ctrl-C, which may have come in the middle of a step, the prompt is kept as far as it was computed.
        """
        try:
            yield
        except GeneratorExit:
            self.keep()
            raise
        except KeyboardInterrupt:
            if self._last_border is not None:
                for layer, snapshot in zip(self.cache, self._last_border.layers, strict=True):
                    layer.restore(snapshot)
                self.keep()
            raise
        self.keep()

    def keep(self) -> None:
        """Keep the request as it is now, for prompts that begin alike."""
        if self._store is None:
            return
        # Accepted drafts after the end of the answer.
        surplus = self.cache[0].offset - len(self.tokens)
        if surplus > 0:
            for layer in self.cache:
                layer.rewind(surplus)
        mx.eval([layer.buffers for layer in self.cache])  # the step that was dispatched ahead
        end = checkpoint_of(self.cache)
        before = [each for each in self._checkpoints if each.offset < end.offset]
        tokens = np.array(self.tokens[: end.offset], np.int64)
        self._store.keep(Entry(tokens, self.num_prompt_tokens, self._kind, self.cache, (*before, end)))

    def _thin_out(self) -> None:
        """Drop the checkpoint whose neighbours are nearest to each other; the first and the last stay."""
        offsets = [each.offset for each in self._checkpoints]
        gaps = [after - before for before, after in zip(offsets, offsets[2:], strict=False)]
        del self._checkpoints[1 + gaps.index(min(gaps))]


def begin_turn(
    store: PrefixCache | None,
    model: Model,
    prompt: Sequence[int],
    kind: tuple[object, ...],
    make_cache: Callable[[], Cache],
    borders: Sequence[int] = (),
) -> Turn:
    """Start the request for `prompt` with what `store` has of it, or with an empty cache."""
    if store is None:
        return Turn(None, prompt, kind, make_cache())
    turn = store.begin(model, prompt, kind, borders)
    if turn is not None:
        return turn
    return Turn(store, prompt, kind, make_cache(), (*borders, *store.borders_for(prompt, kind)))


def _check_is_here(model: Model | None) -> None:
    """Raise SettingError where keys and values of some layers are on other machines: a file would have half of them."""
    if model is not None and model.remote is not None:
        raise SettingError(
            "A prefix_cache of a model over several machines is not kept in a file: some of it is on the others; leave one of "
            "prefix_cache= and workers= out."
        )


def shared(first: np.ndarray, second: np.ndarray) -> int:
    """The length of two sequences' common beginning."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if differs.size else length
