"""What goes wrong between machines is one sentence within a deadline, and the first machine can be used afterwards."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import random_model, save_folder
from worker_processes import ROOT, Worker, workers

import openelm_mlx as om
from openelm_mlx.commands import main
from openelm_mlx.errors import CheckpointError, MemoryLimitError, SettingError, UserError, WorkerError
from openelm_mlx.link.addresses import Address, dial, own_addresses, parse_workers
from openelm_mlx.link.chain import LOOK_SECONDS
from openelm_mlx.link.framing import Connection
from openelm_mlx.link.handshake import NO_SECRET, PROTOCOL, meet_worker
from openelm_mlx.link.secret import read_secret
from openelm_mlx.link.team import Team

DEMO, LAYERS = "demo-openelm", (5, 3)
# Seconds. A fault is known at once, or after this; on a loaded machine everything takes longer.
DEADLINE, PATIENCE = 3.0, 60.0
# Where nothing can come any more, and who waits is known to.
SHORT_DEADLINE = 0.7


@pytest.fixture(scope="module")
def lasting():
    """One worker after the other: a new process costs more than most tests do with it."""
    made: list[Worker] = []
    yield made
    for each in made:
        each.kill()


@pytest.fixture
def worker(lasting):
    """A worker that nobody is connected to; the one of the test before, unless that has ended it."""
    if not lasting or lasting[-1].process.poll() is not None:
        lasting.append(Worker())
    made = lasting[-1]
    made.since = len(made.lines)
    yield made
    gc.collect()  # of a test that failed, the model may still be there
    if made.process.poll() is None and not made.is_free():
        made.kill()


@pytest.fixture(scope="module")
def whole():
    return om.load(DEMO, dtype="float32")


def load(*made: Worker, **options):
    options = {"layers": LAYERS, "worker_timeout": DEADLINE, "dtype": "float32", **options}
    return om.load(DEMO, workers=[each.address for each in made], **options)


def answer(model, tokenizer, **options) -> str:
    return om.generate(model, tokenizer, "What is a banjo?", max_tokens=4, **options)


def took(call) -> float:
    began = time.monotonic()
    with pytest.raises(WorkerError):
        call()
    return time.monotonic() - began


def refusal(*made: Worker, **options) -> str:
    try:
        load(*made, **options)
    except UserError as error:
        return str(error)  # without its traceback, in which the workers are still known
    pytest.fail("it was loaded")


def test_a_load_that_is_refused_lets_the_workers_go(worker, tmp_path):
    """At once, and not when Python next looks for garbage: whoever tries again would be told that they are busy."""
    gc.disable()
    try:
        assert "nothing-here" in refusal(worker, tokenizer=tmp_path / "nothing-here")
        worker.said("waits for the next one")
    finally:
        gc.enable()


# --- a worker that goes -----------------------------------------------------------------------------------------------


def test_a_killed_worker_is_an_error_and_its_successor_goes_on(worker, whole):
    model, tokenizer = load(worker)
    store = om.PrefixCache()
    expected = answer(*whole)
    assert answer(model, tokenizer, prefix_cache=store) == expected
    worker.kill()
    with pytest.raises(WorkerError, match=r"127\.0\.0\.1.* is gone|No worker answers at 127"):
        answer(model, tokenizer, prefix_cache=store)
    successor = Worker(port=worker.port)
    try:
        # What the first machine has kept of the prompt is of no use without the other half: it is computed again.
        assert answer(model, tokenizer, prefix_cache=store) == expected
        chunks = list(om.stream_generate(model, tokenizer, "What is a banjo?", max_tokens=4, prefix_cache=store))
        assert chunks[-1].statistics.cached_tokens > 0
    finally:
        successor.kill()


def test_a_connection_that_ended_between_requests_is_made_again(worker, whole):
    """By the next request, however soon it comes after one that found the workers there."""
    model, tokenizer = load(worker)
    expected, store = answer(*whole), om.PrefixCache()
    for end in ("close", "shutdown"):
        assert answer(model, tokenizer, prefix_cache=store) == expected
        model.remote.look()
        connection = model.remote.peers[0].connection
        if end == "close":
            connection.close()
        else:
            connection._socket.shutdown(socket.SHUT_RDWR)
        # What was kept of the prompt went with the connection, and nobody relies on it.
        assert answer(model, tokenizer, prefix_cache=store) == expected
        assert model.remote.peers[0].connection is not connection


def test_a_worker_hears_of_a_first_machine_that_asks_for_nothing(worker, monkeypatch):
    """It would give up one that is silent: whose user reads, or thinks."""
    monkeypatch.setattr("openelm_mlx.link.keep_alive.PING_SECONDS", 0.1)
    model, _ = load(worker)
    connection = model.remote.peers[0].connection
    for _ in range(2):
        sent, limit = connection.sent, time.monotonic() + PATIENCE
        while connection.sent == sent:
            assert time.monotonic() < limit
            time.sleep(0.01)


def test_caches_of_another_length_are_an_error_and_never_wrong_text(worker, whole):
    """What the worker then has is given up; the next request is served."""
    model, tokenizer = load(worker)
    caches, token = model.make_cache(), mx.array([[5]])
    model(mx.array([[5, 6, 7]]), caches)
    caches[-1].offset -= 1
    with pytest.raises(WorkerError, match="A cache has 3 tokens here, and 2 on the first machine"):
        model(token, caches)
    # The numbers are the same by now, and what they stand for is not.
    with pytest.raises(WorkerError, match="A cache has 3 tokens here, and 2 on the first machine"):
        model(token, caches)
    assert answer(model, tokenizer) == answer(*whole)


def test_a_worker_killed_in_an_answer(worker, whole):
    model, tokenizer = load(worker)
    chunks = om.stream_generate(model, tokenizer, "What is a banjo?", max_tokens=200)
    next(chunks)
    worker.kill()
    with pytest.raises(WorkerError, match="is gone"):
        list(chunks)
    with pytest.raises(WorkerError, match="No worker answers at 127"):
        answer(model, tokenizer)


def test_a_stopped_worker_is_given_up_after_the_deadline(worker, whole):
    model, tokenizer = load(worker)
    chunks = om.stream_generate(model, tokenizer, "What is a banjo?", max_tokens=200)
    next(chunks)
    os.kill(worker.process.pid, signal.SIGSTOP)
    model.remote.peers[0].connection.deadline = SHORT_DEADLINE
    try:
        assert SHORT_DEADLINE * 0.5 < took(lambda: list(chunks)) < PATIENCE
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
    worker.said("waits for the next one")
    assert answer(model, tokenizer) == answer(*whole)


def test_a_worker_that_was_stopped_between_requests_is_waited_for_once(worker, whole, monkeypatch):
    """Not for the old connection and then for a new one; the next request connects again."""
    model, tokenizer = load(worker)
    store, connections, connect = om.PrefixCache(), [], model.remote._connect
    expected = answer(*whole)
    assert answer(model, tokenizer, prefix_cache=store) == expected
    monkeypatch.setattr(model.remote, "_connect", lambda: (connections.append(1), connect()))
    model.remote.peers[0].connection.deadline = 0.5
    os.kill(worker.process.pid, signal.SIGSTOP)
    try:
        time.sleep(LOOK_SECONDS + 0.1)
        with pytest.raises(WorkerError, match="has not answered in time"):
            answer(model, tokenizer, prefix_cache=store)
        assert not connections
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
    assert answer(model, tokenizer, prefix_cache=store) == expected
    assert len(connections) == 1


class SlowNetwork:
    """Between a first machine and a worker: small pieces, each a little late, and while it `is_out` none at all."""

    def __init__(self, port: int) -> None:
        self.is_out, self._port = threading.Event(), port
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._server]
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._sockets:
            with suppress(OSError):  # a thread that reads from it is told, and the worker too
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                ends = self._server.accept()[0], socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            self._sockets += ends
            for pair in (ends, ends[::-1]):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(700):
                time.sleep(0.001)
                while self.is_out.is_set():
                    time.sleep(0.01)
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)  # closed, it would stay open for the thread that reads from it
        except OSError:
            return


def test_a_slow_network_and_one_that_goes_away(worker, whole):
    network = SlowNetwork(worker.port)
    try:
        model, tokenizer = om.load(
            DEMO, dtype="float32", layers=LAYERS, worker_timeout=DEADLINE, workers=[network.address]
        )
        assert answer(model, tokenizer) == answer(*whole)
        chunks = om.stream_generate(model, tokenizer, "What is a banjo?", max_tokens=200)
        next(chunks)
        network.is_out.set()
        model.remote.peers[0].connection.deadline = SHORT_DEADLINE
        assert SHORT_DEADLINE * 0.5 < took(lambda: list(chunks)) < PATIENCE
        network.is_out.clear()
        worker.said("waits for the next one")
        assert answer(model, tokenizer) == answer(*whole)
    finally:
        network.close()


def test_an_engine_s_requests_fail_and_the_engine_lives(worker, whole):
    model, tokenizer = load(worker)
    expected = answer(*whole)
    with om.Engine(model, tokenizer) as engine:
        handles = [engine.submit(f"What is a {each}?", max_tokens=300) for each in ("banjo", "piano", "cat")]
        next(iter(handles[0]))
        worker.kill()
        for handle in handles:
            with pytest.raises(WorkerError):
                list(handle)
        successor = Worker(port=worker.port)
        try:
            text = "".join(chunk.text for chunk in engine.submit("What is a banjo?", max_tokens=4))
            assert text == expected
        finally:
            successor.kill()


def interrupted(chunks):
    list(chunks)
    time.sleep(PATIENCE)


def test_ctrl_c_here_leaves_a_worker_that_waits_for_the_next(worker, whole):
    model, tokenizer = load(worker)
    chunks = om.stream_generate(model, tokenizer, "What is a banjo?", max_tokens=300)
    next(chunks)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        interrupted(chunks)
    assert answer(model, tokenizer) == answer(*whole)
    before = len(worker.lines)
    model.remote.close()
    worker.said("waits for the next one", start=before - 1)
    other, _ = load(worker)
    assert answer(other, tokenizer) == answer(*whole)


def test_ctrl_c_there_is_told_here(worker):
    model, tokenizer = load(worker)
    assert answer(model, tokenizer)
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait(PATIENCE) == 130
    with pytest.raises(WorkerError):
        answer(model, tokenizer)


def test_a_first_machine_that_is_killed_frees_the_worker(worker):
    loading = f"kept = om.load({DEMO!r}, workers=[{worker.address!r}], layers=(5, 3))"
    script = f"import openelm_mlx as om; {loading}; print('up'); input()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        with pytest.raises(WorkerError, match="busy with the machine at"):
            load(worker)
    finally:
        child.kill()
        child.wait(PATIENCE)
    # Without what to do about it, which is for the other side.
    assert "ask once more" not in worker.said("waits for the next one (the machine at 127.0.0.1 is gone")
    assert answer(*load(worker))


def test_a_worker_named_twice_under_two_names_is_no_stranger_s(worker):
    """It is busy, with this machine itself."""
    twice = f"names the same worker twice, as {worker.address} and as localhost:{worker.port}: give each machine once"
    with pytest.raises(SettingError, match=re.escape(twice)):
        om.load(DEMO, workers=[worker.address, f"localhost:{worker.port}"], worker_timeout=DEADLINE)
    assert answer(*load(worker))  # it has been let go


# --- a worker that is not there, or not the right one -----------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_worker_that_was_never_there():
    port = free_port()
    with pytest.raises(WorkerError, match=rf"No worker answers at 127\.0\.0\.1:{port}.*serve-layers --port {port}"):
        om.load(DEMO, workers=[f"127.0.0.1:{port}"], worker_timeout=DEADLINE)
    with pytest.raises(WorkerError, match=r"There is no machine nowhere\.invalid"):
        dial(Address("nowhere.invalid", 7777), DEADLINE)


@pytest.fixture(params=["silent", "talks", "half", "closes"])
def stranger(request):
    """Something else that listens on a port."""
    server = socket.create_server(("127.0.0.1", 0))
    kept = []

    def listen():
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            kept.append(sock)
            if request.param == "talks":
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64))
            elif request.param == "half":
                sock.sendall(b"oelm\0\0")
            elif request.param == "closes":
                sock.close()

    threading.Thread(target=listen, daemon=True).start()
    yield server.getsockname()[1]
    server.close()
    for each in kept:
        each.close()


def test_what_else_answers_there(stranger):
    assert took(lambda: om.load(DEMO, workers=[f"127.0.0.1:{stranger}"], worker_timeout=0.5)) < PATIENCE


def test_a_folder_that_only_this_machine_has(worker, tmp_path):
    folder = save_folder(tmp_path / "mine", random_model(), "llama")
    with pytest.raises(WorkerError, match=r"is a folder or file of the first machine.*--model"):
        om.load(folder, workers=[worker.address])


def test_a_worker_with_a_model_of_its_own(tmp_path):
    mine = save_folder(tmp_path / "mine", random_model(), "llama")
    same = save_folder(tmp_path / "same", random_model(), "llama")
    other = save_folder(tmp_path / "other", random_model(seed=1), "llama")
    with workers(1, "--model", str(same), "--host", "127.0.0.1") as [worker]:
        model, _ = om.load(mine, workers=[worker.address], layers=(1, 2))
        alone, _ = om.load(mine)
        tokens = mx.array([[5, 6, 7]])
        assert mx.array_equal(alone(tokens), model(tokens)).item()
        model.remote.close()
        # The same shapes, and other weights: headers alone would not tell.
        with pytest.raises(CheckpointError, match="same here is another model than other on the first machine"):
            om.load(other, workers=[worker.address])
        with pytest.raises(CheckpointError, match="another model"):
            om.load(DEMO, workers=[worker.address])


def test_another_version(worker, monkeypatch):
    monkeypatch.setattr("openelm_mlx.link.handshake.__version__", "9.9.9")
    with pytest.raises(WorkerError, match=r"has version 0\.\d.*and this machine has 9\.9\.9.*same version on both"):
        load(worker)
    monkeypatch.setattr("openelm_mlx.link.handshake.PROTOCOL", PROTOCOL + 1)
    with pytest.raises(WorkerError, match="same version on both"):
        load(worker)


# --- the secret -------------------------------------------------------------------------------------------------------


def secret_file(folder: Path, text: str = "a secret of some length", mode: int = 0o600) -> Path:
    path = folder / f"secret-{len(list(folder.iterdir()))}"
    path.write_text(text + "\n")
    path.chmod(mode)
    return path


def test_only_who_knows_the_secret_gets_layers(tmp_path):
    right, wrong = secret_file(tmp_path), secret_file(tmp_path, "another secret of some length")
    with workers(1, "--secret-file", str(right)) as [worker]:
        assert "every machine that has the secret" in worker.lines[0]
        for given in (wrong, None):
            with pytest.raises(WorkerError, match="another secret: give both machines the same --secret-file"):
                load(worker, secret_file=given)
        model, tokenizer = load(worker, secret_file=right)
        assert answer(model, tokenizer)
        command = Path(f"/proc/{worker.process.pid}/cmdline")
        if command.exists():
            assert b"a secret of" not in command.read_bytes()


def test_a_recorded_session_is_refused(worker):
    """Everything that a first machine sent, sent once more, is not what the worker's new nonce asks for."""
    recorded = bytearray()
    with socket.create_connection(("127.0.0.1", worker.port)) as sock:
        connection = Connection(sock, "the worker", DEADLINE)
        send = sock.send

        class Recorder:
            def __getattr__(self, name):
                return getattr(sock, name)

            def send(self, piece):
                recorded.extend(piece)
                return send(piece)

        connection._socket = Recorder()
        meet_worker(connection, NO_SECRET)
        connection.send({"op": "facts"})
        assert connection.receive().op == "facts"
    with socket.create_connection(("127.0.0.1", worker.port)) as sock:
        sock.sendall(recorded)
        connection = Connection(sock, "the worker", PATIENCE)
        assert connection.receive().op == "hello"
        answer = connection.receive()
        assert (answer.op, "secret" in answer.header["reason"]) == ("refused", True)


