"""Repositories on the Hugging Face Hub: what they hold, bringing the files that are wanted, uploading a folder.

Listings, logins and uploads are huggingface_hub's. The transfer of a download is written here: huggingface_hub deletes a
file that broke off (huggingface/huggingface_hub#4196), and OpenAI's original gpt-oss-20b is one file of 13.8 GB. It
fills the cache that all Hugging Face tools share (huggingface.co/docs/hub/local-cache), and uses what others put there.
"""

from __future__ import annotations

import email.utils
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from openelm_mlx.errors import CheckpointError, DestinationError, HubError, UserError
from openelm_mlx.files import hears_the_disk, one_line, open_regular, parse_json, read_json, read_text, shown
from openelm_mlx.finder import DISK_IS_GONE, MACOS_PATTERNS, is_empty, is_macos_own

from .hub_names import RepoFile, check_revision, is_repo_name, sound_files

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_LIBRARY = "openelm_mlx"
_COMMIT = re.compile(r"[0-9a-f]{40}")

_CONNECTIONS = 4  # files at a time; more of them hardly fill a home line better, and tear more files on a break
_BLOCK_BYTES = 1 << 20
_REQUEST_BYTES = 8 << 30  # the Hub's delivery network sends at most 50 GB in one answer
_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # after failures in a row; any byte that arrives begins anew
_REPORT_SECONDS = 0.1
# Nobody waits longer than that for a Hub that says when it will answer again.
_LONGEST_WAIT_SECONDS = 120.0
# What the Hub says of a repository: 25 MB are 100,000 files.
_LARGEST_LISTING = 25_000_000
_LISTING_SECONDS = 120.0
_LISTING_WAIT_SECONDS = 30.0


@hears_the_disk(HubError)
def list_files(repo: str, revision: str | None = None) -> list[RepoFile]:
    """The files of a repository with their sizes, in one request; of its cached copy when the Hub cannot be asked.

    `revision` is a branch, a tag or a commit; None is the main branch. Raises HubError.
    """
    return list(_list(repo, revision).files)


@hears_the_disk(HubError)
def download(
    repo: str,
    choose: Callable[[list[RepoFile]], list[str]],
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    local_free_bytes: int | None = None,
) -> Path:
    """Bring the files that `choose` names into the Hugging Face cache; return the folder of that copy.

    What is in the cache already does not travel again, and a file that broke off goes on from its last byte. Each file
    is compared with the checksum that the Hub announced. Without a network, a cached copy that has all of the files
    will do.

    progress: called in this thread, about ten times a second, with the bytes that are here and those of all the chosen
        files; never when nothing is missing.
    local_free_bytes: the free bytes to reckon with instead of those that the cache's disk reports.
    Raises HubError, and DestinationError when the disk is too small or the cache cannot be written.
    """
    listing = _list(repo, revision)
    cache = _RepoCache.of(repo)
    wanted = _choose(listing, choose, cache)
    missing = [file for file in wanted if not _has_size(cache.pointer(listing.commit, file.name), file.size)]
    if missing and listing.refusal:
        raise _incomplete(listing, cache, [file.name for file in missing])
    if missing:
        try:
            _check_free_space(repo, cache, missing, local_free_bytes)
            _fetch(listing, cache, missing, sum(file.size for file in wanted), progress)
        except OSError as error:
            raise _disk_error(error, repo, cache, missing) from error
    if not listing.refusal:
        cache.remember(revision or "main", listing)
    return cache.snapshot(listing.commit)


@hears_the_disk(HubError)
def read_range(repo: str, name: str, start: int, length: int, revision: str | None = None) -> bytes:
    """Bytes [start, start + length) of one file of a repository, without downloading the rest; fewer where it ends.

    Every call is one or two requests, so ask for a header and some more at once. When the Hub cannot be asked, the
    bytes come from a cached copy. Raises HubError.
    """
    _check_repo_name(repo)
    check_revision(revision)
    try:
        with _explained(repo, revision, name):
            url = _url(repo, revision or "main", name)
            return b"".join(_read(url, start, start + length, None, threading.Event()))
    except HubError:
        cached = cached_file(repo, name, revision)
        if cached is None:
            raise
        with open_regular(cached, HubError) as file:
            file.seek(start)
            return file.read(length)


