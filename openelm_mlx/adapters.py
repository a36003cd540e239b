"""The adapters that a loaded model serves: added, taken away and chosen, without loading the model again.

    om.add_adapter(model, "my-adapter")             # read beside the model; used from now on where nothing else is said
    om.generate(model, tokenizer, prompt, adapter="none")
    om.remove_adapter(model, "my-adapter")

Where adapters are found, and how one is checked against the model, is said here; the files are read by
checkpoint/adapter_files.py, and the arithmetic is in models/.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from . import hub
from .arguments import FLAG, NAME, PATH, checked_call
from .checkpoint.adapter_files import (
    CONFIG,
    FORMATS,
    MLX_LM_WEIGHTS,
    PEFT_WEIGHTS,
    read_adapter,
    write_adapter,
)
from .checks import size
from .decoding.arguments import check_model
from .decoding.pieces import forget_other_adapters
from .errors import CheckpointError, DestinationError, MemoryLimitError, SettingError
from .files import expanded, hears_the_disk, shown
from .hub import Progress
from .memory.machine import backend_name
from .memory.scratch import LAYERS_IN_FLIGHT
from .models.adapter_sets import NO_ADAPTER
from .models.adapter_sites import module_at
from .models.adapter_stacks import served_bytes, without_adapter
from .models.adapter_targets import targets_of
from .models.adapters import added
from .models.low_rank import Adapter
from .runtime import runtime_of
from .sources import Source, SourceName, path_here, repository
from .specs import ModelSpec, openelm_config

if TYPE_CHECKING:
    from .checkpoint.layouts import Contents
    from .checkpoint.reader import Checkpoint
    from .models import Model

# How often the outputs of the widest module are there once more, on the CPU (measured, tests/test_adapters.py).
_COPIES = 3

# One adapter, or several by the names that requests use.
Adapters = SourceName | Mapping[str, SourceName]


@hears_the_disk(CheckpointError)
def locate_adapter(source: SourceName, progress: Progress | None = None) -> Path:
    """The folder or file of an adapter on this machine; of a Hugging Face repository it is downloaded first."""
    here = path_here(source)
    if here is not None:
        return here
    found = repository(source)
    if found is None:
        raise CheckpointError(
            f"There is no adapter at {source}: check the path, or give a Hugging Face repository as owner/name."
        )
    return hub.download(found[0], _adapter_files, revision=found[1], progress=progress)


def _name_of(source: SourceName, place: Path) -> str:
    """What an adapter is called where nobody says: the repository's last name, or the folder's or file's."""
    found = repository(source) if path_here(source) is None else None
    if found is not None:
        return found[0].rpartition("/")[2]
    if place.name in (CONFIG, PEFT_WEIGHTS, MLX_LM_WEIGHTS):
        place = place.parent
    return place.stem if place.is_file() else place.resolve().name


def _adapter_files(files: Any) -> list[str]:
    names = {file.name for file in files}
    wanted = [name for name in (CONFIG, PEFT_WEIGHTS, MLX_LM_WEIGHTS) if name in names]
    if CONFIG not in wanted or len(wanted) < 2:
        raise CheckpointError(
            f"The repository holds no adapter: there is no {CONFIG} with a safetensors file beside it."
        )
    return wanted


@checked_call("om.add_adapter", name=NAME, activate=FLAG)
def add_adapter(model: Model, source: SourceName, name: str | None = None, activate: bool = True) -> str:
    """Read an adapter and put it beside the model's weights; returns its name.

    Requests name it (`adapter=`), those at work are not disturbed, and the weights are not read again.

    Args:
        source: A folder of PEFT's or mlx-lm's, CoreNet's file, or a Hugging Face repository as owner/name.
        name: What requests call it; its folder's name when it is None. One of that name that is there already
            is replaced: requests that use it end with an error.
        activate: Whether it is used where a request names none.

    Raises CheckpointError or ConfigError for what is no adapter of this model, MemoryLimitError where the plan has no
    room for it.
    """
    check_model(model)
    if model.runtime is not None and model.runtime.group is not None:
        raise SettingError(
            "An adapter is not put beside a model that several machines share: merge it into a copy of the model first "
            "(om.convert, adapter=)."
        )
    place = locate_adapter(source)
    adapter = read_adapter(place, _whole_spec(model))
    check_base(adapter, None if not adapter.base.get("hash") else base_hash(model))
    name = checked_name(_name_of(source, place) if name is None else name)
    check_room_for_adapter(model, adapter, name)
    put_adapter(model, name, adapter, activate)
    return name


