"""Streamed experts against the same model with all experts in memory: bit for bit, whatever is resident and what fails.

The slow, obvious form is the resident model itself: `om.load(folder)` without `expert_slots`.
"""

import ctypes
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import in_threads
from mlx.utils import tree_flatten
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.layouts import understand
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands import main
from openelm_mlx.decoding.budget import Budget
from openelm_mlx.decoding.prefill import fill, prefill
from openelm_mlx.decoding.step import PlainStep
from openelm_mlx.decoding.streamed_step import StreamedStep
from openelm_mlx.errors import CheckpointError, SettingError
from openelm_mlx.experts import cuda_driver, records, writable
from openelm_mlx.experts.records import HostTarget, PlainReader, Record, RecordFile, RecordReader, preadv_into
from openelm_mlx.experts.residency import Streaming
from openelm_mlx.experts.slots import LeastRecentlyUsed, SlotTable, blocks_of, by_last_use
from openelm_mlx.generate import stream_generate
from openelm_mlx.models import base
from openelm_mlx.models.moe import Experts, sort_routes
from openelm_mlx.models.precision import KernelChoices
from openelm_mlx.models.routing_ways import rows_at_once, uses_tiles
from openelm_mlx.specs import spec_from_config
from openelm_mlx.weights import load_model

SMALL = {
    **released_gpt_oss_config("20b"), "num_hidden_layers": 3, "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
    "eos_token_id": 319,
}  # fmt: skip
NUM_EXPERTS = [32, 128]
PROMPT = np.random.default_rng(5).integers(0, 300, 45).tolist()  # several windows long


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Experts in a layer -> a random checkpoint in OpenAI's layout; 128 as in original/."""
    layouts = {32: "openai-hf", 128: "openai-original"}
    return {
        count: write_random_gpt_oss(
            tmp_path_factory.mktemp("streamed") / str(count), {**SMALL, "num_local_experts": count}, layouts[count]
        )
        for count in NUM_EXPERTS
    }


@pytest.fixture(scope="module")
def residents(folders):
    return {count: om.load(folder, dtype="float32")[0] for count, folder in folders.items()}


def streamed(folder, num_slots, **options):
    """The model with streamed experts, with the options that `load` does not have."""
    config, checkpoint = read_config(folder), open_checkpoint(folder)
    contents = understand(checkpoint, config, spec_from_config(config))
    return load_model(contents, checkpoint, mx.float32, streaming=Streaming(contents, checkpoint, num_slots, **options))


def logits_of(model, chunk_length, steps=10, layers_at_once=None):
    """The logits after a long prompt and after each of some tokens behind it, through the cache. (steps + 1, V)"""
    cache = model.make_cache()
    rows = [prefill(model, PROMPT, cache, chunk_length)]
    step = PlainStep(model, cache)
    if model.residency is not None:
        step = StreamedStep(model, cache, layers_at_once)
    for token in range(steps):
        rows.append(step(mx.array(7 * token + 1)))
        mx.eval(rows)
    return mx.stack(rows)


def tokens_of(chunks):
    return [chunk.token for chunk in chunks]


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("chunk_length", [6, 512])
@pytest.mark.parametrize(
    ("num_experts", "num_slots"), [(32, 4), (32, 7), (32, 31), (32, 32), (128, 4), (128, 33), (128, 128)]
)
def test_logits_are_the_resident_model_s(folders, residents, num_experts, num_slots, chunk_length):
    expected = logits_of(residents[num_experts], chunk_length)
    model, _ = om.load(folders[num_experts], dtype="float32", expert_slots=num_slots)
    # How many layers go at once matters where experts are exchanged: with few slots and with many.
    for layers_at_once in (None, 1, 2, 3) if num_slots in (4, 33) else (None, 1):
        assert mx.array_equal(logits_of(model, chunk_length, layers_at_once=layers_at_once), expected)


