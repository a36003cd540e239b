"""How two machines meet: each proves that it knows the secret, without sending it, and for this connection alone.

    first machine: hello(versions, nonce)    worker: hello(versions, nonce)
    first machine: proof                     worker: proof, or why not

The proofs are HMACs over both hellos, so that a recorded session is of no use: its nonces are not today's. The keys that
sign every later message come from the same hellos.
"""

from __future__ import annotations

import hmac
import json
import secrets
from typing import Any

from .. import __version__
from ..errors import WorkerError
from ..files import one_line
from .framing import Connection, Keys, Message

PROTOCOL = 1
# What stands in for a secret where none is given, on one machine alone.
NO_SECRET = b"openelm_mlx on this machine alone"
# Of arrays and echoes; a chunk of a prompt has some megabytes.
LARGEST_BODY = 2**30


def meet_worker(connection: Connection, secret: bytes) -> None:
    """The first machine's side. Raises WorkerError when the worker refuses, or does not know the secret itself."""
    hello = _hello()
    connection.send(hello)
    answer = _expected(connection, connection.receive(), "hello")
    _check_versions(connection, answer.header)
    transcript = _transcript(hello, answer.header)
    connection.send({"op": "proof", "proof": _proof(secret, b"first", transcript)})
    welcome = _expected(connection, connection.receive(), "welcome")
    if not _is_proof(welcome.header, secret, b"worker", transcript):
        raise WorkerError(f"{connection.name} does not know the secret: give both machines the same --secret-file.")
    connection.use(_keys(secret, transcript, is_worker=False), LARGEST_BODY)


def meet_first(connection: Connection, secret: bytes) -> None:
    """The worker's side. Raises WorkerError when the other one is to be sent away; it has been told why."""
    theirs = connection.receive()
    if theirs.op != "hello":
        raise WorkerError(f"{connection.name} does not begin as another machine of this library would.")
    mine = _hello()
    connection.send(mine)
    _check_versions(connection, theirs.header)
    transcript = _transcript(theirs.header, mine)
    proof = connection.receive()
    if proof.op != "proof" or not _is_proof(proof.header, secret, b"first", transcript):
        connection.send({"op": "refused", "reason": "it has another secret: give both machines the same --secret-file"})
        raise WorkerError(f"{connection.name} does not know the secret.")
    connection.send({"op": "welcome", "proof": _proof(secret, b"worker", transcript)})
    connection.use(_keys(secret, transcript, is_worker=True), LARGEST_BODY)


def _hello() -> dict[str, Any]:
    return {"op": "hello", "protocol": PROTOCOL, "version": __version__, "nonce": secrets.token_hex(32)}


def _expected(connection: Connection, message: Message, op: str) -> Message:
    if message.op == "refused":
        raise WorkerError(f"{connection.name} refuses: {one_line(str(message.header.get('reason')))}.")
    if message.op != op:
        raise WorkerError(f"{connection.name} does not answer as a worker of this library would.")
    return message


def _check_versions(connection: Connection, hello: dict[str, Any]) -> None:
    mine, theirs = (PROTOCOL, __version__), (hello.get("protocol"), hello.get("version"))
    if mine != theirs:
        protocol, version = (one_line(str(each)) for each in theirs)
        raise WorkerError(
            f"{connection.name} has version {version} of openelm_mlx (protocol {protocol}), and this machine "
            f"has {__version__} (protocol {PROTOCOL}): install the same version on both."
        )


def _transcript(first: dict[str, Any], worker: dict[str, Any]) -> bytes:
    return json.dumps([first, worker], sort_keys=True).encode()


def _proof(secret: bytes, who: bytes, transcript: bytes) -> str:
    return hmac.digest(secret, b"proof of " + who + transcript, "sha256").hex()


def _is_proof(header: dict[str, Any], secret: bytes, who: bytes, transcript: bytes) -> bool:
    given = header.get("proof")
    return isinstance(given, str) and given.isascii() and hmac.compare_digest(given, _proof(secret, who, transcript))


def _keys(secret: bytes, transcript: bytes, is_worker: bool) -> Keys:
    to_worker, from_worker = (
        hmac.digest(secret, b"messages " + direction + transcript, "sha256") for direction in (b"there", b"back")
    )
    return Keys(from_worker, to_worker) if is_worker else Keys(to_worker, from_worker)
