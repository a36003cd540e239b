"""The server as a Starlette application: its routes, and its errors as bodies that clients understand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .call_reasoning import CallReasoning
from .failures import ApiError, ClientGone, api_error
from .generation import Generations
from .guard import LONGEST_PATH
from .log import log

# nginx's number for it: nobody reads the answer, but the log has it.
CLIENT_CLOSED_REQUEST = 499


@dataclass
class Services:
    """What the routes need: `services(request)`. tool_names: of the tools that run on this machine."""

    generations: Generations
    registry: Any = None
    metrics: Any = None
    call_reasoning: CallReasoning = field(default_factory=CallReasoning)
    tool_names: tuple[str, ...] = ()


def services(request: Request) -> Services:
    """The services of the application that the request came to."""
    found: Services = request.app.state.services
    return found


def make_app(
    own: Services, routes: Sequence[BaseRoute], models: AbstractAsyncContextManager[Any] | None = None
) -> Starlette:
    """An application of these routes. models: what is entered when it starts, and left when it ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with nullcontext() if models is None else models:
            yield

    app = Starlette(
        routes=list(routes),
        lifespan=lifespan,
        exception_handlers={
            ApiError: _answer_error,
            HTTPException: _answer_error,
            ClientGone: _answer_error,
        },
        middleware=[Middleware(_Unexpected)],
    )
    app.router.redirect_slashes = False  # a path with one slash too many is unknown, like any other
    app.state.services = own
    return app


@final
class _Unexpected:
    """Errors of ours get an answer too. Starlette would raise them once more, and the connection would be closed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if has_begun:
                raise
            answer = await _answer_error(Request(scope, receive), error)
            await answer(scope, receive, send)


class Json(Response):
    """A body of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        error = _http_error(request, error)
    found = api_error(error)
    if found.status >= 500 and not isinstance(error, ApiError):
        log.error("a request to %s failed", request.scope["path"][:LONGEST_PATH], exc_info=error)
    body = found.body(request.scope["path"], request.scope.get("request_id"))
    return Json(body, found.status, {**headers, **found.headers})


def _http_error(request: Request, error: HTTPException) -> ApiError:
    method, path = request.method, request.scope["path"][:LONGEST_PATH]
    if error.status_code == 404:
        return ApiError(404, f"There is nothing at {method} {path}.", code="unknown_url")
    if error.status_code == 405:
        return ApiError(405, f"{path} does not take {method}.", code="method_not_allowed")
    return ApiError(error.status_code, str(error.detail))
