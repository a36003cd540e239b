"""Writing a checkpoint: safetensors files in bounded memory, resumable, visible at the destination only when complete.

While it is written, everything is in a folder beside the destination:

    DESTINATION.partial/journal.jsonl   the plan's fingerprint, then each finished tensor with its checksum
    DESTINATION.partial/output/         the files; the names of weights end in .part until all of them are there

A header needs only names, types and shapes, so it is written first, and then one tensor after the other in the order of
the file. The last step renames `output` to the destination. To resume after an interruption (Ctrl-C, a crash, a power
cut), a writer with the same fingerprint reads the files back, compares them with the journal, and goes on after the last
intact tensor. After an error nothing is left.

The writer is given bytes: it knows the format, not the arrays.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import CheckpointError, DestinationError
from ..files import LARGEST_COPY, kind_of, open_regular, read_bytes, unreadable
from ..finder import is_empty, sync, sync_folder
from .destination import check_destination, check_free_space, destination_error, put_in_place
from .safetensors_plan import OutputFile, OutputTensor, index_of

_JOURNAL = "journal.jsonl"
_LOCK = "lock"
_OUTPUT = "output"
_UNFINISHED = ".part"  # no loader's pattern has this ending
_BLOCK_BYTES = 1 << 22
_LARGEST_JOURNAL = 1 << 26


class CheckpointWriter:
    """Writes the planned files beside `destination`, and renames them to it at the end.

    Use it as a context manager. After an error in the block nothing is left; after Ctrl-C the finished tensors stay, so that
    the next writer with the same `fingerprint` (of everything that the bytes depend on) can resume.

        with CheckpointWriter(destination, files, fingerprint) as writer:
            for tensor in writer.remaining:
                writer.write(tensor.name, pieces_of(tensor))   # in this order
            folder = writer.assemble({"config.json": b"..."})  # complete, but not yet at the destination
            writer.publish()

    Raises DestinationError when the destination exists or cannot be written, or its disk is too small or becomes full.
    """

    def __init__(self, destination: Path, files: Sequence[OutputFile], fingerprint: str) -> None:
        self.destination = Path(os.path.realpath(destination.expanduser()))
        self.partial = Path(f"{self.destination}.partial")
        self.checksums: dict[str, str] = {}
        self._files = tuple(files)
        self._fingerprint = fingerprint
        self._output = self.partial / _OUTPUT
        self._tensors = [(file, tensor) for file in self._files for tensor in file.tensors]
        self._position = 0
        self._stream: BinaryIO | None = None
        self._journal: BinaryIO | None = None
        self._lock: BinaryIO | None = None
        self._checksum = hashlib.sha256()

    def __enter__(self) -> CheckpointWriter:
        check_destination(self.destination)
        with self._explained():
            if not self.partial.exists():
                check_free_space(self.destination, self.nbytes)
            self._check_partial()
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            try:
                self._check_kinds()
            except Exception:
                self._close()  # what is there is not ours to remove
                raise
            try:
                self._resume()
                check_free_space(self.destination, self.nbytes - self._bytes_present())
            except Exception:
                if not self._position:
                    self._remove()
                self._close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Exception):
            self._remove()
        self._close()

    @property
    def nbytes(self) -> int:
        """Bytes of the planned files, headers included."""
        return sum(file.nbytes for file in self._files)

    @property
    def remaining(self) -> tuple[OutputTensor, ...]:
        """The tensors that are not written yet, in the order in which `write` wants them."""
        return tuple(tensor for _, tensor in self._tensors[self._position :])

    @property
    def num_finished(self) -> int:
        """How many tensors are written; when resuming, including those of the interrupted writer."""
        return self._position

    def write(self, name: str, pieces: Iterable[memoryview | bytes]) -> None:
        """Write the next tensor. Its bytes come in pieces, so that only one piece is in memory at a time."""
        file, tensor = self._tensors[self._position]
        assert name == tensor.name, f"{tensor.name} comes before {name}"
        with self._explained():
            stream = self._stream or self._begin(file)
        checksum, count = hashlib.sha256(), 0
        for piece in pieces:
            with self._explained():
                _append(stream, piece)
            checksum.update(piece)
            self._checksum.update(piece)
            count += len(piece)
        assert count == tensor.nbytes, f"{name} has {count:,} bytes instead of {tensor.nbytes:,}"
        with self._explained():
            stream.flush()  # to the system, so that the journal never knows of more than there is
            self._note({"tensor": name, "sha256": checksum.hexdigest()})
            self._position += 1
            if tensor is file.tensors[-1]:
                self._end(file)

    def assemble(self, others: Mapping[str, bytes | Path]) -> Path:
        """Put the other files (bytes, or files to copy) beside the finished weights; return the folder, now complete.

        config.json comes last: no loader accepts a folder without it.
        """
        assert not self.remaining
        with self._explained():
            if len(self._files) > 1:
                self._put("model.safetensors.index.json", index_of(self._files))
            for name in sorted(others, key=lambda name: (name == "config.json", name)):
                if name == "config.json":
                    for file in self._files:
                        os.replace(self._unfinished(file), self._output / file.name)
                    sync_folder(self._output)
                self._put(name, others[name])
            sync_folder(self._output)
        return self._output

    def publish(self) -> None:
        """Rename the assembled folder to the destination, so that it appears complete in one step."""
        with self._explained():
            put_in_place(self._output, self.destination)
        self._remove()

    # --- resuming ---

    def _resume(self) -> None:
        """Find the tensors that an interrupted writer finished; discard everything after the first damaged one."""
        known = self._journalled()
        if known is None:
            shutil.rmtree(self._output, ignore_errors=True)
        self._output.mkdir(exist_ok=True)
        self._take_apart()
        for file in self._files:
            if not self._resume_file(file, known or {}):
                break
        kept = [tensor.name for _, tensor in self._tensors[: self._position]]
        self._rewrite_journal({name: (known or {})[name] for name in kept})

    def _resume_file(self, file: OutputFile, known: Mapping[str, str]) -> bool:
        """Read one file back as far as the journal confirms it and cut off the rest; return whether it is complete."""
        path = self._unfinished(file)
        if not path.exists():
            return False
        with path.open("r+b") as stream:
            if stream.read(len(file.header)) != file.header:
                return False  # writing its first tensor starts the file again
            self._checksum = hashlib.sha256(file.header)
            for tensor in file.tensors:
                start, so_far = stream.tell(), self._checksum.copy()
                if _read_checksum(stream, tensor.nbytes, so_far) != known.get(tensor.name):
                    stream.truncate(start)
                    break
                self._checksum = so_far
                self._position += 1
            else:
                stream.truncate()
                sync(stream)
                self.checksums[file.name] = self._checksum.hexdigest()
                return True
        self._stream = path.open("ab")
        return False

    def _journalled(self) -> dict[str, str] | None:
        """Tensor -> checksum from the journal of an interrupted writer; None when that writer had another plan."""
        path = self.partial / _JOURNAL
        if not path.exists():
            return None
        entries = []
        for line in read_bytes(path, DestinationError, _LARGEST_JOURNAL).splitlines():
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError):  # a line cut by the interruption, or a block lost by the disk
                break
        if not entries or entries[0] != self._first_entry:
            return None
        found = {}
        for entry in entries[1:]:
            if not (isinstance(entry, dict) and {"tensor", "sha256"} <= entry.keys()):
                break
            found[str(entry["tensor"])] = str(entry["sha256"])
        return found

    def _take_apart(self) -> None:
        """Undo an interrupted `assemble`."""
        for path in [self._output / "config.json", *self._output.iterdir()]:
            if not path.name.endswith(_UNFINISHED) and path.name not in {file.name for file in self._files}:
                path.unlink(missing_ok=True)
        for file in self._files:
            if (self._output / file.name).exists():
                os.replace(self._output / file.name, self._unfinished(file))

    def _rewrite_journal(self, kept: Mapping[str, str]) -> None:
        path = self.partial / _JOURNAL
        draft = path.with_suffix(".new")
        entries = [self._first_entry, *({"tensor": name, "sha256": checksum} for name, checksum in kept.items())]
        draft.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        os.replace(draft, path)
        self._journal = path.open("ab")

    @property
    def _first_entry(self) -> dict[str, Any]:
        return {"openelm_mlx": "conversion", "format": 1, "fingerprint": self._fingerprint}

    # --- files ---

    def _begin(self, file: OutputFile) -> BinaryIO:
        self._stream = self._unfinished(file).open("wb")
        self._checksum = hashlib.sha256(file.header)
        _append(self._stream, file.header)
        return self._stream

    def _end(self, file: OutputFile) -> None:
        assert self._stream is not None
        sync(self._stream)
        self._stream.close()
        self._stream = None
        self.checksums[file.name] = self._checksum.hexdigest()

    def _put(self, name: str, content: bytes | Path) -> None:
        with (self._output / name).open("wb") as stream:
            for piece in _pieces(content):
                _append(stream, piece)
            sync(stream)

    def _unfinished(self, file: OutputFile) -> Path:
        return self._output / (file.name + _UNFINISHED)

    def _note(self, entry: Mapping[str, str]) -> None:
        assert self._journal is not None
        _append(self._journal, (json.dumps(entry) + "\n").encode())
        self._journal.flush()

    # --- the folder ---

    def _check_partial(self) -> None:
        if self.partial.exists() and not is_empty(self.partial) and not (self.partial / _LOCK).exists():
            raise DestinationError(
                f"{self.partial} is where the conversion would be written, and holds something else: move it away, or "
                "choose another destination."
            )

    def _check_kind(self, path: Path) -> None:
        """Raise DestinationError for what is not a file: opening a pipe would block, and a link leads elsewhere."""
        if not os.path.lexists(path):
            return
        kind = "a link" if path.is_symlink() else kind_of(path.stat())
        if kind is not None:
            raise DestinationError(
                f"{path} is {kind}, and an interrupted conversion has only files there: move {self.partial} away, or "
                "choose another destination."
            )

    def _check_kinds(self) -> None:
        """`_check_kind` of everything in the partial folder, which is locked."""
        inside = [*_listed(self.partial), *([] if self._output.is_symlink() else _listed(self._output))]
        for path in inside:
            if path != self._output or path.is_symlink() or not path.is_dir():
                self._check_kind(path)

    def _locked(self) -> BinaryIO:
        """Lock the partial folder for this process; the system releases the lock however the process ends."""
        path = self.partial / _LOCK
        self._check_kind(path)
        # If it has been replaced since, opening neither blocks nor follows a link.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.fdopen(os.open(path, flags, 0o666), "wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise DestinationError(
                f"Another conversion to {self.destination} is running: wait for it, or choose another destination."
            ) from error
        return lock

    def _bytes_present(self) -> int:
        return sum(path.stat().st_size for path in self._output.iterdir())

    def _remove(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self) -> None:
        for stream in (self._stream, self._journal, self._lock):
            if stream is not None:
                # Bytes left in the buffer by a full disk are lost; the journal does not list them.
                with suppress(OSError):
                    stream.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise errors of the disk as DestinationError."""
        try:
            yield
        except OSError as error:
            raise destination_error(error, self.destination) from error


