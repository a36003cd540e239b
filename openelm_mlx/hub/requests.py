"""Requests to the Hub: ranges of files, resumed where a connection broke, and bodies of bounded size."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import HubError
from ..files import parse_json, shown
from .failures import BrokenOff, OtherAnswer, may_pass, network_error, retry_after
from .names import LIBRARY, RepoFile

_REQUEST_BYTES = 8 << 30  # the Hub's delivery network sends at most 50 GB in one answer
_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # after failures in a row; any byte that arrives starts the row again
# The longest wait when the Hub says when it will answer again.
_LONGEST_WAIT_SECONDS = 120.0
_BODY_HEADERS = ("content-encoding", "content-length", "transfer-encoding")
_LARGEST_COMPLAINT = 100_000


def quoted(text: str, safe: str = "") -> str:
    from urllib.parse import quote

    return quote(text, safe=safe, errors="surrogatepass")


def address_of(repo: str, revision: str, name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}/resolve/{quoted(revision)}/{quoted(name, '/')}"


def read_bytes_of(
    url: str,
    start: int,
    end: int,
    file: RepoFile | None,
    stop: threading.Event,
    begin: Callable[[int], None] | None = None,
) -> Iterator[bytes]:
    """The bytes [start, end) of a file, in blocks; resumed after a broken connection.

    file: its size and checksum, if known; without it the bytes may end early, where the file does. begin: called with the
    position where each response begins. Raises the last error once `_RETRY_SECONDS` are used up, or the Hub asks for a longer
    pause.
    """
    failures = 0
    while start < end and not stop.is_set():
        asked = min(end, start + _REQUEST_BYTES)
        answer_start = start
        try:
            for chunk in _answer(url, start, asked, file):
                if begin is not None and start == answer_start:
                    begin(start)
                yield chunk
                start += len(chunk)
                failures = 0
        except (network_error(), BrokenOff) as error:
            if failures == len(_RETRY_SECONDS) or not may_pass(error):
                raise
            seconds = max(_RETRY_SECONDS[failures], retry_after(error) or 0.0)
            if seconds > max(_LONGEST_WAIT_SECONDS, _RETRY_SECONDS[failures]):
                raise
            stop.wait(seconds)
            failures += 1
        else:
            if start < asked:
                return


def _answer(url: str, start: int, end: int, file: RepoFile | None) -> Iterator[bytes]:
    """One request for the bytes [start, end) of a file; the HTTP library keeps the token from other hosts."""
    from huggingface_hub import constants

    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with requested(url, constants.HF_HUB_DOWNLOAD_TIMEOUT, headers) as response:
        _refuse_other_content(response, start, file)
        is_range = response.status_code == 206  # else a server or proxy without ranges sends the whole file
        unwanted, wanted = 0 if is_range else start, end - start
        for (
            chunk
        ) in response.iter_bytes():  # as they arrive: with a fixed block size a break would lose a partly filled block
            piece = chunk[unwanted : unwanted + wanted]
            unwanted -= min(unwanted, len(chunk))
            wanted -= len(piece)
            if piece:
                yield piece
            if not wanted and response.headers.get("Content-Length") != str(end - start):
                return  # whatever follows, perhaps endless, is not read
        if wanted and file is not None:
            raise BrokenOff("the answer ended early")


@contextmanager
def requested(url: str, timeout: float, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """The response to a GET, its body still to come; an error status is raised, with a body of bounded size."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    wanted = build_hf_headers(library_name=LIBRARY) | (headers or {})
    with get_session().stream("GET", url, headers=wanted, timeout=timeout, follow_redirects=True) as response:
        if response.status_code >= 400:
            kept = {name: text for name, text in response.headers.items() if name.lower() not in _BODY_HEADERS}
            body = b""
            with suppress(OtherAnswer, network_error()):
                body = bounded(response, _LARGEST_COMPLAINT, timeout)
            hf_raise_for_status(
                type(response)(response.status_code, headers=kept, content=_complaint(body), request=response.request)
            )
        yield response


def _complaint(body: bytes) -> bytes:
    """An error's body if it has the form that huggingface_hub can read; else b""."""
    try:
        said = parse_json(body, "it", HubError)
    except HubError:
        return b""
    text = said.get("error") if isinstance(said, dict) else None
    return json.dumps({"error": text}).encode() if isinstance(text, str) else b""


def bounded(response: Any, most: int, seconds: float) -> bytes:
    """A response's whole body. Raises OtherAnswer when it has more bytes, or takes longer."""
    body, end = bytearray(), time.monotonic() + seconds
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > most or time.monotonic() > end:
            raise OtherAnswer(f"it does not end within {most:,} bytes and {seconds:.0f} s")
    return bytes(body)


def _refuse_other_content(response: Any, start: int, file: RepoFile | None) -> None:
    """Raise OtherAnswer for a response whose headers say that it is not the file, or not its bytes from `start`."""
    headers, size = response.headers, None if file is None else file.size
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and not (
        file is not None and file.name.endswith((".html", ".htm"))
    ):
        raise OtherAnswer("it is a web page")
    packed = headers.get("Content-Encoding", "identity").lower() != "identity"
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != start or packed:
            raise OtherAnswer(f"it has other bytes than those from {start:,} on")
        total = None if found[3] == "*" else int(found[3])
    elif response.status_code == 200:
        length = headers.get("Content-Length", "")
        total = int(length) if re.fullmatch(r"\d{1,18}", length) and not packed else None
    else:
        raise OtherAnswer(f"its status is {response.status_code}")
    if size is not None and total is not None and total != size:
        raise OtherAnswer(f"it has {total:,} bytes and the file {size:,}")
    linked = next((each.headers["X-Linked-ETag"] for each in response.history if "X-Linked-ETag" in each.headers), None)
    if file is not None and linked is not None and linked.removeprefix("W/").strip('"') != file.etag:
        raise OtherAnswer(f"its checksum is {shown(linked)} and that of the file {file.etag[:12]}…")
