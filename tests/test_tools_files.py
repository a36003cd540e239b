"""The browser over local files: what gpt-oss sees, what it can cite, and what it cannot reach."""

import os

import pytest

from openelm_mlx.errors import ToolError
from openelm_mlx.text.builtin_tools import BROWSER
from openelm_mlx.tools.files import LARGEST_FILE, VIEW_TOKENS, FileBrowser, wrapped


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "notes"
    (root / "deep").mkdir(parents=True)
    (root / "apples.md").write_text("# Apples\n\nAn apple is a fruit.\nApples are red or green.\n")
    (root / "deep" / "pears.txt").write_text("A pear is a fruit, too.\n" + "\n".join(f"line {i}" for i in range(400)))
    (root / "long.txt").write_text("word " * 60 + "\nend")
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    (root / "latin.txt").write_bytes(b"caf\xe9 apple")
    (root / ".hidden.txt").write_text("apple secret")
    (tmp_path / "outside.txt").write_text("apple hunter2")
    (root / "link.txt").symlink_to(tmp_path / "outside.txt")
    (root / "up").symlink_to(tmp_path)
    return root


@pytest.fixture
def browser(folder):
    return FileBrowser(folder)


def call(browser, name, **arguments):
    (tool,) = [tool for tool in browser.tools if tool.name == name]
    return tool(arguments)


def test_the_tools_are_those_that_gpt_oss_knows(browser):
    assert [(tool.namespace, tool.name) for tool in browser.tools] == [("browser", t.name) for t in BROWSER.tools]
    assert [(t.description, t.parameters) for t in browser.tools] == [
        (t.description, t.parameters) for t in BROWSER.tools
    ]


def test_searching_opening_and_finding_as_a_model_does_it(browser):
    page = call(browser, "search", query="red apple fruit", topn=5)
    assert page.split("\n")[:4] == [
        "[0] Search results for: red apple fruit (search)", "**viewing lines [0 - 8] of 8**", "", "L0: # 【0†apples.md】",
    ]  # fmt: skip
    assert "【1†deep/pears.txt】" in page
    page = call(browser, "open", id=0)
    assert page == (
        "[1] apples.md (apples.md)\n**viewing lines [0 - 3] of 3**\n\n"
        "L0: # Apples\nL1:\nL2: An apple is a fruit.\nL3: Apples are red or green."
    ).replace("L1:\n", "L1: \n")
    page = call(browser, "find", pattern="APPLE")
    assert page.startswith("[2] Find results for text: `APPLE` in `apples.md` (apples.md)")
    assert "L0: # 【0†match at L0】" in page
    assert "【1†match at L2】" in page
    assert call(browser, "open", id=1, cursor=2).startswith("[3] apples.md")
    assert call(browser, "open", id=1, cursor=0).startswith("[4] deep/pears.txt (deep/pears.txt)")


def test_a_citation_names_the_line_that_was_shown(browser, folder):
    call(browser, "open", id="deep/pears.txt", loc=200, num_lines=3)
    page = browser.pages[0]
    assert page.lines[200:203] == ["line 199", "line 200", "line 201"]
    text = call(browser, "open", cursor=0, loc=200, num_lines=3)  # 【1†L201】 is this display's line 201
    assert text.split("\n")[0] == "[1] deep/pears.txt (deep/pears.txt)"
    assert text.split("\n")[3:] == ["L200: line 199", "L201: line 200", "L202: line 201"]


def test_a_view_holds_so_many_tokens(folder):
    browser = FileBrowser(folder, count_tokens=lambda text: len(text.split()))
    text = call(browser, "open", id="deep/pears.txt")
    shown = text.split("\n")[3:]
    assert sum(len(line.split()) + 1 for line in shown) <= VIEW_TOKENS
    assert f"**viewing lines [0 - {len(shown) - 1}] of 400**" in text
    following = call(browser, "open", loc=len(shown))
    assert following.split("\n")[3].startswith(f"L{len(shown)}: ")
    big = FileBrowser(folder, count_tokens=lambda text: 5000)
    assert len(call(big, "open", id="apples.md").split("\n")) == 4  # one line at least


def test_long_lines_are_wrapped_and_nothing_is_lost(folder):
    lines = wrapped((folder / "long.txt").read_text())
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).split() == ["word"] * 60 + ["end"]
    assert wrapped("") == [""]
    assert wrapped("a\tb") == ["a   b"]


