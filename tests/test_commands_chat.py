"""`python -m openelm_mlx chat` in a real pseudo-terminal, and with its input from a pipe."""

import fcntl
import io
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from openelm_mlx.commands import main

ROOT = Path(__file__).parent.parent
# Generous: the test must not depend on how busy the machine is.
PATIENCE = 60


class Terminal:
    """A chat in a pseudo-terminal: what it shows is collected in .screen, without the terminal's control sequences."""

    def __init__(self, folder: Path, *options: str, **variables: str) -> None:
        main, child = pty.openpty()
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "OPENELM_MLX_CACHE": str(folder / "cache"),
            "PROMPT_TOOLKIT_NO_CPR": "1", **variables,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "openelm_mlx", "chat", *options],
            stdin=child, stdout=child, stderr=child, cwd=folder, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(child)
        self.main, self.raw = main, ""
        self.seen = 0

    @property
    def screen(self) -> str:
        return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>78]|\][^\x07]*\x07)", "", self.raw).replace("\r", "")

    def wait_for(self, text: str) -> str:
        """Read until `text` shows after what earlier waits saw; what came until then."""
        end = time.monotonic() + PATIENCE
        while True:
            new = self.screen[self.seen :]
            if text in new:
                self.seen += new.index(text) + len(text)
                return new
            assert time.monotonic() < end, f"{text!r} did not come; the screen:\n{self.screen[-2000:]}"
            assert self.process.poll() is None or self._read(), f"it ended; the screen:\n{self.screen[-2000:]}"
            self._read()

    def _read(self) -> bool:
        if not select.select([self.main], [], [], 0.2)[0]:
            return False
        try:
            data = os.read(self.main, 65536)
        except OSError:
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def ends_with(self) -> int:
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            self._read()
        return self.process.wait(5)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.main)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def make(*options, **variables):
        opened.append(Terminal(tmp_path, *options, **variables))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.slow
def test_a_terminal_that_obeys_nothing_is_sent_plain_text(terminal):
    chat = terminal("--model", "demo-gpt-oss", "--reasoning-effort", "low", TERM="dumb")
    chat.wait_for("> ")
    chat.type("What is a piano?\n")
    chat.wait_for("produce sounds")
    chat.wait_for("> ")
    chat.type("/sy\\\n")
    chat.wait_for("\n  ")
    chat.type("stem\n")
    chat.wait_for("There is no command")
    chat.wait_for("> ")
    chat.type("half a line\x03")  # Ctrl-C clears it
    chat.wait_for("^C")
    chat.type("/bogus\n")
    chat.wait_for("There is no command /bogus")
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.ends_with() == 0
    assert "\x1b" not in chat.raw


@pytest.mark.slow
def test_a_conversation_with_gpt_oss(terminal, tmp_path):
    chat = terminal("--model", "demo-gpt-oss", "--reasoning-effort", "low", "--tools", "calculator")
    chat.wait_for("Ctrl-D ends the chat")
    chat.wait_for(">")
    chat.type("What is a piano?\r")
    chat.wait_for("piano: a kind of keyboard instrument")  # the reasoning
    chat.wait_for("produce sounds")
    chat.wait_for(">")
    chat.type("/stats\r")
    chat.wait_for("tokens/s")
    chat.type("/effort extreme\r")
    chat.wait_for("not 'extreme'")
    chat.type("/effort high\r")
    chat.wait_for("Reasoning effort is high")
    chat.type("/save talk.json\r")
    chat.wait_for("Saved to talk.json: 3 messages")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["reasoning_effort"] == "high"
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant", "assistant"]
    chat.type("/reset\r")
    chat.wait_for("starts again")
    chat.type("What is 12 + 30?\r")
    chat.wait_for('[functions.calculator {"expression":"12 + 30"}]')
    chat.wait_for("[= 42]")
    chat.wait_for("12 + 30 = 42")
    chat.wait_for(">")
    chat.type("\x04")
    assert chat.ends_with() == 0


