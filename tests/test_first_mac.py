"""What a Mac is like, on any machine: few open files, facts that come from sysctl and vm_stat, calls that are not there.

Nothing here needs a Mac. What a Mac says is put in its place, as recorded on one or as Apple's sources have it, so that a
change made elsewhere cannot break the first Mac unseen.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
import yaml
from conftest import random_model

import openelm_mlx as om
from benchmarks.measurements.streaming import forget_files
from openelm_mlx.bench import selfcheck_machine
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.bench.selfcheck import CheckFailed, Clock
from openelm_mlx.checkpoint.destination import check_destination
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config, read_header
from openelm_mlx.checkpoint.released import released_gpt_oss_config, released_openelm_config
from openelm_mlx.checkpoint.safetensors_plan import OutputTensor, plan_files, write_sparse
from openelm_mlx.commands import main
from openelm_mlx.decoding.gpu_errors import empty_stream
from openelm_mlx.decoding.speculative import num_fused
from openelm_mlx.errors import (
    CheckpointError,
    ConfigError,
    DestinationError,
    MemoryLimitError,
    PlatformError,
    SettingError,
)
from openelm_mlx.finder import disk_trouble, sync, sync_folder
from openelm_mlx.hub import RepoFile
from openelm_mlx.loading import load
from openelm_mlx.memory.machine import GIB, Machine, allow_open_files, process_peak_bytes, this_machine, working_set_of
from openelm_mlx.memory.macos import Footprint, footprint, forget_file, on_macos, used_bytes
from openelm_mlx.memory.plan import make_plan
from openelm_mlx.memory.plan_types import PlanRequest, Weights
from openelm_mlx.platforms import keep_float32, require_mlx, use_device
from openelm_mlx.sources import DEMOS, choose_model_files
from openelm_mlx.specs import openelm_config, spec_from_config

TESTS = Path(__file__).parent
# Half of what a Terminal on macOS gives.
FEW_FILES = 128


def run_python(*words: str) -> str:
    """What a fresh Python prints; the test fails with its last words when it fails."""
    finished = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


# --- open files -------------------------------------------------------------------------------------------------------


def load_with_few_files(folder: Path, *words: str, max_files: int = FEW_FILES) -> dict:
    """What tests/load_with_few_files.py says; the test fails with its last words when it fails."""
    return json.loads(run_python(str(TESTS / "load_with_few_files.py"), str(folder), "--files", str(max_files), *words))


def narrow(size: str) -> dict:
    """A released gpt-oss with all its layers and experts, and so all its tensors, but of a few numbers each."""
    return released_gpt_oss_config(size) | {
        "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 256, "eos_token_id": 2,
    }  # fmt: skip


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("slots", [None, 4], ids=["in memory", "on disk"])
@pytest.mark.parametrize("layout", ["openai-hf", "openai-original"])
@pytest.mark.parametrize("size", ["20b", "120b"])
def test_every_tensor_of_gpt_oss_waits_in_few_files(tmp_path, size, layout, slots):
    # So small that they are evaluated in one batch: more at once than the real ones ever are.
    folder = write_random_gpt_oss(tmp_path / "m", narrow(size), layout, max_file_bytes=2**20, sparse=True)
    found = load_with_few_files(folder, *(() if slots is None else ("--slots", str(slots))))
    num_shards = len(list(folder.glob("*.safetensors")))
    assert found["parameters"] > FEW_FILES
    assert found["most_open"] <= 2 * num_shards + 16  # those of the experts on disk, and what any program has


@pytest.mark.parametrize("size", ["270M", "3B"])
def test_every_tensor_of_openelm_waits_in_few_files(tmp_path, size):
    spec = spec_from_config(released_openelm_config(size) | {"model_dim": 64, "head_dim": 16, "ffn_dim_divisor": 8})
    tensors = [OutputTensor(name, "BF16", shape) for name, shape in spec.parameter_shapes().items()]
    config = json.dumps(openelm_config(spec)).encode()
    folder = write_sparse(tmp_path / "m", plan_files(tensors, 2**30), {"config.json": config})
    found = load_with_few_files(folder, max_files=64)
    assert found["parameters"] > 64
    assert found["most_open"] <= 16


@pytest.mark.skipif(not os.environ.get("OPENELM_MLX_LARGE"), reason="reads 4 GB of zeros: set OPENELM_MLX_LARGE=1")
@pytest.mark.parametrize("layout", ["openai-hf", "openai-original"])
@pytest.mark.parametrize("size", ["20b", "120b"])
def test_a_model_of_the_real_size_loads_in_few_files_and_8_gb(tmp_path, size, layout):
    folder = write_random_gpt_oss(tmp_path / "m", released_gpt_oss_config(size), layout, sparse=True)
    found = load_with_few_files(folder, "--memory", "8000000000")
    assert found["most_open"] <= 40
    assert found["peak"] <= 8_000_000_000


class Limits:
    """What stands in for the module `resource`: (soft, hard) files, and what the system lets be set."""

    RLIMIT_NOFILE, RLIM_INFINITY = 8, 2**63 - 1

    def __init__(self, soft: int, hard: int, system: int = 2**62) -> None:
        self.limits, self.system = (soft, hard), system

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == self.RLIMIT_NOFILE
        return self.limits

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        assert which == self.RLIMIT_NOFILE
        if limits[0] > self.system:
            raise ValueError("current limit exceeds maximum limit")
        self.limits = limits


@pytest.mark.parametrize(
    ("soft", "hard", "system", "then"),
    [
        (256, Limits.RLIM_INFINITY, 10240, 4096),  # a Terminal on macOS
        (256, 1024, 10240, 1024),
        (256, Limits.RLIM_INFINITY, 1000, 256),  # refused
        (10240, Limits.RLIM_INFINITY, 10240, 10240),  # never fewer
        (Limits.RLIM_INFINITY, Limits.RLIM_INFINITY, 10240, Limits.RLIM_INFINITY),
    ],
)
def test_the_limit_of_open_files_is_raised_quietly(monkeypatch, soft, hard, system, then):
    limits = Limits(soft, hard, system)
    monkeypatch.setitem(sys.modules, "resource", limits)
    allow_open_files()
    assert limits.limits == (then, hard)


def test_loading_raises_the_limit():
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128)); import openelm_mlx as om; "
        "om.load('demo-openelm'); print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert run_python("-c", script).split() == ["128", "128"]


# --- what the machine says of itself ----------------------------------------------------------------------------------

# `vm_stat` on a Mac of 32 GB (GIB) after a file of 13 GB was read twice: of the active pages many are the file's.
AFTER_READING = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              152000.
Pages active:                            870000.
Pages inactive:                          861000.
Pages speculative:                         3800.
Pages throttled:                              0.
Pages wired down:                        150000.
Pages purgeable:                           9000.
"Translation faults":                1284716519.
Pages copy-on-write:                   39116052.
Pages zero filled:                    744127322.
Pages reactivated:                     22938123.
Pages purged:                           4720392.
File-backed pages:                      1183000.
Anonymous pages:                         561800.
Pages stored in compressor:              180000.
Pages occupied by compressor:             60400.
Decompressions:                        10273381.
Compressions:                          14380230.
Pageins:                               48282034.
Pageouts:                                141203.
Swapins:                                      0.
Swapouts:                                     0.
"""

