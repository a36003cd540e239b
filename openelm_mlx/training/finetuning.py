"""Fine-tuning: data, model and settings to an adapter, or to a model with all weights trained. Read it first."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date as day
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from .. import __version__
from ..arguments import FLAG, FUNCTION, NAME, PATH, checked_call
from ..checkpoint.adapter_files import write_adapter
from ..checks import is_number
from ..errors import CheckpointError, DataError, SettingError
from ..files import hears_the_disk, shown
from ..memory.limits import generating
from ..models.adapters import attach, trained_adapter
from ..sources import SourceName
from ..text.chat import HARMONY
from ..text.conversation import REASONING_EFFORTS
from .base import Base
from .batches import Row
from .data import PREFERENCE, DataSource, Example, read_examples, validation_file
from .full_output import as_json, write_model
from .loop import Listener, Trainer
from .optimizer import Schedule, adamw, is_matrix
from .plan import TrainingPlan, adapter_config, make_training_plan
from .rendering import Rendering, render_all
from .rows import Rows, reference_logprobs
from .settings import Settings, settings_from
from .state import RunFolder, State, check_output, previous_run
from .steps import Gradients, Objective

if TYPE_CHECKING:
    from ..models import Model

FORMATS = ("peft", "mlx-lm")


@hears_the_disk(CheckpointError)
@checked_call(
    "om.finetune",
    output=PATH,
    recipe=NAME,
    format=NAME,
    chat_template=NAME,
    revision=NAME,
    checkpointing=FLAG,
    restart=FLAG,
    progress=FUNCTION,
)
def finetune(
    source: SourceName,
    *,
    data: DataSource,
    output: str | os.PathLike[str],
    method: str | None = None,
    recipe: str | None = None,
    validation: DataSource | float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    final_learning_rate: float | None = None,
    warmup_steps: int | None = None,
    weight_decay: float | None = None,
    max_grad_norm: float | None = None,
    z_loss: float | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    preference: str | None = None,
    beta: float | None = None,
    learn: str | None = None,
    too_long: str | None = None,
    max_length: int | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    checkpointing: bool | None = None,
    tokens_at_once: int | None = None,
    memory_limit: int | str | None = None,
    dtype: str | mx.Dtype | None = None,
    tokenizer: SourceName | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    reasoning_effort: str | None = None,
    date: str | None = None,
    format: str = "peft",
    seed: int | None = None,
    restart: bool = False,
    progress: Listener | None = None,
) -> Path:
    """Train an adapter beside `source`, or all of its weights, and write it to the folder `output`; returns its path.

    Everything is checked before the model is read: each line of the data, the settings, the memory. After Ctrl-C or a crash
    the same call goes on where it stopped, bit for bit, from what it kept in `OUTPUT.partial`.

    Args:
        source: As for `load`.
        data: A .jsonl file, a folder with train.jsonl (and valid.jsonl), a Hugging Face dataset as "owner/name", or a list of
            dictionaries. Each line has "messages" (and "tools"), "prompt" and "completion", "text", or "chosen" and
            "rejected" (and "prompt"), which are preferences.
        output: The folder to write; nothing may be there.
        method: "lora" (the default), "dora", "rslora", or "full": all weights, which are unpacked where they are quantized.
        recipe: "apple-peft" or "apple-dpo", OpenELM's own; what is given besides takes the place of its settings.
        validation: Other data, measured `VALIDATIONS` times in the run or every validate_every steps; or a share of the data,
            as 0.1. patience: the run ends once it has failed to improve so often in a row, and the best adapter is written.
        steps, epochs: The length of the run; by default three epochs, and for few examples as many as 80 steps are.
        batch_size: Examples a step: by default 8, of fewer than 64 examples an eighth, 4 at least. How many tokens are
            computed at once is another matter (tokens_at_once), which changes nothing but memory.
        learning_rate, final_learning_rate, warmup_steps: A linear warm-up and a cosine.
        rank, alpha, dropout, targets, layers: The adapter's; targets are patterns such as "q_proj", "attention", "experts".
        preference, beta: "sigmoid" (DPO) or "hinge", for preferences.
        learn: "answers" (every turn of the assistant), "last" or "all".
        max_length: Of a row, at most the model's context; too_long: "error", "cut", "skip" or, for texts, "split".
        checkpointing: Compute each layer again for the gradient instead of keeping it; None: where memory is short.
        memory_limit: Bytes or "10GB"; what the machine has when it is None.
        format: "peft" or "mlx-lm".
        restart: Forget an interrupted run to the same output.
        progress: Called with `Progress` after each step.

    Raises the errors of `openelm_mlx.errors`, each with the next step.
    """
    asked = dict(locals())
    del asked["source"], asked["progress"]
    return Finetuning.prepare(source, **asked).run(progress)


def prepare_finetuning(source: SourceName, **options: Any) -> Finetuning:
    """Everything that `finetune` does, with the same options, before it reads the model."""
    return Finetuning.prepare(source, **options)


@dataclass
class Finetuning:
    """A run that has been checked and planned, and read nothing of the model's tensors yet.

    log: of each step, once it has run: step, loss, rate, norm, tokens, seconds, and validation where it was measured.
    """

    base: Base
    settings: Settings
    plan: TrainingPlan
    rows: Rows
    validation: Rows | None
    output: Path
    what: Mapping[str, Any]
    format: str
    restart: bool
    log: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def prepare(cls, source: SourceName, **options: Any) -> Finetuning:
        """Check everything that `finetune` was given, what is cheap first, and plan. Its errors are raised here.

        options: those of `finetune`, which has their defaults.
        """
        call = inspect.signature(finetune).bind(source, **options)
        call.apply_defaults()
        asked = call.arguments
        _check_words(asked)
        chosen = _plain(asked)
        wanted = settings_from(asked["recipe"], chosen)
        check_output(asked["output"])
        examples = read_examples(asked["data"])
        examples, held_out = _divided(asked["validation"], asked["data"], examples, wanted.seed)
        opening = {name: asked[name] for name in ("dtype", "tokenizer", "chat_template", "revision")}
        base = Base.open(source, trains_all=wanted.method == "full", **opening)
        wanted = settings_from(asked["recipe"], chosen, len(base.spec.layers))
        is_preference = examples[0].kind == PREFERENCE
        before = {} if asked["restart"] else previous_run(asked["output"])
        rendering = _rendering(base, wanted, asked, before)
        rows = render_all(rendering, examples)
        validation_rows = render_all(rendering, held_out) if held_out else []
        complete = wanted.completed(len(rows), is_preference)
        # As it was before an interruption, or the last bit would be another one.
        ways = {
            name: before.get(name) if asked[name] is None else asked[name]
            for name in ("checkpointing", "tokens_at_once")
        }
        limit = asked["memory_limit"]
        plan = make_training_plan(base, complete, rows, **ways, memory_limit=limit, is_preference=is_preference)
        if not plan.fits:
            raise plan.refusal()

        def as_data(examples: Sequence[Sequence[Row]]) -> Rows:
            assert complete.batch_size is not None
            reference = _no_reference(len(examples)) if is_preference else None
            return Rows(examples, complete.batch_size, plan.tokens_at_once, complete.seed, reference)

        training, validating = as_data(rows), as_data(validation_rows) if validation_rows else None
        what = {
            "version": __version__,
            "source": base.name,
            "data": training.fingerprint(),
            "validation": "" if validating is None else validating.fingerprint(),
            "date": rendering.date,
            "checkpointing": plan.checkpointing,
            "tokens_at_once": plan.tokens_at_once,
            "dtype": str(base.dtype),
            "settings": complete.as_dict(),
        }
        output = Path(asked["output"])
        return cls(base, complete, plan, training, validating, output, what, asked["format"], asked["restart"])

    @property
    def is_preference(self) -> bool:
        """Whether it learns from preferences."""
        return self.rows.reference is not None

    def run(
        self,
        listener: Listener | None = None,
        started: Callable[[float, int], None] | None = None,
        referring: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Read the model, train, and write the result; see `finetune`.

        started: called before the first step with the seconds that the run will take and the step that it begins after.
        referring: called with (rows done, all rows) while the reference of preferences is computed.
        """
        folder = RunFolder(self.output, self.what, self.restart)
        try:
            with generating(self.plan):
                model = self.base.read()
                trainer = self._trainer(model, folder, listener, referring)
                if started is not None:
                    started(trainer.seconds_left(), trainer.resumed_at)
                state = trainer.run()
                self.log = state.log
                path = self._write(model, state)
            folder.finish()
            return path
        finally:
            folder.close()

    def _trainer(
        self,
        model: Model,
        folder: RunFolder | None,
        listener: Listener | None,
        referring: Callable[[int, int], None] | None = None,
    ) -> Trainer:
        settings = self.settings
        objective = Objective(
            z_loss=settings.z_loss,
            preference=settings.preference if self.is_preference else None,
            beta=settings.beta,
        )
        dtype = self.base.dtype if self.base.trains_all and self.base.dtype != mx.float32 else None
        gradients = Gradients(model, objective, dtype, self.plan.checkpointing)
        if self.is_preference:
            self._refer(gradients, referring)
        if not self.base.trains_all:
            attach(model, adapter_config(settings))
        return Trainer(
            model,
            gradients,
            adamw(settings.betas, settings.eps, settings.weight_decay, None if settings.decay_norms else is_matrix),
            schedule_of(settings),
            self.rows,
            max_grad_norm=settings.max_grad_norm,
            validation=self.validation.all_parts() if self.validation is not None else (),
            validate_every=settings.validate_every or 0,
            patience=settings.patience,
            seed=settings.seed,
            folder=folder,
            listener=listener,
            kept_bytes=self.plan.cache_limit_bytes,
        )

    def _refer(self, gradients: Gradients, tell: Callable[[int, int], None] | None) -> None:
        """The reference is the model as it was read: without the adapter that comes, and before any weight is changed."""
        for rows in (self.rows, self.validation):
            if rows is not None:
                rows.reference = reference_logprobs(gradients, rows.examples, self.plan.tokens_at_once, tell)

    def _write(self, model: Model, state: State) -> Path:
        card = {"training.json": as_json({**self.what, "log": state.log})}
        if self.base.trains_all:
            return write_model(self.output, model, self.base, card)
        base = {"name": self.base.name, "family": self.base.spec.family, "hash": self.base.hash()}
        adapter = replace(trained_adapter(model), base=base)
        return write_adapter(self.output, adapter, self.base.spec, self.format, card)


