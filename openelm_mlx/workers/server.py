"""A worker: it listens, lets in who knows the secret, and serves one first machine at a time."""

from __future__ import annotations

import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import final

from ..errors import SettingError, UserError, WorkerError
from ..files import reason_of
from ..link.addresses import is_loopback
from ..link.framing import Connection, LostConnectionError
from ..link.handshake import NO_SECRET, meet_first
from .parts import Parts, error_header
from .session import Session

# Seconds for a handshake, and how many may be under way at once: whoever does not know the secret gets no further.
HANDSHAKE_SECONDS, MOST_HANDSHAKES = 5.0, 8
# Seconds of a write to the first machine, and of a message that has begun.
DEADLINE = 10.0
# Seconds in which the one before may still be leaving: it is the same machine, where a connection was lost in a pass.
LEAVING_SECONDS = 3.0
ALL_INTERFACES = ""


@final
class Server:
    """See the module. host: None is this machine alone without a secret, and every network with one.

    Raises SettingError for a port that is taken, and where others could connect without a secret.
    """

    def __init__(
        self, parts: Parts, host: str | None, port: int, secret: bytes | None, say: Callable[[str], None]
    ) -> None:
        self._parts, self._say = parts, say
        self._secret = NO_SECRET if secret is None else secret
        self._instance = secrets.token_hex(8)
        self._socket = listening(host, port, secret is not None)
        self._waiting: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._handshakes = threading.BoundedSemaphore(MOST_HANDSHAKES)
        self._busy_with: str | None = None
        self._is_closed = False

    @property
    def port(self) -> int:
        """The port, also where the system chose it."""
        return int(self._socket.getsockname()[1])

    def serve(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Serve one first machine after the other, until Ctrl-C or `is_over`. MLX computes on the calling thread."""
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            while not is_over():
                with suppress(queue.Empty):
                    self._serve_one(self._waiting.get(timeout=0.2))
        finally:
            self.close()

    def close(self) -> None:
        """Listen no more."""
        self._is_closed = True
        self._socket.close()

    def _serve_one(self, connection: Connection) -> None:
        self._busy_with = connection.name
        self._say(f"{connection.name} is connected.")
        reason = "it has left"
        try:
            Session(connection, self._parts, self._instance, self._say).run()
        except LostConnectionError as error:
            reason = str(error).partition(": ")[0]  # what to do after it is for the other side
        except BaseException:
            with suppress(LostConnectionError):
                connection.send({"op": "closing"})
            raise
        finally:
            connection.close()
            self._busy_with = None
        self._say(f"Its caches are free, and this worker waits for the next one ({reason.rstrip('.')}).")

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                sock, place = self._socket.accept()
            except OSError:
                if self._is_closed:
                    return
                continue
            if not self._handshakes.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._shake_hands, args=(sock, str(place[0])), daemon=True).start()

    def _shake_hands(self, sock: socket.socket, host: str) -> None:
        name = f"the machine at {host.removeprefix('::ffff:')}"
        connection = None
        try:
            connection = Connection(sock, name, HANDSHAKE_SECONDS)
            meet_first(connection, self._secret)
            limit = time.monotonic() + LEAVING_SECONDS
            while self._busy_with is not None and time.monotonic() < limit:
                connection.send({"op": "alive"})
                time.sleep(0.05)
            if self._busy_with is not None:
                busy = WorkerError(f"It is busy with {self._busy_with}: try again when that is done.")
                # The other side may be that machine itself, where it names this worker twice.
                connection.send({**error_header(busy), "instance": self._instance})
                raise WorkerError(f"{name} was told that this worker is busy.")
            connection.deadline = DEADLINE
            self._waiting.put(connection)
        except (UserError, OSError, ValueError) as error:
            if isinstance(error, WorkerError) and not isinstance(error, LostConnectionError):
                self._say(f"Sent away: {error}")
            if connection is not None:
                connection.close()
            else:
                sock.close()
        finally:
            self._handshakes.release()


def listening(host: str | None, port: int, has_secret: bool) -> socket.socket:
    """The socket that a worker listens on. Raises SettingError."""
    if host is None:
        host = ALL_INTERFACES if has_secret else "127.0.0.1"
    if not has_secret and not is_loopback(host):
        raise SettingError(
            f"host is {host!r}, where other machines can connect, and there is no secret: give one that both machines "
            "share, secret_file=FILE."
        )
    try:
        if host == ALL_INTERFACES and socket.has_dualstack_ipv6():
            return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise SettingError(
            f"port {port} of {host or 'this machine'} cannot be listened on ({reason_of(error)}): another worker may have it; "
            "give another --port."
        ) from None
