"""Checks of a call from Python before it does anything: names, number and types of the arguments.

Python's own TypeError talks about a function's internals. `checked_call` says instead what was given and what to write.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

from .errors import SettingError, UserError
from .files import shown

_T = TypeVar("_T", bound=Callable[..., Any])

# The fields of SamplingParams, for callers that pass them as plain keywords.
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "seed",
)  # fmt: skip
# Names that other libraries use for the same.
_OTHER_NAMES = {
    "max_new_tokens": "max_tokens", "num_predict": "max_tokens", "n_predict": "max_tokens",
    "stop_strings": "stop", "stop_sequences": "stop", "json_schema": "schema", "draft_model": "draft",
    "system": "instructions", "system_prompt": "instructions",
    "temp": "temperature", "repeat_penalty": "repetition_penalty",
}  # fmt: skip


class Kind(NamedTuple):
    """Which values an argument accepts, and how an error says so."""

    accepts: Callable[[object], bool]
    wanted: str


def _is_path(value: object) -> bool:
    if not isinstance(value, (str, os.PathLike)):
        return False
    name = os.fspath(value)
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a character
        return False
    return True


FLAG = Kind(lambda value: isinstance(value, bool), "give True or False")
FUNCTION = Kind(callable, "give a function")
NAME = Kind(lambda value: isinstance(value, str) and bool(value), "give it as text, not empty")
PATH = Kind(_is_path, "give a path, as text or as a pathlib.Path")
SECONDS = Kind(
    lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"),
    "give seconds, a number above 0",
)
TEXT = Kind(lambda value: isinstance(value, str), "give text")
VARIABLES = Kind(
    lambda value: isinstance(value, Mapping) and all(isinstance(each, str) for item in value.items() for each in item),
    "give a dictionary of text to text",
)


def of_type(kind: type, example: str) -> Kind:
    """Accepts objects of `kind`. example: how to make one."""
    return Kind(lambda value: isinstance(value, kind), f"give {example}")


def checked_call(what: str, error: type[UserError] = SettingError, /, **kinds: Kind) -> Callable[[_T], _T]:
    """A decorator for public functions and classes: a call that Python would refuse raises `error`, with a sentence.

    what: the name as a program writes it. kinds: of arguments that nothing else checks; None is accepted where it is the
    default.
    """

    def decorate(target: _T) -> _T:
        function = cast(Any, target).__init__ if isinstance(target, type) else target
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        is_method = parameters[0].name == "self"
        accepted = _accepted(parameters[is_method:])
        assert kinds.keys() <= {*accepted.named}, what

        @wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            own = args[is_method:]
            _check_call(what, error, accepted, own, keywords)
            given = {**dict(zip(accepted.in_order, own, strict=False)), **keywords}
            for name, kind in kinds.items():
                if name in given:
                    default = signature.parameters[name].default
                    check_kind(name, given[name], kind, error, may_be_none=default is None)
            return function(*args, **keywords)

        if not isinstance(target, type):
            return cast(_T, checked)
        cast(Any, target).__init__ = checked
        return target

    return decorate


def check_kind(
    name: str, value: object, kind: Kind, error: type[UserError] = SettingError, *, may_be_none: bool = False
) -> None:
    """Raise `error` for a value of another kind than the argument `name` has."""
    if (value is None and may_be_none) or kind.accepts(value):
        return
    raise error(f"{name} is {shown(value)}: {kind.wanted}{', or leave it out' if may_be_none else ''}.")


class _Accepted(NamedTuple):
    """Names of a function's parameters: all, those that need no name in a call, and those without a default.

    takes_any: whether it takes others too.
    """

    named: list[str]
    in_order: list[str]
    required: list[str]
    takes_any: bool


def _accepted(parameters: list[inspect.Parameter]) -> _Accepted:
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    return _Accepted(
        [each.name for each in named],
        [each.name for each in named if each.kind is each.POSITIONAL_OR_KEYWORD],
        [each.name for each in named if each.default is each.empty],
        any(each.kind is each.VAR_KEYWORD for each in parameters),
    )


def _check_call(
    what: str,
    error: type[UserError],
    accepted: _Accepted,
    args: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> None:
    named, in_order = accepted.named, accepted.in_order
    if not accepted.takes_any:
        refuse_unknown(what, {name: value for name, value in keywords.items() if name not in named}, named, error)
    if len(args) > len(in_order):
        others = [name for name in named if name not in in_order[: len(args)]]
        advice = f"name the others, for example {others[0]}=..." if others else f"there are {', '.join(named)}"
        raise error(
            f"{what} takes {len(in_order) or 'no'} value{'s' * (len(in_order) != 1)} without a name and got {len(args)}, the "
            f"first one too many {shown(args[len(in_order)])}: {advice}."
        )
    given = in_order[: len(args)]
    for name in given:
        if name in keywords:
            raise error(
                f"{what} got {name} twice, as {shown(args[given.index(name)])} and as {name}={shown(keywords[name])}: give "
                "one of them."
            )
    for name in accepted.required:
        if name not in given and name not in keywords:
            raise error(f"{what} has no {name}: write {what}({', '.join([*accepted.required, '...'])}).")


def refuse_unknown(
    what: str, unknown: Mapping[str, Any], known: Collection[str], error: type[UserError] = SettingError
) -> None:
    """Raise `error`, with what to write instead, when there are keywords that `what` does not know."""
    sampling = [name for name in unknown if (_OTHER_NAMES.get(name, name)) in SAMPLING]
    if sampling and not set(SAMPLING) & set(known):
        written = ", ".join(f"{_OTHER_NAMES.get(name, name)}={shown(unknown[name])}" for name in sampling)
        if "sampling" in known:
            raise error(f"{what} has no keyword {sampling[0]!r}: write sampling=om.SamplingParams({written}).")
        raise error(
            f"{what} has no keyword {sampling[0]!r}: it is for om.generate, in sampling=om.SamplingParams({written})."
        )
    for name in unknown:
        near = _OTHER_NAMES.get(name)
        near = near if near in known else next(iter(difflib.get_close_matches(name, known, 1)), None)
        advice = f"Did you mean {near}?" if near else f"There are: {', '.join(known)}." if known else "There are none."
        raise error(f"{what} has no keyword {name!r}. {advice}")
