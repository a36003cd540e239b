"""What the APIs have in common, most of it in OpenAI's words."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ...files import shown
from ..bodies import WholeNumber, Wire
from ..failures import bad_request
from ..generation import AnswerSchema, Effort
from ..parts import TokenLogprob, Usage

# What clients ask for, in what gpt-oss was trained with.
EFFORTS: dict[str, Effort] = {
    "none": "none", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high",
}  # fmt: skip


def _limit(value: Any) -> Any:
    """-1 is other local servers' word for no limit of the request's own."""
    return None if isinstance(value, (int, float)) and value == -1 else value


TokenLimit = Annotated[Annotated[WholeNumber, Field(ge=1)] | None, BeforeValidator(_limit)]
MOST_ANSWERS = 128
StopStrings = Annotated[list[str], Field(max_length=64)]
StopField = str | StopStrings | None


class StreamOptions(Wire):
    include_usage: bool = False


def effort_of(given: Any, param: str) -> Effort | None:
    """The effort of a request. Raises ApiError."""
    if given is None:
        return None
    if not isinstance(given, str) or given not in EFFORTS:
        raise bad_request(f"{param} is {shown(given)}: use {', '.join(EFFORTS)}.", param)
    return EFFORTS[given]


def answer_schema_of(kind: str, definition: Any, param: str) -> AnswerSchema | None:
    """The schema of an answer. kind: OpenAI's `type`. definition: what holds `schema`. Raises ApiError."""
    if kind == "text":
        return None
    if kind == "json_object":
        return AnswerSchema({"type": "object"})
    if kind != "json_schema":
        raise bad_request(f"{param}.type is {shown(kind)}: use text, json_object or json_schema.", f"{param}.type")
    schema = definition.get("schema") if isinstance(definition, dict) else None
    if not isinstance(schema, dict):
        raise bad_request(
            f"{param}.json_schema.schema is {shown(schema)}: give a JSON Schema.", f"{param}.json_schema.schema"
        )
    name, description = definition.get("name"), definition.get("description")
    for key, value in (("name", name), ("description", description)):
        if not isinstance(value, (str, type(None))):
            raise bad_request(f"{param}.json_schema.{key} is {shown(value)}: give text.", f"{param}.json_schema.{key}")
    return AnswerSchema(schema, name or "answer", description)


def stops_of(given: str | list[str] | None, param: str = "stop") -> tuple[str, ...]:
    """The stop strings of a request. Raises ApiError for an empty one."""
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if not all(stops):
        raise bad_request(f"{param} has an empty string, which would end every answer before it begins.", param)
    return stops


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def logprob_object(token: TokenLogprob) -> dict[str, Any]:
    """One token of OpenAI's `logprobs.content`."""
    top = [{"token": each.token, "logprob": each.logprob, "bytes": each.bytes} for each in token.top]
    return {"token": token.token, "logprob": token.logprob, "bytes": token.bytes, "top_logprobs": top}


def now() -> int:
    """Seconds since 1970, as OpenAI's objects have them."""
    return int(time.time())


def json_text(value: Any) -> str:
    """JSON in one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
