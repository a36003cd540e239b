"""Reading parts of a checkpoint's files straight into allocated memory, by several threads at once.

A file that changes while a model uses it would mix two models, so size, modification time and inode are compared before
and after the reads of each call. Files are never memory-mapped, and the system's file cache stays on.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import CheckpointError
from ..files import open_regular

NUM_THREADS = 8
# A record is read in pieces of this size, so that several threads share one expert.
PIECE_BYTES = 2 * 2**20
# Less than this in total is read by the calling thread: handing it to others would take longer.
INLINE_BYTES = 256 * 2**10
# macOS refuses reads of 2 GiB and more in one call.
LARGEST_READ = 2**30


class Identity(NamedTuple):
    """Facts that stay the same as long as a file is unchanged."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


# Checks bytes that have been read; raises CheckpointError if they cannot be right.
Check = Callable[[memoryview], None]
# What the calling thread still has to do with bytes that have been read (copy them to a GPU).
Delivery = Callable[[], None]


class Target(Protocol):
    """A destination for `nbytes` bytes."""

    @property
    def nbytes(self) -> int: ...

    def part(self, start: int, stop: int) -> Target:
        """Bytes start ... stop - 1 of it, to be filled by another thread."""

    def fill(self, read: Callable[[memoryview], None]) -> Delivery | None:
        """Have `read` fill the destination directly, or a buffer of at most PIECE_BYTES. Any thread may call it."""


class HostTarget(NamedTuple):
    """Memory that the host can write: bytes are read straight into it."""

    memory: memoryview
    check: Check | None = None

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def part(self, start: int, stop: int) -> HostTarget:
        return HostTarget(self.memory[start:stop], self.check)

    def fill(self, read: Callable[[memoryview], None]) -> None:
        read(self.memory)
        if self.check is not None:
            self.check(self.memory)


def fill_with(target: Target, array: np.ndarray) -> None:
    """Fill the target with the bytes of an array of the same size."""
    data = np.ascontiguousarray(array).data.cast("B")

    def read(buffer: memoryview) -> None:
        buffer[:] = data

    deliver = target.fill(read)
    if deliver is not None:
        deliver()


class Record(NamedTuple):
    """Bytes to read: all of `target` from byte `start` of `file`."""

    file: RecordFile
    start: int
    target: Target

    def read(self) -> Delivery | None:
        """Fill the target; see `RecordFile.read`."""
        return self.target.fill(lambda buffer: self.file.read(buffer, self.start))


class RecordFile:
    """One open file of a checkpoint, known by its identity.

    `read_into(fd, buffer, offset)` reads at most the buffer and returns the number of bytes, like `os.preadv`; tests
    replace it with failing ones.
    """

    def __init__(self, path: Path, read_into: Callable[[int, memoryview, int], int] | None = None) -> None:
        self.path = path
        self.read_into = read_into or default_reader()
        self._fd = self._open()
        self._is_suspect = False
        self.identity = Identity.of(os.fstat(self._fd))

    def prepare(self) -> None:
        """Reopen the file after an error: a disk may have been reconnected. No read may be in progress."""
        if self._is_suspect:
            fd = self._open()
            self.close()
            self._fd, self._is_suspect = fd, False

    def check(self) -> None:
        """Raises CheckpointError when the file has changed since it was opened, or its status cannot be read."""
        with self._suspecting():
            self._check()

    def read(self, target: memoryview, start: int) -> None:
        """Fill `target` from byte `start`; a short read is continued, an early end is an error. Raises CheckpointError.

        The caller has to `check` before and after that the file is unchanged. Any number of threads may read at once; the
        descriptor stays open until the next `prepare`.
        """
        with self._suspecting():
            rest = target
            while rest.nbytes:
                count = self.read_into(self._fd, rest[:LARGEST_READ], start)
                if count <= 0:
                    self._check()  # raises a more specific error if the file was truncated
                    raise CheckpointError(
                        f"{self.path} ends at byte {start:,}, {rest.nbytes:,} bytes before a tensor of it does: download "
                        "or copy it again."
                    )
                rest, start = rest[count:], start + count

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # A disconnected disk may refuse even this; nothing is lost.
            with contextlib.suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        # In case loading was interrupted and the file was never closed.
        if hasattr(self, "_fd"):
            self.close()

    @contextlib.contextmanager
    def _suspecting(self) -> Iterator[None]:
        """Raise any error as CheckpointError, and have the file reopened before the next read."""
        try:
            yield
        except OSError as error:
            self._is_suspect = True
            raise self._unreadable(error) from error
        except CheckpointError:
            self._is_suspect = True
            raise

    def _check(self) -> None:
        found = Identity.of(os.fstat(self._fd))
        if found != self.identity:
            raise CheckpointError(
                f"{self.path} has changed since the model was loaded ({found.size:,} bytes now, {self.identity.size:,} "
                "then): restore the file, or load the model again."
            )

    def _open(self) -> int:
        try:
            with open_regular(self.path, CheckpointError) as stream:
                return os.dup(stream.fileno())
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be read ({error.strerror or error}), and the model needs its file while it runs: check "
            "the disk, then try again."
        )


