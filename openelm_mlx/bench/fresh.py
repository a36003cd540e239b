"""Measurements that need a process of their own: a peak, or one model alone in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError


def run_fresh(module: str, *words: str, what: str, environment: Mapping[str, str] | None = None) -> Any:
    """The JSON that `python -m MODULE WORDS` prints. Raises CheckpointError with `what` and its last line when it fails."""
    command = [sys.executable, "-m", module, *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        raise CheckpointError(f"{what} failed: {lines[-1]}")
    return json.loads(finished.stdout)
