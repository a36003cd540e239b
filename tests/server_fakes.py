"""Generations without a model: a script of parts, for tests of the wire formats and of tools."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import ClassVar

from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.generation import Generation, GenerationRequest, Progress
from openelm_mlx.server.parts import Finished, ItemDone, ItemStarted, ItemText, Part, Usage
from openelm_mlx.text.chat import HARMONY, PLAIN
from openelm_mlx.text.conversation import Message

USAGE = Usage(prompt_tokens=12, cached_tokens=4, completion_tokens=9, reasoning_tokens=5)


def item(kind: str, *texts: str, name: str | None = None, index: int = 0, is_preamble: bool = False) -> list[Part]:
    """One item, its text in pieces."""
    pieces = [ItemText(index, text) for text in texts if text]
    return [ItemStarted(index, kind, name, is_preamble), *pieces, ItemDone(index, "".join(texts))]


def end(reason: str = "stop", index: int = 0, stop_string: str | None = None) -> Finished:
    return Finished(index, reason, stop_string, USAGE)


THOUGHT_AND_ANSWER = [*item("reasoning", "Let me ", "think."), *item("message", "2 + 2", " = 4."), end()]
CALL = [
    *item("reasoning", "I need the tool."),
    *item("message", "One moment.", is_preamble=True),
    *item("call", '{"expression"', ': "2+2"}', name="calculator"),
    end("tool_calls"),
]


class FakeGeneration(Generation):
    """script: parts, an ApiError to raise, or a number of seconds to wait, in their order."""

    def __init__(self, script: Sequence[Part | ApiError | float], batch: int) -> None:
        self.prompt_tokens, self.is_closed = USAGE.prompt_tokens, False
        self._script, self._batch = script, batch

    async def batches(self, every: float | None = None) -> AsyncIterator[list[Part]]:
        ready: list[Part] = []
        for step in self._script:
            if isinstance(step, Part):
                ready.append(step)
                if len(ready) < self._batch:
                    continue
            if ready:
                yield ready
                ready = []
            if isinstance(step, ApiError):
                raise step
            if isinstance(step, float | int):
                await asyncio.sleep(step)
                yield []
        if ready:
            yield ready

    def progress(self) -> Progress:
        return Progress(2, 0, self.prompt_tokens)

    def written(self) -> list[Message]:
        """The script as gpt-oss would write it."""
        found = []
        for part in self._script:
            if isinstance(part, ItemStarted):
                started = part
            elif isinstance(part, ItemDone):
                is_call, is_final = started.kind == "call", started.kind == "message" and not started.is_preamble
                channel = "analysis" if started.kind == "reasoning" else "final" if is_final else "commentary"
                recipient = started.name if is_call and started.name == "python" else f"functions.{started.name}"
                found.append(Message("assistant", part.text, None, channel, recipient if is_call else None))
        return found

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_closed = True


class FakeGenerations:
    """Answers every request with one script, or with what a function makes of the request; keeps what was asked."""

    def __init__(
        self,
        script: Sequence[Part | ApiError | float] | Callable[[GenerationRequest], Sequence[Part | ApiError | float]],
        batch: int = 1,
    ) -> None:
        self.requests: list[GenerationRequest] = []
        self.generations: list[FakeGeneration] = []
        self._script, self._batch = script, batch

    async def start(self, request: GenerationRequest) -> Generation:
        self.requests.append(request)
        script = self._script(request) if callable(self._script) else self._script
        if script and isinstance(script[0], ApiError):
            raise script[0]
        self.generations.append(FakeGeneration(script, self._batch))
        return self.generations[-1]

    async def count_tokens(self, request: GenerationRequest) -> int:
        self.requests.append(request)
        return USAGE.prompt_tokens


# --- Tools that run in the server ---------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "What is 2 + 2?"}]


class FakeModels:
    """Leases of models without one, counted."""

    def __init__(self, context_length=1000):
        self.num_leases, self._context_length = 0, context_length

    async def acquire(self, name):
        self.num_leases += 1
        template = PLAIN if name == "openelm" else HARMONY
        tokenizer = SimpleNamespace(chat_template=template, encode=lambda text: list(text.encode()))
        model = SimpleNamespace(context_length=self._context_length)
        return SimpleNamespace(name=name, tokenizer=tokenizer, model=model, release=self._release)

    def _release(self):
        self.num_leases -= 1


def calling(expression="2+2", name="calculator"):
    """A completion that calls a tool."""
    text = json.dumps({"expression": expression})
    return [*item("reasoning", "I need it."), *item("call", text[:5], text[5:], name=name), end("tool_calls")]


def results(request):
    """What tools have said, ours and the client's."""
    said = []
    for message in request.messages:
        if isinstance(message, Message):
            said += [message.text] if message.role == "tool" else []
        elif message["role"] == "tool":
            said.append(message["content"])
    return said


def after(*calls, then=THOUGHT_AND_ANSWER):
    """A script that calls tools one after the other, and then answers."""
    return lambda request: calls[len(results(request))] if len(results(request)) < len(calls) else then


def asked(**options):
    return GenerationRequest(**{"model": "gpt-oss", "messages": ASKED, **options})


class FakePython:
    """An interpreter whose variables are a list."""

    name, namespace, description, parameters = "python", None, "Runs.", None
    made: ClassVar[list] = []

    def __init__(self, **_):
        self.ran, self.is_closed = [], False
        self.made.append(self)

    def __call__(self, script):
        self.ran.append(script)
        return " ".join(self.ran)

    def close(self):
        self.is_closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
