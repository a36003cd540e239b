"""Prompts in slots: which are, what they share a pass with, and when a request moves into a slot and out of it."""

import threading
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import FIXTURES, load_fixture, random_model
from mlx import nn
from mlx.utils import tree_flatten
from slots_in_place import use_slots
from test_engine_many import prompt_of, seen

import openelm_mlx as om
from openelm_mlx.decoding import pieces
from openelm_mlx.decoding.batch_step import BatchStep
from openelm_mlx.decoding.pieces import SlotPieces
from openelm_mlx.engine import runner, slots, step_times
from openelm_mlx.engine.runner import Runner
from openelm_mlx.engine.scheduler import Scheduler
from openelm_mlx.engine.step_times import StepTimes
from openelm_mlx.models.slot_sizes import SIZES
from openelm_mlx.models.slots import SlotBank


@pytest.fixture(params=["openelm", "gpt_oss"])
def model(request, monkeypatch):
    made = random_model(context_length=512) if request.param == "openelm" else load_fixture(FIXTURES / "gpt_oss_tiny")
    use_slots(monkeypatch, made, are_in_place=True)
    return made


@pytest.fixture
def passes(monkeypatch):
    """Of each pass: how many decode in slots, and of each part that it has beside: whether it is a prompt's, and in a slot."""
    found, compute = [], runner.compute

    def noted(model, step, bank, in_slots, parts):
        beside = [(part.is_prompt, part.slot is not None, part.rows.length) for part in parts]
        found.append((sum(each is not None for each in in_slots), beside))
        return compute(model, step, bank, in_slots, parts)

    monkeypatch.setattr(runner, "compute", noted)
    return found


def tokens_of(chunks):
    return [each[0] for each in seen(chunks)]


def alone(model, prompt, **options):
    return tokens_of(om.stream_generate(model, None, prompt, **options))


@pytest.mark.slow
def test_a_prompt_that_comes_in_beside_others_is_rows_of_their_pass(model, passes):
    prompts = [prompt_of(40, 1), prompt_of(300, 2), prompt_of(33, 3)]
    expected = [alone(model, prompt, max_tokens=60) for prompt in prompts]
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 32
        first = engine.submit(prompts[0], max_tokens=60)
        begun = [next(first) for _ in range(3)]
        passes.clear()
        others = [engine.submit(prompt, max_tokens=60) for prompt in prompts[1:]]
        found = [tokens_of([*begun, *first]), *(tokens_of(each) for each in others)]
        assert len(engine._runner.bank) == 0
        assert engine._runner.memory.held_bytes == 0
    assert found == expected
    with_prompts = [(decoding, beside) for decoding, beside in passes if beside]
    assert len(with_prompts) >= 8
    assert all(beside == [(True, True, beside[0][2])] * len(beside) for _, beside in with_prompts if len(beside) == 1)
    assert all(is_prompt and in_slot for _, beside in with_prompts for is_prompt, in_slot, _ in beside)
    assert all(decoding >= 1 for decoding, _ in with_prompts)
    # Who decoded before moves in a step of its own.
    assert passes[0] == (1, [])


@pytest.mark.slow
def test_what_slots_have_no_form_for_stays_apart(model, passes):
    """Keys and values in 8 bits, or in rings of one's own, and prompts of which all logits are wanted."""
    of_family = {"kv_bits": 8} if model.model_type == "gpt_oss" else {"sliding_window": 12}
    expected = [alone(model, prompt_of(60, 2), max_tokens=8, **options) for options in ({}, of_family)]
    with om.Engine(model) as engine:
        first = engine.submit(prompt_of(9, 1), max_tokens=100)
        next(first)
        passes.clear()
        found = [
            tokens_of(engine.submit(prompt_of(60, 2), max_tokens=8, **options))
            for options in ({"prompt_logprobs": 0}, of_family)
        ]
        first.cancel()
    assert found == expected
    assert any(is_prompt for _, beside in passes for is_prompt, *_ in beside)
    assert not any(in_slot for _, beside in passes for _, in_slot, _ in beside)


@pytest.mark.slow
def test_who_is_left_alone_leaves_its_slot_after_a_while(model, monkeypatch):
    """To move takes as long as some steps, and the next one may come."""
    expected, steps = alone(model, prompt_of(9, 1), max_tokens=120), []
    step_alone = Runner._step_alone

    def noted(self, request):
        steps.append(request.bank is not None)
        step_alone(self, request)

    monkeypatch.setattr(Runner, "_step_alone", noted)
    with om.Engine(model) as engine:
        first = engine.submit(prompt_of(9, 1), max_tokens=120)
        begun = [next(first)]
        list(engine.submit(prompt_of(50, 2), max_tokens=3))
        assert tokens_of([*begun, *first]) == expected
        num_alone = engine._runner._num_alone
    assert num_alone == runner.STEPS_BEFORE_LEAVING
    assert steps.count(True) == 1  # it was in a slot until then, and is in none from then on


