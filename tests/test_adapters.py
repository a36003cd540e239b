"""Adapters that a model serves: loaded, swapped, several at once; each request gets the answer that it gets alone."""

import json
import random
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture
from mlx.utils import tree_flatten, tree_map

import openelm_mlx as om
from openelm_mlx.adapters import base_hash, bytes_of, put_adapter, scratch_per_token
from openelm_mlx.checkpoint.adapter_files import read_adapter, write_adapter
from openelm_mlx.checkpoint.torch_file import refuse_harmful
from openelm_mlx.decoding.batch_step import BatchStep
from openelm_mlx.decoding.compiled_step import CompiledStep
from openelm_mlx.decoding.pieces import weights_version
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.decoding.step import PlainStep
from openelm_mlx.decoding.streamed_step import StreamedStep
from openelm_mlx.errors import CheckpointError, MemoryLimitError, SettingError
from openelm_mlx.models import build_model
from openelm_mlx.models.adapter_targets import targets_of
from openelm_mlx.models.adapters import AdapterConfig, attach, detach
from openelm_mlx.models.low_rank import Adapter, Pair
from openelm_mlx.models.rows import Rows, flat_logits
from openelm_mlx.models.slots import SlotBank
from openelm_mlx.runtime import runtime_of
from openelm_mlx.specs import spec_from_config

ADAPTERS = FIXTURES / "adapters"
FAMILIES = {"openelm": "openelm_tiny", "gpt_oss": "gpt_oss_tiny"}


def random_adapter(spec, seed, groups, rank=4, dora=(), ties_head=False):
    """Large enough that every token depends on it."""
    rng, pairs = np.random.default_rng(seed), {}
    for name, target in targets_of(spec).items():
        if target.group not in groups:
            continue
        a, b = (mx.array(rng.normal(0, 0.1, shape).astype(np.float32)) for shape in target.shapes(rank))
        magnitude = mx.array(rng.uniform(0.5, 2.0, target.rows).astype(np.float32)) if target.group in dora else None
        pairs[name] = Pair(a, b, 1.5, magnitude)
    return Adapter(pairs, ties_head=ties_head)


def with_adapters(model):
    """a: everything, b: of another rank, attention alone and DoRA, c: embedding and head."""
    spec = model.spec
    everything = ("attention", "feed-forward", "experts", "router", "embedding", "head")
    put_adapter(model, "a", random_adapter(spec, 1, everything), activate=False)
    put_adapter(model, "b", random_adapter(spec, 2, ("attention",), 7, ("attention",)), activate=False)
    put_adapter(
        model, "c", random_adapter(spec, 3, ("embedding", "experts"), 2, ties_head=spec.tied_head), activate=False
    )
    return model


@pytest.fixture(scope="module")
def models():
    return {family: with_adapters(load_fixture(FIXTURES / folder)) for family, folder in FAMILIES.items()}


NAMES = ("a", "b", "c", "none")


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, 290, length).tolist()


def seen(chunks):
    return [(c.token, c.logprob, c.top_logprobs, c.finish_reason) for c in chunks]


def requests_of(seed, count=9):
    draw = random.Random(seed)
    for at in range(count):
        options = {"max_tokens": draw.choice([1, 3, 9, 14]), "logprobs": 2, "adapter": NAMES[at % 4]}
        if draw.random() < 0.3:
            options["sampling"] = om.SamplingParams(temperature=1.2, seed=at)
        yield prompt_of(draw.choice([1, 2, 5, 17, 30]), draw.randrange(3)), options


