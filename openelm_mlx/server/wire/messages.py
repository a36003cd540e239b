"""Anthropic's messages: `/v1/messages`, as its SDKs and Claude Code use it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..app import Json, services
from ..bodies import read_body
from ..call_reasoning import CallReasoning
from ..failures import ApiError
from ..generation import Generation, Progress
from ..parts import Part
from ..sse import EventStream, begun, comment, unless_gone
from .event_lines import event_lines
from .messages_events import MessageEvents
from .messages_request import CountTokens, CreateMessage, generation_request, prompt_request, shows_thinking

_PATH = "/v1/messages"


def routes() -> list[Route]:
    """The routes of messages."""
    own = Messages()
    return [
        Route(_PATH, own.create, methods=["POST"]),
        Route(f"{_PATH}/count_tokens", own.count_tokens, methods=["POST"]),
    ]


class Messages:
    """The handlers. What they share is the reasoning that clients were not shown."""

    def __init__(self) -> None:
        self.known = CallReasoning()

    async def create(self, request: Request) -> Response:
        body = await read_body(request, CreateMessage)
        wanted = generation_request(body, self.known)
        start = services(request).generations.start(wanted)

        def events_of(own: Generation | None) -> MessageEvents:
            prompt_tokens = 0 if own is None else own.prompt_tokens
            return MessageEvents(body.model, prompt_tokens, shows_thinking(body), self.known)

        if body.stream:
            request_id = request.scope.get("request_id")
            return EventStream(await begun(request, start), lambda own: _Stream(events_of(own), request_id))
        generation = await unless_gone(request, start)
        events = events_of(generation)
        async with generation:
            await unless_gone(request, _write(generation, events))
        return Json(events.message)

    async def count_tokens(self, request: Request) -> Response:
        body = await read_body(request, CountTokens)
        count = await services(request).generations.count_tokens(prompt_request(body, self.known))
        return Json({"input_tokens": count})


async def _write(generation: Generation, events: MessageEvents) -> None:
    async for parts in generation.batches():
        events.more(parts)


class _Stream:
    """The events as bytes."""

    def __init__(self, events: MessageEvents, request_id: str | None) -> None:
        self._events, self._request_id = events, request_id

    def start(self) -> bytes:
        return event_lines(self._events.start())

    def more(self, parts: list[Part]) -> bytes:
        return event_lines(self._events.more(parts))

    def keep_alive(self, progress: Progress | None) -> bytes:
        """The comment is for people; clients wait for events."""
        return comment(progress) + event_lines([{"type": "ping"}])

    def failure(self, error: ApiError) -> bytes:
        return event_lines([error.anthropic_body(self._request_id)])
