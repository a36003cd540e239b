"""Steps of training by this library and by mlx-lm's tuner, on the same rows, in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx_lm.tuner.trainer import CacheDataset, default_loss, grad_checkpoint, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from openelm_mlx.bench.speeds import in_turns
from openelm_mlx.models.adapters import AdapterConfig, attach
from openelm_mlx.sources import locate
from openelm_mlx.training.base import Base
from openelm_mlx.training.batches import Row, make_batch
from openelm_mlx.training.loop import Part, Trainer
from openelm_mlx.training.optimizer import Schedule, adamw
from openelm_mlx.training.rows import Rows
from openelm_mlx.training.steps import Gradients, Objective

RANK, BATCH, PLACES = 8, 8, 1024
# What both adapt: our gpt-oss has q, k and v in one matrix, mlx-lm's has three.
TARGETS = {"openelm": ("qkv_proj", "out_proj"), "gpt_oss": ("q_proj", "k_proj", "v_proj", "o_proj")}
KEYS = {
    "openelm": ["attn.qkv_proj", "attn.out_proj"],
    "gpt_oss": [f"self_attn.{part}_proj" for part in "qkvo"],
}


@dataclass(frozen=True)
class Sizes:
    """What is measured: an equal batch, rows of mixed length, one long row; rounds: how often, in turns."""

    rows: int = 4
    length: int = 64
    mixed: int = 32
    long: int = 512
    rounds: int = 3


@dataclass(frozen=True)
class Measured:
    """One comparison. ours, theirs: medians in `unit`; ratio: of ours to theirs; note: what else is to be known."""

    what: str
    unit: str
    ours: float
    theirs: float
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    def line(self) -> str:
        """A line for people."""
        return f"{self.what:<44} {self.ours:12,.1f} {self.theirs:12,.1f} {self.unit:<12} {self.ratio:5.2f} times  {self.note}"

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {**vars(self), "ratio": self.ratio}


class OneStep:
    """Data that are the same in every step."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    def parts(self, step: int) -> Sequence[Part]:
        """See `StepData`."""
        return self._parts


