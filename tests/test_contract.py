"""Names that programs rely on, each called as a program would: what is renamed inside must not break them."""

import mlx.core as mx
import pytest

import openelm_mlx as om
from openelm_mlx.tools import calculator

GIVEN = {
    "load", "generate", "stream_generate", "Chunk", "Statistics", "SamplingParams", "PromptLookup", "DraftModel",
    "PrefixCache", "convert", "plan", "Chat", "UserError", "NoAnswerWarning", "__version__",
}  # fmt: skip


@pytest.fixture(scope="module")
def openelm():
    return om.load("demo-openelm", memory_limit="1GB", context_length=512)


@pytest.fixture(scope="module")
def gpt_oss():
    return om.load("demo-gpt-oss")


def test_every_public_name_is_there():
    assert set(om.__all__) >= GIVEN
    assert all(getattr(om, name) is not None for name in om.__all__)


def test_a_model_is_a_function_of_tokens_and_a_cache(openelm):
    model, tokenizer = openelm
    tokens = mx.array([tokenizer.encode("a kind of")])
    logits = model(tokens)
    assert logits.shape == (1, tokens.shape[1], model.spec.vocab_size)
    cache = model.make_cache()
    model(tokens[:, :-1], cache=cache)
    assert mx.allclose(model(tokens[:, -1:], cache=cache)[0, -1], logits[0, -1], atol=1e-3)


def test_a_loaded_model_knows_its_plan_and_context(openelm):
    model, _ = openelm
    assert model.context_length == 512
    assert model.plan.fits
    assert model.plan.budget_bytes <= 10**9
    assert model.residency is None


def test_generate_gives_text_for_a_prompt_in_each_form(openelm):
    model, tokenizer = openelm
    options = {"max_tokens": 4, "sampling": om.SamplingParams(temperature=0.0)}
    text = om.generate(model, tokenizer, "What is a banjo?", **options)
    assert text
    messages = [{"role": "user", "content": "What is a banjo?"}]
    assert om.generate(model, tokenizer, messages, **options) == text
    assert isinstance(om.generate(model, tokenizer, tokenizer.encode("a banjo"), **options), str)


@pytest.mark.slow
def test_a_chunk_says_what_a_token_added(gpt_oss):
    model, tokenizer = gpt_oss
    chunks = list(om.stream_generate(model, tokenizer, "What is a piano?", logprobs=1))
    assert "".join(chunk.text for chunk in chunks) == om.generate(model, tokenizer, "What is a piano?")
    assert "".join(chunk.reasoning for chunk in chunks)
    assert {chunk.channel for chunk in chunks} >= {"analysis", "final"}
    assert {chunk.recipient for chunk in chunks} == {None}
    assert all(isinstance(chunk.token, int) and chunk.logprob <= 0 for chunk in chunks)
    last = chunks[-1]
    assert isinstance(last, om.Chunk)
    assert last.finish_reason == "stop"
    assert isinstance(last.statistics, om.Statistics)
    assert last.statistics.completion_tokens == len(chunks)


@pytest.mark.slow
def test_the_arguments_of_a_call_are_neither_answer_nor_reasoning(gpt_oss):
    model, tokenizer = gpt_oss
    chat = om.Chat(model, tokenizer, tools=[calculator], reasoning_effort="low")
    assert chat.ask("What is 12 + 30?") == "12 + 30 = 42"
    prompt = chat.harmony_prompt(chat.messages[:1])
    called = [chunk for chunk in om.stream_generate(model, tokenizer, prompt) if chunk.arguments]
    assert "".join(chunk.arguments for chunk in called) == '{"expression":"12 + 30"}'
    assert {chunk.recipient for chunk in called} == {"functions.calculator"}
    assert not any(chunk.text or chunk.reasoning for chunk in called)


def test_plan_convert_and_what_saves_work(openelm, tmp_path):
    model, tokenizer = openelm
    assert om.plan("demo-openelm", memory_limit="1GB", context_length=256, batch_size=1).fits
    om.convert("demo-openelm", tmp_path / "converted", dtype="float16")
    converted, _ = om.load(tmp_path / "converted")
    assert converted.spec.num_parameters() == model.spec.num_parameters()
    cache = om.PrefixCache()
    options = {"max_tokens": 4, "sampling": om.SamplingParams(temperature=0.0)}
    plain = om.generate(model, tokenizer, "What is a banjo?", **options)
    for more in (
        {"prefix_cache": cache},
        {"prefix_cache": cache},
        {"draft": om.PromptLookup()},
        {"draft": om.DraftModel(converted)},
    ):
        assert om.generate(model, tokenizer, "What is a banjo?", **options, **more) == plain


def test_a_mistake_is_a_user_error():
    with pytest.raises(om.UserError):
        om.load("no-such-model")
    assert issubclass(om.NoAnswerWarning, Warning)