@hears_the_disk(HubError)
def cached_file(repo: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a repository if the Hugging Face cache holds it; the network is not asked."""
    cache = _RepoCache.of(repo)
    commit = cache.commit(revision or "main")
    file = None if commit is None else cache.pointer(commit, name)
    return file if file is not None and file.is_file() else None


@hears_the_disk(CheckpointError)
def upload(
    folder: str | os.PathLike[str],
    repo: str,
    private: bool = False,
    message: str = "Upload a checkpoint written by openelm_mlx",
    show_progress: bool = False,
) -> str:
    """Upload every file of a folder to a repository, which is created when it does not exist; return its address.

    Large files that an earlier, broken upload delivered are not sent again. `show_progress` shows huggingface_hub's
    bars on stderr. Raises CheckpointError when there is no such folder, and HubError when the upload fails.
    """
    from huggingface_hub import HfApi, constants

    folder = Path(folder)
    _check_repo_name(repo)
    if not folder.is_dir() or is_empty(folder):
        raise CheckpointError(f"{folder} is not a folder with files in it: name the folder that is to be uploaded.")
    api = HfApi(endpoint=constants.ENDPOINT, library_name=_LIBRARY)
    try:
        with _progress_bars(show_progress), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the model card's metadata, in several lines
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise HubError(
                    f"{repo} exists and is public: choose another name for a private upload of {folder}, or make it "
                    f"private first at {constants.ENDPOINT}/{repo}/settings."
                )
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=MACOS_PATTERNS)
    except UserError:
        raise
    except Exception as error:  # huggingface_hub and its Rust part raise classes of many kinds, RuntimeError among them
        again = f"hf upload {repo} {shlex.quote(str(folder))}{' --private' if private else ''}"
        raise HubError(
            f"The upload to {repo} failed ({_upload_reason(error)}): the files in {folder} are as they were, "
            f"and `{again}` tries again."
        ) from error
    return f"{constants.ENDPOINT}/{repo}"


def _check_repo_name(repo: str) -> None:
    if not isinstance(repo, str) or not is_repo_name(repo):
        raise HubError(
            f"{shown(repo)} is not the name of a Hub repository: write OWNER/NAME, as in openai/gpt-oss-20b."
        )


# What a repository holds: asked of the Hub, or remembered in the cache.


@dataclass(frozen=True)
class _Listing:
    """The files of a repository at one commit."""

    repo: str
    commit: str
    files: tuple[RepoFile, ...]
    refusal: HubError | None = None  # why the Hub gave no listing, when this one comes from the cache
    is_whole: bool = True  # False: only the files that happen to be cached are known


def _list(repo: str, revision: str | None) -> _Listing:
    _check_repo_name(repo)
    check_revision(revision)
    try:
        return _ask_hub(repo, revision)
    except HubError as refusal:
        cached = _RepoCache.of(repo).recall(repo, revision or "main", refusal)
        if cached is None:
            raise
        return cached


def _ask_hub(repo: str, revision: str | None) -> _Listing:
    from huggingface_hub import constants

    with _explained(repo, revision):
        text = _listing_text(repo, revision)
    try:
        info = parse_json(text, "it", HubError)
        entries = []
        for each in info["siblings"]:
            large = each.get("lfs")
            entries.append((each["rfilename"], each["size"], large["sha256"] if large else each["blobId"]))
        if not isinstance(info["sha"], str) or not _COMMIT.fullmatch(info["sha"]):
            raise ValueError("it has no commit")
        return _Listing(repo, info["sha"], sound_files(entries))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or not with the Hub's fields
        raise HubError(
            f"{constants.ENDPOINT} does not answer like the Hugging Face Hub about {repo}: check HF_ENDPOINT, "
            "and whether this network wants a login in the browser first."
        ) from error


def _listing_text(repo: str, revision: str | None) -> bytes:
    """What the Hub says of a repository, asked again once where it says when."""
    from huggingface_hub import constants

    path = f"/api/models/{repo}" if revision is None else f"/api/models/{repo}/revision/{_quoted(revision)}"
    for is_last in (False, True):
        try:
            with _requested(f"{constants.ENDPOINT}{path}?blobs=true", constants.HF_HUB_ETAG_TIMEOUT) as response:
                return _bounded(response, _LARGEST_LISTING, _LISTING_SECONDS)
        except _network_error() as error:
            seconds = _retry_after(error)
            if is_last or seconds is None or seconds > _LISTING_WAIT_SECONDS or not _may_pass(error):
                raise
            time.sleep(seconds)
    raise AssertionError


def _choose(listing: _Listing, choose: Callable[[list[RepoFile]], list[str]], cache: _RepoCache) -> list[RepoFile]:
    known = {file.name: file for file in listing.files}
    try:
        names = list(dict.fromkeys(choose(list(listing.files))))
    except UserError as error:
        if listing.is_whole:
            raise
        raise _incomplete(listing, cache, []) from error
    unknown = [name for name in names if name not in known]
    if not listing.is_whole:
        unknown += [shard for name in names for shard in _indexed_shards(listing, cache, name) if shard not in known]
    if unknown and listing.is_whole:
        raise HubError(f"{listing.repo} has no file {unknown[0]!r}: its files are listed at {_page(listing.repo)}.")
    if unknown:
        raise _incomplete(listing, cache, unknown)
    return [known[name] for name in names]


def _indexed_shards(listing: _Listing, cache: _RepoCache, name: str) -> list[str]:
    """The files that a cached safetensors index names: a copy without one of them is not complete."""
    if not name.endswith(".index.json"):
        return []
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        shards = dict.fromkeys(read_json(cache.pointer(listing.commit, name), HubError)["weight_map"].values())
        return [str(PurePosixPath(name).parent / shard) for shard in shards]
    return []  # a damaged index is for the reader of the checkpoint to explain


def _incomplete(listing: _Listing, cache: _RepoCache, names: list[str]) -> HubError:
    lacks = f"lacks {names[0]!r}" if names else "is not complete"
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return HubError(f"{listing.refusal} The copy of {listing.repo} in {cache.root} {lacks}{more}.")


# The cache.


@dataclass(frozen=True)
class _RepoCache:
    """Where one repository lies in the cache of Hugging Face's tools (huggingface.co/docs/hub/local-cache)."""

    root: Path
    folder: Path

    @staticmethod
    def of(repo: str) -> _RepoCache:
        from huggingface_hub import constants

        root = Path(constants.HF_HUB_CACHE)
        return _RepoCache(root, root / f"models--{repo.replace('/', '--')}")

    def blob(self, etag: str) -> Path:
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        # Not huggingface_hub's name, which some releases fill out of order. `hf cache prune` knows the ending.
        return self.folder / "blobs" / f"{etag}.{_LIBRARY}.incomplete"

    def lock(self, etag: str) -> Path:
        return self.root / ".locks" / self.folder.name / f"{etag}.lock"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def pointer(self, commit: str, name: str) -> Path:
        return self.snapshot(commit) / name

    def commit(self, revision: str) -> str | None:
        """The commit that a revision stood for when it was last downloaded."""
        if _COMMIT.fullmatch(revision):
            return revision
        with suppress(UserError):
            check_revision(revision)
            if not _is_spelled(self.folder / "refs", revision):
                return None
            text = read_text(self.folder / "refs" / revision, HubError, 100).strip()
            return text if _COMMIT.fullmatch(text) else None
        return None

    def _memo(self, commit: str) -> Path:
        return self.folder / _LIBRARY / f"{commit}.json"

    def remember(self, revision: str, listing: _Listing) -> None:
        """Note a finished download, so that it is found without a network; a cache that is read-only stays as it is."""
        memo = self._memo(listing.commit)
        with suppress(OSError):
            if not memo.exists():
                _write(memo, json.dumps([[file.name, file.size, file.etag] for file in listing.files]))
            if self.commit(revision) != listing.commit:
                if not _is_spelled(self.folder / "refs", revision):  # another revision's, in other letters
                    (self.folder / "refs" / revision).unlink(missing_ok=True)
                _write(self.folder / "refs" / revision, listing.commit)

    def recall(self, repo: str, revision: str, refusal: HubError) -> _Listing | None:
        """The listing of a cached copy: the whole one if it was noted, else of the files that are here."""
        commit = self.commit(revision)
        if commit is None or not self.snapshot(commit).is_dir():
            return None
        with suppress(ValueError, TypeError):
            noted = read_json(self._memo(commit), HubError, _LARGEST_LISTING)
            return _Listing(repo, commit, sound_files((name, size, etag) for name, size, etag in noted), refusal)
        snapshot = self.snapshot(commit)
        here = sorted(path for path in snapshot.rglob("*") if path.is_file() and not is_macos_own(path.name))
        files = tuple(RepoFile(path.relative_to(snapshot).as_posix(), path.stat().st_size) for path in here)
        return _Listing(repo, commit, files, refusal, is_whole=False)


def _is_spelled(folder: Path, name: str) -> bool:
    """Whether a file is called so in a folder, in these letters: a volume may take v1 for V1, and they are two revisions."""
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


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _bytes_to_fetch(cache: _RepoCache, files: list[RepoFile]) -> int:
    needed = 0
    for etag, size in {file.etag: file.size for file in files}.items():
        if not _has_size(cache.blob(etag), size):
            needed += size - min(size, _size_of(cache.partial(etag)))
    return needed


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_free_space(repo: str, cache: _RepoCache, files: list[RepoFile], free: int | None) -> None:
    needed = _bytes_to_fetch(cache, files)
    if free is None:
        existing = next(folder for folder in (cache.root, *cache.root.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
    if needed > free:
        raise DestinationError(
            f"{repo} needs {_in_words(needed)} more on the disk of {cache.root} and {_in_words(free)} are free: make "
            f"room for {_in_words(needed - free)}, or set HF_HOME to a folder on a larger disk."
        )


def _in_words(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


# The transfer.


def _fetch(
    listing: _Listing,
    cache: _RepoCache,
    files: list[RepoFile],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Bring files to the cache, several at a time, and report from this thread how far they are."""
    contents = {file.etag: file for file in files}  # the same bytes under two names travel once
    arrived = {etag: _size_of(cache.partial(etag)) for etag in contents}  # each worker writes its own entry
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
            stop.set()  # after an error or Ctrl-C: the others put down what they hold, and are waited for
            for task in pending:
                task.cancel()
    for etag in contents:
        _point(cache.blob(etag), [cache.pointer(listing.commit, file.name) for file in files if file.etag == etag])


def _fetch_one(
    listing: _Listing, cache: _RepoCache, file: RepoFile, arrived: dict[str, int], stop: threading.Event
) -> None:
    """Bring one file's bytes to its place among the blobs, going on with what an earlier call left."""
    blob, partial, lock = cache.blob(file.etag), cache.partial(file.etag), cache.lock(file.etag)
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, stop):
        if not stop.is_set() and not _has_size(blob, file.size):
            _receive(listing, file, partial, arrived, stop)
            if not stop.is_set():
                os.replace(partial, blob)
    if not stop.is_set():
        arrived[file.etag] = file.size


@contextmanager
def _locked(path: Path, stop: threading.Event) -> Iterator[None]:
    """Hold huggingface_hub's lock for a blob, so that two programs do not fetch it at once; `stop` ends the waiting."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    with ExitStack() as held:
        while not stop.is_set():
            with suppress(Timeout):
                held.enter_context(WeakFileLock(path, timeout=_REPORT_SECONDS))
                break
        yield


def _receive(listing: _Listing, file: RepoFile, partial: Path, arrived: dict[str, int], stop: threading.Event) -> None:
    """Fill the partial file up to the content that the Hub announced, or keep what may be right of it and raise HubError.

    Where the whole is wrong, one of two parts is: what the last answer brought, or what was there before it. The last
    answer is asked for again, and only if it comes the same a second time is the rest given up.
    """
    if os.path.lexists(partial) and not partial.is_file():
        raise HubError(f"{partial} is no file, and a download is kept there: remove it, and run this again.")
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
                    f"{file.name} of {listing.repo} came with another end each time: what was there before "
                    "is kept; try another network, and run this again."
                )
            elif ending.start != 0 and not is_anew:
                earlier, is_anew = None, True
                out.truncate(0)
            else:
                partial.unlink()
                raise HubError(
                    f"{file.name} of {listing.repo} did not arrive as the Hub announced it (its checksum is not "
                    f"{file.etag[:12]}…): run this again to fetch it anew."
                )


@dataclass(frozen=True)
class _Ending:
    """Where in a file the last answer began (None: nothing had to be asked for), and what it held."""

    start: int | None
    digest: bytes


def _go_on(
    listing: _Listing, file: RepoFile, out: BinaryIO, arrived: dict[str, int], stop: threading.Event
) -> _Ending | None:
    """Append what a partial file lacks. None when the whole is right, or `stop` was set; else how it ended."""
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

    with _explained(listing.repo, listing.commit, file.name):
        url = _url(listing.repo, listing.commit, file.name)
        for chunk in _read(url, out.tell(), file.size, file, stop, begin):
            out.write(chunk)
            out.flush()  # what is counted as arrived is there even if this process is killed
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
    """Make the snapshot's paths show a blob; on a disk without symbolic links (exFAT) they become the file itself.

    Each from one moment to the next: another download of the same files may be at this point too.
    """
    for pointer in pointers:
        pointer.parent.mkdir(parents=True, exist_ok=True)
        draft = pointer.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            try:
                os.symlink(os.path.relpath(blob, pointer.parent), draft)
            except OSError:
                if not blob.exists() and pointer.is_file():
                    continue  # the other one has moved it here
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


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}/tree/main"


def _quoted(text: str, safe: str = "") -> str:
    from urllib.parse import quote

    return quote(text, safe=safe, errors="surrogatepass")


def _url(repo: str, revision: str, name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}/resolve/{_quoted(revision)}/{_quoted(name, '/')}"


def _read(
    url: str,
    start: int,
    end: int,
    file: RepoFile | None,
    stop: threading.Event,
    begin: Callable[[int], None] | None = None,
) -> Iterator[bytes]:
    """The bytes [start, end) of a file, in blocks; a connection that breaks is taken up where it broke.

    file: what is known of it; without that, what is read may end early, where the file does. begin: told where each
    answer begins. Raises the last error once `_RETRY_SECONDS` are used up, or the Hub wants to be left alone for longer.
    """
    failures = 0
    while start < end and not stop.is_set():
        asked = min(end, start + _REQUEST_BYTES)
        answer_start = start
        try:
            for chunk in _answer(url, start, asked, file):
                if begin is not None and start == answer_start:
                    begin(start)
                yield chunk
                start += len(chunk)
                failures = 0
        except (_network_error(), _BrokenOff) as error:
            if failures == len(_RETRY_SECONDS) or not _may_pass(error):
                raise
            seconds = max(_RETRY_SECONDS[failures], _retry_after(error) or 0.0)
            if seconds > max(_LONGEST_WAIT_SECONDS, _RETRY_SECONDS[failures]):
                raise
            stop.wait(seconds)
            failures += 1
        else:
            if start < asked:
                return


def _answer(url: str, start: int, end: int, file: RepoFile | None) -> Iterator[bytes]:
    """One request for the bytes [start, end) of a file; the HTTP library keeps the token from other hosts."""
    from huggingface_hub import constants

    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with _requested(url, constants.HF_HUB_DOWNLOAD_TIMEOUT, headers) as response:
        _refuse_other_content(response, start, file)
        is_range = response.status_code == 206  # else a server or proxy that knows no ranges sends the whole file
        unwanted, wanted = 0 if is_range else start, end - start
        for chunk in response.iter_bytes():  # as it comes: blocks of a set size lose what a break leaves unfilled
            piece = chunk[unwanted : unwanted + wanted]
            unwanted -= min(unwanted, len(chunk))
            wanted -= len(piece)
            if piece:
                yield piece
            if not wanted and response.headers.get("Content-Length") != str(end - start):
                return  # what comes behind it, perhaps without an end, is not waited for
        if wanted and file is not None:
            raise _BrokenOff("the answer ended early")


@contextmanager
def _requested(url: str, timeout: float, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """The response to a GET, its body still to come; an error status is raised, with a body of bounded size."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    wanted = build_hf_headers(library_name=_LIBRARY) | (headers or {})
    with get_session().stream("GET", url, headers=wanted, timeout=timeout, follow_redirects=True) as response:
        if response.status_code >= 400:
            kept = {name: text for name, text in response.headers.items() if name.lower() not in _BODY_HEADERS}
            body = b""
            with suppress(_OtherAnswer, _network_error()):
                body = _bounded(response, _LARGEST_COMPLAINT, timeout)
            hf_raise_for_status(
                type(response)(response.status_code, headers=kept, content=_complaint(body), request=response.request)
            )
        yield response


def _complaint(body: bytes) -> bytes:
    """What an error's body says, in the one form that huggingface_hub reads without stumbling; b"" where it is another."""
    try:
        said = parse_json(body, "it", HubError)
    except HubError:
        return b""
    text = said.get("error") if isinstance(said, dict) else None
    return json.dumps({"error": text}).encode() if isinstance(text, str) else b""


_BODY_HEADERS = ("content-encoding", "content-length", "transfer-encoding")
_LARGEST_COMPLAINT = 100_000


def _bounded(response: Any, most: int, seconds: float) -> bytes:
    """A response's whole body. Raises _OtherAnswer when it has more bytes, or takes longer."""
    body, end = bytearray(), time.monotonic() + seconds
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > most or time.monotonic() > end:
            raise _OtherAnswer(f"it does not end within {most:,} bytes and {seconds:.0f} s")
    return bytes(body)


class _BrokenOff(Exception):
    """An answer that ended before all of it was there, without the HTTP library noticing."""


class _OtherAnswer(Exception):
    """An answer that is not what was asked for: a login page, another range, a file of another size."""


def _refuse_other_content(response: Any, start: int, file: RepoFile | None) -> None:
    """Raise _OtherAnswer for an answer that says itself that it is not the file, or not its bytes from `start`."""
    headers, size = response.headers, None if file is None else file.size
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and not (
        file is not None and file.name.endswith((".html", ".htm"))
    ):
        raise _OtherAnswer("it is a web page")
    packed = headers.get("Content-Encoding", "identity").lower() != "identity"
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != start or packed:
            raise _OtherAnswer(f"it says that it has other bytes than those from {start:,} on")
        total = None if found[3] == "*" else int(found[3])
    elif response.status_code == 200:
        length = headers.get("Content-Length", "")
        total = int(length) if re.fullmatch(r"\d{1,18}", length) and not packed else None
    else:
        raise _OtherAnswer(f"its status is {response.status_code}")
    if size is not None and total is not None and total != size:
        raise _OtherAnswer(f"it has {total:,} bytes and the file {size:,}")
    linked = next((each.headers["X-Linked-ETag"] for each in response.history if "X-Linked-ETag" in each.headers), None)
    if file is not None and linked is not None and linked.removeprefix("W/").strip('"') != file.etag:
        raise _OtherAnswer(f"its checksum is {shown(linked)} and that of the file {file.etag[:12]}…")


# Errors.


def _network_error() -> type[Exception]:
    """The base of what the HTTP library raises (httpx, httpx2 from huggingface_hub 2 on), HfHubHTTPError included."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _may_pass(error: Exception) -> bool:
    """Whether it makes sense to ask once more."""
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) or error.response.status_code in (408, 429, 500, 502, 503, 504)


def _retry_after(error: Exception) -> float | None:
    """The seconds for which the Hub wants to be left alone, when it says so."""
    from huggingface_hub.errors import HfHubHTTPError

    text = error.response.headers.get("Retry-After", "").strip() if isinstance(error, HfHubHTTPError) else ""
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):  # none, or no date
        return None


@contextmanager
def _explained(repo: str, revision: str | None = None, name: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into one sentence for the user."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except (_network_error(), OfflineModeIsEnabled, _BrokenOff, _OtherAnswer) as error:
        raise HubError(_sentence(error, repo, revision, name)) from error


def _sentence(error: Exception, repo: str, revision: str | None, name: str | None) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its licence at {hub}/{repo}, log in with `hf auth login`, and run this again."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo} is neither a folder here nor a model at {hub} that you may read: check the spelling, or log in "
            "with `hf auth login` if it is private."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: leave it out, or choose one that {_page(repo)} offers."
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} has no file {name!r}: its files are listed at {_page(repo)}."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} cannot be fetched while HF_HUB_OFFLINE is set: unset it, or give a folder on this machine."
    if isinstance(error, _OtherAnswer):
        return (
            f"What came for {repo if name is None else f'{name} of {repo}'} is something else: {error}. Something "
            f"between here and {hub} answers in its place: open that address in a browser, log in to the network if it "
            "wants that, and run this again; what was downloaded is kept."
        )
    if not isinstance(error, errors.HfHubHTTPError):
        return (
            f"{hub} cannot be reached for {repo} ({one_line(error)}): check the network and run this again; a "
            "download goes on where it stopped."
        )
    status = error.response.status_code
    if status == 401:
        return f"{hub} does not accept your token for {repo}: log in anew with `hf auth login`, or correct HF_TOKEN."
    if status == 403:
        return (
            f"{hub} forbids {repo} to your token ({_answer_of(error)}): use one that may read it, by `hf auth login`."
        )
    if status == 416:
        return f"{name} of {repo} ends before the bytes that its listing promises: the file is damaged or was replaced."
    seconds = _retry_after(error)
    when = (
        "in a while"
        if seconds is None
        else f"in {seconds:.0f} s"
        if seconds < 120
        else f"in {seconds / 60:.0f} minutes"
    )
    if status == 429:
        when = "in a few minutes" if seconds is None else when
        return f"{hub} refuses {repo} for now (429, too many requests): run this again {when}; a download goes on."
    return f"{hub} answered {status} for {repo}: run this again {when}; a download goes on where it stopped."


def _upload_reason(error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        return one_line(error)
    status = error.response.status_code
    if status == 401:
        return "you are not logged in; `hf auth login` with a token that may write does it"
    if status == 403:
        return "your token may not write there; `hf auth login` with one that may does it"
    return f"the Hub answered {_answer_of(error)}"


def _answer_of(error: HfHubHTTPError) -> str:
    message = " ".join((error.server_message or "").split())[:200].rstrip(".")
    return f"{error.response.status_code}, {message}" if message else str(error.response.status_code)


def _disk_error(error: OSError, repo: str, cache: _RepoCache, files: list[RepoFile]) -> DestinationError:
    elsewhere = "set HF_HOME to a folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DestinationError(
            f"The disk of {cache.root} is full and {repo} needs {_in_words(_bytes_to_fetch(cache, files))} more: make "
            f"room and run this again, it goes on where it stopped, or {elsewhere} on a larger disk."
        )
    where = error.filename or cache.root
    if error.errno in DISK_IS_GONE:
        reason = error.strerror or one_line(error)
        return DestinationError(
            f"{where} cannot be used any more for {repo} ({reason}): connect its disk again and run this again, it goes on "
            f"where it stopped, or {elsewhere} on another disk."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DestinationError(f"{where} cannot be written: give yourself the right to, or {elsewhere} of your own.")
    return DestinationError(
        f"{where} cannot be used for {repo} ({error.strerror or one_line(error)}): check the disk, or {elsewhere}."
    )


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # A user's HF_HUB_DISABLE_PROGRESS_BARS, set to 0 or 1, has the last word.
    if show or are_progress_bars_disabled() or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
