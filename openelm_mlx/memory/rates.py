"""Expected speed of decoding and prefill on a machine: three terms, and a range rather than one number.

The terms come from what people have published (`chips.py`, published_speeds.tsv), or from this very machine once `plan
--calibrate` has measured it. Pure arithmetic, no arrays.
"""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from .chips import (
    MANY_EXPERTS,
    MANY_EXPERTS_SHARE,
    PREFILL_TERMS,
    READ_BACK_SECONDS,
    SPREAD,
    decode_terms,
    generation,
)

if TYPE_CHECKING:
    from ..specs import ModelSpec
    from .machine import Machine

# A machine repeats its measured speed within a tenth, or within the terms' own error; a hot laptop is slower.
MEASURED = 0.1
# Attention's speed relative to products: they reach 0.28 and 0.71 of the arithmetic in llama.cpp's series.
ATTENTION_SHARE = 0.4


@dataclass(frozen=True)
class SpeedRange:
    """Tokens a second, the least and the most, two digits each; `tokens`: the context length for it.

    basis: "measured" (here), "published" (runs of such a model on this chip), "related" (on this chip with another size or
    other weights), "no run" (none was published on this chip). fit: the middle before rounding, for comparisons.
    """

    low: float
    high: float
    tokens: int
    basis: str
    fit: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, slow: float, fast: float, tokens: int, basis: str) -> SpeedRange:
        """A range from the least and the most tokens a second."""
        return cls(rounded(slow), rounded(fast), tokens, basis, (slow + fast) / 2)

    @property
    def middle(self) -> float:
        """The middle of the range, two digits."""
        return rounded((self.low + self.high) / 2)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "fit"}

    def __str__(self) -> str:
        low, high = number(self.low), number(self.high)
        return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Rates:
    """A machine's rates for one family, in seconds, bytes a second and operations a second.

    low, high: factors for the speed that the terms give. products, attention: the least and the most, None if not known.
    """

    layer_seconds: float
    weights: float
    keys_values: float
    products: tuple[float, float] | None
    attention: tuple[float, float] | None
    low: float
    high: float
    basis: str

    def decode_seconds(self, layers: int, weight_bytes: float, kv_bytes: float) -> float:
        """Seconds of one token, by the terms."""
        return layers * self.layer_seconds + weight_bytes / self.weights + kv_bytes / self.keys_values


def rates_of(machine: Machine, spec: ModelSpec, dense_bits: int | None = None) -> Rates | None:
    """A machine's rates for such a model: measured, else from published runs; None if nothing is known.

    dense_bits: of the parts that are not experts; decides whether such runs were published.
    """
    calibration = machine.calibration
    measured = None if calibration is None else calibration.rates.get(spec.family)
    if measured is not None:
        within = max(MEASURED, measured.error)
        products = _both(measured.products, within)
        return Rates(
            measured.layer_seconds, measured.weights, measured.keys_values, products,
            _both(measured.products, within, ATTENTION_SHARE), 1 - within, 1 + within, "measured",
        )  # fmt: skip
    terms = decode_terms(spec.family, machine.chip)
    if terms is None or machine.bandwidth is None:
        return None
    basis = published_basis(machine.chip, spec, dense_bits)
    is_base = machine.chip == generation(machine.chip)
    low, high = SPREAD[spec.family, "base chip" if is_base else "no run" if basis == "no run" else "runs"]
    prefill, flops = PREFILL_TERMS.get(generation(machine.chip)), machine.flops
    products = attention = None
    if prefill is not None and flops is not None:
        share = MANY_EXPERTS_SHARE if spec.layers[0].num_experts >= MANY_EXPERTS else 1.0
        products = prefill.weights[0] * share * flops, prefill.weights[1] * share * flops
        attention = prefill.attention[0] * flops, prefill.attention[1] * flops
    return Rates(
        terms.layer_seconds, terms.weights * machine.bandwidth, terms.keys_values * machine.bandwidth,
        products, attention, low, high, basis,
    )  # fmt: skip