@pytest.mark.slow
def test_several_lines_and_history(terminal, tmp_path):
    chat = terminal("--no-show-reasoning")
    chat.wait_for(">")
    chat.type("What is\\\r")
    time.sleep(0.3)
    chat.type("a banjo?\r")
    chat.wait_for("stringed instrument")
    chat.wait_for(">")
    chat.type("What is\x1b\ra piano?\r")  # Alt-Enter
    chat.wait_for("keyboard instrument")
    chat.wait_for(">")
    chat.type("/save both.json\r")
    chat.wait_for("4 messages")
    texts = [m["content"] for m in json.loads((tmp_path / "both.json").read_text())["messages"]]
    assert texts[0] == "What is\na banjo?"
    assert texts[2] == "What is\na piano?"
    chat.type("\x1b[A\x1b[A\r")  # up, twice: the piano again
    chat.wait_for("keyboard instrument")
    chat.type("/exit\r")
    assert chat.ends_with() == 0


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_keeps_the_session(terminal):
    # Without its end token the demo rambles on; nothing else about the answer matters.
    chat = terminal("--temperature", "5", "--max-tokens", "400", "--logit-bias", "2=-1e9")
    chat.wait_for(">")
    chat.type("What is a banjo?\r")
    time.sleep(0.1)
    chat.wait_for("banjo?")
    time.sleep(1.0)
    chat.type("\x03")
    chat.wait_for("[stopped]")
    chat.wait_for(">")
    chat.type("/help\r")
    chat.wait_for("Ctrl-C stops an answer")
    chat.wait_for(">")
    chat.type("half a question\x03")  # at the prompt it clears the line, and a new prompt comes
    chat.wait_for("half a question")
    chat.wait_for(">")
    chat.type("/exit\r")
    assert chat.ends_with() == 0


@pytest.mark.slow
def test_without_history_nothing_that_was_typed_is_kept(terminal, tmp_path):
    kept = []
    for options in ([], ["--no-history"]):
        cache = tmp_path / "cache"
        for file in cache.rglob("*") if cache.exists() else ():
            file.unlink() if file.is_file() else None
        chat = terminal("--max-tokens", "2", *options)
        chat.wait_for(">")
        chat.type("/help unheard-of\r")
        chat.wait_for("unheard-of")
        chat.type("/exit\r")
        assert chat.ends_with() == 0
        kept.append(
            any("unheard-of" in file.read_text(errors="replace") for file in cache.rglob("*") if file.is_file())
        )
    assert kept == [True, False]


@pytest.fixture
def piped(monkeypatch, capfd):
    """A chat whose input is a pipe's, in this process: exit code, and what it wrote to stdout and stderr."""

    def run(text: str, *options: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
        capfd.readouterr()
        exit_code = main(["chat", *options])
        return subprocess.CompletedProcess(options, exit_code, *capfd.readouterr())

    return run


def chat_process(text: bytes, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "openelm_mlx", "chat", *options]
    return subprocess.run(command, input=text, capture_output=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_from_a_pipe_answers_go_to_stdout_and_nothing_else(piped, tmp_path):
    finished = chat_process(b"What is 12 + 30?\n", "--model", "demo-gpt-oss", "--tools", "calculator", "--quiet")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, b"12 + 30 = 42\n", b"")
    finished = piped(f"What is \\\na banjo?\n/save {tmp_path}/x.json\n/load {tmp_path}/x.json\n")
    assert finished.returncode == 0
    assert "stringed instrument" in finished.stdout
    assert "2 messages" in finished.stderr


def test_tab_completes_commands_their_words_and_files(terminal, tmp_path):
    chat = terminal("--model", "demo-gpt-oss", "--reasoning-effort", "low")
    chat.wait_for("Ctrl-D ends the chat")
    chat.wait_for(">")
    chat.type("/ef\t")
    chat.wait_for("/effort")
    chat.type("hi\t")
    chat.wait_for("high")
    chat.type("\r")
    chat.wait_for("Reasoning effort is high")
    chat.wait_for(">")
    (tmp_path / "holiday.json").write_text("{}")
    chat.type("/load hol\t")
    chat.wait_for("iday.json")
    chat.type("\r")
    chat.wait_for("is not a saved chat")
    chat.type("/exit\r")
    assert chat.ends_with() == 0


@pytest.mark.slow
def test_bytes_that_are_no_text_do_not_end_a_chat(terminal, tmp_path):
    chat = terminal("--max-tokens", "4")
    chat.wait_for(">")
    os.write(chat.main, b"What is a \xff\xe9 banjo?\r")
    chat.wait_for("banjo?")
    chat.wait_for("[ended")
    chat.type("/save a.json\r")
    chat.wait_for("Saved to a.json: 2 messages")
    assert "\ufffd" in json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["messages"][0]["content"]
    chat.type("/exit\r")
    assert chat.ends_with() == 0
    finished = chat_process(b"What is a \xff banjo?\n", "--max-tokens", "4")
    assert (finished.returncode, len(finished.stdout) > 1) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ctrl_c_at_any_moment_keeps_the_session(terminal, tmp_path, seed):
    """Bursts of Ctrl-C at random moments, also behind the end of an answer and while nothing is going on."""
    draw = random.Random(seed)
    model = ("--model", "demo-gpt-oss", "--tools", "calculator") if seed else ()
    chat = terminal(*model)
    chat.wait_for(">")
    for question in ("What is 12 + 30?", "What is a piano?", "What is 7 * 8?"):
        chat.type(f"{question}\r")
        time.sleep(draw.uniform(0.0, 0.7))
        for _ in range(draw.choice((1, 2, 5))):
            os.killpg(chat.process.pid, signal.SIGINT) if draw.random() < 0.5 else chat.type("\x03")
            time.sleep(draw.choice((0.0, 0.0, 0.02, 0.2)))
        time.sleep(1.2)  # the prompt is back, and an interruption no longer on its way
    chat.type(f"\x03/save talk{seed}.json\r")
    chat.wait_for(f"Saved to talk{seed}.json")
    assert "Traceback" not in chat.screen
    messages = json.loads((tmp_path / f"talk{seed}.json").read_text())["messages"]
    calls = [m for m in messages if m["role"] == "assistant" and m["recipient"]]
    assert len(calls) == sum(m["role"] == "tool" for m in messages)
    chat.type("/exit\r")
    assert chat.ends_with() == 0


def test_a_name_may_stand_in_quotes(piped, tmp_path):
    assert piped(f"/save \"{tmp_path}/my chat.json\"\n/load '{tmp_path}/my chat.json'\n").returncode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["my chat.json"]


def test_nothing_that_is_no_chat_is_overwritten(piped, tmp_path):
    precious, link = tmp_path / "precious.txt", tmp_path / "link.json"
    precious.write_text("precious")
    precious.chmod(0o640)
    finished = piped(f"/save {precious}\n")
    assert (finished.returncode, precious.read_text()) == (2, "precious")
    assert "holds something else; name another file, or replace it with /save!." in finished.stderr
    assert "/save!" in finished.stderr
    link.symlink_to(precious)
    assert piped(f"/save {link}\n").returncode == 2
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "no" / "folder.json", tmp_path / "pipe", "/dev/null", "~nobody-there/x", "a\0b", "x" * 300):
        finished = piped(f"/save {bad}\n/save! {bad}\n")
        assert finished.returncode == 2
        assert len(finished.stderr.strip().splitlines()) == 2
        assert "Traceback" not in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "pipe", "precious.txt"]
    for command in ("/save! {}", "/save {} --overwrite", "/save {}"):  # the last one finds a saved chat
        precious.write_text("precious") if "-" in command or "!" in command else None
        assert piped(f"{command.format(link)}\n").returncode == 0
        assert "openelm_mlx_chat" in precious.read_text()
    assert link.is_symlink()
    assert precious.stat().st_mode & 0o777 == 0o640
    (tmp_path / "empty.json").touch()
    assert piped(f"/save {tmp_path}/empty.json\n").returncode == 0