class Buffers(Protocol):
    """Buffers for targets that cannot be filled directly (cuda_driver.py)."""

    def open(self) -> None:
        """Mark all buffers as free; none may be in use."""

    def stop(self) -> None:
        """Raise an error in every thread that waits for a buffer."""


class Reading:
    """The reads of one call: threads take pieces until none is left, and the calling thread delivers what they read.

    An interruption (Ctrl-C) is raised in the waiting thread, after any call. So the reading threads themselves count the
    reads in progress, and the waiting thread uses nothing that an interruption can leave locked: plain locks and simple
    queues, no conditions and no executors.
    """

    def __init__(
        self,
        files: Sequence[RecordFile] = (),
        records: Sequence[Record] = (),
        jobs: Jobs | None = None,
        num_threads: int = 0,
        buffers: Buffers | None = None,
    ) -> None:
        self._files, self._jobs, self._num_threads, self._buffers = files, jobs, num_threads, buffers
        self._pieces = deque(
            Record(record.file, record.start + start, record.target.part(start, start + PIECE_BYTES))
            for record in records
            for start in range(0, record.target.nbytes, PIECE_BYTES)
        )
        self._is_small = sum(record.target.nbytes for record in records) <= INLINE_BYTES
        # Under the lock: pieces being read, finished pieces, the first error. `_changed` gets an entry after each piece.
        self._lock, self._changed = Lock(), SimpleQueue[None]()
        self._num_being_read = 0
        self._read: deque[Delivery] = deque()
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Start reading. The caller has to call `finish` or `abandon`, whatever happens.

        A small amount is read at once, by the calling thread. No other read of these files may be in progress.
        """
        for file in self._files:
            file.prepare()
            file.check()
        if self._buffers is not None:
            self._buffers.open()
        if self._is_small or self._jobs is None:
            while self._pieces:
                deliver = self._pieces.popleft().read()
                if deliver is not None:
                    deliver()
            return
        for _ in range(min(self._num_threads, len(self._pieces))):
            self._jobs.put(self._work)

    def finish(self) -> None:
        """Wait for all reads. Raises CheckpointError for the first error, and when a file has changed meanwhile."""
        try:
            while (deliver := self._next()) is not None:
                deliver()
            if self._error is not None:
                raise self._error
            for file in self._files:
                file.check()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Start no more reads, and wait for those in progress: a late one would write into a slot of another expert.

        An interruption is raised after that.
        """
        interruption: BaseException | None = None
        while True:
            try:
                with self._lock:
                    self._pieces.clear()
                if self._buffers is not None and self._num_being_read:
                    self._buffers.stop()
                while self._num_being_read:
                    with contextlib.suppress(Empty):  # an interruption may have taken the entry
                        self._changed.get(timeout=0.05)
                break
            except (KeyboardInterrupt, SystemExit) as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def _next(self) -> Delivery | None:
        """The next finished piece, waiting for it if necessary; None when everything has been read."""
        while True:
            with self._lock:
                if self._read:
                    return self._read.popleft()
                if not self._pieces and not self._num_being_read:
                    return None
            self._changed.get()

    def _work(self) -> None:
        """Read pieces until none is left; after an error all threads stop."""
        while True:
            with self._lock:
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
                self._num_being_read += 1
            deliver, failure = None, None
            try:
                deliver = piece.read()
            except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                failure = error
            with self._lock:
                self._num_being_read -= 1
                if failure is not None:
                    self._pieces.clear()
                    self._error = self._error or failure
                elif deliver is not None:
                    self._read.append(deliver)
            self._changed.put(None)


# Jobs of the reading threads; None ends them.
Jobs = SimpleQueue[Callable[[], None] | None]


class RecordReader:
    """Threads that read records, the pieces of a call in parallel. buffers: of targets that cannot be filled directly."""

    def __init__(self, num_threads: int = NUM_THREADS, buffers: Buffers | None = None) -> None:
        self._num_threads, self._buffers, self._jobs = num_threads, buffers, Jobs()
        self._num_started = 0

    def reading(self, records: Sequence[Record]) -> Reading:
        """The reading that fills every record; not started yet."""
        while self._num_started < self._num_threads:
            Thread(target=_serve, args=(self._jobs,), name=f"experts-{self._num_started}", daemon=True).start()
            self._num_started += 1
        files = list(dict.fromkeys(record.file for record in records))
        return Reading(files, records, self._jobs, self._num_threads, self._buffers)

    def read(self, records: Sequence[Record]) -> None:
        """Fill every record, or raise the first error after all threads have stopped writing."""
        reading = self.reading(records)
        try:
            reading.begin()
            reading.finish()
        except BaseException:
            reading.abandon()
            raise

    def close(self) -> None:
        """End the threads."""
        self._jobs.put(None)


def _serve(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # a waiting thread keeps nothing alive
    jobs.put(None)  # ends the next thread


def default_reader() -> Callable[[int, memoryview, int], int]:
    """`os.preadv` into one buffer, or a plain read if the system lacks it."""
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
