"""Answers of a model to many questions through an engine: of gpt-oss the final channel only, its reasoning counted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from ..decoding.sampling import SamplingParams
from ..engine.handle import Handle
from ..engine.many import Engine
from ..engine.prompt import Prompt, encode_prompt
from ..errors import MemoryLimitError, PromptError
from ..text.chat import HARMONY
from ..text.tokenizer import Tokenizer
from .requests import OnDone
from .store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..models import Model

# Between two looks at requests that end in any order, in seconds.
_PAUSE = 0.02


@dataclass(frozen=True)
class Answer:
    """A model's answer. text: without reasoning. has_final: gpt-oss came to an answer at all; always of other models.

    tokens: all that were generated; analysis_tokens: those that are no part of the answer. finish_reason: "stop", "length".
    """

    text: str
    has_final: bool
    tokens: int
    analysis_tokens: int
    finish_reason: str


def answers(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    options: Sequence[Mapping[str, Any]],
    store: Store,
    keys: Sequence[str],
    on_done: OnDone | None = None,
) -> list[Answer]:
    """The answer to each prompt, with its options of `stream_generate`; what the store has is not asked again.

    Raises PromptError with the number of a prompt that is longer than the context, before anything runs.
    """
    found: dict[int, Answer] = {}
    for i, key in enumerate(keys):
        if (stored := store.get(key)) is not None:
            found[i] = Answer(**stored)
    if on_done is not None and found:
        on_done(len(found))
    missing = [i for i in range(len(prompts)) if i not in found]
    if not missing:
        return [found[i] for i in range(len(prompts))]
    with Engine(model, tokenizer, max_waiting=max(1, len(missing))) as engine:
        waiting: dict[int, Handle] = {}
        for i in missing:
            with _numbered(i, len(prompts)):
                prompt = as_begun(model, tokenizer, prompts[i], options[i], store.date)
                waiting[i] = engine.submit(prompt, **options[i])
        while waiting:
            done = [i for i, handle in waiting.items() if handle.is_done]
            if not done:
                time.sleep(_PAUSE)
                continue
            for i in done:
                with _numbered(i, len(prompts)):
                    found[i] = _answer(waiting.pop(i))
            store.put({keys[i]: asdict(found[i]) for i in done})
            if on_done is not None:
                on_done(len(done))
    return [found[i] for i in range(len(prompts))]


def as_begun(model: Model, tokenizer: Tokenizer | None, prompt: Prompt, options: Mapping[str, Any], day: str) -> Prompt:
    """The prompt, with the date in gpt-oss's system message on which the run was begun, as tokens where it was another."""
    is_harmony = tokenizer is not None and tokenizer.chat_template == HARMONY and not options.get("raw")
    if not is_harmony or day == f"{date.today():%Y-%m-%d}":
        return prompt
    effort = options.get("reasoning_effort")
    return encode_prompt(model, tokenizer, prompt, reasoning_effort=effort, current_date=day).tokens


def _answer(handle: Handle) -> Answer:
    text, last = "", None
    for last in handle:
        text += last.text
    statistics = handle.statistics
    assert last is not None
    assert statistics is not None
    return Answer(
        text=text,
        has_final=statistics.no_answer is None,
        tokens=statistics.completion_tokens,
        analysis_tokens=statistics.reasoning_tokens,
        finish_reason=last.finish_reason or "stop",
    )


def seeded(sampling: SamplingParams, number: int) -> SamplingParams:
    """The same sampling with a seed of its own for each repeat, so that a run can be interrupted."""
    return replace(sampling, seed=((sampling.seed or 0) * 1_000_003 + number) % 2**32)


@contextmanager
def _numbered(at: int, count: int) -> Iterator[None]:
    try:
        yield
    except (PromptError, MemoryLimitError) as error:
        raise type(error)(f"Question {at + 1} of {count}: {error}") from None
