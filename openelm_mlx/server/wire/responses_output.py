"""The items of a response's output: how each looks on the wire, and the events while it is being written.

The events have no sequence_number and no output_index yet: these are the stream's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

from ..parts import TokenLogprob
from .custom_input import CustomInput
from .ids import new_id
from .reasoning_text import encode_reasoning
from .shared import logprob_object

Event = dict[str, Any]


class OutputItem(ABC):
    """One item. `added`, `more` and `done` give events; `whole` is the item of the last of them and of the response."""

    prefix: ClassVar[str]  # of its id

    def __init__(self) -> None:
        self.id = new_id(self.prefix)
        self.text = ""

    @abstractmethod
    def whole(self, status: str) -> dict[str, Any]:
        """The item with all of its text so far."""

    @abstractmethod
    def added(self) -> list[Event]:
        """Its beginning."""

    @abstractmethod
    def more(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        """More of its text, as the model wrote it."""

    @abstractmethod
    def done(self, text: str, status: str) -> list[Event]:
        """Its end. text: the whole, as the model wrote it."""

    def _done(self, status: str) -> Event:
        return {"type": "response.output_item.done", "item": self.whole(status)}


class PartItem(OutputItem):
    """An item whose text is its one content part."""

    event: ClassVar[str]  # what its events begin with

    def added(self) -> list[Event]:
        empty = {"type": "response.output_item.added", "item": {**self.whole("in_progress"), "content": []}}
        return [empty, {"type": "response.content_part.added", **self._place, "part": self._part()}]

    def more(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        self.text += text
        return [{"type": f"{self.event}.delta", **self._place, "delta": text, **self._logprobs(logprobs)}]

    def done(self, text: str, status: str) -> list[Event]:
        self.text = text
        return [
            {"type": f"{self.event}.done", **self._place, "text": text, **self._all_logprobs()},
            {"type": "response.content_part.done", **self._place, "part": self._part()},
            self._done(status),
        ]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "content_index": 0}

    @abstractmethod
    def _part(self) -> dict[str, Any]:
        """The content part with all of the text so far."""

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {}

    def _all_logprobs(self) -> dict[str, Any]:
        return {}


@final
class ReasoningItem(PartItem):
    prefix, event = "rs", "response.reasoning_text"

    def __init__(self, with_sealed: bool) -> None:
        super().__init__()
        self._with_sealed = with_sealed

    def whole(self, status: str) -> dict[str, Any]:
        whole = {"id": self.id, "type": "reasoning", "summary": [], "content": [self._part()], "status": status}
        if self._with_sealed and status != "in_progress":
            whole["encrypted_content"] = encode_reasoning(self.text)
        return whole

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}


@final
class MessageItem(PartItem):
    """phase: "commentary" for what is said before a call, "final_answer" for the answer."""

    prefix, event = "msg", "response.output_text"

    def __init__(self, phase: str, with_logprobs: bool) -> None:
        super().__init__()
        self._phase, self._with_logprobs = phase, with_logprobs
        self._tokens: list[dict[str, Any]] = []

    def whole(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "phase": self._phase,
            "status": status,
            "content": [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self._tokens)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokens = [logprob_object(each) for each in logprobs] if self._with_logprobs else []
        self._tokens += tokens
        return {"logprobs": tokens}

    def _all_logprobs(self) -> dict[str, Any]:
        return {"logprobs": list(self._tokens)}


class CalledItem(OutputItem):
    """A call of a tool. type: of the item. field: where its text stands."""

    type: ClassVar[str]
    field: ClassVar[str]

    def __init__(self, name: str, namespace: str | None) -> None:
        super().__init__()
        self.call_id, self._name, self._namespace = new_id("call"), name, namespace

    def whole(self, status: str) -> dict[str, Any]:
        whole = {
            "id": self.id,
            "type": self.type,
            "call_id": self.call_id,
            "name": self._name,
            self.field: self.text,
            "status": status,
        }
        return whole if self._namespace is None else {**whole, "namespace": self._namespace}

    def added(self) -> list[Event]:
        return [{"type": "response.output_item.added", "item": self.whole("in_progress")}]


@final
class CallItem(CalledItem):
    """A call of a function. Its text is the JSON of its arguments."""

    prefix, type, field = "fc", "function_call", "arguments"

    def more(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        self.text += text
        return [{"type": "response.function_call_arguments.delta", "item_id": self.id, "delta": text}]

    def done(self, text: str, status: str) -> list[Event]:
        self.text = text
        kind = "response.function_call_arguments.done"
        return [{"type": kind, "item_id": self.id, "arguments": text, "name": self._name}, self._done(status)]


@final
class CustomCallItem(CalledItem):
    """A call of a custom tool. Its text is the tool's input, out of the JSON that the model wrote."""

    prefix, type, field = "ctc", "custom_tool_call", "input"

    def __init__(self, name: str, namespace: str | None) -> None:
        super().__init__(name, namespace)
        self._input = CustomInput()

    def more(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        return self._delta(self._input.more(text))

    def done(self, text: str, status: str) -> list[Event]:
        rest = self._input.whole(text).removeprefix(self.text)
        events = self._delta(rest)
        done = {"type": "response.custom_tool_call_input.done", "item_id": self.id, "input": self.text}
        return [*events, done, self._done(status)]

    def _delta(self, text: str) -> list[Event]:
        self.text += text
        return [{"type": "response.custom_tool_call_input.delta", "item_id": self.id, "delta": text}] if text else []
