"""The python tool, attacked. Each attack that is harmless also runs without the sandbox, where it must succeed: so it is
the sandbox that stops it, and not a mistake in the attack.

On Linux they run in namespaces and in bubblewrap, on a Mac in sandbox-exec, where they fail if that does not start.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from python_sandboxes import (
    IS_MAC,
    KINDS,
    SHORT_GRACE,
    SMALL,
    best_kind,
    has_to_be_there,
    inside,
    linux_only,
    outside,
    why_not,
)

from openelm_mlx.errors import ToolError
from openelm_mlx.tools import sandbox_usage
from openelm_mlx.tools.interpreter import Interpreter
from openelm_mlx.tools.python_process import Box
from openelm_mlx.tools.python_tool import PythonTool
from openelm_mlx.tools.sandbox import BUBBLEWRAP, NAMESPACES, NONE, Python

__all__ = ["inside", "outside"]  # fixtures

NOT_THERE = "PermissionError" if IS_MAC else "FileNotFoundError"


def test_ci_has_a_sandbox():
    for kind in KINDS:
        assert not has_to_be_there(kind) or why_not(kind) is None, why_not(kind)


# --- Out of the sandbox -----------------------------------------------------------------------------------------------


def test_the_home_folder_and_other_files_are_not_there(inside, outside, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a password")
    secret.chmod(0o666)
    script = f"print(open({str(secret)!r}).read())"
    assert outside(script) == "a password"
    assert NOT_THERE in inside(script)
    home = str(Path.home())
    assert "password" not in inside(
        f"import os; [os.path.join(p, n) for p, _, ns in os.walk({home!r}) for n in ns][:5]"
    )
    assert NOT_THERE in inside("open('/etc/passwd').read()")
    assert NOT_THERE in inside(f"open({str(Path.home() / '.zshrc')!r}).read()")
    # A Mac's system adds a few of its own, and bubblewrap says which folder it is in.
    added = "('PWD', '__CF_USER_TEXT_ENCODING', 'LC_CTYPE')"
    names = inside(f"import os; sorted(k for k in os.environ if k not in {added})")
    assert names == "['HOME', 'LANG', 'PATH', 'TMPDIR']"


def test_there_is_no_network(inside, outside):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        script = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2).close(); 'through'"
        assert outside(script) == "'through'"
        assert "PermissionError" in inside(script)


@linux_only
def test_there_are_no_sockets_but_pairs(inside, outside):
    """AF_VSOCK, which reaches from a virtual machine to its host, and AF_ALG, AF_NETLINK, ... have no namespaces."""
    script = (
        "import socket\nmade = []\nfor family in range(1, 46):\n    for kind in (1, 2, 3, 5):\n        try:\n"
        "            socket.socket(family, kind).close()\n            made.append(family)\n"
        "        except OSError:\n            pass\nsorted(set(made))"
    )
    assert "1, 2" in outside(script)
    assert inside(script) == "[]"
    assert "PermissionError" in inside("import socket; socket.socketpair(socket.AF_INET)")
    assert inside("import asyncio\nasyncio.run(asyncio.sleep(0.01, 'a loop needs one'))") == "'a loop needs one'"


def test_nothing_outside_the_folder_can_be_written(inside, outside, tmp_path):
    tmp_path.chmod(0o777)
    script = f"open({str(tmp_path / 'x')!r}, 'w').write('x')"
    assert outside(script) == "1"
    (tmp_path / "x").unlink()
    assert "Error" in inside(script)
    assert not (tmp_path / "x").exists()
    for path in ("/x", "/usr/x", "/dev/x", "/root/x", "/proc/sys/kernel/hostname", sys.prefix + "/x"):
        assert "Error" in inside(f"open({path!r}, 'w').write('x')"), path
    assert "Error" in inside("import os; os.chmod('/usr/bin/env', 0o777)")


def test_what_python_needs_can_be_read_and_not_written(tmp_path):
    """Also where the system would let anybody write: it is not the permissions that the sandbox relies on."""
    packages = Path(os.path.realpath(tmp_path)) / "packages"
    packages.mkdir()
    (packages / "thing.py").write_text("value = 3")
    for path in (packages, packages / "thing.py"):
        path.chmod(0o777)
    with PythonTool(limits=SMALL, python=Python(packages=(str(packages),)), sandbox=best_kind()) as tool:
        assert tool("import thing; thing.value") == "3"
        for name in ("thing.py", "other.py"):
            text = tool(f"open({str(packages / name)!r}, 'w')")
            assert "Read-only file system" in text or "PermissionError" in text
    assert (packages / "thing.py").read_text() == "value = 3"


def test_the_standard_library_finds_its_libraries(inside):
    assert inside("import bz2, ctypes, decimal, lzma, sqlite3, ssl, zlib, numpy\nint(numpy.arange(3).sum())") == "3"


def test_links_lead_nowhere(inside, outside, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a password")
    script = (
        f"import os\nif os.path.lexists('link'):\n    os.unlink('link')\nos.symlink({str(secret)!r}, 'link')\n"
        "print(open('link').read())"
    )
    assert outside(script) == "a password"
    assert NOT_THERE in inside(script)
    assert "Error" in inside("import os; os.link('/usr/bin/env', 'hard')")
    assert "Error" in inside("open('/proc/1/root/etc/passwd').read()")


def test_other_processes_cannot_be_seen_or_killed(inside, outside):
    script = f"import os; os.kill({os.getpid()}, 0); 'there'"  # signal 0 only asks
    assert outside(script) == "'there'"
    assert "ProcessLookupError" in inside(script) or "PermissionError" in inside(script)


@pytest.mark.skipif(not IS_MAC, reason="KERN_PROCARGS2 is a Mac's")
def test_the_environment_of_other_processes_cannot_be_read(inside, outside):
    script = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nsize = ctypes.c_size_t(1 << 20)\n"
        f"name, data = (ctypes.c_int * 3)(1, 49, {os.getpid()}), ctypes.create_string_buffer(1 << 20)\n"
        "libc.sysctl(name, 3, data, ctypes.byref(size), None, 0)"
    )
    assert outside(script) == "0"
    assert inside(script) == "-1"


@pytest.mark.skipif(not IS_MAC, reason="Linux limits the number of processes instead")
def test_a_mac_lets_no_process_be_started(inside, outside):
    script = "import os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)[1]"
    assert outside(script) == "0"
    assert "PermissionError" in inside(script)


@linux_only
def test_the_first_process_takes_nothing_from_scripts(inside):
    """It has the same user as they; its end would be the end of their files."""
    inside("open('kept', 'w').write('1')")
    for number in (1, 2, 9, 15, 17, 19):
        assert inside(f"import os; os.kill(1, {number}); 1") == "1"
    assert inside("import os; os.kill(-1, 9); 2").startswith(("2", "Traceback"))
    for path in ("/proc/1/mem", "/proc/1/environ", "/proc/1/maps"):
        assert "PermissionError" in inside(f"open({path!r}, 'rb').read(1)"), path
    assert "PermissionError" in inside("import os; os.listdir('/proc/1/fd')")
    assert "PermissionError" in inside("import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))")
    assert inside("open('kept').read()") == "'1'"
    inside.restart()
    assert inside("import os; len([n for n in os.listdir('/proc') if n.isdigit()])") == "2"


@linux_only
def test_powers_cannot_be_had_back(inside):
    assert int(inside("import os; os.getuid()")) != 0
    assert "Error" in inside("import os; os.setuid(0)")  # of permission, or in a user namespace: no such user
    assert "CapEff:\t0000000000000000" in inside("print(open('/proc/self/status').read())")
    assert "NoNewPrivs:\t1" in inside("print(open('/proc/self/status').read())")
    for call in (
        "c.mount(b'none', b'/mnt', b'tmpfs', 0, None)",
        "c.unshare(0x10000000)",
        "c.ptrace(16, 1, None, None)",
        "c.syscall(425, 8, ctypes.create_string_buffer(200))",  # io_uring_setup
        "c.memfd_create(b'x', 0)",
        "c.shmget(0, 1 << 20, 0o1600)",
        "c.msgget(0, 0o1600)",
        "c.inotify_init1(0)",
        "c.process_vm_readv(1, None, 0, None, 0, 0)",
    ):
        assert inside(
            f"import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n{call}, ctypes.get_errno() in (1, 38)"
        ) == ("(-1, True)"), call


@linux_only
@pytest.mark.parametrize("kind", [NAMESPACES, BUBBLEWRAP])
def test_an_unprivileged_user_has_the_same_sandbox(kind):
    """The way of everybody who is not root: a user namespace. As root, we become nobody first to try it."""
    if why_not(kind) is not None:
        pytest.skip(why_not(kind))
    path = os.path.realpath("/usr/bin/python3") if os.getuid() == 0 else os.path.realpath(sys.executable)
    if not Path(path).exists():
        pytest.skip("no Python that every user can run")
    who = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    python = Python(path, "/usr", (), lambda executable: ()) if who else Python()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        (folder / "root").mkdir()
        folder.chmod(0o755)
        try:
            place = Box(kind, python, folder, SMALL, **who)
        except ToolError as error:
            if who and ("Operation not permitted" in str(error) or "Permission denied" in str(error)):
                pytest.skip(f"user namespaces are for root alone here: {error}")
            raise
        try:
            interpreter = Interpreter(kind, place, python, folder, SMALL)
            script = "import os; os.getuid(), os.path.exists('/etc/passwd'), open('y', 'w').write('x')"
            assert interpreter.run(script, lambda: False) == (f"({65534 if who else os.getuid()}, False, 1)\n", False)
            assert "Error" in interpreter.run("open('/usr/x', 'w')", lambda: False)[0]
            assert "PermissionError" in interpreter.run("open('/proc/1/mem', 'rb')", lambda: False)[0]
            interpreter.end()
        finally:
            place.close()


# --- More than it may take --------------------------------------------------------------------------------------------


@linux_only
def test_a_fork_bomb_is_over_when_its_processes_are(inside):
    """Bounded by itself too: at most 60 forks, each ending in seconds."""
    text = inside(
        "import os, time\nfor _ in range(60):\n    if os.fork() == 0:\n        time.sleep(3); os._exit(0)\nprint('survived')"
    )
    assert "BlockingIOError" in text or "processes" in text
    assert "survived" not in text
    inside.restart()
    assert inside("1") == "1"


@linux_only
def test_an_endless_fork_bomb_leaves_nothing():
    with PythonTool(limits=replace(SMALL, seconds=0.4), sandbox=best_kind()) as tool:
        text = tool("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
        assert "its variables are gone" in text
        assert tool("import os; pid = os.fork()\nif not pid: os._exit(7)\nos.waitpid(pid, 0)[1] >> 8") == "7"


@linux_only
def test_an_interrupt_reaches_what_a_script_started():
    with PythonTool(limits=replace(SMALL, seconds=1), sandbox=best_kind()) as tool:
        text = tool("import subprocess\nx = 1\nsubprocess.run(['sleep', '60'])")
        assert "stopped after 1 seconds; variables and files are kept" in text
        assert "in interrupted" not in text
        assert tool("import os; x, len([n for n in os.listdir('/proc') if n.isdigit()])") == "(1, 2)"


@linux_only
def test_threads_are_limited_as_processes_are(inside):
    text = inside("import threading, time\nfor _ in range(60): threading.Thread(target=time.sleep, args=(1,)).start()")
    assert "can't start new thread" in text
    inside.restart()


@linux_only
def test_a_forked_child_is_no_second_interpreter(inside):
    inside("import os; pid = os.fork()")
    assert inside("os.waitpid(pid, 0)[1]") == "0"


@linux_only
def test_a_memory_bomb_ends_in_an_error_or_is_stopped(inside):
    assert "MemoryError" in inside("b = bytearray(600 << 20)")
    parts = (
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        b = bytearray(130 << 20)\n"
        "        time.sleep(15)\n        os._exit(0)\ntime.sleep(15)\nprint('all')"
    )  # each small enough for the kernel's limit, together 520 MB
    text = inside(parts)
    assert "MB of memory" in text
    assert "all" not in text.split("[")[0]
    assert inside("1") == "1"


@linux_only
def test_memory_that_processes_share_counts_once(inside):
    script = (
        "import os, time\nb = bytearray(b'x') * (100 << 20)\npids = []\nfor _ in range(5):\n    pid = os.fork()\n"
        "    if pid == 0:\n        time.sleep(0.6)\n        os._exit(0)\n    pids.append(pid)\n"
        "for pid in pids: os.waitpid(pid, 0)\ndel b\nprint('all')"
    )  # six processes see the same 100 MB
    assert inside(script) == "all"


@linux_only
def test_a_process_that_has_ended_has_no_memory():
    """Between the two looks at it: several that end together would count as many times what they shared."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is there, but nothing of it is left
    assert sandbox_usage.memory_bytes({process.pid: 1 << 30}, 0) == 0
    process.wait()
    assert sandbox_usage.memory_bytes({process.pid: 1 << 30}, 0) == 0
    assert 0 < sandbox_usage.memory_bytes({os.getpid(): 1 << 40}, 0) < 1 << 40


