"""Requests to models: each is prepared in a thread, answered by the model's engine, and read as a stream of parts."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, final

from ..decoding.grammar import AnswerFormat, answer_format
from ..engine.calling import NO_ARGUMENTS, NONE, calling_of, recipients_of
from ..engine.handle import Handle, something_came
from ..engine.prompt import Prompt, encode_prompt
from ..engine.sequence import Chunk
from ..errors import MemoryLimitError, PromptError, SettingError, UserError
from ..text.chat import HARMONY, PLAIN
from ..text.conversation import FUNCTIONS, Message
from ..text.harmony import HarmonyFormat
from ..text.schema import Tool
from .failures import RETRY_AFTER, ApiError, api_error
from .forgetting import most_prompt_tokens, shortened
from .generation import Generation, GenerationRequest, NamedTool, Progress, PromptText
from .log import log
from .parts import Part, Usage, whole_usage
from .reading import AnswerReader, TokenTexts

if TYPE_CHECKING:
    from ..decoding.prefix_cache import PrefixCache
    from ..engine.many import Engine
    from ..models import Model
    from ..text.tokenizer import Tokenizer

T = TypeVar("T")

# Requests that are prepared at once: without schemas, and with them, so that nobody else waits for a schema.
MOST_PREPARED, MOST_COMPILED = 4, 2
# A schema in characters of JSON, and the seconds that a request with schemas may take to prepare.
LONGEST_SCHEMA, LONGEST_COMPILATION = 64_000, 60.0


class ModelLease(Protocol):
    """A loaded model, which stays loaded until it is released; the registry's."""

    @property
    def name(self) -> str:
        """The model's own, whatever a request called it."""

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that a request means; see `Lease`."""

    @property
    def engine(self) -> Engine:
        """That answers its requests."""

    @property
    def model(self) -> Model:
        """The engine's."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's."""

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """Of all of its requests."""

    def release(self) -> None:
        """It is not used any more. May be called again."""


class Models(Protocol):
    """Where models come from; the registry."""

    async def acquire(self, name: str) -> ModelLease:
        """The model of that name, in memory. Raises ApiError."""


@final
class ModelGenerations:
    """Answers by the models of a registry, each through its engine.

    answered: told of each request whose answers are finished, with the model's name, its usage, and the seconds that the
    first part of them took.
    """

    def __init__(self, models: Models, answered: Callable[[str, Usage, float], None] | None = None) -> None:
        self._models, self._answered = models, answered
        # Encoding a prompt and compiling a schema take a while, and the loop has others to serve.
        self._plain = ThreadPoolExecutor(MOST_PREPARED, thread_name_prefix="openelm_mlx request")
        self._with_schemas = ThreadPoolExecutor(MOST_COMPILED, thread_name_prefix="openelm_mlx schema")

    async def start(self, request: GenerationRequest) -> Generation:
        """See `Generations`."""
        asked = time.perf_counter()
        lease = await self._models.acquire(request.model)
        try:
            handles, recipients = await self._in_thread(_submitted, lease, request)
            return _Running(lease, request, handles, recipients, asked, self._answered)
        except BaseException:
            lease.release()
            raise

    async def count_tokens(self, request: GenerationRequest) -> int:
        """See `Generations`."""
        lease = await self._models.acquire(request.model)
        try:
            return await self._in_thread(_count, lease, request)
        finally:
            lease.release()

    def close(self) -> None:
        """No more requests."""
        for pool in (self._plain, self._with_schemas):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(
        self, call: Callable[[ModelLease, GenerationRequest], T], lease: ModelLease, request: GenerationRequest
    ) -> T:
        is_new = any(f"{FUNCTIONS}.{tool.name}" not in request.tool_formats for tool in request.tools)
        has_schemas = is_new or request.answer_schema is not None
        pool, seconds = (self._with_schemas, LONGEST_COMPILATION) if has_schemas else (self._plain, None)
        working = asyncio.get_running_loop().run_in_executor(pool, call, lease, request)
        try:
            return await asyncio.wait_for(working, seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                400,
                f"The request's schemas were not ready within {seconds:.0f} seconds: make them smaller.",
                param="response_format" if request.answer_schema is not None else "tools",
                code="schema_too_large",
            ) from None
        except UserError as error:
            raise api_error(error, _param_of(error, request)) from error


@final
class _Running(Generation):
    """Answers that an engine writes, one a handle."""

    def __init__(
        self,
        lease: ModelLease,
        request: GenerationRequest,
        handles: list[Handle],
        recipients: Collection[str],
        asked: float,
        answered: Callable[[str, Usage, float], None] | None,
    ) -> None:
        self._asked, self._answered = asked, answered
        self._first: float | None = None
        self.prompt_tokens = sum(each.num_prompt_tokens for each in handles[:: request.n])
        self._lease, self._handles, self._engine, self._n = lease, handles, lease.engine, request.n
        self._request = request
        self._texts = texts = TokenTexts(lease.tokenizer)
        has_channels = is_harmony(lease) and request.messages is not None
        self._tokens: list[int] | None = [] if has_channels and len(handles) == 1 else None
        self._readers = [
            AnswerReader(index, recipients, texts, has_channels, len(request.stop)) for index in range(len(handles))
        ]

    async def batches(self, every: float | None = None) -> AsyncIterator[list[Part]]:
        while True:
            parts: list[Part] = []
            running = []
            for handle, reader in zip(self._handles, self._readers, strict=True):
                if not reader.is_finished:
                    parts += reader.read(self._taken(handle))
                if not reader.is_finished:
                    running.append(handle)
            if parts and self._first is None:
                self._first = time.perf_counter() - self._asked
            if not running:
                self._count()
            if parts:
                yield parts
            if not running:
                return
            if any(handle.is_over for handle in running):  # cancelled from elsewhere
                raise ApiError(503, "The request was given up.", "server_error", retry_after=RETRY_AFTER)
            if not parts and not await something_came(running, every):
                yield []

    def _count(self) -> None:
        if self._answered is not None:
            usage = whole_usage([reader.usage for reader in self._readers], self._n)
            self._answered(self._lease.name, usage, self._first or 0.0)

    def _taken(self, handle: Handle) -> list[Chunk]:
        try:
            chunks = handle.take()
            if self._tokens is not None:
                self._tokens += [chunk.token for chunk in chunks]
            return chunks
        except MemoryLimitError as error:  # it fitted when it was submitted
            raise ApiError(
                503, str(error), "server_error", code="memory_limit_exceeded", retry_after=RETRY_AFTER
            ) from error
        except Exception as error:
            if not isinstance(error, UserError):
                log.error("a request failed", exc_info=error)
            raise api_error(error) from error

    def progress(self) -> Progress:
        first = self._handles[0]
        done = min(sum(each.num_prompt_tokens_done for each in self._handles[:: self._n]), self.prompt_tokens)
        return Progress(self._engine.place_in_queue(first), done, self.prompt_tokens)

    def prompt_texts(self) -> list[PromptText]:
        tokenizer = self._lease.tokenizer
        assert tokenizer is not None
        found = []
        for prompt, handle in zip(self._request.prompts, self._handles[:: self._n], strict=True):
            text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt, continuation=True)
            tokens = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
            texts, scores = self._texts, handle.prompt_logprobs
            scored = tuple(texts.scored(token, *each) for token, each in zip(tokens[1:], scores, strict=False))
            is_begin = isinstance(prompt, str) and tokens[:1] == [tokenizer.bos_token]
            first = None if is_begin else texts.scored(tokens[0], 0.0).token
            found.append(PromptText(text, first, scored))
        return found

    def written(self) -> list[Message]:
        tokenizer = self._lease.tokenizer
        assert tokenizer is not None
        return HarmonyFormat(tokenizer).parse(self._tokens or ())

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.cancel()
        self._lease.release()


# Settings whose errors come from the engine, and begin with their name.
_SETTINGS = ("max_tokens", "stop", "logit_bias", "logprobs", "tool_choice", "tools", "reasoning_effort")


def _param_of(error: UserError, request: GenerationRequest) -> str | None:
    """The field that an error of the engine is about, in the words of Chat Completions."""
    if isinstance(error, PromptError):
        return "prompt" if request.messages is None else "messages"
    first = str(error).split(maxsplit=1)[0]
    if first in _SETTINGS:
        return first
    return None


def is_harmony(lease: ModelLease) -> bool:
    """Whether a model writes gpt-oss's format."""
    return lease.tokenizer is not None and lease.tokenizer.chat_template == HARMONY


