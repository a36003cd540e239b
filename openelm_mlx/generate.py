"""The whole way from a prompt to text: prefill, stream_generate, generate.

Also a command, `python -m openelm_mlx.generate`, and itself callable: `openelm_mlx.generate(model, tokenizer, prompt)` is
`openelm_mlx.generate.generate(...)`, whichever of the two a program imported first.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before anything else is imported: --help is instant, and a machine without MLX gets a sentence, not a traceback.
    from openelm_mlx.commands import main

    sys.exit(main(["generate", *sys.argv[1:]]))

import inspect
import operator
import time
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import mlx.core as mx

from .decoding.arguments import check_model, check_prefix_cache, refuse_unknown
from .decoding.budget import Budget, check_room, chunk_of_plan, keeping_to_plan, room_in_memory
from .decoding.compiled_step import make_step
from .decoding.constraint import HarmonyConstraint, PlainConstraint, TokenConstraint
from .decoding.drafts import Drafts
from .decoding.grammar import AnswerFormat, answer_format, engine_of
from .decoding.prefill import prefill as prefill
from .decoding.prefix_cache import PrefixCache, Turn, begin_turn
from .decoding.sampling import Sampler, SamplingParams
from .decoding.speculation_gain import Counts
from .decoding.speculative import Speculative
from .decoding.step import Step
from .decoding.tokens import Choice, constrained, one_by_one
from .errors import CheckpointError, MemoryLimitError, NoAnswerWarning, PromptError, SettingError, TokenizerError
from .loading import no_tokenizer
from .memory.expert_statistics import ExpertStatistics
from .memory.limits import Held
from .memory.residency import Residency
from .models.cache import Cache
from .text.chat import HARMONY, PLAIN, render_chat
from .text.conversation import ResponseFormat, SystemContent, conversation
from .text.harmony import HarmonyFormat
from .text.streams import FINAL, REASONING, HarmonyStream, Piece, PlainStream, SilentStream, TextStream
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .models import Model

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

# What is generated when nobody says, by a model that may ramble on to the end of its context.
DEFAULT_MAX_TOKENS = 256
# Most answers of gpt-oss, reasoning included, are shorter.
_LONG_ANSWER = 4096

# Freed buffers are handed back this often; MLX keeps them otherwise.
CLEAR_CACHE_EVERY = 256


def generate(model: Model, tokenizer: Tokenizer | None, prompt: Prompt | None = None, **options: Any) -> str:
    """The model's answer to `prompt`, as one string, without its reasoning. Takes the options of `stream_generate`.

    Where gpt-oss came to no answer, because its reasoning used up the tokens or it called a tool, the string is empty and a
    `NoAnswerWarning` says so, with what to change.
    """
    refuse_unknown("om.generate", unknown_options(options), option_names())
    text, last = "", None
    for last in stream_generate(model, tokenizer, prompt, **options):
        if last.channel in (None, FINAL):
            text += last.text
    if last is not None and last.statistics is not None and last.statistics.no_answer is not None:
        depth = 3 if sys._getframe(1).f_code.co_filename == __file__ else 2  # who called `om.generate`
        warnings.warn(last.statistics.no_answer, NoAnswerWarning, stacklevel=depth)
    return text


def stream_generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt | None = None,
    *,
    max_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: str | Sequence[str] = (),
    logprobs: int | None = None,
    raw: bool = False,
    chat_template: str | None = None,
    reasoning_effort: str | None = None,
    sliding_window: int | None = None,
    prefill_chunk: int | None = None,
    kv_bits: int | None = None,
    schema: Any = None,
    regex: str | None = None,
    grammar: str | None = None,
    tool_schemas: Mapping[str, Any] | None = None,
    prefix_cache: PrefixCache | None = None,
    draft: Drafts | None = None,
    **unknown: Any,
) -> Iterator[Chunk]:
    """The model's answer to `prompt`, a chunk for each token; the last chunk has a finish_reason and the statistics.

    prompt: a string (through the chat template where the model has one; raw=True takes it as it is), token ids, or chat
    messages like {"role": "user", "content": "..."}. max_tokens: of reasoning and answer together, clipped to the room the
    context leaves; None: gpt-oss, which comes to its end by itself, may use all of that room as far as the memory goes,
    other models 256. stop: strings that end the answer and are not part of it. logprobs: report each token's
    log-probability and this many of the likeliest alternatives. reasoning_effort: "low", "medium" or "high", how long
    gpt-oss thinks. sliding_window: keep only this many tokens of context, and so go on past its end. prefill_chunk: tokens
    of the prompt in flight at once; the plan's (512 without one), and fewer where memory is short, when it is None.
    kv_bits: 8 keeps keys and values in half the memory, 16 as they are computed; the model's own setting when it is None.

    schema, regex, grammar: what the answer has to be, one of them: a JSON Schema or a Pydantic model's class, a regular
    expression, a grammar in Lark's syntax. It is valid then, and it is finished within max_tokens, cut short where need
    be; gpt-oss thinks as freely as ever. tool_schemas: the same for the arguments of gpt-oss's calls, by recipient:
    {"functions.f": schema}.

    prefix_cache: an `om.PrefixCache`, where what earlier requests computed of a prompt that begins alike is taken from
    and this one's is kept in; the answer is the same. draft: `om.PromptLookup()` or `om.DraftModel(small_model)` guesses
    tokens that the model checks several at a time: the same answer when greedy, the same distribution when sampled (but a
    seed does not repeat it, since the clock decides when it guesses), and plain steps while that is faster.

    Everything that can be wrong with the request is raised here, before any work: PromptError, SettingError,
    TokenizerError, MemoryLimitError. While it runs, a request that would pass the memory limit after all (something else
    in the process grew) ends with MemoryLimitError, and the model can be used again.
    """
    refuse_unknown("om.stream_generate", unknown, option_names())
    check_model(model, tokenizer)
    check_prefix_cache(prefix_cache)
    stops = _checked_stops(stop)
    if prompt is None:
        raise PromptError("There is no prompt: give text, a list of token ids, or chat messages.")
    if not isinstance(tool_schemas, (Mapping, type(None))):
        raise SettingError(
            f"tool_schemas is a {type(tool_schemas).__name__}: give a dictionary of name to JSON Schema."
        )
    if not isinstance(sampling, (SamplingParams, type(None))):
        raise SettingError(f"sampling is a {type(sampling).__name__}: give om.SamplingParams(temperature=0.7, ...).")
    answer = answer_format(schema, regex, grammar)
    encoded = encode_prompt(model, tokenizer, prompt, raw, chat_template, reasoning_effort, answer)
    request = Request(
        prompt_tokens=encoded.tokens,
        max_tokens=max_tokens,
        sampling=sampling or SamplingParams(),
        logprobs=logprobs,
        sliding_window=sliding_window,
        prefill_chunk=prefill_chunk,
        kv_bits=kv_bits,
        prefix_cache=prefix_cache,
        draft=draft,
        borders=message_borders(tokenizer, encoded),
        ends_by_itself=encoded.template == HARMONY,
    ).checked(model, tokenizer)
    constraint = constraint_on(model, tokenizer, encoded.template, answer, tool_schemas or {}, request.limit)
    request = replace(request, constraint=constraint)
    return _stream(model, tokenizer, request, text_stream(tokenizer, encoded, stops))


def option_names() -> list[str]:
    """The keywords of `stream_generate`."""
    parameters = inspect.signature(stream_generate).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]


def unknown_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are no keywords of `stream_generate`."""
    known = option_names()
    return {name: value for name, value in options.items() if name not in known}


