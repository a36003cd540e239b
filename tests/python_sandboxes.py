"""What the tests of the python tool share: its sandboxes on this machine, and small limits."""

import os
import sys

import pytest

from openelm_mlx.tools import sandbox
from openelm_mlx.tools.python_tool import PythonTool
from openelm_mlx.tools.sandbox import BUBBLEWRAP, NAMESPACES, NONE, SANDBOX_EXEC, Limits

SMALL = Limits(seconds=20, memory_bytes=400 << 20, processes=12, file_bytes=1 << 20, folder_bytes=4 << 20)
# Seconds for what takes no interrupt; where the variables have to stay, the tool's own are given.
SHORT_GRACE = 0.2

IS_MAC = sys.platform == "darwin"
KINDS = [SANDBOX_EXEC] if IS_MAC else [NAMESPACES, BUBBLEWRAP]
linux_only = pytest.mark.skipif(IS_MAC, reason="processes and signals of Linux; a Mac's sandbox lets none be started")


def why_not(kind):
    """Why a sandbox of this kind cannot be had here, on Linux; a Mac always has its own, or the tests fail."""
    if kind == SANDBOX_EXEC:
        return None
    return sandbox.namespaces_fail() if kind == NAMESPACES else sandbox.bubblewrap_fails()


def has_to_be_there(kind):
    """Whether a missing sandbox is an error of the machine that runs the tests, and no reason to skip them."""
    return kind == SANDBOX_EXEC or (kind == NAMESPACES and bool(os.environ.get("CI") or os.getuid() == 0))


def skip_without(kind):
    reason = why_not(kind)
    if reason is not None:
        assert not has_to_be_there(kind), reason
        pytest.skip(f"{kind}: {reason}")


def best_kind():
    """The sandbox that is chosen here; skips where there is none, as in a container that permits none."""
    for kind in reversed(KINDS):
        if why_not(kind) is None:
            return kind
    skip_without(KINDS[0])
    return None


@pytest.fixture(scope="module", params=KINDS)
def inside(request):
    skip_without(request.param)
    with PythonTool(limits=SMALL, sandbox=request.param) as tool:
        yield tool


@pytest.fixture(scope="module")
def outside():
    with PythonTool(limits=SMALL, sandbox=NONE) as tool:
        yield tool
