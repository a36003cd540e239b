"""Answers in which tools of this machine run: what `serve --tools` puts between the APIs and the models.

gpt-oss is told of the tools beside those of the request. When it calls one, the call is held back, the tool runs in a
thread, and the model goes on in the same answer, which the client sees as one. What a tool was asked, and what it said, is
a part of the reasoning, a short line each: so every client shows it, and none takes it for a call of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

from ..conversation.history import result_of, without_old_results
from ..text.conversation import Message
from ..text.unicode import whole_characters
from .answering import ModelLease, Models, is_harmony
from .exchanges import Exchange, Exchanges
from .failures import ApiError
from .generation import Generation, GenerationRequest, Generations, Progress, PromptText
from .loading import in_thread
from .log import log
from .own_tools import OwnTools, Result, ToolsOfAnswer
from .parts import (
    Answer,
    AnswerBuilder,
    Finished,
    FinishReason,
    Item,
    ItemDone,
    ItemStarted,
    ItemText,
    Kind,
    Part,
    Usage,
)

# The part of the context that a tool's result may take.
_SHARE_OF_RESULT = 4
# The longest line that a call, or a result, is shown in.
_LONGEST_LINE = 300
_BETWEEN = "\n\n"
_NO_MORE = "[No more tools can be called in this answer: answer with what is known.]"


def may_run_tools(request: GenerationRequest) -> bool:
    """Whether tools of this machine may be added to a request: where the model is free to call them, in one answer."""
    return (
        request.messages is not None
        and request.tool_choice == "auto"
        and request.answer_schema is None
        and request.n == 1
        and request.logprobs is None
    )


@final
class ToolGenerations(Generations):
    """The answers of others, with tools. Requests that tools cannot be added to are passed on as they are."""

    def __init__(self, inner: Generations, models: Models, tools: OwnTools, most_rounds: int) -> None:
        self._inner, self._models, self._tools, self._most_rounds = inner, models, tools, most_rounds
        self._exchanges = Exchanges()
        self._told: set[str] = set()  # models of which it was said that they call no tools

    async def start(self, request: GenerationRequest) -> Generation:
        """See `Generations`."""
        if not may_run_tools(request):
            return await self._inner.start(request)
        # Held to the end, so that the model stays where it is while a tool runs.
        lease = await self._models.acquire(request.model)
        try:
            if is_harmony(lease):
                assert lease.tokenizer is not None
                added, names = await self._tools.added_to(self._completed(request), lease.tokenizer)
                generation = await self._inner.start(added)
                keep = partial(self._exchanges.keep, request.messages or ())
                return _Running(
                    self._inner, lease, self._tools, names, request, added, generation, self._most_rounds, keep
                )
            if lease.name not in self._told:
                self._told.add(lease.name)
                log.warning("%s was not trained to call functions: the server's tools are not used with it", lease.name)
        except BaseException:
            lease.release()
            raise
        lease.release()
        return await self._inner.start(request)

    async def count_tokens(self, request: GenerationRequest) -> int:
        """See `Generations`."""
        if may_run_tools(request):
            lease = await self._models.acquire(request.model)
            try:
                if is_harmony(lease):
                    assert lease.tokenizer is not None
                    request, _ = await self._tools.added_to(self._completed(request), lease.tokenizer)
            finally:
                lease.release()
        return await self._inner.count_tokens(request)

    def _completed(self, request: GenerationRequest) -> GenerationRequest:
        """With what its tools said before a call that the client answers now."""
        return replace(request, messages=self._exchanges.completed(request.messages or ()))


@final
class _Running(Generation):
    """One answer, of as many completions as the model calls tools, and one.

    names: of the tools that run here. request: as the client sent it. added: with the tools, and all that they said before.
    keep: remembers an answer that ends with a call of the client's.
    """

    def __init__(
        self,
        inner: Generations,
        lease: ModelLease,
        tools: OwnTools,
        names: frozenset[str],
        request: GenerationRequest,
        added: GenerationRequest,
        generation: Generation,
        most_rounds: int,
        keep: Callable[[Exchange], None],
    ) -> None:
        self._keep, self._shown = keep, ""
        self._inner, self._lease, self._names = inner, lease, names
        self._request, self._added, self._most_rounds = request, added, most_rounds
        self._generation = generation  # the latest
        self._is_left = False  # whether it has been
        self.prompt_tokens = generation.prompt_tokens
        most_tokens = lease.model.context_length // _SHARE_OF_RESULT
        self._tools = ToolsOfAnswer(tools, most_tokens, _counting(lease))
        self._before = added.messages or ()
        self._messages: list[Message] = []  # what has come after those
        self._usage: Usage | None = None
        self._num_rounds = 0
        self._calling: asyncio.Future[Result] | None = None
        self._starting: asyncio.Future[Generation] | None = None

    async def batches(self, every: float | None = None) -> AsyncIterator[list[Part]]:
        while True:
            completion = _Completion(self._names)
            silence = _Silence(every)
            async for parts in self._generation.batches(every):
                shown = completion.shown(parts)
                if shown or not parts or silence.is_long:
                    silence.ends()
                    yield shown
            answer = completion.answer
            self._usage = _sum(self._usage, answer.usage)
            calls = completion.calls
            has_room = self._room is None or self._room > 0
            self._shown += _text(answer, "reasoning")
            if not calls or not has_room:
                if answer.reason == "tool_calls" and not calls and self._messages:
                    said = [message for message in await self._written() if not message.is_call]
                    self._keep(Exchange(self._shown, [*self._messages, *said]))
                yield [self._last_part(answer, "length" if calls else answer.reason)]
                return
            self._num_rounds += 1
            written = await self._written()
            self._messages += written
            for call, message in zip(calls, (each for each in written if each.is_call), strict=False):
                async for parts in self._call(call, message, every):
                    yield parts
            if self._num_rounds == self._most_rounds:
                self._allow_no_more_calls()
            async for parts in self._go_on(every):
                yield parts
            if self._starting is None:
                yield [self._last_part(answer, "length")]
                return
            self._generation, self._starting = self._starting.result(), None
            self._is_left = False

    @property
    def _room(self) -> int | None:
        """How many tokens the answer may still have."""
        most, usage = self._request.max_tokens, self._usage
        return most if most is None or usage is None else most - usage.completion_tokens

    def _last_part(self, answer: Answer, reason: FinishReason) -> Finished:
        assert self._usage is not None
        return Finished(0, reason, answer.stop_string, self._usage)

    async def _written(self) -> list[Message]:
        """The completion as the model wrote it, so that the next prompt begins with the same tokens."""
        written = await in_thread(self._generation.written, uses_mlx=False)
        return [message for message in written if message.role == "assistant"]  # others are invented

    async def _call(self, call: Item, message: Message, every: float | None) -> AsyncIterator[list[Part]]:
        """Run a tool. What it was asked, and what it said, are shown; the model gets all of the latter."""
        assert call.name is not None
        asked = f"[{_line(f'{call.name} {call.text}')}]"
        yield [ItemStarted(0, "reasoning"), ItemText(0, asked)]
        self._calling = asyncio.ensure_future(self._tools.run(call.name, call.text))
        async for _ in _while_waiting(self._calling, every):
            yield []
        result = self._calling.result()
        said = f"\n[{_line(result.shown)}]"
        self._shown += asked + said
        yield [ItemText(0, said), ItemDone(0, asked + said)]
        self._messages.append(result_of(message, result.text))

    def _allow_no_more_calls(self) -> None:
        """The model has called tools often enough: it is told so, and has to answer, or call a function of the client's."""
        last = self._messages[-1]
        self._messages[-1] = replace(last, content=f"{last.text}\n{_NO_MORE}")
        self._names = frozenset()
        # With its tools still in the prompt where it can be, which begins as before then.
        self._added = self._request if self._request.tools else replace(self._added, tool_choice="none")

    async def _go_on(self, every: float | None) -> AsyncIterator[list[Part]]:
        """Begin the next completion. Where the context has no room for it, even without older results, there is none."""
        await self._leave()
        for messages in (self._messages, without_old_results(self._messages)):
            asked = replace(self._added, messages=[*self._before, *messages], max_tokens=self._room)
            self._starting = asyncio.ensure_future(self._inner.start(asked))
            async for _ in _while_waiting(self._starting, every):
                yield []
            error = self._starting.exception()
            if error is None:
                self._messages = messages
                return
            self._starting = None
            if not isinstance(error, ApiError) or error.code != "context_length_exceeded":
                raise error

    def progress(self) -> Progress:
        return self._generation.progress()

    def prompt_texts(self) -> list[PromptText]:
        return self._generation.prompt_texts()

    def written(self) -> list[Message]:
        return self._generation.written()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            for task in (self._calling, self._starting):
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])
            begun = self._starting
            if begun is not None and not begun.cancelled() and begun.exception() is None:
                await begun.result().__aexit__(None, None, None)
        finally:
            self._tools.close()
            try:
                await self._leave()
            finally:
                self._lease.release()

    async def _leave(self) -> None:
        is_left, self._is_left = self._is_left, True
        if not is_left:
            await self._generation.__aexit__(None, None, None)


