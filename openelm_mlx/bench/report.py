"""What may stand in a report that people put into a public issue: nothing that says whose machine it is.

Paths keep what comes behind the home folder; names of users, machines and disks are left out, wherever they come from: an
error's message has paths, and a path has them all.
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

# Names that say nothing of anybody, and stand in reports for other reasons.
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
# A disk is called as people like ("Eve O'Brien (old)"): up to the next slash, or to what ends a path in a sentence.
_DISKS = re.compile(r"/Volumes/(?:(?:[^/'\":\n]|'(?=\w))+(?=/)|(?:[^/'\":,)\n]|'(?=\w))+)")
_TEMPORARY = re.compile(r"(?:/private)?/var/folders/[^/\s]+/[^/\s]+")


def cleaner(
    home: Path | None = None, names: Sequence[str] | None = None, temporary: str | None = None
) -> Callable[[Any], Any]:
    """A function that takes whose machine this is out of a text, or out of all texts in a value of JSON's types.

    home, names, temporary: of this user and machine where they are None.
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
    """What this machine and its user are called, as far as the system says so."""
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
