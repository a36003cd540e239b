"""Our models under mlx-lm's own loops, and mlx-lm's model on our weights: the same tokens."""

import mlx.core as mx
import pytest
from conftest import FIXTURES, load_fixture, max_difference, oracle, random_model, save_folder

import openelm_mlx as om
from openelm_mlx.generate import stream_generate

PROMPT = [1, 5, 9, 200, 31, 77, 450, 8]


@pytest.fixture(scope="module")
def model():
    return random_model(context_length=2048)


def mlx_lm_tokenizer():
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    file = str(FIXTURES / "tokenizers" / "llama_json" / "tokenizer.json")
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_file=file, eos_token="</s>", bos_token="<s>"))


def test_our_model_runs_through_mlx_lm_s_stream_generate(model):
    from mlx_lm.generate import stream_generate as theirs

    ours = [chunk.token for chunk in stream_generate(model, None, PROMPT, max_tokens=24)]
    responses = theirs(model, mlx_lm_tokenizer(), PROMPT, max_tokens=24)
    assert [response.token for response in responses] == ours


@pytest.mark.parametrize("prefill_step_size", [3, 512])
def test_our_cache_under_mlx_lm_s_chunked_prefill_and_across_its_growth(model, prefill_step_size):
    from mlx_lm.generate import generate_step

    prompt = [(11 * i) % 600 for i in range(250)]
    ours = [chunk.token for chunk in stream_generate(model, None, prompt, max_tokens=20)]
    theirs = generate_step(mx.array(prompt), model, max_tokens=20, prefill_step_size=prefill_step_size)
    assert [token for token, _ in theirs] == ours


def test_mlx_lm_s_caches_in_our_model(model):
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    whole = model(mx.array([PROMPT]))
    for cache in ([KVCache() for _ in model.layers], [RotatingKVCache(max_size=64) for _ in model.layers]):
        parts = [
            model(mx.array([PROMPT[:5]]), cache),
            model(mx.array([PROMPT[5:6]]), cache),
            model(mx.array([PROMPT[6:]]), cache),
        ]
        assert mx.allclose(mx.concatenate(parts, axis=1), whole, atol=1e-4)


def test_our_prompt_cache_is_saved_and_loaded_by_mlx_lm(model, tmp_path):
    from mlx_lm.models import cache as mlx_lm_cache

    cache = model.make_cache()
    model(mx.array([PROMPT]), cache)
    assert mlx_lm_cache.can_trim_prompt_cache(cache)
    assert mlx_lm_cache.trim_prompt_cache(cache, 3) == 3
    again = model(mx.array([PROMPT[5:]]), cache)
    assert mx.allclose(again, model(mx.array([PROMPT]))[:, 5:], atol=1e-4)


def test_mlx_lm_s_openelm_on_the_same_folder_gives_the_same_logits(fixtures, tmp_path):
    from mlx_lm.utils import load_model

    known, ours = oracle(fixtures / "openelm_tiny"), load_fixture(fixtures / "openelm_tiny")
    theirs, _ = load_model(fixtures / "openelm_tiny")
    tokens = mx.array(known["tokens"])
    assert max_difference(theirs(tokens), known["logits_fp32"]) <= 5e-5
    assert mx.allclose(ours(tokens), theirs(tokens), atol=5e-5)


def test_decoding_the_same_weights_gives_mlx_lm_s_tokens(model, tmp_path):
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    folder = save_folder(tmp_path / "m", model)
    theirs, _ = load_model(folder)
    expected = [token for token, _ in generate_step(mx.array(PROMPT), theirs, max_tokens=24)]
    ours, _ = om.load(folder)
    assert [chunk.token for chunk in stream_generate(ours, None, PROMPT, max_tokens=24)] == expected
