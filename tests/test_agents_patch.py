"""apply_patch: what it changes, that it stays in its folder, and that it is all or nothing."""

import json
import os
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx.agents import patch as patches
from openelm_mlx.agents.patch import PatchTool, apply_patch, parse_patch, patched
from openelm_mlx.errors import ToolError

CODE = "import os\n\n\ndef f(x):\n    y = 1\n    return x + y\n\n\ndef g(x):\n    y = 1\n    return x - y\n"


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a.py").write_text(CODE)
    (inside / "b.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "outside.txt").write_text("untouched\n")
    return inside


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def wrap(*lines: str) -> str:
    return "\n".join(["*** Begin Patch", *lines, "*** End Patch"])


def test_files_are_added_changed_moved_and_deleted(folder):
    report = apply_patch(
        wrap(
            "*** Add File: new/deep/c.txt", "+hello", "+", "+world",
            "*** Update File: a.py", "@@ def g(x):", "     y = 1", "-    return x - y", "+    return x * y",
            "*** Update File: b.txt", "*** Move to: d.txt", "@@", " one", "-two", "+2", " three", "+four",
            "*** Delete File: a.py.bak",
        ).replace("*** Delete File: a.py.bak\n", ""),
        folder,
    )  # fmt: skip
    assert report == ["A new/deep/c.txt", "M a.py", "R b.txt -> d.txt"]
    assert snapshot(folder) == {
        "a.py": CODE.replace("x - y", "x * y").encode(),
        "d.txt": b"one\n2\nthree\nfour\n",
        "new/deep/c.txt": b"hello\n\nworld\n",
    }
    assert apply_patch(wrap("*** Delete File: d.txt"), folder) == ["D d.txt"]
    assert not (folder / "d.txt").exists()


def test_the_tool_takes_json_or_the_bare_patch(folder):
    tool = PatchTool(folder)
    text = wrap("*** Add File: x", "+1")
    assert tool(json.dumps({"patch": text})) == "A x"
    assert tool(text.replace("File: x", "File: y")) == "A y"
    assert tool({"patch": text.replace("File: x", "File: z")}) == "A z"
    for arguments in ("[]", "{", '{"patch": 3}', '{"text": ""}', "3"):
        with pytest.raises(ToolError):
            tool(arguments)
    with pytest.raises(ToolError, match="no folder"):
        PatchTool(folder / "nowhere")
    assert tool.parameters["required"] == ["patch"]


@pytest.mark.parametrize(
    "path", ["../outside.txt", "/etc/passwd", "x/../../outside.txt", "~/x", "", "c:x", "..\\x", "."]
)
@pytest.mark.parametrize("action", ["*** Add File: ", "*** Delete File: ", "*** Update File: "])
def test_paths_stay_in_the_folder(folder, path, action):
    before, outside = snapshot(folder), snapshot(folder.parent)
    body = {"*** Add File: ": ["+x"], "*** Update File: ": ["@@", "-untouched", "+touched"]}.get(action, [])
    with pytest.raises(ToolError):
        apply_patch(wrap("*** Add File: first", "+x", action + path, *body), folder)
    with pytest.raises(ToolError):
        apply_patch(wrap("*** Update File: b.txt", f"*** Move to: {path}", "@@", " one"), folder)
    assert (snapshot(folder), snapshot(folder.parent)) == (before, outside)


def test_links_are_not_followed(folder):
    (folder / "link").symlink_to(folder.parent / "outside.txt")
    (folder / "links").symlink_to(folder.parent)
    (folder / "dangling").symlink_to(folder.parent / "made.txt")
    for lines in (
        ["*** Update File: link", "@@", "-untouched", "+touched"],
        ["*** Delete File: link"],
        ["*** Add File: links/x", "+x"],
        ["*** Update File: links/outside.txt", "@@", "-untouched", "+touched"],
        ["*** Add File: dangling", "+x"],
        ["*** Update File: b.txt", "*** Move to: links/b.txt", "@@", " one"],
    ):
        with pytest.raises(ToolError, match="link"):
            apply_patch(wrap(*lines), folder)
    assert (folder.parent / "outside.txt").read_text() == "untouched\n"
    assert not (folder.parent / "made.txt").exists()
    assert not (folder.parent / "x").exists()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["*** Update File: b.txt", "@@", "-four", "+4"], "does not have these lines"),
        (["*** Update File: b.txt", "@@ nowhere", " two"], "no line 'nowhere'"),
        (["*** Update File: b.txt", "@@", "-one", "+1", "*** End of File"], "at its end"),
        (["*** Update File: c.txt", "@@", "-one"], "no file c.txt"),
        (["*** Delete File: c.txt"], "no file c.txt"),
        (["*** Add File: b.txt", "+x"], "already"),
        (["*** Update File: b.txt", "*** Move to: a.py", "@@", " one"], "already"),
        (["*** Add File: c.txt", "x"], "'+'"),
        (["*** Update File: b.txt", "@@", "x"], "' ', '+' or '-'"),
        (["*** Update File: b.txt"], "nothing"),
        (["*** Change File: b.txt"], "Line 6"),
        ([], "no file"),
    ],
)
def test_a_patch_that_does_not_fit_says_why_and_changes_nothing(folder, lines, says):
    before = snapshot(folder)
    with pytest.raises(ToolError, match=says.replace("+", r"\+")):
        apply_patch(
            wrap("*** Update File: a.py", "@@", "-import os", "+import sys", *lines) if lines else wrap(), folder
        )
    assert snapshot(folder) == before


