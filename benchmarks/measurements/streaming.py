"""What streaming experts costs on this machine: time a token beside the fully resident model and beside a floor.

floor = resident time a token + bytes of the missed experts / the rate of a bare loop of the same reads with the same
threads. The stall is what lies above it. Routing can be the model's own, or forced to a trace, since a random model's
says nothing of a trained one's.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.reader import read_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.decoding.budget import Budget
from openelm_mlx.decoding.compiled_step import make_step
from openelm_mlx.decoding.pieces import forget_pieces
from openelm_mlx.decoding.prefill import fill, prefill
from openelm_mlx.decoding.step import Step
from openelm_mlx.decoding.streamed_step import StreamedStep
from openelm_mlx.errors import SettingError
from openelm_mlx.experts.pace import Pace
from openelm_mlx.experts.records import HostTarget, Record, RecordReader, fill_with
from openelm_mlx.experts.residency import Residency, Streaming, checked_slots
from openelm_mlx.experts.writable import Allocator, WritableArray, WriteMode
from openelm_mlx.loading import load
from openelm_mlx.memory.macos import forget_file
from openelm_mlx.models.gpt_oss import GptOss
from openelm_mlx.models.moe import MoE
from openelm_mlx.sources import Source, locate
from openelm_mlx.specs import ModelSpec, spec_from_config
from openelm_mlx.weights import load_model

from .routing import Trace, alike, recording, uniform


@dataclass(frozen=True)
class Settings:
    """What to measure. slots: numbers of slots a layer; None for 75, 50 and 25 % of the experts. trace: what "skewed" routing
    is like; None for the demo's.
    """

    source: str
    slots: tuple[int, ...] | None = None
    routings: tuple[str, ...] = ("own",)
    caches: tuple[str, ...] = ("warm",)
    writes: tuple[WriteMode | None, ...] = (None,)
    strides: tuple[int | None, ...] = (1, None)
    num_tokens: int = 16
    warm_up_tokens: int = 16
    prompt_tokens: int = 64
    prefill_tokens: int = 0
    seed: int = 0
    trace: Trace | None = None


@dataclass(frozen=True)
class Row:
    """One measured way of decoding. Seconds a token; rates in bytes a second; layers_at_once None adapts."""

    slots: int
    routing: str
    cache: str
    writes: str
    layers_at_once: int | None
    seconds: float
    resident_seconds: float
    floor_seconds: float
    ratio: float
    stall_seconds: float
    hit_rate: float
    misses_per_token: float
    bytes_per_token: float
    waited_seconds: float
    bare_rate: float
    read_backs_per_token: float
    replayed_layers_per_token: float


@contextmanager
def random_model(size: str, num_layers: int | None = None, folder: Path | None = None) -> Iterator[Path]:
    """A random checkpoint of a released shape, with fewer layers if asked, in a folder that is removed afterwards."""
    config = released_gpt_oss_config(size)
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    with tempfile.TemporaryDirectory(dir=folder) as place:
        yield write_random_gpt_oss(Path(place) / "random", config)


def resident_model(source: str | Path) -> GptOss:
    """The model with all experts in memory."""
    return cast(GptOss, load(source)[0])


def streamed_model(source: str | Path, num_slots: int, writes: WriteMode | None = None) -> GptOss:
    """The model with streamed experts, its slots written in the way asked for."""
    opened = Source.open(source)
    checked_slots(opened.spec, num_slots)
    streaming = Streaming(opened.contents, opened.checkpoint, num_slots, writes=writes)
    return cast(GptOss, load_model(opened.contents, opened.checkpoint, streaming=streaming))


# --- routing ----------------------------------------------------------------------------------------------------------


class Forced:
    """In the layers' place of `route`: a trace's choices, one token after the other, at the cost of the real ones.

    A compiled step would keep the choices that it was traced with: they are written into the memory of one array.
    """

    def __init__(self, model: GptOss, trace: Trace) -> None:
        self._model, self._trace = model, trace
        k, allocate = trace.experts_per_token, Allocator().allocate
        forget_pieces(model)
        self._choices: list[WritableArray] = [allocate((1, k), mx.uint32) for _ in model.layers]
        for i, layer in enumerate(model.layers):
            layer.mlp.route = partial(self._route, i)  # type: ignore[method-assign]

    def _route(self, i: int, x: mx.array) -> tuple[mx.array, mx.array]:
        chosen, weights = MoE.route(self._model.layers[i].mlp, x)
        if x.size > x.shape[-1]:
            return chosen, weights
        # Nothing of the layer's own choice is left but the need to wait for it.
        return self._choices[i].array.reshape(chosen.shape) + chosen * 0, weights

    def go_to(self, token: int) -> None:
        """The next token, number `token` of the trace, is the one to be routed; nothing may be under way."""
        chosen = self._trace.passes[token % len(self._trace.passes)][0].astype(np.uint32)
        for each, experts in zip(self._choices, chosen, strict=True):
            fill_with(each.target(0), experts)
            each.settle(0)
            each.wait()

    def close(self) -> None:
        """Let every layer route by itself again."""
        for layer in self._model.layers:
            layer.mlp.__dict__.pop("route", None)
        forget_pieces(self._model)


def demo_trace(num_tokens: int = 256) -> Trace:
    """How the trained demo routes while it answers: its single-token passes over several questions."""
    from openelm_mlx.generate import stream_generate

    model, tokenizer = load("demo-gpt-oss", expert_slots=16)
    with recording(cast(GptOss, model).residency) as trace:
        for word in ("banjo", "glacier", "tax", "violin", "river", "engine", "bread", "planet"):
            if len(trace.passes) < num_tokens:
                list(stream_generate(model, tokenizer, f"What is a {word}?", max_tokens=64))
    return trace


def own_trace(source: str | Path, settings: Settings) -> Trace:
    """How a model routes by itself while it goes on from a random prompt: a pass of the prompt, and one a token."""
    spec = spec_from_config(read_config(locate(source)))
    model = streamed_model(source, checked_slots(spec, max(1, spec.layers[0].experts_per_token)))
    prompt = np.random.default_rng(settings.seed).integers(0, spec.vocab_size, settings.prompt_tokens).tolist()
    with recording(model.residency) as trace:
        _decode(model, prompt, settings, None, 1, False)
    return trace


# --- measuring --------------------------------------------------------------------------------------------------------


def check_has_experts(source: str | Path) -> ModelSpec:
    """What a source's model is. Raises SettingError for one without experts."""
    spec = spec_from_config(read_config(locate(source)))
    if not spec.layers[0].num_experts:
        raise SettingError(
            f"{source} has no experts, and so none that could stay on disk: name a gpt-oss model, for example demo-gpt-oss."
        )
    return spec


