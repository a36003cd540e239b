"""How fast a model over several Macs would be, by formulas: pure arithmetic, each form with the terms that it is made of.

    pipeline   sum over the Macs of (layers + bytes / rate), and 2 hops for each Mac but the first
    tensors    the slowest Mac's share of (layers + bytes / rate), and 2 sums a layer
    experts    everything but experts on each Mac, the most chosen experts of one Mac, and 1 sum a layer
    one Mac    its own plan, with experts on disk where they do not fit

A pipeline is a sum, so that two Macs are never faster than one that holds everything; they make it fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import size
from ..errors import SettingError
from ..files import shown
from ..memory.machine import Machine, find_mac
from ..memory.plan_types import MemoryPlan, Weights
from ..memory.rates import SpeedRange, rates_of
from ..parallel.shares import EXPERTS, TENSOR, layer_shares
from ..specs import ModelSpec
from .spread import Part


@dataclass(frozen=True)
class Link:
    """A way between Macs. hop: seconds of a message with its drained queue, least and most. bulk: bytes a second.

    total: seconds of a sum over all Macs, of a few kilobytes. None of it was measured here: see docs/several-macs.md.
    """

    name: str
    hop: tuple[float, float]
    bulk: float
    total: tuple[float, float]


# Round trips of 0.34 to 0.95 ms over a Thunderbolt bridge and 4.9 to 54 ms over Wi-Fi, and bulk of 3.5 GB/s, are what owners
# report; a hop as a whole took some 1.1 ms in one published comparison. Ethernet: as Thunderbolt, with 1 Gbit/s.
LINKS = {
    "thunderbolt": Link("Thunderbolt", (0.5e-3, 1.2e-3), 3.5e9, (3e-4, 5e-4)),
    "ethernet": Link("Ethernet", (0.6e-3, 1.5e-3), 1.1e8, (4e-4, 8e-4)),
    "wifi": Link("Wi-Fi", (5e-3, 25e-3), 4e7, (5e-3, 25e-3)),
}
# RDMA over Thunderbolt 5 (macOS 26.2): some 55 us a sum, reckoned from one published run. Chips that have the ports.
RDMA_SUM = (45e-6, 70e-6)
_THUNDERBOLT_5 = ("M3 Ultra", "M4 Pro", "M4 Max", "M5 Pro", "M5 Max", "M5 Ultra")


@dataclass(frozen=True)
class Form:
    """One way to use the Macs. terms: what its time is made of, in words.

    is_ours: whether this library does it: a layer with fewer units than Macs is not shared. fits: whether the Macs have the
    memory for it; where they have not, terms say what is missing.
    """

    name: str
    decode: SpeedRange | None
    terms: str
    is_ours: bool = True
    fits: bool = True

    @property
    def is_shared(self) -> bool:
        """Whether the Macs compute each layer together."""
        return "shared" in self.name

    def as_dict(self) -> dict[str, Any]:
        decode = None if self.decode is None else self.decode.as_dict()
        return {"name": self.name, "decode": decode, "terms": self.terms, "is_ours": self.is_ours, "fits": self.fits}


@dataclass(frozen=True)
class SeveralPlan:
    """A model over several Macs. alone: the plan of the Mac that does best by itself. verdict: what to do, in a sentence."""

    source: str
    link: Link
    parts: tuple[Part, ...]
    alone: MemoryPlan
    forms: tuple[Form, ...]
    prefill: SpeedRange | None
    verdict: str

    @property
    def counts(self) -> tuple[int, ...]:
        """Layers of each Mac."""
        return tuple(part.stop - part.start for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "source": self.source, "link": self.link.name, "layers": list(self.counts),
            "parts": [
                {"mac": part.machine.name, "start": part.start, "stop": part.stop, "plan": part.plan.as_dict()}
                for part in self.parts
            ],
            "forms": [form.as_dict() for form in self.forms],
            "prefill": None if self.prefill is None else self.prefill.as_dict(),
            "alone": self.alone.as_dict(), "verdict": self.verdict,
        }  # fmt: skip


def checked_link(name: object) -> Link:
    """The link of that name. Raises SettingError."""
    if not isinstance(name, str) or name not in LINKS:
        raise SettingError(f"link is {shown(name)}: give {', '.join(list(LINKS)[:-1])} or {list(LINKS)[-1]}.")
    return LINKS[name]


def forecast(
    source: str,
    spec: ModelSpec,
    weights: Weights,
    parts: Sequence[Part],
    alone: Sequence[MemoryPlan],
    link: Link,
    short: Mapping[str, MemoryPlan],
) -> SeveralPlan:
    """What these parts reach, beside the other forms and the best of the Macs alone.

    spec, weights: of the whole model. alone: its plan on each of the Macs. short: of the forms that share each layer and do
    not fit, the plan of a Mac which its share is too large for.
    """
    machines = [part.machine for part in parts]
    best = max(alone, key=lambda plan: (plan.fits, plan.decode.fit if plan.decode is not None else 0.0))
    pipeline = pipeline_speed(parts, link)
    hops = 2 * (len(parts) - 1)
    low, high = (1e3 * each for each in link.hop)
    forms = [Form("pipeline", pipeline, f"the Macs' times added up, and {hops} hops of {low:g} to {high:g} ms")]
    has_rdma = link is LINKS["thunderbolt"] and all(each.chip in _THUNDERBOLT_5 for each in machines)
    total, way = (RDMA_SUM, "RDMA") if has_rdma else (link.total, "TCP")
    tensors = _tensor_speed(spec, weights, parts, total)
    terms = (
        f"the slowest Mac's share, and {2 * len(spec.layers)} sums of {1e6 * total[0]:,.0f} to {1e6 * total[1]:,.0f} us"
    )
    is_ours = _divides(spec, TENSOR, len(parts))
    forms.append(_shared_form(f"tensors shared, {way}", tensors, terms, is_ours, short.get(TENSOR)))
    if weights.slot:
        chosen = spec.layers[0].experts_per_token
        most = most_of_one(chosen, len(parts))
        experts = _expert_speed(spec, weights, parts, total, most)
        terms = f"all but experts on each Mac, {most:.3g} of {chosen} experts, and {len(spec.layers)} sums"
        is_ours = _divides(spec, EXPERTS, len(parts))
        forms.append(_shared_form(f"experts shared, {way}", experts, terms, is_ours, short.get(EXPERTS)))
    where = best.machine.name if best.machine is not None else "one Mac"
    if best.fits:
        how = "all in memory" if best.expert_slots is None else f"{best.expert_slots} of each layer's experts in memory"
        forms.append(Form(f"{where} alone", best.decode, how))
    streams = any(part.plan.expert_slots is not None for part in parts)
    verdict = _verdict(best, where, pipeline, link, streams) + _of_shared(forms)
    return SeveralPlan(source, link, tuple(parts), best, tuple(forms), _prefill(parts, link, spec), verdict)


def _shared_form(name: str, decode: SpeedRange | None, terms: str, is_ours: bool, short: MemoryPlan | None) -> Form:
    if short is None or short.machine is None:
        return Form(name, decode, terms, is_ours)
    needed, allowed = size(short.process_bytes), size(short.memory_limit)
    return Form(name, None, f"a share takes {needed}, and {short.machine.name} may use {allowed}", is_ours, fits=False)


def _of_shared(forms: Sequence[Form]) -> str:
    """A sentence where sharing each layer is expected to be faster than whatever else there is; or nothing."""
    known = [each for each in forms if each.is_ours and each.decode is not None]
    best = max(known, key=lambda each: each.decode.fit if each.decode is not None else 0.0, default=None)
    if best is None or not best.is_shared or len(known) < 2:
        return ""
    speeds = [each.decode.fit for each in known if each.decode is not None and not each.is_shared]
    if best.decode is None or not speeds:
        return ""
    return f" With {best.name} it would be {best.decode.fit / max(speeds):.1f} times as fast as without."


def _divides(spec: ModelSpec, form: str, count: int) -> bool:
    """Whether so many Macs can share each layer."""
    try:
        layer_shares(spec, {}, form, 0, count)
    except SettingError:
        return False
    return True


def pipeline_speed(parts: Sequence[Part], link: Link) -> SpeedRange | None:
    """A token through one Mac after the other."""
    speeds = [part.plan.decode for part in parts]
    if any(each is None for each in speeds):
        return None
    known = [each for each in speeds if each is not None]
    hops = 2 * (len(parts) - 1)
    slow = sum(1 / each.low for each in known) + hops * link.hop[1]
    fast = sum(1 / each.high for each in known) + hops * link.hop[0]
    return SpeedRange.of(1 / slow, 1 / fast, known[0].tokens, _basis([each.basis for each in known]))


def most_of_one(chosen: int, num_machines: int) -> float:
    """How many of a token's experts the busiest of several machines has, on average; each is equally likely anywhere."""
    places = itertools.product(range(num_machines), repeat=chosen)
    counts = [max(each.count(i) for i in range(num_machines)) for each in places]
    return sum(counts) / len(counts)


