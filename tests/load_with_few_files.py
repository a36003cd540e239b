"""A program that loads a checkpoint as a GPU's machine does, with few open files and little memory; for test_first_mac.py.

python tests/load_with_few_files.py FOLDER --files 128 [--slots 4 | --memory 8000000000]

It prints JSON: the most files that were open at once, the most memory in use, and how many parameters there are.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any
from unittest import mock

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--files", type=int, required=True)
parser.add_argument("--slots", type=int)
parser.add_argument(
    "--memory", type=int, help="bytes that the process may have: as many experts stay on disk as need be"
)
args = parser.parse_args()

# Hard too: nothing that is imported may raise it again.
resource.setrlimit(resource.RLIMIT_NOFILE, (args.files, args.files))

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from openelm_mlx import loading, placement, weights  # noqa: E402
from openelm_mlx.checkpoint.layouts import understand  # noqa: E402
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config  # noqa: E402
from openelm_mlx.experts.residency import Streaming  # noqa: E402
from openelm_mlx.memory.machine import process_peak_bytes  # noqa: E402
from openelm_mlx.specs import spec_from_config  # noqa: E402

most_open = 0


def num_open_files() -> int:
    return len(os.listdir("/dev/fd"))  # on macOS too


def watched(evaluate: Any) -> Any:
    """Each evaluation ends what holds files open: so that is when most are."""

    def evaluate_and_count(*arrays: Any) -> None:
        global most_open
        most_open = max(most_open, num_open_files())
        evaluate(*arrays)

    return evaluate_and_count


def loaded(folder: Path) -> Any:
    if args.memory:
        return loading.load(folder, memory_limit=args.memory, context_length=4096)[0]
    config = read_config(folder)
    checkpoint = open_checkpoint(folder)
    contents = understand(checkpoint, config, spec_from_config(config))
    streaming = None if args.slots is None else Streaming(contents, checkpoint, args.slots)
    return weights.load_model(contents, checkpoint, mx.bfloat16, None, streaming)


with (
    # Else matrices are turned, and evaluated one by one.
    mock.patch.object(placement, "runs_on_cpu", return_value=False),
    mock.patch.object(mx, "eval", watched(mx.eval)),
):
    model = loaded(args.folder)
peak = process_peak_bytes()
if args.memory and peak > args.memory:
    sys.exit(f"The process had {peak:,} bytes in use, and {args.memory:,} were allowed.")
num_parameters = len(tree_flatten(model.parameters()))
json.dump({"most_open": most_open, "peak": peak, "parameters": num_parameters}, sys.stdout)
