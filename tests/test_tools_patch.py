"""apply_patch: what it changes, that it stays in its folder, and that it is all or nothing."""

import json
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx.errors import ToolError
from openelm_mlx.tools import document
from openelm_mlx.tools.document import Document
from openelm_mlx.tools.patch import PatchTool, apply_patch, parse_patch

CODE = "import os\n\n\ndef f(x):\n    y = 1\n    return x + y\n\n\ndef g(x):\n    y = 1\n    return x - y\n"


def patched(text: str, hunks, path: str) -> str:
    """The text with its hunks applied one after the other."""
    document = Document(text)
    document.apply(hunks, path)
    return document.text


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
    with pytest.raises(ToolError, match="not a folder"):
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
        (["*** Update File: b.txt"], "has no changes for it"),
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


# --- What a patch does not name, byte for byte ------------------------------------------------------------------------


def update(*lines: str) -> str:
    return wrap("*** Update File: f", *lines)


@pytest.mark.parametrize(
    ("before", "lines", "after"),
    [
        (b"a\r\nb\nc\r\nd", ["@@", "-b", "+B"], b"a\r\nB\nc\r\nd"),  # mixed ends
        (b"a\r\nb\nc\r\n", ["@@", "-a", "+A", "@@", " c", "+d"], b"A\r\nb\nc\r\nd\r\n"),
        (b"a  \nb\t\nc\n", ["@@", " a", "-b", "+B", " c"], b"a  \nB\nc\n"),  # spaces at line ends
        (b"x \nx\nx  \n", ["@@", " x ", " x", "-x  ", "+y"], b"x \nx\ny\n"),
        (b"a\nb", ["@@", "-a", "+A"], b"A\nb"),  # no newline at the end
        (b"a\nb", ["@@", "-b"], b"a\n"),
        (b"a\nb", ["@@", " b", "+c"], b"a\nb\nc"),
        (b"a\r\nb", ["@@", " b", "+c"], b"a\r\nb\r\nc"),
        (b"a\n", ["@@", "-a"], b""),
        (b"", ["+a"], b"a\n"),
        (b"a\n\n\n", ["@@", "-a", "+b"], b"b\n\n\n"),
        (b"\xef\xbb\xbfa\nb\n", ["@@", "-a", "+A"], b"\xef\xbb\xbfA\nb\n"),  # a BOM
        (b"\xef\xbb\xbf", ["+a"], b"\xef\xbb\xbfa\n"),
        (b"a\rb\nc\x0bd\ne\xe2\x80\xa8f\n", ["@@", "-c\x0bd", "+C"], b"a\rb\nC\ne\xe2\x80\xa8f\n"),
        (b"a\nb\n", ["@@", " a", "+new\r"], b"a\nnew\r\nb\n"),  # "\r" is said, and so it is meant
        (b"a\r\nb\r\n", ["@@", " a\r", "-b\r", "+B\r"], b"a\r\nB\r\n"),
        (b"a\nb\nb\n", ["@@", "-b", "+c", "*** End of File"], b"a\nb\nc\n"),
    ],
)
def test_only_what_is_named_changes(tmp_path, before, lines, after):
    (tmp_path / "f").write_bytes(before)
    apply_patch(update(*lines), tmp_path)
    assert (tmp_path / "f").read_bytes() == after


def test_a_patch_with_windows_line_ends_is_the_same_patch(tmp_path):
    text = wrap("*** Update File: f", "@@", " a", "-b", "+B", "", "*** Add File: g", "+1", "+2").replace("\n", "\r\n")
    for content, expected in ((b"a\nb\n\n", b"a\nB\n\n"), (b"a\r\nb\r\n\r\n", b"a\r\nB\r\n\r\n")):
        (tmp_path / "f").write_bytes(content)
        (tmp_path / "g").unlink(missing_ok=True)
        apply_patch(text, tmp_path)
        assert (tmp_path / "f").read_bytes() == expected
        assert (tmp_path / "g").read_bytes() == b"1\n2\n"


def reference(before: bytes, edits: list[tuple[int, list[tuple[str, str]]]]) -> bytes:
    """What the edits, (number of a line, marked lines), give: slowly, and one line after the other."""
    whole = before.split(b"\n")
    lines = [line + b"\n" for line in whole[:-1]] + ([whole[-1]] if whole[-1] else [])
    crlf = sum(line.endswith(b"\r\n") for line in lines) * 2 > sum(line.endswith(b"\n") for line in lines)
    usual = b"\r\n" if crlf else b"\n"

    def end_of(line: bytes) -> bytes:
        return b"\r\n" if line.endswith(b"\r\n") else b"\n" if line.endswith(b"\n") else usual

    done: list[tuple[bytes, bool]] = []
    at = 0
    for start, marked in edits:
        done += [(line, False) for line in lines[at:start]]
        at = start
        for mark, content in marked:
            if mark == "+":
                near = lines[at - 1] if at else lines[0] if lines else b""
                done.append((content.encode() + end_of(near), True))
            else:
                done += [(lines[at], False)] if mark == " " else []
                at += 1
    done += [(line, False) for line in lines[at:]]
    result = b""
    for number, (line, is_new) in enumerate(done):
        is_last = number == len(done) - 1
        if is_last and is_new and lines and not lines[-1].endswith(b"\n"):
            line = line.removesuffix(b"\n").removesuffix(b"\r")
        elif not is_last and not line.endswith(b"\n"):
            line += usual
        result += line
    return result