def test_secret_files(tmp_path):
    assert read_secret(secret_file(tmp_path)) == b"a secret of some length"
    with pytest.raises(SettingError, match=r"can be read by others \(mode 644\): run `chmod 600"):
        read_secret(secret_file(tmp_path, mode=0o644))
    with pytest.raises(SettingError, match="has 5 bytes, and at least 16"):
        read_secret(secret_file(tmp_path, "short"))
    with pytest.raises(SettingError, match=r"There is no secret file .*umask 077"):
        read_secret(tmp_path / "nothing")
    with pytest.raises(SettingError):
        read_secret(tmp_path)


# --- what a user gets wrong -------------------------------------------------------------------------------------------


def test_addresses(tmp_path):
    assert parse_workers("mac2.local:7000, mac3.local") == [Address("mac2.local", 7000), Address("mac3.local", 7777)]
    assert parse_workers(["[fe80::1%en0]:80"]) == [Address("fe80::1%en0", 80)]
    assert str(Address("::1", 80)) == "[::1]:80"
    (tmp_path / "macs").write_text("mac2.local:7000  # upstairs\n\nmac3.local\n")
    assert len(parse_workers(str(tmp_path / "macs"))) == 2
    for wrong in ("", ",", "a:0", "a:99999", "a b", ["a", "a:7777"], ["x"] * 17, 3, [None], "a:b"):
        with pytest.raises(SettingError):
            parse_workers(wrong)
    ifconfig = "lo0: inet 127.0.0.1 netmask\nen0: inet 192.168.1.7 x\nbridge0: inet 169.254.3.4 x\n"
    assert own_addresses(lambda command: ifconfig if command[0] == "ifconfig" else "") == ["192.168.1.7", "169.254.3.4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": "mac2.local:7777"}, "secret_file=FILE"),
        ({"workers": ["127.0.0.1:1"], "layers": "3,x"}, "layers is '3,x'"),
        ({"workers": ["127.0.0.1:1"], "worker_timeout": -1}, "worker_timeout is -1"),
        ({"layers": (3, 5)}, "layers is for other machines"),
        ({"secret_file": "x"}, "secret_file is for other machines"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(SettingError, match=message):
        om.load(DEMO, **options)


def test_layers_that_do_not_add_up_and_too_little_memory(worker, monkeypatch):
    with pytest.raises(SettingError, match="layers is 3,4, together 7, and the model has 8 layers"):
        load(worker, layers=(3, 4))
    worker.said("waits for the next one (it has left)")  # and not that its first machine is gone
    with pytest.raises(SettingError, match="layers has 3 numbers for 2 machines"):
        load(worker, layers=(3, 4, 1))
    with pytest.raises(SettingError, match="at least one layer"):
        load(worker, layers=(8, 0))
    with pytest.raises(MemoryLimitError, match=r"layers 0 to 4 on .*are missing"):
        load(worker, memory_limit="1MB")
    with workers(1, "--memory-limit", "1MB") as [small]:
        with pytest.raises(
            MemoryLimitError, match=r"layers 5 to 7 on .*, and 1\.0 MB are allowed there; .* are missing"
        ):
            load(small)
        # It has the last word: what it may use could be less by now.
        monkeypatch.setattr("openelm_mlx.link.team.is_whole", lambda value: False)
        with pytest.raises(MemoryLimitError, match=r"On the worker 127\.0\.0\.1.*, and 1\.0 MB are allowed"):
            load(small)


def test_on_the_command_line(worker, capsys):
    """One sentence and exit code 2, in the command line's words."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "openelm_mlx", *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )

    done = run("generate", "Hi", "--workers", worker.address, "--layers", "5,3", "--max-tokens", "3", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert main(["generate", "Hi", "--max-tokens", "3", "-q"]) == 0
    assert done.stdout == capsys.readouterr().out
    failed = run("generate", "Hi", "--workers", f"127.0.0.1:{free_port()}", "--worker-timeout", "2", "-q")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    assert "No worker answers" in failed.stderr


def test_errors_name_options_as_they_are_typed(worker, capsys, tmp_path):
    there = ["--workers", worker.address]
    for arguments, said in (
        (["--workers", "mac2.local:7777"], "give both sides the same file, --secret-file FILE.\n"),
        (
            ["--model", "demo-gpt-oss", "--kv-bits", "8", "--layers", "1,5", *there],
            "give it one more, --layers 2,...\n",
        ),
        (["--prompt-cache", str(tmp_path / "kept"), *there], "leave one of --prompt-cache and --workers out.\n"),
    ):
        assert main(["generate", "Hi", "-q", *arguments]) == 2
        assert capsys.readouterr().err.endswith(said)


def test_what_a_worker_cannot_start_with(worker, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("openelm_mlx.workers.server.Server.serve", lambda *_: pytest.fail("it serves"))
    for arguments, said in (
        (["--secret-file", str(secret_file(tmp_path, mode=0o640))], "chmod 600"),
        (["--host", "0.0.0.0", "--port", "0"], "one that both machines share, --secret-file FILE.\n"),
        (["--quiet", "--port", str(worker.port)], "cannot be listened on"),
    ):
        assert main(["serve-layers", *arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert said in shown.err


@pytest.mark.parametrize(("nearest", "expected"), [("localhost", 2), ("127.0.0.1", 1)])
def test_the_nearest_of_a_worker_s_addresses_is_taken(tmp_path, monkeypatch, nearest, expected):
    """A worker tells its other addresses; one that is clearly nearer is gone over to, and is the same worker."""
    secret, learn = secret_file(tmp_path), Team._learn
    seconds = {nearest: 0.001}

    def learned(team, member):
        learn(team, member)
        member.other_addresses = ["localhost", "192.0.2.1"]

    def latency(family, place, most):
        if place[0].startswith("192."):
            raise OSError("no way there")
        return seconds.get(place[0], 0.004)

    monkeypatch.setattr(Team, "_learn", learned)
    monkeypatch.setattr("openelm_mlx.link.team.is_loopback", lambda host: False)
    monkeypatch.setattr("openelm_mlx.link.team.latency_of", latency)
    with workers(1, "--secret-file", str(secret), "--host", "127.0.0.1") as [worker]:
        assert "to this machine alone (--host 127.0.0.1)" in worker.lines[0]
        model, tokenizer = load(worker, secret_file=secret)
        assert answer(model, tokenizer)
        assert len([line for line in worker.lines if "is connected" in line]) == expected
