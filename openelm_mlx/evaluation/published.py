"""The figures that Apple and OpenAI published, and the task sets that they belong to; published.json has the sources."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import read_json


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """The content of published.json."""
    content: dict[str, Any] = read_json(Path(__file__).with_name("published.json"), ConfigError)
    return content


def task_sets() -> dict[str, dict[str, int]]:
    """Apple's sets by name: each task with its shots."""
    return {name: dict(each["shots"]) for name, each in published()["openelm"]["sets"].items()}


def usual_metric(task: str) -> str:
    """What is set beside a published figure: Apple does not say which it is."""
    return str(published()["openelm"]["metrics"].get(task, "acc"))


def openelm_figure(model: str, task_set: str | None, task: str) -> float | None:
    """Apple's figure in per cent, by the name of the model; None where there is none."""
    found = re.search(r"OpenELM-(270M|450M|1_1B|3B)(-Instruct)?", model, re.IGNORECASE)
    if found is None or task_set is None:
        return None
    size = found[1].upper() + ("-Instruct" if found[2] else "")
    figure = published()["openelm"]["sets"][task_set]["figures"][size].get(task)
    return None if figure is None else float(figure)


def gpt_oss_figure(model: str, task: str, effort: str) -> float | None:
    """OpenAI's figure in per cent, without tools; None where there is none."""
    found = re.search(r"gpt-oss-(?:20|120)b", model.lower())
    figures = published()["gpt_oss"]["figures"].get(task, {})
    figure = figures.get(found[0], {}).get(effort) if found else None
    return None if figure is None else float(figure)
