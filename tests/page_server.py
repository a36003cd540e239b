"""A server for the page's tests: the real page before an API whose answers are scripts."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from openelm_mlx.server.page import page_routes

# A step of an answer: ("text" | "reasoning" | "comment", what), ("call", id, name, arguments), ("hold", an event to wait for),
# ("finish", reason), ("usage", {...}), ("error", message), or ("break",), which closes the connection in the middle.
Step = tuple[Any, ...]
USAGE = {
    "prompt_tokens": 1380,
    "completion_tokens": 42,
    "total_tokens": 1422,
    "prompt_tokens_details": {"cached_tokens": 1024},
    "completion_tokens_details": {"reasoning_tokens": 7},
}


class PageServer:
    """A server in a thread; `stop` and `start` keep its port, as a restart would."""

    def __init__(self) -> None:
        self.port = 0
        self._server: uvicorn.Server | None = None
        self.renew()

    def renew(self) -> None:
        """Forget what a test has set and seen, and run, also where that test has stopped it."""
        self.models = ["demo-gpt-oss", "demo-openelm"]
        self.health: dict[str, Any] = {"status": "ok"}
        self.key: str | None = None
        self.script: Callable[[dict[str, Any]], list[Step] | Response] = lambda body: [("text", "Hello.")]
        self.requests: list[dict[str, Any]] = []
        self._seen = Counter[str]()  # an answer that goes on counts where it began
        if self._server is None:
            self.start()

    @property
    def ended(self) -> int:
        return self._seen["ended"]

    @property
    def gone(self) -> int:
        """Clients that went away before the end."""
        return self._seen["gone"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        listening.listen()  # who asks before the thread runs is answered when it does
        self.port = listening.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(self._app(), log_level="critical", timeout_graceful_shutdown=0))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        assert self._server is not None
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._server = None

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                *page_routes(),
                # A browser asks for it where a tab waits at /health, which names no icon.
                Route("/favicon.ico", lambda request: Response(status_code=204)),
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    async def _health(self, request: Request) -> Response:
        return JSONResponse(self.health)

    async def _models(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "openelm_mlx"} for name in self.models]
        return JSONResponse({"object": "list", "data": cards})

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.requests.append(body)
        answer = self.script(body)
        return (
            answer
            if isinstance(answer, Response)
            else StreamingResponse(self._stream(answer), media_type="text/event-stream")
        )

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return failure(401, "The key is missing or wrong.", "invalid_api_key")

    async def _stream(self, steps: list[Step]) -> AsyncIterator[str]:
        seen = self._seen
        try:
            yield chunk({"role": "assistant", "content": ""})
            calls, reason = 0, "stop"
            usage: dict[str, Any] = USAGE
            for kind, *rest in steps:
                if kind == "text":
                    yield chunk({"content": rest[0]})
                elif kind == "reasoning":
                    yield chunk({"reasoning": rest[0], "reasoning_content": rest[0]})
                elif kind == "comment":
                    yield f": {rest[0]}\n\n"
                elif kind == "call":
                    identity, name, arguments = rest
                    function = {"name": name, "arguments": ""}
                    yield chunk(
                        {"tool_calls": [{"index": calls, "id": identity, "type": "function", "function": function}]}
                    )
                    for piece in (arguments[:7], arguments[7:]):
                        yield chunk({"tool_calls": [{"index": calls, "function": {"arguments": piece}}]})
                    calls, reason = calls + 1, "tool_calls"
                elif kind == "hold":
                    while not rest[0].is_set():
                        await asyncio.sleep(0.01)
                elif kind == "finish":
                    reason = rest[0]
                elif kind == "usage":
                    usage = rest[0]
                elif kind == "error":
                    error = {"message": rest[0], "type": "server_error", "param": None, "code": None}
                    yield f"data: {json.dumps({'error': error})}\n\n"
                    return
                elif kind == "break":
                    return
                await asyncio.sleep(0)
            yield chunk({}, finish_reason=reason)
            last = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": usage}
            yield f"data: {json.dumps(last)}\n\n"
            yield "data: [DONE]\n\n"
            seen["ended"] += 1
        except asyncio.CancelledError:
            seen["gone"] += 1
            raise


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    """One event of a streamed chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "demo", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n"


def failure(
    status: int, message: str, code: str | None = None, retry_after: int | None = None, param: str | None = None
) -> Response:
    """An error with OpenAI's body."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse({"error": error}, status, headers)


def pieces(text: str, size: int = 3) -> list[Step]:
    """A text as steps of a few characters."""
    return [("text", text[i : i + size]) for i in range(0, len(text), size)]


def held() -> tuple[Step, Callable[[], None]]:
    """A step that waits, and what lets it go on."""
    event = threading.Event()
    return ("hold", event), event.set
