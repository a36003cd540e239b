"""What is said in a Harmony conversation: messages, and the way to them from OpenAI-style chat dicts.

No tokens here. How a conversation is written in tokens, and read back from them, is harmony.py's business.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openelm_mlx.errors import PromptError, SettingError
from openelm_mlx.text.schema import Tool, ToolNamespace, check_schema, check_unique, json_text

from ..files import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("analysis", "commentary", "final")
REASONING_EFFORTS = ("low", "medium", "high")

CONSTRAIN = "<|constrain|>"  # at the start of a content type, it stands for the control token of that name
JSON_CALL = CONSTRAIN + "json"  # the content type that gpt-oss itself gives a function call

EVERYONE = "all"  # a recipient that means no tool and is not written down

_FUNCTIONS = "functions"
_INSTRUCTING = ("system", "developer")  # roles whose dicts hold instructions
_THINKING = ("thinking", "reasoning", "reasoning_content")  # what servers call an assistant's reasoning


@dataclass(frozen=True)
class SystemContent:
    """What the system message says: who the model is, the dates, how long it thinks, built-in tools, channels.

    Instructions of the application do not belong here but into DeveloperContent. The defaults are what gpt-oss was
    trained with; a part that is None or empty is left out. `tools` are built-in ones (schema.BROWSER, schema.PYTHON).
    """

    identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    knowledge_cutoff: str | None = "2024-06"
    current_date: str | None = None  # YYYY-MM-DD
    reasoning_effort: str | None = "medium"
    channels: tuple[str, ...] = CHANNELS
    channel_required: bool = True
    tools: tuple[ToolNamespace, ...] = ()

    def __post_init__(self) -> None:
        if self.reasoning_effort is not None and self.reasoning_effort not in REASONING_EFFORTS:
            raise SettingError(f"reasoning_effort is {shown(self.reasoning_effort)}; use low, medium or high.")


@dataclass(frozen=True)
class ResponseFormat:
    """A JSON Schema that the final answer should follow. It only asks the model; nothing enforces it."""

    name: str
    schema: Mapping[str, Any]
    description: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schema, Mapping):
            raise SettingError(f"The schema of response format {self.name!r} is {self.schema!r}; give a dict.")
        check_schema(self.schema, f"The schema of response format {self.name!r}")

    @classmethod
    def from_dict(cls, definition: Mapping[str, Any]) -> ResponseFormat:
        """Read OpenAI's `{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}`, or its inner dict."""
        inner = definition.get("json_schema", definition) if isinstance(definition, Mapping) else None
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise SettingError(f"The response format {reprlib.repr(definition)} has no schema; add json_schema.schema.")
        return cls(inner.get("name", "response"), inner["schema"], inner.get("description"))


@dataclass(frozen=True)
class DeveloperContent:
    """What the developer message says: instructions (the "system prompt" of other models), tools, answer formats.

    `tools` are functions, called as `functions.NAME`; `namespaces` hold tools that are called under another name.
    """

    instructions: str | None = None
    tools: tuple[Tool, ...] = ()
    namespaces: tuple[ToolNamespace, ...] = ()
    response_formats: tuple[ResponseFormat, ...] = ()

    def __post_init__(self) -> None:
        check_unique((namespace.name for namespace in self.all_namespaces), "tool namespaces")

    @property
    def all_namespaces(self) -> tuple[ToolNamespace, ...]:
        """`namespaces`, with the functions as one more of them if there are any."""
        functions = (ToolNamespace(_FUNCTIONS, tools=self.tools),) if self.tools else ()
        return functions + self.namespaces

    @property
    def has_functions(self) -> bool:
        """Whether there is a tool called `functions.NAME`; the system message then says where calls go."""
        return any(namespace.name == _FUNCTIONS and namespace.tools for namespace in self.all_namespaces)


@dataclass(frozen=True)
class Message:
    """One message. Text may come in several parts, which are joined without a separator but become tokens one by one.

    `name` is a tool's full name for role "tool" (`functions.get_weather`), and an optional user name for the others.
    `recipient` makes an assistant message a tool call; in a tool's result it is "assistant". `content_type` is what the
    header says about the content, such as `<|constrain|>json`.
    """

    role: str
    content: str | tuple[str, ...] | SystemContent | DeveloperContent
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None

    @property
    def is_call(self) -> bool:
        """Whether the assistant calls a tool with it."""
        return self.role == "assistant" and self.recipient not in (None, EVERYONE)

    @property
    def text(self) -> str:
        """The text, joined; empty for system and developer content, which is not text before it is rendered."""
        if isinstance(self.content, (SystemContent, DeveloperContent)):
            return ""
        return "".join(self.content)


