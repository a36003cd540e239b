"""Texts from files that a user names: plain text, or JSON Lines with a text or the messages of a chat in each line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..files import expanded, shown

JSON_LINES = (".jsonl", ".ndjson")
Document = str | Sequence[Mapping[str, Any]]


def read_documents(names: Sequence[str]) -> list[Document]:
    """The documents of these files: one of a text file, one a line of a .jsonl file ("text" or "messages").

    Raises PromptError, with the line, for a file that cannot be read, or has nothing in it.
    """
    return [document for name in names for document in _documents(name)]


def _documents(name: str) -> Iterator[Document]:
    path = expanded(name, PromptError)
    text = read_text(path, name)
    if path.suffix not in JSON_LINES:
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


def read_text(path: Path, name: str) -> str:
    """The whole of a UTF-8 file. Raises PromptError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name!r} is not UTF-8 text (byte {error.start:,}): save it as UTF-8.") from None
    except OSError as error:
        raise PromptError(f"{name!r} cannot be read: {error.strerror or error}; give a text file.") from None


def json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not empty. Raises PromptError for one that is not JSON."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            raise PromptError(f"Line {number} of {name!r} is not JSON: {shown(line[:60])}; correct it.") from None
