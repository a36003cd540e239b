"""Constrained decoding: which tokens may be chosen next, so that an answer or a tool's arguments have their format.

A constraint follows the tokens of one completion. In plain text it applies from the first token on; in Harmony to a final
message or the arguments of a tool call, and never to the reasoning. The arithmetic on logits is in sampling.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, Protocol, final

import numpy as np

from ..errors import SettingError
from ..text.conversation import Message, resolve_recipient
from ..text.harmony import HarmonyFormat
from ..text.harmony_header import LONGEST_HEADER, Place, follow
from ..text.streams import FINAL
from .completion import LONGEST_COMPLETION
from .grammar import AnswerFormat, Engine, Matcher
from .headers import HeaderRule, Headers, Node


class TokenConstraint(Protocol):
    """What a decode loop needs. Speculative decoding accepts drafted tokens one by one and rewinds rejected ones."""

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and ended: no token may follow."""

    def mask(self) -> np.ndarray | None:
        """The tokens that may come next, one bit a token in uint32 words, lowest first; None: any may.

        In free text the same object is returned again and again.
        """

    def is_free(self) -> bool:
        """Whether the next token is free text: its mask is most likely valid for the token after it, too."""

    def accept(self, token: int) -> bool:
        """Take one token. Returns False, without a change, if it is not allowed: the next `mask` excludes it.

        That happens for a token outside the mask, and for one that would leave no room to end the answer.
        """

    def rewind(self, count: int) -> None:
        """Take back the last `count` accepted tokens, and the tokens refused since."""


@final
class PlainConstraint:
    """A whole completion in one format, ended by one of `end_tokens`, within `max_tokens`.

    Raises SettingError when even a short answer in this format takes more than `max_tokens`.
    """

    def __init__(self, engine: Engine, answer: AnswerFormat, end_tokens: Collection[int], max_tokens: int) -> None:
        self._span = Span(engine.matcher(answer), end_tokens)
        self._max_tokens, self._count = max_tokens, 0
        check_room(self._span, max_tokens)

    @property
    def is_finished(self) -> bool:
        return self._span.is_ended

    def is_free(self) -> bool:
        return False

    def mask(self) -> np.ndarray:
        return self._span.mask()

    def accept(self, token: int) -> bool:
        is_accepted = self._span.accept(token, self._max_tokens - self._count)
        self._count += is_accepted
        return is_accepted

    def rewind(self, count: int) -> None:
        self._span.rewind(count)
        self._count -= count


def check_room(span: Span, max_tokens: int) -> None:
    """Raise SettingError unless some answer is known that fits into `max_tokens`."""
    completion = span.matcher.completion()
    if completion is None:
        raise SettingError(
            f"No answer in this format was found within {LONGEST_COMPLETION:,} bytes: the format may contain itself "
            "without an alternative, or its counts are too large. Make it smaller."
        )
    if len(completion) + 1 > max_tokens:
        raise SettingError(
            f"max_tokens is {max_tokens}, and even a short answer in the format takes {len(completion) + 1} tokens: "
            f"allow at least that many, or make the format smaller."
        )


# With fewer spare tokens than this beyond a completion, a new one is searched after each token.
_LEAST_SPARE = 64
# Steps of searches that an answer may take at once, and that each of its tokens adds: half a second and 4 ms, where a step
# takes 30 microseconds. A known end of 2,000 tokens can be tried after each token for as many.
_STEPS_AT_ONCE, _STEPS_A_TOKEN = 16_384, 128