@final
class _Completion:
    """One completion of an answer: what of it is shown at once, and the calls that are run here.

    names: of the tools that run here; their calls, and the end, are held back.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names, self._builder, self._is_held = names, AnswerBuilder(), False

    def shown(self, parts: Sequence[Part]) -> list[Part]:
        """Those of the parts that the client gets."""
        found: list[Part] = []
        for part in parts:
            self._builder.add(part)
            if isinstance(part, ItemStarted):
                self._is_held = part.kind == "call" and part.name in self._names
            if not self._is_held and not isinstance(part, Finished):
                found.append(part)
        return found

    @property
    def answer(self) -> Answer:
        """All of it, at its end."""
        return self._builder.answers[0]

    @property
    def calls(self) -> list[Item]:
        """The calls to run. None where the client has to answer one, too: its request ends here, and ours would be lost."""
        answer = self.answer
        calls = [item for item in answer.items if item.kind == "call"]
        is_ours = answer.reason == "tool_calls" and all(call.name in self._names for call in calls)
        return calls if is_ours else []


@final
class _Silence:
    """How long nothing has been yielded: whoever waits wants to hear something every so many seconds."""

    def __init__(self, every: float | None) -> None:
        self._every, self._began = every, time.monotonic()

    @property
    def is_long(self) -> bool:
        return self._every is not None and time.monotonic() - self._began >= self._every

    def ends(self) -> None:
        self._began = time.monotonic()


async def _while_waiting(task: asyncio.Future[Any], every: float | None) -> AsyncIterator[None]:
    """One None for every so many seconds until the task is done."""
    while True:
        await asyncio.wait([task], timeout=every)
        if task.done():
            return
        yield None


def _text(answer: Answer, kind: Kind) -> str:
    return _BETWEEN.join(item.text for item in answer.items if item.kind == kind)


def _sum(before: Usage | None, usage: Usage) -> Usage:
    """The client's prompt counts once, as that of the first completion; of the others what they have written counts."""
    if before is None:
        return usage
    return replace(
        before,
        completion_tokens=before.completion_tokens + usage.completion_tokens,
        reasoning_tokens=before.reasoning_tokens + usage.reasoning_tokens,
    )


def _line(text: str) -> str:
    """A text as one short line, without control characters."""
    words = " ".join(text[: 4 * _LONGEST_LINE].split())
    line = words[:_LONGEST_LINE]
    line = line if line.isprintable() else "".join(each if each.isprintable() else "\ufffd" for each in line)
    return line if len(words) == len(line) and len(text) <= 4 * _LONGEST_LINE else f"{line} …"


def _counting(lease: ModelLease) -> Callable[[str], int]:
    """How many tokens a text has for the model, which the lease keeps."""
    tokenizer = lease.tokenizer
    assert tokenizer is not None
    return lambda text: len(tokenizer.encode(whole_characters(text)))
