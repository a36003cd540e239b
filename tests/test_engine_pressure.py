"""An engine whose memory is short: requests give way at any moment, come back, and answer as they do alone."""

import random
import threading
import time

import pytest
from conftest import FIXTURES, load_fixture, random_model
from short_demos import short_demo
from slots_in_place import use_slots
from test_engine_many import prompt_of, random_request, seen

import openelm_mlx as om
from openelm_mlx.decoding.constraint import PlainConstraint
from openelm_mlx.errors import CheckpointError, MemoryLimitError


@pytest.fixture(scope="module")
def models():
    return {"openelm": random_model(context_length=256), "gpt_oss": load_fixture(FIXTURES / "gpt_oss_tiny")}


@pytest.fixture(scope="module")
def demo():
    return om.load(short_demo("demo-openelm"), dtype="float32")


def give_way_at_random(engine, draw, chance=0.25, most=25):
    """The engine's memory is tight again and again: at the start of a step its youngest request may have to give way."""
    runner = engine._runner
    given = [0]

    def tight(finish_host_work):
        while given[0] < most and draw.random() < chance and runner.life.let_youngest_give_way(finish_host_work):
            given[0] += 1

    runner.life.make_room = tight
    return given


def answers_of(engine, requests):
    """The answers to requests that arrive together, read by threads: none may wait for ever."""
    admit, all_here = engine._runner.life.admit, threading.Event()
    engine._runner.life.admit = lambda: all_here.wait() and admit()
    handles = [engine.submit(prompt, **options) for prompt, options in requests]
    all_here.set()
    return read_all(handles)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["openelm", "gpt_oss"])
@pytest.mark.parametrize("seed", range(2))
def test_who_gives_way_answers_as_alone(models, family, seed):
    model, draw = models[family], random.Random(seed)
    requests = [random_request(draw, family) for _ in range(8)]
    # Some share a prompt, so that there are followers.
    requests += [(prompt, {**options, "logprobs": 1}) for prompt, options in requests[-3:]]
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    with om.Engine(model, max_running=draw.choice([3, 32])) as engine:
        engine._scheduler.pace.longest = draw.choice([2, 5, 16])
        given = give_way_at_random(engine, draw)
        assert answers_of(engine, requests) == alone
        assert given[0] >= 5
        assert engine.num_running == engine.num_waiting == 0
        assert engine._runner.memory.held_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_constraints_and_drafts_that_give_way(demo, seed):
    model, tokenizer = demo
    requests = [
        ("A banjo is", {"regex": "[a-z ]{5,20}"}),
        ("A river is", {"max_tokens": 40}),
        ("The color of the sky is the color of the sky is", {"draft": om.PromptLookup(ngram=1)}),
        ("An animal", {"schema": {"enum": ["cat", "dog"]}}),
        ("A house is", {"sampling": om.SamplingParams(temperature=0.9, seed=4)}),
        ("A list of lists of", {"regex": "(one|two)( three)*", "draft": om.PromptLookup(ngram=1)}),
        ("A banjo is", {"regex": "[a-z ]{5,20}", "sampling": om.SamplingParams(temperature=1.2, seed=8)}),
    ]
    requests = [(prompt, {"max_tokens": 20, "logprobs": 1, **options}) for prompt, options in requests]
    alone = [seen(om.stream_generate(model, tokenizer, prompt, **options)) for prompt, options in requests]
    with om.Engine(model, tokenizer) as engine:
        given = give_way_at_random(engine, random.Random(seed), 0.5, 15)
        assert answers_of(engine, requests) == alone
        assert given[0] >= 5


