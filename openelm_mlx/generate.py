"""The whole way from a prompt to text: prefill, decode_step, stream_generate, generate.

Also a command, `python -m openelm_mlx.generate`, and itself callable: `openelm_mlx.generate(model, tokenizer, prompt)` is
`openelm_mlx.generate.generate(...)`, whichever of the two a program imported first.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before anything else is imported: --help is instant, and a machine without MLX gets a sentence, not a traceback.
    from openelm_mlx.commands import main

    sys.exit(main(["generate", *sys.argv[1:]]))

import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from .decoding.sampling import Sampler, SamplingParams, log_probabilities
from .errors import CheckpointError, PromptError, SettingError, TokenizerError
from .loading import NO_TOKENIZER
from .models.cache import Cache
from .text.chat import PLAIN, render_chat
from .text.stops import StopStrings
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .models import Model

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

# Freed buffers are handed back this often; MLX keeps them otherwise.
CLEAR_CACHE_EVERY = 256


def generate(model: Model, tokenizer: Tokenizer | None, prompt: Prompt, **options: Any) -> str:
    """The model's answer to `prompt`, as one string. Takes the options of `stream_generate`."""
    return "".join(chunk.text for chunk in stream_generate(model, tokenizer, prompt, **options))


def stream_generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    sampling: SamplingParams | None = None,
    stop: str | Sequence[str] = (),
    logprobs: int | None = None,
    raw: bool = False,
    chat_template: str | None = None,
    sliding_window: int | None = None,
    prefill_chunk: int = 512,
) -> Iterator[Chunk]:
    """The model's answer to `prompt`, a chunk for each token; the last chunk has a finish_reason and the statistics.

    prompt: a string (through the chat template where the model has one; raw=True takes it as it is), token ids, or chat
    messages like {"role": "user", "content": "..."}. max_tokens: clipped to the room the context leaves. stop: strings
    that end the answer and are not part of it. logprobs: report each token's log-probability and this many of the
    likeliest alternatives. sliding_window: keep only this many tokens of context, and so go on past its end.
    prefill_chunk: tokens of the prompt in flight at once.

    Everything that can be wrong with the request is raised here, before any work: PromptError, SettingError,
    TokenizerError.
    """
    prompt_tokens, continues_text = encode_prompt(model, tokenizer, prompt, raw, chat_template)
    request = Request(
        prompt_tokens=prompt_tokens,
        continues_text=continues_text,
        max_tokens=max_tokens,
        sampling=sampling or SamplingParams(),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=logprobs,
        sliding_window=sliding_window,
        prefill_chunk=prefill_chunk,
    )
    return _stream(model, tokenizer, request.checked(model, tokenizer))


def _stream(model: Model, tokenizer: Tokenizer | None, request: Request) -> Iterator[Chunk]:
    clock = Clock(len(request.prompt_tokens))
    eos_tokens = model.spec.eos_tokens if tokenizer is None else tokenizer.eos_tokens
    text = TextStream(tokenizer, request.stop, request.continues_text)
    sampler = Sampler(
        request.sampling, model.spec.vocab_size, usable_vocab_size(model, tokenizer), request.prompt_tokens
    )
    cache = model.make_cache(window=request.sliding_window)
    logits = prefill(model, request.prompt_tokens, cache, request.prefill_chunk)
    _check_finite(logits)
    choice = choose(sampler, logits, request.logprobs)
    for count in range(1, request.max_tokens + 1):
        upcoming = None
        if count < request.max_tokens:
            # Dispatched before this token is read: the device works while the host makes text of it.
            upcoming = choose(sampler, decode_step(model, choice.token, cache), request.logprobs)
        token = cast(int, choice.token.item())
        clock.token_arrived()
        piece, finish_reason = "", cast("str | None", "stop")
        if token not in eos_tokens:
            piece, stopped = text.add(token)
            finish_reason = "stop" if stopped else None if upcoming is not None else "length"
        if finish_reason is not None:
            yield choice.chunk(piece + text.finish(), token, finish_reason, clock.statistics())
            return
        yield choice.chunk(piece, token)
        if count % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        assert upcoming is not None
        choice = upcoming


def prefill(model: Model, tokens: Sequence[int], cache: Cache, chunk_length: int) -> mx.array:
    """Run a prompt through the model and return the logits of its last token, (V,).

    tokens: not in the cache yet. At most `chunk_length` of them are in flight at once, and the output head runs once.
    """
    h = None
    for start in range(0, len(tokens), chunk_length):
        chunk = mx.array(list(tokens[start : start + chunk_length]))[None]
        h = model.run_layers(model.embed(chunk), cache)
        mx.eval([layer.buffers for layer in cache])  # bounds what is in flight to one chunk
        mx.clear_cache()
    assert h is not None
    return model.head(h[:, -1:])[0, -1]


def decode_step(model: Model, token: mx.array, cache: Cache) -> mx.array:
    """The logits (V,) that follow one more `token` (a scalar array, which need not be known to the host yet)."""
    return model(token[None, None], cache=cache)[0, -1]


def choose(sampler: Sampler, logits: mx.array, num_logprobs: int | None) -> Choice:
    """Choose the next token from `logits` (V,) and start computing it."""
    token = sampler(logits)
    choice = Choice(token)
    if num_logprobs is not None:
        choice = Choice(token, *log_probabilities(logits, token, num_logprobs))
    mx.async_eval([array for array in (choice.token, choice.logprob, choice.top) if array is not None])
    return choice


