"""Whether this machine computes what it should: checks for a machine that nobody here has, and a report to send.

Each check is one function that returns what it saw or raises `CheckFailed`; nothing here is specific to a backend but
where a check says so. The models are the package's own: two random ones of the fixtures, with the logits that Apple's
and OpenAI's code gave for them in float32, and the two demos.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from ..decoding.compiled_step import CompiledStep
from ..decoding.sampling import SamplingParams
from ..decoding.step import PlainStep
from ..generate import prefill, stream_generate
from ..loading import load
from ..models.precision import runs_on_cpu

if TYPE_CHECKING:
    from ..models import Model

FIXTURES = Path(__file__).parent / "fixtures"
# Largest difference of float32 logits from the original code's (tests/fixtures/README.md).
TOLERANCES = {"openelm_tiny": 5e-5, "gpt_oss_odd": 1e-4}


class CheckFailed(Exception):
    """A check saw something else than it should; the message says what."""


class NotHere(Exception):
    """A check has no meaning on this machine; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """One check's result. passed is None where the check has no meaning on this machine."""

    name: str
    passed: bool | None
    detail: str
    seconds: float


def run_checks(names: list[str] | None = None) -> Iterator[Outcome]:
    """Run every check (or those named), an outcome at a time; an unexpected error is a failure and ends no other check."""
    for name, check in CHECKS.items():
        if names is not None and name not in names:
            continue
        started = time.perf_counter()
        passed: bool | None = True
        try:
            detail = check()
        except NotHere as reason:
            passed, detail = None, str(reason)
        except CheckFailed as failure:
            passed, detail = False, str(failure)
        except Exception as error:  # noqa: BLE001 - the report is for machines nobody has seen: whatever happens is news
            frame = traceback.extract_tb(error.__traceback__)[-1]
            passed = False
            detail = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        yield Outcome(name, passed, detail, time.perf_counter() - started)


# --- parity ---------------------------------------------------------------------------------------------------------


def check_parity() -> str:
    """Logits of both fixtures in float32, at one go and through a cache in pieces, against the original code's."""
    seen = []
    for name, tolerance in TOLERANCES.items():
        model, tokens, expected = _fixture(name)
        whole = _difference(model(tokens), expected)
        cache, pieces = model.make_cache(), []
        for start, stop in ((0, 5), (5, 6), (6, 19), (19, tokens.shape[1])):
            pieces.append(model(tokens[:, start:stop], cache=cache))
        cached = _difference(mx.concatenate(pieces, axis=1), expected)
        if not max(whole, cached) <= tolerance:
            raise CheckFailed(
                f"{name}: logits are off by {whole:.1e} at one go and {cached:.1e} in pieces ({tolerance:g})"
            )
        seen.append(f"{name} {whole:.1e} and {cached:.1e} (at most {tolerance:g})")
    return "largest difference, at one go and in pieces: " + "; ".join(seen)


def check_finite_half_precision() -> str:
    """Both demos answer in bfloat16 and float16 with finite logits, and the same first token as in float32."""
    seen = []
    for source in ("demo-openelm", "demo-gpt-oss"):
        firsts = {}
        for dtype in ("float32", "bfloat16", "float16"):
            model, _ = load(source, dtype=dtype)
            prompt = [model.spec.bos_token or 1, 17, 33, 65, 129]
            logits = prefill(model, prompt, model.make_cache(), 512)
            if not mx.all(mx.isfinite(logits)).item():
                raise CheckFailed(f"{source} in {dtype}: logits are not finite")
            firsts[dtype] = logits.astype(mx.float32)
        drift = max(_difference(firsts[dtype], np.array(firsts["float32"])) for dtype in ("bfloat16", "float16"))
        seen.append(f"{source}: half precision moves a logit by at most {drift:.2g}")
    return "; ".join(seen)


def check_answers() -> str:
    """Both demos say what they say everywhere."""
    expected = {"demo-openelm": ("What is a banjo?", "string"), "demo-gpt-oss": ("What is a piano?", "keyboard")}
    seen = []
    for source, (question, word) in expected.items():
        model, tokenizer = load(source)
        text = "".join(chunk.text for chunk in stream_generate(model, tokenizer, question, max_tokens=128))
        if word not in text:
            raise CheckFailed(f"{source} answers {question!r} with {text[:80]!r}, in which {word!r} is missing")
        seen.append(f"{source}: {text.strip()[:60]}")
    return "; ".join(seen)