@pytest.mark.skipif(not IS_MAC, reason="the kernel of Linux limits it")
def test_a_mac_stops_what_takes_too_much_memory(inside):
    script = "import time\nparts = []\nfor _ in range(30):\n    parts.append(b'x' * (100 << 20))\n    time.sleep(0.05)"
    assert "MB of memory" in inside(script)


def test_giant_output_is_cut_in_the_middle(inside):
    text = inside("for i in range(200_000): print(i)")
    assert len(text) < SMALL.output_bytes + 100
    assert text.startswith("0\n1\n")
    assert text.endswith("199999")
    assert "bytes of output left out" in text
    text = inside("import os; os.write(1, b'y' * 5_000_000); os.write(2, b'\\xff\\xfe')")
    assert len(text) < SMALL.output_bytes + 200


def test_open_files_are_limited(inside):
    assert "Too many open files" in inside("files = [open('/dev/null') for _ in range(1000)]")
    inside("files = None")


@pytest.fixture
def emptied(inside):
    """A sandbox whose folder and processes are cleared afterwards."""
    yield inside
    inside.restart()
    inside("import os, shutil\nfor e in os.scandir('.'):\n    shutil.rmtree(e) if e.is_dir() else os.unlink(e)")


def taken(tool):
    """The bytes that a sandbox's folder takes, as the kernel counts them: also files without a name."""
    found = os.statvfs(tool.scratch)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@linux_only
