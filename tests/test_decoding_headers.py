"""Headers that a rule allows: what gpt-oss writes by itself goes through, and nothing else does."""

import random
from pathlib import Path

import numpy as np
import pytest

from openelm_mlx.decoding.constraint import HarmonyConstraint
from openelm_mlx.decoding.grammar import answer_format, engine_of
from openelm_mlx.decoding.headers import HeaderRule
from openelm_mlx.engine.calling import calling_of, rule_of
from openelm_mlx.errors import SettingError
from openelm_mlx.text.builtin_tools import BROWSER, PYTHON
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.schema import ToolNamespace
from openelm_mlx.text.tokenizer import load_tokenizer

F, G = "functions.f", "functions.f_and_more"
THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
ARGUMENTS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


@pytest.fixture(scope="module")
def harmony():
    return HarmonyFormat(load_tokenizer(Path(__file__).parent.parent / "openelm_mlx" / "demo" / "gpt_oss"))


def constraint(harmony, rule, answer=None, channel=None, calls=(F, G)):
    formats = {name: answer_format(ARGUMENTS) for name in calls}
    form = None if answer is None else answer_format(answer)
    return HarmonyConstraint(harmony, engine_of(harmony.tokenizer), form, formats, 200, rule, channel)


def allowed(constraint) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist())


def goes_through(constraint, harmony, markup: str) -> bool:
    for token in harmony.encode_markup(markup):
        if token not in allowed(constraint):
            assert not constraint.accept(token)
            return False
        assert constraint.accept(token)
    return True


CALLS = [
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.f_and_more<|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.f json<|message|>",
    "<|channel|>analysis to=functions.f code<|message|>",
    "<|channel|>commentary to=functions.f<|message|>",
    " to=functions.f<|channel|>commentary json<|message|>",
    " to=functions.f_and_more<|channel|>commentary <|constrain|>json<|message|>",
    " to=functions.f<|channel|>analysis code<|message|>",
]
OTHERS = ["<|channel|>final<|message|>Yes", "<|channel|>commentary<|message|>Wait", "<|channel|>analysis<|message|>Hm"]
BAD = [
    "<|channel|>commentary to=functions.h<|message|>", "<|channel|>commentary to=python code<|message|>", "<|message|>",
    "<|channel|><|message|>", "<|channel|>finally<|message|>", "Yes", "<|channel|>final to=functions.f<|message|>",
    "<|channel|>commentary to=functions.f to=functions.f<|message|>", "<|start|>", "<|return|>", "user",
    "<|channel|>analysis<|channel|>final<|message|>", "<|channel|>commentary to= functions.f<|message|>",
]  # fmt: skip


@pytest.mark.parametrize("before", ["", THOUGHT])
def test_where_it_may_call(harmony, before):
    for header in CALLS:
        one = constraint(harmony, HeaderRule((F, G)))
        assert goes_through(one, harmony, before + header + '{"x":12}<|call|>')
        assert one.is_finished
    for markup in OTHERS:
        assert goes_through(constraint(harmony, HeaderRule((F, G))), harmony, before + markup)
    for markup in BAD:
        assert not goes_through(constraint(harmony, HeaderRule((F, G))), harmony, before + markup), markup


def test_where_it_has_to_call(harmony):
    rule = HeaderRule((F,), is_required=True)
    for before in ("", THOUGHT, THOUGHT + "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"):
        for header in CALLS:
            assert goes_through(constraint(harmony, rule), harmony, before + header) == ("more" not in header)
        assert not goes_through(constraint(harmony, rule), harmony, before + OTHERS[0])
    assert not goes_through(constraint(harmony, rule), harmony, THOUGHT + OTHERS[2])  # it has thought already
    two = THOUGHT + "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
    assert not goes_through(constraint(harmony, rule), harmony, two + OTHERS[1])
    assert not goes_through(constraint(harmony, rule), harmony, "<|channel|>analysis<|message|>Hm.<|return|>")


def test_where_it_may_not_call(harmony):
    for header in CALLS:
        assert not goes_through(constraint(harmony, HeaderRule(()), calls=()), harmony, THOUGHT + header)
    for markup in OTHERS:
        assert goes_through(constraint(harmony, HeaderRule(()), calls=()), harmony, THOUGHT + markup)
    assert goes_through(constraint(harmony, HeaderRule(()), calls=()), harmony, THOUGHT + OTHERS[0] + "<|return|>")


