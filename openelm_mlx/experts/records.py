"""Bytes of a checkpoint's files straight into memory that is already there, by several threads at once.

A file that changes while a model uses it would mix two models: size, time of modification and inode are compared before
and after the reads of each call. Reads never map the file, and leave the system's file cache on.
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
# Less than this in all is read by the calling thread: handing it over would take longer.
INLINE_BYTES = 256 * 2**10
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


# Looks at bytes that have been read; raises CheckpointError where they cannot be right.
Check = Callable[[memoryview], None]
# What is left to do with bytes that have been read, for the thread that asked for them.
Delivery = Callable[[], None]


class Target(Protocol):
    """Where bytes are to go, `nbytes` of them."""

    @property
    def nbytes(self) -> int: ...

    def part(self, start: int, stop: int) -> Target:
        """Bytes start ... stop - 1 of it, to be filled by another thread."""

    def fill(self, read: Callable[[memoryview], None]) -> Delivery | None:
        """Have `read` put all bytes into a buffer, at most PIECE_BYTES or straight into their place. Any thread may."""


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
    """Have the target hold the bytes of an array, which has as many."""
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

    def check(self) -> None:
        """Raises CheckpointError when the file is not what it was when it was opened, or cannot be asked."""
        with self._suspecting():
            self._check()

    def read(self, target: memoryview, start: int) -> None:
        """Fill `target` from byte `start`; a short read goes on, an early end is an error. Raises CheckpointError.

        Whether the file is the same before and after is for the caller to `check`. Any number of threads may be in here; the
        descriptor stays open until the next `prepare`.
        """
        with self._suspecting():
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

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # A disk that is gone may refuse even this, and nothing is lost by it.
            with contextlib.suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        # Where nobody could close it: loading was broken off.
        if hasattr(self, "_fd"):
            self.close()

    @contextlib.contextmanager
    def _suspecting(self) -> Iterator[None]:
        """Whatever goes wrong is a CheckpointError, after which the file is opened again before it is read."""
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
                "then): put the file back as it was, or load the model again."
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
            "the disk, then ask again."
        )


class Buffers(Protocol):
    """What targets fill that bytes do not go into straight away (cuda_driver.py)."""

    def open(self) -> None:
        """All buffers are free again: nobody fills or sends one any more."""

    def stop(self) -> None:
        """Whoever waits for a buffer gets an error."""


class Reading:
    """Reads of one call: threads take pieces until none is left, and the thread that began them delivers what they read.

    An interruption (Ctrl-C) is raised in the thread that waits, after any call. So what is under way is counted by those that
    do it, and that thread uses nothing of Python's that an interruption can leave locked: plain locks and simple queues, no
    conditions and no executors.
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
        # Under the lock: pieces that are being read, what was read, what went wrong first. Something is put into `_changed`
        # after each piece.
        self._lock, self._changed = Lock(), SimpleQueue[None]()
        self._num_being_read = 0
        self._read: deque[Delivery] = deque()
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Begin to read; whoever calls this has to call `finish` or `abandon`, whatever happens.

        Little is read at once, by the calling thread. No other read of these files may be under way.
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
        """Wait for all of them. Raises CheckpointError for what went wrong, and when a file has changed meanwhile."""
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
        """Let no more of them begin, and wait for those that have begun: a late one would write into a slot given away.

        An interruption waits too, and is raised then.
        """
        interruption: BaseException | None = None
        while True:
            try:
                with self._lock:
                    self._pieces.clear()
                if self._buffers is not None and self._num_being_read:
                    self._buffers.stop()
                while self._num_being_read:
                    with contextlib.suppress(Empty):  # an interruption may have taken what was put in
                        self._changed.get(timeout=0.05)
                break
            except (KeyboardInterrupt, SystemExit) as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def _next(self) -> Delivery | None:
        """Something to deliver as soon as there is something; None when all has been read."""
        while True:
            with self._lock:
                if self._read:
                    return self._read.popleft()
                if not self._pieces and not self._num_being_read:
                    return None
            self._changed.get()

    def _work(self) -> None:
        """Read what is left; after an error nobody goes on."""
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


# What the reading threads do next; None ends them.
Jobs = SimpleQueue[Callable[[], None] | None]


class RecordReader:
    """Threads that read records, the pieces of a call side by side. buffers: what the targets fill, if anything."""

    def __init__(self, num_threads: int = NUM_THREADS, buffers: Buffers | None = None) -> None:
        self._num_threads, self._buffers, self._jobs = num_threads, buffers, Jobs()
        self._num_started = 0

    def reading(self, records: Sequence[Record]) -> Reading:
        """To fill every record, not begun."""
        while self._num_started < self._num_threads:
            Thread(target=_serve, args=(self._jobs,), name=f"experts-{self._num_started}", daemon=True).start()
            self._num_started += 1
        files = list(dict.fromkeys(record.file for record in records))
        return Reading(files, records, self._jobs, self._num_threads, self._buffers)

    def read(self, records: Sequence[Record]) -> None:
        """Fill every record, or raise the first error once no thread is writing any more."""
        reading = self.reading(records)
        try:
            reading.begin()
            reading.finish()
        except BaseException:
            reading.abandon()
            raise

    def close(self) -> None:
        """Let the threads end."""
        self._jobs.put(None)


def _serve(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # nothing is kept alive by a thread that waits
    jobs.put(None)  # for the next one


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