def test_giant_files_are_refused(emptied):
    assert "File too large" in emptied("open('big', 'wb').write(bytes(3 << 20))")
    text = emptied("for i in range(40):\n    open(f'f{i}', 'wb').write(bytes(900_000))")
    assert "No space left on device" in text
    assert "Traceback" not in emptied(
        "import os\nfor name in os.listdir(): os.unlink(name)"
    )  # a full folder can be emptied
    assert emptied("open('f', 'wb').write(bytes(900_000))") == "900000"


@linux_only
def test_files_without_a_name_count_too(emptied):
    script = (
        "import os\nkept = []\nfor i in range(40):\n    file = open('f', 'wb', buffering=0)\n    os.unlink('f')\n"
        "    kept.append(file)\n    file.write(bytes(900_000))"
    )
    assert "No space left on device" in emptied(script)
    assert taken(emptied) <= SMALL.folder_bytes


@linux_only
def test_files_between_two_calls_count_too(emptied):
    script = (
        "import threading, time\nended = threading.Event()\ndef write():\n    try:\n        for i in range(200):\n"
        "            open(f'f{i}', 'wb').write(bytes(900_000))\n    except OSError:\n        ended.set()\n"
        "threading.Thread(target=write).start()"
    )
    emptied(script)
    time.sleep(0.5)
    assert emptied("ended.wait(10)") == "True"
    assert taken(emptied) <= SMALL.folder_bytes


