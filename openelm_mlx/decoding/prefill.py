"""A prompt into the cache, chunk by chunk, and the logits of its last token."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..errors import SettingError
from ..memory.machine import give_back_freed
from ..memory.scratch import LAYERS_IN_FLIGHT
from ..models.block import LayerThrottle
from ..models.cache import Cache, seen_by_last
from ..models.precision import runs_on_cpu
from ..runtime import runtime_of
from .budget import Budget, drop
from .compiled_step import make_step
from .gpu_errors import empty_stream, is_out_of_memory, is_watchdog

if TYPE_CHECKING:
    from ..models import Model

# Seconds. On CUDA it took less.
LONGEST_RELEASE = 1e-3
# Tokens of prompts in a pass beside decoding requests; with fewer, what all layers take at once is small.
THROTTLED_FROM = 512
# Bytes of what a part hands on. With fewer, a few megabytes are freed, which the next part takes again; to give them back
# to the system, all of the process's heap is walked through, which takes longer than the part.
GIVEN_BACK_FROM = 2**17


def prefill(
    model: Model,
    tokens: Sequence[int],
    cache: Cache,
    chunk_length: int,
    budget: Budget | None = None,
    is_retry: bool = False,
    stops: Sequence[int] = (),
    at_border: Callable[[], None] | None = None,
) -> mx.array:
    """Run a prompt through the model and return the logits of its last token, (V,).

    tokens: not in the cache yet. At most `chunk_length` of them are in flight at once, fewer where the budget says so;
    half as many after the GPU's watchdog has struck, which is tried once, from an empty cache. Raises MemoryLimitError
    when the next chunk has no room, SettingError when half the chunk is too long for the watchdog too.

    stops: offsets at which a chunk ends. at_border: called after each chunk; the last one ends before the last token
    then, which costs a pass of its own.
    """
    budget = Budget(model, cache) if budget is None else budget
    started_empty = budget.num_tokens == 0
    try:
        if at_border is None:
            logits = fill(model, tokens, cache, chunk_length, budget, stops, wants_logits=True)
            assert logits is not None
            return logits
        fill(model, tokens[:-1], cache, chunk_length, budget, stops, at_border)
    except RuntimeError as error:
        others = empty_stream()  # what was committed behind it has failed too
        for other in others:
            if is_out_of_memory(other):
                raise other from error
        if not is_watchdog(error):
            raise
        drop(cache)  # what the chunk had begun to write is lost
        # Other machines that share the model are not told.
        if not is_retry and started_empty and chunk_length > 1 and runtime_of(model).group is None:
            return prefill(model, tokens, cache, chunk_length // 2, budget, True, stops, at_border)
        raise SettingError(
            f"The GPU was stopped because {chunk_length} prompt tokens at once took longer than macOS allows: ask for "
            f"prefill_chunk={max(1, chunk_length // 4)} (--prefill-chunk)."
        ) from None
    return make_step(model, cache)(mx.array(tokens[-1]))


def fill(
    model: Model,
    tokens: Sequence[int],
    cache: Cache,
    chunk_length: int,
    budget: Budget,
    stops: Sequence[int] = (),
    at_border: Callable[[], None] | None = None,
    wants_logits: bool = False,
) -> mx.array | None:
    """The keys and values of `tokens` into the cache; see `prefill`. wants_logits: gives those of the last token, (V,)."""
    start, before = 0, cache[0].offset
    logits = None
    while start < len(tokens):
        stop = _next_border(before + start, stops, before + len(tokens)) - before
        length = budget.chunk_of_prompt(chunk_length, stop - start)
        if wants_logits and start + length == len(tokens):
            logits = _last_logits(model, tokens[start:], cache)
            mx.eval([[logits], *(layer.buffers for layer in cache)])
        else:
            only_cache(model, tokens[start : start + length], cache, is_throttled=True)
        budget.chunk_is_done(length)
        if at_border is not None:
            at_border()
        mx.clear_cache()
        start += length
    return logits


def prompt_chunks(start: int, stop: int, length: int, borders: Sequence[int], last_apart: bool) -> list[int]:
    """The lengths of the chunks in which `prefill` computes prompt tokens start ... stop - 1, where memory is not short.

    borders: offsets at which a chunk ends. last_apart: whether the last token has a pass of its own.
    """
    chunks = []
    end = stop - 1 if last_apart else stop
    while start < end:
        chunks.append(min(length, _next_border(start, borders, end) - start))
        start += chunks[-1]
    return [*chunks, 1] if last_apart else chunks


def _next_border(position: int, borders: Sequence[int], end: int) -> int:
    """The first of the borders behind a position; `end` where that comes before it."""
    return min((each for each in borders if position < each < end), default=end)


def _last_logits(model: Model, tokens: Sequence[int], cache: Cache) -> mx.array:
    """The logits (V,) of the last of `tokens`, all of which go into the cache; the last layer computes that one alone."""
    if len(tokens) == 1:
        return make_step(model, cache)(mx.array(tokens[0]))
    with lock_of(model):
        h = through_chunk(model, model.embed(mx.array(list(tokens))[None]), cache, wants_last=True)
    if model.remote is not None:
        h = model.remote.prompt(h, cache, wants_last=True)
    assert h is not None
    return model.head(h)[0]


def only_cache(model: Model, tokens: Sequence[int], cache: Cache, is_throttled: bool = False) -> None:
    """The keys and values of `tokens` into the cache, evaluated: of the last layer and the head nothing else is computed.

    Other machines are not waited for: they compute their part while this one goes on with the next tokens.
    """
    with lock_of(model):
        h = through_chunk(model, model.embed(mx.array(list(tokens))[None]), cache, False, is_throttled)
        mx.eval([layer.buffers for layer in cache])
    if model.remote is not None:
        assert h is not None
        model.remote.prompt(h, cache, wants_last=False)


def through_chunk(
    model: Model, h: mx.array, cache: Cache, wants_last: bool, is_throttled: bool = True
) -> mx.array | None:
    """A chunk of a prompt through the model's own layers; its keys and values are in the cache then. Lazy.

    h (1, L, hidden_size): before the first layer. After the last one, of which nothing is computed that is not wanted,
    it is that of all tokens where other machines go on with it, else (1, hidden_size) of the last one with `wants_last`.
    """
    num_layers = len(model.layers)
    throttle = (
        in_turn(cache, num_layers if wants_last or model.is_followed else num_layers - 1) if is_throttled else None
    )
    if model.is_followed:
        return model.run_layers(h, cache, throttle=throttle)
    last_block, last_cache = model.layers[-1], cache[num_layers - 1]
    h = model.run_layers(h, cache, 0, num_layers - 1, throttle=throttle)
    queries, *new = last_block.before_attention(h, last_cache.offset)
    if throttle is not None:
        throttle([queries, *new], False)
    keys, values = cast("tuple[mx.array, mx.array]", last_cache.update_and_fetch(*new))
    if not wants_last:
        return None
    out = last_block.attention.attend_over(queries[:, :, -1:], *seen_by_last(last_cache, keys, values), None)
    return last_block.after_attention(h[:, -1], out)


def every_token(model: Model, h: mx.array, cache: Cache) -> mx.array:
    """A chunk h (1, L, hidden_size) through all of the model's own layers, of every token, evaluated with keys and values."""
    h = model.run_layers(h, cache, throttle=in_turn(cache, len(model.layers)))
    mx.eval(h, [layer.buffers for layer in cache])
    return h


