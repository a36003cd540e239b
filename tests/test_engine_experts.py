"""Experts on disk in an engine: what each request has of the reads, and a disk that goes."""

import dataclasses
import errno
import os
import threading
from types import SimpleNamespace

import pytest
from conftest import FIXTURES
from test_engine_many import prompt_of, seen

import openelm_mlx as om
from openelm_mlx.engine.expert_shares import ExpertShare, ExpertShares
from openelm_mlx.errors import CheckpointError
from openelm_mlx.experts.statistics import ExpertStatistics, LayerStatistics

NAMES = [each.name for each in dataclasses.fields(LayerStatistics)]


@pytest.fixture
def model():
    return om.load(FIXTURES / "gpt_oss_tiny", expert_slots=4, dtype="float32")[0]


def together(model, requests, **options):
    """The engine's answers to requests that arrive at once, and their handles."""
    with om.Engine(model, **options) as engine:
        admit, all_here = engine._runner.life.admit, threading.Event()
        engine._runner.life.admit = lambda: all_here.wait() and admit()
        handles = [engine.submit(prompt, **each) for prompt, each in requests]
        all_here.set()
        return [seen(handle) for handle in handles], handles


def test_what_each_request_has_of_the_reads_is_all_that_was_read(model):
    requests = [(prompt_of(length, length), {"max_tokens": 6}) for length in (3, 20, 9)]
    requests.append((prompt_of(12, 1), {"max_tokens": 9, "draft": om.PromptLookup(ngram=1)}))
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    before = model.residency.statistics()
    found, handles = together(model, requests)
    read = model.residency.statistics().since(before)
    assert found == alone
    parts = [part for each in handles for part in (each.statistics.prompt_experts, each.statistics.answer_experts)]
    for name in NAMES:
        assert sum(getattr(part, name) for part in parts) == pytest.approx(getattr(read, name)), name
        for i, layer in enumerate(read.layers):
            assert sum(getattr(part.layers[i], name) for part in parts) == pytest.approx(getattr(layer, name))
    assert all(each.statistics.answer_experts.hits + each.statistics.answer_experts.misses > 0 for each in handles)


def test_a_pass_is_shared_by_rows_and_nothing_is_lost_in_rounding():
    now = LayerStatistics()
    shares = ExpertShares(SimpleNamespace(statistics=lambda: ExpertStatistics.of([now])))
    long, short = ExpertShare(1), ExpertShare(1)
    for _ in range(8):
        now.misses += 5  # between passes: somebody else's
        shares.begin()
        now.hits, now.bytes_read, now.seconds_waited = now.hits + 10, now.bytes_read + 1001, now.seconds_waited + 0.5
        shares.divide([(long, 20), (short, 3)])
    assert (long.layers[0].hits, short.layers[0].hits) == (8 * 8 + 4, 8 * 1 + 4)
    assert long.layers[0].bytes_read + short.layers[0].bytes_read == 8 * 1001
    assert long.layers[0].seconds_waited == pytest.approx(8 * 0.5 * 20 / 23)
    assert long.layers[0].misses == short.layers[0].misses == 0


def test_one_request_has_all_that_it_read(model):
    requests = [(prompt_of(20), {"max_tokens": 6})]
    *_, last = om.stream_generate(model, None, requests[0][0], max_tokens=6)
    _, [handle] = together(model, requests)
    for name in ("prompt_experts", "answer_experts"):
        mine, alone = getattr(handle.statistics, name), getattr(last.statistics, name)
        assert mine.hits + mine.misses == alone.hits + alone.misses
        assert mine.read_backs == alone.read_backs


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("num_failures", [1, 10**6])
def test_a_disk_that_goes_while_several_are_computed(model, num_failures):
    """With one read that fails, the others go on; with all, each ends with the same sentence, and the next request works."""
    requests = [(prompt_of(9, seed), {"max_tokens": 20}) for seed in range(3)]
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    files = model.residency.files
    real, left = [file.read_into for file in files], [0]

    def gone(file):
        def read_into(*words):
            if left[0] > 0:
                left[0] -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return file(*words)

        return read_into

    for file, read in zip(files, real, strict=True):
        file.read_into = gone(read)
    with om.Engine(model) as engine:
        runner, step, has_gone = engine._runner, engine._runner.step, []

        def stepped():
            decoding = engine._scheduler.decoding
            if not has_gone and len(decoding) == 3 and all(len(each.sequence.tokens) > 1 for each in decoding):
                has_gone.append(True)
                left[0] = num_failures
            step()

        runner.step = stepped
        handles = [engine.submit(prompt, **options) for prompt, options in requests]
        told = []
        for at, handle in enumerate(handles):
            try:
                assert seen(handle) == alone[at]
            except CheckpointError as error:
                told.append(str(error))
        assert has_gone
        assert len(told) == 3 if num_failures > 1 else len(told) <= 1
        assert all("cannot be read" in each for each in told)
        left[0] = 0
        assert seen(engine.submit(requests[0][0], **requests[0][1])) == alone[0]
        assert engine.num_running == 0
