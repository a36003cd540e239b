"""`python -m benchmarks.memory_together`: planned beside used for mixtures of requests that one engine runs together.

Each mixture runs in a process of its own, with random models whose keys and values weigh about as much as their weights:
what is planned for is what `memory.admission` says of these requests before the first of them begins.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openelm_mlx.commands.output import report_json

from .command import existing_folder, run_benchmark, show_rows

HELP = "measure how far what is planned for several requests at once is from what they use"

_MB = 1e6


@dataclass(frozen=True)
class Mixture:
    """Requests that run together. model: of `_MODELS`, or a demo. requests: tokens of each one's prompt and answer.

    options: of every request; load: of the model. kept: tokens of a prompt that was kept before, and that all begin with.
    chunk: of a prompt. A long prompt stands last: it comes when all others decode, who go on until it has been read.
    """

    model: str
    requests: Sequence[tuple[int, int]]
    options: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    kept: int = 0
    chunk: int = 64


_MODELS: Mapping[str, dict[str, Any]] = {
    "OpenELM": {
        "model_type": "openelm", "num_transformer_layers": 8, "model_dim": 512, "head_dim": 64, "num_gqa_groups": 2,
        "ffn_dim_divisor": 64, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 3.0], "vocab_size": 2048,
        "normalize_qk_projections": True, "share_input_output_layers": True, "rope_freq_constant": 10000,
        "max_context_length": 4096, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt-oss": {
        "num_hidden_layers": 8, "hidden_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048, "eos_token_id": 2,
    },
}  # fmt: skip

MIXTURES: Mapping[str, Mixture] = {
    "demo-openelm, six short ones": Mixture("demo-openelm", [(200, 40)] * 6),
    "demo-gpt-oss, eight short ones": Mixture("demo-gpt-oss", [(200, 40)] * 8),
    "OpenELM, eight short ones": Mixture("OpenELM", [(120, 40)] * 8),
    "gpt-oss, eight short ones past the window": Mixture("gpt-oss", [(200, 40)] * 8),
    "OpenELM, a long one among short ones": Mixture("OpenELM", [(100, 130)] * 5 + [(1100, 80)], chunk=16),
    "gpt-oss, a long one among short ones": Mixture("gpt-oss", [(100, 130)] * 5 + [(1100, 80)], chunk=16),
    "OpenELM, keys and values in 8 bits": Mixture("OpenELM", [(300, 40)] * 6, {"kv_bits": 8}),
    "gpt-oss, keys and values in 8 bits": Mixture("gpt-oss", [(300, 40)] * 6, {"kv_bits": 8}),
    "OpenELM, windows of 128": Mixture("OpenELM", [(300, 40)] * 6, {"sliding_window": 128}),
    "OpenELM, a kept prompt": Mixture("OpenELM", [(330, 30)] * 6, kept=256),
    "gpt-oss, a kept prompt": Mixture("gpt-oss", [(330, 30)] * 6, kept=256),
    "gpt-oss, five of eight experts on disk": Mixture("gpt-oss", [(200, 40)] * 6, load={"expert_slots": 3}),
}
LONG = 1000


@dataclass(frozen=True)
class Row:
    """One mixture. Bytes as MLX counts them: planned and used in all, `weights` of them weights."""

    mixture: str
    requests: int
    weights: int
    keys_values: int
    computing: int
    planned: int
    used: int

    @property
    def ratio(self) -> float:
        """What was planned over what was used."""
        return self.planned / self.used

    def line(self) -> str:
        parts = (self.weights, self.keys_values, self.computing, self.planned, self.used)
        return (
            f"{self.mixture:44}{self.requests:5}"
            + "".join(f"{each / _MB:10.1f}" for each in parts)
            + f"{self.ratio:8.3f}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


HEADING = (
    f"{'mixture':44}{'n':>5}{'weights':>10}{'kv':>10}{'computing':>10}{'planned':>10}{'used':>10}{'ratio':>8}   (MB)"
)


def rows(names: Sequence[str], folder: Path | None = None) -> Iterator[Row]:
    """Measure these mixtures; a row as it is known. Models are written into `folder` (the system's temporary one)."""
    from openelm_mlx.bench.fresh import run_fresh

    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name in names:
            source = _written(MIXTURES[name].model, Path(place))
            found = run_fresh("benchmarks.memory_together", "--measure", name, source, what=f"The mixture {name!r}")
            yield Row(name, len(MIXTURES[name].requests), **found)


def _written(model: str, place: Path) -> str:
    from openelm_mlx.bench.random_checkpoint import write_random_checkpoint
    from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
    from openelm_mlx.checkpoint.released import released_gpt_oss_config

    if model not in _MODELS:
        return model
    path = place / model
    if not path.exists():
        if model == "gpt-oss":
            write_random_gpt_oss(path, {**released_gpt_oss_config("20b"), **_MODELS[model]})
        else:
            write_random_checkpoint(path, _MODELS[model], "bfloat16")
    return str(path)


def measure(name: str, source: str) -> dict[str, int]:
    """Run a mixture in this process, with all of its requests at work at the same time."""
    import mlx.core as mx

    import openelm_mlx as om
    from openelm_mlx.decoding.prefill import lock_of
    from openelm_mlx.engine.flat_pass import num_shares
    from openelm_mlx.memory.admission import Admission, RequestMemory
    from openelm_mlx.memory.cache_bytes import CacheBytes

    mixture = MIXTURES[name]
    longest = max(map(sum, mixture.requests))
    model, _ = om.load(source, context_length=longest, batch_size=len(mixture.requests), **mixture.load)
    itemsize = model.embed(mx.array([[0]])).dtype.size
    caches = CacheBytes(
        model.spec, itemsize, mixture.options.get("kv_bits"), mixture.options.get("sliding_window"),
        context_length=model.context_length,
    )  # fmt: skip
    admission = Admission.of(model.plan, caches, model.plan.machine.backend)
    options: dict[str, Any] = {**mixture.options, "sampling": om.SamplingParams(logit_bias={2: -1e9})}
    store = None
    common = _prompt(model.spec.vocab_size, mixture.kept, 0)
    if mixture.kept:
        options["prefix_cache"] = store = om.PrefixCache()
        # It goes on in another way, so that the requests take copies of it and it stays.
        other = [*common, *_prompt(model.spec.vocab_size, mixture.chunk, 99)]
        list(om.stream_generate(model, None, other, max_tokens=1, prefill_chunk=mixture.chunk, **options))
    kept = 0 if store is None else store.nbytes
    held = [
        RequestMemory(0, prompt + answer, snapshots=_borders(prompt, mixture) if mixture.kept else 0)
        for prompt, answer in mixture.requests
    ]
    in_use = model.plan.weights_bytes + kept
    planned = admission.needed(in_use, held, mixture.chunk)
    if kept == 0 and max(prompt for prompt, _ in mixture.requests) < LONG:
        # While nobody decodes, as many prompts share a pass as the plan's chunk has tokens for, or as there are cores.
        first = max(num_shares(model), model.plan.prefill_chunk // mixture.chunk)
        for offset in range(0, max(prompt for prompt, _ in mixture.requests), mixture.chunk):
            together = [
                admission.part(min(mixture.chunk, prompt - offset), offset)
                for prompt, _ in mixture.requests[:first]
                if prompt > offset
            ]
            planned = max(planned, in_use + admission.growth(held).more + admission.parts_bytes(together, len(held)))
    keys_values = sum(admission.kv_bytes(each.reserved) for each in held) + kept
    prompts = [
        common + _prompt(model.spec.vocab_size, prompt - len(common), seed)
        for seed, (prompt, _) in enumerate(mixture.requests, 1)
    ]
    # The answers are long enough that all prompts have been read before the first of them ends.
    with om.Engine(model, None) as engine, ExitStack() as waiting:
        waiting.enter_context(lock_of(model))  # nothing is computed before all have come
        # Not shorter pieces by the clock: the short ones would end before the long prompt has been read.
        engine._scheduler.pace.length = lambda most, beside=0, position=0: most  # type: ignore[method-assign]
        handles: list[om.Handle] = []
        for prompt, (_, answer) in zip(prompts, mixture.requests, strict=True):
            if len(prompt) > LONG:
                waiting.close()
                for each in handles:
                    next(each)
            handles.append(engine.submit(prompt, max_tokens=answer, prefill_chunk=mixture.chunk, **options))
        waiting.close()
        used = 0
        for handle in handles:
            for _ in handle:
                pass
            if handle.statistics is not None:
                used = max(used, handle.statistics.peak_memory_bytes)
    return {
        "weights": model.plan.weights_bytes, "keys_values": keys_values,
        "computing": planned - model.plan.weights_bytes - keys_values, "planned": planned, "used": used,
    }  # fmt: skip


def _borders(prompt: int, mixture: Mixture) -> int:
    """How many snapshots of its rings a request holds that is kept itself: one after each chunk of what is new to it."""
    from openelm_mlx.decoding.prefix_cache import MAX_CHECKPOINTS

    return min(MAX_CHECKPOINTS, -(-(prompt - mixture.kept // mixture.chunk * mixture.chunk) // mixture.chunk))


def _prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    import random

    chance = random.Random(seed)
    return [chance.randrange(3, min(vocab_size, 250)) for _ in range(length)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--only", metavar="TEXT", help="only the mixtures whose name has this in it")
    parser.add_argument(
        "--folder", metavar="FOLDER", help="where to write the models (default: the system's temporary folder)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Measure and print a row as it is known. Returns 0."""
    from openelm_mlx.errors import SettingError

    if args.measure:
        report_json(measure(*args.measure))
        return 0
    names = [name for name in MIXTURES if args.only is None or args.only in name]
    if not names:
        raise SettingError(f"No mixture has {args.only!r} in its name; there are: {'; '.join(MIXTURES)}.")
    return show_rows(HEADING, rows(names, existing_folder(args.folder)), args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("memory_together", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