def file_checksum(path: Path) -> str:
    """The SHA-256 of a written file, in hexadecimal; the Hub identifies large files by it. Raises DestinationError."""
    try:
        with path.open("rb") as stream:
            return _read_checksum(stream, sys.maxsize)
    except OSError as error:
        raise unreadable(path, error, DestinationError) from error


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _append(stream: BinaryIO, data: bytes | memoryview) -> None:
    stream.write(data)


def _pieces(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open_regular(content, CheckpointError) as source:
        if os.fstat(source.fileno()).st_size > LARGEST_COPY:
            raise CheckpointError(f"{content} is too large to belong to a model as it is: move it away.")
        try:
            while block := source.read(_BLOCK_BYTES):
                yield block
        except OSError as error:  # of the source, and not of the destination
            raise unreadable(content, error, CheckpointError) from error


def _read_checksum(stream: BinaryIO, nbytes: int, *whole: hashlib._Hash) -> str:
    """The checksum of the next `nbytes` of a stream (or of the rest of it); the checksums `whole` are updated too."""
    checksum = hashlib.sha256()
    while nbytes and (block := stream.read(min(nbytes, _BLOCK_BYTES))):
        for each in (checksum, *whole):
            each.update(block)
        nbytes -= len(block)
    return checksum.hexdigest()
