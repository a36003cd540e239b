"""The place where a checkpoint will be written: checks of it, a folder that appears there whole, and the disk's errors."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from ..checks import size
from ..errors import DestinationError
from ..files import expanded
from ..finder import DISK_IS_GONE, is_empty, sync, sync_folder


def check_destination(destination: Path) -> None:
    """Raise DestinationError when something exists at `destination` already; an empty folder is accepted."""
    try:
        if destination.is_dir() and is_empty(destination):
            return
        if os.path.lexists(destination):
            kind = "a folder with files in it" if destination.is_dir() else "a file"
            raise DestinationError(
                f"{destination} exists already ({kind}); nothing is overwritten: choose another destination, or move it away."
            )
    except OSError as error:
        raise destination_error(error, destination) from error


def check_free_space(destination: Path, needed: int) -> None:
    """Raise DestinationError when the disk of `destination` has fewer than `needed` bytes free."""
    try:
        folder = next(parent for parent in destination.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise destination_error(error, destination) from error
    if needed > free:
        raise DestinationError(
            f"The conversion needs {size(needed)} on the disk of {folder} and {size(free)} are free: make "
            "room, or choose a destination on a larger disk."
        )


@contextmanager
def folder_beside(destination: Path) -> Iterator[Path]:
    """A new folder beside the destination, to be filled and put in its place within the block; what is left is removed.

    Folders above it are made. Raises DestinationError for the disk's errors.
    """
    beside = destination.with_name(f".openelm_mlx-{os.urandom(8).hex()}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        yield beside
    except OSError as error:
        raise destination_error(error, destination) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_in_place(whole: Path, destination: Path) -> None:
    """Rename a finished folder to its destination, where it appears in one step; an empty folder there gives way.

    Raises DestinationError where something has appeared there, and OSError.
    """
    try:
        if destination.is_dir() and is_empty(destination):
            for path in list(destination.iterdir()):  # Finder's files, moved because only an empty folder is replaced
                os.replace(path, whole / path.name)
        sync_folder(whole)
        os.rename(whole, destination)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise DestinationError(
            f"{destination} appeared while it was being written, and nothing is overwritten: choose another destination."
        ) from error
    sync_folder(destination.parent)


def save_tensors(file: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, down to the disk itself. Raises OSError."""
    try:
        mx.save_safetensors(str(file), dict(tensors), dict(metadata or {}))
    except RuntimeError as error:  # MLX does not say which error of the disk it was
        is_full = "no space" in str(error).lower() or shutil.disk_usage(file.parent).free < 2**20
        raise OSError(errno.ENOSPC if is_full else errno.EIO, str(error), str(file)) from error
    with file.open("rb") as stream:
        sync(stream)


def write_folder(
    folder: str | os.PathLike[str],
    weights: str,
    tensors: Mapping[str, mx.array],
    files: Mapping[str, bytes | Path],
    metadata: Mapping[str, str],
    *,
    replace: bool = False,
) -> Path:
    """Write a small checkpoint into a new folder, which appears complete; returns it.

    weights: the name of the file for `tensors`. files: name -> content, or a file to copy; the last one is what makes the
    folder readable. replace: the files of an existing folder give way one by one, for a run that saves again what it wrote
    itself.

    Raises DestinationError where something is there, or it cannot be written.
    """
    destination = Path(os.path.realpath(expanded(os.fspath(folder), DestinationError)))
    if not replace:
        check_destination(destination)
    with folder_beside(destination) as beside:
        check_free_space(destination, sum(array.nbytes for array in tensors.values()))
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, beside / name)
            else:
                (beside / name).write_bytes(content)
        save_tensors(beside / weights, tensors, metadata)
        if not (replace and destination.is_dir()):
            put_in_place(beside, destination)
            return destination
        sync_folder(beside)
        for name in sorted([weights, *files], key=lambda each: each == list(files)[-1]):  # a whole one at any moment
            os.replace(beside / name, destination / name)
        sync_folder(destination)
    return destination


def destination_error(error: OSError, destination: Path) -> DestinationError:
    """What an error of the disk means for this destination, and what to do about it, in a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DestinationError(
            f"The disk of {destination.parent} is full; what was written of {destination.name} has been removed: "
            "make room, or choose a destination on another disk."
        )
    if error.errno == errno.EFBIG:  # FAT32, which many memory sticks have, holds no file above 4 GB
        return DestinationError(
            f"{destination} is larger than a file may be on the disk of {destination.parent}: choose a destination on another "
            'disk, or divide a folder\'s files with max_file_bytes="4GB".'
        )
    reason = error.strerror or str(error)
    if error.errno in DISK_IS_GONE:
        return DestinationError(
            f"{destination} cannot be written any more ({reason}): connect its disk again, and run this again."
        )
    return DestinationError(
        f"{destination} cannot be written ({reason}: {error.filename or destination.parent}): choose another destination, "
        "or make that folder writable for you."
    )
