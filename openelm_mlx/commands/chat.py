"""`python -m openelm_mlx chat`: a conversation in the terminal, with either family of models.

What is typed is read by prompt_toolkit (history, editing, several lines) where standard input is a terminal, else line
by line. Answers go to stdout; the prompt, reasoning and everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import DestinationError, SettingError, UserError
from . import INTERRUPTED
from .generate import experts_read, print_dimmed
from .options import add_model_arguments, add_sampling_arguments, load_options, sampling_options

if TYPE_CHECKING:
    from ..agents.chat import Chat, Done, Event

HELP = "talk with a model in the terminal"

COMMANDS_HELP = """\
/help                 this list
/reset                forget what was said
/save FILE            save the conversation     /load FILE   go on with a saved one
/system TEXT          instructions for the model (nothing: none)
/effort low|medium|high   how long gpt-oss thinks
/stats                tokens and times of the last answer
/exit                 leave (or Ctrl-D)
Alt-Enter or a \\ at the end of a line begins another line; Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_arguments(parser.add_argument_group("model"))
    chat = parser.add_argument_group("chat")
    chat.add_argument("--system", metavar="TEXT", help="instructions that stand before the conversation")
    chat.add_argument(
        "--reasoning-effort", choices=["low", "medium", "high"], help="how long gpt-oss thinks (default: medium)"
    )
    chat.add_argument(
        "--tools",
        default="",
        metavar="NAMES",
        help="tools that gpt-oss may call, with commas: calculator, python, files=DIR, patch=DIR, mcp=SERVER",
    )
    chat.add_argument(
        "--allow-unsandboxed", action="store_true", help="let python run where this machine has no sandbox for it"
    )
    chat.add_argument("--load", metavar="FILE", help="go on with a saved conversation")
    chat.add_argument("--no-history", action="store_true", help="do not keep what is typed for the next time")
    add_sampling_arguments(parser.add_argument_group("sampling"), max_tokens=2048)
    output = parser.add_argument_group("output")
    output.add_argument("--hide-reasoning", action="store_true", help="do not show gpt-oss's reasoning")
    output.add_argument("--quiet", "-q", action="store_true", help="nothing but answers")


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends. Returns the exit code."""
    from ..agents.toolbox import Toolbox, parse_names
    from ..decoding.sampling import SamplingParams

    sampling = SamplingParams(**sampling_options(args))  # before the weights are read: a bad option costs no waiting
    parse_names(args.tools)
    from ..agents.chat import Chat
    from ..loading import load

    model, tokenizer = load(args.model, **load_options(args))
    count = None if tokenizer is None else lambda text: len(tokenizer.encode(text))
    with Toolbox(args.tools, allow_unsandboxed=args.allow_unsandboxed, count_tokens=count) as toolbox:
        chat = Chat(
            model,
            tokenizer,
            instructions=args.system,
            tools=toolbox.tools,
            reasoning_effort=args.reasoning_effort,
            sampling=sampling,
            max_tokens=args.max_tokens,
        )
        if args.load is not None:
            chat.load(args.load)
        reader: Reader = TerminalReader(args.no_history) if sys.stdin.isatty() else LineReader()
        screen = Screen(chat, quiet=args.quiet, show_reasoning=not args.hide_reasoning)
        if sys.stdin.isatty():
            screen.say(f"{args.model}. /help lists the commands, Ctrl-D ends the chat.")
        return talk(chat, reader, screen)


def talk(chat: Chat, reader: Reader, screen: Screen) -> int:
    """Read, answer, and so on. A mistake is a sentence and the chat goes on; without a terminal it ends with code 2."""
    exit_code = 0
    for text in reader:
        try:
            if text.startswith("/"):
                if not command(chat, screen, text):
                    break
            elif text.strip():
                screen.answer(text)
        except UserError as error:
            screen.say(str(error) if reader.is_interactive else f"openelm_mlx: {error}", always=True)
            exit_code = 0 if reader.is_interactive else 2
        except KeyboardInterrupt:
            screen.say("\n[stopped]")
            if not reader.is_interactive:
                return INTERRUPTED
    return exit_code


def command(chat: Chat, screen: Screen, text: str) -> bool:
    """Do what a line with a slash says; whether the chat goes on."""
    name, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name == "/help":
        screen.say(COMMANDS_HELP, always=True)
    elif name == "/reset":
        chat.reset()
        screen.say("The conversation begins anew.")
    elif name in ("/save", "/load"):
        if not rest:
            raise SettingError(f"{name} needs a file: {name} chat.json")
        if name == "/save" and Path(rest).expanduser().is_dir():
            raise DestinationError(f"{rest} is a folder: name a file in it.")
        (chat.save if name == "/save" else chat.load)(rest)
        screen.say(f"{'Saved to' if name == '/save' else 'Loaded'} {rest}: {_count(len(chat.messages), 'message')}.")
    elif name == "/system":
        chat.instructions = rest or None
        screen.say("The instructions are set." if rest else "There are no instructions now.")
    elif name == "/effort":
        set_effort(chat, rest)
        screen.say(f"Reasoning effort is {rest}.")
    elif name == "/stats":
        screen.say(screen.statistics(), always=True)
    else:
        raise SettingError(f"There is no command {name}: /help lists them.")
    return True


def set_effort(chat: Chat, effort: str) -> None:
    """Change how long gpt-oss thinks. Raises SettingError for another effort or another model."""
    if not chat.is_harmony:
        raise SettingError("Only gpt-oss has a reasoning effort, and this is an OpenELM model.")
    if effort not in ("low", "medium", "high"):
        raise SettingError(f"/effort is followed by low, medium or high, and not by {effort!r}.")
    chat.reasoning_effort = effort


class Screen:
    """What is shown of a turn: the answer on stdout, everything else on stderr."""

    def __init__(self, chat: Chat, quiet: bool = False, show_reasoning: bool = True) -> None:
        self.chat, self.quiet, self.show_reasoning = chat, quiet, show_reasoning
        self.last: Done | None = None

    def answer(self, text: str) -> None:
        """Say `text` to the model and show what comes; Ctrl-C ends the answer and is passed on."""
        from ..agents.chat import Done

        kind, wrote_answer = "", False
        # Closed at once when it is left early, so that what was said until then is in the history.
        with closing(self.chat.stream(text)) as events:  # type: ignore[type-var]
            try:
                for event in events:
                    if isinstance(event, Done):
                        self.last = event
                        continue
                    if type(event).__name__ != kind and kind:
                        self._end_of(kind)
                    kind = type(event).__name__
                    wrote_answer |= self._show(event)
            finally:
                self._end_of(kind)
        if self.last is not None and self.last.finish_reason != "stop":
            self.say(f"[ended: {_ENDINGS[self.last.finish_reason]}]")
        elif not wrote_answer:
            self.say("[no answer]")

    def _show(self, event: Event) -> bool:
        """Show one event; whether it was a part of the answer."""
        from ..agents.chat import Answer, Notice, Reasoning, ToolCall, ToolResult

        if isinstance(event, Answer):
            sys.stdout.write(event.text)
            sys.stdout.flush()
            return True
        if isinstance(event, Reasoning) and self.show_reasoning and not self.quiet:
            print_dimmed(event.text)
        elif isinstance(event, ToolCall) and event.is_done:
            self._dimmed(f"[{event.name} {event.arguments}]")
        elif isinstance(event, ToolResult):
            self._dimmed(f"[{'failed: ' if event.is_error else '= '}{_one_line(event.text)}]")
        elif isinstance(event, Notice):
            self.say(f"[{event.text}]")
        return False

    def _end_of(self, kind: str) -> None:
        """The line break after the last piece of one kind of event."""
        if kind == "Answer":
            sys.stdout.write("\n")
            sys.stdout.flush()
        elif kind == "Reasoning" and self.show_reasoning and not self.quiet:
            print(file=sys.stderr)

    def _dimmed(self, text: str) -> None:
        if not self.quiet:
            print_dimmed(f"{text}\n")

    def say(self, text: str, always: bool = False) -> None:
        """A line for the person, not of the model."""
        if always or not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def statistics(self) -> str:
        """What the last answer took, and how full the context is."""
        if self.last is None or self.last.statistics is None:
            return "There is no answer yet."
        s = self.last.statistics
        return (
            f"{s.prompt_tokens} prompt tokens, {s.time_to_first_token:.2f} s to the first token; "
            f"{self.last.num_tokens} tokens at {s.decode_tps:.1f} tokens/s, {_count(self.last.num_calls, 'tool call')}; "
            f"{experts_read(s)}peak memory {s.peak_memory_bytes / 1e6:,.0f} MB; "
            f"{s.prompt_tokens + s.completion_tokens:,} of {self.chat.model.context_length:,} tokens of context used."
        )


_ENDINGS = {
    "length": "the limit of tokens was reached",
    "time": "the limit of time was reached",
    "rounds": "the limit of tool calls was reached",
}


class Reader(Protocol):
    """What the person says, one message after the other. is_interactive: a person who can try again."""

    is_interactive: bool

    def __iter__(self) -> Iterator[str]: ...


class LineReader:
    """Standard input that is no terminal: a message a line; a line that ends in a backslash goes on in the next."""

    is_interactive = False

    def __iter__(self) -> Iterator[str]:
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


class TerminalReader:
    """A terminal, with history, editing and several lines."""

    is_interactive = True

    def __init__(self, no_history: bool = False) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.output import create_output

        file = None if no_history else history_file()
        history: History = InMemoryHistory() if file is None else FileHistory(str(file))
        # On stderr: stdout has the answers and nothing else, wherever it goes.
        self._session: PromptSession[str] = PromptSession(
            history=history, output=create_output(stdout=sys.stderr), key_bindings=_key_bindings(), multiline=True,
            prompt_continuation="  ",
        )  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                yield self._session.prompt("> ")
            except KeyboardInterrupt:
                continue  # Ctrl-C at the prompt clears the line
            except EOFError:
                return


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
    """Where what was typed is kept, for this user's eyes only; None where nothing can be kept."""
    from ..memory.stored import cache_folder

    file = cache_folder() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError:
        return None
    return file


def _one_line(text: str, most: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