# `max_recommended_working_set_size` as dumps and logs have it; of 8, 18 and 96 GB estimated.
WORKING_SETS = {
    8: 5_726_623_061, 16: 12_713_120_000, 18: 14_302_241_095, 24: 19_069_670_000, 32: 26_800_600_000, 36: 30_150_672_384,
    48: 40_200_896_512, 64: 55_662_788_608, 96: 83_494_164_234, 128: 115_448_730_000, 256: 223_338_299_392,
    512: 498_216_206_336,
}  # fmt: skip


class Mac:
    """A Mac's words: what `device_info` has with the GPU or the CPU as default device, and what its commands print."""

    def __init__(self, chip: str, memory_gb: int, cores: int | None = None, vm_stat: str = AFTER_READING) -> None:
        self.memory = memory_gb * GIB
        self.on_gpu = {
            "device_name": f"Apple {chip}", "architecture": "applegpu_g16s", "memory_size": self.memory,
            "max_recommended_working_set_size": WORKING_SETS[memory_gb],
            "max_buffer_length": WORKING_SETS[memory_gb] * 3 // 4, "resource_limit": 499000,
        }  # fmt: skip
        self.on_cpu = {"device_name": "arm", "architecture": "arm64"}
        self.answers = {
            "sysctl -n hw.memsize": str(self.memory),
            "sysctl -n machdep.cpu.brand_string": f"Apple {chip}",
            "sysctl -n iogpu.wired_limit_mb": "0",
            "vm_stat": vm_stat,
        }
        if cores is not None:
            self.answers["ioreg -r -c AGXAccelerator -d 1"] = (
                f'+-o AGXAcceleratorG16X\n    {{\n      "gpu-core-count" = {cores}\n    }}\n'
            )

    def run(self, command: list[str]) -> str | None:
        return self.answers.get(" ".join(command))

    def machine(self, on_cpu: bool = False) -> Machine:
        if on_cpu:
            return this_machine(self.on_cpu, "cpu", self.run, is_mac=True)
        return this_machine(self.on_gpu, "metal", self.run, is_mac=True)


