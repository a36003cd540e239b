"""What several machines do at the same time, and what one of them has on disk."""

import json
import re
import socket
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from worker_processes import workers

import openelm_mlx as om
from openelm_mlx.bench.several import check_workers
from openelm_mlx.checkpoint.adapter_files import write_adapter
from openelm_mlx.checkpoint.parts import identity
from openelm_mlx.commands import main
from openelm_mlx.decoding.budget import Budget
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.errors import CheckpointError, SettingError
from openelm_mlx.link.adapter_parts import adapter_part, packed_adapter
from openelm_mlx.link.arrays import unpacked
from openelm_mlx.link.framing import Connection, Message
from openelm_mlx.link.handshake import NO_SECRET, meet_worker
from openelm_mlx.models.adapter_targets import targets_of
from openelm_mlx.models.low_rank import Adapter, Pair
from openelm_mlx.runtime import runtime_of
from openelm_mlx.sources import Source
from openelm_mlx.workers.parts import Parts
from openelm_mlx.workers.session import Session

ENDLESS = om.SamplingParams(logit_bias={2: -1e9, 4079: -1e9})
pytestmark = pytest.mark.filterwarnings("ignore::openelm_mlx.NoAnswerWarning")


@pytest.fixture(scope="module")
def two_workers():
    with workers(2) as made:
        yield made


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 4000, length).tolist()


def test_experts_on_disk_on_every_machine(two_workers):
    one, tokenizer = om.load("demo-gpt-oss", dtype="float32")
    addresses = [each.address for each in two_workers]
    options = {"dtype": "float32", "workers": addresses, "layers": (2, 1, 3), "expert_slots": 5, "worker_timeout": 60}
    model, _ = om.load("demo-gpt-oss", **options)
    assert model.residency is not None
    assert model.plan.expert_slots == 5
    for member, nbytes in zip(runtime_of(model).others.team.members, bytes_there(model), strict=True):
        assert member.plan["expert_slots"] == 5
        assert nbytes < member.plan["weights_bytes"] + 200_000  # no more than these were read
    found = [om.generate(each, tokenizer, "What is a piano?", max_tokens=12) for each in (one, model)]
    assert found[0] == found[1]
    prompts = [tokens_of(40, 1), tokens_of(7, 2)]
    found = [[list(each) for each in streamed(m, tokenizer, prompts)] for m in (one, model)]
    assert found[0] == found[1]
    model.remote.close()


def streamed(model, tokenizer, prompts):
    with om.Engine(model, tokenizer) as engine:
        handles = [engine.submit(prompt, max_tokens=5, sampling=ENDLESS) for prompt in prompts]
        return [[chunk.token for chunk in handle] for handle in handles]


def test_a_prompt_is_filled_in_on_all_machines_at_once(two_workers):
    """A chunk has been handed on, and this machine goes on with the next one, before anybody has answered."""
    addresses = [each.address for each in two_workers]
    model, _ = om.load("demo-openelm", dtype="float32", workers=addresses, layers=(3, 2, 3), worker_timeout=60)
    peers, seen = model.remote.peers, []
    budget = Budget(model, cache := model.make_cache())
    whole_call = model.run_layers

    def run_layers(*args, **keywords):
        seen.append([(len(peer.awaited), len(peer.outbox)) for peer in peers])
        return whole_call(*args, **keywords)

    model.run_layers = run_layers
    prefill(model, tokens_of(160), cache, 32, budget)
    # Of chunk i + 1: the first worker has chunk i, the second one chunk i - 1 at work or chunk i still to come.
    assert [first for first, _ in seen[1:]] == [(1, 0)] * 4
    assert all(second in ((0, 1), (1, 1)) for _, second in seen[2:])
    del model.run_layers
    model.remote.close()


def test_progress_is_of_all_machines(two_workers):
    told = []
    addresses = [each.address for each in two_workers]
    model, _ = om.load("demo-openelm", dtype="float32", workers=addresses, layers=(2, 2, 4), worker_timeout=60,
        progress=lambda done, total: told.append((done, total)))  # fmt: skip
    assert told
    done, total = told[-1]
    assert done == total > 10_000_000  # the whole file's tensors, of which each machine has read its own
    assert [each for each, _ in told] == sorted(each for each, _ in told)
    model.remote.close()


