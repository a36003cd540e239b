"""`python -m openelm_mlx serve-layers`: some of a model's layers for another machine, which has the others."""

from __future__ import annotations

import argparse

from ..errors import SettingError
from .output import say

HELP = "serve a part of a model's layers to another Mac, which runs the model with --workers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--model", metavar="SOURCE",
        help="serve only this folder, file or repository (default: the demos, and what is in the Hugging Face cache here)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=7777, metavar="N", help="listen on this port (default: 7777)")
    parser.add_argument(
        "--host", metavar="ADDRESS",
        help="listen on this address only (default: every network of this machine with --secret-file, and this machine alone "
        "without)",
    )  # fmt: skip
    parser.add_argument(
        "--secret-file", metavar="FILE", help="a secret that both machines have a copy of, which nobody else can read"
    )
    parser.add_argument("--memory-limit", metavar="SIZE", help="for example 40GB (default: what the machine has)")
    parser.add_argument("--quiet", "-q", action="store_true", help="no lines on stderr")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    if not 0 <= args.port < 65536:
        raise SettingError(f"--port is {args.port}: give one from 1 to 65535, or 0 for any that is free.")
    from ..link.addresses import is_loopback
    from ..link.secret import read_secret
    from ..memory.machine import allow_open_files
    from ..memory.sizes import parse_memory
    from ..sources import Source
    from ..workers.parts import Parts
    from ..workers.server import Server

    def tell(line: str) -> None:
        if not args.quiet:
            say(line)

    secret = None if args.secret_file is None else read_secret(args.secret_file)
    allow_open_files()
    given = None if args.model is None else Source.open(args.model)
    server = Server(Parts(given, parse_memory(args.memory_limit)), args.host, args.port, secret, tell)
    what = "the demos and what is in the Hugging Face cache" if given is None else given.name
    where = "every machine that has the secret"
    if secret is None:
        where = "this machine alone (no --secret-file)"
    elif args.host is not None and is_loopback(args.host):
        where = f"this machine alone (--host {args.host})"
    tell(f"Serving layers of {what} on port {server.port}, to {where}. Ctrl-C ends it.")
    server.serve()
    return 0
