"""Running the tool that a model calls: its arguments checked, what comes of it as text that the model can be told."""

from __future__ import annotations

from collections.abc import Callable

from ..decoding.validation import Validator
from ..text.unicode import whole_characters
from .tool import Tool, read_arguments, result_text

# What of a tool's result the model sees; the rest would push the conversation out of its context.
MOST_RESULT_CHARACTERS = 16_000


def run(tool: Tool, text: str) -> str:
    """What `tool` says when it is called with the arguments that a model wrote."""
    if tool.parameters is None:
        return result_text(tool(text))
    arguments = read_arguments(text)
    # A server checks its calls itself, with what its schemas refer to.
    validator = Validator(tool.parameters, is_lenient=getattr(tool, "is_lenient", False))
    if faults := validator.faults(arguments):
        raise ValueError("the arguments do not follow the schema: " + "; ".join(faults))
    return result_text(tool(arguments))


def reason(error: BaseException) -> str:
    """An exception's words for the model."""
    try:
        text = str(error).strip() or type(error).__name__
    except Exception:  # noqa: BLE001 - a tool's own exception may be broken too
        text = type(error).__name__
    return text if isinstance(error, (ValueError, LookupError)) else f"{type(error).__name__}: {text}"


def shown_to_model(text: str, most_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """A result as the model is told it: whole characters, and no more of it than leaves room for the conversation."""
    text = whole_characters(text)
    kept = min(len(text), MOST_RESULT_CHARACTERS)
    # A token has at least a byte, so that most texts need not be counted.
    while len(text[:kept].encode()) > most_tokens and (count := count_tokens(text[:kept])) > most_tokens:
        kept = min(kept - 1, kept * most_tokens // count)
    if kept == len(text):
        return text
    return f"{text[:kept]}\n[{len(text) - kept:,} more characters were left out: ask for less at a time.]"
