"""A conversation of several turns: questions, answers, and for gpt-oss reasoning and tool calls in between.

`Chat` keeps the messages and runs the turns; the text package builds prompts, and tokens come from the decoding loop of
`stream_generate`. Whatever ends a turn early (Ctrl-C, a limit, an error), the chat can go on.
"""

from __future__ import annotations

import json
import warnings
from collections import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..arguments import FLAG, NAME, PATH, checked_call
from ..decoding.grammar import engine_of
from ..decoding.prefix_cache import PrefixCache
from ..decoding.sampling import SamplingParams
from ..errors import NoAnswerWarning, PromptError, SettingError
from ..files import expanded, one_line, read_text
from ..outputs import json_with, write_output
from ..text.chat import HARMONY, PLAIN, render_chat
from ..text.conversation import DeveloperContent, Message, SystemContent, check_conversation
from ..text.harmony import HarmonyFormat
from ..text.unicode import whole_characters
from ..tools.calls import reason, shown_to_model
from ..tools.calls import run as run_tool
from ..tools.tool import Tool, ToolSet
from .history import (
    fewest_to_forget,
    result_of,
    turn_starts,
    without_old_results,
    without_oldest,
)

if TYPE_CHECKING:
    from ..models import Model
    from ..text.tokenizer import Tokenizer
from .events import Answer, Done, Event, Notice, ToolCall, ToolResult
from .settings import check_settings, refuse_stream_options
from .turn import Turn

_FORMAT = 1
_LARGEST_CHAT = 2**26  # bytes of a saved chat
_is_chat = json_with("openelm_mlx_chat")

# Room that is kept free for an answer: a quarter of the context, but in short contexts as much as reasoning often needs.
_SHARE_FOR_ANSWER, _USUAL_ANSWER = 4, 1024
# When turns are dropped, the others fill this share of the rest, so that the whole prompt is not recomputed every turn.
_SHARE_KEPT = 0.75