def test_without_its_frame_it_is_no_patch(folder):
    for text in (
        "",
        "x",
        "*** Begin Patch",
        "*** Begin Patch\n*** Delete File: b.txt",
        "*** Delete File: b.txt\n*** End Patch",
    ):
        with pytest.raises(ToolError, match="Patch"):
            apply_patch(text, folder)


def test_a_failure_in_writing_is_rolled_back(folder, monkeypatch):
    before = snapshot(folder)
    replace, count = os.replace, []

    def failing(source, target):
        count.append(target)
        if len(count) == 3:
            raise OSError(28, "No space left on device", str(target))
        return replace(source, target)

    monkeypatch.setattr(patches.os, "replace", failing)
    text = wrap(
        "*** Update File: a.py", "@@", "-import os", "+import sys", "*** Add File: new/x", "+x",
        "*** Update File: b.txt", "@@", "-two", "+2",
    )  # fmt: skip
    with pytest.raises(ToolError, match="No space left"):
        apply_patch(text, folder)
    assert snapshot(folder) == before
    assert not (folder / "new").exists()
    assert not [path for path in folder.rglob("*") if path.name.startswith(".patch-")]


def test_line_ends_the_last_newline_and_permissions_are_kept(folder):
    (folder / "crlf").write_bytes(b"a\r\nb\r\nc\r\n")
    (folder / "bare").write_bytes(b"a\nb")
    (folder / "run").write_text("a\n")
    (folder / "run").chmod(0o750)
    apply_patch(
        wrap(
            "*** Update File: crlf", "@@", " a", "-b", "+B", "*** Update File: bare", "@@", "-b", "+B", "*** End of File",
            "*** Update File: run", "@@", "-a", "+b",
        ),
        folder,
    )  # fmt: skip
    assert (folder / "crlf").read_bytes() == b"a\r\nB\r\nc\r\n"
    assert (folder / "bare").read_bytes() == b"a\nB"
    assert (folder / "run").stat().st_mode & 0o777 == 0o750
    (folder / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ToolError, match="UTF-8"):
        apply_patch(wrap("*** Update File: binary", "@@", "+x"), folder)


def test_the_place_is_found_by_anchor_by_order_and_despite_spaces():
    text = patched(
        CODE, parse_patch(wrap("*** Update File: a", "@@ def g(x):", "-    y = 1", "+    y = 2"))[0].hunks, "a"
    )
    assert text == CODE[:60] + CODE[60:].replace("y = 1", "y = 2")
    twice = wrap("*** Update File: a", "@@", "-    y = 1", "+    y = 5", "@@", "-    y = 1", "+    y = 6")
    text = patched(CODE, parse_patch(twice)[0].hunks, "a")
    assert text == CODE.replace("y = 1", "y = 5", 1).replace("y = 1", "y = 6", 1)
    loose = parse_patch(wrap("*** Update File: a", "@@", " def f(x):  ", "-y = 1", "+    y = 7"))[0].hunks
    assert patched(CODE, loose, "a") == CODE.replace("y = 1", "y = 7", 1)
    append = parse_patch(wrap("*** Update File: a", "+# the end"))[0].hunks
    assert patched(CODE, append, "a") == CODE + "# the end\n"


LINES = st.lists(st.sampled_from(["a", "b", "  a", "", "c c"]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(LINES, LINES)
def test_a_patch_made_of_diff_s_output_gives_what_patch_gives(before, after):
    """Against the whole file as one place: old lines out, new lines in."""
    text = wrap("*** Update File: f", "@@", *[f"-{line}" for line in before], *[f"+{line}" for line in after])
    old, new = ("".join(f"{line}\n" for line in lines) for lines in (before, after))
    assert patched(old, parse_patch(text)[0].hunks, "f") == new


@pytest.mark.skipif(shutil.which("diff") is None, reason="no diff")
def test_places_of_diff_are_understood(tmp_path):
    before = [f"line {i}" for i in range(60)]
    after = [*before[:10], "new", *before[12:40], "LINE", *before[41:], "last"]
    for name, lines in (("old", before), ("new", after)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    diff = subprocess.run(
        ["diff", "-u", "old", "new"], cwd=tmp_path, capture_output=True, text=True, check=False
    ).stdout
    text = wrap("*** Update File: old", *diff.split("\n")[2:-1])
    apply_patch(text, tmp_path)
    assert (tmp_path / "old").read_text() == (tmp_path / "new").read_text()
