"""The conversations that demo-gpt-oss learns: words, sums with a tool and without one, small talk; all as messages.

How they become tokens is gpt_oss_prepare.py's business. A `Turn` is what is learned: a conversation up to a question,
and the assistant's messages from there to the answer, a tool's result between them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from gpt_oss_words import Word, word_analysis
from questions import FAREWELL, GREETING, INTRODUCTION, REFUSAL, WordMaker, ask, ask_unknown, small_talk

from openelm_mlx.text.builtin_tools import PYTHON
from openelm_mlx.text.conversation import (
    JSON_CALL,
    REASONING_EFFORTS,
    DeveloperContent,
    Message,
    SystemContent,
)
from openelm_mlx.text.schema import Tool, json_text

UNKNOWN_WORD = "I don't know that word."
NO_CALCULATOR = "I have no calculator here. Give me one as a tool, and I will use it."
TOOL_FAILED = "The tool could not do that."
_TALK = {
    GREETING: "Hello! Ask me what a word means, or give me a calculator and ask for a sum.",
    INTRODUCTION: "I am demo-gpt-oss, a small model. I know what common words mean, and I can use a calculator.",
    FAREWELL: "You are welcome.",
    REFUSAL: "I can only tell you what a word means, or use a calculator that you give me.",
}
_ABOUT_TALK = {
    GREETING: "A greeting.",
    INTRODUCTION: "A question about me.",
    FAREWELL: "No question.",
    REFUSAL: "This is nothing that I can do.",
}

# One sum in twenty is never trained on: those whose expression has this remainder.
HELD_OUT_MODULUS, HELD_OUT_REMAINDER = 20, 7


@dataclass(frozen=True)
class Turn:
    """history: the messages up to and including a user's question. answer: what follows, the last one on `final`."""

    history: tuple[Message, ...]
    answer: tuple[Message, ...]


def analysis(text: str) -> Message:
    """A thought of the assistant's."""
    return Message("assistant", text, channel="analysis")


def final(text: str) -> Message:
    """An answer of the assistant's."""
    return Message("assistant", text, channel="final")


# --- What stands before the question ----------------------------------------------------------------------------------

_INSTRUCTIONS = [
    "You are a helpful assistant.", "Be concise.", "Answer briefly.", "Answer in one sentence.", "You are a dictionary.",
    "You are a friendly tutor.", "Be polite.", "Use the calculator for sums.", "Use tools when they help.",
    "Explain words to a child.", "Always answer in English.", "Do not guess.", "Think before you answer.",
    "You are talking to a student.", "Help the user.", "Keep it short and clear.", "You are a careful assistant.",
    "Never make anything up.", "Answer the user's questions.", "You are a calculator.",
]  # fmt: skip

