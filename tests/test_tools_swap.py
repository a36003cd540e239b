"""A patch is applied as a whole or not at all: interrupted at every call of the system, and at any moment."""

import itertools
import os
import random
import signal
import threading
from pathlib import Path

import pytest

from openelm_mlx.errors import ToolError
from openelm_mlx.tools import paths, swap
from openelm_mlx.tools.patch import PatchTool, apply_patch

PATCH = "\n".join(
    [
        "*** Begin Patch",
        "*** Update File: a.py", "@@", "-one", "+1",
        "*** Add File: new/deep/n.txt", "+n",
        "*** Update File: run.sh", "*** Move to: moved/run.sh", "@@", " echo", "+echo 2",
        "*** Update File: plain.txt", "*** Move to: plain2.txt",
        "*** Delete File: gone.txt",
        "*** Delete File: was_file", "*** Add File: was_file/inside", "+x",
        "*** Update File: twice.txt", "@@", "-1", "+one", "*** Update File: twice.txt", "@@", "-2", "+two",
        "*** End Patch",
    ]
)  # fmt: skip
REPORT = [
    "M a.py", "A new/deep/n.txt", "R run.sh -> moved/run.sh", "R plain.txt -> plain2.txt", "D gone.txt", "D was_file",
    "A was_file/inside", "M twice.txt",
]  # fmt: skip


def make(folder: Path) -> Path:
    folder.mkdir()
    modes = {
        "a.py": 0o600,
        "run.sh": 0o755,
        "plain.txt": 0o640,
        "gone.txt": 0o604,
        "was_file": 0o644,
        "twice.txt": 0o711,
    }
    texts = {"a.py": "one\ntwo\n", "run.sh": "echo\n", "twice.txt": "1\n2\n"}
    for name, mode in modes.items():
        (folder / name).write_text(texts.get(name, f"{name}\n"))
        (folder / name).chmod(mode)
    return folder


