"""Generations without a model: a script of parts, for tests of the wire formats."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.generation import Generation, GenerationRequest, Progress
from openelm_mlx.server.parts import Finished, ItemDone, ItemStarted, ItemText, Part, Usage

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