def _stream(model: Model, tokenizer: Tokenizer | None, request: Request, text: TextStream) -> Iterator[Chunk]:
    turn = request.begin_turn(model)
    with keeping_to_plan(model, turn.cache) as (budget, held), turn.kept():
        yield from _answer(model, tokenizer, request, text, turn, budget, held)


def _answer(
    model: Model,
    tokenizer: Tokenizer | None,
    request: Request,
    text: TextStream,
    turn: Turn,
    budget: Budget,
    held: Held,
) -> Iterator[Chunk]:
    clock = Clock(request, turn.num_reused, text, held, model.residency)
    eos_tokens = {*model.spec.eos_tokens, *(() if tokenizer is None else tokenizer.eos_tokens), *text.stop_tokens}
    sampler = Sampler(
        request.sampling, model.spec.vocab_size, usable_vocab_size(model, tokenizer), request.prompt_tokens
    )
    chunk_length = request.prefill_chunk or chunk_of_plan(model)
    at_border = None if request.prefix_cache is None else turn.at_border
    logits = prefill(model, turn.new_tokens, turn.cache, chunk_length, budget, stops=turn.stops, at_border=at_border)
    _check_finite(logits)
    choices = _choices(model, request, make_step(model, turn.cache), sampler, logits, clock)
    for count, choice in enumerate(choices, 1):
        token = choice.item()
        clock.token_arrived()
        turn.tokens.append(token)
        if token in eos_tokens:
            piece = text.finish(token)
            clock.shown(piece)
            yield chunk_of(choice, piece, "stop", clock.statistics("stop"))
            return
        piece = text.add(token)
        if piece.is_stopped or count == request.limit:
            rest = text.finish()
            reason = "stop" if piece.is_stopped or rest.is_stopped else "length"
            whole = Piece(piece.text + rest.text, rest.channel if rest.text else piece.channel)
            clock.shown(whole)
            yield chunk_of(choice, whole, reason, clock.statistics(reason))
            return
        clock.shown(piece)
        yield chunk_of(choice, piece)
        if count % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        budget.before_tokens(count, request.limit)


