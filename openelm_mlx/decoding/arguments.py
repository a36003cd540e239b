"""Checks of the arguments model, tokenizer and prefix_cache."""

from __future__ import annotations

import os
import reprlib

from ..errors import SettingError
from ..text.tokenizer import Tokenizer
from .prefix_cache import PrefixCache


def check_model(model: object, tokenizer: object = None) -> None:
    """Raise SettingError unless the arguments are the two results of `om.load`."""
    if isinstance(model, (str, os.PathLike)):
        raise SettingError(
            f"The model is {os.fspath(model)!r}, only its name: load it first, "
            f"model, tokenizer = om.load({os.fspath(model)!r})."
        )
    if isinstance(model, (tuple, list)):
        raise SettingError(
            "The model is the whole result of om.load: unpack it first, model, tokenizer = om.load(...)."
        )
    # Anything with a spec is accepted: programs wrap models.
    if isinstance(model, type) or getattr(model, "spec", None) is None:
        raise SettingError(f"The model is a {type(model).__name__}: give the first of the two that om.load returns.")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise SettingError(
            f"The tokenizer is a {type(tokenizer).__name__}: give the second of the two that om.load returns, or None."
        )


def check_prefix_cache(prefix_cache: object) -> None:
    """Raise SettingError for what is not a prefix cache."""
    if prefix_cache is not None and not isinstance(prefix_cache, PrefixCache):
        raise SettingError(f"prefix_cache is {reprlib.repr(prefix_cache)}: give om.PrefixCache(), or None for none.")
