"""Constraints over tokens: within a budget, only where they belong in Harmony, and exact when tokens are taken back."""

import gc
import json
import random
import weakref
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_model
from jsonschema import Draft202012Validator

import openelm_mlx as om
from openelm_mlx.decoding import constraint as constraint_module
from openelm_mlx.decoding.constraint import HarmonyConstraint, PlainConstraint, Span
from openelm_mlx.decoding.grammar import answer_format, engine_of
from openelm_mlx.decoding.sampling import Sampler, SamplingParams, unpacked
from openelm_mlx.decoding.step import PlainStep
from openelm_mlx.decoding.tokens import constrained_source, drive
from openelm_mlx.errors import SettingError, TokenizerError
from openelm_mlx.generate import prefill, stream_generate
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SCHEMAS = json.loads((ROOT / "examples" / "structured" / "schemas.json").read_text(encoding="utf-8"))
WORD = {
    "type": "object",
    "properties": {"word": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["word", "count"],
}


@cache
def tokenizer_of(demo: str):
    return load_tokenizer(ROOT / "openelm_mlx" / "demo" / demo)


@cache
def demo(name: str):
    return om.load(name)


def allowed(words) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def is_valid(text: str, schema) -> bool:
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).is_valid(json.loads(text))


def write_at_random(constraint, max_tokens: int, seed: int, end_tokens) -> list[int]:
    """Tokens drawn evenly from the mask, as by a model that knows nothing, until the constraint is finished."""
    draw, tokens = random.Random(seed), []
    while len(tokens) < max_tokens and not constraint.is_finished:
        choices = allowed(constraint.mask())
        token = draw.choice([c for c in choices if c not in end_tokens] or choices)  # never an end if there is more
        if constraint.accept(token):
            tokens.append(token)
        else:
            (token,) = allowed(constraint.mask())
            assert constraint.accept(token)
            tokens.append(token)
    return tokens


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("demo_name", ["openelm", "gpt_oss"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_writer_that_never_wants_to_end_ends_within_its_tokens(demo_name, name):
    tokenizer = tokenizer_of(demo_name)
    engine, ends = engine_of(tokenizer), tokenizer.eos_tokens
    answer = answer_format(SCHEMAS[name])
    shortest = len(engine.matcher(answer).completion()) + 1
    for max_tokens in (shortest, shortest + 17, shortest + 60):
        constraint = PlainConstraint(engine, answer, ends, max_tokens)
        tokens = write_at_random(constraint, max_tokens, seed=max_tokens, end_tokens=ends)
        assert constraint.is_finished
        assert tokens[-1] in ends
        assert is_valid(tokenizer.decode(tokens[:-1], continuation=True), SCHEMAS[name])
    with pytest.raises(SettingError, match=f"takes {shortest} tokens"):
        PlainConstraint(engine, answer, ends, shortest - 1)


def test_without_the_budget_the_same_writer_does_not_end():
    """So the budget is what ends it, not the writer's good will."""
    tokenizer = tokenizer_of("gpt_oss")
    constraint = PlainConstraint(engine_of(tokenizer), answer_format(SCHEMAS["word"]), tokenizer.eos_tokens, 10**6)
    write_at_random(constraint, 150, seed=0, end_tokens=tokenizer.eos_tokens)
    assert not constraint.is_finished


def test_rewinding_a_constraint_is_as_if_it_had_not_been():
    tokenizer = tokenizer_of("gpt_oss")
    engine, answer = engine_of(tokenizer), answer_format(SCHEMAS["invoice"])
    draw = random.Random(1)
    for seed in range(3):
        constraint = PlainConstraint(engine, answer, tokenizer.eos_tokens, 150)
        masks, tokens = [constraint.mask()], []
        for token in write_at_random(PlainConstraint(engine, answer, tokenizer.eos_tokens, 400), 140, seed, ()):
            if not constraint.accept(token):
                break
            tokens.append(token)
            masks.append(constraint.mask())
        for _ in range(20):
            count = draw.randrange(1, 9)
            constraint.rewind(count)
            assert (constraint.mask() == masks[len(tokens) - count]).all()
            for token in tokens[len(tokens) - count :]:
                assert constraint.accept(token)


def nested(levels: int) -> dict:
    """Objects that each ask for the next one twice: the shortest answer doubles with each level."""
    schema: dict = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a", "b"]}
    return schema


LONG = [
    nested(5),
    {"type": "array", "items": {}, "minItems": 100, "maxItems": 100},
    {"type": "string", "minLength": 1500},
    {"type": "array", "items": {"type": "string", "format": "uuid"}, "minItems": 15},
]


def limit_steps(monkeypatch, at_once: int, a_token: int) -> None:
    monkeypatch.setattr(constraint_module, "_STEPS_AT_ONCE", at_once)
    monkeypatch.setattr(constraint_module, "_STEPS_A_TOKEN", a_token)


# With a little more than three times the tokens of the shortest answer a search is due for every second token.
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("schema", LONG, ids=lambda schema: schema.get("type"))
def test_searches_take_no_more_steps_than_the_tokens_pay_for(monkeypatch, schema, times):
    """A long rest that the format asks for, in tight room: without the count each token would search through all of it."""
    tokenizer = tokenizer_of("openelm")
    engine, ends, answer = engine_of(tokenizer), tokenizer.eos_tokens, answer_format(schema)
    matcher = engine.matcher(answer)
    room = times * len(matcher.completion()) + 20
    num_steps, num_tokens, once = [], [], matcher.num_steps + 200
    for at_once in (once, 10**9):
        limit_steps(monkeypatch, at_once, 1)
        constraint = PlainConstraint(engine, answer, ends, room)
        tokens = write_at_random(constraint, room, seed=4, end_tokens=ends)
        assert tokens[-1] in ends
        assert is_valid(tokenizer.decode(tokens[:-1], continuation=True), schema)
        num_steps.append(constraint._span.matcher.num_steps)
        num_tokens.append(len(tokens))
    assert num_steps[0] <= 3 * once + num_tokens[0] < num_steps[1] // 2  # a last search may exceed what is left


def test_a_format_that_does_not_fit_into_what_is_left_is_not_searched_for_at_each_token(monkeypatch):
    tokenizer = tokenizer_of("openelm")
    engine = engine_of(tokenizer)
    matcher = engine.matcher(answer_format(nested(5)))
    tokens = matcher.completion()
    num_steps = []
    for at_once in (0, 10**9):
        limit_steps(monkeypatch, at_once, 1)
        span = Span(engine.matcher(answer_format(nested(5))), tokenizer.eos_tokens)
        for i, token in enumerate(tokens[:60]):
            assert span.accept(token, 61 - i)
        num_steps.append(span.matcher.num_steps)
    assert num_steps[0] <= 3 * matcher.num_steps + 60 < num_steps[1]


def test_tokens_taken_back_lead_to_the_known_end(monkeypatch):
    """As drafts do: what is refused is taken back each time, and nothing is searched for again."""
    tokenizer = tokenizer_of("openelm")
    engine, ends, answer = engine_of(tokenizer), tokenizer.eos_tokens, answer_format(nested(5))
    way = engine.matcher(answer).completion()
    limit_steps(monkeypatch, 10**9, 1)
    constraint = PlainConstraint(engine, answer, ends, len(way) + 20)
    for token in way[:20]:
        assert constraint.accept(token)
    num_steps = constraint._span.matcher.num_steps
    for count in (1, 5, 12):
        constraint.rewind(count)
        for token in way[20 - count : 20]:
            assert constraint.accept(token)
    assert constraint._span.matcher.num_steps == num_steps
    for token in (*way[20:], ends[0]):
        assert constraint.accept(token)
    assert constraint.is_finished


# --- Harmony ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harmony():
    return HarmonyFormat(tokenizer_of("gpt_oss"))


def harmony_constraint(harmony, answer=None, calls=None, max_tokens=400):
    formats = {name: answer_format(schema) for name, schema in (calls or {}).items()}
    answer = None if answer is None else answer_format(answer)
    return HarmonyConstraint(harmony, engine_of(harmony.tokenizer), answer, formats, max_tokens)


def feed(constraint, harmony, markup: str) -> None:
    for token in harmony.encode_markup(markup):
        words = constraint.mask()
        assert words is None or words[token >> 5] >> (token & 31) & 1, (markup, token)
        assert constraint.accept(token)


ANALYSIS = "<|channel|>analysis<|message|>Not JSON at all: ]}<|end|><|start|>assistant"


def test_the_reasoning_and_harmony_s_own_tokens_are_free(harmony):
    constraint = harmony_constraint(harmony, WORD)
    feed(constraint, harmony, ANALYSIS + "<|channel|>commentary<|message|>a plan<|end|><|start|>assistant")
    assert constraint.is_free()
    feed(constraint, harmony, "<|channel|>final <|constrain|>json<|message|>")
    assert not constraint.is_free()
    assert allowed(constraint.mask()) == harmony.encode_markup("{")
    feed(constraint, harmony, '{"word": "a <|')  # typed, not control tokens
    assert not set(allowed(constraint.mask())) & harmony.control_tokens
    feed(constraint, harmony, '", "count": 1}')
    assert set(allowed(constraint.mask())) & harmony.control_tokens == {harmony.return_}
    feed(constraint, harmony, "<|return|>")
    assert constraint.is_finished


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
        " to=functions.f<|channel|>commentary json<|message|>",
        "<|channel|>analysis to=functions.f code<|message|>",
        "<|channel|>commentary to=f<|message|>",
    ],
)
def test_a_call_s_arguments_follow_its_tool_s_schema(harmony, header):
    constraint = harmony_constraint(harmony, None, {"functions.f": WORD, "functions.g": {"type": "boolean"}})
    assert constraint.mask() is None
    feed(constraint, harmony, ANALYSIS + header + '{"word": "x", "count": 2')
    assert not constraint.accept(harmony.call)
    feed(constraint, harmony, "}")
    assert set(allowed(constraint.mask())) & harmony.control_tokens == {harmony.call}
    feed(constraint, harmony, "<|call|>")
    assert constraint.is_finished


