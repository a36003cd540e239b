"""The planner's predictions compared with real use: random models of many shapes, each run in a process of its own.

A process, and MLX in it, has only one peak. So every pair of a shape and a prompt is loaded and run in a fresh process, as
a user would do it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.released import released_gpt_oss_config
from ..memory.machine import process_peak_bytes
from ..specs import spec_from_config
from .against import random_prompt
from .fresh import run_fresh
from .random_checkpoint import write_random_checkpoint
from .random_gpt_oss import write_random_gpt_oss
from .random_pair import shape_config

# What `plan --calibrate` measures: shapes of both families, large enough that rounding does not matter.
CALIBRATION_SHAPES = (
    "OpenELM-270M, 4 layers",
    "OpenELM-1.1B, 3 layers",
    "gpt-oss, 512 wide, 32 experts",
    "gpt-oss, 2,048 wide, 8 experts",
)
CALIBRATION_PROMPTS = 512, 64

# How many tokens are decoded after a prompt.
NEW_TOKENS = 8
# On the CPU backend, the limit for one run of active parameters times tokens. It computes about 10^9 a second.
MOST_MACS_ON_CPU = 45e9


def _gpt_oss(layers: int, hidden: int, experts: int, expert: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        **released_gpt_oss_config("20b"), "num_hidden_layers": layers, "hidden_size": hidden, "num_local_experts": experts,
        "intermediate_size": expert, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 8),
        "vocab_size": vocab, "eos_token_id": 2,
    }  # fmt: skip


# Small enough to be written and read in seconds; widths up to the released ones.
SHAPES: Mapping[str, dict[str, Any]] = {
    "OpenELM-270M, 4 layers": shape_config("openelm-270m", 4),
    "OpenELM-270M": shape_config("openelm-270m"),
    "OpenELM-450M, 6 layers": shape_config("openelm-450m", 6),
    "OpenELM-450M": shape_config("openelm-450m"),
    "OpenELM-1.1B, 3 layers": shape_config("openelm-1.1b", 3),
    "OpenELM-3B, 2 layers": shape_config("openelm-3b", 2),
    "gpt-oss, 768 wide, 64 experts": _gpt_oss(4, 768, 64, 384, 16, 16384),
    "gpt-oss, 512 wide, 32 experts": _gpt_oss(4, 512, 32, 512, 16, 16384),
    "gpt-oss, 1,024 wide, 16 experts": _gpt_oss(4, 1024, 16, 1024, 16, 32768),
    "gpt-oss, 1,024 wide, 128 experts": _gpt_oss(2, 1024, 128, 512, 16, 32768),
    "gpt-oss, 2,048 wide, 8 experts": _gpt_oss(2, 2048, 8, 2048, 32, 65536),
    "gpt-oss-20b's layers, 2 of them, 8 experts": _gpt_oss(2, 2880, 8, 2880, 64, 201088),
}


@dataclass(frozen=True)
class Row:
    """One run. All in bytes, prompt in tokens. planned and peak: MLX's memory; the other two: the whole process's.

    peak_process: 0 on a GPU with its own memory, which the process's peak does not include.
    """

    shape: str
    prompt: int
    family: str
    weights: int
    scratch: int
    planned: int
    peak: int
    planned_process: int
    peak_process: int

    @property
    def ratio(self) -> float:
        """MLX's planned memory divided by its peak."""
        return self.planned / self.peak

    @property
    def process_ratio(self) -> float:
        """The same for the process; 0 if its peak is not known."""
        return self.planned_process / self.peak_process if self.peak_process else 0.0

    def line(self) -> str:
        """The row for people."""
        text = f"{self.shape:44}{self.prompt:7,}{self.planned / 1e6:10.1f}{self.peak / 1e6:10.1f}{self.ratio:7.3f}"
        if not self.peak_process:
            return text
        return f"{text}{self.planned_process / 1e6:10.1f}{self.peak_process / 1e6:10.1f}{self.process_ratio:7.3f}"

    def as_dict(self) -> dict[str, Any]:
        """The row for machines."""
        return {**asdict(self), "ratio": self.ratio, "process_ratio": self.process_ratio}


HEADING = (
    f"{'shape':44}{'prompt':>7}{'planned':>10}{'peak':>10}{'ratio':>7}{'process:':>10}{'peak':>10}{'ratio':>7}   (MB)"
)


def rows(
    shapes: Sequence[str], prompts: Sequence[int], on_cpu: bool, folder: Path | None = None, calibrated: bool = True
) -> Iterator[Row]:
    """Measure `shapes` with `prompts` of so many tokens; a row as it is known.

    Models are written into `folder` (the system's temporary one), one at a time. on_cpu: leave out, of each shape, what
    would take minutes there, but never the first prompt. calibrated: with the correction that this machine has, if any.
    """
    for shape in shapes:
        config = SHAPES[shape]
        spec = spec_from_config(config)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = Path(place) / "model"
            if spec.family == "gpt_oss":
                write_random_gpt_oss(path, config)
            else:
                write_random_checkpoint(path, config, "bfloat16")
            for number, prompt in enumerate(prompts):
                if on_cpu and number and spec.num_active_parameters() * prompt > MOST_MACS_ON_CPU:
                    continue
                yield Row(shape, prompt, spec.family, **_in_a_fresh_process(path, prompt, calibrated))


def _in_a_fresh_process(path: Path, prompt_tokens: int, calibrated: bool) -> dict[str, int]:
    # With an empty cache folder no correction is applied.
    environment = None if calibrated else {**os.environ, "OPENELM_MLX_CACHE": str(path.parent / "nothing")}
    found: dict[str, int] = run_fresh(
        "openelm_mlx.bench.memory", str(path), str(prompt_tokens), what=f"A run with {prompt_tokens} tokens",
        environment=environment,
    )  # fmt: skip
    return found


def _measure(path: str, prompt_tokens: int) -> dict[str, int]:
    from ..generate import stream_generate
    from ..loading import load

    model, _ = load(path, context_length=prompt_tokens + NEW_TOKENS)
    *_, last = stream_generate(model, None, random_prompt(model, prompt_tokens), max_tokens=NEW_TOKENS)
    assert last.statistics is not None
    plan = model.plan
    return {
        "weights": plan.weights_bytes,
        "scratch": plan.scratch_bytes,
        "planned": plan.total_bytes,
        "peak": last.statistics.peak_memory_bytes,
        "planned_process": plan.process_bytes,
        "peak_process": 0 if plan.machine.backend == "cuda" else process_peak_bytes(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
