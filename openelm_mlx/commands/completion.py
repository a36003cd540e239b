"""`openelm_mlx --print-completion bash`: a script for the shell's Tab completion of commands, options and values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ..errors import SettingError
from . import output

SHELLS = ("bash", "zsh")
DEMOS = "demo-openelm demo-gpt-oss"
HELP = 'print a script for Tab completion: eval "$(openelm_mlx --print-completion zsh)" in ~/.zshrc, after compinit'

_MODELS = "_openelm_mlx_models"
# A model is a demo's name, or a folder or file.
_FUNCTIONS = {
    "bash": f'{_MODELS}() {{ compgen -W "{DEMOS}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": f"{_MODELS}() {{ _alternative 'demos:demo:({DEMOS})' 'files:file:_files' }}",
}
_MODEL_NAMES = ("model", "source", "draft_model", "tokenizer")


class PrintCompletion(argparse.Action):
    """Print the script for a shell and exit. Raises SettingError if the library that writes it is missing."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        output.report(script(parser, values))
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that completes `parser`'s command line in "bash" or "zsh"."""
    try:
        import shtab
    except ImportError:
        raise SettingError(
            "--print-completion needs shtab, which is not installed: pip install 'openelm_mlx[completion]'."
        ) from None
    for action in _actions(parser):
        if action.choices is not None:
            continue
        if action.dest in _MODEL_NAMES:
            action.complete = dict.fromkeys(SHELLS, _MODELS)  # type: ignore[attr-defined]
        elif action.metavar == "FILE":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "FOLDER" or action.dest == "destination":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    functions: Any = _FUNCTIONS  # shtab takes one for each shell
    return shtab.complete(parser, shell, preamble=functions)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options and arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
