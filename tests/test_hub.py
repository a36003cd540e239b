"""Listing, downloading, resuming, reading ranges and uploading, against the stand-in of hub_server.py."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import hub_server
import pytest
from hub_server import TOKEN, HubServer, go_offline, log_in

from openelm_mlx.errors import CheckpointError, ConfigError, DestinationError, HubError
from openelm_mlx.hub import RepoFile, cached_file, download, list_files, read_range, repo_of, transfer, upload
from openelm_mlx.sources import locate, repository

hub = hub_server.hub

WEIGHTS = bytes(range(256)) * 40 + b"the end"
# As openai/gpt-oss-20b: three copies of the weights, of which one is wanted.
GPT_OSS = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "config.json": b'{"model_type": "gpt_oss"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "model-00000-of-00001.safetensors": WEIGHTS + b"0",
    "model-00001-of-00001.safetensors": WEIGHTS + b"1",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00000-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}}
    ).encode(),
    "original/model.safetensors": WEIGHTS + b"original",
    "original/config.json": b'{"num_hidden_layers": 24}',
    "metal/model.bin": WEIGHTS + b"metal",
}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openelm_mlx.hub.requests._RETRY_SECONDS", (0.0, 0.0))


def top_folder(files: list[RepoFile]) -> list[str]:
    return [file.name for file in files if "/" not in file.name and file.name != ".gitattributes"]


def every_file(files: list[RepoFile]) -> list[str]:
    return [file.name for file in files]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def blobs(tmp_path: Path, repo: str = "owner/name") -> list[Path]:
    return sorted((tmp_path / "hf_home/hub" / f"models--{repo.replace('/', '--')}" / "blobs").iterdir())


def message_of(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# Names and listings.


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("openai/gpt-oss-20b", True),
        ("apple/OpenELM-1_1B", True),
        ("a/b", True),
        ("gpt-oss-20b", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("./b", False),
        ("/a/b", False),
        ("~/b", False),
        ("a/", False),
        ("a/b c", False),
        ("a/-b", False),
        ("a/b--c", False),
        ("a/b..c", False),
        ("a/b.git", False),
        ("a/b\n", False),
        ("a/" + "b" * 97, False),
        ("", False),
    ],
)
def test_a_repo_id_is_owner_and_name(source: str, expected: bool) -> None:
    assert (repo_of(source) == (source, None)) is expected


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert repository("openai/gpt-oss-20b") == ("openai/gpt-oss-20b", None)
    (tmp_path / "openai/gpt-oss-20b").mkdir(parents=True)
    assert repository("openai/gpt-oss-20b") is None


def test_listing_has_names_and_sizes_from_one_request(hub: HubServer) -> None:
    hub.add_repo("owner/name", GPT_OSS)
    files = list_files("owner/name")
    assert {file.name: file.size for file in files} == {name: len(data) for name, data in GPT_OSS.items()}
    assert len(hub.requests) == 1


# Downloads.


def test_only_the_chosen_files_travel(hub: HubServer) -> None:
    commit = hub.add_repo("owner/name", GPT_OSS)
    folder = download("owner/name", top_folder)
    assert contents(folder) == {name: GPT_OSS[name] for name in top_folder(list_files("owner/name"))}
    assert folder.name == commit
    for name in ("original/model.safetensors", "original/config.json", "metal/model.bin", ".gitattributes"):
        assert hub.sent(name) == 0
    folder = download("owner/name", lambda files: ["original/model.safetensors"])
    assert (folder / "original/model.safetensors").read_bytes() == GPT_OSS["original/model.safetensors"]
    assert hub.sent("metal/model.bin") == 0


def test_what_is_cached_does_not_travel_again(hub: HubServer) -> None:
    hub.add_repo("owner/name", GPT_OSS)
    first = download("owner/name", top_folder)
    count = len(hub.requests)
    assert download("owner/name", top_folder, progress=lambda done, total: pytest.fail("nothing was missing")) == first
    assert [request.path for request in hub.requests[count:]] == ["/api/models/owner/name?blobs=true"]


def test_unchanged_files_of_a_new_commit_do_not_travel_again(hub: HubServer) -> None:
    hub.add_repo("owner/name", GPT_OSS)
    old = download("owner/name", top_folder)
    hub.add_repo("owner/name", GPT_OSS | {"config.json": b"{}"})
    new = download("owner/name", top_folder)
    assert new != old
    assert (new / "config.json").read_bytes() == b"{}"
    assert (old / "config.json").read_bytes() == GPT_OSS["config.json"]
    assert hub.sent("model-00000-of-00001.safetensors") == len(GPT_OSS["model-00000-of-00001.safetensors"])


def test_a_cached_file_is_found_without_asking(hub: HubServer) -> None:
    commit = hub.add_repo("owner/name", GPT_OSS)
    assert cached_file("owner/name", "config.json") is None
    folder = download("owner/name", lambda files: ["config.json"])
    count = len(hub.requests)
    assert cached_file("owner/name", "config.json") == folder / "config.json"
    assert cached_file("owner/name", "config.json", revision=commit) == folder / "config.json"
    assert cached_file("owner/name", "tokenizer.json") is None
    assert cached_file("owner/name", "config.json", revision="v9") is None
    assert len(hub.requests) == count


def test_huggingface_hub_and_we_share_one_cache(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache

    hub.add_repo("owner/theirs", GPT_OSS)
    hub.add_repo("owner/ours", {"config.json": b"{}", "model.safetensors": WEIGHTS})

    theirs = Path(snapshot_download("owner/theirs", allow_patterns=["*.json", "model-*"]))
    sent = sum(request.sent for request in hub.requests if request.file)
    assert download("owner/theirs", top_folder) == theirs
    assert sum(request.sent for request in hub.requests if request.file) == sent

    ours = download("owner/ours", every_file)
    assert try_to_load_from_cache("owner/ours", "model.safetensors") == str(ours / "model.safetensors")
    assert snapshot_download("owner/ours") == str(ours)
    assert hub.sent("model.safetensors") == len(WEIGHTS)

    report = scan_cache_dir(tmp_path / "hf_home/hub")
    assert not report.warnings
    sizes = {repo.repo_id: repo.size_on_disk for repo in report.repos}
    assert sizes["owner/ours"] == len(WEIGHTS) + 2
    assert {ref for repo in report.repos for ref in repo.refs} == {"main"}


def test_revisions(hub: HubServer) -> None:
    first = hub.add_repo("owner/name", {"config.json": b"1"})
    hub.add_repo("owner/name", {"config.json": b"2"}, revision="refs/pr/1")
    assert (download("owner/name", every_file) / "config.json").read_bytes() == b"1"
    assert (download("owner/name", every_file, revision="refs/pr/1") / "config.json").read_bytes() == b"2"
    assert download("owner/name", every_file, revision=first).name == first
    assert read_range("owner/name", "config.json", 0, 9, revision="refs/pr/1") == b"2"


def test_the_same_content_under_two_names_travels_once(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS, "empty.json": b"", "none.txt": b""})
    seen: list[tuple[int, int]] = []
    folder = download("owner/name", every_file, progress=lambda done, total: seen.append((done, total)))
    assert contents(folder) == {
        "a.safetensors": WEIGHTS,
        "b.safetensors": WEIGHTS,
        "empty.json": b"",
        "none.txt": b"",
    }
    assert hub.sent("a.safetensors") + hub.sent("b.safetensors") == len(WEIGHTS)
    assert seen[-1] == (2 * len(WEIGHTS), 2 * len(WEIGHTS))


def test_files_may_be_larger_than_one_request(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openelm_mlx.hub.requests._REQUEST_BYTES", 4000)
    monkeypatch.setattr("openelm_mlx.hub.transfer._BLOCK_BYTES", 100)
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    assert (download("owner/name", every_file) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == ["bytes=0-3999", "bytes=4000-7999", "bytes=8000-10246"]


def test_a_disk_without_symbolic_links(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    files = {"config.json": b"{}", "a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS}
    hub.add_repo("owner/name", files)
    folder = download("owner/name", every_file)
    assert contents(folder) == files
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert blobs(tmp_path) == []
    sent = len(hub.requests)
    assert download("owner/name", every_file) == folder
    assert len(hub.requests) == sent + 1


def test_two_downloads_point_to_a_file_at_once(tmp_path: Path) -> None:
    """Both see the other's name there, and neither takes the content away."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/x").write_bytes(WEIGHTS)
    pointer = tmp_path / "snapshots/c/model.safetensors"

    def point() -> None:
        for _ in range(200):
            transfer._point(tmp_path / "blobs/x", [pointer])

    threads = [threading.Thread(target=point) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pointer.read_bytes() == (tmp_path / "blobs/x").read_bytes() == WEIGHTS
    assert [path.name for path in pointer.parent.iterdir()] == ["model.safetensors"]


def test_a_place_that_is_taken_costs_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/x").write_bytes(WEIGHTS)
    (tmp_path / "snapshots/c/model.safetensors/full").mkdir(parents=True)
    with pytest.raises(OSError):
        transfer._point(tmp_path / "blobs/x", [tmp_path / "snapshots/c/model.safetensors"])
    assert (tmp_path / "blobs/x").read_bytes() == WEIGHTS


def test_two_downloads_at_once_fetch_each_file_once(hub: HubServer) -> None:
    hub.add_repo("owner/name", GPT_OSS)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(download("owner/name", every_file))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert contents(folders[0]) == GPT_OSS
    assert {name: hub.sent(name) for name in GPT_OSS} == {name: len(data) for name, data in GPT_OSS.items()}


# Interruptions.


def break_at_9000(hub: HubServer) -> None:
    """Let the next transfer of WEIGHTS fail: after 6000 bytes, after 3000 more, and then with nothing, twice."""
    hub.drop_after(6000)
    hub.drop_after(3000)
    hub.drop_after(0, times=2)


def test_a_broken_download_goes_on_in_the_next_call(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    break_at_9000(hub)
    with pytest.raises(HubError) as error:
        download("owner/name", every_file)
    assert "cannot be reached for owner/name" in message_of(error)
    assert "resumes where it stopped" in message_of(error)
    assert [path.stat().st_size for path in blobs(tmp_path)] == [9000]

    seen: list[int] = []
    folder = download("owner/name", every_file, progress=lambda done, total: seen.append(done))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors")[-1] == f"bytes=9000-{len(WEIGHTS) - 1}"
    assert hub.sent("model.safetensors") == len(WEIGHTS)
    assert seen == sorted(seen)
    assert seen[0] >= 9000


def test_a_broken_connection_is_taken_up_in_the_same_call(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    hub.drop_after(1000, times=None)  # every answer breaks; as long as each brings something, that is no failure
    monotonic: list[int] = []
    folder = download("owner/name", every_file, progress=lambda done, total: monotonic.append(done))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors")[:2] == [f"bytes=0-{len(WEIGHTS) - 1}", f"bytes=1000-{len(WEIGHTS) - 1}"]
    assert hub.sent("model.safetensors") == len(WEIGHTS)
    assert monotonic == sorted(monotonic)


def test_a_server_that_knows_no_ranges(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    hub.ignore_ranges = True
    hub.drop_after(3000)
    assert (download("owner/name", every_file) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_busy_hub_is_asked_again(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"config.json": b"{}"})
    hub.fail(503, "/resolve/", times=2)
    assert contents(download("owner/name", every_file)) == {"config.json": b"{}"}
    hub.add_repo("owner/name", {"config.json": b"[]"})
    hub.fail(503, "/resolve/", times=3)
    with pytest.raises(HubError, match="answered 503"):
        download("owner/name", every_file)


def test_an_interrupt_stops_the_transfer_and_keeps_what_arrived(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "openelm_mlx.hub.requests._RETRY_SECONDS", (600.0,)
    )  # the worker waits when the interrupt comes
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    hub.drop_after(5000)

    def interrupt(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        if done == 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download("owner/name", every_file, progress=interrupt)
    assert [path.stat().st_size for path in blobs(tmp_path)] == [5000]
    assert (download("owner/name", every_file) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent("model.safetensors") == len(WEIGHTS)


def test_another_program_that_fetches_the_same_file_is_waited_for(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub.utils import WeakFileLock

    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    (file,) = list_files("owner/name")
    lock = tmp_path / "hf_home/hub/.locks/models--owner--name" / f"{file.etag}.lock"
    lock.parent.mkdir(parents=True)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with WeakFileLock(lock):
        with pytest.raises(KeyboardInterrupt):
            download("owner/name", every_file, progress=interrupt)
        results: list[Path] = []
        waiting = threading.Thread(target=lambda: results.append(download("owner/name", every_file)))
        waiting.start()
        waiting.join(0.3)
        assert not results
        assert hub.sent("model.safetensors") == 0
    waiting.join()
    assert contents(results[0]) == {"model.safetensors": WEIGHTS}


def test_a_killed_process_leaves_what_the_next_one_needs(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("owner/name", {"config.json": b"{}", "model.safetensors": WEIGHTS})
    hub.drop_after(4000)
    script = """
        import os
        from openelm_mlx import hub
        hub.requests._RETRY_SECONDS = (600.0,)
        die = lambda done, total: os._exit(9) if done == 4002 else None
        hub.download("owner/name", lambda files: [file.name for file in files], progress=die)
    """
    assert run_python(script).returncode == 9
    assert (download("owner/name", every_file) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent("model.safetensors") == len(WEIGHTS)


def test_a_damaged_part_is_found_out_and_fetched_anew(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS, "config.json": b'{"a": 1}'})
    break_at_9000(hub)
    with pytest.raises(HubError):
        download("owner/name", lambda files: ["model.safetensors"])
    (part,) = blobs(tmp_path)
    part.write_bytes(b"x" + part.read_bytes()[1:])
    # Its end comes the same twice, so what was there before is the damaged part: it is fetched too.
    assert contents(download("owner/name", every_file))["model.safetensors"] == WEIGHTS


def test_a_whole_part_that_is_damaged_is_fetched_anew(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    part = part_of(tmp_path, bytes(len(WEIGHTS)))
    assert contents(download("owner/name", every_file, commit)) == {"model.safetensors": WEIGHTS}
    part.write_bytes(bytes(len(WEIGHTS) + 1))  # and one that is too long
    for path in (part.with_name(hashlib.sha256(WEIGHTS).hexdigest()),):
        path.unlink()
    assert contents(download("owner/name", every_file, commit)) == {"model.safetensors": WEIGHTS}


def test_a_small_file_is_compared_with_gits_checksum(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("owner/name", {"config.json": b"{}"})
    monkeypatch.setattr("openelm_mlx.hub.requests._answer", lambda *_: iter([b"[]"]))
    with pytest.raises(HubError, match=r"config\.json of owner/name did not arrive"):
        download("owner/name", every_file)


def test_a_cached_file_of_the_wrong_size_is_fetched_anew(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    weights = download("owner/name", every_file) / "model.safetensors"
    weights.resolve().write_bytes(WEIGHTS[:-1])
    assert (download("owner/name", every_file) / "model.safetensors").read_bytes() == WEIGHTS


# Answers that are not the file. Whatever comes, what was downloaded stays.

LOGIN = b"<html><body>Log in to this network</body></html>" * 200


def part_of(tmp_path: Path, data: bytes) -> Path:
    """The partial file of WEIGHTS, as an interrupted download leaves it."""
    folder = tmp_path / "hf_home/hub/models--owner--name/blobs"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{hashlib.sha256(WEIGHTS).hexdigest()}.openelm_mlx.incomplete"
    part.write_bytes(data)
    return part


def ranged(start: int, total: int | str = len(WEIGHTS)) -> dict[str, str]:
    return {"Content-Range": f"bytes {start}-{len(WEIGHTS) - 1}/{total}"}


@pytest.mark.parametrize(
    ("status", "headers", "body", "framing"),
    [
        (200, {"Content-Type": "text/html; charset=utf-8"}, LOGIN, "length"),
        (200, {"Content-Type": "text/html"}, WEIGHTS, "length"),  # whatever its length
        (200, {"Content-Type": "text/html"}, LOGIN, "endless"),
        (200, {}, LOGIN, "length"),  # a proxy that says nothing of a type
        (203, {}, LOGIN, "length"),
        (206, {}, WEIGHTS[9000:], "length"),  # a range that it does not name
        (206, ranged(0), WEIGHTS, "length"),
        (206, ranged(8999), WEIGHTS[8999:], "length"),
        (206, ranged(9000, len(WEIGHTS) + 5), WEIGHTS[9000:], "length"),  # of another file
        (206, ranged(9000) | {"Content-Encoding": "gzip"}, WEIGHTS[9000:], "length"),
        (206, {"Content-Range": "bytes x-y/z"}, WEIGHTS[9000:], "length"),
        (416, {"Content-Range": "bytes */8"}, b"", "length"),
        (404, {}, b"nothing", "length"),
        (407, {}, LOGIN, "endless"),
        (511, {"Content-Type": "text/html"}, LOGIN, "length"),
    ],
)
def test_an_answer_that_is_not_the_file_costs_nothing(
    hub: HubServer, tmp_path: Path, status: int, headers: dict[str, str], body: bytes, framing: str
) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    part = part_of(tmp_path, WEIGHTS[:9000])
    hub.fail(status, "/objects/", times=9, body=body, headers=headers, framing=framing)
    with pytest.raises(HubError) as error:
        download("owner/name", every_file)
    assert "owner/name" in message_of(error)
    assert part.read_bytes() == WEIGHTS[:9000]
    hub._faults.clear()
    assert contents(download("owner/name", every_file)) == {"model.safetensors": WEIGHTS}
    assert hub.ranges("model.safetensors") == [f"bytes=9000-{len(WEIGHTS) - 1}"]


@pytest.mark.parametrize("junk", [b"x" * (len(WEIGHTS) - 9000), b"x" * len(WEIGHTS)])
def test_other_bytes_in_the_right_frame_cost_no_more_than_themselves(
    hub: HubServer, tmp_path: Path, junk: bytes
) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    part = part_of(tmp_path, WEIGHTS[:9000])
    is_range = len(junk) < len(WEIGHTS)
    hub.fail(206 if is_range else 200, "/objects/", body=junk, headers=ranged(9000) if is_range else {})
    if is_range:  # asked once more, the end is another one: and it is right
        assert contents(download("owner/name", every_file)) == {"model.safetensors": WEIGHTS}
        return
    hub.fail(200, "/objects/", body=junk[:-1] + b"y")
    with pytest.raises(HubError, match="ended differently each time"):
        download("owner/name", every_file)
    assert part.read_bytes() == WEIGHTS[:9000]


@pytest.mark.parametrize("framing", ["close", "endless"])
def test_bodies_that_end_early_or_never(hub: HubServer, tmp_path: Path, framing: str) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    part = part_of(tmp_path, WEIGHTS[:100])
    body = WEIGHTS[100:3000] if framing == "close" else WEIGHTS[100:]
    hub.fail(206, "/objects/", body=body, headers=ranged(100), framing=framing)
    assert contents(download("owner/name", every_file)) == {"model.safetensors": WEIGHTS}
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS[::-1]})
    part = part.with_name(f"{hashlib.sha256(WEIGHTS[::-1]).hexdigest()}.openelm_mlx.incomplete")
    hub.fail(200, "/objects/", times=9, body=WEIGHTS[::-1][:500], framing="close")
    with pytest.raises(HubError, match="owner/name"):
        download("owner/name", every_file)
    assert part.read_bytes() == WEIGHTS[::-1][:500]


def test_a_file_that_was_replaced_on_the_way_is_noticed(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    part = part_of(tmp_path, WEIGHTS[:9000])
    headers = {"X-Linked-ETag": f'"{"0" * 64}"', "Location": f"{hub.storage_url}/objects/{'0' * 64}"}
    hub.fail(302, "/resolve/", times=2, headers=headers)
    hub.fail(206, "/objects/", body=WEIGHTS[9000:], headers=ranged(9000))
    with pytest.raises(HubError, match="its checksum is"):
        download("owner/name", every_file)
    assert part.read_bytes() == WEIGHTS[:9000]


def test_a_hub_that_says_when_is_asked_then(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: bool(waits.append(seconds)))
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.add_repo("owner/name", {"config.json": b"{}"})
    monkeypatch.setattr("openelm_mlx.hub.transfer._CONNECTIONS", 1)
    hub.fail(503, "/resolve/", headers={"Retry-After": "7"})
    hub.fail(429, "/api/models", headers={"Retry-After": "5"})
    assert contents(download("owner/name", every_file)) == {"config.json": b"{}"}
    assert [wait for wait in waits if wait in (5.0, 7.0)] == [5.0, 7.0]
    hub.add_repo("owner/other", {"config.json": b"{}"})
    for after, said in (("3600", "in 60 minutes"), ("-1", "in a few minutes"), ("soon", "in a few minutes")):
        hub.fail(429, "/api/models", headers={"Retry-After": after})
        with pytest.raises(HubError, match=said):
            list_files("owner/other")
    hub.fail(429, "/api/models", headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})  # long ago: at once
    assert list_files("owner/other")


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"{}" * 5, b"[]", b"null", b'{"sha": 5, "siblings": []}', b'{"sha": null, "siblings": null}'],
)
def test_a_listing_that_is_none(hub: HubServer, body: bytes) -> None:
    hub.fail(200, "/api/models", body=body)
    with pytest.raises(HubError, match="does not answer like the Hugging Face Hub"):
        list_files("owner/name")


def test_a_listing_without_an_end(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openelm_mlx.hub.listing.LARGEST_LISTING", 100_000)
    hub.fail(200, "/api/models", body=b'{"siblings": [' + b" " * 1000, framing="endless")
    with pytest.raises(HubError, match="does not end"):
        list_files("owner/name")
    assert hub.hung_up.wait(60)


def listed(name: object = "a", size: object = 1, etag: object = "0" * 40, lfs: object = None) -> bytes:
    file = {"rfilename": name, "size": size, "blobId": etag} | ({} if lfs is None else {"lfs": lfs})
    return json.dumps({"sha": "0" * 40, "siblings": [file]}).encode()


@pytest.mark.parametrize(
    "body",
    [
        *(listed(name) for name in (".", "..", "", "a/../b", "a/./b", "/a", "a//b", "a/", "a\0b", None, 5, [], {})),
        *(listed(size=size) for size in (-1, None, "1", 1.5, True, 10**30, [])),
        *(listed(etag=etag) for etag in ("", None, 5, "../" * 14, "0" * 41, [])),
        *(listed(lfs=lfs) for lfs in ([5], "x", {"sha256": None}, {"size": 1})),
    ],
)
def test_a_listing_with_files_that_cannot_be(hub: HubServer, tmp_path: Path, body: bytes) -> None:
    hub.fail(200, "/api/models", body=body)
    with pytest.raises(HubError, match="does not answer like the Hugging Face Hub"):
        download("owner/name", every_file)
    assert not (tmp_path / "hf_home/hub").exists()


def test_names_that_no_disk_of_a_mac_can_hold_are_left_out(hub: HubServer) -> None:
    odd = [
        "a\\b",
        "c" * 256,
        "d/" * 600 + "d",
        "tab\t",
        "MODEL.safetensors",
        "config.JSON/x",
        "caf\u0065\u0301",
        "x\u202e",
    ]
    kept = {"config.json": b"{}", "model.safetensors": b"1", "caf\u00e9": b"2", "Grüße/ä": b"3"}
    entries = [{"rfilename": name, "size": 1, "blobId": "0" * 40} for name in [*kept, *odd, "\ud800"]]
    hub.add_repo("owner/name", dict.fromkeys(kept, b"1"))
    hub.fail(200, "/api/models", body=json.dumps({"sha": "0" * 40, "siblings": entries}).encode())
    assert [file.name for file in list_files("owner/name")] == list(kept)


@pytest.mark.parametrize("revision", ["..", "a/../../b", "/etc", "", "a\0", 5])
def test_a_revision_is_no_path(hub: HubServer, revision: object) -> None:
    for call in (lambda: list_files("owner/name", revision), lambda: read_range("owner/name", "a", 0, 1, revision)):  # type: ignore[arg-type]
        with pytest.raises(HubError, match="revision"):
            call()
    assert not hub.requests


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://huggingface.co/openai/gpt-oss-20b", ("openai/gpt-oss-20b", None)),
        ("https://huggingface.co/openai/gpt-oss-20b/", ("openai/gpt-oss-20b", None)),
        ("http://www.huggingface.co/openai/gpt-oss-20b/tree/main", ("openai/gpt-oss-20b", None)),
        ("https://hf.co/apple/OpenELM-270M/tree/v2/sub?x=1#y", ("apple/OpenELM-270M", "v2")),
        ("huggingface.co/apple/OpenELM-270M/blob/main/config.json", ("apple/OpenELM-270M", None)),
        ("hf.co/apple/OpenELM-270M/resolve/refs%2Fpr%2F3/config.json", ("apple/OpenELM-270M", "refs/pr/3")),
        ("hf://apple/OpenELM-270M@abc", ("apple/OpenELM-270M", "abc")),
        ("https://huggingface.co/models/openai/gpt-oss-20b", ("openai/gpt-oss-20b", None)),
        ("gpt-oss:20b", None),
        ("./huggingface.co", None),
    ],
)
def test_addresses_of_repositories(source: str, expected: tuple[str, str | None] | None) -> None:
    assert repo_of(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "https://huggingface.co/", "https://huggingface.co/openai", "https://huggingface.co/datasets/openai/gsm8k",
        "https://huggingface.co/spaces/a/b", "https://example.com/openai/gpt-oss-20b", "https://", "http://[::1",
        "https://huggingface.co/a/b--c", "hf://a", "https://huggingface.co/a/b/tree/..%2f..",
    ],
)  # fmt: skip
def test_addresses_of_something_else(source: str) -> None:
    with pytest.raises(HubError):
        repo_of(source)


def test_other_programs_names_are_answered_with_the_right_one() -> None:
    for name, repo in {
        "gpt-oss": "openai/gpt-oss-20b", "gpt-oss:20b": "openai/gpt-oss-20b", "gpt-oss:latest": "openai/gpt-oss-20b",
        "GPT-OSS:120B": "openai/gpt-oss-120b", "gpt-oss-120b": "openai/gpt-oss-120b", "gpt-oss:20b-cloud": "openai/gpt-oss-20b",
        "openelm-1.1b-instruct": "apple/OpenELM-1_1B-Instruct", "OpenELM-270M": "apple/OpenELM-270M",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=f"give {repo}"):
            locate(name)


# Disks.


def test_free_space_is_checked_before_anything_travels(hub: HubServer, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS * 1000}
    hub.add_repo("owner/name", files)
    with pytest.raises(DestinationError) as error:
        download("owner/name", every_file, local_free_bytes=2_000_000)
    text = message_of(error)
    assert "owner/name needs 10.2 MB more" in text
    assert "2.0 MB are free" in text
    assert "room for 8.2 MB" in text
    assert str(tmp_path / "hf_home/hub") in text
    assert "HF_HOME" in text
    assert hub.sent("model.safetensors") == hub.sent("config.json") == 0


def test_free_space_is_needed_for_the_rest_only(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS, "copy.safetensors": WEIGHTS})
    break_at_9000(hub)
    with pytest.raises(HubError):
        download("owner/name", lambda files: ["model.safetensors"])
    rest = len(WEIGHTS) - 9000
    with pytest.raises(DestinationError, match=r"needs 1\.2 kB more"):
        download("owner/name", every_file, local_free_bytes=rest - 1)
    download("owner/name", every_file, local_free_bytes=rest)
    download("owner/name", every_file, local_free_bytes=0)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "is full and owner/name needs 10.2 kB more"),
        (errno.EACCES, "cannot be written"),
        (errno.EIO, "Input/output"),
    ],
)
def test_a_disk_that_fails_while_downloading(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})

    def fail(source: Path, destination: Path) -> None:
        os.unlink(source)
        raise OSError(number, os.strerror(number), str(destination))

    monkeypatch.setattr(transfer.os, "replace", fail)
    with pytest.raises(DestinationError) as error:
        download("owner/name", every_file)
    assert words in message_of(error)
    assert str(tmp_path / "hf_home/hub") in message_of(error)
    assert "HF_HOME" in message_of(error)


