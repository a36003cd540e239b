"""`python -m openelm_mlx chat`: a conversation in the terminal, with either family of models.

Input is read by prompt_toolkit (history, editing, several lines) if standard input is a terminal, else line by line.
Answers go to stdout; the prompt, reasoning and everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing, nullcontext, suppress
from typing import TYPE_CHECKING

from ..errors import PromptError, SettingError, UserError
from . import INTERRUPTED, output
from .answering import (
    acceptance_clause,
    add_answer_arguments,
    add_draft_arguments,
    add_form_arguments,
    add_reasoning_arguments,
    answer_options,
)
from .generate import check_draft_options, experts_read, prepare_draft, read_form
from .interrupts import Interrupts
from .options import (
    add_model_arguments,
    add_sampling_arguments,
    add_worker_arguments,
    bits_asked_for,
    load_options,
    sampling_options,
)
from .output import answer, dimmed, end_answer, end_dimmed, say, typed
from .reader import Command, LineReader, Reader, reader_for_terminal

if TYPE_CHECKING:
    from ..conversation import Chat, Done, Event
    from ..decoding.drafts import Drafts
    from ..models import Model

HELP = "talk with a model in the terminal"

COMMANDS = (
    Command("/help", "", "this list"),
    Command("/reset", "", "start the conversation again"),
    Command("/save", "FILE", "save the conversation"),
    Command("/save!", "FILE", "save it, replacing any FILE"),
    Command("/load", "FILE", "continue a saved one"),
    Command("/system", "TEXT", "instructions for the model (nothing: none)"),
    Command("/effort", "low|medium|high", "how long gpt-oss thinks"),
    Command("/stats", "", "tokens and times of the last answer"),
    Command("/exit", "", "leave (or Ctrl-D)"),
)

COMMANDS_HELP = "\n".join(
    [
        *(f"{f'{each.name} {each.argument}':<24}{each.help}" for each in COMMANDS),
        "Tab completes them. Alt-Enter or a \\ at the end of a line starts a new line; Ctrl-C stops an answer.",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_arguments(parser.add_argument_group("model"))
    add_worker_arguments(parser.add_argument_group("several machines"))
    chat = parser.add_argument_group("chat")
    chat.add_argument("--system", metavar="TEXT", help="instructions for the model (system prompt)")
    chat.add_argument(
        "--reasoning-effort", choices=["low", "medium", "high"], help="how long gpt-oss thinks (default: medium)"
    )
    chat.add_argument(
        "--tools",
        default="",
        metavar="NAMES",
        help="tools that gpt-oss may call, comma-separated: calculator, python, files=DIR, patch=DIR, mcp=SERVER",
    )
    chat.add_argument(
        "--allow-unsandboxed", action="store_true", help="run python without a sandbox if this machine has none"
    )
    chat.add_argument(
        "--max-rounds", type=int, default=16, metavar="N", help="let it call tools N times a turn (default: 16)"
    )
    chat.add_argument("--time-limit", type=float, metavar="SECONDS", help="end a turn after SECONDS")
    chat.add_argument("--load", metavar="FILE", help="continue a saved conversation")
    chat.add_argument("--no-history", action="store_true", help="do not save what is typed for the next session")
    sampling = parser.add_argument_group("sampling")
    add_sampling_arguments(sampling, "what the context has room for")
    add_answer_arguments(sampling)
    add_draft_arguments(parser)
    add_form_arguments(parser, "every answer")
    shown = parser.add_argument_group("output")
    add_reasoning_arguments(shown, "shown")
    shown.add_argument("--quiet", "-q", action="store_true", help="print only answers")


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends. Returns the exit code."""
    from ..decoding.sampling import SamplingParams
    from ..tools.toolbox import Toolbox, parse_names

    output.also_named({"overwrite": "/save!", "instructions": "/system"})
    check_draft_options(args)
    bits_asked_for(args)
    form = read_form(args)
    sampling = SamplingParams(
        **sampling_options(args)
    )  # before the weights are read, so that a bad option is reported at once
    parse_names(args.tools)
    from ..conversation import Chat
    from ..generate import stream_generate
    from ..loading import prepare
    from ..text.unicode import whole_characters

    prepared = prepare(args.model, **load_options(args))
    tokenizer = prepared.tokenizer
    count = None if tokenizer is None else lambda text: len(tokenizer.encode(whole_characters(text)))
    with Toolbox(args.tools, allow_unsandboxed=args.allow_unsandboxed, count_tokens=count) as toolbox:

        def begun(model: Model, draft: Drafts | None) -> Chat:
            chat = Chat(
                model,
                tokenizer,
                instructions=args.system,
                tools=toolbox.tools,
                reasoning_effort=args.reasoning_effort,
                sampling=sampling,
                max_tokens=args.max_tokens,
                max_rounds=args.max_rounds,
                time_limit=args.time_limit,
                options={**answer_options(args), **form, "draft": draft},
            )
            if args.load is not None:
                chat.load(args.load)
            return chat

        # Errors are reported before the weights are read, which takes half a minute for a large model.
        draft, load_draft = prepare_draft(args)
        checked = begun(prepared.model, draft)
        with suppress(PromptError):  # only the options are checked; the prompt is not known yet
            stream_generate(
                prepared.model, tokenizer, "Hello", max_tokens=args.max_tokens, sampling=sampling, **checked.options
            )
        model, _ = prepared.read()
        chat = begun(model, load_draft())
        reader: Reader = reader_for_terminal(args.no_history, COMMANDS) if sys.stdin.isatty() else LineReader()
        screen = Screen(chat, quiet=args.quiet, show_reasoning=args.show_reasoning is not False)
        for note in toolbox.notes:
            screen.say(note)
        if sys.stdin.isatty():
            screen.say(f"{args.model}. /help lists the commands, Ctrl-D ends the chat.")
        return talk(chat, reader, screen)