def test_selfcheck_of_several_machines(two_workers, capsys, monkeypatch):
    monkeypatch.setattr("openelm_mlx.bench.several.HOPS", 20)
    monkeypatch.setattr("openelm_mlx.bench.several.PROMPTS", (7, 140))  # within the window, and beyond
    monkeypatch.setattr("openelm_mlx.bench.several.ROUNDS", 1)
    addresses = ",".join(each.address for each in two_workers)
    assert main(["selfcheck", "--workers", addresses]) == 0
    shown = capsys.readouterr().out
    assert shown.count("bytes there and back take") == 2
    assert shown.count("tokens and logits are the same, bit for bit") == 2
    assert "demo-gpt-oss in layers of 2, 2, 2" in shown
    assert shown.count("predicted") == 2
    assert main(["selfcheck", "--workers", addresses, "--only", "1"]) == 2
    assert main(["selfcheck", "--secret-file", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_selfcheck_sees_another_model(two_workers, monkeypatch):
    """Were the layers elsewhere other ones, it would say so."""
    addresses = [two_workers[0].address]
    monkeypatch.setattr("openelm_mlx.link.chain.unpacked", lambda header, body: unpacked(header, body) * 1.001)
    monkeypatch.setattr("openelm_mlx.bench.several.ROUNDS", 1)
    monkeypatch.setattr("openelm_mlx.bench.several.HOPS", 5)
    monkeypatch.setattr("openelm_mlx.bench.several.PROMPTS", (7, 20))
    _, [found] = check_workers(addresses, None, 60, lambda line: None, ["demo-openelm"])
    assert found.difference > 0
    assert not found.is_equal
    assert "differ by" in found.line()


def test_two_models_are_compared_over_the_same_workers(two_workers, tmp_path, capsys):
    """They have one at a time, and find what one machine finds with both."""
    (tmp_path / "a.txt").write_text("A banjo is a stringed instrument with a thin membrane.")
    given = f"compare demo-gpt-oss demo-gpt-oss --dense-bits 4 --dtype float32 --text {tmp_path / 'a.txt'}"
    common = given.split()
    assert main([*common, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main([*common, "--workers", two_workers[0].address, "--layers", "2,4"]) == 0
    shown = capsys.readouterr().out
    kl = float(re.search(r"KL divergence ([\d.e+-]+) ", shown)[1])
    assert kl == pytest.approx(alone["kl"]["value"], rel=1e-2)
    assert kl > 0
    assert "Workers have one model at a time: they were loaded one after the other." in shown
    assert len([line for line in two_workers[0].lines if "demo-gpt-oss, layers 2 to 5: ready" in line]) >= 2


def random_adapter(spec, seed: int, groups: tuple[str, ...], magnitudes: bool = False) -> Adapter:
    rng, pairs = np.random.default_rng(seed), {}
    for name, target in targets_of(spec).items():
        if target.group in groups:
            a, b = (mx.array(rng.normal(0, 0.1, shape).astype(np.float32)) for shape in target.shapes(3))
            magnitude = mx.array(rng.uniform(0.5, 2.0, target.rows).astype(np.float32)) if magnitudes else None
            pairs[name] = Pair(a, b, 1.5, magnitude)
    return Adapter(pairs)


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("demo", ["demo-gpt-oss", "demo-openelm"])
def test_adapters_on_every_machine(two_workers, tmp_path, demo):
    """Each machine has its part of each; requests with different ones go through together."""
    spec = Source.open(demo).spec
    everything = ("attention", "feed-forward", "experts", "router", "embedding", "head")
    for name, groups, magnitudes in (("a", everything, False), ("b", ("attention",), True)):
        write_adapter(tmp_path / name, random_adapter(spec, ord(name), groups, magnitudes), spec)
    given = {name: str(tmp_path / name) for name in "ab"}
    addresses = [each.address for each in two_workers]
    one, tokenizer = om.load(demo, dtype="float32", adapter=given)
    third = len(spec.layers) // 3
    layers = (third, third, len(spec.layers) - 2 * third)
    model, _ = om.load(demo, dtype="float32", adapter=given, workers=addresses, layers=layers, worker_timeout=60)
    assert not any(".layers.5." in site for site in model.adapters.served.stacks)
    prompts = [(tokens_of(5 + 12 * i, i), name) for i, name in enumerate(("a", "b", "none", "a"))]
    options = {"max_tokens": 5, "sampling": ENDLESS, "logprobs": 1}
    expected = [
        [(chunk.token, chunk.logprob) for chunk in om.stream_generate(one, tokenizer, prompt, adapter=name, **options)]
        for prompt, name in prompts
    ]
    alone = [
        [
            (chunk.token, chunk.logprob)
            for chunk in om.stream_generate(model, tokenizer, prompt, adapter=name, **options)
        ]
        for prompt, name in prompts
    ]
    assert alone == expected
    assert len({str(each[0]) for each in expected[:3]}) == 3
    with om.Engine(model, tokenizer) as engine:
        handles = [engine.submit(prompt, adapter=name, **options) for prompt, name in prompts]
        together = [[(chunk.token, chunk.logprob) for chunk in handle] for handle in handles]
    with om.Engine(one, tokenizer) as engine:
        handles = [engine.submit(prompt, adapter=name, **options) for prompt, name in prompts]
        assert together == [[(chunk.token, chunk.logprob) for chunk in handle] for handle in handles]
    # A worker that comes back has them again.
    for peer in model.remote.peers:
        peer.connection.close()
    prompt, name = prompts[0]
    again = [
        (chunk.token, chunk.logprob) for chunk in om.stream_generate(model, tokenizer, prompt, adapter=name, **options)
    ]
    assert again == expected[0]
    model.remote.close()


def written_adapter(folder, spec, name: str, seed: int, groups: tuple[str, ...], magnitudes: bool = False) -> str:
    write_adapter(folder / name, random_adapter(spec, seed, groups, magnitudes), spec)
    return str(folder / name)


def bytes_there(model) -> list[int]:
    """What MLX has in memory on each worker."""
    chain = model.remote
    return [chain.ask(number, {"op": "ping"}).header["bytes"] for number in range(len(chain.peers))]


def wait_for_less(model, most: list[int]) -> None:
    for _ in range(300):
        found = bytes_there(model)
        if all(each <= limit for each, limit in zip(found, most, strict=True)):
            return
        time.sleep(0.1)
    raise AssertionError((found, most))


def bytes_without_a_session(worker) -> int:
    """What MLX has in memory on a worker whose first machine has left."""
    with socket.create_connection(("127.0.0.1", worker.port)) as sock:
        connection = Connection(sock, "the worker", 60)
        meet_worker(connection, NO_SECRET)
        connection.send({"op": "ping"})
        while (answer := connection.receive()).op == "alive":
            pass  # until the one before has left
        connection.send({"op": "leave"})
        return answer.header["bytes"]


def test_a_worker_gives_back_what_a_first_machine_had(two_workers, tmp_path):
    """Keys, values and adapters are gone when it has left; the layers stay for the next one."""
    worker, spec = two_workers[0], Source.open("demo-openelm").spec
    model, tokenizer = om.load(
        "demo-openelm", dtype="float32", workers=[worker.address], layers=(5, 3), worker_timeout=60
    )
    [layers] = bytes_there(model)
    adapter = written_adapter(tmp_path, spec, "a", 1, ("attention", "feed-forward"))
    om.add_adapter(model, adapter)
    kept = om.PrefixCache()
    list(om.stream_generate(model, tokenizer, tokens_of(50), max_tokens=2, sampling=ENDLESS, prefix_cache=kept))
    [used] = bytes_there(model)
    model.remote.close()
    assert bytes_without_a_session(worker) <= layers + 20_000 < used


def test_a_worker_without_room_for_an_adapter():
    """It is refused with the numbers, nothing of it stays, and the layers compute as before."""
    source, said = Source.open("demo-openelm"), []
    parts = Parts(None, None)
    here, there = socket.socketpair()
    with here, there:
        session = Session(Connection(here, "the first machine", 60), parts, "here", said.append)

        def ask(header: dict, body: bytes = b"") -> dict:
            return session._answered(Message(header, memoryview(body)))[0]

        asked = {"demo": "demo-openelm", "identity": identity(source.checkpoint, source.config), "dtype": "float32"}
        assert ask({"op": "prepare", **asked, "start": 5, "stop": 8, "longest": 64})["op"] == "prepared"
        session._read()
        plan = runtime_of(parts.model).plan
        adapter = adapter_part(random_adapter(source.spec, 1, ("attention", "feed-forward")), 5, 8)
        tight = mx.get_active_memory() + plan.scratch_bytes + adapter.nbytes // 2
        runtime_of(parts.model).plan = replace(plan, budget_bytes=tight)
        refused = ask(*packed_adapter("large", 7, adapter, False))
        assert (refused["op"], refused["kind"]) == ("error", "MemoryLimitError")
        assert re.search(
            r"The adapter large takes .* allowed have no room for it: remove another one", refused["message"]
        )
        assert not parts.model.adapters.served.names
        assert ask(*packed_adapter("large", 7, adapter, True)) == {"op": "added"}  # one that its plan counts
        session._forget()
        session._limits.close()


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("demo", ["demo-openelm", "demo-gpt-oss"])
def test_adapters_come_and_go_on_every_machine(two_workers, tmp_path, demo, monkeypatch):
    """Beside a loaded model, as on one machine; a worker has the memory of one that nobody uses any more back."""
    spec = Source.open(demo).spec
    a = written_adapter(tmp_path, spec, "a", 1, ("attention", "feed-forward", "experts", "router", "embedding", "head"))
    b = written_adapter(tmp_path, spec, "b", 2, ("attention",), magnitudes=True)
    third = len(spec.layers) // 3
    one, tokenizer = om.load(demo, dtype="float32")
    model, _ = om.load(
        demo, dtype="float32", workers=[each.address for each in two_workers], worker_timeout=60,
        layers=(third, third, len(spec.layers) - 2 * third),
    )  # fmt: skip
    both, prompt, options = (one, model), tokens_of(9), {"max_tokens": 3, "sampling": ENDLESS, "logprobs": 1}

    def streamed_by(each, adapter=None):
        return om.stream_generate(each, tokenizer, prompt, adapter=adapter, **options)

    def answers(adapter=None) -> list:
        found = [[(chunk.token, chunk.logprob) for chunk in streamed_by(each, adapter)] for each in both]
        assert found[0] == found[1]
        return found[0]

    plain, before = answers(), bytes_there(model)
    for each in both:
        assert om.add_adapter(each, a) == "a"
        om.add_adapter(each, b, activate=False)
    alone = {name: answers(name) for name in ("a", "b", "none")}
    beside = bytes_there(model)
    assert alone["none"] == plain == answers("none")
    assert alone["a"] == answers()
    assert len({str(each) for each in alone.values()}) == 3
    with om.Engine(model, tokenizer) as engine:
        handles = [engine.submit(prompt, adapter=name, **options) for name in alone]
        together = [[(chunk.token, chunk.logprob) for chunk in handle] for handle in handles]
    with om.Engine(one, tokenizer) as engine:
        handles = [engine.submit(prompt, adapter=name, **options) for name in alone]
        assert together == [[(chunk.token, chunk.logprob) for chunk in handle] for handle in handles]
    for each in both:
        om.use_adapter(each, "b")
    assert answers() == alone["b"]

    # Another one of the same name, and none; whoever has begun goes on with what it had.
    running = [streamed_by(each, "a") for each in both]
    first = [next(each) for each in running]
    for each in both:
        om.add_adapter(each, b, "a", activate=False)
        om.remove_adapter(each, "b")
    rest = [[(chunk.token, chunk.logprob) for chunk in (first[i], *each)] for i, each in enumerate(running)]
    assert rest[0] == rest[1] == alone["a"]
    assert answers("a") == alone["b"]
    assert om.adapter_names(model) == ("a",)
    with pytest.raises(SettingError, match="adapter is 'b'"):
        next(streamed_by(model, "b"))

    # One worker cannot take its part: nobody has any of it.
    there = model.adapters.served
    whole = packed_adapter

    def damaged(name, number, part, is_planned):
        header, body = whole(name, number, part, is_planned)
        if "layers.1" in header["pairs"][-1][0]:
            header["pairs"][-1][0] = "model.layers.77.self_attn.q_proj"
        return header, body

    with monkeypatch.context() as patched:
        patched.setattr("openelm_mlx.link.several.packed_adapter", damaged)
        with pytest.raises(
            CheckpointError, match=r"On the worker 127\.0\.0\.1:\d+: The adapter belongs to another model"
        ):
            om.add_adapter(model, b, "c")
    assert model.adapters.served is there

    # A worker that comes back has what is there, and not what was taken away.
    for peer in model.remote.peers:
        peer.connection.close()
    for each in both:
        om.add_adapter(each, a, "again", activate=False)
    assert answers("a") == alone["b"]
    assert answers("again") == alone["a"]
    del there
    for each in both:
        om.remove_adapter(each, "a")
        om.remove_adapter(each, "again")
    assert answers() == plain
    # What was there before may have had something of the test before.
    wait_for_less(model, [min(each + 20_000, more - 1) for each, more in zip(before, beside, strict=True)])
    assert not model.remote.given
    model.remote.close()
