"""Messages over a socket: a JSON header and bytes, both of bounded length, each message with a tag that only the peer can make.

    magic 4 | header length 4 | body length 8 | tag of these 16 | header, JSON | body | tag of all 16

The tags are made with a key of this connection and direction, over a number that counts messages (BLAKE2 of the lengths,
HMAC-SHA256 of all, which machines have instructions for): a damaged, repeated or
foreign message is refused, the lengths before anything is allocated for them. Before the handshake there are no keys, the
tags are zeros, and only short headers are read. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, final

from ..errors import WorkerError
from ..files import reason_of

MAGIC = b"oelm"
PREFIX = struct.Struct(">4sIQ")
TAG_BYTES = 16
_START = PREFIX.size + TAG_BYTES
# Before the handshake is done, and after it.
LARGEST_GREETING, LARGEST_HEADER = 4096, 2**20
# A body may take so long by its size beside the deadline: slower networks than this are no help.
SLOWEST_BYTES_PER_SECOND = 250_000
_NO_TAG = bytes(TAG_BYTES)
_encode = json.JSONEncoder(separators=(",", ":")).encode


class LostConnectionError(WorkerError):
    """A connection is of no use any more: the other side is gone, silent, or says what it cannot mean."""


class Message(NamedTuple):
    """A header, which has an "op", and the bytes after it."""

    header: dict[str, Any]
    body: memoryview

    @property
    def op(self) -> str:
        return str(self.header["op"])


class Keys(NamedTuple):
    """What this side's messages are signed with, and the other side's."""

    sending: bytes
    receiving: bytes


@final
class Connection:
    """One connection, seen from one side. name: the other side, in errors. deadline: seconds, of every read and write.

    largest_body: in bytes, of what is received. One thread receives; any thread may send. Interrupted by Ctrl-C while it
    waits (`is_waiting`), it can be used as if nothing had happened. Every trouble is a LostConnectionError.
    """

    def __init__(self, sock: socket.socket, name: str, deadline: float, largest_body: int = 0) -> None:
        self.name, self.deadline, self.largest_body = name, deadline, largest_body
        self.is_waiting = False
        self.heard = self.sent = time.monotonic()
        self._socket = sock
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reading, self._writing = select.poll(), select.poll()
        self._reading.register(sock, select.POLLIN)
        self._writing.register(sock, select.POLLOUT)
        self._keys: Keys | None = None
        self._num_sent = self._num_received = 0
        self._sending = threading.RLock()
        self._unsent: list[memoryview] = []
        # What has come of the message that is being received.
        self._start, self._rest = bytearray(_START), bytearray()
        self._have, self._has_start, self._header_length = 0, False, 0

    def use(self, keys: Keys, largest_body: int) -> None:
        """From now on messages are signed, and may be large."""
        self._keys, self.largest_body = keys, largest_body
        self._num_sent = self._num_received = 0

    @property
    def address(self) -> str:
        """The other side's number on its network."""
        return str(self._socket.getpeername()[0]).removeprefix("::ffff:")

    def close(self) -> None:
        """Close it; the other side is told by its network."""
        self._socket.close()

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, header: Mapping[str, Any], body: bytes | memoryview = b"") -> None:
        """Send one message. Raises LostConnectionError when it cannot be delivered within the deadline."""
        text = _encode(header).encode()
        with self._sending:
            self._flush()
            prefix = PREFIX.pack(MAGIC, len(text), len(body))
            first, last = self._tags(self._sent_key, self._num_sent, prefix, (text, body))
            self._num_sent += 1
            self._unsent = [memoryview(prefix + first + text), memoryview(body), memoryview(last)]
            self._flush(len(body))
            self.sent = time.monotonic()

    def _flush(self, num_bytes: int = 0) -> None:
        limit = time.monotonic() + self.deadline + num_bytes / SLOWEST_BYTES_PER_SECOND
        while self._unsent:
            try:
                count = self._socket.sendmsg(self._unsent)
            except BlockingIOError:
                self._wait(select.POLLOUT, limit)
                continue
            except (OSError, ValueError) as error:
                raise self._lost(error) from None
            while self._unsent and count >= len(self._unsent[0]):
                count -= len(self._unsent.pop(0))
            if count:
                self._unsent[0] = self._unsent[0][count:]

    # --- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Message:
        """The next message. timeout: seconds until it begins, the deadline when it is None."""
        limit = time.monotonic() + (self.deadline if timeout is None else timeout)
        if not self._has_start:
            self._fill(self._start, limit, waits_first=True)
            self._look_at_start()
            limit = time.monotonic() + self.deadline + len(self._rest) / SLOWEST_BYTES_PER_SECOND
        self._fill(self._rest, limit)
        message = self._opened()
        self._has_start, self._have = False, 0
        self._num_received += 1
        self.heard = time.monotonic()
        return message

    def has_input(self) -> bool:
        """Whether anything has come, which may be the end of the connection."""
        return bool(self._poll(select.POLLIN, 0))

    def _fill(self, buffer: bytearray, limit: float, waits_first: bool = False) -> None:
        view = memoryview(buffer)
        while self._have < len(buffer):
            if waits_first:
                self._wait(select.POLLIN, limit)
                waits_first = False
            try:
                count = self._socket.recv_into(view[self._have :])
            except BlockingIOError:
                self._wait(select.POLLIN, limit)
                continue
            except (OSError, ValueError) as error:
                raise self._lost(error) from None
            if count == 0:
                raise self._lost(None)
            self._have += count

    def _look_at_start(self) -> None:
        prefix, tag = bytes(self._start[: PREFIX.size]), bytes(self._start[PREFIX.size :])
        magic, header_length, body_length = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise self._damaged("it does not begin as one")
        if not hmac.compare_digest(tag, self._first_tag(self._received_key, self._num_received, prefix)):
            raise self._damaged("its tag is wrong")
        most = LARGEST_GREETING if self._keys is None else LARGEST_HEADER
        if not 0 < header_length <= most or body_length > (0 if self._keys is None else self.largest_body):
            raise self._damaged(f"it has {header_length + body_length:,} bytes, more than are read")
        self._rest = bytearray(header_length + body_length + TAG_BYTES)
        self._have, self._has_start, self._header_length = 0, True, header_length

    def _opened(self) -> Message:
        content, tag = memoryview(self._rest)[:-TAG_BYTES], bytes(self._rest[-TAG_BYTES:])
        first = bytes(self._start[PREFIX.size :])
        if not hmac.compare_digest(tag, self._last_tag(self._received_key, first, (content,))):
            raise self._damaged("its tag is wrong")
        try:
            header = json.loads(str(content[: self._header_length], "utf-8"))
        except (ValueError, RecursionError):
            raise self._damaged("its header is not JSON") from None
        if not isinstance(header, dict) or not isinstance(header.get("op"), str):
            raise self._damaged("its header does not say what it is")
        return Message(header, content[self._header_length :])

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _wait(self, what: int, limit: float) -> None:
        left = limit - time.monotonic()
        self.is_waiting = True
        ready = self._poll(what, max(0.0, left))
        self.is_waiting = False
        if not ready:
            raise LostConnectionError(
                f"{self.name} has not answered in time ({self.deadline:g} s): it sleeps, hangs, or its network is gone; "
                "wake it or start it again, and ask once more."
            )

    def _poll(self, what: int, seconds: float) -> list[tuple[int, int]]:
        if self._socket.fileno() < 0:
            raise self._lost(None)
        poller = self._reading if what == select.POLLIN else self._writing
        try:
            return poller.poll(seconds * 1000)
        except (OSError, ValueError) as error:
            raise self._lost(error) from None

    # --- tags ---------------------------------------------------------------------------------------------------------

    @property
    def _sent_key(self) -> bytes | None:
        return None if self._keys is None else self._keys.sending

    @property
    def _received_key(self) -> bytes | None:
        return None if self._keys is None else self._keys.receiving

    def _tags(
        self, key: bytes | None, number: int, prefix: bytes, content: tuple[bytes | memoryview, ...]
    ) -> tuple[bytes, bytes]:
        first = self._first_tag(key, number, prefix)
        return first, self._last_tag(key, first, content)

    @staticmethod
    def _first_tag(key: bytes | None, number: int, prefix: bytes) -> bytes:
        if key is None:
            return _NO_TAG
        # Keyed BLAKE2: for a few bytes it takes a third of an HMAC's time.
        return hashlib.blake2b(number.to_bytes(8, "big") + prefix, key=key, digest_size=TAG_BYTES).digest()

    @staticmethod
    def _last_tag(key: bytes | None, first: bytes, content: tuple[bytes | memoryview, ...]) -> bytes:
        if key is None:
            return _NO_TAG
        made = hmac.new(key, first, "sha256")
        for each in content:
            made.update(each)
        return made.digest()[:TAG_BYTES]

    # --- errors -------------------------------------------------------------------------------------------------------

    def _lost(self, error: Exception | None) -> LostConnectionError:
        reason = "" if error is None else f" ({reason_of(error)})"
        return LostConnectionError(
            f"{self.name} is gone{reason}: it was stopped, or its network was; start it again, and ask once more."
        )

    def _damaged(self, why: str) -> LostConnectionError:
        return LostConnectionError(
            f"What came from {self.name} is no message of this library, or a damaged one ({why}): check the address and "
            "port, and that nothing else answers there."
        )
