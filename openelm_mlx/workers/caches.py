"""The caches of a worker's layers: made, changed and forgotten as the first machine says, and computed with in its passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import mlx.core as mx

from ..adapters import remove_adapter
from ..checks import is_whole
from ..decoding.batch_step import BatchStep
from ..decoding.budget import Budget
from ..decoding.compiled_step import make_step
from ..decoding.prefill import chunk_throttle, every_token, lock_of, through_chunk
from ..decoding.step import Step
from ..errors import UserError, WorkerError
from ..link.adapter_parts import adapter_ids_of
from ..link.framing import LostConnectionError
from ..memory.admission import TOKENS_AT_ONCE
from ..models.buffers import Snapshot
from ..models.cache import Cache
from ..models.precision import runs_on_cpu
from ..models.rows import Rows, flat_logits

if TYPE_CHECKING:
    from ..models import Model

MOST_CACHES, MOST_SNAPSHOTS, MOST_ROWS = 4096, 65_536, 4096


@dataclass
class RequestCache:
    """One request's caches here. places: tokens that memory was looked at for. step: computes one more token."""

    cache: Cache
    budget: Budget
    step: Step
    places: int = 0


@dataclass
class RowsOfRequest:
    """One request's part of a pass."""

    number: int
    length: int
    is_prompt: bool
    wants: bool
    held: RequestCache = field(repr=False)