# --- In a thread of the pool ------------------------------------------------------------------------------------------


def _submitted(lease: ModelLease, request: GenerationRequest) -> tuple[list[Handle], Collection[str]]:
    """The engine's requests, and the functions that their answers may call."""
    options, recipients = _options(lease, request)
    request = _fitting(lease, request)
    options["group"] = object()  # a list of prompts is not before all other clients
    handles: list[Handle] = []
    for prompt in _prompts(lease, request):
        handles += _submit(lease, prompt, request.n, options)
    return handles, recipients


def _submit(lease: ModelLease, prompt: Prompt, count: int, options: Mapping[str, Any]) -> list[Handle]:
    """Requests of one prompt. max_tokens is cut to what memory holds: clients send 32,000 whatever the machine is."""
    try:
        return lease.engine.submit_several(prompt, count, **options)
    except MemoryLimitError:
        if options["max_tokens"] is None:
            raise
        return lease.engine.submit_several(prompt, count, **{**options, "max_tokens": None})


def _options(lease: ModelLease, request: GenerationRequest) -> tuple[dict[str, Any], Collection[str]]:
    """The options of an engine's request, and the functions that its answer may call."""
    answer = _answer_format(request)
    options: dict[str, Any] = {
        "max_tokens": request.max_tokens, "sampling": request.sampling, "stop": request.stop,
        "logprobs": request.logprobs, "schema": answer, "prefix_cache": lease.prefix_cache,
        "raw": request.messages is None, "prompt_logprobs": request.prompt_logprobs, "adapter": lease.adapter,
    }  # fmt: skip
    if request.messages is not None and lease.tokenizer is not None and lease.tokenizer.chat_template == PLAIN:
        raise ApiError(
            400,
            f"The model {request.model} has no chat template: it goes on with text, so ask for /v1/completions, or use its "
            "Instruct model.",
            param="model",
            code="unsupported_model",
        )
    if not is_harmony(lease):
        if (request.tools or request.built_in) and request.tool_choice != NONE:
            raise ApiError(
                400,
                f"The model {request.model} was not trained to call functions, so tools cannot be used with it: leave "
                "tools out, or ask a gpt-oss model.",
                param="tools",
                code="unsupported_parameter",
            )
        if request.reasoning_effort not in (None, "none"):
            raise ApiError(
                400,
                f"The model {request.model} does not reason, so it has no reasoning effort: leave it out.",
                param="reasoning_effort",
                code="unsupported_parameter",
            )
        return options, ()
    options["reasoning_effort"] = None if request.messages is None else request.reasoning_effort
    if not request.tools and not request.built_in:
        options["tool_choice"] = NONE if answer is not None and request.messages is not None else None
        return options, ()
    options["tools"] = (*request.tools, *request.built_in)
    choice = request.tool_choice
    options["tool_choice"] = f"{FUNCTIONS}.{choice.name}" if isinstance(choice, NamedTool) else choice
    functions = {f"{FUNCTIONS}.{tool.name}": _arguments(tool, request) for tool in request.tools}
    options["tool_schemas"] = {**functions, **request.tool_formats}
    return options, () if choice == NONE else recipients_of(request.tools, request.built_in)


