"""The writer: what it writes is what loaders read, resumed equals uninterrupted, and nothing unfinished can be loaded."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from openelm_mlx.checkpoint import writer as writer_module
from openelm_mlx.checkpoint.destination import check_destination
from openelm_mlx.checkpoint.reader import open_checkpoint, read_header
from openelm_mlx.checkpoint.safetensors_plan import OutputTensor, index_of, plan_files
from openelm_mlx.checkpoint.writer import CheckpointWriter, file_checksum
from openelm_mlx.errors import CheckpointError, DestinationError

ITEMS = {"F32": np.float32, "U32": np.uint32, "F16": np.float16, "U8": np.uint8}
# Sizes that leave holes: 5 bytes, 6 bytes, and words after them.
TENSORS = [
    OutputTensor("a.weight", "U32", (3, 4)),
    OutputTensor("a.scales", "U8", (5, 1)),
    OutputTensor("b.weight", "F32", (6, 7)),
    OutputTensor("b.gain", "F16", (3,)),
    OutputTensor("c.weight", "U32", (1, 3)),
    OutputTensor("d.weight", "F16", (9, 8)),
]


def data_of(tensor: OutputTensor) -> bytes:
    numbers = np.random.default_rng(sum(map(ord, tensor.name)))
    return numbers.integers(0, 60, tensor.nbytes, dtype=np.uint8).tobytes()


def in_pieces(data: bytes) -> list[bytes]:
    return [data[i : i + 10] for i in range(0, len(data), 10)]


def write_all(writer: CheckpointWriter, stop_after: int | None = None) -> None:
    for number, tensor in enumerate(writer.remaining):
        if number == stop_after:
            raise KeyboardInterrupt
        writer.write(tensor.name, in_pieces(data_of(tensor)))


def write(destination: Path, max_file_bytes: int = 10**9, fingerprint: str = "f", stop_after: int | None = None) -> int:
    """Write everything (or less) and return how many tensors were there before."""
    with CheckpointWriter(destination, plan_files(TENSORS, max_file_bytes), fingerprint) as writer:
        resumed = writer.num_finished
        write_all(writer, stop_after)
        writer.assemble({"config.json": b"{}", "LICENSE": b"terms"})
        writer.publish()
    return resumed


def interrupt(destination: Path, stop_after: int, max_file_bytes: int = 10**9) -> Path:
    """Leave a partial folder behind, as Ctrl-C does."""
    with pytest.raises(KeyboardInterrupt):
        write(destination, max_file_bytes, stop_after=stop_after)
    return Path(f"{destination}.partial")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def message_of(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# --- the format


def test_other_loaders_read_what_was_written(tmp_path):
    write(tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == ["LICENSE", "config.json", "model.safetensors"]
    file = tmp_path / "out/model.safetensors"
    theirs, mlx = load_file(file), mx.load(str(file))
    assert set(theirs) == set(mlx) == {tensor.name for tensor in TENSORS}
    for tensor in TENSORS:
        expected = np.frombuffer(data_of(tensor), ITEMS[tensor.dtype]).reshape(tensor.shape)
        np.testing.assert_array_equal(theirs[tensor.name], expected)
        np.testing.assert_array_equal(np.array(mlx[tensor.name]), expected)
    assert mx.load(str(file), return_metadata=True)[1] == {"format": "mlx"}


def test_every_tensor_begins_at_a_multiple_of_its_item(tmp_path):
    write(tmp_path / "out", max_file_bytes=200)
    for file in (tmp_path / "out").glob("*.safetensors"):
        for entry in read_header(file).values():
            assert entry.start % np.dtype(ITEMS[entry.dtype]).itemsize == 0, entry


def test_files_are_divided_and_the_index_says_where_what_is(tmp_path):
    files = plan_files(TENSORS, 150)
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [[tensor.name for tensor in file.tensors] for file in files] == [
        ["a.weight", "a.scales"],
        ["b.weight"],  # larger than a file may be: it has one to itself
        ["c.weight", "b.gain"],
        ["d.weight"],
    ]
    write(tmp_path / "out", 150)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index == json.loads(index_of(files))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {name: entry.file.name for name, entry in checkpoint.entries.items()} == index["weight_map"]
    for file in files:
        assert (tmp_path / "out" / file.name).stat().st_size == file.nbytes


def test_checksums_are_those_of_the_files(tmp_path):
    with CheckpointWriter(tmp_path / "out", plan_files(TENSORS, 150), "f") as writer:
        write_all(writer)
        writer.assemble({"config.json": b"{}"})
        writer.publish()
    assert len(writer.checksums) == 4
    for name, checksum in writer.checksums.items():
        assert file_checksum(tmp_path / "out" / name) == checksum


# --- interrupted, and taken up again


@pytest.mark.parametrize("max_file_bytes", [10**9, 150])
@pytest.mark.parametrize("stop_after", range(len(TENSORS)))
def test_resumed_is_byte_for_byte_the_uninterrupted(tmp_path, stop_after, max_file_bytes):
    write(tmp_path / "whole", max_file_bytes)
    interrupt(tmp_path / "out", stop_after, max_file_bytes)
    assert not (tmp_path / "out").exists()
    assert write(tmp_path / "out", max_file_bytes) == stop_after
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_torn_tensor_is_written_again(tmp_path):
    write(tmp_path / "whole")
    part = interrupt(tmp_path / "out", 3) / "output/model.safetensors.part"
    part.write_bytes(part.read_bytes() + b"half a tensor")
    assert write(tmp_path / "out") == 3
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_journal_torn_in_its_last_line_costs_that_tensor(tmp_path):
    write(tmp_path / "whole")
    journal = interrupt(tmp_path / "out", 3) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert write(tmp_path / "out") == 2
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_byte_that_changed_on_the_disk_is_found(tmp_path):
    write(tmp_path / "whole")
    part = interrupt(tmp_path / "out", 4) / "output/model.safetensors.part"
    data = bytearray(part.read_bytes())
    second = TENSORS[0].nbytes + len(plan_files(TENSORS)[0].header) + 3
    data[second] ^= 1
    part.write_bytes(data)
    assert write(tmp_path / "out") == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("max_file_bytes", [10**9, 150])
def test_interrupted_while_the_last_files_are_put_together(tmp_path, monkeypatch, max_file_bytes):
    write(tmp_path / "whole", max_file_bytes)
    operations = 0

    def replace(source, target):
        nonlocal operations
        operations += "output" in str(target)
        if operations == stop:
            raise KeyboardInterrupt
        real_replace(source, target)

    real_replace = os.replace
    for stop in range(1, len(plan_files(TENSORS, max_file_bytes)) + 1):
        operations = 0
        with monkeypatch.context() as patch:
            patch.setattr(writer_module.os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / f"out{stop}", max_file_bytes)
        assert write(tmp_path / f"out{stop}", max_file_bytes) == len(TENSORS)
        assert files_of(tmp_path / f"out{stop}") == files_of(tmp_path / "whole")


def test_another_plan_begins_anew(tmp_path):
    interrupt(tmp_path / "out", 3)
    assert write(tmp_path / "out", fingerprint="another source") == 0
    assert len(open_checkpoint(tmp_path / "out").entries) == len(TENSORS)


def test_nothing_unfinished_loads(tmp_path):
    partial = tmp_path / "out.partial"
    with CheckpointWriter(tmp_path / "out", plan_files(TENSORS, 150), "f") as writer:
        for tensor in writer.remaining:
            for folder in (partial, partial / "output"):
                assert not list(folder.glob("*.safetensors"))
                with pytest.raises(CheckpointError):
                    open_checkpoint(folder)
            writer.write(tensor.name, [data_of(tensor)])
        assert not (partial / "output/config.json").exists()
        assert writer.assemble({"config.json": b"{}"}) == partial / "output"
        assert not (tmp_path / "out").exists()
        writer.publish()
    assert open_checkpoint(tmp_path / "out").entries
    assert not partial.exists()


# --- what goes wrong


def test_after_an_error_nothing_is_left(tmp_path):
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path / "out", plan_files(TENSORS), "f") as writer:
        writer.write("a.weight", (bytes(1 // 0) for _ in range(1)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_a_disk_that_gets_full(tmp_path, monkeypatch, number):
    count = 0

    def append(stream, data):
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stream.write(data)

    monkeypatch.setattr(writer_module, "_append", append)
    with pytest.raises(DestinationError) as error:
        write(tmp_path / "out")
    assert "full" in message_of(error)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 400))
    with pytest.raises(DestinationError, match="free"):
        write(tmp_path / "deep/er/out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_counts_against_the_space_needed(tmp_path, monkeypatch):
    interrupt(tmp_path / "out", 5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 400))
    assert write(tmp_path / "out") == 5


def test_an_interrupted_conversion_survives_a_disk_that_is_too_small(tmp_path, monkeypatch):
    interrupt(tmp_path / "out", 2)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 100))
        with pytest.raises(DestinationError, match="free"):
            write(tmp_path / "out")
    assert write(tmp_path / "out") == 2


def test_destinations_that_exist(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "dangling"):
        with pytest.raises(DestinationError) as error:
            check_destination(tmp_path / name)
        assert "nothing is overwritten" in message_of(error)
    with pytest.raises(DestinationError):
        write(tmp_path / "folder")
    assert files_of(tmp_path / "folder") == {"mine": b"mine"}


def test_an_empty_folder_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").entries


def test_a_destination_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DestinationError) as error:
        write(tmp_path / "file/out")
    assert "cannot be written" in message_of(error)
    with pytest.raises(DestinationError, match="cannot be written"):
        write(tmp_path / ("x" * 300))


def test_somebody_elses_partial_folder_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis").write_text("mine")
    with pytest.raises(DestinationError, match="something else"):
        write(tmp_path / "out")
    assert files_of(tmp_path / "out.partial") == {"thesis": b"mine"}


def test_two_at_once(tmp_path):
    with CheckpointWriter(tmp_path / "out", plan_files(TENSORS), "f") as writer:
        write_all(writer)
        with pytest.raises(DestinationError, match="running"):
            write(tmp_path / "out")
        writer.assemble({"config.json": b"{}"})
        writer.publish()
    assert open_checkpoint(tmp_path / "out").entries


def test_a_destination_that_appears_meanwhile(tmp_path, monkeypatch):
    real_assemble = CheckpointWriter.assemble

    def assemble(writer, others):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").write_text("mine")
        return real_assemble(writer, others)

    monkeypatch.setattr(CheckpointWriter, "assemble", assemble)
    with pytest.raises(DestinationError, match="appeared"):
        write(tmp_path / "out")
    assert files_of(tmp_path / "out") == {"mine": b"mine"}


def test_a_tensor_out_of_order_or_of_the_wrong_length_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="before"), CheckpointWriter(tmp_path / "a", plan_files(TENSORS), "f") as w:
        w.write("d.weight", [])
    with (
        pytest.raises(AssertionError, match="instead of"),
        CheckpointWriter(tmp_path / "b", plan_files(TENSORS), "f") as w,
    ):
        w.write("a.weight", [b"short"])


@pytest.mark.parametrize("name", ["lock", "journal.jsonl", "journal.new", "output", "output/model.safetensors.part"])
@pytest.mark.parametrize("kind", ["a named pipe", "a link"])
def test_what_is_no_file_among_the_unfinished_is_refused_and_left_alone(tmp_path, name, kind):
    """Opening a pipe would wait for ever, and writing through a link would overwrite what it leads to."""
    partial, other = interrupt(tmp_path / "out", 3), tmp_path / "mine"
    other.write_bytes(b"mine")
    path = partial / name
    if path.is_dir():
        path.rename(tmp_path / "moved")
    path.unlink(missing_ok=True)
    if kind == "a link":
        path.symlink_to(other)
    else:
        os.mkfifo(path)
    with pytest.raises(DestinationError, match=f"{name} is {kind}.*move .*out.partial away"):
        write(tmp_path / "out")
    assert other.read_bytes() == b"mine"
    assert os.path.lexists(path)
    path.unlink()
    if (tmp_path / "moved").is_dir():
        (tmp_path / "moved").rename(path)
    (partial / "lock").touch()
    write(tmp_path / "out")  # nothing is held on to
    assert open_checkpoint(tmp_path / "out").entries


@pytest.mark.parametrize("line", [b"5", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"tensor": 1}'])
def test_a_journal_that_holds_something_else_costs_what_comes_after(tmp_path, line):
    write(tmp_path / "whole")
    journal = interrupt(tmp_path / "out", 3) / "journal.jsonl"
    first, second, *_ = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([first, second, line, b""]))
    assert write(tmp_path / "out") == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