def lock_of(model: Model) -> Any:
    """What is held for a chunk of a prompt, where experts are on disk."""
    return nullcontext() if (residency := runtime_of(model).residency) is None else residency.lock


def is_throttled(num_tokens: int) -> bool:
    """Whether the host waits for layers while it dispatches a pass with so many tokens of prompts."""
    return runs_on_cpu() or num_tokens >= THROTTLED_FROM


def chunk_throttle(caches: Sequence[Cache], num_tokens: int) -> LayerThrottle | None:
    """`in_turn` for chunks of several prompts, `num_tokens` in all, that go through all layers together.

    None for few tokens on a GPU: waiting for each layer would take longer than computing it.
    """
    if not is_throttled(num_tokens):
        return None
    return in_turn(caches[0], len(caches[0]), caches[1:])


def in_turn(cache: Cache, num_layers: int, others: Sequence[Cache] = ()) -> LayerThrottle:
    """What lets the arrays of few layers be in memory at the same time while many tokens go through so many layers.

    MLX gives memory to everything that is dispatched, and takes it back when it has been computed; left alone, the host is
    layers ahead of that: gpt-oss-20b then takes 13 GB for 2,048 tokens on a fast GPU (docs/LOG.md). Here a GPU computes one
    layer while the next one is dispatched (a fast one: up to three), and the CPU each part of a layer by itself, which the
    planner counts with (memory/scratch.py). What comes after these layers is not waited for.
    """
    running: deque[Sequence[mx.array]] = deque()
    on_cpu, num_done, start, largest = runs_on_cpu(), 0, mx.get_active_memory(), 0
    behind = LAYERS_IN_FLIGHT["cuda" if mx.cuda.is_available() else "metal"] - 1
    caches = (cache, *others)

    def nbytes(i: int) -> int:
        return sum(each[i].nbytes for each in caches)

    before_pass = [nbytes(i) for i in range(len(cache))]

    def throttle(arrays: Sequence[mx.array], is_complete: bool) -> None:
        nonlocal num_done, start, largest
        if num_done == num_layers:
            return
        num_done += is_complete
        if on_cpu:
            mx.eval(arrays)
            if arrays[0].nbytes >= GIVEN_BACK_FROM:
                give_back_freed()
        elif is_complete:
            before = mx.get_active_memory()
            mx.async_eval(arrays)
            largest = max(largest, mx.get_active_memory() - before)
            running.append(arrays)
            if len(running) > behind:
                mx.eval(running.popleft())
            # A cache's first places stay.
            start += nbytes(num_done - 1) - before_pass[num_done - 1]
            # What is there beyond is computed, and on its way back.
            if not _until_below(start + behind * largest + largest // 16):
                start = max(start, mx.get_active_memory() - behind * largest)  # it stays: nothing is waited for twice

    return throttle


def _until_below(num_bytes: int) -> bool:
    """Wait for MLX to take memory back, a moment at most: a thread of its own does that, shortly after the work is done.

    Whether no more is in use than `num_bytes`.
    """
    deadline = time.perf_counter() + LONGEST_RELEASE
    while mx.get_active_memory() > num_bytes and time.perf_counter() < deadline:
        time.sleep(0)
    return mx.get_active_memory() <= num_bytes