def put_adapter(
    model: Model, name: str, adapter: Adapter, activate: bool = True, id: str | None = None, is_planned: bool = False
) -> None:
    """Serve an adapter that has been read, or trained, under this name; one of the same name is replaced.

    id: what requests know it by, where that is known already. is_planned: the memory plans of all machines count it.
    """
    adapters, others = model.adapters, runtime_of(model).others
    id, kept = adapter_id(adapter) if id is None else id, None
    if others is not None:
        adapter, kept = others.give_adapter(name, adapter, is_planned)
    if name in adapters.served.names:
        remove_adapter(model, name)
    served = added(model, name, id, adapter, kept)
    mx.eval(served.arrays)  # not by the first of several threads, and not in pieces of the first pass
    adapters.served = served
    _plan_again(model)
    if activate:
        adapters.active = name


def _whole_spec(model: Model) -> ModelSpec:
    """Of all layers, also where other machines have some of them."""
    others = runtime_of(model).others
    return model.spec if others is None else others.source.spec


@checked_call("om.remove_adapter", name=NAME)
def remove_adapter(model: Model, name: str) -> None:
    """Take an adapter away and free its memory, on every machine; requests that use it end with an error.

    Raises SettingError where there is none of that name.
    """
    check_model(model)
    adapters = model.adapters
    _check_known(model, name)
    if adapters.active == name:
        adapters.active = None
    served = without_adapter(adapters.served, name)
    mx.eval(served.arrays)
    adapters.served = served
    forget_other_adapters(model)
    _plan_again(model)


@checked_call("om.use_adapter")
def use_adapter(model: Model, name: str | None) -> None:
    """Which adapter is used where a request names none; None, or "none": the model without one. Raises SettingError."""
    check_model(model)
    if name is None or name == NO_ADAPTER:
        model.adapters.active = None
        return
    _check_known(model, name)
    model.adapters.active = name


@checked_call("om.adapter_names")
def adapter_names(model: Model) -> tuple[str, ...]:
    """The adapters that requests may name, in the order in which they were added."""
    check_model(model)
    return model.adapters.served.names


@hears_the_disk(CheckpointError)
@checked_call("om.convert_adapter", destination=PATH, format=NAME)
def convert_adapter(
    source: SourceName, destination: str | os.PathLike[str], base: SourceName, format: str = "peft"
) -> Path:
    """Write an adapter in another format; returns where it is.

    Args:
        source: As in `add_adapter`.
        destination: A folder that does not exist yet; of CoreNet's format a file whose name ends in .pt, beside
            which its YAML is written.
        base: The model that it belongs to; of its files only headers are read, unless the format is CoreNet's, which
            holds the base too.
        format: "peft", "mlx-lm" or "corenet".

    Raises CheckpointError, ConfigError for what cannot be read, SettingError for what the format cannot hold, and
    DestinationError.
    """
    if format not in FORMATS:
        raise SettingError(f"format is {shown(format)}: choose one of {', '.join(FORMATS)}.")
    opened = Source.open(base, headers_only=format != "corenet")
    adapter = read_adapter(locate_adapter(source), opened.spec)
    if format != "corenet":
        return write_adapter(os.fspath(destination), adapter, opened.spec, format)
    from .checkpoint.adapter_corenet import write_corenet

    if opened.contents.quantized:
        raise SettingError("CoreNet's files hold plain weights, and this base is quantized: give the original as base.")
    weights = ((each.name, each.read(opened.checkpoint)) for each in opened.contents.parameters.values())
    fields = {key: value for key, value in openelm_config(opened.spec).items() if not key.endswith("_token_id")}
    return write_corenet(expanded(destination, DestinationError), adapter, opened.spec, weights, fields)


