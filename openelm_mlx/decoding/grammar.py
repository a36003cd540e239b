"""What an answer's text must be (JSON Schema, a regular expression, a grammar), and which tokens may come next in it.

The engine is llguidance: one wheel of 3 MB for each platform, without dependencies, that reads all three kinds of formats
and can take tokens back. (xgrammar 0.2.8 requires torch, transformers and, on Linux, triton.) No arrays of mlx here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, final
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import SettingError
from ..text.schema import check_schema
from ..text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# JSON is written in one line, with a space between its tokens or none, as models write calls. White space as JSON allows it
# has no meaning and no end: a small model writes it until its tokens are spent.
_WHITESPACE = " ?"

# A completion with more bytes is not looked for. A walk that passes one place so often goes in a circle, or writes a long
# string of a given length.
_LONGEST_COMPLETION = 4096
_CIRCLE = 48
# Walks, passes of one place in a walk, whether matches of patterns are tried. The first is enough nearly always.
_EFFORTS = (128, _CIRCLE, False), (128, _CIRCLE, True), (1, _LONGEST_COMPLETION, True)
_UNANCHORED = re.compile(r"^\.[*+]|\.[*+]$")


@dataclass(frozen=True)
class AnswerFormat:
    """What the text of an answer has to be. `answer_format` makes one.

    text: what was given, a schema as JSON. definition: the same as llguidance reads it. schema: the JSON Schema itself,
    None for the other kinds.
    """

    kind: str  # "json", "regex" or "grammar"
    text: str
    definition: str
    schema: Mapping[str, Any] | None = None
    preferred: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """What walks to an end of such an answer have learned, see _Walk."""


def answer_format(schema: Any = None, regex: str | None = None, grammar: str | None = None) -> AnswerFormat | None:
    """The format that was asked for, None if none was.

    schema: a JSON Schema (a dictionary) or a Pydantic model class. regex: a regular expression in Rust's syntax that the
    whole answer matches. grammar: in Lark's syntax, as llguidance reads it, beginning at `start`. Raises SettingError
    when it is invalid, when the engine cannot express it, or when there is more than one.
    """
    given = {"schema": schema, "regex": regex, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise SettingError(f"An answer has one format, and {' and '.join(names)} are given: leave all but one out.")
    if not names:
        return None
    from llguidance import LLMatcher

    if schema is not None:
        return _json_format(schema)
    text = given[names[0]]
    if not isinstance(text, str) or not text:
        raise SettingError(f"{names[0]} is {text!r}: give it as text.")
    definition = LLMatcher.grammar_from_regex(text) if regex is not None else LLMatcher.grammar_from_lark(text)
    return _checked(AnswerFormat(names[0], text, definition), f"The {names[0]}")


def _json_format(schema: Any) -> AnswerFormat:
    from llguidance import LLMatcher

    of_model = getattr(schema, "model_json_schema", None)  # a Pydantic model's, without importing Pydantic
    if isinstance(schema, type) and callable(of_model):
        schema = of_model()
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, Mapping):
        raise SettingError(
            f"schema is a {type(schema).__name__}: give a JSON Schema as a dictionary, or a Pydantic model's class."
        )
    check_schema(schema, "The schema")
    try:
        text = json.dumps(_closed(schema))
    except (TypeError, ValueError) as error:
        raise SettingError(f"The schema cannot be written as JSON: {error}.") from None
    definition = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
    return _checked(AnswerFormat("json", text, definition, schema), "The schema")


def _checked(answer: AnswerFormat, what: str) -> AnswerFormat:
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(answer.definition)
    if failed:
        reason = " ".join(messages[0].split())
        raise SettingError(f"{what} cannot be followed while tokens are chosen: {reason[:300]}.")
    return answer


def _closed(schema: Any) -> Any:
    """The schema with objects that list their properties closed to others, unless it says what others may be.

    A model has nothing to put there, and what the closed schema allows the open one allows too. Where parts of a schema
    are combined, closing one would forbid what another asks for; such a schema stays as it is.
    """
    text = json.dumps(schema, default=str)
    may_close = not any(f'"{word}"' in text for word in ("allOf", "unevaluatedProperties"))
    return _walk(schema, may_close)


_COMBINING = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "$ref", "minProperties")
_DATA = ("const", "enum", "default", "examples", "example")

# RFC 3339, with days that exist (the engine's own have a 30 February) in years that Python's dates know, 1 to 9999.
_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP_YEAR}-02-29)"
)
_CLOCK = "([01][0-9]|2[0-3]):[0-5][0-9]"
_DATES = {"date": _DATE, "date-time": rf"{_DATE}T{_CLOCK}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_CLOCK})"}


def _walk(schema: Any, may_close: bool) -> Any:
    if isinstance(schema, (list, tuple)):
        return [_walk(item, may_close) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    walked = {key: value if key in _DATA else _walk_value(key, value, may_close) for key, value in schema.items()}
    if walked.get("format") in _DATES and "pattern" not in walked:
        walked["pattern"] = f"^{_DATES[walked.pop('format')]}$"
    if walked.get("uniqueItems") is False:
        del walked["uniqueItems"]  # the default, which the engine does not know
    properties: Any = walked.get("properties")
    required: Any = walked.get("required", ())
    closes = may_close and isinstance(properties, Mapping) and not any(key in walked for key in _COMBINING)
    if closes and all(name in properties for name in required):
        walked["additionalProperties"] = False
    return walked


def _walk_value(key: str, value: Any, may_close: bool) -> Any:
    if key in ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas"):
        return {name: _walk(item, may_close) for name, item in value.items()}  # names, which may look like keywords
    return _walk(value, may_close)


# --- The engine -------------------------------------------------------------------------------------------------------

_engines: WeakKeyDictionary[Tokenizer, Engine] = WeakKeyDictionary()


def engine_of(tokenizer: Tokenizer) -> Engine:
    """The engine over a tokenizer, made once for each: for gpt-oss's 200,000 tokens that takes half a second."""
    engine = _engines.get(tokenizer)
    if engine is None:
        engine = _engines[tokenizer] = Engine(tokenizer)
    return engine


