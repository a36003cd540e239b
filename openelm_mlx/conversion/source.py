"""Where the weights come from: a folder, a file or a repository, understood from its headers before anything is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import hub
from ..checkpoint.layouts import Contents, understand
from ..checkpoint.reader import Checkpoint, open_checkpoint, read_config
from ..checkpoint.remote import RemoteCheckpoint, indexed_files
from ..checkpoint.writer import check_free_space
from ..errors import ConfigError
from ..files import read_object
from ..loading import DEMOS, choose_model_files, locate, repository
from ..specs import spec_from_config

# Stage ("download", "convert" or "verify"), what is done, and of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """What is converted. `folder` holds its config and other small files; `repo` and `revision` where it came from.

    name: for people: the repository, or the folder's name. chooser: what a chat template is chosen by. is_here: whether
    its tensors can be read; those of a repository cannot before `fetch`.
    """

    name: str
    chooser: str
    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    contents: Contents
    repo: str | None = None
    is_here: bool = True

    @property
    def revision(self) -> str | None:
        """The commit that was downloaded; the Hub's cache names folders by it."""
        return self.folder.name if self.repo is not None else None

    @staticmethod
    def open(source: str | Path, revision: str | None = None, progress: Progress | None = None) -> Source:
        """The source, known from its config and headers; of a repository only those are fetched.

        Raises what `locate`, `read_config`, `open_checkpoint` and `understand` raise, and HubError.
        """
        if (found := repository(source, revision)) is not None:
            return _open_repo(*found, progress)
        path = locate(source)
        folder = path if path.is_dir() else path.parent
        name = folder.resolve().name if str(source) not in DEMOS else str(source)
        return _understood(path, name, chooser=str(source) if path.is_dir() else str(folder.resolve()))

    def fetch(self, destination: Path, needed: int, progress: Progress | None = None) -> Source:
        """The same with tensors that can be read: a repository's weights are downloaded now, if they are not here yet.

        needed: bytes that `destination` will take; on the cache's disk they are not free for the download.
        """
        if self.is_here or self.repo is None:
            return self
        check_free_space(destination, needed)
        folder = hub.download(
            self.repo,
            choose_model_files,
            revision=self.revision,
            progress=_download_progress(progress),
            local_free_bytes=_free_bytes(self.folder, destination, needed),
        )
        return _understood(folder, self.name, self.chooser, self.repo)


def _open_repo(repo: str, revision: str | None, progress: Progress | None) -> Source:
    files = hub.list_files(repo, revision)
    chosen = set(choose_model_files(files))
    weights = [file for file in files if file.name in chosen and file.name.endswith(".safetensors")]
    if not weights:  # PyTorch's files have no header to look at
        folder = hub.download(repo, choose_model_files, revision=revision, progress=_download_progress(progress))
        return _understood(folder, repo, repo, repo)
    others = sorted(chosen - {file.name for file in weights})
    folder = hub.download(repo, lambda _: others, revision=revision)
    indexes = [name for name in others if name.endswith(".safetensors.index.json")]
    if indexes:
        index = read_object(folder / indexes[0], ConfigError)
        weights = indexed_files(index, f"{repo}/{indexes[0]}", weights)
    config = read_config(folder)
    checkpoint = RemoteCheckpoint(repo, weights, folder.name)
    contents = understand(checkpoint, config, spec_from_config(config))
    return Source(repo, repo, folder, config, checkpoint, contents, repo, is_here=False)


def _understood(path: Path, name: str, chooser: str, repo: str | None = None) -> Source:
    config = read_config(path)
    checkpoint = open_checkpoint(path)
    contents = understand(checkpoint, config, spec_from_config(config))
    return Source(name, chooser, path if path.is_dir() else path.parent, config, checkpoint, contents, repo)


def _download_progress(progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress("download", done, total)


def _free_bytes(cache: Path, destination: Path, needed: int) -> int | None:
    """What the cache's disk has left for a download when the destination's bytes are on it too; None: all that is free."""
    parent = next(folder for folder in destination.absolute().parents if folder.exists())
    if cache.stat().st_dev != parent.stat().st_dev:
        return None
    return max(0, shutil.disk_usage(cache).free - needed)
