"""No file is lost that somebody else wrote, and none is left half written."""

import json
import os
import stat

import pytest

from openelm_mlx.errors import DestinationError
from openelm_mlx.outputs import (
    checked_output,
    json_with,
    output_file,
    picture_of_ours,
    safetensors_of,
    write_output,
)

OURS = json_with("format", "ours")


def files_in(folder):
    return {str(each.relative_to(folder)) for each in folder.rglob("*")}


def test_a_new_file_is_written_with_the_usual_mode(tmp_path):
    write_output(tmp_path / "a.txt", "é\n", "The text")
    assert (tmp_path / "a.txt").read_text() == "é\n"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask
    write_output(tmp_path / "secret", b"x", "The text", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert files_in(tmp_path) == {"a.txt", "secret"}


@pytest.mark.parametrize(
    "content", ["precious", '{"format": "theirs"}', '{"form', "[]", "null", "[" * 100_000, "\0\xff"]
)
def test_what_we_did_not_write_stays(tmp_path, content):
    file = tmp_path / "precious.txt"
    file.write_text(content)
    for is_ours in (None, OURS):
        with pytest.raises(DestinationError, match=r"is there.*name another file, or replace it with overwrite=True"):
            write_output(file, "new", "The text", is_ours)
        with pytest.raises(DestinationError, match=r"name another file\.$"):
            checked_output(file, "The text", is_ours, overwrite=None)
    assert file.read_text() == content
    write_output(file, "new", "The text", OURS, overwrite=True)
    assert file.read_text() == "new"
    assert files_in(tmp_path) == {"precious.txt"}


def test_what_we_wrote_is_replaced_and_keeps_its_mode(tmp_path):
    file = tmp_path / "ours.json"
    file.write_text('{"format": "ours", "n": 1}')
    file.chmod(0o640)
    write_output(file, '{"format": "ours", "n": 2}', "The text", OURS)
    assert json.loads(file.read_text())["n"] == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_an_empty_file_is_nobody_s(tmp_path):
    (tmp_path / "a").touch()
    write_output(tmp_path / "a", "x", "The text")
    assert (tmp_path / "a").read_text() == "x"


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_output(tmp_path / "link", "x", "The text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "x"
    (tmp_path / "there" / "file").write_text("precious")
    with pytest.raises(DestinationError):
        write_output(tmp_path / "link", "x", "The text")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such/a.txt", "there is no folder .*make it first"), ("", "that is a folder"), (".", "that is a folder"),
        ("there", "that is a folder"), ("new/", "that is a folder"), ("pipe", "that is a named pipe"),
        ("/dev/null", "that is a device"), ("a" * 300, "File name too long"), ("a\0b", "null"),
        ("loop", "symbolic links"), ("file/a.txt", "there is no folder"),
    ],
)  # fmt: skip
def test_places_that_are_none(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    before = files_in(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(DestinationError, match=f"^The text cannot be written to .*{said}"):
            write_output(name, "x", "The text", overwrite=overwrite)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("protected", ["folder", "file"])
def test_what_is_write_protected_says_so_before_the_work(tmp_path, monkeypatch, protected):
    file = tmp_path / "a.json"
    file.write_text('{"format": "ours"}')
    # Whoever runs the tests may be allowed everything.
    wanted = file if protected == "file" else tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != os.fspath(wanted))
    with pytest.raises(DestinationError, match="write-protected"):
        checked_output(file, "The text", OURS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    file = tmp_path / "a.json"
    file.write_text('{"format": "ours"}')
    expected = DestinationError if isinstance(error, OSError) else error

    def write():
        with output_file(file, "The text", OURS) as stream:
            stream.write(b"half of ")
            raise error

    with pytest.raises(expected) as raised:
        write()
    if expected is DestinationError:
        assert str(raised.value) == f"The text cannot be written to {str(file)!r}: the disk is full."
    assert file.read_text() == '{"format": "ours"}'
    assert files_in(tmp_path) == {"a.json"}


def test_a_file_that_comes_meanwhile_is_kept_and_so_is_the_work(tmp_path):
    file = tmp_path / "a"

    def write():
        with output_file(file, "It") as stream:
            stream.write(b"hours of work")
            file.write_text("theirs")

    with pytest.raises(DestinationError, match="another file appeared") as raised:
        write()
    assert file.read_text() == "theirs"
    [kept] = files_in(tmp_path) - {"a"}
    assert kept in str(raised.value)
    assert (tmp_path / kept).read_text() == "hours of work"


def test_our_formats_are_known_by_what_is_in_them(tmp_path):
    import mlx.core as mx

    mx.save_safetensors(str(tmp_path / "ours.safetensors"), {"a": mx.zeros(2)}, {"format": "ours"})
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"a": mx.zeros(2)}, {"format": "pt"})
    (tmp_path / "long.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    (tmp_path / "text.svg").write_text("<svg>openelm_mlx</svg>")
    kinds = {"safetensors": safetensors_of("ours"), "svg": picture_of_ours}
    for file in sorted(tmp_path.iterdir()):
        if file.name.startswith("ours"):
            assert checked_output(file, "It", kinds[file.suffix[1:]]) == file
        else:
            with pytest.raises(DestinationError, match="holds something else"):
                checked_output(file, "It", kinds[file.suffix[1:]])


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_chart_replaces_a_chart_and_no_other_picture(tmp_path, kind):
    import matplotlib as mpl

    from openelm_mlx.bench.chart import check_chart, draw_bars

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    file = tmp_path / f"chart.{kind}"
    figure = plt.figure()
    figure.text(0, 0, "a picture about openelm_mlx")
    figure.savefig(file)
    plt.close(figure)
    theirs = file.read_bytes()
    with pytest.raises(DestinationError, match="overwrite"):
        check_chart(str(file))
    with pytest.raises(DestinationError, match="overwrite"):
        draw_bars(file, "x", {"speed": {"ours": [1.0, 2.0]}})
    assert file.read_bytes() == theirs
    draw_bars(file, "x", {"speed": {"ours": [1.0, 2.0]}}, overwrite=True)
    ours = file.read_bytes()
    assert check_chart(str(file)) == file
    draw_bars(file, "y", {"speed": {"ours": [1.0, 2.0]}})
    assert file.read_bytes() != ours