def _choices(
    model: Model, request: Request, step: Step, sampler: Sampler, logits: mx.array, clock: Clock
) -> Iterator[Choice]:
    """The tokens of the answer, in the way that was asked for."""
    max_tokens, num_logprobs, constraint = request.limit, request.logprobs, request.constraint
    if request.draft is not None:
        draft, prompt = request.draft, request.prompt_tokens
        source = Speculative(
            model, step, sampler, prompt, draft.begin(model), draft.num_draft_tokens, num_logprobs, constraint,
            memory=draft.memory,
        )  # fmt: skip
        clock.speculation = source.gain.counts
        return source.choices(logits, max_tokens)
    if constraint is not None:
        return constrained(step, sampler, logits, max_tokens, constraint, num_logprobs)
    return one_by_one(step, sampler, logits, max_tokens, num_logprobs)


@dataclass(frozen=True)
class Statistics:
    """What a request took. Rates are tokens a second, times seconds.

    peak_memory_bytes: the most that was in use in the process while the request ran, as MLX counts it. max_tokens: the
    limit that held: what was asked for, or less where the context or the memory has no room for it. reasoning_tokens: how
    many of the completion's tokens stood before and around the answer (gpt-oss's reasoning, its calls and headers).
    no_answer: None, or a sentence that says why gpt-oss came to no answer and what to change. notes: sentences about
    settings of the process that were left as they are. cached_tokens: how many of the prompt's tokens came from a prefix cache;
    prefill_tps counts the others. drafted_tokens, accepted_tokens, speculation_speedup: what guessing did; times as fast as
    plain steps, None where it was not measured. prompt_experts, answer_experts: what was read from disk for either, in all
    and by layer, where experts are there (of two answers at a time from one model, for both); else None.
    """

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    prefill_tps: float
    decode_tps: float
    peak_memory_bytes: int
    max_tokens: int
    reasoning_tokens: int = 0
    no_answer: str | None = None
    notes: tuple[str, ...] = ()
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    speculation_speedup: float | None = None
    prompt_experts: ExpertStatistics | None = None
    answer_experts: ExpertStatistics | None = None


@dataclass(frozen=True)
class Chunk:
    """One token of the answer.

    text: what became certain with it; may be empty, since a character can take several tokens. finish_reason: None,
    "stop" (end of text, or a stop string), or "length" (max_tokens or the context ended it). channel: None in models
    without channels. logprob, top_logprobs: as asked for.
    """

    text: str
    token: int
    finish_reason: str | None = None
    channel: str | None = None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    statistics: Statistics | None = None


def chunk_of(
    choice: Choice, piece: Piece, finish_reason: str | None = None, statistics: Statistics | None = None
) -> Chunk:
    """What the caller sees of a chosen token and the text that it made certain."""
    return Chunk(
        piece.text, choice.item(), finish_reason, piece.channel, *choice.logprob_values(), statistics=statistics
    )


