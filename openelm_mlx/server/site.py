"""The whole server as one application: every route behind the guard, and the models that live as long as it does."""

from __future__ import annotations

from . import metrics
from .app import Services, make_app
from .generation import Generations
from .guard import Guard
from .page import page_routes
from .registry import Registry
from .settings import ServerSettings
from .wire import messages, models, responses


def make_site(settings: ServerSettings, registry: Registry, generations: Generations | None = None) -> Guard:
    """The application that a server runs. Its models are there from the start of its lifespan until the end."""
    counted = metrics.Metrics()
    own = Services(generations or _none(), registry, settings, counted)
    app = make_app(
        own, [*metrics.routes(), *models.routes(), *responses.routes(), *messages.routes(), *page_routes()], registry
    )
    return Guard(app, settings, counted)


def _none() -> Generations:
    return None  # type: ignore[return-value]