def test_python_s_scripts_and_unknown_tools_are_free(harmony):
    for header in (" to=python<|channel|>analysis code<|message|>", "<|channel|>commentary to=functions.h<|message|>"):
        constraint = harmony_constraint(harmony, None, {"functions.f": WORD})
        feed(constraint, harmony, header)
        assert constraint.is_free()
        assert constraint.mask() is None


def test_an_answer_cannot_be_left_out(harmony):
    """With a format the completion must not end before its final message, whatever the model would like."""
    constraint = harmony_constraint(harmony, WORD)
    assert not set(allowed(constraint.mask())) & (harmony.end_tokens | {harmony.start})
    feed(constraint, harmony, "<|channel|>analysis<|message|>I refuse.")
    banned = {harmony.return_, harmony.call, harmony.tokenizer.special_tokens["<|endoftext|>"]}
    assert set(range(harmony.tokenizer.vocab_size)) - set(allowed(constraint.mask())) == banned
    feed(constraint, harmony, "<|end|>")
    assert harmony.start in allowed(constraint.mask())
    # A header that does not end is ended one token before the parser would take it for an answer.
    header = [harmony.start, *harmony.encode_markup("assistant<|channel|>final"), *harmony.encode_markup(" word") * 99]
    parser = harmony.parser()
    parser.push(harmony.end)
    for token in header:
        if allowed(constraint.mask()) == [harmony.message]:
            break
        assert constraint.accept(token)
        parser.push(token)
    assert allowed(constraint.mask()) == [harmony.message]
    assert parser.channel is None
    parser.push(harmony.message)
    assert parser.channel == "final"


