"""Rotary position embedding, plain and stretched by YaRN."""

from __future__ import annotations

import math
import threading

import mlx.core as mx

from ..specs import YarnSpec
from .precision import one_kernel, runs_on_cpu, widen


class Rotation:
    """The rotation of one model's queries and keys, the same in all of its layers: `rotate` with its numbers.

    The CPU backend has no kernel for it and would compute the same sines and cosines again in every layer, with 29 primitives;
    there they are computed once per pass and applied with 7. The results are bit-identical.
    """

    def __init__(self, theta: float, yarn: YarnSpec | None = None) -> None:
        self.theta, self.yarn = theta, yarn
        self._periods: dict[int, mx.array | None] = {}
        self._slot_constants: dict[tuple[int, int, int], list[mx.array]] = {}
        # The table's key (tokens, head_dim and thread; the offset) and the table: one tuple, replaced as a whole.
        self._made: tuple[tuple[int, int, int], int | mx.array, tuple[mx.array, mx.array]] | None = None

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """x (B, H, L, D) from position `offset` on, an int, an array of one, or one a row (B,)."""
        # The layers of a pass share a table. Threads do not: one cannot evaluate another's lazy arrays.
        key, made = (x.shape[2], x.shape[3], threading.get_ident()), self._made
        # Two arrays may have the same value, but to compare them the host would have to wait.
        if (
            made is None
            or made[0] != key
            or not (made[1] is offset or (type(offset) is type(made[1]) is int and made[1] == offset))
        ):
            if not runs_on_cpu() or (isinstance(offset, mx.array) and offset.ndim > 0 and x.shape[2] > 1):
                return rotate(x, self.theta, offset, self.periods(x.shape[-1]))
            self._made = made = key, offset, self._make_table(x.shape[2], offset, x.shape[3])
        cosines, sines = made[2]
        y = x if x.dtype == mx.float32 else widen(x)
        first, second = mx.split(y, 2, axis=-1)
        return (y * cosines + mx.concatenate([second, first], axis=-1) * sines).astype(x.dtype)

    def of_slots(
        self,
        heads: mx.array,
        positions: mx.array,
        num_rotated: int,
        normed: mx.array | None = None,
        gains: mx.array | None = None,
    ) -> mx.array:
        """One token a row, heads (S, n, 1, D): the first `num_rotated` of them rotated, the others as they are.

        positions: (S,), in float32. normed (the shape of heads), gains (n, 1, D): where they are given, normed * gains is what
        is rotated. One elementwise kernel: MLX's for the rotation takes no gains, and would copy a part of the heads.
        """
        S, n, _, head_dim = heads.shape
        pairs = (S, n, 2, head_dim // 2)  # the two halves of a head, which are rotated with each other
        source = (heads if normed is None else normed).reshape(pairs)
        given = [source[:, :, :1], source[:, :, 1:], heads.reshape(pairs), positions[:, None, None, None]]
        given += self.slot_constants(n, num_rotated, head_dim)
        if gains is None:
            found = _rotated_pairs(*given)
        else:
            wide = gains.reshape(pairs[1:])
            found = _rotated_pairs_with_gains(wide[:, :1], wide[:, 1:], *given)
        return found.reshape(heads.shape)

    def slot_constants(self, num_heads: int, num_rotated: int, head_dim: int) -> list[mx.array]:
        """Radians a position of each pair, (D/2,); which of its two numbers is the second; which heads are rotated."""
        key = num_heads, num_rotated, head_dim
        if key not in self._slot_constants:
            are_rotated = mx.arange(num_heads)[:, None, None] < num_rotated
            self._slot_constants[key] = [self._frequencies(head_dim), mx.array([[False], [True]]), are_rotated]
        return self._slot_constants[key]

    def periods(self, head_dim: int) -> mx.array | None:
        """`rotary_periods`, made once."""
        if head_dim not in self._periods:
            self._periods[head_dim] = rotary_periods(head_dim, self.theta, self.yarn)
        return self._periods[head_dim]

    def _make_table(self, L: int, offset: int | mx.array, head_dim: int) -> tuple[mx.array, mx.array]:
        """Cosine and sine of each position and number of a head, (L, D) both; the sines for the first half are negative.

        With the position of one token a row, (B,): (B, 1, 1, D).
        """
        frequencies = self._frequencies(head_dim)
        positions = (mx.arange(L) + offset).astype(mx.float32)[:, None]
        if isinstance(offset, mx.array) and offset.ndim > 0:
            positions = positions[:, None, None]
        angles = positions * frequencies
        cosines, sines = mx.cos(angles), mx.sin(angles)
        return mx.concatenate([cosines, cosines], axis=-1), mx.concatenate([-sines, sines], axis=-1)

    def _frequencies(self, head_dim: int) -> mx.array:
        """Radians a position of each pair of numbers, (D/2,)."""
        half, periods = head_dim // 2, self.periods(head_dim)
        if periods is None:
            return mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(self.theta) / half))
        return mx.reciprocal(periods)


