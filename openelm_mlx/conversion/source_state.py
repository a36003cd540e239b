"""Whether the files of a source are those that a conversion began with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, ConversionError


def source_state(files: Sequence[Path]) -> list[tuple[str, int, int, int, int]]:
    """Name, size, times and inode of each file, to detect changes. Raises CheckpointError when one is gone.

    The ctime is included: unlike the mtime, no program can set it back.
    """
    try:
        found = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read any more ({error.strerror}): put it back.") from error
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in found]


def source_changed(name: str) -> ConversionError:
    """The error for a source whose files were changed under its conversion."""
    return ConversionError(
        f"The files of {name} changed while they were converted, and nothing was kept: let them be, and convert again."
    )
