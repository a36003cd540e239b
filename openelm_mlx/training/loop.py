"""The run: step after step, with validation, an end when nothing improves, a stop at NaN, and a state to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..errors import TrainingError
from ..memory.machine import give_back_freed
from ..models.base import LanguageModel
from ..models.tracing import compile_apart
from ..outputs import signals_wait
from .batches import Batch
from .optimizer import Schedule, clipped, global_norm, set_rate
from .state import RunFolder, State
from .steps import Gradients, Tree, add_gradients, divided_by

# How often the state is written, unless a step takes longer.
SAVE_EVERY_SECONDS = 120.0


class Part(NamedTuple):
    """What goes through the model at once in a step. reference: of a batch of preferences, see `Gradients`."""

    batch: Batch
    reference: np.ndarray | None = None


class StepData(Protocol):
    """Where a step's data come from; the same step always has the same."""

    def parts(self, step: int) -> Sequence[Part]:
        """What step `step` (from 0 on) learns from."""


class PrefetchedData:
    """The data of a run's steps, those of the next one laid out while the device computes with these."""

    def __init__(self, data: StepData) -> None:
        self._data = data
        self._thread = ThreadPoolExecutor(1, "next step")  # one at a time: data need not be thread-safe
        self._next: tuple[int, Future[Sequence[Part]]] | None = None

    def parts(self, step: int) -> Sequence[Part]:
        """See `StepData`."""
        if self._next is None or self._next[0] != step:
            self._next = step, self._thread.submit(self._data.parts, step)
        found = self._next[1].result()
        self._next = step + 1, self._thread.submit(self._data.parts, step + 1)
        return found

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Progress:
    """What is told after each step. loss: a mean over the step's targets (over its pairs, of preferences). tokens: that went
    through the model in it. validation, accuracy: where they were measured after this step. seconds: of training so far;
    left: an estimate.
    """

    step: int
    steps: int
    loss: float
    rate: float
    norm: float
    tokens: int
    seconds: float
    left: float
    tokens_per_second: float
    validation: float | None = None
    accuracy: float | None = None


Listener = Callable[[Progress], None]