@pytest.mark.parametrize("memory_gb", WORKING_SETS)
def test_macs_of_every_size(memory_gb):
    machine = Mac("M4 Max", memory_gb).machine()
    assert (machine.memory_bytes, machine.working_set_bytes) == (memory_gb * GIB, WORKING_SETS[memory_gb])
    assert machine.available_bytes == min(WORKING_SETS[memory_gb], max(0, memory_gb * GIB - machine.used_bytes))
    assert working_set_of(memory_gb)[0] == WORKING_SETS[memory_gb]


def test_the_largest_macs_leave_48_gib():
    for memory_gb in (256, 512):
        assert working_set_of(memory_gb) == ((memory_gb - 48) * GIB, True)


def test_a_file_that_was_read_is_no_used_memory():
    assert used_bytes(AFTER_READING) == pytest.approx(12.5e9, rel=0.001)
    active = (150_000 + 870_000 + 60_400) * 16384
    assert active == pytest.approx(17.7e9, rel=0.001)  # what wired, active and compressed pages come to


def test_what_vm_stat_does_not_say():
    assert used_bytes("") == 0
    assert used_bytes("page size of 4096 bytes\nPages wired down: 10.") == 40960
    assert used_bytes(AFTER_READING.replace("561800", "5000")) == 16384 * (150_000 + 60_400)  # never below nothing


@pytest.mark.parametrize("memory_gb", [8, 36, 512])
def test_the_cpu_as_default_device_has_the_mac_s_memory(memory_gb):
    machine = Mac("M3 Max", memory_gb).machine(on_cpu=True)
    assert (machine.name, machine.backend) == (f"Apple M3 Max {memory_gb}GB", "cpu")
    assert machine.memory_bytes == machine.working_set_bytes == memory_gb * GIB
    assert machine.used_bytes == min(memory_gb * GIB, used_bytes(AFTER_READING))
    assert machine.bandwidth is machine.flops is None  # a plan's rates are the GPU's