def test_half_precision_is_the_same_too(folders):
    expected = logits_of(om.load(folders[32], dtype="bfloat16")[0], 16, steps=4)
    assert mx.array_equal(logits_of(om.load(folders[32], dtype="bfloat16", expert_slots=5)[0], 16, steps=4), expected)


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("num_slots", [4, 6, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_demo_answers_the_same(num_slots, temperature):
    sampling = om.SamplingParams(temperature=temperature, seed=3)
    source = short_demo("demo-gpt-oss")
    known, tokenizer = om.load(source)
    model, _ = om.load(source, expert_slots=num_slots)
    question = "What is a banjo?"
    expected, seen = (
        tokens_of(stream_generate(each, tokenizer, question, max_tokens=14, sampling=sampling))
        for each in (known, model)
    )
    assert seen == expected


@pytest.mark.parametrize("num_slots", [4, 11])
def test_batches_of_four(folders, residents, num_slots):
    """Four rows want up to 16 experts at once, more than there are slots: the routes go in blocks."""
    model, _ = om.load(folders[32], dtype="float32", expert_slots=num_slots)
    rows = mx.array(np.random.default_rng(0).integers(0, 300, (4, 20)))
    seen = []
    for each in (residents[32], model):
        cache = each.make_cache()
        outs = [each(rows[:, :12], cache=cache), *(each(rows[:, i : i + 1], cache=cache) for i in range(12, 20))]
        seen.append(mx.concatenate(outs, axis=1))
    assert mx.array_equal(*seen)


@pytest.mark.parametrize("options", [{"writes": "copy"}, {"padded_down_rows": 128}, {"embedding_on_disk": False}])
def test_other_ways_to_fill_slots(folders, residents, options):
    model = streamed(folders[32], 6, **options)
    assert model.residency.writes == options.get("writes", "view")
    assert model.residency.embedding_on_disk is options.get("embedding_on_disk", True)
    assert mx.array_equal(logits_of(model, 16), logits_of(residents[32], 16))


def test_rows_are_padded_alike_in_memory_and_in_slots(folders, residents, monkeypatch):
    """Where whole tiles pay: other rows would be another kernel."""
    monkeypatch.setattr(base, "default_choices", lambda: KernelChoices(rows_in_a_tile=128, compiled_step=False))
    known, model = om.load(folders[32], dtype="float32")[0], streamed(folders[32], 6)
    assert known.layers[0].mlp.experts.down_proj.weight.shape[1] == 128
    assert model.layers[0].mlp.experts.experts.down_proj.weight.shape[1] == 128
    expected = logits_of(residents[32], 16)
    assert mx.array_equal(logits_of(known, 16), expected)
    assert mx.array_equal(logits_of(model, 16), expected)


@pytest.mark.parametrize("dense_bits", [None, 8])
def test_an_embedding_on_disk_gives_the_same_rows(folders, dense_bits):
    known, _ = om.load(folders[32], dtype="float32", dense_bits=dense_bits)
    model, _ = om.load(folders[32], dtype="float32", dense_bits=dense_bits, expert_slots=4)
    tokens = mx.array([[5, 319, 5, 0], [1, 2, 2, 1]])
    assert mx.array_equal(model.embed(tokens), known.embed(tokens))
    assert not any("embed_tokens" in name for name, _ in tree_flatten(model.parameters()))


def test_the_library_s_own_layout_can_be_read_in_place(folders, residents, tmp_path):
    om.convert(folders[32], tmp_path / "ours")
    model, _ = om.load(tmp_path / "ours", dtype="float32", expert_slots=5)
    assert mx.array_equal(logits_of(model, 16, steps=2), logits_of(residents[32], 16, steps=2))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_speculation_and_with_prefix_reuse(folders, temperature):
    """Drafts are verified several at a time through blocks of experts, and rejected ones taken back."""
    sampling = om.SamplingParams(temperature=temperature, seed=3)
    prompt = PROMPT[:12] * 4
    answers = []
    for options in ({}, {"expert_slots": 5}):
        model, _ = om.load(folders[32], dtype="float32", **options)
        drafted = list(stream_generate(model, None, prompt, max_tokens=40, sampling=sampling, draft=om.PromptLookup()))
        cache = om.PrefixCache()
        first = tokens_of(stream_generate(model, None, prompt, max_tokens=12, sampling=sampling, prefix_cache=cache))
        longer = [*prompt, *first, 5, 6, 7]
        again = list(stream_generate(model, None, longer, max_tokens=20, sampling=sampling, prefix_cache=cache))
        assert again[-1].statistics.cached_tokens > 20
        answers.append((tokens_of(drafted), first, tokens_of(again)))
    assert answers[0] == answers[1]


# --- one kernel path --------------------------------------------------------------------------------------------------


def metal_s_kernel(rows, experts_in_array, is_sorted):
    """Which kernel MLX 0.32.4 takes for one row a route (metal/quantized.cpp, GatherQMM::eval_gpu)."""
    return "tiles" if is_sorted and rows >= 16 and rows // experts_in_array >= 4 else "rows"


@pytest.mark.parametrize("num_tokens", [1, 8, 16, 31, 32, 33, 60, 130])
@pytest.mark.parametrize(("num_experts", "num_slots"), [(32, 4), (32, 24), (32, 32), (128, 5), (128, 100)])
def test_the_kernel_follows_from_routes_and_the_model_s_experts(
    folders, residents, num_experts, num_slots, num_tokens, monkeypatch
):
    seen = []
    gather_qmm = mx.gather_qmm

    def spy(x, weight, *args, rhs_indices, sorted_indices, **kwargs):
        assert not sorted_indices or np.all(np.diff(np.array(rhs_indices).astype(int)) >= 0)
        seen.append(metal_s_kernel(rhs_indices.size, weight.shape[0], sorted_indices))
        return gather_qmm(x, weight, *args, rhs_indices=rhs_indices, sorted_indices=sorted_indices, **kwargs)

    x = mx.random.normal((1, num_tokens, 64), key=mx.random.key(num_tokens))
    model, _ = om.load(folders[num_experts], dtype="float32", expert_slots=num_slots)
    monkeypatch.setattr(mx, "gather_qmm", spy)
    kernels = []
    for each in (residents[num_experts], model):
        seen.clear()
        mx.eval(each.layers[0].mlp(x, mx.float32))
        kernels.append(set(seen))
    assert kernels[0] == kernels[1] == {"tiles" if uses_tiles(4 * num_tokens, num_experts) else "rows"}


@pytest.mark.parametrize("num_slots", [4, 9, 32])
def test_of_tokens_that_want_the_same_experts_no_more_rows_are_computed_at_once(folders, num_slots, monkeypatch):
    """They are one block, which is computed in parts: bit for bit what it gives at once, and every expert is read once."""
    seen, gather_qmm = [], mx.gather_qmm

    def spy(x, weight, *args, rhs_indices, **kwargs):
        seen.append(rhs_indices.size)
        return gather_qmm(x, weight, *args, rhs_indices=rhs_indices, **kwargs)

    known, _ = om.load(folders[32], dtype="float32")
    model, _ = om.load(folders[32], dtype="float32", expert_slots=num_slots)
    x = mx.random.normal((1, 150, 64), key=mx.random.key(3))
    for each in (known, model):
        each.layers[0].mlp.router.bias = mx.where(mx.arange(32) < 4, 1e4 * mx.ones((32,)), 0.0)
    expected = known.layers[0].mlp(x, mx.float32)
    mx.eval(expected)
    monkeypatch.setattr(mx, "gather_qmm", spy)
    assert mx.array_equal(model.layers[0].mlp(x, mx.float32), expected)
    most = rows_at_once(600, 32, num_slots)
    assert max(seen) == most
    assert len(seen) == 2 * -(-600 // most)
    assert model.layers[0].mlp.experts.bank.statistics.misses == 4


@pytest.mark.parametrize("way", ["unsorted", "sorted", "grouped", "blocks_16", "blocks_32"])
@pytest.mark.parametrize(("num_experts", "num_slots"), [(32, 5), (32, 32), (128, 40)])
def test_the_way_through_the_experts_is_the_resident_model_s(
    folders, residents, num_experts, num_slots, way, monkeypatch
):
    """Few rows whose routes go in groups: as many places in each as in memory, or it would be another kernel."""
    chosen = KernelChoices(compiled_step=False, expert_ways=((1, way),))
    monkeypatch.setattr(base, "default_choices", lambda: chosen)
    known, _ = om.load(folders[num_experts], dtype="float32")
    model, _ = om.load(folders[num_experts], dtype="float32", expert_slots=num_slots)
    seen = []

    def spied(name, product):
        def spy(x, weight, *args, **kwargs):
            if weight.ndim == 3:  # the experts' weights, and no other ones
                seen.append((name, x.shape[-2]))
            return product(x, weight, *args, **kwargs)

        return spy

    for name in ("gather_qmm", "quantized_matmul"):
        monkeypatch.setattr(mx, name, spied(name, getattr(mx, name)))
    for num_rows in (1, 3, 20, 30, 60):
        x = mx.random.normal((num_rows, 64), key=mx.random.key(num_rows))
        kernels, outs = [], []
        for each in (known, model):
            seen.clear()
            outs.append(each.layers[0].mlp(x, mx.float32))
            mx.eval(outs[-1])
            kernels.append(set(seen))
        assert mx.array_equal(*outs)
        assert mx.array_equal(outs[0], residents[num_experts].layers[0].mlp(x, mx.float32))
        assert kernels[0] == kernels[1]
        if num_rows == 60 and way.startswith("blocks"):
            assert kernels[0] == {("gather_qmm", int(way[-2:]))}
        if num_rows == 20 and way == "grouped":
            assert kernels[0] == {
                ("quantized_matmul" if num_experts == 32 else "gather_qmm", 32 if num_experts == 32 else 1)
            }


@pytest.mark.parametrize("way", ["grouped", "blocks_16"])
def test_looking_ahead_takes_the_way_of_the_resident_model(folders, residents, way, monkeypatch):
    monkeypatch.setattr(base, "default_choices", lambda: KernelChoices(compiled_step=False, expert_ways=((1, way),)))
    model, _ = om.load(folders[32], dtype="float32", expert_slots=32)
    layer = model.layers[0].mlp
    x = mx.random.normal((24, 64), key=mx.random.key(3))
    expert_indices, _ = layer.route(x)
    known = layer.experts(x, expert_indices)
    mx.eval(known)
    again = layer.experts.compute_from_slots(x, expert_indices, layer.experts.bank.device_table())
    assert mx.array_equal(again, known)
    assert mx.array_equal(known, residents[32].layers[0].mlp.experts(x, expert_indices))


def test_rows_are_added_where_a_bank_would_fall_below_the_tiles(folders, residents, monkeypatch):
    """40 tokens are 5 rows an expert; one block of 24 experts has fewer than 4 x 24 of its own at some point."""
    sizes = []
    feed_forward = Experts.feed_forward

    def spy(self, x, routes):
        sizes.append(routes.experts.size)
        return feed_forward(self, x, routes)

    monkeypatch.setattr(Experts, "feed_forward", spy)
    model, _ = om.load(folders[32], dtype="float32", expert_slots=24)
    x = mx.random.normal((1, 40, 64), key=mx.random.key(1))
    streamed_out, resident_out = (each.layers[0].mlp(x, mx.float32) for each in (model, residents[32]))
    assert mx.array_equal(streamed_out, resident_out)
    assert sum(sizes[:-1]) > 160 == sizes[-1]
    assert min(sizes) >= 4 * 24


# --- reads ------------------------------------------------------------------------------------------------------------


def spied_reads(model):
    """(file's name, offset) of every read, as they come."""
    reads = []
    for file in model.residency.files:

        def read_into(fd, buffer, offset, name=file.path.name):
            reads.append((name, offset))
            return preadv_into(fd, buffer, offset)

        file.read_into = read_into
    return reads


@pytest.mark.parametrize("num_slots", [4, 10, 32])
def test_each_expert_is_read_at_most_once_a_chunk(folders, num_slots):
    model = streamed(folders[32], num_slots, embedding_on_disk=False)
    reads = spied_reads(model)
    cache = model.make_cache()
    fill(model, PROMPT, cache, 512, Budget(model, cache))
    assert len(reads) > 100
    assert len(set(reads)) == len(reads)
    misses = [layer.misses for layer in model.residency.statistics().layers]
    assert misses[-1] == 0  # of the last layer only keys and values are wanted
    assert all(20 < count <= 32 for count in misses[:-1])


def test_blocks_cover_everything_once():
    table = SlotTable(5)
    table.arrived(table.place([1, 2, 3, 4, 5]))
    blocks = blocks_of(by_last_use([9, 2, 7, 1, 8, 6, 9, 0, 11, 2]), table)
    # What is there first, and two blocks fit into the slots: one is read while the other is computed.
    assert blocks == [[1, 2], [7, 8], [6, 9], [0, 11]]
    assert blocks_of([3, 9], table) == [[3], [9]]
    assert blocks_of([3, 5, 1], table) == [[3, 5, 1]]
    assert blocks_of([10, 11, 12, 13, 14, 15, 16], table) == [[10], [11, 12], [13, 14], [15, 16]]
    table = SlotTable(2)
    for count in range(9):
        assert [expert for block in blocks_of(list(range(count)), table) for expert in block] == list(range(count))


def test_blocks_equal_one_sorted_call(folders, residents):
    """37 tokens through 6 slots."""
    model, _ = om.load(folders[32], dtype="float32", expert_slots=6)
    x = mx.random.normal((1, 37, 64), key=mx.random.key(3))
    experts = residents[32].layers[1].mlp.experts
    chosen = mx.array(np.random.default_rng(1).integers(0, 32, (1, 37, 4)).astype(np.uint32))
    rows, routes, inverse = sort_routes(x, chosen)
    expected = experts.feed_forward(rows, routes._replace(is_sorted=True))[inverse].reshape(1, 37, 4, 64)
    assert mx.array_equal(model.layers[1].mlp.experts(x, chosen), expected)


def test_slots_cost_what_the_files_say(folders):
    """Four extents an expert, to the byte: 2 x 64 x 64 and 64 x 64 numbers of 4 bits, a scale for each 32."""
    model, _ = om.load(folders[32], dtype="float32", expert_slots=9)
    one = 2 * 64 * 32 + 2 * 64 * 2 + 64 * 32 + 64 * 2
    assert model.residency.nbytes == 3 * 9 * one
    model(mx.array([[1]]))
    statistics = model.residency.statistics()
    assert statistics.bytes_read == statistics.misses * one
    assert (statistics.misses, statistics.hits, statistics.read_backs) == (12, 0, 3)
    model(mx.array([[1]]))
    assert model.residency.statistics().hit_rate == 0.5
    assert model.residency.statistics().seconds_waited > 0
    model.residency.reset_statistics()
    assert model.residency.statistics()[:6] == (0, 0, 0, 0, 0, 0)


def test_views_stay_where_they_are(folders, residents):
    model, _ = om.load(folders[32], dtype="float32", expert_slots=8)

    def addresses():
        parts = [part for bank in model.residency.banks for part in bank.parts]
        for part in parts:
            assert np.array(part.array, copy=False).ctypes.data == part.memory.view.ctypes.data
        return [part.memory.view.ctypes.data for part in parts]

    before = addresses()
    logits_of(model, 16)
    model.set_dtype(mx.bfloat16)
    model.set_dtype(mx.float32)
    cache = model.make_cache()
    prefill(model, PROMPT, cache, 512)
    for layer in cache:
        layer.rewind(1)
    assert addresses() == before
    experts = model.layers[0].mlp.experts.experts
    assert experts.gate_up_proj.weight is model.residency.banks[0].parts[0].array


# --- fences -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writes", ["view", "copy"])
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_results_nobody_has_asked_for_are_computed_before_their_slots_change(folders, residents, writes, num_tokens):
    """As with the last layer of a chunk, whose experts no later router waits for."""
    model = streamed(folders[32], 4, writes=writes)
    experts, known = model.layers[0].mlp.experts, residents[32].layers[0].mlp.experts
    x = mx.random.normal((1, num_tokens, 64), key=mx.random.key(0))
    choices = [
        mx.array(np.arange(4 * i, 4 * i + 4)[None, None].repeat(num_tokens, 1).astype(np.uint32)) for i in range(8)
    ]
    pending = [experts(x, choice) for choice in choices]
    for outputs, choice in zip(pending, choices, strict=True):
        assert mx.array_equal(outputs, known(x, choice))


def test_many_results_may_be_pending_at_once(folders, residents):
    model, _ = om.load(folders[32], dtype="float32", expert_slots=4)
    experts, known = model.layers[0].mlp.experts, residents[32].layers[0].mlp.experts
    choice = mx.array([[[3, 1, 2, 0]]], mx.uint32)
    xs = [mx.random.normal((1, 1, 64), key=mx.random.key(i)) for i in range(40)]
    pending = [experts(x, choice) for x in xs]
    experts(xs[0], choice + 4)
    for x, outputs in zip(xs, pending, strict=True):
        assert mx.array_equal(outputs, known(x, choice))


def test_an_expert_that_is_wanted_is_never_evicted():
    random = np.random.default_rng(0)
    for num_slots in (1, 2, 5, 8):
        table, content = SlotTable(num_slots), {}
        for _ in range(300):
            wanted = random.permutation(12)[: random.integers(1, num_slots + 1)].tolist()
            before = dict(table.slot_of)
            placed = table.place(wanted)
            assert [expert for expert, _ in placed] == [expert for expert in wanted if expert not in before]
            assert all(table.slot_of[expert] == before[expert] for expert in wanted if expert in before)
            taken = [slot for _, slot in placed]
            assert not set(taken) & set(table.slot_of.values())
            if random.random() < 0.8:  # else the reads failed
                table.arrived(placed)
                content.update({slot: expert for expert, slot in placed})
            table.use(wanted)
            assert all(content[slot] == expert for expert, slot in table.slot_of.items())
            assert len(set(table.slot_of.values())) == len(table.slot_of) <= num_slots
        with pytest.raises(AssertionError, match=f"{num_slots + 1} experts"):
            table.place(list(range(num_slots + 1)))


def test_the_least_recently_used_goes_first():
    table = SlotTable(3)
    for wanted in ([1], [2], [3], [1]):
        table.arrived(table.place(wanted))
        table.use(wanted)
    table.arrived(table.place([4]))
    assert set(table.slot_of) == {3, 1, 4}
    assert table.evictions == 1


def test_another_policy_can_take_its_place(folders, residents):
    class MostRecentlyUsed(LeastRecentlyUsed):
        def victim(self, candidates):
            return max(candidates, key=self._last_use.get)

    model, other = streamed(folders[32], 8), streamed(folders[32], 8, policy=MostRecentlyUsed)
    expected = logits_of(residents[32], 512)
    assert mx.array_equal(logits_of(model, 512), expected)
    assert mx.array_equal(logits_of(other, 512), expected)
    assert model.residency.statistics().misses != other.residency.statistics().misses


# --- statistics --------------------------------------------------------------------------------------------------------


def test_an_answer_says_what_was_read_for_it(folders):
    model, _ = om.load(folders[32], dtype="float32", expert_slots=6)
    before = model.residency.statistics()
    *_, last = stream_generate(model, None, PROMPT, max_tokens=9)
    prompt, answer = last.statistics.prompt_experts, last.statistics.answer_experts
    every = model.residency.statistics().since(before)
    assert prompt.misses + answer.misses == every.misses > 0
    assert prompt.bytes_read + answer.bytes_read == every.bytes_read
    assert answer.hits + answer.misses == 8 * 3 * 4  # eight steps, the first token comes from the prompt
    assert [layer.hits + layer.misses for layer in answer.layers] == [8 * 4] * 3
    assert 0 < answer.hit_rate < 1
    *_, again = stream_generate(model, None, PROMPT, max_tokens=9)
    assert again.statistics.answer_experts.hits + again.statistics.answer_experts.misses == 8 * 3 * 4
    assert prompt.misses + answer.misses == every.misses  # what was given stays as it was


def test_the_command_line_answers_and_says_what_was_read(capsys):
    arguments = [
        "generate",
        "--model",
        "demo-gpt-oss",
        "--expert-slots",
        "6",
        "--reasoning-effort",
        "low",
        "What is a boat?",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert "MB a token" in shown.err
    assert main([*arguments, "--max-tokens", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["statistics"]
    assert found["answer_experts"]["misses"] > 0
    assert 0 < found["answer_experts"]["hit_rate"] < 1
    assert main(["generate", "--model", "demo-gpt-oss", "--max-tokens", "3", "--json", "What is a banjo?"]) == 0
    assert "answer_experts" not in json.loads(capsys.readouterr().out)["statistics"]


# --- what a view is ---------------------------------------------------------------------------------------------------


def test_a_view_that_is_a_copy_is_found_out(monkeypatch, folders, residents):
    """NumPy 1 copies without a word what it cannot view."""
    array = np.array
    monkeypatch.setattr(writable.np, "array", lambda a, copy=True: array(a) if not copy else array(a, copy=copy))
    assert writable.memory_of(mx.zeros((3,))) is None
    assert not writable.views_work()
    assert writable.Allocator().way == writable.Allocator("view").way == "copy"
    model = streamed(folders[32], 5)
    monkeypatch.undo()
    assert model.residency.writes == "copy"
    assert writable.views_work()
    assert mx.array_equal(logits_of(model, 16, steps=2), logits_of(residents[32], 16, steps=2))


def test_copies_never_hold_the_bank_twice(tmp_path):
    config = {**SMALL, "num_hidden_layers": 1, "num_local_experts": 16, "hidden_size": 512, "intermediate_size": 512}
    model = streamed(write_random_gpt_oss(tmp_path / "wide", config), 12, writes="copy")
    bank = model.residency.banks[0]
    experts = model.layers[0].mlp.experts
    x = mx.random.normal((1, 1, 512))
    mx.eval(experts(x, mx.array([[[0, 1, 2, 3]]], mx.uint32)))
    for first in (4, 8, 12, 0):
        mx.eval(x)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(experts(x, mx.array([[[first, first + 1, first + 2, first + 3]]], mx.uint32)))
        assert mx.get_peak_memory() - before < bank.nbytes / 4  # one expert is a twelfth


# --- CUDA's driver ----------------------------------------------------------------------------------------------------


def test_a_mac_never_imports_it(monkeypatch):
    monkeypatch.setattr(writable.sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "openelm_mlx.experts.cuda_driver", None)  # to import it would raise
    assert writable.cuda_driver() is None


class MemoryDriver:
    """CUDA's driver for arrays of the CPU backend: what is copied arrives when it is waited for, and no earlier."""

    def __init__(self):
        self.on_its_way, self.num_copies = [], 0

    def pinned(self, nbytes):
        memory = np.zeros(nbytes, np.uint8)
        self.memory = memory  # kept
        return cuda_driver.Pinned(memory.data, memory.ctypes.data, lambda: None)

    def use(self):
        pass

    def new_stream(self):
        return None

    def end_stream(self, stream):
        self.wait(stream)

    def copy(self, address, pinned, nbytes, stream):
        self.on_its_way.append((address, pinned, nbytes))
        self.num_copies += 1

    def wait(self, stream):
        for each in self.on_its_way:
            ctypes.memmove(*each)
        self.on_its_way.clear()


@pytest.fixture
def driver(monkeypatch):
    """A driver in the place of CUDA's, with few and small buffers: a block of experts needs them several times over."""
    driver = MemoryDriver()
    monkeypatch.setattr(writable, "cuda_driver", lambda: driver)
    monkeypatch.setattr(cuda_driver, "address_of", lambda array: np.array(array, copy=False).ctypes.data)
    monkeypatch.setattr(cuda_driver, "NUM_BUFFERS", 6)
    for module in (records, cuda_driver):
        monkeypatch.setattr(module, "PIECE_BYTES", 1500)
    monkeypatch.setattr(records, "INLINE_BYTES", 1000)
    return driver


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("num_slots", [4, 9])
@pytest.mark.parametrize("chunk_length", [6, 512])
def test_through_the_driver_the_bits_are_the_same(folders, residents, driver, num_slots, chunk_length):
    model = streamed(folders[32], num_slots, writes="driver")
    assert model.residency.writes == "driver"
    expected = logits_of(residents[32], chunk_length)
    for layers_at_once in (1, 3, None):
        assert mx.array_equal(logits_of(model, chunk_length, layers_at_once=layers_at_once), expected)
    assert driver.num_copies > 1000
    assert not driver.on_its_way


def test_without_a_driver_slots_are_copied_into(folders, monkeypatch):
    monkeypatch.setattr(writable, "cuda_driver", lambda: None)
    assert streamed(folders[32], 4, writes="driver").residency.writes == "copy"
    assert streamed(folders[32], 4).residency.writes == "view"


@pytest.mark.parametrize("kind", ["end", "error", "interrupt"])
@pytest.mark.parametrize("number", [0, 3, 40])
def test_a_failed_read_leaves_every_buffer_free(own_copy, answer, driver, kind, number):
    model = streamed(own_copy, 6, writes="driver")
    courier = model.residency.banks[0].parts[0].memory._courier
    for file in model.residency.files:
        file.read_into = failing(kind, number)
    with pytest.raises(KeyboardInterrupt if kind == "interrupt" else CheckpointError):
        list(stream_generate(model, None, PROMPT, max_tokens=30))
    check_slots(model)
    for file in model.residency.files:
        file.read_into = preadv_into
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=30)) == answer
    assert sorted(courier._free.get_nowait() for _ in range(6)) == list(range(6))


def test_scales_are_looked_at_on_their_way(own_copy, driver):
    entry = open_checkpoint(own_copy).entries["model.layers.1.mlp.experts.gate_up_proj_scales"]
    with open(entry.file, "r+b") as stream:
        stream.seek(entry.start)
        stream.write(b"\xff" * entry.nbytes)
    model = streamed(own_copy, 6, writes="driver")
    with pytest.raises(CheckpointError, match="NaN"):
        list(stream_generate(model, None, PROMPT, max_tokens=3))
    check_slots(model)


def test_a_driver_is_tried_before_it_is_trusted(monkeypatch):
    """One that copies to another place, or nothing, is found out."""
    monkeypatch.setattr(cuda_driver, "address_of", lambda array: np.array(array, copy=False).ctypes.data)
    monkeypatch.setattr(cuda_driver, "ResultBuffer", lambda driver: None)
    monkeypatch.setattr(cuda_driver, "results_on_host", lambda arrays, buffer: [np.array(each) for each in arrays])
    assert cuda_driver.driver_works(MemoryDriver())

    class Elsewhere(MemoryDriver):
        def copy(self, address, pinned, nbytes, stream):
            super().copy(address - nbytes, pinned, nbytes, stream)

    class Lost(MemoryDriver):
        def copy(self, address, pinned, nbytes, stream):
            pass

    assert not cuda_driver.driver_works(Elsewhere())
    assert not cuda_driver.driver_works(Lost())
    monkeypatch.setattr(cuda_driver, "results_on_host", lambda arrays, buffer: [np.zeros(3, np.uint32)])
    assert not cuda_driver.driver_works(MemoryDriver())


def test_results_that_nobody_waited_for_are_not_taken_for_the_next_ones(monkeypatch):
    """An interruption leaves a kernel behind, which writes its numbers later: before those of the next one."""
    driver, queued = MemoryDriver(), []

    def kernel(inputs, **_):
        numbers, address = (np.array(each) for each in inputs)
        queued.append((int(address[0]), numbers))
        return [inputs[0]]

    def look():
        """The clock, which the host asks between two looks: one kernel has run meanwhile."""
        if is_interrupted:
            raise KeyboardInterrupt
        if queued:
            address, numbers = queued.pop(0)
            ctypes.memmove(address, numbers.ctypes.data, numbers.nbytes)
        return 0.0

    monkeypatch.setattr(cuda_driver, "_result_kernel", lambda: kernel)
    monkeypatch.setattr(cuda_driver.time, "perf_counter", look)
    buffer, is_interrupted = cuda_driver.ResultBuffer(driver), True
    with pytest.raises(KeyboardInterrupt):
        cuda_driver.results_on_host([mx.array([1, 2, 3, 4], mx.uint32)], buffer)
    assert len(queued) == 1  # still to come
    is_interrupted = False
    for numbers in ([9, 8, 7, 6], [5, 5, 5, 5], [1, 2, 3, 4]):
        asked = [mx.array([numbers[:2]], mx.uint32), mx.array(numbers[2:], mx.uint32)]
        first, second = cuda_driver.results_on_host(asked, buffer)
        assert (first.tolist(), second.tolist()) == ([numbers[:2]], numbers[2:])


def test_there_is_no_driver_for_the_cpu():
    assert cuda_driver.working_driver() is None


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_copy(folders, tmp_path):
    return shutil.copytree(folders[32], tmp_path / "own")


@pytest.fixture(scope="module")
def answer(residents):
    """What the resident model answers."""
    return tokens_of(stream_generate(residents[32], None, PROMPT, max_tokens=30))


def broken_off(model, break_it, after):
    """The tokens that came before the error, and the error, when `break_it` is called after some tokens."""
    seen = []

    def read_on():
        for chunk in stream_generate(model, None, PROMPT, max_tokens=30):
            seen.append(chunk.token)
            if len(seen) == after:
                break_it()

    with pytest.raises(CheckpointError) as raised:
        read_on()
    return seen, str(raised.value)


def check_slots(model):
    for bank in model.residency.banks:
        slots = list(bank.table.slot_of.values())
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(bank.num_slots))


def failing(kind, number):
    """A read function whose call `number` and later ones fail."""
    count = itertools.count()

    def read_into(fd, buffer, offset):
        if next(count) < number:
            return preadv_into(fd, buffer, offset)
        if kind == "end":
            return 0
        if kind == "interrupt":
            raise KeyboardInterrupt
        raise OSError(errno.EIO, "Input/output error")

    return read_into


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("number", [0, 3, 50])
@pytest.mark.parametrize("kind", ["end", "error"])
@pytest.mark.parametrize("inline", [True, False])
def test_a_failed_read_ends_the_request_and_no_more(own_copy, answer, kind, number, inline, monkeypatch):
    monkeypatch.setattr(records, "INLINE_BYTES", 2**20 if inline else 0)
    monkeypatch.setattr(records, "PIECE_BYTES", 700)
    model, _ = om.load(own_copy, dtype="float32", expert_slots=6)

    def break_it():
        for file in model.residency.files:
            file.read_into = failing(kind, number)

    seen, message = broken_off(model, break_it, 2)
    assert 2 <= len(seen) < 30
    assert seen == answer[: len(seen)]
    assert ("ends at byte" if kind == "end" else "Input/output error") in message
    check_slots(model)
    for file in model.residency.files:
        file.read_into = preadv_into
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=30)) == answer
    check_slots(model)


def test_ctrl_c_between_reads_leaves_the_slots_in_order(own_copy, answer):
    model, _ = om.load(own_copy, dtype="float32", expert_slots=6)
    for file in model.residency.files:
        file.read_into = failing("interrupt", 30)
    with pytest.raises(KeyboardInterrupt):
        list(stream_generate(model, None, PROMPT, max_tokens=30))
    check_slots(model)
    for file in model.residency.files:
        file.read_into = preadv_into
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=30)) == answer


