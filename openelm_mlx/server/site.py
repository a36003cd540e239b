"""The whole server as one application: every route behind the guard, and the models that live as long as it does."""

from __future__ import annotations

from starlette.applications import Starlette

from . import metrics
from .answering import ModelGenerations
from .app import Services, make_app
from .counts import Metrics
from .guard import Guard
from .page import page_routes
from .registry import Registry
from .settings import ServerSettings
from .wire import chat, completions, messages, responses
from .wire import models as model_list


def make_site(settings: ServerSettings, registry: Registry) -> Guard:
    """All of it, in one piece. Its models are there from the start of its lifespan until the end."""
    counted = Metrics()
    return Guard(make_inner_site(registry, counted, models=registry), settings, counted)


def make_inner_site(registry: Registry, counted: Metrics, models: Registry | None = None) -> Starlette:
    """All of it but the guard. models: as `make_app` has them."""
    own = Services(ModelGenerations(registry, counted.answered), registry, counted)
    apis = (chat, completions, responses, messages, model_list, metrics)
    return make_app(own, [*(route for api in apis for route in api.routes()), *page_routes()], models)
