"""Reading a chat's input: from a terminal, with history, editing and completion, or line by line from a pipe."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..text.unicode import whole_characters
from .output import ask, can_redraw, say, terminal


class Command(NamedTuple):
    """A chat command with a slash. argument: "FILE" or the choices, for help and completion."""

    name: str
    argument: str
    help: str

    @property
    def choices(self) -> Sequence[str]:
        """The words that may follow, where there are few."""
        return self.argument.split("|") if "|" in self.argument else ()


class Reader(Protocol):
    """The user's messages, one after the other. is_interactive: the user can correct a mistake and go on."""

    is_interactive: bool

    def __iter__(self) -> Iterator[str]: ...


class LineReader:
    """Standard input that is not a terminal: a message a line; a line that ends in a backslash goes on in the next."""

    is_interactive = False

    def __iter__(self) -> Iterator[str]:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # bytes that are not text do not end a chat
        pending = ""
        for line in sys.stdin:
            line = line.rstrip("\n")
            if line.endswith("\\"):
                pending += line[:-1] + "\n"
                continue
            yield pending + line
            pending = ""
        if pending:
            yield pending


class PlainTerminalReader:
    """A terminal without control sequences (TERM=dumb, as in Emacs): a message a line, as in a pipe."""

    is_interactive = True

    def __iter__(self) -> Iterator[str]:
        pending = ""
        while True:
            ask("  " if pending else "> ")
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:  # clears the message
                say()
                pending = ""
                continue
            if not line:
                say()
                return
            line = line.rstrip("\n")
            if line.endswith("\\"):
                pending += line[:-1] + "\n"
                continue
            message, pending = pending + line, ""
            yield message


def reader_for_terminal(no_history: bool, commands: Sequence[Command]) -> Reader:
    """The reader that the terminal supports."""
    return TerminalReader(no_history, commands) if can_redraw(terminal()) else PlainTerminalReader()


class TerminalReader:
    """A terminal, with history, editing and several lines."""

    is_interactive = True

    def __init__(self, no_history: bool = False, commands: Sequence[Command] = ()) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.output import create_output

        class WholeHistory(FileHistory):
            """History without lone surrogates, which a terminal gives for invalid bytes and a file cannot store."""

            def store_string(self, string: str) -> None:
                super().store_string(whole_characters(string))

        file = None if no_history else history_file()
        history: History = InMemoryHistory() if file is None else WholeHistory(str(file))
        self._session: PromptSession[str] = PromptSession(
            history=history, output=create_output(stdout=terminal()), key_bindings=_key_bindings(), multiline=True,
            prompt_continuation="  ", completer=_completer(commands), complete_while_typing=False,
        )  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                yield self._session.prompt("> ")
            except KeyboardInterrupt:
                continue  # Ctrl-C at the prompt clears the line
            except EOFError:
                return


def _completer(commands: Sequence[Command]) -> Any:
    """What Tab completes: a command with a slash, its choices, or the name of its file."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            name, space, rest = text.partition(" ")
            if not text.startswith("/") or "\n" in text:
                return
            if not space:
                for each in commands:
                    if each.name.startswith(name):
                        ending = " " if each.argument else ""
                        yield Completion(each.name + ending, -len(name), each.name, display_meta=each.help)
                return
            command = next((each for each in commands if each.name == name), None)
            for word in command.choices if command is not None else ():
                if word.startswith(rest):
                    yield Completion(word, -len(rest))
            if command is not None and command.argument == "FILE":
                yield from paths.get_completions(Document(rest, len(rest)), complete_event)

    return Commands()


def _key_bindings() -> Any:
    """Enter sends, unless the line ends in a backslash; Alt-Enter begins another line."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.newline()

    return bindings


def history_file() -> Path | None:
    """The file for the input history, readable only by this user; None if it cannot be kept."""
    from ..memory.stored import cache_folder

    file = cache_folder() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError:
        return None
    return file
