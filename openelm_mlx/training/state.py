"""The state of a run on disk: everything that the next step depends on, in a folder that appears whole or not at all.

    OUTPUT.partial/run.json             what the run is: its settings, and fingerprints of its data and its model
    OUTPUT.partial/state-0000120/       after step 120: trained parameters, optimizer, log; the best parameters so far
    OUTPUT.partial/lock                 held while a process trains

The data's position, the schedule and random numbers follow from the step. A crash leaves the state before.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint.destination import check_destination, check_free_space, destination_error, save_tensors
from ..errors import DestinationError, TrainingError
from ..files import expanded, read_object, shown
from ..finder import sync, sync_folder

_RUN, _LOCK, _STATE = "run.json", "lock", "state.json"
FORMAT = "openelm_mlx training 1"


@dataclass
class State:
    """A run after `step` steps. log: one entry a step (`loop.Trainer`). best: parameters with the lowest validation loss, kept
    only where the run may end early; failures: how often in a row validation has not improved.
    """

    step: int
    parameters: dict[str, Any]
    optimizer: dict[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    best_loss: float | None = None
    failures: int = 0
    seconds: float = 0.0


class RunFolder:
    """The folder beside the output in which a run keeps its state.

    what: identifies the run; a state of another one is refused. Raises DestinationError where the output exists or cannot be
    written, and TrainingError where another run's state, or another process, is in the way.
    """

    def __init__(self, output: str | os.PathLike[str], what: Mapping[str, Any], restart: bool = False) -> None:
        self.output = check_output(output)
        self.folder = _folder_of(self.output)
        self.what = {"format": FORMAT, **json.loads(json.dumps(what))}
        self._lock: BinaryIO | None = None
        try:
            self._open(restart)
        except OSError as error:
            raise destination_error(error, self.output) from error

    def _open(self, restart: bool) -> None:
        if self.folder.exists() and not self._is_ours():
            raise TrainingError(
                f"{self.folder} is there and was not left by a run of training: choose another output, or move it away."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / _LOCK).open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise TrainingError(
                f"Another process is training {self.output}: wait for it, or choose another output."
            ) from None
        if restart:
            for each in self._states():
                shutil.rmtree(each)
        elif (self.folder / _RUN).is_file():
            self._check_same(read_object(self.folder / _RUN, TrainingError))
        _write(self.folder / _RUN, self.what)

    def _is_ours(self) -> bool:
        names = {each.name for each in self.folder.iterdir()} if self.folder.is_dir() else {""}
        return not names or names == {_LOCK} or (_RUN in names and (self.folder / _LOCK).exists())

    def _check_same(self, found: Mapping[str, Any]) -> None:
        if found == self.what or not self._states():
            return
        name, before, now = next(_differences(found, self.what))
        raise TrainingError(
            f"{self.folder} holds an interrupted run with {name} {shown(before)}, and now it is {shown(now)}: run the same as "
            "then to go on with it, pass restart=True to begin anew, or choose another output."
        )

    def load(self) -> State | None:
        """The newest state; None where there is none."""
        found = self._states()
        if not found:
            return None
        try:
            state = read_object(found[-1] / _STATE, TrainingError, most=2**30)
            names = ["parameters", "optimizer", *(["best"] if state["has_best"] else [])]
            arrays = {name: _loaded(found[-1] / f"{name}.safetensors") for name in names}
            made = State(
                state["step"], arrays["parameters"], arrays["optimizer"], state["log"], arrays.get("best"), state["best_loss"],
                state["failures"], state["seconds"],
            )  # fmt: skip
            mx.eval(made.parameters, made.optimizer)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise TrainingError(
                f"The state in {found[-1]} is damaged ({error}): pass restart=True to begin anew."
            ) from error
        return made

    def save(self, state: State) -> None:
        """Write a state, then drop the one before. Raises DestinationError; the one before is still there then."""
        final = self.folder / f"state-{state.step:07d}"
        partial = self.folder / "state.new"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            trees = {"parameters": state.parameters, "optimizer": state.optimizer, "best": state.best}
            needed = sum(array.nbytes for tree in trees.values() if tree for _, array in tree_flatten(tree))
            check_free_space(partial / _STATE, needed)
            for name, tree in trees.items():
                if tree:
                    save_tensors(partial / f"{name}.safetensors", dict(tree_flatten(tree)))
            numbers = {
                "step": state.step, "log": state.log, "best_loss": state.best_loss, "has_best": state.best is not None,
                "failures": state.failures, "seconds": state.seconds,
            }  # fmt: skip
            _write(partial / _STATE, numbers)
            sync_folder(partial)
            if final.exists():  # saved again after the same step
                shutil.rmtree(final)
            partial.rename(final)
            sync_folder(self.folder)
            for old in self._states()[:-1]:
                shutil.rmtree(old)
        except OSError as error:
            with suppress(OSError):
                shutil.rmtree(partial)
            raise destination_error(error, self.output) from error

    def finish(self) -> None:
        """Remove the folder: the output is complete."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another process go on. A folder without a state is removed."""
        if self._lock is not None:
            if not self._states():
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()
            self._lock = None

    def _states(self) -> list[Path]:
        return _states_in(self.folder)


def previous_run(output: str | os.PathLike[str]) -> dict[str, Any]:
    """What an interrupted run to this output is; empty where there is none."""
    place = _folder_of(_real_path(output)) / _RUN
    if not place.is_file() or not any(place.parent.glob("state-*")):
        return {}
    return read_object(place, TrainingError)


def losses_so_far(output: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The log of an interrupted run to this output; empty where there is no state."""
    states = _states_in(_folder_of(_real_path(output)))
    if not states:
        return []
    log: list[dict[str, Any]] = read_object(states[-1] / _STATE, TrainingError, most=2**30)["log"]
    return log


def _states_in(folder: Path) -> list[Path]:
    """The states in a run's folder, the newest last."""
    if not folder.is_dir():
        return []
    return sorted(each for each in folder.glob("state-*") if (each / _STATE).is_file())


def _real_path(output: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(expanded(output, DestinationError)))


def _folder_of(output: Path) -> Path:
    return Path(f"{output}.partial")


def check_output(output: str | os.PathLike[str]) -> Path:
    """The output's path, if it may be written: nothing is there yet. Raises DestinationError."""
    text = os.fspath(output)
    if not text.strip():
        raise DestinationError("output is empty: name the folder that the result is written to.")
    path = _real_path(text)
    check_destination(path)
    try:
        parent = next(each for each in path.parents if each.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise DestinationError(
                f"{text} cannot be written, because {parent} is write-protected: choose another output."
            )
    except OSError as error:
        raise destination_error(error, path) from error
    return path


def _loaded(path: Path) -> dict[str, Any]:
    arrays = cast("dict[str, mx.array]", mx.load(str(path)))
    tree: dict[str, Any] = tree_unflatten(list(arrays.items()))
    return tree


def _write(path: Path, value: Any) -> None:
    beside = path.with_suffix(".new")
    with beside.open("wb") as stream:
        stream.write(json.dumps(value).encode())
        sync(stream)
    beside.replace(path)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Any:
    """(name, before, now) of what is not the same."""
    for name in {**found, **wanted}:
        before, now = found.get(name), wanted.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, prefix)
        else:
            yield f"{prefix}{name}", before, now
