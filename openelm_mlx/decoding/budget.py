"""The memory limit of a request, checked before it begins, before each chunk of its prompt, and every few tokens.

The limit comes from the plan (`Runtime.plan`); without a plan nothing is refused. Counted are the memory in use now, the
growth of keys and values, and the scratch memory of the next pass: the plan's figure, or the measured one if it was larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import mlx.core as mx

from ..checks import size
from ..errors import MemoryLimitError
from ..memory.admission import LEAST_CHUNK, TOKENS_AT_ONCE, what_fits
from ..memory.cache_bytes import Growth, growth_of, most_that
from ..memory.limits import LimitsLease, generating
from ..memory.machine import backend_name
from ..memory.plan import CHUNKS, DEFAULT_CHUNK
from ..models.cache import Cache
from ..runtime import runtime_of
from .gpu_errors import empty_stream, is_out_of_memory

if TYPE_CHECKING:
    from ..models import Model


class Budget:
    """The memory of one request on `model` with its `cache`. `active_memory` can be injected.

    Machines that share the model do the same, what the one with the least memory can.

    itemsize: bytes of a number of keys and values, where the model has no embedding to tell it.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        lease: LimitsLease | None = None,
        active_memory: Callable[[], int] | None = None,
        itemsize: int | None = None,
    ) -> None:
        self._spec, self._cache, self._lease = model.spec, cache, lease
        self._active_memory = mx.get_active_memory if active_memory is None else active_memory
        runtime = runtime_of(model)
        plan, self._group = runtime.plan, runtime.group
        self._limit = None if plan is None else plan.budget_bytes
        self._scratch_per_token = 0.0 if plan is None else plan.scratch_bytes / max(1, plan.prefill_chunk)
        # Lazy: nothing is computed.
        self._itemsize = model.embed(mx.array([[0]])).dtype.size if itemsize is None else itemsize
        self._before_chunk = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens are in the cache."""
        return self._cache[0].offset

    def check_request(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise MemoryLimitError when prompt and answer cannot fit, and say what would fit."""
        least = min(LEAST_CHUNK, num_prompt_tokens)
        if self._limit is None or self._needed(num_prompt_tokens + max_tokens, least) <= self._limit:
            return
        advice = what_fits(num_prompt_tokens, self._most_tokens(least))
        self._refuse(
            f"A prompt of {num_prompt_tokens:,} tokens and an answer of up to {max_tokens:,} do not fit into the memory",
            num_prompt_tokens + max_tokens,
            least,
            f"{advice}, or raise memory_limit (--memory-limit).",
        )

    def room_for_answer(self, num_prompt_tokens: int, most: int) -> int:
        """How many tokens of an answer fit into memory after the prompt, at most `most`; 0 if none does."""
        least = min(LEAST_CHUNK, num_prompt_tokens)
        if self._limit is None or self._needed(num_prompt_tokens + most, least) <= self._limit:
            return most
        return max(0, min(most, self._most_tokens(least) - num_prompt_tokens))

    def chunk_of_prompt(self, chunk_length: int, num_left: int) -> int:
        """Make room for the next chunk of a prompt with `num_left` tokens to go; return its length.

        That is `chunk_length`, or half of it, a quarter and so on if memory is short. Raises MemoryLimitError.
        """
        if self._group is None:
            length = self._chunk_that_fits(chunk_length, num_left)
        else:
            length = self._group.least(lambda: self._chunk_that_fits(chunk_length, num_left))
        self._make_room(self.num_tokens + length)
        self._before_chunk = self._active_memory()
        if self._lease is not None:
            self._lease.lap()
        return length

    def _chunk_that_fits(self, chunk_length: int, num_left: int) -> int:
        length = min(chunk_length, num_left)
        while self._limit is not None and self._needed(self.num_tokens + length, length) > self._limit:
            if chunk_length <= LEAST_CHUNK:
                self._refuse(
                    f"The prompt was stopped after {self.num_tokens:,} tokens, before it would pass the memory limit",
                    self.num_tokens + length,
                    length,
                    "The model can be used again: shorten the prompt, or raise memory_limit (--memory-limit).",
                )
            chunk_length = max(LEAST_CHUNK, chunk_length // 2)
            length = min(chunk_length, num_left)
        return length

    def check_pass(self, num_tokens: int, length: int) -> None:
        """Raise MemoryLimitError where a pass of `length` tokens has no room that fills the cache up to `num_tokens`."""
        if self._limit is not None and self._needed(num_tokens, length) > self._limit:
            self._refuse(
                f"The request was stopped after {self.num_tokens:,} tokens, before it would pass the memory limit",
                num_tokens,
                length,
                "Ask for fewer tokens, or raise memory_limit (--memory-limit).",
            )

    def chunk_is_done(self, length: int) -> None:
        """Learn from a computed chunk how much scratch memory each of its tokens took."""
        if self._lease is not None:
            seen = self._lease.lap() - max(self._before_chunk, self._active_memory())
            self._scratch_per_token = max(self._scratch_per_token, seen / length)

    def before_tokens(self, count: int, max_tokens: int) -> None:
        """Make room for the next tokens of an answer that has `count` tokens so far. Raises MemoryLimitError.

        Called for every token, but does something only for one in 64.
        """
        if count % TOKENS_AT_ONCE or count >= max_tokens:
            return
        total = self.num_tokens + min(TOKENS_AT_ONCE + 1, max_tokens - count)  # the loop runs one token ahead
        if self._group is None:
            self._check_tokens(total, count)
        else:
            self._group.least(lambda: self._check_tokens(total, count))
        self._make_room(total)

    def _check_tokens(self, total: int, count: int) -> int:
        if self._limit is not None and self._needed(total, 1) > self._limit:
            self._refuse(
                f"The answer was stopped after {count:,} tokens, before it would pass the memory limit",
                total,
                1,
                "The model can be used again: ask for fewer tokens, or raise memory_limit (--memory-limit).",
            )
        return total

    def _make_room(self, num_tokens: int) -> None:
        """Grow the caches one layer after the other, so that only one is in memory twice while it is copied."""
        for layer in self._cache:
            mx.eval(layer.reserve(num_tokens))  # before the next layer's copy is made

    def _needed(self, num_tokens: int, chunk_length: int) -> int:
        """Bytes in use while a pass of `chunk_length` tokens fills the cache up to `num_tokens`."""
        return self._active_memory() + sum(self.growth(num_tokens)) + self.scratch(chunk_length)

    def growth(self, num_tokens: int) -> Growth:
        """Bytes that the keys and values grow by up to `num_tokens`, and of the one layer that is there twice meanwhile."""
        layers = zip(self._spec.layers, self._cache, strict=False)  # other machines' caches, which follow, are theirs
        return growth_of((layer.nbytes, layer.nbytes_for(num_tokens, spec, self._itemsize)) for spec, layer in layers)

    def scratch(self, chunk_length: int) -> int:
        """Bytes that computing a pass of so many tokens takes, beside weights and caches."""
        return int(self._scratch_per_token * chunk_length)

    def _most_tokens(self, chunk_length: int) -> int:
        """The largest number of tokens in all that fits, 0 when none does."""
        limit = cast(int, self._limit)
        return most_that(lambda n: self._needed(n, chunk_length) <= limit, self._spec.context_length)

    def _refuse(self, what: str, num_tokens: int, chunk_length: int, advice: str) -> NoReturn:
        raise MemoryLimitError(
            f"{what}: {size(self._active_memory())} are in use, the keys and values of {num_tokens:,} tokens take "
            f"{size(sum(self.growth(num_tokens)))} more and computing takes {size(self.scratch(chunk_length))}, together "
            f"{size(self._needed(num_tokens, chunk_length))} of the {size(cast(int, self._limit))} allowed; {advice}"
        )


@contextmanager
def keeping_to_plan(model: Model, cache: Cache) -> Iterator[tuple[Budget, LimitsLease]]:
    """The memory limit of a request from its first chunk to its last token, however it ends.

    After an error nothing of the cache stays in memory. When the backend itself ran out of memory, the model's state cannot be
    trusted: the model keeps an error message, which every later request raises.
    """
    group = runtime_of(model).group
    with generating(runtime_of(model).plan) as lease:
        try:
            yield Budget(model, cache, lease), lease
        except (RuntimeError, MemoryError) as error:
            drop(cache)
            if group is not None and group.is_lost(error):
                raise group.lost(error) from None
            # So that the next request does not get errors of this one.
            error = next((each for each in (error, *empty_stream()) if is_out_of_memory(each)), error)
            if not is_out_of_memory(error):
                raise
            failure = runtime_of(model).failure = (
                "The memory ran out while the model was computing, and it must be loaded again: call load once more, with a "
                "shorter context_length or a smaller memory_limit."
            )
            raise MemoryLimitError(f"{failure} (MLX says: {_first_line(error)})") from None
        except MemoryLimitError:
            drop(cache)
            raise


def check_room(
    model: Model,
    cache: Cache,
    num_prompt_tokens: int,
    max_tokens: int,
    active_memory: Callable[[], int] | None = None,
) -> None:
    """Raise MemoryLimitError when a request cannot fit, or when an earlier one ran out of memory while computing.

    cache: empty, of the kind that the request will use. active_memory: what is in use; as MLX says when it is None.
    """
    if (failure := runtime_of(model).failure) is not None:
        raise MemoryLimitError(failure)
    Budget(model, cache, active_memory=active_memory).check_request(num_prompt_tokens, max_tokens)


def room_in_memory(
    model: Model, cache: Cache, num_prompt_tokens: int, most: int, active_memory: Callable[[], int] | None = None
) -> int:
    """How many tokens of an answer the plan's memory holds behind a prompt, at most `most`. The rest as for `check_room`."""
    return Budget(model, cache, active_memory=active_memory).room_for_answer(num_prompt_tokens, most)


def chunk_of_plan(model: Model) -> int:
    """The default number of prompt tokens that are computed at once."""
    plan = runtime_of(model).plan
    if plan is not None:
        return plan.prefill_chunk
    # On CUDA dispatching a pass takes as long as computing thousands of tokens (docs/LOG.md).
    return CHUNKS[0] if backend_name() == "cuda" else DEFAULT_CHUNK


def drop(cache: Cache) -> None:
    """Free the memory of a cache, even if a traceback still refers to the cache."""
    for layer in cache:
        layer.clear()
    mx.clear_cache()


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
