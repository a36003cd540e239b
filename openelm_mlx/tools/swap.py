"""Changing several files atomically: all of them or none, whatever fails or interrupts.

New contents are written beside their targets and checked; then each target is swapped by one system call, and the old file
is kept under another name until the last one is in place. After a failure, including Ctrl-C at any moment, the same files
are put back: contents, permissions, owner, hard links.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ToolError
from ..outputs import signals_wait

TEMPORARY = ".patch-"
# An interrupt while files are put back starts that again, at most this often.
_MOST_ATTEMPTS = 100
_ACL_AND_XATTR = 1 << 0 | 1 << 2


@dataclass(frozen=True)
class Seen:
    """A file as it was read: its bytes, and what tells whether it is still the same."""

    data: bytes
    status: os.stat_result

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: the file itself, whatever it is called."""
        return self.status.st_dev, self.status.st_ino

    def is_still(self, status: os.stat_result) -> bool:
        """Whether a file with this status is the one that was read, and has not been written to."""
        now, then = status, self.status
        return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_mode) == (
            *self.identity, then.st_size, then.st_mtime_ns, then.st_mode,
        )  # fmt: skip


@dataclass(eq=False)
class Change:
    """The change of one path: it gets `data`, or is deleted. before: its file when it was read.

    like: path and state of the file whose permissions the new one gets: itself, or the moved file.
    """

    name: str  # for messages
    path: str
    before: Seen | None
    data: bytes | None
    like: tuple[str, Seen] | None = None
    staged: str | None = None
    ours: tuple[int, int] | None = None  # the identity of what is staged
    backup: str | None = None


def read_file(path: str, name: str, most: int) -> Seen | None:
    """The regular file at `path`; None if there is nothing. Raises ToolError for anything else, and above `most` bytes."""
    try:
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ToolError(f"{name} is a folder, not a file.")
        if not stat.S_ISREG(status.st_mode):
            raise ToolError(f"{name} is not a file.")
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            data = file.read(most + 1)
        if not stat.S_ISREG(status.st_mode):
            raise ToolError(f"{name} is not a file.")
        if len(data) > most:
            raise ToolError(f"{name} has more than {most / 1e6:.0f} MB, too much for a patch.")
        return Seen(data, status)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ToolError(f"{name[:200]} cannot be read: {error.strerror}.") from error


def swap(changes: Sequence[Change]) -> None:
    """Make the changes, all of them or none. Raises ToolError when one cannot be made, and then none is."""
    with signals_wait() as check:
        work = _Swap(changes, check)
        try:
            work.prepare()
            work.verify()
            work.carry_out()
        except BaseException:
            if not work.is_done:
                _insist(work.undo)
                if work.kept:
                    raise ToolError(
                        f"The patch was not applied, and {work.kept[0][0]} could not be put back: it is in {work.kept[0][1]}."
                    ) from None
                raise
            _insist(work.clean_up)
            raise
        _insist(work.clean_up)


