"""Random weights in a released shape, in our model and in mlx-lm's, and the rates of both, turn by turn in one process.

No checkpoint is needed: the numbers are drawn on the device, and mlx-lm gets the very same ones in its own layout.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoint.quantize import Quantization
from ..checkpoint.released import released_gpt_oss_config, released_openelm_config
from ..decoding.compiled_step import CompiledStep
from ..decoding.sampling import SamplingParams
from ..errors import SettingError
from ..generate import prefill, stream_generate
from ..loading import pad_expert_rows
from ..models import build_model
from ..specs import gpt_oss_config, openelm_config, spec_from_config
from .graph import decode_primitives

if TYPE_CHECKING:
    from ..models import Model

SHAPES = ("gpt-oss-20b", "openelm-270m", "openelm-450m", "openelm-1.1b", "openelm-3b")
# The first tokens of a run pay for what is compiled and allocated once.
LEFT_OUT = 8


@dataclass
class Comparison:
    """Samples of one shape: name of the measure -> whose ("ours", "mlx-lm") -> values, rates in tokens a second."""

    shape: str
    bits: int | None
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    primitives: dict[str, tuple[int, int]] = field(default_factory=dict)
    error: str | None = None

    def add(self, measure: str, whose: str, value: float) -> None:
        self.samples.setdefault(measure, {}).setdefault(whose, []).append(value)

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
        for whose, (every, without_views) in self.primitives.items():
            yield f"{name}: primitives a token, {whose}: {every}, without views {without_views}"

    def as_dict(self) -> dict[str, Any]:
        """The comparison for machines."""
        return {**vars(self), "ratios": {measure: self.ratio(measure) for measure in self.samples}}


def shape_config(shape: str, num_layers: int | None = None) -> dict[str, Any]:
    """The config of a released shape, with fewer layers when asked. Raises SettingError for a name that is none."""
    if shape not in SHAPES:
        raise SettingError(f"There is no shape {shape!r}: choose among {', '.join(SHAPES)}.")
    if shape.startswith("gpt-oss"):
        config = released_gpt_oss_config("20b")
        return config if num_layers is None else {**config, "num_hidden_layers": num_layers}
    spec = spec_from_config(released_openelm_config(shape.removeprefix("openelm-").upper()))
    if num_layers is not None:
        spec = replace(spec, layers=spec.layers[:num_layers])
    return openelm_config(spec)


def random_pair(config: Mapping[str, Any], bits: int | None = None, theirs: bool = True) -> tuple[Model, Any]:
    """Our model and mlx-lm's (None when not asked for) with the same random weights, in bfloat16, or packed to `bits`."""
    spec = spec_from_config(config)
    model = build_model(spec)
    packings = _pack(model, bits)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        weights[name] = _random_like(name, array, spec.keeps_float32(name))
        mx.eval(weights[name])  # one at a time: what it is drawn from is twice its size
    other = _mlx_lm_model(config, spec, weights, packings) if theirs else None
    # Not strict: padded rows are not in the empty model's shapes.
    model.load_weights(list(pad_expert_rows(weights).items()), strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model, other


def compare(
    shape: str, bits: int | None = None, num_layers: int | None = None, rounds: int = 3, seconds: float = 60.0,
    prompt_tokens: int = 2048, completion_tokens: int = 96, long_context: int = 0, theirs: bool = True,
    sample: Callable[[str], None] | None = None,
) -> Comparison:  # fmt: skip
    """Measure one shape: prefill of `prompt_tokens`, decode after a short prompt, and after `long_context` tokens (0: not).

    Prompts are cut to what the model's context has room for. At least one round counts after one that warms up; no
    round begins after `seconds`, and a measure that has samples of both is left out after them. sample: called with a
    sentence for each sample as it comes, those of the round that warms up included: what a run that is cut off leaves.
    """
    comparison = Comparison(shape, bits)
    try:
        model, other = random_pair(shape_config(shape, num_layers), bits, theirs)
        comparison.primitives = _primitives(model, other)
        runners: dict[str, Callable[..., tuple[float, float]]] = {"ours": _our_runner(model)}
        if other is not None:
            runners["mlx-lm"] = _mlx_lm_runner(other)
        started = time.perf_counter()
        measures = _measures(model, prompt_tokens, completion_tokens, long_context)
        for number in range(rounds + 1):
            for name, (prompt, num_tokens, which) in measures.items():
                is_late = time.perf_counter() - started > seconds
                if is_late and comparison.ratio(name) is not None:
                    continue
                for whose in sorted(runners, reverse=bool(number % 2)):
                    value = runners[whose](prompt, num_tokens)[which]
                    if sample is not None:
                        sample(f"{shape}: {name}: {whose} {value:.4g}{'' if number else ' (warming up)'}")
                    if number:
                        comparison.add(name, whose, value)
    except Exception as error:  # noqa: BLE001 - one shape that fails must not end the others
        comparison.error = f"{type(error).__name__}: {error}"
    mx.clear_cache()
    return comparison


def usable_tokens(model: Model) -> int:
    """Ids below this can stand in a random prompt."""
    return min(model.spec.usable_vocab_size, 30_000)


def _measures(
    model: Model, prompt_tokens: int, completion_tokens: int, long_context: int
) -> dict[str, tuple[list[int], int, int]]:
    """Name -> (prompt, how many new tokens, which of the two rates), prompts no longer than the context allows."""
    room = model.context_length
    length, long = min(prompt_tokens, room - 2), min(long_context, room - completion_tokens)
    prompt = random_prompt(model, max(length, long))
    found = {
        f"prefill of {length}": (prompt[:length], 2, 0),
        "decode": (prompt[: min(128, length)], completion_tokens, 1),
    }
    if long > 0:
        found[f"decode after {long}"] = (prompt[:long], completion_tokens, 1)
    return found


def random_prompt(model: Model, length: int) -> list[int]:
    """So many tokens, the same ones each time, without a pattern that a model could know."""
    vocab_size = usable_tokens(model)
    return [(7919 * i + 13) % vocab_size for i in range(length)]


def _our_runner(model: Model) -> Callable[..., tuple[float, float]]:
    never = SamplingParams(logit_bias=dict.fromkeys(model.spec.eos_tokens, float("-inf")))

    def run(prompt: list[int], num_tokens: int) -> tuple[float, float]:
        arrivals = [time.perf_counter()]
        for _ in stream_generate(model, None, prompt, max_tokens=num_tokens, sampling=never, prefill_chunk=2048):
            arrivals.append(time.perf_counter())
        return _rates(arrivals, len(prompt))

    return run


def _mlx_lm_runner(model: Any) -> Callable[..., tuple[float, float]]:
    from mlx_lm.generate import generate_step

    def run(prompt: list[int], num_tokens: int) -> tuple[float, float]:
        arrivals = [time.perf_counter()]
        for _ in generate_step(mx.array(prompt), model, max_tokens=num_tokens):
            arrivals.append(time.perf_counter())
        return _rates(arrivals, len(prompt))

    return run


def _rates(arrivals: list[float], num_prompt_tokens: int) -> tuple[float, float]:
    started, first = arrivals[0], arrivals[1]
    counted = arrivals[1 + LEFT_OUT :] if len(arrivals) > LEFT_OUT + 4 else arrivals[1:]
    return num_prompt_tokens / (first - started), (len(counted) - 1) / (counted[-1] - counted[0])


def _primitives(model: Model, other: Any) -> dict[str, tuple[int, int]]:
    found = {}
    cache = model.make_cache()
    mx.eval(prefill(model, random_prompt(model, 8), cache, 512))
    found["ours, plain"] = decode_primitives(lambda tokens, cache: model(tokens[0], cache=cache)[None], cache)
    cache = model.make_cache()
    mx.eval(prefill(model, random_prompt(model, 8), cache, 512))
    step = CompiledStep(model, cache)
    found["ours, compiled"] = decode_primitives(lambda tokens, _: step(tokens[0, 0])[None, None], cache)
    if other is not None:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(other)
        mx.eval(other(mx.array([random_prompt(model, 8)]), cache=cache))
        found["mlx-lm"] = decode_primitives(lambda tokens, cache: cast(Any, other)(tokens, cache=cache), cache)
    return found


def _pack(model: Model, bits: int | None) -> dict[str, Quantization]:
    """Pack gpt-oss's experts as released, and with `bits` every other matrix but routers; which modules, and how."""
    packings: dict[str, Quantization] = {}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if ".experts." in path:
            packings[path] = Quantization(4, 32, "mxfp4")
        elif bits is not None and hasattr(module, "to_quantized") and not path.endswith("router"):
            packings[path] = Quantization(bits, 64)
        return packings[path].as_config() if path in packings else False

    if bits is not None or model.spec.family == "gpt_oss":
        nn.quantize(model, class_predicate=choose)
    return packings


def _random_like(name: str, array: mx.array, is_float32: bool) -> mx.array:
    if array.dtype == mx.uint32:
        return mx.random.randint(0, 256, (*array.shape[:-1], 4 * array.shape[-1])).astype(mx.uint8).view(mx.uint32)
    if array.dtype == mx.uint8:  # MXFP4's exponents; 2^-7 and 2^-8 give 2,880 columns ordinary sums
        return mx.random.randint(119, 121, array.shape).astype(mx.uint8)
    dtype = mx.float32 if is_float32 else mx.bfloat16
    if name.endswith("norm.weight"):
        return mx.ones(array.shape, dtype)
    if name.endswith(".scales"):
        return mx.full(array.shape, 0.002, dtype)
    if name.endswith(".biases"):
        return mx.full(array.shape, -0.015, dtype)
    scale = 0.1 if array.ndim == 1 or name.endswith(".bias") else array.shape[-1] ** -0.5
    return (mx.random.normal(array.shape, mx.bfloat16) * scale).astype(dtype)


def _mlx_lm_model(
    config: Mapping[str, Any], spec: Any, weights: Mapping[str, mx.array], packings: Mapping[str, Quantization]
) -> Any:
    try:
        from mlx_lm.utils import _get_classes
    except ImportError as error:
        raise SettingError("Comparing with mlx-lm needs mlx-lm: pip install 'openelm_mlx[bench]'.") from error
    spelled = gpt_oss_config(spec) if spec.family == "gpt_oss" else dict(config)
    model_class, arguments_class = _get_classes(spelled)
    model: Any = model_class(arguments_class.from_dict(spelled))
    theirs = {name: array for our_name, array in weights.items() for name, array in _their_parts(our_name, array, spec)}
    nn.quantize(model, class_predicate=lambda path, _: _their_packing(path, packings, theirs))
    model.load_weights([(n, a.astype(mx.bfloat16) if a.dtype == mx.float32 else a) for n, a in theirs.items()])
    model.eval()
    mx.eval(model.parameters())
    return model


def _their_parts(name: str, array: mx.array, spec: Any) -> Iterator[tuple[str, mx.array]]:
    """mlx-lm keeps q, k and v apart, and gate and up."""
    if spec.family == "gpt_oss" and ".qkv_proj." in name:
        layer = spec.layers[0]
        ends = [layer.num_heads * layer.head_dim, (layer.num_heads + layer.num_kv_heads) * layer.head_dim]
        for part, piece in zip(("q_proj", "k_proj", "v_proj"), mx.split(array, ends, axis=0), strict=True):
            yield name.replace("qkv_proj", part), piece
    elif ".gate_up_proj." in name:
        for part, start in (("gate_proj", 0), ("up_proj", 1)):
            yield name.replace("gate_up_proj", part), mx.contiguous(array[:, start::2])
    else:
        yield name, array


def _their_packing(
    path: str, packings: Mapping[str, Quantization], weights: Mapping[str, mx.array]
) -> bool | dict[str, Any]:
    if f"{path}.scales" not in weights:
        return False
    ours = path.replace(".gate_proj", ".gate_up_proj").replace(".up_proj", ".gate_up_proj")
    for part in ("q_proj", "k_proj", "v_proj"):
        ours = ours.replace(f".{part}", ".qkv_proj") if ours not in packings else ours
    return packings[ours].as_config()


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} [{min(values):.4g} to {max(values):.4g}]"