class Trainer:
    """Trains what is trainable in `model`, which is in training mode, from where `folder` has a state, or from the beginning.

    max_grad_norm: see `Settings`. validation: parts to measure after every `validate_every` steps; patience: how often in a row
    that may fail to improve. folder: None keeps no state. last_step: where it ends, if that is before the schedule's end.
    kept_bytes: freed buffers of other shapes that a GPU may keep for the steps to come.
    """

    def __init__(
        self,
        model: LanguageModel,
        gradients: Gradients,
        optimizer: optim.Optimizer,
        schedule: Schedule,
        data: StepData,
        *,
        max_grad_norm: float | None = 1.0,
        validation: Sequence[Part] = (),
        validate_every: int = 0,
        patience: int | None = None,
        seed: int = 0,
        folder: RunFolder | None = None,
        listener: Listener | None = None,
        save_every: float = SAVE_EVERY_SECONDS,
        last_step: int | None = None,
        kept_bytes: int = 0,
    ) -> None:
        self.model, self.gradients, self.optimizer = model, gradients, optimizer
        self.schedule, self.data = schedule, data
        self.max_grad_norm = max_grad_norm or None
        self.last_step = schedule.steps if last_step is None else last_step
        self.validation, self.validate_every, self.patience = validation, validate_every, patience
        self.seed, self.folder, self.listener, self.save_every = seed, folder, listener, save_every
        self.kept_bytes = kept_bytes
        # Apart from each other, an update's operations read and write every weight a dozen times.
        self._update = compile_apart(self._apply) if gradients.compiled else self._apply
        self._mean = mx.compile(_mean) if gradients.compiled else _mean
        self._shapes: list[Any] = []
        found = folder.load() if folder is not None else None
        own = _by_rows(model.trainable_parameters())
        model.update(own)
        if found is None:
            optimizer.init(own)
            found = State(0, own, optimizer.state)
        else:
            found.parameters = _in_shape_of(own, found.parameters)
            found.best = None if found.best is None else _in_shape_of(own, found.best)
            optimizer.state = found.optimizer
        self.state: State | None = found
        self.resumed_at = found.step

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        state = self.state
        assert state is not None
        has_failed = self.patience is not None and state.failures >= self.patience
        return has_failed or state.step >= self.last_step

    def run(self) -> State:
        """Train to the end. Returns the state after the last step, or with the best parameters where the run ended early.

        On Ctrl-C, or whatever else ends it, the state after the last whole step is written first. Raises TrainingError when a
        loss is not a number; the state before that step is kept.
        """
        assert self.state is not None
        saved = time.monotonic()
        started = saved - self.state.seconds
        ahead = PrefetchedData(self.data)
        try:
            self._validate_if_due()  # the run ended in the midst of it
            while not self.is_over:
                self._step(started, ahead.parts(self.state.step))
                if self.folder is not None and time.monotonic() - saved > self.save_every:
                    self.folder.save(self.state)
                    saved = time.monotonic()
        except BaseException:
            if self.folder is not None and self.state is not None and self.state.step > self.resumed_at:
                self.folder.save(self.state)
            raise
        finally:
            ahead.close()
        if self.folder is not None:
            self.folder.save(self.state)
        if self.patience is not None and self.state.best is not None:
            self.state = replace(self.state, parameters=self.state.best)
        self.model.update(self.state.parameters)
        return self.state

    def seconds_left(self) -> float:
        """How long the rest of the run will take, by a part that is computed now and changes nothing."""
        state = self.state
        assert state is not None
        if self.is_over:
            return 0.0
        steps = self.last_step - state.step
        parts = [part for step in range(state.step, state.step + min(3, steps)) for part in self.data.parts(step)]
        part = max(parts, key=lambda each: each.batch.num_tokens)
        mx.eval(self.gradients(state.parameters, part.batch, part.reference, mx.random.key(0)))  # compiled, and warm
        begun = time.monotonic()
        mx.eval(self.gradients(state.parameters, part.batch, part.reference, mx.random.key(0)))
        each = (time.monotonic() - begun) / part.batch.num_tokens
        return each * sum(part.batch.num_tokens for part in parts) / min(3, steps) * steps

    def _step(self, started: float, parts: Sequence[Part] | None = None) -> None:
        state = self.state
        assert state is not None
        parts = self.data.parts(state.step) if parts is None else parts
        rate = self.schedule.rate(state.step)
        loss, total, count, tokens = self._gradients(state, parts)
        gradients, norm = self._mean(total, mx.array(count, mx.float32))
        del total
        mx.eval(norm, gradients)
        length = float(cast(float, norm.item()))
        if not (math.isfinite(loss) and math.isfinite(length)):
            raise self._not_a_number(state.step, rate)
        entry: dict[str, Any] = {"step": state.step + 1, "loss": loss, "rate": rate, "norm": length, "tokens": tokens}
        with signals_wait():  # an interrupted update would be half of one
            made = self._updated(state, gradients, norm, rate)
            del gradients, state
            entry["seconds"] = round(time.monotonic() - started, 3)
            self.state = replace(made, log=[*made.log, entry], seconds=entry["seconds"])
        self._give_back(parts)
        self._validate_if_due()
        self._tell(entry)

    def _validate_if_due(self) -> None:
        """Measure after the last step, where that is due and has not been done."""
        state = self.state
        assert state is not None
        if not (self.validation and self.validate_every and state.log):
            return
        is_last = state.step == self.last_step
        if "validation" not in state.log[-1] and (is_last or state.step % self.validate_every == 0):
            self.state = self._validated(state, state.log[-1])

    def _updated(self, state: State, gradients: dict[str, Any], norm: mx.array, rate: float) -> State:
        """The state after the update. Nothing refers to the old arrays meanwhile, so that their memory is used again."""
        self.state = None
        parameters, optimizer = self._update(
            state.parameters, state.optimizer, gradients, norm, mx.array(rate, mx.float32)
        )
        self.optimizer.state = optimizer
        parameters = _by_rows(parameters)
        self.model.update(parameters)
        made = replace(state, step=state.step + 1, parameters=parameters, optimizer=optimizer)
        state.parameters, state.optimizer = {}, {}
        del gradients
        mx.eval(parameters, optimizer)
        return made

    def _apply(
        self, parameters: Tree, optimizer: Tree, gradients: Tree, norm: mx.array, rate: mx.array
    ) -> tuple[Tree, Tree]:
        """The parameters and the optimizer's state after one update."""
        self.optimizer.state = optimizer
        set_rate(self.optimizer, rate)
        parameters = self.optimizer.apply_gradients(clipped(gradients, norm, self.max_grad_norm), parameters)
        return parameters, self.optimizer.state

    def _give_back(self, parts: Sequence[Part]) -> None:
        """Free what this step took: always on the CPU, where nothing is gained by keeping it.

        A GPU keeps it for the next step, since allocating takes a part of a step's time. Steps of other shapes would let it
        pile up, so then it is freed when it is more than `kept_bytes`.
        """
        shapes = [(part.batch.rows.shape, part.batch.tokens.size, part.batch.targets.size) for part in parts]
        if not self.gradients.compiled:
            give_back_freed()
        elif shapes != self._shapes and mx.get_cache_memory() > self.kept_bytes:
            mx.clear_cache()
        self._shapes = shapes

    def _gradients(self, state: State, parts: Sequence[Part]) -> tuple[float, Tree, float, int]:
        """The mean loss of a step over all of its parts, the sum of their gradients, over how many that is, and the tokens."""
        total: dict[str, Any] | None = None
        loss, count, tokens = 0.0, 0.0, 0
        for number, part in enumerate(parts):
            key = mx.random.key((self.seed * 1_000_003 + state.step * 1009 + number) % 2**63)
            value, gradients = self.gradients(state.parameters, part.batch, part.reference, key)
            total = add_gradients(total, gradients)
            del gradients
            mx.eval(value, total)  # a part's activations are freed before the next one's are made
            loss += float(cast(float, value.item()))
            count += weight_of(part)
            tokens += part.batch.num_tokens
        assert total is not None
        return loss / count, total, count, tokens

    def _validated(self, state: State, entry: dict[str, Any]) -> State:
        loss, accuracy = self.measured(state.parameters)
        entry["validation"] = loss
        if accuracy is not None:
            entry["accuracy"] = accuracy
        if state.best_loss is not None and not loss < state.best_loss:
            return replace(state, failures=state.failures + 1)
        best = state.parameters if self.patience is not None else None
        return replace(state, best=best, best_loss=loss, failures=0)

    def measured(self, parameters: dict[str, Any]) -> tuple[float, float | None]:
        """The validation parts' mean loss, without dropout; of preferences also how often the chosen answer wins."""
        self.model.update(self.gradients.cast(parameters))
        self.model.eval()
        try:
            total, wins, count = 0.0, 0.0, 0.0
            for part in self.validation:
                loss, won = self.gradients.measured(part.batch, part.reference)
                mx.eval(loss, won)
                total, wins = total + float(cast(float, loss.item())), wins + float(cast(float, won.item()))
                count += weight_of(part)
        finally:
            self.model.train()
            self.model.update(parameters)
        return total / count, wins / count if self.validation[0].reference is not None else None

    def _not_a_number(self, step: int, rate: float) -> TrainingError:
        where = f" The weights before it are kept in {self.folder.folder}." if self.folder is not None and step else ""
        return TrainingError(
            f"The loss or its gradient is not a number in step {step + 1}, with learning rate {rate:.2g}.{where} Pass a lower "
            "learning_rate (a tenth), and restart=True."
        )

    def _tell(self, entry: dict[str, Any]) -> None:
        if self.listener is None:
            return
        assert self.state is not None
        log, steps = self.state.log, self.last_step
        recent = log[self.resumed_at :][-20:]
        first = log[-len(recent) - 1]["seconds"] if len(log) > len(recent) else 0.0
        spent = max(1e-6, entry["seconds"] - first)
        self.listener(
            Progress(
                step=entry["step"],
                steps=steps,
                loss=entry["loss"],
                rate=entry["rate"],
                norm=entry["norm"],
                tokens=entry["tokens"],
                seconds=entry["seconds"],
                left=spent / len(recent) * (steps - entry["step"]),
                tokens_per_second=sum(each["tokens"] for each in recent) / spent,
                validation=entry.get("validation"),
                accuracy=entry.get("accuracy"),
            )
        )


def _mean(total: Tree, count: mx.array) -> tuple[Tree, mx.array]:
    """A step's gradients from their sum, and their norm."""
    gradients = divided_by(total, count)
    return gradients, global_norm(gradients)


def weight_of(part: Part) -> float:
    """How much a part counts in a mean: its pairs, or its targets by their weights."""
    if part.reference is not None:
        return len(part.reference) / 2
    return float(part.batch.weights.sum())


def _by_rows(parameters: dict[str, Any]) -> dict[str, Any]:
    """The same arrays as a file gives them back: how they lie in memory decides the last bit of a product."""
    laid: dict[str, Any] = tree_map(mx.contiguous, parameters)
    return laid


def _in_shape_of(own: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a state in the tree that the model has. Raises TrainingError where they are others."""
    arrays = dict(tree_flatten(found))
    if {name: a.shape for name, a in arrays.items()} != {name: a.shape for name, a in tree_flatten(own)}:
        raise TrainingError("The state belongs to another model or adapter: pass restart=True to begin anew.")
    tree: dict[str, Any] = tree_map_with_path(lambda name, _: arrays[name], own)
    return tree
