"""The numbers of a run: what is asked for, what a recipe says, and what holds where neither says anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..checks import is_number, whole_number
from ..errors import SettingError
from ..files import shown
from .rendering import LEARN, TOO_LONG, checked_choice

METHODS = ("lora", "dora", "rslora", "full")
PREFERENCES = ("sigmoid", "hinge")
# A small data set is gone through until so many steps have been made; a large one so many times.
USUAL_EPOCHS, FEWEST_STEPS = 3, 80
# Examples a step: of few examples an eighth, within these bounds, since what is learned depends on the number of steps.
SMALL_BATCH_SIZE, USUAL_BATCH_SIZE = 4, 8
# Validation and log: so many times in a run, unless said otherwise.
VALIDATIONS = 10


@dataclass(frozen=True)
class Settings:
    """How to train. None: chosen by `completed`, from the method, the recipe and the number of examples.

    method: one of `METHODS`. steps, epochs: the run's length; steps count where both are given. batch_size: examples a step.
    learning_rate: after warmup_steps from 1e-6, it falls along a cosine to final_learning_rate. warmup_share: of all steps,
    where warmup_steps is None; None: 5 %, at most 100 steps. max_grad_norm: gradients are clipped to this global norm; 0:
    never. decay_norms: whether weight decay reaches vectors as well. rank, alpha, dropout: of the adapter. preference, beta: of
    pairs of answers. learn, too_long, max_length: see `Rendering`. validate_every: steps; patience: how often in a row
    validation may fail to improve before the run ends (None: it never does).
    """

    method: str = "lora"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    final_learning_rate: float | None = None
    warmup_steps: int | None = None
    warmup_share: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_norms: bool = False
    max_grad_norm: float = 1.0
    z_loss: float = 0.0
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    preference: str = "sigmoid"
    beta: float = 0.1
    learn: str = "answers"
    too_long: str = "error"
    max_length: int | None = None
    validate_every: int | None = None
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checked_choice("method", self.method, METHODS)
        checked_choice("preference", self.preference, PREFERENCES)
        checked_choice("learn", self.learn, LEARN)
        checked_choice("too_long", self.too_long, TOO_LONG)
        for name in ("steps", "batch_size", "rank", "max_length", "validate_every", "patience"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), low=2 if name == "max_length" else 1, high=10**9)
        for name in ("warmup_steps", "seed"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), low=0, high=2**31 - 1)
        self._check_numbers()

    def _check_numbers(self) -> None:
        bounds = {
            "epochs": (0, 1e6), "learning_rate": (0, 10), "alpha": (0, 1e6), "eps": (0, 1), "beta": (0, 1e3),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not (is_number(value) and low < value <= high):
                raise SettingError(f"{name} is {shown(value)}: it must be a number above {low} and at most {high:g}.")
        from_zero = {
            "final_learning_rate": 10, "warmup_share": 1, "weight_decay": 1, "max_grad_norm": 1e6, "z_loss": 1,
        }  # fmt: skip
        for name, most in from_zero.items():
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value <= most):
                raise SettingError(f"{name} is {shown(value)}: it must be a number from 0 to {most:g}.")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise SettingError(f"dropout is {shown(self.dropout)}: it must be a number from 0 to below 1.")
        if len(self.betas) != 2 or not all(is_number(each) and 0 <= each < 1 for each in self.betas):
            raise SettingError(f"betas are {shown(self.betas)}: give two numbers from 0 to below 1.")

    def completed(self, num_examples: int, is_preference: bool) -> Settings:
        """The same with nothing left open."""
        batch_size = self.batch_size or min(USUAL_BATCH_SIZE, max(SMALL_BATCH_SIZE, num_examples // 8))
        of_epoch = max(1, num_examples / batch_size)
        if self.steps is not None:
            steps = self.steps
        elif self.epochs is not None:
            steps = max(1, math.ceil(self.epochs * of_epoch))
        else:
            steps = max(math.ceil(USUAL_EPOCHS * of_epoch), FEWEST_STEPS)
        rate = self.learning_rate
        if rate is None:
            rate = (
                (1e-5 if self.method == "full" else 5e-5) if is_preference else 2e-4 if self.method == "full" else 2e-3
            )
        final = rate / 10 if self.final_learning_rate is None else self.final_learning_rate
        if final > rate:
            raise SettingError(
                f"final_learning_rate is {final:g} and learning_rate {rate:g}: it cannot be higher; leave it out for a tenth."
            )
        usual = min(100, math.ceil(0.05 * steps)) if self.warmup_share is None else math.ceil(self.warmup_share * steps)
        warmup = usual if self.warmup_steps is None else self.warmup_steps
        every = max(1, math.ceil(steps / VALIDATIONS)) if self.validate_every is None else self.validate_every
        return replace(
            self, steps=steps, epochs=steps / of_epoch, batch_size=batch_size, learning_rate=rate,
            final_learning_rate=final, warmup_steps=min(warmup, steps), validate_every=every,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


# Apple's own: OpenELM's parameter-efficient recipe (projects/openelm/peft_configs, LoRA and DoRA alike) and the preferences of
# its instruction-tuned models (projects/openelm/instruction_tuning). The latter differ by size, in `OF_SIZES`.
RECIPES: dict[str, dict[str, Any]] = {
    "apple-peft": {
        "method": "lora", "rank": 32, "alpha": 32.0, "dropout": 0.1,
        "targets": ("token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2"),
        "learning_rate": 3e-4, "final_learning_rate": 3e-5, "warmup_steps": 1000, "epochs": 3, "batch_size": 16,
        "betas": (0.9, 0.95), "weight_decay": 0.0, "max_grad_norm": 1.0, "z_loss": 1e-4, "learn": "all", "max_length": 2048,
    },
    "apple-dpo": {
        "method": "full", "preference": "hinge", "beta": 0.01, "epochs": 5, "learning_rate": 2e-5, "final_learning_rate": 0.0,
        "batch_size": 16, "betas": (0.9, 0.999), "weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": 1024,
        "warmup_share": 0.1, "too_long": "skip", "seed": 42,
    },
}  # fmt: skip
# Layers -> what the recipe "apple-dpo" has there instead (README-instruct.md).
OF_SIZES: dict[int, dict[str, Any]] = {
    16: {"epochs": 5, "learning_rate": 2e-5, "preference": "hinge"},
    20: {"epochs": 8, "learning_rate": 3e-5, "preference": "hinge"},
    28: {"epochs": 5, "learning_rate": 5e-5, "preference": "sigmoid"},
    36: {"epochs": 10, "learning_rate": 1e-4, "preference": "hinge"},
}


def settings_from(recipe: str | None, asked: Mapping[str, Any], num_layers: int | None = None) -> Settings:
    """The settings of a recipe with what was asked for in its place. num_layers: of the model, where it is known."""
    known = {field.name for field in fields(Settings)}
    asked = {name: value for name, value in asked.items() if name in known and value is not None}
    if recipe is None:
        return Settings(**asked)
    checked_choice("recipe", recipe, tuple(RECIPES))
    of_size = OF_SIZES.get(num_layers or 0, {}) if recipe == "apple-dpo" else {}
    return Settings(**{**RECIPES[recipe], **of_size, **asked})