def read_all(handles, seconds=60):
    """What each handle gives, its error where it raises; nobody waits for ever."""
    found = [None] * len(handles)

    def read(at):
        try:
            found[at] = seen(handles[at])
        except (ValueError, RuntimeError, OSError) as error:
            found[at] = error

    threads = [threading.Thread(target=read, args=(at,), daemon=True) for at in range(len(handles))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert None not in found, "somebody waits for ever"
    return found


def before_step(engine, call):
    """Have `call(number of the step)` done at the start of every step, on the engine's thread."""
    runner, step = engine._runner, engine._runner.step

    def stepped():
        call(runner.num_steps)
        step()

    runner.step = stepped


@pytest.mark.slow
def test_a_prompt_that_is_computed_again_is_shared(models):
    """Whoever joins a request that gave way with its first token chosen gets its answer, too."""
    model, prompt = models["gpt_oss"], prompt_of(60)
    expected = seen(om.stream_generate(model, None, prompt, max_tokens=6))
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 8
        runner, scheduler, handles = engine._runner, engine._scheduler, []

        def give_way_once(_):
            request = scheduler.youngest()
            if len(handles) == 2 and request is not None and request.pending is not None and not request.replay:
                runner.life.let_youngest_give_way(runner._delivery.finish_host_work)
                handles.append(engine.submit(prompt, max_tokens=6))
                handles.append(engine.submit(prompt, max_tokens=6))

        before_step(engine, give_way_once)
        blocker = engine.submit(prompt_of(5, 9), max_tokens=150)
        next(blocker)
        handles.append(blocker)
        handles.append(engine.submit(prompt, max_tokens=6))
        deadline = time.monotonic() + 60
        while len(handles) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_all(handles[1:]) == [expected] * 3


@pytest.mark.slow
def test_who_gives_way_while_its_constraint_is_slow(demo, monkeypatch):
    """Its mask and then its token are being worked out: it gives way when its source stands, not between the two."""
    model, tokenizer = demo
    requests = [("A banjo is", {"max_tokens": 30}), ("A river", {"max_tokens": 12, "regex": "[a-z ]{5,20}"})]
    alone = [seen(om.stream_generate(model, tokenizer, prompt, **options)) for prompt, options in requests]
    for name in ("mask", "accept"):
        real = getattr(PlainConstraint, name)

        def slow(self, *words, real=real):
            time.sleep(0.008)  # longer than a step waits
            return real(self, *words)

        monkeypatch.setattr(PlainConstraint, name, slow)
    with om.Engine(model, tokenizer) as engine:
        given = give_way_at_random(engine, random.Random(1), 0.5, 12)
        assert answers_of(engine, requests) == alone
        assert given[0] >= 3


def watchdog_once(monkeypatch, engine, when):
    """The GPU's watchdog stops the first pass for which when(parts) is true."""
    from openelm_mlx.engine import runner

    compute, has_struck = runner.compute, []

    def struck(model, step, bank, in_slots, parts):
        if not has_struck and when(parts):
            has_struck.append(True)
            raise RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity")
        return compute(model, step, bank, in_slots, parts)

    monkeypatch.setattr(runner, "compute", struck)
    return has_struck


def test_a_pass_that_the_watchdog_stopped_is_computed_again(models, monkeypatch):
    """Seeds and penalties go on where they were."""
    model = models["openelm"]
    sampling = [
        om.SamplingParams(temperature=1.2, seed=3),
        om.SamplingParams(temperature=1.2, seed=4),
        om.SamplingParams(repetition_penalty=1.6, frequency_penalty=0.5),
    ]
    requests = [(prompt_of(9, at), {"max_tokens": 30, "sampling": each}) for at, each in enumerate(sampling)]
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    with om.Engine(model) as engine:
        struck = watchdog_once(monkeypatch, engine, lambda parts: any(p.offset > 20 for p in parts) and len(parts) > 2)
        assert answers_of(engine, requests) == alone
        assert struck


def test_a_failed_allocation_beside_a_pass_leaves_the_engine_alive(models, monkeypatch):
    """Room for keys and values is made before a pass; what fails there ends who runs, not the engine."""
    model = models["openelm"]
    expected = seen(om.stream_generate(model, None, prompt_of(9), max_tokens=12))
    from openelm_mlx.engine.memory import BatchMemory

    with om.Engine(model) as engine:
        handles = [engine.submit(prompt_of(9, seed), max_tokens=150) for seed in range(2)]
        for handle in handles:
            next(handle)

        def no_memory(*_):
            raise RuntimeError("[malloc_or_wait] Unable to allocate 123 bytes.")

        with monkeypatch.context() as patch:
            patch.setattr(BatchMemory, "reserve", no_memory)
            found = read_all([*handles, engine.submit(prompt_of(9), max_tokens=4)])
        assert all(isinstance(each, MemoryLimitError) for each in found), found
        assert seen(engine.submit(prompt_of(9), max_tokens=12)) == expected


@pytest.mark.slow
def test_a_prompt_beside_a_request_whose_pass_raises(models, monkeypatch):
    """A pass of several raises once: what cannot be taken back, a prompt longer than the window, is computed again."""
    model = models["gpt_oss"]
    requests = [(prompt_of(7, 1), {"max_tokens": 40}), (prompt_of(150, 2), {"max_tokens": 5})]
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    from openelm_mlx.engine import runner

    compute, has_failed = runner.compute, []

    def fails(model, step, bank, in_slots, parts):
        logits = compute(model, step, bank, in_slots, parts)
        if not has_failed and len(parts) > 1 and any(each.is_prompt and each.offset > 40 for each in parts):
            has_failed.append(True)
            raise OSError(5, "Input/output error")
        return logits

    monkeypatch.setattr(runner, "compute", fails)
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 32
        first = engine.submit(requests[0][0], **requests[0][1])
        chunk = next(first)
        second = engine.submit(requests[1][0], **requests[1][1])
        found = read_all([first, second])
        assert has_failed
        assert found == [alone[0][1:], alone[1]], chunk


@pytest.mark.slow
@pytest.mark.parametrize("are_in_place", [False, True])
@pytest.mark.parametrize("family", ["openelm", "gpt_oss"])
def test_who_gives_way_out_of_a_slot_answers_as_alone(models, monkeypatch, family, are_in_place):
    model, draw = models[family], random.Random(7)
    use_slots(monkeypatch, model, are_in_place)
    requests = [random_request(draw, family) for _ in range(8)]
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    with om.Engine(model) as engine:
        given = give_way_at_random(engine, draw)
        found = answers_of(engine, requests)
        assert [[each[0] for each in one] for one in found] == [[each[0] for each in one] for one in alone]
        assert given[0] >= 3
        assert len(engine._runner.bank) == 0
        assert engine._runner.memory.held_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("are_in_place", [False, True])
def test_a_prompt_in_a_slot_whose_pass_raises_is_computed_by_itself(models, monkeypatch, are_in_place):
    """In the middle of its layers, so that some have been written."""
    model = models["gpt_oss"]
    requests = [(prompt_of(7, 1), {"max_tokens": 40}), (prompt_of(150, 2), {"max_tokens": 5})]
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    use_slots(monkeypatch, model, are_in_place, with_prompts=True)
    from openelm_mlx.models import slots

    write, has_failed = slots.SlotBank.write, []

    def fails(self, i, new):
        if not has_failed and i == 2 and self.num_rows > len(self) and self.longest > 40:
            has_failed.append(True)
            raise OSError(5, "Input/output error")
        return write(self, i, new)

    monkeypatch.setattr(slots.SlotBank, "write", fails)
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 32
        first = engine.submit(requests[0][0], **requests[0][1])
        chunk = next(first)
        second = engine.submit(requests[1][0], **requests[1][1])
        found = read_all([first, second])
        assert has_failed
        tokens = [[each[0] for each in one] for one in found]
        assert tokens == [[each[0] for each in alone[0][1:]], [each[0] for each in alone[1]]], chunk


def test_logits_that_are_no_numbers_end_their_request_alone():
    """Also of requests that share a prompt."""
    model = load_fixture(FIXTURES / "gpt_oss_tiny")
    weight = model.model.embed_tokens.weight
    model.update({"model": {"embed_tokens": {"weight": weight.at[500].add(float("nan"))}}})
    prompts = [[5, 6, 7], [5, 500, 7], [9, 8], [5, 500, 7]]
    alone = {at: seen(om.stream_generate(model, None, prompts[at], max_tokens=6)) for at in (0, 2)}
    with om.Engine(model) as engine:
        found = answers_of(engine, [(prompt, {"max_tokens": 6}) for prompt in prompts])
        assert [found[0], found[2]] == [alone[0], alone[2]]
        assert [type(found[at]) for at in (1, 3)] == [CheckpointError] * 2