def schedule_of(settings: Settings) -> Schedule:
    """The learning rates of completed settings."""
    assert settings.learning_rate is not None
    assert settings.steps is not None
    return Schedule(settings.learning_rate, settings.steps, settings.warmup_steps or 0, settings.final_learning_rate)


def _divided(
    asked: DataSource | float | None, data: DataSource, examples: list[Example], seed: int
) -> tuple[list[Example], list[Example]]:
    """The examples to learn from and those to validate with, which are other data or a share of them."""
    asked = validation_file(data) if asked is None else asked
    if asked is None:
        return examples, []
    if is_number(asked):
        if not 0 < asked < 1:
            raise SettingError(f"validation is {shown(asked)}: give a share between 0 and 1, or other data.")
        count = max(1, round(asked * len(examples)))
        if count >= len(examples):
            raise DataError(f"validation={asked:g} of {len(examples)} examples leaves none to learn from: give more.")
        held = set(np.random.default_rng([seed, 2**31]).permutation(len(examples))[:count].tolist())
        return [e for i, e in enumerate(examples) if i not in held], [examples[i] for i in sorted(held)]
    found = read_examples(cast("DataSource", asked), "validation")
    if (found[0].kind == PREFERENCE) != (examples[0].kind == PREFERENCE):
        raise found[0].error("data and validation are of two kinds: both must be preferences, or neither.")
    return examples, found