@pytest.mark.slow
def test_answers_to_one_prompt_begin_with_what_is_in_its_slot(model):
    """And a kept prefix, which is copied at the borders of its chunks."""
    prompt, store = prompt_of(90, 4), om.PrefixCache()
    expected = alone(model, prompt, max_tokens=12)
    with om.Engine(model) as engine:
        beside = engine.submit(prompt_of(12, 1), max_tokens=100)
        next(beside)
        handles = [engine.submit(prompt, max_tokens=12) for _ in range(3)]
        assert [tokens_of(each) for each in handles] == [expected] * 3
        for _ in range(2):
            handle = engine.submit(prompt, max_tokens=12, prefix_cache=store, prefill_chunk=40)
            assert tokens_of(handle) == expected
        assert handle.statistics.cached_tokens >= 40
        beside.cancel()


@pytest.mark.slow
def test_every_pass_is_dispatched_before_the_next_one(model, monkeypatch):
    """What is written in place is an effect of computing the logits: of prompts alone too, which nobody waits for."""
    given, passes, compute = [], [], runner.compute

    def noted(evaluate):
        return lambda *arrays: given.extend(id(each) for _, each in tree_flatten(list(arrays))) or evaluate(*arrays)

    def computed(model, step, bank, in_slots, parts):
        assert all(id(logits) in given for logits in passes)
        logits = compute(model, step, bank, in_slots, parts)
        if in_slots:
            assert bank._computed is logits
            passes.append(logits)
        return logits

    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, noted(getattr(mx, name)))
    monkeypatch.setattr(runner, "compute", computed)
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 20
        handles = [engine.submit(prompt_of(90, seed), max_tokens=1 + 3 * seed) for seed in range(4)]
        for handle in handles:
            list(handle)
    assert len(passes) > 20


@pytest.mark.slow
def test_what_is_lost_in_slots_is_computed_again(model, monkeypatch):
    """There was no memory to give the others fewer slots."""
    prompts = [prompt_of(30 + seed, seed) for seed in range(4)]
    expected = [alone(model, prompt, max_tokens=5 if at < 2 else 60) for at, prompt in enumerate(prompts)]
    resize, hits = SlotBank._resize, []

    def fails(self, kept, size):
        if size < len(self) and not hits:
            hits.append(size)
            self._move_all(no_memory, range(len(self._buffers)))
        resize(self, kept, size)

    def no_memory(_):
        raise RuntimeError("[malloc_or_wait] Unable to allocate 5 bytes.")

    monkeypatch.setattr(SlotBank, "_resize", fails)
    with om.Engine(model) as engine:
        handles = [engine.submit(prompt, max_tokens=5 if at < 2 else 60) for at, prompt in enumerate(prompts)]
        assert [tokens_of(each) for each in handles] == expected
        assert len(engine._runner.bank) == 0
    assert hits == [2]


@pytest.mark.slow
def test_who_follows_a_prompt_whose_slot_cannot_be_read_begins_again(model, monkeypatch):
    prompt, leave, armed = prompt_of(200, 3), SlotBank.leave, []
    expected = alone(model, prompt, max_tokens=3)

    def fails(self, slot, cache=None):
        if cache is not None and armed:
            armed.clear()
            raise RuntimeError("[malloc_or_wait] Unable to allocate 5 bytes.")
        leave(self, slot, cache)

    monkeypatch.setattr(SlotBank, "leave", fails)
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 16
        beside = engine.submit(prompt_of(9, 1), max_tokens=200)
        next(beside)
        first, second = (engine.submit(prompt, max_tokens=3) for _ in range(2))
        while first.channel.num_prompt_tokens_done < 30:
            next(beside)
        armed.append(True)
        first.cancel()
        assert tokens_of(second) == expected
        assert not armed
        beside.cancel()


