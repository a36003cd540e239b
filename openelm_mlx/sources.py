"""A source (a demo's name, a folder, a file, a Hugging Face repository), found and opened once, from its headers.

Loading, planning and converting take path, config, spec and contents from the same `Source`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hub
from .checkpoint.destination import check_free_space
from .checkpoint.layouts import Contents, understand
from .checkpoint.reader import Checkpoint, open_checkpoint, read_config
from .checkpoint.remote import RemoteCheckpoint, indexed_files
from .errors import CheckpointError, ConfigError, HubError
from .files import hears_the_disk, kind_of, read_object, shown
from .finder import is_macos_own
from .hub import Progress, RepoFile, known_name, repo_of
from .specs import ModelSpec, spec_from_config
from .text.tokenizer_files import TOKENIZER_FILES

# How a user names a source.
SourceName = str | Path

_DEMO_FOLDER = Path(__file__).parent / "demo"
DEMOS = {"demo-openelm": _DEMO_FOLDER / "openelm", "demo-gpt-oss": _DEMO_FOLDER / "gpt_oss"}


@dataclass(frozen=True)
class Source:
    """What is loaded, planned or converted, as far as its config and headers tell.

    name: for messages: the repository, the demo, or the folder's name. template_name: decides the chat template.
    path: the file or folder of the weights. folder: where its config and other small files are. repo: where it came from.
    is_here: whether its tensors can be read; those of a repository that was opened by its headers cannot before `fetch`.
    """

    name: str
    template_name: str
    path: Path
    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    contents: Contents
    repo: str | None = None
    is_here: bool = True

    @property
    def spec(self) -> ModelSpec:
        return self.contents.spec

    @property
    def revision(self) -> str | None:
        """The commit that was downloaded; the Hub's cache names folders by it."""
        return self.folder.name if self.repo is not None else None

    @staticmethod
    def open(
        source: SourceName, revision: str | None = None, progress: Progress | None = None, headers_only: bool = False
    ) -> Source:
        """The source, known from its config and headers; a repository is downloaded, or with `headers_only` only those.

        Raises what `locate`, `read_config`, `open_checkpoint` and `understand` raise, and HubError.
        """
        found = repository(source, revision)
        if found is not None and headers_only:
            return _open_repo(*found, progress)
        path = locate(source, revision, progress)
        if found is not None:
            return _understood(path, found[0], found[0], found[0])
        folder = (path if path.is_dir() else path.parent).resolve()
        name = folder.name if str(source) not in DEMOS else str(source)
        return _understood(path, name, str(source) if path.is_dir() and Path(source).name else str(folder))

    def fetch(self, destination: Path, needed: int, progress: Progress | None = None) -> Source:
        """The same source with readable tensors: a repository's weights are downloaded now, if they are not here yet.

        needed: bytes reserved for `destination`; if it is on the cache's disk, the download cannot use them.
        """
        if self.is_here or self.repo is None:
            return self
        check_free_space(destination, needed)
        folder = hub.download(
            self.repo,
            choose_model_files,
            revision=self.revision,
            progress=progress,
            local_free_bytes=_free_bytes(self.folder, destination, needed),
        )
        return _understood(folder, self.name, self.template_name, self.repo)


def _open_repo(repo: str, revision: str | None, progress: Progress | None) -> Source:
    files = hub.list_files(repo, revision)
    chosen = set(choose_model_files(files))
    weights = [file for file in files if file.name in chosen and file.name.endswith(".safetensors")]
    if not weights:  # PyTorch files have no header to read alone
        folder = hub.download(repo, choose_model_files, revision=revision, progress=progress)
        return _understood(folder, repo, repo, repo)
    others = sorted(chosen - {file.name for file in weights})
    folder = hub.download(repo, lambda _: others, revision=revision)
    indexes = [name for name in others if name.endswith(".safetensors.index.json")]
    if indexes:
        index = read_object(folder / indexes[0], ConfigError)
        weights = indexed_files(index, f"{repo}/{indexes[0]}", weights)
    return _understood(folder, repo, repo, repo, RemoteCheckpoint(repo, weights, folder.name))


def _understood(
    path: Path, name: str, template_name: str, repo: str | None = None, remote: RemoteCheckpoint | None = None
) -> Source:
    """The source at a path. remote: the repository whose tensors were not fetched, only their headers."""
    config = read_config(path)
    spec = spec_from_config(config)
    checkpoint = open_checkpoint(path) if remote is None else remote
    contents = understand(checkpoint, config, spec)
    folder = path if path.is_dir() else path.parent
    return Source(name, template_name, path, folder, config, checkpoint, contents, repo, is_here=remote is None)


