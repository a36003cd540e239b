"""The chat page at `/`: a few static files, sent with a policy that lets the page talk to this server only.

The files in `page/` are built from `web/` at the repository's top; nothing here knows what is in them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .guard import SAFE_HEADERS

# What a model writes must never become code, tell another host that it was read, or be shown within another site. The page
# sets no style in its markup, and makes nodes of text in one place only, which is DOMPurify's.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "font-src 'self'",
        "connect-src 'self'",
        "object-src 'none'",
        "media-src 'none'",
        "frame-src 'none'",
        "worker-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    ]
)
HEADERS = {
    **SAFE_HEADERS,
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
    "woff2": "font/woff2",
}
# A font's name has a hash of its bytes in it. All else is asked for again, and mostly answered by a 304.
KEPT = "public, max-age=31536000, immutable"
ASKED_AGAIN = "no-cache"


@final
@dataclass(frozen=True)
class PageFile:
    """One file of the page. etag: as in the header, with its quotes."""

    body: bytes
    type: str
    etag: str
    caching: str


@cache
def page_files() -> dict[str, PageFile]:
    """All files of the page by their paths, as `index.html` and `fonts/….woff2`: about one megabyte, read once."""
    folder = files(__package__) / "page"
    found = {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}
    found |= {f"fonts/{each.name}": each.read_bytes() for each in (folder / "fonts").iterdir()}
    return {
        name: PageFile(
            body,
            TYPES[name.rsplit(".", 1)[-1]],
            f'"{hashlib.sha256(body).hexdigest()[:32]}"',
            KEPT if name.startswith("fonts/") else ASKED_AGAIN,
        )
        for name, body in found.items()
        if name.rsplit(".", 1)[-1] in TYPES
    }


def page_routes() -> list[Route]:
    """`/` and what the page loads from `/page/…`. They have no secrets: a key guards the API alone."""
    return [Route("/", _index), Route("/page/{name:path}", _file)]  # GET and HEAD


async def _index(request: Request) -> Response:
    return _answer(request, page_files()["index.html"])


async def _file(request: Request) -> Response:
    found = page_files().get(request.path_params["name"])
    if found is None:
        raise HTTPException(404)
    return _answer(request, found)


def _answer(request: Request, found: PageFile) -> Response:
    headers = {**HEADERS, "ETag": found.etag, "Cache-Control": found.caching}
    known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    if found.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(found.body, headers=headers, media_type=found.type)
