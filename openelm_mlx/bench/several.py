"""`selfcheck --workers`: how far away other machines are, and whether a model over them is the model on this one."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..decoding.compiled_step import make_step
from ..decoding.prefill import prefill
from ..link.chain import Chain
from ..loading import load

if TYPE_CHECKING:
    from ..models import Model

# What a token of gpt-oss carries, and some of a prompt's.
HOP_BYTES, BULK_BYTES = 11_520, 2_949_120
HOPS, BULKS, TOKENS, ROUNDS = 200, 8, 8, 5
# Longer than gpt-oss's window, so that rings have gone round.
PROMPTS = (7, 300)
MODELS = ("demo-openelm", "demo-gpt-oss")


@dataclass(frozen=True)
class Distance:
    """One worker. hop, hop_90: seconds of HOP_BYTES there and back, the median and what one in ten exceeds. bulk: bytes a
    second each way.
    """

    name: str
    hop: float
    hop_90: float
    bulk: float

    def line(self) -> str:
        return (
            f"{self.name}: {HOP_BYTES:,} bytes there and back take {1e6 * self.hop:,.0f} us (one in ten more than "
            f"{1e6 * self.hop_90:,.0f}); {self.bulk / 1e6:,.0f} MB/s each way"
        )


@dataclass(frozen=True)
class Compared:
    """A model over several machines beside itself on this one. difference: the largest of any logit. alone, together: seconds
    a token, medians. predicted: by the formula, from `alone` and the measured hops.
    """

    source: str
    layers: tuple[int, ...]
    same_tokens: bool
    difference: float
    alone: float
    together: float
    predicted: float

    @property
    def is_equal(self) -> bool:
        return self.same_tokens and self.difference == 0.0

    def line(self) -> str:
        what = "tokens and logits are the same, bit for bit"
        if not self.same_tokens:
            what = f"the tokens are NOT the same (logits differ by {self.difference:.2g})"
        elif self.difference:
            what = f"the tokens are the same, the logits differ by {self.difference:.2g}"
        layers = ", ".join(map(str, self.layers))
        return (
            f"{self.source} in layers of {layers}: {what}; a token takes {1e3 * self.together:.2f} ms, predicted "
            f"{1e3 * self.predicted:.2f}, on this machine alone {1e3 * self.alone:.2f}"
        )


def check_workers(
    workers: str | Sequence[str],
    secret_file: str | os.PathLike[str] | None,
    deadline: float,
    tell: Callable[[str], None],
    sources: Sequence[str | Path] = MODELS,
) -> tuple[list[Distance], list[Compared]]:
    """Measure and compare, telling each line as it is known. Raises what loading over workers raises."""
    distances: list[Distance] = []
    found = []
    for source in sources:
        alone, _ = load(source, dtype="float32")
        several, _ = load(
            source, dtype="float32", workers=workers, secret_file=secret_file, worker_timeout=deadline,
            layers=evenly(len(alone.spec.layers), workers),
        )  # fmt: skip
        chain = several.remote
        assert isinstance(chain, Chain)
        try:
            if not distances:
                for number, peer in enumerate(chain.peers):
                    distances.append(distance(chain, number, peer.name))
                    tell(distances[-1].line())
            found.append(compare(str(source), alone, several, sum(each.hop for each in distances)))
            tell(found[-1].line())
        finally:
            chain.close()
    return distances, found


def evenly(num_layers: int, workers: str | Sequence[str]) -> tuple[int, ...]:
    """As many layers for each machine."""
    from ..link.addresses import parse_workers

    count = 1 + len(parse_workers(workers))
    return tuple(num_layers * (i + 1) // count - num_layers * i // count for i in range(count))


def distance(chain: Chain, number: int, name: str) -> Distance:
    """How far away one worker is."""
    times = [_seconds(lambda: chain.echo(number, bytes(HOP_BYTES))) for _ in range(HOPS)]
    bulk = [_seconds(lambda: chain.echo(number, bytes(BULK_BYTES))) for _ in range(BULKS)]
    hop = statistics.median(times)
    return Distance(name, hop, sorted(times)[9 * HOPS // 10], 2 * BULK_BYTES / max(1e-9, statistics.median(bulk) - hop))


def compare(source: str, alone: Model, several: Model, hops: float) -> Compared:
    """Prompts, and then a few tokens each in turns: what else the machines do is the same for both.

    Not token by token: on one machine each model would find the processor's caches full of the other
    one's weights.
    """
    same, largest = True, 0.0
    times: tuple[list[float], list[float]] = ([], [])
    for length in PROMPTS:
        prompt = [3 + (7 * i) % 400 for i in range(length)]
        caches = alone.make_cache(), several.make_cache()
        logits = [prefill(model, prompt, cache, 128) for model, cache in zip((alone, several), caches, strict=True)]
        steps = [make_step(model, cache) for model, cache in zip((alone, several), caches, strict=True)]
        for _ in range(ROUNDS):
            tokens, found = [mx.argmax(logits[0])], ([logits[0]], [logits[1]])
            for place, step in enumerate(steps):
                for i in range(TOKENS):
                    mx.eval(tokens[i])
                    began = time.perf_counter()
                    found[place].append(step(tokens[i]))
                    mx.eval(found[place][-1])
                    times[place].append(time.perf_counter() - began)
                    if place == 0:
                        tokens.append(mx.argmax(found[0][-1]))
            for here, there in zip(*found, strict=True):
                same &= mx.argmax(here).item() == mx.argmax(there).item()
                largest = max(largest, cast(float, mx.max(mx.abs(here - there)).item()))
            logits = [each[-1] for each in found]
    chain = several.remote
    assert isinstance(chain, Chain)
    layers = (len(several.spec.layers), *(len(spec.layers) for spec in chain.specs))
    one, together = (statistics.median(each) for each in times)
    return Compared(source, layers, bool(same), largest, one, together, one + hops)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
