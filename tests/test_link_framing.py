"""Messages between machines: of bounded size, signed, each within a deadline; what is damaged is an error and never a crash."""

import hashlib
import hmac
import json
import os
import random
import select
import socket
import struct
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from worker_processes import workers

import openelm_mlx as om
from openelm_mlx.errors import WorkerError
from openelm_mlx.link import framing
from openelm_mlx.link.arrays import packed, unpacked
from openelm_mlx.link.framing import MAGIC, PREFIX, Connection, Keys, LostConnectionError, Signer
from openelm_mlx.link.handshake import NO_SECRET, meet_first, meet_worker
from openelm_mlx.workers.parts import Parts
from openelm_mlx.workers.session import Session

DEADLINE = 20.0


@pytest.fixture
def pair():
    """Two ends of a connection, and their sockets."""
    sockets = socket.socketpair()
    here, there = (Connection(each, name, DEADLINE) for each, name in zip(sockets, ("A", "B"), strict=True))
    yield here, there, sockets
    here.close()
    there.close()


def sign(here: Connection, there: Connection, largest: int = 2**20) -> Keys:
    keys = Keys(os.urandom(32), os.urandom(32))
    here.use(keys, largest)
    there.use(Keys(keys.receiving, keys.sending), largest)
    return keys


def sent_bytes(header: dict, body: bytes = b"", keys: Keys | None = None, number: int = 0) -> bytes:
    """What one message is on the wire."""
    ends = socket.socketpair()
    connection = Connection(ends[0], "A", DEADLINE)
    if keys is not None:
        connection.use(keys, 2**20)
        connection._num_sent = number
    connection.send(header, body)
    connection.close()
    data = b""
    while piece := ends[1].recv(2**20):
        data += piece
    ends[1].close()
    return data


def test_messages_go_both_ways_whole(pair):
    here, there, _ = pair
    sign(here, there, 2**24)
    body = os.urandom(3_000_000)  # more than the sockets' buffers
    threading.Thread(target=lambda: here.send({"op": "x", "n": 1}, body)).start()
    message = there.receive()
    assert (message.op, message.header["n"], bytes(message.body)) == ("x", 1, body)
    # Several that come at once, a long one among them, are read one after the other.
    sent = [{"op": "y", "n": number} for number in range(5)]
    bodies = [os.urandom(size) for size in (0, 11_520, 100_000, framing.PIECE - 1, 3)]

    def send_all() -> None:
        for header, each in zip(sent, bodies, strict=True):
            there.send(header, each)

    threading.Thread(target=send_all).start()
    assert here.has_input() or here._wait(select.POLLIN, time.monotonic() + DEADLINE) is None
    time.sleep(0.05)
    received = [here.receive() for _ in sent]
    assert [(each.header, bytes(each.body)) for each in received] == list(zip(sent, bodies, strict=True))
    assert not here.has_input()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 2, 8)])
def test_arrays_are_the_same_on_the_other_side(dtype, shape):
    array = mx.random.normal(shape).astype(dtype)
    header, body = packed(array)
    assert mx.array_equal(unpacked(json.loads(json.dumps(header)), body), array).item()
    turned = packed(array.T)  # no copy is to be seen of how it lies in memory
    assert mx.array_equal(unpacked(*turned), array.T).item()


@pytest.mark.parametrize(
    "header",
    [
        {"dtype": "float32", "shape": [4]}, {"dtype": "int8", "shape": [8]}, {"dtype": "float32", "shape": [-2]},
        {"dtype": "float32", "shape": []}, {"dtype": "float32", "shape": "2"}, {"shape": [2]}, {"dtype": [], "shape": [2]},
        {"dtype": "float32", "shape": [True, 2]}, {"dtype": "float32", "shape": [2**70]},
    ],
)  # fmt: skip
def test_arrays_that_are_none(header):
    with pytest.raises(LostConnectionError):
        unpacked(header, memoryview(bytes(8)))


@pytest.mark.parametrize("length", [1, 32, 64])
def test_tags_are_what_the_standard_library_computes(length):
    key, pieces = os.urandom(length), [os.urandom(16), os.urandom(40), os.urandom(11_520)]
    signer = Signer(key)
    for number in (0, 1, 2**40):
        expected = hashlib.blake2b(number.to_bytes(8, "big") + pieces[0], key=key, digest_size=16).digest()
        assert signer.first(number, pieces[0]) == expected
    for signed in (pieces, [b"".join(pieces)], [memoryview(pieces[1])]):
        assert signer.last(*signed) == hmac.digest(key, b"".join(signed), "sha256")[:16]


