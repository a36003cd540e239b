"""A server's models: names, loading on demand, memory that is really given back, leases, and engines that have died."""

import asyncio
import gc
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import random_model, save_folder

from openelm_mlx.errors import CheckpointError, EngineClosedError, SettingError
from openelm_mlx.planning import plan
from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.loading import Loader
from openelm_mlx.server.names import Names, models_in, parse_aliases, served_model, with_adapters
from openelm_mlx.server.registry import Registry
from openelm_mlx.server.settings import ServedModel, ServerSettings

BOTH = (served_model("demo-gpt-oss"), served_model("demo-openelm"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four models of 26 MB: a, b, c and d."""
    place = tmp_path_factory.mktemp("models")
    model = random_model(num_transformer_layers=4, model_dim=512, head_dim=64)
    save_folder(place / "a", model, "llama")
    for name in "bcd":
        shutil.copytree(place / "a", place / name)
    return place


def room_for(folder, count):
    """A memory limit that so many of them keep to, and one more would not."""
    found = plan(folder / "a", memory_limit="1GB")
    tokenizer = 5 * (folder / "a" / "tokenizer.model").stat().st_size
    each = found.total_bytes + tokenizer
    return mx.get_active_memory() + found.process_bytes + (count - 1) * each + each // 2


def settings(folder, names="abcd", count=2, **changes):
    options = {"memory_limit": room_for(folder, count), "context_length": 64}
    return ServerSettings(
        models=tuple(ServedModel(name, folder / name) for name in names), load_options=options, **changes
    )


def states(registry):
    return {card.id: card.state for card in registry.names()}


async def used(registry, name):
    """Use a model once."""
    async with await registry.acquire(name) as lease:
        handle = lease.engine.submit("hello", max_tokens=2, prefix_cache=lease.prefix_cache)
        return [chunk.token async for chunk in handle]


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        self.time += 0.001  # later calls are later
        return self.time


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


async def drained(handle):
    """How many chunks come until the end."""
    return len([chunk async for chunk in handle])


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


# --- loading and giving back ------------------------------------------------------------------------------------------


def test_models_are_loaded_on_demand_and_answer():
    async def main():
        async with Registry(ServerSettings(models=BOTH)) as registry:
            assert states(registry) == {"demo-gpt-oss": "unloaded", "demo-openelm": "unloaded"}
            assert len(await used(registry, "demo-openelm")) == 2
            assert states(registry) == {"demo-gpt-oss": "ready", "demo-openelm": "ready"}  # the first one at the start
            with pytest.raises(ApiError, match="There is no model 'gpt-4o' here") as told:
                await registry.acquire("gpt-4o")
            assert (told.value.status, told.value.code, told.value.param) == (404, "model_not_found", "model")

    asyncio.run(main())


def test_the_least_recently_used_one_makes_room_and_its_memory_is_free(folder):
    weights = plan(folder / "a", memory_limit="1GB").weights_bytes
    gc.collect()
    before, threads = mx.get_active_memory(), threading.active_count()

    async def main():
        async with Registry(settings(folder), clock=Clock()) as registry:
            alone = await used(registry, "a")
            await used(registry, "b")
            assert mx.get_active_memory() - before >= 2 * weights
            assert await used(registry, "a") == alone
            await used(registry, "c")  # b was used longest ago
            assert states(registry) == {"a": "ready", "b": "unloaded", "c": "ready", "d": "unloaded"}
            assert 2 * weights <= mx.get_active_memory() - before < 2.2 * weights
            await used(registry, "b")
            assert states(registry) == {"a": "unloaded", "b": "ready", "c": "ready", "d": "unloaded"}
            assert await used(registry, "a") == alone
            assert mx.get_active_memory() - before < 2.2 * weights

    asyncio.run(main())
    gc.collect()
    assert mx.get_active_memory() - before < weights // 100
    assert threading.active_count() <= threads + 1  # a thread of loading may still be saying goodbye


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's memory is read from /proc")
def test_swapping_models_does_not_make_the_process_grow(folder):
    """In a process of its own, since what other tests have left is given back at any time."""
    script = "import sys; from pathlib import Path; import test_server_registry; test_server_registry.swap(Path(sys.argv[1]))"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env={**os.environ, "PYTHONPATH": path})


def swap(folder):
    """Ten models one after the other. Raises AssertionError where memory grows with them."""
    weights = plan(folder / "a", memory_limit="1GB").weights_bytes

    async def main():
        async with Registry(settings(folder, count=1)) as registry:
            sizes = []
            for i in range(10):
                await used(registry, "abcd"[i % 4])
                assert sum(state == "ready" for state in states(registry).values()) == 1
                sizes.append(resident_bytes())
            assert max(sizes[4:]) - sizes[3] < weights  # ten would be ten times as much

    asyncio.run(main())


def test_a_model_in_use_is_not_taken_away_and_who_came_later_waits_for_whoever_waits(folder):
    async def main():
        async with Registry(settings(folder, count=1)) as registry:
            lease = await registry.acquire("a")
            waiting_b = asyncio.create_task(used(registry, "b"))
            await until(lambda: states(registry)["b"] == "loading")
            await asyncio.sleep(0.05)
            assert states(registry)["a"] == "ready"
            assert len([chunk async for chunk in lease.engine.submit("x", max_tokens=3)]) == 3  # it goes on
            # b does not wait for ever because a is popular.
            later_a = asyncio.create_task(used(registry, "a"))
            await asyncio.sleep(0.05)
            assert not later_a.done()
            lease.release()
            assert len(await waiting_b) == 2
            assert len(await later_a) == 2

    asyncio.run(main())


def test_many_who_ask_for_one_model_share_one_loading(folder):
    loads = []

    class Counting(Loader):
        def prepare(self, served, progress):
            loads.append(served.name)
            return super().prepare(served, progress)

    async def main():
        chosen = settings(folder, count=1)
        async with Registry(chosen, Counting(chosen)) as registry:
            await asyncio.gather(*(used(registry, "b") for _ in range(8)))
            # Who takes turns makes progress, too: each loading serves all who wait then.
            answers = await asyncio.gather(*(used(registry, "abc"[i % 3]) for i in range(12)))
            assert len(answers) == 12

    asyncio.run(main())
    assert loads.count("b") <= 2
    assert len(loads) <= 6


def test_whoever_waits_too_long_is_told_when_to_come_back(folder):
    async def main():
        async with Registry(settings(folder, count=1, load_wait=0.3)) as registry:
            await until(lambda: states(registry)["a"] == "ready")
            async with await registry.acquire("a"):
                with pytest.raises(ApiError, match="b is not in memory yet: others are being used") as told:
                    await registry.acquire("b")
                assert (told.value.status, told.value.code) == (503, "model_loading")
                assert told.value.retry_after
                # Nobody waits for b any more, so a need not leave.
                async with await registry.acquire("a"):
                    pass
            await until(lambda: states(registry)["b"] == "unloaded")
            assert states(registry)["a"] == "ready"

    asyncio.run(main())


def test_a_client_that_goes_away_while_it_waits_leaves_nothing_behind(folder):
    async def main():
        async with Registry(settings(folder, count=1)) as registry:
            lease = await registry.acquire("a")
            waiting = [asyncio.create_task(registry.acquire("b")) for _ in range(3)]
            await until(lambda: states(registry)["b"] == "loading")
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await until(lambda: states(registry)["b"] == "unloaded")
            async with await registry.acquire("a"):
                pass
            lease.release()
            # And one that goes at the very moment at which its model is there.
            for delay in range(8):
                task = asyncio.create_task(registry.acquire("bc"[delay % 2]))
                await asyncio.sleep(delay / 26)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                if not task.cancelled():
                    task.result().release()
            await used(registry, "a")
            assert registry._slots["a"].loaded.num_leases == 0
            assert sum(state == "ready" for state in states(registry).values()) == 1

    asyncio.run(main())


def test_a_lease_that_was_forgotten_is_found(folder):
    async def main():
        async with Registry(settings(folder, count=1)) as registry:
            await registry.acquire("a")  # nobody keeps it
            gc.collect()
            assert len(await used(registry, "b")) == 2

    asyncio.run(main())


@pytest.mark.parametrize(
    ("keep_alive", "is_kept"), [(60.0, [True, False]), (0.0, [False, False]), (None, [True, True])]
)
def test_models_that_nobody_uses_are_given_back(folder, keep_alive, is_kept):
    async def main():
        clock = Clock()
        async with Registry(settings(folder, keep_alive=keep_alive), clock=clock) as registry:
            await used(registry, "a")
            await registry.replace_and_unload()
            assert (states(registry)["a"] == "ready") is is_kept[0]
            clock.time += 61
            await registry.replace_and_unload()
            assert (states(registry)["a"] == "ready") is is_kept[1]
            lease = await registry.acquire("a")
            clock.time += 61
            await registry.replace_and_unload()
            assert states(registry)["a"] == "ready"  # in use, however long
            lease.release()

    asyncio.run(main())


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_whoever_waits_is_told_why_a_model_cannot_be_loaded_and_the_next_one_tries_again(folder, tmp_path):
    for name in "ab":
        shutil.copytree(folder / name, tmp_path / name)
    weights = tmp_path / "b" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])

    async def main():
        async with Registry(settings_of(tmp_path, folder)) as registry:
            told = await asyncio.gather(*(registry.acquire("b") for _ in range(3)), return_exceptions=True)
            for error in told:
                assert (error.status, error.code) == (503, "model_load_failed")
                assert "model.safetensors" in error.message
            assert len({id(error) for error in told}) == 3
            assert states(registry)["b"] == "failed"
            assert "model.safetensors" in registry.status()["models"][1]["error"]
            await used(registry, "a")
            weights.write_bytes(whole)
            assert len(await used(registry, "b")) == 2
            assert "error" not in registry.status()["models"][1]

    asyncio.run(main())


def settings_of(place, folder):
    return ServerSettings(
        models=(ServedModel("a", place / "a"), ServedModel("b", place / "b")),
        load_options={"memory_limit": room_for(folder, 2), "context_length": 64},
    )


def test_a_failure_of_ours_while_loading_is_told_too(folder):
    class Broken(Loader):
        def read(self, served, prepared):
            raise RuntimeError("metal: no such kernel")

    async def main():
        chosen = settings(folder)
        async with Registry(chosen, Broken(chosen)) as registry:
            with pytest.raises(ApiError, match="a could not be loaded: RuntimeError: metal: no such kernel"):
                await registry.acquire("a")
            assert registry.health() == "failed"

    asyncio.run(main())


def test_a_model_that_is_larger_than_the_memory_says_what_it_needs(folder):
    async def main():
        chosen = settings(folder)
        tight = ServerSettings(models=chosen.models, load_options={"memory_limit": 60_000_000})
        async with Registry(tight) as registry:
            with pytest.raises(ApiError, match=r"does not fit: weights 26\.4 MB") as told:
                await registry.acquire("a")
            assert told.value.status == 503

    asyncio.run(main())


class Death(BaseException):
    """What no request can cause."""


async def kill(lease):
    """Let the engine's thread die in the middle of a request; what its reader is told."""

    def step():
        raise Death("the GPU is gone")

    lease.engine._runner.step = step
    try:
        return [chunk async for chunk in lease.engine.submit("x", max_tokens=3)]
    except Death as error:
        return error


def test_an_engine_that_has_died_is_replaced_and_nobody_waits_for_it(folder):
    gc.collect()
    before = mx.get_active_memory()

    async def main():
        async with Registry(settings(folder)) as registry:
            alone = await used(registry, "a")
            lease = await registry.acquire("a")
            assert isinstance(await kill(lease), Death)
            assert registry.health() == "dead"
            again = asyncio.create_task(used(registry, "a"))
            await asyncio.sleep(0.05)
            assert registry.health() == "dead"
            lease.release()
            assert await again == alone
            assert registry.health() == "ok"
            assert mx.get_active_memory() - before < 30_000_000  # the dead one is not there any more

    asyncio.run(main())


def test_an_engine_that_has_died_is_replaced_before_anybody_asks(folder):
    async def main():
        async with Registry(settings(folder)) as registry:
            async with await registry.acquire("a") as lease:
                await kill(lease)
            del lease
            await registry.replace_and_unload()
            await until(lambda: registry.health() == "ok")
            assert states(registry)["a"] == "ready"
            assert len(await used(registry, "a")) == 2

    asyncio.run(main())


def test_a_model_that_has_to_be_loaded_again_is_loaded_again(folder):
    from openelm_mlx.runtime import runtime_of

    async def main():
        async with Registry(settings(folder)) as registry:
            async with await registry.acquire("a") as lease:
                runtime_of(lease.model).failure = "The disk with the experts is gone: load the model again."
                first = lease.engine
            del lease
            async with await registry.acquire("a") as lease:
                assert lease.engine is not first

    asyncio.run(main())


def test_at_the_end_everybody_is_told(folder):
    async def main():
        registry = Registry(settings(folder, count=1))
        registry.start()
        async with await registry.acquire("a") as lease:
            handle = lease.engine.submit("x", max_tokens=60)
            waiting = asyncio.create_task(registry.acquire("b"))
            await asyncio.sleep(0.05)
            await registry.close()
            with pytest.raises(ApiError, match="being shut down"):
                await waiting
            with pytest.raises(ApiError, match="being shut down"):
                await registry.acquire("a")
            with pytest.raises(EngineClosedError):
                await drained(handle)
        await registry.close()

    asyncio.run(main())


# --- memory that several engines share --------------------------------------------------------------------------------


def test_engines_leave_room_for_each_other(folder):
    async def main():
        async with Registry(settings(folder)) as registry, await registry.acquire("a") as a:
            alone = a.engine._runner.memory._active_memory()
            async with await registry.acquire("b") as b:
                beside = b.plan
                needs = beside.kv_cache_bytes + beside.scratch_bytes
                seen = a.engine._runner.memory._active_memory()
                assert seen - alone >= beside.weights_bytes + needs
                assert seen - mx.get_active_memory() >= needs
                # Both can do what their plans promise.
                both = [each.engine.submit("hello " * 10, max_tokens=20) for each in (a, b)]
                for handle in both:
                    assert await drained(handle) == 20
                without = a.engine._runner.memory.without_requests()
                assert without >= 2 * beside.weights_bytes
            await registry._give_back(registry._slots["b"])
            assert a.engine._runner.memory._active_memory() - mx.get_active_memory() == 0
            assert a.engine._runner.memory.without_requests() < without

    asyncio.run(main())


@pytest.mark.slow
def test_kept_prefixes_give_way_to_another_model(folder):
    async def main():
        async with Registry(settings(folder)) as registry:
            async with await registry.acquire("a") as lease:
                store = lease.prefix_cache
                for i in range(40):
                    handle = lease.engine.submit([i + 5] * 60, max_tokens=1, prefix_cache=store)
                    assert [chunk async for chunk in handle]
                kept = store.nbytes
                assert kept > 1_000_000
            del lease, handle
            async with await registry.acquire("b") as lease:
                budget = lease.plan.budget_bytes
                assert store.nbytes < kept
                assert mx.get_active_memory() <= budget
                # And to a request of the other model.
                assert store in lease.engine._runner.memory._known_stores()

    asyncio.run(main())


# --- names ------------------------------------------------------------------------------------------------------------


def names(*models, **aliases):
    return Names([ServedModel(name, name) for name in models], aliases)


def test_a_request_names_a_model_by_its_name_its_alias_or_another_program_s_name():
    known = names("openai/gpt-oss-20b", "apple/OpenELM-3B-Instruct", "mine", **{"gpt-4o-mini": "gpt-oss-20b"})
    for name in ("openai/gpt-oss-20b", "gpt-oss-20b", "gpt-oss:20b", "gpt-oss", "OpenAI/GPT-OSS-20B", "gpt-4o-mini"):
        assert known.find(name) == ("openai/gpt-oss-20b", None), name
    for name in ("openelm-3b-instruct", "OpenELM-3B-Instruct"):
        assert known.find(name) == ("apple/OpenELM-3B-Instruct", None)
    for name in (
        "",
        "gpt-4o",
        "gpt-oss-120b",
        "./mine",
        "/mine",
        "mine/",
        "../mine",
        "openai/gpt-oss-20b@main",
        "mine\0",
    ):
        assert known.find(name) is None, name
    assert names("one/x", "two/x").find("x") is None  # which one?


def test_an_adapter_is_named_behind_its_model():
    models = with_adapters([ServedModel("openai/gpt-oss-20b", "x"), ServedModel("b", "y")], ["a=.", "b:c=owner/name"])
    known = Names(models, {"mine": "openai/gpt-oss-20b:a", "big": "gpt-oss-20b"})
    for name in ("openai/gpt-oss-20b:a", "gpt-oss-20b:a", "gpt-oss:20b:a", "mine", "big:a"):
        assert known.find(name) == ("openai/gpt-oss-20b", "a"), name
    assert known.find("b:c") == ("b", "c")
    assert known.find("gpt-oss:20b") == ("openai/gpt-oss-20b", None)
    for name in ("b:a", "openai/gpt-oss-20b:c", ":a", "a", "b:", "openai/gpt-oss-20b:a:a"):
        assert known.find(name) is None, name


@pytest.mark.parametrize(("values", "said"), [
    (["x"], "write NAME=PATH"), (["=x"], "write NAME=PATH"), (["a="], "write NAME=PATH"), (["b:=x"], "write NAME=PATH"),
    (["z:a=."], "is for z, and no model is called that: there is m, b"), (["a=/no/such"], "no file or folder /no/such"),
    (["a=.", "m:a=."], "Two adapters of m are called a"),
])  # fmt: skip
def test_adapters_that_cannot_be_served(values, said):
    with pytest.raises(SettingError, match=said):
        with_adapters([ServedModel("m", "x"), ServedModel("b", "y")], values)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: names("a", "a"), "Two models are called a"),
        (lambda: names(), "no model to serve"),
        (lambda: names("a", b="c"), "The alias b is for c, and no model is called that: there is a."),
        (lambda: names("a", "b", a="b"), "The alias a is the name of a model"),
        (lambda: parse_aliases(["x"]), "--alias 'x' is not of the form ALIAS=NAME"),
        (lambda: parse_aliases(["x=a", "x=b"]), "--alias x is given twice"),
        (lambda: served_model("=x"), "no name before the ="),
    ],
)
def test_names_that_do_not_work_are_one_sentence(make, said):
    with pytest.raises(SettingError, match=said):
        make()