@dataclass(frozen=True)
class Statistics:
    """What a request took. Rates are tokens a second, times seconds; the peak is the process's, as MLX counts it."""

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    prefill_tps: float
    decode_tps: float
    peak_memory_bytes: int


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


@dataclass(frozen=True)
class Choice:
    """A chosen token that may still be being computed, with its log-probabilities when asked for."""

    token: mx.array
    logprob: mx.array | None = None
    top: mx.array | None = None
    top_logprobs: mx.array | None = None

    def chunk(
        self, text: str, token: int, finish_reason: str | None = None, statistics: Statistics | None = None
    ) -> Chunk:
        chunk = Chunk(text, token, finish_reason, statistics=statistics)
        if self.logprob is None or self.top is None or self.top_logprobs is None:
            return chunk
        tokens, logprobs = cast("list[int]", self.top.tolist()), cast("list[float]", self.top_logprobs.tolist())
        top = dict(zip(tokens, logprobs, strict=True))
        return replace(chunk, logprob=cast(float, self.logprob.item()), top_logprobs=top)


@dataclass(frozen=True)
class Request:
    """What `stream_generate` was asked for, checked before anything runs."""

    prompt_tokens: Sequence[int]
    continues_text: bool
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    logprobs: int | None
    sliding_window: int | None
    prefill_chunk: int

    def checked(self, model: Model, tokenizer: Tokenizer | None) -> Request:
        """The request with max_tokens clipped to the context. Raises SettingError or PromptError."""
        _check_whole("max_tokens", self.max_tokens)
        _check_whole("prefill_chunk", self.prefill_chunk)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, low=0, high=usable_vocab_size(model, tokenizer))
        if self.stop and tokenizer is None:
            raise TokenizerError("Stop strings need a tokenizer, and this model has none: load it with tokenizer=...")
        if self.sliding_window is not None:
            _check_whole("sliding_window", self.sliding_window, high=model.context_length)
            return self
        return replace(self, max_tokens=min(self.max_tokens, room_after(model, len(self.prompt_tokens))))


def room_after(model: Model, num_prompt_tokens: int) -> int:
    """How many tokens fit into the model's context after a prompt. Raises PromptError when none does."""
    room = model.context_length - num_prompt_tokens
    if room < 1:
        raise PromptError(
            f"The prompt has {num_prompt_tokens:,} tokens and the context holds {model.context_length:,}, so there is no "
            "room for an answer: shorten the prompt, or ask for a sliding window (sliding_window=, --sliding-window)."
        )
    return room


def encode_prompt(
    model: Model, tokenizer: Tokenizer | None, prompt: Prompt, raw: bool = False, chat_template: str | None = None
) -> tuple[list[int], bool]:
    """The tokens of a prompt in any of its forms, and whether the answer continues the prompt's own text.

    Raises PromptError when the prompt is empty or has ids that the model lacks, TokenizerError when text needs a tokenizer.
    """
    if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
        return _checked_tokens(model, cast("Sequence[int]", prompt)), True
    if tokenizer is None:
        raise TokenizerError(NO_TOKENIZER)
    if isinstance(prompt, str) and not prompt.strip():
        raise PromptError("The prompt is empty: give some text.")
    template = chat_template or tokenizer.chat_template
    if not isinstance(prompt, str):
        return render_chat(cast("Sequence[Mapping[str, str]]", prompt), tokenizer, template), False
    if raw or template == PLAIN:
        return tokenizer.encode_prompt(prompt), True
    return render_chat([{"role": "user", "content": prompt}], tokenizer, template), False


def usable_vocab_size(model: Model, tokenizer: Tokenizer | None) -> int:
    """Ids below this are tokens; rows of logits beyond are padding, and were never trained."""
    known = model.spec.usable_vocab_size
    return known if tokenizer is None else min(known, tokenizer.vocab_size)


class TextStream:
    """Tokens in, text out: whole characters only, and never a stop string nor what may become one."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], continues_text: bool) -> None:
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer(continuation=continues_text)
        self._stops = StopStrings(stop)
        self._stopped = False

    def add(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string ended it. Without a tokenizer there is no text."""
        if self._detokenizer is None:
            return "", False
        text, self._stopped = self._stops.feed(self._detokenizer.add(token))
        return text, self._stopped

    def finish(self) -> str:
        """What was held back."""
        if self._detokenizer is None or self._stopped:
            return ""
        text, stopped = self._stops.feed(self._detokenizer.finish())
        return text if stopped else text + self._stops.finish()


class Clock:
    """Times of one request."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._started = self._first = self._last = time.perf_counter()
        self._num_tokens = 0

    def token_arrived(self) -> None:
        self._last = time.perf_counter()
        if self._num_tokens == 0:
            self._first = self._last
        self._num_tokens += 1

    def statistics(self) -> Statistics:
        prefill, decode = self._first - self._started, self._last - self._first
        return Statistics(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_tokens,
            time_to_first_token=prefill,
            prefill_tps=self._num_prompt_tokens / prefill if prefill else 0.0,
            decode_tps=(self._num_tokens - 1) / decode if decode else 0.0,
            peak_memory_bytes=mx.get_peak_memory(),
        )


def _checked_tokens(model: Model, prompt: Sequence[int]) -> list[int]:
    tokens = [int(token) for token in prompt]
    if not tokens:
        raise PromptError("The prompt is empty: give at least one token.")
    for token in tokens:
        if not 0 <= token < model.spec.vocab_size:
            raise PromptError(f"The prompt has token {token}; the model's tokens are 0 to {model.spec.vocab_size - 1}.")
    return tokens


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

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
