"""What `dir` shows of the package and of the package of tools: the public names, all of them, and nothing else."""

import importlib
import inspect
import subprocess
import sys

import pytest

OM = {
    "Chat", "Chunk", "DraftModel", "NoAnswerWarning", "PrefixCache", "PromptLookup", "SamplingParams", "Statistics",
    "UserError", "__version__", "convert", "generate", "load", "plan", "stream_generate",
}  # fmt: skip
TOOLS = {
    "FileBrowser", "FunctionTool", "McpServer", "PatchTool", "PythonTool", "Tool", "Toolbox", "apply_patch", "calculator",
    "function_tool",
}  # fmt: skip
EVENTS = {"Answer", "Chat", "Done", "Event", "Notice", "Reasoning", "ToolCall", "ToolResult"}


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(("name", "names"), [("openelm_mlx", OM), ("openelm_mlx.tools", TOOLS)])
def test_dir_is_the_public_names(name, names):
    """Also when every module is loaded."""
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
    assert names <= set(dir(module))  # none of them goes away
    for each in dir(module):
        assert not inspect.ismodule(getattr(module, each)) or callable(getattr(module, each))
        assert getattr(module, each) is not None
    assert dir(module) == sorted(module.__all__)
    starred: dict[str, object] = {}
    exec(f"from {name} import *", starred)
    assert set(starred) - {"__builtins__"} == set(module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = module.nonsense


@pytest.mark.parametrize("name", ["openelm_mlx", "openelm_mlx.tools"])
def test_looking_costs_no_import(name):
    script = f"import sys, {name} as m; d = dir(m); print([n for n in sys.modules if 'mlx' in n and n not in {{m!r}}])"
    assert run(script.replace("{m!r}", '("openelm_mlx", "openelm_mlx.tools")')) == "[]"


def test_everything_public_is_in_a_fresh_process():
    """In the order of the alphabet, each first use finds what it names: no module hides a name of its own."""
    script = (
        "import openelm_mlx.tools as a, openelm_mlx as om\n"
        "import openelm_mlx.tools.toolbox, openelm_mlx.tools.arithmetic\n"
        "assert a.calculator('2 + 3') == '5'\n"
        "print(all(each.__module__.startswith('openelm_mlx.') for n in dir(a) for each in [getattr(a, n)]))"
    )
    assert run(script) == "True"


def test_public_names_have_a_docstring():
    for name in ("openelm_mlx", "openelm_mlx.tools"):
        module = importlib.import_module(name)
        for each in set(module.__all__) - {"__version__", "Event"}:
            assert inspect.getdoc(getattr(module, each)), each


def test_the_events_of_a_conversation_are_named_beside_it():
    from openelm_mlx import conversation

    assert set(conversation.__all__) == EVENTS
    assert conversation.Chat is importlib.import_module("openelm_mlx").Chat
