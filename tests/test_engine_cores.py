"""On the CPU backend the requests of a pass are shared among the cores; no answer changes."""

import threading
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, random_model

import openelm_mlx as om
from openelm_mlx.decoding import batch_step
from openelm_mlx.engine import flat_pass
from openelm_mlx.models.cores import MOST_CORES, compute_at_once, num_cores, streams
from openelm_mlx.models.rows import Rows

LOADERS = {
    "openelm": lambda: random_model(context_length=256),
    "gpt_oss": lambda: load_fixture(FIXTURES / "gpt_oss_tiny"),
}


def shared(monkeypatch, model, cores, *lengths):
    monkeypatch.setattr(flat_pass, "num_cores", lambda: cores)
    rows = [Rows([], each) for each in lengths]
    return [[each.length for each in share] for share in flat_pass._shares(model, rows)]


def test_each_core_gets_about_as_many_rows(monkeypatch):
    model = random_model()
    assert shared(monkeypatch, model, 2, 1, 1, 1, 1) == [[1, 1], [1, 1]]
    assert shared(monkeypatch, model, 2, 1, 1, 1) in ([[1], [1, 1]], [[1, 1], [1]])
    assert shared(monkeypatch, model, 4, 1, 1, 1) == [[1], [1], [1]]
    assert shared(monkeypatch, model, 2, 1, 1, 1, 64) == [[1, 1, 1], [64]]  # who decodes beside a chunk of a prompt
    assert shared(monkeypatch, model, 2, 90, 80, 100, 70) == [[90, 80], [100, 70]]
    assert shared(monkeypatch, model, 2, 64) == [[64]]
    assert shared(monkeypatch, model, 1, 1, 1) == [[1, 1]]


def test_a_pass_stays_whole_on_a_gpu_and_where_experts_are_on_disk(monkeypatch):
    model = random_model()
    with monkeypatch.context() as patched:
        patched.setattr(flat_pass, "runs_on_cpu", lambda: False)
        assert shared(patched, model, 2, 1, 1) == [[1, 1]]
    monkeypatch.setattr(flat_pass, "runtime_of", lambda model: SimpleNamespace(residency=object()))
    assert shared(monkeypatch, model, 2, 1, 1) == [[1, 1]]


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