def test_where_it_may_not_think(harmony):
    rule = HeaderRule((F,), may_think=False)
    assert not goes_through(constraint(harmony, rule), harmony, OTHERS[2])
    assert goes_through(constraint(harmony, rule), harmony, CALLS[0])
    begun = constraint(harmony, HeaderRule((), may_think=False), channel="final", calls=())
    assert goes_through(begun, harmony, "Yes.")
    assert not goes_through(begun, harmony, "<|end|>")
    assert goes_through(begun, harmony, "<|return|>")


def test_an_answer_in_a_format_is_all_that_is_said(harmony):
    rule = HeaderRule((F,), has_format=True)
    one = constraint(harmony, rule, ARGUMENTS)
    assert goes_through(one, harmony, THOUGHT + '<|channel|>final <|constrain|>json<|message|>{"x":1}<|return|>')
    assert one.is_finished
    assert not goes_through(constraint(harmony, rule, ARGUMENTS), harmony, THOUGHT + OTHERS[1])
    begun = constraint(harmony, HeaderRule((), may_think=False, has_format=True), ARGUMENTS, "final", ())
    assert goes_through(begun, harmony, '{"x":1}<|return|>')


def test_any_way_through_the_headers_is_read_as_one_of_them(harmony):
    """Tokens drawn from the masks, in whatever pieces: the parser finds a known channel and a known function."""
    for seed in range(60):
        draw, parser, tokens = random.Random(seed), harmony.parser(), []
        one = constraint(harmony, HeaderRule((F, G)))
        while parser.channel is None:
            token = draw.choice(sorted(allowed(one)))
            assert one.accept(token)
            parser.push(token)
            tokens.append(token)
        assert parser.recipient in (None, F, G), harmony.decode_markup(tokens)
        assert parser.channel in ("analysis", "commentary", "final")
        assert not parser.messages


def test_headers_are_taken_back(harmony):
    one = constraint(harmony, HeaderRule((F, G)))
    tokens = harmony.encode_markup(THOUGHT + CALLS[0] + '{"x":1}<|call|>')
    masks = []
    for token in tokens:
        masks.append(one.mask().copy())
        assert one.accept(token)
    for count in (1, 3, 9, len(tokens)):
        one.rewind(count)
        for token, mask in zip(tokens[-count:], masks[-count:], strict=True):
            assert (one.mask() == mask).all()
            assert one.accept(token)


def test_what_tools_and_tool_choice_mean():
    tools = [{"type": "function", "function": {"name": "f", "parameters": ARGUMENTS}}, {"name": "g"}]
    assert calling_of(tools, "none") is None
    assert calling_of((), None) is None
    assert calling_of(tools, None).recipients == ("functions.f", "functions.g")
    assert calling_of(tools, "functions.g").recipients == ("functions.g",)
    assert rule_of(calling_of(tools, "functions.g"), "functions.g", False, True).is_required
    assert rule_of(None, None, False, True) is None
    for wrong in ("f", "sometimes", 5, [], "functions.h"):
        with pytest.raises(SettingError, match="tool_choice is"):
            calling_of(tools, wrong)
    with pytest.raises(SettingError, match="request has no tools"):
        calling_of((), "required")
    with pytest.raises(SettingError, match="Two tools"):
        calling_of([*tools, {"name": "g"}], None)


def test_the_tools_that_it_was_trained_with_are_called_by_their_own_names(harmony):
    tools = [{"name": "f", "parameters": ARGUMENTS}, PYTHON, BROWSER]
    calling = calling_of(tools, None)
    names = ("functions.f", "browser.search", "browser.open", "browser.find", "python")
    assert sorted(calling.recipients) == sorted(names)
    assert set(calling.schemas(None)) == set(names) - {"python"}
    assert calling_of(tools, "python").recipients == ("python",)
    assert calling_of([PYTHON], None).recipients == ("python",)
    for markup in (
        "<|channel|>analysis to=python code<|message|>",
        " to=browser.open<|channel|>analysis code<|message|>",
    ):
        assert goes_through(constraint(harmony, rule_of(calling, None, False, True)), harmony, markup)
    with pytest.raises(SettingError, match="Two tools"):
        calling_of([PYTHON, PYTHON], None)
    with pytest.raises(SettingError, match="'files' is none that gpt-oss was trained with"):
        calling_of([ToolNamespace("files")], None)
    with pytest.raises(SettingError, match="the tools are f, python: choose"):
        calling_of([tools[0], PYTHON], "g")