@linux_only
def test_too_many_files_are_stopped(emptied, monkeypatch):
    monkeypatch.setattr(sandbox_usage, "MOST_FILES", 200)
    text = emptied("import time\nfor i in range(300): open(f'f{i}', 'w')\ntime.sleep(5)")
    assert "files, and 200 are allowed" in text
    assert "Traceback" not in emptied("import os, time\nfor n in os.listdir(): os.unlink(n)\ntime.sleep(0.3)")


def test_a_locked_folder_is_opened_again(emptied):
    emptied("import os; open('kept', 'w').write('1'); os.chmod(os.environ['HOME'], 0)")
    assert emptied("open('kept').read()") == "'1'"
    emptied("import os; os.chmod(os.environ['HOME'], 0o300); os._exit(0)")
    assert emptied("open('kept').read()") == "'1'"


# --- Forging, and breaking the interpreter ----------------------------------------------------------------------------


def test_the_end_of_a_call_cannot_be_written(inside):
    script = (
        "import os, time\nfor descriptor in range(3, 5000):\n    try: os.write(descriptor, b'done\\n')\n"
        "    except OSError: pass\ntime.sleep(0.5)\nprint('went on')"
    )
    text = inside(script)
    assert "it wrote into the interpreter's own pipe; its variables are gone" in text
    assert "went on" not in text
    assert inside("2") == "2"


def test_a_token_found_in_memory_does_not_shift_the_results(inside):
    """A script that digs out how its end is said deceives about itself alone."""
    script = (
        "import os, sys, time\nframe = sys._getframe()\nwhile 'token' not in frame.f_locals: frame = frame.f_back\n"
        "keeper = frame.f_locals['self']\nos.write(keeper.report, frame.f_locals['token'] + b'\\n')\n"
        "time.sleep(0.3)\nprint('late')"
    )
    assert inside(script).startswith("(The script wrote nothing")
    text = inside("'second'")
    assert text.startswith("late\n")
    assert text.endswith(
        "[it was stopped: it wrote into the interpreter's own pipe; its variables are gone, files are kept]"
    )
    assert inside("'third'") == "'third'"


