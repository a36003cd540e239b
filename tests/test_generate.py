"""The loop, against a loop that a child could read: no cache, the whole sequence anew for every token."""

import inspect
import itertools
import json
import math
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, random_model

import openelm_mlx as om
from openelm_mlx.errors import CheckpointError, PromptError, SettingError, TokenizerError
from openelm_mlx.generate import prefill, stream_generate
from openelm_mlx.text.streams import PlainStream
from openelm_mlx.text.tokenizer import load_tokenizer

PROMPT = [1, 5, 9, 200, 31, 77, 450, 8]


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FIXTURES / "tokenizers" / "llama")


def naive_greedy(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(mx.argmax(model(mx.array([tokens]))[0, -1]).item())
    return tokens[len(prompt) :]


def tokens_of(chunks) -> list[int]:
    return [chunk.token for chunk in chunks]


@pytest.mark.parametrize("chunk", [1, 3, 8, 512])
def test_greedy_tokens_are_the_naive_loop_s(model, chunk):
    expected = naive_greedy(model, PROMPT, 20)
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=20, prefill_chunk=chunk)) == expected


@pytest.mark.parametrize("chunk", [1, 3, 8, 512])
def test_prefill_gives_the_last_token_s_logits(model, chunk):
    cache = model.make_cache()
    logits = prefill(model, PROMPT, cache, chunk)
    assert mx.allclose(logits, model(mx.array([PROMPT]))[0, -1], atol=1e-4)
    assert [layer.offset for layer in cache] == [len(PROMPT)] * 3


def test_chunks_joined_are_the_answer(model, tokenizer):
    chunks = list(stream_generate(model, tokenizer, "Hello world", max_tokens=12))
    assert "".join(chunk.text for chunk in chunks) == om.generate(model, tokenizer, "Hello world", max_tokens=12)
    assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(tokens_of(chunks), continuation=True)
    assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    assert all(chunk.channel is None and chunk.logprob is None for chunk in chunks)


def test_statistics_come_with_the_last_chunk(model):
    *others, last = stream_generate(model, None, PROMPT, max_tokens=5)
    assert all(chunk.statistics is None for chunk in others)
    s = last.statistics
    assert (s.prompt_tokens, s.completion_tokens) == (8, 5)
    assert min(s.time_to_first_token, s.prefill_tps, s.decode_tps, s.peak_memory_bytes) > 0
    assert s.prefill_tps == pytest.approx(8 / s.time_to_first_token)


def test_the_next_step_is_dispatched_before_the_last_token_is_read(model, monkeypatch):
    """When the host waits for token n, the step that makes token n + 1 has been handed to the device."""
    events = []
    real = mx.async_eval

    def note(*arrays):
        events.append("dispatched")
        real(*arrays)

    monkeypatch.setattr("mlx.core.async_eval", note)
    for chunk in stream_generate(model, None, PROMPT, max_tokens=4):
        events.append(f"read {chunk.token is not None}")
    assert events == [
        "dispatched",
        "dispatched",
        "read True",
        "dispatched",
        "read True",
        "dispatched",
        "read True",
        "read True",
    ]


def test_end_of_text_ends_it_and_has_no_text(model, tokenizer):
    sampling = om.SamplingParams(logit_bias={2: 1000.0})
    chunks = list(stream_generate(model, tokenizer, "Hello", max_tokens=9, sampling=sampling))
    assert [(chunk.text, chunk.token, chunk.finish_reason) for chunk in chunks] == [("", 2, "stop")]


def test_stop_strings_across_token_borders_are_never_printed(model, tokenizer):
    whole = om.generate(model, tokenizer, "Hello world", max_tokens=16)
    assert len(whole) > 15
    for start, length in itertools.product(range(0, len(whole) - 3, 3), (1, 3)):
        stop = whole[start : start + length]
        chunks = list(stream_generate(model, tokenizer, "Hello world", max_tokens=16, stop=[stop, "\0never"]))
        assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].finish_reason == "stop"
        assert om.generate(model, tokenizer, "Hello world", max_tokens=16, stop=stop) == whole[: whole.index(stop)]


def test_what_might_have_become_a_stop_string_comes_at_the_end(model, tokenizer):
    whole = om.generate(model, tokenizer, "Hello world", max_tokens=10)
    assert om.generate(model, tokenizer, "Hello world", max_tokens=10, stop=[whole[-2:] + "\0"]) == whole