class _Swap:
    """The steps of a swap. The files themselves tell which of them were done, so an interrupt cannot lose track."""

    def __init__(self, changes: Sequence[Change], check: Callable[[], None]) -> None:
        # Deletions come first and make room: for a folder of a file's name, or the same name in other case.
        self._changes = sorted(changes, key=lambda each: (each.data is not None, each.before is None))
        self._check = check
        self._started: list[Change] = []
        self._folders: list[str] = []
        self.is_done = False
        self.kept: list[tuple[str, str]] = []

    # --- Beside the targets -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        for change in self._changes:
            self._check()
            with _told(change):
                if change.before is not None:
                    if not os.access(change.path, os.W_OK):
                        raise ToolError(f"{change.name} is write-protected: make it writable, or leave it as it is.")
                    change.backup = _temporary(os.path.dirname(change.path))
                if change.data is not None:
                    change.staged = _temporary(_existing_parent(change.path))
                    self._stage(change, change.staged, change.data)
                    status = os.lstat(change.staged)
                    change.ours = status.st_dev, status.st_ino
                if change.data is not None and change.backup is not None:
                    with contextlib.suppress(OSError):  # some volumes have no hard links: then it is moved aside
                        os.link(change.path, change.backup)

    def _stage(self, change: Change, staged: str, data: bytes) -> None:
        source, like = change.like or ("", None)
        if like is not None and source != change.path and data == like.data:
            with contextlib.suppress(OSError):
                os.link(source, staged)  # moved, and otherwise the same file
                return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(staged, flags, 0o666 if like is None else 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            if like is not None:
                _copy_metadata(source, like.status, staged, descriptor)
        finally:
            os.close(descriptor)

    def verify(self) -> None:
        """Raise ToolError when a file has changed since it was read."""
        leaving = {each.before.identity for each in self._changes if each.before is not None and each.data is None}
        for change in self._changes:
            self._check()
            with _told(change):
                status = _status(change.path)
                if change.before is None:
                    if status is not None and (status.st_dev, status.st_ino) not in leaving:
                        raise ToolError(f"The patch was not applied: {change.name} was created meanwhile.")
                elif status is None or not change.before.is_still(status):
                    raise ToolError(f"The patch was not applied: {change.name} was changed meanwhile; read it again.")

    # --- Swapped ------------------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        for change in self._changes:
            self._check()
            self._started.append(change)
            with _told(change):
                self._carry_out(change)
        self.is_done = True

    def _carry_out(self, change: Change) -> None:
        path, staged, backup = change.path, change.staged, change.backup
        if staged is None:
            assert backup is not None
            os.rename(path, backup)
        elif backup is not None:
            if not os.path.lexists(backup):
                os.rename(path, backup)
            os.replace(staged, path)
        else:
            self._make_folders(os.path.dirname(path))
            try:
                os.link(staged, path)  # never over something else
            except FileExistsError:
                raise
            except OSError:
                if os.path.lexists(path):
                    raise
                os.rename(staged, path)

    def _make_folders(self, folder: str) -> None:
        missing = []
        while not os.path.lexists(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for each in reversed(missing):
            self._folders.append(each)
            os.mkdir(each)

    # --- Put back, or cleaned up: both may be begun again at any point ------------------------------------------------

    def undo(self) -> None:
        self.kept = []
        self._put_back(is_new=True)
        for folder in reversed(self._folders):  # one may stand where a file was
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        self._put_back(is_new=False)
        for change in self._changes:
            _remove(change.staged)
            if change.backup is None or change.before is None:
                continue
            status = _status(change.path)
            is_back = status is not None and (status.st_dev, status.st_ino) == change.before.identity
            if is_back or change not in self._started:
                _remove(change.backup)
            elif os.path.lexists(change.backup):
                self.kept.append((change.name, os.path.basename(change.backup)))

    def _put_back(self, is_new: bool) -> None:
        for change in reversed(self._started):
            if (change.backup is None) != is_new:
                continue
            with contextlib.suppress(OSError):
                status = _status(change.path)
                is_ours = status is not None and (status.st_dev, status.st_ino) == change.ours
                if change.backup is None:
                    if is_ours:
                        os.unlink(change.path)
                elif (is_ours or status is None) and os.path.lexists(change.backup):
                    os.replace(change.backup, change.path)

    def clean_up(self) -> None:
        for change in self._changes:
            _remove(change.staged)
            _remove(change.backup)


def _temporary(folder: str) -> str:
    return os.path.join(folder, f"{TEMPORARY}{secrets.token_hex(8)}")


def _existing_parent(path: str) -> str:
    """The nearest folder above `path` that exists. Raises ToolError where a file is in the way and stays."""
    folder = os.path.dirname(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove(path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _copy_metadata(source: str, status: os.stat_result, target: str, descriptor: int) -> None:
    """Owner, permissions and extended attributes of one file for another, as far as this user may set them."""
    with contextlib.suppress(OSError):
        if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, status.st_uid, status.st_gid)
    with contextlib.suppress(OSError):
        copy_attributes(source, target)
    os.fchmod(descriptor, stat.S_IMODE(status.st_mode))


def copy_attributes(source: str, target: str, platform: str = sys.platform, libc: Any = None) -> None:
    """Extended attributes (Finder's tags, quarantine) and access lists. Raises OSError where that fails."""
    if platform == "darwin":  # Python has no call for them there; copyfile(3) has
        libc = libc or ctypes.CDLL(None)
        libc.copyfile(os.fsencode(source), os.fsencode(target), None, ctypes.c_uint32(_ACL_AND_XATTR))
    elif hasattr(os, "listxattr"):
        for name in os.listxattr(source):
            os.setxattr(target, name, os.getxattr(source, name))


@contextlib.contextmanager
def _told(change: Change) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ToolError(f"The patch was not applied: {change.name[:200]}: {error.strerror or error}.") from error


def _insist(work: Callable[[], None]) -> None:
    """Run `work` to its end despite interrupts, which are raised afterwards."""
    interrupt: BaseException | None = None
    for _ in range(_MOST_ATTEMPTS):
        try:
            work()
            break
        except BaseException as error:  # noqa: BLE001
            interrupt = error
    if interrupt is not None:
        raise interrupt
