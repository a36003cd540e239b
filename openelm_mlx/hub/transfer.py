"""Downloading a repository's files, or a range of one, and resuming interrupted downloads.

Downloads are written here because huggingface_hub deletes a partial file after an error
(huggingface/huggingface_hub#4196), and OpenAI's original gpt-oss-20b is one file of 13.8 GB. They use the cache that all
Hugging Face tools share.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import HubError
from ..files import hears_the_disk, open_regular
from .cache import RepoCache, cached_file, check_free_space, disk_error, has_size, size_of
from .failures import explained
from .listing import choose_files, incomplete, look_up
from .names import Listing, Progress, RepoFile, check_repo_name, check_revision
from .requests import address_of, read_bytes_of

_CONNECTIONS = 4  # files at a time; more hardly use a home connection better, and leave more partial files on a break
_BLOCK_BYTES = 1 << 20
_REPORT_SECONDS = 0.1


@hears_the_disk(HubError)
def download(
    repo: str,
    choose: Callable[[list[RepoFile]], list[str]],
    revision: str | None = None,
    progress: Progress | None = None,
    local_free_bytes: int | None = None,
) -> Path:
    """Download the files that `choose` names into the Hugging Face cache; return the folder of that copy.

    Files in the cache are not downloaded again, and a partial file is resumed from its last byte. Each file is compared with
    the checksum from the Hub's listing. Without a network, a cached copy that has all of the files is used.

    progress: called in this thread, about ten times a second, with (bytes so far, total bytes) of the chosen files; never
    when nothing is missing.
    local_free_bytes: free bytes to assume instead of those that the cache's disk reports.
    Raises HubError, and DestinationError when the disk is too small or the cache cannot be written.
    """
    listing = look_up(repo, revision)
    cache = RepoCache.of(repo)
    wanted = choose_files(listing, choose, cache)
    missing = [file for file in wanted if not has_size(cache.pointer(listing.commit, file.name), file.size)]
    if missing and listing.refusal:
        raise incomplete(listing, cache, [file.name for file in missing])
    if missing:
        try:
            check_free_space(repo, cache, missing, local_free_bytes)
            _fetch(listing, cache, missing, sum(file.size for file in wanted), progress)
        except OSError as error:
            raise disk_error(error, repo, cache, missing) from error
    if not listing.refusal:
        cache.remember(revision or "main", listing)
    return cache.snapshot(listing.commit)


@hears_the_disk(HubError)
def read_range(repo: str, name: str, start: int, length: int, revision: str | None = None) -> bytes:
    """Bytes [start, start + length) of one file of a repository, without downloading the rest; fewer where it ends.

    Every call is one or two requests, so read a whole header at once. When the Hub cannot be reached, the bytes come from a
    cached copy. Raises HubError.
    """
    check_repo_name(repo)
    check_revision(revision)
    try:
        with explained(repo, revision, name):
            url = address_of(repo, revision or "main", name)
            return b"".join(read_bytes_of(url, start, start + length, None, threading.Event()))
    except HubError:
        cached = cached_file(repo, name, revision)
        if cached is None:
            raise
        with open_regular(cached, HubError) as file:
            file.seek(start)
            return file.read(length)


def _fetch(
    listing: Listing,
    cache: RepoCache,
    files: list[RepoFile],
    total: int,
    progress: Progress | None,
) -> None:
    """Download files into the cache, several at a time, and report progress from this thread."""
    contents = {file.etag: file for file in files}  # the same content under two names is downloaded once
    arrived = {etag: size_of(cache.partial(etag)) for etag in contents}  # each worker writes its own entry
    settled = total - sum(file.size for file in contents.values())
    stop = threading.Event()
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        pending = {
            pool.submit(_fetch_one, listing, cache, file, arrived, stop)
            for file in sorted(contents.values(), key=lambda file: file.size)
        }
        try:
            while pending:
                finished, pending = wait(pending, timeout=_REPORT_SECONDS, return_when=FIRST_COMPLETED)
                for task in finished:
                    task.result()
                if progress is not None:
                    progress(settled + sum(arrived.values()), total)
        finally:
            stop.set()  # after an error or Ctrl-C: the other workers stop, and are waited for
            for task in pending:
                task.cancel()
    for etag in contents:
        _point(cache.blob(etag), [cache.pointer(listing.commit, file.name) for file in files if file.etag == etag])


def _fetch_one(
    listing: Listing, cache: RepoCache, file: RepoFile, arrived: dict[str, int], stop: threading.Event
) -> None:
    """Download one file's bytes to its place among the blobs, resuming what an earlier call left."""
    blob, partial, lock = cache.blob(file.etag), cache.partial(file.etag), cache.lock(file.etag)
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, stop):
        if not stop.is_set() and not has_size(blob, file.size):
            _receive(listing, file, partial, arrived, stop)
            if not stop.is_set():
                os.replace(partial, blob)
    if not stop.is_set():
        arrived[file.etag] = file.size


@contextmanager
def _locked(path: Path, stop: threading.Event) -> Iterator[None]:
    """Hold huggingface_hub's lock for a blob, so that two programs do not download it at once; `stop` ends the wait."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    with ExitStack() as held:
        while not stop.is_set():
            with suppress(Timeout):
                held.enter_context(WeakFileLock(path, timeout=_REPORT_SECONDS))
                break
        yield


def _receive(listing: Listing, file: RepoFile, partial: Path, arrived: dict[str, int], stop: threading.Event) -> None:
    """Complete the partial file until it has the announced checksum, or keep what may be right and raise HubError.

    If the checksum is wrong, either the last response is wrong or what was there before. The last part is requested again,
    and only if the same bytes arrive a second time is the rest discarded.
    """
    if os.path.lexists(partial) and not partial.is_file():
        raise HubError(f"{partial} is not a file, but a partial download belongs there: remove it, and run this again.")
    with open(partial, "r+b" if partial.exists() else "w+b") as out:
        earlier: _Ending | None = None
        is_anew = False
        while (ending := _go_on(listing, file, out, arrived, stop)) is not None:
            if ending.start and earlier is None:
                earlier = ending
                out.truncate(ending.start)
            elif ending.start and ending != earlier:
                out.truncate(ending.start)
                raise HubError(
                    f"{file.name} of {listing.repo} ended differently each time it was downloaded: what was there before "
                    "is kept; try another network, and run this again."
                )
            elif ending.start != 0 and not is_anew:
                earlier, is_anew = None, True
                out.truncate(0)
            else:
                partial.unlink()
                raise HubError(
                    f"{file.name} of {listing.repo} did not arrive as the Hub announced it (its checksum is not "
                    f"{file.etag[:12]}…): run this again to download it again."
                )


@dataclass(frozen=True)
class _Ending:
    """Where in a file the last response began (None: no request was needed), and a checksum of its bytes."""

    start: int | None
    digest: bytes


def _go_on(
    listing: Listing, file: RepoFile, out: BinaryIO, arrived: dict[str, int], stop: threading.Event
) -> _Ending | None:
    """Append what a partial file lacks. None when the checksum is right, or `stop` was set; else how it ended."""
    checksum = _checksum(file)
    out.seek(0)
    while block := out.read(_BLOCK_BYTES):
        checksum.update(block)
        if stop.is_set():
            return None
    start, digest = None, hashlib.sha256()

    def begin(position: int) -> None:
        nonlocal start, digest
        start, digest = position, hashlib.sha256()

    with explained(listing.repo, listing.commit, file.name):
        url = address_of(listing.repo, listing.commit, file.name)
        for chunk in read_bytes_of(url, out.tell(), file.size, file, stop, begin):
            out.write(chunk)
            out.flush()  # bytes that were reported must survive if this process is killed
            checksum.update(chunk)
            digest.update(chunk)
            arrived[file.etag] = out.tell()
            if stop.is_set():
                return None
    if stop.is_set() or checksum.hexdigest() == file.etag:
        return None
    return _Ending(start, digest.digest())


def _checksum(file: RepoFile) -> hashlib._Hash:
    if len(file.etag) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size)  # git's name for a file's content


def _point(blob: Path, pointers: list[Path]) -> None:
    """Link the snapshot's paths to a blob; on a disk without symbolic links (exFAT) they become the file itself.

    Each link appears atomically: another download of the same files may be at this point too.
    """
    for pointer in pointers:
        pointer.parent.mkdir(parents=True, exist_ok=True)
        draft = pointer.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            try:
                os.symlink(os.path.relpath(blob, pointer.parent), draft)
            except OSError:
                if not blob.exists() and pointer.is_file():
                    continue  # another download has moved it here
                if pointer == pointers[-1]:
                    os.replace(blob, draft)
                else:
                    shutil.copyfile(blob, draft)
            os.replace(draft, pointer)
        except BaseException:
            with suppress(OSError):
                if draft.is_symlink() or blob.exists():
                    draft.unlink()
                else:
                    os.replace(draft, blob)  # it is the only copy
            raise