def state(folder: Path) -> dict[str, tuple]:
    """Everything that a person could miss: contents, permissions, which file it is, how many names it has."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (
            content,
            status.st_mode,
            status.st_ino,
            status.st_nlink if content else 0,
        )
    return found


def contents(found: dict[str, tuple]) -> dict[str, tuple]:
    """Contents and permissions alone."""
    return {name: each[:2] for name, each in found.items()}


class FailingOs:
    """The os module, with an error raised before or after the calls of these numbers."""

    def __init__(self, numbers: set[int], is_before: bool, error: BaseException) -> None:
        self.numbers, self.is_before, self.error = numbers, is_before, error
        self.names: list[str] = []

    def __getattr__(self, name: str):
        function = getattr(os, name)
        if not callable(function) or name in ("access", "fspath"):
            return function

        def call(*arguments, **options):
            self.names.append(name)
            number = len(self.names)
            if number in self.numbers and self.is_before:
                raise self.error
            try:
                result = function(*arguments, **options)
            except OSError:
                if number in self.numbers:
                    raise self.error from None
                raise
            if number in self.numbers:
                if name == "open":
                    os.close(result)
                raise self.error
            return result

        return call


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("after") / "folder")
    assert apply_patch(PATCH, folder) == REPORT
    return contents(state(folder))


def test_permissions_stay_through_updates_and_moves(after):
    assert after["a.py"] == (b"1\ntwo\n", 0o100600)
    assert after["moved/run.sh"] == (b"echo\necho 2\n", 0o100755)
    assert after["plain2.txt"] == (b"plain.txt\n", 0o100640)
    assert after["twice.txt"] == (b"one\ntwo\n", 0o100711)
    assert not {"run.sh", "plain.txt", "gone.txt"} & set(after)


def number_of_calls(tmp_path, monkeypatch) -> int:
    counting = FailingOs(set(), True, KeyboardInterrupt())
    monkeypatch.setattr(swap, "os", counting)
    apply_patch(PATCH, make(tmp_path / "counted"))
    return len(counting.names)


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_an_error_at_any_call_leaves_all_or_nothing(tmp_path, monkeypatch, after, error, is_before):
    total = number_of_calls(tmp_path, monkeypatch)
    assert total > 60
    outcomes = set()
    for number in range(1, total + 1):
        folder = make(tmp_path / f"{number}")
        before = state(folder)
        failing = FailingOs({number}, is_before, error)
        monkeypatch.setattr(swap, "os", failing)
        try:
            apply_patch(PATCH, folder)
            raised = None
        except (KeyboardInterrupt, MemoryError, ToolError) as caught:
            raised = caught
        monkeypatch.setattr(swap, "os", os)
        found = state(folder)
        if isinstance(error, OSError) and failing.names[number - 1] == "unlink":
            found = {name: each for name, each in found.items() if swap.TEMPORARY not in name}
        is_whole = contents(found) == after
        assert is_whole or contents(found) == contents(before), (number, failing.names[number - 1], found.keys())
        assert is_whole or found == before or isinstance(error, OSError)
        if isinstance(error, OSError):
            assert is_whole == (raised is None)
        else:
            assert type(raised) is type(error)
        outcomes.add(is_whole)
    assert outcomes == {True, False}


def test_interrupts_while_it_is_put_back(tmp_path, monkeypatch, after):
    total = number_of_calls(tmp_path, monkeypatch)
    numbers = random.Random(1)
    for attempt in range(250):
        folder = make(tmp_path / f"{attempt}")
        before = state(folder)
        first = numbers.randrange(1, total)
        chosen = {first, *(first + numbers.randrange(1, 30) for _ in range(numbers.randrange(1, 4)))}
        monkeypatch.setattr(swap, "os", FailingOs(chosen, numbers.random() < 0.5, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            apply_patch(PATCH, folder)
        monkeypatch.setattr(swap, "os", os)
        found = state(folder)
        assert found == before or contents(found) == after, (attempt, chosen, found.keys())


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers")
def test_ctrl_c_at_any_moment(tmp_path, after):
    """A real signal, whose handler raises as Ctrl-C's does, after a random time."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    numbers, outcomes = random.Random(2), []
    kept = signal.signal(signal.SIGALRM, interrupt)
    try:
        for attempt in range(150):
            folder = make(tmp_path / f"{attempt}")
            before = state(folder)
            try:
                signal.setitimer(signal.ITIMER_REAL, numbers.uniform(1e-5, 8e-3))
                apply_patch(PATCH, folder)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            found = state(folder)
            assert found == before or contents(found) == after, (attempt, found.keys())
            outcomes.append(found == before)
        assert signal.getsignal(signal.SIGALRM) is interrupt
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
    assert True in outcomes


def test_signals_are_left_alone_in_other_threads(tmp_path, after):
    folder, errors = make(tmp_path / "folder"), []

    def work():
        try:
            apply_patch(PATCH, folder)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert contents(state(folder)) == after


def test_volumes_without_links_are_used_too(tmp_path, monkeypatch, after):
    def no_links(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    folder = make(tmp_path / "folder")
    assert apply_patch(PATCH, folder) == REPORT
    assert contents(state(folder)) == after
    rename = os.rename
    for number in itertools.count():
        folder, calls = make(tmp_path / f"{number}"), []
        before = state(folder)

        def failing(source, target, number=number, calls=calls):
            calls.append(target)
            if len(calls) == number + 1:
                raise OSError(5, "Input/output error")
            return rename(source, target)

        monkeypatch.setattr(os, "rename", failing)
        try:
            apply_patch(PATCH, folder)
            break
        except ToolError as error:
            said = str(error)
        assert "Input/output error" in said
        assert contents(state(folder)) == contents(before)
    assert number > 5


# --- What else may stand in the way -----------------------------------------------------------------------------------


def patch_of(*lines: str) -> str:
    return "\n".join(["*** Begin Patch", *lines, "*** End Patch"])


EDIT = patch_of("*** Update File: a.py", "@@", "-one", "+1", "*** Add File: n", "+n")


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "folder")


def refused(folder, patch, says):
    before = state(folder)
    with pytest.raises(ToolError, match=says) as caught:
        apply_patch(patch, folder)
    assert state(folder) == before
    assert "\n" not in str(caught.value)


