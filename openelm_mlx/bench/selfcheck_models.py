"""Checks 2, 3, 8, 9 and 13: whole models, those of the package and random ones in gpt-oss's shapes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from ..checkpoint.released import released_gpt_oss_config
from ..decoding.compiled_step import CompiledStep
from ..decoding.gpu_errors import is_watchdog
from ..decoding.sampling import SamplingParams
from ..decoding.step import PlainStep
from ..errors import SettingError
from ..generate import prefill, stream_generate
from ..loading import load
from ..memory.machine import this_machine
from ..models.precision import runs_on_cpu
from .against import random_prompt
from .fresh import run_fresh
from .random_gpt_oss import write_random_gpt_oss
from .random_pair import random_pair
from .selfcheck import CheckFailed, Clock

if TYPE_CHECKING:
    from ..models import Model

FIXTURES = Path(__file__).parent / "fixtures"
# Largest difference of float32 logits from the original code's (tests/fixtures/README.md).
TOLERANCES = {"openelm_tiny": 5e-5, "gpt_oss_odd": 1e-4}
# What a Terminal on macOS gives a program.
OPEN_FILES = 256


# --- 2: open files ----------------------------------------------------------------------------------------------------


def check_open_files(clock: Clock) -> str:
    """gpt-oss-20b as sparse files, with 4 of 32 experts, in a process that may have 256 files open and no more.

    In its real widths where there is room for its dense parts; else with all its tensors, but of a few numbers each.
    """
    config, is_real = released_gpt_oss_config("20b"), not runs_on_cpu() and this_machine().available_bytes > 8e9
    if not is_real:
        config |= {
            "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "vocab_size": 256, "eos_token_id": 2,
        }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="openelm_mlx-sparse-") as place:
        folder = write_random_gpt_oss(
            Path(place) / "m", config, max_file_bytes=5 * 10**9 if is_real else 2**20, sparse=True
        )
        found = run_fresh(
            "openelm_mlx.bench.selfcheck_models",
            "load",
            str(folder),
            str(OPEN_FILES),
            what="Loading with 256 open files",
        )
    widths = "in its real widths" if is_real else "narrow (there is no room, or no GPU, for its real widths)"
    return f"{found['layers']} layers {widths} loaded in {found['seconds']:.1f} s, {found['files']} files still open"


def _load_with_few_files(folder: str, most: int) -> dict[str, Any]:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # hard too: nothing may raise it again
    started = time.perf_counter()
    model, _ = load(folder, expert_slots=4, context_length=256)
    seconds = time.perf_counter() - started
    return {"layers": len(model.spec.layers), "seconds": seconds, "files": len(os.listdir("/dev/fd"))}


# --- 3: parity --------------------------------------------------------------------------------------------------------


def check_parity(clock: Clock) -> str:
    """Float32 logits of both fixtures against the original code's; half precision is finite; the demos answer."""
    seen = []
    for name, (whole, cached) in parity().items():
        if not max(whole, cached) <= TOLERANCES[name]:
            raise CheckFailed(
                f"{name}: logits are off by {whole:.1e} in one pass and {cached:.1e} in chunks ({TOLERANCES[name]:g})"
            )
        seen.append(f"{name} {whole:.1e} and {cached:.1e}")
    seen.append(_tf32())
    seen.append(_half_precision())
    seen.append(_answers())
    return "in one pass and in chunks: " + "; ".join(seen)


def parity() -> dict[str, tuple[float, float]]:
    """Fixture -> the largest difference of its logits, in one pass and in chunks through a cache."""
    found = {}
    for name in TOLERANCES:
        model, tokens, expected = _fixture(name)
        whole = _difference(model(tokens), expected)
        cache, pieces = model.make_cache(), []
        for start, stop in ((0, 5), (5, 6), (6, 19), (19, tokens.shape[1])):
            pieces.append(model(tokens[:, start:stop], cache=cache))
        found[name] = whole, _difference(mx.concatenate(pieces, axis=1), expected)
    return found


