"""Scoring choices: our scorer and mlx-lm's evaluator, in turns in one process, on the same questions and weights."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from openelm_mlx.bench.random_pair import mlx_lm_model, random_pair, shape_config
from openelm_mlx.checkpoint.quantize import Quantization
from openelm_mlx.conversion import convert
from openelm_mlx.errors import SettingError
from openelm_mlx.evaluation.requests import TokenRequest
from openelm_mlx.evaluation.scorer import Scorer
from openelm_mlx.loading import load

DEMOS = ("demo-openelm", "demo-gpt-oss")
# mlx-lm's evaluator is given so many questions at once, and stops between two such parts.
QUESTIONS_AT_ONCE = 10
# What is found on the way, for people.
Note = Callable[[str], None]


@dataclass(frozen=True)
class Rates:
    """Seconds of each side, a figure for each round, and how far the answers of both differ at most, in nats.

    answered: how many of the questions mlx-lm's side came to in each round; ours comes to all of them, and what is compared
    is the time a question takes. num_tokens, num_passes: what ours computed. cpu_ours, cpu_theirs: seconds of the process's
    own work, which other programs on a busy machine do not lengthen as much.
    """

    model: str
    questions: int
    few_shot_tokens: int
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    answered: tuple[int, ...]
    cpu_ours: tuple[float, ...]
    cpu_theirs: tuple[float, ...]
    num_tokens: int
    num_passes: int
    difference: float
    peak_bytes: int

    @property
    def ratio(self) -> float:
        return self._a_question(self.theirs) / median(self.ours) * self.questions

    @property
    def cpu_ratio(self) -> float:
        return self._a_question(self.cpu_theirs) / median(self.cpu_ours) * self.questions

    def _a_question(self, seconds: Sequence[float]) -> float:
        """The seconds that one takes mlx-lm's side."""
        return median(took / count for took, count in zip(seconds, self.answered, strict=True))

    def line(self) -> str:
        fewest = min(self.answered)
        part = "" if fewest == self.questions else f" for {fewest} of them"
        return (
            f"{self.model}, {self.questions} questions after {self.few_shot_tokens} tokens of examples: ours "
            f"{median(self.ours):.2f} s, mlx-lm {median(self.theirs):.2f} s{part}: {self.ratio:.2f} times "
            f"({self.cpu_ratio:.2f} by the processor's time); {self.num_tokens:,} tokens in {self.num_passes} passes; the "
            f"answers differ by {self.difference:.1e} at most"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "cpu_ratio": self.cpu_ratio}


def questions(
    vocab_size: int, count: int, few_shot_tokens: int = 0, num_choices: int = 4, seed: int = 0
) -> list[list[TokenRequest]]:
    """Contexts of 30 to 60 random tokens after the same examples, each with choices of 2 to 13."""
    drawn = random.Random(seed)

    def tokens(number: int) -> list[int]:
        return [drawn.randrange(3, vocab_size) for _ in range(number)]

    examples = [1, *tokens(few_shot_tokens)]
    found = []
    for _ in range(count):
        context = [*examples, *tokens(drawn.randrange(30, 61))]
        found.append([TokenRequest.of(context, tokens(drawn.randrange(2, 14))) for _ in range(num_choices)])
    return found


class _Numbers:
    """A tokenizer whose texts are numbers."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(each) for each in text.split()]


def their_evaluator(model: Any) -> Any:
    """mlx-lm's, with a model that is there. Raises SettingError where mlx-lm is not installed."""
    try:
        with _importable_harness():
            from mlx_lm.evaluate import MLXLM
    except ImportError:
        raise SettingError("This needs mlx-lm: pip install 'openelm_mlx[bench]'.") from None
    made = MLXLM.__new__(MLXLM)
    made._model, made.tokenizer = model, _Numbers()
    made._max_tokens, made._batch_size, made.use_chat_template = None, 8, False
    return made


