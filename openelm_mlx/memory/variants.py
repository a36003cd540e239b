"""The presets of one source beside each other: what each takes, how fast it should be, and what it does to the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .plan_types import MemoryPlan
from .presets import PRESETS
from .quality import quality_of
from .variant import Variant

# A preset that is faster by less than this, and saves nothing that is short, is not worth rounding anything.
LEAST_GAIN = 1.05


def variants_of(plans: Sequence[MemoryPlan]) -> tuple[Variant, ...]:
    """Plans of one source on one machine with different bits of its dense parts, the exact one first, as variants."""
    exact = plans[0]
    found = [
        Variant(
            _name(plan.dense_bits), plan.dense_bits, plan.fits, plan.process_bytes, plan.expert_slots,
            plan.decode if plan.fits else None, _gain(plan, exact), quality_of(plan.family, plan.dense_bits),
        )
        for plan in plans
    ]  # fmt: skip
    advised = _advised(found, exact)
    return tuple(replace(each, is_advised=each.name == advised) for each in found)


def _name(bits: int | None) -> str:
    return next((name for name, preset in PRESETS.items() if preset.dense_bits == bits), f"{bits} bits")


def _gain(plan: MemoryPlan, exact: MemoryPlan) -> float | None:
    if plan is exact or not (plan.fits and exact.fits) or plan.decode is None or exact.decode is None:
        return None
    return round(plan.decode.fit / exact.decode.fit, 2)


def _advised(variants: Sequence[Variant], exact: MemoryPlan) -> str:
    """8 bits on a Mac, where they are faster or fit better, and nothing below: 4 bits are everybody's own choice.

    MLX's CPU backend multiplies by 8-bit matrices at 0.4 times the speed (docs/LOG.md), and of CUDA nothing is planned.
    """
    balanced = next(each for each in variants if each.name == "balanced")
    is_better = balanced.gain is not None and balanced.gain >= LEAST_GAIN
    fits_better = balanced.fits and (
        not exact.fits or (exact.expert_slots is not None and balanced.expert_slots is None)
    )
    is_mac = exact.machine is not None and exact.machine.backend == "metal"
    return "balanced" if (is_mac and balanced.fits and is_better) or fits_better else "exact"
