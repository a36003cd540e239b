"""Measure demo-gpt-oss: does it know its words, think what WordNet says, and leave sums to the tool it is given?

    python examples/train/gpt_oss_quality.py                    # the shipped model, some minutes on a CPU
    python examples/train/gpt_oss_quality.py build/gpt-oss/gpt_oss --report report.json

needs WordNet (Debian's wordnet-base), and for the strict reading of every output the package openai-harmony 0.0.8 with
the vocabulary that it parses with: TIKTOKEN_ENCODINGS_BASE names the folder of o200k_base.tiktoken. Ends with 1 when a
number is below its bar. Words, sums and seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from gpt_oss_answering import completions
from gpt_oss_conversations import (
    BUILT_IN_PYTHON,
    STANDARD_CALCULATOR,
    Calculator,
    calculate,
    is_held_out,
    random_expression,
    result_number,
    sum_question,
)
from gpt_oss_words import NUM_WORDS, STEPS, Relations, is_chain, named_words, related_words
from headwords import Headword, find_sense, read_headwords
from questions import standard_question
from wordnet import DEFAULT_FOLDER, WordNet, read_wordnet

from openelm_mlx.checkpoint.layouts import understand
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config
from openelm_mlx.models.gpt_oss import GptOss
from openelm_mlx.specs import spec_from_config
from openelm_mlx.text.builtin_tools import PYTHON
from openelm_mlx.text.conversation import REASONING_EFFORTS, DeveloperContent, Message, SystemContent
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.schema import Tool
from openelm_mlx.text.tokenizer import load_tokenizer
from openelm_mlx.weights import load_model

SHIPPED = Path(__file__).parents[2] / "openelm_mlx" / "demo" / "gpt_oss"
SEED = 500
NUM_MEASURED_WORDS, NUM_SUMS, NUM_CHAINS = 500, 200, 100
DATE = "2026-03-09"

PYTHON_FUNCTION = Calculator(
    "functions.python",
    "code",
    (
        Tool(
            "python",
            "Runs Python code.",
            {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
        ),
    ),
)


@dataclass(frozen=True)
class Measure:
    """One number with its bar."""

    name: str
    value: float
    bar: float

    @property
    def is_reached(self) -> bool:
        """Whether the value is at the bar or above it."""
        return self.value >= self.bar

    def __str__(self) -> str:
        return f"{'ok  ' if self.is_reached else 'LOW '} {self.name}: {self.value:.4g} (at least {self.bar:g})"


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    examiner = Examiner(arguments.model, read_wordnet(arguments.wordnet), arguments.wordnet)
    measures = [*examiner.words(), *examiner.chains(), *examiner.sums(), *examiner.parsing(strict_reader())]
    for measure in measures:
        print(measure)
    print(f"{len(examiner.outputs)} outputs in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if arguments.report:
        arguments.report.write_text(json.dumps(examiner.report(measures), indent=1, ensure_ascii=False) + "\n")
    sys.exit(0 if all(measure.is_reached for measure in measures) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=SHIPPED, help="folder of the model")
    parser.add_argument("--wordnet", type=Path, default=DEFAULT_FOLDER, help="folder of WordNet's database files")
    parser.add_argument("--report", type=Path, help="write every number and every output to this file")
    return parser.parse_args()


class Examiner:
    """Asks the model and judges what it says; `outputs` has every completion, tool calls among them."""

    def __init__(self, folder: Path, wordnet: WordNet, wordnet_folder: Path) -> None:
        self.model, self.harmony = load_demo(folder)
        self.wordnet, self.relations = wordnet, Relations(wordnet, wordnet_folder)
        headwords = read_headwords()[:NUM_WORDS]
        self.headwords = random.Random(SEED).sample(headwords, NUM_MEASURED_WORDS)
        self.outputs: list[list[int]] = []
        self.failures: list[dict[str, Any]] = []

    def words(self) -> list[Measure]:
        """The share of the words that are answered with a gloss of theirs, all asked with medium effort."""
        replies = self._ask([word_conversation(headword, "medium") for headword in self.headwords])
        right = 0
        for headword, reply in zip(self.headwords, replies, strict=True):
            glosses = {sense.synset.definition for sense in self.wordnet.senses[headword.word.lower()]}
            if final_text(reply) in glosses:
                right += 1
            else:
                self._note("gloss", headword.word, reply)
        return [Measure("words answered with a WordNet gloss", right / len(self.headwords), 0.85)]

    def chains(self) -> list[Measure]:
        """What the analysis names at each effort, of words that have enough above them to name."""
        chosen = []
        for headword in self.headwords:
            relation, chain = related_words(self.relations, find_sense(self.wordnet, headword))
            if relation in ("kind", "instance", "way") and len(chain) > STEPS["medium"]:
                chosen.append(headword)
        chosen = chosen[:NUM_CHAINS]
        counts: dict[str, list[int]] = {}
        right = 0
        for effort in REASONING_EFFORTS:
            replies = self._ask([word_conversation(headword, effort) for headword in chosen])
            counts[effort] = [self._correct_steps(*each) for each in zip(chosen, replies, strict=True)]
            right += sum(count > 0 for count in counts[effort])
        grows = sum(low < medium < high for low, medium, high in zip(*counts.values(), strict=True))
        means = {effort: sum(each) / len(chosen) for effort, each in counts.items()}
        return [
            Measure("analyses that are a chain of WordNet's hypernyms, and nothing else", right / 3 / len(chosen), 0.9),
            Measure("words whose chain grows from low to medium to high", grows / len(chosen), 0.85),
            Measure("correct hypernyms at low effort, mean", means["low"], 0.8),
            Measure("more of them at medium", means["medium"] - means["low"], 1.5),
            Measure("more of them at high", means["high"] - means["medium"], 1.5),
        ]

    def sums(self) -> list[Measure]:
        """The share of the sums where the tool is called with the right arguments and the answer is its result."""
        rng = random.Random(SEED)
        tasks = [held_out_sum(rng) for _ in range(NUM_SUMS)]
        asked = [
            (tool_conversation(expression, tool, effort, rng), expression, tool) for expression, tool, effort in tasks
        ]
        calls = self._ask([conversation for conversation, _, _ in asked])
        answered, called = [], 0
        for (conversation, expression, tool), call in zip(asked, calls, strict=True):
            if call and is_right_call(call[-1], expression, tool):
                called += 1
                answered.append((expression, [*conversation, *call, tool.result(calculate(expression))]))
            else:
                self._note("call", expression, call)
        finals = self._ask([conversation for _, conversation in answered])
        right = 0
        for (expression, _), reply in zip(answered, finals, strict=True):
            if final_text(reply).rpartition(" = ")[2] == result_number(calculate(expression)):
                right += 1
            else:
                self._note("result", expression, reply)
        return [
            Measure("sums whose tool call is right", called / len(tasks), 0.95),
            Measure("sums that end with the tool's result", right / len(tasks), 0.95),
        ]

    def parsing(self, strict: Callable[[HarmonyFormat, Sequence[int]], list[tuple[str, str]] | None]) -> list[Measure]:
        """The share of all outputs that have a final message, or are the call of a tool, by both parsers."""
        ours = theirs = 0
        for tokens in self.outputs:
            messages = self.harmony.parse(tokens)
            is_ended = tokens[-1] in self.harmony.stop_tokens
            ours += is_ended and bool(messages) and (messages[-1].is_call or messages[-1].channel == "final")
            theirs += strict(self.harmony, tokens) == [(message.channel, message.text) for message in messages]
        return [
            Measure("outputs with a final message or a call, by our parser", ours / len(self.outputs), 0.99),
            Measure("outputs that strict openai-harmony reads the same", theirs / len(self.outputs), 0.99),
        ]

    def report(self, measures: Sequence[Measure]) -> dict[str, Any]:
        """All numbers, what went wrong, and every output with its markup."""
        return {
            "measures": {measure.name: [measure.value, measure.bar] for measure in measures},
            "failures": self.failures,
            "outputs": [self.harmony.decode_markup(tokens) for tokens in self.outputs],
        }

    def _ask(self, conversations: Sequence[Sequence[Message]]) -> list[list[Message]]:
        rows = completions(self.model, self.harmony, conversations)
        self.outputs += rows
        return [self.harmony.parse(tokens) for tokens in rows]

    def _correct_steps(self, headword: Headword, reply: list[Message]) -> int:
        """How many hypernyms an analysis names; 0 when one of them is wrong or there is anything else in it."""
        word, relation, names = named_words(next((m.text for m in reply if m.channel == "analysis"), ""))
        is_right = (
            word == headword.word and bool(names) and is_chain(self.wordnet, self.relations, word, relation, names)
        )
        if not is_right:
            self._note("chain", headword.word, reply)
        return len(names) if is_right else 0

    def _note(self, what: str, asked: str, reply: Sequence[Message]) -> None:
        self.failures.append({"what": what, "asked": asked, "reply": [(m.channel, m.text) for m in reply]})


def load_demo(folder: Path) -> tuple[GptOss, HarmonyFormat]:
    """The model of a folder, in float32, and its Harmony."""
    config, checkpoint = read_config(folder), open_checkpoint(folder)
    model = load_model(understand(checkpoint, config, spec_from_config(config)), checkpoint, mx.float32)
    assert isinstance(model, GptOss)
    return model, HarmonyFormat(load_tokenizer(folder))


def word_conversation(headword: Headword, effort: str) -> list[Message]:
    """The plain question for a word."""
    system = SystemContent(current_date=DATE, reasoning_effort=effort)
    return [
        Message("system", system),
        Message("user", standard_question(headword.word, headword.part_of_speech)),
    ]


def held_out_sum(rng: random.Random) -> tuple[str, Calculator, str]:
    """A sum that training never saw, the tool to ask it with (mostly a calculator), and an effort."""
    while not is_held_out(expression := random_expression(rng)) or calculate(expression).startswith("Error"):
        pass
    tool = rng.choice(3 * [STANDARD_CALCULATOR] + [PYTHON_FUNCTION, BUILT_IN_PYTHON])
    return expression, tool, rng.choice(REASONING_EFFORTS)


def tool_conversation(expression: str, tool: Calculator, effort: str, rng: random.Random) -> list[Message]:
    """The question for a sum, the tool being declared."""
    built_in = (PYTHON,) if tool == BUILT_IN_PYTHON else ()
    messages = [Message("system", SystemContent(current_date=DATE, reasoning_effort=effort, tools=built_in))]
    if tool.tools:
        messages.append(Message("developer", DeveloperContent(tools=tool.tools)))
    return [*messages, Message("user", sum_question(expression, rng))]


def is_right_call(message: Message, expression: str, tool: Calculator) -> bool:
    """Whether it calls the tool, on the commentary channel, with the sum that was asked for."""
    if message.recipient != tool.recipient or message.channel != "commentary":
        return False
    text = message.text
    if tool.parameter is not None:
        try:
            arguments = json.loads(text)
        except json.JSONDecodeError:
            return False
        if not isinstance(arguments, dict) or list(arguments) != [tool.parameter]:
            return False
        text = str(arguments[tool.parameter])
    wanted = f"print({expression})" if tool.parameter in (None, "code") else expression
    return text.replace(" ", "") == wanted.replace(" ", "")


def final_text(reply: Sequence[Message]) -> str:
    """What the user gets to see."""
    return reply[-1].text if reply and reply[-1].channel == "final" else ""


def strict_reader() -> Callable[[HarmonyFormat, Sequence[int]], list[tuple[str, str]] | None]:
    """A function that reads a completion with openai-harmony: channels and texts, or None when it refuses."""
    try:
        from openai_harmony import HarmonyError, Role, TextContent, load_harmony_encoding
    except ImportError:
        sys.exit("Half of the parsing is judged by openai-harmony: pip install openai-harmony==0.0.8.")
    encoding = load_harmony_encoding("HarmonyGptOss")

    def read(harmony: HarmonyFormat, tokens: Sequence[int]) -> list[tuple[str, str]] | None:
        try:
            messages = encoding.parse_messages_from_completion_tokens(
                translated(encoding, harmony, tokens), Role.ASSISTANT, strict=True
            )
        except HarmonyError:
            return None
        texts = ("".join(c.text for c in m.content if isinstance(c, TextContent)) for m in messages)
        return [(message.channel, text) for message, text in zip(messages, texts, strict=True)]

    return read


def translated(encoding: Any, harmony: HarmonyFormat, tokens: Sequence[int]) -> list[int]:
    """The demo's tokens in openai-harmony's vocabulary: control tokens by name, the texts between them encoded anew."""
    names = {token: name for name, token in harmony.tokenizer.special_tokens.items()}
    result: list[int] = []
    text = b""
    for token in [*tokens, None]:
        if token is not None and token not in names:
            text += harmony.token_bytes(token)
            continue
        result += encoding.encode(text.decode("utf-8", "replace"), disallowed_special=())
        text = b""
        if token is not None:
            result += encoding.encode(names[token], allowed_special="all")
    return result


if __name__ == "__main__":
    main()
