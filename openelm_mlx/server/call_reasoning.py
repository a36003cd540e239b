"""What a model thought before its calls, for clients that send a call back without it.

gpt-oss was trained to see its reasoning again until the turn ends, after each result of a tool. Many clients of Chat
Completions leave it out of the history, and clients of Anthropic's messages are not shown it unless they ask. A call's id
is random, so that it names the reasoning before it for whoever was given both; with it, the history has the tokens that
the model wrote, and the prefix cache knows them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from ..text.conversation import Message
from .recently_used import RecentlyUsed

MOST_CALLS = 4096
MOST_BYTES = 8_000_000


@final
class CallReasoning:
    """The reasoning before the latest calls, in memory alone; the least recently used is forgotten first."""

    def __init__(self, most_calls: int = MOST_CALLS, most_bytes: int = MOST_BYTES) -> None:
        self._texts: RecentlyUsed[str, str] = RecentlyUsed(most_calls, most_bytes)

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def num_bytes(self) -> int:
        """What all of them take, with the names of their calls."""
        return self._texts.num_bytes

    def keep(self, call_id: str, reasoning: str) -> None:
        """Remember what was thought before this call."""
        if reasoning:
            self._texts.put(call_id, reasoning, len(call_id) + len(reasoning.encode("utf-8", "replace")))

    def before(self, call_ids: Iterable[Any]) -> str:
        """What was thought before the first of these calls that is known; "" where none is."""
        for call_id in map(str, call_ids):
            reasoning = self._texts.get(call_id)
            if reasoning is not None:
                self._texts.use(call_id)
                return reasoning
        return ""

    def completed(self, messages: Sequence[Mapping[str, Any] | Message]) -> list[Mapping[str, Any] | Message]:
        """Chat messages, with the reasoning before calls where a client has left it out."""
        return [self._completed(message) for message in messages]

    def _completed(self, message: Mapping[str, Any] | Message) -> Mapping[str, Any] | Message:
        if isinstance(message, Message) or message.get("reasoning"):
            return message
        reasoning = self.before(call.get("id") for call in message.get("tool_calls") or ())
        return {**message, "reasoning": reasoning} if reasoning else message
