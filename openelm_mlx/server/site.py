"""The whole server as one application: every route behind the guard, and the models that live as long as it does."""

from __future__ import annotations

from starlette.applications import Starlette

from . import metrics
from .answering import ModelGenerations
from .app import Services, make_app
from .generation import Generations
from .guard import Guard
from .page import page_routes
from .registry import Registry
from .settings import ServerSettings
from .wire import chat, completions, messages, models, responses


def make_site(settings: ServerSettings, registry: Registry, generations: Generations | None = None) -> Guard:
    """The application that a server runs. Its models are there from the start of its lifespan until the end."""
    counted = metrics.Metrics()
    return Guard(make_inner_site(settings, registry, counted, generations), settings, counted)


def make_inner_site(
    settings: ServerSettings, registry: Registry, counted: metrics.Metrics, generations: Generations | None = None
) -> Starlette:
    """All of it but the guard."""
    own = Services(generations or ModelGenerations(registry, counted.answered), registry, settings, counted)
    apis = (chat, completions, responses, messages, models, metrics)
    return make_app(own, [*(route for api in apis for route in api.routes()), *page_routes()], registry)
