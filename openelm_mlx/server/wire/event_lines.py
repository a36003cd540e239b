"""Events as the lines of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .shared import json_text


def event_lines(events: Iterable[Mapping[str, Any]]) -> bytes:
    """Server-sent events, each named by its `type`. Half of a surrogate pair, which UTF-8 lacks, becomes "?"."""
    return "".join(f"event: {event['type']}\ndata: {json_text(event)}\n\n" for event in events).encode(
        "utf-8", "replace"
    )