@pytest.fixture
def pretended_mac(monkeypatch) -> Mac:
    """This machine as a Mac whose default device is the CPU: macOS's commands answer, and what macOS lacks is missing."""
    mac = Mac("M2", 16)
    monkeypatch.setattr("openelm_mlx.memory.machine.on_macos", lambda: True)
    monkeypatch.setattr("openelm_mlx.memory.machine.output", mac.run)
    monkeypatch.setattr("openelm_mlx.memory.machine.footprint", lambda: Footprint(10**8, 2 * 10**8))
    monkeypatch.setattr("openelm_mlx.memory.machine._linux_memory", lambda root: (0, 0))  # there is no /proc
    for name in ("posix_fadvise", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    return mac


def test_the_demos_load_with_the_cpu_as_default_device(pretended_mac):
    for source in ("demo-openelm", "demo-gpt-oss"):
        model, tokenizer = load(source, context_length=256)
        assert model.plan.machine.memory_bytes == 16 * GIB
        assert len(list(om.stream_generate(model, tokenizer, "Hello", max_tokens=2))) == 2


@pytest.mark.parametrize(
    ("chip", "memory_gb", "cores", "bandwidth", "flops"),
    [
        ("M3 Max", 36, None, 300e9, 10.65e12),
        ("M3 Max", 36, 30, 300e9, 10.65e12),
        ("M3 Max", 64, 40, 400e9, 14.2e12),
        ("M4 Max", 36, 32, 410e9, 14.72e12),
        ("M5 Max", 36, None, 460e9, 18.24e12),
        ("M2 Max", 32, 30, 400e9, 10.66e12),  # the whole bus, fewer cores: only ioreg knows
    ],
)
def test_a_chip_with_fewer_cores_is_known(chip, memory_gb, cores, bandwidth, flops):
    machine = Mac(chip, memory_gb, cores).machine()
    assert (machine.bandwidth, machine.flops) == (bandwidth, flops)


def test_a_raised_wired_limit_counts():
    mac = Mac("M1", 16)
    mac.answers["sysctl -n iogpu.wired_limit_mb"] = "14000"
    assert mac.machine().working_set_bytes == 14000 * 2**20
    mac.answers["sysctl -n iogpu.wired_limit_mb"] = "99999"  # more than there is
    assert mac.machine().working_set_bytes == 16 * GIB
    mac.answers["sysctl -n iogpu.wired_limit_mb"] = "unknown oid"
    assert mac.machine().working_set_bytes == WORKING_SETS[16]


class SystemLibrary:
    """libSystem's `proc_pid_rusage`: an unsigned 64-bit number at each offset that XNU's header gives it."""

    def __init__(self, now: int, peak: int, processes: set[int]) -> None:
        self.now, self.peak, self.processes = now, peak, processes

    def proc_pid_rusage(self, pid: int, flavor: int, info) -> int:
        assert flavor == 4
        if pid not in self.processes:
            return -1
        words = ctypes.cast(info, ctypes.POINTER(ctypes.c_uint64))
        words[9], words[30] = self.now, self.peak  # behind 16 bytes of uuid: ri_phys_footprint, ..._lifetime_max_...
        return 0


def test_the_footprint_of_a_process():
    library = SystemLibrary(5 * 10**9, 7 * 10**9, {os.getpid(), 4711})
    assert footprint(None, library) == footprint(4711, library) == (5 * 10**9, 7 * 10**9)
    assert footprint(4712, library) is None  # has ended, or is another user's
    assert footprint() is None or on_macos()


def test_the_peak_on_macos_is_the_footprint_s(pretended_mac):
    assert process_peak_bytes() == 2 * 10**8


def test_linux_without_proc_has_memory_too(tmp_path):
    machine = this_machine({"device_name": "a CPU"}, "cpu", root=tmp_path, is_mac=False)
    assert machine.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.available_bytes > 0


def planned_on(mac: Mac, monkeypatch, capsys, source: str = "openai/gpt-oss-20b", *words: str) -> str:
    """What `plan` says on that Mac."""
    monkeypatch.setattr("openelm_mlx.planning.this_machine", mac.machine)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main(["plan", source, *words])
    return capsys.readouterr().out


def test_a_plan_that_lacks_memory_says_what_other_programs_have(monkeypatch, capsys):
    told = "12.50 GB are in use by other programs now: close some, and a model may use up to"
    small, large = Mac("M4", 16, 10), Mac("M3 Max", 36, 30)
    assert f"{told} 12.71 GB" in planned_on(small, monkeypatch, capsys)
    nothing_left = planned_on(Mac("M1", 8, 8), monkeypatch, capsys)
    assert f"8.59 GB{told.removeprefix('12.50 GB')} 5.73 GB" in nothing_left
    for text in (
        planned_on(large, monkeypatch, capsys),  # it fits all the same
        planned_on(small, monkeypatch, capsys, "openai/gpt-oss-20b", "--memory-limit", "4GB"),  # the user's own wish
        planned_on(small, monkeypatch, capsys, "openai/gpt-oss-20b", "--mac", "M4 16GB"),
    ):
        assert "other programs" not in text


def test_a_chip_that_is_not_in_the_table_is_told_how_its_speed_is_learned(monkeypatch, capsys):
    text = planned_on(Mac("M9", 36, 30), monkeypatch, capsys)
    assert "the speed of this machine is not known: run plan --calibrate" in text
    assert "the speed of this machine is not known" not in planned_on(Mac("M3 Max", 36, 30), monkeypatch, capsys)


@pytest.mark.parametrize("name", ["memory.macos.output", "bench.conditions._output"])
def test_words_of_the_system_that_are_no_utf_8_cost_no_more_than_themselves(name, monkeypatch):
    module, _, called = name.rpartition(".")
    monkeypatch.setattr("openelm_mlx.memory.macos.on_macos", lambda: True)
    ask = getattr(importlib.import_module(f"openelm_mlx.{module}"), called)
    assert ask(["printf", r"gpu \377 cores"]).strip() == "gpu \ufffd cores"


def facts_of(mac: Mac, on_cpu: bool = False) -> dict:
    info, backend = (mac.on_cpu, "cpu") if on_cpu else (mac.on_gpu, "metal")
    return selfcheck_machine.facts(info, mac.run, True, backend)


@pytest.mark.parametrize("on_cpu", [False, True], ids=["gpu", "cpu"])
def test_selfcheck_tells_a_mac_s_facts(on_cpu):
    mac = Mac("M3 Max", 36, 30)
    mac.answers |= {
        "sysctl -n kern.osproductversion": "15.6.1", "sysctl -n kern.osversion": "24G90", "sysctl -n hw.model": "Mac15,10",
    }  # fmt: skip
    found = facts_of(mac, on_cpu)
    told = "\n".join(selfcheck_machine.facts_lines(found))
    for words in (
        "macOS 15.6.1 (24G90)",
        "chip Apple M3 Max",
        "Mac15,10",
        "GPU cores 30",
        "memory 38.65 GB",
        "used 12.50 GB",
    ):
        assert words in told
    if not on_cpu:
        assert "applegpu_g16s" in told
        assert "working set 30.15 GB" in told
        assert "iogpu.wired_limit_mb 0" in told
    assert selfcheck_machine.check_facts(Clock(9), found).startswith("all known")
    json.dumps(found)


def test_selfcheck_misses_a_fact_and_an_old_macos():
    mac = Mac("M4", 16)  # ioreg says nothing of cores
    mac.answers["sysctl -n kern.osproductversion"] = "15.0"
    with pytest.raises(CheckFailed, match="not known: gpu_cores"):
        selfcheck_machine.check_facts(Clock(9), facts_of(mac))
    old = facts_of(Mac("M1", 16, 8)) | {"system": "macOS 13.6"}
    with pytest.raises(CheckFailed, match="MLX needs macOS 14"):
        selfcheck_machine.check_facts(Clock(9), old)
    new = Mac("M4", 16, 10)
    new.answers |= {"sysctl -n kern.osproductversion": "27.0", "sysctl -n machdep.cpu.brand_string": "Apple M9"}
    assert "M9 is not in the table of chips" in selfcheck_machine.check_facts(Clock(9), facts_of(new))


@pytest.mark.parametrize(("free", "passes"), [(67, True), (40, False)])
def test_selfcheck_holds_used_memory_to_memory_pressure(free, passes):
    mac = Mac("M3 Pro", 36)
    mac.answers["memory_pressure -Q"] = f"The system has 36864\nSystem-wide memory free percentage: {free}%\n"
    if passes:
        assert "used 12.5 GB by vm_stat's parts, 12.8 GB" in selfcheck_machine._beside_memory_pressure(mac.run)
    else:
        with pytest.raises(CheckFailed, match=r"12\.5 GB by vm_stat's parts, 23\.2 GB"):
            selfcheck_machine._beside_memory_pressure(mac.run)


# --- what is wired ----------------------------------------------------------------------------------------------------

OPENELM = spec_from_config(released_openelm_config("270M"))


def wired(memory_gb: int, weights: float, wire: bool | None = None, on_cpu: bool = False) -> int:
    """The wired limit of a plan for weights of so many bytes."""
    machine = replace(Mac("M4 Max", memory_gb).machine(on_cpu), used_bytes=0)
    plan = make_plan("m", OPENELM, Weights(int(weights)), machine, PlanRequest(context_length=128, wire=wire))
    assert plan.wired_limit_bytes in (0, plan.total_bytes)
    return plan.wired_limit_bytes


def test_only_what_takes_most_of_the_working_set_is_wired():
    assert wired(16, 2e9) == wired(64, 13.8e9) == wired(128, 65e9) == 0
    assert wired(128, 102e9) >= 102e9  # 40 times slower unwired, on such a Mac
    assert wired(24, 15.5e9) >= 15.5e9


def test_who_asks_to_wire_or_not_gets_it():
    assert wired(64, 2e9, wire=True) >= 2e9
    assert wired(128, 102e9, wire=False) == 0
    assert wired(128, 102e9, wire=True, on_cpu=True) == 0  # there is nothing to wire for


def test_the_option(monkeypatch, capsys):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr("openelm_mlx.loading.prepare", lambda *_, wire, **__: asked.append(wire) or sys.exit(0))
        for words in ([], ["--wire"], ["--no-wire"]):
            with pytest.raises(SystemExit):
                main(["generate", "--prompt", "x", *words])
    assert asked == [None, True, False]
    with pytest.raises(SettingError, match="wire is 1"):
        load("demo-openelm", wire=1)


# --- the GPU's errors -------------------------------------------------------------------------------------------------


def metal_error(words: str, number: int, name: str) -> str:
    return f"[METAL] Command buffer execution failed: {words} ({number:08x}:kIOGPUCommandBufferCallbackError{name})"


TIMEOUT = metal_error("Caused GPU Timeout Error", 2, "Timeout")
IGNORED = metal_error("Ignored (for causing prior/excessive GPU errors)", 4, "SubmissionsIgnored")
VICTIM = metal_error("Innocent Victim (for being a victim of a GPU error/recovery)", 5, "InnocentVictim")
NO_MEMORY = metal_error("Insufficient Memory", 8, "OutOfMemory")


class Gpu:
    """A GPU with failed command buffers: whoever waits for it, by `eval` or `synchronize`, hears of the next, once."""

    def __init__(self, monkeypatch, errors: list[str]) -> None:
        self.errors: list[str] = []
        self.strikes, self.evaluate = errors, mx.eval
        monkeypatch.setattr("openelm_mlx.decoding.prefill.mx.eval", self.eval)
        monkeypatch.setattr("openelm_mlx.decoding.gpu_errors.mx.synchronize", lambda stream: self.report())

    def eval(self, *arrays) -> None:
        self.evaluate(*arrays)
        self.errors, self.strikes = self.errors + self.strikes, []
        self.report()

    def report(self) -> None:
        if self.errors:
            raise RuntimeError(self.errors.pop(0))


@pytest.fixture(scope="module")
def small_model():
    return random_model(context_length=512)


def answer(model, prompt_tokens: int = 60) -> list[int]:
    return [each.token for each in om.stream_generate(model, None, [3] * prompt_tokens, max_tokens=4, prefill_chunk=16)]


@pytest.mark.parametrize(
    "errors",
    [[TIMEOUT], [TIMEOUT, IGNORED, IGNORED, VICTIM], [IGNORED], [VICTIM], [VICTIM, TIMEOUT]],
    ids=["alone", "with those behind it", "ignored", "another program's", "out of order"],
)
def test_the_watchdog_is_known_by_all_its_names_and_its_errors_are_heard_to_the_end(small_model, monkeypatch, errors):
    expected = answer(small_model)
    gpu = Gpu(monkeypatch, errors)
    assert answer(small_model) == expected
    assert gpu.errors == gpu.strikes == []


def test_memory_that_ran_out_behind_an_ignored_buffer_is_what_is_said(monkeypatch):
    model = random_model(context_length=512)
    gpu = Gpu(monkeypatch, [IGNORED, NO_MEMORY, IGNORED])
    with pytest.raises(MemoryLimitError, match="memory ran out"):
        answer(model)
    assert gpu.errors == []


def test_after_another_error_nothing_is_left_for_the_next_request(small_model, monkeypatch):
    gpu = Gpu(monkeypatch, [metal_error("Page Fault", 11, "PageFault"), IGNORED, IGNORED])
    with pytest.raises(RuntimeError, match="PageFault"):
        answer(small_model)
    assert gpu.errors == []
    assert len(answer(small_model)) == 4


def test_a_stream_of_another_thread_is_not_waited_for(monkeypatch):
    def not_here(stream):
        raise RuntimeError("There is no Stream(gpu, 1) in current thread.")

    monkeypatch.setattr("openelm_mlx.decoding.gpu_errors.mx.synchronize", not_here)
    assert empty_stream() == []


# --- computers that cannot, and float32 that is float32 ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (("Darwin", "arm64", None, "13.6.1"), "macOS 13.6.1, and MLX needs macOS 14"),
        (("Darwin", "arm64", None, "12.0"), "Software Update"),
        (("Darwin", "x86_64", False, "15.0"), "Intel Mac"),
        (("Darwin", "x86_64", True, "15.0"), "Rosetta"),
    ],
)
def test_a_computer_that_cannot_run_mlx_gets_a_sentence(facts, said):
    with pytest.raises(PlatformError, match=said):
        require_mlx(*facts)


