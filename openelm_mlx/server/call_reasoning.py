"""What a model thought before its calls, for clients that send a call back without it.

gpt-oss was trained to see its reasoning again until the turn ends, after each result of a tool. Many clients of Chat
Completions leave it out of the history. A call's id is random, so that it names the reasoning before it for whoever
was given both; with it, the history has the tokens that the model wrote, and the prefix cache knows them all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, final

MOST_CALLS = 4096
MOST_CHARACTERS = 8_000_000


@final
class CallReasoning:
    """The reasoning before the latest calls, in memory alone; the least recently used is forgotten first."""

    def __init__(self, most_calls: int = MOST_CALLS, most_characters: int = MOST_CHARACTERS) -> None:
        self._most_calls, self._most_characters = most_calls, most_characters
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._num_characters = 0

    def keep(self, call_id: str, reasoning: str) -> None:
        """Remember what was thought before this call."""
        if not reasoning or len(reasoning) > self._most_characters:
            return
        self._texts[call_id] = reasoning
        self._num_characters += len(reasoning)
        while len(self._texts) > self._most_calls or self._num_characters > self._most_characters:
            _, forgotten = self._texts.popitem(last=False)
            self._num_characters -= len(forgotten)

    def completed(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Chat messages, with the reasoning before calls where a client has left it out."""
        return [self._completed(message) for message in messages]

    def _completed(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        calls = message.get("tool_calls")
        if not calls or message.get("reasoning"):
            return message
        call_id = calls[0].get("id")
        if call_id not in self._texts:
            return message
        self._texts.move_to_end(call_id)
        return {**message, "reasoning": self._texts[call_id]}
