"""The python tool on macOS, as far as it can be held without one: the profile's text for each kind of Python, and what
libproc says of a process, given by a library in its place. The attacks themselves run in sandbox-exec on a Mac
(test_tools_sandbox.py)."""

import ctypes
import os
import re
import struct
from pathlib import Path

import pytest
from python_sandboxes import SMALL

from openelm_mlx.tools import python_process, sandbox, sandbox_mac, sandbox_usage
from openelm_mlx.tools.python_tool import PythonTool
from openelm_mlx.tools.sandbox import BUBBLEWRAP, NONE, SANDBOX_EXEC, Python

# Where each kind of Python has its interpreter, what it loads beside the system's libraries, and where links lead.
BREW, PORTS = "/opt/homebrew", "/opt/local/Library/Frameworks/Python.framework/Versions/3.13"
CELLAR = f"{BREW}/Cellar/python@3.13/3.13.5/Frameworks/Python.framework/Versions/3.13"
PYTHON_ORG = "/Library/Frameworks/Python.framework/Versions/3.13"
UV = "/Users/ada/.local/share/uv/python/cpython-3.13.5-macos-aarch64-none"
KINDS = {
    "python.org": (PYTHON_ORG, f"{PYTHON_ORG}/bin/python3.13", [f"{PYTHON_ORG}/lib/libssl.3.dylib"]),
    "homebrew": (
        CELLAR,
        f"{CELLAR}/bin/python3.13",
        [f"{BREW}/opt/openssl@3/lib/libssl.3.dylib", f"{BREW}/opt/sqlite/lib/libsqlite3.0.dylib"],
    ),
    "macports": (
        PORTS,
        f"{PORTS}/bin/python3.13",
        ["/opt/local/lib/libintl.8.dylib", "/opt/local/lib/liblzma.5.dylib"],
    ),
    "uv": (UV, f"{UV}/bin/python3.13", [f"{UV}/lib/libpython3.13.dylib"]),
    "pyenv": (
        "/Users/ada/.pyenv/versions/3.13.5",
        "/Users/ada/.pyenv/versions/3.13.5/bin/python3.13",
        [f"{BREW}/opt/xz/lib/liblzma.5.dylib", "/Users/ada/own/lib/libffi.8.dylib"],
    ),
}
SYSTEM = ["/usr/lib/libSystem.B.dylib", "/System/Library/Frameworks/CoreFoundation.framework/CoreFoundation"]


def profile_of(kind, monkeypatch, folder="/private/tmp/x/scratch"):
    prefix, executable, libraries = KINDS[kind]
    monkeypatch.setattr(sandbox.Path, "home", lambda: Path("/Users/ada"))
    python = Python(
        executable, prefix, ("/Users/ada/venv/lib/python3.13/site-packages",), lambda path: libraries + SYSTEM
    )
    return sandbox_mac.profile(python.readable(), python.programs(), folder)


def rules(text):
    """The profile's rules as (what it does, which operation, the line), in order; the last one that matches wins."""
    return [(*re.match(r"\((\w+) (\S+?)[ )]", line).groups(), line) for line in text.splitlines()]


def readable_by(text, path):
    """Whether a profile lets a file be read, by its subpaths."""
    (line,) = [line for action, operation, line in rules(text) if (action, operation) == ("allow", "file-read*")]
    return any(f"{path}/".startswith(f"{folder}/") for folder in re.findall(r'\(subpath "([^"]*)"\)', line))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_python_can_read_what_it_loads_and_no_more(kind, monkeypatch):
    text = profile_of(kind, monkeypatch)
    prefix, executable, libraries = KINDS[kind]
    for path in (executable, f"{prefix}/lib/python3.13/os.py", *libraries, *SYSTEM, "/private/tmp/x/scratch/a"):
        assert readable_by(text, path), path
    for path in (
        "/Users/ada/.zshrc", "/Users/ada/.ssh/id_ed25519", "/Users/ada/own/notes.txt", "/etc/passwd", "/private/etc/passwd",
        "/opt/homebrew/var/postgres/data", "/opt/homebrew/etc/my.cnf", "/opt/local/etc/x", "/opt/local/var/db", "/Library/x",
        "/private/tmp/x/other", "/private/tmp/x",
    ):  # fmt: skip
        assert not readable_by(text, path), path
    (programs,) = [line for action, operation, line in rules(text) if (action, operation) == ("allow", "process-exec")]
    assert f'(subpath "{prefix}")' in programs
    assert "/opt/homebrew/opt" not in programs


