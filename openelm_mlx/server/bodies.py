"""Requests' bodies: from JSON to a checked model, with errors that name the field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from starlette.requests import Request

from ..files import shown
from .failures import ApiError, bad_request

Model = TypeVar("Model", bound=BaseModel)


def _whole(value: Any) -> Any:
    """Some clients have only one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WholeNumber = Annotated[int, BeforeValidator(_whole)]


class Wire(BaseModel):
    """A JSON object of a request. Fields that it does not know are ignored; null means that a field was not given."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {name: value for name, value in data.items() if value is not None}
        return data


async def read_body(request: Request, model: type[Model]) -> Model:
    """The request's body. Raises ApiError, a 400 that names the field."""
    return parsed(await request.body(), model)


def parsed(body: bytes, model: type[Model]) -> Model:
    """A body as `model`. Raises ApiError."""
    try:
        data = json.loads(body, parse_constant=_no_number)
    except RecursionError:
        raise ApiError(400, "The request's JSON is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        reason = str(error) if not isinstance(error, UnicodeDecodeError) else "it is not UTF-8"
        raise ApiError(400, f"The request's body is not JSON: {reason}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The request's body has to be a JSON object.", code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _first_of(error) from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _first_of(error: ValidationError) -> ApiError:
    """The first mistake; of the forms that a field may have, the one that got furthest."""
    first = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    param = field_name(first["loc"])
    if first["type"] == "missing":
        return bad_request(f"{param} is missing.", param, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").rstrip(".")
    wanted = message if first["type"] == "value_error" else f"it should be {message}"
    return bad_request(f"{param} is {shown(first['input'])}: {wanted}.", param, "invalid_value")


# How pydantic names the forms of a field that may have several; those of lists and the like are no words.
_TYPES = ("str", "int", "float", "bool")


def field_name(location: Sequence[str | int]) -> str:
    """The name of a field as OpenAI writes it: `messages[1].content`.

    >>> field_name(("messages", 1, "content"))
    'messages[1].content'
    >>> field_name(("input", "str"))
    'input'
    """
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in _TYPES:
            name += f".{part}" if name else part
    return name
