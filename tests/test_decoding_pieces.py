"""Weights that change: every step computes with the new ones, whichever way they came, and nothing of the old ones is kept."""

import mlx.core as mx
import pytest
from conftest import random_model
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.decoding.compiled_step import CompiledStep
from openelm_mlx.decoding.pieces import weights_version
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.decoding.step import PlainStep
from openelm_mlx.decoding.streamed_step import StreamedStep

PROMPT = [3, 10, 17, 24, 31]


def scaled(tree, factor=1.3):
    return tree_map(lambda array: array * factor if mx.issubdtype(array.dtype, mx.floating) else array, tree)


class Doubled(nn.Module):
    """An adapter in a linear layer's place."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.scale = mx.array(2.0)

    def __call__(self, x):
        return self.linear(x) * self.scale


def by_update(model):
    norms = {name: each for name, each in tree_flatten(model.parameters()) if "norm" in name}
    model.load_weights([(name, each * 1.3) for name, each in norms.items()], strict=False)


def by_update_of_all(model):
    model.update(scaled(model.parameters()))


def by_update_of_a_layer(model):
    """The model itself does not hear of it."""
    layer = model.layers[1]
    layer.attention.update(scaled(layer.attention.parameters()))


def by_assignment(model):
    attention = model.layers[0].attention
    attention.qkv_proj.weight = attention.qkv_proj.weight * 0.5


def by_update_of_modules(model):
    """As `nn.quantize` and mlx-lm's tuner put other modules in."""
    model.update_modules(
        tree_unflatten([(name, Doubled(each)) for name, each in model.named_modules() if name.endswith("qkv_proj")])
    )


def by_adapter(model):
    for layer in model.layers:
        layer.attention.qkv_proj = Doubled(layer.attention.qkv_proj)


WAYS = [by_update, by_update_of_all, by_update_of_a_layer, by_assignment, by_adapter]


def logits_of(model, make) -> mx.array:
    """Those of a token after the prompt."""
    cache = model.make_cache()
    prefill(model, PROMPT, cache, 64)
    return make(model, cache)(mx.array(7))


@pytest.fixture(scope="module", params=["openelm", "gpt-oss", "streamed"])
def family(request):
    return request.param


def load(family):
    if family == "openelm":
        mx.random.seed(5)
        return random_model()
    return om.load(short_demo("demo-gpt-oss"), dtype="float32", expert_slots=8 if family == "streamed" else None)[0]


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("change", WAYS)
def test_every_step_computes_with_the_weights_that_are_there_now(family, change):
    model = load(family)
    step = StreamedStep if family == "streamed" else CompiledStep

    def fast(model, cache):
        return step(model, cache, compile=True)  # what is not compiled reads the parameters anew each time anyway

    before = logits_of(model, fast)
    assert mx.abs(before - logits_of(model, PlainStep)).max().item() < 1e-4
    version = weights_version(model)
    change(model)
    assert weights_version(model) != version
    expected = logits_of(model, PlainStep)
    assert mx.abs(before - expected).max().item() > 1e-2
    assert mx.abs(logits_of(model, fast) - expected).max().item() < 1e-3


@pytest.mark.parametrize("change", [by_update, by_update_of_modules])
def test_a_step_that_is_in_use_follows_an_update(family, change):
    model = load(family)
    cache = model.make_cache()
    prefill(model, PROMPT, cache, 64)
    # Compiled: what is not reads the model's parameters anew each time anyway.
    step = (StreamedStep if family == "streamed" else CompiledStep)(model, cache, compile=True)
    mx.eval(step(mx.array(7)))
    change(model)
    plain = model.make_cache()
    for layer, other in zip(plain, cache, strict=True):
        layer.state = tuple(mx.array(each) for each in other.state)
        layer.offset = other.offset
        if hasattr(other, "end"):
            layer.end = other.end
    expected = PlainStep(model, plain)(mx.array(9))
    assert mx.abs(step(mx.array(9)) - expected).max().item() < 1e-3


def test_nothing_is_traced_anew_while_the_weights_stay(family):
    model = load(family)
    version = weights_version(model)
    logits_of(model, PlainStep)
    model.train()
    model.eval()
    model.update(model.parameters())  # the same arrays
    assert weights_version(model) == version


def test_a_prefix_cache_forgets_what_the_old_weights_computed(family):
    model = load(family)
    kept = om.PrefixCache()
    options = {"max_tokens": 6, "sampling": om.SamplingParams(temperature=0.0)}
    prompt = [3 + 7 * i % 60 for i in range(40)]

    def answer(prefix_cache):
        return [chunk.token for chunk in om.stream_generate(model, None, prompt, prefix_cache=prefix_cache, **options)]

    answer(kept)
    assert list(om.stream_generate(model, None, prompt, prefix_cache=kept, **options))[-1].statistics.cached_tokens > 0
    by_assignment(model)
    found = list(om.stream_generate(model, None, prompt, prefix_cache=kept, **options))
    assert found[-1].statistics.cached_tokens == 0
    assert [chunk.token for chunk in found] == answer(None)
