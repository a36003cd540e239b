"""The data of a run: which rows each step learns from, laid out in batches, and the reference of preferences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from .batches import Row, divided, make_batch, rows_of_step
from .loop import Part
from .steps import Gradients


class Rows:
    """Examples, each one row, several pieces of a text, or a chosen and a rejected row; batch_size of them are a step's.

    places: how many tokens go through the model at once; a longer row goes alone. reference: of preferences, each row's
    log-probability by the reference, (examples, 2). How a step's rows are divided changes nothing but memory.
    """

    def __init__(
        self,
        examples: Sequence[Sequence[Row]],
        batch_size: int,
        places: int,
        seed: int = 0,
        reference: np.ndarray | None = None,
    ) -> None:
        self.examples, self.batch_size, self.places, self.seed = examples, batch_size, places, seed
        self.reference = reference

    def parts(self, step: int) -> list[Part]:
        """See `StepData`."""
        return self._parts(rows_of_step(step, self.batch_size, len(self.examples), self.seed))

    def all_parts(self) -> list[Part]:
        """Every example once."""
        return self._parts(list(range(len(self.examples))))

    def _parts(self, chosen: Sequence[int]) -> list[Part]:
        rows = [row for i in chosen for row in self.examples[i]]
        return parts_of(rows, self.places, None if self.reference is None else self.reference[list(chosen)].ravel())

    @property
    def num_tokens(self) -> int:
        """Of all examples."""
        return sum(len(row) for rows in self.examples for row in rows)

    def fingerprint(self) -> str:
        """Differs for other rows."""
        found = hashlib.sha256()
        for rows in self.examples:
            for row in rows:
                found.update(row.tokens.tobytes())
                found.update(row.targets.tobytes())
        return found.hexdigest()


def parts_of(rows: Sequence[Row], places: int, reference: np.ndarray | None = None) -> list[Part]:
    """Rows as parts of `places` tokens. reference (rows,): of preferences, whose rows come in pairs."""
    together = 1 if reference is None else 2
    return [
        Part(make_batch([rows[i] for i in group]), None if reference is None else reference[group])
        for group in divided([len(row) for row in rows], places, together)
    ]


def reference_logprobs(
    gradients: Gradients,
    examples: Sequence[Sequence[Row]],
    places: int,
    tell: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The sum of log-probabilities of each row's targets by the model as it is, (examples, rows of each).

    tell: called with (rows done, all rows).
    """
    rows = [row for each in examples for row in each]
    found = np.zeros(len(rows), np.float32)
    done = 0
    gradients.model.eval()
    try:
        for group in divided([len(row) for row in rows], places):
            sums = gradients.logprobs(make_batch([rows[i] for i in group]), len(group))
            mx.eval(sums)
            found[group] = np.array(sums)
            done += len(group)
            if tell is not None:
                tell(done, len(rows))
    finally:
        gradients.model.train()
    return found.reshape(len(examples), -1)