def test_a_prompt_that_fills_the_context_is_refused_before_any_work(model):
    calls = []

    class Watched:
        spec, context_length, runtime = model.spec, model.context_length, None

        def __getattr__(self, name):
            calls.append(name)
            raise AssertionError(name)

    for length in (64, 65, 500):
        with pytest.raises(PromptError, match=rf"{length} tokens and the context holds 64"):
            stream_generate(Watched(), None, [3] * length)
    assert calls == []


def test_more_tokens_than_fit_are_clipped_and_end_with_length(model):
    chunks = list(stream_generate(model, None, [3] * 60, max_tokens=100))
    assert len(chunks) == 4
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].statistics.completion_tokens == chunks[-1].statistics.max_tokens == 4


def test_a_sliding_window_goes_past_the_context_when_asked_for(model):
    prompt = [(7 * i) % 600 for i in range(80)]
    chunks = list(stream_generate(model, None, prompt, max_tokens=30, sliding_window=16, prefill_chunk=9))
    assert len(chunks) == 30
    # The slow form: each layer sees the last 16 positions, the whole sequence anew for every token.
    from openelm_mlx.models.attention import visible_keys

    tokens = list(prompt)
    for _ in range(30):
        positions, h = mx.arange(len(tokens)), model.embed(mx.array([tokens]))
        for layer in model.layers:
            h = layer(h, visible_keys(positions, positions, 16), None)
        tokens.append(mx.argmax(model.head(h)[0, -1]).item())
    assert tokens_of(chunks) == tokens[80:]


def test_same_seed_same_text(model, tokenizer):
    def text(seed):
        return om.generate(
            model, tokenizer, "Hello", max_tokens=20, sampling=om.SamplingParams(temperature=1.0, seed=seed)
        )

    assert text(5) == text(5)
    assert text(5) != text(6)
    assert text(None) != text(None)


def test_log_probabilities_are_the_model_s_own(model):
    """Whatever penalties and temperature do to the choice."""
    sampling = om.SamplingParams(temperature=3.0, repetition_penalty=1.5, seed=1)
    chunks = list(stream_generate(model, None, PROMPT, max_tokens=6, sampling=sampling, logprobs=4))
    tokens = list(PROMPT)
    for chunk in chunks:
        logits = model(mx.array([tokens]))[0, -1]
        logprobs = logits - mx.logsumexp(logits)
        assert chunk.logprob == pytest.approx(logprobs[chunk.token].item(), abs=1e-3)
        order = mx.argsort(-logprobs)[:4].tolist()
        assert list(chunk.top_logprobs) == order
        assert list(chunk.top_logprobs.values()) == pytest.approx([logprobs[t].item() for t in order], abs=1e-3)
        tokens.append(chunk.token)


def test_prompts_in_every_form(model, tokenizer):
    ids = tokenizer.encode_prompt("Hello world")
    assert ids[0] == 1  # BOS, always
    expected = tokens_of(stream_generate(model, None, ids, max_tokens=4))
    assert tokens_of(stream_generate(model, tokenizer, "Hello world", max_tokens=4)) == expected
    chat = {"max_tokens": 4, "chat_template": "openelm-instruct"}
    as_text = tokens_of(stream_generate(model, tokenizer, "Hello world", **chat))
    as_messages = tokens_of(stream_generate(model, tokenizer, [{"role": "user", "content": "Hello world"}], **chat))
    assert as_text == as_messages != expected
    assert tokens_of(stream_generate(model, tokenizer, "Hello world", raw=True, **chat)) == expected


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", []])
def test_empty_prompts(model, tokenizer, prompt):
    with pytest.raises(PromptError, match="empty"):
        stream_generate(model, tokenizer, prompt)


@pytest.mark.parametrize("prompt", [None, 5, b"abc", 1.5, {"role": "user"}])
def test_prompts_that_are_none(model, tokenizer, prompt):
    with pytest.raises(PromptError):
        stream_generate(model, tokenizer, prompt)


def test_arrays_and_numpy_numbers_are_tokens(model):
    expected = tokens_of(stream_generate(model, None, [1, 5, 6], max_tokens=3))
    for prompt in (mx.array([1, 5, 6]), np.array([1, 5, 6]), list(np.array([1, 5, 6])), (1, 5, 6)):
        assert tokens_of(stream_generate(model, None, prompt, max_tokens=3)) == expected
    with pytest.raises(PromptError, match="True"):
        stream_generate(model, None, [True, 5])


