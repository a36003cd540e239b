"""Tab in a shell: the script for bash is sourced by bash, and completes as a person would see it."""

import shutil
import subprocess
import sys

import pytest

from openelm_mlx.commands import COMMANDS, main
from openelm_mlx.sources import DEMOS


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    pytest.importorskip("shtab")
    file = tmp_path_factory.mktemp("completion") / "openelm_mlx.bash"
    command = [sys.executable, "-m", "openelm_mlx", "--print-completion", "bash"]
    file.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return file


def completed(script, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    program = """
        source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
        spec=$(complete -p openelm_mlx); [[ $spec =~ -F\\ ([^ ]+) ]]
        "${BASH_REMATCH[1]}" openelm_mlx "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    command = ["bash", "-c", program, "bash", str(script), "openelm_mlx", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=script.parent)
    return {word.strip() for word in done.stdout.splitlines()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there")
def test_bash_completes_commands_options_choices_and_demos(bash_script):
    assert set(COMMANDS) <= completed(bash_script, "")
    assert completed(bash_script, "ge") == {"generate"}
    assert completed(bash_script, "generate", "--json-s") == {"--json-schema"}
    assert {"--model", "--memory-limit", "--kv-bits"} <= completed(bash_script, "chat", "--")
    assert completed(bash_script, "generate", "--reasoning-effort", "") == {"low", "medium", "high"}
    for words in (["generate", "--model"], ["chat", "--model"], ["plan"], ["info"], ["convert"], ["export"]):
        assert completed(bash_script, *words, "demo-") == set(DEMOS)
    assert bash_script.name in completed(bash_script, "generate", "--prompt-file", "open")


def test_zsh_has_a_script_too(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "zsh"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#compdef openelm_mlx")
    assert "demo-openelm demo-gpt-oss" in shown


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "pip install 'openelm_mlx[completion]'" in capsys.readouterr().err