def test_what_changed_meanwhile_is_not_overwritten(folder, monkeypatch):
    prepare = swap._Swap.prepare

    def meanwhile(change):
        def prepared(self):
            prepare(self)
            change()

        monkeypatch.setattr(swap._Swap, "prepare", prepared)

    meanwhile(lambda: (folder / "a.py").write_text("mine, and longer\n"))
    with pytest.raises(ToolError, match=r"a\.py was changed meanwhile"):
        apply_patch(EDIT, folder)
    assert (folder / "a.py").read_text() == "mine, and longer\n"
    (folder / "a.py").write_text("one\n")
    meanwhile(lambda: (folder / "n").write_text("mine\n"))
    with pytest.raises(ToolError, match="n was created meanwhile"):
        apply_patch(EDIT, folder)
    assert (folder / "n").read_text() == "mine\n"
    assert (folder / "a.py").read_text() == "one\n"
    (folder / "n").unlink()
    meanwhile(lambda: (folder / "a.py").unlink())
    with pytest.raises(ToolError, match=r"a\.py was changed meanwhile"):
        apply_patch(EDIT, folder)
    assert not [name for name in os.listdir(folder) if name.startswith(swap.TEMPORARY)]


def test_a_file_made_in_the_last_moment_is_not_overwritten(folder, monkeypatch):
    link = os.link

    def late(source, target):
        if target.endswith("/n"):
            Path(target).write_text("mine\n")
        return link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ToolError, match="n: File exists"):
        apply_patch(EDIT, folder)
    assert (folder / "n").read_text() == "mine\n"
    assert (folder / "a.py").read_text() == "one\ntwo\n"


def test_what_is_no_file_is_refused(folder):
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    for path, says in (("sub", "is a folder"), ("pipe", "is not a file")):
        refused(folder, patch_of(f"*** Update File: {path}", "@@", "-x", "+y"), says)
        refused(folder, patch_of(f"*** Delete File: {path}"), says)
        refused(folder, patch_of(f"*** Add File: {path}", "+y"), says)
        refused(folder, patch_of("*** Update File: a.py", f"*** Move to: {path}", "@@", " one"), says)
    refused(folder, patch_of("*** Add File: a.py/x", "+y"), "Not a directory")
    refused(folder, patch_of("*** Update File: a.py/x", "@@", "-y"), "no file")


def test_write_protected_files_and_folders_are_left(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("a.py"))
    refused(folder, EDIT, r"a\.py is write-protected")
    refused(folder, patch_of("*** Delete File: a.py"), r"a\.py is write-protected")
    refused(folder, patch_of("*** Update File: a.py", "*** Move to: b.py", "@@", " one"), r"a\.py is write-protected")
    monkeypatch.undo()
    opened = os.open

    def read_only(path, flags, *mode):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    refused(folder, EDIT, "Permission denied")


@pytest.mark.parametrize(
    "path",
    ["n" * 300, "d/" + "n" * 300, "/".join(["d" * 200] * 40), "a\ud800b", "a\x1b[31mb", "a\0b", "a\u2028b"],
)
def test_names_that_no_file_can_have(folder, path):
    for lines in (
        ["*** Update File: a.py", "@@", "-one", "+1", f"*** Add File: {path}", "+x"],
        [f"*** Update File: {path}", "@@", "-x"],
        [f"*** Delete File: {path}"],
        ["*** Update File: a.py", f"*** Move to: {path}", "@@", "-one", "+1"],
    ):
        before = state(folder)
        with pytest.raises(ToolError) as caught:
            apply_patch(patch_of(*lines), folder)
        assert state(folder) == before
        str(caught.value).encode()
        assert len(str(caught.value)) < 500


def test_half_characters_are_refused_and_not_replaced(folder):
    refused(folder, patch_of("*** Update File: a.py", "@@", "-one", "+\ud83d"), "half of a surrogate pair")


@pytest.mark.parametrize(
    "path",
    [".git/config", ".env", "sub/.git/hooks/pre-commit", ".GIT/config", "./.git/x", "sub/./.env", "\u200c.git/x",
     ".g\u200cit/x", ".git", "node_modules/x.js", "Node_Modules/x.js"],
)  # fmt: skip
def test_hidden_files_are_not_there(folder, path):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]\n")
    (folder / ".env").write_text("SECRET=1\n")
    for lines in (
        [f"*** Add File: {path}", "+x"],
        [f"*** Update File: {path}", "@@", "-[core]", "+x"],
        [f"*** Delete File: {path}"],
        ["*** Update File: a.py", f"*** Move to: {path}", "@@", "-one", "+1"],
    ):
        refused(folder, patch_of(*lines), "hidden")


