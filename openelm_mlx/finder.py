"""What macOS leaves in folders by itself, and how a file gets onto a disk that a Mac may have.

Finder writes .DS_Store into every folder that it shows. On disks without extended attributes (exFAT, many network ones)
each file NAME gets a second one, ._NAME (AppleDouble), which ends as NAME does and is something else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_NAMES = {
    ".DS_Store", ".localized", "Icon\r", ".apdisk", ".VolumeIcon.icns", ".metadata_never_index", ".Spotlight-V100",
    ".fseventsd", ".Trashes", ".TemporaryItems", ".DocumentRevisions-V100",
}  # fmt: skip
# The same for who takes patterns.
MACOS_PATTERNS = [*sorted(_NAMES), "._*"]
# What a disk says that has no such call: SMB, NFS, exFAT, FUSE.
_NO_SUCH_CALL = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS}


def is_macos_own(name: str) -> bool:
    """Whether macOS puts files of that name into folders, whatever they are for."""
    return name in _NAMES or name.startswith("._")


def files_of(folder: Path) -> Iterator[Path]:
    """What is in a folder but for what macOS has put there."""
    return (path for path in folder.iterdir() if not is_macos_own(path.name))


def is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder but what macOS has put there."""
    return next(files_of(folder), None) is None


def sync(stream: IO[bytes]) -> None:
    """Have the disk itself keep what was written to a stream, as far as the disk can be told."""
    stream.flush()
    descriptor = stream.fileno()
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # macOS's fsync leaves the bytes in the drive's cache
            return
        except OSError as error:
            if error.errno not in _NO_SUCH_CALL:
                raise
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder; some network disks cannot be told."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
    finally:
        os.close(descriptor)
