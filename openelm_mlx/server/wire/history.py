"""A chat put together item by item: what Responses and Anthropic's messages have apart, in one dict a message."""

from __future__ import annotations

from typing import Any

COMMENTARY, FINAL_ANSWER = "commentary", "final_answer"  # OpenAI's words for what a message of the assistant is


class History:
    """Chat dicts as text/openai_chat.py reads them.

    Reasoning, text and calls that belong together become one dict of the assistant. What the assistant says before a call
    of the same turn is a preamble, and marked as such: taken for an answer, it would end the turn, and the reasoning of
    the turn would be dropped from the prompt.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the assistant's dict that may still grow
        self._said: list[dict[str, Any]] = []  # the assistant's texts of the turn, as long as no one else spoke

    def instructions(self, text: str) -> None:
        self._other({"role": "developer", "content": text})

    def user(self, text: str) -> None:
        self._other({"role": "user", "content": text})

    def reasoning(self, text: str) -> None:
        mine = self._assistant(after=("content", "tool_calls"))
        mine["reasoning"] = f"{mine['reasoning']}\n\n{text}" if mine.get("reasoning") else text

    def said(self, text: str, phase: str | None = None) -> None:
        mine = self._assistant(after=("content", "tool_calls"))
        mine["content"] = text
        if phase is not None:
            mine["phase"] = phase
        self._said.append(mine)

    def call(self, call_id: str, name: str, arguments: str) -> None:
        mine = self._assistant(after=())
        function = {"name": name, "arguments": arguments}
        mine.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        for text in self._said:
            text.setdefault("phase", COMMENTARY)

    def result(self, call_id: str, text: str) -> None:
        self._open = None
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _assistant(self, after: tuple[str, ...]) -> dict[str, Any]:
        """The open dict of the assistant, or a new one if it has one of the keys `after` already."""
        if self._open is None or any(key in self._open for key in after):
            self._open = {"role": "assistant"}
            self.messages.append(self._open)
        return self._open

    def _other(self, message: dict[str, Any]) -> None:
        self._open, self._said = None, []
        self.messages.append(message)

    def finished(self) -> list[dict[str, Any]]:
        """The messages; an assistant's without text has an explicit null, as OpenAI's chats have it."""
        for message in self.messages:
            message.setdefault("content", None)
        return self.messages