# --- one at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["openelm_lora", "openelm_dora", "openelm_lora_embedding", "gpt_oss_experts"])
def test_loaded_with_an_adapter(case, monkeypatch):
    """The logits of PEFT, also with experts on disk, and the base's without it."""
    known = dict(np.load(ADAPTERS / case / "oracle.npz"))
    base = json.loads((ADAPTERS / case / "case.json").read_text())["base"]
    tokens = mx.array(known["eval_tokens"])

    def difference(model, which):
        return np.abs(np.array(model(tokens))[..., known["columns"]] - known[f"logits_{which}"]).max()

    for slots in (None, 4) if base.startswith("gpt_oss") else (None,):
        folder = ADAPTERS / case / "peft_final"
        model, _ = om.load(FIXTURES / base, dtype="float32", adapter=folder, expert_slots=slots)
        assert om.adapter_names(model) == ("peft_final",)
        assert difference(model, "final") < 1e-4
        om.use_adapter(model, "none")
        assert difference(model, "base") < 1e-4
        assert om.add_adapter(model, ADAPTERS / case / "peft_initial") == "peft_initial"
        assert difference(model, "initial") < 1e-4
        om.remove_adapter(model, "peft_final")
        assert difference(model, "initial") < 1e-4
        om.remove_adapter(model, "peft_initial")
        assert difference(model, "base") < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_left_as_it_was(models, family):
    """Bit for bit, with adapters beside it and none chosen; parameters count as not replaced."""
    model, plain = models[family], load_fixture(FIXTURES / FAMILIES[family])
    tokens = mx.array([prompt_of(20), prompt_of(20, 1)])
    assert mx.array_equal(model(tokens), plain(tokens))
    version = weights_version(model)
    put_adapter(model, "d", random_adapter(model.spec, 9, ("attention",)), activate=False)
    assert mx.array_equal(model(tokens), plain(tokens))
    om.remove_adapter(model, "d")
    assert weights_version(model) == version
    answers = {name: om.generate(model, None, prompt_of(5), max_tokens=1, logprobs=0, adapter=name) for name in NAMES}
    assert len(answers) == 4
    found = [
        seen(om.stream_generate(model, None, prompt_of(5), max_tokens=3, logprobs=1, adapter=name)) for name in NAMES
    ]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_steps_are_the_whole_pass(models, family, name):
    """Plain and compiled, over a cache."""
    model = models[family]
    tokens = mx.array([prompt_of(24, 4)])
    with model.adapters.using(model.adapters.of(name)):
        known = model(tokens)[0]
        for make in (PlainStep, CompiledStep):
            cache = model.make_cache()
            model(tokens[:, :20], cache)
            step = make(model, cache)
            found = mx.stack([step(tokens[0, at]) for at in range(20, 24)])
            assert mx.allclose(found, known[20:], atol=2e-4)


def test_compiled_pieces_follow_the_adapter(models):
    """One step, with which adapter is said each time."""
    model = models["openelm"]
    cache = model.make_cache()
    model(mx.array([prompt_of(6)]), cache)
    step, found = CompiledStep(model, cache), {}
    for name in (*NAMES, *NAMES):
        with model.adapters.using(model.adapters.of(name)):
            logits = step(mx.array(7))
            assert mx.array_equal(found.setdefault(name, logits), logits)
        for layer in cache:
            layer.rewind(1)
    assert len({tuple(logits.tolist()) for logits in found.values()}) == 4


@pytest.mark.parametrize("compiled", [False, True])
def test_streamed_steps(compiled):
    """Experts on disk, the adapter's in memory: the numbers of the model that has them all."""
    folder, seed = FIXTURES / "gpt_oss_tiny", 5
    resident = with_adapters(load_fixture(folder))
    streamed, _ = om.load(folder, dtype="float32", expert_slots=4)
    with_adapters(streamed)
    prompt = mx.array([prompt_of(12, seed)])
    for name in ("a", "c"):
        logits = []
        for model in (resident, streamed):
            with model.adapters.using(model.adapters.of(name)):
                cache = model.make_cache()
                model(prompt, cache)
                step = PlainStep(model, cache) if model is resident else StreamedStep(model, cache, compile=compiled)
                logits.append(mx.stack([step(mx.array(token)) for token in (5, 6, 7)]))
        assert mx.allclose(*logits, atol=1e-5)


