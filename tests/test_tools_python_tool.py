"""The python tool as its users meet it: what a session keeps, what it shows, and what Ctrl-C, threads and limits do to it.

What scripts can do to the machine is in test_tools_sandbox.py.
"""

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from python_sandboxes import IS_MAC, SHORT_GRACE, SMALL, best_kind, inside, linux_only, outside

from openelm_mlx.errors import ToolError
from openelm_mlx.text.builtin_tools import PYTHON
from openelm_mlx.tools import interpreter, python_tool, sandbox, sandbox_usage
from openelm_mlx.tools.python_tool import PythonTool
from openelm_mlx.tools.sandbox import BUBBLEWRAP, NAMESPACES, NONE, SANDBOX_EXEC, Python

__all__ = ["inside", "outside"]  # fixtures

SOURCE = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


# --- What it is for ---------------------------------------------------------------------------------------------------


def test_a_session_keeps_its_variables_and_shows_the_last_value(inside, outside):
    for tool in (inside, outside):
        assert tool("x = 6\nx * 7") == "42"
        assert tool("x + 1") == "7"
        assert tool("_") == "7"
        assert tool("print('a'); print('b')\n'c'") == "a\nb\n'c'"
        assert tool("None").startswith("(The script wrote nothing")
        assert tool("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nf(20)") == "2432902008176640000"
        assert tool("print('größe 林檎 🐔')") == "größe 林檎 🐔"
        assert tool("print('\\udcff')") == "\\udcff"


def test_errors_are_told_as_a_traceback_of_the_script_alone(inside, outside):
    for tool in (inside, outside):
        text = tool("def half(n):\n    return n / 0\nhalf(3)")
        assert text.startswith("Traceback (most recent call last):\n")
        assert "return n / 0" in text
        assert text.endswith("ZeroDivisionError: division by zero")
        assert "in run\n" not in text
        assert "SyntaxError" in tool("def f(:")
        assert tool("import sys; sys.exit(3)") == "SystemExit: 3"
        assert "EOFError" in tool("input()")
        assert tool("1 + 1") == "2"


def test_what_a_script_defines_can_be_pickled(inside):
    """Scripts are a module of their own, and not lost in the one that runs them."""
    assert inside("import pickle\nclass A:\n    n = 3\npickle.loads(pickle.dumps(A)).n") == "3"
    assert inside("import __main__, sys; __main__.A is A, sys.argv") == "(True, [''])"


@linux_only
def test_files_are_in_the_trained_folder(inside):
    assert inside("open('/mnt/data/a.txt', 'w').write('hello')") == "5"
    assert inside("import os; os.getcwd(), open('a.txt').read()") == "('/mnt/data', 'hello')"
    assert (inside.scratch / "a.txt").read_text() == "hello"
    (inside.scratch / "b.txt").write_text("from outside")
    # /tmp is the same folder, unless the interpreter or its packages lie below it and have to be read there.
    has_own_tmp = any(path.startswith("/tmp/") for path in Python().readable())
    folder = "/mnt/data" if has_own_tmp else "/tmp"
    assert inside(f"open('{folder}/b.txt').read()") == "'from outside'"
    assert inside("import tempfile; tempfile.gettempdir()") == "'/mnt/data'"


def test_files_stay_when_the_interpreter_has_to_go(inside):
    inside("open('kept.txt', 'w').write('kept'); x = 1")
    inside.restart()
    assert inside("open('kept.txt').read(), 'x' in globals()") == "('kept', False)"


def test_it_is_the_tool_that_gpt_oss_knows():
    assert (PythonTool.name, PythonTool.parameters, PythonTool.description) == ("python", None, PYTHON.description)


# --- Ctrl-C and other threads -----------------------------------------------------------------------------------------


