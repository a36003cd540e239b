"""The compiled step against the plain one: the same logits, for both families, wherever a cache can stand."""

import mlx.core as mx
import pytest
from conftest import FIXTURES, load_fixture, random_model
from primitive_counts import primitives
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.decoding import pieces
from openelm_mlx.decoding.compiled_step import CompiledStep, make_step
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.decoding.sampling import Sampler, SamplingParams
from openelm_mlx.decoding.step import PlainStep
from openelm_mlx.decoding.tokens import one_by_one
from openelm_mlx.models.cache import make_cache
from openelm_mlx.runtime import Traced, runtime_of


@pytest.fixture(scope="module")
def models():
    return {
        "openelm": random_model(context_length=2048),
        "gpt-oss": load_fixture(FIXTURES / "gpt_oss_tiny"),
        "odd": load_fixture(FIXTURES / "gpt_oss_odd"),
        "demo-gpt-oss": om.load(short_demo("demo-gpt-oss"))[0],
    }


def prompt_of(model, length: int) -> list[int]:
    return [(7 * i + 3) % min(200, model.spec.vocab_size) for i in range(length)]


def decode(model, cls, prompt, num_tokens, cache=None, **options):
    """Greedy tokens and the logits of every step."""
    cache = model.make_cache() if cache is None else cache
    logits = prefill(model, prompt, cache, 64)
    step = cls(model, cache, **options)
    tokens, seen = [], []
    for _ in range(num_tokens):
        token = mx.argmax(logits)
        logits = step(token)
        tokens.append(token)
        seen.append(logits)
    mx.eval(tokens, seen)
    return [token.item() for token in tokens], mx.stack(seen), cache


# The windows of the fixtures are 16 and 8. Compiling takes seconds on a CPU: two lengths say the same.
CASES = [
    (name, length, compiled)
    for name in ("openelm", "gpt-oss", "odd")
    for length, compiled in [(3, False), (15, False), (16, False), (17, False), (40, False), (15, True), (17, True)]
]


@pytest.mark.parametrize(("name", "length", "compiled"), CASES)
def test_equals_the_plain_step_across_the_window(models, name, length, compiled):
    model = models[name]
    prompt = prompt_of(model, length)
    expected, plain, cache = decode(model, PlainStep, prompt, 12)
    tokens, logits, ours = decode(model, CompiledStep, prompt, 12, compile=compiled)
    assert tokens == expected
    assert mx.abs(logits - plain).max().item() < 1e-5
    for layer, other in zip(ours, cache, strict=True):
        assert (layer.offset, layer.nbytes) == (other.offset, other.nbytes)


@pytest.mark.parametrize("name", ["openelm", "gpt-oss"])
def test_across_the_growth_of_the_buffers(models, name):
    model = models[name]
    prompt = prompt_of(model, 250)
    expected, plain, before = decode(model, PlainStep, prompt, 20)
    tokens, logits, cache = decode(model, CompiledStep, prompt, 20, compile=False)
    assert tokens == expected
    assert mx.abs(logits - plain).max().item() < 1e-5
    assert [layer.nbytes for layer in cache] == [layer.nbytes for layer in before]


@pytest.mark.parametrize(("name", "options"), [
    ("openelm", {"window": 12}), ("gpt-oss", {"window": 24}), ("gpt-oss", {"room": 5}), ("demo-gpt-oss", {"kv_bits": 8}),
])  # fmt: skip
def test_over_every_kind_of_cache(models, name, options):
    model = models[name]
    prompt = prompt_of(model, 40)
    expected, plain, _ = decode(model, PlainStep, prompt, 12, model.make_cache(**options))
    tokens, logits, _ = decode(model, CompiledStep, prompt, 12, model.make_cache(**options), compile=False)
    assert tokens == expected
    assert mx.abs(logits - plain).max().item() < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["openelm", "gpt-oss"])
def test_many_rows_at_once_and_padding_before_them(models, name, compiled):
    """Each row as it would be alone; the pieces take (B,) tokens as they take one."""
    model = models[name]
    rows, padding = [prompt_of(model, 21), prompt_of(model, 30)[9:], prompt_of(model, 17)], [0, 0, 4]
    cache = model.make_cache(left_padding=padding)
    mx.eval(model(mx.array([[0] * n + row for n, row in zip(padding, rows, strict=True)]), cache=cache))
    for token in (5, 9, 11):
        rows = [[*row, token + i] for i, row in enumerate(rows)]
        x, out = CompiledStep(model, cache, compile=compiled).run_layers(mx.array([row[-1] for row in rows]))
        logits = model.head(model.layers[-1].after_attention(x, out))
        for ours, row in zip(logits, rows, strict=True):
            assert mx.abs(ours - model(mx.array([row]))[0, -1]).max().item() < 2e-5


@pytest.mark.parametrize("name", ["openelm", "gpt-oss"])
def test_a_cache_may_be_rewound_and_used_otherwise_in_between(models, name):
    model = models[name]
    prompt = prompt_of(model, 30)
    cache = make_cache(model.spec, room=4)
    prefill(model, prompt, cache, 64)
    step = CompiledStep(model, cache, compile=False)
    for token in (5, 6, 7):
        mx.eval(step(mx.array(token)))
    for layer in cache:
        layer.rewind(2)
    model(mx.array([[9]]), cache=cache)  # somebody else's token
    ours = step(mx.array(11))
    reference = model(mx.array([[*prompt, 5, 9, 11]]))[0, -1]
    assert mx.abs(ours - reference).max().item() < 2e-5