def _turned(
    first: mx.array,
    second: mx.array,
    own: mx.array,
    positions: mx.array,
    frequencies: mx.array,
    is_second: mx.array,
    are_rotated: mx.array,
) -> mx.array:
    """Of each pair one number: the first or the second (`Rotation.slot_constants`); where nothing is rotated, `own`."""
    angles = positions * frequencies
    cosines, sines = mx.cos(angles), mx.sin(angles)
    of_first, of_second = mx.where(is_second, sines, cosines), mx.where(is_second, cosines, -sines)
    turned = first.astype(mx.float32) * of_first + second.astype(mx.float32) * of_second
    return mx.where(are_rotated, turned.astype(own.dtype), own)


_rotated_pairs = one_kernel(_turned)


@one_kernel
def _rotated_pairs_with_gains(
    first_gains: mx.array, second_gains: mx.array, first: mx.array, second: mx.array, *rest: mx.array
) -> mx.array:
    return _turned(first * first_gains, second * second_gains, *rest)


def rotate(x: mx.array, theta: float, offset: int | mx.array, periods: mx.array | None = None) -> mx.array:
    """Rotate the pairs (i, i + D/2) of each head by angle position * theta^(-2i/D). x: (B, H, L, D), same shape out.

    `offset` is the position of the first of the L tokens, an int or one a row (B,). `periods` (D/2,), positions per
    radian, take the place of theta's. Angles, sines and products are float32 whatever x is, and the result is rounded
    once (corenet/modeling/layers/rotary_embeddings.py).
    """
    y = mx.fast.rope(
        widen(x),
        x.shape[-1],
        traditional=False,
        base=theta if periods is None else None,
        scale=1.0,
        offset=offset,
        freqs=periods,  # MLX's "freqs" are divided by, not multiplied with
    )
    return y.astype(x.dtype)


def yarn_inverse_frequencies(head_dim: int, theta: float, yarn: YarnSpec) -> list[float]:
    """Radians per position of each of the D/2 pairs (arXiv 2309.00071, eq. 23; gpt_oss/torch/model.py).

    The ramp between the two bounds is 0 where the plain frequency stays and 1 where it is divided by the factor.
    """
    low = _pair_turning(head_dim, theta, yarn, yarn.beta_fast)
    high = _pair_turning(head_dim, theta, yarn, yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # as transformers does where the bounds meet: a step, no division by 0
    frequencies = []
    for i in range(head_dim // 2):
        plain = theta ** (-2 * i / head_dim)
        ramp = min(max((i - low) / width, 0.0), 1.0)
        frequencies.append(ramp * plain / yarn.factor + (1.0 - ramp) * plain)
    return frequencies


def rotary_periods(head_dim: int, theta: float, yarn: YarnSpec | None) -> mx.array | None:
    """The `periods` for `rotate`, (D/2,) float32; None if theta is enough."""
    if yarn is None:
        return None
    return mx.array([1.0 / f for f in yarn_inverse_frequencies(head_dim, theta, yarn)], mx.float32)


def _pair_turning(head_dim: int, theta: float, yarn: YarnSpec, turns: float) -> float:
    """The pair, as a fractional index, that makes `turns` turns within the original context."""
    return head_dim * math.log(yarn.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
