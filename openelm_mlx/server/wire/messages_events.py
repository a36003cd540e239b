"""From the parts of an answer to the events of Anthropic's stream, and to the message itself.

Both come from one place, so that an answer is the same whether it was streamed or not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic_core import from_json

from ..call_reasoning import CallReasoning
from ..parts import Finished, FinishReason, ItemDone, ItemStarted, ItemText, Part, Usage
from .ids import new_id
from .reasoning_text import encode_reasoning

Event = dict[str, Any]

_STOP_REASONS: dict[FinishReason, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageEvents:
    """One message while it is being written. Each method gives the events of what has happened.

    thinking: "shown", "sealed" (blocks without their text, for the client to send back) or "hidden" (no blocks). known:
    where the reasoning of hidden thinking is kept for the calls that it leads to.
    """

    def __init__(
        self,
        model: str,
        prompt_tokens: int,
        thinking: Literal["shown", "sealed", "hidden"] = "hidden",
        known: CallReasoning | None = None,
    ) -> None:
        self._thinking, self._known = thinking, CallReasoning() if known is None else known
        self._hidden = ""  # reasoning that the client has not seen
        self._kind: str | None = None  # of the open item
        self._arguments = ArgumentsText()
        self._is_open = False
        self._content: list[dict[str, Any]] = []
        self._message: dict[str, Any] = {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_body(Usage(prompt_tokens, 0, 0, 0)),
        }

    @property
    def message(self) -> dict[str, Any]:
        """The message as it is now."""
        return {**self._message, "content": [dict(block) for block in self._content]}

    def start(self) -> list[Event]:
        return [{"type": "message_start", "message": self.message}]

    def more(self, parts: Sequence[Part]) -> list[Event]:
        """The events of these parts; with the last one, the end of the stream."""
        events: list[Event] = []
        for part in parts:
            if isinstance(part, ItemStarted):
                events += self._start(part)
            elif isinstance(part, ItemText):
                events += self._text(part.text)
            elif isinstance(part, ItemDone):
                events += self._done(part.text)
            else:
                events += self._end(part)
        return events

    def _start(self, part: ItemStarted) -> list[Event]:
        self._kind = part.kind
        block: dict[str, Any]
        if part.kind == "reasoning":
            if self._thinking == "hidden":
                return []
            block = {"type": "thinking", "thinking": "", "signature": ""}
        elif part.kind == "message":
            block = {"type": "text", "text": ""}
        else:
            block = {"type": "tool_use", "id": new_id("toolu"), "name": part.name or "", "input": {}}
            self._arguments = ArgumentsText()
            self._known.keep(block["id"], self._hidden)
        self._content.append(block)
        self._is_open = True
        return [{"type": "content_block_start", "index": self._index, "content_block": dict(block)}]

    @property
    def _index(self) -> int:
        return len(self._content) - 1

    def _text(self, text: str) -> list[Event]:
        if self._kind == "reasoning":
            if self._thinking != "shown":
                return []
            self._content[-1]["thinking"] += text
            return [self._delta("thinking_delta", thinking=text)]
        if self._kind == "message":
            self._content[-1]["text"] += text
            return [self._delta("text_delta", text=text)]
        return self._json(self._arguments.more(text))

    def _json(self, text: str) -> list[Event]:
        return [self._delta("input_json_delta", partial_json=text)] if text else []

    def _done(self, text: str) -> list[Event]:
        if not self._is_open:
            self._hidden = f"{self._hidden}\n\n{text}" if self._hidden else text
            return []
        events, block = [], self._content[-1]
        if self._kind == "reasoning":
            # Clients take a signature for granted, and send it back; where the text is shown, it is what counts.
            block["signature"] = encode_reasoning(text if self._thinking == "sealed" else "")
            events.append(self._delta("signature_delta", signature=block["signature"]))
        elif self._kind == "call":
            events += self._json(self._arguments.rest())
            block["input"] = self._arguments.value
        self._is_open = False
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _end(self, part: Finished) -> list[Event]:
        is_stopped = part.reason == "stop" and part.stop_string is not None
        reason = "stop_sequence" if is_stopped else _STOP_REASONS[part.reason]
        ending = {"stop_reason": reason, "stop_sequence": part.stop_string if is_stopped else None}
        self._message |= {**ending, "usage": usage_body(part.usage)}
        usage = {name: value for name, value in self._message["usage"].items() if name != "service_tier"}
        return [{"type": "message_delta", "delta": ending, "usage": usage}, {"type": "message_stop"}]

    def _delta(self, kind: str, **fields: str) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **fields}}


class ArgumentsText:
    """A call's arguments, as far as they are the beginning of a JSON object: clients read every piece as such.

    What the model writes beyond is left out. Arguments that are no object at all become one with their text in it, under the
    name that Anthropic's documentation gives.
    """

    def __init__(self) -> None:
        self._given = self._ahead = ""
        self._is_broken = False

    def more(self, text: str) -> str:
        """What of the arguments can be given on."""
        self._ahead += text
        # Everything is read again for each piece: pieces that grow with the whole keep the work in proportion to it.
        return "" if len(self._ahead) * 4 < len(self._given) else self._checked()

    def rest(self) -> str:
        """What is left at the end."""
        rest = self._checked()
        if not self._given and self._ahead.strip():
            self._given = rest = json.dumps({"INVALID_JSON": self._ahead}, ensure_ascii=False)
        return rest

    @property
    def value(self) -> dict[str, Any]:
        """The object that what was given on is."""
        return _object(self._given) if self._given else {}

    def _checked(self) -> str:
        whole = self._given + self._ahead
        if self._is_broken or not whole.lstrip():
            return ""
        if not _begins_object(whole):
            self._is_broken = True
            return ""
        text, self._given, self._ahead = self._ahead, whole, ""
        return text


def _begins_object(text: str) -> bool:
    if not text.lstrip().startswith("{"):
        return False
    try:
        json.dumps(_object(text), allow_nan=False)
    except ValueError:
        return False
    return True


def _object(text: str) -> dict[str, Any]:
    """The object that the text is, or begins. Raises ValueError for any other text, and for numbers that JSON lacks."""
    found: dict[str, Any] = from_json(text.encode("utf-8", "replace"), allow_partial=True, allow_inf_nan=False)
    return found


def usage_body(usage: Usage) -> dict[str, Any]:
    """Here the input is what was computed anew: the cached tokens stand beside it."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "service_tier": "standard",
    }
