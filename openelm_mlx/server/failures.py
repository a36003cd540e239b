"""What goes wrong with a request over HTTP, as one error with a status, and in the words of OpenAI and Anthropic."""

from __future__ import annotations

from typing import Any, final

from ..errors import EngineClosedError, EngineFullError, MemoryLimitError, PromptError, UserError, WorkerError

# Seconds after which a client may ask again, where nobody knows better.
RETRY_AFTER = 5

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


class ClientGone(OSError):
    """The client closed its connection before it had its answer."""


@final
class ApiError(Exception):
    """An answer that is an error.

    type, param, code: as in OpenAI's body. retry_after: seconds after which asking again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer, beside its type."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self, path: str, request_id: str | None = None) -> dict[str, Any]:
        """The answer's body, in the words of the API that has this path."""
        return self.anthropic_body(request_id) if path.startswith("/v1/messages") else self.openai_body()

    def openai_body(self) -> dict[str, Any]:
        """`{"error": {...}}` with all four keys."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self, request_id: str | None = None) -> dict[str, Any]:
        """`{"type": "error", "error": {...}, "request_id": ...}`."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """A 400: a field has a value that it cannot have."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: BaseException, param: str | None = None) -> ApiError:
    """Any error of a request as an ApiError. What is not the client's mistake does not tell what it was."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFullError):
        return ApiError(503, str(error), "server_error", code="overloaded", retry_after=RETRY_AFTER)
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), "server_error", code="engine_closed", retry_after=RETRY_AFTER)
    if isinstance(error, MemoryLimitError):
        return ApiError(400, str(error), param=param, code="memory_limit_exceeded")
    if isinstance(error, PromptError) and "context holds" in str(error):
        message = str(error).split(", or ask for")[0].rstrip(".")  # what else there is, is not asked for over HTTP
        return ApiError(400, f"{message}.", param=param or "messages", code="context_length_exceeded")
    if isinstance(error, WorkerError):
        return ApiError(503, str(error), "server_error", code="worker_lost", retry_after=RETRY_AFTER)
    if isinstance(error, UserError):
        return bad_request(str(error), param)
    return ApiError(500, "The server failed on this request; its log has the error.", "server_error")
