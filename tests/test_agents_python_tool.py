"""The python tool, attacked. Each attack that is harmless also runs without the sandbox, where it must succeed: so it is
the sandbox that stops it, and not a mistake in the attack."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from openelm_mlx.agents import python_tool, sandbox
from openelm_mlx.agents.python_tool import PythonTool
from openelm_mlx.agents.sandbox import BUBBLEWRAP, NAMESPACES, NONE, SANDBOX_EXEC, Limits, Python
from openelm_mlx.errors import ToolError
from openelm_mlx.text.schema import PYTHON

SMALL = Limits(seconds=10, memory_bytes=400 << 20, processes=12, file_bytes=1 << 20, folder_bytes=4 << 20)

# CI's machines permit namespaces; elsewhere (a container without them) the attacks have nothing to attack.
HAS_SANDBOX = sys.platform == "linux" and sandbox.namespaces_fail() is None
needs_sandbox = pytest.mark.skipif(not HAS_SANDBOX, reason=f"no sandbox: {sandbox.namespaces_fail()}")


@pytest.fixture(scope="module", params=[NAMESPACES, BUBBLEWRAP])
def inside(request):
    if request.param == BUBBLEWRAP:
        if (program := shutil.which("bwrap")) is None or not sandbox._bubblewrap_works(program):
            pytest.skip("bubblewrap is not installed here")
        if os.getuid() == 0:
            pytest.skip("bubblewrap leaves root what it is, and the kernel limits no processes of root's")
    elif not HAS_SANDBOX:
        pytest.skip("no sandbox")
    tool = PythonTool(limits=SMALL)
    tool.sandbox = request.param
    with tool:
        yield tool


@pytest.fixture(scope="module")
def outside():
    tool = PythonTool(limits=SMALL, allow_unsandboxed=True)
    tool.sandbox = NONE
    with tool:
        yield tool


def test_ci_has_a_sandbox():
    if os.environ.get("CI") or os.getuid() == 0:
        assert HAS_SANDBOX or sys.platform != "linux", sandbox.namespaces_fail()


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


def test_errors_are_told_as_a_traceback_of_the_script_alone(inside, outside):
    for tool in (inside, outside):
        text = tool("def half(n):\n    return n / 0\nhalf(3)")
        assert text.startswith("Traceback (most recent call last):\n")
        assert "return n / 0" in text
        assert text.endswith("ZeroDivisionError: division by zero")
        assert "run_script" not in text
        assert "SyntaxError" in tool("def f(:")
        assert tool("import sys; sys.exit(3)") == "SystemExit: 3"
        assert "EOFError" in tool("input()")
        assert tool("1 + 1") == "2"


def test_files_are_in_the_trained_folder(inside):
    assert inside("open('/mnt/data/a.txt', 'w').write('hello')") == "5"
    assert inside("import os; os.getcwd(), open('a.txt').read()") == "('/mnt/data', 'hello')"
    assert (inside.scratch / "a.txt").read_text() == "hello"


def test_it_is_the_tool_that_gpt_oss_knows():
    assert (PythonTool.name, PythonTool.parameters, PythonTool.description) == ("python", None, PYTHON.description)


# --- Attacks ----------------------------------------------------------------------------------------------------------


def test_the_home_folder_and_other_files_are_not_there(inside, outside, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a password")
    secret.chmod(0o666)
    script = f"print(open({str(secret)!r}).read())"
    assert outside(script) == "a password"
    assert "FileNotFoundError" in inside(script)
    home = str(Path.home())
    assert "password" not in inside(
        f"import os; [os.path.join(p, n) for p, _, ns in os.walk({home!r}) for n in ns][:5]"
    )
    assert "FileNotFoundError" in inside("open('/etc/passwd').read()")
    assert inside("import os; os.path.exists('/etc/shadow'), os.path.exists('/var/run')") == "(False, False)"
    # Bubblewrap says which folder it is in.
    assert inside("import os; sorted(k for k in os.environ if k != 'PWD')") == "['HOME', 'LANG', 'PATH', 'TMPDIR']"


def test_there_is_no_network(inside, outside):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        script = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2).close(); 'through'"
        assert outside(script) == "'through'"
        assert "ConnectionRefusedError" in inside(script) or "unreachable" in inside(script)
    text = inside("import socket; [name for _, name in socket.if_nameindex()]")
    assert text in ("['lo']", "[]")
    abstract = "\0openelm-mlx-test"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(abstract)
        server.listen()
        script = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({abstract!r}); 'through'"
        assert outside(script) == "'through'"
        assert "ConnectionRefusedError" in inside(script)


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
    if not HAS_SANDBOX:
        pytest.skip("no sandbox")
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "thing.py").write_text("value = 3")
    for path in (packages, packages / "thing.py"):
        path.chmod(0o777)
    with PythonTool(limits=SMALL, python=Python(packages=(str(packages),))) as tool:
        assert tool("import thing; thing.value") == "3"
        for name in ("thing.py", "other.py"):
            assert "Read-only file system" in tool(f"open({str(packages / name)!r}, 'w')")
    assert (packages / "thing.py").read_text() == "value = 3"


def test_links_lead_nowhere(inside, outside, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a password")
    script = (
        f"import os\nif os.path.lexists('link'):\n    os.unlink('link')\nos.symlink({str(secret)!r}, 'link')\n"
        "print(open('link').read())"
    )
    assert outside(script) == "a password"
    assert "FileNotFoundError" in inside(script)
    assert "Error" in inside("import os; os.link('/usr/bin/env', 'hard')")
    assert "FileNotFoundError" in inside("open('/proc/1/root/etc/passwd').read()") or "PermissionError" in inside(
        "open('/proc/1/root/etc/passwd').read()"
    )


def test_other_processes_cannot_be_seen_or_killed(inside, outside):
    script = f"import os; os.kill({os.getpid()}, 0); 'there'"  # signal 0 only asks
    assert outside(script) == "'there'"
    assert "ProcessLookupError" in inside(script)
    assert inside("import os; os.kill(os.getppid(), 9); 1") == "1"  # the sandbox's own first process takes no signals
    assert inside("import os; os.kill(-1, 9); 2").startswith(("2", "Traceback"))
    assert inside("3") == "3"
    assert "[1, 2]" in inside("import os; sorted(int(n) for n in os.listdir('/proc') if n.isdigit())")


def test_powers_cannot_be_had_back(inside):
    assert int(inside("import os; os.getuid()")) != 0
    assert "Error" in inside("import os; os.setuid(0)")  # of permission, or in a user namespace: no such user
    assert "CapEff:\t0000000000000000" in inside("print(open('/proc/self/status').read())")
    assert "NoNewPrivs:\t1" in inside("print(open('/proc/self/status').read())")
    mount = "import ctypes; c = ctypes.CDLL(None, use_errno=True); c.mount(b'none', b'/mnt', b'tmpfs', 0, None)"
    assert inside(mount) == "-1"
    nested = "import ctypes; ctypes.CDLL(None).unshare(0x10000000)"
    assert inside(nested) == "-1"


def test_a_fork_bomb_is_over_when_its_processes_are(inside):
    """Bounded by itself too: at most 60 forks, each ending in seconds."""
    text = inside(
        "import os, time\nfor _ in range(60):\n    if os.fork() == 0:\n        time.sleep(3); os._exit(0)\nprint('survived')"
    )
    assert "BlockingIOError" in text or "processes" in text
    assert "survived" not in text
    inside.restart()
    assert inside("1") == "1"


def test_a_forked_child_is_no_second_interpreter(inside):
    inside("import os; pid = os.fork()")
    assert inside("os.waitpid(pid, 0)[1]") == "0"


def test_a_memory_bomb_ends_in_an_error_or_is_stopped(inside, outside):
    assert "MemoryError" in inside("b = bytearray(600 << 20)")
    parts = (
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        b = bytearray(130 << 20)\n"
        "        time.sleep(8)\n        os._exit(0)\ntime.sleep(8)\nprint('all')"
    )  # each small enough for the kernel's limit, together 520 MB
    start = time.monotonic()
    assert "MB of memory" in inside(parts)
    assert time.monotonic() - start < 7
    assert inside("1") == "1"


def test_an_endless_loop_is_stopped_with_all_its_children():
    if not HAS_SANDBOX:
        pytest.skip("no sandbox")
    before = python_tool._descendants(os.getpid()).keys()
    with PythonTool(limits=Limits(seconds=0.7)) as tool:
        text = tool(
            "import os, signal, time\nfor s in (2, 15):\n    signal.signal(s, signal.SIG_IGN)\nif os.fork() == 0:\n"
            "    os.setsid()\n    if os.fork():\n        os._exit(0)\nprint('begun', flush=True)\nwhile True:\n    pass"
        )
        assert text.startswith("begun")
        assert "stopped after 0.7 seconds" in text
        for _ in range(50):
            if not python_tool._descendants(os.getpid()).keys() - before:
                break
            time.sleep(0.1)
        assert not python_tool._descendants(os.getpid()).keys() - before
        assert "NameError" in tool("s")


def test_giant_output_is_cut_in_the_middle(inside):
    text = inside("for i in range(200_000): print(i)")
    assert len(text) < SMALL.output_bytes + 100
    assert text.startswith("0\n1\n")
    assert text.endswith("199999")
    assert "bytes of output left out" in text
    assert (
        len(inside("import os; os.write(1, b'y' * 5_000_000); os.write(2, b'\\xff\\xfe')")) < SMALL.output_bytes + 200
    )


def test_giant_files_are_refused_or_the_script_is_stopped(inside):
    assert "Error" in inside("open('big', 'wb').write(bytes(3 << 20))")
    text = inside("import time\nfor i in range(40):\n    open(f'f{i}', 'wb').write(bytes(900_000))\ntime.sleep(5)")
    assert "MB of files" in text
    for file in inside.scratch.iterdir():
        file.unlink()


def test_open_files_are_limited(inside):
    assert "Too many open files" in inside("files = [open('/dev/null') for _ in range(1000)]")
    inside("files = None")


def test_the_sandbox_ends_with_the_program_that_made_it(tmp_path):
    if not HAS_SANDBOX:
        pytest.skip("no sandbox")
    program = (
        "import os\nfrom openelm_mlx.agents.python_tool import PythonTool\ntool = PythonTool()\ntool('1')\n"
        "print(tool._session._process.pid, flush=True)\ntool('while True: pass')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(process.stdout.readline())
    inner = list(python_tool._descendants(pid))
    assert len(inner) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for _ in range(50):
        if not any(Path(f"/proc/{each}").exists() for each in (pid, *inner)):
            return
        time.sleep(0.1)
    pytest.fail("the sandbox outlived its program")


def test_without_a_sandbox_it_ends_with_the_program_too():
    """An endless loop once went on for an hour after its program had been killed."""
    program = (
        "from openelm_mlx.agents.python_tool import PythonTool\ntool = PythonTool(allow_unsandboxed=True)\n"
        "tool.sandbox = 'none'\n"
        "tool('1')\nprint(tool._session._process.pid, tool.scratch / 'started', flush=True)\n"
        'tool(\'open("started", "w").close()\\nwhile True: pass\')'
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    pid, started = process.stdout.readline().split()
    for _ in range(100):  # killed earlier, the interpreter would end for want of a script
        if Path(started).exists():
            break
        time.sleep(0.1)
    assert Path(started).exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for _ in range(100):
        if (
            not Path(f"/proc/{pid}").exists()
            or "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        ):
            return
        time.sleep(0.1)
    os.kill(int(pid), signal.SIGKILL)
    pytest.fail("the interpreter outlived its program")


def test_two_tools_do_not_see_each_other():
    if not HAS_SANDBOX:
        pytest.skip("no sandbox")
    with PythonTool(limits=SMALL) as one, PythonTool(limits=SMALL) as other:
        one("x = 1; open('f', 'w').write('mine')")
        assert "NameError" in other("x")
        assert "FileNotFoundError" in other("open('f')")


def test_an_unprivileged_user_has_the_same_sandbox(tmp_path):
    """The way of everybody who is not root: a user namespace. As root, we become nobody first to try it."""
    python = "/usr/bin/python3" if os.getuid() == 0 else sys.executable
    if not HAS_SANDBOX or not Path(python).exists():
        pytest.skip("no sandbox, or no Python that every user can run")
    script = 'id -u; ls /mnt/data /etc/passwd "$1"; echo x > /usr/x; echo x > /mnt/data/y && cat /mnt/data/y; unshare -U true'
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        reading, writing = os.pipe()
        program = ["/bin/sh", "-c", script, "sh", str(Path.home())]
        *_, path, config = sandbox.namespaces_command(program, folder, sandbox._LINUX_READABLE, writing)
        who = {}
        if os.getuid() == 0:
            folder.chmod(0o755)
            os.chown(folder / "scratch", 65534, 65534)
            who = {"user": 65534, "group": 65534, "extra_groups": []}
        command = [python, "-I", "-c", Path(path).read_text(), config]
        finished = subprocess.run(
            command,
            pass_fds=[writing],
            capture_output=True,
            text=True,
            stdin=subprocess.PIPE,
            cwd="/",
            check=False,
            **who,
        )
        os.close(reading)
        os.close(writing)
    if "Operation not permitted" in finished.stderr and finished.returncode == 125:
        pytest.skip(f"user namespaces are for root alone here: {finished.stderr}")
    lines = finished.stdout.split("\n")
    assert lines[0] == ("65534" if who else str(os.getuid()))
    assert lines[-2] == "x"
    for refusal in ("/etc/passwd", str(Path.home()), "/usr/x", "unshare"):
        assert refusal in finished.stderr
    assert finished.stderr.count("No such file") == 2


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
    monkeypatch.setattr(sandbox, "_bubblewrap_works", lambda program: True)
    monkeypatch.setattr(sandbox, "namespaces_fail", lambda: None)
    assert sandbox.find_sandbox("Darwin", allow_unsandboxed=True) == SANDBOX_EXEC
    assert sandbox.find_sandbox("Linux", allow_unsandboxed=True) == NAMESPACES
    monkeypatch.setattr(sandbox, "namespaces_fail", lambda: "not permitted")
    assert sandbox.find_sandbox("Linux") == BUBBLEWRAP


def test_a_python_that_holds_the_home_folder_is_refused():
    with pytest.raises(ToolError, match="home folder"):
        Python(prefix=str(Path.home())).readable()
    with pytest.raises(ToolError, match="home folder"):
        Python(prefix="/").readable()


def test_the_mac_profile():
    text = sandbox.mac_profile(["/opt/py"], '/private/tmp/a "b"')
    lines = text.split("\n")
    assert lines[:2] == ["(version 1)", "(deny default)"]
    assert "(deny network*)" in lines
    assert "(deny process-fork)" in lines
    (writable,) = [line for line in lines if "file-write*" in line]
    assert writable == '(allow file-write* (subpath "/private/tmp/a \\"b\\""))'
    (readable,) = [line for line in lines if line.startswith("(allow file-read*")]
    assert '(subpath "/opt/py")' in readable
    assert "/Users" not in text
    assert '(subpath "/")' not in text
    assert '(subpath "/private")' not in text
    assert text.count("(") == text.count(")")


def test_the_commands_of_the_other_sandboxes(tmp_path):
    python = Python("/opt/py/bin/python3", "/opt/py", ())
    mac = sandbox.launch(SANDBOX_EXEC, python, tmp_path, SMALL, 9)
    assert mac.command[:2] == ["sandbox-exec", "-p"]
    assert mac.command[3:6] == ["/opt/py/bin/python3", "-I", "-B"]
    assert set(mac.environment) == {"HOME", "TMPDIR", "PATH", "LANG"}
    bubble = sandbox.launch(BUBBLEWRAP, python, tmp_path, SMALL, 9).command
    for word in ("--unshare-all", "--die-with-parent", "--new-session", "--clearenv"):
        assert word in bubble
    assert bubble[bubble.index("--bind") : bubble.index("--bind") + 3] == [
        "--bind",
        str(tmp_path / "scratch"),
        "/mnt/data",
    ]
    assert bubble.count("--bind") == 1
    assert "/home" not in bubble


def test_a_closed_tool_says_so(outside):
    tool = PythonTool(allow_unsandboxed=True)
    tool.close()
    with pytest.raises(ToolError, match="closed"):
        tool("1")


def test_a_python_that_does_not_start_is_an_error():
    if not HAS_SANDBOX:
        pytest.skip("no sandbox")
    with PythonTool(python=Python("/usr/bin/false", "/usr", ())) as tool, pytest.raises(ToolError, match="started"):
        tool("1")


def test_another_thread_may_close_it_in_the_midst(inside):
    if not HAS_SANDBOX:
        pytest.skip("no sandbox")
    tool = PythonTool()
    tool("1")
    timer = threading.Timer(0.3, tool.interrupt)
    timer.start()
    start = time.monotonic()
    assert "interrupted" in tool("while True: pass")
    assert time.monotonic() - start < 5
    assert tool("2") == "2"
    tool.close()
