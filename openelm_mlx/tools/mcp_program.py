"""The stdio transport for an MCP server that is a program: started, connected by its standard streams, ended in time.

The SDK's own stdio transport loses a message with a lone surrogate, so its caller waits for ever; keeps an endless line
in memory and copies it for every piece; takes four seconds to give up on a program that does not end; and writes the
program's standard error to a file. This one does not.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, final

import anyio
import mcp_types
from anyio.abc import Process
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage

from .mcp_messages import Note, cleaned_result, whole

_LONGEST_LINE = 32 << 20  # bytes of one message
_KEPT_BYTES = 1 << 16  # of standard error
# Seconds for a program to end by itself once its input is closed, and after it was told to.
GRACE_SECONDS, TERM_SECONDS = 1.5, 0.3
_GONE = (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError, OSError)


@final
class Log:
    """What a program wrote besides its messages. Written in the connection's thread, read in any."""

    def __init__(self) -> None:
        self.errors = b""  # the end of what it wrote to standard error
        self.stray = ""  # the first line on its standard output that is not a message
        self.has_ended = self.is_hurried = False

    def last_words(self) -> str:
        """Its last words, for the end of a sentence; empty when it wrote nothing."""
        lines = [line.strip() for line in self.errors.decode("utf-8", "replace").split("\n")]
        said = next((line for line in reversed(lines) if line), "")
        if said:
            return f"; {said}"[:300]
        return f"; on its standard output, where only messages belong, it said {self.stray!r}" if self.stray else ""


def parsed(line: bytes, log: Log, note: Note) -> SessionMessage | None:
    """The message in a line; None if it is not a message."""
    try:
        value = json.loads(line.decode("utf-8", "replace"))
        if not isinstance(value, dict):
            raise ValueError
        if "result" in value:
            value["result"] = cleaned_result(value["result"], note)
        return SessionMessage(mcp_types.jsonrpc_message_adapter.validate_python(whole(value), by_name=False))
    except (ValueError, RecursionError):
        log.stray = log.stray or line.decode("utf-8", "replace").strip()[:80]
        return None


@asynccontextmanager
async def program(
    words: Sequence[str], environment: Mapping[str, str], log: Log, note: Note
) -> AsyncIterator[tuple[Any, Any]]:
    """Start a program; yield the streams of messages from it and to it. At the end it and its child processes are killed."""
    process = await anyio.open_process(
        list(words), env={**get_default_environment(), **environment}, start_new_session=True
    )
    received, messages = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    answers, sent = anyio.create_memory_object_stream[SessionMessage](0)

    async def read() -> None:
        async with received:
            async for line in _lines(process.stdout):
                message = parsed(line, log, note)
                if message is not None:
                    with suppress(*_GONE):
                        await received.send(message)
            log.has_ended = True

    async def write() -> None:
        assert process.stdin is not None
        with suppress(*_GONE):
            async with sent:
                async for message in sent:
                    text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    await process.stdin.send(text.encode() + b"\n")
        received.close()  # requests cannot be sent any more, so no answer comes

    async def read_errors() -> None:
        assert process.stderr is not None
        with suppress(*_GONE):
            while True:
                log.errors = (log.errors + await process.stderr.receive())[-_KEPT_BYTES:]

    async with anyio.create_task_group() as tasks:
        for task in (read, write, read_errors):
            tasks.start_soon(task)
        try:
            yield messages, answers
        finally:
            with anyio.CancelScope(shield=True):
                messages.close()
                answers.close()
                await _end(process, log)
            tasks.cancel_scope.cancel()
    for stream in (received, messages, answers, sent):
        stream.close()


async def _lines(output: Any) -> AsyncIterator[bytes]:
    """The lines that a program writes, without those that are too long."""
    pieces: list[bytes] = []
    size = 0
    with suppress(*_GONE):
        while True:
            *ended, rest = (await output.receive()).split(b"\n")
            for piece in ended:
                line, size = b"".join([*pieces, piece]), size + len(piece)
                pieces.clear()
                if size <= _LONGEST_LINE:
                    yield line
                size = 0
            size += len(rest)
            if size <= _LONGEST_LINE:
                pieces.append(rest)
            else:
                pieces.clear()


async def _end(process: Process, log: Log) -> None:
    if process.stdin is not None:
        with suppress(*_GONE), anyio.move_on_after(TERM_SECONDS):
            await process.stdin.aclose()
    if not log.is_hurried:
        await _wait(process, GRACE_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):  # also for processes that it left running
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        await _wait(process, TERM_SECONDS)
    # On Python up to 3.12 a pipe that a process outside the group holds keeps this open, and warns.
    transport = getattr(getattr(process, "_process", None), "_transport", None)
    if transport is not None:
        with suppress(PermissionError):
            transport.close()


async def _wait(process: Process, seconds: float) -> None:
    with anyio.move_on_after(seconds):
        while process.returncode is None:
            await anyio.sleep(0.01)
