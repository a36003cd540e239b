"""The tools that `serve --tools` switches on: opened once, and run for whichever answer calls them.

An interpreter's variables, and the pages that a browser has open, belong to one answer: they are made when it first needs
them, and end with it, so that nobody finds what another chat has left there. Everything else is shared.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, final

from ..decoding.grammar import AnswerFormat, answer_format
from ..engine.calling import recipients_of
from ..errors import ToolError
from ..text.conversation import FUNCTIONS
from ..tools.calls import reason, shown_to_model
from ..tools.calls import run as run_tool
from ..tools.tool import Tool, ToolSet, namespace_of
from ..tools.toolbox import Toolbox, parse_names
from .generation import GenerationRequest
from .loading import in_thread

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

# Answers that have an interpreter of Python at once: each may take the memory and the processes that one is allowed.
MOST_INTERPRETERS = 4
PYTHON = "python"
# Namespaces whose tools are of one answer alone, by the name that switches them on.
_OF_ONE_ANSWER = {PYTHON: "python", "browser": "files"}
_ERROR = "Error: "  # what a model is told begins with it
_CLOSED = "The answer that this tool was called for has ended."


class Result(NamedTuple):
    """What a tool said, as the model gets it. is_error: it failed, and the text says why."""

    text: str
    is_error: bool

    @property
    def shown(self) -> str:
        """As people are shown it."""
        return f"failed: {self.text.removeprefix(_ERROR)}" if self.is_error else f"= {self.text}"


@final
class OwnTools:
    """The tools in `names`, as `Toolbox` reads them. `close` ends their processes, as a `with` block does.

    notes: sentences about tools of MCP servers that are left out, or whose schema is not fully enforced. Raises ToolError
    as Toolbox does.
    """

    def __init__(self, names: str, *, allow_unsandboxed: bool = False) -> None:
        self._allow_unsandboxed = allow_unsandboxed
        self._own = {
            kind: f"{kind}={value}" if value else kind
            for kind, value in parse_names(names)
            if kind in _OF_ONE_ANSWER.values()
        }
        self._toolbox = Toolbox(names, allow_unsandboxed=allow_unsandboxed)
        self.notes = list(self._toolbox.notes)
        try:
            self._set = ToolSet(self._toolbox.tools)
        except BaseException:
            self._toolbox.close()
            raise
        self._lenient = [tool for tool in self._toolbox.tools if getattr(tool, "is_lenient", False)]
        self._is_checked = not self._lenient
        self._boxes: set[_Box] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self.interpreters = asyncio.Semaphore(MOST_INTERPRETERS)
        self.closings: set[asyncio.Task[None]] = set()

    @property
    def names(self) -> list[str]:
        """The tools as calls name them: "calculator", "python", "browser.search"."""
        return [name.removeprefix(f"{FUNCTIONS}.") for name in self._set.names]

    async def added_to(
        self, request: GenerationRequest, tokenizer: Tokenizer
    ) -> tuple[GenerationRequest, frozenset[str]]:
        """The request with these tools beside its own, and their names as its calls will have them.

        A tool of the client's own goes before one of the same name.
        """
        if not self._is_checked:
            await in_thread(partial(self._check, tokenizer), uses_mlx=False)
        theirs = {tool.name for tool in request.tools}
        functions = tuple(tool for tool in self._set.functions if tool.name not in theirs)
        built_in = tuple(each for each in self._set.built_in if theirs.isdisjoint(recipients_of((), [each])))
        recipients = recipients_of(functions, built_in)
        added = replace(
            request,
            tools=(*request.tools, *functions),
            built_in=built_in,
            tool_formats={**request.tool_formats, **self._formats(recipients)},
        )
        return added, frozenset(name.removeprefix(f"{FUNCTIONS}.") for name in recipients)

    def _formats(self, recipients: tuple[str, ...]) -> Mapping[str, AnswerFormat]:
        """The formats of calls. Where the engine cannot follow a server's schema, any object will do."""
        anything = answer_format({"type": "object"})
        assert anything is not None
        formats = {}
        for name in recipients:
            found = self._set.find(name)
            assert found is not None
            if found[1].parameters is not None:
                formats[name] = self._set.formats.get(name, anything)
        return formats

    def _check(self, tokenizer: Tokenizer) -> None:
        from ..decoding.grammar import engine_of

        with self._lock:
            if not self._is_checked:
                self._set.check_ends(engine_of(tokenizer))
                self._is_checked = True

    def find(self, name: str) -> Tool:
        """The tool that a call names."""
        found = self._set.find(name)
        assert found is not None
        return found[1]

    def open_box(self, namespace: str, count_tokens: Callable[[str], int]) -> _Box:
        """Tools of one answer alone. Raises ToolError."""
        names = self._own[_OF_ONE_ANSWER[namespace]]
        box = _Box(Toolbox(names, allow_unsandboxed=self._allow_unsandboxed, count_tokens=count_tokens))
        with self._lock:
            self._boxes.add(box)
            is_late = self._is_closed
        if is_late:
            box.close()
            raise ToolError(_CLOSED)
        return box

    def close_box(self, box: _Box) -> None:
        """The answer has ended."""
        box.close()
        with self._lock:
            self._boxes.discard(box)

    def close(self) -> None:
        """End all of them, also those that are running."""
        with self._lock:
            self._is_closed = True
            boxes = list(self._boxes)
        for box in boxes:
            self.close_box(box)
        self._toolbox.close()

    def __enter__(self) -> OwnTools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@final