INTERRUPTED = """
import faulthandler, json, random, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
import test_experts_residency as tests
from openelm_mlx.experts import cuda_driver, records, writable
faulthandler.dump_traceback_later(240, exit=True)
for module in (records, cuda_driver):
    module.PIECE_BYTES = 1500
records.INLINE_BYTES, cuda_driver.NUM_BUFFERS, driver = 0, 6, tests.MemoryDriver()
writable.cuda_driver, cuda_driver.address_of = lambda: driver, lambda array: tests.np.array(array, copy=False).ctypes.data
model = tests.streamed(tests.Path(sys.argv[2]), 5, writes=sys.argv[3])
answer = lambda: tests.tokens_of(tests.stream_generate(model, None, tests.PROMPT, max_tokens=12, prefill_chunk=17))
call = lambda: tests.np.array(model(tests.mx.array([[5, 6, 7]])))
expected, logits, is_armed, counts, kept = answer(), call(), False, [0, 0], None

def beside():
    with tests.mx.stream(tests.mx.new_stream(tests.mx.default_device())):
        found.append(answer() == expected and tests.np.array_equal(call(), logits))

def interrupt(*_):
    if is_armed:
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
chance, longest = random.Random(7), 0.01
while counts[0] <= 22:
    try:
        is_armed = True
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0003, longest))
        started = time.perf_counter()
        answer()
        is_armed = False
        longest = time.perf_counter() - started  # as long as an answer takes here: then most are hit
    except KeyboardInterrupt as error:
        is_armed = False
        counts[0] += 1
        kept = error  # with its frames, as a notebook keeps it
    signal.setitimer(signal.ITIMER_REAL, 0)
    if chance.random() < 0.2:
        counts[1] += 1
        assert answer() == expected and tests.np.array_equal(call(), logits)
        found = []
        other = threading.Thread(target=beside)
        other.start()
        other.join()
        assert found == [True], found
assert answer() == expected
assert threading.active_count() == 9, threading.enumerate()
tests.check_slots(model)
assert all(len(bank.table.slot_of) == 5 for bank in model.residency.banks)
print(json.dumps([model.residency.writes, *counts]))
"""


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("writes", ["view", "driver", "copy"])
def test_ctrl_c_at_any_moment(folders, writes):
    """Raised in the thread that waits, wherever it is: the next answer is right, and nothing waits for ever."""
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(Path(__file__).parent), str(folders[32]), writes],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen[0] == writes
    assert seen[1] > 20
    assert seen[2] > 3


