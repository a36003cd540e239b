"""The fastest of equivalent kernels on this machine, as `selfcheck` stored them (models/precision.py, `KernelChoices`)."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..models.precision import KernelChoices, default_choices, runs_on_cpu
from ..models.routing_ways import is_checked, is_range
from .stored import load_stored, store

SUBJECT = "choices"
# Valid values: a file with others was not written by this program.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "rows_in_a_tile": (1, 32, 64, 128), "spare_places": (0, 8), "compiled_step": (False, True),
    "fuse_residual_add": (False, True), "bias_apart": (False, True), "slot_kernel": (False, True),
}  # fmt: skip

# What nobody times, and what is therefore the backend's default whatever is stored.
BY_BACKEND = {"slots", "prompts_in_slots", "prompt_products_to", "fuse_many_residual_adds", "pads_rows"}


def stored_choices() -> KernelChoices | None:
    """The stored choices for this machine; None if there are none, if they cannot be used, and on the CPU backend."""
    if runs_on_cpu():
        return None
    found = load_stored(SUBJECT)
    known = {each.name: found[each.name] for each in fields(KernelChoices) if _is_allowed(each.name, found)}
    if "expert_ways" in known:
        known["expert_ways"] = tuple((first, way) for first, way in known["expert_ways"])
    if "expert_kernel_rows" in known:
        known["expert_kernel_rows"] = tuple(known["expert_kernel_rows"])
    return replace(default_choices(), **known) if known else None


def _is_allowed(name: str, found: dict[str, Any]) -> bool:
    if name == "expert_ways":
        return is_checked(found.get(name))
    if name == "expert_kernel_rows":
        return is_range(found.get(name))
    value, allowed = found.get(name), _ALLOWED.get(name, ())
    return value in allowed and type(value) is type(allowed[0])


def store_choices(chosen: KernelChoices) -> Path:
    """Store the choices for this machine and return the file. Raises DestinationError."""
    return store(SUBJECT, {name: value for name, value in asdict(chosen).items() if name not in BY_BACKEND})