@pytest.mark.parametrize("release", ["14.0", "15.7.1", "26.2", "99"])
def test_a_mac_that_can(release):
    require_mlx("Darwin", "arm64", None, release)


def test_a_program_without_mlx_is_told_what_is_the_matter(monkeypatch):
    monkeypatch.delitem(om.__dict__, "load", raising=False)
    monkeypatch.setitem(sys.modules, "mlx", None)
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    for name in [name for name in sys.modules if name.startswith("openelm_mlx.loading")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(PlatformError, match="MLX cannot be imported"):
        om.load  # noqa: B018


OLD_PYTHON = "import sys; sys.version_info = (3, 9, 6, 'final', 0); sys.argv = {argv}; import openelm_mlx"


def test_apple_s_own_python_is_told_so():
    """Whatever else of it is old, the first file of the package can be read by it."""
    for argv, code in ((["-m"], 2), (["x.py"], 1)):
        script = OLD_PYTHON.format(argv=argv)
        finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert finished.returncode == code
        assert "openelm_mlx needs Python 3.10 or later, and this is Python 3.9" in finished.stderr
        assert ("Traceback" in finished.stderr) == (code == 1)
    for name in ("__init__.py", "__main__.py"):
        ast.parse((TESTS.parent / "openelm_mlx" / name).read_text(), feature_version=(3, 9))


def test_float32_stays_float32_unless_the_user_says_otherwise():
    for given, then in (({}, "0"), ({"MLX_ENABLE_TF32": "1"}, "1"), ({"MLX_ENABLE_TF32": "0"}, "0")):
        environment = dict(given)
        keep_float32(environment)
        assert environment == {"MLX_ENABLE_TF32": then}
    assert os.environ["MLX_ENABLE_TF32"], "the tests themselves"
    script = "import os, openelm_mlx as om; assert 'MLX_ENABLE_TF32' not in os.environ; om.load('demo-openelm'); {}"
    environment = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    script = script.format("print(os.environ['MLX_ENABLE_TF32'])")
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert finished.stdout.strip() == "0"


# --- Finder, external and network disks -------------------------------------------------------------------------------

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(64)
FINDERS = (".DS_Store", ".localized", "Icon\r", "._model.safetensors", "._config.json")


def with_apple_doubles(folder: Path) -> Path:
    """As a folder looks after it was copied to exFAT and shown in Finder."""
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(APPLE_DOUBLE)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return folder


def sharded(folder: Path) -> Path:
    return write_random_gpt_oss(folder, narrow("20b"), max_file_bytes=2**20, sparse=True)


@pytest.mark.parametrize("index", [True, False])
def test_apple_doubles_are_no_shards_and_no_indexes(tmp_path, index):
    folder = sharded(tmp_path / "m")
    shards = sorted(folder.glob("*.safetensors"))
    names = {name: file.name for file in shards for name in read_header(file)}
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with_apple_doubles(folder)
    assert open_checkpoint(folder).files == tuple(shards)
    assert read_config(folder)["model_type"] == "gpt_oss"


@pytest.mark.parametrize("name", ["._model.bin", "._model.pt"])
def test_an_apple_double_is_no_weight_at_all(tmp_path, name):
    (tmp_path / name).write_bytes(APPLE_DOUBLE)
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)


