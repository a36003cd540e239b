"""The state machine of the Harmony format: the position in a completion, token by token, and parsing headers.

The parser, which makes messages of a completion, and constraints, which decide what may come next, both use it. A `Place`
is immutable, so keeping old ones is enough to take tokens back.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from enum import Enum
from typing import Literal, NamedTuple, Protocol

from openelm_mlx.text.conversation import CHANNELS, CONSTRAIN, EVERYONE, ROLES, Message

# A header of names and a channel has about ten tokens, and a tool's name up to 64 characters; anything longer is an answer
# whose header is missing, and is streamed from here on.
LONGEST_HEADER = 96


class ControlTokens(Protocol):
    """The numbers of Harmony's control tokens, and the bytes of the others. `HarmonyFormat` is one."""

    start: int
    message: int
    channel: int
    constrain: int
    end_tokens: frozenset[int]
    control_tokens: frozenset[int]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of an ordinary token; b"" for a token that the tokenizer does not know."""


class Place(NamedTuple):
    """The position in a completion: in a header, or in the content of a message.

    header: the tokens of the header so far. role: the author, if known before the header. message: the open message without
    its content; None in a header. is_between: after the end of a message and before `<|start|>`: stray text there is not a
    header. rest: text in the header that does not belong to it.
    """

    header: tuple[int, ...] = ()
    role: str | None = "assistant"
    message: Message | None = None
    is_between: bool = False
    rest: str = ""


def follow(place: Place, token: int, control: ControlTokens) -> Place:
    """The place after `token`, for any sequence of tokens, well-formed or not."""
    if place.message is not None and token not in control.control_tokens:
        return place
    if token == control.start or token in control.end_tokens:
        return Place(role=None, is_between=token != control.start)
    if place.message is not None:
        # At <|channel|> the model changed the channel and forgot <|end|><|start|>assistant.
        return Place((token,), place.message.role) if token == control.channel else place
    if token == control.message:
        message, rest = read_header(place, "complete", control)
        return Place(message=message, rest=rest)
    header = (*place.header, token)
    grown = place._replace(header=header, is_between=place.is_between and token != control.channel)
    if len(header) < LONGEST_HEADER or not _ends_with_whole_character(header, control):
        return grown
    message, rest = read_header(grown, "ended", control)
    return Place(message=message, rest=rest)


# How a header ended: with <|message|>; by the end of the message, or by its length; by the end of the completion.
Ending = Literal["complete", "ended", "cut"]


def read_header(place: Place, ending: Ending, control: ControlTokens) -> tuple[Message, str]:
    """The message of a header, without its content, and the text in it that does not belong to a header."""
    runs = [(-1, bytearray())]
    for token in place.header:
        if token in control.control_tokens:
            runs.append((token, bytearray()))
        else:
            runs[-1][1].extend(control.token_bytes(token))
    kinds = {control.channel: _Marker.CHANNEL, control.constrain: _Marker.CONSTRAIN}
    texts = [(kinds.get(token, _Marker.NONE), bytes(text).decode("utf-8", "replace")) for token, text in runs]
    return _HeaderReader(place.role, ending).read(texts)


def _ends_with_whole_character(header: Sequence[int], control: ControlTokens) -> bool:
    data = b"".join(map(control.token_bytes, header[-4:]))
    return codecs.utf_8_decode(data, "replace", False)[1] == len(data)


class _Marker(Enum):
    """The control token in front of a run of header text, as far as it matters."""

    NONE = "none"
    CHANNEL = "channel"
    CONSTRAIN = "constrain"


_Run = tuple[_Marker, str]

_ROLE_WORD = re.compile(f"(?:{'|'.join(ROLES)})+(?P<channel>{'|'.join(CHANNELS)})?")
_TOOL_NAME = re.compile(r"[^\W\d][\w.-]*")
_NAMESPACES = ("functions.", "browser.")
_CONTENT_TYPES = ("json", "code", "text")


class _HeaderReader:
    """Makes the words of one header the fields of a Message, whatever their order; built for a single use.

    The regular forms are `assistant to=functions.f<|channel|>commentary <|constrain|>json` and
    `assistant<|channel|>commentary to=functions.f <|constrain|>json`, in a completion without the first word.
    """

    def __init__(self, role: str | None, ending: Ending) -> None:
        self._is_complete = ending == "complete"
        self._is_cut = ending == "cut"
        self._role = role
        self._author: str | None = None  # a first word that is no role: a tool's name, perhaps
        self._name: str | None = None
        self._channel: str | None = None
        self._recipient: str | None = None
        self._content_type: str | None = None
        self._strays: list[str] = []  # words that mean nothing where they stand, before any field
        self._unread: list[str] = []  # words after a field, where some fields have no marker

    def read(self, runs: Sequence[_Run]) -> tuple[Message, str]:
        """The message, without its content, and the text that is not part of a header.

        In a complete header these are single words; otherwise it is everything from the first such word on.
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
        """A first word that is not a role is a tool's name if it looks like one, or if the message is for the assistant."""
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
        if self._recipient in ("assistant", EVERYONE):  # not a tool
            self._recipient = None
        if self._channel not in CHANNELS:
            if self._channel is not None:
                self._strays.append(self._channel)
            self._channel = "commentary" if self._recipient else "final"
