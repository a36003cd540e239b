"""Scoring choices: our scorer and mlx-lm's evaluator, in turns in one process, on the same questions and weights."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from openelm_mlx.bench.random_pair import random_pair, shape_config
from openelm_mlx.conversion import convert
from openelm_mlx.errors import SettingError
from openelm_mlx.evaluation.requests import TokenRequest
from openelm_mlx.evaluation.scorer import Scorer
from openelm_mlx.loading import load

DEMOS = ("demo-openelm", "demo-gpt-oss")


@dataclass(frozen=True)
class Rates:
    """Seconds of each side, a figure for each round, and how far its answers are from ours at most, in nats.

    num_tokens, num_passes: what ours computed. cpu_ours, cpu_theirs: seconds of the process's own work, which other
    programs on a busy machine do not lengthen as much.
    """

    model: str
    questions: int
    few_shot_tokens: int
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    cpu_ours: tuple[float, ...]
    cpu_theirs: tuple[float, ...]
    num_tokens: int
    num_passes: int
    difference: float
    peak_bytes: int

    @property
    def ratio(self) -> float:
        return median(self.theirs) / median(self.ours)

    @property
    def cpu_ratio(self) -> float:
        return median(self.cpu_theirs) / median(self.cpu_ours)

    def line(self) -> str:
        return (
            f"{self.model}, {self.questions} questions after {self.few_shot_tokens} tokens of examples: ours "
            f"{median(self.ours):.2f} s, mlx-lm {median(self.theirs):.2f} s: {self.ratio:.2f} times ({self.cpu_ratio:.2f} by "
            f"the processor's time); {self.num_tokens:,} tokens in {self.num_passes} passes; the answers differ by "
            f"{self.difference:.1e} at most"
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
    """mlx-lm's, with a model that is there. Raises SettingError where its packages are not installed."""
    try:
        from mlx_lm.evaluate import MLXLM
    except ImportError:
        raise SettingError("This needs mlx-lm and lm_eval: pip install 'openelm_mlx[bench,evaluate]'.") from None
    made = MLXLM.__new__(MLXLM)
    made._model, made.tokenizer = model, _Numbers()
    made._max_tokens, made._batch_size, made.use_chat_template = None, 8, False
    return made


def models(name: str, num_layers: int | None = None) -> tuple[Any, Any, int]:
    """Ours, mlx-lm's with the same weights, and the number of tokens that may be drawn."""
    if name not in DEMOS:
        config = shape_config(name, num_layers)
        ours, theirs = random_pair(config)
        return ours, theirs, ours.spec.usable_vocab_size
    from mlx_lm.utils import load_model

    # The demos are stored in 8 bits, which one side could compute with and the other not.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "float32")
        convert(name, place, dtype="float32")
        ours, tokenizer = load(place)
        theirs, _ = load_model(place)
    assert tokenizer is not None
    return ours, theirs, tokenizer.vocab_size


def measure(
    name: str, count: int, few_shot_tokens: int = 0, rounds: int = 2, num_layers: int | None = None,
    tokens_at_once: int | None = None,
) -> Rates:  # fmt: skip
    """Both sides in turns, after a warm-up of each on a few questions."""
    ours, theirs, vocab_size = models(name, num_layers)
    asked = questions(vocab_size, count, few_shot_tokens)
    evaluator = their_evaluator(theirs)
    requests = [each for choices in asked for each in choices]
    pairs = [_as_text(each) for each in requests]
    warm_up = 4 * min(4, count)
    Scorer(ours, tokens_at_once).score(requests[:warm_up])
    _quietly(evaluator, pairs[:warm_up])
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "cpu_ours": [], "cpu_theirs": []}
    difference, peak = 0.0, 0
    for _ in range(rounds):
        scorer = Scorer(ours, tokens_at_once)
        start, cpu = time.perf_counter(), time.process_time()
        found = scorer.score(requests)
        seconds["ours"].append(time.perf_counter() - start)
        seconds["cpu_ours"].append(time.process_time() - cpu)
        peak = max(peak, scorer.peak_memory_bytes)
        start, cpu = time.perf_counter(), time.process_time()
        others = _quietly(evaluator, pairs)
        seconds["theirs"].append(time.perf_counter() - start)
        seconds["cpu_theirs"].append(time.process_time() - cpu)
        difference = max(abs(a.logprob - b[0]) for a, b in zip(found, others, strict=True))
    return Rates(
        name, count, few_shot_tokens, **{side: tuple(each) for side, each in seconds.items()},
        num_tokens=scorer.num_tokens, num_passes=scorer.num_passes, difference=difference, peak_bytes=peak,
    )  # fmt: skip


def _as_text(request: TokenRequest) -> SimpleNamespace:
    context = " ".join(map(str, request.context))
    return SimpleNamespace(args=(context, " " + " ".join(map(str, request.continuation))))


def _quietly(evaluator: Any, pairs: Sequence[Any]) -> list[tuple[float, bool]]:
    import mlx_lm.evaluate as module

    bars = module.tqdm
    module.tqdm = lambda each, **_: each  # its bar would be drawn over our lines
    try:
        found: list[tuple[float, bool]] = evaluator.loglikelihood(pairs)
    finally:
        module.tqdm = bars
    return found
