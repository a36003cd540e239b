"""How fast this machine's disk is read: a file of random bytes, by several threads, out of and in the system's cache."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..finder import sync
from ..memory.macos import forget_file

THREADS = (1, 2, 4, 8, 16)
# Read at once by each thread: about what an expert of gpt-oss-20b has in one of its two files' tensors.
PIECE_BYTES = 4 * 2**20
# A cold read faster than this share of a warm one came from the cache after all.
CLEARLY_SLOWER = 0.8


@dataclass(frozen=True)
class DiskRate:
    """Bytes a second with this number of threads: from the disk, and from the system's cache."""

    threads: int
    cold: float
    warm: float


def disk_rates(
    num_bytes: int,
    threads: Sequence[int] = THREADS,
    folder: Path | None = None,
    has_time: Callable[[], bool] | None = None,
) -> list[DiskRate]:
    """A rate for each number of threads, with a file in `folder` (the system's temporary one), as long as `has_time`.

    Raises OSError if the disk cannot be written or read, ValueError if it returns other bytes.
    """
    found: list[DiskRate] = []
    with random_file(num_bytes, folder) as (path, total):
        for count in threads:
            if found and has_time is not None and not has_time():
                break
            drop_from_cache(path)
            cold, warm = (_read(path, count, total) for _ in range(2))
            found.append(DiskRate(count, path.stat().st_size / cold, path.stat().st_size / warm))
    return found


def cold_rate(rates: Sequence[DiskRate]) -> float | None:
    """The fastest read from the disk; None if the reads seem to have come from the system's cache."""
    cold, warm = max(each.cold for each in rates), max(each.warm for each in rates)
    return cold if cold < CLEARLY_SLOWER * warm else None


@contextmanager
def random_file(num_bytes: int, folder: Path | None = None) -> Iterator[tuple[Path, int]]:
    """A file of `num_bytes` random bytes and their digest; deleted when the block ends.

    It has at most an eighth of the free space, but at least one piece.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="openelm_mlx-disk-") as place:
        pieces = max(1, min(num_bytes, shutil.disk_usage(place).free // 8) // PIECE_BYTES)
        random, path, total = np.random.Generator(np.random.SFC64(0)), Path(place) / "bytes", 0
        with path.open("wb") as stream:
            for _ in range(pieces):
                piece = random.integers(0, 2**64, PIECE_BYTES // 8, np.uint64)
                total ^= _digest(piece)
                stream.write(piece.data)
            sync(stream)
        yield path, total


def drop_from_cache(path: Path) -> None:
    """Drop a file from the system's file cache, if the system can."""
    if not hasattr(os, "posix_fadvise"):
        forget_file(path)
        return
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path, threads: int, expected: int) -> float:
    """Seconds of reading the whole file. Raises ValueError when its bytes are not those that were written."""
    pieces = path.stat().st_size // PIECE_BYTES
    buffers = [np.empty(PIECE_BYTES // 8, np.uint64) for _ in range(pieces)]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            done = list(pool.map(lambda i: os.preadv(descriptor, [buffers[i].data], i * PIECE_BYTES), range(pieces)))
            seconds = time.perf_counter() - started
    finally:
        os.close(descriptor)
    found = 0
    for piece in buffers:
        found ^= _digest(piece)
    if any(each != PIECE_BYTES for each in done) or found != expected:
        raise ValueError("the bytes read differ from those written")
    return seconds


def _digest(piece: np.ndarray) -> int:
    return int(np.bitwise_xor.reduce(piece))