# --- several at once --------------------------------------------------------------------------------------------------


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_each_request_its_own_adapter(models, family, seed):
    """Bit for bit what each gets alone, whoever is beside it."""
    model = models[family]
    requests = list(requests_of(seed))
    alone = [seen(om.stream_generate(model, None, prompt, **options)) for prompt, options in requests]
    with om.Engine(model, max_running=[2, 5, 32][seed]) as engine:
        engine._scheduler.pace.longest = [2, 16, 2**20][seed]
        handles = [engine.submit(prompt, **options) for prompt, options in requests]
        for handle, known in zip(handles, alone, strict=True):
            assert seen(handle) == known


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["slots", "compiled", "streamed"])
def test_other_ways_of_a_pass(models, family, way):
    model = models[family]
    if way == "streamed":
        if family == "openelm":
            return
        model, _ = om.load(FIXTURES / FAMILIES[family], dtype="float32", expert_slots=5)
        with_adapters(model)
    elif way == "slots":
        model = with_adapters(load_fixture(FIXTURES / FAMILIES[family]))
        model.choices = replace(model.choices, slots=True)
    else:
        model = with_adapters(load_fixture(FIXTURES / FAMILIES[family]))
        model.choices = replace(model.choices, compiled_step=True)
    requests = list(requests_of(7, 8))
    alone = [seen(om.stream_generate(models[family], None, prompt, **options)) for prompt, options in requests]
    with om.Engine(model, max_running=6) as engine:
        handles = [engine.submit(prompt, **options) for prompt, options in requests]
        found = [seen(handle) for handle in handles]
    for one, known in zip(found, alone, strict=True):
        assert [token for token, *_ in one] == [token for token, *_ in known]
        assert np.allclose([each[1] for each in one], [each[1] for each in known], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flat_pass_by_rows(models, family):
    """A prompt's chunk beside decoding rows, compiled and not: each row is the one of its own adapter."""
    model = models[family]
    adapters = model.adapters
    lengths = {"a": 5, "none": 1, "b": 1, "c": 9}
    ids, caches, known, tokens = [], [], [], []
    for at, (name, length) in enumerate(lengths.items()):
        own = None if name == "none" else adapters.id_of(name)
        row = prompt_of(10 + length, at)
        with adapters.using(adapters.select([own])):
            cache = model.make_cache()
            model(mx.array([row[:10]]), cache)
            known.append(model(mx.array([row]))[0, 10:])
        caches.append(cache)
        ids += [own] * length
        tokens += row[10:]
    rows = [Rows(cache, length, length == 9) for cache, length in zip(caches, lengths.values(), strict=True)]
    with adapters.using(adapters.select(ids)):
        found = flat_logits(model, mx.array(tokens), rows)
    known[-1] = known[-1][-1:]
    assert mx.allclose(found, mx.concatenate(known), atol=2e-4)


def test_compiled_passes_by_rows(models):
    """Traced once for each number of rows, whoever sits in which."""
    model = models["openelm"]
    adapters, step = model.adapters, BatchStep(model, compile=True)
    for names in (("a", "b"), ("b", "c"), ("none", "a"), ("c", "c")):
        caches, known = [], []
        for at, name in enumerate(names):
            with adapters.using(adapters.of(name)):
                caches.append(model.make_cache())
                model(mx.array([prompt_of(8, at)]), caches[-1])
                known.append(model(mx.array([[*prompt_of(8, at), 5]]))[0, -1])
        ids = [None if name == "none" else adapters.id_of(name) for name in names]
        with adapters.using(adapters.select(ids)):
            found = step(mx.array([5, 5]), [Rows(cache) for cache in caches])
        assert mx.allclose(found, mx.stack(known), atol=2e-4)


def test_compiled_slots_by_rows(models, monkeypatch):
    """Requests that lie side by side, traced once, whoever sits in which slot."""
    model = models["openelm"]
    monkeypatch.setattr(model, "choices", replace(model.choices, slot_kernel=True))
    adapters, step = model.adapters, BatchStep(model, compile=True)
    for names in (("a", "b", "none"), ("none", "c", "a")):
        bank, known = SlotBank(model.spec, evaluate=mx.eval, has_kernel=True), []
        for at, name in enumerate(names):
            with adapters.using(adapters.of(name)):
                cache = model.make_cache()
                mx.eval(model(mx.array([prompt_of(8, at)]), cache))
                known.append(model(mx.array([[*prompt_of(8, at), 5]]))[0, -1])
            bank.join(name, cache)
        ids = [None if name == "none" else adapters.id_of(name) for name in names]
        bank.begin()
        with adapters.using(adapters.select([*ids, None])):
            found = step(mx.array([5, 5, 5, 5]), [], bank)
        assert mx.allclose(found[:3], mx.stack(known), atol=2e-4)


def test_prompts_in_slots_by_rows(models):
    """Several tokens of each slot, and of the last layer only the last of them."""
    model = models["openelm"]
    adapters, names = model.adapters, ("a", "none", "b")
    bank, counts, tokens = SlotBank(model.spec, has_kernel=True, takes_prompts=True), [5, 1, 3, 0], prompt_of(9, 3)
    for name in names:
        bank.join(name, model.make_cache(), 5, 4)
    own = [tokens[:5], tokens[5:6], tokens[6:]]
    ids = [None if name == "none" else adapters.id_of(name) for name in names]
    bank.begin(counts)
    rows = [*ids, None, *[ids[0]] * 4, *[ids[2]] * 2]
    with adapters.using(adapters.select(rows)):
        given = [*(each[0] for each in own), 0, *own[0][1:], *own[2][1:]]
        found = flat_logits(model, mx.array(given), [], bank=bank)
    for name, piece, logits in zip(names, own, found[:3], strict=True):
        with adapters.using(adapters.of(name)):
            assert mx.allclose(logits, model(mx.array([piece]))[0, -1], atol=2e-4)


def test_prompts_are_shared_with_the_same_adapter_alone(models):
    """Kept prefixes and prompts that are computed for several requests at once."""
    model, prompt = models["openelm"], prompt_of(20, 8)
    known = {
        name: seen(om.stream_generate(model, None, prompt, max_tokens=4, logprobs=1, adapter=name)) for name in NAMES
    }
    cache = om.PrefixCache()
    for name in (*NAMES, *NAMES):
        chunks = list(
            om.stream_generate(model, None, prompt, max_tokens=4, logprobs=1, adapter=name, prefix_cache=cache)
        )
        assert np.allclose([c.logprob for c in chunks], [each[1] for each in known[name]], atol=1e-4)
        assert chunks[-1].token == known[name][-1][0]
    assert chunks[-1].statistics.cached_tokens == 19
    assert len(cache) == 4
    with om.Engine(model) as engine:
        handles = {name: engine.submit_several(prompt, 2, max_tokens=4, logprobs=1, adapter=name) for name in NAMES}
        for name, both in handles.items():
            assert all(seen(each) == known[name] for each in both)


def test_a_prompt_cache_on_disk_knows_the_adapter(models, tmp_path):
    model, prompt = models["openelm"], prompt_of(20, 8)
    cache = om.PrefixCache()
    om.generate(model, None, prompt, max_tokens=2, adapter="a", prefix_cache=cache)
    cache.save(tmp_path / "kept")
    again = with_adapters(load_fixture(FIXTURES / FAMILIES["openelm"]))
    for loaded in (model, again):
        cache = om.PrefixCache()
        cache.load(tmp_path / "kept", loaded)
        reused = {}
        for name in ("b", "none", "a"):
            *_, last = om.stream_generate(loaded, None, prompt, max_tokens=2, adapter=name, prefix_cache=cache)
            reused[name] = last.statistics.cached_tokens
        assert reused == {"a": 19, "b": 0, "none": 0}


def test_drafts_with_adapters(models):
    model, prompt = models["openelm"], [*prompt_of(6), *prompt_of(6), *prompt_of(6)]
    for name in ("a", "none"):
        plain = [c.token for c in om.stream_generate(model, None, prompt, max_tokens=12, adapter=name)]
        with om.Engine(model) as engine:
            other = engine.submit(prompt, max_tokens=12, adapter="b")
            handle = engine.submit(prompt, max_tokens=12, adapter=name, draft=om.PromptLookup())
            assert [c.token for c in handle] == plain
            other.text()


def test_hot_swap_while_others_run(models):
    """Who runs is not disturbed by one that comes; who uses one that goes ends with an error."""
    model = with_adapters(load_fixture(FIXTURES / FAMILIES["openelm"]))
    prompt = prompt_of(9, 3)
    known = [c.token for c in om.stream_generate(model, None, prompt, max_tokens=60, adapter="a")]
    with om.Engine(model) as engine:
        steady = engine.submit(prompt, max_tokens=60, adapter="a")
        chunks = iter(steady)
        found = [next(chunks).token for _ in range(5)]
        put_adapter(model, "late", random_adapter(model.spec, 11, ("attention",)), activate=False)
        late = engine.submit(prompt, max_tokens=3, adapter="late")
        assert len(list(late)) == 3
        doomed = engine.submit(prompt, max_tokens=200, adapter="late")
        its = iter(doomed)
        next(its)
        om.remove_adapter(model, "late")
        with pytest.raises(SettingError, match="taken away"):
            list(its)
        assert found + [c.token for c in chunks] == known
        with pytest.raises(SettingError, match="choose one of a, b, c, none"):
            engine.submit(prompt, adapter="late")


def test_threads_choose_for_themselves(models):
    model, prompt = models["openelm"], prompt_of(9, 3)
    known = {
        name: [c.token for c in om.stream_generate(model, None, prompt, max_tokens=6, adapter=name)] for name in NAMES
    }
    found = {}
    streams = {name: om.stream_generate(model, None, prompt, max_tokens=6, adapter=name) for name in NAMES}
    for _ in range(6):  # in turns, on one thread
        for name, chunks in streams.items():
            found.setdefault(name, []).append(next(chunks).token)
    assert found == known
    inside = threading.Event()

    def other():
        assert model.adapters.selection.which is None
        inside.set()

    with model.adapters.using(model.adapters.of("a")):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert inside.is_set()


# --- names, memory, bases ---------------------------------------------------------------------------------------------


def test_several_by_name():
    folder = ADAPTERS / "openelm_lora"
    given = {"first": folder / "peft_initial", "second": folder / "mlx_lm_final"}
    model, _ = om.load(FIXTURES / "openelm_tiny", dtype="float32", adapter=given)
    assert om.adapter_names(model) == ("first", "second")
    assert model.adapters.active is None  # requests name one
    with pytest.raises(SettingError, match="choose one of first, second, none"):
        om.generate(model, None, [3, 4], adapter="third")
    with pytest.raises(SettingError, match="has first, second"):
        om.remove_adapter(model, "third")
    with pytest.raises(SettingError, match="has no adapter 'x'"):
        om.use_adapter(model, "x")
    om.add_adapter(model, folder / "peft_final", "first")  # replaced
    assert om.adapter_names(model) == ("second", "first")
    one, other = (
        seen(om.stream_generate(model, None, prompt_of(4), max_tokens=3, logprobs=1, adapter=name))
        for name in ("first", "second")
    )
    assert one == other  # the same adapter in two formats
    with pytest.raises(SettingError, match="another name"):
        om.add_adapter(model, folder / "peft_final", "none")


def test_a_model_without_adapters():
    model = load_fixture(FIXTURES / "openelm_tiny")
    with pytest.raises(SettingError, match=r"om\.add_adapter"):
        om.generate(model, None, [3, 4], adapter="a")
    assert om.generate(model, None, [3, 4], adapter="none", max_tokens=1) == ""


def test_an_adapter_knows_its_base(tmp_path):
    model, _ = om.load(FIXTURES / "openelm_tiny", dtype="float32")
    known = base_hash(model)
    with_adapters(model)
    assert base_hash(model) == known  # whatever is beside it
    adapter = read_adapter(ADAPTERS / "openelm_lora" / "peft_final", model.spec)
    write_adapter(tmp_path / "mine", replace(adapter, base={"hash": known, "name": "tiny"}), model.spec)
    for dtype in ("float32", "bfloat16"):
        for options in ({"adapter": tmp_path / "mine"}, {}):
            loaded, _ = om.load(FIXTURES / "openelm_tiny", dtype=dtype, **options)
            om.add_adapter(loaded, tmp_path / "mine")
    om.convert(FIXTURES / "openelm_tiny", tmp_path / "packed", quantize=8)
    om.load(tmp_path / "packed", adapter=tmp_path / "mine")
    write_adapter(tmp_path / "other", replace(adapter, base={"hash": "bf16:1234", "name": "someone's"}), model.spec)
    for attempt in (lambda: om.load(FIXTURES / "openelm_tiny", adapter=tmp_path / "other"),
                    lambda: om.add_adapter(model, tmp_path / "other")):  # fmt: skip
        with pytest.raises(CheckpointError, match="beside other weights \\(someone's\\)"):
            attempt()


def test_the_plan_counts_it():
    folder = ADAPTERS / "gpt_oss_experts" / "peft_final"
    without, beside = (om.plan(FIXTURES / "gpt_oss_tiny", adapter=each) for each in (None, folder))
    model, _ = om.load(FIXTURES / "gpt_oss_tiny", adapter=folder)
    nbytes = sum(each.nbytes for each in model.adapters.served.arrays)
    assert beside.adapter_bytes == nbytes == model.plan.adapter_bytes
    assert beside.weights_bytes - without.weights_bytes == nbytes
    adapter = read_adapter(folder, model.spec)
    assert bytes_of(model.spec, {"x": adapter}) == nbytes
    dora = random_adapter(model.spec, 0, ("attention",), dora=("attention",))
    put_adapter(model, "dora", dora)
    om.remove_adapter(model, "peft_final")
    assert sum(each.nbytes for each in model.adapters.served.arrays) == bytes_of(model.spec, {"x": dora})


def test_no_room_for_another():
    model, _ = om.load(FIXTURES / "openelm_tiny")
    runtime_of(model).plan = replace(model.plan, budget_bytes=mx.get_active_memory() + 1000)
    with pytest.raises(MemoryLimitError, match="The adapter peft_final takes"):
        om.add_adapter(model, ADAPTERS / "openelm_lora" / "peft_final")
    assert om.adapter_names(model) == ()


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("family", FAMILIES)
def test_computing_takes_what_is_planned(family):
    """A prompt's peak grows by no more than the plan has for adapters, and by a good part of that."""
    model = load_fixture(FIXTURES / FAMILIES[family])
    groups = ("attention", "feed-forward", "experts")
    put_adapter(model, "a", random_adapter(model.spec, 0, groups), activate=False)
    tokens, peaks = prompt_of(200), {}
    for name in ("none", "a"):
        with model.adapters.using(model.adapters.of(name)):
            found = []
            for _ in range(8):  # MLX's own thread frees some buffers earlier at times, and never later
                cache = model.make_cache()
                mx.eval([layer.reserve(len(tokens)) for layer in cache])
                mx.clear_cache()
                before = mx.get_active_memory()
                mx.reset_peak_memory()
                mx.eval(prefill(model, tokens, cache, len(tokens)))
                found.append(mx.get_peak_memory() - before)
                del cache
            peaks[name] = max(found[1:])
    planned = scratch_per_token(model.spec, model.adapters.served.stacks.keys(), "cpu") * len(tokens)
    assert peaks["none"] - 2**16 < peaks["a"] < peaks["none"] + 1.05 * planned
    model, _ = om.load(FIXTURES / FAMILIES[family], batch_size=2)
    plan = model.plan
    put_adapter(model, "a", random_adapter(model.spec, 0, groups), activate=False)
    per_token = scratch_per_token(model.spec, model.adapters.served.stacks.keys(), "cpu")
    assert model.plan.scratch_bytes - plan.scratch_bytes == per_token * plan.prefill_chunk
    with om.Engine(model) as engine:
        memory = engine._runner.memory
        used, admission = memory.without_requests(), memory.admission
        put_adapter(model, "b", random_adapter(model.spec, 1, groups), activate=False)
        grown = memory.without_requests() - used
        assert abs(grown - model.adapters.served.nbytes // 2) < model.adapters.served.nbytes // 20
        assert memory.admission.weights - admission.weights == model.adapters.served.nbytes // 2
        assert memory.admission.adapter_scratch == per_token > 0
    om.remove_adapter(model, "a")
    om.remove_adapter(model, "b")
    assert model.plan == plan


@pytest.mark.parametrize("way", ["unsorted", "sorted", "grouped", "blocks_16"])
@pytest.mark.parametrize("slots", [None, 5])
def test_every_way_through_the_experts(models, way, slots):
    """As many rows as a batch has, each with an adapter of its own, and all with one; resident and from slots."""
    model = models["gpt_oss"]
    experts = model.layers[1].mlp.experts
    if slots is not None:
        streamed, _ = om.load(FIXTURES / FAMILIES["gpt_oss"], dtype="float32", expert_slots=slots)
        with_adapters(streamed)
        model, experts = streamed, streamed.layers[1].mlp.experts
    arithmetic = experts if slots is None else experts.experts
    before, arithmetic.ways = arithmetic.ways, ((1, "unsorted"),)
    rng, adapters = np.random.default_rng(1), model.adapters
    x = mx.array(rng.normal(size=(24, 64)).astype(np.float32))
    chosen = mx.array(np.stack([rng.permutation(8)[:2] for _ in range(24)]).astype(np.uint32))
    ids = [adapters.id_of(NAMES[at]) for at in rng.integers(0, 4, 24)]
    try:
        known = []
        for row, own in enumerate(ids):
            with adapters.using(adapters.select([own])):
                known.append(experts(x[row : row + 1], chosen[row : row + 1]))
        arithmetic.ways = ((1, way),)
        with adapters.using(adapters.select(ids)):
            assert mx.allclose(experts(x, chosen), mx.concatenate(known), atol=1e-5)
        for own in set(ids):
            with adapters.using(adapters.select([own])):
                found = experts(x, chosen)
                mine = mx.array([row for row, each in enumerate(ids) if each == own])
                assert mx.allclose(found[mine], mx.concatenate(known)[mine], atol=1e-5)
    finally:
        arithmetic.ways = before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_s_kernels_are_the_base_s(family, dtype):
    """Where the residual is added in the product's kernel, and a bias in one of its own: bit for bit without a change."""
    model, _ = om.load(FIXTURES / FAMILIES[family], dtype=dtype)
    model.choices = replace(model.choices, fuse_residual_add=True, bias_apart=True)
    for layer in model.layers:
        if family == "openelm":
            layer.fuse_residual_add = True
        else:
            layer.self_attn.bias_apart = layer.mlp.bias_apart = True
    tokens, one = mx.array([prompt_of(20)]), mx.array([3])
    known = model(tokens), model(one)
    for kind in ("lora", "dora"):
        targets = None if family == "openelm" else ("q_proj", "v_proj", "o_proj", "router")
        attach(model, AdapterConfig(kind=kind, targets=targets))
        assert all(mx.array_equal(*pair) for pair in zip(known, (model(tokens), model(one)), strict=True))
        adapter = detach(model)
        put_adapter(model, kind, adapter)
        assert all(mx.array_equal(*pair) for pair in zip(known, (model(tokens), model(one)), strict=True))
        om.remove_adapter(model, kind)
    groups = ("attention", "feed-forward")
    changed = random_adapter(model.spec, 4, groups, dora=groups)
    put_adapter(model, "changed", changed)
    plain = load_fixture(FIXTURES / FAMILIES[family])
    put_adapter(plain, "changed", changed)
    # In 16 bits a near-tie may send a token to another expert.
    error = mx.abs(model(tokens) - plain(tokens))
    assert mx.max(error).item() < 1e-3 if dtype == "float32" else mx.mean(error).item() < 0.1


def test_from_one_format_to_another(tmp_path):
    """PEFT's to mlx-lm's to PEFT's, and to CoreNet's file, which holds the base; the adapter stays the same."""
    source, base = ADAPTERS / "openelm_lora_patterns" / "peft_final", FIXTURES / "openelm_untied"
    spec = load_fixture(base).spec
    known = read_adapter(source, spec)
    om.convert_adapter(source, tmp_path / "mlx", base, "mlx-lm")
    om.convert_adapter(tmp_path / "mlx", tmp_path / "peft", base)
    om.convert_adapter(source, tmp_path / "core.pt", base, "corenet")
    assert json.loads((tmp_path / "core.yaml").read_text())["base"]["model_dim"] == spec.hidden_size
    for folder in ("mlx", "peft"):
        for name, pair in read_adapter(tmp_path / folder, spec).pairs.items():
            delta, its = (each.scale * each.a @ each.b for each in (known.pairs[name], pair))
            assert mx.allclose(delta, its, atol=1e-6)
    refuse_harmful(tmp_path / "core.pt")
    for destination, said in (("mlx", "exists already"), ("core.pt", "is there already"), ("core.txt", "ends in .pt")):
        format = "peft" if destination == "mlx" else "corenet"
        with pytest.raises(om.UserError, match=said.replace(".", r"\.")):
            om.convert_adapter(source, tmp_path / destination, base, format)


def test_a_model_that_no_file_was_loaded_into_takes_an_adapter_of_experts():
    """`build_model` and random weights: added, used, removed, and put in training beside them."""
    spec = spec_from_config(json.loads((FIXTURES / "gpt_oss_tiny" / "config.json").read_text()))
    model = build_model(spec)
    keys = iter(mx.random.split(mx.random.key(3), 200))
    model.update(tree_map(lambda a: 0.1 * mx.random.normal(a.shape, key=next(keys)), model.parameters()))
    model.eval()
    tokens = mx.array([[5, 6, 7, 8]])
    alone = model(tokens)
    om.add_adapter(model, ADAPTERS / "gpt_oss_experts" / "peft_final", name="mine")
    om.use_adapter(model, "mine")
    assert float(mx.abs(model(tokens) - alone).max()) > 1e-3
    om.remove_adapter(model, "mine")
    assert bool((model(tokens) == alone).all())
    attach(model, AdapterConfig(targets=("experts",)))
    assert bool((model(tokens) == alone).all())


@pytest.mark.parametrize("where", ["disk", "machines"])
def test_no_adapter_is_trained_beside_what_is_not_in_memory(where):
    """MLX's own error would come in the midst of the first gradient."""
    options = {"expert_slots": 4} if where == "disk" else {}
    model, _ = om.load(FIXTURES / FAMILIES["gpt_oss"], dtype="float32", **options)
    if where == "machines":
        model.runtime.group = object()
    trainable = [name for name, _ in tree_flatten(model.trainable_parameters())]
    with pytest.raises(
        SettingError, match=r"^(Experts on disk|A model of several machines) cannot be trained.*: load "
    ):
        attach(model, AdapterConfig(targets=("q_proj",)))
    assert model.attached is None
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == trainable