def test_short_reads_go_on(own_copy, answer):
    model, _ = om.load(own_copy, dtype="float32", expert_slots=6)
    for file in model.residency.files:
        file.read_into = lambda fd, buffer, offset: preadv_into(fd, buffer[:501], offset)
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=30)) == answer


def test_a_slow_thread_is_waited_for_when_another_fails(own_copy, answer, monkeypatch):
    """It would write into a slot that has been given to another expert."""
    monkeypatch.setattr(records, "INLINE_BYTES", 0)
    model = streamed(own_copy, 6, embedding_on_disk=False)
    [file] = model.residency.files
    count, other_started, gate, started, finished = itertools.count(), threading.Event(), threading.Event(), [], []

    def read_into(fd, buffer, offset):
        if next(count) == 0:
            other_started.wait(60)
            threading.Timer(0.2, gate.set).start()
            raise OSError(errno.EIO, "Input/output error")
        started.append(offset)
        other_started.set()
        gate.wait(60)
        finished.append(offset)
        return preadv_into(fd, buffer, offset)

    file.read_into = read_into
    with pytest.raises(CheckpointError):
        model(mx.array([[1]]))
    assert len(started) == len(finished) > 0
    file.read_into = preadv_into
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=30)) == answer


def test_a_file_that_is_cut_and_put_back(own_copy, answer):
    model, _ = om.load(own_copy, dtype="float32", expert_slots=6)
    file = own_copy / "model.safetensors"
    data, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    seen, message = broken_off(model, lambda: os.truncate(file, 2000), 3)
    assert seen == answer[: len(seen)]
    assert "has changed since the model was loaded (2,000 bytes now" in message
    with pytest.raises(CheckpointError, match="restore the file"):
        list(stream_generate(model, None, PROMPT, max_tokens=3))
    file.write_bytes(data)
    os.utime(file, ns=times)
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=30)) == answer