@contextmanager
def _importable_harness() -> Iterator[None]:
    """Let `lm_eval` be imported: mlx-lm's evaluator is a subclass of a class of its, and uses nothing else of it here.

    Where it is not installed, as on a machine without a network, modules stand in for it meanwhile.
    """
    if "lm_eval" in sys.modules or importlib.util.find_spec("lm_eval") is not None:
        yield
        return
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    made = {name: ModuleType(name) for name in names}
    vars(made["lm_eval.api.model"])["LM"] = type("LM", (), {})
    vars(made["lm_eval.api.registry"])["register_model"] = lambda *_: lambda kind: kind
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def models(name: str, num_layers: int | None = None) -> tuple[Any, Any, int]:
    """Ours, mlx-lm's with the same weights, and the number of tokens that may be drawn."""
    if name not in DEMOS:
        config = shape_config(name, num_layers)
        ours, theirs = random_pair(config)
        return ours, theirs, ours.spec.usable_vocab_size
    # The demos are stored in 8 bits, which one side could compute with and the other not.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "float32")
        convert(name, place, dtype="float32")
        ours, tokenizer = load(place)
        config = json.loads((place / "config.json").read_text())
    # Rows that mlx-lm's products read as they read those of its own files.
    weights = {key: mx.contiguous(array) for key, array in tree_flatten(ours.parameters())}
    # gpt-oss's experts stay as they were released.
    packed = {key.removesuffix(".scales"): Quantization(4, 32, "mxfp4") for key in weights if key.endswith(".scales")}
    theirs = mlx_lm_model(config, ours.spec, weights, packed, keeps=False, float32_as=mx.float32)
    assert tokenizer is not None
    return ours, theirs, tokenizer.vocab_size


def measure(
    name: str, count: int, few_shot_tokens: int = 0, rounds: int = 2, num_layers: int | None = None,
    tokens_at_once: int | None = None, seconds: float = math.inf, note: Note = lambda _: None,
) -> Rates:  # fmt: skip
    """Both sides in turns, after a warm-up of each on a few questions.

    seconds: after so many a round of mlx-lm's side ends with the part that it is at. note: told what each side took.
    """
    ours, theirs, vocab_size = models(name, num_layers)
    asked = questions(vocab_size, count, few_shot_tokens)
    evaluator = their_evaluator(theirs)
    requests = [each for choices in asked for each in choices]
    warm_up = asked[: min(4, count)]
    start = time.perf_counter()
    Scorer(ours, tokens_at_once).score([each for choices in warm_up for each in choices])
    _their_answers(evaluator, warm_up)
    note(f"warm-up: {time.perf_counter() - start:.2f} s")
    found: dict[str, list[Any]] = {"ours": [], "theirs": [], "cpu_ours": [], "cpu_theirs": [], "answered": []}
    difference, peak = 0.0, 0
    for at in range(rounds):
        scorer = Scorer(ours, tokens_at_once)
        with _timed(found["ours"], found["cpu_ours"]):
            scores = scorer.score(requests)
        peak = max(peak, scorer.peak_memory_bytes)
        note(f"round {at + 1}: ours {found['ours'][-1]:.2f} s, {count} of {count} questions")
        with _timed(found["theirs"], found["cpu_theirs"]):
            others = _their_answers(evaluator, asked, seconds)
        found["answered"].append(len(others) // len(asked[0]))
        note(f"round {at + 1}: mlx-lm {found['theirs'][-1]:.2f} s, {found['answered'][-1]} of {count} questions")
        difference = max(abs(a.logprob - b[0]) for a, b in zip(scores, others, strict=False))
    return Rates(
        name, count, few_shot_tokens, **{side: tuple(each) for side, each in found.items()},
        num_tokens=scorer.num_tokens, num_passes=scorer.num_passes, difference=difference, peak_bytes=peak,
    )  # fmt: skip


@contextmanager
def _timed(seconds: list[float], of_processor: list[float]) -> Iterator[None]:
    start, cpu = time.perf_counter(), time.process_time()
    yield
    seconds.append(time.perf_counter() - start)
    of_processor.append(time.process_time() - cpu)


def _as_text(request: TokenRequest) -> SimpleNamespace:
    context = " ".join(map(str, request.context))
    return SimpleNamespace(args=(context, " " + " ".join(map(str, request.continuation))))


def _their_answers(
    evaluator: Any, asked: Sequence[Sequence[TokenRequest]], seconds: float = math.inf
) -> list[tuple[float, bool]]:
    """Of the questions as far as they are answered after so many seconds, at least of the first part."""
    with _importable_harness():
        import mlx_lm.evaluate as module

    end = time.perf_counter() + seconds
    found: list[tuple[float, bool]] = []
    bars = module.tqdm
    module.tqdm = lambda each, **_: each  # its bar would be drawn over our lines
    try:
        for start in range(0, len(asked), QUESTIONS_AT_ONCE):
            some = asked[start : start + QUESTIONS_AT_ONCE]
            found += evaluator.loglikelihood([_as_text(each) for choices in some for each in choices])
            if time.perf_counter() >= end:
                break
    finally:
        module.tqdm = bars
    return found
