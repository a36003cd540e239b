"""Each example is short and runs as it stands. (examples/train/ has its own smoke test.)"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "many_requests.py": "banjo: a stringed instrument",
    "memory_peak.py": "planned",
    "make_random_checkpoint.py": "parameters",
    "calculator_agent.py": "12 + 30 = 42",
    "ask.py": "stringed instrument",
    "batch.py": "a token   a stringed instrument\n",
    "continue_text.py": "The ship sailed out of the harbour, and the captain ",
    "convert_and_compare.py": "KL divergence",
    "extract_json.py": "7 * 6\n",
    "kv_quality.py": "same likeliest token",
    "logprobs.py": "rather than",
    "research_files.py": "】",
    "mlx_lm_interop.py": "stringed instrument",
    "serve_chat_client.py": "> What is a river?",
    "serve_agent.py": "437",
    "serve_many.py": "harbor: a sheltered port",
}
# What they take after their name: as much as shows that they run.
ARGUMENTS = {"kv_quality.py": ["float32", "1"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What an example says, run once however many tests ask; the test fails with its last words when it fails."""

    @functools.cache
    def run(name: str) -> str:
        command = [sys.executable, str(ROOT / "examples" / name), *ARGUMENTS.get(name, ())]
        environment, folder = {**os.environ, "PYTHONPATH": str(ROOT)}, tmp_path_factory.mktemp("example")
        finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example(example, run):
    assert len(example.read_text().splitlines()) < 40
    assert SAYS[example.name] in run(example.name)


def test_what_is_likely_is_found_likely(run):
    """The banjo is no soup, and words in disorder are the least likely."""
    answers = [line.split("a token")[1].strip() for line in run("batch.py").splitlines()[1:]]
    assert answers == ["a stringed instrument", "a keyboard instrument", "a kind of soup", "instrument stringed a"]


def test_a_second_turn_over_http_has_its_first_one_cached(run):
    (first, _), (second, cached) = re.findall(
        r"\((\d+) tokens read, (\d+) of them cached\)", run("serve_chat_client.py")
    )
    assert int(first) - 8 <= int(cached) < int(second)


def test_every_example_is_known():
    assert {example.name for example in EXAMPLES} == set(SAYS)
