"""What the documentation's pages get when they are built: the help of every command, and code without links to it."""

import argparse
import re

from openelm_mlx.commands import COMMANDS, build_parser

# Links to files of the repository, which the site does not hold.
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, page, **_) -> str:
    """Called by mkdocs for each page."""
    if page.file.src_uri == "commands.md":
        markdown = markdown.replace("<!-- help of every command -->", "\n\n".join(map(help_of, COMMANDS)))
    return OUTSIDE.sub(lambda match: match[1], markdown)


def help_of(name: str) -> str:
    """One command's section: what `-h` prints, 100 columns wide."""
    parser = build_parser("openelm_mlx", [name])
    choices = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction)).choices
    command = choices[name]
    command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100, max_help_position=32)
    return f"## {name}\n\n```text\n{command.format_help().rstrip()}\n```"