@dataclass(frozen=True)
class Request:
    """What `stream_generate` was asked for, checked before anything runs."""

    prompt_tokens: Sequence[int]
    max_tokens: int | None
    sampling: SamplingParams
    logprobs: int | None
    sliding_window: int | None
    prefill_chunk: int | None
    kv_bits: int | None
    prefix_cache: PrefixCache | None = None
    draft: Drafts | None = None
    borders: Sequence[int] = ()  # offsets in the prompt where messages begin
    ends_by_itself: bool = False  # a model that thinks first, and has to come to its end
    constraint: TokenConstraint | None = None  # set when the rest is checked: it counts the tokens
    limit: int = 0  # of tokens, and by what: set when the rest is checked
    limited_by: Literal["max_tokens", "context", "memory"] = "max_tokens"

    def checked(self, model: Model, tokenizer: Tokenizer | None) -> Request:
        """The request with its limit of tokens. Raises SettingError, PromptError or MemoryLimitError."""
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens)
        if self.prefill_chunk is not None:
            _check_whole("prefill_chunk", self.prefill_chunk)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, low=0, high=usable_vocab_size(model, tokenizer))
        self.sampling.check_tokens(usable_vocab_size(model, tokenizer))
        if self.sliding_window is not None:
            _check_whole("sliding_window", self.sliding_window, high=model.context_length)
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
            in_memory = self._limit_in_memory(model, limit)
            limit, limited_by = in_memory, limited_by if in_memory == limit else "memory"
        else:
            self._check_room(model, limit)
        return replace(self, limit=limit, limited_by=cast(Any, limited_by))

    def _limit_in_memory(self, model: Model, most: int) -> int:
        """`most`, or what of it the memory holds. Kept requests go for the sake of an answer of usual length only."""
        self._check_room(model, min(most, DEFAULT_MAX_TOKENS))
        room = self._room_in_memory(model, most)
        if room < min(most, _LONG_ANSWER):
            with suppress(MemoryLimitError):
                self._check_room(model, min(most, _LONG_ANSWER))
            room = self._room_in_memory(model, most)
        return max(1, room)

    def _room_in_memory(self, model: Model, most: int) -> int:
        return room_in_memory(model, self.make_cache(model), len(self.prompt_tokens), most)

    def _check_room(self, model: Model, max_tokens: int) -> None:
        def check() -> None:
            check_room(model, self.make_cache(model), len(self.prompt_tokens), max_tokens)

        # Kept requests never stand in the way of a new one.
        check() if self.prefix_cache is None else self.prefix_cache.make_room(check)

    def make_cache(self, model: Model) -> Cache:
        """An empty cache of the kind that was asked for. Raises SettingError where the model cannot have it."""
        return model.make_cache(window=self.sliding_window, kv_bits=self.kv_bits, room=self._room)

    @property
    def _room(self) -> int:
        """How many tokens rings must be able to take back."""
        return 0 if self.draft is None else self.draft.num_draft_tokens

    def begin_turn(self, model: Model) -> Turn:
        """The cache to begin with: with what the prefix cache has of the prompt, or empty."""
        kv_bits = self.kv_bits or (None if self.sliding_window else model.kv_bits) or 16
        kind = (self.sliding_window, kv_bits, self._room)
        return begin_turn(
            self.prefix_cache, model, self.prompt_tokens, kind, lambda: self.make_cache(model), self.borders
        )


def room_after(model: Model, num_prompt_tokens: int) -> int:
    """How many tokens fit into the model's context after a prompt. Raises PromptError when none does."""
    room = model.context_length - num_prompt_tokens
    if room < 1:
        raise PromptError(
            f"The prompt has {num_prompt_tokens:,} tokens and the context holds {model.context_length:,}, so there is no "
            "room for an answer: shorten the prompt, or ask for a sliding window (sliding_window=, --sliding-window)."
        )
    return room


class EncodedPrompt(NamedTuple):
    """A prompt's tokens, the template they went through, and whether the answer continues the prompt's own text."""

    tokens: list[int]
    template: str
    continues_text: bool