class Pair:
    """The same model twice, with adapters of the same shape."""

    def __init__(self, ours: Any, theirs: nn.Module, sizes: Sizes) -> None:
        self.ours, self.theirs, self.sizes = ours, theirs, sizes
        self.vocab_size = ours.spec.vocab_size
        self._rng = np.random.default_rng(0)

    @classmethod
    def of(cls, source: str, sizes: Sizes) -> Pair:
        """Of a source that both can load."""
        ours = Base.open(source, trains_all=False, dtype="float32").read()
        attach(ours, AdapterConfig(rank=RANK, targets=TARGETS[ours.spec.family]))
        theirs = load_model(locate(source))[0]
        theirs.set_dtype(mx.float32)
        theirs.freeze()
        config = {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": KEYS[ours.spec.family]}
        linear_to_lora_layers(theirs, len(theirs.layers), config)
        theirs.train()
        mx.eval(ours.parameters(), theirs.parameters())
        return cls(ours, theirs, sizes)

    def equal_batches(self) -> Measured:
        """Tokens a second of whole steps, on rows of one length: forward, backward, update."""
        texts = self._texts([self.sizes.length] * self.sizes.rows)
        ours = self._our_step([Part(make_batch(self._rows(texts)))])
        theirs = self._their_step([self._their_batch(texts)])
        tokens = self.sizes.rows * self.sizes.length
        a, b = self._in_turns(ours, theirs)
        what = f"equal batches, {self.sizes.rows} x {self.sizes.length}"
        return Measured(what, "tokens/s", tokens / a, tokens / b)

    def mixed_lengths(self) -> Measured:
        """Useful tokens a second of an epoch over rows of log-normal lengths, each trainer with its own batches."""
        lengths = np.exp(self._rng.normal(3.3, 0.8, self.sizes.mixed)).astype(int).clip(6, self.sizes.long)
        texts = self._texts(lengths.tolist())
        rows = Rows([[row] for row in self._rows(texts)], len(texts), PLACES)
        parts = rows.parts(0)
        # As the tuner's own command has them: records that are tokenized when they are first asked for.
        data = CacheDataset(_Records(texts))
        batches = list(iterate_batches(data, BATCH, 2048))
        places = sum(each[0].size for each in batches)
        useful = sum(int((each[1][:, 1] - each[1][:, 0]).sum()) for each in batches)
        filled = sum(len(row) for row in self._rows(texts)) / sum(part.batch.tokens.size for part in parts)
        a, b = self._in_turns(self._our_step(parts), self._their_step(batches))
        note = f"places filled: {filled:.0%} and {useful / places:.0%}"
        return Measured(f"{len(texts)} rows of mixed length, useful", "tokens/s", sum(lengths) / a, useful / b, note)

    def peak_memory(self) -> Measured:
        """Peak of a gradient on one long row, layers computed again, above the weights; half of the row is learned."""
        texts = self._texts([self.sizes.long])
        row = self._rows(texts)[0]
        learned = Row(row.tokens, np.where(np.arange(len(row)) < len(row) // 2, -1, row.targets).astype(np.int32))
        gradients = Gradients(self.ours, Objective(), checkpointing=True)
        parameters = self.ours.trainable_parameters()
        ours = _peak(lambda: gradients(parameters, make_batch([learned])))
        layer = type(self.theirs.layers[0])
        call = layer.__call__
        grad_checkpoint(self.theirs.layers[0])
        try:
            batch, lengths = self._their_batch(texts)
            lengths = mx.array([[self.sizes.long // 2, self.sizes.long]])
            step = nn.value_and_grad(self.theirs, default_loss)
            theirs = _peak(lambda: step(self.theirs, batch, lengths))
        finally:
            layer.__call__ = call  # it replaces the class's own
        return Measured(f"peak of a row of {self.sizes.long} tokens", "MB", ours / 1e6, theirs / 1e6, "recomputed")

    def _texts(self, lengths: Sequence[int]) -> list[list[int]]:
        return [self._rng.integers(3, self.vocab_size - 200, n + 1).tolist() for n in lengths]

    def _rows(self, texts: Sequence[Sequence[int]]) -> list[Row]:
        return [Row.of(text, np.ones(len(text), bool)) for text in texts]

    def _their_batch(self, texts: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
        return mx.array([list(text) for text in texts]), mx.array([[0, len(text) - 1] for text in texts])

    def _our_step(self, parts: Sequence[Part]) -> Callable[[], None]:
        trainer = Trainer(
            self.ours,
            Gradients(self.ours, Objective()),
            adamw((0.9, 0.95), 1e-8, 0.0),
            Schedule(1e-6, 10**9),
            OneStep(parts),
            max_grad_norm=1.0,
        )
        return lambda: trainer._step(0.0)

    def _their_step(self, batches: Sequence[Any]) -> Callable[[], None]:
        """As mlx-lm's `train` has it: a step for each batch."""
        optimizer = optim.AdamW(1e-6)
        differentiated = nn.value_and_grad(self.theirs, default_loss)
        state = [self.theirs.state, optimizer.state, mx.random.state]

        def step(batch: mx.array, lengths: mx.array) -> Any:
            (loss, tokens), gradients = differentiated(self.theirs, batch, lengths)
            optimizer.update(self.theirs, gradients)
            return loss, tokens

        compiled = step if mx.default_device() == mx.Device(mx.cpu) else mx.compile(step, inputs=state, outputs=state)

        def run() -> None:
            for batch in batches:
                mx.eval(compiled(*batch), self.theirs.trainable_parameters(), optimizer.state)

        return run

    def _in_turns(self, ours: Callable[[], None], theirs: Callable[[], None]) -> tuple[float, float]:
        """Median seconds of each, after one that is not counted."""
        a, b = in_turns((ours, theirs), rounds=self.sizes.rounds, seconds=math.inf)
        return statistics.median(a), statistics.median(b)


class _Records:
    """A data set as mlx-lm's: records with named fields, made into tokens by `process`."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = texts

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": self._texts[index]}

    def __len__(self) -> int:
        return len(self._texts)

    def process(self, record: dict[str, Any]) -> tuple[list[int], int]:
        return record["text"], 0


def _peak(work: Callable[[], Any]) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before
