"""Removing personal data from a report that users attach to a public issue.

Paths keep only the part after the home folder; names of users, machines and disks are removed wherever they appear: error
messages have paths, and a path may have all of them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Names that identify nobody and occur in reports for other reasons.
_ANYBODY = {
    "root",
    "user",
    "admin",
    "runner",
    "ubuntu",
    "apple",
    "mac",
    "macbook",
    "python",
    "localhost",
    "home",
    "build",
}
# Somebody's folder on macOS and Linux; a disk; each user's own temporary folder on macOS.
_HOMES = re.compile(r"/(?:Users|home)/(?!Shared\b)[^/\s'\":,)]+")
# A disk may have any name ("Eve O'Brien (old)"): it ends at the next slash, or where a path ends in a sentence.
_DISKS = re.compile(r"/Volumes/(?:(?:[^/'\":\n]|'(?=\w))+(?=/)|(?:[^/'\":,)\n]|'(?=\w))+)")
_TEMPORARY = re.compile(r"(?:/private)?/var/folders/[^/\s]+/[^/\s]+")


def cleaner(
    home: Path | None = None, names: Sequence[str] | None = None, temporary: str | None = None
) -> Callable[[Any], Any]:
    """A function that removes personal names and paths from a text, or from all texts in a JSON value.

    home, names, temporary: None: those of this user and machine.
    """
    home = Path.home() if home is None else home
    names = personal_names() if names is None else names
    temporary = tempfile.gettempdir() if temporary is None else temporary
    folders = sorted({str(home), os.path.realpath(home)} - {"/"}, key=len, reverse=True)
    told = sorted({each for each in names if len(each) > 2 and each.lower() not in _ANYBODY}, key=len, reverse=True)
    words = re.compile("|".join(rf"(?<![\w]){re.escape(each)}(?![\w])" for each in told), re.IGNORECASE)

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(each) for each in value]
        if not isinstance(value, str):
            return value
        for folder in folders:
            value = re.sub(rf"{re.escape(folder)}(?=[/\s'\":,)]|$)", "~", value)
        value = _HOMES.sub("~", _DISKS.sub("/Volumes/...", _TEMPORARY.sub("<temporary>", value)))
        if len(temporary) > len("/tmp"):
            value = value.replace(temporary, "<temporary>")
        return words.sub("<name>", value) if told else value

    return clean


def personal_names() -> list[str]:
    """The names of this machine and its user, as far as the system reports them."""
    hosts = [platform.node()]
    users = [os.environ.get("USER", ""), os.environ.get("LOGNAME", ""), Path.home().name]
    with contextlib.suppress(OSError):
        hosts.append(socket.gethostname())
    with contextlib.suppress(ImportError, KeyError, OSError):
        import pwd

        user = pwd.getpwuid(os.getuid())
        full = user.pw_gecos.partition(",")[0]
        users += [user.pw_name, full, *full.split()]
    hosts += [each.partition(".")[0] for each in hosts]
    return [each for each in dict.fromkeys([*hosts, *users]) if each]