def encode_prompt(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    raw: bool = False,
    chat_template: str | None = None,
    reasoning_effort: str | None = None,
    answer: AnswerFormat | None = None,
) -> EncodedPrompt:
    """The tokens of a prompt in any of its forms. Token ids are taken as they are, already through the template.

    answer: the format that the answer will have. gpt-oss is told of a JSON Schema in its prompt, as it was trained.

    Raises PromptError when the prompt is empty or has ids that the model lacks, TokenizerError when text needs a tokenizer.
    """
    template = PLAIN if raw or tokenizer is None else chat_template or tokenizer.chat_template
    if reasoning_effort is not None and template != HARMONY:
        raise SettingError(
            f"reasoning_effort is {reasoning_effort!r}, and only gpt-oss's chat format has one: leave it out."
        )
    if hasattr(prompt, "tolist"):  # an array of mlx or NumPy
        prompt = cast("Prompt", prompt.tolist())
    if not isinstance(prompt, (str, list, tuple)):
        raise PromptError(f"The prompt is a {type(prompt).__name__}: give text, a list of token ids, or chat messages.")
    if not isinstance(prompt, str) and not any(type(item) is not int and isinstance(item, Mapping) for item in prompt):
        return EncodedPrompt(_checked_tokens(model, cast("Sequence[int]", prompt)), template, True)
    if tokenizer is None:
        raise TokenizerError(no_tokenizer(model.spec))
    if isinstance(prompt, str) and not prompt.strip():
        raise PromptError("The prompt is empty: give some text.")
    if isinstance(prompt, str) and template == PLAIN:
        return EncodedPrompt(tokenizer.encode_prompt(prompt), template, True)
    chat = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else cast("Sequence[Mapping[str, str]]", prompt)
    )
    if template != HARMONY:
        # The text of an answer in a format is what its tokens spell, a space at its beginning included.
        return EncodedPrompt(render_chat(chat, tokenizer, template), template, answer is not None)
    # The model was trained with the day's date in front, as OpenAI's own template prints it.
    system = SystemContent(current_date=f"{date.today():%Y-%m-%d}", reasoning_effort=reasoning_effort or "medium")
    schema = None if answer is None else answer.schema
    formats = [] if schema is None else [ResponseFormat("answer", schema)]
    messages = conversation(chat, system=system, response_formats=formats)
    return EncodedPrompt(HarmonyFormat(tokenizer).render_for_completion(messages), template, False)


def message_borders(tokenizer: Tokenizer | None, prompt: EncodedPrompt) -> list[int]:
    """Offsets in a Harmony prompt where other conversations are likely to part from it: behind the system and the
    developer message, and before the last message.
    """
    if tokenizer is None or prompt.template != HARMONY:
        return []
    start = HarmonyFormat(tokenizer).start
    starts = [offset for offset, token in enumerate(prompt.tokens) if token == start]
    return sorted({*starts[1:3], *starts[-2:-1]})


def text_stream(tokenizer: Tokenizer | None, prompt: EncodedPrompt, stop: Sequence[str]) -> TextStream:
    """What makes text of the completion's tokens. Raises SettingError for an empty stop string."""
    if tokenizer is None:
        if stop:
            raise TokenizerError("Stop strings need a tokenizer, and this model has none: load it with tokenizer=...")
        return SilentStream()
    if prompt.template == HARMONY:
        return HarmonyStream(tokenizer, stop)
    return PlainStream(tokenizer, stop, prompt.continues_text)


def constraint_on(
    model: Model,
    tokenizer: Tokenizer | None,
    template: str,
    answer: AnswerFormat | None,
    tool_schemas: Mapping[str, Any],
    max_tokens: int,
) -> TokenConstraint | None:
    """What holds a completion to its formats, None if it has none. Raises SettingError or TokenizerError."""
    if answer is None and not tool_schemas:
        return None
    if tokenizer is None:
        raise TokenizerError(
            "An answer in a format needs a tokenizer, and this model has none: load it with tokenizer=..."
        )
    if template == HARMONY:
        calls = {name: answer_format(schema) for name, schema in tool_schemas.items() if schema is not None}
        checked = cast("dict[str, AnswerFormat]", calls)
        return HarmonyConstraint(HarmonyFormat(tokenizer), engine_of(tokenizer), answer, checked, max_tokens)
    if answer is None:
        raise SettingError(
            "tool_schemas are for gpt-oss's calls, and this model has no format for calls: leave them out."
        )
    return PlainConstraint(engine_of(tokenizer), answer, {*model.spec.eos_tokens, *tokenizer.eos_tokens}, max_tokens)


def usable_vocab_size(model: Model, tokenizer: Tokenizer | None) -> int:
    """Ids below this are tokens; rows of logits beyond are padding, and were never trained."""
    known = model.spec.usable_vocab_size
    return known if tokenizer is None else min(known, tokenizer.vocab_size)


