"""Examples as rows of tokens, with what is to be learned marked by who wrote it: the model's own formats, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, PromptError, SettingError, TokenizerError
from ..files import shown
from ..text.chat import HARMONY, PLAIN, render_turns
from ..text.conversation import SystemContent
from ..text.harmony import HarmonyFormat
from ..text.harmony_training import training_pieces
from ..text.openai_chat import conversation
from ..text.tokenizer import Tokenizer
from .batches import NOT_LEARNED, Row
from .data import CHAT, COMPLETION, INSTRUCTION, PREFERENCE, TEXT, Example

# Which tokens are learned: every turn of the assistant, its last one, or all tokens of the row.
LEARN = ("answers", "last", "all")
# What becomes of a row that is longer than the rows may be.
TOO_LONG = ("error", "cut", "skip", "split")

# CommonSense-170k as CoreNet writes it (data/datasets/language_modeling/commonsense_170k.py): lines are indented by 16
# spaces, and the first sentence ends in one space or two.
_INDENT = " " * 16
_TASK = "Below is an instruction that describes a task"
_WITH_INPUT, _RESPOND = (
    ", paired with an input that provides further context",
    ". Write a response that appropriately completes the request.",
)


@dataclass(frozen=True)
class Rendering:
    """How examples become tokens.

    learn: see `LEARN`. too_long: see `TOO_LONG`; max_length: tokens of a row, its first one and the end of its answer included.
    date: in gpt-oss's system message, YYYY-MM-DD or None. reasoning_effort: where a line has none of its own.
    context_length: the model's, where max_length may not be larger.
    """

    tokenizer: Tokenizer
    template: str
    max_length: int
    learn: str = "answers"
    too_long: str = "error"
    date: str | None = None
    reasoning_effort: str = "medium"
    context_length: int | None = None

    @property
    def longer(self) -> str:
        """The advice to let rows be longer, where they can be."""
        return "" if self.max_length == self.context_length else "pass a larger max_length, "

    def rows(self, example: Example) -> list[Row]:
        """The rows of an example: one; two of a preference, chosen and rejected; none where it is skipped.

        Raises DataError with the line's number.
        """
        try:
            sequences = self._sequences(example)
        except (PromptError, SettingError, TokenizerError) as error:
            raise example.error(str(error)) from error
        longest = max(len(tokens) for tokens, _ in sequences)
        if longest > self.max_length:
            if self.too_long == "skip":
                return []
            if (
                self.too_long == "error"
                or example.kind == PREFERENCE
                or (self.too_long == "split" and example.kind != TEXT)
            ):
                raise self._too_long(example, longest)
            sequences = [part for each in sequences for part in self._parts(*each)]
        rows = [Row.of_targets(tokens, written) for tokens, written in sequences]
        if not all(row.num_targets for row in rows):
            if self.too_long == "cut" and longest > self.max_length:
                raise example.error(
                    f"it has {longest:,} tokens, and in the first {self.max_length:,}, which are left, "
                    f'nothing is learned: shorten it, {self.longer}or pass too_long="skip".'
                )
            raise example.error("there is nothing to learn in it: give the assistant an answer.")
        return rows

    def _too_long(self, example: Example, longest: int) -> DataError:
        ways = ['"skip"']
        if example.kind != PREFERENCE:
            ways = ['"cut"', *ways, *(['"split"'] if example.kind == TEXT else [])]
        listed = " or ".join(f"too_long={way}" for way in ways)
        return example.error(
            f"it has {longest:,} tokens and a row may have {self.max_length:,}: shorten it, "
            f"{self.longer}or pass {listed}."
        )

    def _parts(self, tokens: list[int], written: list[int]) -> list[tuple[list[int], list[int]]]:
        """A sequence that is too long: its beginning, or all of it in pieces."""
        if self.too_long == "cut":
            return [(tokens[: self.max_length], written[: self.max_length])]
        bos = list(tokens[:1]) if tokens[0] == self.tokenizer.bos_token else []
        rest, targets, most = tokens[len(bos) :], written[len(bos) :], self.max_length - len(bos)
        cuts = range(0, len(rest), most)
        parts = [([*bos, *rest[i : i + most]], [*([NOT_LEARNED] * len(bos)), *targets[i : i + most]]) for i in cuts]
        return [part for part in parts if len(part[0]) > 1]

    def _sequences(self, example: Example) -> list[tuple[list[int], list[int]]]:
        """(tokens, what is written at each of them) of each row."""
        fields, kind = example.fields, example.kind
        if kind == TEXT:
            return [self._text(fields["text"])]
        if kind == INSTRUCTION:
            return [self._text(instruction_text(fields))]
        if kind == CHAT:
            return [self._chat(fields["messages"], fields)]
        if kind == COMPLETION:
            return [self._completion(fields["prompt"], fields["completion"], fields)]
        assert kind == PREFERENCE
        prompt = fields.get("prompt") or []
        return [self._completion(prompt, fields[name], fields, last=True) for name in ("chosen", "rejected")]

    def _text(self, text: str) -> tuple[list[int], list[int]]:
        tokens = [*self.tokenizer.encode_prompt(text), self._end_of_text()]
        has_bos = tokens[0] == self.tokenizer.bos_token
        return tokens, [NOT_LEARNED, *tokens[1:]] if has_bos else list(tokens)

    def _completion(
        self, prompt: Any, completion: Any, fields: Mapping[str, Any], last: bool = False
    ) -> tuple[list[int], list[int]]:
        """As the model is asked for it: through the chat template where there is one."""
        if self.template == PLAIN and isinstance(prompt, str) and isinstance(completion, str):
            begin = self.tokenizer.encode_prompt(prompt) if prompt else self.tokenizer.encode_prompt("")
            answer = [*self.tokenizer.encode(completion, continuation=bool(prompt)), self._end_of_text()]
            unlearned = begin[1:] if self.learn == "all" else [NOT_LEARNED] * len(begin[1:])
            return [*begin, *answer], [NOT_LEARNED] * bool(begin) + [*unlearned, *answer]
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answered = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        # Data sets of preferences repeat the prompt in both answers.
        if isinstance(prompt, str) and len(answered) > 1 and answered[0] == {**answered[0], **said[0]}:
            said = []
        return self._chat([*said, *answered], fields, "last" if last and self.learn != "all" else None)

    def _chat(
        self, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any], learn: str | None = None
    ) -> tuple[list[int], list[int]]:
        pieces = self._harmony(messages, fields) if self.template == HARMONY else self._openelm(messages, fields)
        learn = self.learn if learn is None else learn
        last = max((turn for _, written, turn in pieces if written is not None), default=-1)
        tokens: list[int] = []
        targets: list[int] = []
        for piece, written, turn in pieces:
            tokens += piece
            if learn == "all":
                targets += piece if written is None else written
            elif written is None or (learn == "last" and turn != last):
                targets += [NOT_LEARNED] * len(piece)
            else:
                targets += written
        return tokens, targets

    def _openelm(
        self, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]
    ) -> list[tuple[list[int], list[int] | None, int]]:
        if fields.get("tools"):
            raise PromptError("it has tools, and OpenELM's chat template has none: leave them out.")
        if fields.get("reasoning_effort"):
            raise PromptError("it has a reasoning_effort, and only gpt-oss's chat format has one: leave it out.")
        found = render_turns(messages, self.tokenizer, self.template)
        return [(piece, piece if learned else None, i) for i, (piece, learned) in enumerate(found)]

    def _harmony(
        self, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]
    ) -> list[tuple[list[int], list[int] | None, int]]:
        effort = fields.get("reasoning_effort", self.reasoning_effort)
        system = SystemContent(current_date=self.date, reasoning_effort=effort)
        found = conversation(messages, system=system, tools=fields.get("tools", ()))
        return [(p.tokens, p.written, p.turn) for p in training_pieces(HarmonyFormat(self.tokenizer), found)]

    def _end_of_text(self) -> int:
        """The token after a text: gpt-oss ends an answer with another one."""
        special = self.tokenizer.special_tokens
        if "<|endoftext|>" in special:
            return special["<|endoftext|>"]
        if not self.tokenizer.eos_tokens:
            raise TokenizerError("this tokenizer names no end-of-text token, which a text ends with.")
        return self.tokenizer.eos_tokens[0]


def instruction_text(fields: Mapping[str, Any]) -> str:
    """An instruction, its input if it has one, and the response, as CoreNet writes CommonSense-170k."""
    given = fields.get("input")
    parts = [
        ("Instruction", fields["instruction"]),
        *([("Input", given)] if given else []),
        ("Response", fields["output"]),
    ]
    head = f"{_TASK}{_WITH_INPUT if given else ''}{_RESPOND}{' ' if given else '  '}\n"
    lines = [f"\n{_INDENT}### {name}:\n{_INDENT}{text}" for name, text in parts]
    return head + f"\n{_INDENT}".join(lines)


def checked_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value`, if it is one of `choices`. Raises SettingError."""
    if value not in choices:
        raise SettingError(f"{name} is {shown(value)}: choose {', '.join(choices[:-1])} or {choices[-1]}.")
    return str(value)


def render_all(rendering: Rendering, examples: Sequence[Example]) -> list[list[Row]]:
    """The rows of each example, those that are skipped left out. Raises DataError where nothing is left."""
    found = [rows for rows in map(rendering.rows, examples) if rows]
    if not found:
        raise DataError(
            f"Every example has more than {rendering.max_length:,} tokens and is skipped: "
            f'{rendering.longer}{"or " if rendering.longer else ""}pass too_long="cut".'
        )
    return found
