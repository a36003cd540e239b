"""What guessing ahead gains, beside what its measured costs and its measured acceptance allow.

Three ways to the same greedy tokens, in turns: plain steps; guessing in every round, which shows what holds; and guessing
as a user gets it, which stops while it loses. allowed gain = time of plain steps / (the rounds, each a guess and a
verification timed alone, and plain steps for the rest), or 1 where that is less. efficiency = gain / allowed gain.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from openelm_mlx.decoding.compiled_step import make_step
from openelm_mlx.decoding.drafts import Drafts
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.decoding.sampling import Sampler, SamplingParams
from openelm_mlx.decoding.speculation_gain import Gain
from openelm_mlx.decoding.speculative import Guided, Speculative
from openelm_mlx.decoding.step import Step
from openelm_mlx.decoding.tokens import Choice, one_by_one
from openelm_mlx.models.openelm import OpenELM

if TYPE_CHECKING:
    from openelm_mlx.models import Model

_TIMINGS = 9


@dataclass(frozen=True)
class SpeculationResult:
    """One measurement over all prompts. Rates are decoded tokens a second, medians of the repetitions; costs in ms.

    rounds, drafted_tokens, accepted_tokens, num_tokens: of guessing in every round.
    """

    plain_tps: float
    always_tps: float
    speculative_tps: float
    num_tokens: int
    rounds: int
    drafted_tokens: int
    accepted_tokens: int
    plain_ms: float
    draft_ms: float
    verify_ms: float

    @property
    def gain(self) -> float:
        """Times as fast as plain steps, switching off included."""
        return self.speculative_tps / self.plain_tps

    @property
    def allowed_gain(self) -> float:
        """What the costs and the acceptance allow."""
        by_rounds = self.rounds + self.accepted_tokens
        allowed_ms = (self.num_tokens - by_rounds) * self.plain_ms + self.rounds * (self.draft_ms + self.verify_ms)
        return max(1.0, self.num_tokens * self.plain_ms / allowed_ms)

    @property
    def efficiency(self) -> float:
        return self.gain / self.allowed_gain

    def as_dict(self) -> dict[str, Any]:
        """The measurement for machines."""
        derived = {"gain": self.gain, "allowed_gain": self.allowed_gain, "efficiency": self.efficiency}
        return {**asdict(self), **derived}


class _Always(Gain):
    """Guesses in every round, as many tokens as may be."""

    def pause(self) -> int:
        return 0

    @property
    def num_drafts(self) -> int:
        return self._most_drafts


def measure_speculation(
    model: Model, draft: Drafts, prompts: Sequence[Sequence[int]], max_tokens: int = 128, repetitions: int = 3
) -> SpeculationResult:
    """Decode `max_tokens` after each of `prompts` (token ids), the ways interleaved. The end of text is not heeded."""
    seconds: dict[str, list[float]] = {"plain": [], "always": [], "watched": []}
    counts = [0, 0, 0]
    for repetition in range(repetitions + 1):
        total = dict.fromkeys(seconds, 0.0)
        for prompt in prompts:
            total["plain"] += _decode(model, draft, prompt, max_tokens, None)
            always = _Always(draft.num_draft_tokens)
            total["always"] += _decode(model, draft, prompt, max_tokens, always)
            total["watched"] += _decode(model, draft, prompt, max_tokens, Gain(draft.num_draft_tokens, draft.history))
            if not repetition:
                of_prompt = (always.counts.rounds, always.counts.drafted, always.counts.accepted)
                counts = [a + b for a, b in zip(counts, of_prompt, strict=True)]
        if repetition:  # the first one compiles kernels
            for way, took in total.items():
                seconds[way].append(took)
    rounds, drafted, accepted = counts
    num_tokens = len(prompts) * (max_tokens - 1)
    plain, always_tps, watched = (num_tokens / median(each) for each in seconds.values())
    drafts_a_round = max(1, round(drafted / rounds)) if rounds else 1
    costs = [_costs(model, draft, prompt, drafts_a_round) for prompt in prompts]
    draft_ms, verify_ms = (median(each) for each in zip(*costs, strict=True))
    return SpeculationResult(
        plain, always_tps, watched, num_tokens, rounds, drafted, accepted, 1e3 / plain, draft_ms, verify_ms
    )


def made_pair(model: OpenELM, times: int = 4, bits: int = 4) -> tuple[OpenELM, OpenELM]:
    """A larger and a smaller OpenELM out of one, to measure guessing with where no such pair was trained.

    The larger one has `times` as many layers, of which the new ones add nothing: their last matrices are zeros, so that they
    cost what a trained layer costs and leave the residual stream as it is. The smaller one is the model itself in `bits`
    bits. So guesses are as often right as those of a good draft model, at the price that a model pays for depth.
    """
    spec = model.spec
    known = _unpacked_parameters(model)
    larger = OpenELM(replace(spec, layers=spec.layers * times))
    weights = []
    for name, _ in tree_flatten(larger.parameters()):
        number = re.fullmatch(r"transformer\.layers\.(\d+)\.(.*)", name)
        if number is None or int(number[1]) < len(spec.layers):
            weights.append((name, known[name]))
            continue
        like = known[f"transformer.layers.{int(number[1]) % len(spec.layers)}.{number[2]}"]
        adds = number[2] in ("attn.out_proj.weight", "ffn.proj_2.weight")
        weights.append((name, mx.zeros(like.shape, like.dtype) if adds else like))
    larger.load_weights(weights)
    smaller = OpenELM(spec)
    smaller.load_weights(list(known.items()))
    nn.quantize(smaller, group_size=64, bits=bits)
    for each in (larger, smaller):
        each.context_length = model.context_length
        each.eval()
        mx.eval(each.parameters())
    return larger, smaller


def _unpacked_parameters(model: OpenELM) -> dict[str, mx.array]:
    """A model's parameters under the names that they have when nothing is packed."""
    found = dict(tree_flatten(model.parameters()))
    dtype = model.transformer.norm.weight.dtype
    for name, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            weight, scales, biases = (found.pop(f"{name}.{part}", None) for part in ("weight", "scales", "biases"))
            assert weight is not None
            assert scales is not None
            plain = mx.dequantize(
                weight, scales, biases, group_size=module.group_size, bits=module.bits, mode=module.mode
            )
            found[f"{name}.weight"] = plain.astype(dtype)
    return found