def test_closing_lets_go_of_a_thread_that_is_sending(pair):
    """Before the file's number is free for another one."""
    here, there, _ = pair
    sign(here, there, 2**30)
    ended = []

    def send() -> None:
        with pytest.raises(LostConnectionError) as caught:
            here.send({"op": "x"}, bytes(2**24))  # which nobody reads
        ended.append(str(caught.value))

    here.deadline = 600.0
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    until = time.monotonic() + DEADLINE
    while not here.is_waiting and time.monotonic() < until:
        time.sleep(0.01)
    assert here.is_waiting
    here.close()
    sender.join(DEADLINE)
    assert not sender.is_alive()
    assert "is gone" in ended[0]


@pytest.mark.parametrize("kind", ["repeated", "foreign", "unsigned", "later"])
def test_what_is_not_the_next_message_of_this_connection_is_refused(pair, kind):
    here, there, sockets = pair
    keys = sign(here, there)
    first = sent_bytes({"op": "one"}, keys=keys)
    sockets[0].send(first)
    assert there.receive().op == "one"
    wrong = {
        "repeated": first,
        "foreign": sent_bytes({"op": "two"}, keys=Keys(b"x" * 32, b"y" * 32), number=1),
        "unsigned": sent_bytes({"op": "two"}),
        "later": sent_bytes({"op": "three"}, keys=keys, number=2),
    }
    sockets[0].send(wrong[kind])
    with pytest.raises(LostConnectionError, match="its tag is wrong"):
        there.receive()


@pytest.mark.parametrize(("header", "body"), [(2**31, 0), (20, 101), (20, 2**62)])
def test_huge_messages_are_refused_before_memory_is_taken(pair, monkeypatch, header, body):
    here, there, sockets = pair
    keys = sign(here, there, largest=100)
    prefix = PREFIX.pack(MAGIC, header, body)
    sockets[0].send(prefix + Signer(keys.sending).first(0, prefix))
    monkeypatch.setattr(framing, "bytearray", None, raising=False)
    with pytest.raises(LostConnectionError, match=f"it has {header + body:,} bytes, more than are read"):
        there.receive()


def test_before_the_handshake_messages_are_short(pair):
    _, there, sockets = pair
    sockets[0].send(PREFIX.pack(MAGIC, 20, 1) + bytes(16))
    with pytest.raises(LostConnectionError, match="more than are read"):
        there.receive()


def error_in_time(call, *args) -> str:
    """The LostConnectionError of a call, which runs in a thread: one that waits for ever fails the test and nothing else."""
    ended = []

    def run() -> None:
        with pytest.raises(LostConnectionError) as caught:
            call(*args)
        ended.append(str(caught.value))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert ended, "it waits for ever, or has ended without an error"
    return ended[0]


def test_half_a_message_and_silence_end_with_the_deadline(pair):
    _, there, sockets = pair
    there.deadline = 0.2
    assert "has not answered in time" in error_in_time(there.receive)
    sockets[0].send(sent_bytes({"op": "x"})[:-3])
    assert "has not answered in time" in error_in_time(there.receive)
    sockets[0].close()
    assert "is gone" in error_in_time(there.receive)


def test_who_does_not_read_is_given_up(pair, monkeypatch):
    here, there, _ = pair
    sign(here, there, 2**30)
    here.deadline = 0.2
    monkeypatch.setattr(framing, "SLOWEST_BYTES_PER_SECOND", 10**9)
    assert "has not answered in time" in error_in_time(here.send, {"op": "x"}, bytes(2**24))


def test_a_receiver_that_was_interrupted_goes_on(pair, monkeypatch):
    here, there, sockets = pair
    data = sent_bytes({"op": "x"}, b"abc" * 100, keys=sign(here, there))
    sockets[0].send(data[:50])
    wait = there._wait

    def interrupted(*_):
        monkeypatch.setattr(there, "_wait", wait)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        calls = iter([wait, interrupted])
        patched.setattr(there, "_wait", lambda *args: next(calls)(*args))
        with pytest.raises(KeyboardInterrupt):
            there.receive()
    sockets[0].send(data[50:])
    assert bytes(there.receive().body) == b"abc" * 100