def test_hard_links_keep_their_own_content_and_come_back(folder, monkeypatch):
    os.link(folder / "a.py", folder / "other.py")
    before = state(folder)
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_patch(EDIT, folder)
    monkeypatch.undo()
    assert state(folder) == before
    apply_patch(EDIT, folder)
    assert (folder / "a.py").read_text() == "1\ntwo\n"
    assert (
        folder / "other.py"
    ).read_text() == "one\ntwo\n"  # perhaps not even in the folder: only what is named changes


def test_moves(folder):
    inode = (folder / "plain.txt").stat().st_ino
    os.utime(folder / "plain.txt", (1, 1))
    assert apply_patch(patch_of("*** Update File: plain.txt", "*** Move to: d/p.txt"), folder) == [
        "R plain.txt -> d/p.txt"
    ]
    moved = (folder / "d/p.txt").stat()
    assert (moved.st_ino, moved.st_mtime, moved.st_nlink) == (inode, 1, 1)  # the very same file
    # onto one that the patch deletes, back, around, and onto itself
    text = patch_of("*** Delete File: gone.txt", "*** Update File: run.sh", "*** Move to: gone.txt")
    assert apply_patch(text, folder) == ["R run.sh -> gone.txt"]
    assert (folder / "gone.txt").read_text() == "echo\n"
    assert (folder / "gone.txt").stat().st_mode & 0o777 == 0o755
    around = patch_of(
        "*** Update File: a.py", "*** Move to: t", "*** Update File: twice.txt", "*** Move to: a.py",
        "*** Update File: t", "*** Move to: twice.txt",
    )  # fmt: skip
    assert apply_patch(around, folder) == ["R twice.txt -> a.py", "R a.py -> twice.txt"]
    assert (folder / "a.py").read_text() == "1\n2\n"
    assert (folder / "a.py").stat().st_mode & 0o777 == 0o711
    assert (folder / "twice.txt").stat().st_mode & 0o777 == 0o600
    assert apply_patch(patch_of("*** Update File: a.py", "*** Move to: ./a.py"), folder) == ["unchanged: a.py"]
    refused(folder, patch_of("*** Update File: a.py", "*** Move to: twice.txt"), "already")


def test_a_patch_that_changes_nothing_says_so(folder):
    before = state(folder)
    for lines in (
        ["*** Update File: a.py", "@@", "-one", "+one"],
        ["*** Update File: a.py", "@@", " one"],
        ["*** Delete File: a.py", "*** Add File: a.py", "+one", "+two"],
        ["*** Update File: a.py", "@@", "-one", "+1", "*** Update File: a.py", "@@", "-1", "+one"],
        ["*** Update File: a.py", "*** Move to: b.py", "*** Update File: b.py", "*** Move to: a.py"],
    ):
        (report,) = apply_patch(patch_of(*lines), folder)
        assert report.startswith("unchanged: a.py")
        assert state(folder) == before
    assert PatchTool(folder)({"patch": patch_of("*** Update File: a.py", "@@", " one")}) == "unchanged: a.py"
    assert apply_patch(patch_of("*** Add File: x", "+x", "*** Delete File: x"), folder) == ["unchanged: x"]
    both = patch_of("*** Update File: a.py", "@@", " one", "*** Update File: twice.txt", "@@", "-1", "+one")
    assert apply_patch(both, folder) == ["M twice.txt"]


def test_new_files_follow_the_umask(folder):
    kept = os.umask(0o027)
    try:
        apply_patch(EDIT, folder)
    finally:
        os.umask(kept)
    assert (folder / "n").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="no extended attributes")
def test_extended_attributes_stay(folder):
    try:
        os.setxattr(folder / "a.py", "user.tag", b"blue")
    except OSError:
        pytest.skip("the volume has no extended attributes")
    apply_patch(patch_of("*** Update File: a.py", "*** Move to: b.py", "@@", "-one", "+1"), folder)
    assert os.getxattr(folder / "b.py", "user.tag") == b"blue"