def _check_known(model: Model, name: object) -> None:
    if not isinstance(name, str) or name not in model.adapters.served.names:
        known = ", ".join(model.adapters.served.names) or "none"
        raise SettingError(f"The model has no adapter {shown(name)}: it has {known}.")


def checked_name(name: str) -> str:
    """A name for an adapter. Raises SettingError for one that means something else, or cannot be typed."""
    if name == NO_ADAPTER or not name.isprintable() or not name.strip() or len(name) > 200:
        raise SettingError(f"An adapter cannot be called {shown(name)}: give it another name.")
    return name


def given_adapters(given: Adapters | None, spec: ModelSpec, progress: Progress | None = None) -> dict[str, Adapter]:
    """Name -> adapter of what `adapter=` gives: one, or several by name. Raises SettingError, CheckpointError, ConfigError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        place = locate_adapter(given, progress)
        return {checked_name(_name_of(given, place)): read_adapter(place, spec)}
    sources = {checked_name(str(name)): source for name, source in given.items()}
    for name, source in sources.items():
        if not isinstance(source, str | os.PathLike):
            raise SettingError(f"The adapter {shown(name)} is {shown(source)}: give a path, or a repository.")
    return {name: read_adapter(locate_adapter(source, progress), spec) for name, source in sources.items()}


def bytes_of(spec: ModelSpec, adapters: Mapping[str, Adapter]) -> int:
    """What these adapters take in memory while they are served."""
    targets = targets_of(spec)
    return sum(served_bytes(targets, each) for each in adapters.values())


def planned_bytes(spec: ModelSpec, adapters: Mapping[str, Adapter], backend: str) -> tuple[int, int]:
    """What a plan counts for these adapters: their bytes, and what they take for each token of a pass."""
    targets = targets_of(spec)
    sites = {targets[name].site for each in adapters.values() for name in each.pairs}
    return bytes_of(spec, adapters), scratch_per_token(spec, sites, backend)


def scratch_per_token(spec: ModelSpec, sites: Collection[str], backend: str) -> int:
    """Bytes that adapters beside the modules at `sites` take for each token of a pass, beside what the model takes.

    A module's outputs are there in float32 as well: the change and the sum. The CPU computes one part of a layer at a time,
    of which the widest counts; on a GPU all modules of the layers count that are in memory at the same time.
    """
    rows: dict[int | None, list[int]] = {}
    for target in targets_of(spec).values():
        if target.site in sites and not target.is_embedding and target.layer is not None:
            times = spec.layers[target.layer].experts_per_token if target.num_experts else 1
            rows.setdefault(target.layer, []).append(target.rows * times)
    if backend == "cpu":
        return 4 * _COPIES * max((max(each) for each in rows.values()), default=0)
    return 4 * LAYERS_IN_FLIGHT[backend] * max((sum(each) for each in rows.values()), default=0)


def _plan_again(model: Model) -> None:
    """The model's plan with the adapters that it has now."""
    runtime, served = runtime_of(model), model.adapters.served
    if runtime.plan is not None:
        plan, nbytes = runtime.plan, served.nbytes
        backend = backend_name() if plan.machine is None else plan.machine.backend
        scratch = scratch_per_token(model.spec, served.stacks.keys(), backend)
        runtime.plan = replace(
            plan,
            weights_bytes=plan.weights_bytes + nbytes - plan.adapter_bytes,
            scratch_bytes=plan.scratch_bytes + (scratch - plan.adapter_scratch) * plan.prefill_chunk,
            total_bytes=plan.total_bytes + nbytes - plan.adapter_bytes,
            adapter_bytes=nbytes,
            adapter_scratch=scratch,
        )