HEADERS = [b"[]", b"{", b"{}", b'{"op": 3}', b"[" * 4000, b'"op"', b"\xff\xfe", b'{"op": "\\ud800"}', b"1e999", b"nul"]


@pytest.mark.parametrize("text", HEADERS, ids=repr)
def test_headers_that_say_nothing(pair, text):
    _, there, sockets = pair
    sockets[0].send(PREFIX.pack(MAGIC, len(text), 0) + bytes(16) + text + bytes(16))
    if text == HEADERS[-3]:
        assert there.receive().op == "\ud800"
        return
    with pytest.raises(LostConnectionError):
        there.receive()


# --- many damaged messages --------------------------------------------------------------------------------------------


def damaged(random_: random.Random, data: bytes) -> bytes:
    """Bits turned, bytes lost, doubled, or put in, or something else altogether."""
    kind = random_.randrange(6)
    at = random_.randrange(len(data))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << random_.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + 1 + random_.randrange(20) :]
    if kind == 3:
        return data[:at] + random_.randbytes(1 + random_.randrange(20)) + data[at:]
    if kind == 4:
        return random_.randbytes(1 + random_.randrange(200))
    return MAGIC + struct.pack(">IQ", random_.randrange(2**32), random_.randrange(2**64)) + random_.randbytes(40) + data


def test_4000_damaged_messages_are_errors_and_nothing_else():
    random_ = random.Random(22)
    for number in range(4000):
        keys = Keys(b"k" * 32, b"l" * 32) if number % 2 else None
        header = {"op": "pass", "form": "step", "rows": [[1, 40, 1, 0, 1]], "dtype": "float32", "shape": [8]}
        data = sent_bytes(header, b"" if keys is None else os.urandom(32), keys)
        ends = socket.socketpair()
        connection = Connection(ends[1], "B", DEADLINE)
        if keys is not None:
            connection.use(Keys(keys.receiving, keys.sending), 2**20)
        wrong = damaged(random_, data)
        ends[0].send(wrong)
        ends[0].close()
        try:
            message = connection.receive()
        except LostConnectionError:
            continue
        finally:
            connection.close()
        # Without keys a turned bit may make another message of the greeting, and what comes after a whole one is not read.
        assert keys is None or wrong.startswith(data)
        assert isinstance(message.op, str)


@pytest.mark.slow
def test_a_worker_outlives_1000_damaged_sessions():
    """Damage in a handshake, and after it by somebody who knows the secret; the worker serves who comes next."""
    random_ = random.Random(7)
    with workers(1) as [worker]:

        def connected() -> Connection:
            return Connection(socket.create_connection(("127.0.0.1", worker.port)), "the worker", DEADLINE)

        hello = sent_bytes({"op": "hello", "protocol": 1, "version": "0.1.0", "nonce": "00" * 32})
        for _ in range(950):
            with socket.create_connection(("127.0.0.1", worker.port)) as sock:
                sock.sendall(damaged(random_, hello))
        odd = [
            {"op": "pass"}, {"op": "pass", "form": "step", "rows": [[1]], "dtype": "float32", "shape": [2]}, {"op": "prepare"},
            {"op": "prepare", "demo": "../../etc", "repo": "../x", "start": 1, "stop": 2}, {"op": "read"}, {"op": "facts"},
            {"op": "prepare", "demo": "demo-openelm", "identity": "x", "start": {}, "stop": None}, {"op": "nothing"},
            {"op": "changes", "changes": [{"op": "rewind"}]}, {"op": "changes", "changes": 3}, {"op": "ping", "changes": {}},
            {"op": "echo"}, {"op": "leave"}, {"op": "adapter", "number": 3, "pairs": [["x", 1.0, {}]]},
            {"op": "prepare", "demo": "demo-openelm", "identity": [], "adapter_bytes": ["x", {}], "dense_bits": "y"},
        ]  # fmt: skip
        for number in range(50):
            connection = connected()
            for _ in range(40):  # the one before may not have been given up yet
                try:
                    meet_worker(connection, NO_SECRET)
                    connection.send(odd[number % len(odd)], random_.randbytes(8))
                    connection.receive()
                    break
                except WorkerError as error:
                    connection.close()
                    if "is gone" in str(error):
                        break
                    time.sleep(0.05)
                    connection = connected()
            connection.close()
        assert worker.process.poll() is None
        model, _ = load_patiently(worker)
        alone, _ = om.load("demo-openelm", dtype="float32")
        tokens = mx.array(np.arange(3, 9)[None])
        assert mx.array_equal(model(tokens), alone(tokens)).item()
        assert not any("Traceback" in line for line in worker.lines)


