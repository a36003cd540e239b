"""Searching for a short completion: tokens that end an answer soon, from any position in it.

The engine tells which tokens may follow. For brackets, members and enums a walk takes the most promising character each
time; inside strings with a pattern, the pattern's automaton has the shortest rest (patterns.py). A proposal counts only if
the engine accepts it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, final

import numpy as np

from .formats import AnswerFormat
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import llguidance

# The longest completion in bytes. A walk that passes one position this often is in a circle, or writes a long string of a
# given length.
LONGEST_COMPLETION = 4096
_CIRCLE = 48
# (walks, passes of one position in a walk). The first pair is nearly always enough; one long walk, for a list of hundreds of
# items, comes before many short ones.
EFFORTS = (4, _CIRCLE), (1, LONGEST_COMPLETION), (32, _CIRCLE)

# A completion from an earlier position is reused after at most this many steps, without at most this many of its tokens.
_MOST_STEPS_TO_KNOWN = 12
MOST_DROPPED = 8

# A step of a walk takes as long as consuming about this many tokens, or reading this many bytes of the text so far; copying
# a matcher may take as long as so many tokens.
_TOKENS_A_STEP, _BYTES_A_STEP, _TOKENS_A_COPY = 16, 256, 64

# How much of a proposal is tried before the rest, in bytes.
_BEGINNING = 64

# How far back a grammar's terminal may have begun, in characters.
_LONGEST_TERMINAL = 512


def completion(
    matcher: llguidance.LLMatcher,
    vocabulary: Vocabulary,
    answer: AnswerFormat,
    text: bytes,
    effort: tuple[int, int],
    known: Sequence[int] = (),
) -> tuple[bytes | None, int]:
    """The bytes that end the answer after `text` (not provably the fewest), and how many steps finding them took.

    The bytes are None if none were found with this effort. known: the completion of an earlier position; without its
    beginning it may complete this one too.
    """
    num_walks, most_passes = effort
    num_steps = 0
    for _ in range(num_walks):
        walk = _Walk(matcher.deep_copy(), vocabulary, answer, text, most_passes, known)
        data = walk.to_end()
        num_steps += walk.num_steps + len(text) // _BYTES_A_STEP
        num_steps += (walk.num_tokens + _TOKENS_A_COPY) // _TOKENS_A_STEP
        if data is not None:
            return data, num_steps
        if not walk.learn():
            break
    return None, num_steps


# --- The walk ---------------------------------------------------------------------------------------------------------


@final
class _JsonStrings:
    """Reads JSON byte by byte, to know whether a string is open, and its content so far."""

    def __init__(self) -> None:
        self.is_open = self._is_escaped = False
        self._content = bytearray()

    def feed(self, data: bytes) -> None:
        for byte in data:
            if self.is_open:
                self._content.append(byte)
            if self._is_escaped:
                self._is_escaped = False
            elif byte == 0x22:
                self.is_open = not self.is_open
                self._content.clear()
            else:
                self._is_escaped = self.is_open and byte == 0x5C

    def contents(self) -> Iterator[tuple[str, str]]:
        """The open string's characters; within an escape there are several, each with the text that ends the escape.

        None within a character.
        """
        for ending in _escape_endings(bytes(self._content)):
            try:
                text = json.loads(b'"' + self._content + ending.encode() + b'"')
            except ValueError:
                continue
            if not any(0xD800 <= ord(c) <= 0xDFFF for c in text):
                yield ending, text


_OPEN_ESCAPE = re.compile(rb"(?:\\\\|\\[^\\u]|\\u[0-9a-fA-F]{4}|[^\\])*(\\(?:u[0-9a-fA-F]{0,3})?)?", re.DOTALL)


def _escape_endings(content: bytes) -> list[str]:
    """The texts that can end the escape that is open at the end of a JSON string's content; [""] if none is."""
    match = _OPEN_ESCAPE.fullmatch(content)
    start = match[1] if match else None
    if not start:
        return [""]
    if start == b"\\":
        return ['"', "\\", "n", "t", "r", "u0061"]
    return [code[len(start) - 2 :] for code in ("0061", "0041", "0030", "0022", "005c", "000a", "0020", "002e", "00e9")]


# Characters that lead to an end soonest, most promising first; other characters come between the two lists. In JSON the
# quote that ends a string, and the closing brackets, always lead nearer to it.
_IN_STRING = "@-:/.,;_+0aA", "\\ "
_OUTSIDE = ',0123456789ntf":', "-+.eE[{"
_ANY = ")}]\"';>.,:!?-_/0aA", "\\<([{ \n"


