"""Measuring this machine's speed: the terms of decoding and prefill that plans use (memory/rates.py).

Small random models of the released widths with a few layers are slow for different reasons: many narrow layers (the fixed
time of a layer), few wide ones (weights), a long context (keys and values). They are written, loaded and run like a user's,
in turns, so that a disturbance affects all; medians are used.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..checkpoint.released import released_gpt_oss_config, released_openelm_config
from ..decoding.compiled_step import make_step
from ..decoding.prefill import prefill
from ..loading import load
from ..memory.cache_bytes import kv_cache_bytes
from ..memory.calibration import Timed, checked_rates, spread_of
from ..memory.machine import Machine
from ..memory.measured import MeasuredRates
from ..memory.rates import ATTENTION_SHARE
from ..models.precision import runs_on_cpu
from ..specs import ModelSpec, openelm_config, spec_from_config
from .against import of_a_token, random_prompt
from .disk import cold_rate, disk_rates
from .random_checkpoint import write_random_checkpoint
from .random_gpt_oss import write_random_gpt_oss

if TYPE_CHECKING:
    from ..models import Model

Clock = Callable[[], float]

FAMILIES = ("gpt_oss", "openelm")
# Rounds after the warm-up; after this many seconds no round begins, except the first three.
ROUNDS, FEWEST_ROUNDS, SECONDS = 9, 3, 12.0
# Of the file that the disk is asked for.
DISK_BYTES, DISK_BYTES_ON_CPU = 2**30, 2**28


@dataclass(frozen=True)
class Shape:
    """A model to decode from, with each of `contexts` tokens in its cache; prompt: tokens to read at once (0: none)."""

    name: str
    config: Mapping[str, Any]
    contexts: tuple[int, ...]
    prompt: int = 0


@dataclass(frozen=True)
class Work:
    """One timed task: `run` decodes `tokens` tokens, or with is_prompt reads a prompt of that many."""

    name: str
    spec: ModelSpec
    weight_bytes: int
    kv_bytes: int
    tokens: int
    is_prompt: bool
    run: Callable[[], None]


def shapes(family: str, on_cpu: bool) -> tuple[Shape, ...]:
    """The measured shapes of a family: with released widths; fewer and narrower on MLX's CPU backend."""
    return _gpt_oss_shapes(on_cpu) if family == "gpt_oss" else _openelm_shapes(on_cpu)


def _gpt_oss_shapes(on_cpu: bool) -> tuple[Shape, ...]:
    def config(layers: int, hidden: int, heads: int) -> dict[str, Any]:
        return {
            **released_gpt_oss_config("20b"), "num_hidden_layers": layers, "hidden_size": hidden, "num_local_experts": 8,
            "intermediate_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads // 8,
            "vocab_size": 2048, "eos_token_id": 2,
        }  # fmt: skip

    if on_cpu:
        return (
            Shape("narrow", config(12, 256, 8), (256,)),
            Shape("wide", config(2, 1440, 64), (256,), 32),
            Shape("long", config(2, 256, 64), (256, 4096)),
        )
    return (
        Shape("narrow", config(24, 512, 8), (256,)),
        Shape("half", config(8, 1440, 64), (2048,)),
        Shape("wide", config(3, 2880, 64), (256,), 512),
        Shape("long", config(8, 512, 64), (256, 16384)),
    )