def talk(chat: Chat, reader: Reader, screen: Screen) -> int:
    """Read and answer until the input ends. After an error message the chat goes on; without a terminal it returns 2."""
    exit_code = 0
    with Interrupts() as interrupts:
        texts = iter(reader)
        while True:
            try:
                # At a terminal, the prompt itself handles Ctrl-C.
                with nullcontext() if reader.is_interactive else interrupts.armed():
                    text = next(texts, None)
                if text is None:
                    return exit_code
                with interrupts.armed():
                    is_answered = respond(chat, screen, text)
                if is_answered is None:
                    return exit_code
                if not reader.is_interactive and not is_answered:
                    exit_code = 2
            except UserError as error:
                if reader.is_interactive:
                    screen.say(typed(str(error)), always=True)
                else:
                    output.error("openelm_mlx", str(error))
                exit_code = 0 if reader.is_interactive else 2
            except KeyboardInterrupt:
                screen.say("\n[stopped]")
                if not reader.is_interactive:
                    return INTERRUPTED


def respond(chat: Chat, screen: Screen, text: str) -> bool | None:
    """Run a command, or answer a message; return whether it succeeded, or None to end the chat."""
    if text.startswith("/"):
        return True if command(chat, screen, text) else None
    return screen.answer(text) if text.strip() else True


def _unquoted(name: str) -> str:
    """A file's name without the quotes that a shell would have taken away."""
    is_quoted = len(name) > 1 and name[0] == name[-1] and name[0] in "\"'"
    return name[1:-1] if is_quoted else name


def command(chat: Chat, screen: Screen, text: str) -> bool:
    """Run a command with a slash; return whether the chat goes on."""
    name, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name == "/help":
        screen.say(COMMANDS_HELP, always=True)
    elif name == "/reset":
        chat.reset()
        screen.say("The conversation starts again.")
    elif name in ("/save", "/save!"):
        overwrite = name == "/save!" or rest.endswith(" --overwrite")
        rest = _unquoted(rest.removesuffix(" --overwrite").rstrip())
        if not rest:
            raise SettingError(f"{name} needs a file: {name} chat.json")
        chat.save(rest, overwrite=overwrite)
        screen.say(f"Saved to {rest}: {_count(len(chat.messages), 'message')}.")
    elif name == "/load":
        rest = _unquoted(rest)
        if not rest:
            raise SettingError("/load needs a file: /load chat.json")
        chat.load(rest)
        screen.say(f"Loaded {rest}: {_count(len(chat.messages), 'message')}.")
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
        raise SettingError("Only gpt-oss has a reasoning effort; this is an OpenELM model.")
    if effort not in ("low", "medium", "high"):
        raise SettingError(f"/effort needs low, medium or high, not {effort!r}.")
    chat.reasoning_effort = effort