@hears_the_disk(CheckpointError)
def locate(source: SourceName, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The folder or file on this machine that holds `source`, downloaded first when it is a repository."""
    path = path_here(source)
    if path is not None:
        if path.exists() and not path.is_dir() and (kind := kind_of(path.stat())) is not None:
            raise CheckpointError(f"{source} is {kind}: give a folder, a weight file, or a repository.")
        if path.suffix.lower() == ".gguf" and not path.is_dir():
            raise CheckpointError(
                f"{source} is a GGUF file, which is not run as it is: `openelm_mlx convert {shlex.quote(str(source))} "
                "FOLDER` makes a folder of it that is."
            )
        return path
    found = repository(source, revision)
    if found is not None:
        try:
            return hub.download(found[0], choose_model_files, revision=found[1], progress=progress)
        except HubError as error:
            raise HubError(f"There is no folder {source} here, and as a repository: {error}") from error
    known = known_name(str(source))
    if known is not None:
        raise CheckpointError(f"{source} is what another program calls {known}: give {known}.")
    raise CheckpointError(
        f"There is no file or folder {source}: check the path, or give a Hugging Face repository as owner/name, "
        f"or one of {', '.join(DEMOS)}."
    )


def repository(source: SourceName, revision: str | None = None) -> tuple[str, str | None] | None:
    """The repository and revision that `source` names, as owner/name or as an address of the Hub; None for a path.

    Raises HubError for an address of something else, and for two revisions that are not the same.
    """
    if not isinstance(source, str) or source in DEMOS or existing_path(source) is not None:
        return None
    found = repo_of(source)
    if found is None:
        return None
    repo, named = found
    if named is not None and revision not in (None, named):
        raise HubError(f"{source} names the revision {named!r} and the revision is {revision!r}: give one of the two.")
    return repo, named if revision is None else revision


def path_here(source: SourceName) -> Path | None:
    """The demo, file or folder of that name, if there is one. Raises CheckpointError for an impossible name."""
    is_demo = isinstance(source, (str, Path)) and str(source) in DEMOS
    return DEMOS[str(source)] if is_demo else existing_path(source)


def existing_path(source: SourceName) -> Path | None:
    """The file or folder of that name, if there is one. Raises CheckpointError for an impossible name."""
    # An empty name, for example of an unset shell variable, would mean the current folder.
    if not isinstance(source, (str, Path)) or (isinstance(source, str) and not source.strip()):
        raise CheckpointError(
            f"The source is {shown(source)}: give a folder, a file, or a Hugging Face repository, as text."
        )
    try:
        path = Path(source).expanduser()
        return path if os.path.lexists(path) else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, an unknown user's home
        raise CheckpointError(f"{str(source)[:80]!r} is not a path: {error}.") from error


def choose_model_files(files: list[RepoFile]) -> list[str]:
    """The files of a repository that loading and converting need: one layout's weights, config, tokenizer, licence.

    Weights in subfolders are other layouts' copies of the same model, and pickles repeat what safetensors hold.
    Raises CheckpointError if there are only GGUF files.
    """
    top = [file.name for file in files if "/" not in file.name and not is_macos_own(file.name)]
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights:
        weights = [name for name in top if name.endswith((".pt", ".pth"))]
    if not weights and (packed := [name for name in top if name.endswith(".gguf")]):
        raise CheckpointError(
            f"The repository has its weights as GGUF only ({', '.join(packed[:3])}): download one file, for example with "
            f"`hf download OWNER/NAME {packed[0]} --local-dir .`, and convert that."
        )
    others = [
        name
        for name in top
        if name.endswith((".json", ".yaml", ".yml", ".jinja", ".md", ".txt")) or name in TOKENIZER_FILES
        or re.match(r"(LICEN[CS]E|NOTICE|ACKNOWLEDG|USA?[GS]?E_POLICY)", name, re.IGNORECASE)
    ]  # fmt: skip
    return sorted({*weights, *others})


def _free_bytes(cache: Path, destination: Path, needed: int) -> int | None:
    """Free bytes for a download when the destination is on the cache's disk too; None: all free bytes."""
    parent = next(folder for folder in destination.absolute().parents if folder.exists())
    if cache.stat().st_dev != parent.stat().st_dev:
        return None
    return max(0, shutil.disk_usage(cache).free - needed)
