"""The messages of a Harmony conversation: roles, channels, recipients, and the rules that they obey.

No tokens here: harmony.py writes a conversation in tokens and reads it back. openai_chat.py makes messages of chat dicts.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openelm_mlx.errors import PromptError, SettingError
from openelm_mlx.text.schema import Tool, ToolNamespace, check_unique
from openelm_mlx.text.schema_check import check_schema

from ..files import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("analysis", "commentary", "final")
REASONING_EFFORTS = ("low", "medium", "high")

CONSTRAIN = "<|constrain|>"  # at the start of a content type, it stands for the control token of that name
JSON_CALL = CONSTRAIN + "json"  # the content type that gpt-oss itself gives a function call

EVERYONE = "all"  # a recipient that means no tool and is not written down

FUNCTIONS = "functions"


@dataclass(frozen=True)
class SystemContent:
    """What the system message says: who the model is, the dates, how long it thinks, built-in tools, channels.

    Instructions of the application belong in DeveloperContent, not here. The defaults are what gpt-oss was
    trained with; a part that is None or empty is left out. `tools` are built-in ones (BROWSER and PYTHON of builtin_tools.py).
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
        functions = (ToolNamespace(FUNCTIONS, tools=self.tools),) if self.tools else ()
        return functions + self.namespaces

    @property
    def has_functions(self) -> bool:
        """Whether there is a tool called `functions.NAME`; the system message then says where calls go."""
        return any(namespace.name == FUNCTIONS and namespace.tools for namespace in self.all_namespaces)


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
    bare = recipient.removeprefix(f"{FUNCTIONS}.")
    for candidate in (recipient, f"{FUNCTIONS}.{recipient}", bare):
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
            called.add(str(message.recipient).removeprefix(f"{FUNCTIONS}."))
        if message.role == "tool" and str(message.name).removeprefix(f"{FUNCTIONS}.") not in called:
            raise PromptError(
                f"Message {number} is a result of tool {message.name!r}, but no message before it calls that tool; "
                f"put the assistant's call in front of it."
            )


def without_old_analysis(messages: Sequence[Message]) -> list[Message]:
    """`messages` without the reasoning of finished turns: the `analysis` messages before the last `final` answer.

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
            f"Message {number} has {type(content).__name__} but role {message.role!r}; it belongs in role {owner!r}."
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