class Screen:
    """Shows a turn: the answer on stdout, everything else on stderr."""

    def __init__(self, chat: Chat, quiet: bool = False, show_reasoning: bool = True) -> None:
        self.chat, self.quiet, self.show_reasoning = chat, quiet, show_reasoning
        self.last: Done | None = None

    def answer(self, text: str) -> bool:
        """Send `text` to the model and show the turn; return whether there was an answer. Ctrl-C ends it and is raised."""
        from ..conversation import Done

        kind, wrote_answer = "", False
        # Closed at once when left early, so that the answer so far is in the history.
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
        done = self.last
        assert done is not None
        if done.no_answer is not None:  # shown even with --quiet
            self.say(f"[no answer: {typed(done.no_answer)}]", always=True)
            return False
        if done.finish_reason != "stop":
            self.say(f"[ended: {self._ending(done)}]")
        elif not wrote_answer:
            self.say("[no answer]")
        return True

    def _ending(self, done: Done) -> str:
        """Why an answer is incomplete, and what to change."""
        limit, chat = done.finish_reason, self.chat
        if limit == "length" and chat.max_tokens is not None and done.num_tokens >= chat.max_tokens:
            return f"the token limit was reached; raise --max-tokens ({chat.max_tokens})"
        if limit == "length":
            return f"the context of {chat.model.context_length:,} tokens is full; ask it to go on"
        return f"the time limit was reached; raise --time-limit ({chat.time_limit:g})"

    def _show(self, event: Event) -> bool:
        """Show one event; return whether it was part of the answer."""
        from ..conversation import Answer, Notice, Reasoning, ToolCall, ToolResult

        if isinstance(event, Answer):
            answer(event.text)
            return True
        if isinstance(event, Reasoning) and self.show_reasoning and not self.quiet:
            dimmed(event.text)
        elif isinstance(event, ToolCall) and event.is_done:
            self._dimmed(f"[{event.name} {event.arguments}]")
        elif isinstance(event, ToolResult):
            self._dimmed(f"[{'failed: ' if event.is_error else '= '}{_one_line(event.text)}]")
        elif isinstance(event, Notice) and not event.is_no_answer:
            self.say(f"[{event.text}]")
        return False

    def _end_of(self, kind: str) -> None:
        """The line break after the last piece of one kind of event."""
        if kind == "Answer":
            end_answer()
        elif kind == "Reasoning" and self.show_reasoning and not self.quiet:
            end_dimmed()

    def _dimmed(self, text: str) -> None:
        if not self.quiet:
            dimmed(f"{text}\n")

    def say(self, text: str, always: bool = False) -> None:
        """A line for the person, not of the model."""
        if always or not self.quiet:
            say(text)

    def statistics(self) -> str:
        """What the last answer took, and how full the context is."""
        if self.last is None or self.last.statistics is None:
            return "There is no answer yet."
        s = self.last.statistics
        chat = self.chat
        forgotten = f"{_count(chat.num_forgotten, 'turn')} forgotten; " if chat.num_forgotten else ""
        return (
            f"{s.prompt_tokens} prompt tokens, {s.time_to_first_token:.2f} s to the first token; "
            f"{self.last.num_tokens} tokens at {s.decode_tps:.1f} tokens/s, "
            f"{_count(self.last.num_calls, 'tool call')}; "
            f"{acceptance_clause(s, chat.options.get('draft') is not None)}{experts_read(s)}{forgotten}"
            f"peak memory {s.peak_memory_bytes / 1e6:,.0f} MB; "
            f"{s.prompt_tokens + s.completion_tokens:,} of {chat.model.context_length:,} tokens of context used."
        )


def _one_line(text: str, most: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