def run(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Measure; gives (what, value) as it comes: facts, rows of `Row`, and predictions from the first row's slots."""
    stored = check_has_experts(settings.source)
    for each in settings.slots or ():
        checked_slots(stored, each)
    known = resident_model(settings.source)
    spec, layer = known.spec, known.spec.layers[0]
    k, num_experts, num_layers = layer.experts_per_token, layer.num_experts, len(spec.layers)
    slots = settings.slots or tuple(max(k, num_experts * share // 100) for share in (75, 50, 25))
    num_tokens = settings.warm_up_tokens + settings.num_tokens
    recorded = (settings.trace or demo_trace()) if "skewed" in settings.routings else None
    prompt = np.random.default_rng(settings.seed).integers(0, spec.vocab_size, settings.prompt_tokens).tolist()
    traces: dict[str, Trace | None] = {}
    for routing in settings.routings:
        if routing == "uniform":
            traces[routing] = uniform(num_tokens, num_layers, num_experts, k, settings.seed)
        elif routing == "skewed":
            assert recorded is not None
            traces[routing] = alike(recorded, num_tokens, num_layers, num_experts, settings.seed)
        else:
            traces[routing] = None
    resident_seconds, expected = {}, {}
    for routing, trace in traces.items():
        resident_seconds[routing], expected[routing] = _decode(known, prompt, settings, trace, None, False)
        yield "resident", {"routing": routing, "seconds": resident_seconds[routing]}
    if settings.prefill_tokens:
        yield "prefill", _prefill(known, settings, "warm")
    del known
    mx.clear_cache()
    for num_slots in slots:
        for writes in settings.writes:
            model = streamed_model(settings.source, num_slots, writes)
            for routing, trace in traces.items():
                same = []
                for cache in settings.caches:
                    for stride in settings.strides:
                        row, tokens = _row(model, prompt, settings, trace, routing, cache, stride, resident_seconds)
                        same.append(tokens == expected[routing])
                        yield "row", row
                what = {"slots": num_slots, "writes": model.residency.writes, "routing": routing}
                yield "identical", {**what, "is_identical": all(same)}
            for cache in settings.caches if settings.prefill_tokens else ():
                yield "prefill", _prefill(model, settings, cache)
            del model
            mx.clear_cache()


def _decode(
    model: GptOss,
    prompt: Sequence[int],
    settings: Settings,
    trace: Trace | None,
    stride: int | None,
    is_cold: bool,
    measured: dict[str, float] | None = None,
) -> tuple[float, list[int]]:
    """Mean seconds of a greedy token, evaluated one by one, and the tokens. measured: what the slots did a token."""
    with nullcontext() if trace is None else closing(Forced(model, trace)) as forced:
        cache = model.make_cache()
        residency: Residency | None = model.residency
        if residency is not None:
            residency.pace = Pace()
        step: Step = make_step(model, cache) if residency is None else StreamedStep(model, cache, stride)
        token = mx.argmax(prefill(model, prompt, cache, 512))
        tokens, seconds = [cast(int, token.item())], []
        for count in range(settings.warm_up_tokens + settings.num_tokens):
            if count == settings.warm_up_tokens and residency is not None:
                residency.reset_statistics()
                cast(StreamedStep, step).replayed_layers = 0
            if is_cold and residency is not None:
                forget_files(residency)
            if forced is not None:
                forced.go_to(count)
            started = time.perf_counter()
            token = mx.argmax(step(token))
            mx.eval(token)
            seconds.append(time.perf_counter() - started)
            tokens.append(cast(int, token.item()))
    seconds = seconds[settings.warm_up_tokens :]
    if residency is not None and measured is not None:
        found = residency.statistics()
        for name in ("hits", "misses", "bytes_read", "seconds_waited", "read_backs"):
            measured[name] = getattr(found, name) / len(seconds)
        measured["replayed"] = cast(StreamedStep, step).replayed_layers / len(seconds)
        measured["hit_rate"] = found.hit_rate
    # Means, not medians: reads differ from token to token, and what they cost is in all of them together.
    return statistics.fmean(seconds), tokens


def _row(
    model: GptOss,
    prompt: Sequence[int],
    settings: Settings,
    trace: Trace | None,
    routing: str,
    cache: str,
    stride: int | None,
    resident_seconds: dict[str, float],
) -> tuple[Row, list[int]]:
    residency: Residency = model.residency
    measured: dict[str, float] = {}
    bring_about(cache, residency)
    seconds, tokens = _decode(model, prompt, settings, trace, stride, cache == "cold", measured)
    rate = bare_rate(residency, cache == "cold", max(1, round(measured["misses"] / len(residency.banks))))
    floor = resident_seconds[routing] + measured["bytes_read"] / rate
    row = Row(
        slots=residency.num_slots,
        routing=routing,
        cache=cache,
        writes=residency.writes,
        layers_at_once=stride,
        seconds=seconds,
        resident_seconds=resident_seconds[routing],
        floor_seconds=floor,
        ratio=seconds / floor,
        stall_seconds=seconds - floor,
        hit_rate=measured["hit_rate"],
        misses_per_token=measured["misses"],
        bytes_per_token=measured["bytes_read"],
        waited_seconds=measured["seconds_waited"],
        bare_rate=rate,
        read_backs_per_token=measured["read_backs"],
        replayed_layers_per_token=measured["replayed"],
    )
    return row, tokens


def bare_rate(residency: Residency, is_cold: bool, experts_at_once: int = 1, num_reads: int = 24) -> float:
    """Bytes a second of nothing but reads: so many experts of a layer at a time, by as many threads as the engine has."""
    random, reader = np.random.default_rng(0), RecordReader()
    parts = residency.banks[0].parts
    # As many targets as slots, in turns: a few would stay in the processor's cache, which slots do not.
    targets = itertools.cycle(
        [HostTarget(np.ones(part.stored.nbytes, np.uint8).data) for part in parts] for _ in range(residency.num_slots)
    )
    plan = [
        [
            Record(part.stored.file, part.stored.start + int(expert) * part.stored.nbytes, target)
            for expert in random.permutation(bank.num_experts)[:experts_at_once]
            for part, target in zip(bank.parts, next(targets), strict=True)
        ]
        for bank in (residency.banks[i % len(residency.banks)] for i in range(num_reads))
    ]
    if is_cold:
        forget_files(residency)
    else:
        for records in plan:
            reader.read(records)
    started = time.perf_counter()
    for records in plan:
        reader.read(records)
    seconds = time.perf_counter() - started
    reader.close()
    return sum(record.target.nbytes for records in plan for record in records) / seconds


def bring_about(cache: str, residency: Residency) -> None:
    """Have the system's file cache hold all of the files ("warm", as far as there is memory), or nothing of them ("cold")."""
    if cache == "cold":
        forget_files(residency)
        return
    for file in residency.files:
        with file.path.open("rb", buffering=0) as stream:
            buffer = bytearray(2**24)
            while stream.readinto(buffer):
                pass


def forget_files(residency: Residency) -> None:
    """Ask the system to drop its cache of the files, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        for file in residency.files:
            forget_file(file.path)
        return
    for file in residency.files:
        with file.path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _prefill(model: GptOss, settings: Settings, file_cache: str) -> dict[str, Any]:
    """A prompt in one chunk, for the second time: how long it takes, and the most often that a layer's expert was read."""
    tokens = np.random.default_rng(1).integers(0, model.spec.vocab_size, settings.prefill_tokens).tolist()
    found: dict[str, Any] = {"tokens": len(tokens), "slots": None}
    for _ in range(2):  # the first time kernels may be compiled
        cache = model.make_cache()
        if model.residency is not None:
            bring_about(file_cache, model.residency)
            model.residency.reset_statistics()
        started = time.perf_counter()
        fill(model, tokens, cache, len(tokens), Budget(model, cache))
        found["seconds"] = time.perf_counter() - started
    if model.residency is not None:
        layers = model.residency.statistics().layers
        found["slots"], found["cache"] = model.residency.num_slots, file_cache
        found["reads_per_expert"] = max(each.misses / model.residency.banks[0].num_experts for each in layers)
        found["bytes_read"] = sum(each.bytes_read for each in layers)
        found["seconds_waited"] = sum(each.seconds_waited for each in layers)
    return found


def row_as_json(row: Row) -> dict[str, Any]:
    return asdict(row)
