"""What streaming should cost where it was not measured: by the simulator, after one measured run or from a Mac's rates."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.experts.pace import READ_BACK_COST
from openelm_mlx.generate import stream_generate
from openelm_mlx.loading import load
from openelm_mlx.memory.machine import Machine
from openelm_mlx.memory.plan_speeds import ASSUMED_DISK
from openelm_mlx.memory.rates import rates_of
from openelm_mlx.models.gpt_oss import GptOss
from openelm_mlx.planning import plans_on
from openelm_mlx.specs import spec_from_config

from .routing import (
    Trace,
    after_a_prompt,
    calibrated,
    expert_bytes_of,
    recording,
    replay,
    seconds_per_token,
    speed_of_chip,
)

if TYPE_CHECKING:
    from openelm_mlx.models import Model
    from openelm_mlx.text.tokenizer import Tokenizer


def measured_predictions(
    source: str, slots: Sequence[int], prompts: Sequence[Any], max_tokens: int
) -> list[dict[str, Any]]:
    """Seconds a token at each number of slots, measured, and predicted from the first by replaying its trace."""
    rows: list[dict[str, Any]] = []
    trace, speed = None, None
    for num_slots in slots:
        model, tokenizer = load(source, expert_slots=num_slots)
        residency = cast(GptOss, model).residency
        with recording(residency) as recorded:
            # Other work on the machine can only add to a time: the least of three is nearest to this work's own.
            seconds, waited = min(_time_answers(model, tokenizer, prompts, max_tokens) for _ in range(3))
        trace = recorded if trace is None else trace
        replayed = replay(trace, num_slots)
        layers, nbytes = len(residency.banks), expert_bytes_of(model.spec)
        if speed is None:
            speed = calibrated(seconds, waited, replayed, layers, nbytes)
        predicted = seconds_per_token(replayed, layers, nbytes, speed)
        rows.append({"slots": num_slots, "seconds": seconds, "predicted": predicted, "hit_rate": replayed.hit_rate})
    return rows


def _time_answers(
    model: Model, tokenizer: Tokenizer | None, prompts: Sequence[Any], max_tokens: int
) -> tuple[float, float]:
    """Seconds a token and seconds of waiting for reads in it, over all tokens but each answer's first.

    The mean of the middle half: other work on the machine makes some tokens several times as long.
    """
    seconds: list[float] = []
    waited: list[float] = []
    for prompt in prompts:
        marks = [
            (time.perf_counter(), model.residency.statistics().seconds_waited)
            for _ in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens)
        ]
        for (start, waited_then), (stop, waited_now) in itertools.pairwise(marks):
            seconds.append(stop - start)
            waited.append(waited_now - waited_then)
    return middle_mean(seconds), middle_mean(waited)


def middle_mean(values: Sequence[float]) -> float:
    """The mean of the middle half."""
    cut = len(values) // 4
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def mac_predictions(size: str, trace: Trace, machines: Sequence[tuple[Machine, Sequence[int]]]) -> list[dict[str, Any]]:
    """What Macs should reach with a released model, by the simulator. Nobody has measured these.

    machines: each with the numbers of slots that are asked of it.
    """
    spec = spec_from_config(released_gpt_oss_config(size))
    whole = after_a_prompt(trace)
    replays = {
        each: replay(whole, each, read_back_cost=READ_BACK_COST, warm_up=len(whole.passes) // 2)
        for each in {num_slots for _, slots in machines for num_slots in slots}
    }
    rows = []
    for machine, slots in machines:
        for num_slots in slots:
            rates = rates_of(machine, spec)
            assert rates is not None
            speed = speed_of_chip(spec, rates, machine.ssd_bandwidth or ASSUMED_DISK)
            replayed = replays[num_slots]
            seconds = seconds_per_token(replayed, len(spec.layers), expert_bytes_of(spec), speed)
            rows.append(
                {
                    "mac": machine.name,
                    "slots": num_slots,
                    "hit_rate": replayed.hit_rate,
                    "tokens_per_second": 1 / seconds,
                }
            )
    return rows


def planned_slots(size: str, machines: Sequence[Machine]) -> list[int | None]:
    """How many experts of a layer a plan keeps in memory on each; None where the model does not fit."""
    plans = plans_on(machines, f"openai/gpt-oss-{size}", as_released=True)
    num_experts = spec_from_config(released_gpt_oss_config(size)).layers[0].num_experts
    return [plan.expert_slots or num_experts if plan.fits else None for plan in plans]
