"""What the Hub, or whatever answers in its place, may say: a download ends with the right files, or with one sentence of ours.

FUZZ_HUB_CASES=5000 plays so many cases instead of a few, from FUZZ_FIRST on; case N is always the same.
"""

import gzip
import json
import os
import random

import hub_server
import pytest
from file_fuzz import BYTES, as_json, change
from hub_server import HubServer

from openelm_mlx import hub as our_hub
from openelm_mlx.errors import HubError, UserError
from openelm_mlx.hub import listing as our_listing

hub = hub_server.hub
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
CASES = int(os.environ.get("FUZZ_HUB_CASES", "60"))
FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 80, "x/y.txt": b"text"}
STATUSES = (
    200,
    201,
    204,
    206,
    301,
    302,
    303,
    307,
    308,
    400,
    401,
    403,
    404,
    408,
    410,
    416,
    418,
    429,
    500,
    502,
    503,
    504,
    511,
    599,
)
HEADERS = {
    "Retry-After": (
        "1",
        "-1",
        "1e9",
        "soon",
        "999999999",
        "Wed, 21 Oct 2065 07:28:00 GMT",
        "Wed, 99 Oct 2015",
        "",
        "0x10",
    ),
    "Location": (
        "/",
        "//",
        "http://",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        "javascript:0",
        "",
    ),
    "Content-Type": ("text/html", "application/json", "text/html; charset=utf-16", "x", ""),
    "Content-Encoding": ("gzip", "br", "identity", "zstd, gzip", "x"),
    "Content-Range": ("bytes 0-9/10", "bytes */5", "bytes 99999999999999999999-1/2", "x", "bytes 5-2/*"),
    "X-Linked-ETag": ('"abc"', "W/", ""),
    "X-Error-Code": ("GatedRepo", "RepoNotFound", "RevisionNotFound", "EntryNotFound", "x"),
    "X-Error-Message": ("a" * 5000, "\x1b[2J"),
}


def body_of(numbers: random.Random, listing: bytes) -> bytes:
    match numbers.randrange(6):
        case 0:
            return b"<!DOCTYPE html><html><body>Log in</body></html>"
        case 1:
            return gzip.compress(b"0" * 10_000)
        case 2:
            return numbers.choice(BYTES)(numbers.choice((listing, FILES["model.safetensors"])), numbers)
        case _:
            return as_json(change(json.loads(listing), numbers), numbers)


def play(hub: HubServer, numbers: random.Random, listing: bytes) -> None:
    """Have the stand-in answer wrongly once to three times."""
    for _ in range(numbers.randrange(1, 4)):
        chosen = numbers.sample(list(HEADERS), numbers.choice((0, 1, 1, 2)))
        headers = {name: numbers.choice(HEADERS[name]) for name in chosen}
        status = numbers.choice(STATUSES) if numbers.random() < 0.6 else 200
        path = numbers.choice(("/api/models/", "/api/models/", "/resolve/", "/objects/"))
        framing = numbers.choice(("length", "length", "close"))
        hub.fail(status, path, numbers.choice((1, 1, 3)), body_of(numbers, listing), headers, framing)
    if numbers.random() < 0.2:
        hub.drop_after(numbers.randrange(20_000), numbers.choice((1, 3)))


def test_answers_of_any_kind(hub: HubServer, tmp_path, monkeypatch):
    monkeypatch.setattr("openelm_mlx.hub.requests._RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("openelm_mlx.hub.requests._LONGEST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("openelm_mlx.hub.listing._LISTING_WAIT_SECONDS", -1.0)
    monkeypatch.setattr("openelm_mlx.hub.transfer._REPORT_SECONDS", 0.005)
    hub.add_repo("owner/name", FILES)
    listing = our_listing._listing_text("owner/name", None)
    faults = []
    for number in range(FIRST, FIRST + CASES):
        numbers = random.Random(number)
        home = tmp_path / str(number)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
        play(hub, numbers, listing)
        try:
            folder = our_hub.download("owner/name", lambda files: [file.name for file in files])
            for path in folder.rglob("*"):
                name = path.relative_to(folder).as_posix()
                if path.is_file() and name in FILES and path.read_bytes() != FILES[name]:
                    faults.append(f"{number}: {name} has other bytes")
        except UserError as error:
            if not str(error).isprintable() or len(str(error)) > 1500:
                faults.append(f"{number}: {str(error)[:300]!r}")
        except Exception as error:  # noqa: BLE001 - anything but ours is what is looked for
            faults.append(f"{number}: {type(error).__name__}: {str(error)[:300]}")
        hub._faults.clear()
        hub.drop_after(None)
    assert not faults, "\n".join(faults)


def test_a_redirect_to_a_local_file_or_in_a_circle_is_no_answer(hub: HubServer, monkeypatch):
    monkeypatch.setattr("openelm_mlx.hub.requests._RETRY_SECONDS", ())
    hub.add_repo("owner/name", FILES)
    for place in ("file:///etc/passwd", f"{hub.url}/api/models/owner/name?again"):
        hub.fail(302, "/api/models/", 50, headers={"Location": place})
        with pytest.raises(UserError):
            our_hub.list_files("owner/name")
        hub._faults.clear()


@pytest.mark.parametrize(
    "body", [b"\x1f\x8b\xb6", b'{"error": ' + b"7" * 5000 + b"}", b"[1]", b'{"errors": [5]}', b"[" * 90_000]
)
def test_an_error_whose_body_is_no_complaint(hub: HubServer, monkeypatch, body):
    monkeypatch.setattr("openelm_mlx.hub.requests._RETRY_SECONDS", ())
    hub.fail(500, "/api/models/", body=body, headers={"Content-Type": "application/json"})
    with pytest.raises(HubError, match="answered 500 for owner/name"):
        our_hub.list_files("owner/name")
