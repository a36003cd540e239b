"""What requests may call a model: the names given at the start, their aliases, and nothing else.

A request's model is only ever looked up here. It never becomes a path, a repository or a download.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

from ..errors import CheckpointError, SettingError
from ..files import shown
from ..finder import files_of
from ..hub.names import is_repo_name, known_name, repo_of
from .settings import ServedModel

DEMO_NAMES = ("demo-openelm", "demo-gpt-oss")


@final
class Names:
    """The models' names and aliases. Raises SettingError for two models of one name, and aliases of nothing."""

    def __init__(self, models: Iterable[ServedModel], aliases: Mapping[str, str]) -> None:
        self._models: dict[str, ServedModel] = {}
        for each in models:
            if (other := self._models.get(each.name)) is not None:
                raise SettingError(
                    f"Two models are called {each.name}: {other.source} and {each.source}. Give one of them another name, as "
                    f"--model NAME={each.source}."
                )
            self._models[each.name] = each
        if not self._models:
            raise SettingError("There is no model to serve: give one with --model.")
        # MODEL:ADAPTER -> both.
        self.adapters = {
            f"{each.name}:{adapter}": (each.name, adapter)
            for each in self._models.values()
            for adapter in each.adapters
        }
        for name in self.adapters:
            if name in self._models:
                raise SettingError(f"{name} is the name of a model and of an adapter: give the adapter another name.")
        self.aliases: dict[str, str] = {}
        for alias, name in aliases.items():
            found = name if name in self.adapters else self._find_own(name)
            if found is None:
                raise SettingError(f"The alias {alias} is for {name}, and no model is called that: {self._listed()}.")
            if alias in self._models or alias in self.adapters:
                raise SettingError(f"The alias {alias} is the name of a model: give the alias another name.")
            self.aliases[alias] = found

    def find(self, name: str) -> tuple[str, str | None] | None:
        """The model that a request means, and its adapter, if it means one.

        A model goes by its name, an alias, its name without the owner, or another program's name; an adapter of it by that,
        a colon, and its own name.
        """
        if name in self._models:
            return name, None
        name = self.aliases.get(name, name)
        if name in self.adapters:
            return self.adapters[name]
        if (own := self._find_own(name)) is not None:
            return own, None
        model, _, adapter = name.rpartition(":")
        found = self._find_own(self.aliases.get(model, model))
        return self.adapters.get(f"{found}:{adapter}")

    def _find_own(self, name: str) -> str | None:
        if name in self._models:
            return name
        released = known_name(name)
        wanted = {
            name.casefold(),
            *(() if released is None else (released.casefold(), released.split("/")[1].casefold())),
        }
        found = [
            each for each in self._models if each.casefold() in wanted or each.rpartition("/")[2].casefold() in wanted
        ]
        return found[0] if len(found) == 1 else None

    def _listed(self) -> str:
        return f"there is {', '.join(self._models)}"


def served_model(value: str) -> ServedModel:
    """A model as the command line gives it: SOURCE, or NAME=SOURCE.

    Raises CheckpointError for a source that cannot be one, without opening it.
    """
    name, equals, source = value.partition("=")
    if not equals or os.path.lexists(value):
        name, source = "", value
    elif not name.strip():
        raise SettingError(f"--model {value} has no name before the =: write NAME=SOURCE.")
    if source in DEMO_NAMES:
        return ServedModel(name or source, source, owned_by="openelm_mlx")
    path = Path(source).expanduser() if source.strip() else None
    if path is not None and os.path.lexists(path):
        return _local_model(name, path)
    if (repo := repo_of(source)) is not None:
        return ServedModel(name or repo[0], source, owned_by=repo[0].split("/")[0])
    from ..sources import locate

    locate(source)  # says what is wrong with it
    raise CheckpointError(f"There is no file or folder {source}: check the path.")


def _local_model(name: str, path: Path) -> ServedModel:
    whole = path.resolve()
    if whole.is_dir() and not any((whole / each).exists() for each in _CONFIGS):
        raise CheckpointError(
            f"{path} has no config.json: give the folder of a model, or --models-folder {path} for many."
        )
    own = whole.name if whole.is_dir() else whole.stem
    return ServedModel(name or own, str(whole), created=_time_of(whole))


# A CoreNet checkpoint has a YAML file.
_CONFIGS = ("config.json", "config.yaml", "config.yml")


def with_adapters(models: Sequence[ServedModel], values: Sequence[str]) -> list[ServedModel]:
    """The models with their adapters, each given as NAME=PATH (of the first model) or MODEL:NAME=PATH. Raises SettingError."""
    found = {each.name: each for each in models}
    for value in values:
        name, equals, path = value.partition("=")
        model, _, adapter = name.rpartition(":")
        owner = found.get(model) if model else next(iter(found.values()))
        if not equals or not adapter.strip() or not path.strip():
            raise SettingError(
                f"--adapter {value} does not say what it is called: write NAME=PATH, or MODEL:NAME=PATH."
            )
        if owner is None:
            raise SettingError(
                f"--adapter {value} is for {model}, and no model is called that: there is {', '.join(found)}."
            )
        if adapter in owner.adapters:
            raise SettingError(f"Two adapters of {owner.name} are called {adapter}: give one of them another name.")
        if not os.path.lexists(Path(path).expanduser()) and not is_repo_name(path):
            raise SettingError(f"--adapter {value}: there is no file or folder {path}: check the path.")
        adapters = {**owner.options.get("adapter", {}), adapter: path}
        found[owner.name] = replace(owner, options={**owner.options, "adapter": adapters})
    return list(found.values())


def models_in(folder: str | Path) -> list[ServedModel]:
    """The models in the folders of a folder: named NAME, or OWNER/NAME where they are a level deeper.

    Raises SettingError when there is none.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise SettingError(f"--models-folder {folder} is not a folder: give one that holds folders of models.")
    found: list[ServedModel] = []
    for each in sorted(_folders(place)):
        if _is_model(each):
            found.append(_named(each, each.name))
        else:
            found += [
                _named(inner, f"{each.name}/{inner.name}") for inner in sorted(_folders(each)) if _is_model(inner)
            ]
    if not found:
        raise SettingError(f"--models-folder {folder} holds no folder with a config.json: put models into it.")
    return found


def _named(path: Path, name: str) -> ServedModel:
    return ServedModel(name, str(path.resolve()), created=_time_of(path))


def _folders(place: Path) -> Sequence[Path]:
    try:
        return [each for each in files_of(place) if not each.name.startswith(".") and each.is_dir()]
    except OSError:
        return []


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _time_of(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0


def parse_aliases(values: Iterable[str]) -> dict[str, str]:
    """ALIAS=NAME pairs as a dictionary. Raises SettingError."""
    aliases: dict[str, str] = {}
    for value in values:
        alias, equals, name = value.partition("=")
        if not equals or not alias.strip() or not name.strip():
            raise SettingError(
                f"--alias {shown(value)} is not of the form ALIAS=NAME, for example gpt-4o-mini=demo-gpt-oss."
            )
        if aliases.get(alias, name) != name:
            raise SettingError(
                f"--alias {alias} is given twice, for {aliases[alias]} and for {name}: give one of them."
            )
        aliases[alias] = name
    return aliases
