"""macOS: the profile for sandbox-exec, and the files that a process has open, from the system's libproc."""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_READABLE = (
    "/usr/lib",
    "/usr/share",
    "/System/Library",
    "/private/var/db/timezone",
    "/Library/Apple/System/Library",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# Package managers that keep each library in a folder of its own, which links lead to: where a Python of theirs, or one
# that is linked to their libraries, finds all that these need in turn. Neither has a user's files.
_PACKAGE_MANAGERS = {
    "/opt/homebrew": ("opt", "Cellar", "lib", "etc/openssl@3"),
    "/opt/local": ("lib", "libexec", "Library/Frameworks/Python.framework", "etc/openssl"),
}

_PROC_PIDLISTFDS, _PROC_PIDFDVNODEINFO, _FD_IS_FILE = 1, 1, 1
_VNODE_INFO_BYTES, _FILE_INFO_BYTES = 176, 24  # struct vnode_fdinfo, and struct proc_fileinfo at its beginning


def libraries_readable(paths: Iterable[str], real: Callable[[str], str] = os.path.realpath) -> list[str]:
    """The folders that must be readable for a Python that is itself at, or is linked to, `paths`; links and their ends."""
    folders: list[str] = []
    for path in paths:
        for each in (path, real(path)):
            for manager, parts in _PACKAGE_MANAGERS.items():
                if each.startswith(manager + "/"):
                    folders += [f"{manager}/{part}" for part in parts]
                    break
            else:
                folders.append(os.path.dirname(each))
    system = tuple(f"{folder}/" for folder in _READABLE)
    return [folder for folder in dict.fromkeys(folders) if not f"{folder}/".startswith(system)]


def profile(readable: Sequence[str], programs: Sequence[str], folder: str) -> str:
    """The profile for sandbox-exec: everything not listed here is forbidden, and the last matching rule wins.

    readable: folders to read; programs: folders whose programs may be run; folder: the one to write. Real paths.
    """
    below = [f"(subpath {_quoted(path)})" for path in (*_READABLE, *dict.fromkeys((*readable, *programs, folder)))]
    ancestors = sorted({str(parent) for path in (*readable, *programs, folder) for parent in Path(path).parents})
    return "\n".join(
        [
            "(version 1)",
            "(deny default)",
            '(import "system.sb")',
            "(deny network*)",
            "(deny process-fork)",
            f"(allow process-exec {' '.join(f'(subpath {_quoted(path)})' for path in programs)})",
            "(allow signal (target self))",
            # "default" does not cover what is known of other processes: their arguments and their environment.
            "(deny process-info*)",
            "(allow process-info* (target self))",
            "(allow sysctl-read)",
            '(deny sysctl-read (sysctl-name-regex #"procargs"))',
            f"(allow file-read* {' '.join(below)} {' '.join(f'(literal {_quoted(path)})' for path in _DEVICES)})",
            f"(allow file-read-metadata {' '.join(f'(literal {_quoted(path)})' for path in ancestors)})",
            f"(allow file-write* (subpath {_quoted(folder)}))",
            '(allow file-write-data (literal "/dev/null"))',
        ]
    )


def _quoted(path: str) -> str:
    return json.dumps(path, ensure_ascii=False)  # the profile's strings are Scheme's: the same quotes and backslashes


@cache
def _libproc() -> Any:
    return ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)


def deleted_files(pid: int, library: Any = None) -> dict[tuple[int, int], int]:
    """(Device, inode) and bytes on disk of the deleted files that a process has open."""
    found: dict[tuple[int, int], int] = {}
    try:
        library = library or _libproc()
        listed = ctypes.create_string_buffer(8 * 4096)  # struct proc_fdinfo: a number and a kind
        count = library.proc_pidinfo(pid, _PROC_PIDLISTFDS, ctypes.c_uint64(0), listed, len(listed)) // 8
        for descriptor, kind in struct.iter_unpack("=iI", listed.raw[: 8 * max(count, 0)]):
            if kind != _FD_IS_FILE:
                continue
            info = ctypes.create_string_buffer(_VNODE_INFO_BYTES)
            size = library.proc_pidfdinfo(pid, descriptor, _PROC_PIDFDVNODEINFO, info, _VNODE_INFO_BYTES)
            if size != _VNODE_INFO_BYTES:
                continue
            # struct vinfo_stat: device, mode, links, inode; size and blocks behind two owners and eight times.
            device, _, links, inode = struct.unpack_from("=IHHQ", info, _FILE_INFO_BYTES)
            (blocks,) = struct.unpack_from("=q", info, _FILE_INFO_BYTES + 96)
            if links == 0:
                found[device, inode] = blocks * 512
    except (OSError, AttributeError):
        pass
    return found