def interrupted_call(tool, script, seconds):
    """Call a tool and raise KeyboardInterrupt after some seconds, by a real signal; None if that came in time."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return tool(script)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return None
    finally:
        signal.signal(signal.SIGALRM, before)


def test_after_ctrl_c_each_call_has_its_own_result_and_the_variables(inside, outside):
    for tool in (inside, outside):
        tool("kept = 5")
        chance = random.Random(3)
        for number in range(12):
            script = f"import time\nnumber = {number}\nfor _ in range(10): time.sleep(0.005)\nprint('result', {number})"
            text = interrupted_call(tool, script, chance.uniform(0.0005, 0.1))
            assert text in (None, f"result {number}")
            assert tool(f"{number} * 1000, kept") == f"({number * 1000}, 5)"


def test_ctrl_c_stops_the_script_itself(inside):
    script = "import time\nfor _ in range(400): time.sleep(0.01)\nopen('finished', 'w').close()"
    assert interrupted_call(inside, script, 0.5) is None
    assert inside("import os; os.path.exists('finished')") == "False"


def test_ctrl_c_in_the_first_call():
    for seconds in (0.001, 0.02, 0.1):
        with PythonTool(limits=SMALL, sandbox=best_kind()) as tool:
            text = interrupted_call(tool, "'first'", seconds)
            assert text in (None, "'first'")
            assert tool("'second'") == "'second'"


def test_a_script_that_takes_no_interrupt_is_ended_and_the_next_one_is_told(inside, monkeypatch):
    monkeypatch.setattr(interpreter, "_GRACE_SECONDS", SHORT_GRACE)
    script = "import signal, time\nlost = 1\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(0.01)"
    inside("lost = 0")
    assert interrupted_call(inside, script, 0.5) is None
    text = inside("'lost' in globals()")
    assert "its variables are gone" in text
    assert text.endswith("False")
    assert inside("1") == "1"


def test_another_thread_may_interrupt_it():
    with PythonTool(limits=SMALL, sandbox=best_kind()) as tool:
        tool("x = 1")
        timer = threading.Timer(0.3, tool.interrupt)
        timer.start()
        text = tool("print('begun', flush=True)\nwhile True: pass")
        assert text.startswith("begun")
        assert "KeyboardInterrupt" in text
        assert text.endswith("[it was interrupted; variables and files are kept]")
        assert tool("x") == "1"
        tool.interrupt()  # nothing runs
        assert tool("x") == "1"


def test_another_thread_may_close_it_in_the_midst():
    tool = PythonTool(limits=SMALL, sandbox=best_kind())
    tool("1")
    timer = threading.Timer(0.3, tool.close)
    timer.start()
    with contextlib.suppress(ToolError):
        assert "interrupted" in tool("while True: pass")
    timer.join()
    with pytest.raises(ToolError, match="closed"):
        tool("1")


def test_threads_that_share_it_get_their_own_results(inside):
    results = {}

    def call(number):
        results[number] = inside(f"import time\nmine = {number}\ntime.sleep(0.01)\nmine")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: str(number) for number in range(20)}


def test_it_outlives_the_thread_that_called_it_first():
    with PythonTool(limits=SMALL, sandbox=best_kind()) as tool:
        thread = threading.Thread(target=tool, args=("x = 5",))
        thread.start()
        thread.join()
        time.sleep(0.3)
        assert tool("x") == "5"


def test_a_fork_of_the_program_leaves_it_alone(outside):
    outside("x = 3")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            outside("x = 4")
        except ToolError as error:
            os.write(writing, str(error).encode())
        outside.close()
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as said:
        assert b"closed" in said.read()
    assert outside("x") == "3"


# --- Ends -------------------------------------------------------------------------------------------------------------


def test_a_script_over_its_time_is_interrupted_and_the_variables_stay():
    with PythonTool(limits=replace(SMALL, seconds=0.7), sandbox=best_kind()) as tool:
        text = tool("x = 3\nprint('begun', flush=True)\nwhile True:\n    pass")
        assert text.startswith("begun")
        assert text.endswith("[it was stopped after 0.7 seconds; variables and files are kept]")
        assert tool("x") == "3"


@linux_only
def test_an_endless_loop_is_stopped_with_all_its_children(monkeypatch):
    monkeypatch.setattr(interpreter, "_GRACE_SECONDS", SHORT_GRACE)
    before = sandbox_usage.descendants(os.getpid()).keys()
    with PythonTool(limits=replace(SMALL, seconds=0.7), sandbox=best_kind()) as tool:
        text = tool(
            "import os, signal, time\nfor s in (2, 15):\n    signal.signal(s, signal.SIG_IGN)\nif os.fork() == 0:\n"
            "    os.setsid()\n    if os.fork():\n        os._exit(0)\nprint('begun', flush=True)\nwhile True:\n    pass"
        )
        assert text.startswith("begun")
        assert "stopped after 0.7 seconds; its variables are gone" in text
        assert "NameError" in tool("s")
        assert len(sandbox_usage.descendants(os.getpid()).keys() - before) == 3  # what makes it, its first, and Python
    assert not sandbox_usage.descendants(os.getpid()).keys() - before


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import os; os._exit(3)", "[Python ended (exit code 3); its variables are gone, files are kept]"),
        ("import os; os.abort()", "[Python ended (killed by SIGABRT); its variables are gone, files are kept]"),
        ("import os, signal; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIG"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): return [*map(lambda _: f(), [1])]\nf()", "killed by SIG"),
    ],
)  # fmt: skip
def test_the_end_of_python_is_told_and_the_next_script_runs(inside, script, says):
    text = inside(f"open('kept', 'w').write('1')\n{script}")
    assert says in text
    assert inside("open('kept').read()") == "'1'"


def test_an_end_between_two_scripts_is_told_and_the_next_one_runs(inside):
    assert inside("x = 1; import signal; signal.setitimer(signal.ITIMER_REAL, 1.0)[0]") == "0.0"
    time.sleep(2.0)  # the answer is here long before the alarm, and the end long before the next script
    text = inside("'x' in globals()")
    assert text.startswith("[Python ended (killed by SIGALRM), since the last script; its variables are gone")
    assert text.endswith("\nFalse")


@linux_only
def test_the_sandbox_ends_with_the_program_that_made_it():
    best_kind()
    program = (
        "from openelm_mlx.tools.python_tool import PythonTool\ntool = PythonTool()\ntool('1')\n"
        "print(tool._owner._place._process.pid, flush=True)\ntool('while True: pass')"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=SOURCE)
    pid = int(process.stdout.readline())
    inner = list(sandbox_usage.descendants(pid))
    assert len(inner) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_until(lambda: not any(is_running(each) for each in (pid, *inner)), "the sandbox outlived its program")


@pytest.mark.parametrize("kind", [SANDBOX_EXEC if IS_MAC else NONE])
def test_without_namespaces_it_ends_with_the_program_too(kind):
    """An endless loop once went on for an hour after its program had been killed."""
    program = (
        "from openelm_mlx.tools.python_tool import PythonTool\n"
        f"tool = PythonTool(sandbox={kind!r})\n"
        "tool('1')\nprint(tool._owner._place._process.pid, tool.scratch / 'started', flush=True)\n"
        'tool(\'open("started", "w").close()\\nwhile True: pass\')'
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=SOURCE)
    pid, started = process.stdout.readline().split()
    wait_until(Path(started).exists, "the script did not begin")  # killed earlier, it would end for want of a script
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    try:
        wait_until(lambda: not is_running(int(pid)), "the interpreter outlived its program")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
        sandbox_usage.remove_folder(Path(started).parent.parent)


def wait_until(condition, complaint):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(complaint)


def is_running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_two_tools_do_not_see_each_other():
    kind = best_kind()
    with PythonTool(limits=SMALL, sandbox=kind) as one, PythonTool(limits=SMALL, sandbox=kind) as other:
        one("x = 1; open('f', 'w').write('mine')")
        assert "NameError" in other("x")
        assert "FileNotFoundError" in other("open('f')")


def test_a_forgotten_tool_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tool = PythonTool(sandbox=NONE)
    assert tool("1") == "1"
    assert list(tmp_path.iterdir())
    thread = tool._owner._thread
    del tool
    gc.collect()
    thread.join(30)
    assert not list(tmp_path.iterdir())


# --- Where there is none ----------------------------------------------------------------------------------------------


def test_without_a_sandbox_it_refuses_unless_told(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox, "namespaces_fail", lambda: "unshare: Operation not permitted")
    for system in ("Linux", "Darwin", "Plan9"):
        with pytest.raises(ToolError, match="--allow-unsandboxed"):
            sandbox.find_sandbox(system)
        assert sandbox.find_sandbox(system, allow_unsandboxed=True) == NONE
    with pytest.raises(ToolError, match="Operation not permitted"):
        sandbox.find_sandbox("Linux")


def test_the_best_sandbox_is_chosen(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sandbox, "namespaces_fail", lambda: None)
    monkeypatch.setattr(sandbox, "bubblewrap_fails", lambda: None)
    assert sandbox.find_sandbox("Darwin", allow_unsandboxed=True) == SANDBOX_EXEC
    assert sandbox.find_sandbox("Linux", allow_unsandboxed=True) == BUBBLEWRAP
    monkeypatch.setattr(sandbox, "bubblewrap_fails", lambda: "bwrap: Unknown option --size")
    assert sandbox.find_sandbox("Linux") == NAMESPACES


def test_a_bubblewrap_that_is_too_old_is_told(tmp_path, monkeypatch):
    """Before 0.7 it has no --size: a folder without a limit is no sandbox."""
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho 'bwrap: Unknown option --size' >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sandbox._fails.cache_clear()
    try:
        assert "Unknown option --size" in sandbox.bubblewrap_fails()
    finally:
        sandbox._fails.cache_clear()


@linux_only
def test_systemd_limits_the_whole_where_it_can(tmp_path, monkeypatch):
    """Another program in systemd's place, which notes its options and runs the command as a scope would."""
    kind = best_kind()
    program = tmp_path / "systemd-run"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/seen\nwhile [ "${{1#-}}" != "$1" ]; do\n'
        '    [ "$1" = -p ] && shift\n    shift\ndone\nexec "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    sandbox._scope.cache_clear()
    try:
        with PythonTool(limits=SMALL, sandbox=kind) as tool:
            assert tool("import os; 'XDG_RUNTIME_DIR' in os.environ") == "False"
        probe, seen = [line for line in (tmp_path / "seen").read_text().splitlines() if "--scope" in line]
        assert probe.endswith("/bin/true")
        assert "--scope --quiet --collect" in seen
        assert f"-p MemoryMax={(400 + 4 + 64) << 20} -p MemorySwapMax=0 -p TasksMax=20" in seen
        assert ("--user" in seen) == (os.getuid() != 0)
        program.write_text("#!/bin/sh\nexit 1\n")  # not booted with systemd, or no bus
        sandbox._scope.cache_clear()
        assert sandbox.scope(SMALL) == []
    finally:
        sandbox._scope.cache_clear()


