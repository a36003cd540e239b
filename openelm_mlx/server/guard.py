"""What every request has to pass before anything is done for it: whom it names, where it comes from, its key and its size.

In this order, for every path, known or not: the Host header, the Origin, the key, and then the body, which is read whole
here so that nothing behind has to think of limits. Every answer gets its request id and the headers that browsers obey.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Protocol, final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import ApiError, ClientGone, api_error
from .hosts import Hosts, host_name, is_own
from .log import log, request_id
from .settings import ServerSettings

# What the page needs to be shown, and to ask for a key.
OPEN_PATHS = ("/", "/health", "/favicon.ico")
OPEN_FOLDERS = ("/page/",)
# Of a path, as the log has it.
LONGEST_PATH = 200
# What programs ask all the time is not logged where it goes well.
ASKED_OFTEN = ("/health", "/metrics")

# JSON deeper than that is nobody's request; what reads it later may go down by recursion.
MAX_DEPTH = 100
# Of all bodies that are being read or worked on, in largest bodies.
BODIES_AT_ONCE = 8

# Of every answer.
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
    "access-control-max-age": "600",
}


class Observer(Protocol):
    """Who counts requests."""

    def request_done(self, method: str, path: str, status: int, seconds: float) -> None:
        """One request has been answered, or its client has gone."""


@final
class Guard:
    """An application behind all of that. observer: told of every request."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, observer: Observer | None = None) -> None:
        self._app, self._settings, self._observer = app, settings, observer
        self._hosts = Hosts(settings)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self._body_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # a web socket: there are none here
            await send({"type": "websocket.close", "code": 1002})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(scope, send)
        token = request_id.set(answer.request_id)
        body: bytes | None = None
        try:
            headers = _headers(scope)
            if scope.get("http_version", "1.1") not in ("1.0", "1.1"):
                raise ApiError(400, "This is no HTTP/1.1 request that can be read.", code="invalid_http")
            answer.origin = self._checked_origin(headers, self._checked_host(headers))
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await answer.empty(self._preflight(headers))
                return
            self._check_key(scope, headers)
            body = await self._body(headers, receive)
            await self._app(scope, _replayed(body, receive), answer.send)
        except ApiError as error:
            await answer.fail(error)
        except ClientGone:
            pass
        except Exception as error:  # noqa: BLE001  (an answer is owed, whatever it was)
            if not answer.status:  # else whoever began to answer has said what happened
                log.exception("a request failed")
                await answer.fail(api_error(error))
        finally:
            self._body_bytes -= len(body or b"")
            self._log(scope, answer)
            request_id.reset(token)

    def _log(self, scope: Scope, answer: _Answer) -> None:
        seconds = time.perf_counter() - answer.began
        level = logging.DEBUG if scope["path"] in ASKED_OFTEN and answer.status == 200 else logging.INFO
        method, path = _shown(scope["method"]), _shown(scope["path"], LONGEST_PATH)
        log.log(level, "%s %s %s %.3f s", method, path, answer.status or "client gone", seconds)
        if self._observer is not None:
            self._observer.request_done(scope["method"], scope["path"], answer.status, seconds)

    # --- who asks -----------------------------------------------------------------------------------------------------

    def _checked_host(self, headers: Mapping[str, list[str]]) -> str:
        found = headers.get("host", [])
        if len(found) != 1 or not self._hosts.allows(found[0]):
            named = (_shown(found[0]) or "empty") if found else "missing"
            name = _shown(host_name(found[0]) or "NAME") if found else "NAME"
            raise ApiError(
                403, f"The Host header is {named}, which this server does not answer to: use the address that it printed, or "
                f"start it with --allow-host {name}.", "permission_error", code="host_not_allowed",
            )  # fmt: skip
        return found[0]

    def _checked_origin(self, headers: Mapping[str, list[str]], host: str) -> str | None:
        """The allowed foreign origin that a request comes from; None for the server's own page, and for programs."""
        origins = headers.get("origin", [])
        if not origins:
            site, mode = headers.get("sec-fetch-site", [""])[0], headers.get("sec-fetch-mode", [""])[0]
            if site == "cross-site" and mode != "navigate":  # an image, a script: nobody could read the answer
                raise _foreign("another site")
            return None
        (origin,) = origins if len(origins) == 1 else ("",)
        if origin in self._settings.allow_origins:
            return origin
        if is_own(origin, host):
            return None
        if "*" in self._settings.allow_origins:
            return origin
        raise _foreign(origin)

    def _preflight(self, headers: Mapping[str, list[str]]) -> dict[str, str]:
        asked = headers.get("access-control-request-headers", [""])[0]
        more = {"access-control-allow-headers": asked} if re.fullmatch(r"[A-Za-z0-9_, -]{1,1000}", asked) else {}
        if headers.get("access-control-request-private-network") == ["true"]:
            more["access-control-allow-private-network"] = "true"
        return {**_PREFLIGHT, **more}

    def _check_key(self, scope: Scope, headers: Mapping[str, list[str]]) -> None:
        """Raise ApiError, a 401, where a key is asked for and none of the right ones is given."""
        scope["has_key"] = not self._keys
        if not self._keys:
            return
        given = [*headers.get("x-api-key", []), *map(_bearer, headers.get("authorization", []))]
        is_right = False
        for each in given[:4]:
            digest = hashlib.sha256(each.encode("utf-8", "surrogateescape")).digest()
            for key in self._keys:
                is_right |= hmac.compare_digest(digest, key)
        scope["has_key"] = bool(is_right)
        if not is_right and not (scope["method"] in ("GET", "HEAD") and is_open(scope["path"])):
            what = "is not one that this server takes" if any(given) else "is missing"
            raise ApiError(
                401, f"The API key {what}: send it as Authorization: Bearer KEY, or as x-api-key.",
                "authentication_error", code="invalid_api_key",
            )  # fmt: skip

    # --- the body -----------------------------------------------------------------------------------------------------

    async def _body(self, headers: Mapping[str, list[str]], receive: Receive) -> bytes:
        """The whole body. Raises ApiError where it is too large, too deep, too slow, or packed."""
        encoding = headers.get("content-encoding", ["identity"])[0].strip().lower()
        if encoding not in ("", "identity"):
            raise ApiError(
                415, f"The body is packed ({_shown(encoding)}): send it as it is.", code="unsupported_encoding"
            )
        most = self._settings.max_body
        length = headers.get("content-length", ["0"])[0]
        if length.isascii() and length.isdecimal() and int(length[:20]) > most:
            raise _too_large(most)
        pieces: list[bytes] = []
        size, depth = 0, Depth()
        until = time.monotonic() + self._settings.body_timeout
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(0.001, until - time.monotonic()))
                except asyncio.TimeoutError:
                    raise ApiError(
                        408,
                        f"The body did not arrive within {self._settings.body_timeout:g} seconds.",
                        code="request_timeout",
                    ) from None
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece = message.get("body", b"")
                size += len(piece)
                if size > most:
                    raise _too_large(most)
                if self._body_bytes + len(piece) > BODIES_AT_ONCE * most:
                    raise ApiError(
                        503, "Too many large requests are being received: ask again in a moment.", "server_error",
                        code="overloaded", retry_after=2,
                    )  # fmt: skip
                self._body_bytes += len(piece)
                pieces.append(piece)
                if depth.after(piece) > MAX_DEPTH:
                    raise ApiError(400, f"The JSON is nested more than {MAX_DEPTH} levels deep.", code="invalid_json")
                if not message.get("more_body", False):
                    return b"".join(pieces)
        except BaseException:
            self._body_bytes -= sum(map(len, pieces))
            raise


