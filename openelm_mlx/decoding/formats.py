"""The format of an answer for the engine, and the patterns and lengths of its strings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .patterns import Pattern, StringForm
from .schema_parts import NAMED_SCHEMAS

_TERMINAL = re.compile(r'"(?:\\.|[^"\\\n])*"|/((?:\\.|[^/\\\n])+)/')


@dataclass(frozen=True)
class AnswerFormat:
    """The format that an answer must have. `grammar.answer_format` makes one.

    text: as given, a schema as JSON after rewriting. definition: the same in llguidance's form. schema: the JSON Schema itself,
    None for the other kinds.
    """

    kind: str  # "json", "regex" or "grammar"
    text: str
    definition: str
    schema: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()  # parts of the schema that are not enforced, each in a sentence
    preferred: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """What searches for a completion of such an answer have learned, see completion.py."""

    @cached_property
    def forms(self) -> list[StringForm]:
        """The patterns and lengths that strings of the answer may have to match."""
        return string_forms(self)


def string_forms(answer: AnswerFormat) -> list[StringForm]:
    """The forms that strings may have to match: of the whole text for a regex, of terminals for a grammar."""
    if answer.kind == "regex":
        return _forms([((answer.text,), 0, None)], matches_whole=True)
    if answer.kind == "grammar":
        terminals = dict.fromkeys(match[1] for match in _TERMINAL.finditer(answer.text) if match[1])
        return _forms([((each.replace(r"\/", "/"),), 0, None) for each in terminals], matches_whole=True)
    return _forms(list(dict.fromkeys(_string_schemas(json.loads(answer.text)))), matches_whole=False)


_Form = tuple[tuple[str, ...], int, "int | None"]


def _forms(given: Sequence[_Form], matches_whole: bool) -> list[StringForm]:
    read: dict[str, Pattern | None] = {}
    forms = []
    for patterns, low, high in given:
        for pattern in patterns:
            if pattern not in read:
                try:
                    read[pattern] = Pattern(pattern, matches_whole)
                except ValueError:
                    read[pattern] = None
        known = [automaton for pattern in patterns if (automaton := read[pattern]) is not None]
        if known or low:
            forms.append(StringForm(known, low, high))
    return forms


def _string_schemas(schema: Any) -> Iterator[_Form]:
    if isinstance(schema, Mapping):
        parts = [schema, *(part for part in schema.get("allOf", ()) if isinstance(part, Mapping))]
        patterns = tuple(each["pattern"] for each in parts if isinstance(each.get("pattern"), str))
        low = max(each.get("minLength", 0) for each in parts)
        if patterns or low:
            yield patterns, low, schema.get("maxLength")
        for key, value in schema.items():
            if key == "patternProperties" and isinstance(value, Mapping):
                yield from (((pattern,), 0, None) for pattern in value)
            if key in NAMED_SCHEMAS and isinstance(value, Mapping):
                for item in value.values():
                    yield from _string_schemas(item)
            elif key not in ("const", "enum"):
                yield from _string_schemas(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _string_schemas(item)
