"""Lines of data: a chat, a prompt with its completion, a text, or a preference of two answers; read and checked one by one.

What is wrong is said with the number of its line before a model is looked for. No arrays and no tokens here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import expanded, one_line, open_regular, shown
from ..text.conversation import REASONING_EFFORTS

CHAT, COMPLETION, TEXT, PREFERENCE, INSTRUCTION = "messages", "prompt", "text", "chosen", "instruction"

# What each kind of line must have, and may have besides.
FIELDS = {
    CHAT: (("messages",), ("tools", "reasoning_effort")),
    COMPLETION: (("prompt", "completion"), ("tools", "reasoning_effort")),
    TEXT: (("text",), ()),
    PREFERENCE: (("chosen", "rejected"), ("prompt", "tools", "reasoning_effort")),
    INSTRUCTION: (("instruction", "output"), ("input",)),
}
WANTED = (
    'give "messages" (a chat), "prompt" and "completion", "text", "prompt", "chosen" and "rejected", or "instruction" and '
    '"output"'
)
# No chat is longer; a file without line breaks is something else.
LARGEST_LINE = 64 * 2**20
# The names of a folder's files, as mlx-lm has them too.
TRAINING_FILE, VALIDATION_FILES = "train.jsonl", ("valid.jsonl", "validation.jsonl")


@dataclass(frozen=True)
class Example:
    """One line. kind: what it is (a key of `FIELDS`). place: where it stands, for errors: "data.jsonl, line 3"."""

    kind: str
    fields: Mapping[str, Any]
    place: str

    def error(self, problem: str) -> DataError:
        """The error for a problem of this line."""
        return DataError(f"{self.place}: {problem}")


DataSource = str | os.PathLike[str] | Sequence[Mapping[str, Any]]


def read_examples(source: DataSource, what: str = "data") -> list[Example]:
    """All examples of a source, each checked.

    source: a .jsonl file, a folder with train.jsonl, a Hugging Face dataset as "owner/name" or "owner/name:split" (through the
    library `datasets`), or the lines themselves as dictionaries. what: the argument's name, for errors.

    Raises DataError with the line's number, also where there are none.
    """
    if isinstance(source, (str, os.PathLike)):
        place, items = _open(source, what)
    elif isinstance(source, Sequence):
        place, items = what, ((f"{what}[{i}]", item) for i, item in enumerate(source))
    else:
        raise DataError(
            f"{what} is {shown(source)}: give a file, a folder, a dataset's name, or a list of dictionaries."
        )
    examples = [checked(item, where) for where, item in items]
    if not examples:
        raise DataError(f"{place} has no examples: {WANTED} on each line.")
    kinds = {example.kind == PREFERENCE for example in examples}
    if len(kinds) > 1:
        other = next(e for e in examples if (e.kind == PREFERENCE) != (examples[0].kind == PREFERENCE))
        raise other.error("preferences and other examples are mixed: put them into two files.")
    return examples


def validation_file(source: DataSource) -> Path | None:
    """The validation file beside the training file, where the source is a folder that has one."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    folder = expanded(source, DataError)
    return next((folder / name for name in VALIDATION_FILES if (folder / name).is_file()), None)


def checked(item: Any, place: str) -> Example:
    """The example of one line. Raises DataError."""
    if not isinstance(item, Mapping):
        raise DataError(f"{place} is {shown(item)}, not an object with named fields: {WANTED}.")
    kind = next(
        (each for each in (PREFERENCE, *FIELDS) if all(item.get(name) is not None for name in FIELDS[each][0])), None
    )
    if kind is None:
        names = ", ".join(map(str, item)) or "nothing"
        raise DataError(f"{place} has {shown(names)[1:-1]}: {WANTED}.")
    required, allowed = FIELDS[kind]
    fields = {name: item[name] for name in (*required, *allowed) if item.get(name) is not None}
    example = Example(kind, fields, place)
    for name, value in fields.items():
        _check_field(example, name, value)
    return example


