"""What several test files share: the fixtures' folder, models loaded from it, and a clean environment."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from openelm_mlx.checkpoint.layouts import understand
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config
from openelm_mlx.loading import load_model
from openelm_mlx.specs import spec_from_config

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def fixtures() -> Path:
    """The folder of small random checkpoints with what the original code says about them (see its README)."""
    return FIXTURES


def load_fixture(path: Path, dtype: mx.Dtype | None = mx.float32):
    """The model of a fixture's folder or file, in `dtype`."""
    config = read_config(path)
    checkpoint = open_checkpoint(path)
    return load_model(understand(checkpoint, config, spec_from_config(config)), checkpoint, dtype)


def oracle(folder: Path) -> dict[str, np.ndarray]:
    """The arrays that the original code computed for a fixture."""
    return dict(np.load(folder / "oracle.npz"))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def max_difference(ours: mx.array, theirs: np.ndarray) -> float:
    return float(np.abs(np.array(ours.astype(mx.float32)) - theirs).max())
