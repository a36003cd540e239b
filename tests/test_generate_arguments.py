"""What a call from Python can get wrong is a sentence; and a call that has no answer to return says why."""

import dataclasses
import warnings

import mlx.core as mx
import pytest
from test_memory_limits import plan
from test_text_streams import Scripted

import openelm_mlx as om
from openelm_mlx.errors import NoAnswerWarning, PromptError, SettingError
from openelm_mlx.runtime import runtime_of
from openelm_mlx.text.tokenizer import load_tokenizer

THOUGHT = "<|channel|>analysis<|message|>I think about it at length.<|end|>"
ANSWER = "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
CALL = '<|start|>assistant<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>'


@pytest.fixture(scope="module")
def gpt_oss():
    return om.load("demo-gpt-oss")


@pytest.fixture(scope="module")
def openelm():
    return om.load("demo-openelm")


@pytest.fixture(scope="module")
def tokenizer(fixtures):
    tokenizer = load_tokenizer(fixtures / "harmony" / "tokenizer.json")
    tokenizer.chat_template = "harmony"
    return tokenizer


@pytest.fixture(scope="module")
def fixtures():
    from conftest import FIXTURES

    return FIXTURES


def warned(tokenizer, script: str, **options) -> tuple[str, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = om.generate(Scripted(tokenizer, script), tokenizer, "Hi", **options)
    assert all(each.category is NoAnswerWarning and each.filename == __file__ for each in caught)
    return text, [str(each.message) for each in caught]


# --- no answer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 3, 8, 11])
def test_reasoning_that_took_all_tokens_is_said_with_the_number_to_raise(tokenizer, max_tokens):
    text, (sentence,) = warned(tokenizer, THOUGHT + ANSWER, max_tokens=max_tokens)
    assert text == ""
    assert f"all {max_tokens} tokens" in sentence
    assert f"raise max_tokens above {max_tokens}," in sentence


def test_an_answer_however_short_is_no_warning(tokenizer):
    assert warned(tokenizer, THOUGHT + ANSWER) == ("Yes.", [])
    whole = len(list(om.stream_generate(Scripted(tokenizer, THOUGHT + ANSWER), tokenizer, "Hi")))
    assert warned(tokenizer, THOUGHT + ANSWER, max_tokens=whole - 2)[1] == []  # cut short, but an answer
    assert warned(tokenizer, THOUGHT + ANSWER, stop=["Yes"]) == ("", [])  # that is what was asked for
    assert warned(tokenizer, THOUGHT + ANSWER, raw=True, max_tokens=2)[1] == []  # text has no reasoning


def test_an_end_without_an_answer_and_a_call_are_said_too(tokenizer):
    text, (sentence,) = warned(tokenizer, THOUGHT + "<|return|>")
    assert (text, "without an answer" in sentence) == ("", True)
    text, (sentence,) = warned(tokenizer, THOUGHT + CALL)
    assert (text, "The model called functions.f" in sentence) == ("", True)
    (*chunks, _) = om.stream_generate(Scripted(tokenizer, THOUGHT + CALL), tokenizer, "Hi")
    text, (sentence,) = warned(tokenizer, THOUGHT + CALL, max_tokens=len(chunks) - 1)
    assert f"A call of functions.f used up all {len(chunks) - 1} tokens" in sentence
    assert warned(tokenizer, THOUGHT + ANSWER.replace("<|return|>", "<|end|>") + CALL) == ("Yes.", [])


def test_the_stream_s_statistics_say_the_same(tokenizer):
    def last(**options):
        return list(om.stream_generate(Scripted(tokenizer, THOUGHT + ANSWER), tokenizer, "Hi", **options))[
            -1
        ].statistics

    assert "raise max_tokens above 5" in last(max_tokens=5).no_answer
    assert last(max_tokens=5).reasoning_tokens == 5
    whole = last()
    assert whole.no_answer is None
    assert 0 < whole.reasoning_tokens < whole.completion_tokens


def test_gpt_oss_may_use_the_context_and_others_may_not(gpt_oss, openelm):
    model, tokenizer = gpt_oss
    *_, last = om.stream_generate(model, tokenizer, "What is a boat?", reasoning_effort="low")
    assert last.finish_reason == "stop"
    assert last.statistics.max_tokens == model.context_length - last.statistics.prompt_tokens
    assert next(iter(om.stream_generate(*openelm, "What is a banjo?", max_tokens=1))).statistics.max_tokens == 1
    (*_, last) = om.stream_generate(*openelm, "What is a banjo?")
    assert last.statistics.max_tokens == 256
    (*_, last) = om.stream_generate(model, tokenizer, "What is", raw=True, max_tokens=None)
    assert last.statistics.max_tokens == 256


def test_a_context_that_is_full_is_said_with_what_to_change():
    model, tokenizer = om.load("demo-gpt-oss", context_length=100)
    with pytest.warns(NoAnswerWarning, match="context had room for.*larger context_length"):
        assert om.generate(model, tokenizer, "What is a piano?") == ""


def test_without_a_number_the_memory_is_the_limit(gpt_oss):
    """An error would be wrong: nobody asked for so many tokens."""
    model, tokenizer = gpt_oss
    room = model.spec.kv_cache_bytes(8192, itemsize=4)
    try:
        made = plan(budget=mx.get_active_memory() + room)
        runtime_of(model).plan = dataclasses.replace(made, scratch_bytes=0, prefill_chunk=64)
        options = {"reasoning_effort": "low", "prefix_cache": om.PrefixCache()}
        *_, last = om.stream_generate(model, tokenizer, "What is a boat?", **options)
        used = last.statistics
        assert last.finish_reason == "stop"
        assert 256 < used.max_tokens <= 8192 - used.prompt_tokens
        with pytest.raises(om.UserError, match="memory"):
            om.generate(model, tokenizer, "What is a piano?", max_tokens=2**16)
    finally:
        runtime_of(model).plan = None


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.7}, r"write sampling=om\.SamplingParams\(temperature=0\.7\)"),
        ({"temp": 0.7, "top_k": 3, "max_tokens": 5}, r"sampling=om\.SamplingParams\(temperature=0\.7, top_k=3\)"),
        ({"max_token": 5}, "'max_token'. Did you mean max_tokens"),
        ({"max_new_tokens": 5}, "Did you mean max_tokens"),
        ({"nonsense": 5}, "There are: .*max_tokens, sampling"),
        ({"prefix_cache": True}, r"prefix_cache is True: give om\.PrefixCache\(\)"),
        ({"draft": "x"}, "draft is a str"),
        ({"tool_schemas": 5}, "tool_schemas is a int"),
        ({"sampling": {"temperature": 1}}, "sampling is a dict"),
    ],
)
def test_options_that_are_wrong(gpt_oss, options, said):
    for call in (om.generate, om.stream_generate):
        with pytest.raises(SettingError, match=said):
            call(*gpt_oss, "Hi", **options)