class Span:
    """A stretch of tokens in one format, from its first token to the end token after it.

    It can always be finished: a completion that fits into the remaining tokens is known, and a token after which none would
    fit is refused; then the next mask has only the completion's first token. While there is plenty of room, a completion is
    searched now and then; otherwise after each token. A search goes through the whole rest of an answer, which may be
    thousands of tokens that the format asks for. So the steps of the searches are counted, and where they are more than the
    answer's tokens may take, it keeps to the known completion, which needs no search, until they are not.
    """

    def __init__(self, matcher: Matcher, end_tokens: Collection[int]) -> None:
        self.matcher = matcher
        self.is_ended = False
        self._end_tokens = frozenset(end_tokens)
        self._completion: list[int] | None = None  # of the current position, if known
        self._last_found: list[int] | None = None  # of an earlier position
        self._forced: int | None = None
        self._check_below: float = float("inf")  # search for a completion when fewer tokens than this are left
        self._last_length, self._largest_growth = 0, 0  # of completions found
        self._num_accepted = 0  # tokens, with those that were taken back
        self._has_fitted = True  # whether the last completion found did

    @property
    def _steps_left(self) -> int:
        return _STEPS_AT_ONCE + _STEPS_A_TOKEN * self._num_accepted - self.matcher.num_steps

    def mask(self) -> np.ndarray:
        """The tokens that may come next; an end token where the text is complete."""
        if self._forced is not None:
            return bits([self._forced], self.matcher.engine.vocab_size)
        words = self.matcher.mask()
        if self.matcher.is_complete:
            for token in self._end_tokens:
                words[token >> 5] |= np.uint32(1 << (token & 31))
        return words

    def accept(self, token: int, num_left: int) -> bool:
        """Take `token`, the first of `num_left` remaining ones. Returns False, without a change, if it is not allowed."""
        if self.is_ended or (self._forced is not None and token != self._forced):
            return False
        if token in self._end_tokens:
            self.is_ended = self.matcher.is_complete
            return self.is_ended
        if not self.matcher.accept(token):
            return False
        if not self._leaves_room(token, num_left - 1):
            return False
        self._forced = None
        self._num_accepted += 1
        return True

    def rewind(self, count: int) -> None:
        """Take back the last `count` tokens, the end token among them if there was one."""
        if count:
            num_tokens = count - self.is_ended
            if self._completion is not None and num_tokens:
                # The tokens taken back lead to it.
                self._completion = [*self.matcher.tokens[-num_tokens:], *self._completion]
            self.matcher.rewind(num_tokens)
            self.is_ended = False
        self._forced, self._check_below = None, float("inf")

    def _leaves_room(self, token: int, num_left: int) -> bool:
        """Whether the answer can still end after `token`, which was taken. If not, takes it back and forces another."""
        known = self._completion
        if known and known[0] == token:
            self._completion = known[1:]
            return True
        if num_left >= self._check_below:
            self._completion = None
            return True
        if self._steps_left < 0 and not self._has_fitted:
            return True
        if self._steps_left >= 0 or known is None:
            completion = self._completion_within(num_left)
            if completion is not None and len(completion) < num_left:
                self._schedule(len(completion), num_left)
                self._completion = self._last_found = completion
                self._has_fitted = True
                return True
        self.matcher.rewind(1)
        known = self.matcher.completion() if known is None else known
        if known is None or len(known) > num_left:  # it never fitted: let the model go on
            self.matcher.accept(token)
            self._completion, self._has_fitted = None, False
            return True
        self._has_fitted = True
        self._completion, self._forced = known, known[0] if known else min(self._end_tokens)
        return False

    def _completion_within(self, num_left: int) -> list[int] | None:
        """A completion of the current position. Inside a string the last one is still valid, perhaps without its beginning.

        Most tokens are inside strings, and in a long list a new search would go through all remaining items.
        """
        return self.matcher.completion(self._last_found or ())

    def _schedule(self, length: int, num_left: int) -> None:
        """Decide when to search again, after a completion of `length` tokens was found with `num_left` tokens remaining."""
        self._largest_growth = max(self._largest_growth, length - self._last_length)
        self._last_length = length
        # One token can require many more (an object with its required members), and it may come next.
        spare = max(0, num_left - length - max(_LEAST_SPARE, 2 * self._largest_growth))
        is_paid = self._steps_left + _STEPS_A_TOKEN * (spare // 8) >= 0  # by the tokens until then
        self._check_below = num_left - spare // 8 if is_paid else float("inf")


class _Spot(NamedTuple):
    """A position in a Harmony completion, and the format that its text must have there, if any.

    node: in a header that a rule is for, where in the allowed headers. num_messages: that were begun before.
    """

    place: Place = Place()
    span: Span | None = None
    node: Node | None = None
    num_messages: int = 0


@final
class HarmonyConstraint:
    """A Harmony completion: its final message in the format `answer`, the arguments of a call in that of its tool.

    calls: the formats of arguments by recipient, "functions.f" for example. With `answer`, the completion ends with a final
    message or a call: `<|return|>` elsewhere, or a header without a message, would end it without an answer. A header is
    ended before it is so long that the parser would take it for an answer.
    rule: which headers there may be, for requests with tools; messages and their ends are then well formed, too.
    channel: the message that the prompt has begun for the model, if it has.
    Headers and reasoning are otherwise unconstrained.
    """

    def __init__(
        self,
        harmony: HarmonyFormat,
        engine: Engine,
        answer: AnswerFormat | None,
        calls: Mapping[str, AnswerFormat],
        max_tokens: int,
        rule: HeaderRule | None = None,
        channel: str | None = None,
    ) -> None:
        self.is_finished = False
        self._harmony, self._engine, self._answer, self._calls = harmony, engine, answer, calls
        self._max_tokens = max_tokens
        self._headers = None if rule is None else Headers(rule, harmony, engine.vocabulary)
        # The last one is the current one; one is added per token, so that tokens can be taken back.
        self._spots = [self._first_spot(channel)]
        if answer is not None:
            check_room(Span(engine.matcher(answer), ()), max_tokens)
        everything = np.packbits(np.ones(engine.vocab_size, bool), bitorder="little")
        self._any = np.zeros((engine.vocab_size + 31) // 32, np.uint32)
        self._any.view(np.uint8)[: everything.size] = everything
        ends = harmony.end_tokens | {harmony.start}
        self._in_text = self._without(harmony.stop_tokens)
        self._in_call = self._without(harmony.stop_tokens - {harmony.call})
        self._in_header = self._without(ends)
        self._between = self._without(harmony.end_tokens)
        self._header_end = bits([harmony.message], engine.vocab_size)
        self._start = bits([harmony.start], engine.vocab_size)
        self._in_thought = self._without(harmony.control_tokens - {harmony.end})
        # Where nothing may be thought, nothing comes after the answer either.
        may_go_on = rule is None or rule.may_think
        no_ends = {harmony.call} if may_go_on else {harmony.call, harmony.end}
        self._in_answer = self._without(harmony.control_tokens - harmony.end_tokens | no_ends)
        self._in_arguments = self._without(harmony.control_tokens - {harmony.call})

    def _first_spot(self, channel: str | None) -> _Spot:
        if channel is None:
            return _Spot(node=None if self._headers is None else self._headers.begin(True, 0))
        message = Message("assistant", "", channel=channel)
        return _Spot(Place(message=message), self._span(message), None, 1)

    def _without(self, tokens: Iterable[int]) -> np.ndarray:
        return self._any & ~bits(tokens, self._engine.vocab_size)

    def is_free(self) -> bool:
        spot = self._spots[-1]
        return spot.span is None and (self._headers is None or spot.place.message is not None)

    def mask(self) -> np.ndarray | None:
        place, span, node, _ = self._spots[-1]
        if span is not None:
            return span.mask()
        if self._headers is not None:
            return self._ruled(self._headers, place, node)
        if self._answer is None:
            return None
        if place.message is not None:
            return self._in_text if place.message.recipient is None else self._in_call
        if len(place.header) >= LONGEST_HEADER - 1:
            return self._header_end  # one more, and it would be taken for an answer
        return self._between if place.is_between or (not place.header and place.role is None) else self._in_header

    def _ruled(self, headers: Headers, place: Place, node: Node | None) -> np.ndarray:
        """The mask where no format applies, and a rule says which headers there may be."""
        message = place.message
        if message is not None:
            if message.recipient is not None:
                return self._in_arguments
            return self._in_answer if message.channel == FINAL else self._in_thought
        if node is None:  # between two messages
            return self._start
        if node.words is None:
            node.words = bits(headers.tokens(node), self._engine.vocab_size)
        return node.words

    def accept(self, token: int) -> bool:
        spot = self._spots[-1]
        if spot.span is not None:
            if not spot.span.accept(token, self._max_tokens - len(self._spots) + 1):
                return False
            self.is_finished = spot.span.is_ended
            self._spots.append(spot)
            return True
        if self._headers is not None and not self._is_ruled_in(token):
            return False
        place = follow(spot.place, token, self._harmony)
        # A message without `<|message|>` began in its header, where no format applied.
        begins = token == self._harmony.message and place.message is not spot.place.message
        node, num_messages = None, spot.num_messages + begins
        if self._headers is not None and place.message is None:
            node = self._node_after(self._headers, spot, token)
        self._spots.append(_Spot(place, self._span(place.message) if begins else None, node, num_messages))
        return True

    def _is_ruled_in(self, token: int) -> bool:
        words = self.mask()
        return words is not None and bool(words[token >> 5] >> (token & 31) & 1)

    def _node_after(self, headers: Headers, spot: _Spot, token: int) -> Node | None:
        if token == self._harmony.start:
            return headers.begin(False, spot.num_messages)
        return None if spot.node is None else headers.after(spot.node, token)

    def rewind(self, count: int) -> None:
        for _ in range(count):
            spot = self._spots.pop()
            if spot.span is not None and spot.span is self._spots[-1].span:
                spot.span.rewind(1)
        if not count and (span := self._spots[-1].span) is not None:
            span.rewind(0)
        self.is_finished = False

    def _span(self, message: Message | None) -> Span | None:
        """The span that enforces a message's format, if it has one."""
        harmony = self._harmony
        if message is None or message.role != "assistant":
            return None
        if message.recipient is not None:
            known = resolve_recipient(message.recipient, self._calls.keys())
            return None if known is None else Span(self._engine.matcher(self._calls[known]), {harmony.call})
        if message.channel == FINAL and self._answer is not None:
            return Span(self._engine.matcher(self._answer), {harmony.return_})
        return None


def bits(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """A mask of these tokens, in uint32 words."""
    words = np.zeros((vocab_size + 31) // 32, np.uint32)
    for token in tokens:
        words[token >> 5] |= np.uint32(1 << (token & 31))
    return words
