"""`/health` and `/metrics`: whether a server is well, and what it has done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .app import Json, services

if TYPE_CHECKING:
    from .registry import Registry


async def health(request: Request) -> Response:
    """Whether requests can be answered: 200, also while a model is being loaded; 503 where an engine has died.

    With the key, or where none is asked for, the body says what the server is doing.
    """
    own = services(request)
    registry: Registry = own.registry
    found: dict[str, Any] = {"status": registry.health()}
    if request.scope.get("has_key"):
        found |= registry.status()
        found["tools"] = list(own.tool_names)
    is_dead = found["status"] == "dead"
    return Json(found, 503 if is_dead else 200, {"Retry-After": "5"} if is_dead else {})


async def metrics_text(request: Request) -> Response:
    """What has been counted, for Prometheus."""
    own = services(request)
    body, kind = own.metrics.text(own.registry)
    return Response(body, media_type=kind)


def routes() -> list[Route]:
    """`/health` and `/metrics`."""
    return [
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics_text, methods=["GET"]),
    ]
