"""Our rates and mlx-lm's on the same random weights: in turns in one process, or each in a process of its own."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checks import size
from ..decoding.sampling import SamplingParams
from ..errors import CheckpointError
from ..generate import stream_generate
from ..memory.machine import this_machine
from ..specs import spec_from_config
from .fresh import run_fresh
from .limits import Limits, measured_limits
from .random_pair import random_pair, shape_config

if TYPE_CHECKING:
    from ..models import Model

# The first tokens of a run include one-time compilation and allocation.
LEFT_OUT = 8


@dataclass
class Comparison:
    """Samples of one shape: name of the measure -> whose ("ours", "mlx-lm") -> values, rates in tokens a second.

    first_token: measure -> whose -> seconds from a prompt to the first token. peaks: measure -> whose -> peak bytes in
    addition to both models' weights. limits: of the machine, measured in the same run; token_bytes, token_operations: the
    bytes and operations that a token needs at least. is_apart: every run had a process of its own.
    """

    shape: str
    bits: int | None
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first_token: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    limits: Limits | None = None
    token_bytes: int = 0
    token_operations: int = 0
    is_apart: bool = False
    error: str | None = None

    def add(self, measure: str, whose: str, value: float) -> None:
        self.samples.setdefault(measure, {}).setdefault(whose, []).append(value)

    def add_run(self, measure: str, whose: str, run: Run) -> None:
        """One run's rate, time and peak."""
        self.add(measure, whose, run.prefill if measure.startswith("prefill") else run.decode)
        self.first_token.setdefault(measure, {}).setdefault(whose, []).append(run.first_token)
        peaks = self.peaks.setdefault(measure, {})
        peaks[whose] = max(peaks.get(whose, 0), run.peak_bytes)

    def part_of_limit(self, measure: str) -> float | None:
        """The share of the machine's bandwidth (decode) or arithmetic (prefill) that our median uses."""
        ours = self.samples.get(measure, {}).get("ours")
        if self.limits is None or not ours:
            return None
        rate = statistics.median(ours)
        if measure.startswith("prefill"):
            return self.limits.of_flops(self.token_operations, rate)
        return self.limits.of_bandwidth(self.token_bytes, rate)

    def ratio(self, measure: str) -> float | None:
        """Our median over mlx-lm's."""
        both = self.samples.get(measure, {})
        if not both.get("ours") or not both.get("mlx-lm"):
            return None
        return statistics.median(both["ours"]) / statistics.median(both["mlx-lm"])

    def lines(self) -> Iterator[str]:
        """The comparison for people, a line a measure."""
        name = f"{self.shape}, {'as released' if self.bits is None else f'{self.bits} bits'}"
        if self.error is not None:
            yield f"{name}: {self.error}"
        for measure, both in self.samples.items():
            parts = [f"{whose} {_spread(values)}" for whose, values in both.items()]
            ratio = self.ratio(measure)
            yield f"{name}: {measure}: {', '.join(parts)}" + ("" if ratio is None else f"; ratio {ratio:.2f}")
            part = self.part_of_limit(measure)
            if part is not None and self.limits is not None:
                what = (
                    f"the {self.limits.flops / 1e12:.3g} TFLOPS"
                    if measure.startswith("prefill")
                    else f"the {self.limits.bandwidth / 1e9:,.4g} GB/s"
                )
                yield f"{name}: {measure}: ours is {part:.1%} of {what} measured in this run"
            if measure in self.first_token:
                both_times = self.first_token[measure].items()
                times = ", ".join(f"{whose} {1e3 * statistics.median(each):,.4g} ms" for whose, each in both_times)
                peaks = ", ".join(f"{whose} {size(each)}" for whose, each in self.peaks[measure].items())
                yield f"{name}: {measure}: first token after {times}; memory in addition to the weights {peaks}"

    def as_dict(self) -> dict[str, Any]:
        """The comparison for machines."""
        return {
            **vars(self),
            "limits": None if self.limits is None else self.limits.as_dict(),
            "ratios": {measure: self.ratio(measure) for measure in self.samples},
            "parts_of_limits": {measure: self.part_of_limit(measure) for measure in self.samples},
        }


@dataclass(frozen=True)
class Run:
    """One run of one side: rates in tokens a second, seconds to the first token, peak bytes in addition to the weights."""

    prefill: float
    decode: float
    first_token: float
    peak_bytes: int


