"""One request, checked before anything runs: its options, and how many tokens it may take."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from ..checks import whole_number
from ..decoding.budget import check_room, chunk_of_plan, room_in_memory
from ..decoding.constraint import HarmonyConstraint, PlainConstraint, TokenConstraint
from ..decoding.drafts import Drafts
from ..decoding.grammar import AnswerFormat, answer_format, engine_of
from ..decoding.headers import HeaderRule
from ..decoding.prefix_cache import PrefixCache, Turn, begin_turn
from ..decoding.sampling import SamplingParams
from ..errors import MemoryLimitError, PromptError, SettingError, TokenizerError
from ..files import shown
from ..models.adapter_sets import NO_ADAPTER
from ..models.cache import Cache
from ..runtime import runtime_of
from ..text.chat import HARMONY
from ..text.harmony import HarmonyFormat
from ..text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..models import Model

# The default limit of a model that may ramble on to the end of its context.
DEFAULT_MAX_TOKENS = 256
# Most answers of gpt-oss, reasoning included, are shorter.
_LONG_ANSWER = 4096
# What each machine would decide by its own clock and its own memory, where all of them have to do the same.
_NOT_SHARED = {
    "draft": "when it guesses is decided by the clock; leave it out.",
    "prefix_cache": "what is kept is decided by memory; leave it out, and give the whole conversation each time.",
}


class Memory(Protocol):
    """Memory that several requests share. A request is measured as if it were alone there."""

    def check(self, request: Request, max_tokens: int) -> None:
        """Raise MemoryLimitError when it can never fit."""

    def room_for_answer(self, request: Request, most: int) -> int:
        """How many tokens of an answer fit, at most `most`."""


@dataclass(frozen=True)
class Request:
    """The options of a `stream_generate` call, checked before anything runs."""

    prompt_tokens: Sequence[int]
    max_tokens: int | None
    sampling: SamplingParams
    logprobs: int | None
    sliding_window: int | None
    prefill_chunk: int | None
    kv_bits: int | None
    prefix_cache: PrefixCache | None = None
    draft: Drafts | None = None
    adapter: str | None = None  # which one, by its id in the model's set; None: none
    borders: Sequence[int] = ()  # offsets in the prompt where messages begin
    notes: tuple[str, ...] = ()  # sentences about parts of the answer's format that are not enforced
    prompt_logprobs: int | None = None  # the likeliest tokens told for each of the prompt's; None: no log-probabilities
    ends_by_itself: bool = False  # a model that reasons first and must not be cut off before its answer
    constraint: TokenConstraint | None = None  # set when the rest is checked: it counts the tokens
    limit: int = 0  # of tokens, and by what: set when the rest is checked
    limited_by: Literal["max_tokens", "context", "memory"] = "max_tokens"

    def checked(self, model: Model, tokenizer: Tokenizer | None, memory: Memory | None = None) -> Request:
        """The request with its limit of tokens. Raises SettingError, PromptError or MemoryLimitError.

        memory: where others may be at work; None: it has what is in use now beside itself.
        """
        group = runtime_of(model).group
        if group is None:
            return self._checked(model, tokenizer, memory)
        for name, reason in _NOT_SHARED.items():
            if getattr(self, name) is not None:
                raise SettingError(f"{name} is not for a model that several machines share: {reason}")
        group.is_computing = False
        with group.agreeing_on_errors():
            found = self._checked(model, tokenizer, memory)
        asked = [list(map(int, self.prompt_tokens)), self.max_tokens, self.logprobs, self.sliding_window, self.kv_bits]
        asked += [usable_vocab_size(model, tokenizer), None if tokenizer is None else sorted(tokenizer.eos_tokens)]
        settings = [getattr(self.sampling, each.name) for each in fields(self.sampling)]
        group.agreed(
            {"request": hashlib.sha256(repr([asked, settings]).encode()).hexdigest()},
            {
                "request": "another prompt or other options: start all of them with the same command, and the same files."
            },
        )
        limit, chunk = found.limit, self.prefill_chunk or chunk_of_plan(model)
        least = group.least(lambda: limit)
        limited_by = found.limited_by if least == limit else "memory"
        return replace(found, limit=least, limited_by=limited_by, prefill_chunk=group.least(lambda: chunk))

    def _checked(self, model: Model, tokenizer: Tokenizer | None, memory: Memory | None) -> Request:
        if self.max_tokens is not None:
            whole_number("max_tokens", self.max_tokens)
        if self.prefill_chunk is not None:
            whole_number("prefill_chunk", self.prefill_chunk)
        if self.logprobs is not None:
            whole_number("logprobs", self.logprobs, low=0, high=usable_vocab_size(model, tokenizer))
        self.sampling.check_tokens(usable_vocab_size(model, tokenizer))
        if self.sliding_window is not None:
            whole_number("sliding_window", self.sliding_window, high=model.context_length)
        if self.prefix_cache is not None:
            self.prefix_cache.check_model(model)
        if self.draft is not None:
            if not isinstance(self.draft, Drafts):
                raise SettingError(
                    f"draft is a {type(self.draft).__name__}: give om.PromptLookup() or om.DraftModel(model)."
                )
            self.draft.check(model, tokenizer)
        wanted = self.max_tokens
        if wanted is None:
            wanted = model.context_length if self.ends_by_itself else DEFAULT_MAX_TOKENS
        limit, limited_by = wanted, "max_tokens"
        if self.sliding_window is None:
            limit = min(wanted, room_after(model, len(self.prompt_tokens)))
        if limit < wanted or (self.max_tokens is None and self.ends_by_itself):
            limited_by = "context"
        if self.max_tokens is None:
            in_memory = self._limit_in_memory(model, limit, memory)
            limit, limited_by = in_memory, limited_by if in_memory == limit else "memory"
        else:
            self._check_room(model, limit, memory)
        return replace(self, limit=limit, limited_by=cast(Any, limited_by))

    def _limit_in_memory(self, model: Model, most: int, memory: Memory | None) -> int:
        """`most`, or as many tokens as memory allows. Cached requests are evicted only for an answer of usual length."""
        self._check_room(model, min(most, DEFAULT_MAX_TOKENS), memory)
        room = self._room_in_memory(model, most, memory)
        if room < min(most, _LONG_ANSWER):
            with suppress(MemoryLimitError):
                self._check_room(model, min(most, _LONG_ANSWER), memory)
            room = self._room_in_memory(model, most, memory)
        return max(1, room)

    def _room_in_memory(self, model: Model, most: int, memory: Memory | None) -> int:
        if memory is not None:
            return memory.room_for_answer(self, most)
        return room_in_memory(model, self.make_cache(model), len(self.prompt_tokens), most)

    def _check_room(self, model: Model, max_tokens: int, memory: Memory | None) -> None:
        if memory is not None:
            memory.check(self, max_tokens)
            return

        def check() -> None:
            check_room(model, self.make_cache(model), len(self.prompt_tokens), max_tokens)

        # Requests in the prefix cache never block a new one.
        check() if self.prefix_cache is None else self.prefix_cache.make_room(check)

    def make_cache(self, model: Model) -> Cache:
        """An empty cache of the kind that was asked for. Raises SettingError where the model cannot have it."""
        return model.make_cache(window=self.sliding_window, kv_bits=self.kv_bits, room=self.room)

    @property
    def room(self) -> int:
        """How many tokens rings must be able to take back."""
        return 0 if self.draft is None else self.draft.num_draft_tokens

    def begin_turn(self, model: Model) -> Turn:
        """The cache to begin with: filled with what the prefix cache has of the prompt, or empty."""
        kv_bits = self.kv_bits or (None if self.sliding_window else model.kv_bits) or 16
        # Keys and values are those of the model with this adapter.
        kind = (self.sliding_window, kv_bits, self.room, *(() if self.adapter is None else (self.adapter,)))
        return begin_turn(
            self.prefix_cache, model, self.prompt_tokens, kind, lambda: self.make_cache(model), self.borders
        )


def adapter_id(model: Model, name: str | None) -> str | None:
    """The id of the adapter that a request names: the active one's for None, None for none. Raises SettingError."""
    adapters = model.adapters
    try:
        return adapters.id_of(name)
    except KeyError:
        known = ", ".join((*adapters.served.names, NO_ADAPTER))
        what = f"choose one of {known}" if adapters.served.names else "the model has none; load one with om.add_adapter"
        raise SettingError(f"adapter is {shown(name)}: {what}.") from None