def test_a_pass_takes_what_the_host_or_the_device_takes(monkeypatch):
    """The host is a pass ahead: what is waited for in a step is what the step before has dispatched."""
    now, seen_by_pace = [0.0], []
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(step_times.mx, "eval", lambda seconds: now.__setitem__(0, now[0] + sum(seconds)))
    scheduler = Scheduler(4, 4)
    scheduler.pace = SimpleNamespace(
        step_took=lambda seconds, length, is_alone=False: seen_by_pace.append((round(seconds, 3), length)),
        prompt_took=lambda seconds, length: seen_by_pace.append(("alone", round(seconds, 3), length)),
    )
    times = StepTimes(scheduler)

    def step(dispatching, waiting, chunk, comes_first=False, has_moved=False):
        began = now[0]
        for waits in (comes_first, not comes_first):
            if waits:
                times.wait_for([waiting])
            else:
                now[0] += dispatching
        now[0] += 0.001  # handing over
        times.dispatched(began, chunk, has_moved)
        return seen_by_pace[-1]

    now[0] = 0.5
    times.waited(0.2, 100)  # nobody decodes
    now[0] = 0.6
    times.waited(0.5, 40)  # the first answers begin, with tokens that are there already
    step(0.03, 0, 0)
    assert seen_by_pace == [("alone", 0.3, 100), ("alone", 0.1, 40)]
    assert step(0.004, 0.005, 0) == (0.031, 0)  # the first one took longer on the host
    assert step(0.004, 0.004, 20) == (0.009, 0)  # on the device: from the tokens before it to its own
    # Its tokens were there while the next one was dispatched, whose time that is.
    assert step(0.02, 0, 30) == (0.005, 20)
    assert step(0.004, 0.03, 0) == (0.035, 30)
    now[0] += 1
    times.took(now[0] - 0.004, 0)  # one request by itself, in no slot
    now[0] += 5
    step(0.004, 0, 16)
    # A chunk that is waited for while it is dispatched, after the tokens of the pass before it.
    assert step(0.07, 0.006, 600, comes_first=True) == (0.007, 16)
    assert step(0.004, 0, 0) == (0.071, 600)
    # Whoever moves takes longer, once.
    step(0.004, 0, 20)
    assert step(0.02, 0, 30, has_moved=True) == (0.005, 20)
    num_seen = len(seen_by_pace)
    step(0.004, 0, 20)
    assert len(seen_by_pace) == num_seen  # nothing is known of it
    assert step(0.004, 0, 0, has_moved=True) == (0.005, 20)
    assert step(0.004, 0.007, 0) == (0.012, 0)
    # After a pass that failed, and all that followed from it.
    step(0.004, 0.007, 50)
    times.failed()
    now[0] += 0.1
    num_seen = len(seen_by_pace)
    step(0.004, 0.007, 0)
    assert len(seen_by_pace) == num_seen
    assert step(0.004, 0.007, 0) == (0.012, 0)


@pytest.mark.slow
@pytest.mark.parametrize("asks", [False, True])
def test_a_prompt_goes_on_beside_one_whose_usual_step_is_not_known(model, passes, monkeypatch, asks):
    """Both come at once: one is soon decoding, or asking for logits, and has never been computed by itself."""
    has_come = threading.Event()
    monkeypatch.setattr(Runner, "prepare", lambda self: has_come.wait(60))
    options = {"draft": om.PromptLookup()} if asks else {}
    with om.Engine(model) as engine:
        engine._scheduler.pace.longest = 32
        first = engine.submit(prompt_of(9, 1), max_tokens=200, **options)
        second = engine.submit(prompt_of(250, 2), max_tokens=2)
        has_come.set()
        list(second)
        first.cancel()
    num_plain = sum(not any(is_prompt for is_prompt, *_ in beside) for _, beside in passes)
    assert num_plain <= 30  # of the 200 that there would be if the prompt waited for the whole answer


def test_a_pass_that_failed_is_not_timed(model, monkeypatch):
    """Nor is the one before it, whose tokens came late."""
    failed, compute = [], runner.compute
    monkeypatch.setattr(StepTimes, "failed", lambda self: failed.append(self))

    def once(*arguments):
        if not failed and sum(each is not None for each in arguments[3]) == 2:
            raise ValueError("nobody's fault")
        return compute(*arguments)

    expected = [alone(model, prompt_of(9, seed), max_tokens=20) for seed in (1, 2)]
    monkeypatch.setattr(runner, "compute", once)
    with om.Engine(model) as engine:
        handles = [engine.submit(prompt_of(9, seed), max_tokens=20) for seed in (1, 2)]
        found = [tokens_of(each) for each in handles]
    assert failed
    assert found == expected