def test_closed_descriptors_are_opened_again(inside):
    inside("x = 1\nimport os\nos.closerange(0, 128)")  # what daemons do
    assert inside("print(x); 2") == "1\n2"
    text = inside("import os\nos.closerange(0, 100_000)")
    assert "it closed the interpreter's own pipe" in text or "Python ended" in text
    assert inside("3") == "3"


@pytest.mark.parametrize(
    "script",
    [
        "import builtins\nfor name in list(vars(builtins)): delattr(builtins, name)",
        "import sys; sys.stdout = sys.stderr = None",
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import sys; del sys.stdout, sys.stderr",
        "class A:\n    def __repr__(self): raise KeyError('no')\nA()",
        "class E(Exception):\n    def __str__(self): raise KeyError('no')\nraise E",
        "raise SystemExit(type('A', (), {'__str__': lambda self: 1 / 0})())",
        "import sys; sys.exit(type('A', (), {'__str__': lambda self: 1 / 0})())",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
        "import traceback, linecache; traceback.print_exception = linecache.cache = None\n1 / 0",
        "import os; os.mkdir('d'); os.chdir('d'); os.rmdir('../d')",
        "def f(): f()\nf()",
        "(" * 5000,
        "import atexit, threading, time\natexit.register(time.sleep, 60)\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()",
        "import gc, sys\nsys.modules.clear()",
    ],
)  # fmt: skip
def test_a_broken_interpreter_is_mended_or_replaced(inside, script):
    inside(script)
    assert inside("print('fine'); 6 * 7") == "fine\n42"
    assert "ZeroDivisionError" in inside("1 / 0")
    inside.restart()


@linux_only
def test_a_stopped_interpreter_is_ended_in_time(monkeypatch):
    monkeypatch.setattr("openelm_mlx.tools.interpreter._GRACE_SECONDS", SHORT_GRACE)
    with PythonTool(limits=replace(SMALL, seconds=0.5), sandbox=best_kind()) as tool:
        text = tool("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
        assert "stopped after 0.5 seconds; its variables are gone" in text
        assert tool("1") == "1"


# --- Without a sandbox the same things are counted --------------------------------------------------------------------


@pytest.mark.skipif(IS_MAC, reason="there the same is counted by libproc, in test_tools_sandbox_mac.py")
def test_outside_a_full_folder_stops_a_script_and_can_be_emptied(outside):
    text = outside("import time\nfor i in range(9): open(f'f{i}', 'wb').write(bytes(900_000))\ntime.sleep(15)")
    assert "MB of files" in text
    assert "Traceback" not in outside("import os, time\ntime.sleep(0.3)\nfor n in os.listdir(): os.unlink(n)")
    script = (
        "import os, time\nkept = []\nfor i in range(9):\n    file = open('f', 'wb', buffering=0)\n    os.unlink('f')\n"
        "    kept.append(file)\n    file.write(bytes(900_000))\ntime.sleep(15)"
    )
    assert "MB of files" in outside(script)
    hidden = (
        "import os, time\nos.mkdir('h')\nfor i in range(9): open(f'h/f{i}', 'wb').write(bytes(900_000))\n"
        "os.chmod('h', 0o300)\ntime.sleep(15)"
    )
    assert "MB of files" in outside(hidden)


@pytest.fixture
def as_ordinary_user():
    """A folder of an ordinary user's, to whom modes mean something: root becomes nobody for the test."""
    before = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # not below pytest's own folders, which are root's alone
        if before == 0:
            os.chown(name, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(before)


def test_folders_are_counted_and_deleted_whatever_was_made_of_them(as_ordinary_user):
    folder = as_ordinary_user / "scratch"
    hidden = folder / "hidden"
    hidden.mkdir(parents=True)
    (hidden / "file").write_bytes(bytes(50_000))
    hidden.chmod(0o300)
    assert sandbox_usage.files_in(folder, 1 << 40) >= 50_000
    (folder / "locked").mkdir(0o000)
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)
    for _ in range(2_000):  # far deeper than recursion or a path reach
        os.mkdir("deeper")
        os.chdir("deeper")
    Path("file").write_text("x")
    os.fchdir(here)
    os.close(here)
    assert sandbox_usage.files_in(folder, 1 << 40) > 1 << 40
    kept = as_ordinary_user / "kept"
    kept.mkdir()
    (folder / "link").symlink_to(kept)
    sandbox_usage.remove_folder(folder)
    assert not folder.exists()
    assert kept.exists()


def test_nothing_is_left_of_a_deeply_nested_folder(outside):
    with PythonTool(limits=SMALL, sandbox=NONE) as tool:
        tool("import os\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')")
        folder = tool._owner._folder
    assert not folder.exists()
