"""What a worker does for one first machine, from its first question to the end of the connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, final

import mlx.core as mx

from ..adapters import check_room_for_adapter, put_adapter
from ..checks import is_whole
from ..errors import UserError, WorkerError
from ..files import one_line
from ..link.adapter_parts import unpacked_adapter
from ..link.addresses import own_addresses
from ..link.arrays import packed, unpacked
from ..link.framing import Connection, LostConnectionError, Message
from ..link.team import facts_of
from ..memory.limits import generating
from ..memory.machine import own_machine
from .caches import Caches
from .parts import Parts, error_header

# Seconds: the first machine says every few that it is still there.
LONGEST_SILENCE = 20.0
# While it works a worker says so this often, or as much oftener as the first machine's deadline asks for.
BEAT_SECONDS, BEATS_IN_DEADLINE, LEAST_BEAT_SECONDS = 1.0, 5, 0.05


@final
class Session:
    """See the module. instance: of this worker, so that two of its addresses are known to be one. say: told what happens."""

    def __init__(self, connection: Connection, parts: Parts, instance: str, say: Callable[[str], None]) -> None:
        self._connection, self._parts, self._instance, self._say = connection, parts, instance, say
        self._caches: Caches | None = None
        self._limits = ExitStack()  # the process's settings, for as long as there are layers to compute
        self._heartbeat = _Heartbeat(connection)

    def run(self) -> None:
        """Answer until the other side leaves. Raises LostConnectionError when it did so without a word, or made no sense."""
        self._heartbeat.start()
        try:
            while True:
                message = self._connection.receive(LONGEST_SILENCE)
                if message.op == "leave":
                    return
                self._heartbeat.is_on = True
                try:
                    answer = self._answered(message)
                finally:
                    self._heartbeat.is_on = False
                if answer is not None:
                    self._connection.send(*answer)
        finally:
            self._heartbeat.stop()
            self._limits.close()
            self._forget()

    def _forget(self) -> None:
        """Give back what was made for this first machine: keys, values and adapters."""
        if self._caches is not None:
            self._caches.clear()
            self._caches = None
            self._parts.forget_adapters()

    def _answered(self, message: Message) -> tuple[Mapping[str, Any], memoryview | bytes] | None:
        """The header and the bytes of an answer; None for what has none."""
        if "changes" in message.header:
            if self._caches is None:
                if message.header["changes"]:
                    raise LostConnectionError("There are no caches yet.")
            else:
                self._caches.change(message.header["changes"])
        if message.op == "still here":
            return None
        try:
            return self._done(message)
        except LostConnectionError:
            raise
        except UserError as error:
            return error_header(error), b""
        except (RuntimeError, MemoryError) as error:  # MLX's
            return error_header(WorkerError(f"A pass failed: {one_line(error)}.")), b""
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            # What was asked for makes no sense; the next one is served all the same.
            what = f"{message.op[:40]!r} cannot be done ({type(error).__name__}: {one_line(str(error))[:200]})"
            return error_header(WorkerError(f"{what}.")), b""

    def _done(self, message: Message) -> tuple[Mapping[str, Any], memoryview | bytes]:
        header = message.header
        if message.op == "pass":
            return self._passed(message)
        if message.op == "ping":
            return {"op": "pong", "bytes": mx.get_active_memory()}, b""
        if message.op == "echo":
            return {"op": "echo"}, message.body
        if message.op == "facts":
            self._heartbeat.set_deadline(header.get("deadline"))
            about = {"instance": self._instance, "addresses": own_addresses(), "memory_limit": self._parts.memory_limit}
            return {"op": "facts", **about, **facts_of(own_machine())}, b""
        if message.op == "prepare":
            return {"op": "prepared", "plan": self._prepared(header)}, b""
        if message.op == "read":
            self._read()
            return {"op": "ready", "bytes": mx.get_active_memory()}, b""
        if message.op == "adapter":
            self._add_adapter(message)
            return {"op": "added"}, b""
        if message.op == "changes":
            return {"op": "changed"}, b""
        raise LostConnectionError(f"{self._connection.name} asks for {message.op[:40]!r}, which there is not.")

    def _prepared(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        self._forget()
        planned = self._parts.prepare(asked)
        plan = planned.plan
        self._say(f"{plan.source}: for {self._connection.name}.")
        return {
            "process_bytes": plan.process_bytes, "weights_bytes": plan.weights_bytes, "memory_limit": plan.memory_limit,
            "expert_slots": plan.expert_slots, "prefill_chunk": plan.prefill_chunk, "context_length": plan.context_length,
            "max_context_length": plan.max_context_length, "decode_tps": plan.decode_tps,
        }  # fmt: skip

    def _read(self) -> None:
        self._forget()
        model = self._parts.read(
            lambda done, total: self._connection.send({"op": "progress", "done": done, "total": total})
        )
        assert self._parts.planned is not None
        self._caches = Caches(model, self._parts.planned.placement.dtype.size)
        self._limits.close()
        self._limits.enter_context(generating(self._parts.planned.plan))
        self._say(f"{self._parts.planned.plan.source}: ready.")

    def _add_adapter(self, message: Message) -> None:
        model = self._parts.model
        if model is None or self._caches is None:
            raise WorkerError("Nothing has been read that an adapter could be put beside.")
        header, number = message.header, message.header.get("number")
        if not is_whole(number):
            raise WorkerError(f"{str(number)[:40]!r} is no number of an adapter.")
        adapter = unpacked_adapter(header, message.body)
        if header.get("is_planned") is not True:
            check_room_for_adapter(model, adapter, one_line(str(header.get("name"))))
        put_adapter(model, str(number), adapter, False, str(number))

    def _passed(self, message: Message) -> tuple[Mapping[str, Any], memoryview | bytes]:
        if self._caches is None:
            raise WorkerError("Nothing has been read to compute with.")
        h = unpacked(message.header, message.body)
        out = self._caches.compute(message.header, h)
        if out is None:
            return {"op": "done"}, b""
        described, body = packed(out)
        return {"op": "array", **described}, body


class _Heartbeat(threading.Thread):
    """Says that this worker is still at work, while it is: a prompt, or reading layers, may take longer than a deadline."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(daemon=True)
        self._connection, self._seconds = connection, BEAT_SECONDS
        self.is_on, self._is_over = False, threading.Event()

    def set_deadline(self, seconds: Any) -> None:
        """As often as the other side's deadline asks for."""
        if isinstance(seconds, (int, float)) and seconds > 0:
            self._seconds = max(LEAST_BEAT_SECONDS, min(BEAT_SECONDS, seconds / BEATS_IN_DEADLINE))

    def stop(self) -> None:
        self._is_over.set()

    def run(self) -> None:
        while not self._is_over.wait(self._seconds):
            if self.is_on:
                try:
                    self._connection.send({"op": "alive"})
                except LostConnectionError:
                    return  # the session finds out
