"""A whole evaluation: tasks from a few sources, one model, one report, which goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..decoding.sampling import SamplingParams
from ..errors import SettingError
from ..loading import load
from ..runtime import runtime_of
from ..text.chat import HARMONY, PLAIN
from ..text.conversation import REASONING_EFFORTS
from ..text.tokenizer import Tokenizer
from .answers import Answer, answers, seeded
from .borders import Borders
from .chats import chat_tokens
from .likelihood import borders_of
from .protocols import Asked, Choices, Question, is_ours, make_task, run_tests
from .published import gpt_oss_figure, published, task_sets
from .report import Report, Row
from .requests import StageProgress, TokenRequest
from .scorer import Scorer, kept_scores
from .statistics import mean_of
from .store import Store
from .tasks import check_data, check_names, run_tasks, task_manager, versions

if TYPE_CHECKING:
    from ..models import Model

# Of a model's folder, or an adapter's.
_MODEL_FILES = (".safetensors", ".json", ".model", ".gguf", ".npz", ".jinja")

NO_FINAL_NOTE = (
    "No final: questions to which gpt-oss came to no answer; they count as wrong. Raise --max-tokens if there are many."
)


@dataclass(frozen=True)
class Settings:
    """What to evaluate. tasks: names of sets, of tasks, or files; the rest as the options of the command.

    Raises SettingError for an effort that there is not.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    efforts: tuple[str, ...] = ()
    add_bos: bool | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    include_path: str | None = None
    data: tuple[tuple[str, str], ...] = ()
    allow_unsandboxed: bool = False

    def __post_init__(self) -> None:
        for effort in self.efforts:
            if effort not in REASONING_EFFORTS:
                raise SettingError(
                    f"reasoning_effort is {effort!r}: give low, medium or high, with commas between them."
                )

    def identity(self, model: str, load_options: Mapping[str, Any]) -> dict[str, Any]:
        """What answers of an interrupted run have to agree with: the model and its files, and these settings."""
        own = {name: value for name, value in vars(self).items() if name != "allow_unsandboxed"}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        own["data"] = [list(pair) for pair in self.data]
        adapter = load_options.get("adapter")
        files = {name: _state_of(path) for name, path in (("model_files", model), ("adapter_files", adapter))}
        return {"model": model, "load": _loaded(load_options), **files, **own}


@dataclass(frozen=True)
class Planned:
    """The tasks by who runs them. of_harness: sets of (name of the set, shots, tasks); ours: made ones."""

    ours: tuple[Asked, ...]
    of_harness: tuple[tuple[str | None, int | None, tuple[str, ...]], ...]
    manager: Any


def plan_tasks(settings: Settings) -> Planned:
    """Find every task and its data before the model is loaded. Raises SettingError or PromptError."""
    sets = task_sets()
    data = dict(settings.data)
    ours: list[Asked] = []
    groups: list[tuple[str | None, int | None, tuple[str, ...]]] = []
    alone: list[str] = []
    for name in settings.tasks:
        if name in sets:
            by_shots: dict[int, list[str]] = {}
            for task, shots in sets[name].items():
                by_shots.setdefault(shots if settings.shots is None else settings.shots, []).append(task)
            groups += [(name, shots, tuple(tasks)) for shots, tasks in by_shots.items()]
        elif is_ours(name):
            ours.append(make_task(name, settings.limit, data.get(name), settings.seed))
        else:
            alone.append(name)
    if alone:
        groups.append((None, settings.shots, tuple(alone)))
    manager = None
    if groups:
        names = list(dict.fromkeys(task for _, _, tasks in groups for task in tasks))
        manager = task_manager(settings.include_path, names)
        check_names(names, manager)
        check_data(names, manager)
    return Planned(tuple(ours), tuple(groups), manager)


def evaluate(
    source: str,
    settings: Settings,
    *,
    load_options: Mapping[str, Any] | None = None,
    store_path: Path | None = None,
    progress: StageProgress | None = None,
) -> Report:
    """Evaluate the model at `source`. Answers are kept in `store_path` until the report is whole.

    Raises the errors of `om.load`, SettingError, PromptError, DestinationError for a store that is not this run's.
    """
    options = {} if load_options is None else dict(load_options)
    store = Store(store_path, settings.identity(source, options))
    started = time.perf_counter()
    try:
        planned = plan_tasks(settings)
        model, tokenizer = load(source, **options)
        report = Report(source, _described(model, tokenizer, source, settings, options))
        run = _Run(model, tokenizer, source, settings, store, progress)
        for asked in planned.ours:
            report.rows += run.ours(asked)
        for task_set, shots, names in planned.of_harness:
            report.rows += run.of_harness(task_set, shots, names, planned.manager)
        report.seconds = time.perf_counter() - started
        report.notes += _notes(report, planned)
        return report
    finally:
        store.close()


