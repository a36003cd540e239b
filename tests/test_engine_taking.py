"""Handles as a server uses them: all that has come at once, one wait for several, progress, and scores of a prompt."""

import asyncio
from dataclasses import FrozenInstanceError, fields

import mlx.core as mx
import pytest
from conftest import FIXTURES, load_fixture, random_model
from test_engine_many import prompt_of, seen

import openelm_mlx as om
from openelm_mlx.engine.handle import Channel, Handle, something_came
from openelm_mlx.engine.sequence import Chunk
from openelm_mlx.errors import SettingError


@pytest.fixture(scope="module", params=["OpenELM", "gpt-oss"])
def model(request):
    return random_model(context_length=256) if request.param == "OpenELM" else load_fixture(FIXTURES / "gpt_oss_tiny")


def test_what_is_taken_is_what_would_have_been_read(model):
    expected = seen(om.stream_generate(model, None, prompt_of(9), max_tokens=30))

    async def read(handles):
        found = {handle: [] for handle in handles}
        while running := [handle for handle in handles if not handle.is_over]:
            await something_came(running)
            for handle in running:
                found[handle] += handle.take()
        return [seen(chunks) for chunks in found.values()]

    with om.Engine(model) as engine:
        handles = engine.submit_several(prompt_of(9), 3, max_tokens=30)
        assert asyncio.run(read(handles)) == [expected] * 3
        assert all(handle.take() == [] for handle in handles)


def test_a_chunk_of_a_sequence_is_one_like_any_other(model):
    """It is made in a shorter way than a frozen class's own, and has every field."""
    chunk = next(om.stream_generate(model, None, prompt_of(9), max_tokens=3))
    assert chunk == Chunk("", chunk.token)
    assert set(vars(chunk)) == {each.name for each in fields(Chunk)}
    assert hash(chunk) == hash(Chunk("", chunk.token))
    with pytest.raises(FrozenInstanceError):
        chunk.text = "other"


def test_waiting_ends_by_itself_and_no_wake_up_is_lost():
    channel = Channel(lambda: None)
    handle = Handle(channel)

    async def wait():
        assert not await something_came([handle], within=0.01)
        assert handle.take() == []
        channel.put(Chunk("", 1))
        assert await something_came([handle])  # it came before
        assert [chunk.token for chunk in handle.take()] == [1]
        channel.end(error=SettingError("wrong"))
        channel.put(Chunk("", 2))  # comes after the end, and is nobody's
        assert await something_came([handle], within=5)
        with pytest.raises(SettingError, match="wrong"):
            handle.take()
        assert handle.is_over

    asyncio.run(wait())


def test_chunks_before_an_error_are_taken_first():
    channel = Channel(lambda: None)
    handle = Handle(channel)
    channel.put(Chunk("", 1))
    channel.end(error=SettingError("wrong"))
    assert [chunk.token for chunk in handle.take()] == [1]
    for _ in range(2):
        with pytest.raises(SettingError, match="wrong"):
            handle.take()


def test_a_prompt_s_progress_comes_to_its_end(model):
    cache = om.PrefixCache()
    with om.Engine(model) as engine:
        handle = engine.submit(prompt_of(40), max_tokens=2, prefill_chunk=8, prefix_cache=cache)
        assert handle.num_prompt_tokens == 40
        list(handle)
        assert handle.num_prompt_tokens_done == 40
        known = engine.submit([*prompt_of(40), 3], max_tokens=2, prefix_cache=cache)
        list(known)
        assert known.statistics.cached_tokens > 0
        assert known.num_prompt_tokens_done == 41


def test_the_prompt_s_log_probabilities_are_the_model_s_in_any_company(model):
    prompt = prompt_of(50)
    logits = model(mx.array([prompt]))[0].astype(mx.float32)
    wanted = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    with om.Engine(model) as engine:
        others = [engine.submit(prompt_of(length), max_tokens=30) for length in (5, 33)]
        scored = [engine.submit(prompt, prompt_logprobs=2, max_tokens=3) for _ in range(2)]  # one prompt, computed once
        answers = [seen(handle) for handle in (*scored, *others)]
    assert answers[0] == answers[1] == seen(om.stream_generate(model, None, prompt, max_tokens=3))
    for handle in scored:
        assert len(handle.prompt_logprobs) == len(prompt) - 1
        for place, (logprob, top) in enumerate(handle.prompt_logprobs):
            assert logprob == pytest.approx(wanted[place, prompt[place + 1]].item(), abs=1e-4)
            assert max(top.values()) == pytest.approx(mx.max(wanted[place]).item(), abs=1e-4)
            assert len(top) == 2
    with om.Engine(model) as engine, pytest.raises(SettingError, match="prompt_logprobs"):
        engine.submit(prompt, prompt_logprobs=-1)
