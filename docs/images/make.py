"""Draws the README's pictures anew: terminal.svg from what commands really print here, macs.png by `plan --chart`.

pip install '.[docs,chart]' && python docs/images/make.py
"""

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
OPENELM_MLX = [sys.executable, "-m", "openelm_mlx"]

# What is typed, the arguments that really run, and what is typed into the running program.
SESSIONS = [
    ('openelm_mlx generate "What is a banjo?"', ["generate", "What is a banjo?"], None),
    (
        'openelm_mlx generate --model demo-gpt-oss --reasoning-effort high "What is a piano?"',
        ["generate", "--model", "demo-gpt-oss", "--reasoning-effort", "high", "What is a piano?"],
        None,
    ),
    (
        'echo "What is 12 + 30?" | openelm_mlx chat --model demo-gpt-oss --tools calculator --show-reasoning',
        ["chat", "--model", "demo-gpt-oss", "--tools", "calculator", "--show-reasoning"],
        "What is 12 + 30?\n",
    ),
]


def terminal(file: Path) -> None:
    """The sessions, one after the other, as a picture of a terminal: answers white, everything else grey."""
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    for typed, arguments, given in SESSIONS:
        console.print(Text.assemble(("$ ", "bold green"), (typed, "bold")))
        done = subprocess.run([*OPENELM_MLX, *arguments], input=given, capture_output=True, text=True, check=True)
        lines = done.stderr.strip().splitlines()
        before = [line for line in lines if " prompt tokens, " not in line]  # what is said after the answer has this
        for line in before:
            console.print(Text(line, style="grey58"))
        console.print(Text(done.stdout.strip()))
        for line in lines[len(before) :]:
            console.print(Text(line, style="grey58"))
        console.print()
    console.save_svg(str(file), title="openelm_mlx")


if __name__ == "__main__":
    terminal(HERE / "terminal.svg")
    chart = ["--chart", str(HERE / "macs.png"), "--overwrite"]
    subprocess.run([*OPENELM_MLX, "plan", "--preset", "balanced", *chart], check=True)