@final
class Engine:
    """llguidance over one tokenizer. Control tokens, role tags and the unknown token are never text to it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import llguidance

        self.vocab_size = tokenizer.vocab_size
        vocabulary = _Vocabulary(tokenizer)
        self.token_bytes = vocabulary.tokens
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))
        self.eos_token = vocabulary.eos_token_id
        text = {data: token for token, data in reversed(list(enumerate(vocabulary.tokens))) if self._is_text(token)}
        self._by_bytes, self._longest = text, min(max(map(len, text)), 32)
        # A token for each printable character that has one of its own: what completions are first written in.
        ordinary = ((chr(byte), text.get(bytes([byte]))) for byte in (*range(0x20, 0x7F), 0x0A))
        self.characters = {character: token for character, token in ordinary if token is not None}
        self._encode = vocabulary

    def _is_text(self, token: int) -> bool:
        return not self.tokenizer.is_special_token(token)

    def matcher(self, answer: AnswerFormat) -> Matcher:
        """A matcher at the beginning of an answer. Raises SettingError where the engine gives up on its size."""
        matcher = Matcher(self, answer)
        matcher.check()
        return matcher

    def encode(self, data: bytes) -> list[int]:
        """Tokens of these very bytes, as the tokenizer has them where they are whole characters."""
        tokens = self._encode(data)
        spelled = b"".join(self.token_bytes[token] for token in tokens if self._is_text(token))
        return tokens if spelled == data else self.spell(data)

    def spell(self, data: bytes) -> list[int]:
        """Tokens of these bytes, the longest first each time; what has no token is left out."""
        tokens, start = [], 0
        while start < len(data):
            for length in range(min(self._longest, len(data) - start), 0, -1):
                token = self._by_bytes.get(data[start : start + length])
                if token is not None:
                    tokens.append(token)
                    break
            start += max(length, 1)
        return tokens


@final
class _Vocabulary:
    """A Tokenizer as llguidance asks for it: the bytes of each token, those that are no text, and how text is encoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {token: name for name, token in tokenizer.special_tokens.items()}
        tokens = [
            names[token].encode() if token in names else tokenizer.token_bytes(token)
            for token in range(tokenizer.vocab_size)
        ]
        self.tokens: Sequence[bytes] = tokens
        self.special_token_ids = [
            token for token, data in enumerate(tokens) if token in names or not data or _is_tag(data)
        ]
        self.eos_token_id = tokenizer.eos_tokens[0]
        self.bos_token_id = tokenizer.bos_token
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, continuation=True)


