"""What a Mac is like, on any machine: few open files, facts that come from sysctl and vm_stat, calls that are not there.

Nothing here needs a Mac. What a Mac says is put in its place, as recorded on one or as Apple's sources have it, so that a
change made elsewhere cannot break the first Mac unseen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.released import released_gpt_oss_config, released_openelm_config
from openelm_mlx.checkpoint.writer import OutputTensor, plan_files, write_sparse
from openelm_mlx.memory.machine import allow_open_files
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
