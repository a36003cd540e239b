"""Regular expressions out of files: which module a setting is for."""

from __future__ import annotations

from typing import Annotated

from ..errors import ConfigError
from ..files import shown

_LONGEST = 1000


def fits(pattern: str, text: str) -> bool:
    """Whether a file's pattern matches `text`, in linear time. Raises ConfigError for what is none.

    A hostile pattern would keep Python's own engine busy for years; pydantic's engine is linear, without look-around.
    """
    from pydantic import StringConstraints, TypeAdapter, ValidationError
    from pydantic_core import SchemaError

    try:
        checker = TypeAdapter(Annotated[str, StringConstraints(pattern=pattern[:_LONGEST])])
        checker.validate_python(text)
    except ValidationError:
        return False
    except SchemaError as error:
        raise ConfigError(
            f"The config's adapter pattern {shown(pattern)} is not a supported regular expression: correct it."
        ) from error
    return True
