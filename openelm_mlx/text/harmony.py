"""Harmony, the conversation format of gpt-oss, in tokens: rendering conversations, and reading what the model writes.

Both directions work on token numbers, never on text: a user who types `<|end|>` gets those seven characters, and no
control token appears in a parsed message. Any tokenizer that has Harmony's special tokens will do. docs/harmony.md
describes the format and where openai-harmony reads it differently. Messages and conversations are defined in
conversation.py; harmony_parser.py reads completions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, final

from openelm_mlx.errors import SettingError, TokenizerError
from openelm_mlx.text.conversation import (
    CHANNELS,
    CONSTRAIN,
    EVERYONE,
    DeveloperContent,
    Message,
    ResponseFormat,
    SystemContent,
    check_conversation,
    without_old_analysis,
)
from openelm_mlx.text.harmony_parser import Delta as Delta
from openelm_mlx.text.harmony_parser import HarmonyParser
from openelm_mlx.text.schema import comment_lines, json_text, tools_section


class HarmonyTokenizer(Protocol):
    """What Harmony needs from a tokenizer."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Names of the special tokens, `<|start|>` and so on, to their numbers."""

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Tokens of ordinary text: what looks like a special token stays text. PromptError if it is not Unicode.

        continuation: the text follows other tokens, so no space is put before it.
        """

    def token_bytes(self, token: int) -> bytes:
        """The raw bytes of an ordinary token, maybe a part of a character; TokenizerError if there is no such token."""


@final
class HarmonyFormat:
    """The format over one tokenizer.

    >>> harmony = HarmonyFormat(tokenizer)
    >>> prompt = harmony.render_for_completion(conversation("What is 2 + 2?"))
    >>> harmony.parse(completion)
    [Message(role='assistant', content='Simple.', channel='analysis'), Message(..., content='4', channel='final')]

    Raises TokenizerError when the tokenizer lacks one of Harmony's tokens.
    """

    stop_tokens: frozenset[int]
    """Tokens that end a completion, whatever generation_config.json says (as released it lacks `<|call|>`)."""

    end_tokens: frozenset[int]
    """Tokens that end a message; after `<|end|>` the model goes on with another one."""

    control_tokens: frozenset[int]
    """Every special token, also those that Harmony has no use for."""

    def __init__(self, tokenizer: HarmonyTokenizer) -> None:
        special = tokenizer.special_tokens
        required = ("start", "end", "message", "channel", "constrain", "return", "call")
        missing = [f"<|{name}|>" for name in required if f"<|{name}|>" not in special]
        if missing:
            raise TokenizerError(
                f"The tokenizer has no {', '.join(missing)}, so it cannot write gpt-oss's chat format; "
                f"use the tokenizer.json of a gpt-oss model."
            )
        self.tokenizer = tokenizer
        self.start, self.end, self.message, self.channel, self.constrain, self.return_, self.call = (
            special[f"<|{name}|>"] for name in required
        )
        end_of_text = {special["<|endoftext|>"]} if "<|endoftext|>" in special else set()
        self.stop_tokens = frozenset({self.return_, self.call} | end_of_text)
        self.end_tokens = self.stop_tokens | {self.end}
        self.control_tokens = frozenset(special.values())

    # --- Rendering ----------------------------------------------------------------------------------------------------

    def render_for_completion(
        self, messages: Sequence[Message], *, channel: str | None = None, text: str = "", keep_analysis: bool = False
    ) -> list[int]:
        """The prompt for the assistant's next message: the conversation, then `<|start|>assistant`.

        channel, text: begin that message for the model, on `channel` and with `text`; pass both to `parser` as well.
        keep_analysis: keep the reasoning of finished turns too, see `render`.
        """
        opening = self._opening(channel, text)
        return [*self.render(messages, keep_analysis=keep_analysis), self.start, *self._encode("assistant"), *opening]

    def render(self, messages: Sequence[Message], *, keep_analysis: bool = False) -> list[int]:
        """The tokens of a whole conversation.

        keep_analysis: also keep the reasoning of turns that ended with an answer, which gpt-oss was trained not to see.
        Raises PromptError when the messages break a rule of the format.
        """
        check_conversation(messages)
        kept = messages if keep_analysis else without_old_analysis(messages)
        has_functions = any(isinstance(m.content, DeveloperContent) and m.content.has_functions for m in messages)
        return [token for message in kept for token in self.render_message(message, has_functions=has_functions)]

    def render_message(self, message: Message, *, has_functions: bool = False) -> list[int]:
        """The tokens of one message, `<|start|>` to `<|end|>` or `<|call|>`, unchecked.

        has_functions: whether the conversation defines functions; a system message then says where their calls go.
        """
        tokens = [self.start, *self._header(message), self.message]
        for part in _content_texts(message.content, has_functions):
            tokens += self._encode(part)
        return [*tokens, self.call if message.is_call else self.end]

    def _header(self, message: Message) -> list[int]:
        author = message.role
        if message.name is not None:
            author = message.name if message.role == "tool" else f"{message.role}:{message.name}"
        tokens = self._encode(author)
        if message.recipient not in (None, EVERYONE):
            tokens += self._encode(f" to={message.recipient}")
        if message.channel is not None:
            tokens += [self.channel, *self._encode(message.channel)]
        if message.content_type is not None and message.content_type.startswith(CONSTRAIN):
            rest = message.content_type.removeprefix(CONSTRAIN)
            tokens += [*self._encode(" "), self.constrain, *(self._encode(rest) if rest else ())]
        elif message.content_type is not None:
            tokens += self._encode(f" {message.content_type}")
        return tokens

    def _opening(self, channel: str | None, text: str) -> list[int]:
        _check_opening(channel, text)
        if channel is None:
            return []
        return [self.channel, *self._encode(channel), self.message, *(self._encode(text) if text else ())]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, continuation=True)  # a control token stands in front of every text

    # --- Control tokens in text, for those who ask --------------------------------------------------------------------

    def encode_markup(self, text: str) -> list[int]:
        """Tokens of text in which `<|start|>`, `<|channel|>` and so on do mean the control tokens.

        Only for trusted text, such as a prompt written down with its markup.
        """
        special = self.tokenizer.special_tokens
        pieces = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)
        tokens: list[int] = []
        for piece in filter(None, pieces):
            tokens += [special[piece]] if piece in special else self._encode(piece)
        return tokens

    def decode_markup(self, tokens: Iterable[int]) -> str:
        """The text of `tokens` with control tokens spelled out: to look at, for typed markup looks the same."""
        names = {token: name.encode() for name, token in self.tokenizer.special_tokens.items()}
        return b"".join(names.get(t) or self.token_bytes(t) for t in tokens).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of an ordinary token, none for one that the tokenizer does not know.

        A model's vocabulary has rows beyond the tokenizer's; a parser has to live with whatever was sampled.
        """
        try:
            return self.tokenizer.token_bytes(token)
        except TokenizerError:
            return b""

    # --- Parsing ------------------------------------------------------------------------------------------------------

    def parser(self, role: str | None = "assistant", *, channel: str | None = None, text: str = "") -> HarmonyParser:
        """A parser for a completion, to be fed token by token.

        role: who is speaking already, as after `<|start|>assistant`; None to parse whole messages from `<|start|>` on.
        channel, text: what render_for_completion was given; `text` will be the beginning of the first message.
        """
        _check_opening(channel, text)
        return HarmonyParser(self, role, channel, text)

    def parse(self, tokens: Iterable[int], role: str | None = "assistant") -> list[Message]:
        """The messages of a completion, also a malformed or unfinished one. `tokens` do not include the prompt."""
        parser = self.parser(role)
        for token in tokens:
            parser.push(token)
        parser.finish()
        return parser.messages


