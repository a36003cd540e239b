"""Each example is short and runs as it stands. (examples/train/ has its own smoke test.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "memory_peak.py": "planned",
    "make_random_checkpoint.py": "parameters",
    "calculator_agent.py": "12 + 30 = 42",
    "mlx_lm_server.py": "keyboard instrument",
    "ask.py": "stringed instrument",
    "batch.py": "a token",
    "continue_text.py": "The old man walked down to the river and",
    "convert_and_compare.py": "KL divergence",
    "extract_json.py": "born",
    "kv_quality.py": "same likeliest token",
    "dense_quality.py": "same top",
    "logprobs.py": "rather than",
    "research_files.py": "】",
    "mlx_lm_interop.py": "stringed instrument",
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example(example, tmp_path):
    assert len(example.read_text().splitlines()) < 40
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert SAYS[example.name] in finished.stdout


def test_every_example_is_known():
    assert {example.name for example in EXAMPLES} == set(SAYS)
