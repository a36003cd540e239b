"""What the library says to people has none of its developers' words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for name in ("openelm_mlx", "benchmarks") for file in (ROOT / name).rglob("*.py"))
# What developers ask of the library, and how they keep count of it. ("targets" is an option: what an adapter is beside.)
WORDS = re.compile(
    r"\b(asked|missed|goals?|acceptance|criteri(on|a)|milestones?|backlog|sprint|roadmap|todo|fixme|xxx)\b",
    re.IGNORECASE,
)


def strings(source: str) -> Iterator[str]:
    """Every string of a file but for docstrings, with the pieces of an f-string put together."""
    tree = ast.parse(source)
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, scopes) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_developers_words_in_what_is_said(file):
    found = [text for text in strings(file.read_text()) if WORDS.search(text)]
    # What an adapter stands beside is its targets, PEFT's word, and the name of an argument.
    is_about_adapters = "training" in file.parts or file.name in ("finetune.py", "adapters.py", "adapter_targets.py")
    found = [text for text in found if not (is_about_adapters and WORDS.findall(text) == [("targets", "")])]
    # A sentence of the library's about guessing: how often a draft is accepted is the field's word.
    assert [text for text in found if "what costs and acceptance allow" not in text] == []


def test_the_words_are_found():
    assert [text for text in strings('print(f"(asked: {limit}, MISSED)")\n"""x"""') if WORDS.search(text)]
