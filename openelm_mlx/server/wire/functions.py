"""Functions that clients define, in whichever API's words."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from ...text.schema import Tool
from ..failures import bad_request

# The longest name of a function: its header stays shorter than what would be taken for an answer without a header.
LONGEST_NAME = 128


def function_of(name: Any, description: Any, parameters: Any, place: str, schema_key: str = "parameters") -> Tool:
    """The function that the client defined at `place`. Raises ApiError, a 400 that names it."""
    if isinstance(name, str) and len(name) > LONGEST_NAME:
        message = f"{place}.name has {len(name)} characters: use at most {LONGEST_NAME}."
        raise bad_request(message, f"{place}.name")
    try:
        return Tool(name, description or "", parameters)
    except UserError as error:
        at = f"{place}.{schema_key}" if str(error).startswith("The parameters") else place
        raise bad_request(str(error), at) from None
