"""Checks of the place where a checkpoint will be written, and what the disk's errors mean to a user."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from ..checks import size
from ..errors import DestinationError
from ..finder import DISK_IS_GONE, is_empty


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