def test_homebrews_libraries_may_need_others_of_its(monkeypatch):
    """What a library is linked to in turn is found by links from `opt` into the Cellar."""
    text = profile_of("homebrew", monkeypatch)
    assert readable_by(text, "/opt/homebrew/Cellar/openssl@3/3.5.1/lib/libcrypto.3.dylib")
    assert readable_by(text, "/opt/homebrew/opt/readline/lib/libreadline.8.dylib")
    assert readable_by(profile_of("macports", monkeypatch), "/opt/local/libexec/openssl3/lib/libssl.3.dylib")
    assert not readable_by(profile_of("uv", monkeypatch), "/opt/homebrew/opt/readline/lib/libreadline.8.dylib")


def test_links_and_their_ends_are_both_readable():
    folders = sandbox_mac.libraries_readable(
        ["/a/link/lib.dylib", "/usr/lib/libz.dylib"], real=lambda path: path.replace("/a/link", "/b/real")
    )
    assert folders == ["/a/link", "/b/real"]


def test_the_order_of_the_rules(monkeypatch):
    """In a profile the last rule that matches wins; and what is known of other processes is not in "default"."""
    text = profile_of("python.org", monkeypatch)
    order = [(action, operation) for action, operation, _ in rules(text)]
    assert [line for *_, line in rules(text)][:2] == ["(version 1)", "(deny default)"]
    system = order.index(("import", '"system.sb"'))
    for denied in ("network*", "process-fork", "process-info*"):
        assert order.index(("deny", denied)) > system, denied
        assert order.count(("deny", denied)) == 1
    assert order.index(("allow", "process-info*")) > order.index(("deny", "process-info*"))
    assert "(allow process-info* (target self))" in text
    assert '(deny sysctl-read (sysctl-name-regex #"procargs"))' in text
    assert order.index(("deny", "sysctl-read")) > order.index(("allow", "sysctl-read"))
    assert not [
        line for action, operation, line in rules(text) if action == "allow" and operation.startswith("network")
    ]
    assert text.count("(") == text.count(")")


def test_one_folder_can_be_written_whatever_its_name(monkeypatch):
    text = profile_of("uv", monkeypatch, '/private/tmp/a "b"')
    writable = [line for _, operation, line in rules(text) if operation.startswith("file-write")]
    assert writable == [
        '(allow file-write* (subpath "/private/tmp/a \\"b\\""))',
        '(allow file-write-data (literal "/dev/null"))',
    ]
    for whole in ("/", "/private", "/Users", "/Users/ada", "/opt"):
        assert f'(subpath "{whole}")' not in text


def test_this_interpreters_libraries_are_found():
    """The question that each interpreter is asked, asked here."""
    found = sandbox.linked_libraries(os.path.realpath(sandbox.sys.executable))
    assert any("ssl" in path for path in found)
    assert all(Path(path).is_file() for path in found)
    assert sandbox.linked_libraries("/usr/bin/false") == ()
    assert sandbox.linked_libraries("/nowhere/python") == ()


