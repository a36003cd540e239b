"""The server's log. Never a prompt or an answer: what is logged of a request is its id, its sizes and its times."""

import logging

log = logging.getLogger("openelm_mlx.server")
