"""gpt-oss's python tool: scripts of the model, run one after the other in an interpreter that keeps its variables.

The interpreter is another process, in a sandbox (sandbox.py). One thread owns both: it serves calls from all threads in
turn, gives each its own result, even when the previous one was interrupted by Ctrl-C, and checks the resources that
scripts use, also between calls. interpreter.py runs a single script.
"""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, final

from ..arguments import FLAG, Kind, checked_call, of_type
from ..errors import ToolError
from ..text.builtin_tools import PYTHON
from .interpreter import Interpreter
from .python_process import Box, Direct, Place
from .sandbox import KEPT, SANDBOXES, Limits, Python, find_sandbox
from .sandbox_usage import remove_folder

_IDLE_SECONDS = 1.0  # between two checks while no script runs
_CLOSED = "This python tool is closed: make another one."
_SANDBOX = Kind(lambda value: value in SANDBOXES, f"give one of {', '.join(SANDBOXES)}")
_NOTHING = "(The script wrote nothing. Its last expression, or what it prints, is what you see.)"


@final
@checked_call(
    "PythonTool", ToolError, limits=of_type(Limits, "Limits(seconds=60, ...)"), allow_unsandboxed=FLAG,
    python=of_type(Python, "Python(executable=...)"), sandbox=_SANDBOX,
)  # fmt: skip
class PythonTool:
    """A tool that runs Python. Called with a script, it returns what the script wrote and its last expression's value.

    Variables, imports and files stay until `close`, which a `with` block calls; after a script had to be killed, the next
    one starts without variables but with the files. Ctrl-C (KeyboardInterrupt) in a call interrupts its script too, and
    keeps the variables if the script ends then. Threads may share the tool: their calls run one after the other. Raises
    ToolError if the machine has no sandbox and allow_unsandboxed is False.
    """

    name = "python"
    namespace: str | None = None
    description = PYTHON.description or ""
    parameters: dict[str, object] | None = None  # the message is the script itself

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        allow_unsandboxed: bool = False,
        python: Python | None = None,
        sandbox: str | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.sandbox = sandbox or find_sandbox(allow_unsandboxed=allow_unsandboxed)
        self._owner = _Owner(self.sandbox, python or Python(), self.limits)
        # Also closes it at the end of the program, and when the tool is garbage collected.
        self._finalizer = weakref.finalize(self, _Owner.close, self._owner)

    @property
    def scratch(self) -> Path:
        """The folder that scripts see as /mnt/data (on a Mac, and without a sandbox, as the working folder).

        On Linux it is in memory, and the path is valid only in this process: copy files that you want to keep.
        """
        return self._owner.ask(self._owner.find_scratch)

    def __call__(self, arguments: str) -> str:
        """Run a script; its output, with a notice where it was cut short or the script was stopped."""
        return self._owner.ask(self._owner.run, arguments).removesuffix("\n") or _NOTHING

    def interrupt(self) -> None:
        """Stop the running script, if there is one; to be called from another thread."""
        self._owner.interrupt()

    def restart(self) -> None:
        """Delete the variables and end processes that scripts have left running; files stay."""
        self._owner.ask(self._owner.restart)

    def close(self) -> None:
        """End the interpreter, even during a script, and delete its files."""
        self._finalizer()

    def __enter__(self) -> PythonTool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Job:
    """One call: what to do, and where its result goes. The result of an abandoned call is dropped."""

    def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.work, self.arguments = work, arguments
        self.result: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.is_interrupted = self.is_given_up = False


