"""A conversation that goes on: questions, answers, and for gpt-oss reasoning and tool calls in between.

`Chat` keeps the messages and decides what a turn does; what a prompt looks like is the text room's business, and tokens
come from `stream_generate`. Whatever ends a turn early (Ctrl-C, a limit, an error) leaves a chat that can go on.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decoding.grammar import engine_of
from ..decoding.prefix_cache import PrefixCache
from ..decoding.sampling import SamplingParams
from ..errors import DestinationError, PromptError, SettingError, TokenizerError, ToolError
from ..generate import Chunk, Statistics, stream_generate
from ..loading import no_tokenizer
from ..text.chat import HARMONY, PLAIN, render_chat
from ..text.conversation import DeveloperContent, Message, SystemContent, check_conversation
from ..text.harmony import HarmonyFormat
from .tool import Tool, ToolSet

if TYPE_CHECKING:
    from ..models import Model
    from ..text.tokenizer import Tokenizer

# What of a tool's result the model sees; the rest would push the conversation out of its context.
MOST_RESULT_CHARACTERS = 16_000
_FORMAT = 1


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks; not for the user unless asked for."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The model calls a tool. A piece of its arguments as it is written, or, with is_done, all of them."""

    name: str
    arguments: str
    is_done: bool = False


@dataclass(frozen=True)
class ToolResult:
    """What a tool said, as the model is told it."""

    name: str
    text: str
    is_error: bool = False


@dataclass(frozen=True)
class Answer:
    """A piece of the answer. is_preamble: said to the user before a tool call, and not the answer itself."""

    text: str
    is_preamble: bool = False


@dataclass(frozen=True)
class Notice:
    """A sentence about the conversation itself, for instance that its oldest part no longer fits."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of a turn. finish_reason: "stop", "length" (max_tokens, or the context is full), "time" or "rounds".

    statistics: of the last of the turn's completions. num_tokens: of all of them together.
    """

    finish_reason: str
    statistics: Statistics | None
    num_tokens: int
    num_calls: int


Event = Reasoning | ToolCall | ToolResult | Answer | Notice | Done