def _check_opening(channel: str | None, text: str) -> None:
    if channel is not None and channel not in CHANNELS:
        raise SettingError(f"The answer cannot begin on channel {channel!r}; use {', '.join(CHANNELS)}.")
    if text and channel is None:
        raise SettingError(f"The answer is to begin with {text!r}, but on no channel; pass channel='final' as well.")


# --- The texts of system and developer messages -----------------------------------------------------------------------


def _content_texts(content: object, has_functions: bool) -> Sequence[str]:
    if isinstance(content, SystemContent):
        return [system_text(content, has_functions)]
    if isinstance(content, DeveloperContent):
        return [developer_text(content)]
    assert isinstance(content, (str, tuple))
    return [content] if isinstance(content, str) else content


def system_text(system: SystemContent, has_functions: bool) -> str:
    """The text of a system message; `has_functions` adds the line that sends function calls to `commentary`."""
    top = [system.identity] if system.identity is not None else []
    if system.knowledge_cutoff is not None:
        top.append(f"Knowledge cutoff: {system.knowledge_cutoff}")
    if system.current_date is not None:
        top.append(f"Current date: {system.current_date}")
    sections = ["\n".join(top)] if top else []
    if system.reasoning_effort is not None:
        sections.append(f"Reasoning: {system.reasoning_effort}")
    if system.tools:
        sections.append(tools_section(system.tools))
    if system.channels:
        text = f"# Valid channels: {', '.join(system.channels)}."
        if system.channel_required:
            text += " Channel must be included for every message."
        if has_functions:
            text += "\nCalls to these tools must go to the commentary channel: 'functions'."
        sections.append(text)
    return "\n\n".join(sections)


def developer_text(developer: DeveloperContent) -> str:
    """The text of a developer message: `# Instructions`, `# Tools`, `# Response Formats`, as far as there are any."""
    sections = []
    if developer.instructions is not None:
        sections += ["# Instructions", developer.instructions]
    if developer.all_namespaces:
        sections.append(tools_section(developer.all_namespaces))
    if developer.response_formats:
        sections += ["# Response Formats", *map(_response_format_text, developer.response_formats)]
    return "\n\n".join(sections)


def _response_format_text(answer: ResponseFormat) -> str:
    return "\n".join([f"## {answer.name}\n", *comment_lines(answer.description or ""), json_text(answer.schema)])