def test_the_function_can_be_looked_at():
    assert list(inspect.signature(om.generate).parameters)[:3] == ["model", "tokenizer", "prompt"]


@pytest.mark.parametrize("token", [-1, 600, 10**9])
def test_tokens_that_the_model_lacks(model, token):
    with pytest.raises(PromptError, match=str(token)):
        stream_generate(model, None, [1, token])


def test_text_without_a_tokenizer_says_where_one_comes_from(model):
    with pytest.raises(TokenizerError, match=r"huggingface\.co/meta-llama/Llama-2-7b-hf.*--tokenizer"):
        stream_generate(model, None, "Hello")
    with pytest.raises(TokenizerError, match="Stop strings"):
        stream_generate(model, None, [1, 2], stop=["x"])


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"prefill_chunk": 0}, {"logprobs": -1}, {"logprobs": 601},
     {"sliding_window": 0}, {"sliding_window": 65}, {"stop": [""]}, {"stop": None}, {"stop": 5}, {"stop": [5]},
     {"sampling": {"temperature": 1}}],
)  # fmt: skip
def test_options_out_of_range(model, tokenizer, options):
    with pytest.raises(SettingError):
        list(stream_generate(model, tokenizer, "Hello", **options))


def test_weights_that_are_not_numbers_are_said_so(tokenizer):
    broken = random_model()
    broken.transformer.norm.weight = mx.full((64,), math.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        om.generate(broken, tokenizer, "Hello")


def test_rows_beyond_the_tokenizer_are_never_sampled(tokenizer):
    padded = random_model(vocab_size=640)
    sampling = om.SamplingParams(temperature=50.0, seed=0)
    tokens = tokens_of(stream_generate(padded, tokenizer, "Hello", max_tokens=50, sampling=sampling))
    assert max(tokens) < 600 == tokenizer.vocab_size
    unrestricted = tokens_of(stream_generate(padded, None, [1, 2, 3], max_tokens=50, sampling=sampling))
    assert max(unrestricted) >= 600  # so the first assertion can fail


def test_a_character_split_over_tokens_comes_out_whole(tokenizer):
    stream = PlainStream(tokenizer, [], continues_text=True)
    pieces = [stream.add(token).text for token in tokenizer.encode("👩‍🚀é")]
    assert "".join(pieces) + stream.finish().text == " 👩‍🚀é"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


IMPORTS = [
    "import openelm_mlx as om",
    "import openelm_mlx.generate",
    "from openelm_mlx import generate",
    "from openelm_mlx.generate import stream_generate",
    "from openelm_mlx.generate import generate as g",
    "from openelm_mlx import stream_generate, load",
]


ORDERS = list(itertools.permutations(IMPORTS, 2))

# One process for all of them: MLX and NumPy stay, ours is imported anew for each.
IN_EVERY_ORDER = """
import json, sys, traceback, types

for order in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.partition(".")[0] == "openelm_mlx"]:
        del sys.modules[name]
    try:
        exec("\\n".join(order), {})
        import openelm_mlx, openelm_mlx.generate
        import openelm_mlx as om
        assert callable(om.generate) and callable(openelm_mlx.generate)
        assert om.generate.stream_generate is om.stream_generate
        assert isinstance(openelm_mlx.generate, types.ModuleType)
        from openelm_mlx import generate
        assert generate is om.generate
        try:
            om.generate(5, None, 'Hi')
            raise AssertionError("5 was taken for a model")
        except om.UserError as error:
            assert 'a int' in str(error)
        print(json.dumps(None))
    except BaseException:
        print(json.dumps(traceback.format_exc()))
"""


@pytest.fixture(scope="module")
def found_in_order():
    """Order of imports -> the traceback it ended with, or None."""
    command = [sys.executable, "-W", "error", "-c", IN_EVERY_ORDER, json.dumps(ORDERS)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(ORDERS, map(json.loads, finished.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: " ; ".join(order))
def test_function_and_module_coexist_in_every_import_order(found_in_order, order):
    assert found_in_order[order] is None


def test_no_runpy_warning():
    command = [sys.executable, "-W", "error", "-m", "openelm_mlx.generate", "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stderr == ""
    assert "--max-tokens" in finished.stdout
