"""One request alone: checked by `new_sequence`, computed by `run`."""

from __future__ import annotations

from collections import abc
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..arguments import FLAG, NAME, check_kind
from ..decoding.arguments import check_model, check_prefix_cache
from ..decoding.budget import Budget, chunk_of_plan, keeping_to_plan
from ..decoding.compiled_step import make_step
from ..decoding.drafts import Drafts
from ..decoding.grammar import answer_format
from ..decoding.prefill import prefill
from ..decoding.prefix_cache import PrefixCache, Turn
from ..decoding.sampling import Sampler, SamplingParams
from ..decoding.speculative import Speculative
from ..decoding.step import Step
from ..decoding.tokens import Choice, TokenSource, constrained_source, drive, plain_source
from ..errors import CheckpointError, PromptError, SettingError, TokenizerError
from ..memory.limits import LimitsLease
from ..runtime import runtime_of
from ..text.chat import HARMONY
from ..text.streams import HarmonyStream, PlainStream, SilentStream, TextStream
from ..text.tokenizer import Tokenizer
from .calling import calling_of, rule_of
from .prompt import NO_REASONING, EncodedPrompt, Prompt, encode_prompt, message_borders
from .request import Memory, Request, adapter_id, checked_stops, constraint_on, usable_vocab_size
from .sequence import Chunk, Sequence
from .statistics import Clock

if TYPE_CHECKING:
    from ..models import Model

# MLX's cache of freed buffers is cleared once every this many tokens.
CLEAR_CACHE_EVERY = 256


def new_sequence(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt | None,
    *,
    max_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: str | abc.Sequence[str] = (),
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
    tools: abc.Sequence[Any] = (),
    tool_choice: str | None = None,
    prefix_cache: PrefixCache | None = None,
    draft: Drafts | None = None,
    adapter: str | None = None,
    memory: Memory | None = None,
) -> Sequence:
    """The sequence of a request, before any token. Options and errors are those of `stream_generate`.

    memory: see `Request.checked`.
    """
    check_model(model, tokenizer)
    check_prefix_cache(prefix_cache)
    check_kind("raw", raw, FLAG)
    check_kind("chat_template", chat_template, NAME, may_be_none=True)
    check_kind("reasoning_effort", reasoning_effort, NAME, may_be_none=True)
    check_kind("adapter", adapter, NAME, may_be_none=True)
    stops = checked_stops(stop)
    if prompt is None:
        raise PromptError("There is no prompt: give text, a list of token ids, or chat messages.")
    if not isinstance(tool_schemas, (Mapping, type(None))):
        raise SettingError(
            f"tool_schemas is a {type(tool_schemas).__name__}: give a dictionary of name to JSON Schema."
        )
    if not isinstance(sampling, (SamplingParams, type(None))):
        raise SettingError(f"sampling is a {type(sampling).__name__}: give om.SamplingParams(temperature=0.7, ...).")
    answer = answer_format(schema, regex, grammar)
    calling = calling_of(tools, tool_choice)
    encoded = encode_prompt(model, tokenizer, prompt, raw, chat_template, reasoning_effort, answer, calling)
    schemas: Mapping[str, Any] = (tool_schemas or {}) if calling is None else calling.schemas(tool_schemas)
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
        notes=() if answer is None else answer.notes,
        ends_by_itself=encoded.template == HARMONY,
    ).checked(model, tokenizer, memory)
    rule = None
    if encoded.template == HARMONY:
        rule = rule_of(calling, tool_choice, answer is not None, reasoning_effort != NO_REASONING)
    constraint = constraint_on(
        model, tokenizer, encoded.template, answer, schemas, request.limit, rule, encoded.channel
    )
    request = replace(request, adapter=adapter_id(model, adapter), constraint=constraint)
    end_tokens = {*model.spec.eos_tokens, *(() if tokenizer is None else tokenizer.eos_tokens)}
    return Sequence(request, text_stream(tokenizer, encoded, stops), end_tokens)


def run(model: Model, tokenizer: Tokenizer | None, sequence: Sequence) -> Iterator[Chunk]:
    """The chunks of a prepared sequence, one for each token, until it ends or the caller stops."""
    adapters = model.adapters
    in_use = adapters.using(adapters.select([sequence.request.adapter]))
    chunks = _run(model, tokenizer, sequence)
    while True:
        with in_use:  # not while the caller has a chunk
            chunk = next(chunks, None)
        if chunk is None:
            return
        try:
            yield chunk
        except BaseException as error:  # the caller stops, or was stopped, here
            with in_use:
                chunks.throw(error)
            raise