@final
class Caches:
    """See the module. Everything that is asked for is checked first: a wrong number or length is a WorkerError."""

    def __init__(self, model: Model, itemsize: int) -> None:
        self._model, self._itemsize = model, itemsize
        self._held: dict[int, RequestCache] = {}
        self._snapshots: dict[int, tuple[Snapshot, ...]] = {}
        self._batch_step = BatchStep(model)

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Forget all of them."""
        for each in self._held.values():
            for layer in each.cache:
                layer.clear()
        self._held.clear()
        self._snapshots.clear()
        mx.clear_cache()

    # --- changes ------------------------------------------------------------------------------------------------------

    def change(self, changes: Any) -> None:
        """What has happened to caches since the last pass, in order.

        Raises LostConnectionError: after a change that is not possible, nothing here is what the first machine thinks.
        """
        if not isinstance(changes, list):
            raise LostConnectionError("Changes of caches are no list.")
        for each in changes:
            if not isinstance(each, dict) or each.get("op") not in CHANGES:
                raise LostConnectionError(f"There is no change of a cache {str(each)[:80]!r}.")
            try:
                CHANGES[each["op"]](self, each)
            except (KeyError, TypeError, ValueError) as error:
                raise LostConnectionError(f"A cache cannot be changed so: {error}.") from None

    def _rewind(self, change: Mapping[str, Any]) -> None:
        for layer in self._of(change).cache:
            layer.rewind(_natural(change["count"]))

    def _snapshot(self, change: Mapping[str, Any]) -> None:
        if len(self._snapshots) >= MOST_SNAPSHOTS:
            raise WorkerError("There are too many snapshots.")
        made = tuple(layer.snapshot() for layer in self._of(change).cache)
        mx.eval([array for each in made for array in each.arrays])  # a lazy slice would keep the whole ring
        self._snapshots[_natural(change["snapshot"])] = made

    def _restore(self, change: Mapping[str, Any]) -> None:
        snapshot = self._snapshots[_natural(change["snapshot"])]
        for layer, each in zip(self._of(change).cache, snapshot, strict=True):
            layer.restore(each)

    def _fork(self, change: Mapping[str, Any]) -> None:
        source = self._of(change)
        if "snapshot" in change:
            snapshots = self._snapshots[_natural(change["snapshot"])]
        else:
            end = _natural(change["end"])
            snapshots = tuple(Snapshot(end, end) for _ in source.cache)
        cache = [layer.fork(each) for layer, each in zip(source.cache, snapshots, strict=True)]
        self._hold(_natural(change["to"]), cache)

    def _forget(self, change: Mapping[str, Any]) -> None:
        if "snapshot" in change:
            self._snapshots.pop(_natural(change["snapshot"]), None)
            return
        if "adapter" in change:
            self._forget_adapter(str(_natural(change["adapter"])))
            return
        held = self._held.pop(_natural(change["cache"]), None)
        if held is not None:
            for layer in held.cache:
                layer.clear()

    def _forget_adapter(self, name: str) -> None:
        if name in self._model.adapters.served.names:
            remove_adapter(self._model, name)
            self._batch_step = BatchStep(self._model)  # the one before may have pieces that were traced with it
            mx.clear_cache()

    def _of(self, change: Mapping[str, Any]) -> RequestCache:
        return self._held[_natural(change["cache"])]

    def _hold(self, number: int, cache: Cache) -> RequestCache:
        if number in self._held or len(self._held) >= MOST_CACHES:
            raise WorkerError(f"There is a cache {number} already, or there are too many.")
        budget = Budget(self._model, cache, itemsize=self._itemsize)
        held = self._held[number] = RequestCache(cache, budget, make_step(self._model, cache))
        return held

    def _make(self, number: int, settings: Any) -> None:
        if not isinstance(settings, dict):
            raise WorkerError("The settings of a cache are no object.")
        window, padding = settings.get("window"), settings.get("left_padding")
        kv_bits = settings.get("kv_bits")
        if window is None and all(layer.window is not None for layer in self._model.spec.layers):
            kv_bits = None  # there is no layer here that keeps everything
        made = self._model.make_cache(
            None if window is None else _natural(window),
            None if padding is None else [_natural(each) for each in padding],
            kv_bits,
            _natural(settings.get("room", 0)),
        )
        self._hold(number, made)

    # --- a pass -------------------------------------------------------------------------------------------------------

    def compute(self, header: Mapping[str, Any], h: mx.array) -> mx.array | None:
        """The residual stream after the layers here, of those tokens that are wanted; None where none is."""
        new = header.get("new", {})
        rows: list[RowsOfRequest] = []
        try:
            for number, settings in new.items():
                self._make(int(number), settings)
            rows = self._checked(header, h)
            adapters = self._model.adapters
            with adapters.using(adapters.select(adapter_ids_of(header))):
                return self._computed(str(header.get("form")), header, h, rows)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._drop(rows)
            if isinstance(error, UserError):
                raise
            raise WorkerError(f"A pass cannot be computed: {type(error).__name__}, {error}.") from None
        except BaseException:
            self._drop(rows)
            raise

    def _checked(self, header: Mapping[str, Any], h: mx.array) -> list[RowsOfRequest]:
        given = header["rows"]
        if not isinstance(given, list) or len(given) > MOST_ROWS or h.shape[-1] != self._model.spec.hidden_size:
            raise WorkerError("A pass has too many rows, or rows of another width.")
        rows = []
        for number, offset, length, is_prompt, wants in given:
            held = self._held[_natural(number)]
            rows.append(RowsOfRequest(number, _natural(length), bool(is_prompt), bool(wants), held))
            if held.cache[0].offset != offset:
                raise WorkerError(f"A cache has {held.cache[0].offset} tokens here, and {offset} on the first machine.")
        for each in rows:
            self._make_room(each)
        return rows

    def _make_room(self, row: RowsOfRequest) -> None:
        """Let caches grow, one layer after the other, where the plan's memory has room for it."""
        held, total = row.held, row.held.cache[0].offset + row.length
        if total <= held.places:
            return
        limit = self._model.context_length
        places = min(max(total, limit), total + TOKENS_AT_ONCE)
        held.budget.check_pass(places, row.length)
        for layer in held.cache:
            mx.eval(layer.reserve(places))  # before the next layer's copy is made
        held.places = places

    def _computed(
        self, form: str, header: Mapping[str, Any], h: mx.array, rows: list[RowsOfRequest]
    ) -> mx.array | None:
        model = self._model
        out: mx.array | None
        if form == "rows":
            return self._flat(h, rows)
        if form == "whole" and not rows:
            padding = header.get("left_padding")
            return model(h, None, None if padding is None else mx.array([_natural(each) for each in padding]))
        [row] = rows
        held = row.held
        if form == "step" and h.shape == (model.spec.hidden_size,):
            return held.step(h)
        if form == "many" and h.shape == (row.length, model.spec.hidden_size):
            return held.step.many(h)
        if form == "whole" and row.length == (1 if h.ndim == 2 else h.shape[1]):
            return model(h, held.cache)
        if form in ("prompt", "chunk") and h.ndim == 3 and h.shape[:2] == (1, row.length):
            with lock_of(model):
                if form == "prompt":
                    out = through_chunk(model, h, held.cache, row.wants)
                    mx.eval([[] if out is None else [out], *(layer.buffers for layer in held.cache)])
                else:
                    out = every_token(model, h, held.cache)
            mx.clear_cache()
            return out
        raise WorkerError(f"There is no pass {form[:20]!r} of {h.shape} numbers.")

    def _flat(self, h: mx.array, rows: list[RowsOfRequest]) -> mx.array | None:
        """Rows of several requests, as an engine's pass has them (engine/flat_pass.py)."""
        if not rows or h.ndim != 2 or sum(each.length for each in rows) != h.shape[0]:
            raise WorkerError("A pass has other rows than it says.")
        made = [Rows(each.held.cache, each.length, each.is_prompt, each.wants) for each in rows]
        prompts = [each for each in made if each.is_prompt]
        with lock_of(self._model):
            if any(each.length > 1 for each in prompts):
                throttle = chunk_throttle([each.cache for each in prompts], sum(each.length for each in prompts))
                out = flat_logits(self._model, h, made, throttle)
            else:
                out = self._batch_step(h, made)
            if prompts:
                mx.eval([[] if out is None else [out], *(layer.buffers for each in prompts for layer in each.cache)])
        if prompts and runs_on_cpu():
            mx.clear_cache()
        return out

    def _drop(self, rows: Sequence[RowsOfRequest]) -> None:
        """What a failed pass has begun to write is not to be trusted; the first machine forgets it too."""
        for each in rows:
            self._forget({"cache": each.number})
        mx.clear_cache()


CHANGES: Mapping[str, Callable[[Caches, Mapping[str, Any]], None]] = {
    "rewind": Caches._rewind,
    "snapshot": Caches._snapshot,
    "restore": Caches._restore,
    "fork": Caches._fork,
    "forget": Caches._forget,
}


def _natural(value: Any) -> int:
    if not is_whole(value) or value < 0:
        raise WorkerError(f"{str(value)[:40]!r} is no number of tokens, caches or rows.")
    return int(value)