def _openelm_shapes(on_cpu: bool) -> tuple[Shape, ...]:
    def narrow(layers: int, width: int, heads: int, head_dim: int) -> dict[str, Any]:
        return {
            **released_openelm_config("270M"), "num_transformer_layers": layers, "model_dim": width, "head_dim": head_dim,
            "vocab_size": 2048, "num_query_heads": [heads] * layers, "num_kv_heads": [heads // 4] * layers,
            "ffn_multipliers": [4.0] * layers, "max_context_length": 16384, "rope_max_length": 16384,
        }  # fmt: skip

    def released(size: str, layers: int) -> dict[str, Any]:
        spec = spec_from_config(released_openelm_config(size))
        last = spec.layers[-layers:]  # the widest
        return {**openelm_config(ModelSpec(**{**vars(spec), "layers": last})), "vocab_size": 2048}

    if on_cpu:
        return (
            Shape("narrow", narrow(16, 256, 4, 64), (256,)),
            Shape("wide", released("450M", 2), (256,), 32),
            Shape("long", narrow(2, 256, 16, 64), (256, 4096)),
        )
    return (
        Shape("narrow", narrow(24, 512, 8, 64), (256,)),
        Shape("half", released("1.1B", 8), (1024,)),
        Shape("wide", released("3B", 4), (256,), 512),
        Shape("long", narrow(8, 512, 24, 128), (256, 8192)),
    )


@dataclass(frozen=True)
class Speeds:
    """The measured speeds. rates: of families with credible runs; reasons: why the others have none.

    disk: bytes a second; None if it was not measured, or the reads came from the system's cache.
    """

    rates: Mapping[str, MeasuredRates]
    reasons: Mapping[str, str]
    rows: Sequence[Timed]
    disk: float | None = None

    def lines(self) -> Iterator[str]:
        """For people."""
        for family, each in self.rates.items():
            prompt = "" if each.products is None else f"; prompts at {each.products / 1e12:.3g} TFLOPS"
            yield (
                f"{family}: {1e6 * each.layer_seconds:,.0f} us a layer, weights at {each.weights / 1e9:.3g} GB/s, keys and "
                f"values at {each.keys_values / 1e9:.3g} GB/s{prompt}"
            )
        for family, reason in self.reasons.items():
            yield f"{family}: not kept, plans stay as before: {reason}"
        if self.disk is not None:
            yield f"disk: {self.disk / 1e9:.2g} GB/s"

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "rates": {family: asdict(each) for family, each in self.rates.items()}, "not_kept": dict(self.reasons),
            "rows": [asdict(each) for each in self.rows], "disk": self.disk,
        }  # fmt: skip


def measured_speeds(
    machine: Machine,
    families: Sequence[str] = FAMILIES,
    clock: Clock = time.perf_counter,
    with_disk: bool = True,
    left: Callable[[], float] | None = None,
) -> Speeds:
    """Measure this machine's speeds, in well under a minute; nothing is stored. Raises OSError if the disk is full.

    left: returns the remaining seconds; a family that would take longer, judging by the previous one, is skipped.
    """
    rows: list[Timed] = []
    took = 0.0
    for family in families:
        if rows and left is not None and left() < 1.3 * took:
            break
        started = clock()
        rows += measure(family, clock=clock)
        took = clock() - started
    rates, reasons = checked_rates(rows, machine.bandwidth)
    disk = cold_rate(disk_rates(DISK_BYTES_ON_CPU if runs_on_cpu() else DISK_BYTES, (4, 8))) if with_disk else None
    return Speeds(rates, reasons, rows, disk)


def measure(
    family: str, chosen: Sequence[Shape] | None = None, clock: Clock = time.perf_counter, folder: Path | None = None
) -> list[Timed]:
    """A family's runs, each the median of its rounds. Models are written into `folder`, the system's temporary one."""
    with works(shapes(family, runs_on_cpu()) if chosen is None else chosen, folder) as found:
        return timed(found, clock)


def timed(found: Sequence[Work], clock: Clock = time.perf_counter) -> list[Timed]:
    """Each piece of work of one family, timed in turns; a prompt's beside the last one of its model."""
    rounds = in_turns([each.run for each in found], clock)
    rows: list[Timed] = []
    for work, seconds in zip(found, rounds, strict=True):
        middle = statistics.median(seconds) / work.tokens
        if work.is_prompt:
            continue
        prompts = [
            _operations(other) * other.tokens / statistics.median(its)
            for other, its in zip(found, rounds, strict=True)
            if other.is_prompt and other.spec is work.spec and statistics.median(its) > 0
        ]
        rows.append(
            Timed(
                work.spec.family, len(work.spec.layers), work.weight_bytes, work.kv_bytes, middle,
                prompts[0] if prompts else None, spread_of(seconds),
            )
        )  # fmt: skip
    return rows


