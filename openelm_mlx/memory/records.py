"""Bytes of a checkpoint's files straight into memory that is already there, by several threads at once.

A file that changes while a model uses it would mix two models: size, time of modification and inode are compared before
and after each read. Reads never map the file, and leave the system's file cache on.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError

NUM_THREADS = 8
# A record is read in pieces of about this size, so that several threads share one expert.
PIECE_BYTES = 4 * 2**20
# Less than this in all is read by the calling thread: handing it over would take longer.
INLINE_BYTES = 256 * 2**10
# More than this many pieces (rows of an embedding) are handed over several at a time.
MOST_TASKS = 256
# macOS refuses reads of 2 GiB and more in one call.
LARGEST_READ = 2**30


class Identity(NamedTuple):
    """What stays the same while a file is the same."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class Record(NamedTuple):
    """Bytes to read: all of `target` from byte `start` of `file`."""

    file: RecordFile
    start: int
    target: memoryview


class RecordFile:
    """One open file of a checkpoint, known by its identity.

    `read_into(fd, buffer, offset)` reads at most the buffer and gives the number of bytes, like `os.preadv`; tests put
    failing ones in its place.
    """

    def __init__(self, path: Path, read_into: Callable[[int, memoryview, int], int] | None = None) -> None:
        self.path = path
        self.read_into = read_into or default_reader()
        self._fd = self._open()
        self._is_suspect = False
        self.identity = Identity.of(os.fstat(self._fd))

    def prepare(self) -> None:
        """Open the file again if something was wrong with it: a disk may have come back. No read may be under way."""
        if self._is_suspect:
            fd = self._open()
            self.close()
            self._fd, self._is_suspect = fd, False

    def read(self, target: memoryview, start: int) -> None:
        """Fill `target` from byte `start`; a short read goes on, an early end is an error. Raises CheckpointError.

        Any number of threads may be in here; the descriptor stays open until the next `prepare`.
        """
        try:
            self._check()
            rest = target
            while rest.nbytes:
                count = self.read_into(self._fd, rest[:LARGEST_READ], start)
                if count <= 0:
                    self._check()  # says more when the file was cut
                    raise CheckpointError(
                        f"{self.path} ends at byte {start:,}, {rest.nbytes:,} bytes before a tensor of it does: download "
                        "or copy it again."
                    )
                rest, start = rest[count:], start + count
            self._check()
        except OSError as error:
            self._is_suspect = True
            raise self._unreadable(error) from error
        except CheckpointError:
            self._is_suspect = True
            raise

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # A disk that is gone may refuse even this, and nothing is lost by it.
            with contextlib.suppress(OSError):
                os.close(fd)

    def _check(self) -> None:
        found = Identity.of(os.fstat(self._fd))
        if found != self.identity:
            raise CheckpointError(
                f"{self.path} has changed since the model was loaded ({found.size:,} bytes now, {self.identity.size:,} "
                "then): put the file back as it was, or load the model again."
            )

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be read ({error.strerror or error}), and the model needs its file while it runs: check "
            "the disk, then ask again."
        )


class RecordReader:
    """A pool of threads that reads records, all pieces of a call at once."""

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="experts")

    def read(self, records: Sequence[Record]) -> None:
        """Fill every record, or raise the first error once no thread is writing any more."""
        for file in {record.file for record in records}:
            file.prepare()
        if sum(record.target.nbytes for record in records) <= INLINE_BYTES:
            _read_all(records)
            return
        pieces = [
            Record(record.file, record.start + start, record.target[start : start + PIECE_BYTES])
            for record in records
            for start in range(0, record.target.nbytes, PIECE_BYTES)
        ]
        share = -(-len(pieces) // MOST_TASKS)
        finish([self._pool.submit(_read_all, pieces[start : start + share]) for start in range(0, len(pieces), share)])

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _read_all(records: Sequence[Record]) -> None:
    for record in records:
        record.file.read(record.target, record.start)


def finish(futures: Sequence[Future[Any]]) -> None:
    """Wait for all of them, also when one fails or the user interrupts: a late one would write into a slot given away."""
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def default_reader() -> Callable[[int, memoryview, int], int]:
    """`os.preadv` into one buffer, or where the system has none a plain read."""
    return preadv_into if hasattr(os, "preadv") else PlainReader()


def preadv_into(fd: int, buffer: memoryview, offset: int) -> int:
    """One `preadv`: at most the whole buffer from `offset`; the descriptor's own position is not used."""
    return os.preadv(fd, [buffer], offset)


class PlainReader:
    """Reads without `preadv`: the file's one position is moved and used under a lock, so one thread reads at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, fd: int, buffer: memoryview, offset: int) -> int:
        with self._lock, io.FileIO(fd, "rb", closefd=False) as stream:
            stream.seek(offset)
            return stream.readinto(buffer) or 0