# --- memory ---------------------------------------------------------------------------------------------------------


def check_views() -> str:
    """A NumPy view of an evaluated array is its memory, and a kernel sees what was written through it."""
    bank = mx.zeros((4, 1024), mx.uint32)
    mx.eval(bank)
    view = np.array(bank, copy=False)
    before = mx.sum(bank).item()
    view[2] = np.arange(1024, dtype=np.uint32)
    after, again = mx.sum(bank).item(), np.array(bank, copy=False)
    if again.ctypes.data != view.ctypes.data:
        raise CheckFailed("two views of one array have different addresses: writes would go to a copy")
    if (before, after) != (0, 1023 * 512):
        raise CheckFailed(f"a kernel summed {after} where {1023 * 512} had been written through a view")
    return "a write through a NumPy view is seen by the next kernel"


def check_streamed_experts() -> str:
    """With some experts in memory the logits are those with all of them, bit for bit, by every kernel of this backend."""
    known, _ = load("demo-gpt-oss")
    prompt = [each % 4000 for each in range(0, 97 * 160, 97)]
    seen = []
    for slots in (4, 12):
        model, _ = load("demo-gpt-oss", expert_slots=slots)
        for length in (1, 20, 160):  # few routes, sorted ones, and enough for tiles
            a, b = (prefill(each, prompt[:length], each.make_cache(), 512) for each in (known, model))
            if not mx.array_equal(a, b):
                difference = mx.abs(a - b).max().item()
                raise CheckFailed(
                    f"with {slots} of 16 experts, {length} tokens: logits differ by up to {difference:.2g}"
                )
        seen.append(f"{slots} slots ({model.residency.writes})")
    return f"bit-identical with {', '.join(seen)}"


def check_fences() -> str:
    """A slot is overwritten only when its readers are done: with the fewest slots, while tokens are decoded, bit for bit."""
    known, _ = load("demo-gpt-oss")
    model, _ = load("demo-gpt-oss", expert_slots=4)
    prompt, length = [each % 4000 for each in range(0, 97 * 40, 97)], 48
    never = SamplingParams(logit_bias=dict.fromkeys(known.spec.eos_tokens, float("-inf")))
    expected, found = (
        [chunk.token for chunk in stream_generate(each, None, prompt, max_tokens=length, sampling=never)]
        for each in (known, model)
    )
    if found != expected:
        first = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        raise CheckFailed(f"with 4 of 16 experts the answer differs from token {first} on")
    return (
        f"{len(found)} tokens with 4 of 16 experts are those with all of them; {model.residency.statistics().evictions:,} "
        "experts made room for others meanwhile"
    )


def check_compiled_step() -> str:
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
    return f"compiled and plain logits differ by at most {largest:.1e}"


def check_wired_limit(module: Any = mx) -> str:
    """The wired limit can be set to something harmless and comes back as it was. Metal only."""
    if not module.metal.is_available():
        raise NotHere("the wired limit is Metal's")
    wanted = 64 * 2**20
    before = module.set_wired_limit(wanted)
    try:
        held = module.set_wired_limit(wanted)
    finally:
        module.set_wired_limit(before)
    if held != wanted:
        raise CheckFailed(f"the wired limit was set to {wanted:,} bytes and read back as {held:,}")
    return f"set to {wanted:,} bytes, read back, restored to {before:,}"


CHECKS: dict[str, Callable[[], str]] = {
    "parity with Apple's and OpenAI's code": check_parity,
    "half precision": check_finite_half_precision,
    "the demos' answers": check_answers,
    "NumPy views": check_views,
    "streamed experts": check_streamed_experts,
    "fences": check_fences,
    "compiled step": check_compiled_step,
    "wired limit": check_wired_limit,
}


def _fixture(name: str) -> tuple[Model, mx.array, np.ndarray]:
    model, _ = load(FIXTURES / name, dtype="float32")
    oracle = np.load(FIXTURES / name / "oracle.npz")
    return model, mx.array(oracle["tokens"]), oracle["logits_fp32"]


def _difference(logits: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(logits.astype(mx.float32)) - expected).max())