def _arguments(tool: Tool, request: GenerationRequest) -> AnswerFormat:
    known = request.tool_formats.get(f"{FUNCTIONS}.{tool.name}")
    if known is not None:
        return known
    if tool.parameters is None:
        return schema_format(NO_ARGUMENTS)
    try:
        return schema_format(tool.parameters)
    except SettingError as error:
        if tool.name not in request.lenient_tools:
            raise api_error(error, "tools") from error
        return schema_format({"type": "object"})


def _answer_format(request: GenerationRequest) -> AnswerFormat | None:
    if request.answer_schema is None:
        return None
    try:
        return schema_format(request.answer_schema.schema)
    except SettingError as error:
        raise api_error(error, "response_format") from error


def schema_format(schema: Mapping[str, Any]) -> AnswerFormat:
    """A schema for the engine; those used last are kept, since clients send theirs with every request."""
    text = json.dumps(schema)
    if len(text) > LONGEST_SCHEMA:
        raise SettingError(
            f"The schema has {len(text):,} characters, and at most {LONGEST_SCHEMA:,} are taken: make it smaller."
        )
    return _compiled(text)


@functools.lru_cache(maxsize=256)
def _compiled(text: str) -> AnswerFormat:
    found = answer_format(json.loads(text))
    assert found is not None
    return found


def _prompts(lease: ModelLease, request: GenerationRequest) -> Sequence[Any]:
    if request.messages is None:
        return request.prompts
    if is_harmony(lease):
        return [request.messages]
    roles = {"developer": "system"}  # OpenELM's template has one name for both
    dicts = [each for each in request.messages if isinstance(each, Mapping)]
    return [[{**each, "role": roles.get(each.get("role", ""), each.get("role"))} for each in dicts]]


def _fitting(lease: ModelLease, request: GenerationRequest) -> GenerationRequest:
    """The request, without its oldest turns where they are too many and it allows that."""
    if request.messages is None or not request.may_forget:
        return request
    most = most_prompt_tokens(lease.model.context_length, request.max_tokens)
    kept = shortened(request.messages, most, lambda messages: _tokens(lease, replace(request, messages=messages)))
    return replace(request, messages=kept)


def _count(lease: ModelLease, request: GenerationRequest) -> int:
    return _tokens(lease, _fitting(lease, request))


def _tokens(lease: ModelLease, request: GenerationRequest) -> int:
    answer = _answer_format(request)
    calling = calling_of((*request.tools, *request.built_in), NONE if request.tool_choice == NONE else None)
    effort = request.reasoning_effort if is_harmony(lease) else None
    raw = request.messages is None
    return sum(
        len(encode_prompt(lease.model, lease.tokenizer, prompt, raw, None, effort, answer, calling).tokens)
        for prompt in _prompts(lease, request)
    )