def _is_tag(data: bytes) -> bool:
    """A single token that spells `<|user|>` marks a role, wherever it comes from; " ⁇ " stands for unknown text."""
    return (data.startswith(b"<|") and data.endswith(b"|>") and len(data) > 4) or data == " ⁇ ".encode()


@final
class Matcher:
    """The place reached in one answer: what may follow, and one way to the end of it."""

    def __init__(self, engine: Engine, answer: AnswerFormat) -> None:
        import llguidance

        self.engine, self.answer = engine, answer
        self.tokens: list[int] = []
        self._matcher = llguidance.LLMatcher(engine.tokenizer, answer.definition, log_level=0)
        self._effort = 0
        self._words = (engine.vocab_size + 31) // 32

    def check(self) -> None:
        """Raise SettingError if the engine has given up: the format is too large for its limits."""
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise SettingError(f"The answer's format is too much for the engine: {reason[:300]}; make it smaller.")

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    def mask(self) -> np.ndarray:
        """The tokens of text that may follow, one bit a token in uint32 words, lowest first. May be none."""
        words = np.zeros(self._words, np.uint32)
        data = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self.check()
        words[: data.size] = data[: self._words]
        eos = self.engine.eos_token
        words[eos >> 5] &= ~np.uint32(1 << (eos & 31))  # who ends the answer, and how, is decided outside
        return words

    def accept(self, token: int) -> bool:
        """Go on by one token; False, and no change, if it may not follow."""
        if token == self.engine.eos_token or self._matcher.try_consume_tokens([token]) != 1:
            return False
        self.tokens.append(token)
        return True

    def rewind(self, count: int) -> None:
        """Take the last `count` tokens back."""
        if count:
            self._matcher.rollback(count)
            del self.tokens[-count:]

    def is_completed_by(self, tokens: list[int]) -> bool:
        """Whether the answer may end after these tokens. Much faster than to look for such tokens."""
        ahead = self._matcher.deep_copy()
        return ahead.try_consume_tokens(tokens) == len(tokens) and ahead.is_accepting()

    def completion(self) -> list[int] | None:
        """Tokens that end the answer soon (not provably soonest); None if none were found."""
        text = None
        if self.answer.kind == "json":
            text = b"".join(map(self.engine.token_bytes.__getitem__, self.tokens))
        while self._effort < len(_EFFORTS):
            num_attempts, most_passes, tries_matches = _EFFORTS[self._effort]
            for _ in range(num_attempts):
                matches = self._matches if tries_matches else ()
                walk = _Walk(self._matcher.deep_copy(), self.engine, text, self.answer.preferred, matches, most_passes)
                data = walk.to_end()
                if data is not None:
                    return self.engine.encode(data)
                if not walk.learn():
                    break
            self.answer.preferred.clear()
            self._effort += 1  # for good: what did not help here will not help in the next place
        self._effort = 0
        return None

    @cached_property
    def _matches(self) -> list[str]:
        """A match for each pattern that may match anywhere in a text, as the answer writes it.

        There, what may follow is any character from first to last, so a walk does not see whether it gets nearer.
        """
        if self.answer.kind == "regex":
            core = _UNANCHORED.sub("", self.answer.text)
            match = None if core == self.answer.text else self._match_of(core)
            return [] if match is None else [match]
        patterns = [each for each in _patterns(self.answer.schema) if not (each[:1] == "^" and each[-1:] == "$")]
        found = (self._match_of(_UNANCHORED.sub("", each.removeprefix("^").removesuffix("$"))) for each in patterns)
        return [json.dumps(match, ensure_ascii=False)[1:-1] for match in found if match]

    def _match_of(self, pattern: str) -> str | None:
        """A text that matches the whole pattern, None if none is found."""
        try:
            answer = answer_format(regex=pattern)
        except SettingError:
            return None
        assert answer is not None
        matcher = self.engine.matcher(answer)
        completion = matcher.completion()
        if completion is None:
            return None
        return b"".join(map(self.engine.token_bytes.__getitem__, completion)).decode("utf-8", "replace")


