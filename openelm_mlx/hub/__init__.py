"""Repositories on the Hugging Face Hub: listing, downloading and uploading files.

Listings, logins and uploads use huggingface_hub; `transfer.py` says why downloads do not.
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