def test_a_folder_for_temporary_files_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ToolError, match=r"cannot be written \(No such file or directory\).*TMPDIR"):
        PythonTool(sandbox=NONE)


def test_a_closed_tool_says_so():
    tool = PythonTool(sandbox=NONE)
    tool.close()
    for use in (lambda: tool("1"), lambda: tool.scratch, tool.restart):
        with pytest.raises(ToolError, match="closed"):
            use()
    tool.close()


@pytest.mark.parametrize("python", ["/usr/bin/false", "/nowhere/python"])
def test_a_python_that_does_not_start_is_an_error(python):
    for kind in (best_kind(), NONE):
        with (
            PythonTool(python=Python(python, "/usr", ()), sandbox=kind) as tool,
            pytest.raises(ToolError, match="started"),
        ):
            tool("1")


def test_a_python_that_holds_the_home_folder_is_refused():
    with pytest.raises(ToolError, match="home folder"):
        Python(prefix=str(Path.home())).readable()
    with pytest.raises(ToolError, match="home folder"):
        Python(prefix="/").readable()


def test_a_burst_of_calls_from_an_owner_that_died_does_not_hang(outside):
    owner = python_tool._Owner(NONE, Python(), SMALL)
    owner.close()
    owner._is_closing = False  # as if it had been closed between the question and the queue
    with pytest.raises(ToolError, match="closed"):
        owner.ask(owner.run, "1")