def _tensor_speed(
    spec: ModelSpec, weights: Weights, parts: Sequence[Part], total: tuple[float, float]
) -> SpeedRange | None:
    count = len(parts)
    touched = weights.dense - weights.untied_embedding + spec.layers[0].experts_per_token * weights.slot
    return _shared_speed(spec, parts, touched / count, _kv_bytes(parts) / count, 2 * len(spec.layers), total)


def _expert_speed(
    spec: ModelSpec, weights: Weights, parts: Sequence[Part], total: tuple[float, float], most: float
) -> SpeedRange | None:
    touched = weights.dense - weights.untied_embedding + most * weights.slot
    return _shared_speed(spec, parts, touched, _kv_bytes(parts), len(spec.layers), total)


def _shared_speed(
    spec: ModelSpec, parts: Sequence[Part], touched: float, kv: float, sums: int, total: tuple[float, float]
) -> SpeedRange | None:
    slow = fast = 0.0
    bases = []
    for part in parts:
        rates = rates_of(part.machine, spec, part.plan.dense_bits)
        if rates is None:
            return None
        seconds = rates.decode_seconds(len(spec.layers), touched, kv)
        slow, fast = max(slow, seconds / rates.low), max(fast, seconds / rates.high)
        bases.append(rates.basis)
    tokens = parts[0].plan.context_length
    return SpeedRange.of(1 / (slow + sums * total[1]), 1 / (fast + sums * total[0]), tokens, _basis(bases))