def test_a_line_that_strays_between_messages_does_not_shut_the_next_one_out(harmony):
    constraint = harmony_constraint(harmony, WORD)
    feed(
        constraint,
        harmony,
        "<|channel|>analysis<|message|>a<|end|>Hm. So.<|start|>assistant<|channel|>final<|message|>",
    )
    feed(constraint, harmony, '{"word": "a", "count": 1}<|return|>')
    assert constraint.is_finished
    constraint = harmony_constraint(harmony, WORD)
    feed(constraint, harmony, "<|channel|>analysis<|message|>a<|end|>Hm.")
    assert not set(allowed(constraint.mask())) & harmony.end_tokens  # it would end with nothing
    feed(constraint, harmony, "<|channel|>final")
    assert harmony.start not in allowed(constraint.mask())


def test_the_tracker_is_where_the_parser_is(harmony):
    """Random streams of markup: the channel and recipient of every token are those of HarmonyParser."""
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
    pieces += ["<|end|>", "<|call|>", " json", "<|constrain|>", "1", "true", "x"]
    for seed in range(200):
        draw = random.Random(seed)
        constraint = harmony_constraint(harmony, None, {"functions.g": WORD})
        parser = harmony.parser()
        for _ in range(25):
            for token in harmony.encode_markup(draw.choice(pieces)):
                parser.push(token)
                assert constraint.accept(token)
            message = constraint._spots[-1].place.message
            found = (None, None) if message is None else (message.channel, message.recipient)
            assert found == (parser.channel, parser.recipient)