def test_an_apple_double_is_no_config(tmp_path):
    (tmp_path / "._config.yaml").write_bytes(APPLE_DOUBLE)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_config(tmp_path)


def test_an_apple_double_in_a_repository_is_not_fetched():
    names = ["model.safetensors", "._model.safetensors", "config.json", "._config.json", ".DS_Store"]
    assert choose_model_files([RepoFile(name, 1) for name in names]) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", FINDERS)
def test_a_folder_with_finder_s_files_is_empty(tmp_path, name):
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / name).write_bytes(b"x")
    check_destination(destination)
    (destination / ".gitignore").write_text("")
    with pytest.raises(DestinationError, match="folder with files in it"):
        check_destination(destination)


def test_a_conversion_into_a_folder_that_finder_has_shown(tmp_path):
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / ".DS_Store").write_bytes(b"Bud1")
    om.convert("demo-openelm", destination, verify=False)
    assert (destination / ".DS_Store").read_bytes() == b"Bud1"
    assert open_checkpoint(destination).entries


class Fcntl:
    """`fcntl` as macOS has it; F_FULLFSYNC is passed to a disk that answers with this error (None: does it)."""

    F_FULLFSYNC = 51

    def __init__(self, error: int | None) -> None:
        self.error, self.calls = error, 0

    def fcntl(self, descriptor: int, command: int) -> int:
        assert command == self.F_FULLFSYNC
        self.calls += 1
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return 0