@dataclass
class Chat:
    """A conversation with a model.

    instructions: what other models call the system prompt. tools: functions or `Tool`s, for gpt-oss only.
    reasoning_effort: "low", "medium" or "high". max_tokens: of one turn, all its completions together. max_rounds: how
    many times in a turn the model may call tools. time_limit: seconds of a turn. messages: what was said, without
    instructions; Harmony messages, or for OpenELM the same with roles user and assistant.

    Raises SettingError, ToolError, and TokenizerError when the model has no tokenizer.
    """

    model: Model
    tokenizer: Tokenizer | None
    instructions: str | None = None
    tools: Sequence[Tool | Callable[..., Any]] = ()
    reasoning_effort: str | None = None
    sampling: SamplingParams | None = None
    max_tokens: int = 2048
    max_rounds: int = 16
    time_limit: float | None = None
    options: dict[str, Any] = field(default_factory=dict)  # more keyword arguments of `stream_generate`
    prefix_cache: PrefixCache | None = field(default_factory=PrefixCache)  # a turn computes what is new of the prompt
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise TokenizerError(no_tokenizer(self.model.spec))
        self.tool_set = ToolSet(self.tools)
        self._tool_schemas = self.tool_set.schemas
        self._unfollowed = self.tool_set.unfollowed
        self.is_harmony = self.tokenizer.chat_template == HARMONY
        if not self.is_harmony and self.tool_set:
            raise SettingError(
                f"OpenELM has no format for tools, so it cannot call {', '.join(self.tool_set.names)}: load a gpt-oss model."
            )
        if not self.is_harmony and self.reasoning_effort is not None:
            raise SettingError(
                f"reasoning_effort is {self.reasoning_effort!r}, and only gpt-oss's chat format has one: leave it out."
            )
        for name in ("max_tokens", "max_rounds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"{name} is {value!r}: it must be a whole number, at least 1.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise SettingError(f"time_limit is {self.time_limit!r}: give seconds above 0, or None.")
        self._system()  # a wrong effort is found here
        for name, call in self.tool_set.formats.items():  # only gpt-oss has come so far with any
            if engine_of(self.tokenizer).matcher(call).completion() is None:
                raise ToolError(
                    f"No call of the tool {name} could be finished: its arguments' schema asks for itself without an end."
                )

    # --- one turn ---

    def ask(self, text: str) -> str:
        """Say `text` and return the whole answer."""
        return "".join(e.text for e in self.stream(text) if isinstance(e, Answer) and not e.is_preamble)

    def stream(self, text: str) -> Iterator[Event]:
        """Say `text`; what happens comes as events, the last of them `Done`.

        Closing the iterator (or Ctrl-C) ends the turn; what the model had answered until then stays in the history.
        """
        if not isinstance(text, str) or not text.strip():
            raise PromptError("The message is empty: write something.")
        self.messages.append(Message("user", text))
        return self._harmony_turn() if self.is_harmony else self._plain_turn()

    def _harmony_turn(self) -> Iterator[Event]:
        turn = _Turn(self)
        if self._unfollowed:  # said once
            names, self._unfollowed = ", ".join(self._unfollowed), []
            yield Notice(
                f"The schema of {names} cannot be followed while a call is written; its calls are checked when complete"
            )
        while True:
            yield from turn.completion()
            calls = [message for message in turn.new_messages if message.is_call]
            self.messages += turn.new_messages
            turn.new_messages = []
            if not calls or turn.ended_by is not None:
                break
            turn.num_calls += len(calls)
            for call in calls:
                yield from self._call(call)
            if turn.num_rounds >= self.max_rounds:
                turn.ended_by = "rounds"
                break
        yield turn.done()

    def _call(self, call: Message) -> Iterator[Event]:
        """Call the tool that a message means, tell the model what came of it, and tell the user both."""
        assert call.recipient is not None
        found = self.tool_set.find(call.recipient)
        name = call.recipient if found is None else found[0]
        yield ToolCall(name, call.text, is_done=True)
        try:
            if found is None:
                known = ", ".join(self.tool_set.names) or "none at all"
                raise LookupError(f"there is no tool {call.recipient}; the tools are: {known}")
            text, is_error = _run(found[1], call.text), False
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is news for the model, not the end of the chat
            text, is_error = f"Error: {_reason(error)}", True
        result = Message("tool", _shortened(text), call.recipient, call.channel, "assistant")
        self.messages.append(result)
        yield ToolResult(name, result.text, is_error)

    def _plain_turn(self) -> Iterator[Event]:
        notice = self._drop_what_does_not_fit()
        if notice:
            yield Notice(notice)
        turn, said = _Turn(self), ""
        try:
            for chunk in turn.chunks(self._plain_prompt()):
                said += chunk.text
                if chunk.text:
                    yield Answer(chunk.text)
        finally:
            if said.strip():
                self.messages.append(Message("assistant", said.strip(), channel="final"))
            else:
                self.messages.pop()  # a question without an answer would be asked again with the next one
        yield turn.done()

    # --- prompts ---

    def _harmony_prompt(self, harmony: HarmonyFormat) -> list[int]:
        head = [Message("system", self._system())]
        developer = DeveloperContent(self.instructions, self.tool_set.functions, self.tool_set.namespaces)
        if developer != DeveloperContent():
            head.append(Message("developer", developer))
        return harmony.render_for_completion([*head, *self.messages])

    def _system(self) -> SystemContent:
        effort = self.reasoning_effort or "medium"
        return SystemContent(
            current_date=f"{date.today():%Y-%m-%d}", reasoning_effort=effort, tools=self.tool_set.built_in
        )

    def _plain_prompt(self) -> list[int]:
        assert self.tokenizer is not None
        if self.tokenizer.chat_template == PLAIN:  # a base model continues what was written
            return self.tokenizer.encode_prompt(" ".join(message.text for message in self.messages))
        head = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        turns = [{"role": message.role, "content": message.text} for message in self.messages]
        return render_chat([*head, *turns], self.tokenizer, self.tokenizer.chat_template)

    def _drop_what_does_not_fit(self) -> str | None:
        """Forget the oldest turns until there is room for an answer; says how many."""
        room = min(self.max_tokens, self.model.context_length // 4)
        dropped = 0
        while len(self.messages) > 1 and len(self._plain_prompt()) + room > self.model.context_length:
            del self.messages[0 : 2 if self.messages[1].role == "assistant" else 1]
            dropped += 1
        if not dropped:
            return None
        return (
            f"The context of {self.model.context_length:,} tokens is full: the oldest {dropped} of the earlier turns "
            "are forgotten."
        )

    # --- the whole conversation ---

    def reset(self) -> None:
        """Forget what was said; instructions and settings stay."""
        self.messages.clear()

    def save(self, path: str | Path) -> Path:
        """Write what was said, the instructions and the effort to a JSON file, whole or not at all."""
        path = Path(path).expanduser()
        content = {
            "openelm_mlx_chat": _FORMAT,
            "instructions": self.instructions,
            "reasoning_effort": self.reasoning_effort,
            "messages": [{**vars(message), "content": message.text} for message in self.messages],
        }
        try:
            descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    json.dump(content, stream, ensure_ascii=False, indent=2)
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
        except OSError as error:
            raise DestinationError(f"The chat cannot be saved to {path}: {error.strerror}.") from error
        return path

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation in place of this one. Raises PromptError when the file holds none."""
        path = Path(path).expanduser()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["openelm_mlx_chat"] != _FORMAT:
                raise ValueError(f"its format is {content['openelm_mlx_chat']!r}")
            messages = [Message(**each) for each in content["messages"]]
            check_conversation(messages)
            for name in ("instructions", "reasoning_effort"):
                if not isinstance(content[name], (str, type(None))):
                    raise ValueError(f"its {name} are no text")
            settings = replace(
                self, messages=messages, instructions=content["instructions"],
                reasoning_effort=content["reasoning_effort"] if self.is_harmony else None,
            )  # fmt: skip
        except OSError as error:
            raise PromptError(f"The chat in {path} cannot be read: {error.strerror}.") from error
        except PromptError as error:
            raise PromptError(f"The chat in {path} cannot go on. {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = {
                "JSONDecodeError": "it is no JSON",
                "RecursionError": "it is no JSON",
                "UnicodeDecodeError": "it is no text",
                "ValueError": f"{error}",
                "KeyError": f"{error} is missing",
            }.get(type(error).__name__, "its parts have other names or kinds")
            raise PromptError(
                f"{path} holds no saved chat ({reason}): give a file that /save or Chat.save wrote."
            ) from None
        self.messages, self.instructions = settings.messages, settings.instructions
        self.reasoning_effort = settings.reasoning_effort


class _Turn:
    """What is known of the turn that is going on: its limits, and what the model has said in it."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.started = time.monotonic()
        self.ended_by: str | None = None
        self.statistics: Statistics | None = None
        self.num_tokens = self.num_calls = self.num_rounds = 0
        self.new_messages: list[Message] = []

    def completion(self) -> Iterator[Event]:
        """One completion of gpt-oss, as events; the messages it was are left in `new_messages`."""
        assert self.chat.tokenizer is not None
        harmony = HarmonyFormat(self.chat.tokenizer)
        parser = harmony.parser()
        self.num_rounds += 1
        is_whole = False
        try:
            for chunk in self.chunks(self.chat._harmony_prompt(harmony)):
                delta = parser.push(chunk.token)
                yield from _shown(delta.text, delta.channel, delta.recipient)
            is_whole = True
        finally:
            rest = parser.finish()
            self.new_messages = parser.messages if is_whole and self.ended_by is None else _cut_off(parser.messages)
            if not is_whole:  # the iterator was closed, or an error came: nobody goes on with this turn
                self.chat.messages += self.new_messages
        yield from _shown(rest.text, rest.channel, rest.recipient)

    def chunks(self, prompt: list[int]) -> Iterator[Chunk]:
        """The tokens of one completion, until a limit of the turn ends it."""
        chat = self.chat
        room = chat.max_tokens - self.num_tokens
        if room < 1:
            self.ended_by = "length"
            return
        options = {"sampling": chat.sampling, "prefix_cache": chat.prefix_cache, **chat.options}
        if chat.is_harmony and chat._tool_schemas:
            options["tool_schemas"] = chat._tool_schemas  # so that calls always parse
        for chunk in stream_generate(chat.model, chat.tokenizer, prompt, max_tokens=room, **options):
            self.num_tokens += 1
            if chunk.finish_reason is not None:
                self.statistics = chunk.statistics
                self.ended_by = "length" if chunk.finish_reason == "length" else None
            yield chunk
            if chat.time_limit is not None and time.monotonic() - self.started > chat.time_limit:
                self.ended_by = "time"
                return

    def done(self) -> Done:
        return Done(self.ended_by or "stop", self.statistics, self.num_tokens, self.num_calls)


def _shown(text: str, channel: str | None, recipient: str | None) -> Iterator[Event]:
    if not text:
        return
    if recipient is not None:
        yield ToolCall(recipient, text)
    elif channel == "analysis":
        yield Reasoning(text)
    else:
        yield Answer(text, is_preamble=channel == "commentary")


def _cut_off(messages: Sequence[Message]) -> list[Message]:
    """What stays of a completion that did not come to its end: the answer as far as it went.

    Thoughts without an answer, and calls nobody answered, would be taken for a turn that is still going on.
    """
    return [message for message in messages if message.channel != "analysis" and not message.is_call]


def _run(tool: Tool, text: str) -> str:
    if tool.parameters is None:
        return tool(text)
    try:
        arguments = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"the arguments are no JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments are a {type(arguments).__name__}, not a JSON object")
    _check_arguments(arguments, tool)
    return tool(arguments)


def _check_arguments(arguments: dict[str, Any], tool: Tool) -> None:
    import jsonschema

    assert tool.parameters is not None
    errors = jsonschema.Draft202012Validator(tool.parameters).iter_errors(arguments)
    sentences = [f"{'.'.join(map(str, error.absolute_path)) or 'arguments'}: {error.message}" for error in errors]
    if sentences:
        raise ValueError("the arguments do not follow the schema: " + "; ".join(sentences[:3]))


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, (ValueError, LookupError)) else f"{type(error).__name__}: {text}"


def _shortened(text: str) -> str:
    if len(text) <= MOST_RESULT_CHARACTERS:
        return text
    left_out = len(text) - MOST_RESULT_CHARACTERS
    return f"{text[:MOST_RESULT_CHARACTERS]}\n[{left_out:,} more characters were left out: ask for less at a time.]"
