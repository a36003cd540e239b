"""Names of repositories and their files: OWNER/NAME, web addresses, other programs' names, safe paths.

Names in a listing of the Hub become paths in the cache, so they are checked here first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import HubError
from ..files import shown
from ..finder import folded

LIBRARY = "openelm_mlx"
COMMIT = re.compile(r"[0-9a-f]{40}")

# Called with (bytes so far, total bytes).
Progress = Callable[[int, int], None]

_PART = r"(?![.-])[A-Za-z0-9._-]{1,96}(?<![.-])"
_OWNER_AND_NAME = re.compile(f"{_PART}/{_PART}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's SHA-1 of a small file, SHA-256 of a large (LFS) one
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_ADDRESS = re.compile(r"(https?|hf)://|(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)
# Parts of web addresses of a model's page, folders and files; the revision follows.
_PAGES = ("tree", "blob", "resolve", "raw", "commit")

_LONGEST_NAME = 255  # bytes of one part of a path, on all usual disks
_LONGEST_PATH = 900
LARGEST_FILE = 2**50

# Other names of the released models, in other programs and in common use.
_OTHER_NAMES = (
    (re.compile(r"gpt-oss(:latest|:20b|-20b)?|gpt-oss:20b-.*", re.IGNORECASE), "openai/gpt-oss-20b"),
    (re.compile(r"gpt-oss(:120b|-120b)|gpt-oss:120b-.*", re.IGNORECASE), "openai/gpt-oss-120b"),
)
_OPENELM_NAME = re.compile(r"openelm[-:](270m|450m|1[._]1b|3b)(-instruct)?", re.IGNORECASE)


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository: its path with forward slashes, and its size in bytes.

    `etag` identifies the content on the Hub and in its cache: SHA-256 for large (LFS) files, git's SHA-1 for the others.
    """

    name: str
    size: int
    etag: str = ""


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repo: str
    commit: str
    files: tuple[RepoFile, ...]
    refusal: HubError | None = None  # why the Hub gave no listing, when this one comes from the cache
    is_whole: bool = True  # False: only the files that happen to be cached are known


def check_repo_name(repo: str) -> None:
    if not isinstance(repo, str) or not is_repo_name(repo):
        raise HubError(
            f"{shown(repo)} is not the name of a Hub repository: write OWNER/NAME, as in openai/gpt-oss-20b."
        )


def is_repo_name(text: str) -> bool:
    """Whether it is a valid repository name, by the rules of huggingface_hub's validate_repo_id, with an owner."""
    return (
        _OWNER_AND_NAME.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def repo_of(source: str) -> tuple[str, str | None] | None:
    """The repository that `source` names, and the revision if it names one too; None when it is not such a name.

    Accepted are "owner/name" and the addresses of its pages: "https://huggingface.co/owner/name/tree/main",
    "hf.co/owner/name". The main branch counts as no revision. Raises HubError for an address of something else.
    """
    if is_repo_name(source):
        return source, None
    if not _ADDRESS.match(source):
        return None
    return _repo_of_address(source)


def known_name(source: str) -> str | None:
    """The repository of a released model that other programs call `source` ("gpt-oss:20b"), or None."""
    for pattern, repo in _OTHER_NAMES:
        if pattern.fullmatch(source):
            return repo
    found = _OPENELM_NAME.fullmatch(source)
    if found is None:
        return None
    return f"apple/OpenELM-{found[1].upper().replace('.', '_')}{'-Instruct' if found[2] else ''}"


def check_revision(revision: str | None) -> None:
    """Raise HubError for what cannot be a branch, tag or commit: it becomes a path in the cache."""
    if revision is not None and not (isinstance(revision, str) and revision and _is_inside(revision)):
        raise HubError(f"{shown(revision)} is not a valid revision: give a branch, a tag or a commit, as text.")


def sound_files(entries: Iterable[tuple[Any, Any, Any]]) -> tuple[RepoFile, ...]:
    """The files of a listing, (name, size, etag) each, that can be stored on a disk.

    Names that a Mac's disk cannot have, or takes for the same as an earlier name, are left out. Raises ValueError for names
    that lead out of their folder, and for invalid sizes and checksums.
    """
    files: dict[str, RepoFile] = {}
    for name, size, etag in entries:
        if not isinstance(name, str) or not _is_inside(name):
            raise ValueError(f"a file is called {shown(name)}")
        has_etag = isinstance(etag, str) and _ETAG.fullmatch(etag)
        if type(size) is not int or not 0 <= size <= LARGEST_FILE or not has_etag:
            raise ValueError(f"size or checksum of {shown(name)} is missing")
        if _fits_on_a_disk(name):
            files.setdefault(folded(name), RepoFile(name, size, etag))
    return tuple(file for key, file in files.items() if not any(parent in files for parent in _parents(key)))


def _repo_of_address(address: str) -> tuple[str, str | None]:
    from huggingface_hub import constants

    try:
        parts = urlsplit(address if "://" in address else f"https://{address}")
    except ValueError:  # brackets that do not close
        raise HubError(
            f"{shown(address)} is not a valid address: give a repository as OWNER/NAME, or a folder."
        ) from None
    path = [unquote(part) for part in parts.path.split("/") if part]
    if parts.scheme.lower() == "hf":  # hf://owner/name@revision
        path = [parts.netloc, *path]
    elif parts.netloc.lower() not in (*_HOSTS, urlsplit(constants.ENDPOINT).netloc.lower()):
        raise HubError(
            f"{shown(address)} is not an address of the Hugging Face Hub: download it yourself and give the folder, or give a "
            "repository as OWNER/NAME."
        )
    if path[:1] == ["models"]:
        path = path[1:]
    repo, _, revision = "/".join(path[:2]).partition("@")
    if path[:1] in (["datasets"], ["spaces"], ["collections"], ["papers"]) or not is_repo_name(repo):
        raise HubError(
            f"{shown(address)} is not the address of a model: give one as OWNER/NAME, as in openai/gpt-oss-20b, or as "
            "https://huggingface.co/openai/gpt-oss-20b."
        )
    if len(path) > 3 and path[2] in _PAGES:
        revision = path[3]
    check_revision(revision or None)
    return repo, None if revision in ("", "main") else revision


def _is_inside(name: str) -> bool:
    """Whether a path with forward slashes stays in its folder, whatever the system."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def _fits_on_a_disk(name: str) -> bool:
    if "\\" in name or not name.isprintable():  # control characters, and lone surrogates
        return False
    data = [part.encode() for part in name.split("/")]
    return max(map(len, data)) <= _LONGEST_NAME and sum(map(len, data)) + len(data) <= _LONGEST_PATH


def _parents(name: str) -> Iterable[str]:
    parts = name.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))