def compare(
    shape: str, bits: int | None = None, num_layers: int | None = None, rounds: int = 3, seconds: float = 60.0,
    prompt_tokens: int = 2048, completion_tokens: int = 96, long_context: int = 0, theirs: bool = True,
    sample: Callable[[str], None] | None = None, ours: bool = True, apart: bool | None = None,
) -> Comparison:  # fmt: skip
    """Measure one shape: prefill of `prompt_tokens`, decode after a short prompt, and after `long_context` tokens (0: not).

    Prompts are cut to the model's context. After a warm-up round at least one round counts; no round begins after
    `seconds`, and then a measure with samples of both sides is skipped. sample: called with a sentence for each sample as it
    comes, warm-up included, so that an interrupted run leaves some.
    ours, theirs: whether a side is measured. apart: each run in a process of its own; None: when both models do not fit.
    """
    comparison = Comparison(shape, bits)
    try:
        config = shape_config(shape, num_layers)
        if apart is None:
            apart = ours and theirs and 2.2 * _model_bytes(config, bits) > this_machine().available_bytes
        if apart:
            _compare_apart(
                comparison, bits, num_layers, rounds, seconds, prompt_tokens, completion_tokens, long_context, sample
            )
            return comparison
        model, other = random_pair(config, bits, theirs, ours)
        comparison.limits = measured_limits()
        comparison.token_bytes, comparison.token_operations = of_a_token(model)
        runners: dict[str, Callable[..., Run]] = {"ours": our_runner(model, 2048)} if ours else {}
        if other is not None:
            runners["mlx-lm"] = mlx_lm_runner(other)
        started = time.perf_counter()
        measures = _measures(model, prompt_tokens, completion_tokens, long_context)
        for number in range(rounds + 1):
            for name, (prompt, num_tokens) in measures.items():
                is_late = time.perf_counter() - started > seconds
                if is_late and comparison.samples.get(name, {}).keys() == runners.keys():
                    continue
                for whose in sorted(runners, reverse=bool(number % 2)):
                    run = _beside_weights(runners[whose], prompt, num_tokens)
                    if sample is not None:
                        value = run.prefill if name.startswith("prefill") else run.decode
                        sample(f"{shape}: {name}: {whose} {value:.4g}{'' if number else ' (warming up)'}")
                    if number:
                        comparison.add_run(name, whose, run)
    except Exception as error:  # noqa: BLE001 - one shape that fails must not end the others
        comparison.error = f"{type(error).__name__}: {error}"
    mx.clear_cache()
    return comparison


def _compare_apart(
    comparison: Comparison, bits: int | None, num_layers: int | None, rounds: int, seconds: float, prompt_tokens: int,
    completion_tokens: int, long_context: int, sample: Callable[[str], None] | None,
) -> None:  # fmt: skip
    """Measure the sides in turns, each round of each in a fresh process with only one model."""
    comparison.is_apart = True
    started = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - started > seconds:
            break
        for whose in sorted(("ours", "mlx-lm"), reverse=bool(number % 2)):
            settings = {
                "shape": comparison.shape, "bits": bits, "num_layers": num_layers, "rounds": 1, "seconds": seconds,
                "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "long_context": long_context,
                "ours": whose == "ours", "theirs": whose == "mlx-lm", "apart": False,
            }  # fmt: skip
            what = f"a process that measured {whose}"
            found = run_fresh("openelm_mlx.bench.against", json.dumps(settings), what=what)
            if found["error"] is not None:
                raise CheckpointError(f"{whose}: {found['error']}")
            comparison.limits = comparison.limits or Limits(**found["limits"])
            comparison.token_bytes, comparison.token_operations = found["token_bytes"], found["token_operations"]
            for name, sides in found["samples"].items():
                for value in sides.get(whose, []):
                    comparison.add(name, whose, value)
                    if sample is not None:
                        sample(f"{comparison.shape}: {name}: {whose} {value:.4g}")
                times = comparison.first_token.setdefault(name, {}).setdefault(whose, [])
                times += found["first_token"][name].get(whose, [])
                peaks = comparison.peaks.setdefault(name, {})
                peaks[whose] = max(peaks.get(whose, 0), found["peaks"][name].get(whose, 0))