@pytest.mark.parametrize(
    ("code", "synced"), [(None, 0), (errno.ENOTSUP, 1), (errno.ENOTTY, 1), (errno.EINVAL, 1), (errno.EIO, None)]
)
def test_a_disk_that_refuses_f_fullfsync_is_asked_to_fsync(tmp_path, monkeypatch, code, synced):
    calls, disk = [], Fcntl(code)
    monkeypatch.setattr("openelm_mlx.finder.fcntl", disk)
    monkeypatch.setattr("openelm_mlx.finder.sys.platform", "darwin")
    monkeypatch.setattr(os, "fsync", calls.append)
    with (tmp_path / "x").open("wb") as stream:
        if synced is None:  # what the disk really says of a write is heard
            with pytest.raises(OSError, match="Input/output"):
                sync(stream)
        else:
            sync(stream)
            assert len(calls) == synced
    assert disk.calls == 1


def test_a_network_disk_whose_folders_cannot_be_synced(tmp_path, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE])
def test_a_disk_that_is_pulled_out_while_a_model_is_loaded(tmp_path, monkeypatch, capsys, code):
    folder = shutil.copytree(DEMOS["demo-openelm"], tmp_path / "m")
    weights, real = folder / "model.safetensors", Path.open

    def evaluate(*arrays):
        raise RuntimeError("[read] Unable to read from file descriptor.")

    def gone(path, *words, **options):
        if path == weights and options.get("buffering") == 0:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *words, **options)

    monkeypatch.setattr("openelm_mlx.weights.mx.eval", evaluate)
    monkeypatch.setattr(Path, "open", gone)
    assert main(["generate", "--model", str(folder), "--prompt", "x"]) == 2
    told = capsys.readouterr().err
    assert f"model.safetensors cannot be read any more ({os.strerror(code)}): connect its disk again" in told
    assert "Traceback" not in told