@final
class _Walk:
    """One path from a position in an answer to its end.

    It takes proposals of the string formats, or else goes on character by character. `answer.preferred` says which character
    to take at some positions, which are identified by the characters that may follow; elsewhere the most promising one is
    taken. A walk without an end has gone in circles: `learn` makes the next one leave the circle.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocabulary: Vocabulary,
        answer: AnswerFormat,
        text: bytes,
        most_passes: int,
        known: Sequence[int] = (),
    ) -> None:
        self.num_steps = self.num_tokens = 0  # steps, and tokens of proposals and of `known` that were tried
        self._known = list(known)
        self._matcher, self._vocabulary, self._answer = matcher, vocabulary, answer
        self._preferred, self._most_passes = answer.preferred, most_passes
        self._text = bytearray(text)
        self._strings = None
        if answer.kind == "json":
            self._strings = _JsonStrings()
            self._strings.feed(text)
        self._passed: Counter[str] = Counter()

    def to_end(self) -> bytes | None:
        """The bytes up to the end; None if there is no end within the longest completion's length."""
        start = len(self._text)
        while not self._matcher.is_accepting():
            if self._known and self.num_steps < _MOST_STEPS_TO_KNOWN and (rest := self._known_rest()) is not None:
                return bytes(self._text[start:]) + rest
            self.num_steps += 1
            step = self._forced() or self._chosen()
            length = len(self._text) - start
            # A pattern or a length may add much in one step.
            if step is None or length > LONGEST_COMPLETION or length + len(step) > 2 * LONGEST_COMPLETION:
                return None
            self._text += step
            if self._strings is not None:
                self._strings.feed(step)
        return bytes(self._text[start:])

    def _known_rest(self) -> bytes | None:
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        for begin, token in enumerate(self._known[:MOST_DROPPED]):
            if not words[token >> 5] >> (token & 31) & 1:
                continue
            rest, ahead = self._known[begin:], self._matcher.deep_copy()
            num_taken = ahead.try_consume_tokens(rest)
            self.num_tokens += num_taken + _TOKENS_A_COPY
            if num_taken == len(rest) and ahead.is_accepting():
                return b"".join(self._vocabulary.tokens[token] for token in rest)
        return None

    def learn(self) -> bool:
        """Prefer another character at the position that was passed most often; False if there is none left to try."""
        for place, _ in self._passed.most_common():
            tried = self._preferred.get(place, 0)
            if tried + 1 < len(place):
                self._preferred[place] = tried + 1
                return True
        return False

    def _forced(self) -> bytes:
        """What has to come next, if only one thing can."""
        data = self._matcher.compute_ff_bytes()
        if not data:
            return b""
        tokens = self._vocabulary.spell(data)
        count = self._matcher.try_consume_tokens(tokens)
        return b"".join(self._vocabulary.tokens[token] for token in tokens[:count])

    def _chosen(self) -> bytes | None:
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        closing = () if self._strings is None else '"' if self._strings.is_open else "}]"
        for character in closing:
            token = self._vocabulary.characters.get(character)
            if token is not None and words[token >> 5] >> (token & 31) & 1:
                return self._consumed(token)
        if self._strings is None or self._strings.is_open:
            for proposal, end in self._proposals():
                if (taken := self._taken(proposal, end)) is not None:
                    return taken
        allowed = self._vocabulary.characters_in(words)
        if not allowed:
            return self._any_token(words)
        if self._strings is not None and not self._strings.is_open:
            allowed = [c for c in allowed if not c.isspace()] or allowed
        place = "".join(sorted(allowed, key=self._rank))
        if len(place) > 1:
            self._passed[place] += 1
            if self._passed[place] > self._most_passes:
                return None
        return self._consumed(self._vocabulary.characters[place[self._preferred.get(place, 0)]])

    # --- Proposals ---

    def _proposals(self) -> list[tuple[bytes, bytes]]:
        """Rests of the text or of the open string, the shortest first, each with what has to be possible after it."""
        forms = self._answer.forms
        if not forms:
            return []
        if self._strings is not None:
            quoted: set[str] = set()
            for ending, content in self._strings.contents():
                rests = {form.rest(content) for form in forms}
                written = (ending + json.dumps(rest, ensure_ascii=False)[1:-1] for rest in rests if rest is not None)
                quoted.update(each for each in written if each)
            return [(each.encode(), b'"') for each in sorted(quoted, key=lambda text: (len(text), text))]
        text = self._text.decode("utf-8", "replace")
        if text.endswith("\ufffd"):
            return []
        if self._answer.kind == "regex":
            rest = forms[0].rest(text)
            return [(rest.encode(), b"")] if rest else []
        tail = text[-_LONGEST_TERMINAL:]
        found = {rest for form in forms for pattern in form.patterns for rest in pattern.rests_of_tails(tail)}
        return [(rest.encode(), b"") for rest in sorted(found, key=lambda text: (len(text), text)) if rest]

    def _taken(self, proposal: bytes, end: bytes) -> bytes | None:
        """The proposal, if the text can continue with it and then end, or continue in another way."""
        ahead = self._matcher.deep_copy()
        self.num_tokens += _TOKENS_A_COPY
        # Nearly all that is refused is so at its beginning, and proposals may be thousands of bytes long.
        beginning = proposal[:_BEGINNING].decode("utf-8", "ignore").encode()
        for part in (beginning, proposal[len(beginning) :], end):
            tokens = self._vocabulary.spell(part)
            num_taken = ahead.try_consume_tokens(tokens)
            self.num_tokens += num_taken
            if num_taken != len(tokens):
                return None
        if self._answer.kind == "regex" and not ahead.is_accepting():
            return None
        is_grammar = self._answer.kind == "grammar" and not ahead.is_accepting()
        if is_grammar and self._matcher.compute_bitmask() == ahead.compute_bitmask():
            return None  # a terminal that may end here would let other things follow than it did
        self._matcher = ahead
        return proposal + end

    # --- Single characters ---

    def _rank(self, character: str) -> int:
        if self._strings is None:
            first, last = _ANY
        else:
            first, last = _IN_STRING if self._strings.is_open else _OUTSIDE
        if character in first:
            return first.index(character)
        return 1000 + last.index(character) if character in last else 500

    def _any_token(self, words: np.ndarray) -> bytes | None:
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(self._vocabulary.tokens)]
        bits[self._vocabulary.eos_token_id] = 0
        tokens = np.flatnonzero(bits)
        return self._consumed(int(tokens[0])) if tokens.size else None

    def _consumed(self, token: int) -> bytes | None:
        if self._matcher.try_consume_tokens([token]) != 1:
            return None
        return self._vocabulary.tokens[token]
