"""One sequence makes chunks of tokens, whoever hands it the tokens; its clock, its stops, and the loop around it."""

import itertools

import mlx.core as mx
import pytest
from conftest import FIXTURES, random_model

import openelm_mlx as om
from openelm_mlx.engine import runner, single, statistics
from openelm_mlx.engine.sequence import Sequence
from openelm_mlx.engine.single import new_sequence, run
from openelm_mlx.text.tokenizer import load_tokenizer

ENDLESS = om.SamplingParams(logit_bias={2: -1e9})


@pytest.fixture(scope="module")
def gpt_oss():
    return om.load("demo-gpt-oss")


@pytest.mark.parametrize("name", ["demo-openelm", "demo-gpt-oss"])
def test_a_sequence_fed_by_hand_gives_the_loop_s_chunks(name):
    """Whoever runs many requests uses the same sequence, and shows the same."""
    model, tokenizer = om.load(name)
    options = {"max_tokens": 30, "stop": ["vessel for", "instrument"]}
    if name == "demo-gpt-oss":
        options["reasoning_effort"] = "low"
    expected = list(om.stream_generate(model, tokenizer, "What is a boat?", **options))
    sequence = new_sequence(model, tokenizer, "What is a boat?", **options)
    chunks = [sequence.accept(chunk.token) for chunk in expected]
    shown = [(c.text, c.reasoning, c.channel, c.recipient, c.finish_reason) for c in expected]
    assert [(c.text, c.reasoning, c.channel, c.recipient, c.finish_reason) for c in chunks] == shown
    assert sequence.finish_reason == expected[-1].finish_reason
    assert sequence.tokens == [chunk.token for chunk in expected]


def test_a_sequence_has_the_messages_that_its_chunks_showed(gpt_oss):
    model, tokenizer = gpt_oss
    sequence = new_sequence(model, tokenizer, "What is a piano?", stop=[" keyboard"])
    chunks = list(run(model, tokenizer, sequence))
    thought, answer = sequence.messages
    assert (thought.channel, thought.text) == ("analysis", "".join(chunk.reasoning for chunk in chunks))
    assert (answer.channel, answer.text) == ("final", "".join(chunk.text for chunk in chunks))
    assert answer.text == "a"


def test_a_sequence_that_nobody_goes_on_with_has_what_was_being_written(gpt_oss):
    model, tokenizer = gpt_oss
    sequence = new_sequence(model, tokenizer, "What is a piano?")
    chunks = list(itertools.islice(run(model, tokenizer, sequence), 8))
    assert sequence.messages == []
    sequence.close()
    (message,) = sequence.messages
    assert message.text == "".join(chunk.reasoning for chunk in chunks)


def test_rates_are_tokens_over_the_time_between_them(monkeypatch):
    """The clock is looked at when the prompt begins and at each token: 2 s for 10 tokens of prompt, then 0.25 s a token."""
    times = iter([100.0, 102.0, 102.25, 102.5, 102.75])
    monkeypatch.setattr(statistics.time, "perf_counter", lambda: next(times))
    *_, last = om.stream_generate(random_model(), None, list(range(3, 13)), max_tokens=4, sampling=ENDLESS)
    found = last.statistics
    assert (found.prompt_tokens, found.completion_tokens) == (10, 4)
    assert (found.time_to_first_token, found.prefill_tps, found.decode_tps) == (2.0, 5.0, 4.0)


def test_the_rate_of_a_prompt_is_that_of_what_was_computed_of_it(monkeypatch):
    """Nine of its ten tokens were there already: one token in 2 s."""
    model, cache = random_model(), om.PrefixCache()
    options = {"max_tokens": 1, "sampling": ENDLESS, "prefix_cache": cache}
    list(om.stream_generate(model, None, list(range(3, 13)), **options))
    times = iter([100.0, 102.0])
    monkeypatch.setattr(statistics.time, "perf_counter", lambda: next(times))
    *_, last = om.stream_generate(model, None, list(range(3, 13)), **options)
    assert (last.statistics.cached_tokens, last.statistics.prefill_tps) == (9, 0.5)


def test_a_stop_string_may_become_whole_at_the_very_end():
    """Half a character is shown as U+FFFD when the tokens are over, and only then completes the stop string."""
    tokenizer = load_tokenizer(FIXTURES / "tokenizers" / "llama")
    first_byte = tokenizer.encode("\U00010348", continuation=True)[0]
    tokens = [*tokenizer.encode("ab", continuation=True), first_byte]
    options = {"max_tokens": len(tokens), "stop": ["b\ufffd"]}
    sequence = new_sequence(random_model(tokenizer.vocab_size), tokenizer, [5, 6], **options)
    chunks = [sequence.accept(token) for token in tokens]
    assert "".join(chunk.text for chunk in chunks) == "a"
    assert chunks[-1].finish_reason == "stop"


def test_freed_buffers_are_given_back_now_and_then(monkeypatch):
    calls = []
    monkeypatch.setattr(single, "CLEAR_CACHE_EVERY", 3)
    chunks = om.stream_generate(random_model(), None, [3, 4], max_tokens=8, sampling=ENDLESS)
    next(chunks)
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(len(received)))
    received = []
    for chunk in chunks:
        received.append(chunk)
    assert calls[:2] == [2, 5]  # before the fourth and the seventh token of eight


def test_an_engine_gives_freed_buffers_back_now_and_then(monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "CLEAR_CACHE_EVERY", 3)
    with om.Engine(random_model(), None) as engine:
        monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(engine._runner.num_steps))
        tokens = [chunk.token for chunk in engine.submit([3, 4], max_tokens=12, sampling=ENDLESS)]
        assert len(tokens) == 12
    assert {3, 6, 9} <= set(calls)
    assert [number for number in calls if 0 < number < 12 and number % 3] == []


def test_a_sequence_that_has_ended_takes_no_token(gpt_oss):
    model, tokenizer = gpt_oss
    sequence = new_sequence(model, tokenizer, "What is a piano?", max_tokens=1)
    assert isinstance(sequence, Sequence)
    sequence.accept(5)
    assert sequence.finish_reason == "length"
    with pytest.raises(AssertionError):
        sequence.accept(5)


def test_what_of_a_format_is_not_held_is_said_with_the_answer():
    model, tokenizer = om.load("demo-openelm")
    schema = {"type": "string", "format": "path", "maxLength": 8}
    *_, last = om.stream_generate(model, tokenizer, "A file", schema=schema, max_tokens=30)
    assert last.statistics.notes == (
        "The format 'path' at the top level is not enforced: any string is accepted there.",
    )
