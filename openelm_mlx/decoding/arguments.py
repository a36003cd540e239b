"""What a Python call can get wrong before anything is looked at: a keyword that does not exist, a model that is none."""

from __future__ import annotations

import difflib
import inspect
import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, cast

from ..errors import SettingError
from ..text.tokenizer import Tokenizer
from .prefix_cache import PrefixCache
from .sampling import SamplingParams

_F = TypeVar("_F", bound=Callable[..., Any])
_SAMPLING = tuple(field.name for field in fields(SamplingParams))
# What other libraries call the same.
_OTHER_NAMES = {
    "max_new_tokens": "max_tokens", "num_predict": "max_tokens", "n_predict": "max_tokens",
    "stop_strings": "stop", "stop_sequences": "stop", "json_schema": "schema", "draft_model": "draft",
    "system": "instructions", "system_prompt": "instructions",
}  # fmt: skip
_OTHER_SAMPLING = {"temp": "temperature", "repeat_penalty": "repetition_penalty"}


def refuse_unknown(what: str, unknown: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise SettingError, with what to write instead, when there are keywords that `what` does not know."""
    sampling = [name for name in unknown if _OTHER_SAMPLING.get(name, name) in _SAMPLING]
    if sampling:
        written = ", ".join(f"{_OTHER_SAMPLING.get(name, name)}={reprlib.repr(unknown[name])}" for name in sampling)
        raise SettingError(f"{what} has no keyword {sampling[0]!r}: write sampling=om.SamplingParams({written}).")
    for name in unknown:
        near = _OTHER_NAMES.get(name)
        near = near if near in known else next(iter(difflib.get_close_matches(name, known, 1)), None)
        advice = f"Did you mean {near}?" if near else f"There are: {', '.join(known)}."
        raise SettingError(f"{what} has no keyword {name!r}. {advice}")


def refusing_unknown(what: str) -> Callable[[_F], _F]:
    """A decorator: the function says what to write in place of a keyword that it does not have."""

    def decorate(function: _F) -> _F:
        known = [each.name for each in inspect.signature(function).parameters.values()]

        @wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            unknown = {name: value for name, value in keywords.items() if name not in known}
            sampling = [name for name in unknown if _OTHER_SAMPLING.get(name, name) in _SAMPLING]
            if sampling:
                raise SettingError(
                    f"{what} has no keyword {sampling[0]!r}: it is for om.generate, in sampling=om.SamplingParams(...)."
                )
            refuse_unknown(what, unknown, known)
            return function(*args, **keywords)

        return cast(_F, checked)

    return decorate


def check_model(model: object, tokenizer: object = None) -> None:
    """Raise SettingError when something else was given where the two results of `om.load` belong."""
    if isinstance(model, (str, os.PathLike)):
        raise SettingError(
            f"The model is {os.fspath(model)!r}, which only names one: load it first, "
            f"model, tokenizer = om.load({os.fspath(model)!r})."
        )
    if isinstance(model, (tuple, list)):
        raise SettingError(
            "The model is all that om.load returned: take it apart first, model, tokenizer = om.load(...)."
        )
    # A module of MLX is a dict too.
    if model is None or type(model) is dict or isinstance(model, (Tokenizer, int, float, type)):
        raise SettingError(f"The model is a {type(model).__name__}: give the first of the two that om.load returns.")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise SettingError(
            f"The tokenizer is a {type(tokenizer).__name__}: give the second of the two that om.load returns, or None."
        )


def check_prefix_cache(prefix_cache: object) -> None:
    """Raise SettingError for what is no prefix cache."""
    if prefix_cache is not None and not isinstance(prefix_cache, PrefixCache):
        raise SettingError(f"prefix_cache is {reprlib.repr(prefix_cache)}: give om.PrefixCache(), or None for none.")
