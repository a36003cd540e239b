"""gpt-oss's browser over the text files of one folder: search, open, find, with numbered lines to cite.

gpt-oss was trained to search, to open what it found, and to cite `【3†L7-L9】`: lines 7 to 9 of the third display. Here
all pages are local files; the three tools have the names and arguments that it was trained with (text/builtin_tools.py).
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from ..arguments import FUNCTION, PATH, checked_call
from ..errors import ToolError
from ..text.builtin_tools import BROWSER
from .paths import existing_folder, first_hidden, is_hidden
from .tool import arguments_of

LINE_WIDTH = 80
VIEW_TOKENS = 1024
MOST_RESULTS = 20
LARGEST_FILE = 4 << 20
MOST_FILES = 20_000
MOST_BYTES = 256 << 20  # read in one search
MOST_MATCHES = 50
_SNIPPET_LINES = 3


@dataclass(frozen=True)
class Page:
    """A page, of which a display shows a part: wrapped lines, and the links in them by number, each a path and a line."""

    title: str
    location: str
    lines: list[str]
    links: dict[int, tuple[str, int]] = field(default_factory=dict)


@final
class BrowserTool:
    """One of the three functions, as a tool."""

    namespace: str | None = BROWSER.name

    def __init__(self, name: str, call: Callable[..., str]) -> None:
        definition = next(tool for tool in BROWSER.tools if tool.name == name)
        self.name, self.description, self.parameters = name, definition.description, definition.parameters
        self._call = call

    def __call__(self, arguments: Any) -> str:
        """Call it with a dictionary, or JSON; returns the display. Raises ToolError if something is wrong with them."""
        values = arguments_of(arguments, f"browser.{self.name}")
        assert self.parameters is not None
        known: Mapping[str, Any] = self.parameters["properties"]
        return self._call(**{key: value for key, value in values.items() if key in known})


@final
@checked_call("FileBrowser", ToolError, folder=PATH, count_tokens=FUNCTION)
class FileBrowser:
    """The browser over `folder`. Its `tools` are search, open and find; `pages` are the displays by cursor.

    count_tokens: how many tokens a text has for the model; a view holds 1,024. By default a token counts as four
    characters. Symbolic links and files outside the folder are invisible. Raises ToolError if there is no such folder.
    """

    def __init__(self, folder: str | Path, count_tokens: Callable[[str], int] | None = None) -> None:
        self.folder = existing_folder(folder, "are no files to read")
        self.pages: list[Page] = []
        self.tools = [
            BrowserTool("search", self.search),
            BrowserTool("open", self.open),
            BrowserTool("find", self.find),
        ]
        self._count_tokens = count_tokens or (lambda text: len(text) // 4)

    def search(self, query: str = "", topn: float = 10, source: str | None = None) -> str:
        """The files that match the words of `query` best, each with its best lines."""
        words = _words(query) if isinstance(query, str) else []
        if not words:
            raise ToolError(f"The query {query!r} has no words to search for.")
        found = self._ranked(words)[: max(1, min(_whole(topn, "topn"), MOST_RESULTS))]
        lines: list[str] = []
        links: dict[int, tuple[str, int]] = {}
        for number, (path, text) in enumerate(found):
            all_lines = wrapped(text)
            best = _best_line(all_lines, words)
            links[number] = (path, best)
            lines += [f"# 【{number}†{path}】", *all_lines[max(0, best - 1) : best + _SNIPPET_LINES - 1], ""]
        return self._show(Page(f"Search results for: {query}", "search", lines or ["Nothing was found."], links), 0)

    def open(
        self,
        id: float | str = -1,
        cursor: float = -1,
        loc: float = -1,
        num_lines: float = -1,
        view_source: bool = False,
        source: str | None = None,
    ) -> str:
        """A file, by a link's number on the page `cursor` or by its path; without `id`, another part of the page."""
        line, count = _whole(loc, "loc"), _whole(num_lines, "num_lines")
        if isinstance(id, str) and not id.lstrip("-").isdigit():
            return self._show(self._file_page(id), max(0, line), count)
        number = _whole(id, "id")
        if number == -1:
            return self._show(self._page(cursor), max(0, line), count)
        page = self._page(cursor)
        if number not in page.links:
            known = ", ".join(map(str, page.links)) or "none"
            raise ToolError(f"The page {page.title!r} has no link {number}; its links are: {known}.")
        path, best = page.links[number]
        return self._show(self._file_page(path), line if line >= 0 else max(0, best - 4), count)

    def find(self, pattern: str = "", cursor: float = -1) -> str:
        """The lines of a page that have `pattern` in them, in any case."""
        page = self._page(cursor)
        if not isinstance(pattern, str) or not pattern:
            raise ToolError("There is no pattern to find.")
        places = [n for n, line in enumerate(page.lines) if pattern.lower() in line.lower()]
        lines, links = [], {}
        for number, place in enumerate(places[:MOST_MATCHES]):
            links[number] = (page.location, place)
            lines += [f"# 【{number}†match at L{place}】", *page.lines[place : place + _SNIPPET_LINES], ""]
        if len(places) > MOST_MATCHES:
            lines.append(f"({len(places) - MOST_MATCHES} more matches)")
        title = f"Find results for text: `{pattern}` in `{page.title}`"
        return self._show(Page(title, page.location, lines or [f"No match for `{pattern}`."], links), 0)

    # --- Pages --------------------------------------------------------------------------------------------------------

    def _page(self, cursor: float) -> Page:
        number = _whole(cursor, "cursor")
        if not self.pages:
            raise ToolError("No page is open yet: search for something first, or open a file by its path.")
        if number == -1:
            return self.pages[-1]
        if not 0 <= number < len(self.pages):
            raise ToolError(f"There is no page {number}; the last one is {len(self.pages) - 1}.")
        return self.pages[number]

    def _show(self, page: Page, start: int, count: int = -1) -> str:
        """Add the page and display it from line `start`: `count` lines, or as many as a view holds."""
        if start >= len(page.lines):
            raise ToolError(f"{page.title} has {len(page.lines)} lines, and line {start} is not among them.")
        self.pages.append(page)
        shown: list[str] = []
        tokens = 0
        for number, line in enumerate(page.lines[start:], start):
            text = f"L{number}: {line}"
            tokens += self._count_tokens(text) + 1
            if shown and (tokens > VIEW_TOKENS or 0 < count <= len(shown)):
                break
            shown.append(text)
        last = start + len(shown) - 1
        head = f"[{len(self.pages) - 1}] {page.title} ({page.location})"
        return "\n".join([head, f"**viewing lines [{start} - {last}] of {len(page.lines) - 1}**", "", *shown])

    def _file_page(self, path: str) -> Page:
        file = self._inside(path.removeprefix("file://"))
        if file.is_dir():
            return self._folder_page(file)
        text = _text_of(file)
        if text is None:
            raise ToolError(f"{path} is not a text file of at most {LARGEST_FILE / 1e6:.0f} MB, so it cannot be shown.")
        name = str(file.relative_to(self.folder))
        return Page(name, name, wrapped(text))

    def _folder_page(self, folder: Path) -> Page:
        """The files of a folder, as links."""
        names = sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir() if not is_hidden(p.name))
        relative = folder.relative_to(self.folder)
        links = {number: (str(relative / name), 0) for number, name in enumerate(names)}
        lines = [f"【{number}†{name}】" for number, name in enumerate(names)] or ["The folder is empty."]
        return Page(f"Files in {relative}/", str(relative), lines, links)

    def _inside(self, path: str) -> Path:
        """The file meant by a path. Raises ToolError for what is hidden or not in the folder, through links too."""
        file = (self.folder / path.lstrip("/")).resolve() if "\0" not in path else self.folder / "\ufffd"
        if Path(path).is_absolute() and Path(path).resolve().is_relative_to(self.folder):
            file = Path(path).resolve()
        # The target of a link counts: a link to a hidden file is hidden too.
        is_there = file.is_relative_to(self.folder) and file.exists()
        if not is_there or first_hidden(file.relative_to(self.folder).parts) is not None:
            raise ToolError(f"There is no file {path!r} here. Search for its words, or open '.' to see what there is.")
        return file

    # --- Search -------------------------------------------------------------------------------------------------------

    def _ranked(self, words: list[str]) -> list[tuple[str, str]]:
        """Paths and texts of the files with some of the words, best first (BM25: arXiv 2407.03618 describes it)."""
        counts, lengths, texts = {}, {}, {}
        for path, text in self._texts():
            found = Counter(_words(text))
            name = Counter(_words(path))
            lengths[path] = sum(found.values())
            matched = {word: found[word] + 3 * name[word] for word in words if found[word] or name[word]}
            if matched:
                counts[path], texts[path] = matched, text
        mean = max(1.0, sum(lengths.values()) / max(1, len(lengths)))
        in_files = Counter(word for matched in counts.values() for word in matched)

        def score(path: str) -> float:
            total = 0.0
            for word, count in counts[path].items():
                rarity = math.log(1 + (len(lengths) - in_files[word] + 0.5) / (in_files[word] + 0.5))
                total += rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * lengths[path] / mean))
            return total

        return [(path, texts[path]) for path in sorted(counts, key=lambda path: (-score(path), path))]

    def _texts(self) -> Iterator[tuple[str, str]]:
        num_files = num_bytes = 0
        for folder, folders, names in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            for name in sorted(names):
                file = Path(folder) / name
                num_files += 1
                if num_files > MOST_FILES or num_bytes > MOST_BYTES:
                    return
                if is_hidden(name) or file.is_symlink():
                    continue
                text = _text_of(file)
                if text is not None:
                    num_bytes += len(text)
                    yield str(file.relative_to(self.folder)), text


def wrapped(text: str) -> list[str]:
    """The lines of a text, long ones wrapped at 80 characters. Tabs are four spaces."""
    lines: list[str] = []
    for line in text.expandtabs(4).splitlines() or [""]:
        lines += textwrap.wrap(line, LINE_WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]
    return [line.rstrip() for line in lines]


def _text_of(file: Path) -> str | None:
    """The text of a file; None if it is not text, too large, or unreadable."""
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_FILE:
            return None
        data = file.read_bytes()
    except OSError:
        return None
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _best_line(lines: list[str], words: list[str]) -> int:
    """The line with the most of the words, the earliest of these."""
    wanted = set(words)
    return max(range(len(lines)), key=lambda n: (len(wanted & set(_words(lines[n]))), -n))


def _whole(value: float | str, name: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ToolError(f"{name} is {value!r}, and it must be a number.") from None