def test_harmony_places_are_taken_back(harmony):
    constraint = harmony_constraint(harmony, WORD, {"functions.f": {"type": "boolean"}})
    tokens = harmony.encode_markup(ANALYSIS + '<|channel|>final<|message|>{"word": "ab", "count": 12}<|return|>')
    masks = [constraint.mask()]
    for token in tokens:
        assert constraint.accept(token)
        masks.append(constraint.mask() if not constraint.is_finished else None)
    for count in (1, 2, 9, 20, len(tokens)):
        constraint.rewind(count)
        assert not constraint.is_finished
        assert (constraint.mask() == masks[len(tokens) - count]).all()
        for token in tokens[len(tokens) - count :]:
            assert constraint.accept(token)


# --- The loop ---------------------------------------------------------------------------------------------------------


def naive(model, prompt, constraint, sampler, max_tokens) -> list[int]:
    """No cache and nothing ahead: the whole sequence anew for each token, then the mask, then the choice."""
    tokens = []
    while len(tokens) < max_tokens and not constraint.is_finished:
        logits = model(mx.array([[*prompt, *tokens]]))[0, -1]
        while True:
            words, state = constraint.mask(), sampler.state
            mask = None if words is None else unpacked(mx.array(words), logits.size)
            token = sampler(logits, mask).item()
            if constraint.accept(token):
                break
            sampler.state = state
        tokens.append(token)
    return tokens


@pytest.mark.slow(first=1)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_p": 0.9}, {"frequency_penalty": 0.7, "temperature": 0.5}]
)
@pytest.mark.parametrize("has_format", [True, False])
def test_the_loop_is_the_naive_loop(harmony, options, has_format):
    """Random weights under Harmony, reasoning and all: looking ahead in free text changes nothing."""
    vocab_size = harmony.tokenizer.vocab_size
    model = random_model(vocab_size, context_length=256)
    prompt = [5, 900, 31, 77]
    opening = harmony.encode_markup(
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>"
    )

    def constraint():
        made = (
            harmony_constraint(harmony, WORD, max_tokens=120) if has_format else harmony_constraint(harmony, None, {})
        )
        for token in opening[: -1 if has_format else 3]:
            assert made.accept(token)
        return made

    # With the format the first token ends the header: the next, chosen ahead as free text, has to be chosen again.
    params = SamplingParams(seed=3, logit_bias={harmony.message: 60.0 if has_format else 4.0}, **options)
    expected = naive(model, prompt, constraint(), Sampler(params, vocab_size, vocab_size), 40)
    step = PlainStep(model, model.make_cache())
    logits = prefill(model, prompt, step.cache, 512)
    source = constrained_source(step, Sampler(params, vocab_size, vocab_size), logits, 40, constraint())
    choices = drive(step, source)
    assert [choice.item() for choice in choices] == expected
    assert (expected[0] == harmony.message) == has_format


@pytest.mark.parametrize("seed", range(4))
def test_a_step_with_a_token_that_is_not_accepted_is_taken_back(monkeypatch, seed):
    """So few tokens that a format can be finished only by force: the naive loop's tokens, and nothing else in the cache."""
    tokenizer = tokenizer_of("gpt_oss")
    model = random_model(tokenizer.vocab_size, context_length=256)
    prompt, refused = [5, 900, 31, 77], []
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    real = PlainConstraint.accept

    def accept(self, token):
        accepted = real(self, token)
        refused.append(token) if not accepted else None
        return accepted

    monkeypatch.setattr(PlainConstraint, "accept", accept)

    def run(loop):
        constraint = PlainConstraint(engine_of(tokenizer), answer_format(schema), tokenizer.eos_tokens, 20)
        params = SamplingParams(temperature=1.5, seed=seed, frequency_penalty=0.3)
        return loop(constraint, Sampler(params, tokenizer.vocab_size, tokenizer.vocab_size))

    expected = run(lambda constraint, sampler: naive(model, prompt, constraint, sampler, 20))
    assert refused
    step = PlainStep(model, model.make_cache())
    logits = prefill(model, prompt, step.cache, 512)
    assert [
        choice.item() for choice in run(lambda c, s: drive(step, constrained_source(step, s, logits, 20, c)))
    ] == expected
    assert step.cache[0].offset - len(prompt) in (len(expected) - 1, len(expected))


