"""Option names in errors as they are typed on the command line.

Errors and plans name options as a program does: `dense_bits=8`, `memory_limit="8GB"`, `context_length is 0`. Here they are
rewritten to the running command's options: `--dense-bits 8`, `--memory-limit 8GB`, `--context-length is 0`. The names come
from the command's own parser. A name in quotes, in a path or in a longer word is left alone, and so is one that the command
does not have.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping

# Python names whose option has another name.
_OTHER_NAMES = {
    "schema": "--json-schema",
    "prefix_cache": "--prompt-cache",
    "draft": "--draft-model",
    "max_file_bytes": "--max-file-size",
    "instructions": "--system",
    "allow_unsandboxed": "--allow-unsandboxed",
}

# An apostrophe inside a word is not a quote.
_QUOTED = r"(?<!\w)'[^'\n]*'(?!\w)" + r'|"[^"\n]*"'
_VALUE = r"'[^'\n]*'" + r'|"[^"\n]*"'
# name=value, name= alone, or a name that is not an English word.
_NAME = rf"""(?<![\w./\\'"=-])(?P<name>[a-z][a-z0-9_]*)(?:=(?P<value>{_VALUE}|[\w.+-]*[\w%]|(?=\W|$))|(?![\w/\\'"=-]|\.\w))"""
# A sentence that begins with a name is about the option, even if the name is an English word.
_FOUND = re.compile(rf"^(?P<first>[a-z]+)(?= (?:is|has|must)\b)|(?:{_QUOTED})|{_NAME}")

Flags = Mapping[str, str]


def flags_of(parser: argparse.ArgumentParser) -> Flags:
    """Python name -> option as it is typed, for a command's options."""
    flags: dict[str, str] = {}
    for action in parser._actions:
        long = [each for each in action.option_strings if each.startswith("--")]
        if long and action.dest != "help" and action.help is not argparse.SUPPRESS:
            flags.setdefault(action.dest, long[0])
    known = set(flags.values())
    return {**flags, **{name: flag for name, flag in _OTHER_NAMES.items() if flag in known}}


def in_flags(text: str, flags: Flags) -> str:
    """`text` with the names of options as the command line has them.

    in_flags("pass dense_bits=8", {"dense_bits": "--dense-bits"})   # "pass --dense-bits 8"
    """

    def typed(found: re.Match[str]) -> str:
        name, value = found["name"] or found["first"], found["value"]
        if name is None or name not in flags:
            return found[0]
        if value is None:
            is_a_name = "_" in name or found["first"] is not None
            return flags[name] if is_a_name else found[0]
        value = value.strip("'\"")
        return flags[name] if value in ("", "True") else f"{flags[name]} {shlex.quote(value)}"

    return _FOUND.sub(typed, text)