@final
class _Answer:
    """The answer to one request, as it goes out. status: 0 before it has begun."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.request_id = scope["request_id"] = f"req_{secrets.token_hex(12)}"
        self.began = time.perf_counter()
        self.status = 0
        self.origin: str | None = None
        self._path, self._send = scope["path"], send

    async def send(self, message: Message) -> None:
        """As ASGI's, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": self._with_own(list(message.get("headers", [])))}
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """An error as the answer."""
        if self.status:
            return
        data = json.dumps(error.body(self._path, self.request_id)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(data)), **error.headers}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        await self._whole(error.status, headers, data)

    async def empty(self, headers: Mapping[str, str]) -> None:
        """Nothing but these headers."""
        await self._whole(204, headers, b"")

    async def _whole(self, status: int, headers: Mapping[str, str], data: bytes) -> None:
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": data})

    def _with_own(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        there = {name.lower(): value for name, value in headers}
        # Each service's clients read their own.
        own = {**SAFE_HEADERS, "x-request-id": self.request_id, "request-id": self.request_id}
        if there.get(b"content-type", b"").startswith(b"text/html"):
            own["content-security-policy"] = CONTENT_POLICY
        elif b"cache-control" not in there:
            own["cache-control"] = "no-store"
        if self.origin is not None:
            own["access-control-allow-origin"] = self.origin
            own["access-control-expose-headers"] = "x-request-id, request-id, retry-after"
            own["vary"] = "Origin"
        return headers + [(name.encode(), value.encode()) for name, value in own.items() if name.encode() not in there]


# --- small things -----------------------------------------------------------------------------------------------------

_IN_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@final
class Depth:
    """How deeply JSON is nested, piece by piece."""

    def __init__(self) -> None:
        self.deepest = self._depth = 0
        self._is_in_string = self._is_escaped = False

    def after(self, piece: bytes) -> int:
        """The greatest depth so far, this piece counted."""
        at = 0
        if self._is_escaped and piece:
            at, self._is_escaped = 1, False
        while at < len(piece) and self.deepest <= MAX_DEPTH:
            if not self._is_in_string:
                end = piece.find(b'"', at)
                end = len(piece) if end < 0 else end
                self._count(piece[at:end].translate(None, _NO_BRACKETS))
                self._is_in_string, at = end < len(piece), end + 1
                continue
            found = _IN_STRING.match(piece, at)
            assert found is not None
            end = found.end()
            if end < len(piece):
                self._is_in_string = self._is_escaped = piece[end : end + 1] == b"\\"
            at = end + 1
        return self.deepest

    def _count(self, brackets: bytes) -> None:
        for each in brackets:
            self._depth += 1 if each in b"[{" else -1
            if self._depth > self.deepest:
                self.deepest = self._depth
                if self.deepest > MAX_DEPTH:
                    return


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _bearer(header: str) -> str:
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _shown(text: str, longest: int = 100) -> str:
    """What a client sent, as a part of an error or of the log: one short line."""
    return "".join(each if each.isprintable() else "?" for each in text[:longest])


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and after it what really comes: that the client has gone."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def is_open(path: str) -> bool:
    """Whether a path may be read without a key: the page, and whether the server is well."""
    return path in OPEN_PATHS or (path.startswith(OPEN_FOLDERS) and ".." not in path)


def _foreign(origin: str) -> ApiError:
    return ApiError(
        403, f"Web pages of {_shown(origin) or 'nowhere'} may not use this server: start it with --allow-origin to let them.",
        "permission_error", code="origin_not_allowed",
    )  # fmt: skip


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is larger than {most:,} bytes.", code="request_too_large")