_CALCULATOR_NAMES = 12 * ["calculator"] + ["calculate", "calc", "evaluate", "compute", "math"]
_CALCULATOR_TEXTS = [
    "Evaluates an arithmetic expression.", "A calculator.", "Calculates.", "Evaluate a math expression", "",
    "Does arithmetic and returns the result.", "Compute the value of an expression.", "Use this for sums.",
]  # fmt: skip
_PARAMETER_NAMES = 12 * ["expression"] + ["formula", "input", "expr", "query"]
_PARAMETER_TEXTS = [
    "", "", "The expression, such as 2 + 2.", "What to calculate.", "The arithmetic expression to evaluate.",
    'For example "12 * 3".', "A formula",
]  # fmt: skip
_OTHER_TOOLS = [
    Tool("get_weather", "Gets the weather.", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool("search", "Searches the web.", {"type": "object", "properties": {"query": {"type": "string"}}}),
    Tool("get_time", "The time of day."),
    Tool("read_file", "Reads a file.", {"type": "object", "properties": {"path": {"type": "string"}}}),
]


@dataclass(frozen=True)
class Calculator:
    """A tool that can do sums: the functions it is declared with, or none for the built-in python."""

    recipient: str
    parameter: str | None  # None: the message is the program itself
    tools: tuple[Tool, ...]

    def call(self, expression: str) -> Message:
        """The call that has `expression` worked out, on the commentary channel."""
        if self.parameter is None:
            return Message("assistant", f"print({expression})", channel="commentary", recipient=self.recipient)
        value = f"print({expression})" if self.parameter == "code" else expression
        text = json_text({self.parameter: value})
        return Message("assistant", text, channel="commentary", recipient=self.recipient, content_type=JSON_CALL)

    def result(self, text: str) -> Message:
        """The tool's message with the result."""
        return Message("tool", text, name=self.recipient, channel="commentary", recipient="assistant")


STANDARD_CALCULATOR = Calculator(
    "functions.calculator",
    "expression",
    (
        Tool(
            "calculator",
            "Evaluates an arithmetic expression.",
            {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
        ),
    ),
)
BUILT_IN_PYTHON = Calculator("python", None, ())


def random_calculator(rng: random.Random) -> Calculator:
    """The standard one, one with other words, a function named python, or the built-in python."""
    kind = rng.random()
    if kind < 0.12:
        return BUILT_IN_PYTHON
    if kind < 0.3:
        return STANDARD_CALCULATOR
    name, parameter, text = rng.choice(_CALCULATOR_NAMES), rng.choice(_PARAMETER_NAMES), rng.choice(_CALCULATOR_TEXTS)
    if kind < 0.42:
        name, parameter, text = "python", "code", rng.choice(["Runs Python code.", "Run Python.", "Execute code", ""])
    described = {"type": "string"} | ({"description": t} if (t := rng.choice(_PARAMETER_TEXTS)) else {})
    required = {"required": [parameter]} if rng.random() < 0.8 else {}
    tool = Tool(name, text, {"type": "object", "properties": {parameter: described}} | required)
    tools = [tool, *(rng.sample(_OTHER_TOOLS, rng.choice([1, 1, 2])) if rng.random() < 0.2 else ())]
    rng.shuffle(tools)
    return Calculator(f"functions.{name}", parameter, tuple(tools))


def opening(
    effort: str, rng: random.Random, calculator: Calculator | None, other_tools: Sequence[Tool] = ()
) -> list[Message]:
    """The system message, still without a date, and a developer message where something belongs into it."""
    built_in = (PYTHON,) if calculator == BUILT_IN_PYTHON else ()
    system = SystemContent(reasoning_effort=effort, tools=built_in)
    instructions = rng.choice(_INSTRUCTIONS) if rng.random() < 0.12 else None
    tools = (*(calculator.tools if calculator else ()), *other_tools)
    messages = [Message("system", system)]
    if instructions is not None or tools:
        messages.append(Message("developer", DeveloperContent(instructions, tools)))
    return messages


# --- Turns ------------------------------------------------------------------------------------------------------------


class Teacher:
    """Makes turns at random, the same ones from the same seed."""

    def __init__(self, words: Sequence[Word], unlisted: Sequence[str], taken: set[str], seed: int) -> None:
        self._words, self._unlisted = words, unlisted
        self._entries = [word.entry for word in words]
        self._maker = WordMaker([word.word for word in words], taken)
        self._rng = random.Random(seed)

    def word(self, word: Word, effort: str) -> Turn:
        """A question for a word that the demo knows."""
        question = ask(word.entry, self._rng)
        return self._turn(effort, question, (analysis(word_analysis(word, effort)), final(word.gloss)))

    def unknown(self) -> Turn:
        """A question for an invented word, or for one that only WordNet has."""
        invented = self._rng.random() < 0.5
        word = self._maker.make(self._rng) if invented else self._rng.choice(self._unlisted)
        question, _ = ask_unknown(word, self._rng)
        return self._turn(None, question, (analysis("This is no word that I know."), final(UNKNOWN_WORD)))

    def small_talk(self) -> Turn:
        """A greeting, thanks, a question about the model, or something it cannot do."""
        while True:
            question, answer = small_talk(self._entries, self._rng)
            if not any(character.isdigit() for character in question):
                return self._turn(None, question, (analysis(_ABOUT_TALK[answer]), final(_TALK[answer])))

    def sum_with_tool(self) -> Turn:
        """A sum, the call of a tool, its result, and the answer."""
        rng = self._rng
        effort, calculator = rng.choice(REASONING_EFFORTS), random_calculator(rng)
        while is_held_out(expression := random_expression(rng)):
            pass
        history = opening(effort, rng, calculator)
        if rng.random() < 0.15:
            history += self._earlier(calculator)
        result = tool_result(expression, rng)
        answer = TOOL_FAILED if result.startswith("Error") else sum_answer(expression, result)
        return Turn(
            (*history, Message("user", sum_question(expression, rng))),
            (
                analysis(sum_analysis(expression, effort)),
                calculator.call(expression),
                calculator.result(result),
                final(answer),
            ),
        )

    def sum_without_tool(self) -> Turn:
        """A sum when there is no tool: a small one is answered, of another the model says that it cannot."""
        rng = self._rng
        if rng.random() < 0.5:
            a, b, operator = rng.randint(0, 10), rng.randint(0, 10), rng.choice("+-*")
            expression = f"{a} {operator} {b}"
            answer = (analysis("A small sum."), final(sum_answer(expression, calculate(expression))))
        else:
            while max(map(float, (expression := random_expression(rng)).split()[::2])) <= 12:
                pass
            answer = (analysis("A sum, and I have no calculator."), final(NO_CALCULATOR))
        return self._turn(None, sum_question(expression, rng), answer, may_have_calculator=False)

    def _turn(
        self, effort: str | None, question: str, answer: tuple[Message, ...], may_have_calculator: bool = True
    ) -> Turn:
        rng = self._rng
        effort = effort or rng.choice(REASONING_EFFORTS)
        calculator = random_calculator(rng) if may_have_calculator and rng.random() < 0.1 else None
        others = [rng.choice(_OTHER_TOOLS)] if calculator is None and rng.random() < 0.03 else []
        history = opening(effort, rng, calculator, others)
        if rng.random() < 0.1:
            history += self._earlier(calculator)
        return Turn((*history, Message("user", question)), answer)

    def _earlier(self, calculator: Calculator | None) -> list[Message]:
        """A turn that is over: its analysis is gone, as gpt-oss is trained to see it."""
        rng = self._rng
        if calculator is not None and rng.random() < 0.5:
            expression = random_expression(rng)
            result = calculate(expression)
            return [
                Message("user", sum_question(expression, rng)),
                calculator.call(expression),
                calculator.result(result),
                final(sum_answer(expression, result)),
            ]
        word = rng.choice(self._words)
        return [Message("user", ask(word.entry, rng)), final(word.gloss)]


# --- Sums -------------------------------------------------------------------------------------------------------------

_SYMBOL_QUESTIONS = [
    "What is {e}?", "What is {e}?", "What's {e}?", "{e}", "{e}?", "{e} =", "{e} = ?", "Calculate {e}.", "Calculate {e}",
    "Compute {e}.", "How much is {e}?", "Please calculate {e}.", "Can you work out {e}?", "Work out {e}.",
    "Tell me what {e} is.", "What does {e} make?", "Evaluate {e}.", "What is the result of {e}?", "I need {e}.",
    "Use the calculator: {e}", "Use Python to calculate {e}.", "Use the tool to find {e}.", "Solve {e}",
]  # fmt: skip
_SPOKEN = {
    "+": ["plus", "plus", "and"],
    "-": ["minus"],
    "*": ["times", "times", "x", "×"],
    "/": ["divided by", "÷", "over"],
}
_WHOLE_QUESTIONS = {
    "+": ["Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {a} to {b}"],
    "-": ["What is the difference between {a} and {b}?", "Take {b} from {a}.", "Subtract {b} from {a}."],
    "*": ["Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}"],
    "/": ["Divide {a} by {b}.", "What do I get if I divide {a} by {b}?"],
}
_NAMES = {"+": "an addition", "-": "a subtraction", "*": "a multiplication", "/": "a division"}


def random_expression(rng: random.Random) -> str:
    """Two numbers, or now and then three, of one to five digits, rarely decimal ones: `17 * 3`."""
    count = 3 if rng.random() < 0.12 else 2
    parts = [_number(rng)]
    for _ in range(count - 1):
        parts += [rng.choice("++--**/"), _number(rng)]
    return " ".join(parts)


def _number(rng: random.Random) -> str:
    digits = rng.choice([1, 1, 2, 2, 2, 3, 3, 4, 5])
    number = str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    return f"{number}.{rng.randrange(1, 100)}" if rng.random() < 0.06 else number


def is_held_out(expression: str) -> bool:
    """Whether the sum is kept out of training, to measure with."""
    return crc32(expression.encode()) % HELD_OUT_MODULUS == HELD_OUT_REMAINDER


def calculate(expression: str) -> str:
    """What a calculator tool says: Python's value of the expression, or an error."""
    try:
        # Only what random_expression makes comes here: digits, points, spaces and four operators.
        return str(eval(expression, {"__builtins__": {}}))
    except ZeroDivisionError as error:
        return f"Error: {error}"


def sum_question(expression: str, rng: random.Random) -> str:
    """One of the many ways to ask for a sum, in symbols or in words."""
    parts = expression.split()
    kind = rng.random()
    if kind < 0.15 and len(parts) == 3:
        question = rng.choice(_WHOLE_QUESTIONS[parts[1]]).format(a=parts[0], b=parts[2])
    else:
        shown = expression
        if kind < 0.5:
            shown = " ".join(rng.choice(_SPOKEN[part]) if part in _SPOKEN else part for part in parts)
        elif kind < 0.65:
            shown = expression.replace(" ", "")
        question = rng.choice(_SYMBOL_QUESTIONS).format(e=shown)
    if rng.random() < 0.25:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.") if rng.random() < 0.15 else question


def sum_analysis(expression: str, effort: str) -> str:
    """The thought before the call: what kind of sum, the sum itself, what to do."""
    operators = expression.split()[1::2]
    name = _NAMES[operators[0]] if len(operators) == 1 else "several steps"
    if effort == "low":
        return "A sum: I call the tool."
    return (
        f"A sum: {expression}. I call the tool."
        if effort == "medium"
        else f"A sum: {expression}, {name}. I call the tool."
    )


def tool_result(expression: str, rng: random.Random) -> str:
    """What the tool says; now and then another number than the right one, since the answer is to be the tool's."""
    result = calculate(expression)
    if result.startswith("Error"):
        return result
    kind = rng.random()
    if kind < 0.03:
        return rng.choice(["Error: invalid syntax", "Error: tool not available", "Error: time-out"])
    if kind < 0.3:
        result = rng.choice([_number(rng), "-" + _number(rng), str(rng.randrange(10 ** rng.randint(1, 9))), _long(rng)])
    form = rng.random()
    if form < 0.1:
        return json_text({rng.choice(["result", "value"]): float(result) if "." in result else int(result)})
    return result + "\n" if form < 0.25 else result


def _long(rng: random.Random) -> str:
    return str(rng.random() * 10 ** rng.randint(0, 4))


def result_number(result: str) -> str:
    """The number in a tool's result, as it is written there."""
    return (
        result.strip().rpartition(": ")[2].rpartition(":")[2].rstrip("}").strip() if "{" in result else result.strip()
    )


def sum_answer(expression: str, result: str) -> str:
    """The final answer: `17 * 3 = 51`."""
    return f"{expression} = {result_number(result)}"