def test_what_is_no_model_is_told_how_to_be_one(gpt_oss):
    model, tokenizer = gpt_oss
    for call in (om.generate, om.stream_generate):
        with pytest.raises(SettingError, match=r"load it first, model, tokenizer = om\.load\('demo-openelm'\)"):
            call("demo-openelm", "What is a banjo?")
        with pytest.raises(SettingError, match="unpack it first"):
            call(gpt_oss, "What is a banjo?")
        with pytest.raises(SettingError, match="The model is a JsonTokenizer"):
            call(tokenizer, model, "What is a banjo?")
        with pytest.raises(SettingError, match="The tokenizer is a str"):
            call(model, "demo-gpt-oss", "What is a banjo?")
        with pytest.raises(PromptError, match="There is no prompt"):
            call(model, tokenizer)
    with pytest.raises(SettingError, match="load it first"):
        om.DraftModel("demo-gpt-oss")


def test_a_draft_model_of_another_tokenizer_is_refused_whoever_is_asked(gpt_oss, openelm):
    """Python's caller need not name the draft's tokenizer: the model knows what it was loaded with."""
    for draft, large in ((gpt_oss, openelm), (openelm, gpt_oss)):
        for made in (om.DraftModel(draft[0]), om.DraftModel(*draft)):
            for tokenizer, prompt in ((large[1], "What is a banjo?"), (None, [5, 6])):
                with pytest.raises(SettingError, match="must share the tokenizer"):
                    om.stream_generate(large[0], tokenizer, prompt, draft=made)
    again, _ = om.load("demo-gpt-oss")
    assert om.stream_generate(*gpt_oss, "What is a banjo?", draft=om.DraftModel(again))


@pytest.mark.parametrize("call", [om.load, om.plan, lambda *a, **k: om.convert(*a, "nowhere", **k)])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 1}, "it is for om.generate"),
        ({"revison": "x"}, "Did you mean revision"),
        ({"q": 1}, "There are: "),
    ],
)
def test_functions_say_what_to_write_for_a_keyword_they_do_not_have(call, options, said):
    with pytest.raises(SettingError, match=said):
        call("demo-openelm", **options)


def test_a_machine_is_no_name():
    with pytest.raises(SettingError, match="machine is 'M4'"):
        om.plan("demo-openelm", machine="M4")