def in_turns(
    runs: Sequence[Callable[[], None]], clock: Clock = time.perf_counter, rounds: int = ROUNDS, seconds: float = SECONDS
) -> list[list[float]]:
    """Seconds of each run in each round. The first round warms up and does not count."""
    found: list[list[float]] = [[] for _ in runs]
    began = clock()
    for number in range(rounds + 1):
        if number > FEWEST_ROUNDS and clock() - began > seconds:
            break
        for times, run in zip(found, runs, strict=True):
            started = clock()
            run()
            if number:
                times.append(clock() - started)
    return found


@contextmanager
def works(chosen: Sequence[Shape], folder: Path | None = None) -> Iterator[list[Work]]:
    """What to time of these shapes, their models in memory until the block is left."""
    found: list[Work] = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="openelm_mlx-speeds-") as place:
        try:
            for shape in chosen:
                path, spec = Path(place) / shape.name, spec_from_config(shape.config)
                if spec.family == "gpt_oss":
                    write_random_gpt_oss(path, shape.config)
                else:
                    write_random_checkpoint(path, shape.config, "bfloat16")
                model, _ = load(path, context_length=max(*shape.contexts, shape.prompt) + 1024)
                found += [_decoding(model, tokens, shape) for tokens in shape.contexts]
                if shape.prompt:
                    found.append(_reading(model, shape))
            yield found
        finally:
            found.clear()
            mx.clear_cache()


def _decoding(model: Model, context: int, shape: Shape) -> Work:
    """Decoding with `context` tokens in the cache, which are random numbers: no prompt has to be read for them."""
    cache = model.make_cache()
    prefill(model, random_prompt(model, 4), cache, 16)
    num_tokens = 3 if runs_on_cpu() else 16
    for layer, each in zip(model.spec.layers, cache, strict=True):
        shape_of = (1, layer.num_kv_heads, context - 4, layer.head_dim)
        dtype = each.buffers[0].dtype
        keys, values = (mx.random.normal(shape_of, mx.float32).astype(dtype) for _ in range(2))
        each.update_and_fetch(keys, values)
        mx.eval(each.buffers)
        mx.eval(each.reserve(context + (ROUNDS + 1) * num_tokens))
    step = make_step(model, cache)

    def run() -> None:
        token = mx.array(3)
        for _ in range(num_tokens):
            token = mx.argmax(step(token))
            mx.async_eval(token)
        mx.eval(token)

    kv_bytes = kv_cache_bytes(model.spec, context, cache[0].buffers[0].dtype.size)
    name = f"{shape.name}, {context:,} tokens in the context"
    return Work(name, model.spec, of_a_token(model)[0], kv_bytes, num_tokens, False, run)


def _reading(model: Model, shape: Shape) -> Work:
    prompt = random_prompt(model, shape.prompt)

    def run() -> None:
        mx.eval(prefill(model, prompt, model.make_cache(), len(prompt)))

    name = f"{shape.name}, a prompt of {len(prompt):,} tokens"
    return Work(name, model.spec, of_a_token(model)[0], 0, len(prompt), True, run)


def _operations(work: Work) -> float:
    """Of a prompt's token: two a multiplication with a weight, and attention's at the rate that plans give it."""
    spec = work.spec
    products = 2 * (spec.num_active_parameters() - spec.vocab_size * spec.hidden_size)
    attention = sum(
        4 * layer.num_heads * layer.head_dim * min(work.tokens / 2, layer.window or work.tokens)
        for layer in spec.layers
    )
    return products + attention / ATTENTION_SHARE
