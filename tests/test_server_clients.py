"""Real clients from the registries against a real server: chat, stream, a tool's round trip, structured answers, errors.

They need an environment of their own: OPENELM_MLX_CLIENTS names a folder with `py` (a virtual environment) and `npm` (a
folder with node_modules), which `.ci/clients FOLDER` makes. Each script of tests/clients speaks to one client's library.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

FOLDER = os.environ.get("OPENELM_MLX_CLIENTS")
SCRIPTS = Path(__file__).parent / "clients"
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="OPENELM_MLX_CLIENTS names no folder of clients (.ci/clients makes one)"
)


@pytest.fixture(scope="module")
def server():
    """The address of `openelm_mlx serve`, as a user starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "openelm_mlx", "serve", "--port", "0"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())[0]
        end = time.monotonic() + 120
        while json.load(urllib.request.urlopen(f"{address}/health", timeout=60))["status"] != "ok":
            assert time.monotonic() < end
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert "Traceback" not in said


def run_client(server, *command, **variables):
    environment = {
        **os.environ, "BASE_URL": server, "MODEL": "demo-gpt-oss", "NO_COLOR": "1", "OPENAI_API_KEY": "none",
        "PATH": f"{FOLDER}/py/bin:{FOLDER}/npm/node_modules/.bin:{FOLDER}/aider/bin:{os.environ['PATH']}", **variables,
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, cwd=SCRIPTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def python(server, script):
    return json.loads(run_client(server, f"{FOLDER}/py/bin/python", f"{script}.py").splitlines()[-1])


def node(server, script, tmp_path):
    """A module finds its packages beside itself, so the scripts are copied to where those are."""
    for name in ("common.mjs", f"{script}.mjs"):
        shutil.copy(SCRIPTS / name, Path(FOLDER) / "npm" / name)
    return json.loads(run_client(server, "node", f"{FOLDER}/npm/{script}.mjs").splitlines()[-1])


PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
SNIPPETS = re.findall(r"```(python|ts)\n(.*?)```", PAGE, re.DOTALL)
HARBOR = "a sheltered port where ships can take on or discharge cargo"  # what om.generate says, too


@pytest.mark.parametrize(("language", "code"), SNIPPETS, ids=[code.split("\n")[0] for _, code in SNIPPETS])
def test_what_the_page_shows_runs(server, language, code):
    code = code.replace("http://127.0.0.1:8080", server)
    if language == "python":
        said = run_client(server, f"{FOLDER}/py/bin/python", "-c", code)
    else:
        file = Path(FOLDER) / "npm" / "page.mjs"
        file.write_text(code)
        said = run_client(server, "node", str(file))
    assert said.strip() or "print" not in code


def check_words(found):
    assert found["chat"] == found["stream"] == HARBOR


def check_call(call):
    call = json.loads(call) if isinstance(call, str) else call
    assert "23" in call["expression"]
    assert "19" in call["expression"]


def test_openai_chat(server):
    found = python(server, "python_openai_chat")
    check_words(found)
    check_call(found["call"])
    assert found["finish"] == "tool_calls"
    assert "437" in found["after_call"]
    assert set(found["structured"]) == {"expression"}
    assert found["errors"] == {
        "unknown model": [404, "NotFoundError", "model_not_found", "model"],
        "wrong value": [400, "BadRequestError", found["errors"]["wrong value"][2], "temperature"],
    }


def test_openai_responses(server):
    found = python(server, "python_openai_responses")
    check_words(found)
    assert found["stream_whole"] == found["chat"]
    check_call(found["call"])
    assert "437" in found["after_call"]
    assert set(found["structured"]) == {"expression"}
    assert found["errors"]["unknown model"][0] == found["errors"]["unknown response"][0] == 404


def test_anthropic(server):
    found = python(server, "python_anthropic")
    check_words(found)
    check_call(found["call"])
    assert found["finish"] == "tool_use"
    assert "437" in found["after_call"]
    assert found["errors"]["unknown model"] == [404, "NotFoundError", "not_found_error"]
    assert found["count"] > 5


def test_openai_agents(server):
    found = python(server, "python_openai_agents")
    assert found["responses"]["stream"] == HARBOR
    for kind in ("responses", "chat"):
        assert found[kind]["chat"] == HARBOR
        [expression] = found[kind]["calls"]
        check_call({"expression": expression})
        assert "437" in found[kind]["after_call"]


def test_langchain(server):
    found = python(server, "python_langchain")
    for kind in ("chat", "responses"):
        check_words(found[kind])
        check_call(found[kind]["call"])
        assert "437" in found[kind]["after_call"]
        assert found[kind]["forced"] == ["calculator"]
        assert set(found[kind]["structured"]) == {"expression"}


def test_litellm(server):
    found = python(server, "python_litellm")
    check_words(found)
    assert found["reasoning"]
    check_call(found["call"])
    assert "437" in found["after_call"]
    assert found["errors"]["unknown model"] == ["NotFoundError", 404]


def test_pydantic_ai(server):
    found = python(server, "python_pydantic_ai")
    for kind in ("chat", "responses"):
        check_words(found[kind])
        assert len(found[kind]["calls"]) == 1
        assert "437" in found[kind]["after_call"]
        assert set(found[kind]["structured"]) == set(found[kind]["forced"]) == {"expression"}


def test_llm(server, tmp_path):
    found = json.loads(run_client(server, "sh", "llm.sh", str(tmp_path)).splitlines()[-1])
    check_words(found)
    assert set(found["structured"]) == {"expression"}


def test_openai_for_javascript(server, tmp_path):
    found = node(server, "node_openai", tmp_path)
    check_words(found)
    check_call(found["call"])
    assert "437" in found["after_call"]
    assert found["errors"]["unknown model"][0] == 404


def test_vercels_ai(server, tmp_path):
    found = node(server, "node_ai", tmp_path)
    for kind in ("responses", "chat"):
        check_words(found[kind])
        assert len(found[kind]["calls"]) == 1
        assert "437" in found[kind]["after_call"]
        assert set(found[kind]["structured"]) == {"expression"}
        assert found[kind]["errors"]["unknown model"][0] == 404


@pytest.mark.parametrize("prompt", ["short", "whole"])
def test_codex(server, tmp_path, prompt):
    """The demo answers something, and the turn is completed. Codex's whole first prompt has 40 kB."""
    if prompt == "whole" and os.environ.get("OPENELM_MLX_LONG") != "1":
        pytest.skip("minutes: set OPENELM_MLX_LONG=1")
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    said = run_client(server, "sh", "codex.sh", str(tmp_path / "home"), str(tmp_path / "work"), PROMPT=prompt)
    kinds = [json.loads(line)["type"] for line in said.splitlines() if line.startswith("{")]
    assert "turn.completed" in kinds


def test_claude_code(server, tmp_path):
    found = json.loads(run_client(server, "sh", "claude.sh", str(tmp_path)).splitlines()[-1])
    assert (found["subtype"], found["is_error"]) == ("success", False)
    assert found["result"]
    assert found["usage"]["output_tokens"] > 0


def test_continue(server, tmp_path):
    assert run_client(server, "sh", "continue.sh", str(tmp_path)).strip()


def test_aider(server, tmp_path):
    """What it says by itself, and then reasoning and answer, each under its own heading."""
    if not Path(FOLDER, "aider").exists():
        pytest.skip("aider cannot be installed for this Python")
    said = run_client(server, "sh", "aider.sh", str(tmp_path))
    assert "ANSWER" in said
    assert re.search(r"Tokens: \d+ sent, \d+ received", said)
