"""Harmony, the conversation format of gpt-oss, in tokens: rendering conversations, and reading what the model writes.

Both ways go over token numbers, never over text: whoever types `<|end|>` gets those seven characters, and no control
token shows in a parsed message. Any tokenizer that has Harmony's special tokens will do. docs/harmony.md describes the
format and where openai-harmony reads it differently; what a message is, and a conversation, is in conversation.py.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, Protocol, final

from openelm_mlx.errors import SettingError, TokenizerError
from openelm_mlx.text.conversation import (
    CHANNELS,
    CONSTRAIN,
    EVERYONE,
    ROLES,
    DeveloperContent,
    Message,
    ResponseFormat,
    SystemContent,
    check_conversation,
    without_old_analysis,
)
from openelm_mlx.text.schema import comment_lines, json_text, tools_section


class HarmonyTokenizer(Protocol):
    """What Harmony needs of a tokenizer."""

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

        Only for text that no stranger had a hand in, such as a prompt written down with its markup.
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


# --- The parser -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delta:
    """What one token added: `text` (often none: a header, half a character) and whose it is.

    role and channel are None while a header is being read. An assistant's text always has a channel: `analysis`,
    `commentary` or `final`. A recipient means that the text is a tool call's.
    """

    text: str = ""
    role: str | None = None
    channel: str | None = None
    recipient: str | None = None


# A header of names and a channel has some ten tokens, and a tool's name up to 64 characters; what goes on for longer is
# an answer whose header is missing, and is streamed from here on.
_LONGEST_HEADER = 96


@final
class HarmonyParser:
    """Reads a completion token by token; any sequence of tokens will do, well-formed or not.

    `push` returns the text each token adds. `messages` has the finished messages; the one being written is described by
    role, channel, recipient, content_type and text. Call `finish` at the end: it closes a message that was cut off.

    Salvage, in short (docs/harmony.md has the table): header parts count in any order; a missing or unknown channel is
    `final`, or `commentary` for a tool call, so that what may be an answer is seen; text without a header is a message of
    its own, on `final` unless the answer or a call comes after it; words of a header that mean nothing become an
    `analysis` message in front; `<|start|>` and `<|channel|>` in the midst of a message begin another; other control
    tokens there are dropped.
    """

    def __init__(self, harmony: HarmonyFormat, role: str | None, channel: str | None, text: str) -> None:
        self.messages: list[Message] = []
        self._harmony = harmony
        self._role = role  # of the header being read, where it is known beforehand
        self._header: list[int] = []
        self._open: Message | None = None  # its content is in _texts
        self._texts: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._headless: list[Message] = []  # texts without a header, until it is known what they are
        self._is_stray = False  # they are no answer: the answer, or a call, came after them
        if channel is not None:
            self._open_message(Message(role or "assistant", "", channel=channel))
            self._texts.append(text)

    @property
    def role(self) -> str | None:
        """Who writes the open message, or is about to; None while that is not known."""
        return self._role if self._open is None else self._open.role

    @property
    def channel(self) -> str | None:
        """The open message's channel; None in a header."""
        return None if self._open is None else self._open.channel

    @property
    def recipient(self) -> str | None:
        """The tool that the open message calls, if it is a call."""
        return None if self._open is None else self._open.recipient

    @property
    def content_type(self) -> str | None:
        """The open message's content type, if its header gave one."""
        return None if self._open is None else self._open.content_type

    @property
    def text(self) -> str:
        """The text of the open message so far."""
        return "".join(self._texts)

    def push(self, token: int) -> Delta:
        """Take the next token, stop tokens included, and return what it adds."""
        delta = self._push_header(token) if self._open is None else self._push_content(token)
        return delta if delta.text or not self._is_stray else self._released("analysis", delta)

    def finish(self) -> Delta:
        """The completion is over: close the open message, salvage an open header. Returns what that adds."""
        is_cut = self._open is not None
        delta = self._close() if is_cut else self._salvage("cut")
        self._expect(None)
        if is_cut:  # in a thought: what was said before it is no answer yet
            return self._released(delta.channel, delta)
        return self._released("analysis" if self._is_stray else "final", delta)

    def _push_header(self, token: int) -> Delta:
        harmony = self._harmony
        if token == harmony.message:
            return self._begin()
        if token == harmony.start or token in harmony.end_tokens:
            delta = self._salvage("ended")
            self._expect(None)
            return delta
        self._header.append(token)
        if len(self._header) < _LONGEST_HEADER or not self._ends_with_whole_character():
            return Delta()
        message, text = self._read_header("ended")
        # Where the answer lacks its header, so did what came right before it.
        delta = self._released("final", Delta()) if _is_answer(message) else Delta()
        self._note(message)
        self._open_message(message)
        return replace(self._add(text), text=delta.text + text)

    def _push_content(self, token: int) -> Delta:
        harmony = self._harmony
        if token not in harmony.control_tokens:
            return self._add(self._decoder.decode(harmony.token_bytes(token)))
        if token == harmony.channel:  # the model changed the channel and forgot <|end|><|start|>assistant
            role = self.role
            delta = self._close()
            self._expect(role, [token])
            return delta
        if token == harmony.start or token in harmony.end_tokens:
            delta = self._close()
            self._expect(None)
            return delta
        return Delta("", self.role, self.channel, self.recipient)

    def _begin(self) -> Delta:
        """`<|message|>`: the header is complete."""
        message, rest = self._read_header("complete")
        self._note(message)
        self._open_message(message)
        delta = Delta()
        if self._is_stray or message.role != "assistant":  # whoever invents the next part has answered before
            delta = self._released("analysis" if self._is_stray else "final", delta)
        if rest:
            channel = delta.channel or "analysis"
            self.messages.append(Message("assistant", rest, channel=channel))
            delta = Delta(delta.text + rest, "assistant", channel)
        return delta if delta.text else self._add("")

    def _salvage(self, ending: _Ending) -> Delta:
        """A header that ends without `<|message|>`: its text is the message's content."""
        message, text = self._read_header(ending)
        is_call = message.recipient is not None and ending == "ended"  # one that was cut off may lack its arguments
        if not text.strip() and not is_call:
            return Delta()
        message = replace(message, content=text)
        has_header = self._harmony.channel in self._header or message.recipient is not None
        if message.role == "assistant" and (not has_header or (self._headless and ending == "cut")):
            self._headless.append(replace(message, recipient=None))
            return Delta()
        self._note(message)
        self.messages.append(message)
        return Delta(text, message.role, message.channel, message.recipient)

    def _note(self, message: Message) -> None:
        """`message` is what it says: if it is the answer or a call, texts without a header before it were neither.

        A model that writes a line between two messages, or begins with one, goes on with a message that has a header.
        """
        self._is_stray = bool(self._headless) and (self._is_stray or _is_answer(message) or message.is_call)

    def _released(self, channel: str | None, delta: Delta) -> Delta:
        """`delta`, and the texts without a header, which turned out to stand on `channel`."""
        texts = [message.text for message in self._headless]
        role = delta.role or "assistant"
        self.messages += [replace(message, role=role, channel=channel) for message in self._headless]
        self._headless, self._is_stray = [], False
        return Delta(delta.text + "".join(texts), role, channel, delta.recipient) if texts else delta

    def _read_header(self, ending: _Ending) -> tuple[Message, str]:
        return _HeaderReader(self._role, ending).read(self._header_runs())

    def _ends_with_whole_character(self) -> bool:
        data = b"".join(map(self._harmony.token_bytes, self._header[-4:]))
        return codecs.utf_8_decode(data, "replace", False)[1] == len(data)

    def _header_runs(self) -> list[_Run]:
        """The header's text, cut in front of every control token."""
        harmony = self._harmony
        runs = [(-1, bytearray())]
        for token in self._header:
            if token in harmony.control_tokens:
                runs.append((token, bytearray()))
            else:
                runs[-1][1].extend(harmony.token_bytes(token))
        kinds = {harmony.channel: _Marker.CHANNEL, harmony.constrain: _Marker.CONSTRAIN}
        return [(kinds.get(token, _Marker.NONE), bytes(text).decode("utf-8", "replace")) for token, text in runs]

    def _expect(self, role: str | None, header: Sequence[int] = ()) -> None:
        self._role = role
        self._header = list(header)

    def _open_message(self, message: Message) -> None:
        self._open = message
        self._texts = []
        self._decoder.reset()

    def _add(self, text: str) -> Delta:
        self._texts.append(text)
        return Delta(text, self.role, self.channel, self.recipient)

    def _close(self) -> Delta:
        assert self._open is not None
        delta = self._add(self._decoder.decode(b"", final=True))  # what is left of a character
        self.messages.append(replace(self._open, content=self.text))
        self._open = None
        self._texts = []
        return delta


