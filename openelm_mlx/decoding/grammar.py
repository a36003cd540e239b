"""The format of an answer (JSON Schema, a regular expression, a grammar), and which tokens may come next in it.

The engine is llguidance: one wheel of 3 MB for each platform, without dependencies, that reads all three kinds of formats
and can take tokens back. (xgrammar 0.2.8 requires torch, transformers and, on Linux, triton.) No arrays of mlx here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import SettingError
from ..text.schema_check import check_schema
from ..text.tokenizer import Tokenizer
from .completion import EFFORTS, completion
from .engine_schema import HALF_A_CHARACTER
from .formats import AnswerFormat as AnswerFormat
from .json_schema import prepared
from .vocabulary import Vocabulary

# JSON is written in one line, with at most one space between its tokens, as models write calls. With all the white space
# that JSON allows, a small model may write nothing else until its tokens are used up.
_WHITESPACE = " ?"


def answer_format(schema: Any = None, regex: str | None = None, grammar: str | None = None) -> AnswerFormat | None:
    """The requested format, None if there is none.

    schema: a JSON Schema (a dictionary), a Pydantic model class, or an AnswerFormat, which is returned as it is. regex: a
    regular expression in Rust's syntax that the whole answer matches. grammar: in Lark's syntax, as llguidance reads it,
    beginning at `start`. Raises SettingError when it is invalid, when the engine cannot express it, or when there is more
    than one.
    """
    given = {"schema": schema, "regex": regex, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise SettingError(f"An answer has one format, and {' and '.join(names)} are given: leave all but one out.")
    if not names:
        return None
    if isinstance(schema, AnswerFormat):
        return schema
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
    for_engine, notes = prepared(schema)
    text = json.dumps(for_engine)
    try:
        definition = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
    except ValueError:
        raise SettingError(
            f"The schema has a text that cannot be written, in a name, a value or a pattern: {HALF_A_CHARACTER}. Leave it out."
        ) from None
    return _checked(AnswerFormat("json", text, definition, schema, notes), "The schema")


def _checked(answer: AnswerFormat, what: str) -> AnswerFormat:
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(answer.definition)
    if failed:
        reason = " ".join(messages[0].split())
        if outside := _OUTSIDE.match(reason):
            raise SettingError(
                f"{what} refers to {outside[1]!r}, which is not a part of it: put that under $defs, since nothing "
                "is fetched or read."
            )
        advice = next((f" {advice}" for sign, advice in _ADVICE.items() if sign in reason), "")
        raise SettingError(f"{what} cannot be enforced while tokens are chosen: {reason[:300]}.{advice}")
    return answer


# References that lead out of a schema, or nowhere. The engine does not fetch anything either.
_OUTSIDE = re.compile(r"(?:Resource|Pointer|Anchor) '(.*?)' (?:is not present in a registry|does not exist)")
# What a user can do about the engine's refusals, by a part of their text.
_ADVICE = {
    "Unimplemented keys": "Leave these keywords out, and check the answer for them afterwards.",
    "min/maxProperties only supported": "Make every listed property required, or leave minProperties and maxProperties out.",
    "not disjoint": "Change the patterns so that no name matches two of them.",
    "Unsatisfiable schema": "No value fits it: loosen one of its conditions.",
    "circular references with sibling keys": "Move the keywords beside the $ref into the definition.",
    "look-ahead": "Write the pattern without (?=, (?!, (?<= and (?<!.",
    "too many digits": "Give multipleOf with fewer digits.",
}


# --- The engine -------------------------------------------------------------------------------------------------------

_engines: WeakKeyDictionary[Tokenizer, Engine] = WeakKeyDictionary()


def engine_of(tokenizer: Tokenizer) -> Engine:
    """The engine for a tokenizer, made once for each: for gpt-oss's 200,000 tokens that takes half a second."""
    engine = _engines.get(tokenizer)
    if engine is None:
        engine = _engines[tokenizer] = Engine(tokenizer)
    return engine


@final
class Engine:
    """llguidance with one tokenizer. Control tokens, role tags and the unknown token never count as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import llguidance

        self.vocab_size = tokenizer.vocab_size
        vocabulary = Vocabulary(tokenizer)
        self.vocabulary, self.token_bytes, self.eos_token = vocabulary, vocabulary.tokens, vocabulary.eos_token_id
        self.characters, self.encode, self.spell = vocabulary.characters, vocabulary.encode, vocabulary.spell
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))

    def matcher(self, answer: AnswerFormat) -> Matcher:
        """A matcher at the beginning of an answer. Raises SettingError where the engine gives up on its size."""
        matcher = Matcher(self, answer)
        matcher.check()
        return matcher


@final
class Matcher:
    """The current position in one answer: which tokens may follow, and a completion."""

    def __init__(self, engine: Engine, answer: AnswerFormat) -> None:
        import llguidance

        self.engine, self.answer = engine, answer
        self.tokens: list[int] = []
        self._matcher = llguidance.LLMatcher(engine.tokenizer, answer.definition, log_level=0)
        self.num_steps = 0  # of all searches for a completion so far
        self._effort = 0
        self._words = (engine.vocab_size + 31) // 32

    def check(self) -> None:
        """Raise SettingError if the engine has given up: the format is too large for its limits."""
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise SettingError(f"The answer's format is too large for the engine: {reason[:300]}; make it smaller.")

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
        words[eos >> 5] &= ~np.uint32(1 << (eos & 31))  # the caller decides how the answer ends
        return words

    def accept(self, token: int) -> bool:
        """Take one token; returns False, without a change, if it may not follow."""
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
        """Whether the answer may end after these tokens. Much faster than searching for such tokens."""
        ahead = self._matcher.deep_copy()
        return ahead.try_consume_tokens(tokens) == len(tokens) and ahead.is_accepting()

    def completion(self, known: Sequence[int] = ()) -> list[int] | None:
        """Tokens that end the answer soon (not provably soonest); None if none were found.

        known: a completion of a position shortly before, which shortens the search.
        """
        text = b"".join(map(self.engine.token_bytes.__getitem__, self.tokens))
        while self._effort < len(EFFORTS):
            effort, vocabulary = EFFORTS[self._effort], self.engine.vocabulary
            data, num_steps = completion(self._matcher, vocabulary, self.answer, text, effort, known)
            self.num_steps += num_steps
            if data is not None:
                return self.engine.encode(data)
            self.answer.preferred.clear()
            self._effort += 1  # permanently: a smaller effort will not help at the next position either
        self._effort = 0
        return None