def check_room_for_adapter(model: Model, adapter: Adapter, name: str) -> None:
    """Raise MemoryLimitError where the model's plan has no room for another adapter on this machine."""
    plan = runtime_of(model).plan
    if plan is None:
        return
    targets = targets_of(model.spec)
    # What goes to other machines stays here too, for one that comes back.
    elsewhere = sum(pair.nbytes for each, pair in adapter.pairs.items() if each not in targets)
    needed = served_bytes(targets, adapter) + elsewhere
    # While stacks are made anew, what is there is there twice.
    there = model.adapters.served.nbytes
    in_use = mx.get_active_memory()
    if in_use + needed + there + plan.scratch_bytes > plan.budget_bytes:
        raise MemoryLimitError(
            f"The adapter {name} takes {size(needed)}, and beside the model and its requests ({size(in_use)}) and computing "
            f"({size(plan.scratch_bytes)}) the {size(plan.budget_bytes)} allowed have no room for it: remove another one, or "
            "load the model with it (adapter=), so that it is planned for."
        )


# --- which model it belongs to ----------------------------------------------------------------------------------------


def adapter_id(adapter: Adapter) -> str:
    """A digest of all its numbers: two adapters with the same answer alike."""
    digest = hashlib.sha256(repr(adapter.ties_head).encode())
    for name, pair in adapter.pairs.items():
        digest.update(f"{name} {pair.scale!r}".encode())
        for array in (pair.a, pair.b, *([] if pair.magnitude is None else [pair.magnitude])):
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(np.array(array.astype(mx.float32))).tobytes())
    return digest.hexdigest()


def check_base(adapter: Adapter, known: str | None) -> None:
    """Raise CheckpointError where an adapter says that it was trained beside other weights. known: the model's base hash."""
    theirs = adapter.base.get("hash")
    if theirs and known and theirs != known and theirs.partition(":")[0] == known.partition(":")[0]:
        name = adapter.base.get("name")
        raise CheckpointError(
            f"The adapter was trained beside other weights{f' ({name})' if name else ''} than this model's (hash "
            f"{theirs.partition(':')[2][:12]}, not {known.partition(':')[2][:12]}): load that model, or train it again beside "
            "this one."
        )


def base_hash(model: Model) -> str:
    """A hash of a model's weights that stays the same when it is converted: of its norms, sinks and biases, which nothing
    packs, rounded to bfloat16. Of weights in float16, which round otherwise, it begins with "f16". Where other machines have
    layers, of this machine's copy of the files.
    """
    others = runtime_of(model).others
    if others is not None:
        return stored_base_hash(others.source.contents, others.source.checkpoint)
    vectors = {}
    for name, shape in model.spec.parameter_shapes().items():
        if len(shape) == 1:
            module, _, part = name.rpartition(".")
            vectors[name] = module_at(model, _site(model, module))[part]
    return _hash(vectors)


def _site(model: Model, module: str) -> str:
    found = module_at(model, module)
    return f"{module}.base" if "base" in found else module


def stored_base_hash(contents: Contents, checkpoint: Checkpoint) -> str:
    """The same of a checkpoint, from its files; little is read."""
    names = [name for name, shape in contents.spec.parameter_shapes().items() if len(shape) == 1]
    return _hash({name: contents.parameters[name].read(checkpoint) for name in names})


def _hash(vectors: Mapping[str, mx.array]) -> str:
    is_half = any(each.dtype == mx.float16 for each in vectors.values())
    digest = hashlib.sha256()
    for name in sorted(vectors):
        value = vectors[name].astype(mx.float16 if is_half else mx.bfloat16).astype(mx.float32)
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(np.array(value)).tobytes())
    return f"{'f16' if is_half else 'bf16'}:{digest.hexdigest()}"
