"""The whole server as one application: every route behind the guard, and the models that live as long as it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette

from . import metrics
from .answering import ModelGenerations
from .app import Services, make_app
from .counts import Metrics
from .generation import Generations
from .guard import Guard
from .page import page_routes
from .registry import Registry
from .settings import ServerSettings
from .wire import chat, completions, messages, responses
from .wire import models as model_list

if TYPE_CHECKING:
    from .own_tools import OwnTools


def make_site(settings: ServerSettings, registry: Registry) -> Guard:
    """All of it, in one piece. Its models are there from the start of its lifespan until the end."""
    counted = Metrics()
    return Guard(make_inner_site(registry, counted, models=registry), settings, counted)


def make_inner_site(
    registry: Registry, counted: Metrics, tools: OwnTools | None = None, models: Registry | None = None
) -> Starlette:
    """All of it but the guard. tools: that run on this machine. models: as `make_app` has them."""
    generations: Generations = ModelGenerations(registry, counted.answered)
    if tools is not None:
        from .tool_running import ToolGenerations

        generations = ToolGenerations(generations, registry, tools, registry.settings.max_rounds)
    own = Services(generations, registry, counted, tool_names=() if tools is None else tuple(tools.names))
    apis = (chat, completions, responses, messages, model_list, metrics)
    return make_app(own, [*(route for api in apis for route in api.routes()), *page_routes()], models)
