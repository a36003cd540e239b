"""`serve`: what is refused before it listens, listening before a model is there, and its end."""

import argparse
import asyncio
import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from server_raw import raw, request

from openelm_mlx.commands import build_parser, main
from openelm_mlx.commands.serve import KEY_VARIABLE, _log_to_stderr, seconds_of, settings_of
from openelm_mlx.errors import SettingError, ToolError
from openelm_mlx.server import site
from openelm_mlx.server.connections import listening_socket
from openelm_mlx.server.loading import Loader
from openelm_mlx.server.log import log
from openelm_mlx.server.running import serve
from openelm_mlx.server.settings import ServedModel, ServerSettings
from openelm_mlx.sources import DEMOS
from openelm_mlx.text.tokenizer import load_tokenizer

COMMAND = [sys.executable, "-m", "openelm_mlx", "serve"]


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def nothing_listens(monkeypatch):
    """Whatever is wrong is said before anything is served."""
    monkeypatch.setattr("openelm_mlx.server.running.serve", lambda *_: pytest.fail("it was served"))


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--host 0.0.0.0", "--host 0.0.0.0 lets other machines use this server: give it a key first"),
        ("--host ::", "give it a key first"), ("--host 192.0.2.1", "give it a key first"),
        ("--port 99999", "--port is 99999"), ("--port x", "--port is 'x', which is not a whole number"),
        ("--model no/such/folder", "no/such/folder"), ("--model nothing", "There is no file or folder nothing"),
        ("--model gpt-oss:20b", "give openai/gpt-oss-20b"),
        ("--model demo-gpt-oss --model demo-gpt-oss", "Two models are called demo-gpt-oss"),
        ("--model x=demo-gpt-oss --model x=demo-openelm", "Two models are called x: demo-gpt-oss and demo-openelm"),
        ("--models-folder /no/such/folder", "--models-folder /no/such/folder is not a folder"),
        ("--alias gpt-4o", "--alias 'gpt-4o' is not of the form ALIAS=NAME"),
        ("--alias gpt-4o=nothing", "The alias gpt-4o is for nothing, and no model is called that"),
        ("--keep-alive soon", "--keep-alive is 'soon'"), ("--max-running 0", "--max-running is 0"),
        ("--max-waiting -1", "--max-waiting is -1"), ("--memory-limit much", "--memory-limit"),
        ("--allow-origin localhost:3000", "--allow-origin localhost:3000 is not an origin"),
        ("--allow-origin *", "give it a key first"), ("--allow-host http://mac", "--allow-host http://mac is not a name"),
        ("--preset smallest --dense-bits 8", "--dense-bits"), ("--api-key-file /no/such/file", "/no/such/file cannot be read"),
        ("--tools nothing", "There is no tool 'nothing'"), ("--tools python=3", "gives python a value"),
        ("--tools calculator,calculator", "'calculator' is named twice"), ("--max-rounds 0", "--max-rounds is 0"),
        ("--tools files=/no/such/folder", "/no/such/folder is not a folder"), ("--tools files", "'files' lacks its value"),
        ("--host no.such.host.invalid --api-key-file KEY", "is no address of this machine"),
        ("--host 192.0.2.1 --api-key-file KEY", "cannot be listened to"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_sentence(capsys, tmp_path, arguments, said):
    key = tmp_path / "key"
    key.write_text("k" * 20)
    key.chmod(0o600)
    words = [str(key) if word == "KEY" else word for word in arguments.split()]
    try:
        code = main(["serve", "--port", "0", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    seen = capsys.readouterr()
    assert said in seen.err
    assert (seen.out, seen.err.count("\n")) == ("", 1)


@pytest.mark.usefixtures("no_key")
def test_a_port_in_use(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"Port {port} of 127.0.0.1 is in use by another program" in capsys.readouterr().err


@pytest.mark.usefixtures("no_key")
def test_a_key_that_others_can_read_or_that_is_none(capsys, tmp_path):
    key = tmp_path / "key"
    key.write_text("a-secret-key\n")
    for mode in (0o644, 0o640, 0o604, 0o622):
        key.chmod(mode)
        assert main(["serve", "--api-key-file", str(key)]) == 2
        said = capsys.readouterr().err
        assert f"can be read by others (mode {mode:o}): run `chmod 600 {key}`" in said
        assert "a-secret-key" not in said
    key.chmod(0o600)
    for text, said in (
        (b"\n \n", "holds no key"),
        (b"\xff\xfe", "is not text"),
        ("schlüssel".encode(), "cannot carry"),
    ):
        key.write_bytes(text)
        assert main(["serve", "--api-key-file", str(key)]) == 2
        assert said in capsys.readouterr().err
    for place in (tmp_path, "/dev/null"):
        assert main(["serve", "--api-key-file", str(place)]) == 2
        assert "--api-key-file" in capsys.readouterr().err


# --- settings ---------------------------------------------------------------------------------------------------------


def parsed(*words, environment=None):
    args: argparse.Namespace = build_parser("x", ["serve"]).parse_args(["serve", *words])
    return settings_of(args, environment or {})


def test_without_arguments_the_demo_is_served_on_this_machine_alone():
    found = parsed()
    assert [(each.name, each.source) for each in found.models] == [("demo-gpt-oss", "demo-gpt-oss")]
    assert (found.host, found.port, found.api_keys, found.allow_origins, found.keep_alive) == (
        "127.0.0.1",
        8080,
        (),
        (),
        None,
    )


def test_what_the_options_say(tmp_path):
    shutil.copytree(DEMOS["demo-openelm"], tmp_path / "models" / "mine")
    key = tmp_path / "key"
    key.write_text("one-key\n\ntwo-key\n")
    key.chmod(0o600)
    found = parsed(
        "--model", "demo-gpt-oss", "--models-folder", str(tmp_path / "models"), "--alias", "gpt-4o-mini=mine",
        "--keep-alive", "5m", "--memory-limit", "2GB", "--context-length", "512", "--kv-bits", "8", "--max-running", "4",
        "--host", "0.0.0.0", "--port", "0", "--api-key-file", str(key), "--allow-host", "Mac.example",
        "--allow-origin", "http://localhost:3000", environment={KEY_VARIABLE: "env-key"},
    )  # fmt: skip
    assert [each.name for each in found.models] == ["demo-gpt-oss", "mine"]
    assert found.aliases == {"gpt-4o-mini": "mine"}
    assert (found.keep_alive, found.max_running) == (300.0, 4)
    assert found.load_options["memory_limit"] == 2_000_000_000
    assert (found.load_options["context_length"], found.load_options["kv_bits"]) == (512, 8)
    assert found.load_options["batch_size"] == 4
    assert found.api_keys == ("one-key", "two-key", "env-key")
    assert (found.allow_hosts, found.allow_origins) == (("mac.example",), ("http://localhost:3000",))
    # A folder alone is served without the demo.
    assert [each.name for each in parsed("--models-folder", str(tmp_path / "models")).models] == ["mine"]


@pytest.mark.parametrize(("words", "name", "value"), [
    ("--dtype bfloat16", "dtype", "bfloat16"), ("--dense-bits 5", "dense_bits", 5), ("--preset balanced", "dense_bits", 8),
    ("--expert-slots 3", "expert_slots", 3), ("--wire", "wire", True), ("--no-wire", "wire", False), ("", "wire", None),
    ("--workers mac2.local:7777", "workers", "mac2.local:7777"), ("--secret-file S", "secret_file", "S"),
    ("--layers 4,2", "layers", "4,2"), ("--worker-timeout 3", "worker_timeout", 3.0),
])  # fmt: skip
def test_how_models_are_loaded(words, name, value):
    assert parsed(*words.split()).load_options[name] == value


def test_adapters_are_those_of_their_models(tmp_path):
    found = parsed("--model", "demo-gpt-oss", "--model", "demo-openelm", "--adapter", f"a={tmp_path}",
                   "--adapter", f"demo-openelm:b={tmp_path}", "--alias", "mine=demo-openelm",
                   "--alias", "its=demo-openelm:b")  # fmt: skip
    assert found.aliases == {"mine": "demo-openelm", "its": "demo-openelm:b"}
    assert [each.options.get("adapter") for each in found.models] == [{"a": str(tmp_path)}, {"b": str(tmp_path)}]


def test_tools_are_off_unless_named(tmp_path):
    assert (parsed().tools, parsed("--tools", " ,").tools) == ("", "")
    found = parsed("--tools", f"calculator,files={tmp_path}", "--allow-unsandboxed", "--max-rounds", "3")
    assert (found.tools, found.allow_unsandboxed, found.max_rounds) == (f"calculator,files={tmp_path}", True, 3)


def test_tools_are_opened_for_the_server_and_closed_after_it(monkeypatch, capsys, tmp_path):
    seen = []

    async def noting(settings, listening, voice, tools=None):
        voice.listening(settings, "127.0.0.1", 8080)
        seen.append(tools)

    monkeypatch.setattr("openelm_mlx.server.running.serve", noting)
    level = log.level
    try:
        assert main(["serve", "--port", "0"]) == 0
        assert "Tools run" not in capsys.readouterr().err
        assert main(["serve", "--port", "0", "--tools", f"calculator,files={tmp_path}"]) == 0
    finally:
        log.setLevel(level)
    said = "for all who can reach this address: calculator, browser.search, browser.open, browser.find.\n"
    assert capsys.readouterr().err.endswith(f"Tools run on this machine {said}")
    assert seen[0] is None
    with pytest.raises(ToolError):
        seen[1].open_box("browser", len)


@pytest.mark.parametrize("words", [(), ("--quiet",)])
def test_quiet_leaves_out_the_line_of_each_request(words):
    args = build_parser("x", ["serve"]).parse_args(["serve", *words])
    before = log.level
    try:
        _log_to_stderr(args.quiet)
        assert log.isEnabledFor(logging.INFO) is not args.quiet
    finally:
        log.setLevel(before)


def test_times():
    assert [seconds_of(each) for each in ("0", "90", "90s", "5m", "1h", "2d", "Forever", "-1")] == [
        0.0, 90.0, 90.0, 300.0, 3600.0, 172800.0, None, None,
    ]  # fmt: skip
    for wrong in ("", "m", "5x", "-5", "1.5m", "5 m"):
        with pytest.raises(SettingError, match="--keep-alive"):
            seconds_of(wrong)


# --- listening, and the end -------------------------------------------------------------------------------------------


class ServerEvents:
    def __init__(self):
        self.said, self.port = [], None

    def listening(self, settings, host, port):
        self.said.append("listening")
        self.port = port

    def stopping(self, num_answers, seconds):
        self.said.append(f"stopping {num_answers}")

    def stopping_at_once(self):
        self.said.append("stopping_at_once")


@contextlib.asynccontextmanager
async def serving(settings):
    """The port of a server in this event loop, which listens already."""
    voice = ServerEvents()
    with listening_socket("127.0.0.1", 0) as listening:
        running = asyncio.create_task(serve(settings, listening, voice))
        while voice.port is None:
            await asyncio.sleep(0.01)
        try:
            yield voice.port
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def answered(port, path):
    return await asyncio.to_thread(raw, port, request(path, host="localhost"))


def test_it_answers_while_its_model_is_being_loaded(monkeypatch):
    may_load, prepare = threading.Event(), Loader.prepare

    def waiting(self, served, progress):
        assert may_load.wait(60)
        return prepare(self, served, progress)

    monkeypatch.setattr(Loader, "prepare", waiting)

    async def main():
        async with serving(ServerSettings(models=(ServedModel("demo-openelm", "demo-openelm"),))) as port:
            health = await answered(port, "/health")
            assert (health.status, json.loads(health.body)["status"]) == (200, "loading")
            cards = json.loads((await answered(port, "/v1/models")).body)["data"]
            assert [(card["id"], card["state"]) for card in cards] == [("demo-openelm", "loading")]
            may_load.set()
            while json.loads((await answered(port, "/health")).body)["status"] != "ok":
                await asyncio.sleep(0.02)
            found = json.loads((await answered(port, "/health")).body)
            assert found["models"][0]["plan"]["weights_bytes"] > 0
            assert found["memory"]["used_bytes"] > 0
            assert (await answered(port, "/")).status == 200
            assert b"openelm_mlx_model_loaded" in (await answered(port, "/metrics")).body

    asyncio.run(main())


def test_nothing_is_loaded_while_the_rest_of_the_server_is_imported(monkeypatch):
    """Two threads that import packages whose modules need each other may find them half made."""
    made, prepare, told = [], Loader.prepare, []
    make = site.make_inner_site

    def slowly(*arguments):
        time.sleep(0.5)
        made.append(make(*arguments))
        return made[0]

    def noting(self, served, progress):
        told.append(bool(made))
        return prepare(self, served, progress)

    monkeypatch.setattr(site, "make_inner_site", slowly)
    monkeypatch.setattr(Loader, "prepare", noting)

    async def main():
        async with serving(ServerSettings(models=(ServedModel("demo-openelm", "demo-openelm"),))) as port:
            while (status := json.loads((await answered(port, "/health")).body)["status"]) != "ok":
                assert status == "loading"
                await asyncio.sleep(0.02)

    asyncio.run(main())
    assert told == [True]


def test_health_tells_a_stranger_nothing_more():
    async def main():
        async with serving(
            ServerSettings(models=(ServedModel("demo-openelm", "demo-openelm"),), api_keys=("k" * 20,))
        ) as port:
            assert list(json.loads((await answered(port, "/health")).body)) == ["status"]
            own = {}
            while "models" not in own:
                answer = await asyncio.to_thread(raw, port, request("/health", x_api_key="k" * 20))
                own = json.loads(answer.body)
            assert list(json.loads((await answered(port, "/health")).body)) == ["status"]
            for path in ("/metrics", "/v1/models"):
                assert (await answered(port, path)).status == 401

    asyncio.run(main())


class Served:
    """The command as a user starts it."""

    def __init__(self, *words, **environment):
        self.process = subprocess.Popen(
            [*COMMAND, "--port", "0", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip

    def __enter__(self):
        self.line = self.process.stdout.readline()
        self.port = int(self.line.split(" at http://127.0.0.1:")[1].split(" ")[0]) if self.line else None
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=120) as answer:
            return json.loads(answer.read())

    def until_ready(self):
        while self.get("/health")["status"] != "ok":
            time.sleep(0.05)

    def ended(self):
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_one_line_says_where_and_one_signal_ends_it(how):
    with Served("--alias", "gpt-4o-mini=demo-gpt-oss") as served:
        assert (
            served.line == f"Serving demo-gpt-oss at http://127.0.0.1:{served.port} (open it in a browser to chat).\n"
        )
        assert [card["id"] for card in served.get("/v1/models")["data"]] == ["demo-gpt-oss", "gpt-4o-mini"]
        if how == signal.SIGTERM:
            served.until_ready()
        served.process.send_signal(how)
        code, said = served.ended()
    assert code == 0, said
    assert f"base URL http://127.0.0.1:{served.port}/v1, model demo-gpt-oss" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_only_model_that_cannot_be_loaded_ends_it_with_a_sentence(tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(DEMOS["demo-openelm"], folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with Served("--model", str(folder)) as served:
        code, said = served.ended()
    assert code == 2
    last = said.strip().splitlines()[-1]
    assert last.startswith("openelm_mlx: ")
    assert weights.name in last
    assert "Traceback" not in said


def streaming(served, max_tokens):
    """An answer of so many tokens that is being streamed, after its first event."""
    ends = load_tokenizer(DEMOS["demo-gpt-oss"]).eos_tokens
    body = {
        "model": "demo-gpt-oss", "prompt": "A banjo is", "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "logit_bias": {str(token): -100 for token in ends},  # it does not end by itself
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    while not answer.readline().startswith(b"data: {"):
        pass
    return answer


@pytest.mark.slow
def test_after_ctrl_c_an_answer_is_finished_and_nothing_new_begins():
    with Served() as served:
        answer = streaming(served, 200)
        served.process.send_signal(signal.SIGINT)
        rest = answer.read().decode()
        assert rest.rstrip().endswith("data: [DONE]")
        assert '"finish_reason":"length"' in rest.replace(" ", "")
        code, said = served.ended()
    assert code == 0
    assert "1 answer is still being written, and may take 30 seconds. Ctrl-C again ends everything now." in said
    with pytest.raises(OSError, match="refused"):
        served.get("/health")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_everything_now():
    with Served() as served:
        answer = streaming(served, 100_000)
        served.process.send_signal(signal.SIGINT)
        while "Ctrl-C again" not in served.process.stderr.readline():
            pass
        served.process.send_signal(signal.SIGINT)
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
        code, said = served.ended()
    assert code == 130
    assert "Traceback" not in said
