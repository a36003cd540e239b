"""The logits of a flat pass in which everybody decodes, computed in compiled pieces where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import mlx.core as mx

from ..models.block import Projected
from ..models.rows import Rows, RowsWalk, flat_logits
from ..models.slots import SlotBank
from ..runtime import runtime_of
from .pieces import LatestPieces, ResidentPieces, SlotPieces

if TYPE_CHECKING:
    from ..models import Model


@final
class BatchStep:
    """One more token, or a few of a draft, of each of several requests.

    compile: see `Pieces`; None for what the model's choices say. Each number of rows is traced once.
    """

    def __init__(self, model: Model, compile: bool | None = None) -> None:
        self._model = model
        compiles = model.choices.compiled_step if compile is None else compile
        can_compile = runtime_of(model).residency is None
        is_compiled = compiles and can_compile
        self._latest = LatestPieces(model, ResidentPieces, compiles) if is_compiled else None
        self._slot_pieces = (
            LatestPieces(model, SlotPieces, compiles) if is_compiled and model.choices.slot_kernel else None
        )

    def __call__(self, tokens: mx.array, rows: Sequence[Rows], bank: SlotBank | None = None) -> mx.array:
        """The logits (M, V) after each of the flat `tokens` (M,); see `flat_logits`. Lazy."""
        if self._latest is None:
            logits = flat_logits(self._model, tokens, rows, bank=bank)
            assert logits is not None
            return logits
        if self._slot_pieces is not None and bank is not None and not rows:
            found = self._slot_pieces.get()(tokens, bank)
        else:
            pieces = self._latest.get()
            walk = _CompiledRowsWalk(self._model, rows, tokens, pieces, bank)
            walk.run(0, len(walk.layers))
            found = pieces.head_of_rows(*walk.state)
        if self._model.remote is None:
            return found
        h = self._model.remote.rows(found, rows)
        assert h is not None
        return self._model.head(h)


class _CompiledRowsWalk(RowsWalk):
    """`RowsWalk` in pieces from one layer's attention to the next one's."""

    state: tuple[mx.array, mx.array]

    def __init__(
        self, model: Model, rows: Sequence[Rows], tokens: mx.array, pieces: ResidentPieces, bank: SlotBank | None
    ) -> None:
        super().__init__(model, rows, None, None, bank)
        self._tokens, self._pieces = tokens, pieces

    def enter(self, i: int) -> Projected:
        if i == 0:
            return self._pieces.first(self._tokens, self.positions)
        return self._pieces.between[i - 1](*self.state, self.positions)

    def leave(self, i: int, x: mx.array, out: mx.array) -> None:
        self.state = x, out
