"""What the README says is so: its first command works without any network, its files exist, its Python runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def first_command() -> list[str]:
    """The arguments of Python in the README's first command, after the installation."""
    block = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0]
    arguments = shlex.split(block.split("&&")[-1])
    assert arguments[0] == ".venv/bin/python"
    return arguments[1:]


@pytest.fixture
def no_network(tmp_path):
    """An environment in which Python has no sockets, an empty cache and no login."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('sockets are blocked')\n"
        "socket.socket = socket.create_connection = socket.getaddrinfo = refuse\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
    return kept | {"PYTHONPATH": path, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}


def test_the_first_command_answers_without_a_network(no_network, tmp_path):
    finished = subprocess.run(
        [sys.executable, *first_command()], env=no_network, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert finished.stdout == "a stringed instrument of the guitar family that has long neck and circular body\n"
    assert len(finished.stderr.splitlines()) == 1


def test_the_network_really_is_blocked(no_network, tmp_path):
    script = "import socket; socket.create_connection(('127.0.0.1', 9))"
    finished = subprocess.run(
        [sys.executable, "-c", script], env=no_network, capture_output=True, text=True, check=False
    )
    assert "sockets are blocked" in finished.stderr


def test_its_python_runs():
    for code in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "stringed instrument" in finished.stdout


def test_its_links_and_its_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    listing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("openelm_mlx/\n")[1].split("```")[0]
    for name in re.findall(r"^  ([a-z_]+(?:\.py|/))", listing, re.MULTILINE):
        assert (ROOT / "openelm_mlx" / name).exists(), name
    rooms = {path.name for path in (ROOT / "openelm_mlx").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {name[:-1] for name in re.findall(r"^  ([a-z_]+/)", listing, re.MULTILINE)}


MODELS = {
    "gpt-oss-20b": "openai/gpt-oss-20b", "gpt-oss-120b": "openai/gpt-oss-120b", "OpenELM-270M": "apple/OpenELM-270M",
    "OpenELM-450M": "apple/OpenELM-450M", "OpenELM-1.1B": "apple/OpenELM-1_1B", "OpenELM-3B": "apple/OpenELM-3B",
}  # fmt: skip


def test_its_speeds_are_those_that_plan_expects(tmp_path):
    """The table of models against Macs, by the command that stands above it."""
    table = README.split("| model |")[1].split("\n\n")[0].splitlines()
    macs = [each.strip() for each in table[0].strip("|").split("|")][2:]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [row[0] for row in shown] == list(MODELS)
    command = [sys.executable, "-m", "openelm_mlx", "plan", *MODELS.values(), "--all-macs", "--preset", "balanced"]
    # Nobody answers there: the models have the sizes that they were released with.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    for column, mac in enumerate(macs, 3):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{mac}  ")]
        assert [row[column] for row in shown] == line.removeprefix(mac).split()[1:], mac


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
    assert "TODO" not in README


def test_its_options_exist():
    from openelm_mlx.commands import COMMANDS, build_parser

    known = set()
    for command in COMMANDS:
        subparsers = build_parser("x", [command])._subparsers._group_actions[0].choices
        known |= {option for action in subparsers[command]._actions for option in action.option_strings}
    for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README):
        assert option in known | {"--quiet"}, option
