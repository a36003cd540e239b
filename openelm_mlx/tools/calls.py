"""Running a tool call: its arguments are checked against the schema, and its result becomes text for the model."""

from __future__ import annotations

from collections.abc import Callable

from ..decoding.validation import Validator
from ..text.unicode import whole_characters
from .tool import Tool, read_arguments, result_text

# The longest tool result that the model is shown; more would push the conversation out of its context.
MOST_RESULT_CHARACTERS = 16_000


def run(tool: Tool, text: str) -> str:
    """The result of `tool` for the arguments that a model wrote."""
    if tool.parameters is None:
        return result_text(tool(text))
    arguments = read_arguments(text)
    # A server checks its calls itself, and knows what its schemas refer to.
    validator = Validator(tool.parameters, is_lenient=getattr(tool, "is_lenient", False))
    if faults := validator.faults(arguments):
        raise ValueError("the arguments do not follow the schema: " + "; ".join(faults))
    return result_text(tool(arguments))


def reason(error: BaseException) -> str:
    """An exception's message, for the model."""
    try:
        text = str(error).strip() or type(error).__name__
    except Exception:  # noqa: BLE001 - a tool's own exception may be broken too
        text = type(error).__name__
    return text if isinstance(error, (ValueError, LookupError)) else f"{type(error).__name__}: {text}"


def shown_to_model(text: str, most_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """A result as the model gets it: whole characters only, cut so that room for the conversation is left."""
    text = whole_characters(text)
    kept = min(len(text), MOST_RESULT_CHARACTERS)
    # A token has at least a byte, so that most texts need not be counted.
    while len(text[:kept].encode()) > most_tokens and (count := count_tokens(text[:kept])) > most_tokens:
        kept = min(kept - 1, kept * most_tokens // count)
    if kept == len(text):
        return text
    return f"{text[:kept]}\n[{len(text) - kept:,} more characters were left out: ask for less at a time.]"