def _is_answer(message: Message) -> bool:
    return message.role == "assistant" and message.channel == "final" and message.recipient is None


# --- Headers ----------------------------------------------------------------------------------------------------------


class _Marker(Enum):
    """The control token in front of a run of header text, as far as it matters."""

    NONE = "none"
    CHANNEL = "channel"
    CONSTRAIN = "constrain"


_Run = tuple[_Marker, str]

# How a header ended: with <|message|>; where the message ended, or too late for a header; where the completion ended.
_Ending = Literal["complete", "ended", "cut"]

_ROLE_WORD = re.compile(f"(?:{'|'.join(ROLES)})+(?P<channel>{'|'.join(CHANNELS)})?")
_TOOL_NAME = re.compile(r"[^\W\d][\w.-]*")
_NAMESPACES = ("functions.", "browser.")
_CONTENT_TYPES = ("json", "code", "text")


class _HeaderReader:
    """Makes the words of one header the fields of a Message, whatever their order; built for a single use.

    The regular forms are `assistant to=functions.f<|channel|>commentary <|constrain|>json` and
    `assistant<|channel|>commentary to=functions.f <|constrain|>json`, in a completion without the first word.
    """

    def __init__(self, role: str | None, ending: _Ending) -> None:
        self._is_complete = ending == "complete"
        self._is_cut = ending == "cut"
        self._role = role
        self._author: str | None = None  # a first word that is no role: a tool's name, perhaps
        self._name: str | None = None
        self._channel: str | None = None
        self._recipient: str | None = None
        self._content_type: str | None = None
        self._strays: list[str] = []  # words that mean nothing where they stand, before any field
        self._unread: list[str] = []  # and after one, where some kinds of fields come without a marker

    def read(self, runs: Sequence[_Run]) -> tuple[Message, str]:
        """The message, without its content, and the text that is no part of a header.

        That is words here and there in a complete header, otherwise everything from the first such word on.
        """
        words = [(i, word) for i, (_, text) in enumerate(runs) for word in re.finditer(r"\S+", text)]
        for n, (i, word) in enumerate(words):
            is_marked = n == 0 or words[n - 1][0] < i
            marker = runs[i][0] if is_marked else _Marker.NONE
            used = self._take(word[0], marker, may_be_cut=self._is_cut and n == len(words) - 1)
            if used < len(word[0]) and not self._is_complete:
                text = runs[i][1][word.start() + used :] + "".join(text for _, text in runs[i + 1 :])
                return self._message(), text
            if used == 0:
                has_field = self._channel or self._recipient or self._role not in (None, "assistant")
                (self._unread if has_field else self._strays).append(word[0])
        if any(marker is _Marker.CONSTRAIN and not text.strip() for marker, text in runs):
            self._content_type = self._content_type or CONSTRAIN
        message = self._message()
        return message, " ".join(self._strays + self._unread)

    def _take(self, word: str, marker: _Marker, *, may_be_cut: bool) -> int:
        """Use a word; returns how many of its characters were understood."""
        if marker is _Marker.CONSTRAIN:
            return self._take_content_type(word)
        if self._recipient == "":  # the word before was a bare "to="
            return self._take_recipient(word)
        if word.startswith("to="):
            return len("to=") + self._take_recipient(word[len("to=") :])
        if marker is _Marker.CHANNEL:
            return self._take_channel(word, may_be_cut)
        if self._channel is None and self._recipient is None and (used := self._take_author(word)):
            return used
        if may_be_cut and any(full.startswith(word) for full in ("to=", *ROLES)):
            return len(word)
        if self._recipient is None and word.startswith(_NAMESPACES):
            return self._take_recipient(word)
        if self._recipient is not None and self._content_type is None and word in _CONTENT_TYPES:
            self._content_type = word
            return len(word)
        if self._is_complete and self._channel is None and word in CHANNELS:
            self._channel = word
            return len(word)
        return 0

    def _take_content_type(self, word: str) -> int:
        match = re.match(r"\S+" if self._is_complete else r"[\w.+/-]*", word)
        assert match is not None
        self._content_type = CONSTRAIN + match[0]
        return match.end()

    def _take_recipient(self, word: str) -> int:
        match = re.match(r"\S*" if self._is_complete else r"[\w.$:/-]*", word)
        assert match is not None
        self._recipient = match[0]
        return match.end()

    def _take_channel(self, word: str, may_be_cut: bool) -> int:
        for channel in CHANNELS:
            if word.startswith(channel):
                self._name_channel(channel)
                rest = word[len(channel) :]
                if rest.startswith("to="):
                    return len(channel) + len("to=") + self._take_recipient(rest[len("to=") :])
                return len(channel)
            # "comment" has been seen for "commentary", which is two tokens.
            if channel.startswith(word) and (may_be_cut or (self._is_complete and len(word) >= 4)):
                self._name_channel(channel)
                return len(word)
        if self._is_complete and self._channel is None:
            self._channel = word
            return len(word)
        return 0

    def _name_channel(self, channel: str) -> None:
        if self._channel is not None and self._channel not in CHANNELS:
            self._strays.append(self._channel)
        self._channel = channel

    def _take_author(self, word: str) -> int:
        is_first = self._role is None and self._author is None
        role, colon, name = word.partition(":")
        if is_first and colon and role in ROLES:
            self._role, self._name = role, name or None
            return len(word)
        match = _ROLE_WORD.fullmatch(word)  # also "assistantassistant" and "assistantfinal"
        if match is not None and (self._role is None or word.startswith(self._role)):
            self._role = self._role or next(role for role in ROLES if word.startswith(role))
            self._channel = match["channel"]
            return len(word)
        if is_first and (self._is_complete or word.startswith(_NAMESPACES)):
            self._author = word
            return len(word)
        return 0

    def _message(self) -> Message:
        self._settle_author()
        if self._is_complete:
            self._settle_unmarked()
        if self._role == "assistant":
            self._settle_channel()
        assert self._role is not None
        return Message(self._role, "", self._name, self._channel, self._recipient or None, self._content_type)

    def _settle_author(self) -> None:
        """A first word that is no role names a tool if it looks like one, or if the message is for the assistant."""
        if self._author is not None:
            is_known = self._author.startswith(_NAMESPACES) or self._author == "python"
            if is_known or self._recipient == "assistant":
                self._role, self._name = "tool", self._author
            else:
                self._strays.insert(0, self._author)
        self._role = self._role or "assistant"

    def _settle_unmarked(self) -> None:
        """Content types and recipients without a marker: a lone `json`, `get_weather json`, `python`."""
        words = self._unread
        takes_any_type = self._recipient is not None or self._channel == "final" or self._role != "assistant"
        if (
            self._content_type is None
            and words
            and (words[-1] in _CONTENT_TYPES or (takes_any_type and len(words) == 1))
        ):
            self._content_type = words.pop()
        if self._recipient is not None or self._role != "assistant":
            return
        others = self._strays + words
        is_call = self._channel == "commentary" and self._content_type is not None
        if len(others) == 1 and (others[0] == "python" or (is_call and _TOOL_NAME.fullmatch(others[0]))):
            self._recipient = others[0]
            self._strays, self._unread = [], []

    def _settle_channel(self) -> None:
        """An assistant's message always gets one of the three channels, one that is shown if none was named."""
        if self._recipient in ("assistant", EVERYONE):  # nobody to call
            self._recipient = None
        if self._channel not in CHANNELS:
            if self._channel is not None:
                self._strays.append(self._channel)
            self._channel = "commentary" if self._recipient else "final"
