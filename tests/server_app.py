"""The demos behind HTTP, for tests, on a free port: a registry of models that are loaded already."""

import contextlib
from dataclasses import dataclass

from server_running import served

import openelm_mlx as om
from openelm_mlx.server.answering import ModelGenerations
from openelm_mlx.server.app import Services, make_app
from openelm_mlx.server.failures import ApiError


class LoadedModel:
    """A lease of a model that is never given back."""

    def __init__(self, name: str, **options) -> None:
        self.name = name
        self.model, self.tokenizer = om.load(name, context_length=1024 if name == "demo-gpt-oss" else None)
        self.engine = om.Engine(self.model, self.tokenizer, **options)
        self.prefix_cache = om.PrefixCache()
        self.num_leases = 0
        self.adapter = None

    def release(self) -> None:
        self.num_leases -= 1


@dataclass
class Card:
    id: str
    created: int = 1_700_000_000
    owned_by: str = "openelm_mlx"
    state: str = "ready"


class LoadedModels:
    """A registry without loading."""

    def __init__(self, *names: str, **options) -> None:
        self.models = {name: LoadedModel(name, **options) for name in names}

    def names(self) -> list[Card]:
        return [Card(name) for name in self.models]

    def card(self, name: str) -> Card:
        self._check(name)
        return Card(name)

    async def acquire(self, name: str) -> LoadedModel:
        self._check(name)
        self.models[name].num_leases += 1
        return self.models[name]

    def _check(self, name: str) -> None:
        if name not in self.models:
            raise ApiError(404, f"There is no model {name!r}.", param="model", code="model_not_found")

    def close(self) -> None:
        for model in self.models.values():
            model.engine.close()


@contextlib.contextmanager
def served_demos(routes, *names: str, **options):
    """The address, and the registry, of a server of demos."""
    registry = LoadedModels(*names, **options)
    generations = ModelGenerations(registry)
    try:
        with served(make_app(Services(generations, registry), routes)) as address:
            yield address, registry
    finally:
        generations.close()
        registry.close()