class _Box:
    """A toolbox of one answer. Whoever closes it a second time waits until it is closed."""

    def __init__(self, toolbox: Toolbox) -> None:
        self._toolbox, self._lock = toolbox, threading.Lock()
        self._set = ToolSet(toolbox.tools)

    def find(self, name: str) -> Tool:
        found = self._set.find(name)
        assert found is not None
        return found[1]

    def close(self) -> None:
        with self._lock:
            self._toolbox.close()


@final
class ToolsOfAnswer:
    """The tools as one answer has them.

    most_tokens: of a result, as `count_tokens` counts them. Everything but `_run` belongs to the event loop's thread.
    """

    def __init__(self, tools: OwnTools, most_tokens: int, count_tokens: Callable[[str], int]) -> None:
        self._tools, self._most_tokens, self._count_tokens = tools, most_tokens, count_tokens
        self._boxes: dict[str, _Box] = {}
        self._lock = threading.Lock()
        self._is_closed = self._has_interpreter = False

    async def run(self, name: str, arguments: str) -> Result:
        """What a tool says to the arguments that a model wrote. Whatever it raises becomes a text for the model.

        When this is cancelled, the tool's result is dropped.
        """
        tool = self._tools.find(name)
        if namespace_of(tool) == PYTHON and not self._has_interpreter:
            await self._tools.interpreters.acquire()
            self._has_interpreter = True
        return await in_thread(partial(self._run, name, tool, arguments), uses_mlx=False)

    def _run(self, name: str, tool: Tool, arguments: str) -> Result:
        """In a thread of its own: tools wait for programs and networks."""
        try:
            if namespace_of(tool) in _OF_ONE_ANSWER:
                tool = self._box(namespace_of(tool)).find(name)
            text, is_error = run_tool(tool, arguments), False
        except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a tool raises is news for the model)
            text, is_error = f"{_ERROR}{reason(error)}", True
        return Result(shown_to_model(text, self._most_tokens, self._count_tokens), is_error)

    def _box(self, namespace: str) -> _Box:
        if namespace in self._boxes:
            return self._boxes[namespace]
        box = self._tools.open_box(namespace, self._count_tokens)
        with self._lock:
            self._boxes[namespace] = box
            is_late = self._is_closed
        if is_late:
            self._tools.close_box(box)
            raise ToolError(_CLOSED)
        return box

    def close(self) -> None:
        """The answer has ended: so does its interpreter, even during a script. May be called again; nobody waits for it."""
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
            boxes = list(self._boxes.values())
        if is_first and (boxes or self._has_interpreter):
            closing = asyncio.get_running_loop().create_task(self._end(boxes))
            self._tools.closings.add(closing)
            closing.add_done_callback(self._tools.closings.discard)

    async def _end(self, boxes: list[_Box]) -> None:
        def end() -> None:
            for box in boxes:
                self._tools.close_box(box)

        try:
            await in_thread(end, uses_mlx=False)
        finally:
            if self._has_interpreter:
                self._tools.interpreters.release()