def load_patiently(worker):
    for _ in range(100):
        try:
            return om.load("demo-openelm", dtype="float32", workers=[worker.address])
        except WorkerError as error:
            if "busy" not in str(error) and "gone" not in str(error):
                raise
            time.sleep(0.1)
    raise AssertionError("the worker never became free")


def test_a_handshake_with_who_makes_no_sense():
    for theirs in ({"op": "hello"}, {"op": "hello", "protocol": 1, "version": "0.1.0", "nonce": []}, {"op": "proof"}):
        ends = socket.socketpair()
        mine = Connection(ends[0], "it", 0.3)
        other = Connection(ends[1], "me", 0.3)
        other.send(theirs)
        with pytest.raises(WorkerError):
            meet_first(mine, b"x" * 16)
        mine.close()
        other.close()


def met(mine: Connection, other: Connection, secret: bytes = b"x" * 16) -> None:
    """A handshake of both sides."""
    worker = threading.Thread(target=meet_first, args=(other, secret))
    worker.start()
    meet_worker(mine, secret)
    worker.join(DEADLINE)


@pytest.mark.parametrize("kind", ["none", "made up", "sent back"])
def test_a_worker_that_does_not_know_the_secret_is_left(pair, kind):
    """It may say that all is well: who has something to compute for it does not believe that."""
    mine, other, _ = pair

    def pretend() -> None:
        hello = other.receive().header
        other.send({**hello, "nonce": "00" * 32})
        proof = {"none": None, "made up": "00" * 32, "sent back": other.receive().header["proof"]}
        other.send({"op": "welcome", "proof": proof[kind]})

    worker = threading.Thread(target=pretend)
    worker.start()
    with pytest.raises(WorkerError, match="A does not know the secret"):
        meet_worker(mine, b"x" * 16)
    worker.join(DEADLINE)


def test_what_was_sent_is_no_answer_to_itself(pair):
    """Each direction has a key of its own: whoever is between two machines cannot send back what it has heard."""
    mine, other, sockets = pair
    met(mine, other)
    mine.send({"op": "echo"})
    sockets[1].setblocking(True)
    sockets[1].sendall(sockets[1].recv(4096))
    with pytest.raises(LostConnectionError, match="its tag is wrong"):
        mine.receive()


def served(there: Connection, **replaced) -> tuple[threading.Thread, list[str]]:
    """A worker's session on a thread; how it ended is in the list then. replaced: what it does otherwise, by method."""
    session, ended = Session(there, Parts(None, None), "here", lambda line: None), []
    for name, method in replaced.items():
        setattr(session, name, method)

    def serve() -> None:
        try:
            session.run()
        except LostConnectionError as error:
            ended.append(str(error))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread, ended


def test_a_worker_gives_up_a_first_machine_that_says_nothing(pair, monkeypatch):
    """Else a laptop that was closed would keep it busy for ever: nobody ends that connection."""
    monkeypatch.setattr("openelm_mlx.workers.session.LONGEST_SILENCE", 0.2)
    here, there, _ = pair
    sign(here, there)
    thread, ended = served(there)
    here.send({"op": "echo"})
    assert here.receive().op == "echo"
    thread.join(DEADLINE)
    assert "has not answered in time" in ended[0]


def test_a_worker_says_that_it_is_at_work(pair):
    """As often as the first machine's deadline asks for, for as long as it takes."""
    here, there, _ = pair
    sign(here, there)
    is_done = threading.Event()

    def computed(message):
        is_done.wait(DEADLINE)
        return {"op": "done"}, b""

    thread, _ = served(there, _passed=computed)
    here.send({"op": "facts", "deadline": 0.3})
    assert here.receive().op == "facts"
    here.send({"op": "pass"})
    here.deadline = DEADLINE / 4
    assert [here.receive().op for _ in range(3)] == ["alive"] * 3
    is_done.set()
    while (message := here.receive()).op == "alive":
        pass
    assert message.op == "done"
    here.send({"op": "leave"})
    thread.join(DEADLINE)
    assert not thread.is_alive()
