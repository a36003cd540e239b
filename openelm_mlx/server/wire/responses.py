"""OpenAI's Responses: `/v1/responses`, and what can be asked about a stored one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..app import Json, services
from ..bodies import read_body
from ..failures import ApiError, bad_request
from ..generation import Generation, GenerationRequest, Progress
from ..parts import Part
from ..responses_store import Item, ResponseStore, Stored
from ..sse import EventStream, begun, comment, unless_gone
from .event_lines import event_lines
from .responses_events import ResponseEvents
from .responses_items import read_input
from .responses_request import (
    ENCRYPTED,
    CountTokens,
    CreateResponse,
    check_offered,
    generation_request,
    prompt_request,
    tools_of,
    wanted_logprobs,
)
from .responses_tools import Tools

_PATH = "/v1/responses"


def routes(store: ResponseStore | None = None) -> list[Route]:
    """The routes of Responses, with a store of their own unless one is given."""
    own = Responses(ResponseStore() if store is None else store)
    one = f"{_PATH}/{{response_id}}"
    return [
        Route(_PATH, own.create, methods=["POST"]),
        Route(f"{_PATH}/input_tokens", own.input_tokens, methods=["POST"]),
        Route(one, own.retrieve, methods=["GET"]),
        Route(one, own.delete, methods=["DELETE"]),
        Route(f"{one}/cancel", own.cancel, methods=["POST"]),
        Route(f"{one}/input_items", own.input_items, methods=["GET"]),
    ]


class Responses:
    """The handlers. What they share is the store."""

    def __init__(self, store: ResponseStore) -> None:
        self.store = store

    async def create(self, request: Request) -> Response:
        body = await read_body(request, CreateResponse)
        before, inputs, items = self._conversation(body)
        tools = tools_of(body, items)
        wanted = generation_request(body, items, tools)
        start = self._start(request, wanted)
        events = ResponseEvents(
            _fields(body, tools), tools, ENCRYPTED in (body.include or ()), wanted_logprobs(body) is not None
        )

        def keep() -> None:
            if body.store is not False:
                self.store.add(events.response, inputs, before)

        if body.stream:
            return EventStream(await begun(request, start), lambda _: _Stream(events, keep))
        generation = await unless_gone(request, start)
        async with generation:
            await unless_gone(request, _write(generation, events))
        keep()
        return Json(events.response)

    async def input_tokens(self, request: Request) -> Response:
        body = await read_body(request, CountTokens)
        _, _, items = self._conversation(body)
        wanted = prompt_request(body, items, tools_of(body, items))
        try:
            count = await services(request).generations.count_tokens(wanted)
        except ApiError as error:
            raise _in_own_words(error) from None
        return Json({"object": "response.input_tokens", "input_tokens": count})

    async def retrieve(self, request: Request) -> Response:
        if request.query_params.get("stream", "false") == "true":
            message = "Only an answer of a background request can be streamed again: leave stream out."
            raise ApiError(400, message, param="stream", code="unsupported_parameter")
        return Json(self._stored(request).body)

    async def delete(self, request: Request) -> Response:
        name = request.path_params["response_id"]
        self.store.delete(name)
        return Json({"id": name, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        self._stored(request)
        raise ApiError(400, "Only an answer of a background request can be cancelled, and this one has ended.")

    async def input_items(self, request: Request) -> Response:
        stored = self._stored(request)
        items = stored.items
        del items[len(items) - len(stored.body["output"]) :]
        order, limit, after = (request.query_params.get(key) for key in ("order", "limit", "after"))
        if order != "asc":
            items.reverse()
        if after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == after]
            items = items[places[0] + 1 :] if places else []
        number = _limit(limit)
        page = items[:number]
        return Json(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else "",
                "last_id": page[-1]["id"] if page else "",
                "has_more": len(items) > number,
            }
        )

    def _stored(self, request: Request) -> Stored:
        return self.store.get(request.path_params["response_id"])

    def _conversation(self, body: CountTokens) -> tuple[Stored | None, list[Item], list[Item]]:
        """The response that the request goes on from, the request's own items, and those of the whole conversation."""
        check_offered(body)
        name = body.previous_response_id
        before = None if name is None else self.store.get(name, "previous_response_id")
        items = [] if before is None else before.items
        # A reference to an item of the conversation itself would put it there twice.
        known = {id(item) for item in items}
        inputs = [item for item in read_input(body.input, self.store.item) if id(item) not in known]
        return before, inputs, [*items, *inputs]

    async def _start(self, request: Request, wanted: GenerationRequest) -> Generation:
        try:
            return await services(request).generations.start(wanted)
        except ApiError as error:
            raise _in_own_words(error) from None


def _limit(given: str | None) -> int:
    if given is None:
        return 20
    if not given.isdecimal() or not 1 <= int(given) <= 100:
        raise bad_request(f"limit is {given!r}: it should be a whole number from 1 to 100.", "limit")
    return int(given)


# What Chat Completions calls it, and what it is here.
_WORDS = {
    "messages": "input", "max_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort",
    "response_format": "text.format", "logprobs": "top_logprobs",
}  # fmt: skip


def _in_own_words(error: ApiError) -> ApiError:
    """The error of a model with the field's name in Responses."""
    if error.param is not None:
        error.param = _WORDS.get(error.param, error.param)
    return error


async def _write(generation: Generation, events: ResponseEvents) -> None:
    events.start()
    async for parts in generation.batches():
        events.more(parts)


class _Stream:
    """The events as bytes. keep: called when the response has ended, before its last event is sent."""

    def __init__(self, events: ResponseEvents, keep: Callable[[], None]) -> None:
        self._events, self._keep = events, keep

    def start(self) -> bytes:
        return event_lines(self._events.start())

    def more(self, parts: list[Part]) -> bytes:
        lines = event_lines(self._events.more(parts))
        if self._events.is_finished:
            self._keep()
        return lines

    def keep_alive(self, progress: Progress | None) -> bytes:
        return comment(progress)

    def failure(self, error: ApiError) -> bytes:
        lines = event_lines(self._events.failed(error))
        self._keep()
        return lines


def _fields(body: CreateResponse, tools: Tools) -> dict[str, Any]:
    """What the response repeats of its request."""
    reasoning, text = body.reasoning, body.text
    form = {"type": "text"} if text is None or text.format is None else text.format.model_dump(by_alias=True)
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": {name: value for name, value in form.items() if value is not None},
            "verbosity": "medium" if text is None or text.verbosity is None else text.verbosity,
        },
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": list(tools.echoed),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }
