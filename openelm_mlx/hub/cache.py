"""The cache that all Hugging Face tools share (huggingface.co/docs/hub/local-cache), and a repository's place in it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..checks import size
from ..errors import DestinationError, HubError, UserError
from ..files import hears_the_disk, read_json, read_text, reason_of
from ..finder import DISK_IS_GONE, is_macos_own
from .names import COMMIT, LIBRARY, Listing, RepoFile, check_revision, sound_files

# Largest listing of a repository: 25 MB are 100,000 files.
LARGEST_LISTING = 25_000_000


@hears_the_disk(HubError)
def cached_file(repo: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a repository if it is in the Hugging Face cache; the network is not used."""
    cache = RepoCache.of(repo)
    commit = cache.commit(revision or "main")
    file = None if commit is None else cache.pointer(commit, name)
    return file if file is not None and file.is_file() else None


@dataclass(frozen=True)
class RepoCache:
    """One repository in the cache of Hugging Face's tools (huggingface.co/docs/hub/local-cache)."""

    root: Path
    folder: Path

    @staticmethod
    def of(repo: str) -> RepoCache:
        from huggingface_hub import constants

        root = Path(constants.HF_HUB_CACHE)
        return RepoCache(root, root / f"models--{repo.replace('/', '--')}")

    def blob(self, etag: str) -> Path:
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        # Not huggingface_hub's name, which some releases fill out of order. `hf cache prune` knows the ending.
        return self.folder / "blobs" / f"{etag}.{LIBRARY}.incomplete"

    def lock(self, etag: str) -> Path:
        return self.root / ".locks" / self.folder.name / f"{etag}.lock"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def pointer(self, commit: str, name: str) -> Path:
        return self.snapshot(commit) / name

    def commit(self, revision: str) -> str | None:
        """The commit that a revision pointed to when it was last downloaded."""
        if COMMIT.fullmatch(revision):
            return revision
        with suppress(UserError):
            check_revision(revision)
            if not _is_spelled(self.folder / "refs", revision):
                return None
            text = read_text(self.folder / "refs" / revision, HubError, 100).strip()
            return text if COMMIT.fullmatch(text) else None
        return None

    def _memo(self, commit: str) -> Path:
        return self.folder / LIBRARY / f"{commit}.json"

    def remember(self, revision: str, listing: Listing) -> None:
        """Note a finished download, so that it is found without a network. A read-only cache is left as it is."""
        memo = self._memo(listing.commit)
        with suppress(OSError):
            if not memo.exists():
                _write(memo, json.dumps([[file.name, file.size, file.etag] for file in listing.files]))
            if self.commit(revision) != listing.commit:
                if not _is_spelled(self.folder / "refs", revision):  # the file of another revision, in other case
                    (self.folder / "refs" / revision).unlink(missing_ok=True)
                _write(self.folder / "refs" / revision, listing.commit)

    def recall(self, repo: str, revision: str, refusal: HubError) -> Listing | None:
        """The listing of a cached copy: the whole one if it was noted, else of the files that are here."""
        commit = self.commit(revision)
        if commit is None or not self.snapshot(commit).is_dir():
            return None
        with suppress(ValueError, TypeError):
            noted = read_json(self._memo(commit), HubError, LARGEST_LISTING)
            return Listing(repo, commit, sound_files((name, nbytes, etag) for name, nbytes, etag in noted), refusal)
        snapshot = self.snapshot(commit)
        here = sorted(path for path in snapshot.rglob("*") if path.is_file() and not is_macos_own(path.name))
        files = tuple(RepoFile(path.relative_to(snapshot).as_posix(), path.stat().st_size) for path in here)
        return Listing(repo, commit, files, refusal, is_whole=False)


def _is_spelled(folder: Path, name: str) -> bool:
    """Whether a folder has a file of exactly this name: a volume may ignore case, but v1 and V1 are two revisions."""
    for part in name.split("/"):
        with suppress(OSError):
            if unicodedata.normalize("NFC", part) not in {
                unicodedata.normalize("NFC", each) for each in os.listdir(folder)
            }:
                return False
        folder = folder / part
    return True


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)  # other processes see the old text or the new one


def has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


def bytes_to_fetch(cache: RepoCache, files: list[RepoFile]) -> int:
    needed = 0
    for etag, nbytes in {file.etag: file.size for file in files}.items():
        if not has_size(cache.blob(etag), nbytes):
            needed += nbytes - min(nbytes, size_of(cache.partial(etag)))
    return needed


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_free_space(repo: str, cache: RepoCache, files: list[RepoFile], free: int | None) -> None:
    needed = bytes_to_fetch(cache, files)
    if free is None:
        existing = next(folder for folder in (cache.root, *cache.root.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
    if needed > free:
        raise DestinationError(
            f"{repo} needs {size(needed)} more on the disk of {cache.root} and {size(free)} are free: make "
            f"room for {size(needed - free)}, or set HF_HOME to a folder on a larger disk."
        )


def disk_error(error: OSError, repo: str, cache: RepoCache, files: list[RepoFile]) -> DestinationError:
    elsewhere = "set HF_HOME to a folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DestinationError(
            f"The disk of {cache.root} is full and {repo} needs {size(bytes_to_fetch(cache, files))} more: make "
            f"room and run this again, it resumes where it stopped, or {elsewhere} on a larger disk."
        )
    where = error.filename or cache.root
    if error.errno in DISK_IS_GONE:
        reason = reason_of(error)
        return DestinationError(
            f"{where} cannot be used any more for {repo} ({reason}): connect its disk again and run this again, it resumes "
            f"where it stopped, or {elsewhere} on another disk."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DestinationError(f"{where} cannot be written: make it writable for you, or {elsewhere} of your own.")
    return DestinationError(f"{where} cannot be used for {repo} ({reason_of(error)}): check the disk, or {elsewhere}.")
