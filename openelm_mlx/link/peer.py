"""One worker as the first machine sees it: what is still to be sent to it, and which answers are still to come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

from .. import errors
from ..errors import UserError, WorkerError
from ..hub.names import Progress
from .framing import Connection, LostConnectionError, Message

# Changes of caches go along with the next pass; so many of them by themselves.
MOST_CHANGES = 500


@dataclass(eq=False)
class PendingReply:
    """An answer that is to come. on_failure: called with the worker's error, also where nobody waits for the answer.

    failure: never raised itself, but copies of it. An error that was raised has the frames of its callers, and an answer is in
    one of them: all that they have would stay in memory until Python looks for such rings.
    """

    on_failure: Callable[[Exception], None] | None = None
    message: Message | None = None
    failure: Exception | None = None

    @property
    def is_here(self) -> bool:
        return self.message is not None or self.failure is not None

    def fail(self, error: Exception) -> None:
        """It will not come, for this reason."""
        self.failure = copy(error)
        if self.on_failure is not None:
            self.on_failure(self.failure)

    def result(self) -> Message:
        """What has come. Raises the worker's error, or the one of its connection."""
        if self.failure is not None:
            raise copy(self.failure)
        assert self.message is not None
        return self.message


class OutgoingMessage(NamedTuple):
    """A message that has an answer. body: its bytes, or the answer of the worker before, whose array goes on as it is."""

    header: dict[str, Any]
    body: bytes | memoryview | PendingReply
    answer: PendingReply


@final
@dataclass(eq=False)
class Peer:
    """See the module. name: as errors call it. address: as it was given, host:port."""

    name: str
    address: str
    connection: Connection | None = None
    outbox: deque[OutgoingMessage] = field(default_factory=deque)
    awaited: deque[PendingReply] = field(default_factory=deque)
    changes: list[dict[str, Any]] = field(default_factory=list)
    progress: Progress | None = None

    @property
    def open(self) -> Connection:
        if self.connection is None:
            raise LostConnectionError(f"{self.name} is not connected: ask once more.")
        return self.connection

    def ask(
        self, header: Mapping[str, Any], body: bytes | memoryview | PendingReply, answer: PendingReply
    ) -> PendingReply:
        """Put a message into the outbox, with the changes of caches that come before it."""
        while len(self.changes) > MOST_CHANGES:
            self.outbox.append(OutgoingMessage({"op": "changes", "changes": self.next_changes()}, b"", PendingReply()))
        before = self.next_changes()
        self.outbox.append(OutgoingMessage({**header, "changes": before} if before else dict(header), body, answer))
        return answer

    def next_changes(self) -> list[dict[str, Any]]:
        """The first changes of caches that are still to be told, as many as one message has; they are told with it."""
        first, self.changes = self.changes[:MOST_CHANGES], self.changes[MOST_CHANGES:]
        return first

    def is_ready(self) -> bool:
        """Whether the first message of the outbox can be sent."""
        if not self.outbox:
            return False
        body = self.outbox[0].body
        return body.is_here if isinstance(body, PendingReply) else True

    def send_first(self) -> None:
        """Send it. One message at a time is at work there, so that the worker reads while this one is sent."""
        while self.awaited:
            self.receive()
        header, body, answer = self.outbox.popleft()
        if isinstance(body, PendingReply):
            if body.failure is not None:
                answer.fail(body.failure)
                return
            assert body.message is not None
            header = {**header, "dtype": body.message.header["dtype"], "shape": body.message.header["shape"]}
            body = body.message.body
        self.awaited.append(answer)
        self.open.send(header, body)

    def receive(self) -> None:
        """Wait for the next answer. The worker's error is the answer's; one of the connection is raised."""
        while not self._take(self.open.receive()):
            pass

    def receive_available(self) -> None:
        """Take what has come already, without waiting for more."""
        while self.open.has_input():
            self._take(self.open.receive())

    def _take(self, message: Message) -> bool:
        """Whether it was an answer."""
        if message.op == "alive":
            return False
        if message.op == "progress":
            self._show(message.header)
            return False
        if message.op == "closing":
            raise LostConnectionError(f"{self.name} was stopped there: start it again, and ask once more.")
        if not self.awaited:
            raise LostConnectionError(f"{self.name} has sent what nobody waits for: it is no worker of this library.")
        answer = self.awaited.popleft()
        if message.op == "error":
            answer.fail(error_of(message.header, self.name))
        else:
            answer.message = message
        return True

    def forget(self, error: Exception) -> None:
        """The connection is gone: whatever was to be sent or to come is not any more."""
        waiting = [*self.awaited, *(each.answer for each in self.outbox)]
        self.outbox.clear()
        self.awaited.clear()
        self.changes.clear()
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        for each in waiting:
            each.fail(error)

    def _show(self, header: Mapping[str, Any]) -> None:
        done, total = header.get("done"), header.get("total")
        if self.progress is not None and isinstance(done, int) and isinstance(total, int):
            self.progress(done, total)


def error_of(header: Mapping[str, Any], name: str) -> UserError:
    """A worker's error as one of ours: of the same class where it is one, with its name before the sentence."""
    kind = getattr(errors, str(header.get("kind")), None)
    is_known = isinstance(kind, type) and issubclass(kind, UserError)
    text = " ".join(str(header.get("message")).split())[:2000]
    return (kind if is_known and kind is not None else WorkerError)(f"On {name}: {text}")