def _kv_bytes(parts: Sequence[Part]) -> int:
    return sum(part.plan.kv_cache_bytes for part in parts)


def _prefill(parts: Sequence[Part], link: Link, spec: ModelSpec) -> SpeedRange | None:
    """Each Mac computes a chunk while the one before computes the next: the slowest one decides, or the link."""
    speeds = [part.plan.prefill for part in parts]
    if any(each is None for each in speeds):
        return None
    known = [each for each in speeds if each is not None]
    wire = link.bulk / (4 * spec.hidden_size * (2 if len(parts) > 2 else 1))
    low, high = min([wire, *(each.low for each in known)]), min([wire, *(each.high for each in known)])
    return SpeedRange.of(low, high, known[0].tokens, _basis([each.basis for each in known]))


def _basis(found: Sequence[str]) -> str:
    return next((each for each in ("no run", "related", "published") if each in found), found[0])


def _verdict(best: MemoryPlan, where: str, pipeline: SpeedRange | None, link: Link, streams: bool) -> str:
    """streams: whether the Macs together have experts on their disks, too."""
    alone = best.decode if best.fits else None
    if best.fits and best.expert_slots is None:
        return f"{where} alone holds all of it, and is faster: another Mac would only add its hops."
    if alone is None or pipeline is None:
        return (
            f"No one of them holds it: together they do{', with experts on their disks' if streams else ''}."
            if not best.fits
            else "The speed of these machines is not known."
        )
    ratio = pipeline.fit / alone.fit
    if ratio < 1:
        return (
            f"{where} alone, with experts on its disk, is expected to be {1 / ratio:.1f} times as fast as several over "
            f"{link.name}: {'use a cable, or ' if link is LINKS['wifi'] else ''}leave the others out."
        )
    return f"Together they are expected to be {ratio:.1f} times as fast as {where} alone with experts on its disk."


def machines_of(names: str | Sequence[str]) -> list[Machine]:
    """Macs by name, from "M4 Pro 48GB, M4 Pro 48GB" or a list. Raises SettingError for fewer than two, and an unknown one."""
    texts = names.split(",") if isinstance(names, str) else list(names)
    texts = [each.strip() if isinstance(each, str) else each for each in texts]
    if len(texts) < 2 or "" in texts:
        raise SettingError(f'macs is {shown(names)}: give two or more, such as "M4 Pro 48GB, M4 Pro 48GB".')
    return [find_mac(each) for each in texts]
