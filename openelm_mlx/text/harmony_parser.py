"""Parsing what gpt-oss writes: from a completion's tokens to messages, even when they are malformed or cut off."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, replace
from typing import final

from openelm_mlx.text.conversation import Message
from openelm_mlx.text.harmony_header import ControlTokens, Ending, Place, follow, read_header


@dataclass(frozen=True)
class Delta:
    """What one token added: `text` (often empty: a header, half a character), and the message it belongs to.

    role and channel are None while a header is being read. An assistant's text always has a channel: `analysis`,
    `commentary` or `final`. A recipient means that the text is a tool call's.
    """

    text: str = ""
    role: str | None = None
    channel: str | None = None
    recipient: str | None = None


@final
class HarmonyParser:
    """Parses a completion token by token; it accepts any sequence of tokens, well-formed or not.

    `push` returns the text each token adds. `messages` has the finished messages; the one being written is described by
    role, channel, recipient, content_type and text. Call `finish` at the end: it closes a message that was cut off.

    How malformed output is repaired (docs/harmony.md has the table): header parts are accepted in any order; a missing or
    unknown channel is `final`, or `commentary` for a tool call, so that a possible answer is shown; text without a header is
    a message of its own, on `final` unless the answer or a call comes after it; unknown words in a header become an
    `analysis` message before it; `<|start|>` and `<|channel|>` inside a message begin another one; other control tokens
    there are dropped.
    """

    def __init__(self, control: ControlTokens, role: str | None, channel: str | None, text: str) -> None:
        self.messages: list[Message] = []
        self._control = control
        self._place = Place(role=role)
        self._texts: list[str] = []  # the open message's
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._headless: list[Message] = []  # texts without a header, until their channel is known
        self._is_stray = False  # they are not the answer: the answer, or a call, came after them
        if channel is not None:
            self._place = Place(message=Message(role or "assistant", "", channel=channel))
            self._texts.append(text)

    @property
    def role(self) -> str | None:
        """Who writes the open message, or is about to; None while that is not known."""
        place = self._place
        return place.role if place.message is None else place.message.role

    @property
    def channel(self) -> str | None:
        """The open message's channel; None in a header."""
        return None if self._place.message is None else self._place.message.channel

    @property
    def recipient(self) -> str | None:
        """The tool that the open message calls, if it is a call."""
        return None if self._place.message is None else self._place.message.recipient

    @property
    def content_type(self) -> str | None:
        """The open message's content type, if its header gave one."""
        return None if self._place.message is None else self._place.message.content_type

    @property
    def text(self) -> str:
        """The text of the open message so far."""
        return "".join(self._texts)

    def push(self, token: int) -> Delta:
        """Take the next token, stop tokens included, and return what it adds."""
        before, self._place = self._place, follow(self._place, token, self._control)
        if before.message is None:
            delta = self._push_header(before, token)
        else:
            delta = self._push_content(before.message, token)
        return delta if delta.text or not self._is_stray else self._released("analysis", delta)

    def finish(self) -> Delta:
        """The completion is over: close the open message, salvage an open header. Returns what that adds."""
        before, self._place = self._place, Place(role=None)
        if before.message is None:
            delta = self._salvage(before, "cut")
            return self._released("analysis" if self._is_stray else "final", delta)
        delta = self._close(before.message)
        return self._released(delta.channel, delta)  # inside reasoning: the text before it is not an answer yet

    def _push_header(self, before: Place, token: int) -> Delta:
        message = self._place.message
        if message is None:
            # A header that has no token now has ended.
            return Delta() if self._place.header else self._salvage(before, "ended")
        if token == self._control.message:
            return self._begin(message, self._place.rest)
        # Too long for a header, so it is text. If the answer has no header, the text right before it had none either.
        delta = self._released("final", Delta()) if _is_answer(message) else Delta()
        self._note(message)
        self._open_message()
        return replace(self._add(message, self._place.rest), text=delta.text + self._place.rest)

    def _push_content(self, message: Message, token: int) -> Delta:
        if token not in self._control.control_tokens:
            return self._add(message, self._decoder.decode(self._control.token_bytes(token)))
        if self._place.message is None:
            return self._close(message)
        return Delta("", message.role, message.channel, message.recipient)

    def _begin(self, message: Message, rest: str) -> Delta:
        """`<|message|>`: the header is complete. rest: its unknown words."""
        self._note(message)
        self._open_message()
        delta = Delta()
        if self._is_stray or message.role != "assistant":  # a model that invents the user's reply has answered before
            delta = self._released("analysis" if self._is_stray else "final", delta)
        if rest:
            channel = delta.channel or "analysis"
            self.messages.append(Message("assistant", rest, channel=channel))
            delta = Delta(delta.text + rest, "assistant", channel)
        return delta if delta.text else self._add(message, "")

    def _salvage(self, place: Place, ending: Ending) -> Delta:
        """A header that ends without `<|message|>`: its text is the message's content."""
        message, text = read_header(place, ending, self._control)
        is_call = message.recipient is not None and ending == "ended"  # one that was cut off may lack its arguments
        if not text.strip() and not is_call:
            return Delta()
        message = replace(message, content=text)
        has_header = self._control.channel in place.header or message.recipient is not None
        if message.role == "assistant" and (not has_header or (self._headless and ending == "cut")):
            self._headless.append(replace(message, recipient=None))
            return Delta()
        self._note(message)
        self.messages.append(message)
        return Delta(text, message.role, message.channel, message.recipient)

    def _note(self, message: Message) -> None:
        """Note a message with a header: if it is the answer or a call, texts without a header before it were neither.

        A model that writes a line without a header before or between messages goes on with a message that has one.
        """
        self._is_stray = bool(self._headless) and (self._is_stray or _is_answer(message) or message.is_call)

    def _released(self, channel: str | None, delta: Delta) -> Delta:
        """`delta`, and the texts without a header, which turned out to belong to `channel`."""
        texts = [message.text for message in self._headless]
        role = delta.role or "assistant"
        self.messages += [replace(message, role=role, channel=channel) for message in self._headless]
        self._headless, self._is_stray = [], False
        return Delta(delta.text + "".join(texts), role, channel, delta.recipient) if texts else delta

    def _open_message(self) -> None:
        self._texts = []
        self._decoder.reset()

    def _add(self, message: Message, text: str) -> Delta:
        self._texts.append(text)
        return Delta(text, message.role, message.channel, message.recipient)

    def _close(self, message: Message) -> Delta:
        delta = self._add(message, self._decoder.decode(b"", final=True))  # what is left of a character
        self.messages.append(replace(message, content=self.text))
        self._texts = []
        return delta


def _is_answer(message: Message) -> bool:
    return message.role == "assistant" and message.channel == "final" and message.recipient is None