WORDS = st.sampled_from(["a", "b ", "  a", "", "c c", "\u00e9\u2028", "x\ty", "+", "-", "@@ f", "*** b"])


@st.composite
def edited(draw) -> tuple[bytes, list, list[str]]:
    """A file, edits to it, and the lines of a patch that says the same; unique lines, so that places are certain."""
    count = draw(st.integers(1, 25))
    texts = [f"{i}{draw(WORDS)}" for i in range(count)]
    ends = [draw(st.sampled_from(["\n", "\n", "\r\n"])) for _ in texts]
    ends[-1] = draw(st.sampled_from([ends[-1], ""]))
    edits, patch, at = [], [], 0
    while at < count and draw(st.booleans()):
        start = draw(st.integers(at, count - 1))
        marked = []
        at = start
        for mark in draw(st.lists(st.sampled_from(" -+"), min_size=1, max_size=6)):
            if mark == "+":
                marked.append((mark, draw(WORDS)))
            elif at < count:
                marked.append((mark, texts[at]))
                at += 1
        if all(mark == "+" for mark, _ in marked):
            marked.insert(0, (" ", texts[start]))
            at = start + 1
        edits.append((start, marked))
        patch += ["@@", *[mark + text for mark, text in marked]]
    return "".join(t + e for t, e in zip(texts, ends, strict=True)).encode(), edits, patch


@settings(max_examples=400, deadline=None)
@given(edited())
def test_any_patch_does_what_a_slow_applier_does(case):
    before, edits, lines = case
    if not lines:
        return
    hunks = parse_patch(update(*lines))[0].hunks
    assert patched(before.decode(), hunks, "f").encode() == reference(before, edits)


PIECES = st.sampled_from(
    [
        *("*** Begin Patch", "*** End Patch", "*** Update File: b.txt", "*** Add File: n", "*** Delete File: b.txt"),
        *("*** Move to: m", "*** End of File", "@@", "@@ two", " one", "-two", "+2", " three", "", "+", "-", "x"),
        *("*** ", "\r", "+\ud800", "*** Update File: "),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=14))
def test_any_lines_give_a_report_or_a_sentence(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("any")
    (folder / "b.txt").write_text("one\ntwo\nthree\n")
    try:
        report = apply_patch(wrap(*lines), folder)
    except ToolError:
        report = None
    assert report if report is not None else snapshot(folder) == {"b.txt": b"one\ntwo\nthree\n"}


def test_large_patches_take_as_long_as_they_are(tmp_path, monkeypatch):
    """Lines are compared once for each kind of comparison, not once for each place."""
    count = 3000
    (tmp_path / "f").write_text("".join(f"line {i} \n" for i in range(count)))
    compared = []
    cleaned = tuple(lambda line, clean=clean: compared.append(1) or clean(line) for clean in document._CLEANED)
    monkeypatch.setattr(document, "_CLEANED", cleaned)
    places = [["@@", f" line {i}", f"-line {i + 1}", "+x"] for i in range(0, count, 3)]
    apply_patch(update(*[line for place in places for line in place]), tmp_path)
    assert len(compared) < 8 * count
    assert (tmp_path / "f").read_text().count("x\n") == count // 3
    compared.clear()
    sections = [["*** Update File: f", *place[:2], "-line " + place[2][6:], "+y"] for place in places]
    (tmp_path / "f").write_text("".join(f"line {i}\n" for i in range(count)))
    apply_patch(wrap(*[line for section in sections for line in section]), tmp_path)
    assert len(compared) < 8 * count
    (tmp_path / "f").write_text("a\nb\n" * count)
    with pytest.raises(ToolError, match="does not have these lines"):
        apply_patch(update("@@", *["-a", "-b"] * 500, "-a", "-a"), tmp_path)


def test_files_too_large_are_refused(tmp_path):
    (tmp_path / "f").write_text("a\n" * (2 << 20))
    (tmp_path / "g").write_text("a\n" * (2 << 20) + "b")
    with pytest.raises(ToolError, match=r"f would have more than 4 MB"):
        apply_patch(update("@@", " a", "+b"), tmp_path)
    with pytest.raises(ToolError, match=r"g has more than 4 MB"):
        apply_patch(wrap("*** Update File: g", "@@", " a", "+b"), tmp_path)
