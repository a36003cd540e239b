"""Repositories on the Hugging Face Hub: what they hold, bringing the files that are wanted, uploading a folder.

Listings, logins and uploads are huggingface_hub's; `transfer.py` says why the transfer of a download is not.
"""

from .cache import cached_file
from .listing import list_files
from .names import Progress, RepoFile, is_repo_name, known_name, repo_of
from .transfer import download, read_range
from .uploads import upload

__all__ = [
    "Progress",
    "RepoFile",
    "cached_file",
    "download",
    "is_repo_name",
    "known_name",
    "list_files",
    "read_range",
    "repo_of",
    "upload",
]