def test_pieces_are_traced_once_for_a_model(models, monkeypatch):
    """However many tokens there are and however the prompts differ: a trace more would take longer than many tokens."""
    model, traced = models["gpt-oss"], []
    runtime_of(model).traced = Traced()
    block = type(model.layers[0])
    original = block.after_attention
    monkeypatch.setattr(block, "after_attention", lambda *a: traced.append(1) or original(*a))
    for length in (3, 20, 40):
        cache = model.make_cache()
        prefill(model, prompt_of(model, length), cache, 64)
        step = CompiledStep(model, cache)
        traced.clear() if length == 3 else None
        for token in range(5):
            mx.eval(step(mx.array(token)))
    assert len(traced) == len(model.layers) * (1 + 2)  # one trace, and what the later two prefills call


def test_what_no_token_changes_is_made_before_the_pieces_are_traced():
    """After a prompt too long for single lookups nothing of it is there yet; a trace would make it for every token."""
    counts = []
    for is_there in (False, True):
        model = load_fixture(FIXTURES / "gpt_oss_tiny")
        if is_there:
            mx.eval(model(mx.array([5])))
        cache = model.make_cache()
        prefill(model, prompt_of(model, 40), cache, 64)
        step = CompiledStep(model, cache)
        mx.eval(step(mx.array(5)))
        counts.append(primitives(step(mx.array(6))))
    assert counts[0] == counts[1]


SAMPLINGS = [
    SamplingParams(),
    SamplingParams(logit_bias={5: -1.0, 7: 3.0}),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(
        temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3, frequency_penalty=0.4, seed=5
    ),
]


@pytest.mark.parametrize(("params", "compiled"), [*((each, False) for each in SAMPLINGS), (SAMPLINGS[-1], True)])
def test_a_choice_inside_the_graph_is_the_one_outside(models, params, compiled):
    model = models["gpt-oss"]
    prompt, answers = prompt_of(model, 20), []
    for cls, options in ((PlainStep, {}), (CompiledStep, {"compile": compiled})):
        cache = model.make_cache()
        logits = prefill(model, prompt, cache, 64)
        sampler = Sampler(params, model.spec.vocab_size, model.spec.vocab_size - 3, prompt)
        choices = one_by_one(cls(model, cache, **options), sampler, logits, 15, 2)
        answers.append([(choice.item(), *choice.logprob_values()) for choice in choices])
    for plain, ours in zip(*answers, strict=True):
        assert ours[0] == plain[0]
        assert ours[1] == pytest.approx(plain[1], abs=1e-5)
        assert ours[2] == pytest.approx(plain[2], abs=1e-5)


def test_other_seeds_share_a_piece_and_pieces_do_not_pile_up(models, monkeypatch):
    model = models["openelm"]
    runtime_of(model).traced = Traced()
    monkeypatch.setattr(pieces, "MOST_CHOICES", 3)
    cache = model.make_cache()
    prefill(model, prompt_of(model, 20), cache, 64)
    step = CompiledStep(model, cache, compile=False)
    counts = []
    for temperature, seed in ((0.5, 1), (0.5, 2), (0.6, 1), (0.7, 1), (0.8, 1), (0.5, 3)):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=seed), model.spec.vocab_size, 200)
        mx.eval(step.choose(mx.array(3), sampler))
        counts.append(len(step._pieces._heads))
    assert counts == [1, 1, 2, 3, 3, 3]


def test_the_cpu_keeps_the_plain_step(models, monkeypatch):
    """Compiling would call the machine's C++ compiler there."""
    model = models["openelm"]
    assert isinstance(make_step(model, model.make_cache()), PlainStep)
    monkeypatch.setattr("openelm_mlx.models.precision.runs_on_cpu", lambda: False)
    model = random_model()
    assert isinstance(make_step(model, model.make_cache()), CompiledStep)


@pytest.mark.parametrize("source", ["demo-openelm", "demo-gpt-oss"])
def test_the_demos_say_the_same(source, monkeypatch):
    model, tokenizer = om.load(short_demo(source))
    question = "What is a piano?"
    expected = [chunk.token for chunk in om.stream_generate(model, tokenizer, question, max_tokens=36)]
    monkeypatch.setattr("openelm_mlx.engine.single.make_step", lambda m, c: CompiledStep(m, c, compile=False))
    assert [chunk.token for chunk in om.stream_generate(model, tokenizer, question, max_tokens=36)] == expected


@pytest.mark.parametrize("length", [2, 5, 9])
@pytest.mark.parametrize("name", ["openelm", "gpt-oss"])
def test_several_tokens_at_once_are_those_of_the_model(models, name, length):
    """As a guess is checked: at the start, across the window and after it, compiled once a length."""
    model = models[name]
    for compiled in (False, True):
        cache, ours = model.make_cache(room=16), model.make_cache(room=16)
        prompt = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
        for each in (cache, ours):
            mx.eval(prefill(model, prompt, each, 512))
        step = CompiledStep(model, ours, compile=compiled)
        for start in range(0, 3 * length, length):
            tokens = mx.array([(5 * i) % 20 + 3 for i in range(start, start + length)], mx.uint32)
            expected = model(tokens[None], cache=cache)[0]
            found = step.many(tokens)
            assert found.shape == expected.shape
            assert mx.abs(found - expected).max().item() < 1e-4
