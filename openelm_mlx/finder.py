"""Files that macOS puts into folders, and the peculiarities of a Mac's disks: names, syncing, disconnection.

Finder writes .DS_Store into every folder that it shows. On disks without extended attributes (exFAT, many network ones)
each file NAME gets a second one, ._NAME (AppleDouble), with the same ending but other content.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

_NAMES = {
    ".DS_Store", ".localized", "Icon\r", ".apdisk", ".VolumeIcon.icns", ".metadata_never_index", ".Spotlight-V100",
    ".fseventsd", ".Trashes", ".TemporaryItems", ".DocumentRevisions-V100",
}  # fmt: skip
# The same as glob patterns.
MACOS_PATTERNS = [*sorted(_NAMES), "._*"]
# Error numbers of a read from a disk that was disconnected, or a server that went away.
DISK_IS_GONE = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN}
# Error numbers of file systems without such a call: SMB, NFS, exFAT, FUSE.
_NO_SUCH_CALL = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS}


def is_macos_own(name: str) -> bool:
    """Whether macOS puts files of that name into any folder."""
    return name in _NAMES or name.startswith("._")


def files_of(folder: Path) -> Iterator[Path]:
    """The entries of a folder, without what macOS has put there."""
    return (path for path in folder.iterdir() if not is_macos_own(path.name))


def is_empty(folder: Path) -> bool:
    """Whether a folder is empty, apart from what macOS has put there."""
    return next(files_of(folder), None) is None


def is_same_name(one: str, other: str) -> bool:
    """Whether two names are the same on a Mac's usual volume, which ignores case and the form of accents."""
    return folded(one) == folded(other)


def folded(name: str) -> str:
    """A name without case and forms of accents: equal for names that are the same on a Mac's usual volume."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file or folder, however the volume compares names; False where one is missing."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def is_named(folder: Path, name: str, names: Iterable[str]) -> bool:
    """Whether `name` is one of the existing `names` on the folder's volume, perhaps with other case or accents."""
    return any(is_same_name(name, each) and same_file(folder / name, folder / each) for each in list(names))


def disk_trouble(files: Iterable[Path]) -> str | None:
    """What is wrong with the disk of one of these files, and what to do about it; None when they can be read.

    MLX's own error says only that a read failed.
    """
    for file in files:
        try:
            with file.open("rb", buffering=0) as stream:
                stream.read(1)
                stream.seek(-1, os.SEEK_END)
                stream.read(1)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return f"{file} cannot be opened ({reason}): close other programs, or run `ulimit -n 4096` before this one."
            if error.errno in DISK_IS_GONE or isinstance(error, FileNotFoundError):  # it was there a moment ago
                return f"{file} cannot be read any more ({reason}): connect its disk again, and try again."
            return f"{file} cannot be read ({reason})."
    return None


def sync(stream: IO[bytes]) -> None:
    """Flush what was written to a stream to the disk itself, as far as the file system allows."""
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
    """Flush the names in a folder to the disk; some network disks have no such call."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
    finally:
        os.close(descriptor)