def test_sources_of_the_command_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    assert [served_model(each).name for each in ("demo-openelm", "a", "./a/", "x=a", str(folder / "b"))] == [
        "demo-openelm", "a", "a", "x", "b",
    ]  # fmt: skip
    assert served_model("openai/gpt-oss-20b") == ServedModel(
        "openai/gpt-oss-20b", "openai/gpt-oss-20b", owned_by="openai"
    )
    assert served_model("mine=openai/gpt-oss-20b").name == "mine"
    assert Path(served_model("a").source).is_absolute()
    for wrong in ("no/such/folder", "nothing", "", "gpt-oss:20b", str(tmp_path)):
        with pytest.raises(CheckpointError):
            served_model(wrong)


def test_the_models_of_a_folder(folder, tmp_path):
    assert [each.name for each in models_in(folder)] == ["a", "b", "c", "d"]
    shutil.copytree(folder / "a", tmp_path / "owner" / "x")
    shutil.copytree(folder / "a", tmp_path / ".hidden")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert [each.name for each in models_in(tmp_path)] == ["owner/x"]
    for wrong in (tmp_path / "empty", tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(SettingError, match="--models-folder"):
            models_in(wrong)


def test_the_list_has_aliases_and_a_card_of_each(folder):
    registry = Registry(ServerSettings(models=BOTH, aliases={"gpt-4o-mini": "demo-gpt-oss"}))
    assert [card.id for card in registry.names()] == ["demo-gpt-oss", "demo-openelm", "gpt-4o-mini"]
    assert registry.card("gpt-4o-mini").owned_by == "openelm_mlx"
    assert registry._slot("gpt-4o-mini").served.name == "demo-gpt-oss"
    with pytest.raises(ApiError):
        registry.card("gpt-4o")
