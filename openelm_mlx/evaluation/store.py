"""Answers of a run that is not complete, in a file: a line for each, so that the run can be interrupted at any moment."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import IO, Any

from ..errors import DestinationError
from ..files import shown

FORMAT = "openelm_mlx answers 1"


class Store:
    """The answers so far. A line that was cut off by the interruption is left out, and what follows it is written anew.

    path: made when the first answer comes. identity: what has to be the same for the answers to be of use: the model, the
    tasks, the settings. Raises DestinationError for a file that holds something else, which stays as it is.
    date: when the run was begun, YYYY-MM-DD, which gpt-oss is told.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        self.date = f"{date.today():%Y-%m-%d}"
        self._answers: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        self._length = 0
        self._numbers: Counter[str] = Counter()
        if path is not None and path.exists():
            self._read(path)

    def key(self, kind: str, *request: Any) -> str:
        """The name of a request: what it asks, and the how many-th that asks the same."""
        text = json.dumps([kind, *request], sort_keys=True, default=str, ensure_ascii=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        self._numbers[digest] += 1
        return f"{digest}-{self._numbers[digest]}"

    def get(self, key: str) -> Any:
        """The answer; None where there is none."""
        return self._answers.get(key)

    def put(self, answers: Mapping[str, Any]) -> None:
        """Keep these answers; they are on the disk when it returns."""
        self._answers.update(answers)
        if self.path is None:
            return
        try:
            file = self._opened()
            for key, value in answers.items():
                file.write(json.dumps([key, value]).encode() + b"\n")
            file.flush()
        except OSError as error:
            raise DestinationError(
                f"Answers cannot be written to {str(self.path)!r}: {error.strerror or error}."
            ) from error

    def close(self) -> None:
        """Close the file, which stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> IO[bytes]:
        assert self.path is not None
        if self._file is None:
            is_new = not self.path.exists()
            self._file = open(self.path, "ab")  # noqa: SIM115  (for as long as the run takes)
            if is_new or not self._length:
                self._file.truncate(0)
                header = {"format": FORMAT, "identity": self.identity, "date": self.date}
                self._file.write(json.dumps(header, sort_keys=True).encode() + b"\n")
            else:
                os.truncate(self.path, self._length)
        return self._file

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise DestinationError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
        if not lines:
            return
        try:
            header = json.loads(lines[0])
            is_ours = header["format"] == FORMAT
            found = header["identity"]
        except (ValueError, KeyError, TypeError):
            is_ours, found = False, None
        if not is_ours:
            raise DestinationError(
                f"{str(path)!r} is damaged, or no run of this library: name another output, or remove it to begin anew."
            )
        other = [name for name in {**found, **self.identity} if found.get(name) != self.identity.get(name)]
        if other:
            name = min(other)
            raise DestinationError(
                f"{str(path)!r} belongs to a run with other settings ({name} was {shown(found.get(name))} and is "
                f"{shown(self.identity.get(name))}): name another output, or remove it to begin anew."
            )
        self.date = str(header.get("date", self.date))
        self._length = len(lines[0])
        for line in lines[1:]:
            try:
                if not line.endswith(b"\n"):
                    break
                key, value = json.loads(line)
            except (ValueError, TypeError):
                break  # what comes after a damaged line is asked again
            self._answers[str(key)] = value
            self._length += len(line)