@pytest.mark.parametrize("during", [False, True])
def test_other_bytes_of_the_same_size_are_noticed(own_copy, answer, during):
    """Before a read, and between its beginning and its end."""
    model, _ = om.load(own_copy, dtype="float32", expert_slots=6)
    file = own_copy / "model.safetensors"
    data = file.read_bytes()

    def change():
        file.write_bytes(data[:-5000] + bytes(5000))
        os.utime(file, ns=(0, 12345))

    def change_during_a_read():
        def read_into(fd, buffer, offset):
            got = preadv_into(fd, buffer, offset)
            change()
            return got

        model.residency.files[0].read_into = read_into

    seen, message = broken_off(model, change_during_a_read if during else change, 3)
    assert seen == answer[: len(seen)]
    assert "has changed" in message


def test_a_file_that_changes_during_its_only_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))

    def read_into(fd, buffer, offset):
        (tmp_path / "file").write_bytes(bytes(101))
        return preadv_into(fd, buffer, offset)

    record = Record(RecordFile(tmp_path / "file", read_into), 0, HostTarget(memoryview(bytearray(50))))
    with pytest.raises(CheckpointError, match=r"101 bytes now, 100 then"):
        RecordReader(num_threads=0).read([record])


def test_a_file_replaced_by_another_goes_on_from_the_one_that_was_opened(own_copy, answer):
    """A download that is renamed into place leaves the open file as it is; opened again, it is another file."""
    model, _ = om.load(own_copy, dtype="float32", expert_slots=6)
    file = own_copy / "model.safetensors"
    (own_copy / "new").write_bytes(bytes(file.stat().st_size))
    os.replace(own_copy / "new", file)
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=30)) == answer
    model.residency.files[0].read_into = failing("error", 0)
    with pytest.raises(CheckpointError, match="Input/output error"):
        list(stream_generate(model, None, PROMPT[::-1], max_tokens=30))
    model.residency.files[0].read_into = preadv_into
    with pytest.raises(CheckpointError, match="has changed"):
        list(stream_generate(model, None, PROMPT[::-1], max_tokens=30))


