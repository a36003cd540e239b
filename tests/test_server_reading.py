"""From chunks to parts: where items begin and end, in well-formed answers and in those that are not."""

import random
from pathlib import Path

import pytest

from openelm_mlx.decoding.sampling import SamplingParams
from openelm_mlx.engine.request import Request
from openelm_mlx.engine.sequence import Sequence
from openelm_mlx.server.parts import AnswerBuilder, Finished, ItemDone, ItemStarted, ItemText
from openelm_mlx.server.reading import AnswerReader, TokenTexts
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.streams import HarmonyStream
from openelm_mlx.text.tokenizer import load_tokenizer


class Clock:
    """Statistics without times."""

    def __init__(self, num_tokens):
        self.prompt_tokens, self.cached_tokens, self.completion_tokens = 7, 2, num_tokens

    def token_arrived(self):
        pass

    def token_is_answer(self):
        pass

    def statistics(self, *_):
        return self


@pytest.fixture(scope="module")
def harmony():
    return HarmonyFormat(load_tokenizer(Path(__file__).parent.parent / "openelm_mlx" / "demo" / "gpt_oss"))


def chunks_of(harmony, tokens, stop=()):
    request = Request([1], None, SamplingParams(), None, None, None, None, limit=len(tokens))
    sequence = Sequence(request, HarmonyStream(harmony.tokenizer, stop), ())
    sequence.clock = Clock(len(tokens))
    for token in tokens:
        yield sequence.accept(token, -0.5, {token: -0.5})
        if sequence.finish_reason is not None:
            return


def parts_of(harmony, tokens, recipients=("functions.f",), stop=(), cut=1):
    """The parts, read `cut` chunks at a time; checked for their grammar."""
    reader = AnswerReader(0, recipients, TokenTexts(harmony.tokenizer), True, len(stop))
    chunks = list(chunks_of(harmony, tokens, stop))
    parts = [part for at in range(0, len(chunks), cut) for part in reader.read(chunks[at : at + cut])]
    is_open, text = False, ""
    for part in parts[:-1]:
        assert isinstance(part, ItemStarted) == (not is_open), parts
        if isinstance(part, ItemStarted):
            is_open, text = True, ""
        elif isinstance(part, ItemText):
            assert part.text
            text += part.text
        else:
            assert isinstance(part, ItemDone)
            assert part.text == text
            is_open = False
    assert not is_open
    assert isinstance(parts[-1], Finished)
    return parts


def items_of(parts):
    builder = AnswerBuilder()
    for part in parts:
        builder.add(part)
    [answer] = builder.answers
    return [(item.kind, item.name, item.text) for item in answer.items], answer.reason


CASES = [
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        [("reasoning", None, "Hm."), ("message", None, "Yes.")], "stop",
    ),
    (
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>B<|end|><|start|>assistant"
        '<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x"'
        ":1}<|call|>",
        [("reasoning", None, "A"), ("reasoning", None, "B"), ("message", None, "Wait."), ("call", "f", '{"x":1}')],
        "tool_calls",
    ),
    # A call without arguments, one by its bare name, one of a function that nobody knows.
    ("<|channel|>commentary to=functions.f<|message|><|call|>", [("call", "f", "{}")], "tool_calls"),
    ("<|channel|>commentary to=f<|message|>{}<|call|>", [("call", "f", "{}")], "tool_calls"),
    ("<|channel|>commentary to=functions.g<|message|>{}<|call|>", [("call", "g", "{}")], "tool_calls"),
    # Malformed: no header, no message token, a call that is cut.
    ("I cannot help with that.<|return|>", [("message", None, "I cannot help with that.")], "stop"),
    ("<|channel|>final I am here.<|return|>", [("message", None, "I am here.")], "stop"),
    ('<|channel|>commentary to=functions.f<|message|>{"x"', [("call", "f", '{"x"')], "length"),
    ("<|channel|>analysis<|message|>So", [("reasoning", None, "So")], "length"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_items(harmony, case):
    markup, items, reason = CASES[case]
    tokens = harmony.encode_markup(markup)
    for cut in (1, 2, 5, len(tokens)):
        found, ended = items_of(parts_of(harmony, tokens, cut=cut))
        assert [(kind, name, text.strip()) for kind, name, text in found] == items
        assert ended == reason


def test_without_functions_a_call_is_what_the_model_says(harmony):
    tokens = harmony.encode_markup('<|channel|>commentary to=functions.f json<|message|>{"x":1}<|call|>')
    assert items_of(parts_of(harmony, tokens, recipients=())) == ([("message", None, '{"x":1}')], "stop")


def test_any_tokens_at_all_are_items_that_come_in_order(harmony):
    """Random markup: never an error, never a part out of place, and the same items however the chunks are cut."""
    pieces = [
        "<|start|>",
        "assistant",
        "<|channel|>",
        "final",
        "analysis",
        "commentary",
        " to=functions.f",
        "<|message|>",
    ]
    pieces += ["<|end|>", " json", "<|constrain|>", "stop here", " Yes", "{}", "user", "<|call|>", "é", "\U0001f600"]
    for seed in range(150):
        draw = random.Random(seed)
        tokens = [token for _ in range(25) for token in harmony.encode_markup(draw.choice(pieces))]
        for stop in ((), ("stop here",)):
            one = items_of(parts_of(harmony, tokens, stop=stop))
            assert items_of(parts_of(harmony, tokens, stop=stop, cut=7)) == one
            assert items_of(parts_of(harmony, tokens, stop=stop, cut=1000)) == one


def test_log_probabilities_are_those_of_the_text_that_is_shown(harmony):
    text = "A \U0001f600 and stop, no more"
    markup = f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{text}"
    for stop, shown in ((), text), ((" stop, no",), "A \U0001f600 and"):
        parts = parts_of(harmony, harmony.encode_markup(markup), stop=stop)
        texts = [part for part in parts if isinstance(part, ItemText) and part.logprobs]
        scored = b"".join(bytes(token.bytes) for part in texts for token in part.logprobs)
        assert scored.decode() == shown
        assert parts[-1].stop_string == (stop[0] if stop else None)
        assert parts[-1].usage.reasoning_tokens > 0
