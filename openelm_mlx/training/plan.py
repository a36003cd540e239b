"""What a run will take before anything is read: weights, adapter, optimizer, activations, logits; and what would make it fit.

The sums follow from what the backward pass keeps (measured on the CPU backend; tests hold them near MLX's peak). How many
tokens are computed at once changes nothing but memory, so that is what a plan gives up first; then each layer is computed again
instead of kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checks import size, whole_number
from ..errors import MemoryLimitError
from ..memory.machine import Machine
from ..memory.plan import PROCESS_BYTES, PROCESS_BYTES_ON_CPU, TOKENIZER_FACTOR
from ..memory.plan_types import Change
from ..memory.sizes import parse_memory
from ..models import build_model
from ..models.adapter_targets import Target
from ..models.adapters import AdapterConfig, selected_targets
from ..specs import ModelSpec
from .activations import FLOAT32, Copies, batch_bytes
from .base import Base
from .batches import Row, divided, make_batch, rounded_up
from .settings import Settings

# Tokens that go through the model at once, from the most that is of use on.
PLACES_ON_GPU, PLACES_ON_CPU = 8192, 2048
FEWEST_PLACES = 64
# Measured on the CPU backend, where all weights are trained: how often the largest matrix, or all
# experts' largest, is there while the optimizer computes.
OF_AN_UPDATE = {2: 5.8, 3: 8.0}
# Of freed buffers, on a GPU: what a step's next batch finds again.
CACHE_LIMIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class TrainingPlan:
    """What a run takes. Bytes; total_bytes: what MLX's peak should be; process_bytes: the whole process's.

    weights_bytes: of the model, where they are not trained. trained_bytes: what is trained and the optimizer's two moments.
    activations_bytes: what is kept for the gradient and computed with, logits (logits_bytes) and gradients included.
    num_trained: trained numbers. tokens_at_once: see `finetune`. longest: tokens of the longest row. tokens: that the whole run
    sees. cache_limit_bytes: MLX's limit while it runs; 0: its own. experts_bytes: of the weights. changes: what would fit.
    """

    source: str
    fits: bool
    weights_bytes: int
    trained_bytes: int
    activations_bytes: int
    logits_bytes: int
    total_bytes: int
    process_bytes: int
    memory_limit: int
    tokens_at_once: int
    checkpointing: bool
    num_trained: int
    longest: int
    examples: int
    steps: int
    batch_size: int
    tokens: int
    cache_limit_bytes: int = 0
    experts_bytes: int = 0
    changes: tuple[Change, ...] = ()

    @property
    def wired_limit_bytes(self) -> int:
        """Nothing is wired: a run takes its memory anew in each step."""
        return 0

    def arithmetic(self) -> str:
        """The sum as a phrase."""
        kept = "layers computed again" if self.checkpointing else "all layers kept"
        return (
            f"weights {size(self.weights_bytes)}, {self.num_trained:,} trained numbers with their optimizer "
            f"{size(self.trained_bytes)}, computing {self.tokens_at_once:,} tokens at once ({kept}) "
            f"{size(self.activations_bytes)}, the process {size(self.process_bytes - self.total_bytes)}"
        )

    def refusal(self) -> MemoryLimitError:
        """The error for a plan that does not fit."""
        options = "; ".join(f"{change.setting} ({change.cost})" for change in self.changes)
        what = f"It would fit with {options}." if options else "Train a smaller model, or adapt fewer layers."
        if self.experts_bytes:
            twice = size(2 * self.experts_bytes)
            what += (
                f" Experts stay on disk for answers only: each step of training would read all of them twice, {twice}."
            )
        return MemoryLimitError(
            f"Training {self.source} does not fit: {self.arithmetic()} are {size(self.process_bytes)}, and "
            f"{size(self.memory_limit)} are allowed. {what}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {**vars(self), "changes": [vars(change) for change in self.changes]}


def make_training_plan(
    base: Base,
    settings: Settings,
    examples: Sequence[Sequence[Row]],
    *,
    checkpointing: bool | None = None,
    tokens_at_once: int | None = None,
    memory_limit: int | str | None = None,
    is_preference: bool = False,
) -> TrainingPlan:
    """The plan of a run: what was asked for, and where nothing was, the fastest that fits; the smallest where none does."""
    limit = parse_memory(memory_limit)
    if tokens_at_once is not None:
        whole_number("tokens_at_once", tokens_at_once, high=2**24)
    planner = _Planner(
        base, settings, examples, base.machine.available_bytes if limit is None else limit, is_preference
    )
    ways = [False, True] if checkpointing is None else [checkpointing]
    sizes = planner.sizes() if tokens_at_once is None else [tokens_at_once]
    # As many tokens as are of use keep the cores busy; fewer cost less than computing layers twice.
    enough = [each for each in sizes if each >= planner.enough] or sizes[:1]
    tried = [(way, each) for way in ways for each in enough] + [
        (ways[-1], each) for each in sizes if each not in enough
    ]
    for way, each in tried:
        plan = planner.plan(each, way)
        if plan.fits:
            return plan
    return replace(plan, changes=tuple(planner.changes(plan)))


class _Planner:
    def __init__(
        self, base: Base, settings: Settings, examples: Sequence[Sequence[Row]], limit: int, is_preference: bool
    ) -> None:
        self.base, self.settings, self.limit, self.is_preference = base, settings, limit, is_preference
        assert settings.batch_size is not None
        self.batch_size = settings.batch_size
        self.machine: Machine = base.machine
        self.spec: ModelSpec = base.spec
        self.examples = examples
        self.lengths = [len(row) for rows in examples for row in rows]
        self.longest = max(self.lengths)
        self.is_gpu = self.machine.backend != "cpu"
        self.is_half = base.dtype.size < FLOAT32
        self.enough = 512
        self.targets = [] if base.trains_all else chosen_targets(self.spec, settings)

    def sizes(self) -> list[int]:
        """Tokens at once to try, from the most on."""
        most = PLACES_ON_GPU if self.is_gpu else PLACES_ON_CPU
        together = 2 * self.longest if self.is_preference else self.longest
        step = rounded_up(min(most, max(together, self._of_a_step())))
        found = [step]
        while found[-1] // 2 >= max(FEWEST_PLACES, min(together, step)):
            found.append(found[-1] // 2)
        return found

    def _of_a_step(self) -> int:
        """Tokens of the examples of a step, where they are the longest ones."""
        sizes = sorted((sum(map(len, rows)) for rows in self.examples), reverse=True)
        return sum(sizes[: self.batch_size])

    def plan(self, places: int, checkpointing: bool, longest: int | None = None) -> TrainingPlan:
        """The plan with so many tokens at once. longest: with all rows cut to so many tokens."""
        lengths = self.lengths if longest is None else [min(each, longest) for each in self.lengths]
        num_trained = self._num_trained()
        weights, trained = self._weights(), self._trained(num_trained)
        kept, logits = self._activations(lengths, places, checkpointing, num_trained)
        total = max(weights + trained + kept, self.base.weights.loading)
        process = PROCESS_BYTES if self.is_gpu else PROCESS_BYTES_ON_CPU
        cache = CACHE_LIMIT_BYTES if self.is_gpu else 0  # what it needs; buffers are kept where there is more room
        whole = total + process + cache + TOKENIZER_FACTOR * self.base.weights.tokenizer
        steps = self.settings.steps or 0
        mean = sum(self.lengths) / len(self.examples)
        return TrainingPlan(
            source=self.base.name, fits=whole <= self.limit, weights_bytes=weights, trained_bytes=trained,
            activations_bytes=kept, logits_bytes=logits, total_bytes=total, process_bytes=whole, memory_limit=self.limit,
            tokens_at_once=places, checkpointing=checkpointing, num_trained=num_trained, longest=max(lengths),
            examples=len(self.examples), steps=steps, batch_size=self.batch_size,
            tokens=int(mean * steps * self.batch_size),
            cache_limit_bytes=max(cache, min(kept, self.limit - whole)) if self.is_gpu else 0,
            experts_bytes=self._experts(),
        )  # fmt: skip

    def changes(self, plan: TrainingPlan) -> list[Change]:
        """What would make the smallest plan fit."""
        found = []
        if not plan.checkpointing:
            again = self.plan(plan.tokens_at_once, True)
            if again.fits:
                found.append(Change("checkpointing=True", "every layer is computed twice", again.process_bytes))
        smallest = self.sizes()[-1]
        if plan.tokens_at_once > smallest:
            fewer = self.plan(smallest, True)
            if fewer.fits:
                found.append(Change(f"tokens_at_once={smallest}", "the same result, slower", fewer.process_bytes))
        shorter = self.longest // 2
        while shorter >= 32 and not found:
            cut = self.plan(rounded_up(shorter), True, shorter)
            if cut.fits:
                setting = f'max_length={shorter} and too_long="cut"'
                found.append(Change(setting, "longer rows lose their end", cut.process_bytes))
            shorter //= 2
        return found

    def _num_trained(self) -> int:
        if self.base.trains_all:
            return self.spec.num_parameters()
        total = 0
        config = self.settings
        for target in self.targets:
            total += sum(map(math.prod, target.shapes(config.rank)))
            total += target.rows if config.method == "dora" else 0
        return total

    def _weights(self) -> int:
        """Weights that are not trained; trained ones are counted with their gradients."""
        return 0 if self.base.trains_all else self.base.weights.dense + self._experts()

    def _experts(self) -> int:
        return self.spec.layers[0].num_experts * self.base.weights.slot if self.spec.layers else 0

    def _trained(self, count: int) -> int:
        """Parameters and the optimizer's two moments, in float32; the best ones, where they are kept."""
        return (3 + (self.settings.patience is not None)) * FLOAT32 * count

    def _activations(self, lengths: Sequence[int], places: int, checkpointing: bool, trained: int) -> tuple[int, int]:
        """What the largest batch of a step takes, gradients included, and the logits in it."""
        together = 2 if self.is_preference else 1
        longest = sorted(range(0, len(lengths), together), key=lambda i: -max(lengths[i : i + together]))
        chosen = [i + k for i in longest[: self.batch_size] for k in range(together)]
        rows = [row for each in self.examples for row in each]
        cut = [Row(rows[i].tokens[: lengths[i]], rows[i].targets[: lengths[i]]) for i in chosen]
        groups = divided([len(row) for row in cut], places, together)
        gradient = FLOAT32 * trained
        # The sum of earlier batches' gradients stays while the next batch is computed.
        kept = gradient if len(groups) > 1 and self.base.trains_all else 0
        copies = self._copies(trained)
        found = (gradient + self._of_an_update() if self.base.trains_all else 2 * gradient + copies.head, 0)
        for group in groups:
            batch = make_batch([cut[i] for i in group])
            # On a GPU nobody has measured what half precision saves.
            needed, logits = batch_bytes(
                self.spec, self.targets, self.base.trains_all, batch, checkpointing, gradient, copies,
                self.is_half and not self.is_gpu,
            )  # fmt: skip
            found = max(found, (needed + kept, logits))
        return found

    def _copies(self, trained: int) -> Copies:
        """Of the matrices that the model is computed with, of which so many numbers are trained."""
        cast = 2 * trained if self.base.trains_all and self.is_half else 0
        if self.is_gpu:
            return Copies(cast=cast)
        head, of_layers, experts = 0, Counter[str](), Counter[str]()
        for name, shape in self.spec.parameter_shapes().items():
            layer = next((part for part in name.split(".") if part.isdigit()), "")
            if name.removesuffix(".weight") in self.base.placement.packed:
                continue
            if self.is_half and len(shape) == 3:
                experts[layer] += FLOAT32 * math.prod(shape)
            elif not self.is_half and len(shape) == 2 and layer:
                of_layers[layer] += FLOAT32 * math.prod(shape)
            elif not self.is_half and len(shape) == 2 and (self.spec.tied_head or "embed" not in name):
                head = FLOAT32 * math.prod(shape)
        return Copies(head, max(of_layers.values(), default=0), max(experts.values(), default=0), cast)

    def _of_an_update(self) -> int:
        """What the optimizer's arithmetic takes beside weights, moments and gradients."""
        return int(FLOAT32 * max(times * self._largest(axes) for axes, times in OF_AN_UPDATE.items()))

    def _largest(self, axes: int) -> int:
        """Numbers of the largest weight with so many axes."""
        shapes = self.spec.parameter_shapes().values()
        return max((math.prod(shape) for shape in shapes if len(shape) == axes), default=0)


def chosen_targets(spec: ModelSpec, settings: Settings) -> list[Target]:
    """What the adapter of these settings is beside. Raises SettingError for what is not there."""
    return selected_targets(build_model(spec), adapter_config(settings))  # a model without memory


def adapter_config(settings: Settings) -> AdapterConfig:
    """The adapter that settings ask for."""
    return AdapterConfig(
        kind="dora" if settings.method == "dora" else "lora",
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        layers=settings.layers,
        use_rslora=settings.method == "rslora",
        dropout=settings.dropout,
        seed=settings.seed,
    )
