"""On the CPU backend the requests of a pass are shared among the cores; no answer changes."""

import threading
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, random_model

import openelm_mlx as om
from openelm_mlx.decoding import batch_step
from openelm_mlx.engine import flat_pass, runner
from openelm_mlx.models.cores import MOST_CORES, compute_at_once, num_cores, streams

LOADERS = {
    "openelm": lambda: random_model(context_length=256),
    "gpt_oss": lambda: load_fixture(FIXTURES / "gpt_oss_tiny"),
}


def test_a_pass_stays_whole_on_a_gpu_and_where_experts_are_on_disk(monkeypatch):
    model = random_model()
    monkeypatch.setattr(flat_pass, "num_cores", lambda: 2)
    assert flat_pass.num_shares(model) == 2
    with monkeypatch.context() as patched:
        patched.setattr(flat_pass, "runs_on_cpu", lambda: False)
        assert flat_pass.num_shares(model) == 1
    monkeypatch.setattr(flat_pass, "runtime_of", lambda model: SimpleNamespace(residency=object()))
    assert flat_pass.num_shares(model) == 1


@pytest.mark.parametrize("family", LOADERS)
def test_any_number_of_cores_gives_the_answers_of_one(monkeypatch, family):
    model = LOADERS[family]()
    prompts = [
        np.random.default_rng(at).integers(3, 500, length).tolist() for at, length in enumerate((1, 40, 7, 90, 17))
    ]
    seen, found = [], {}
    real = flat_pass.compute_at_once
    monkeypatch.setattr(flat_pass, "compute_at_once", lambda works: seen.append(len(works)) or real(works))
    for cores in (1, 2, 3):
        monkeypatch.setattr(flat_pass, "num_cores", lambda cores=cores: cores)
        with om.Engine(model) as engine:
            engine._scheduler.pace.longest = 16  # chunks of prompts beside requests that decode
            options = {"max_tokens": 20, "logprobs": 2}
            handles = [
                engine.submit(prompt, **options, **({"kv_bits": 8} if at == 3 and family == "gpt_oss" else {}))
                for at, prompt in enumerate(prompts)
            ]
            found[cores] = [[(c.token, c.logprob, c.top_logprobs) for c in handle] for handle in handles]
    assert set(seen) == {2, 3}
    assert found[1] == found[2] == found[3]


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_beside_those_who_decode_each_core_has_a_prompt(monkeypatch, cores):
    model, submitted, passes = random_model(context_length=256), threading.Event(), []
    step, compute = runner.Runner.step, runner.compute

    def seen(model, step, bank, in_slots, parts):
        passes.append(
            (len(in_slots) + sum(not each.is_prompt for each in parts), sum(each.is_prompt for each in parts))
        )
        return compute(model, step, bank, in_slots, parts)

    monkeypatch.setattr(flat_pass, "num_cores", lambda: cores)
    monkeypatch.setattr(runner, "compute", seen)
    monkeypatch.setattr(runner.Runner, "step", lambda self: submitted.wait(60) and step(self))
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 16
        handles = [engine.submit([7], max_tokens=60)]
        handles += [engine.submit(list(range(at, at + 48)), max_tokens=4) for at in (3, 4, 5)]
        submitted.set()
        assert [len(list(handle)) for handle in handles] == [60, 4, 4, 4]
    assert max(prompts for decoding, prompts in passes if decoding) == cores


def test_results_come_in_order_each_from_its_own_thread():
    at_once = threading.Barrier(3, timeout=60)

    def work(number):
        at_once.wait()  # nobody goes on before all have begun
        return mx.full((2,), number) * 2, threading.get_ident()

    works = [lambda number=number: work(number) for number in range(3)]
    found = compute_at_once(works)
    mx.eval(found[2][0])
    assert len({thread for _, thread in found}) == 3
    assert found[2][1] == threading.get_ident()
    assert found[2][0].tolist() == [4, 4]


def test_an_error_is_raised_when_all_have_ended():
    ended, begin = [], threading.Event()

    def slow():
        begin.wait(60)
        ended.append(True)

    def fails():
        begin.set()
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        compute_at_once([slow, fails])
    with pytest.raises(ValueError, match="this one"):
        compute_at_once([fails, slow])
    assert ended == [True, True]


def test_there_is_a_stream_for_each_core():
    assert 1 <= num_cores() <= MOST_CORES
    assert len(set(map(str, streams()))) == num_cores()


def test_a_request_whose_share_fails_ends_alone(monkeypatch):
    """A pass of several that fails is computed once more, each request by itself."""
    model = random_model(context_length=256)
    monkeypatch.setattr(flat_pass, "num_cores", lambda: 2)
    real, broken = flat_pass.flat_logits, []

    def logits(model, tokens, rows, *more, **named):
        broken.extend(each.cache for each in rows if each.is_prompt and each.length == 7)
        if any(each.cache[0].offset == 9 and any(each.cache is cache for cache in broken) for each in rows):
            raise ValueError("a broken cache")
        return real(model, tokens, rows, *more, **named)

    expected = [chunk.token for chunk in om.stream_generate(model, None, [3, 4, 5], max_tokens=8)]
    for module in (flat_pass, batch_step):
        monkeypatch.setattr(module, "flat_logits", logits)
    with om.Engine(model) as engine:
        well, broken_one = (engine.submit(prompt, max_tokens=8) for prompt in ([3, 4, 5], list(range(9, 16))))
        with pytest.raises(ValueError, match="a broken cache"):
            list(broken_one)
        assert [chunk.token for chunk in well] == expected
