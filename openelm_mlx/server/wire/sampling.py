"""How a request wants its tokens chosen: OpenAI's fields, and those that clients send to local servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from ...decoding.sampling import SamplingParams
from ...errors import UserError
from ...files import shown
from ..bodies import WholeNumber, Wire
from ..failures import bad_request


class SamplingFields(Wire):
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[WholeNumber, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[WholeNumber, Field(ge=-(2**63), lt=2**64)] | None = None


def sampling_params(fields: SamplingFields) -> SamplingParams:
    """The fields as the engine takes them; without a temperature 1, as both services have it. Raises ApiError."""
    given: dict[str, Any] = {
        name: value for name in SamplingFields.model_fields if (value := getattr(fields, name)) is not None
    }
    if fields.seed is not None:
        given["seed"] = fields.seed % 2**64
    if fields.top_k == -1:  # other servers' word for all tokens
        given["top_k"] = 0
    if fields.top_p == 0:
        given |= {"top_p": 1.0, "top_k": 1}  # OpenAI takes it for the likeliest token alone
    if fields.logit_bias is not None:
        given["logit_bias"] = _biases(fields.logit_bias)
    try:
        return SamplingParams(**{"temperature": 1.0, **given})
    except UserError as error:
        param = next((name for name in given if str(error).startswith(name)), None)
        raise bad_request(str(error), param) from None


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    for name in given:
        if not (name.isascii() and name.isdecimal()):
            message = f"logit_bias has the key {shown(name)}: it should be the number of a token."
            raise bad_request(message, "logit_bias")
    return {int(name): bias for name, bias in given.items()}
