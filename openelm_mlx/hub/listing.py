"""The file listing of a repository on the Hugging Face Hub: from the Hub, or from the cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePosixPath

from ..errors import HubError, UserError
from ..files import hears_the_disk, parse_json, read_json
from .cache import LARGEST_LISTING, RepoCache
from .failures import explained, may_pass, network_error, page_of, retry_after
from .names import COMMIT, Listing, RepoFile, check_repo_name, check_revision, sound_files
from .requests import bounded, quoted, requested

_LISTING_SECONDS = 120.0
_LISTING_WAIT_SECONDS = 30.0


@hears_the_disk(HubError)
def list_files(repo: str, revision: str | None = None) -> list[RepoFile]:
    """The files of a repository with their sizes, in one request; those of its cached copy when the Hub cannot be reached.

    `revision` is a branch, a tag or a commit; None is the main branch. Raises HubError.
    """
    return list(look_up(repo, revision).files)


def look_up(repo: str, revision: str | None) -> Listing:
    check_repo_name(repo)
    check_revision(revision)
    try:
        return _ask_hub(repo, revision)
    except HubError as refusal:
        cached = RepoCache.of(repo).recall(repo, revision or "main", refusal)
        if cached is None:
            raise
        return cached


def _ask_hub(repo: str, revision: str | None) -> Listing:
    from huggingface_hub import constants

    with explained(repo, revision):
        text = _listing_text(repo, revision)
    try:
        info = parse_json(text, "it", HubError)
        entries = []
        for each in info["siblings"]:
            large = each.get("lfs")
            entries.append((each["rfilename"], each["size"], large["sha256"] if large else each["blobId"]))
        if not isinstance(info["sha"], str) or not COMMIT.fullmatch(info["sha"]):
            raise ValueError("it has no commit")
        return Listing(repo, info["sha"], sound_files(entries))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or not with the Hub's fields
        raise HubError(
            f"{constants.ENDPOINT} does not answer like the Hugging Face Hub about {repo}: check HF_ENDPOINT, "
            "and whether this network wants a login in the browser first."
        ) from error


def _listing_text(repo: str, revision: str | None) -> bytes:
    """The Hub's answer about a repository, retried once if the Hub says when."""
    from huggingface_hub import constants

    path = f"/api/models/{repo}" if revision is None else f"/api/models/{repo}/revision/{quoted(revision)}"
    for is_last in (False, True):
        try:
            with requested(f"{constants.ENDPOINT}{path}?blobs=true", constants.HF_HUB_ETAG_TIMEOUT) as response:
                return bounded(response, LARGEST_LISTING, _LISTING_SECONDS)
        except network_error() as error:
            seconds = retry_after(error)
            if is_last or seconds is None or seconds > _LISTING_WAIT_SECONDS or not may_pass(error):
                raise
            time.sleep(seconds)
    raise AssertionError


def choose_files(listing: Listing, choose: Callable[[list[RepoFile]], list[str]], cache: RepoCache) -> list[RepoFile]:
    known = {file.name: file for file in listing.files}
    try:
        names = list(dict.fromkeys(choose(list(listing.files))))
    except UserError as error:
        if listing.is_whole:
            raise
        raise incomplete(listing, cache, []) from error
    unknown = [name for name in names if name not in known]
    if not listing.is_whole:
        unknown += [shard for name in names for shard in _indexed_shards(listing, cache, name) if shard not in known]
    if unknown and listing.is_whole:
        raise HubError(f"{listing.repo} has no file {unknown[0]!r}: its files are listed at {page_of(listing.repo)}.")
    if unknown:
        raise incomplete(listing, cache, unknown)
    return [known[name] for name in names]


def _indexed_shards(listing: Listing, cache: RepoCache, name: str) -> list[str]:
    """The files that a cached safetensors index names: a copy without one of them is not complete."""
    if not name.endswith(".index.json"):
        return []
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        shards = dict.fromkeys(read_json(cache.pointer(listing.commit, name), HubError)["weight_map"].values())
        return [str(PurePosixPath(name).parent / shard) for shard in shards]
    return []  # the checkpoint reader explains a damaged index


def incomplete(listing: Listing, cache: RepoCache, names: list[str]) -> HubError:
    lacks = f"lacks {names[0]!r}" if names else "is not complete"
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return HubError(f"{listing.refusal} The copy of {listing.repo} in {cache.root} {lacks}{more}.")