def _run(model: Model, tokenizer: Tokenizer | None, sequence: Sequence) -> Generator[Chunk, None, None]:
    turn = sequence.request.begin_turn(model)
    with keeping_to_plan(model, turn.cache) as (budget, lease), turn.kept():
        yield from _answer(model, tokenizer, sequence, turn, budget, lease)


def text_stream(tokenizer: Tokenizer | None, prompt: EncodedPrompt, stop: abc.Sequence[str]) -> TextStream:
    """The stream that turns the completion's tokens into text. Raises SettingError for an empty stop string."""
    if tokenizer is None:
        if stop:
            raise TokenizerError("Stop strings need a tokenizer, and this model has none: load it with tokenizer=...")
        return SilentStream()
    if prompt.template == HARMONY:
        return HarmonyStream(tokenizer, stop, prompt.channel)
    return PlainStream(tokenizer, stop, prompt.continues_text)


def _answer(
    model: Model, tokenizer: Tokenizer | None, sequence: Sequence, turn: Turn, budget: Budget, lease: LimitsLease
) -> Iterator[Chunk]:
    request = sequence.request
    sequence.clock = Clock(request, turn.num_reused, lease, runtime_of(model).residency)
    sampler = Sampler(
        request.sampling, model.spec.vocab_size, usable_vocab_size(model, tokenizer), request.prompt_tokens
    )
    group = runtime_of(model).group
    if group is not None:
        sampler.agreed, group.is_computing = group.first, True
    chunk_length = request.prefill_chunk or chunk_of_plan(model)
    at_border = None if request.prefix_cache is None else turn.at_border
    logits = prefill(model, turn.new_tokens, turn.cache, chunk_length, budget, stops=turn.stops, at_border=at_border)
    _check_finite(logits)
    choices = _choices(sequence, model, make_step(model, turn.cache), sampler, logits)
    for count, choice in enumerate(choices, 1):
        token = choice.item()
        turn.tokens.append(token)
        chunk = sequence.accept(token, *choice.logprob_values())
        if chunk.finish_reason is not None and group is not None:
            group.exchange()  # what all of them have begun of the next token is done then, and one of them may end
            group.is_computing = False
        if group is not None:
            group.since = None  # whatever the caller does with the chunk takes as long as it takes
        yield chunk
        if chunk.finish_reason is not None:
            return
        if count % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        budget.before_tokens(count, request.limit)


def _choices(sequence: Sequence, model: Model, step: Step, sampler: Sampler, logits: mx.array) -> Iterator[Choice]:
    """The tokens of the answer, by plain or speculative decoding."""
    return drive(step, source_of(model, sequence, step, sampler, logits))


def source_of(
    model: Model,
    sequence: Sequence,
    step: Step,
    sampler: Sampler,
    logits: mx.array,
    may_guess: abc.Callable[[], bool] | None = None,
) -> TokenSource:
    """Where the answer's tokens come from, the first of them chosen from `logits` (V,). may_guess: see `Speculative`."""
    request, clock = sequence.request, sequence.clock
    max_tokens, num_logprobs, constraint = request.limit, request.logprobs, request.constraint
    if request.draft is not None:
        draft, prompt = request.draft, request.prompt_tokens
        guessing = Speculative(
            model, step, sampler, prompt, draft.begin(model), draft.num_draft_tokens, num_logprobs, constraint,
            history=draft.history, may_guess=may_guess,
        )  # fmt: skip
        if clock is not None:
            clock.speculation = guessing.gain.counts
        return guessing.source(logits, max_tokens)
    if constraint is not None:
        return constrained_source(step, sampler, logits, max_tokens, constraint, num_logprobs)
    return plain_source(step, sampler, logits, max_tokens, num_logprobs)


def _check_finite(logits: mx.array) -> None:
    if not mx.all(mx.isfinite(logits)).item():
        raise not_finite()


def not_finite() -> CheckpointError:
    """The error of a model whose logits are not numbers."""
    return CheckpointError(
        "The model's logits are not finite numbers: its weights are damaged, or their type has too small a range "
        '(OpenELM-3B overflows in float16): load it with dtype="bfloat16".'
    )
