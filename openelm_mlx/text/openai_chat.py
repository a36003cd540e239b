"""OpenAI-style chats (lists of dicts) to Harmony messages: roles, reasoning, tool calls and their results."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openelm_mlx.errors import PromptError
from openelm_mlx.text.conversation import (
    FUNCTIONS,
    JSON_CALL,
    ROLES,
    DeveloperContent,
    Message,
    ResponseFormat,
    SystemContent,
    resolve_recipient,
    tool_recipients,
)
from openelm_mlx.text.schema import Tool, json_text

_INSTRUCTING = ("system", "developer")  # roles whose dicts hold instructions
_THINKING = ("thinking", "reasoning", "reasoning_content")  # what servers call an assistant's reasoning


def conversation(
    chat: str | Sequence[Message | Mapping[str, Any]],
    *,
    system: SystemContent | None = None,
    tools: Sequence[Tool | Mapping[str, Any]] = (),
    response_formats: Sequence[ResponseFormat | Mapping[str, Any]] = (),
) -> list[Message]:
    """Turn a chat into Harmony messages: the system message, a developer message if there is content for it, the rest.

    `chat` is a question, or OpenAI-style dicts, or messages (passed through as they are), or dicts and messages mixed.
    Leading dicts of role "system" or "developer" become the instructions; later ones become developer messages where
    they stand. An assistant dict may have `thinking` (or `reasoning`, `reasoning_content`), `content` and `tool_calls`;
    its content is a preamble where it has calls or the `phase` "commentary", and an answer elsewhere.
    A content is text, a list of text parts as OpenAI writes them, or None for no text. A tool dict has a
    `tool_call_id`, which means the open call with that id, or a `name`; without either it answers the first call still
    open. A chat that starts with a system Message keeps that one, and `system` is not used.

    Raises PromptError when `chat` is not a chat, SettingError when a tool or format cannot be used.
    """
    if not isinstance(chat, (str, Sequence)):
        raise PromptError(f"The chat is a {type(chat).__name__}; give a string or a list of messages.")
    items: list[Message | Mapping[str, Any]] = (
        [{"role": "user", "content": chat}] if isinstance(chat, str) else list(chat)
    )
    if not items:
        raise PromptError("The chat has no messages; give at least one of role 'user'.")
    head = [Message("system", system or SystemContent())]
    start = 0
    if isinstance(items[0], Message) and items[0].role == "system":
        head, start = [items[0]], 1
    instructions = []
    for item in items[start:]:
        if not isinstance(item, Mapping) or item.get("role") not in _INSTRUCTING:
            break
        start += 1
        instructions.append("".join(text_parts(item, start)))
    developer = DeveloperContent(
        instructions="\n\n".join(filter(None, instructions)) or None,
        tools=tuple(tool if isinstance(tool, Tool) else Tool.from_dict(tool) for tool in tools),
        response_formats=tuple(
            answer if isinstance(answer, ResponseFormat) else ResponseFormat.from_dict(answer)
            for answer in response_formats
        ),
    )
    if developer != DeveloperContent():
        head.append(Message("developer", developer))
    reader = _ChatReader(tool_recipients([*head, *(item for item in items if isinstance(item, Message))]))
    return head + [message for i in range(start, len(items)) for message in reader.read(items[i], number=i + 1)]


@dataclass
class _Call:
    """A tool call in the history, until its result comes."""

    recipient: str
    channel: str | None
    round: int
    id: object = None
    answered: bool = False


class _ChatReader:
    """Reads a chat item by item, and remembers the tool calls that results refer to."""

    def __init__(self, recipients: Collection[str]) -> None:
        self._recipients = recipients
        self._calls: list[_Call] = []
        self._round = 0  # counts groups of calls that nothing else was said between
        self._is_calling = False

    def read(self, item: object, number: int) -> list[Message]:
        """The messages that one item of a chat stands for; `number` is its place, for the error messages."""
        messages = self._messages(item, number)
        self._is_calling = bool(messages) and messages[-1].role == "assistant"
        return messages

    def _messages(self, item: object, number: int) -> list[Message]:
        if isinstance(item, Message):
            return [self._note(item)]
        if not isinstance(item, Mapping):
            raise PromptError(f"Message {number} is {reprlib.repr(item)}; give a dict with role and content.")
        role = item.get("role")
        if role in _INSTRUCTING:
            return [Message("developer", DeveloperContent("".join(text_parts(item, number)) or None))]
        if role == "user":
            return [Message("user", _text(item, number), name=item.get("name"))]
        if role == "assistant":
            return self._assistant(item, number)
        if role == "tool":
            return [self._tool(item, number)]
        raise PromptError(f"Message {number} has role {role!r}; use {', '.join(ROLES[:-1])} or {ROLES[-1]}.")

    def _note(self, message: Message) -> Message:
        if message.is_call:
            self._open(str(message.recipient), message.channel)
        if message.role == "tool":
            for call in self._calls:
                if not call.answered and call.recipient == message.name:
                    call.answered = True
                    break
        return message

    def _open(self, recipient: str, channel: str | None, call_id: object = None) -> None:
        if not self._is_calling:
            self._round += 1
            self._is_calling = True
        self._calls.append(_Call(recipient, channel, self._round, call_id))

    def _assistant(self, item: Mapping[str, Any], number: int) -> list[Message]:
        thinking = next((name for name in _THINKING if item.get(name)), None)
        content, calls = item.get("content"), item.get("tool_calls") or ()
        if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
            raise PromptError(f"The tool_calls of message {number} are {reprlib.repr(calls)}; give a list of calls.")
        messages = [Message("assistant", _text(item, number, thinking), channel="analysis")] if thinking else []
        if calls and content:
            messages.append(Message("assistant", _text(item, number), channel="commentary"))  # a preamble
        messages += [self._call(call, number) for call in calls]
        # Reasoning with an empty answer is a turn that was cut off; an empty answer would end the turn.
        if not calls and (content or (content is not None and not thinking)):
            channel = "commentary" if item.get("phase") == "commentary" else "final"
            messages.append(Message("assistant", _text(item, number), channel=channel))
        if not messages and "content" not in item:
            raise PromptError(f"Message {number} of the assistant has no content, no thinking and no tool_calls.")
        return messages

    def _call(self, call: object, number: int) -> Message:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise PromptError(f"Message {number} has the tool call {reprlib.repr(call)}; it needs function.name.")
        bare = name.removeprefix(f"{FUNCTIONS}.")
        recipient = resolve_recipient(name, self._recipients) or f"{FUNCTIONS}.{bare}"
        is_built_in = recipient == "python" or recipient.startswith("browser.")
        arguments = function.get("arguments", {})
        if not isinstance(arguments, str):
            try:
                arguments = json_text(arguments)
            except TypeError as error:
                raise PromptError(
                    f"Message {number} calls {name!r} with arguments that JSON cannot express: {error}."
                ) from None
        channel = "analysis" if is_built_in else "commentary"  # where gpt-oss was trained to call each kind
        self._open(recipient, channel, call.get("id"))
        content_type = None if is_built_in else JSON_CALL
        return Message("assistant", arguments, channel=channel, recipient=recipient, content_type=content_type)

    def _tool(self, item: Mapping[str, Any], number: int) -> Message:
        call = self._answered_call(item, number)
        call.answered = True
        content = _text(item, number)
        return Message("tool", content, name=call.recipient, channel=call.channel, recipient="assistant")

    def _answered_call(self, item: Mapping[str, Any], number: int) -> _Call:
        open_calls = [call for call in self._calls if not call.answered]
        call_id, name = item.get("tool_call_id"), item.get("name")
        bare = str(name).removeprefix(f"{FUNCTIONS}.")
        named = [call for call in open_calls if call.recipient.removeprefix(f"{FUNCTIONS}.") == bare]
        if call_id is not None:
            # Some servers restart their ids in each round ("call_0", or no id at all): the last round's call is meant.
            same = [call for call in open_calls if call.id == call_id]
            same = [call for call in same if call.round == same[-1].round]
            matching = [call for call in same if call in named] or same
            matching = matching or [call for call in open_calls if call.id is None]  # calls that came as a Message
            wanted = f"tool_call_id {call_id!r}"
        elif name is not None:
            matching, wanted = named, f"tool {name!r}"
        else:
            matching, wanted = open_calls, "a tool"
        if not matching:
            raise PromptError(
                f"Message {number} is the result of {wanted}, but no open tool call before it fits; "
                f"put the assistant message with the tool_calls in front of it."
            )
        return matching[0]


def _text(item: Mapping[str, Any], number: int, key: str = "content") -> str | tuple[str, ...]:
    parts = text_parts(item, number, key)
    return parts[0] if len(parts) == 1 else parts


def text_parts(item: Mapping[str, Any], number: int, key: str = "content") -> tuple[str, ...]:
    """The texts of a chat dict's content: a string, None for no text, or a list of parts as OpenAI writes them.

    Raises PromptError, with the message's `number`, when there is no content, or one that is not all text.
    """
    if key not in item:
        raise PromptError(f"Message {number} has no {key}; give it as a string.")
    content = item[key]
    if content is None:
        return ("",)
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"The {key} of message {number} is {reprlib.repr(content)}; give a string.")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise PromptError(f"Message {number} has a part of type {reprlib.repr(kind)}; the model reads text only.")
    return tuple(part["text"] for part in content)
