"""Plurals, third persons, past tenses and participles, so that "What are mice?" finds the mouse.

Regular forms by the spelling rules of English, irregular ones from WordNet's exception lists (morphy(7WN)).
"""

from __future__ import annotations

import re
from pathlib import Path

_VOWELS = "aeiou"


def read_exceptions(path: Path) -> dict[str, list[str]]:
    """Base form -> irregular forms, from noun.exc or verb.exc, whose lines are `form base ...`."""
    forms: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        form, *bases = line.split()
        for base in bases:
            forms.setdefault(base, []).append(form)
    return forms


def plural(noun: str) -> str:
    """The regular plural.

    >>> plural("fox"), plural("city"), plural("banjo")
    ('foxes', 'cities', 'banjos')
    """
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return _y_to_ies(noun) if _ends_in_consonant_y(noun) else noun + "s"


def verb_forms(verb: str) -> list[str]:
    """The regular third person, past tense and present participle.

    >>> verb_forms("stop"), verb_forms("bake")
    (['stops', 'stopped', 'stopping'], ['bakes', 'baked', 'baking'])
    """
    if verb.endswith("e"):
        stem = verb if verb.endswith(("ee", "ye", "oe")) else verb[:-1]
        return [verb + "s", verb + "d", stem + "ing"]
    if _ends_in_consonant_y(verb):
        return [_y_to_ies(verb), verb[:-1] + "ied", verb + "ing"]
    # One short syllable doubles its last consonant: stop, stopped.
    doubled = verb + verb[-1] if re.fullmatch(r"[^aeiou]*[aeiou][bdgklmnprt]", verb) else verb
    return [plural(verb), doubled + "ed", doubled + "ing"]


def _ends_in_consonant_y(word: str) -> bool:
    return len(word) > 2 and word.endswith("y") and word[-2] not in _VOWELS


def _y_to_ies(word: str) -> str:
    return word[:-1] + "ies"
