"""A disk that is pulled out, at any call of the system: one sentence with exit code 2, and never a raw OSError.

Each test counts the calls that a sound run makes, and then has the disk gone from the first, the second, ... on.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import mlx.core as mx
import pytest
from hub_server import HubServer

from openelm_mlx import hub as our_hub
from openelm_mlx.commands import main
from openelm_mlx.conversation.session import Chat
from openelm_mlx.conversion import convert
from openelm_mlx.decoding.prefix_file import load_entries
from openelm_mlx.errors import CheckpointError, DestinationError, HubError, UserError
from openelm_mlx.files import hears_the_disk, read_bytes
from openelm_mlx.generate import generate
from openelm_mlx.loading import load
from openelm_mlx.planning import plan

hub = hub_server.hub
CODES = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOENT, errno.ENOTCONN)


class Disk:
    """The disk below `folder`, gone from the call number `last` on. calls: how many there were."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.last, self.code = str(folder), 0, 10**9, errno.EIO

    def ask(self, name: object, is_stream: bool = False) -> None:
        """Count a call about a file, and fail it when the disk is gone; a stream's errors have no name."""
        if not isinstance(name, (str, os.PathLike)) or not os.fspath(name).startswith(self.folder):
            return
        self.calls += 1
        if self.calls > self.last:
            words = () if is_stream else (os.fspath(name),)
            raise OSError(self.code, os.strerror(self.code), *words)


class Stream(io.FileIO):
    """An open file on a disk that may go."""

    disk: Disk
    path: str

    def readinto(self, buffer):  # type: ignore[no-untyped-def]
        self.disk.ask(self.path, is_stream=True)
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self.disk.ask(self.path, is_stream=True)
        return super().readall()

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        self.disk.ask(self.path, is_stream=True)
        return super().write(data)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """One on which `tmp_path / "disk"` lies."""
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = Disk(folder)

    def asked(function: Callable[..., object]) -> Callable[..., object]:
        def call(path: object = ".", *words: object, **options: object) -> object:
            disk.ask(path)
            return function(path, *words, **options)

        return call

    for name in (
        "stat",
        "lstat",
        "open",
        "listdir",
        "scandir",
        "mkdir",
        "replace",
        "rename",
        "unlink",
        "truncate",
        "symlink",
    ):
        monkeypatch.setattr(os, name, asked(getattr(os, name)))
    real_open, real_fdopen, real_load = io.open, os.fdopen, mx.load

    def wrapped(path: str, stream: io.IOBase, mode: str) -> io.IOBase:
        if not isinstance(stream, (io.BufferedReader, io.BufferedWriter)):
            return stream
        raw = Stream(os.dup(stream.fileno()), mode.replace("b", "").replace("t", "") or "r")
        raw.disk, raw.path = disk, path
        stream.close()
        return io.BufferedReader(raw) if isinstance(stream, io.BufferedReader) else io.BufferedWriter(raw)

    def opened(path: object, mode: str = "r", *words: object, **options: object) -> io.IOBase:
        disk.ask(path)
        stream = real_open(path, mode, *words, **options)
        return wrapped(str(path), stream, mode) if str(path).startswith(disk.folder) else stream

    def from_descriptor(descriptor: int, mode: str = "r", *words: object, **options: object) -> io.IOBase:
        stream = real_fdopen(descriptor, mode, *words, **options)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return wrapped(path, stream, mode) if path.startswith(disk.folder) else stream

    def loaded(path: str, *words: object, **options: object) -> object:
        try:
            disk.ask(path)
        except OSError as error:
            raise RuntimeError("[load_safetensors] Failed to open file") from error
        return real_load(path, *words, **options)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(os, "fdopen", from_descriptor)
    monkeypatch.setattr(mx, "load", loaded)
    yield disk
    disk.last = 10**9


