"""Uploading a folder to the Hub, by huggingface_hub."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, HubError, UserError
from ..files import hears_the_disk, one_line
from ..finder import MACOS_PATTERNS, is_empty
from .failures import answer_of
from .names import LIBRARY, check_repo_name


@hears_the_disk(CheckpointError)
def upload(
    folder: str | os.PathLike[str],
    repo: str,
    private: bool = False,
    message: str = "Upload a checkpoint written by openelm_mlx",
    show_progress: bool = False,
) -> str:
    """Upload every file of a folder to a repository, which is created when it does not exist; return its address.

    Large files that an earlier, interrupted upload delivered are not sent again. `show_progress` shows huggingface_hub's
    bars on stderr. Raises CheckpointError when there is no such folder, and HubError when the upload fails.
    """
    from huggingface_hub import HfApi, constants

    folder = Path(folder)
    check_repo_name(repo)
    if not folder.is_dir() or is_empty(folder):
        raise CheckpointError(f"{folder} is not a folder with files in it: name the folder to upload.")
    api = HfApi(endpoint=constants.ENDPOINT, library_name=LIBRARY)
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


def _upload_reason(error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        return one_line(error)
    status = error.response.status_code
    if status == 401:
        return "you are not logged in; run `hf auth login` with a token that may write"
    if status == 403:
        return "your token may not write there; run `hf auth login` with one that may"
    return f"the Hub answered {answer_of(error)}"


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # A user's HF_HUB_DISABLE_PROGRESS_BARS, set to 0 or 1, takes precedence.
    if show or are_progress_bars_disabled() or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
