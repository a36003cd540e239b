"""A part of a model: its own tensors alone are read; and which layers lie on which machine."""

import itertools
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import random_model, save_folder

from openelm_mlx.checkpoint.parts import identity, part_name, part_of
from openelm_mlx.errors import MemoryLimitError, SettingError, WorkerError
from openelm_mlx.experts.residency import Streaming
from openelm_mlx.link.spread import parse_counts, spread_over
from openelm_mlx.memory.machine import find_mac, own_machine, this_machine
from openelm_mlx.memory.plan_types import PlanRequest
from openelm_mlx.memory.split import Room, missing_bytes, split_evenly, split_layers
from openelm_mlx.placement import Placement
from openelm_mlx.planning import released_contents
from openelm_mlx.sources import DEMOS, Source
from openelm_mlx.weights import read_model
from openelm_mlx.workers.caches import Caches
from openelm_mlx.workers.parts import Parts

GB = 10**9
IO = Path("/proc/self/io")


def read_so_far() -> int:
    return int(IO.read_text().split("rchar:")[1].split()[0])


def header_bytes(source: Source) -> int:
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in source.checkpoint.files)


@pytest.mark.skipif(not IO.exists(), reason="only Linux counts the bytes that a process reads")
@pytest.mark.parametrize("demo", DEMOS)
@pytest.mark.parametrize("count", [2, 3])
def test_a_machine_reads_its_own_tensors_and_headers(demo, count):
    once = Source.open(demo)
    read_model(Placement.of(once.contents, mx.float32).part(0, 1), once.checkpoint)  # what reading imports
    num_layers = len(once.spec.layers)
    borders = [0, *(num_layers * i // count for i in range(1, count)), num_layers]
    for start, stop in itertools.pairwise(borders):
        source = Source.open(demo)
        headers, before = header_bytes(source), read_so_far()
        part = Placement.of(source.contents, mx.float32).part(start, stop)
        model = read_model(part, source.checkpoint)
        identity(source.checkpoint, source.config)
        took = read_so_far() - before
        tensors = sum(each.stored_bytes for each in part.decisions)
        assert tensors <= took <= 1.01 * (tensors + headers), (tensors, headers, took)
        assert len(model.layers) == stop - start


@pytest.mark.parametrize("demo", DEMOS)
def test_parts_make_the_whole(demo):
    contents = Source.open(demo).contents
    num_layers = len(contents.spec.layers)
    parts = [part_of(contents, *each) for each in ((0, 2), (2, 3), (3, num_layers))]
    assert sum(part.spec.num_parameters() for part in parts) == contents.spec.num_parameters()
    for part in parts:
        weights = {f"{each}.weight" for each in part.quantized} | {name for name in part.parameters if "." in name}
        assert set(part.spec.parameter_shapes()) <= weights
    sources = [source for part in parts for each in part.parameters.values() for source in each.sources]
    assert sorted(sources) == sorted(source for each in contents.parameters.values() for source in each.sources)


def test_names():
    assert part_name("model.layers.7.mlp.router.weight", 5, 9) == "model.layers.2.mlp.router.weight"
    assert part_name("model.layers.17.mlp.router.weight", 5, 9) is None
    assert part_name("model.norm.weight", 0, 9) == "model.norm.weight"
    assert part_name("model.norm.weight", 1, 9) is None


def test_what_makes_two_checkpoints_one(tmp_path):
    folders = {
        name: save_folder(tmp_path / name, random_model(seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    found = {name: identity_of(folder) for name, folder in folders.items()}
    assert found["a"] == found["b"] != found["c"]
    other = save_folder(tmp_path / "d", random_model(), config={"rope_freq_constant": 5000})
    assert identity_of(other) != found["a"]


def identity_of(folder: Path) -> str:
    source = Source.open(folder)
    return identity(source.checkpoint, source.config)


def test_a_worker_finds_a_repository_in_its_own_cache_and_nothing_by_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, repo = "0a" * 20, tmp_path / "models--me--tiny"
    snapshot = save_folder(repo / "snapshots" / commit, random_model())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    asked = {
        "name": "me/tiny", "repo": "me/tiny", "identity": identity_of(snapshot), "start": 1, "stop": 2, "dtype": "float32",
        "longest": 64,
    }  # fmt: skip
    for revision in (None, commit, "main"):
        planned = Parts(None, None).prepare({**asked, "revision": revision})
        assert (planned.source.repo, len(planned.placement.contents.spec.layers)) == ("me/tiny", 1)
    for wrong in ({"repo": "me/other"}, {"repo": str(snapshot)}, {"repo": None, "demo": str(snapshot)}):
        with pytest.raises(WorkerError, match="Hugging Face cache"):
            Parts(None, None).prepare({**asked, **wrong})


def test_experts_on_disk_in_a_part():
    """A part streams its own experts, with the same answers."""
    source = Source.open("demo-gpt-oss")
    part = Placement.of(source.contents, mx.float32).part(2, 5)
    whole = read_model(part, source.checkpoint)
    streamed = read_model(part, source.checkpoint, Streaming(part.contents, source.checkpoint, 6))
    h = mx.random.normal((1, 5, 256))
    caches = whole.make_cache(), streamed.make_cache()
    assert mx.array_equal(whole(h, caches[0]), streamed(h, caches[1])).item()


def test_a_pass_that_fails_leaves_no_caches():
    """They may have been written to; the first machine forgets them, too."""
    source = Source.open("demo-openelm")
    part = Placement.of(source.contents, mx.float32).part(5, 8)
    caches = Caches(read_model(part, source.checkpoint), 4)
    h = mx.zeros((1, 2, part.contents.spec.hidden_size))
    assert caches.compute({"form": "whole", "rows": [[1, 0, 2, 1, 1]], "new": {"1": {}}}, h).shape == h.shape
    assert len(caches) == 1
    with pytest.raises(WorkerError, match="There is no pass 'odd'"):
        caches.compute({"form": "odd", "rows": [[1, 2, 2, 1, 1]]}, h)
    assert len(caches) == 0


# --- which layers where -----------------------------------------------------------------------------------------------


def test_the_fastest_is_filled_first():
    slow, fast = Room(20, 0, 2.0), Room(12, 0, 1.0)
    assert split_layers([2] * 10, 4, [slow, fast]) == (4, 6)
    assert split_layers([2] * 10, 4, [fast, slow]) == (4, 6)
    assert split_layers([2] * 10, 4, [Room(99, 0, 1.0), Room(99, 0, 1.0)]) == (9, 1)  # of equals, this machine
    assert split_layers([2] * 10, 4, [Room(99, 0, 2.0), Room(99, 0, 1.0), Room(99, 0, 3.0)]) == (1, 8, 1)


def test_uneven_layers_go_by_their_bytes():
    layers = [1, 1, 1, 1, 4, 4, 4, 4]
    assert split_layers(layers, 2, [Room(6), Room(16)]) == (4, 4)
    assert split_layers(layers, 2, [Room(10), Room(12)]) == (5, 3)
    assert split_layers(layers, 2, [Room(9), Room(11)]) is None  # the sum would do, whole layers do not
    assert missing_bytes(layers, 2, [Room(9), Room(11)]) == 2
    assert split_layers(layers, 2, [Room(3), Room(-5), Room(99)]) is None


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_takes_less_time(seed):
    import random

    draw = random.Random(seed)
    layers = [draw.randrange(1, 6) for _ in range(7)]
    rooms = [Room(draw.randrange(3, 16), draw.random(), draw.random()) for _ in range(3)]
    best = None
    for a, b in itertools.combinations(range(1, 7), 2):
        parts = [layers[:a], layers[a:b], layers[b:]]
        sums = [sum(parts[0]) + 2, sum(parts[1]), sum(parts[2])]
        if all(total <= room.nbytes for total, room in zip(sums, rooms, strict=True)):
            took = sum(
                len(part) * room.seconds_per_layer + total * room.seconds_per_byte
                for part, total, room in zip(parts, sums, rooms, strict=True)
            )
            best = took if best is None else min(best, took)
    found = split_layers(layers, 2, rooms)
    assert (found is None) == (best is None)
    if found is not None:
        start, took = 0, 2 * rooms[0].seconds_per_byte
        for count, room in zip(found, rooms, strict=True):
            part = layers[start : start + count]
            took += count * room.seconds_per_layer + sum(part) * room.seconds_per_byte
            start += count
        assert took == pytest.approx(best)


def test_too_little_is_divided_by_what_there_is():
    counts = split_evenly([2] * 12, 2, [Room(10), Room(10), Room(5)])
    assert sum(counts) == 12
    assert counts[0] >= counts[2] >= 1
    assert min(split_evenly([1] * 3, 50, [Room(1), Room(1), Room(1)])) == 1


def test_two_macs_for_the_120b():
    placement = Placement.of(released_contents("openai/gpt-oss-120b"), on_cpu=False)
    macs = [find_mac("M4 Pro 48GB")] * 2
    parts = spread_over("openai/gpt-oss-120b", placement, macs, PlanRequest(context_length=4096))
    assert [part.stop - part.start for part in parts] == [21, 15]  # as many as this Mac holds
    assert all(part.plan.fits and part.plan.expert_slots is None for part in parts)
    assert sum(part.plan.weights_bytes for part in parts) == pytest.approx(65.2 * GB, rel=0.01)
    # The larger and faster one has as much as it can hold.
    mixed = spread_over(
        "openai/gpt-oss-120b",
        placement,
        [find_mac("M4 Pro 48GB"), find_mac("M4 Max 64GB")],
        PlanRequest(context_length=4096),
    )
    assert mixed[1].stop - mixed[1].start > 24


def test_another_machine_s_memory_limit_counts():
    """What its owner has allowed there, and not what the machine has; that of the request is this machine's alone."""
    placement = Placement.of(Source.open("demo-openelm").contents, mx.float32)
    macs = [find_mac("M4 16GB"), *[find_mac("M4 Max 64GB")] * 2]
    request = PlanRequest(memory_limit=2 * GB)

    def layers(limits: list[int | None] | None) -> list[int]:
        parts = spread_over("demo-openelm", placement, macs, request, limits=limits)
        assert [part.plan.memory_limit for part in parts][1:] == [
            each or macs[1].available_bytes for each in limits or [0, 0]
        ]
        assert all(part.plan.fits for part in parts)
        return [part.stop - part.start for part in parts]

    assert layers(None) == layers([None, None]) == [1, 6, 1]
    process = spread_over("demo-openelm", placement, macs, request)[2].plan.process_bytes
    assert layers([process, None])[2] > layers([None, None])[2]


def test_what_three_machines_do_not_hold():
    placement = Placement.of(Source.open("demo-openelm").contents, mx.float32)
    small = replace(this_machine(), memory_bytes=70_000_000, working_set_bytes=70_000_000, used_bytes=0)
    with pytest.raises(MemoryLimitError, match=r"demo-openelm needs .* are missing; add a worker"):
        spread_over(
            "demo-openelm", placement, [replace(small, memory_bytes=10**7, working_set_bytes=10**7)] * 3, PlanRequest()
        )
    with pytest.raises(SettingError, match="has 8 layers, too few for 9 machines"):
        spread_over("demo-openelm", placement, [small] * 9, PlanRequest())
    for wrong in ("a", "3,", "3;5", "", 3, [3.5]):
        with pytest.raises(SettingError, match="layers is"):
            parse_counts(wrong)
    assert parse_counts("20,16") == parse_counts([20, 16]) == (20, 16)


def test_what_a_worker_has_read_is_not_another_program_s(monkeypatch):
    """Else whoever comes next would see no room for the layers that are there already."""
    machine = replace(this_machine(), memory_bytes=64 * GB, working_set_bytes=48 * GB, used_bytes=30 * GB)
    monkeypatch.setattr("openelm_mlx.memory.machine.this_machine", lambda: machine)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 25 * GB)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1 * GB)
    assert own_machine().used_bytes == 4 * GB
    assert own_machine().available_bytes == 48 * GB
