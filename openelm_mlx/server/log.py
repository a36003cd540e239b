"""The server's log. Never a prompt or an answer: what is logged of a request is its id, its sizes and its times."""

import logging
from contextvars import ContextVar

log = logging.getLogger("openelm_mlx.server")

# The id of the request that is being worked on, for its lines.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