def test_the_next_step_is_dispatched_before_the_mask_is_computed(monkeypatch):
    tokenizer = tokenizer_of("gpt_oss")
    model = random_model(tokenizer.vocab_size, context_length=256)
    step = PlainStep(model, model.make_cache())
    logits = prefill(model, [5, 6], step.cache, 512)
    constraint = PlainConstraint(engine_of(tokenizer), answer_format({"type": "string"}), tokenizer.eos_tokens, 100)
    events = []
    mask, evaluate = constraint.mask, mx.async_eval
    monkeypatch.setattr(PlainConstraint, "mask", lambda self: (events.append("mask"), mask())[1])
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (events.append("dispatch"), evaluate(*arrays))[1])
    sampler = Sampler(SamplingParams(), tokenizer.vocab_size, tokenizer.vocab_size)
    assert len(list(drive(step, constrained_source(step, sampler, logits, 4, constraint)))) == 4
    # A mask and a choice; then for each token the next step, its mask while that is computed, and the choice.
    assert events == ["mask", "dispatch"] + ["dispatch", "mask", "dispatch"] * 3


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("name", ["demo-openelm", "demo-gpt-oss"])
@pytest.mark.parametrize(
    ("schema", "temperature"), [("expression", 0.0), ("pattern, unanchored", 1.2), ("recipe", 0.7)]
)
def test_the_demos_answer_in_the_format(name, schema, temperature):
    model, tokenizer = demo(name)
    sampling = om.SamplingParams(temperature=temperature, seed=1)
    chunks = list(
        stream_generate(
            model, tokenizer, "What is a cat?", schema=SCHEMAS[schema], max_tokens=100, sampling=sampling, logprobs=1
        )
    )
    text = "".join(chunk.text for chunk in chunks)
    assert chunks[-1].finish_reason == "stop"
    assert is_valid(text, SCHEMAS[schema])
    assert all(chunk.logprob is not None and chunk.logprob <= 0 for chunk in chunks)


def test_gpt_oss_thinks_as_it_does_without_a_format():
    model, tokenizer = demo("demo-gpt-oss")

    def thoughts(**options):
        chunks = stream_generate(model, tokenizer, "What is a boat?", reasoning_effort="low", **options)
        return "".join(chunk.reasoning for chunk in chunks)

    assert thoughts(regex="(yes|no)") == thoughts() != ""


def test_a_regex_and_a_grammar_on_the_demos():
    for name in ("demo-openelm", "demo-gpt-oss"):
        model, tokenizer = demo(name)
        options = {"reasoning_effort": "low"} if name == "demo-gpt-oss" else {}
        question = "What is a boat?"
        assert om.generate(model, tokenizer, question, regex="(yes|no)!", **options) in ("yes!", "no!")
        assert om.generate(model, tokenizer, question, grammar='start: "a " ("cat" | "dog")', **options) in (
            "a cat",
            "a dog",
        )


def test_what_is_wrong_is_said_before_anything_runs():
    model, tokenizer = demo("demo-openelm")
    with pytest.raises(SettingError, match="takes 19 tokens"):
        stream_generate(model, tokenizer, "What is a cat?", schema=SCHEMAS["word"], max_tokens=5)
    with pytest.raises(SettingError, match="No answer in this format was found"):
        stream_generate(model, tokenizer, "Hi", grammar='start: "a" start')
    with pytest.raises(SettingError, match="tool_schemas"):
        stream_generate(model, tokenizer, "Hi", tool_schemas={"functions.f": WORD})
    with pytest.raises(TokenizerError, match="format"):
        stream_generate(model, None, [5], regex="a")


def test_a_bias_cannot_make_an_answer_invalid():
    model, tokenizer = demo("demo-openelm")
    texts = enumerate(engine_of(tokenizer).token_bytes)
    forbidden = {token: float("-inf") for token, data in texts if data[:1] in (b"y", b"n")}
    sampling = om.SamplingParams(logit_bias=forbidden)
    assert om.generate(model, tokenizer, "Is it?", regex="(yes|no)", sampling=sampling) in ("yes", "no")


@pytest.mark.parametrize("name", ["demo-openelm", "demo-gpt-oss"])
def test_a_tokenizer_is_let_go_after_an_answer_in_a_format(name):
    model, tokenizer = om.load(name)
    options = {"reasoning_effort": "low"} if name == "demo-gpt-oss" else {}
    assert om.generate(model, tokenizer, "Hi", regex="(yes|no)", max_tokens=400, **options)
    gone = weakref.ref(tokenizer)
    del model, tokenizer
    gc.collect()
    assert gone() is None