def test_a_complete_copy_in_a_read_only_cache_will_do(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    hub.add_repo("owner/name", {"config.json": b"{}"})
    folder = Path(snapshot_download("owner/name"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert download("owner/name", every_file) == folder


# Without a network.


def cut_off(hub: HubServer, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "HF_HUB_OFFLINE":
        go_offline(monkeypatch)
    else:
        hub.stop()


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "cannot be reached"])
def test_a_complete_copy_works_without_a_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    hub.add_repo("owner/name", GPT_OSS)
    folder = download("owner/name", top_folder)
    listing = list_files("owner/name")
    cut_off(hub, monkeypatch, how)
    assert download("owner/name", top_folder) == folder
    assert list_files("owner/name") == listing
    assert read_range("owner/name", "model-00000-of-00001.safetensors", 3, 5) == WEIGHTS[3:8]

    with pytest.raises(HubError) as error:  # known from the listing, though never downloaded
        download("owner/name", lambda files: ["original/model.safetensors", "original/config.json"])
    text = message_of(error)
    assert how in text
    assert "lacks 'original/model.safetensors' and 1 more" in text
    with pytest.raises(HubError, match=r"no file 'absent\.bin'"):
        download("owner/name", lambda files: ["absent.bin"])
    with pytest.raises(HubError, match=how):
        download("owner/other", top_folder)
    with pytest.raises(HubError, match=how):
        read_range("owner/name", "metal/model.bin", 0, 8)


def test_offline_by_the_environment_of_the_process(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("owner/name", GPT_OSS)
    folder = download("owner/name", top_folder)
    count = len(hub.requests)
    go_offline(monkeypatch)
    script = """
        from openelm_mlx.hub import download
        print(download("owner/name", lambda files: ["config.json", "tokenizer.json"]))
    """
    result = run_python(script)
    assert (result.stdout.strip(), result.stderr) == (str(folder), "")
    assert len(hub.requests) == count


def test_an_interrupted_update_leaves_the_old_copy_to_be_used(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("owner/name", {"config.json": b"1", "model.safetensors": WEIGHTS})
    old = download("owner/name", every_file)
    hub.add_repo("owner/name", {"config.json": b"2", "model.safetensors": WEIGHTS[::-1]})
    hub.fail(503, "model.safetensors", times=20)  # of this file alone: the two come at the same time, in any order
    with pytest.raises(HubError):
        download("owner/name", every_file)
    go_offline(monkeypatch)
    assert download("owner/name", every_file) == old
    assert (old / "config.json").read_bytes() == b"1"


def test_a_copy_that_another_tool_brought(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    hub.add_repo("owner/whole", GPT_OSS)
    hub.add_repo("owner/part", GPT_OSS)
    hub.add_repo("owner/config", GPT_OSS)
    whole = snapshot_download("owner/whole", allow_patterns=["*.json", "model-*"])
    snapshot_download("owner/part", allow_patterns=["*.json", "model-00000*"])
    snapshot_download("owner/config", allow_patterns=["config.json"])
    go_offline(monkeypatch)

    assert str(download("owner/whole", top_folder)) == whole
    with pytest.raises(HubError) as error:
        download("owner/part", top_folder)
    assert "lacks 'model-00001-of-00001.safetensors'." in message_of(error)

    def choose(files: list[RepoFile]) -> list[str]:
        raise ConfigError("there are no weights here")

    with pytest.raises(HubError) as error:
        download("owner/config", choose)
    assert "is not complete" in message_of(error)
    assert "HF_HUB_OFFLINE" in message_of(error)


def test_a_choice_that_fails_online_is_the_choosers_error(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"README.md": b"no weights"})

    def choose(files: list[RepoFile]) -> list[str]:
        raise CheckpointError(f"No weights among {[file.name for file in files]}.")

    with pytest.raises(CheckpointError, match=r"No weights among \['README.md'\]"):
        download("owner/name", choose)


def test_a_hub_that_is_silent_counts_as_out_of_reach(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
        with pytest.raises(HubError, match=r"cannot be reached for owner/name \(.*timed out.*\): check the network"):
            download("owner/name", every_file)


# What the Hub refuses.


def test_a_repository_that_is_missing_or_private(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("owner/private", {"config.json": b"{}"}, private=True)
    calls = (list_files, lambda name: download(name, every_file), lambda name: read_range(name, "x", 0, 1))
    for name in ("owner/missing", "owner/private"):
        for call in calls:
            with pytest.raises(HubError) as error:
                call(name)
            text = message_of(error)
            assert text.startswith(f"{name} is neither a folder here nor a model")
            assert "check the spelling" in text
            assert "`hf auth login`" in text
    log_in(monkeypatch)
    assert contents(download("owner/private", every_file)) == {"config.json": b"{}"}
    with pytest.raises(HubError, match="check the spelling"):
        list_files("owner/missing")


def test_a_gated_repository(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("meta/llama", {"tokenizer.model": WEIGHTS}, gated=True)
    for token in (None, TOKEN):
        if token:
            log_in(monkeypatch, token)
        with pytest.raises(HubError) as error:
            download("meta/llama", every_file)
        text = message_of(error)
        assert "meta/llama is gated" in text
        assert f"accept its licence at {hub.url}/meta/llama" in text
        assert "`hf auth login`" in text
    assert sum("/resolve/" in request.path for request in hub.requests) == 2  # asking again would not help
    hub.accepted_licences.add("meta/llama")
    assert contents(download("meta/llama", every_file)) == {"tokenizer.model": WEIGHTS}


def test_the_token_goes_to_the_hub_only(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("owner/private", {"model.safetensors": WEIGHTS}, private=True)
    log_in(monkeypatch)
    download("owner/private", every_file)
    tokens = {(request.path.split("/")[1], request.token) for request in hub.requests}
    assert tokens == {("api", f"Bearer {TOKEN}"), ("owner", f"Bearer {TOKEN}"), ("objects", None)}


def test_a_token_that_is_not_accepted(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("owner/name", {"config.json": b"{}"})
    log_in(monkeypatch, "hf_stale")
    with pytest.raises(HubError) as error:
        list_files("owner/name")
    assert "does not accept your token" in message_of(error)
    assert "HF_TOKEN" in message_of(error)


def test_a_revision_or_file_that_is_missing(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"config.json": b"{}"})
    with pytest.raises(HubError) as error:
        download("owner/name", every_file, revision="v9")
    assert "owner/name has no revision 'v9'" in message_of(error)
    for call in (
        lambda: download("owner/name", lambda files: ["a/weights.bin"]),
        lambda: read_range("owner/name", "a/weights.bin", 0, 8),
    ):
        with pytest.raises(HubError) as error:
            call()
        assert f"has no file 'a/weights.bin': its files are listed at {hub.url}/owner/name/tree/main" in str(
            error.value
        )


def test_an_answer_that_is_not_the_hubs(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"config.json": b"{}"})
    for body in (b"<html>Please accept the terms of this hotel</html>", b"[]", b'{"id": "owner/name"}'):
        hub.fail(200, "/api/models/", body=body)
        with pytest.raises(HubError) as error:
            list_files("owner/name")
        assert "does not answer like the Hugging Face Hub" in message_of(error)
    hub.fail(403, "/resolve/", body=b'{"error": "Enable gated repositories in your token settings."}')
    with pytest.raises(HubError) as error:
        download("owner/name", every_file)
    assert "to your token (403, Enable gated repositories in your token settings): use one" in message_of(error)
    hub.fail(429, "/api/models/")
    with pytest.raises(HubError, match="too many requests"):
        list_files("owner/name")


@pytest.mark.parametrize("name", ["../../../outside.bin", "/outside.bin"])
def test_names_that_lead_out_of_the_cache_are_refused(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.add_repo("owner/name", {"config.json": b"{}", name: WEIGHTS})
    with pytest.raises(HubError, match="does not answer like the Hugging Face Hub"):
        download("owner/name", every_file)
    assert not list(tmp_path.rglob("outside.bin"))


def test_a_name_that_no_repository_has(hub: HubServer) -> None:
    with pytest.raises(HubError) as error:
        download("gpt-oss-20b", every_file)
    assert "'gpt-oss-20b' is not the name of a Hub repository: write OWNER/NAME" in message_of(error)
    assert not hub.requests


# Ranges.


def test_ranges_are_what_slicing_gives(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS, "config.json": WEIGHTS[:100]})
    size = len(WEIGHTS)
    for broken in (None, 1, 70):
        for start, length in ((0, 8), (8, 300), (size - 5, 5), (size - 5, 100), (0, size), (0, size + 9), (17, 0)):
            hub.drop_after(broken, times=2)
            assert read_range("owner/name", "model.safetensors", start, length) == WEIGHTS[start : start + length]
            assert read_range("owner/name", "config.json", 10, 20) == WEIGHTS[10:30]


def test_a_range_of_a_server_that_knows_none(hub: HubServer) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS, "large.safetensors": bytes(50_000_000)})
    hub.ignore_ranges = True
    assert read_range("owner/name", "model.safetensors", 500, 64) == WEIGHTS[500:564]
    assert read_range("owner/name", "large.safetensors", 0, 8) == bytes(8)
    assert hub.hung_up.wait(60)  # the rest was not waited for


def test_a_range_is_all_that_travels(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("owner/name", {"model.safetensors": WEIGHTS})
    assert read_range("owner/name", "model.safetensors", 8, 300) == WEIGHTS[8:308]
    assert hub.sent("model.safetensors") == 300
    assert not (tmp_path / "hf_home/hub").exists()
    with pytest.raises(HubError, match=r"model\.safetensors of owner/name is shorter than its listing says"):
        read_range("owner/name", "model.safetensors", len(WEIGHTS) + 1, 8)


# Uploads.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "converted model"
    path.mkdir()
    for name, data in {
        "config.json": b"{}",
        "README.md": b"# A model card without metadata",
        "LICENSE": b"terms",
        "NOTICE": b"who made it",
        "model-1.safetensors": WEIGHTS,
        "model-2.safetensors": WEIGHTS[::-1],
        "more/tokenizer.json": b'{"version": "1.0"}',
        "more/empty.txt": b"",
    }.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_an_upload_brings_every_file(
    hub: HubServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    log_in(monkeypatch)
    expected = contents(folder)
    (folder / ".DS_Store").write_bytes(b"of the Finder")
    assert upload(folder, "owner/new") == f"{hub.url}/owner/new"
    assert hub.uploads == {"owner/new": expected}
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    puts = [request.path.split("?")[0] for request in hub.requests if request.method == "PUT"]
    assert len(puts) == 3  # by Git LFS; the others are in the commit itself

    back = download("owner/new", lambda files: sorted(expected))
    assert contents(back) == expected
    assert {request.token for request in hub.requests if request.path.startswith("/objects/")} == {None}


def test_an_upload_adds_to_what_is_there(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch)
    hub.add_repo("owner/old", {"config.json": b"old", "kept.txt": b"kept"})
    upload(str(folder), "owner/old", message="Second version")
    remote = contents(download("owner/old", every_file))
    assert remote["kept.txt"] == b"kept"
    assert remote["config.json"] == b"{}"
    count = len(hub.requests)
    upload(folder, "owner/old")
    assert not [request for request in hub.requests[count:] if request.method == "PUT"]


def test_a_private_upload_is_private(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch)
    upload(folder, "owner/secret", private=True)
    assert set(hub.uploads) == {"owner/secret"}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="check the spelling"):
        list_files("owner/secret")

    log_in(monkeypatch)
    hub.add_repo("owner/public", {"config.json": b"{}"})
    with pytest.raises(HubError) as error:
        upload(folder, "owner/public", private=True)
    assert "owner/public exists and is public" in message_of(error)
    assert set(hub.uploads) == {"owner/secret"}


def test_a_failed_upload_says_what_to_do(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    with pytest.raises(HubError) as error:
        upload(folder, "owner/new")
    text = message_of(error)
    assert text.startswith("The upload to owner/new failed (you are not logged in; run `hf auth login`")
    assert f"the files in {folder} are as they were" in text
    assert f"`hf upload owner/new '{folder}'` tries again" in text

    log_in(monkeypatch)
    hub.read_only_token = True
    with pytest.raises(HubError, match="your token may not write there"):
        upload(folder, "owner/new")

    hub.read_only_token = False
    hub.fail(403, "/objects/")
    with pytest.raises(HubError) as error:
        upload(folder, "owner/new", private=True)
    assert "may not write there" in message_of(error)
    assert f"`hf upload owner/new '{folder}' --private` tries again" in message_of(error)
    assert "owner/new" not in hub.uploads

    hub.fail(403, "/commit/")
    with pytest.raises(HubError):
        upload(folder, "owner/new", private=True)
    upload(folder, "owner/new", private=True)
    sent = [request.path for request in hub.requests if request.method == "PUT" and request.status == 200]
    assert len(sent) == len(set(sent)) == 3  # what had arrived before the commit failed was not sent again
    assert hub.uploads["owner/new"] == before == contents(folder)

    hub.fail(500, "/commit/", body=b"<html>oops</html>")
    (folder / "config.json").write_bytes(b"[]")
    with pytest.raises(HubError, match=r"failed \(the Hub answered 500"):
        upload(folder, "owner/new", private=True)
    hub.stop()
    with pytest.raises(HubError, match=r"failed \(.*[Cc]onnect"):
        upload(folder, "owner/new")


def test_there_must_be_something_to_upload(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=f"{path.name} is not a folder with files"):
            upload(path, "owner/new")
    assert not hub.requests


def test_bars_are_shown_when_they_are_asked_for(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    log_in(monkeypatch)
    upload(folder, "owner/new", show_progress=True)
    assert "model-1.safetensors" in capfd.readouterr().err
    upload(folder, "owner/silent")
    assert not are_progress_bars_disabled()


# The module, and the stand-in itself.


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    lines = "\n".join(line.strip() for line in script.strip().splitlines())
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, env=environment, timeout=60)


def test_importing_the_module_does_not_import_huggingface_hub() -> None:
    script = """
        import sys, openelm_mlx.hub
        print([name for name in sys.modules if name.split('.')[0] in ('huggingface_hub', 'httpx', 'httpx2', 'tqdm')])
    """
    assert run_python(script).stdout.strip() == "[]"


def test_downloads_are_silent(hub: HubServer, capfd: pytest.CaptureFixture[str]) -> None:
    hub.add_repo("owner/name", GPT_OSS)
    hub.drop_after(100, times=2)
    download("owner/name", every_file)
    assert capfd.readouterr() == ("", "")


def test_the_stand_in_answers_as_huggingface_hub_expects(hub: HubServer) -> None:
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url

    commit = hub.add_repo("owner/name", GPT_OSS, gated=False)
    url = hf_hub_url("owner/name", "metal/model.bin")
    metadata = get_hf_file_metadata(url)
    assert metadata.commit_hash == commit
    assert metadata.size == len(GPT_OSS["metal/model.bin"])
    assert metadata.location.startswith(hub.storage_url)
    assert metadata.etag == next(file.etag for file in list_files("owner/name") if file.name == "metal/model.bin")
    for name, data in GPT_OSS.items():
        assert Path(hf_hub_download("owner/name", name)).read_bytes() == data
    info = HfApi(endpoint=hub.url).model_info("owner/name")
    assert (info.sha, info.private, info.gated) == (commit, False, False)
    assert [sibling.size for sibling in info.siblings or ()] == [None] * len(GPT_OSS)
