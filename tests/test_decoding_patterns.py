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
