"""The benchmark: rates of prefill and decode against mlx-lm on the same weights, start-up times, and the peak of loading.

Both libraries run in one process, turn by turn, so that what disturbs the machine disturbs both; medians are compared.
Start-up times and the peak of loading are measured in fresh processes.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..adapters import locate_adapter
from ..checkpoint.adapter_files import read_adapter, write_adapter
from ..checkpoint.reader import read_config
from ..errors import CheckpointError, SettingError
from ..loading import load
from ..memory.machine import this_machine
from ..memory.presets import preset_bits
from ..placement import dense_packing
from ..sources import SourceName, locate
from ..specs import ModelSpec, spec_from_config
from .against import Run, mlx_lm_runner, of_a_token, our_runner
from .fresh import run_fresh
from .limits import measured_limits

if TYPE_CHECKING:
    from ..models import Model


@dataclass(frozen=True)
class Figure:
    """One measured figure: the median of `samples`, mlx-lm's samples if there are any, and a limit for it.

    ratio: ours over mlx-lm's, for rates (larger is better). limit: "<= 0.3" or ">= 1.0", of the ratio when there is one.
    """

    name: str
    unit: str
    samples: list[float]
    mlx_lm_samples: list[float] | None = None
    limit: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float | None:
        return None if self.mlx_lm_samples is None else self.median / statistics.median(self.mlx_lm_samples)

    @property
    def is_met(self) -> bool | None:
        """Whether the limit holds; None when there is none."""
        if self.limit is None:
            return None
        sign, bound = self.limit.split()
        value = self.median if self.ratio is None else self.ratio
        return value <= float(bound) if sign == "<=" else value >= float(bound)

    def as_dict(self) -> dict[str, object]:
        return {**vars(self), "median": self.median, "ratio": self.ratio, "is_met": self.is_met}


@dataclass(frozen=True)
class Settings:
    """What to measure. prompt_tokens, completion_tokens: of each run; rounds: how many times each side runs; preset,
    adapter: as for `load`; mlx-lm's model is quantized in the same way, and has the same adapter.
    """

    source: SourceName = "demo-openelm"
    prompt_tokens: int = 64
    completion_tokens: int = 64
    rounds: int = 7
    against_mlx_lm: bool = True
    preset: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        preset_bits(self.preset)
        for name in ("prompt_tokens", "completion_tokens", "rounds"):
            least = 2 if name == "completion_tokens" else 1
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}: it must be at least {least}.")


def run_benchmark(settings: Settings) -> Iterator[Figure]:
    """Measure everything, a figure at a time as it is known.

    Raises SettingError when prompt and completion do not fit into the model's context.
    """
    spec = spec_from_config(read_config(locate(settings.source)))
    if settings.prompt_tokens + settings.completion_tokens > spec.context_length:
        raise SettingError(
            f"{settings.prompt_tokens:,} + {settings.completion_tokens:,} tokens do not fit into the model's context of "
            f"{spec.context_length:,}: ask for fewer."
        )
    yield from startup_figures(settings)
    yield load_peak_figure(settings)
    yield from rate_figures(settings)


def machine_description() -> str:
    """The machine, system, MLX device and version that figures were measured with."""
    info = mx.device_info()
    device = info.get("device_name") or platform.processor() or platform.machine()
    return (
        f"{device}, {platform.system()} {platform.release()}, Python {platform.python_version()}, mlx {version('mlx')}"
    )


# --- fresh processes ------------------------------------------------------------------------------------------------


def startup_figures(settings: Settings) -> Iterator[Figure]:
    """Seconds of `--help`, and from the start of a process to the first character of an answer."""
    command = [sys.executable, "-m", "openelm_mlx.generate"]
    yield Figure("--help", "s", [_seconds_to_end([*command, "--help"]) for _ in range(settings.rounds)], limit="<= 0.3")
    if str(settings.source).startswith("demo-"):
        command += ["--model", str(settings.source), "--prompt", "What is a banjo?", "--quiet"]
        command += [] if settings.preset is None else ["--preset", settings.preset]
        command += [] if settings.adapter is None else ["--adapter", settings.adapter]
        samples = [_seconds_to_first_output(command) for _ in range(settings.rounds)]
        yield Figure("process start to first token", "s", samples, limit="<= 1.0")


def load_peak_figure(settings: Settings) -> Figure:
    """MLX's peak memory while loading, over the bytes of the tensors, in a fresh process."""
    script = (
        "import sys, mlx.core as mx, openelm_mlx as om\n"
        "from mlx.utils import tree_flatten\n"
        "model, _ = om.load(sys.argv[1], preset=sys.argv[2] or None, adapter=sys.argv[3] or None)\n"
        "print(mx.get_peak_memory() / sum(a.nbytes for _, a in tree_flatten(model.parameters())))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, str(settings.source), settings.preset or "", settings.adapter or ""],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise CheckpointError(f"Loading {settings.source} failed: {finished.stderr.strip().splitlines()[-1]}")
    # A matrix that is quantized as it is read is briefly in memory twice.
    limit = "<= 1.02" if preset_bits(settings.preset) is None else None
    return Figure("load peak / tensor bytes", "", [float(finished.stdout)], limit=limit)


def _seconds_to_end(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def _seconds_to_first_output(command: Sequence[str]) -> float:
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    return seconds


# --- rates ----------------------------------------------------------------------------------------------------------


def rate_figures(settings: Settings) -> list[Figure]:
    """Tokens a second of prefill and decode, ours and mlx-lm's in turns, on the same random prompt; the share of the machine's
    limits that ours reach; seconds to the first token; and peak memory.

    In one process, unless both models do not fit: then each run has a process of its own.
    """
    model, _ = load(settings.source, preset=settings.preset, adapter=settings.adapter)
    spec, tokens = model.spec, of_a_token(model)
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    is_apart = settings.against_mlx_lm and 2.2 * nbytes > this_machine().available_bytes
    samples: dict[str, list[Run]] = {"ours": [], **({"mlx-lm": []} if settings.against_mlx_lm else {})}
    prompt = _prompt(spec, settings.prompt_tokens)
    runs: dict[str, Callable[[], Run]] = {}
    if is_apart:
        del model
        runs = {side: partial(_in_a_fresh_process, settings, side) for side in samples}
    else:
        runs["ours"] = _our_runs(model, prompt, settings.completion_tokens)
        if settings.against_mlx_lm:
            other = mlx_lm_model(settings.source, settings.preset, settings.adapter)
            runs["mlx-lm"] = _mlx_lm_runs(other, prompt, settings.completion_tokens)
    for round_number in range(settings.rounds + 1):
        # The order alternates; round 0 is the warm-up and does not count. A fresh process warms up by itself.
        if is_apart and not round_number:
            continue
        for name in sorted(runs, reverse=bool(round_number % 2)):
            run = runs[name]()
            if round_number:
                samples[name].append(run)
    limits, ours, theirs = measured_limits(), samples["ours"], samples.get("mlx-lm")

    def figure(name: str, unit: str, value: Callable[[Run], float], limit: str | None = None) -> Figure:
        their_samples = None if theirs is None else [value(run) for run in theirs]
        return Figure(name, unit, [value(run) for run in ours], their_samples, limit)

    length, apart = settings.prompt_tokens, ", each run in its own process" if is_apart else ""
    decode = f"decode of {settings.completion_tokens} tokens"
    return [
        figure(f"prefill of {length} tokens{apart}", "tokens/s", lambda run: run.prefill),
        figure(f"{decode}{apart}", "tokens/s", lambda run: run.decode, ">= 1.0" if theirs else None),
        Figure(
            f"prefill of the {limits.flops / 1e12:.3g} TFLOPS here", "%",
            [100 * limits.of_flops(tokens[1], run.prefill) for run in ours],
        ),
        Figure(
            f"decode of the {limits.bandwidth / 1e9:.3g} GB/s here", "%",
            [100 * limits.of_bandwidth(tokens[0], run.decode) for run in ours],
        ),
        Figure(f"first token after {length} tokens", "ms", [1e3 * run.first_token for run in ours]),
        Figure("most memory in use, as MLX counts", "MB", [run.peak_bytes / 1e6 for run in ours]),
    ]  # fmt: skip


def _prompt(spec: ModelSpec, length: int) -> list[int]:
    tokens = mx.random.randint(3, spec.usable_vocab_size, (length,), key=mx.random.key(0))
    return cast("list[int]", tokens.tolist())


def _our_runs(model: Model, prompt: list[int], num_tokens: int) -> Callable[[], Run]:
    return partial(our_runner(model, left_out=0), prompt, num_tokens)


def _mlx_lm_runs(model: object, prompt: list[int], num_tokens: int) -> Callable[[], Run]:
    return partial(mlx_lm_runner(model, left_out=0), prompt, num_tokens)


def _in_a_fresh_process(settings: Settings, side: str) -> Run:
    """One run of one side after a warm-up run, in a fresh process."""
    words = (
        str(settings.source),
        side,
        str(settings.prompt_tokens),
        str(settings.completion_tokens),
        settings.preset or "",
        settings.adapter or "",
    )
    return Run(**run_fresh("openelm_mlx.bench.benchmark", *words, what=f"A process that measured {side}"))


def _alone(
    source: str, side: str, prompt_tokens: int, completion_tokens: int, preset: str | None, adapter: str | None = None
) -> Run:
    """The work of such a process."""
    prompt = _prompt(spec_from_config(read_config(locate(source))), prompt_tokens)
    run = (
        _our_runs(load(source, preset=preset, adapter=adapter)[0], prompt, completion_tokens)
        if side == "ours"
        else _mlx_lm_runs(mlx_lm_model(source, preset, adapter), prompt, completion_tokens)
    )
    run()
    return run()


def mlx_lm_model(source: SourceName, preset: str | None, adapter: str | None = None) -> object:
    """mlx-lm's model of a source, with the matrices quantized that a preset quantizes in ours, and the same adapter."""
    try:
        from mlx_lm.utils import load_model
    except ImportError as error:
        raise SettingError(
            "Comparing with mlx-lm needs mlx-lm: pip install 'openelm_mlx[bench]', or add --against nothing."
        ) from error
    model, packing = load_model(locate(source))[0], dense_packing(preset_bits(preset))
    if packing is None:
        return _with_adapter(model, source, adapter)

    def is_packed(name: str, module: nn.Module) -> bool:
        is_matrix = isinstance(module, (nn.Linear, nn.Embedding)) and not name.endswith(".router")
        return is_matrix and packing.fits(module.weight.shape)

    nn.quantize(model, packing.group_size, packing.bits, class_predicate=is_packed)
    mx.eval(model.parameters())
    return _with_adapter(model, source, adapter)


def _with_adapter(model: Any, source: SourceName, adapter: str | None) -> object:
    """mlx-lm's model with an adapter, of whatever format. Raises SettingError for one that mlx-lm cannot have."""
    if adapter is None:
        return model
    from mlx_lm.tuner.utils import load_adapters

    spec = spec_from_config(read_config(locate(source)))
    with tempfile.TemporaryDirectory() as folder:
        place = write_adapter(Path(folder) / "adapter", read_adapter(locate_adapter(adapter), spec), spec, "mlx-lm")
        model = load_adapters(model, str(place))
        mx.eval(model.parameters())
    return model


def figures_as_json(figures: Sequence[Figure]) -> str:
    """The figures with all samples, for machines."""
    return json.dumps({"machine": machine_description(), "figures": [figure.as_dict() for figure in figures]})


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps(
            vars(
                _alone(
                    sys.argv[1],
                    sys.argv[2],
                    int(sys.argv[3]),
                    int(sys.argv[4]),
                    *(each or None for each in sys.argv[5:7]),
                )
            )
        )
    )