class _Run:
    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        name: str,
        settings: Settings,
        store: Store,
        progress: StageProgress | None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.settings, self.store = model, tokenizer, name, settings, store
        self.progress: StageProgress = (lambda what, more, total: None) if progress is None else progress
        is_harmony = tokenizer is not None and tokenizer.chat_template == HARMONY
        if settings.efforts and not is_harmony:
            raise SettingError(
                f"reasoning_effort is {','.join(settings.efforts)}, and only gpt-oss's chat format has one: leave it out."
            )
        self.efforts: tuple[str | None, ...] = settings.efforts or (("medium",) if is_harmony else (None,))
        self.is_chat = tokenizer is not None and tokenizer.chat_template != PLAIN

    def ours(self, asked: Asked) -> list[Row]:
        """The figures of a task that is asked here, for each effort."""
        if asked.has_choices:
            return self._choices(asked)
        return [row for effort in self.efforts for row in self._answers(asked, effort)]

    def of_harness(self, task_set: str | None, shots: int | None, names: Sequence[str], manager: Any) -> list[Row]:
        """The figures of tasks of the harness."""
        from .harness import HarnessModel

        rows = []
        # Only a chat's system message has an effort in it.
        efforts = self.efforts if self.settings.apply_chat_template else (None,)
        for effort in efforts:
            lm = HarnessModel(
                model=self.model, tokenizer=self.tokenizer, add_bos_token=self.settings.add_bos, reasoning_effort=effort,
                store=self.store, progress=self.progress,
            )  # fmt: skip
            if self.settings.max_tokens is not None:
                lm.max_gen_toks = self.settings.max_tokens
            rows += run_tasks(
                lm, names, manager, shots=shots, limit=self.settings.limit, seed=self.settings.seed,
                apply_chat_template=self.settings.apply_chat_template,
                fewshot_as_multiturn=self.settings.fewshot_as_multiturn and self.settings.apply_chat_template,
                system=self.settings.system, task_set=task_set, model_name=self.name, effort=effort,
            )  # fmt: skip
        return rows

    def _choices(self, asked: Asked) -> list[Row]:
        """Questions whose choices are scored: the likeliest is the answer, by its sum, and by its sum over its length."""
        borders = borders_of(self.model, self.tokenizer, None, self.settings.add_bos)
        questions: list[Choices] = [each for each in asked.questions if isinstance(each, Choices)]
        pairs = [(each.context, choice) for each in questions for choice in each.choices]
        requests = [request for each in questions for request in self._scored(borders, each)]
        keys = [self.store.key("choice", *pair) for pair in pairs]
        started = time.perf_counter()
        found = kept_scores(
            Scorer(self.model), requests, self.store, keys, lambda more: self.progress(asked.name, more, len(pairs))
        )
        scores = iter(found)
        right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
        for each in questions:
            sums = [next(scores).logprob for _ in each.choices]
            shares = [total / max(1, len(choice.strip())) for total, choice in zip(sums, each.choices, strict=True)]
            right["acc"].append(float(sums.index(max(sums)) == each.answer))
            right["acc_norm"].append(float(shares.index(max(shares)) == each.answer))
        seconds = time.perf_counter() - started
        rows = []
        for metric, values in right.items():
            mean = mean_of(values)
            rows.append(
                Row(
                    asked.name,
                    metric,
                    100 * mean.value,
                    100 * mean.error,
                    mean.n,
                    shots=0,
                    version=asked.version,
                    seconds=seconds,
                )
            )
        return rows

    def _scored(self, borders: Borders, question: Choices) -> list[TokenRequest]:
        """A request for each of its choices."""
        if not question.is_chat:
            return [borders.pair(question.context, choice) for choice in question.choices]
        if self.tokenizer is None or not self.is_chat:
            return [borders.pair(f"{question.context}\nAnswer:", f" {choice}") for choice in question.choices]
        message = {"role": "user", "content": question.context}
        before = chat_tokens(self.model, self.tokenizer, [message], is_scored=True, effort=self.efforts[0])
        return [borders.after_tokens(before, choice) for choice in question.choices]

    def _answers(self, asked: Asked, effort: str | None) -> list[Row]:
        """Questions that are answered: the mean grade of the final channel, over questions and repeats."""
        given = asked.questions if self.is_chat or not asked.base_questions else asked.base_questions
        questions: list[Question] = [each for each in given if isinstance(each, Question)]
        temperature = asked.temperature if self.settings.temperature is None else self.settings.temperature
        sampling = SamplingParams(temperature=temperature)
        prompts, options, keys = [], [], []
        for each in questions:
            prompts.append(self._prompt(each))
            own: dict[str, Any] = {"max_tokens": self.settings.max_tokens, "stop": each.stop, "raw": each.is_raw}
            own["sampling"] = seeded(sampling, self.settings.seed + each.repeat) if temperature else sampling
            if effort is not None:
                own["reasoning_effort"] = effort
            options.append(own)
            keys.append(
                self.store.key("answer", each.prompt, each.repeat, effort, temperature, self.settings.max_tokens)
            )
        what = asked.name if effort is None else f"{asked.name} {effort}"
        started = time.perf_counter()
        found = answers(
            self.model, self.tokenizer, prompts, options, self.store, keys,
            lambda more: self.progress(what, more, len(questions)),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        grades = self._grades(asked, questions, found)
        mean = mean_of(grades)
        has_analysis = effort is not None
        return [
            Row(
                asked.name,
                asked.metric,
                100 * mean.value,
                100 * mean.error,
                mean.n,
                effort=effort,
                version=asked.version,
                published=None if effort is None else gpt_oss_figure(self.name, asked.name, effort),
                no_final=sum(not each.has_final for each in found) if has_analysis else None,
                analysis_tokens=sum(each.analysis_tokens for each in found) / len(found) if has_analysis else None,
                tokens=sum(each.tokens for each in found),
                seconds=seconds,
            )
        ]

    def _prompt(self, question: Question) -> Any:
        if question.is_raw or not self.is_chat:
            return question.prompt
        return [{"role": "user", "content": question.prompt}]

    def _grades(self, asked: Asked, questions: Sequence[Question], found: Sequence[Answer]) -> list[float]:
        if not asked.needs_python:
            return [q.grade(a.text) if a.has_final else 0.0 for q, a in zip(questions, found, strict=True)]
        from ..tools.python_tool import PythonTool
        from ..tools.sandbox import Limits

        grades: list[float] = []
        with PythonTool(limits=Limits(seconds=20), allow_unsandboxed=self.settings.allow_unsandboxed) as python:
            for question, answer in zip(questions, found, strict=True):
                grades += run_tests(question, [answer.text], python) if answer.has_final else [0.0]
        return grades


def _described(
    model: Model, tokenizer: Tokenizer | None, source: str, settings: Settings, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What the figures were made with."""
    plan = runtime_of(model).plan
    dtype = str(model.embed(mx.array([[0]])).dtype).removeprefix("mlx.core.")
    return {
        "dtype": dtype,
        "weights_bytes": None if plan is None else plan.weights_bytes,
        **_loaded(options),
        "tokenizer": None
        if tokenizer is None
        else f"{len(tokenizer.files) and tokenizer.files[0].name} of {tokenizer.vocab_size:,}",
        "bos": "as the tokenizer does" if settings.add_bos is None else settings.add_bos,
        "chat_template": None if tokenizer is None else tokenizer.chat_template,
        "apply_chat_template": settings.apply_chat_template,
        "efforts": ",".join(settings.efforts) or None,
        "system": settings.system,
        "limit": settings.limit,
        "shots": settings.shots,
        "seed": settings.seed,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "date": time.strftime("%Y-%m-%d"),
        "versions": ", ".join(f"{name} {each}" for name, each in versions().items()),
    }


def _state_of(path: Any) -> str | None:
    """Tells whether a folder's files, or a file, have been written anew; None of what is not here."""
    place = Path(str(path)).expanduser()
    if path is None or not place.exists():
        return None
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    states = [(each.name, each.stat()) for each in files if each.suffix in _MODEL_FILES]
    told = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def _loaded(options: Mapping[str, Any]) -> dict[str, str]:
    """Keywords of `load`, as a report has them."""
    left_out = ("progress", "secret_file", "worker_timeout")
    return {name: str(value) for name, value in options.items() if value is not None and name not in left_out}


def _notes(report: Report, planned: Planned) -> list[str]:
    notes = []
    if any(row.published is not None and row.task_set for row in report.rows):
        notes.append(f"Published: {published()['openelm']['source']}")
    if any(row.published is not None and row.effort for row in report.rows):
        notes.append(f"Published: {published()['gpt_oss']['source']}.")
    if any(row.no_final for row in report.rows):
        notes.append(NO_FINAL_NOTE)
    if any(row.effort and row.n < 8 * 30 and _repeats_of(planned, row.task) == 1 for row in report.rows):
        notes.append(
            "One answer to each question: another seed may give figures that differ by more than the error says."
        )
    for task_set, averages in _averages(report).items():
        notes.append(f"{task_set}: {averages}")
    return notes


def _repeats_of(planned: Planned, task: str) -> int:
    """How often each question of a task was asked."""
    return next((each.repeats for each in planned.ours if each.name == task), 1)


def _averages(report: Report) -> dict[str, str]:
    """Of each whole set the average over its tasks, ours and Apple's."""
    found = {}
    for task_set, shots in task_sets().items():
        rows = [row for row in report.rows if row.task_set == task_set and row.usual and row.task in shots]
        if {row.task for row in rows} == set(shots):
            ours = sum(row.value for row in rows) / len(rows)
            theirs = [row.published for row in rows if row.published is not None]
            told = f", published {sum(theirs) / len(theirs):.2f}" if len(theirs) == len(rows) else ""
            found[task_set] = f"average of {len(rows)} tasks {ours:.2f}{told}."
    return found