def test_too_many_open_files_is_no_damaged_file(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), {"a": mx.ones((2,))})
    assert disk_trouble([file]) is None
    monkeypatch.setattr(
        Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files"))
    )
    assert "ulimit -n 4096" in disk_trouble([file])


# --- what Metal's kernels take, and the system's file cache -----------------------------------------------------------


@pytest.mark.parametrize(
    ("drafts", "fused"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (7, 3), (8, 8), (9, 9), (64, 64)]
)
def test_guesses_of_gpt_oss_are_checked_in_one_kernel_on_metal(drafts, fused):
    spec = spec_from_config(released_gpt_oss_config("20b"))
    assert num_fused(drafts, spec, on_metal=True) == fused
    assert num_fused(drafts, spec, on_metal=False) == drafts
    assert num_fused(drafts, OPENELM, on_metal=True) == drafts  # 4 heads a key head: up to 8 queries are fused


def test_as_many_are_guessed_as_fit_a_kernel(monkeypatch, small_model):
    asked = []
    monkeypatch.setattr("openelm_mlx.decoding.speculative.num_fused", lambda n, spec: asked.append(n) or 1)
    monkeypatch.setattr("openelm_mlx.decoding.speculation_gain.Gain.pause", lambda self: 0)
    chunks = list(om.stream_generate(small_model, None, [3, 4] * 20, max_tokens=8, draft=om.PromptLookup()))
    rounds = [each for each in asked if each]
    assert rounds
    assert chunks[-1].statistics.drafted_tokens <= len(rounds)


def test_a_file_is_dropped_from_the_cache_without_posix_fadvise(tmp_path, monkeypatch):
    file = tmp_path / "x"
    file.write_bytes(b"12345" * 1000)
    calls = []

    class Library:
        def msync(self, address, size, flags):
            calls.append((ctypes.string_at(address.value, 5), size.value, flags))
            return 0

    forget_file(file, Library())
    assert calls == [(b"12345", 5000, 2)]
    (tmp_path / "empty").touch()
    forget_file(tmp_path / "empty", Library())
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    dropped = []
    monkeypatch.setattr("benchmarks.measurements.streaming.forget_file", dropped.append)
    forget_files(SimpleNamespace(files=[SimpleNamespace(path=file)]))
    assert dropped == [file]


# --- the CPU as default device, and GitHub's Macs ---------------------------------------------------------------------


def test_the_device_can_be_chosen(monkeypatch):
    chosen = []
    monkeypatch.setattr(mx, "set_default_device", chosen.append)
    use_device({})
    assert not chosen
    use_device({"OPENELM_MLX_DEVICE": "cpu"})
    assert chosen == [mx.Device(mx.cpu)]
    with pytest.raises(PlatformError, match="cpu or gpu"):
        use_device({"OPENELM_MLX_DEVICE": "tpu"})
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    with pytest.raises(PlatformError, match="finds none here"):
        use_device({"OPENELM_MLX_DEVICE": "gpu"})


def test_one_job_on_macos_must_be_green_on_the_cpu_and_one_may_fail_on_metal():
    jobs = yaml.safe_load((TESTS.parent / ".github/workflows/tests.yml").read_text())["jobs"]
    macos = {name: job for name, job in jobs.items() if str(job["runs-on"]).startswith("macos")}
    green = [job for job in macos.values() if not job.get("continue-on-error")]
    may_fail = [job for job in macos.values() if job.get("continue-on-error")]
    assert len(green) == len(may_fail) == 1
    assert green[0]["env"]["OPENELM_MLX_DEVICE"] == "cpu"
    assert "env" not in may_fail[0]
    for job in macos.values():
        assert any(step.get("run") == "bash .ci/run" for step in job["steps"])
        kept_reports(job)


def kept_reports(job: dict) -> None:
    """A job leaves the report that selfcheck writes, also when something in it failed."""
    (made,) = [step["run"] for step in job["steps"] if "selfcheck" in step.get("run", "")]
    assert made.endswith("selfcheck --no-timings --output selfcheck.json")
    (kept,) = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert (kept["with"]["path"], kept["if"]) == ("selfcheck.json", "always()")


def test_linux_has_a_sandbox_before_its_tests_and_leaves_a_report():
    job = yaml.safe_load((TESTS.parent / ".github/workflows/tests.yml").read_text())["jobs"]["linux"]
    runs = [step.get("run", "") for step in job["steps"]]
    sandbox = next(i for i, each in enumerate(runs) if "apt-get install" in each and "bubblewrap" in each)
    assert sandbox < runs.index("bash .ci/run")
    kept_reports(job)
