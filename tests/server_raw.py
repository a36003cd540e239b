"""A server of ours on a free port, in a thread, and clients that write bytes to it which no library would."""

import asyncio
import contextlib
import socket
import threading
import time

from openelm_mlx.server.connections import Server, listening_socket


@contextlib.contextmanager
def serving(app, settings):
    """The port that `app` listens on, in a thread, until the block ends."""
    listening = listening_socket("127.0.0.1", 0)
    server = Server(app, settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has ended while it started"
            time.sleep(0.005)
        yield listening.getsockname()[1]
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=300)


class Answer:
    """One answer: status, headers with small names, body; b"" for status None, where the server closed without a word."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def __repr__(self):
        return f"{self.status} {self.body[:300]!r}"


def read_answer(connection, has_body=True):
    """The next answer on a connection, as long as its headers say, or until the end. has_body: not of a HEAD request."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = _received(connection)
        if not piece:
            return Answer(None, {}, data)
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    status = int(lines[0].split(" ")[1])
    if not has_body:
        return Answer(status, headers, b"")
    if headers.get("transfer-encoding") == "chunked":
        return Answer(status, headers, _dechunked(connection, body))
    length = 0 if status in (204, 304) else int(headers.get("content-length", 10**9))
    while len(body) < length:
        piece = _received(connection)
        if not piece:
            break
        body += piece
    return Answer(status, headers, body[:length])


def _dechunked(connection, data):
    whole = b""
    while True:
        size, there, rest = data.partition(b"\r\n")
        if there and len(rest) >= int(size, 16) + 2:
            length = int(size, 16)
            if not length:
                return whole
            whole, data = whole + rest[:length], rest[length + 2 :]
            continue
        piece = _received(connection)
        if not piece:
            return whole
        data += piece


def _received(connection):
    try:
        return connection.recv(65536)
    except ConnectionError:
        return b""


def raw(port, *pieces, pause=0.0):
    """What a server answers to these bytes."""
    with connect(port) as connection:
        for piece in pieces:
            with contextlib.suppress(ConnectionError):
                connection.sendall(piece)
            time.sleep(pause)
        return read_answer(connection, has_body=not b"".join(pieces[:1]).startswith(b"HEAD "))


def request(path="/echo", body=b"", method=None, host="localhost:1", **headers):
    """A request as bytes; headers with _ for -."""
    lines = [f"{method or ('POST' if body else 'GET')} {path} HTTP/1.1", f"Host: {host}"]
    if body:
        headers.setdefault("Content_Length", len(body))
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