def _patterns(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(pattern := schema.get("pattern"), str):
            yield pattern
        schema = schema.values()
    elif not isinstance(schema, (list, tuple)):
        return
    for item in schema:
        yield from _patterns(item)


@final
class _JsonStrings:
    """Reads JSON byte by byte, only to know whether a string is open."""

    def __init__(self) -> None:
        self.is_open = self._is_escaped = False

    def feed(self, data: bytes) -> None:
        for byte in data:
            if self._is_escaped:
                self._is_escaped = False
            elif byte == 0x22:
                self.is_open = not self.is_open
            else:
                self._is_escaped = self.is_open and byte == 0x5C


# What leads soonest to an end, most promising first; other characters come between the two lists. In JSON the quote that
# ends a string, and the brackets, always lead nearer to it.
_IN_STRING = "@-:/.,;_+0aA", "\\ "
_OUTSIDE = '0123456789ntf",:', "-+.eE[{"
_ANY = ")}]\"';>.,:!?-_/0aA", "\\<([{ \n"


@final
class _Walk:
    """One way from a place in an answer to its end, character by character.

    text: what the JSON up to here is, None in other formats. matches: strings to try inside a JSON string that cannot end
    yet. preferred: for places, known by the characters that may follow, which of these to take; otherwise the most promising
    one is taken. A walk that finds no end has gone in circles: `learn` makes the next one leave where it went round.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        engine: Engine,
        text: bytes | None,
        preferred: dict[str, int],
        matches: Sequence[str],
        most_passes: int,
    ) -> None:
        self._matcher, self._engine, self._preferred, self._matches = matcher, engine, preferred, matches
        self._most_passes = most_passes
        self._strings = None if text is None else _JsonStrings()
        if self._strings is not None and text is not None:
            self._strings.feed(text)
        self._passed: Counter[str] = Counter()

    def to_end(self) -> bytes | None:
        """The bytes up to the end; None if there is none within the longest completion's length."""
        data = bytearray()
        while not self._matcher.is_accepting():
            step = self._forced() or self._chosen()
            if step is None or len(data) > _LONGEST_COMPLETION:
                return None
            data += step
            if self._strings is not None:
                self._strings.feed(step)
        return bytes(data)

    def learn(self) -> bool:
        """Prefer another character in the place that was passed most often; False if there is none left to try."""
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
        tokens = self._engine.spell(data)
        count = self._matcher.try_consume_tokens(tokens)
        return b"".join(self._engine.token_bytes[token] for token in tokens[:count])

    def _chosen(self) -> bytes | None:
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        allowed = [c for c, token in self._engine.characters.items() if words[token >> 5] >> (token & 31) & 1]
        if not allowed:
            return self._any_token(words)
        closing = () if self._strings is None else '"' if self._strings.is_open else "}]"
        for character in closing:
            if character in allowed:
                return self._consumed(self._engine.characters[character])
        if (self._strings is None or self._strings.is_open) and (match := self._match()):
            return match
        if self._strings is not None and not self._strings.is_open:
            allowed = [c for c in allowed if not c.isspace()] or allowed
        place = "".join(sorted(allowed, key=self._rank))
        if len(place) > 1:
            self._passed[place] += 1
            if self._passed[place] > self._most_passes:
                return None
        return self._consumed(self._engine.characters[place[self._preferred.get(place, 0)]])

    def _match(self) -> bytes | None:
        """One of the strings to try, if the text can end after it."""
        for match in self._matches:
            tokens = self._engine.spell(match.encode())
            end = [] if self._strings is None else [self._engine.characters['"']]
            ahead = self._matcher.deep_copy()
            if ahead.try_consume_tokens([*tokens, *end]) == len(tokens) + len(end) and (end or ahead.is_accepting()):
                self._matcher.try_consume_tokens(tokens)
                return match.encode()
        return None

    def _rank(self, character: str) -> int:
        if self._strings is None:
            first, last = _ANY
        else:
            first, last = _IN_STRING if self._strings.is_open else _OUTSIDE
        if character in first:
            return first.index(character)
        return 1000 + last.index(character) if character in last else 500

    def _any_token(self, words: np.ndarray) -> bytes | None:
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self._engine.vocab_size]
        bits[self._engine.eos_token] = 0
        tokens = np.flatnonzero(bits)
        return self._consumed(int(tokens[0])) if tokens.size else None

    def _consumed(self, token: int) -> bytes | None:
        if self._matcher.try_consume_tokens([token]) != 1:
            return None
        return self._engine.token_bytes[token]
