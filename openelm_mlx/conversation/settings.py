"""Which settings a chat takes, checked when it is made."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, cast

from ..arguments import refuse_unknown
from ..checks import whole_number
from ..decoding.arguments import check_model, check_prefix_cache
from ..decoding.sampling import SamplingParams
from ..engine.many import option_names
from ..errors import SettingError, TokenizerError
from ..text.conversation import check_conversation
from ..tokenizers import missing_tokenizer_message

# Options of `stream_generate` that a chat decides itself.
_OWN_OPTIONS = (
    "max_tokens",
    "tool_schemas",
    "tools",
    "tool_choice",
    "raw",
    "chat_template",
    "reasoning_effort",
    "logprobs",
)

_C = TypeVar("_C")


def refuse_stream_options(kind: type[_C]) -> type[_C]:
    """A class decorator: options of `stream_generate` as keywords are refused, with the way to write them."""
    construct = cast(Any, kind).__init__
    known = [each.name for each in fields(cast(Any, kind))]

    @wraps(construct)
    def __init__(self: _C, *args: Any, **keywords: Any) -> None:
        for name in (keywords.keys() - set(known)) & set(option_names()):
            raise SettingError(
                f"{kind.__name__} has no keyword {name!r}: write options={{{name!r}: {reprlib.repr(keywords[name])}}}."
            )
        construct(self, *args, **keywords)

    cast(Any, kind).__init__ = __init__
    return kind


def check_settings(chat: Any) -> None:
    """Raise for the first setting of a `Chat` that cannot be used: SettingError, TokenizerError or PromptError.

    `tools` becomes a list. Nothing is assumed of the types: a caller may have given anything.
    """
    check_model(chat.model, chat.tokenizer)
    if chat.tokenizer is None:
        raise TokenizerError(missing_tokenizer_message(chat.model.spec))
    if not isinstance(chat.instructions, (str, type(None))):
        raise SettingError(f"instructions is {reprlib.repr(chat.instructions)}: give text, or None for none.")
    if isinstance(chat.tools, (str, Mapping)) or not isinstance(chat.tools, Iterable):
        raise SettingError(
            f"tools is {reprlib.repr(chat.tools)}: give a list of functions or tools, for example tools=[calculator]."
        )
    chat.tools = list(chat.tools)
    if not isinstance(chat.sampling, (SamplingParams, type(None))):
        raise SettingError(
            f"sampling is {reprlib.repr(chat.sampling)}: give om.SamplingParams(temperature=0.7, ...), or None."
        )
    for name in ("max_tokens", "max_rounds"):
        value = getattr(chat, name)
        if value is None and name == "max_tokens":
            continue
        whole_number(name, value)
    limit = chat.time_limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
        raise SettingError(f"time_limit is {limit!r}: give seconds above 0, or None.")
    check_prefix_cache(chat.prefix_cache)
    if not isinstance(chat.options, Mapping):
        raise SettingError(f"options is {reprlib.repr(chat.options)}: give a dictionary of keywords.")
    known = [name for name in option_names() if name not in _OWN_OPTIONS]
    refuse_unknown("Chat's options", {n: v for n, v in chat.options.items() if n not in known}, known)
    if not isinstance(chat.messages, list):
        raise SettingError(f"messages is {reprlib.repr(chat.messages)}: give a list of messages.")
    check_conversation(chat.messages)
