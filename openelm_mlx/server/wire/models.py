"""`GET /v1/models` and `/v1/models/{id}`: which models requests may name, for OpenAI's and Anthropic's clients alike."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..app import Json, services

if TYPE_CHECKING:
    from ..registry import Registry
    from ..slots import ModelCard

_PATH = "/v1/models"


def routes() -> list[Route]:
    """The routes of the models. Their ids may have slashes."""
    return [
        Route(_PATH, list_models, methods=["GET"]),
        Route(f"{_PATH}/{{id:path}}", retrieve, methods=["GET"]),
    ]


async def list_models(request: Request) -> Response:
    """All of them."""
    registry: Registry = services(request).registry
    cards = [_as_json(card) for card in registry.names()]
    ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"]} if cards else {}
    return Json({"object": "list", "data": cards, "has_more": False, **ends})


async def retrieve(request: Request) -> Response:
    """One of them. An unknown one is a 404."""
    registry: Registry = services(request).registry
    return Json(_as_json(registry.card(request.path_params["id"])))


def _as_json(card: ModelCard) -> dict[str, Any]:
    """OpenAI's fields, and Anthropic's beside them."""
    created = datetime.fromtimestamp(card.created, timezone.utc)
    return {
        "id": card.id, "object": "model", "created": card.created, "owned_by": card.owned_by,
        "type": "model", "display_name": card.id, "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "state": card.state,
    }  # fmt: skip
