"""The resources of the python tool's processes and files, measured from outside; and deleting their folder.

The kernel's limits apply to single processes, and a Mac has few of them, so python_tool.py checks the totals here. If the
sandbox's folder has a limited size (Linux), only processes and memory have to be counted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from . import sandbox_mac

IS_MAC = sys.platform == "darwin"
MOST_FILES = 20_000
_MOST_NESTED = 200


def descendants(pid: int, with_itself: bool = False) -> dict[int, int]:
    """The processes that descend from `pid`, and the bytes of memory that each has.

    None on a Mac: there is no /proc, and there the sandbox does not let Python start others.
    """
    parents, memory = {}, {}
    page = os.sysconf("SC_PAGE_SIZE")
    for name in _entries("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                parents[int(name)], memory[int(name)] = int(fields[1]), int(fields[21]) * page
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: memory[child] for child in (found if with_itself else found - {pid}) if child in memory}


def memory_bytes(processes: dict[int, int], enough: int) -> int:
    """The memory of all processes together. Pages that several of them share count once, if the kernel reports them."""
    total = sum(processes.values())
    if total <= enough or IS_MAC:
        return total  # an upper bound is enough, and a Mac's footprint has no shared pages
    return sum(_proportional(pid, resident) for pid, resident in processes.items())


def _proportional(pid: int, resident: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    # Not reported, or the process has ended since it was counted and has no memory any more.
    try:
        return resident if int(Path(f"/proc/{pid}/statm").read_text().split()[1]) else 0
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except (OSError, ValueError, IndexError):
        return resident


def footprint(pid: int) -> int | None:
    """The memory footprint of one process on a Mac; None if it cannot be read."""
    from ..memory import macos

    found = macos.footprint(pid)
    return None if found is None else found.now


def files_in(folder: Path, enough: int) -> int:
    """The bytes on disk below a folder; stops counting past `enough`.

    Too many files, and folders nested too deeply to be seen, count as too many bytes.
    """
    total = count = 0
    pending = [(str(folder), 0)]
    while pending:
        path, depth = pending.pop()
        try:
            entries = _listed(path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # deleted meanwhile
        except OSError:
            return enough + 1
        for entry in entries:
            count += 1
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    pending.append((entry.path, depth + 1))
        if count > MOST_FILES or depth > _MOST_NESTED:
            return enough + 1
        if total > enough:
            break
    return total


def deleted_files(pids: Iterable[int]) -> int:
    """The bytes of deleted files that processes have open."""
    sizes: dict[tuple[int, int], int] = {}
    for pid in pids:
        if sys.platform == "darwin":
            sizes.update(sandbox_mac.deleted_files(pid))
            continue
        for name in _entries(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found = os.stat(f"/proc/{pid}/fd/{name}")
                if found.st_nlink == 0 and stat.S_ISREG(found.st_mode):
                    sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def remove_folder(folder: Path) -> None:
    """Delete a folder, however scripts left it: nested to any depth, with any mode, locked by a Mac's flags.

    Deeply nested folders are moved up first, so no path is longer than two names below the folder. What cannot be deleted is
    left.
    """
    prefix, number, is_moving = secrets.token_hex(8), 0, True
    while is_moving:
        is_moving = False
        for entry in _listed_or_nothing(str(folder)):
            if not entry.is_dir(follow_symlinks=False):
                is_moving |= _done(os.unlink, entry.path)
                continue
            for inner in _listed_or_nothing(entry.path):
                if inner.is_dir(follow_symlinks=False):
                    number += 1
                    _unlock(inner.path)
                    is_moving |= _done(os.rename, inner.path, str(folder / f"{prefix}-{number}"))
                else:
                    is_moving |= _done(os.unlink, inner.path)
            is_moving |= _done(os.rmdir, entry.path)
    _done(os.rmdir, str(folder))


def _done(action, *paths: str) -> bool:  # type: ignore[no-untyped-def]
    try:
        action(*paths)
    except OSError:
        if sys.platform != "darwin":
            return False
        try:
            os.lchflags(paths[0], 0)  # a file may be locked
            action(*paths)
        except OSError:
            return False
    return True


def _listed_or_nothing(path: str) -> list[os.DirEntry[str]]:
    try:
        return _listed(path)
    except OSError:
        return []


def _listed(path: str) -> list[os.DirEntry[str]]:
    """The entries of a folder, made readable first if its owner removed that permission."""
    try:
        with os.scandir(path) as entries:
            found = list(entries)
        if os.access(path, os.X_OK | os.W_OK):
            return found
    except PermissionError:
        pass
    _unlock(path)
    with os.scandir(path) as entries:
        return list(entries)


def _unlock(path: str) -> None:
    with contextlib.suppress(OSError):
        if sys.platform == "darwin":
            os.lchflags(path, 0)
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.chmod(path, 0o700)


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