def test_the_commands_of_the_sandboxes(tmp_path):
    python = Python("/opt/py/bin/python3", "/opt/py", (), lambda path: ())
    mac = sandbox.interpreter(SANDBOX_EXEC, python, tmp_path, SMALL, 9, "token")
    assert mac.command[:2] == ["sandbox-exec", "-p"]
    assert mac.command[3:6] == ["/opt/py/bin/python3", "-I", "-B"]
    assert set(mac.environment) == {"HOME", "TMPDIR", "PATH", "LANG"}
    assert mac.environment["HOME"] == os.path.realpath(tmp_path / "scratch")
    bubble = sandbox.box(BUBBLEWRAP, python, tmp_path, SMALL, 9)
    for word in ("--unshare-net", "--unshare-pid", "--die-with-parent", "--new-session", "--clearenv"):
        assert word in bubble
    size = bubble.index("--size")
    assert bubble[size : size + 6] == ["--size", str(4 << 20), "--perms", "0700", "--tmpfs", "/mnt/data"]
    assert "--bind" not in bubble
    assert "/home" not in bubble


# --- What a process takes ---------------------------------------------------------------------------------------------


class Libproc:
    """libproc with one process, 7, that holds files open: (device, inode, links, blocks)."""

    def __init__(self, files):
        self.files = list(files)

    def proc_pidinfo(self, pid, flavor, argument, buffer, size):
        assert (flavor, argument.value) == (1, 0)
        if pid != 7:
            return 0
        listed = b"".join(struct.pack("=iI", number, 1) for number in range(len(self.files))) + struct.pack(
            "=iI", 99, 2
        )
        ctypes.memmove(buffer, listed, len(listed))
        return len(listed)

    def proc_pidfdinfo(self, pid, descriptor, flavor, buffer, size):
        assert (flavor, size) == (1, 24 + 136 + 16)
        device, inode, links, blocks = self.files[descriptor]
        stat = struct.pack("=IHHQII8qqqIIII2q", device, 0o100600, links, inode, 1, 1, *range(8), 1, blocks, *range(6))
        assert len(stat) == 136
        struct.pack_into("=24s136s", buffer, 0, b"f" * 24, stat)
        return size


def test_files_without_a_name():
    library = Libproc([(1, 10, 0, 2048), (1, 11, 1, 4096), (1, 12, 0, 8), (1, 10, 0, 2048)])
    assert sandbox_mac.deleted_files(7, library) == {(1, 10): 1 << 20, (1, 12): 4096}
    assert sandbox_mac.deleted_files(8, library) == {}
    assert sandbox_mac.deleted_files(7, object()) == {}


def test_a_script_over_its_footprint_is_stopped(monkeypatch):
    """Nothing else limits memory there: RLIMIT_AS is refused, and there is no /proc."""
    footprints = {"now": 100 << 20}
    grow = "import time; open('grown', 'w').close(); time.sleep(15)"
    monkeypatch.setattr(python_process.sandbox_usage, "IS_MAC", True)
    with PythonTool(limits=SMALL, sandbox=NONE) as tool:
        # Between two scripts memory is watched too: it grows when the script itself says so.
        grown = tool.scratch / "grown"
        monkeypatch.setattr(
            python_process.sandbox_usage, "footprint", lambda pid: footprints["now"] if grown.exists() else 100 << 20
        )
        assert tool("1") == "1"
        footprints["now"] = 401 << 20
        assert "more than 419 MB of memory" in tool(grow)
        grown.unlink()
        assert tool("2") == "2"
        footprints["now"] = None
        assert "does not report its memory" in tool(grow)


@pytest.mark.skipif(sandbox_usage.IS_MAC, reason="has its own footprint")
def test_a_library_of_the_system_that_is_not_there_is_no_footprint():
    assert sandbox_usage.footprint(os.getpid()) is None


@pytest.mark.skipif(not sandbox_usage.IS_MAC, reason="asks a Mac")
def test_a_mac_says_its_own_footprint():
    before = sandbox_usage.footprint(os.getpid())
    kept = bytearray(b"x") * (200 << 20)
    assert sandbox_usage.footprint(os.getpid()) - before > 150 << 20
    assert len(kept) == 200 << 20
