"""The command line: one file a command, and the only place that prints or reads argv.

Answers go to stdout and everything else to stderr. The exit code is 0, or 2 with one sentence for a user's mistake, or 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

from .. import __version__
from ..errors import UserError
from ..platforms import keep_float32, require_mlx, use_device
from . import completion, output

# Name -> module, in the order of the help. Each has HELP, add_arguments(parser) and run(args) -> exit code, and imports
# slow modules only in run, so that --help is instant.
COMMANDS = {
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "plan": "plan",
    "convert": "convert",
    "export": "export",
    "finetune": "finetune",
    "train": "train",
    "serve-layers": "serve_layers",
    "info": "info",
    "evaluate": "evaluate",
    "perplexity": "perplexity",
    "compare": "compare",
    "bench": "bench",
    "selfcheck": "selfcheck",
}

INTERRUPTED = 130

# Arguments without an option that are models.
_MODELS = ("source", "model", "sources", "models")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence instead of the whole usage, with the nearest name and the command's own -h."""

    def error(self, message: str) -> NoReturn:
        output.error(self.prog, f"{self._advised(message)} (see {self.prog} -h)")
        raise SystemExit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but unknown arguments are reported by the command itself, not by the program."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            getattr(found, "command", self).refuse(unknown)
        if isinstance(self._subparsers, argparse._ArgumentGroup) and not hasattr(found, "run"):
            self.error(f"there is no command: give {_listed(list(COMMANDS))}")
        return found

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with an error about the first of these unknown arguments."""
        first = unknown[0]
        if not first.startswith("-"):
            advice = "put a text of several words in quotes"
            if "--model" in self._option_string_actions:
                advice += ", and name a model with --model"
            self.error(f"{first!r} is one argument too many: {advice}")
        name, known = first.partition("=")[0], self._option_string_actions
        without_option = {each.dest for each in self._get_positional_actions()}
        if name == "--model" and not without_option.isdisjoint(_MODELS):
            self.error("there is no option --model: give the model without it")
        if name == "--parallel":
            instead = "; over several machines this command runs with --workers HOST:PORT" * ("--workers" in known)
            self.error(f"there is no option {name} here, only generate has it{instead}")
        self.error(f"there is no option {name}{_did_you_mean(name, known)}")

    def _advised(self, message: str) -> str:
        """argparse's own message, with the next step."""
        if wrong := re.search(r"^argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)$", message):
            name, value, choices = wrong.groups()
            known = [each.strip(" '") for each in choices.split(",")]
            subject = f"there is no command {value!r}" if name == "COMMAND" else f"{name} cannot be {value!r}"
            return f"{subject}{_did_you_mean(value, known) or f': give {_listed(known)}'}"
        if wrong := re.search(r"^argument (\S+): invalid (int|float) value: (.*)$", message):
            kind = "whole number" if wrong[2] == "int" else "number"
            return f"{wrong[1].split('/')[0]} is {wrong[3]}, which is not a {kind}"
        if wrong := re.search(r"^argument (\S+): expected one argument$", message):
            name = wrong[1].split("/")[0]
            return f"{name} needs a value; one that begins with a - is given as {name}=-..."
        return message


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f": did you mean {near[0]}?" if near else ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def main(argv: Sequence[str] | None = None, prog: str = "openelm_mlx") -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_program(prog, arguments, partial(build_parser, prog, arguments))


def run_program(prog: str, arguments: Sequence[str], make_parser: Callable[[], Parser]) -> int:
    """Run the command in `arguments` and return its exit code. prog: the program's name in errors.

    make_parser: its parser sets `run`, args -> exit code, and `command`, the parser whose options errors refer to.
    """
    if not output.open_streams():
        output.error(prog, "Standard output is closed, and the answer would go there.")
        return 2
    try:
        code = _run(prog, arguments, make_parser)
        output.flush()  # so that a failed write is reported here, not by Python at exit
        return code
    except SystemExit:  # help, the version, or a mistake in the arguments
        with contextlib.suppress(OSError):
            output.flush()
        output.discard()
        raise
    except BrokenPipeError:
        # The reader of our output has ended (`... | head`), so nothing is reported. Python would complain at exit.
        output.discard()
        return 1
    except OSError as error:
        output.discard()
        what = "The output cannot be written" if error.filename is None else f"{error.filename} cannot be used"
        output.error(prog, f"{what}: {error.strerror or error}.")
        return 2
    except Exception:  # noqa: BLE001  (whatever it is, it holds text that others wrote, and it is our mistake)
        import traceback

        output.say(traceback.format_exc().rstrip())
        output.error(prog, f"This is a bug in {prog}, not your mistake: please open an issue with all of the above.")
        return 70


def _run(prog: str, arguments: Sequence[str], make_parser: Callable[[], Parser]) -> int:
    try:
        args = make_parser().parse_args(arguments)
        output.speak_for(args.command)
        keep_float32()
        require_mlx()
        use_device()
        return args.run(args)
    except UserError as error:
        output.error(prog, str(error))
        return 2
    except KeyboardInterrupt:
        output.say()
        return INTERRUPTED


def build_parser(prog: str, arguments: Sequence[str] = ()) -> Parser:
    """The parser of all commands; only of the one named first, if there is one, to import only that."""
    parser = Parser(prog=prog, description="Run Apple OpenELM and OpenAI gpt-oss models on Apple MLX.")
    parser.add_argument("--version", action="version", version=f"openelm_mlx {__version__}", help="print the version")
    parser.add_argument(
        "--print-completion",
        action=completion.PrintCompletion,
        choices=completion.SHELLS,
        metavar="SHELL",
        help=completion.HELP,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=False, parser_class=Parser)
    wanted = [name for name in arguments[:1] if name in COMMANDS] or list(COMMANDS)
    for name in wanted:
        module = importlib.import_module(f".{COMMANDS[name]}", __name__)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    return parser
