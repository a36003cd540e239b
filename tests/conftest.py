"""What several test files share: the fixtures' folder, models loaded from it, and a clean environment."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# pytest rewrites each assert: 20 s of processor time in each process, unless it may keep what it wrote in tests/__pycache__.
# And each child of a test reads a hundred of our files: a third of its start is compiling them, unless they are kept too.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from openelm_mlx.platforms import available_cores, keep_float32, use_device  # noqa: E402

keep_float32()  # before MLX makes its first product: what is compared here is float32
use_device()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

from openelm_mlx.checkpoint.layouts import understand  # noqa: E402
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config  # noqa: E402
from openelm_mlx.models import build_model  # noqa: E402
from openelm_mlx.specs import openelm_config, spec_from_config  # noqa: E402
from openelm_mlx.weights import load_model  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"

# Each process holds MLX and small models, 400 MB or so; on a Mac they share one GPU, so that more of them gain little.
MOST_WORKERS = 4


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what runs in the background, and so would every child of a test that sends it Ctrl-C be started.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# No test speaks TLS, and every client over HTTP reads the certificates of 140 authorities: a folder without any takes its
# place. Hundreds of clients would take 30 ms each for that.
os.environ["SSL_CERT_DIR"] = str(FIXTURES)
os.environ.pop("SSL_CERT_FILE", None)  # which would be read in place of the folder


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes `-n auto` is: one more than cores for a whole folder, none beside this one for files named one by one.

    A quarter of the time is spent on waiting: for children, terminals and servers. One file is done before a second
    process has started, and its output and debugger are wanted here.
    """
    if not _is_whole_folder(config):
        return 0
    cores = available_cores()
    return 0 if cores == 1 else min(cores + 1, MOST_WORKERS)


def _is_whole_folder(config: pytest.Config) -> bool:
    return all(Path(argument.split("::")[0]).is_dir() for argument in config.args)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests where a whole folder is asked for, and nothing is said of marks or names (-m, -k).

    Of a test marked slow(first=N) the first N cases stay.
    """
    if not _is_whole_folder(config) or config.option.markexpr or config.option.keyword:
        return
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    cases: Counter[Any] = Counter()
    for item in items:
        mark = item.get_closest_marker("slow")
        if mark is None:
            kept.append(item)
            continue
        cases[function := item.function] += 1  # type: ignore[attr-defined]
        (kept if cases[function] <= mark.kwargs.get("first", 0) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_collection_finish() -> None:
    """Thousands of collected tests stay until the end: the garbage collector need not go through them again and again."""
    gc.collect()
    gc.freeze()


# The file that the last test was of, and how many modules there were when objects were last set aside.
_last: dict[str, Any] = {"file": None, "modules": 0}
MANY_MODULES = 150


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Between two files: what large packages brought stays until the end too.

    With transformers, PyTorch and clients of APIs there each `gc.collect()` of a test, or of a model that is given back,
    took a fourth of a second.
    """
    if item.path != _last["file"] and len(sys.modules) > _last["modules"] + MANY_MODULES:
        gc.collect()
        gc.freeze()
        _last["modules"] = len(sys.modules)
    _last["file"] = item.path


@pytest.fixture
def fixtures() -> Path:
    """The folder of small random checkpoints with what the original code says about them (see its README)."""
    return FIXTURES


def load_fixture(path: Path, dtype: mx.Dtype | None = mx.float32):
    """The model of a fixture's folder or file, in `dtype`."""
    config = read_config(path)
    checkpoint = open_checkpoint(path)
    return load_model(understand(checkpoint, config, spec_from_config(config)), checkpoint, dtype)


def in_threads(work: Callable[[int], Any], count: int = 2) -> list[Any]:
    """What `work(0)`, `work(1)`, ... give, each in a thread and a stream of its own at the same time; [] of one that failed."""
    results: list[Any] = [[] for _ in range(count)]

    def run(i: int) -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            results[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def oracle(folder: Path) -> dict[str, np.ndarray]:
    """The arrays that the original code computed for a fixture, for reading."""
    return dict(_oracle(folder))


@cache
def _oracle(folder: Path) -> dict[str, np.ndarray]:
    """Unpacked once in a process: hundreds of tests compare with the same arrays."""
    found = dict(np.load(folder / "oracle.npz"))
    for array in found.values():
        array.flags.writeable = False
    return found


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def max_difference(ours: mx.array, theirs: np.ndarray) -> float:
    return float(np.abs(np.array(ours.astype(mx.float32)) - theirs).max())


TINY = {
    "model_type": "openelm", "num_transformer_layers": 3, "model_dim": 64, "head_dim": 16, "num_gqa_groups": 2,
    "ffn_dim_divisor": 32, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 2.0], "normalize_qk_projections": True,
    "share_input_output_layers": True, "rope_freq_constant": 10000, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def random_model(vocab_size: int = 600, context_length: int = 64, seed: int = 0, **config):
    """A small OpenELM with random weights, large enough for the tokenizer fixture `llama`."""
    spec = spec_from_config({**TINY, "vocab_size": vocab_size, "max_context_length": context_length, **config})
    model = build_model(spec)
    keys = iter(mx.random.split(mx.random.key(seed), 100))
    model.update(
        tree_map(lambda a: mx.random.normal(a.shape, key=next(keys)) * (0.3 if a.ndim > 1 else 1), model.parameters())
    )
    mx.eval(model.parameters())
    return model


def save_folder(folder: Path, model, tokenizer: str | None = None, config: dict | None = None) -> Path:
    """Write a model as Apple's Hugging Face layout has it, with one of the tokenizer fixtures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**openelm_config(model.spec), **(config or {})}))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    if tokenizer is not None:
        for file in (FIXTURES / "tokenizers" / tokenizer).iterdir():
            shutil.copyfile(file, folder / file.name)
    return folder
