"""How structured output does over a set of schemas: how many answers are finished and valid, and what the masks cost.

    python examples/structured/measure.py [SOURCE ...] [--max-tokens N] [--temperature T] [--steps]

Every schema of schemas.json is asked of every model. An answer counts as finished if its finish_reason is "stop", and as
valid if the package jsonschema says so. --steps measures the decode loop with and without a constraint on one schema.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

import openelm_mlx as om
from openelm_mlx.decoding import constraint as constraints

SCHEMAS: dict[str, Any] = json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8"))
PROMPT = "What is an apple?"


class HostTime:
    """Adds up the CPU seconds that constraints take on the host."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        for name in ("mask", "accept"):
            for kind in (constraints.PlainConstraint, constraints.HarmonyConstraint):
                setattr(kind, name, self._timed(getattr(kind, name)))

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*args)
            finally:
                self.seconds += time.thread_time() - start
                self.calls += 1

        return timed


def measure(source: str, max_tokens: int, temperature: float, host: HostTime) -> None:
    """Ask for an answer to each schema and print what came."""
    model, tokenizer = om.load(source)
    finished = valid = tokens = 0
    decode_seconds, host.seconds, host.calls = 0.0, 0.0, 0
    for number, (name, schema) in enumerate(SCHEMAS.items()):
        sampling = om.SamplingParams(temperature=temperature, seed=number)
        options = {"schema": schema, "max_tokens": max_tokens, "sampling": sampling}
        chunks = list(om.stream_generate(model, tokenizer, PROMPT, **options))
        text = "".join(chunk.text for chunk in chunks)
        is_finished = chunks[-1].finish_reason == "stop"
        finished += is_finished
        is_valid = is_finished and matches(text, schema)
        valid += is_valid
        tokens += len(chunks)
        statistics = chunks[-1].statistics
        if statistics is not None and statistics.decode_tps:
            decode_seconds += (len(chunks) - 1) / statistics.decode_tps
        if not is_valid:
            print(f"  {name}: {chunks[-1].finish_reason}, {text!r}")
    print(
        f"{source}, at most {max_tokens} tokens, temperature {temperature}: {finished} of {len(SCHEMAS)} finished, {valid} "
        f"of these valid; {tokens} tokens; masks and acceptance {1e6 * host.seconds / tokens:.0f} us a token, a step "
        f"{1e6 * decode_seconds / tokens:.0f} us"
    )


def matches(text: str, schema: Any) -> bool:
    """Whether `text` is JSON that follows the schema, formats included."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).is_valid(value)


def measure_steps(source: str, max_tokens: int) -> None:
    """Time a token in a string of any length, constrained and not, turn by turn; the smallest of five counts."""
    model, tokenizer = om.load(source)
    times: dict[str, list[float]] = {"free": [], "constrained": []}
    for _ in range(5):
        for name, options in (("free", {}), ("constrained", {"schema": {"type": "string"}})):
            sampling = om.SamplingParams(
                logit_bias={} if tokenizer is None else dict.fromkeys(tokenizer.eos_tokens, -1e9)
            )
            chunks = list(
                om.stream_generate(
                    model, tokenizer, PROMPT, raw=True, max_tokens=max_tokens, sampling=sampling, **options
                )
            )
            assert chunks[-1].statistics is not None
            times[name].append(1e6 / chunks[-1].statistics.decode_tps)
    print(f"{source}: " + ", ".join(f"{name} {min(each):.0f} us a token" for name, each in times.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["demo-openelm", "demo-gpt-oss"])
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--steps", action="store_true")
    args = parser.parse_args()
    if not args.steps:
        host_time = HostTime()
    for each in args.sources:
        if args.steps:
            measure_steps(each, args.max_tokens)
        else:
            measure(each, args.max_tokens, args.temperature, host_time)