def test_a_removed_disk(own_copy, answer, tmp_path):
    model, _ = om.load(own_copy, dtype="float32", expert_slots=6)
    os.rename(own_copy, tmp_path / "elsewhere")
    model.residency.files[0].read_into = failing("error", 0)
    with pytest.raises(CheckpointError, match="Input/output error"):
        list(stream_generate(model, None, PROMPT, max_tokens=30))
    model.residency.files[0].read_into = preadv_into
    with pytest.raises(CheckpointError, match="No such file"):
        list(stream_generate(model, None, PROMPT, max_tokens=30))
    os.rename(tmp_path / "elsewhere", own_copy)
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=30)) == answer


def test_scales_that_stand_for_no_number(own_copy):
    """What loading everything refuses is refused here when it is read."""
    checkpoint = open_checkpoint(own_copy)
    entry = checkpoint.entries["model.layers.1.mlp.experts.down_proj_scales"]
    with open(entry.file, "r+b") as stream:
        stream.seek(entry.start)
        stream.write(b"\xff" * entry.nbytes)
    model, _ = om.load(own_copy, expert_slots=6)
    with pytest.raises(CheckpointError, match="NaN"):
        list(stream_generate(model, None, PROMPT, max_tokens=3))
    check_slots(model)


def test_large_reads_are_split(tmp_path, monkeypatch):
    """macOS refuses 2 GiB in one call."""
    assert records.LARGEST_READ < 2**31
    (tmp_path / "file").write_bytes(bytes(range(100)))
    monkeypatch.setattr(records, "LARGEST_READ", 7)
    sizes, target = [], bytearray(50)

    def read_into(fd, buffer, offset):
        sizes.append(buffer.nbytes)
        return preadv_into(fd, buffer, offset)

    RecordFile(tmp_path / "file", read_into).read(memoryview(target), 20)
    assert target == bytes(range(20, 70))
    assert sizes == [7] * 7 + [1]


