"""What a machine has: recorded Macs, Linux with and without a container's limit, CUDA, and Macs by name."""

import pytest

from openelm_mlx.errors import SettingError
from openelm_mlx.memory.chips import CHIPS, chip_of
from openelm_mlx.memory.machine import GIB, find_mac, macs, this_machine, wired_limit_advice, working_set_of

# `device_info` as recorded on Macs (48 and 64 GB), and of the others what their logs say.
RECORDED = {
    8: 5_726_623_061, 16: 12_713_120_000, 24: 19_069_670_000, 32: 26_800_600_000, 36: 30_150_672_384, 48: 40_200_896_512,
    64: 55_662_788_608, 128: 115_448_730_000, 256: 223_338_299_392, 512: 498_216_206_336,
}  # fmt: skip

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            100000.
Pages inactive:                           90000.
Pages wired down:                         50000.
Pages purgeable:                           5000.
File-backed pages:                        85000.
Anonymous pages:                         105000.
Pages occupied by compressor:             20000.
"""


def recorded(memory_gb: int, wired_limit_mb: int = 0, vm_stat: str = VM_STAT):
    info = {
        "device_name": "Apple M4 Pro",
        "memory_size": memory_gb * GIB,
        "max_recommended_working_set_size": RECORDED[memory_gb],
    }
    answers = {"sysctl -n iogpu.wired_limit_mb": str(wired_limit_mb), "vm_stat": vm_stat}
    return this_machine(info, "metal", run=lambda command: answers.get(" ".join(command)))


@pytest.mark.parametrize("memory_gb", RECORDED)
def test_recorded_macs(memory_gb):
    machine = recorded(memory_gb)
    assert (machine.memory_bytes, machine.working_set_bytes) == (memory_gb * GIB, RECORDED[memory_gb])
    assert machine.used_bytes == 170_000 * 16384
    assert machine.available_bytes == min(RECORDED[memory_gb], memory_gb * GIB - 170_000 * 16384)
    assert (machine.bandwidth, machine.flops) == (273e9, 9.2e12)
    assert machine.name == f"Apple M4 Pro {memory_gb}GB"


def test_a_raised_wired_limit_counts_and_a_busy_mac_has_less():
    assert recorded(16, wired_limit_mb=14000).working_set_bytes == 14000 * 2**20
    busy = VM_STAT.replace("105000", "605000")
    machine = recorded(16, vm_stat=busy)
    assert machine.available_bytes == 16 * GIB - 670_000 * 16384 < machine.working_set_bytes


def test_commands_that_are_missing_leave_the_device_s_own_facts():
    info = {"device_name": "Apple M9", "memory_size": 16 * GIB, "max_recommended_working_set_size": RECORDED[16]}
    machine = this_machine(info, "metal", run=lambda command: None)
    assert (machine.used_bytes, machine.bandwidth, machine.available_bytes) == (0, None, RECORDED[16])


def linux(tmp_path, total=24 * 2**20, available=20 * 2**20, **files):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return this_machine({"device_name": "a CPU"}, "cpu", root=tmp_path, is_mac=False)


def test_linux(tmp_path):
    machine = linux(tmp_path)
    assert (machine.memory_bytes, machine.available_bytes) == (24 * GIB, 20 * GIB)


def test_a_container_s_limit_version_2(tmp_path):
    machine = linux(tmp_path, **{"memory.max": str(8 * GIB), "memory.current": str(GIB)})
    assert (machine.memory_bytes, machine.available_bytes) == (8 * GIB, 7 * GIB)


def test_a_container_s_limit_version_1(tmp_path):
    files = {"memory__memory.limit_in_bytes": str(4 * GIB), "memory__memory.usage_in_bytes": str(GIB)}
    assert linux(tmp_path, **files).available_bytes == 3 * GIB


@pytest.mark.parametrize("limit", ["max", str(2**63)])
def test_a_container_without_a_limit(tmp_path, limit):
    assert linux(tmp_path, **{"memory.max": limit}).memory_bytes == 24 * GIB


def test_cuda():
    machine = this_machine({"device_name": "a GPU", "total_memory": 80 * GIB, "free_memory": 60 * GIB}, "cuda")
    assert machine.available_bytes == 60 * GIB


def test_this_very_machine_has_memory():
    machine = this_machine()
    assert machine.memory_bytes > 10**8
    assert 0 < machine.available_bytes <= machine.memory_bytes


@pytest.mark.parametrize("name", ["M4 Pro 24GB", "m4 pro 24gb", "M4Pro-24", "Apple M4 Pro 24 GB"])
def test_macs_by_name(name):
    machine = find_mac(name)
    assert (machine.name, machine.working_set_bytes, machine.bandwidth) == ("M4 Pro 24GB", 19_069_670_000, 273e9)


def test_the_table():
    machines = list(macs())
    assert len(machines) == len({machine.name for machine in machines}) > 40
    assert find_mac("M3 Max 36GB").bandwidth == 300e9  # the smaller GPU has the narrower bus
    assert find_mac("M1 8GB").notes
    assert "estimated" in find_mac("M1 8GB").notes[0]
    assert not find_mac("M4 16GB").notes
    assert working_set_of(18) == (int(18 * GIB * 0.74), False)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("MacBook Air M4", "M4 16GB"), ("M4 Max", "M4 Max 36GB"), ("mac studio m3 ultra", "M3 Ultra 96GB"),
        ("m4 pro 48", "M4 Pro 48GB"), ("MacBook Pro M4", "M4 16GB"), ("M4 MacBook Pro", "M4 16GB"),
        ("mbp m4pro48", "M4 Pro 48GB"), ("M3Ultra", "M3 Ultra 96GB"), ("mac pro m2 ultra", "M2 Ultra 64GB"),
        ('MacBook Pro 14" M4 Pro 24GB (2024)', "M4 Pro 24GB"), ("MacBook Pro 16-inch M1 Pro 32", "M1 Pro 32GB"),
        ("iMac 24 M4", "M4 16GB"), ("iMac M4 24", "M4 24GB"), ("iMac 24GB M4", "M4 24GB"),
        ("MacBook Pro 16 M4 Max 48", "M4 Max 48GB"), ("MacBook Air (M2, 2022)", "M2 8GB"), ("M1 16 GiB", "M1 16GB"),
        ("Apple M4 Max (16-core CPU, 40-core GPU), 48 GB, 512 GB SSD", "M4 Max 48GB"), ("M4 1TB", "M4 16GB"),
    ],
)  # fmt: skip
def test_macs_as_people_call_them(name, found):
    assert find_mac(name).name == found


def test_a_memory_that_was_not_named_is_the_least_and_that_is_said():
    assert find_mac("M4").memory_bytes == 16 * GIB
    (note,) = find_mac("MacBook Air M4").notes
    assert "16, 24 or 32 GB" in note
    assert '"M4 32GB"' in note
    assert find_mac("M4 24").notes == ()


def test_the_cores_of_a_gpu_that_were_named_count():
    assert find_mac("M4 Max 36GB").bandwidth == find_mac("M4 Max 32-core GPU 48GB").bandwidth == 410e9
    assert find_mac("M4 Max 48GB").bandwidth == 546e9
    with pytest.raises(SettingError, match="40 cores at most"):
        find_mac("M4 Max 99-core GPU")


@pytest.mark.parametrize("name", [machine.name for machine in macs()])
def test_every_mac_of_the_table_is_found(name):
    assert find_mac(name) == find_mac(name.lower().replace(" ", "-")) == next(m for m in macs() if m.name == name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("M4 Pro 25GB", "no M4 Pro with 25 GB.*24, 48 or 64 GB"), ("M6 Max", "there are M1, M1 Pro, .*M5 Max"),
        ("", "there are M1,"), ("PC", "there are M1,"), ("MacBook Pro", "there are M1,"), ("M3/M4", "M3 and M4: name one"),
        ("M4 16 24", "16 and 24 GB: name one"), ("M4 turbo", "'turbo' is not understood"), ("M4 Prox", "'prox'"),
        (4, "mac is 4"), (None, "mac is None"),
    ],
)  # fmt: skip
def test_unknown_macs(name, said):
    with pytest.raises(SettingError, match=said):
        find_mac(name)


def test_the_line_that_raises_the_limit():
    mac = find_mac("M4 16GB")
    advice = wired_limit_advice(mac, 12_850_000_000)
    assert advice.startswith("sudo sysctl iogpu.wired_limit_mb=12511 ")
    assert wired_limit_advice(mac, 12_000_000_000) is None  # fits as it is
    assert wired_limit_advice(mac, 16_000_000_000) is None  # macOS needs some too


# --- chips ---


@pytest.mark.parametrize(
    ("chip", "memory", "cores", "expected"),
    [("Apple M3 Max", 36, None, (300, 30, 10.65)), ("M3 Max", 96, None, (300, 30, 10.65)),
     ("M3 Max", 128, None, (400, 40, 14.2)),
     ("M4 Max", 36, None, (410, 32, 14.72)), ("Apple M5 Max", 36, None, (460, 32, 18.24)), ("M5 Max", 64, 40, (614, 40, 22.8)),
     ("M3 Max", 64, 30, (300, 30, 10.65)), ("M2 Max", 32, 30, (400, 30, 10.66)), ("M1", 8, 7, (68, 7, 2.27)),
     ("M3 Ultra", 256, 60, (819, 60, 21.3))],
)  # fmt: skip
def test_fewer_cores_have_less_arithmetic_and_narrow_max_chips_a_narrower_bus(chip, memory, cores, expected):
    found = chip_of(chip, memory, cores)
    assert (found.bandwidth, found.cores, found.teraflops) == expected


def test_a_chip_that_nobody_knows():
    assert chip_of("Apple M9 Max", 36) is None


def test_a_narrow_chip_is_known_on_the_machine_itself():
    info = {"device_name": "Apple M3 Max", "memory_size": 36 * GIB, "max_recommended_working_set_size": RECORDED[36]}
    machine = this_machine(info, "metal", run=lambda command: None)
    assert (machine.bandwidth, machine.flops, machine.chip) == (300e9, 10.65e12, "M3 Max")


def test_every_chip_has_what_a_plan_needs():
    for name, chip in CHIPS.items():
        assert 1 < chip.ssd[0] <= chip.ssd[1] < 20, name
        assert chip.cores, name
    assert find_mac("M4 Pro 64GB").ssd_bandwidth == (2.0e9 + 7.3e9) / 2
