"""The layers after a model's own, on one worker after the other: `RemoteLayers` over connections.

This machine sends the residual stream to the first worker, gets it back, sends it to the second, and so on. While a prompt
is filled in, each computes a chunk of its own: the answer to chunk i is fetched when chunk i + 1 is there to be sent.

An epoch is the time of one set of connections. Once one of them is lost all are closed, and the caches of that epoch are
lost with it; the next request connects again, and its prompt is computed from its tokens.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar, cast, final

import mlx.core as mx

from ..errors import UserError, WorkerError
from ..models.adapter_sets import AdapterSet
from ..models.cache import Cache
from ..models.remote import RemoteLayers, RequestRows
from ..models.remote_cache import Keeper, RemoteCache
from ..specs import ModelSpec
from . import keep_alive
from .adapter_parts import adapters_header
from .arrays import packed, unpacked
from .framing import LostConnectionError, Message, SilentPeerError
from .peer import Peer, PendingReply

_T = TypeVar("_T")

# Seconds. A connection that was silent for so long is looked at before a request relies on it.
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class _Row:
    """One request's part of a pass: its caches on all machines, and how many tokens they get."""

    caches: Sequence[RemoteCache]
    length: int
    is_prompt: bool = False
    wants: bool = True


@final
class Chain(RemoteLayers, Keeper):
    """See the module. specs: of each worker's layers. connect: opens all connections, with the layers there ready to be used.

    Any thread may use it, one after the other.
    """

    def __init__(self, peers: Sequence[Peer], specs: Sequence[ModelSpec], connect: Callable[[], None]) -> None:
        assert len(peers) == len(specs)
        self.peers, self.specs = list(peers), list(specs)
        self._connect = connect
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._forgotten: deque[tuple[int, int, int, bool]] = deque()
        self.epoch, self.is_up = 0, False
        # The model's own, which say what a pass at work uses; the workers have their parts of them.
        self.adapters: AdapterSet | None = None
        # By number what each worker was sent of an adapter, for one that comes back; and which are not needed any more.
        self.given: dict[int, Sequence[tuple[dict[str, Any], bytes]]] = {}
        self._adapters_to_forget: deque[int] = deque()
        self._trouble: str | None = None
        self._looked = 0.0
        # A worker that was silent when it was looked at, and when that was known.
        self._silence: tuple[float, Exception] | None = None

    # --- connections --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, and begin an epoch. Raises WorkerError."""
        with self._lock:
            if self.is_up:
                return
            self.epoch += 1
            self._forgotten.clear()
            self._forget_given()
            try:
                self._connect()
            except BaseException as error:
                self._disconnect(error)
                raise
            self.is_up = True
            keep_alive.start_keep_alive(self)

    def close(self) -> None:
        """Give the workers up; they wait for the next one then."""
        with self._lock:
            for peer in self.peers:
                if self.is_up and peer.connection is not None and not peer.awaited:
                    with suppress(LostConnectionError):
                        peer.connection.send({"op": "leave"})
            self._disconnect(WorkerError("The workers were given up."))

    def read(self, read_own: Callable[[Callable[[], None]], _T]) -> _T:
        """Have the workers read their tensors while `read_own` reads this machine's, calling what it is given now and then;
        returns what it gives. Connects where they were given up meanwhile.
        """
        self.start()
        with self._at_work():
            answers = [peer.ask({"op": "read"}, b"", PendingReply()) for peer in self.peers]
            for peer in self.peers:
                peer.send_first()
        own = read_own(self.receive_available)
        with self._at_work():
            for k, answer in enumerate(answers):
                self._result(k, answer)
        return own

    def receive_available(self) -> None:
        """Take what the workers have said meanwhile."""
        with self._at_work():
            for peer in self.peers:
                peer.receive_available()

    def echo(self, k: int, body: bytes) -> None:
        """To worker k and back, for measuring: so many bytes."""
        self.ask(k, {"op": "echo"}, body)

    def ask(self, k: int, header: Mapping[str, Any], body: bytes = b"") -> Message:
        """Ask worker k for something, and wait until it is done. Raises its error."""
        with self._at_work():
            return self._result(k, self.peers[k].ask(header, body, PendingReply()))

    def give_adapter(self, number: int, messages: Sequence[tuple[dict[str, Any], bytes]]) -> None:
        """Have each worker serve its part of an adapter until `forget_adapter`. Raises the error of one that cannot."""
        with self._lock:
            try:
                try:
                    self._give(messages)
                except LostConnectionError:
                    self._give(messages)  # a worker that was gone may have come back
            except BaseException:
                self.forget_adapter(number)
                raise
            self.given[number] = messages

    def _give(self, messages: Sequence[tuple[dict[str, Any], bytes]]) -> None:
        self.start()
        for k, message in enumerate(messages):
            self.ask(k, *message)

    def forget_adapter(self, number: int) -> None:
        """An adapter is not needed any more; the workers are told with the next pass, or soon. Any thread may call it."""
        self._adapters_to_forget.append(number)

    def _disconnect(self, error: BaseException) -> None:
        # Its text alone: with an error all that its callers had would be kept.
        self.is_up, self._trouble = False, str(error) if isinstance(error, Exception) else None
        for peer in self.peers:
            peer.forget(error if isinstance(error, Exception) else WorkerError("It was interrupted."))

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """What is sent and received within it is complete, or the connections are given up.

        Ctrl-C while an answer is waited for leaves everything as it is: the answer is fetched before the next one.
        """
        with self._lock:
            try:
                yield
            except UserError as error:
                if isinstance(error, LostConnectionError):
                    self._disconnect(error)
                raise  # another one is a worker's own, whose connection is as it was
            except BaseException as error:
                connections = [peer.connection for peer in self.peers if peer.connection is not None]
                was_waiting = any(each.is_waiting for each in connections)
                if isinstance(error, Exception) or not was_waiting:
                    self._disconnect(error)
                for each in connections:
                    each.is_waiting = False
                raise

    # --- Keeper -------------------------------------------------------------------------------------------------------

    def new_number(self) -> int:
        return next(self._numbers)

    def is_here(self, epoch: int) -> bool:
        return self.is_up and epoch == self.epoch

    def look(self) -> None:
        now = time.monotonic()
        if not self.is_up:
            return
        try:
            with self._at_work():
                self._look(now)
        except SilentPeerError as error:
            self._silence = time.monotonic(), copy(error)
        except LostConnectionError:
            pass  # the next request connects again

    def _look(self, now: float) -> None:
        for peer in self.peers:
            peer.receive_available()  # a connection that has ended says so at once
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        quiet = [
            k for k, peer in enumerate(self.peers)
            if not (peer.outbox or peer.awaited) and now - peer.open.heard > LOOK_SECONDS
        ]  # fmt: skip
        answers = [(k, self.peers[k].ask({"op": "ping"}, b"", PendingReply())) for k in quiet]
        for k, answer in answers:
            self._result(k, answer)

    def tell(self, cache: RemoteCache, change: Mapping[str, Any]) -> None:
        with self._lock:
            self.peers[cache.machine].changes.append({"cache": cache.number, **change})

    def forget(self, machine: int, epoch: int, number: int, is_snapshot: bool) -> None:
        self._forgotten.append((machine, epoch, number, is_snapshot))  # without the lock: a collector may call it

    # --- RemoteLayers -------------------------------------------------------------------------------------------------

    def caches(self, window: int | None, left_padding: list[int] | None, kv_bits: int | None, room: int) -> Cache:
        padding = None if left_padding is None or not any(left_padding) else list(left_padding)
        settings = {"window": window, "left_padding": padding, "kv_bits": kv_bits, "room": room}
        return [RemoteCache(self, k, spec, settings) for k, spec in enumerate(self.specs)]

    def whole(self, h: mx.array, cache: Cache | None, left_padding: mx.array | None = None) -> mx.array:
        if cache is None:
            padding = None if left_padding is None else left_padding.tolist()
            return self._wanted("whole", h, [], {"left_padding": padding})
        return self._wanted("whole", h, [_Row(self._of(cache), 1 if h.ndim == 2 else h.shape[1])])

    def step(self, h: mx.array, cache: Cache) -> mx.array:
        return self._wanted("step", h, [_Row(self._of(cache), 1)])

    def many(self, h: mx.array, cache: Cache) -> mx.array:
        return self._wanted("many", h, [_Row(self._of(cache), h.shape[0])])

    def prompt(self, h: mx.array | None, cache: Cache, wants_last: bool) -> mx.array | None:
        assert h is not None
        row = _Row(self._of(cache), h.shape[1], True, wants_last)
        if wants_last:
            return self._wanted("prompt", h, [row])
        self._filled("prompt", h, [row])
        return None

    def chunk(self, h: mx.array, cache: Cache) -> mx.array:
        return self._wanted("chunk", h, [_Row(self._of(cache), h.shape[1], True)])

    def rows(self, h: mx.array, rows: Sequence[RequestRows]) -> mx.array | None:
        made = [_Row(self._of(each.cache), each.length, each.is_prompt, each.wants_logits) for each in rows]
        if any(each.num_logits for each in rows):
            return self._wanted("rows", h, made)
        self._filled("rows", h, made)
        return None

    def _of(self, cache: Cache) -> Sequence[RemoteCache]:
        return cast("Sequence[RemoteCache]", cache[len(cache) - len(self.peers) :])

    # --- a pass -------------------------------------------------------------------------------------------------------

    def _wanted(self, form: str, h: mx.array, rows: Sequence[_Row], more: Mapping[str, Any] | None = None) -> mx.array:
        """The residual stream after the last layer."""
        header, body = packed(h)
        header.update(more or {})
        del h
        with self._at_work():
            last = self._submit(form, header, body, rows)
            message = self._result(len(self.peers) - 1, last)
            return unpacked(message.header, message.body)

    def _filled(self, form: str, h: mx.array, rows: Sequence[_Row]) -> None:
        """Only keys and values; they are computed there while this machine goes on."""
        header, body = packed(h)
        del h
        with self._at_work():
            self._submit(form, header, body, rows)
            for peer in self.peers:
                while peer.is_ready():
                    peer.send_first()

    def _submit(self, form: str, described: dict[str, Any], body: memoryview, rows: Sequence[_Row]) -> PendingReply:
        """The pass into every worker's outbox; gives the last one's answer."""
        self._make_ready(rows)
        self._pass_on_forgotten()

        def give_up(error: Exception) -> None:
            for each in rows:
                for cache in each.caches:
                    cache.give_up(error)

        chosen = {} if self.adapters is None else adapters_header(self.adapters.selection)
        given: memoryview | PendingReply = body
        for k, peer in enumerate(self.peers):
            new, parts = {}, []
            for each in rows:
                cache = each.caches[k]
                settings = cache.begin(self.epoch)
                if settings is not None:
                    new[str(cache.number)] = settings
                parts.append([cache.number, cache.offset, each.length, int(each.is_prompt), int(each.wants)])
                cache.advance(each.length)
            header = {"op": "pass", "form": form, "rows": parts, **described, **chosen}
            if new:
                header["new"] = new
            given = peer.ask(header, given, PendingReply(give_up))
        assert isinstance(given, PendingReply)
        return given

    def _make_ready(self, rows: Sequence[_Row]) -> None:
        """Raise the error of a cache that is lost; connect again where all of them are new."""
        caches = [cache for each in rows for cache in each.caches]
        failure = next((each.failure for each in caches if each.failure is not None), None)
        if failure is not None:
            raise copy(failure)
        are_new = all(each.epoch is None for each in caches)
        if are_new:
            self.look()
        if any(each.is_lost for each in caches):
            raise self._lost()
        if not self.is_up:
            self._check_was_heard()
            self.start()

    def _check_was_heard(self) -> None:
        """Raise the error of a worker that has just been waited for in vain: another deadline would be no better."""
        silence, self._silence = self._silence, None
        if silence is not None and time.monotonic() - silence[0] < LOOK_SECONDS:
            raise silence[1]

    def _lost(self) -> WorkerError:
        reason = "" if self._trouble is None else f" ({self._trouble})"
        return WorkerError(f"The keys and values on another machine were lost with its connection{reason}")

    def _forget_given(self) -> list[int]:
        """The numbers of adapters that nobody needs any more; they are not sent again."""
        numbers = []
        while self._adapters_to_forget:
            numbers.append(self._adapters_to_forget.popleft())
            self.given.pop(numbers[-1], None)
        return numbers

    def _pass_on_forgotten(self) -> None:
        for number in self._forget_given():
            for peer in self.peers:
                peer.changes.append({"op": "forget", "adapter": number})
        while self._forgotten:
            machine, epoch, number, is_snapshot = self._forgotten.popleft()
            if epoch == self.epoch:
                op = {"op": "forget", "snapshot": number} if is_snapshot else {"op": "forget", "cache": number}
                self.peers[machine].changes.append(op)

    def _result(self, k: int, answer: PendingReply) -> Message:
        """An answer of worker k, waited for. Raises its error."""
        self._wait_for(k, answer)
        return answer.result()

    def _wait_for(self, k: int, answer: PendingReply) -> None:
        """Until it is here, an error too; what is sent before it may need the answer of the worker before."""
        peer = self.peers[k]
        while not answer.is_here:
            if not peer.outbox:
                peer.receive()
                continue
            body = peer.outbox[0].body
            if isinstance(body, PendingReply):
                self._wait_for(k - 1, body)
            peer.send_first()

    # --- while nobody asks --------------------------------------------------------------------------------------------

    def send_keep_alive(self) -> bool:
        """Tell the workers that this machine is still there, and what they may forget. False once they are given up."""
        is_idle = self._lock.acquire(blocking=False)
        try:
            if not self.is_up:
                return False
            if is_idle:
                self._pass_on_forgotten()
            for peer in self.peers:
                connection = peer.connection
                if connection is None:
                    return False
                changes: list[dict[str, Any]] = []
                if is_idle and not peer.outbox:
                    changes = peer.next_changes()
                if changes or time.monotonic() - connection.sent > keep_alive.PING_SECONDS:
                    connection.send({"op": "still here", "changes": changes})
        except LostConnectionError:
            return False  # whoever asks next finds out
        finally:
            if is_idle:
                self._lock.release()
        return True
