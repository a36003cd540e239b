"""Patterns from real life: each has an answer, found in a few walks, from its beginning and from the midst of it."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from everyday_patterns import PATTERNS

from openelm_mlx.decoding import completion
from openelm_mlx.decoding.constraint import PlainConstraint
from openelm_mlx.decoding.grammar import answer_format, engine_of
from openelm_mlx.decoding.json_patterns import held_pattern, matches
from openelm_mlx.text.tokenizer import load_tokenizer

DEMO = Path(__file__).parent.parent / "openelm_mlx" / "demo"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO / "openelm")


def text_of(engine, tokens) -> str:
    return b"".join(engine.token_bytes[token] for token in tokens).decode()


def fits(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def test_there_are_many():
    assert len(PATTERNS) >= 80


@pytest.mark.parametrize("name", PATTERNS)
def test_an_everyday_pattern_has_an_answer_soon(tokenizer, monkeypatch, name):
    pattern, other = PATTERNS[name]
    walks, real = [], completion._Walk.to_end
    monkeypatch.setattr(completion._Walk, "to_end", lambda walk: (walks.append(1), real(walk))[1])
    engine = engine_of(tokenizer)
    answer = answer_format({"type": "string", "pattern": pattern})
    matcher = engine.matcher(answer)
    tokens = matcher.completion()
    assert tokens is not None
    assert fits(pattern, json.loads(text_of(engine, tokens)))
    assert len(walks) <= 4
    spelled = engine.spell(json.dumps(other, ensure_ascii=False).encode())
    assert not matcher.is_completed_by(spelled)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_writer_that_ends_only_when_it_must_still_fits(tokenizer, name):
    pattern, _ = PATTERNS[name]
    engine, draw = engine_of(tokenizer), random.Random(name)
    answer = answer_format({"type": "string", "pattern": pattern})
    room = len(engine.matcher(answer).completion()) + 12
    constraint = PlainConstraint(engine, answer, tokenizer.eos_tokens, room)
    tokens: list[int] = []
    while not constraint.is_finished:
        assert len(tokens) < room
        choices = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist()
        token = draw.choice([each for each in choices if each not in tokenizer.eos_tokens] or choices)
        if constraint.accept(token):
            tokens.append(token)
    assert fits(pattern, json.loads(text_of(engine, tokens[:-1])))


@pytest.mark.parametrize("name", PATTERNS)
def test_an_everyday_pattern_is_a_regex_of_a_whole_answer_too(tokenizer, name):
    pattern, _ = PATTERNS[name]
    if re.search(r"\|\^|\$\|", pattern):
        pattern = f"({pattern.replace('^', '').replace('$', '')})"  # a regex is the whole text, without anchors inside
    engine = engine_of(tokenizer)
    whole = pattern if pattern.startswith("^") else f".*{pattern}"
    whole = whole.removeprefix("^").removesuffix("$")
    tokens = engine.matcher(answer_format(regex=whole)).completion()
    assert re.fullmatch(whole, text_of(engine, tokens))


# What JSON has to escape, and what stands beside it.
ESCAPED = ['"', "\\", "\n", "\t", "\x01", "\x1f", "a", "/", "é", 'a"b', "a\\b", 'a\nb"', "\\\\", '""', "ab"]
CLASSES = [
    r'^[^"]+$', r"^[^\\]+$", r'^[^"\\]+$', r'^[^"\n]+$', r"^[^\\\n]+$", r"^[\x00-\x1f]+$", r"^[\x00-\x1fa]+$", r"^\P{P}+$",
    r"^[[:cntrl:]]+$", r"^\p{Cc}+$", r"^.+$", r"^[\s\S]+$", r"^\W+$", r"^[^a]+$", r"^[^\x01]+$", r'^(?:[^"\t]|\t)+$',
    r'^(?:\s|[^"\t])+$', r"^[]\x00-\x1f-]+$", r'^[\w\s\S&&[^"]]+$', r'^a[^"]b$', r'[^"]"[^"]',
]  # fmt: skip


@pytest.mark.parametrize("pattern", CLASSES)
def test_a_class_takes_no_character_that_it_excludes_for_being_escaped(tokenizer, pattern):
    engine = engine_of(tokenizer)
    in_python = re.sub(r"\[\[:cntrl:\]\]|\\p\{Cc\}", r"[\\x00-\\x1f\\x7f]", pattern).replace(r"[]\x", r"[\]\x")
    in_python = in_python.replace(r"\P{P}", r"[^!-#%-*,-/:;?@\[-\]_{}]").replace(r'[\w\s\S&&[^"]]', '[^"]')
    in_python = in_python.replace(r'[^[\]"]', r'[^\[\]"]')
    matcher = engine.matcher(answer_format({"type": "string", "pattern": pattern}))
    for text in ESCAPED:
        is_match = re.search(in_python, text, re.ASCII) is not None
        assert matcher.is_completed_by(engine.spell(json.dumps(text, ensure_ascii=False).encode())) == is_match, text
        assert matches(pattern, text) == is_match, text


def test_a_pattern_that_is_read_exactly_stays_as_it_is():
    for pattern in (r"^\S+@\S+$", r"^[\w,\s-]+$", r"^.*\?$", r"^[^\s/$.?#]+$", r"[\s\S]*", r"\[x"):
        assert held_pattern(pattern) == pattern
    assert held_pattern(r"^\x00|[^\"]$") == r"^\x00|[\x00-\x00\x02-\x{10FFFF}&&[^\"]]$"
    every = "".join(map(chr, range(32)))
    assert matches('^[^"]*$', every) is None
    assert matches('^[^"]*$', every[:-1]) is True


def test_names_of_properties_are_told_apart_by_the_same_classes(tokenizer):
    engine = engine_of(tokenizer)
    answer = answer_format({"type": "object", "patternProperties": {'^[^"]+$': {"type": "integer"}}})
    matcher = engine.matcher(answer)
    assert matcher.is_completed_by(engine.spell(b'{"a": 1}'))
    assert not matcher.is_completed_by(engine.spell(b'{"a\\"b": 1}'))
    assert not matcher.is_completed_by(engine.spell(b'{"a\\u0000": "text"}'))
    assert "only names that are listed or match" in answer.notes[0]