def test_without_preadv(folders, residents, monkeypatch):
    monkeypatch.delattr(records.os, "preadv")
    monkeypatch.setattr(records, "INLINE_BYTES", 0)
    model, _ = om.load(folders[32], dtype="float32", expert_slots=6)
    assert isinstance(model.residency.files[0].read_into, PlainReader)
    assert mx.array_equal(logits_of(model, 16, steps=2), logits_of(residents[32], 16, steps=2))


# --- who else is there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [1, 2])
def test_two_threads(folders, answer, models):
    """Two models, and one model with two answers under way."""
    loaded = [om.load(folders[32], dtype="float32", expert_slots=5)[0] for _ in range(models)]
    seen = in_threads(lambda i: tokens_of(stream_generate(loaded[i % models], None, PROMPT, max_tokens=30)))
    assert seen == [answer, answer]


def test_the_model_called_from_two_threads(folders, residents):
    """Without a loop around it: each layer's turn is taken anew, and what others still have to compute is waited for."""
    model, _ = om.load(folders[32], dtype="float32", expert_slots=5)
    random = np.random.default_rng(4)
    prompts = [[random.integers(0, 300, (1, length)) for length in (1, 3, 20, 1, 40, 2) * 3] for _ in range(2)]
    expected = [[np.array(residents[32](mx.array(each))) for each in rows] for rows in prompts]
    seen = in_threads(lambda i: [np.array(model(mx.array(each))) for each in prompts[i]])
    for rows, known in zip(seen, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(rows, known, strict=True))
        assert len(rows) == len(known)


