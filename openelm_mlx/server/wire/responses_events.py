"""From the parts of an answer to the events of a Responses stream, and to the response itself.

Both come from one place, so that an answer is the same whether it was streamed or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..failures import ApiError
from ..parts import Finished, ItemDone, ItemStarted, ItemText, Part, Usage
from .history import COMMENTARY, FINAL_ANSWER
from .ids import new_id
from .responses_output import CallItem, CustomCallItem, MessageItem, OutputItem, ReasoningItem
from .responses_tools import Tools
from .shared import now

Event = dict[str, Any]


class ResponseEvents:
    """One response while it is being written. Each method gives the events of what has happened, numbered without gaps.

    body: the response's fields that the request decides. with_sealed: reasoning items get `encrypted_content`.
    with_logprobs: messages get log-probabilities.
    """

    def __init__(
        self,
        body: Mapping[str, Any],
        tools: Tools | None = None,
        with_sealed: bool = False,
        with_logprobs: bool = False,
    ) -> None:
        self._tools = Tools() if tools is None else tools
        self._with_sealed, self._with_logprobs = with_sealed, with_logprobs
        self._body = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": now(),
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            **body,
            "output": [],
            "usage": None,
        }
        self._output: list[dict[str, Any]] = []
        self._number = 0
        self._item: OutputItem | None = None
        self._written = ""  # of the open item, as the model wrote it
        self._done: ItemDone | None = None  # it is told with the next part, which says whether the item was cut off

    @property
    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        return {**self._body, "output": list(self._output)}

    @property
    def is_finished(self) -> bool:
        return self._body["status"] != "in_progress"

    def start(self) -> list[Event]:
        return [
            self._event("response.created", response=self.response),
            self._event("response.in_progress", response=self.response),
        ]

    def more(self, parts: Sequence[Part]) -> list[Event]:
        """The events of these parts; with the last one, the end of the stream."""
        events: list[Event] = []
        for part in parts:
            was_cut = isinstance(part, Finished) and part.reason == "length"
            events += self._close("incomplete" if was_cut else "completed")
            if isinstance(part, ItemStarted):
                events += self._open(part)
            elif isinstance(part, ItemText):
                self._written += part.text
                events += self._numbered(self._opened.more(part.text, part.logprobs))
            elif isinstance(part, ItemDone):
                self._done = part
            else:
                events += self._end(part)
        return events

    def failed(self, error: ApiError) -> list[Event]:
        """The end of a stream that has begun. What was written so far stays in the output."""
        if self._item is not None and self._done is None:
            self._done = ItemDone(0, self._written)
        events = self._close("incomplete")
        code = {429: "rate_limit_exceeded"}.get(
            error.status, "server_error" if error.status >= 500 else "invalid_prompt"
        )
        self._body |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return [*events, self._event("response.failed", response=self.response)]

    @property
    def _opened(self) -> OutputItem:
        assert self._item is not None, "text without an item"
        return self._item

    def _open(self, part: ItemStarted) -> list[Event]:
        assert self._item is None, "an item starts within another"
        self._item, self._written = self._new_item(part), ""
        return self._numbered(self._item.added())

    def _new_item(self, part: ItemStarted) -> OutputItem:
        if part.kind == "reasoning":
            return ReasoningItem(self._with_sealed)
        if part.kind == "message":
            return MessageItem(COMMENTARY if part.is_preamble else FINAL_ANSWER, self._with_logprobs)
        name = part.name or ""
        tool = self._tools.by_function.get(name)
        if tool is None:
            return CallItem(name, None)
        return (CustomCallItem if tool.kind == "custom" else CallItem)(tool.name, tool.namespace)

    def _close(self, status: str) -> list[Event]:
        """The events of an item's end, once it is known how it ended."""
        if self._done is None:
            return []
        item, text = self._opened, self._done.text
        events = self._numbered(item.done(text, status))
        self._output.append(item.whole(status))
        self._item, self._done = None, None
        return events

    def _end(self, part: Finished) -> list[Event]:
        is_cut = part.reason == "length"
        self._body["usage"] = usage_body(part.usage)
        if is_cut:
            self._body |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            self._body |= {"status": "completed", "completed_at": now()}
        return [self._event(f"response.{self._body['status']}", response=self.response)]

    def _numbered(self, events: list[Event]) -> list[Event]:
        return [self._event(**event, output_index=len(self._output)) for event in events]

    def _event(self, type: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": type, "sequence_number": self._number - 1, **fields}


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