def _check_words(asked: Mapping[str, Any]) -> None:
    """Raise SettingError for a format or an effort that there is not."""
    if asked["format"] not in FORMATS:
        raise SettingError(f"format is {shown(asked['format'])}: choose peft or mlx-lm.")
    effort = asked["reasoning_effort"]
    if effort is not None and effort not in REASONING_EFFORTS:
        raise SettingError(f"reasoning_effort is {shown(effort)}: use low, medium or high.")


def _rendering(base: Base, settings: Settings, asked: Mapping[str, Any], before: Mapping[str, Any]) -> Rendering:
    """How examples become rows. before: of an interrupted run, whose date holds on."""
    effort = asked["reasoning_effort"]
    if effort is not None and base.template.template != HARMONY:
        raise SettingError(
            f"reasoning_effort is {shown(effort)}, and only gpt-oss's chat format has one: leave it out."
        )
    most = base.spec.context_length if settings.max_length is None else settings.max_length
    if most > base.spec.context_length:
        raise SettingError(
            f"max_length is {most:,}: it must be at most the model's context, {base.spec.context_length:,}."
        )
    return Rendering(
        tokenizer=base.tokenizer,
        template=base.template.template,
        max_length=most,
        learn=settings.learn,
        too_long=settings.too_long,
        date=_checked_date(asked["date"]) or before.get("date") or f"{day.today():%Y-%m-%d}",
        reasoning_effort=effort or "medium",
        context_length=base.spec.context_length,
    )


def _plain(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The same with lists as tuples, which settings are compared by."""
    settings = dict(asked)
    for name, kind, example in (("targets", str, '["q_proj"]'), ("layers", int, "[0, 1]")):
        value = settings.get(name)
        if isinstance(value, str):
            raise SettingError(f'{name} is {shown(value)}: give a list, as ["{value}"].')
        if value is not None:
            if not isinstance(value, (list, tuple)) or not all(isinstance(each, kind) for each in value):
                raise SettingError(f"{name} is {shown(value)}: give a list, as {example}.")
            settings[name] = tuple(value)
    return settings


def _checked_date(date: str | None) -> str | None:
    if date is None:
        return None
    try:
        return f"{day.fromisoformat(date):%Y-%m-%d}"
    except (TypeError, ValueError):
        raise SettingError(f"date is {shown(date)}: write it as YYYY-MM-DD.") from None


def _no_reference(count: int) -> np.ndarray:
    """A place for the reference of so many pairs, which is computed once the model is read."""
    return np.zeros((count, 2), np.float32)