def conversation(
    chat: str | Sequence[Message | Mapping[str, Any]],
    *,
    system: SystemContent | None = None,
    tools: Sequence[Tool | Mapping[str, Any]] = (),
    response_formats: Sequence[ResponseFormat | Mapping[str, Any]] = (),
) -> list[Message]:
    """Turn a chat into Harmony messages: the system message, a developer message if anything belongs into it, the rest.

    `chat` is a question, or OpenAI-style dicts, or messages (passed through as they are), or dicts and messages mixed.
    Leading dicts of role "system" or "developer" become the instructions; later ones become developer messages where
    they stand. An assistant dict may have `thinking` (or `reasoning`, `reasoning_content`), `content` and `tool_calls`.
    A content is text, a list of text parts as OpenAI writes them, or None for no text. A tool dict has a
    `tool_call_id`, which means the open call with that id, or a `name`; without either it answers the first call still
    open. A chat that starts with a system Message keeps that one, and `system` is not used.

    Raises PromptError when `chat` is no chat, SettingError when a tool or format cannot be used.
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


def tool_recipients(messages: Iterable[Message]) -> frozenset[str]:
    """Every recipient that the tools defined in `messages` answer to, such as `functions.get_weather` and `python`."""
    recipients: set[str] = set()
    for message in messages:
        content = message.content
        if isinstance(content, SystemContent):
            namespaces = content.tools
        elif isinstance(content, DeveloperContent):
            namespaces = content.all_namespaces
        else:
            continue
        for namespace in namespaces:
            recipients.update(f"{namespace.name}.{tool.name}" for tool in namespace.tools)
            recipients.update(() if namespace.tools else (namespace.name,))
    return frozenset(recipients)


def resolve_recipient(recipient: str, recipients: Collection[str]) -> str | None:
    """Which of `recipients` (from tool_recipients) a call means, or None; gpt-oss may leave out or add `functions.`.

    >>> resolve_recipient("get_weather", {"functions.get_weather", "python"})
    'functions.get_weather'
    >>> resolve_recipient("functions.python", {"functions.get_weather", "python"})
    'python'
    """
    bare = recipient.removeprefix(f"{_FUNCTIONS}.")
    for candidate in (recipient, f"{_FUNCTIONS}.{recipient}", bare):
        if candidate in recipients:
            return candidate
    return None


def check_conversation(messages: Sequence[Message]) -> None:
    """Raise PromptError when `messages` break a rule of the format: a role, a channel, a result without a call."""
    called: set[str] = set()
    channels = set(CHANNELS)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Message):
            raise PromptError(f"Message {number} is a {type(message).__name__}; make Messages with conversation().")
        _check_message(message, number)
        if isinstance(message.content, SystemContent):
            channels.update(message.content.channels)
        if message.role == "assistant" and message.channel is not None and message.channel not in channels:
            raise PromptError(f"Message {number} is on channel {message.channel!r}; use {', '.join(CHANNELS)}.")
        if message.is_call:
            called.add(str(message.recipient).removeprefix(f"{_FUNCTIONS}."))
        if message.role == "tool" and str(message.name).removeprefix(f"{_FUNCTIONS}.") not in called:
            raise PromptError(
                f"Message {number} is a result of tool {message.name!r}, but no message before it calls that tool; "
                f"put the assistant's call in front of it."
            )


def without_old_analysis(messages: Sequence[Message]) -> list[Message]:
    """`messages` without the reasoning of finished turns: what stands on `analysis` before the last `final` answer.

    The reasoning of a turn still going (thoughts between tool calls, with no answer yet) stays. Source: the gpt-oss
    model card and openai/harmony docs/format.md, "Handling reasoning output in subsequent sampling".
    """
    answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.channel == "final"]
    finished = answers[-1] if answers else 0
    return [message for i, message in enumerate(messages) if i >= finished or message.channel != "analysis"]


def _check_message(message: Message, number: int) -> None:
    if message.role not in ROLES:
        raise PromptError(f"Message {number} has role {message.role!r}; use {', '.join(ROLES[:-1])} or {ROLES[-1]}.")
    content = message.content
    owner = {SystemContent: "system", DeveloperContent: "developer"}.get(type(content))
    if owner is not None and message.role != owner:
        raise PromptError(
            f"Message {number} has {type(content).__name__} but role {message.role!r}; it belongs into role {owner!r}."
        )
    parts = content if isinstance(content, tuple) else (content,)
    if owner is None and not all(isinstance(part, str) for part in parts):
        raise PromptError(f"The content of message {number} is {reprlib.repr(content)}; give a string.")
    if message.role == "tool" and not message.name:
        raise PromptError(f"Message {number} is a tool's result without a name; give one, like 'functions.search'.")
    for field, word in (("name", message.name), ("channel", message.channel), ("recipient", message.recipient)):
        if word is not None and (not isinstance(word, str) or not word or any(c.isspace() for c in word)):
            raise PromptError(f"The {field} of message {number} is {word!r}; a header holds single words.")
    if message.content_type is not None and not (
        isinstance(message.content_type, str) and message.content_type.strip()
    ):
        raise PromptError(
            f"The content_type of message {number} is {message.content_type!r}; give a word such as 'json'."
        )


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
        self._round = 0  # the calls between two other things that were said
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
        # An empty answer beside reasoning is a turn that was cut off: as an answer it would end the turn.
        if not calls and (content or (content is not None and not thinking)):
            messages.append(Message("assistant", _text(item, number), channel="final"))
        if not messages and "content" not in item:
            raise PromptError(f"Message {number} of the assistant has no content, no thinking and no tool_calls.")
        return messages

    def _call(self, call: object, number: int) -> Message:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise PromptError(f"Message {number} has the tool call {reprlib.repr(call)}; it needs function.name.")
        bare = name.removeprefix(f"{_FUNCTIONS}.")
        recipient = resolve_recipient(name, self._recipients) or f"{_FUNCTIONS}.{bare}"
        is_built_in = recipient == "python" or recipient.startswith("browser.")
        arguments = function.get("arguments", {})
        if not isinstance(arguments, str):
            try:
                arguments = json_text(arguments)
            except TypeError as error:
                raise PromptError(
                    f"Message {number} calls {name!r} with arguments that JSON cannot say: {error}."
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
        bare = str(name).removeprefix(f"{_FUNCTIONS}.")
        named = [call for call in open_calls if call.recipient.removeprefix(f"{_FUNCTIONS}.") == bare]
        if call_id is not None:
            # Servers begin to count anew in each round ("call_0", or no id at all): the last round's call is meant.
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