class Clock:
    """Times and memory of one request."""

    def __init__(
        self, request: Request, num_cached_tokens: int, text: TextStream, held: Held, residency: Residency | None = None
    ) -> None:
        self._request, self._text, self._held = request, text, held
        self._num_cached_tokens = num_cached_tokens
        self._num_answer_tokens = 0
        self.speculation = Counts()
        self._started = self._first = self._last = time.perf_counter()
        self._num_tokens = 0
        self._residency = residency
        self._experts = [] if residency is None else [residency.statistics()]

    def token_arrived(self) -> None:
        self._last = time.perf_counter()
        if self._num_tokens == 0:
            self._first = self._last
            if self._residency is not None:
                self._experts.append(self._residency.statistics())
        self._num_tokens += 1

    def shown(self, piece: Piece) -> None:
        self._num_answer_tokens += piece.channel in (None, FINAL) and self._text.ended_in is None

    def statistics(self, finish_reason: str) -> Statistics:
        request, num_prompt_tokens = self._request, len(self._request.prompt_tokens)
        prefill, decode = self._first - self._started, self._last - self._first
        experts: dict[str, ExpertStatistics] = {}
        if self._residency is not None:
            start, first, last = *self._experts, self._residency.statistics()
            experts = {"prompt_experts": first.since(start), "answer_experts": last.since(first)}
        return Statistics(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=self._num_tokens,
            time_to_first_token=prefill,
            prefill_tps=(num_prompt_tokens - self._num_cached_tokens) / prefill if prefill else 0.0,
            decode_tps=(self._num_tokens - 1) / decode if decode else 0.0,
            peak_memory_bytes=self._held.peak_memory_bytes(),
            max_tokens=request.limit,
            reasoning_tokens=self._num_tokens - self._num_answer_tokens,
            no_answer=no_answer(request, self._text.ended_in, finish_reason, self._num_tokens),
            notes=tuple(self._held.notes),
            cached_tokens=self._num_cached_tokens,
            drafted_tokens=self.speculation.drafted,
            accepted_tokens=self.speculation.accepted,
            speculation_speedup=self.speculation.speedup,
            **experts,
        )


def no_answer(request: Request, ended_in: str | None, finish_reason: str, num_tokens: int) -> str | None:
    """Why there is no answer, and what to change, in a sentence; None where there is one."""
    if ended_in is None:
        return None
    if ended_in != REASONING and finish_reason == "stop":
        return f"The model called {ended_in} and wrote no answer: om.Chat runs tools, om.stream_generate shows calls."
    what = "Reasoning" if ended_in == REASONING else f"A call of {ended_in}"
    if finish_reason == "stop":
        return f"The model ended after {num_tokens:,} tokens of reasoning, without an answer: ask again or otherwise."
    remedy = {
        "max_tokens": f"raise max_tokens above {request.limit}, or leave it out",
        "context": "shorten the prompt, or load the model with a larger context_length",
        "memory": "load the model with a larger memory_limit, or shorten the prompt",
    }[request.limited_by]
    limit = {"max_tokens": "", "context": " that the context had room for", "memory": " that the memory had room for"}
    return (
        f"{what} used up all {num_tokens:,} tokens{limit[request.limited_by]}, and no answer came: {remedy}; or let it "
        'think less with reasoning_effort="low".'
    )


def _checked_tokens(model: Model, prompt: Sequence[int]) -> list[int]:
    if not prompt:
        raise PromptError("The prompt is empty: give at least one token.")
    if all(type(token) is int for token in prompt) and min(prompt) >= 0 and max(prompt) < model.spec.vocab_size:
        return list(prompt)
    tokens = []
    for token in prompt:
        try:
            number = -1 if isinstance(token, bool) else operator.index(token)
        except TypeError:
            number = -1
        if not 0 <= number < model.spec.vocab_size:
            raise PromptError(
                f"The prompt has token {token!r}; the model's tokens are 0 to {model.spec.vocab_size - 1}."
            )
        tokens.append(number)
    return tokens


def _checked_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(each, str) for each in stops):
        raise SettingError(f"stop is {stop!r}: give a string, or a list of strings.")
    return tuple(stops)


def _check_finite(logits: mx.array) -> None:
    if not mx.all(mx.isfinite(logits)).item():
        raise CheckpointError(
            "The model's logits are not finite numbers: its weights are damaged, or their type has too small a range "
            '(OpenELM-3B overflows in float16): load it with dtype="bfloat16".'
        )


def _check_whole(name: str, value: int, low: int = 1, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f"at least {low}" + ("" if high is None else f" and at most {high}")
        raise SettingError(f"{name} is {value!r}: it must be a whole number, {limits}.")


class _CallableModule(types.ModuleType):
    """`openelm_mlx.generate` is this module and the function at once, so no import order makes one hide the other."""

    __signature__ = inspect.signature(generate)

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