@refuse_stream_options
@checked_call("om.Chat", reasoning_effort=NAME)
@dataclass
class Chat:
    """A conversation with a model.

    When the context is full, the oldest turns are dropped, each as a whole. A turn without an answer is removed
    again unless tools ran in it, and turns that were dropped for it are restored.

    Attributes:
        instructions: The system prompt.
        tools: Functions or `Tool`s, for gpt-oss only.
        reasoning_effort: "low", "medium" or "high".
        max_tokens: Limit for one turn, all its completions together; None: what the context has room for.
        max_rounds: How many times in a turn the model may call tools.
        time_limit: Limit for one turn, in seconds.
        options: More keyword arguments of `stream_generate`.
        messages: The conversation so far, without instructions: Harmony messages; for OpenELM only with the roles
            user and assistant.

    Raises SettingError, ToolError, PromptError, and TokenizerError when the model has no tokenizer.
    """

    model: Model
    tokenizer: Tokenizer | None
    instructions: str | None = None
    tools: abc.Sequence[Tool | Callable[..., Any]] = ()
    reasoning_effort: str | None = None
    sampling: SamplingParams | None = None
    max_tokens: int | None = None
    max_rounds: int = 16
    time_limit: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    prefix_cache: PrefixCache | None = field(
        default_factory=PrefixCache
    )  # so that a turn computes only the new part of the prompt
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turn: Turn | None = None
        self._events: Iterator[Event] | None = None
        self.num_forgotten, self._has_told = 0, False  # turns, and whether it was said
        check_settings(self)
        self.tool_set = ToolSet(self.tools)
        assert self.tokenizer is not None
        self.is_harmony = self.tokenizer.chat_template == HARMONY
        if not self.is_harmony and self.tool_set:
            raise SettingError(
                f"OpenELM has no format for tools, so it cannot call {', '.join(self.tool_set.names)}: load a gpt-oss model."
            )
        if not self.is_harmony and self.reasoning_effort is not None:
            raise SettingError(
                f"reasoning_effort is {self.reasoning_effort!r}, and only gpt-oss's chat format has one: leave it out."
            )
        self._system()  # raises for an unknown reasoning effort
        if self.tool_set.formats:  # a gpt-oss model: others were refused above
            self.tool_set.check_ends(engine_of(self.tokenizer))
        self.tool_schemas = self.tool_set.schemas
        self._unfollowed = self.tool_set.unfollowed

    # --- one turn ---

    @checked_call("chat.ask", PromptError)
    def ask(self, text: str) -> str:
        """Say `text` and return the whole answer. If there is none, a NoAnswerWarning says why."""
        answer, no_answer = "", None
        for event in self.stream(text):
            if isinstance(event, Answer) and not event.is_preamble:
                answer += event.text
            elif isinstance(event, Done):
                no_answer = event.no_answer
        if no_answer is not None and not answer.strip():
            warnings.warn(no_answer, NoAnswerWarning, stacklevel=3)  # the caller is above the check of the call
        return answer

    @checked_call("chat.stream", PromptError)
    def stream(self, text: str) -> Iterator[Event]:
        """Say `text` and yield the events of the turn, the last of them `Done`.

        Closing the iterator, Ctrl-C, another question or `save` ends the turn; the answer so far stays in the history.
        """
        if not isinstance(text, str) or not text.strip():
            raise PromptError("The message is empty: write something.")
        self._end_turn()
        self.turn = turn = Turn(self, Message("user", whole_characters(text)))
        self._events = events = self._turn_events(turn)
        return events

    def _turn_events(self, turn: Turn) -> Iterator[Event]:
        try:
            turn.publish()
            yield from self._harmony_turn(turn) if self.is_harmony else self._plain_turn(turn)
            turn.settle()
            done = turn.done()
            if done.no_answer is not None:
                yield Notice(done.no_answer, is_no_answer=True)
            yield done
        finally:
            turn.settle()

    def _end_turn(self) -> None:
        """End a turn that was not read to its end. `settle` is repeated in case an interruption broke it off."""
        if self._events is not None:
            try:
                cast(Any, self._events).close()
            except ValueError:
                raise SettingError(
                    "The chat is in the middle of an answer: a tool cannot ask it another question."
                ) from None
        if self.turn is not None:
            self.turn.settle()
        self._events = self.turn = None

    def _harmony_turn(self, turn: Turn) -> Iterator[Event]:
        if self._unfollowed:  # said once
            names, self._unfollowed = ", ".join(self._unfollowed), []
            yield Notice(
                f"The schema of {names} cannot be enforced while a call is written; its calls are checked when complete"
            )
        while True:
            yield from self._make_room(turn)
            before = turn.num_messages
            yield from turn.completion()
            calls = [message for message in turn.messages[before:] if message.is_call]
            if turn.filled_context and not turn.has_said_more_than(before) and self._forget(turn, None):
                turn.take_back(before)
                yield from self._told_of_forgetting()
                continue
            if not calls or turn.ended_by is not None:
                return
            for call in calls:
                yield from self._call(turn, call)
            if turn.num_rounds >= self.max_rounds:
                turn.ended_by = "rounds"
                return

    def _call(self, turn: Turn, call: Message) -> Iterator[Event]:
        """Run the tool that a message calls, give the model its result, and show the user both."""
        assert call.recipient is not None
        found = self.tool_set.find(call.recipient)
        name = call.recipient if found is None else found[0]
        yield ToolCall(name, call.text, is_done=True)
        turn.num_begun += 1
        try:
            if found is None:
                known = ", ".join(self.tool_set.names) or "none at all"
                raise LookupError(f"there is no tool {call.recipient}; the tools are: {known}")
            text, is_error = run_tool(found[1], call.text), False
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a tool raises is news for the model
            text, is_error = f"Error: {reason(error)}", True
        most_tokens = self.model.context_length // _SHARE_FOR_ANSWER
        result = result_of(call, shown_to_model(text, most_tokens, self._count))
        turn.add([result])
        yield ToolResult(name, result.text, is_error)

    def _plain_turn(self, turn: Turn) -> Iterator[Event]:
        yield from self._make_room(turn)
        sequence = turn.begin(self._plain_prompt(self.messages))
        for chunk in () if sequence is None else turn.chunks(sequence):
            turn.said += chunk.text
            if chunk.text:
                yield Answer(chunk.text)

    # --- the context ---

    def _make_room(self, turn: Turn) -> Iterator[Event]:
        """Drop the oldest turns, each as a whole, when the context has too little room for an answer."""
        if self.options.get("sliding_window") is not None:
            return
        context, limit = self.model.context_length, turn.num_left
        room = context // _SHARE_FOR_ANSWER
        if self.is_harmony:
            room = max(room, min(context // 2, _USUAL_ANSWER))
        most = context - (room if limit is None else min(room, limit))
        if len(self._prompt(self.messages)) <= most:
            return
        if turn.num_messages == 1:
            self._check_question()
        if self._forget(turn, most):
            yield from self._told_of_forgetting()
        if len(self._prompt(self.messages)) > most:
            turn.replace(without_old_results(turn.messages))

    def _check_question(self) -> None:
        """Refuse a question that is too long by itself, before any turn is dropped for it."""
        alone = without_oldest(self.messages, len(turn_starts(self.messages)) - 1)
        context, needed = self.model.context_length, len(self._prompt(alone))
        if needed >= context:
            raise PromptError(
                f"The message needs {needed:,} tokens by itself, and the context holds {context:,}: shorten it. Nothing "
                "of the conversation is lost."
            )

    def _forget(self, turn: Turn, most_tokens: int | None) -> bool:
        """Drop all turns before this one, or enough to leave less than `most_tokens`; return whether there were any."""
        before, told = turn.others, (self.num_forgotten, self._has_told)

        def bring_back() -> None:
            self.messages[:] = before
            self.num_forgotten, self._has_told = told

        if most_tokens is None:
            number = max(0, len(turn_starts(self.messages)) - 1)
        else:
            kept = int(most_tokens * _SHARE_KEPT)
            number = fewest_to_forget(self.messages, kept, lambda messages: len(self._prompt(messages)))
        if number and turn.bring_back is None:
            turn.bring_back = bring_back
        self.messages[:] = without_oldest(self.messages, number)
        self.num_forgotten += number
        return number > 0

    def _told_of_forgetting(self) -> Iterator[Event]:
        """The notice about dropped turns, given only once: a long conversation drops turns again and again."""
        if self._has_told:
            return
        self._has_told = True
        turns = "the oldest turn is" if self.num_forgotten == 1 else f"the oldest {self.num_forgotten} turns are"
        yield Notice(
            f"The context of {self.model.context_length:,} tokens is full: {turns} forgotten, and others will be as the "
            "chat goes on."
        )

    def _count(self, text: str) -> int:
        assert self.tokenizer is not None
        return len(self.tokenizer.encode(text))

    # --- prompts ---

    def _prompt(self, messages: abc.Sequence[Message]) -> list[int]:
        return self.harmony_prompt(messages) if self.is_harmony else self._plain_prompt(messages)

    def harmony_prompt(self, messages: abc.Sequence[Message]) -> list[int]:
        """The prompt for gpt-oss's next completion after these messages."""
        head = [Message("system", self._system())]
        developer = DeveloperContent(self.instructions, self.tool_set.functions, self.tool_set.namespaces)
        if developer != DeveloperContent():
            head.append(Message("developer", developer))
        return HarmonyFormat(_WholeText(self.any_tokenizer)).render_for_completion([*head, *messages])

    def _system(self) -> SystemContent:
        effort = self.reasoning_effort or "medium"
        return SystemContent(
            current_date=f"{date.today():%Y-%m-%d}", reasoning_effort=effort, tools=self.tool_set.built_in
        )

    def _plain_prompt(self, messages: abc.Sequence[Message]) -> list[int]:
        tokenizer = self.any_tokenizer
        texts = [whole_characters(message.text) for message in messages]
        if tokenizer.chat_template == PLAIN:  # a base model continues what was written
            return tokenizer.encode_prompt(" ".join(texts))
        instructions = whole_characters(self.instructions or "")
        head = [] if self.instructions is None else [{"role": "system", "content": instructions}]
        turns = [{"role": each.role, "content": text} for each, text in zip(messages, texts, strict=True)]
        return render_chat([*head, *turns], tokenizer, tokenizer.chat_template)

    @property
    def any_tokenizer(self) -> Tokenizer:
        """The tokenizer, which a chat always has."""
        assert self.tokenizer is not None
        return self.tokenizer

    # --- the whole conversation ---

    def reset(self) -> None:
        """Start the conversation again; instructions and settings stay."""
        self._end_turn()
        self.messages.clear()
        self.num_forgotten, self._has_told = 0, False

    @checked_call("chat.save", path=PATH, overwrite=FLAG)
    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Save messages, instructions and reasoning effort to a JSON file, completely or not at all.

        An existing file is replaced if it holds a saved chat, or with overwrite. Folders are not made. Raises
        DestinationError.
        """
        self._end_turn()
        content = {
            "openelm_mlx_chat": _FORMAT,
            "instructions": self.instructions,
            "reasoning_effort": self.reasoning_effort,
            "messages": [{**vars(message), "content": message.text} for message in self.messages],
        }
        text = whole_characters(json.dumps(content, ensure_ascii=False, indent=2))
        # A conversation is private.
        return write_output(path, text, "The chat", _is_chat, overwrite, mode=0o600)

    @checked_call("chat.load", path=PATH)
    def load(self, path: str | Path) -> None:
        """Replace this conversation with a saved one. Raises PromptError when the file does not hold one."""
        path = expanded(path, PromptError)
        text = read_text(path, PromptError, _LARGEST_CHAT)
        try:
            content = json.loads(text)
            if content["openelm_mlx_chat"] != _FORMAT:
                raise ValueError(f"its format is {content['openelm_mlx_chat']!r}")
            messages = [Message(**each) for each in content["messages"]]
            check_conversation(messages)
            for name in ("instructions", "reasoning_effort"):
                if not isinstance(content[name], (str, type(None))):
                    raise ValueError(f"its {name} are not text")
            settings = replace(
                self, messages=messages, instructions=content["instructions"],
                reasoning_effort=content["reasoning_effort"] if self.is_harmony else None,
            )  # fmt: skip
        except PromptError as error:
            raise PromptError(f"The chat in {path} cannot be continued. {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = {
                "JSONDecodeError": "it is not valid JSON",
                "RecursionError": "it is not valid JSON",
                "UnicodeDecodeError": "it is not text",
                "ValueError": one_line(error),
                "KeyError": f"{one_line(error)} is missing",
            }.get(type(error).__name__, "it is not in the format of a saved chat")
            raise PromptError(
                f"{path} is not a saved chat ({reason}): give a file that /save or Chat.save wrote."
            ) from None
        self._end_turn()
        self.messages, self.instructions = settings.messages, settings.instructions
        self.reasoning_effort = settings.reasoning_effort
        self.num_forgotten, self._has_told = 0, False


class _WholeText:
    """A tokenizer that encodes lone surrogates as U+FFFD, so that text of tools, files and saved chats never raises."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_tokens: Mapping[str, int] = tokenizer.special_tokens

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        return self._tokenizer.encode(whole_characters(text), continuation=continuation)

    def token_bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)