def test_a_folder_opens_as_a_list_of_links(browser):
    text = call(browser, "open", id=".")
    assert "【0†apples.md】" in text
    assert ".hidden" not in text
    assert call(browser, "open", id=1).startswith("[1] Files in deep/")
    assert call(browser, "open", id=0).startswith("[2] deep/pears.txt")


@pytest.mark.parametrize(
    "path",
    [
        "../outside.txt",
        "/etc/passwd",
        "link.txt",
        "up/outside.txt",
        "deep/../../outside.txt",
        "file:///etc/passwd",
        "a\0b",
    ],
)
def test_nothing_outside_the_folder_is_shown(browser, path):
    with pytest.raises(ToolError, match="no file"):
        call(browser, "open", id=path)
    assert "hunter2" not in call(browser, "search", query="apple")


def test_hidden_binary_and_giant_files_are_not_shown(browser, folder):
    page = call(browser, "search", query="apple secret caf")
    assert "hidden" not in page
    assert "latin" not in page
    (folder / "giant.txt").write_bytes(b"apple " * (LARGEST_FILE // 6 + 1))
    assert "giant" not in call(browser, "search", query="apple")
    for name in ("image.png", "latin.txt", "giant.txt"):
        with pytest.raises(ToolError, match="not a text file"):
            call(browser, "open", id=name)


def test_an_absolute_path_inside_is_the_file(browser, folder):
    assert call(browser, "open", id=str(folder / "apples.md")).startswith("[0] apples.md")


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("search", {}, "no words"),
        ("search", {"query": "!!"}, "no words"),
        ("search", {"query": 3}, "no words"),
        ("search", {"query": "apple", "topn": "many"}, "topn"),
        ("open", {}, "No page is open"),
        ("open", {"id": 3}, "No page is open"),
        ("open", {"id": "apples.md", "loc": 99}, "line 99"),
        ("find", {"pattern": "x"}, "No page is open"),
    ],
)
def test_mistakes_are_told(browser, name, arguments, says):
    with pytest.raises(ToolError, match=says):
        call(browser, name, **arguments)


def test_links_and_cursors_that_do_not_exist_are_told(browser):
    call(browser, "search", query="apple")
    with pytest.raises(ToolError, match="no link 9"):
        call(browser, "open", id=9)
    with pytest.raises(ToolError, match="no page 7"):
        call(browser, "open", id=0, cursor=7)
    with pytest.raises(ToolError, match="pattern"):
        call(browser, "find")
    for arguments in ("[1]", "{", "3", [1], None):
        with pytest.raises(ToolError):
            browser.tools[0](arguments)
    assert browser.tools[1]('{"id": "apples.md"}').startswith("[1] apples.md")
    assert "No match" in call(browser, "find", pattern="zebra")
    assert "Nothing was found" in call(browser, "search", query="zebra")
    assert call(browser, "open", id="apples.md", unknown=1, view_source=True).startswith("[")
    with pytest.raises(ToolError, match="not a folder"):
        FileBrowser("/nowhere/at/all")


def test_rarer_words_and_names_count_more(tmp_path):
    for i in range(30):
        (tmp_path / f"common{i}.txt").write_text("the river " * 20)
    (tmp_path / "one.txt").write_text("the delta of the river\n" + "the " * 30)
    (tmp_path / "delta.txt").write_text("nothing of it")
    page = call(FileBrowser(tmp_path), "search", query="the delta", topn=100)
    assert page.split("\n")[3] in ("L0: # 【0†delta.txt】", "L0: # 【0†one.txt】")
    assert page.count("】") == 20  # whatever was asked for
    assert os.path.exists(tmp_path)


@pytest.mark.parametrize(
    "path", [".env", ".git/config", "./sub/../.env", "sub/.env", "link", "folder/config", "node_modules/x.js", ".git"]
)
def test_hidden_files_are_not_shown_whichever_way_they_are_named(tmp_path, path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "node_modules").mkdir()
    for name in (".env", ".git/config", "sub/.env", "node_modules/x.js"):
        (tmp_path / name).write_text("SECRET=1")
    (tmp_path / "link").symlink_to(tmp_path / ".env")
    (tmp_path / "folder").symlink_to(tmp_path / ".git")
    browser = FileBrowser(tmp_path)
    for asked in (path, str(tmp_path / path), f"file://{path}"):
        with pytest.raises(ToolError, match="There is no file"):
            browser.open(asked)
    assert "Nothing was found" in browser.search("SECRET")
