"""Errors of the Hub and the network as one sentence for the user, and whether a retry makes sense."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import HubError
from ..files import one_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


class BrokenOff(Exception):
    """A response that ended early without the HTTP library noticing."""


class OtherAnswer(Exception):
    """A response with other content than requested: a login page, another range, a file of another size."""


def network_error() -> type[Exception]:
    """The base class of the HTTP library's errors (httpx; httpx2 since huggingface_hub 2), including HfHubHTTPError."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def may_pass(error: Exception) -> bool:
    """Whether a retry makes sense."""
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) or error.response.status_code in (408, 429, 500, 502, 503, 504)


def retry_after(error: Exception) -> float | None:
    """The seconds to wait before the next request, if the Hub says so (Retry-After)."""
    from huggingface_hub.errors import HfHubHTTPError

    text = error.response.headers.get("Retry-After", "").strip() if isinstance(error, HfHubHTTPError) else ""
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):  # none, or no date
        return None


@contextmanager
def explained(repo: str, revision: str | None = None, name: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into one sentence for the user."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except (network_error(), OfflineModeIsEnabled, BrokenOff, OtherAnswer) as error:
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
        return f"{repo} has no revision {revision!r}: leave it out, or choose one that {page_of(repo)} offers."
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} has no file {name!r}: its files are listed at {page_of(repo)}."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} cannot be fetched while HF_HUB_OFFLINE is set: unset it, or give a folder on this machine."
    if isinstance(error, OtherAnswer):
        return (
            f"What came for {repo if name is None else f'{name} of {repo}'} is something else: {error}. Something "
            f"between here and {hub} answers instead: open that address in a browser, log in to the network if it "
            "asks you to, and run this again; what was downloaded is kept."
        )
    if not isinstance(error, errors.HfHubHTTPError):
        return (
            f"{hub} cannot be reached for {repo} ({one_line(error)}): check the network and run this again; a "
            "download resumes where it stopped."
        )
    status = error.response.status_code
    if status == 401:
        return f"{hub} does not accept your token for {repo}: log in again with `hf auth login`, or correct HF_TOKEN."
    if status == 403:
        return f"{hub} forbids {repo} to your token ({answer_of(error)}): use one that may read it, by `hf auth login`."
    if status == 416:
        return f"{name} of {repo} is shorter than its listing says: the file is damaged or was replaced."
    seconds = retry_after(error)
    when = (
        "in a while"
        if seconds is None
        else f"in {seconds:.0f} s"
        if seconds < 120
        else f"in {seconds / 60:.0f} minutes"
    )
    if status == 429:
        when = "in a few minutes" if seconds is None else when
        return f"{hub} refuses {repo} for now (429, too many requests): run this again {when}; a download resumes."
    return f"{hub} answered {status} for {repo}: run this again {when}; a download resumes where it stopped."


def answer_of(error: HfHubHTTPError) -> str:
    message = " ".join((error.server_message or "").split())[:200].rstrip(".")
    return f"{error.response.status_code}, {message}" if message else str(error.response.status_code)


def page_of(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}/tree/main"
