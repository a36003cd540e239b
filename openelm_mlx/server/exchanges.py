"""What tools of this machine said before a call of the client's own, for when the client comes back with its result.

The client has seen a line of each call and result, in the reasoning. The model is to see all of them again, as it wrote and
read them: the turn is not over, and the prompt then begins with tokens that the prefix cache knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ..text.conversation import Message
from .recently_used import RecentlyUsed

MOST_EXCHANGES = 1024
MOST_BYTES = 8_000_000

Messages = Sequence[Mapping[str, Any] | Message]


@dataclass(frozen=True)
class Exchange:
    """One answer up to the client's call. shown: its reasoning as the client has it. messages: as it was written, but for
    the call.
    """

    shown: str
    messages: Sequence[Message]

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        return sum(
            len(text.encode("utf-8", "replace")) for text in [self.shown, *(each.text for each in self.messages)]
        )


@final
class Exchanges:
    """The latest of them, in memory alone.

    One is found by all that was said before it, and has to have the same reasoning: only who has the whole chat gets what
    its tools said.
    """

    def __init__(self, most: int = MOST_EXCHANGES, most_bytes: int = MOST_BYTES) -> None:
        self._found: RecentlyUsed[bytes, Exchange] = RecentlyUsed(most, most_bytes)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def num_bytes(self) -> int:
        """About what all of them take in memory."""
        return self._found.num_bytes

    def keep(self, before: Messages, exchange: Exchange) -> None:
        """Remember what came after these messages."""
        self._found.put(_digests(before)[-1], exchange, exchange.num_bytes)

    def completed(self, messages: Messages) -> Messages:
        """A chat with what is known put back where it was."""
        if not self._found:
            return messages
        digests, place = _digests(messages), 0
        found: list[Mapping[str, Any] | Message] = []
        while place < len(messages):
            end = _end_of_call(messages, place)
            known = self._found.get(digests[place])
            if known is None or end is None or _bare(_reasoning(messages[place:end])) != _bare(known.shown):
                found.append(messages[place])
                place += 1
                continue
            self._found.use(digests[place])
            call = messages[end - 1]
            assert isinstance(call, Mapping)
            found += [*known.messages, {**call, "reasoning": None, "content": None}]
            place = end
        return found


def _end_of_call(messages: Messages, place: int) -> int | None:
    """Where the assistant's messages from `place` on end that lead to a call: APIs may have several for one completion."""
    for end in range(place, len(messages)):
        message = messages[end]
        if isinstance(message, Message) or message.get("role") != "assistant":
            return None
        if message.get("tool_calls"):
            return end + 1
    return None


def _reasoning(messages: Messages) -> str:
    return "".join(message.get("reasoning") or "" for message in messages if isinstance(message, Mapping))


def _bare(text: str) -> str:
    """A text without its spaces: APIs put texts together in ways of their own."""
    return "".join(text.split())


def _digests(messages: Messages) -> list[bytes]:
    """Of the messages before each place, and of all."""
    so_far = hashlib.sha256()
    found = [so_far.digest()]
    for message in messages:
        so_far.update(json.dumps(message, sort_keys=True, default=str).encode() + b"\n")
        found.append(so_far.digest())
    return found