def each_moment(
    disk: Disk,
    work: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    step: int = 1,
    is_lookup: bool = False,
) -> None:
    """Do the work once with the disk there, and once for each of its calls (or every `step`th) with the disk gone.

    is_lookup: what cannot be found is no error.
    """
    before()
    disk.calls = 0
    work()
    number = disk.calls
    assert number > 2
    told = []
    for last in range(0, number, step):
        before()
        disk.calls, disk.last, disk.code = 0, last, CODES[last // step % len(CODES)]
        try:
            work()
        except UserError as error:
            told.append(str(error))
        finally:
            disk.last = 10**9
    assert all(each.isprintable() for each in told)
    assert is_lookup or len(told) > number // step // 2  # it may be gone after the last word was read


def copied(fixture: Path, disk: Disk, name: str = "model") -> Path:
    target = Path(disk.folder) / name
    target.mkdir()
    for file in fixture.iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


def test_while_a_model_is_loaded(disk, fixtures):
    folder = copied(fixtures / "openelm_tiny", disk)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    each_moment(disk, lambda: load(folder))


def test_while_it_is_planned(disk, fixtures):
    folder = copied(fixtures / "gpt_oss_tiny", disk)
    each_moment(disk, lambda: plan(folder))


@pytest.mark.parametrize("where", ["source", "destination"])
def test_while_it_is_converted_and_compared(tmp_path, disk, fixtures, where):
    folder = copied(fixtures / "openelm_untied", disk) if where == "source" else fixtures / "openelm_untied"
    target = tmp_path / "out" if where == "source" else Path(disk.folder) / "out"

    def begin_anew() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(f"{target}.partial", ignore_errors=True)

    each_moment(disk, lambda: convert(folder, target, dtype="float16", verify=True), begin_anew, step=5)


def test_while_it_is_downloaded(hub: HubServer, disk, monkeypatch):
    hub.add_repo("owner/name", {"config.json": b"{}", "model.safetensors": b"x" * 3000})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{disk.folder}/hub")
    monkeypatch.setattr("openelm_mlx.hub.transfer._REPORT_SECONDS", 0.01)

    def begin_anew() -> None:
        shutil.rmtree(f"{disk.folder}/hub", ignore_errors=True)

    each_moment(disk, lambda: our_hub.download("owner/name", lambda files: [f.name for f in files]), begin_anew, step=4)


def test_of_what_was_downloaded(hub: HubServer, disk, monkeypatch):
    hub.add_repo("owner/name", {"config.json": b"{}"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{disk.folder}/hub")
    our_hub.download("owner/name", lambda files: [f.name for f in files])
    each_moment(disk, lambda: our_hub.cached_file("owner/name", "config.json"), is_lookup=True)
    monkeypatch.setattr("openelm_mlx.hub.requests._RETRY_SECONDS", ())
    hub.stop()
    each_moment(disk, lambda: our_hub.list_files("owner/name"))
    each_moment(disk, lambda: our_hub.read_range("owner/name", "config.json", 0, 2))


@pytest.mark.parametrize("code", CODES)
def test_while_experts_on_it_answer(disk, fixtures, capsys, monkeypatch, code):
    folder = copied(fixtures / "gpt_oss_tiny", disk)
    model, _ = load(folder, expert_slots=4)
    for file in model.residency.files:

        def gone(*words: object) -> int:
            raise OSError(code, os.strerror(code))

        file.read_into = gone
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read \(.*\), and the model needs its file"):
        generate(model, None, [1, 2, 3], max_tokens=1)


def test_of_a_prompt_cache_and_a_chat(disk):
    model, tokenizer = load("demo-gpt-oss")
    from openelm_mlx.decoding.prefix_cache import PrefixCache

    cache, file = PrefixCache(), Path(disk.folder) / "cache"
    generate(model, tokenizer, [1, 2, 3], max_tokens=1, prefix_cache=cache)
    each_moment(disk, lambda: cache.save(file))
    each_moment(disk, lambda: list(load_entries(file, model)))
    chat = Chat(model, tokenizer)
    each_moment(disk, lambda: chat.save(Path(disk.folder) / "chat.json"))
    each_moment(disk, lambda: chat.load(Path(disk.folder) / "chat.json"))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE])
def test_what_is_said(disk, fixtures, capsys, code):
    folder = copied(fixtures / "openelm_tiny", disk)
    disk.calls, disk.last, disk.code = 0, 4, code
    assert main(["generate", "--model", str(folder), "--prompt", "x"]) == 2
    told = capsys.readouterr().err
    assert f"cannot be read any more ({os.strerror(code)}): connect its disk again" in told
    assert told.count("\n") == 1


def test_what_no_command_expects_is_a_sentence_too(monkeypatch, capsys):
    def fails(args: object) -> int:
        raise OSError(errno.ENXIO, "Device not configured", "/Volumes/T7/x")

    monkeypatch.setattr("openelm_mlx.commands.info.run", fails)
    assert main(["info", "demo-openelm"]) == 2
    assert "/Volumes/T7/x cannot be used: Device not configured" in capsys.readouterr().err


def test_other_errors_of_the_system_stay_what_they_are():
    @hears_the_disk(HubError)
    def read(source: str, error: OSError) -> None:
        raise error

    with pytest.raises(BrokenPipeError):
        read("x", BrokenPipeError(errno.EPIPE, "Broken pipe"))  # of a progress bar, for instance
    with pytest.raises(HubError, match=r"x cannot be read any more \(Input/output error\)"):
        read("x", OSError(errno.EIO, "Input/output error"))
    with pytest.raises(HubError, match="/y cannot be read"):
        read(source="x", error=OSError(errno.EACCES, "Permission denied", b"/y"))
    with pytest.raises(DestinationError, match="No such file"):
        read_bytes("/nowhere/at/all", DestinationError)