def _check_field(example: Example, name: str, value: Any) -> None:
    if name == "reasoning_effort":
        if value not in REASONING_EFFORTS:
            raise example.error(f"reasoning_effort is {shown(value)}: use low, medium or high.")
        return
    if name == "tools":
        if not isinstance(value, (list, tuple)):
            raise example.error(f"tools is {shown(value)}: give a list of function definitions.")
        return
    may_be_chat = example.kind in (CHAT, COMPLETION, PREFERENCE)
    if isinstance(value, str):
        if name == "messages":
            raise example.error("messages is text: give a list of messages, each with a role and a content.")
        if not value.strip() and name not in ("input", "prompt"):
            raise example.error(f"{name} is empty: there is nothing to learn; fill it, or remove the line.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise example.error(
                f"{name} holds half a character: it was read from something that is not UTF-8."
            ) from None
        return
    if not may_be_chat or not isinstance(value, (list, tuple)):
        raise example.error(f"{name} is {shown(value)}: give text{' or a list of messages' if may_be_chat else ''}.")
    if not value:
        raise example.error(f"{name} is an empty list: give at least one message, or remove the line.")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise example.error(
                f"message {number} of {name} is {shown(message)}: give an object with role and content."
            )
    if name in ("messages", "completion", "chosen", "rejected") and not any(m["role"] == "assistant" for m in value):
        raise example.error(f"{name} has no message of the assistant, so there is nothing to learn: add one.")


def _open(source: str | os.PathLike[str], what: str) -> tuple[str, Iterable[tuple[str, Any]]]:
    """What a path or a name stands for: its name, and (place, object) of each line."""
    text = os.fspath(source)
    if not text.strip():
        raise DataError(f"{what} is empty: give a .jsonl file, a folder, or a dataset's name.")
    path = expanded(text, DataError)
    if path.is_dir():
        path = path / TRAINING_FILE
        if not path.is_file():
            raise DataError(f"{text} is a folder without {TRAINING_FILE}: name the file itself.")
    if not os.path.lexists(path) and _is_dataset_name(text):
        return text, _of_dataset(text)
    return path.name, _of_file(path)


def _of_file(path: Path) -> Iterator[tuple[str, Any]]:
    with open_regular(path, DataError, may_be_pipe=True) as stream:
        number = 0
        while line := stream.readline(LARGEST_LINE + 1):
            number += 1
            place = f"{path.name}, line {number}"
            if len(line) > LARGEST_LINE:
                raise DataError(f"{place} is longer than {LARGEST_LINE:,} bytes: give one JSON object a line.")
            try:
                content = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if content:
                    yield place, json.loads(content)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place} is not UTF-8 text (byte {error.start} is 0x{line[error.start]:02x}): convert the file, for "
                    "example with iconv."
                ) from None
            except RecursionError:
                raise DataError(f"{place} is nested too deep: {WANTED}.") from None
            except ValueError as error:
                raise DataError(f"{place} is not JSON ({one_line(error)}): give one JSON object a line.") from None


def _is_dataset_name(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(slash) and bool(owner) and bool(name) and "/" not in name and not text.endswith((".jsonl", ".json"))


def _of_dataset(text: str) -> Iterator[tuple[str, Any]]:
    """The rows of a Hugging Face dataset, "owner/name" (its split "train") or "owner/name:split"."""
    name, _, split = text.partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{text} is not a file here, and a dataset of the Hugging Face Hub needs the library datasets: pip install "
            "'openelm_mlx[finetune]', or give a .jsonl file."
        ) from None
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # noqa: BLE001  (it raises errors of a dozen libraries)
        raise DataError(f"{text} is not a file here, and no dataset could be loaded ({one_line(error)}).") from None
    for number, row in enumerate(rows, start=1):
        yield f"{text}, row {number}", row
