"""The command line: one file a command, and the only place that prints or reads argv.

Answers go to stdout and everything else to stderr. The exit code is 0, or 2 with one sentence when something that the
user gave is wrong, or 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import UserError
from ..platforms import keep_float32, require_mlx, use_device

# Name -> module, in the order of the help. Each has HELP, add_arguments(parser) and run(args) -> exit code, and imports
# what is slow only in run, so that --help is instant.
COMMANDS = {
    "generate": "generate",
    "chat": "chat",
    "plan": "plan",
    "convert": "convert",
    "info": "info",
    "bench": "bench",
    "selfcheck": "selfcheck",
    "bench-streaming": "bench_streaming",
    "bench-memory": "bench_memory",
}

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None, prog: str = "openelm_mlx") -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser(prog, arguments).parse_args(arguments)
        keep_float32()
        require_mlx()
        use_device()
        return args.run(args)
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`... | head`): nobody is left to tell. Python would complain at exit.
        _discard_output()
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        _discard_output()
        print(f"{prog}: The output cannot be written: {error.strerror}.", file=sys.stderr)
        return 2


def _discard_output() -> None:
    """Send what is left in stdout's buffer nowhere: Python would try to write it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser(prog: str, arguments: Sequence[str] = ()) -> Parser:
    """The parser of all commands; of only the one named first, when there is one, to import no more than that."""
    parser = Parser(prog=prog, description="Run Apple OpenELM and OpenAI gpt-oss models on Apple MLX.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    wanted = [name for name in arguments[:1] if name in COMMANDS] or list(COMMANDS)
    for name in wanted:
        module = importlib.import_module(f".{COMMANDS[name]}", __name__)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
