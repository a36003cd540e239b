"""Messages over a socket: a JSON header and bytes, both of bounded length, each message with a tag that only the peer can make.

    magic 4 | header length 4 | body length 8 | tag of these 16 | header, JSON | body | tag of all 16

The tags are made with a key of this connection and direction, over a number that counts messages (BLAKE2 of the lengths,
HMAC-SHA256 of all, which machines have instructions for): a damaged, repeated or foreign message is refused, the lengths
before anything is allocated for them. Before the handshake there are no keys, the tags are zeros, and only short headers are
read. Nothing is ever unpickled.

A token's residual stream is a few kilobytes, and on a cable the time between two machines is what
Python does here: the tag of such a message follows by itself, so that both sides compute it at once.
Only that of a shorter one goes with it.
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
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
# A message up to so long is made one piece before it goes out, and so much is read at once.
PIECE = 2**16
# A body of fewer bytes goes out with the message's tag: that is computed sooner than a second call is made.
WITH_TAG = 2**12
_NO_TAG = bytes(TAG_BYTES)
# An HMAC hashes its key twice before anything else (RFC 2104): in blocks of SHA-256, masked so.
_BLOCK = 64
_INNER, _OUTER = (bytes(each ^ mask for each in range(256)) for mask in (0x36, 0x5C))
_encode, _decode = json.JSONEncoder(separators=(",", ":")).encode, json.JSONDecoder().decode


class LostConnectionError(WorkerError):
    """A connection is of no use any more: the other side is gone, silent, or says what it cannot mean."""


class SilentPeerError(LostConnectionError):
    """Nothing has come, or could be sent, within the deadline."""


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
class Signer:
    """Makes the tags of one direction. key: None before the handshake, when they are zeros.

    What depends on the key alone is computed once: between two passes, `hmac.digest` takes as long for that as for the
    bytes of a token.
    """

    def __init__(self, key: bytes | None) -> None:
        self._states = None
        if key is not None:
            assert 0 < len(key) <= _BLOCK
            padded = key.ljust(_BLOCK, b"\0")
            inner, outer = (hashlib.sha256(padded.translate(mask)) for mask in (_INNER, _OUTER))
            # Keyed BLAKE2: for a few bytes it takes a third of an HMAC's time.
            self._states = hashlib.blake2b(key=key, digest_size=TAG_BYTES), inner, outer

    def first(self, number: int, prefix: bytes) -> bytes:
        """Of the lengths. number: how many messages went before this one."""
        if self._states is None:
            return _NO_TAG
        made = self._states[0].copy()
        made.update(number.to_bytes(8, "big") + prefix)
        return made.digest()

    def last(self, *signed: bytes | memoryview) -> bytes:
        """Of the first tag, the header and the body, which may be one piece or several."""
        if self._states is None:
            return _NO_TAG
        inner, outer = (each.copy() for each in self._states[1:])
        for piece in signed:
            inner.update(piece)
        outer.update(inner.digest())
        return outer.digest()[:TAG_BYTES]


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
        self._is_signed = False
        self._signer = self._checker = Signer(None)
        self._num_sent = self._num_received = 0
        self._sending = threading.RLock()
        # What is still to be sent; the tag of a long message is computed when the rest is on its way.
        self._unsent: list[memoryview | Callable[[], bytes]] = []
        # What has come: the start of the next message, and what there is of it and of those after it; then a long one.
        self._came = memoryview(bytearray(PIECE))
        self._have = 0
        self._long, self._have_of_long = memoryview(b""), 0
        self._header_length = 0

    def use(self, keys: Keys, largest_body: int) -> None:
        """From now on messages are signed, and may be large."""
        self._is_signed, self.largest_body = True, largest_body
        self._signer, self._checker = Signer(keys.sending), Signer(keys.receiving)
        self._num_sent = self._num_received = 0

    @property
    def address(self) -> str:
        """The other side's number on its network."""
        return str(self._socket.getpeername()[0]).removeprefix("::ffff:")

    def close(self) -> None:
        """Close it; the other side is told by its network. A thread that is sending is woken, and done when this returns.

        Without that its next call would find another file under the number of this one.
        """
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._sending:
            self._socket.close()

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, header: Mapping[str, Any], body: bytes | memoryview = b"") -> None:
        """Send one message. Raises LostConnectionError when it cannot be delivered within the deadline."""
        text = _encode(header).encode()
        with self._sending:
            if self._unsent:
                self._flush()
            prefix = PREFIX.pack(MAGIC, len(text), len(body))
            first = self._signer.first(self._num_sent, prefix)
            self._num_sent += 1
            if len(body) < WITH_TAG:
                signed = b"".join((first, text, body))
                self._unsent = [memoryview(b"".join((prefix, signed, self._signer.last(signed))))]
            elif len(body) < PIECE:
                whole = memoryview(b"".join((prefix, first, text, body)))
                self._unsent = [whole, partial(self._signer.last, whole[PREFIX.size :])]
            else:
                start = memoryview(prefix + first + text)
                self._unsent = [start, memoryview(body), partial(self._signer.last, start[PREFIX.size :], body)]
            self._flush(len(body))
            self.sent = time.monotonic()

    def _flush(self, num_bytes: int = 0) -> None:
        limit = time.monotonic() + self.deadline + num_bytes / SLOWEST_BYTES_PER_SECOND
        while self._unsent:
            piece = self._unsent[0]
            if not isinstance(piece, memoryview):
                self._unsent[0] = piece = memoryview(piece())
            try:
                count = self._socket.send(piece) if len(piece) else 0
            except BlockingIOError:
                self._wait(select.POLLOUT, limit)
                continue
            except (OSError, ValueError) as error:
                raise self._lost(error) from None
            if count == len(piece):
                self._unsent.pop(0)
            else:
                self._unsent[0] = piece[count:]

    # --- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Message:
        """The next message. timeout: seconds until it begins, the deadline when it is None."""
        if not self._long:
            if self._have == 0:
                self._wait(select.POLLIN, time.monotonic() + (self.deadline if timeout is None else timeout))
            limit = time.monotonic() + self.deadline
            while self._have < _START:
                self._have += self._read(self._came[self._have :], limit)
            total = self._checked_start()
            if total <= PIECE:
                while self._have < total - TAG_BYTES:
                    self._have += self._read(self._came[self._have :], limit)
                expected = self._expected_tag(self._came[:total])
                while self._have < total:
                    self._have += self._read(self._came[self._have :], limit)
                return self._opened(memoryview(self._taken(total)), expected)
            self._long = memoryview(bytearray(total))
            self._have_of_long = self._have
            self._long[: self._have] = self._came[: self._have]
            self._have = 0
        limit = time.monotonic() + self.deadline + len(self._long) / SLOWEST_BYTES_PER_SECOND
        while self._have_of_long < len(self._long) - TAG_BYTES:
            self._have_of_long += self._read(self._long[self._have_of_long :], limit)
        expected = self._expected_tag(self._long)
        while self._have_of_long < len(self._long):
            self._have_of_long += self._read(self._long[self._have_of_long :], limit)
        whole, self._long = self._long, memoryview(b"")
        return self._opened(whole, expected)

    def has_input(self) -> bool:
        """Whether anything has come, which may be the end of the connection."""
        return self._have > 0 or bool(self._poll(select.POLLIN, 0))

    def _read(self, place: memoryview, limit: float) -> int:
        """How many bytes have been read into a place."""
        while True:
            try:
                count = self._socket.recv_into(place)
            except BlockingIOError:
                self._wait(select.POLLIN, limit)
                continue
            except (OSError, ValueError) as error:
                raise self._lost(error) from None
            if count == 0:
                raise self._lost(None)
            return count

    def _taken(self, total: int) -> bytes:
        """The first message of what has come, which it leaves; what came after it is the next one's."""
        taken = bytes(self._came[:total])
        self._have -= total
        if self._have:
            self._came[: self._have] = bytes(self._came[total : total + self._have])
        return taken

    def _checked_start(self) -> int:
        """How long the next message is, of which the start is there; a false one is refused."""
        prefix = bytes(self._came[: PREFIX.size])
        magic, header_length, body_length = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise self._damaged("it does not begin as one")
        if not hmac.compare_digest(self._came[PREFIX.size : _START], self._checker.first(self._num_received, prefix)):
            raise self._damaged("its tag is wrong")
        most = LARGEST_HEADER if self._is_signed else LARGEST_GREETING
        if not 0 < header_length <= most or body_length > (self.largest_body if self._is_signed else 0):
            raise self._damaged(f"it has {header_length + body_length:,} bytes, more than are read")
        self._header_length = header_length
        return int(_START + header_length + body_length + TAG_BYTES)

    def _expected_tag(self, whole: memoryview) -> bytes:
        """What the last tag of a message has to be, of which all before it is there."""
        return self._checker.last(whole[PREFIX.size : -TAG_BYTES])

    def _opened(self, whole: memoryview, expected: bytes) -> Message:
        if not hmac.compare_digest(whole[-TAG_BYTES:], expected):
            raise self._damaged("its tag is wrong")
        start = _START + self._header_length
        try:
            header = _decode(str(whole[_START:start], "utf-8"))
        except (ValueError, RecursionError):
            raise self._damaged("its header is not JSON") from None
        if not isinstance(header, dict) or not isinstance(header.get("op"), str):
            raise self._damaged("its header does not say what it is")
        self._num_received += 1
        self.heard = time.monotonic()
        return Message(header, whole[start:-TAG_BYTES])

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _wait(self, what: int, limit: float) -> None:
        left = limit - time.monotonic()
        self.is_waiting = True
        ready = self._poll(what, max(0.0, left))
        self.is_waiting = False
        if not ready:
            raise SilentPeerError(
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
