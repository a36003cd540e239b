"""The developers' benchmarks as commands: `python -m benchmarks.NAME` in a clone, with errors as the others have them."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from openelm_mlx.commands import COMMANDS

ROOT = Path(__file__).parent.parent
NAMES = (
    "evaluation", "experts_for_few_rows", "memory", "memory_together", "quality", "requests", "server", "several_macs",
    "speculation", "streaming", "training",
)  # fmt: skip


def test_each_of_them_is_known():
    """A file with a HELP is a command."""
    found = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if "\nHELP = " in file.read_text()}
    assert found == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_is_that_of_the_module(name):
    finished = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "-h"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith(f"usage: python -m benchmarks.{name} [-h]")
    words = " ".join(finished.stdout.split())
    assert " ".join(importlib.import_module(f"benchmarks.{name}").HELP.split()) in words


def test_help_imports_nothing_slow():
    modules = ", ".join(f"benchmarks.{name}" for name in NAMES)
    script = f"import sys, {modules}; print([m for m in sys.modules if m in ('mlx', 'mlx.core', 'numpy')])"
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("argument", "said"), [("--nonsense", "there is no option --nonsense"), ("more", "'more' is one argument too many")]
)
def test_a_mistake_is_one_sentence_of_the_command_s_own(name, argument, said, capsys):
    main = importlib.import_module(f"benchmarks.{name}").main
    with pytest.raises(SystemExit) as ended:
        main([argument])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert shown.err.startswith(f"python -m benchmarks.{name}: {said}")
    assert shown.err.endswith(f"(see python -m benchmarks.{name} -h)\n")


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        ("memory", "--only=llama", "No shape has 'llama' in its name"), ("quality", "--words=0", "--words is 0"),
        ("requests", "--shapes=openelm-7b", "There is no shape 'openelm-7b'"),
        ("requests", "--requests=0", "--requests is '0'"),
        ("speculation", "--rounds=0", "--rounds is 0"), ("streaming", "--cache=hot", "--cache is 'hot'"),
    ],
)  # fmt: skip
def test_so_is_what_cannot_be_measured(name, option, said, capsys):
    assert importlib.import_module(f"benchmarks.{name}").main([option]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(f"python -m benchmarks.{name}: {said}")


def test_what_a_user_has_is_in_the_package():
    assert {"bench", "selfcheck", "plan"} < set(COMMANDS)
    assert not [name for name in COMMANDS if name.startswith("bench-")]


def test_a_clone_has_them_and_an_installation_does_not():
    project = (ROOT / "pyproject.toml").read_text()
    of_wheel, of_sdist = (project.split(f"[tool.hatch.build.targets.{each}]\n")[1] for each in ("wheel", "sdist"))
    assert of_wheel.splitlines()[0] == 'packages = ["openelm_mlx"]'
    assert '"benchmarks"' in of_sdist.splitlines()[0]