def _both(rate: float | None, within: float, share: float = 1.0) -> tuple[float, float] | None:
    return None if rate is None else ((1 - within) * share * rate, (1 + within) * share * rate)


def prefill_seconds(
    spec: ModelSpec, rates: Rates, prompt: int, chunk: int, touched_bytes: float
) -> tuple[float, float] | None:
    """Seconds of a prompt in chunks, the most and the least; None if not known.

    They are for products with every active parameter, and attention over half of the prompt in layers with full attention
    (over the window in the others), but never faster than a chunk's weights, `touched_bytes` of them, can be read.
    """
    if rates.products is None or rates.attention is None:
        return None
    # Published shares count all active parameters; calibration counts those that a prompt's tokens use.
    head = spec.vocab_size * spec.hidden_size if rates.basis == "measured" else 0
    operations = 2 * (spec.num_active_parameters() - head)
    attention = sum(
        4 * layer.num_heads * layer.head_dim * min(prompt / 2, layer.window or math.inf) for layer in spec.layers
    )
    reading = math.ceil(prompt / chunk) * rates.decode_seconds(len(spec.layers), touched_bytes, 0)
    slow, fast = (
        max(reading, prompt * (operations / products + attention / attending))
        for products, attending in zip(rates.products, rates.attention, strict=True)
    )
    return slow, fast


def streamed_seconds(layers: int) -> float:
    """The most that read-backs of the routers' choices add to a token: one wait a layer.

    This is added to measured rates too, since the measured runs have all experts in memory and never wait.
    """
    return layers * READ_BACK_SECONDS


def rounded(value: float, digits: int = 2) -> float:
    """`value` rounded to two significant digits."""
    return float(f"{value:.{digits}g}")


def number(value: float, digits: int = 2) -> str:
    """Two digits for people: 0.57, 2.0, 47, 1,300."""
    value = rounded(value, digits)
    return f"{value:,.0f}" if value >= 10 else f"{value:#.2g}"


# --- what was published -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A published speed: tokens/s of decoding (`what` "decode") with `tokens` tokens in the context, or of a prompt with that
    many ("prefill"). gigabytes: of weights that a token of decoding reads. weights: "Q8" and "Q4" are MXFP4 experts with
    dense parts in 8 and 4 bits, "A4" everything in 4. trust: "A" a protocol and repeats; "B" one run; "C" second-hand,
    throttled, or by an engine that is not named.
    """

    what: str
    family: str
    chip: str
    memory_gb: int
    cores: int | None
    model: str
    weights: str
    layers: int
    gigabytes: float
    kv_bytes_per_token: int
    engine: str
    tokens: int
    rate: float
    trust: str
    source: str


@lru_cache
def published_speeds() -> tuple[Published, ...]:
    """All of published_speeds.tsv."""
    text = resources.files(__package__).joinpath("published_speeds.tsv").read_text(encoding="utf-8")
    return tuple(
        Published(
            row["what"], row["family"], row["chip"], int(row["memory_gb"]), int(row["cores"]) if row["cores"] else None,
            row["model"], row["weights"], int(row["layers"]), float(row["gigabytes"]), int(row["kv_bytes_per_token"]),
            row["engine"], int(row["tokens"]), float(row["rate"]), row["trust"], row["source"],
        )
        for row in csv.DictReader(text.splitlines(), delimiter="\t")
    )  # fmt: skip


def published_basis(chip: str, spec: ModelSpec, dense_bits: int | None) -> str:
    """ "published", "related" or "no run": whether such a model's decoding was published on that chip, without weak sources."""
    family = "gpt_oss" if spec.family == "gpt_oss" else "dense"
    rows = [
        row for row in published_speeds()
        if (row.what, row.family, row.chip) == ("decode", family, chip) and row.trust != "C"
    ]  # fmt: skip
    if not rows:
        return "no run"
    exact = {("20b" if spec.layers[0].num_experts < MANY_EXPERTS else "120b", f"Q{dense_bits}")}
    return "published" if family == "gpt_oss" and exact & {(row.model, row.weights) for row in rows} else "related"
