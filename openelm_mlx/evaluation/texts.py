"""Texts from files that a user names: plain text, or JSON Lines with a text or the messages of a chat in each line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..errors import PromptError
from ..files import expanded, parse_json, shown

JSON_LINES = (".jsonl", ".ndjson")
# Far more than any model reads in a day.
_LARGEST_TEXT = 2**30
# Text, or the messages of a chat, which go through the model's template.
Document = str | Sequence[Mapping[str, Any]]


def read_documents(names: Sequence[str]) -> list[Document]:
    """The documents of these files: one of a text file, one a line of a .jsonl file ("text" or "messages").

    Raises PromptError, with the line, for a file that cannot be read, or has nothing in it.
    """
    return [document for name in names for document in _documents(name)]


def _documents(name: str) -> Iterator[Document]:
    text = read_text(name)
    if Path(name).suffix not in JSON_LINES:
        if not text.strip():
            raise PromptError(f"{name!r} holds no text: give a file that has some.")
        yield text
        return
    found = False
    for number, value in json_lines(text, name):
        found = True
        if isinstance(value, Mapping) and isinstance(value.get("text"), str):
            yield value["text"]
        elif isinstance(value, Mapping) and isinstance(value.get("messages"), list) and value["messages"]:
            yield value["messages"]
        else:
            raise PromptError(f'Line {number} of {name!r} is {shown(value)}: give an object with "text" or "messages".')
    if not found:
        raise PromptError(f"{name!r} holds no lines: give a file that has some.")


def read_text(name: str) -> str:
    """The whole of a UTF-8 file that a user names, with line feeds for every kind of line break. Raises PromptError."""
    text = files.read_text(expanded(name, PromptError), PromptError, _LARGEST_TEXT, may_be_pipe=True)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not empty. Raises PromptError for one that is not JSON."""
    # Not `splitlines`: a string of JSON may hold the other characters that end a line for it.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        yield number, parse_json(line, f"Line {number} of {name!r}", PromptError, "correct it")