def _model_bytes(config: Mapping[str, Any], bits: int | None) -> float:
    """About the bytes of a model's weights."""
    spec = spec_from_config(config)
    experts = sum(layer.num_experts * layer.parameters_per_expert(spec.hidden_size) for layer in spec.layers)
    return (spec.num_parameters() - experts) * (2 if bits is None else bits / 8 + 0.06) + experts * 4.25 / 8


def of_a_token(model: Model) -> tuple[int, int]:
    """Bytes that decoding one token reads, and operations for one prompt token: each active weight once."""
    spec, total, experts = model.spec, 0, 0
    for name, array in tree_flatten(model.parameters()):
        if ".experts." in name:
            experts += array.nbytes
        elif spec.tied_head or "embed_tokens" not in name:
            total += array.nbytes
    layer = spec.layers[0]
    return total + experts * layer.experts_per_token // max(1, layer.num_experts), 2 * spec.num_active_parameters()


def _beside_weights(run: Callable[..., Run], prompt: list[int], num_tokens: int) -> Run:
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = run(prompt, num_tokens)
    return replace(found, peak_bytes=max(0, (found.peak_bytes or mx.get_peak_memory()) - before))


def usable_tokens(model: Model) -> int:
    """Ids below this can be used in a random prompt."""
    return min(model.spec.usable_vocab_size, 30_000)


def _measures(
    model: Model, prompt_tokens: int, completion_tokens: int, long_context: int
) -> dict[str, tuple[list[int], int]]:
    """Name -> (prompt, how many new tokens), prompts no longer than the context allows."""
    room = model.context_length
    length, long = min(prompt_tokens, room - 2), min(long_context, room - completion_tokens)
    prompt = random_prompt(model, max(length, long))
    found = {
        f"prefill of {length}": (prompt[:length], 2),
        "decode": (prompt[: min(128, length)], completion_tokens),
    }
    if long > 0:
        found[f"decode after {long}"] = (prompt[:long], completion_tokens)
    return found


def random_prompt(model: Model, length: int) -> list[int]:
    """`length` tokens, the same ones each time, without a pattern that a model could know."""
    vocab_size = usable_tokens(model)
    return [(7919 * i + 13) % vocab_size for i in range(length)]


def our_runner(model: Model, prefill_chunk: int | None = None, left_out: int = LEFT_OUT) -> Callable[..., Run]:
    """Runs of our loop on (prompt, number of new tokens); the end-of-text token does not end them.

    left_out: tokens after the first one that the decode rate does not count.
    """
    never = SamplingParams(logit_bias=dict.fromkeys(model.spec.eos_tokens, float("-inf")))

    def run(prompt: list[int], num_tokens: int) -> Run:
        arrivals, peak = [time.perf_counter()], 0
        for chunk in stream_generate(
            model, None, prompt, max_tokens=num_tokens, sampling=never, prefill_chunk=prefill_chunk
        ):
            arrivals.append(time.perf_counter())
            peak = peak if chunk.statistics is None else chunk.statistics.peak_memory_bytes
        # The loop resets MLX's peak several times, so its own maximum is used.
        return replace(_rates(arrivals, len(prompt), left_out), peak_bytes=peak)

    return run


def mlx_lm_runner(model: Any, left_out: int = LEFT_OUT) -> Callable[..., Run]:
    """The same for mlx-lm's loop, without its peak."""
    from mlx_lm.generate import generate_step

    def run(prompt: list[int], num_tokens: int) -> Run:
        arrivals = [time.perf_counter()]
        for _ in generate_step(mx.array(prompt), model, max_tokens=num_tokens):
            arrivals.append(time.perf_counter())
        return _rates(arrivals, len(prompt), left_out)

    return run


def _rates(arrivals: list[float], num_prompt_tokens: int, left_out: int) -> Run:
    started, first = arrivals[0], arrivals[1]
    counted = arrivals[1 + left_out :] if len(arrivals) > left_out + 4 else arrivals[1:]
    decode = (len(counted) - 1) / (counted[-1] - counted[0])
    return Run(num_prompt_tokens / (first - started), decode, first - started, 0)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} [{min(values):.4g} to {max(values):.4g}]"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compare(**json.loads(sys.argv[1])).as_dict()))