def room_after(model: Model, num_prompt_tokens: int) -> int:
    """How many tokens fit into the model's context after a prompt. Raises PromptError when none does."""
    room = model.context_length - num_prompt_tokens
    if room < 1:
        raise PromptError(
            f"The prompt has {num_prompt_tokens:,} tokens and the context holds {model.context_length:,}, so there is no "
            "room for an answer: shorten the prompt, or ask for a sliding window (sliding_window=, --sliding-window)."
        )
    return room


def constraint_on(
    model: Model,
    tokenizer: Tokenizer | None,
    template: str,
    answer: AnswerFormat | None,
    tool_schemas: Mapping[str, Any],
    max_tokens: int,
    rule: HeaderRule | None = None,
    channel: str | None = None,
) -> TokenConstraint | None:
    """The constraint that enforces a completion's formats, None if it has none. Raises SettingError or TokenizerError.

    rule, channel: see `HarmonyConstraint`.
    """
    if answer is None and not tool_schemas and rule is None:
        return None
    if tokenizer is None:
        raise TokenizerError(
            "An answer in a format needs a tokenizer, and this model has none: load it with tokenizer=..."
        )
    if template == HARMONY:
        calls = {name: answer_format(schema) for name, schema in tool_schemas.items() if schema is not None}
        checked = cast("dict[str, AnswerFormat]", calls)
        engine = engine_of(tokenizer)
        return HarmonyConstraint(HarmonyFormat(tokenizer), engine, answer, checked, max_tokens, rule, channel)
    if answer is None:
        raise SettingError(
            "tool_schemas are for gpt-oss's calls, and this model has no format for calls: leave them out."
        )
    return PlainConstraint(engine_of(tokenizer), answer, {*model.spec.eos_tokens, *tokenizer.eos_tokens}, max_tokens)


def usable_vocab_size(model: Model, tokenizer: Tokenizer | None) -> int:
    """Ids below this are tokens; rows of logits beyond are padding, and were never trained."""
    known = model.spec.usable_vocab_size
    return known if tokenizer is None else min(known, tokenizer.vocab_size)


def checked_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(each, str) for each in stops):
        raise SettingError(f"stop is {shown(stop)}: give a string, or a list of strings.")
    return tuple(stops)