def test_passes_are_warmed_up_before_requests_come(monkeypatch):
    """As with CUDA: a step until it is traced, and each product for each number of rows; not those that are few, or packed."""
    model = random_model(context_length=512)
    use_slots(monkeypatch, model, are_in_place=True)
    monkeypatch.setattr(pieces, "compile_apart", lambda function: function)  # MLX would call the machine's compiler
    step, traced, products = BatchStep(model, compile=True), [], []
    call = SlotPieces.__call__

    def noted(self, tokens, bank):
        logits = call(self, tokens, bank)
        traced.append(dict(self._num_traced))
        return logits

    kind = type(model.layers[0])
    layer_call = kind.after_attention

    def noted_products(self, x, out):
        products.append((x.shape, out.shape))
        return layer_call(self, x, out)

    monkeypatch.setattr(SlotPieces, "__call__", noted)
    slots.warm_up(model, step)  # not on a CPU
    assert not traced
    monkeypatch.setattr(slots, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(slots, "has_kernel_for", lambda head_dim: True)
    monkeypatch.setattr(slots.mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(slots, "MANY_WIDTHS", len(set(model.spec.layers)) + 1)
    with monkeypatch.context() as patch:
        patch.setattr(slots, "through_products", lambda *_: pytest.fail("they have few shapes"))
        slots.warm_up(model, step)
    assert list(traced[-1].values()) == [-(-len(model.layers) // pieces.LAYERS_IN_A_PIECE)]
    monkeypatch.setattr(slots, "MANY_WIDTHS", len(set(model.spec.layers)))
    monkeypatch.setattr(slots, "steps_until_traced", lambda model: 0)
    monkeypatch.setattr(kind, "after_attention", noted_products)
    slots.warm_up(model, step)
    assert [x[0] for x, _ in products] == [count for count in SIZES for _ in model.layers]
    heads = [layer.num_heads for layer in model.spec.layers]
    assert [out[1] for _, out in products] == heads * len(SIZES)
    products.clear()
    nn.quantize(model, group_size=32)
    slots.warm_up(model, step)
    assert not products


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_an_engine_without_room_to_be_warmed_up_answers_all_the_same(model, monkeypatch, error):
    asked = []

    def without_room(*arguments):
        asked.append(arguments)
        raise error("no room")

    expected = alone(model, prompt_of(9, 1), max_tokens=5)
    monkeypatch.setattr(runner, "warm_up", without_room)
    with om.Engine(model) as engine:
        assert tokens_of(engine.submit(prompt_of(9, 1), max_tokens=5)) == expected
    assert len(asked) == 1


@pytest.mark.slow
def test_the_pace_is_told_who_decodes_and_how_much_is_before_a_chunk(model, monkeypatch):
    """And the times are told who moved, and are asked to wait before a pass that is dispatched slowly."""
    lengths, alone_steps, moved, order = [], [], [], []
    dispatched, wait_for, compute = StepTimes.dispatched, StepTimes.wait_for, runner.compute
    with om.Engine(model) as engine:
        pace = engine._scheduler.pace
        pace.longest = 32
        length, step_took = pace.length, pace.step_took

        def noted_length(most, beside=0, position=0):
            lengths.append((pace.is_one, position))
            return length(most, beside, position)

        def noted_step(seconds, chunk_length, is_alone=False):
            alone_steps.append(is_alone)
            step_took(seconds, chunk_length, is_alone)

        def noted_dispatched(self, began, chunk_length, has_moved):
            moved.append(has_moved)
            dispatched(self, began, chunk_length, has_moved)

        def noted_wait(self, tokens):
            order.append("waits")
            wait_for(self, tokens)

        def noted_compute(model, step, bank, in_slots, parts):
            order.append("chunk" if any(part.is_prompt for part in parts) else "step")
            return compute(model, step, bank, in_slots, parts)

        monkeypatch.setattr(pace, "length", noted_length)
        monkeypatch.setattr(pace, "step_took", noted_step)
        monkeypatch.setattr(StepTimes, "dispatched", noted_dispatched)
        monkeypatch.setattr(StepTimes, "wait_for", noted_wait)
        monkeypatch.setattr(runner, "compute", noted_compute)
        first = engine.submit(prompt_of(9, 1), max_tokens=300)
        for _ in range(8):
            next(first)
        assert any(alone_steps)
        order.clear()
        second = engine.submit(prompt_of(200, 2), max_tokens=8)
        list(second)
        first.cancel()
    positions = [position for is_one, position in lengths if is_one]
    assert positions[0] == 0
    assert len(set(positions)) > 4
    assert positions == sorted(positions)
    assert not alone_steps[-1]
    assert any(moved)
    assert not all(moved)
    # On a processor the host waits for the layers of each chunk: before it, the tokens of the pass before have come.
    at = [i for i, each in enumerate(order) if each == "chunk"]
    assert all(order[i - 1] == "waits" for i in at[1:])
    assert "stepwaits" in "".join(order)