def _tf32() -> str:
    """The error with matrix units that round float32, for information only."""
    if runs_on_cpu():
        return "TF32 is a GPU's"
    environment = {**os.environ, "MLX_ENABLE_TF32": "1"}
    found = run_fresh("openelm_mlx.bench.selfcheck_models", "parity", what="Parity with TF32", environment=environment)
    return "with TF32 it would be " + " and ".join(f"{max(each):.1e}" for each in found.values())


def _half_precision() -> str:
    drifts = []
    for source in ("demo-openelm", "demo-gpt-oss"):
        firsts = {}
        for dtype in ("float32", "bfloat16", "float16"):
            model, _ = load(source, dtype=dtype)
            prompt = [model.spec.bos_token or 1, 17, 33, 65, 129][: 2 if runs_on_cpu() else 5]  # it has no float16
            logits = prefill(model, prompt, model.make_cache(), 512)
            if not mx.all(mx.isfinite(logits)).item():
                raise CheckFailed(f"{source} in {dtype}: logits are not finite")
            firsts[dtype] = logits.astype(mx.float32)
        drifts.append(max(_difference(firsts[each], np.array(firsts["float32"])) for each in ("bfloat16", "float16")))
    return f"half precision moves a demo's logit by {drifts[0]:.2g} and {drifts[1]:.2g}"


def _answers() -> str:
    expected = {"demo-openelm": ("What is a banjo?", "string"), "demo-gpt-oss": ("What is a piano?", "keyboard")}
    for source, (question, word) in expected.items():
        model, tokenizer = load(source)
        text = "".join(chunk.text for chunk in stream_generate(model, tokenizer, question, max_tokens=128))
        if word not in text:
            raise CheckFailed(f"{source} answers {question!r} with {text[:80]!r}, in which {word!r} is missing")
    return "both demos answer as expected"


# --- 8: experts on disk -----------------------------------------------------------------------------------------------


