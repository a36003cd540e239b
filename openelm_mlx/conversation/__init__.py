"""Conversations of several turns: `Chat`, and the events of its turns."""

from __future__ import annotations

from .events import Answer as Answer
from .events import Done as Done
from .events import Event as Event
from .events import Notice as Notice
from .events import Reasoning as Reasoning
from .events import ToolCall as ToolCall
from .events import ToolResult as ToolResult
from .session import Chat as Chat

__all__ = ["Answer", "Chat", "Done", "Event", "Notice", "Reasoning", "ToolCall", "ToolResult"]