class _Owner:
    """The thread that owns the sandbox. Other threads touch only plain flags of its state.

    It is a thread of its own because Ctrl-C raises KeyboardInterrupt in the main thread, between any two steps: here nothing
    is left half done. And the kernel ends a sandbox together with the thread that made it, so this thread stays alive.
    """

    def __init__(self, kind: str, python: Python, limits: Limits) -> None:
        self._kind, self._python, self._limits = kind, python, limits
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="openelm_mlx-python-"))
        except OSError as error:
            raise ToolError(
                f"The python tool has no place for its files, because {tempfile.gettempdir()} cannot be written "
                f"({error.strerror}): make room there, or set TMPDIR to another folder."
            ) from None
        self._pid = os.getpid()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._job: _Job | None = None
        self._is_closing = False
        self._place: Place | None = None
        self._interpreter: Interpreter | None = None
        self._notice = ""  # put before the next script's output
        self._thread = threading.Thread(target=self._serve, name="openelm_mlx-python", daemon=True)
        self._thread.start()

    # --- Called from any thread ---------------------------------------------------------------------------------------

    def ask(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run `work` in the owner's thread, in its turn; return its result, or raise its exception."""
        job = _Job(work, arguments)
        try:
            if self._is_closing or not self._thread.is_alive():
                raise ToolError(_CLOSED)
            self._jobs.put(job)
            while True:
                with contextlib.suppress(queue.Empty):
                    value, error = job.result.get(timeout=1)
                    break
                if not self._thread.is_alive():
                    raise ToolError(_CLOSED)
        except BaseException:  # Ctrl-C, at any moment: the script is to be stopped
            job.is_given_up = job.is_interrupted = True
            raise
        if error is not None:
            raise error
        return value

    def interrupt(self) -> None:
        """Interrupt the call that is being served."""
        if (job := self._job) is not None:
            job.is_interrupted = True

    def close(self) -> None:
        """End everything, and delete the files."""
        if os.getpid() != self._pid:
            return  # a fork of the program: it is not ours
        self._is_closing = True
        self.interrupt()
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:  # it is, when the garbage collector runs there
            self._thread.join(30)

    # --- The owner's thread -------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._is_closing:
                try:
                    job = self._jobs.get(timeout=_IDLE_SECONDS if self._interpreter else None)
                except queue.Empty:
                    self._look()
                    continue
                if job is not None and not self._is_closing:
                    self._do(job)
        finally:
            self._close_interpreter()
            if self._place is not None:
                self._place.close()
            remove_folder(self._folder)

    def _do(self, job: _Job) -> None:
        if job.is_given_up:
            return
        self._job = job
        try:
            result: tuple[Any, BaseException | None] = job.work(*job.arguments), None
        except BaseException as error:  # noqa: BLE001  (it is raised where the call was made)
            result = None, error
        self._job = None
        job.result.put(result)

    def _look(self) -> None:
        """Check between calls: processes that scripts left running may exceed limits, or end the interpreter."""
        if self._interpreter is not None and (trouble := self._interpreter.trouble()) is not None:
            self._notice = f"[{trouble}, since the last script; its variables are gone, files are kept]\n"
            self.restart()

    def run(self, script: str) -> str:
        """What a script wrote."""
        job = self._job
        assert job is not None
        self._look()
        if self._interpreter is None:
            self._interpreter = Interpreter(self._kind, self._find_place(), self._python, self._folder, self._limits)
        notice, self._notice = self._notice, ""
        output, has_ended = self._interpreter.run(script, lambda: job.is_interrupted or self._is_closing)
        if has_ended:
            self.restart()
        if job.is_given_up:
            lost = "[the last script was interrupted; its variables are gone, files are kept]\n"
            self._notice = lost if has_ended else notice
        return notice + output

    def restart(self) -> None:
        """End the interpreter."""
        self._close_interpreter()

    def _close_interpreter(self) -> None:
        interpreter, self._interpreter = self._interpreter, None
        if interpreter is not None:
            interpreter.end()

    def find_scratch(self) -> Path:
        """The folder of scripts' files, as this program sees it."""
        place = self._find_place()
        return Path(f"/proc/{os.getpid()}/fd/{place.folder}") if isinstance(place, Box) else self._folder / "scratch"

    def _find_place(self) -> Place:
        if isinstance(self._place, Box) and not self._place.is_there:
            self._place.close()
            self._place = None
            self._notice = "[the sandbox was ended by the system: variables and files are gone]\n"
        place: Place | None = self._place
        if place is None and self._kind in KEPT:
            place = Box(self._kind, self._python, self._folder, self._limits)
        elif place is None:
            place = Direct(self._kind, self._folder / "scratch")
        self._place = place
        return place
