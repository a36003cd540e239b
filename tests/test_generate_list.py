"""`om.generate` with a list: which lists are several prompts, and what is said of one of them."""

import numpy as np
import pytest
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.errors import NoAnswerWarning, PromptError, SettingError


@pytest.fixture(scope="module")
def demo():
    return om.load(short_demo("demo-openelm"), dtype="float32")


def test_prompts_of_every_kind(demo):
    model, tokenizer = demo
    messages = [{"role": "user", "content": "a river"}]
    prompts = ["a river", [5, 6], (5, 6), np.array([5, 6]), messages, tuple(messages)]
    expected = [om.generate(model, tokenizer, each, max_tokens=3) for each in prompts]
    assert om.generate(model, tokenizer, prompts, max_tokens=3) == expected
    assert om.generate(model, tokenizer, tuple(prompts), max_tokens=3) == expected
    assert om.generate(model, tokenizer, ["a river"], max_tokens=3) == expected[:1]


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ([], "The prompt is empty"),
        (["a", 5], "Number 2 in the list of 2 prompts is of type int: each has to be text"),
        ([5, "a"], "Number 1 in the list of 2 prompts is of type int"),
        (["a", None, "b"], "Number 2 in the list of 3 prompts is of type NoneType"),
        (["a", {"role": "user", "content": "b"}], "Number 2 in the list of 2 prompts is of type dict"),
        (["a", "b", " "], "Prompt 3 of 3: The prompt is empty: give some text"),
        ([[5], []], "Prompt 2 of 2: The prompt is empty: give at least one token"),
        ([[5], [10**9]], "Prompt 2 of 2: The prompt has token 1000000000"),
        ([[["a"]]], "Prompt 1 of 1: The prompt is a list with"),
    ],
)
def test_what_is_no_list_of_prompts(demo, prompts, told):
    with pytest.raises(PromptError, match=told):
        om.generate(*demo, prompts, max_tokens=2)


def test_one_prompt_where_several_are_given(demo):
    with pytest.raises(PromptError, match=r"give one prompt here; om\.generate takes a list of them"):
        om.stream_generate(*demo, ["a", "b"])
    with om.Engine(*demo) as engine, pytest.raises(PromptError, match=r"om\.generate takes a list"):
        engine.submit(["a", "b"])


def test_a_wrong_option_is_nobodys_in_particular(demo):
    with pytest.raises(SettingError, match=r"^max_tokens"):
        om.generate(*demo, ["a", "b"], max_tokens=0)


def test_the_prompt_without_an_answer_is_named():
    model, tokenizer = om.load("demo-gpt-oss")
    with pytest.warns(NoAnswerWarning) as warned:
        answers = om.generate(model, tokenizer, ["a river", "a cat"], max_tokens=2)
    assert answers == ["", ""]
    assert [str(each.message).split(":")[0] for each in warned] == ["Prompt 1 of 2", "Prompt 2 of 2"]
    assert all(each.filename == __file__ for each in warned)