def check_streamed(clock: Clock) -> str:
    """With the fewest experts in memory logits and answers are those with all, bit for bit, for two threads at once."""
    known, _ = load("demo-gpt-oss")
    model, _ = load("demo-gpt-oss", expert_slots=4)
    prompt = [each % 4000 for each in range(0, 97 * 160, 97)]
    # Few routes, sorted ones, and on a GPU enough for tiles, which MLX's CPU backend has none of.
    lengths, num_tokens = ((1, 20, 40), 16) if runs_on_cpu() else ((1, 20, 160), 48)
    for length in lengths:
        a, b = (prefill(each, prompt[:length], each.make_cache(), 512) for each in (known, model))
        if not mx.array_equal(a, b):
            off = mx.abs(a - b).max().item()
            raise CheckFailed(f"with 4 of 16 experts, {length} tokens: logits differ by up to {off:.2g}")
    never = SamplingParams(logit_bias=dict.fromkeys(known.spec.eos_tokens, float("-inf")))

    def answer(of: Model, start: int) -> list[int]:
        chunks = stream_generate(of, None, prompt[start : start + 40], max_tokens=num_tokens, sampling=never)
        return [chunk.token for chunk in chunks if chunk.token is not None]

    expected = [answer(known, start) for start in (0, 60)]
    for i, (found, wanted) in enumerate(zip(_in_threads(partial(answer, model), (0, 60)), expected, strict=True)):
        if isinstance(found, BaseException):
            raise found
        if found != wanted:
            first = next((j for j, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
            raise CheckFailed(f"with 4 of 16 experts the answer of thread {i + 1} differs from token {first} on")
    first, second, last = lengths
    return (
        f"equal bits with 4 of 16 experts ({model.residency.writes}): prompts of {first}, {second} and {last}, and "
        f"{num_tokens} tokens in each of two threads; {model.residency.statistics().evictions:,} experts made room for others"
    )


def _in_threads(work: Any, values: tuple[int, ...]) -> list[Any]:
    """`work` of each value at the same time, each in a thread and a stream of its own: results, or what was raised."""
    found: list[Any] = [None] * len(values)

    def run(i: int) -> None:
        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                found[i] = work(values[i])
        except BaseException as error:  # noqa: BLE001 - it is raised by who waits
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# --- 9: compiled step -------------------------------------------------------------------------------------------------


def check_compiled_step(clock: Clock) -> str:
    """One compiled graph a token gives the logits of the plain step, across the window and from one bucket to the next."""
    largest = 0.0
    for name in TOLERANCES:
        model, tokens, _ = _fixture(name)
        prompt = cast("list[int]", tokens[0].tolist())
        logits = []
        # MLX's CPU backend would call a C++ compiler, which may be missing: there the graph runs as it is.
        for make in (PlainStep, partial(CompiledStep, compile=not runs_on_cpu())):
            cache = model.make_cache()
            prefill(model, prompt, cache, 512)
            step = make(model, cache)
            logits.append(mx.stack([step(mx.array(token)) for token in prompt[:12]]))
        largest = max(largest, _difference(logits[1], np.array(logits[0])))
        if not largest <= TOLERANCES[name]:
            raise CheckFailed(f"{name}: compiled, logits differ from the plain step's by {largest:.1e}")
    how = " (pieces as they are: nothing is compiled on MLX's CPU backend)" if runs_on_cpu() else ""
    return f"compiled and plain logits differ by at most {largest:.1e}{how}"


# --- 13: a long chunk -------------------------------------------------------------------------------------------------


def check_prompt_chunk(clock: Clock) -> str:
    """2,048 tokens at once through the larger demo, and on a GPU through two layers of gpt-oss-20b's widths."""
    model, _ = load("demo-gpt-oss")
    if runs_on_cpu():  # which has no watchdog, and is slow: that the chunk comes through is all there is to see
        return f"256 tokens of demo-gpt-oss in {_chunk_seconds(model, 256, clock):.1f} s (MLX's CPU backend has no watchdog)"
    seen = [f"demo-gpt-oss {_chunk_seconds(model, 2048, clock):.2f} s"]
    if this_machine().available_bytes > 6e9 and clock.has(15):
        config = {**released_gpt_oss_config("20b"), "num_hidden_layers": 2, "vocab_size": 8192, "eos_token_id": 2}
        wide = random_pair(config, theirs=False)[0]
        seen.append(f"two layers of gpt-oss-20b {_chunk_seconds(wide, 2048, clock):.2f} s")
    return "no watchdog; the longest command buffer is shorter than: " + ", ".join(seen)


def _chunk_seconds(model: Model, num_tokens: int, clock: Clock) -> float:
    """Of a chunk so long, the second time if there is time for it: kernels may be compiled at first."""
    prompt, seconds = random_prompt(model, num_tokens), 0.0
    try:
        while not seconds or (not runs_on_cpu() and clock.has(2 * seconds)):
            is_first, started = not seconds, time.perf_counter()
            mx.eval(prefill(model, prompt, model.make_cache(), num_tokens, is_retry=True))
            seconds = time.perf_counter() - started
            if not is_first:
                break
    except (SettingError, RuntimeError) as error:
        if isinstance(error, SettingError) or is_watchdog(error):
            raise CheckFailed(f"{num_tokens:,} tokens at once: {error}") from error
        raise
    return seconds


def _fixture(name: str) -> tuple[Model, mx.array, np.ndarray]:
    model, _ = load(FIXTURES / name, dtype="float32")
    oracle = np.load(FIXTURES / name / "oracle.npz")
    return model, mx.array(oracle["tokens"]), oracle["logits_fp32"]


def _difference(logits: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(logits.astype(mx.float32)) - expected).max())


if __name__ == "__main__":
    from openelm_mlx.platforms import use_device

    use_device()
    what = parity() if sys.argv[1] == "parity" else _load_with_few_files(sys.argv[2], int(sys.argv[3]))
    sys.stdout.write(json.dumps(what))