def test_two_answers_in_turns_from_one_model(folders, answer):
    model, _ = om.load(folders[32], dtype="float32", expert_slots=5)
    both = [stream_generate(model, None, PROMPT, max_tokens=30) for _ in range(2)]
    assert [(a.token, b.token) for a, b in zip(*both, strict=True)] == [(token, token) for token in answer]


def test_a_folder_that_cannot_be_written(own_copy, answer):
    before = sorted(path.name for path in own_copy.iterdir())
    for path in (*own_copy.iterdir(), own_copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    model, _ = om.load(own_copy, dtype="float32", expert_slots=5)
    assert tokens_of(stream_generate(model, None, PROMPT, max_tokens=30)) == answer
    assert sorted(path.name for path in own_copy.iterdir()) == before
    own_copy.chmod(0o755)


def test_files_are_closed_with_the_model(folders):
    model, _ = om.load(folders[32], expert_slots=5)
    descriptors = [file._fd for file in model.residency.files]
    assert all(os.fstat(fd) for fd in descriptors)
    files = model.residency.files
    del model
    import gc

    gc.collect()
    assert all(file._fd == -1 for file in files)


MEASURE = """
import json, sys
import mlx.core as mx
import openelm_mlx as om
model, _ = om.load(sys.argv[1], dtype="float32", expert_slots=int(sys.argv[2]) or None)
list(om.stream_generate(model, None, list(range(1, 60)), max_tokens=5))
print(json.dumps([mx.get_peak_memory(), 0 if model.residency is None else model.residency.nbytes]))
"""


@pytest.mark.slow
def test_memory_in_fresh_processes(tmp_path):
    """Streamed, the peak is that of all experts in memory, less those that are not there."""
    config = {**SMALL, "num_local_experts": 128, "hidden_size": 256, "intermediate_size": 256}
    folder = write_random_gpt_oss(tmp_path / "many", config)
    peaks = {}
    for slots in (0, 8, 128):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder), str(slots)], capture_output=True, text=True, check=True
        )
        peaks[slots] = json.loads(run.stdout)
    slot = peaks[128][1] // 128
    assert peaks[8][1] == 8 * slot
    scratch = 2 * 2**20
    assert peaks[8][0] <= peaks[0][0] - 120 * slot + scratch
    assert peaks[128][0] <= peaks[0][0] + scratch


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [3, 33, 0, True, 4.0])
def test_a_number_of_slots_out_of_range(folders, num_slots):
    with pytest.raises(SettingError, match=r"uses 4 of the 32 experts in a layer.*from 4 to 32"):
        om.load(folders[32], expert_slots=num_slots)


def test_a_dense_model_has_no_experts(capsys):
    with pytest.raises(SettingError, match="openelm has no experts"):
        om.load("demo-openelm", expert_slots=4)
    assert main(["generate", "--model", "demo-openelm", "--expert-slots", "4", "Hello"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_layouts_that_cannot_be_read_in_place(folders, residents, tmp_path):
    weights = dict(tree_flatten(residents[32].parameters()))
    parts = {}
    for name, array in weights.items():
        if ".gate_up_proj." in name:
            parts[name.replace("gate_up_proj", "gate_proj")] = array[:, ::2]
            parts[name.replace("gate_up_proj", "up_proj")] = array[:, 1::2]
        elif ".qkv_proj." in name:
            for each, piece in zip("qkv", mx.split(array, [64, 96]), strict=True):
                parts[name.replace("qkv_proj", f"{each}_proj")] = piece
        else:
            parts[name] = array
    config = json.loads((folders[32] / "config.json").read_text())
    config.pop("quantization_config")
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    split = tmp_path / "split"
    split.mkdir()
    mx.save_safetensors(str(split / "model.safetensors"), parts)
    (split / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(om.load(split, dtype="float32")[0](mx.array([[1]])), residents[32](mx.array([[1]])))
    with pytest.raises(CheckpointError, match=r"stores gate and up separately: convert it once, `python convert.py"):
        om.load(split, expert_slots=4)