@pytest.mark.slow
def test_no_answer_is_said_with_the_option_to_raise(piped):
    finished = piped("What is a piano?\n", "--model", "demo-gpt-oss", "--max-tokens", "12", "--quiet")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "raise --max-tokens above 12" in finished.stderr
    finished = piped("What is a piano?\n", "--model", "demo-gpt-oss", "--max-tokens", "60", "--no-show-reasoning")
    assert finished.returncode == 0
    assert finished.stderr == "[ended: the token limit was reached; raise --max-tokens (60)]\n"


def test_the_options_of_an_answer_reach_it(piped):
    finished = piped(
        "What is a piano?\n/stats\n", "--model", "demo-gpt-oss", "--stop", " keyboard", "--kv-bits", "8",
        "--prefill-chunk", "16", "--prompt-lookup", "--hide-reasoning", "--reasoning-effort", "low",
    )  # fmt: skip
    assert (finished.returncode, finished.stdout) == (0, "a\n")
    # Drafts are left off where they cost more than they bring, as on a machine that does other things.
    assert "drafted tokens accepted" in finished.stderr or "no draft was tried" in finished.stderr
    assert "a kind of" not in finished.stderr
    options = ("--regex", "[0-9]{3}", "--quiet", "--reasoning-effort", "low")
    finished = piped("What is a boat?\n", "--model", "demo-gpt-oss", *options)
    assert re.fullmatch(r"[0-9]{3}\n", finished.stdout)
    finished = piped("Hi\n", "--draft-model", "demo-gpt-oss")
    assert finished.returncode == 2
    assert "must share the tokenizer" in finished.stderr


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("/bogus\n", (), "no command /bogus"),
        ("/effort high\n", (), "Only gpt-oss"),
        ("/save\n", (), "needs a file"),
        ("/save .\n", (), "is a folder"),
        ("/load nothing.json\n", (), "cannot be read"),
        ("", ("--tools", "bogus"), "no tool 'bogus'"),
        ("", ("--tools", "calculator"), "OpenELM has no format for tools"),
        ("", ("--reasoning-effort", "high"), "only gpt-oss"),
        ("", ("--temperature", "-1"), "temperature"),
        ("", ("--max-tokens", "0"), "--max-tokens is 0"),
        ("", ("--load", "nothing.json"), "cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(piped, text, options, said):
    finished = piped(text, *options)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert said in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1