def speculation_lines(name: str, found: SpeculationResult) -> Iterator[str]:
    """A measurement for people."""
    yield (
        f"{name}: {found.speculative_tps:,.0f} tokens/s, plain steps {found.plain_tps:,.0f}: {found.gain:.2f} times; "
        f"{found.allowed_gain:.2f} times is what costs and acceptance allow, so {found.efficiency:.0%} of it"
    )
    yield (
        f"{name}: {found.accepted_tokens} of {found.drafted_tokens} guesses right in {found.rounds} rounds; a plain step takes "
        f"{found.plain_ms:.3g} ms, a guess {found.draft_ms:.3g} ms, a verification {found.verify_ms:.3g} ms; guessing in "
        f"every round {found.always_tps:,.0f} tokens/s"
    )


def _begin(model: Model, draft: Drafts, prompt: Sequence[int]) -> tuple[Step, Sampler, mx.array]:
    cache = model.make_cache(room=draft.num_draft_tokens)
    sampler = Sampler(SamplingParams(), model.spec.vocab_size, model.spec.usable_vocab_size, prompt)
    logits = prefill(model, prompt, cache, 512)
    mx.eval(logits)  # so that only decoding is timed
    return make_step(model, cache), sampler, logits


def _decode(model: Model, draft: Drafts, prompt: Sequence[int], max_tokens: int, gain: Gain | None) -> float:
    """Seconds from the first token to the last; plain steps where `gain` is None."""
    step, sampler, logits = _begin(model, draft, prompt)
    choices: Iterator[Choice]
    if gain is None:
        choices = one_by_one(step, sampler, logits, max_tokens)
    else:
        guesser, num_drafts = draft.begin(model), draft.num_draft_tokens
        choices = Speculative(model, step, sampler, prompt, guesser, num_drafts, gain=gain).choices(logits, max_tokens)
    next(choices).item()
    began = time.perf_counter()
    for choice in choices:
        choice.item()
    return time.perf_counter() - began


def _costs(model: Model, draft: Drafts, prompt: Sequence[int], num_drafts: int) -> tuple[float, float]:
    """Milliseconds of a guess of `num_drafts` tokens, and of a pass of the model over them and the token before."""
    step, sampler, logits = _begin(model, draft, prompt)
    tokens, guesser = [*prompt, int(mx.argmax(logits))], draft.begin(model)

    def guess() -> None:
        found = guesser.guess(tokens, num_drafts, sampler, Guided(None, model.spec.vocab_size))
        if found is not None:
            mx.eval(found.tokens)  # its own time, not that of the verification behind it

    def verify() -> None:
        mx.eval(mx.argmax(step.many(mx.array(tokens[-1:] * (num_drafts + 1), mx.uint32)), axis=-1))
        for layer in step.cache:
            layer.rewind(num_drafts + 1)

    return _milliseconds(guess), _milliseconds(verify)


def _milliseconds(work: Callable[[], None]) -> float:
    times = []
    for _ in range(_TIMINGS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * median(times[1:])