def test_a_mac_copies_them_with_copyfile():
    calls = []

    class Libc:
        def copyfile(self, source, target, state, flags):
            calls.append((source, target, state, flags.value))

    swap.copy_attributes("/a", "/b", "darwin", Libc())
    assert calls == [(b"/a", b"/b", None, 5)]  # COPYFILE_ACL | COPYFILE_XATTR


# --- A volume on which Readme and README are one file -----------------------------------------------------------------


class FoldingOs:
    """The os module over a volume that finds a name in any case and in composed or decomposed letters."""

    def __init__(self) -> None:
        self.path = FoldingPath(self)

    def found(self, path):
        place = "/"
        for part in Path(os.path.abspath(path)).parts[1:]:
            try:
                names = os.listdir(place)
            except OSError:
                names = []
            place = os.path.join(
                place, next((each for each in names if paths._folded(each) == paths._folded(part)), part)
            )
        return place

    def rename(self, source, target):
        """To another spelling of itself it changes the spelling."""
        own = self.found(source)
        os.rename(own, target if self.found(target) == own else self.found(target))

    def __getattr__(self, name):
        function = getattr(os, name)
        if name in ("lstat", "open", "unlink", "mkdir", "rmdir", "listdir", "access"):
            return lambda path, *rest: function(self.found(path), *rest)
        if name in ("link", "replace"):
            return lambda source, target: function(self.found(source), self.found(target))
        return function


class FoldingPath:
    def __init__(self, folding):
        self.folding = folding

    def __getattr__(self, name):
        function = getattr(os.path, name)
        if name in ("lexists", "islink", "isdir"):
            return lambda path: function(self.folding.found(path))
        return function


@pytest.fixture
def one_case(monkeypatch):
    folding = FoldingOs()
    monkeypatch.setattr(swap, "os", folding)
    monkeypatch.setattr(paths, "os", folding)


def test_one_file_in_two_spellings_is_one_file(folder, one_case):
    (folder / "Readme").write_text("1\n2\n")
    (folder / "caf\u00e9.txt").write_text("x\n")
    text = patch_of(
        "*** Update File: README", "@@", "-1", "+one", "*** Update File: readme", "@@", "-2", "+two",
        "*** Update File: cafe\u0301.txt", "@@", "-x", "+y",
    )  # fmt: skip
    assert apply_patch(text, folder) == ["M Readme", "M caf\u00e9.txt"]
    assert (folder / "Readme").read_text() == "one\ntwo\n"
    refused(folder, patch_of("*** Add File: README", "+x"), "already")
    refused(folder, patch_of("*** Update File: a.py", "*** Move to: README", "@@", " one"), "already")
    refused(folder, patch_of("*** Add File: New", "+x", "*** Add File: NEW", "+y"), "File exists")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]\n")
    for path in (".GIT/config", ".giT/new", "\u200c.git/config"):
        refused(folder, patch_of(f"*** Add File: {path}", "+x"), "hidden")
    (folder / "Link").symlink_to(folder)
    refused(folder, patch_of("*** Add File: LINK/x", "+x"), "link")


def test_a_name_can_change_its_case_alone(folder, one_case):
    (folder / "Readme").write_text("1\n")
    inode = (folder / "Readme").stat().st_ino
    assert apply_patch(patch_of("*** Update File: Readme", "*** Move to: README"), folder) == ["R Readme -> README"]
    assert "README" in os.listdir(folder)
    assert "Readme" not in os.listdir(folder)
    assert (folder / "README").stat().st_ino == inode
    text = patch_of("*** Update File: README", "*** Move to: readme", "@@", "-1", "+2")
    assert apply_patch(text, folder) == ["R README -> readme"]
    assert (folder / "readme").read_text() == "2\n"
    assert not [name for name in os.listdir(folder) if name.startswith(swap.TEMPORARY)]


def test_changing_the_case_is_undone_too(folder, one_case, monkeypatch):
    (folder / "Readme").write_text("1\n")
    (folder / "Readme").chmod(0o600)
    before = state(folder)
    text = patch_of(
        "*** Update File: Readme", "*** Move to: README", "*** Add File: zz", "+x", "*** Add File: ZZ", "+x"
    )
    with pytest.raises(ToolError, match="File exists"):
        apply_patch(text, folder)
    assert state(folder) == before
