"""What requests may call a model: the names given at the start, their aliases, and nothing else.

A request's model is only ever looked up here. It never becomes a path, a repository or a download.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
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
        self.aliases: dict[str, str] = {}
        for alias, name in aliases.items():
            found = self._find_own(name)
            if found is None:
                raise SettingError(f"The alias {alias} is for {name}, and no model is called that: {self._listed()}.")
            if alias in self._models:
                raise SettingError(f"The alias {alias} is the name of a model: give the alias another name.")
            self.aliases[alias] = found

    def find(self, name: str) -> str | None:
        """The model that a request means: by its name, an alias, its name without the owner, or another program's name."""
        if name in self._models:
            return name
        if name in self.aliases:
            return self.aliases[name]
        return self._find_own(name)

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


def is_repository(source: str) -> bool:
    """Whether a source is downloaded from the Hub."""
    return source not in DEMO_NAMES and not os.path.lexists(source) and is_repo_name(source)
