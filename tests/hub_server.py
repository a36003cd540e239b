"""A stand-in for the Hugging Face Hub, on 127.0.0.1: the part of its HTTP interface that downloads and uploads use.

Two servers run in threads. One is the Hub (listings, small files, redirects for large files, commits). The other is
where large files lie, on another port, as those of the real Hub are on another host: no token may arrive there. The
stand-in speaks plain HTTP and Git LFS, not Xet.

In a test module, use the fixture:

    import hub_server

    hub = hub_server.hub

    def test_something(hub):
        hub.add_repo("owner/name", {"config.json": b"{}", "model.safetensors": Path("tiny.safetensors")})
        assert list_files("owner/name")            # in this process ...
        subprocess.run([sys.executable, "-m", "openelm_mlx", "info", "owner/name"])   # ... or in another one
        assert hub.sent("model.safetensors") == 0

`hub` points huggingface_hub at the stand-in, in this process and, through the environment, in every process that it
starts: HF_ENDPOINT, an empty HF_HOME below tmp_path, no token, no Xet. `log_in(monkeypatch)` adds the token that the
stand-in accepts. Without pytest: `with HubServer() as hub: ...` and `hub.environment(home)` for a subprocess.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import getproxies
from weakref import WeakSet

import pytest

TOKEN = "hf_standin"
LARGE_FILE_BYTES = 1 << 20  # the Hub's is 10 MB
LARGE_FILE_NAMES = re.compile(r".*\.(safetensors|bin|pt|pth|model|npz|gguf)|(.*/)?tokenizer\.json")


@dataclass(frozen=True)
class Request:
    """One request that arrived: `sent` is the bytes of the answer's body that left, `file` the file it was for."""

    method: str
    path: str
    status: int
    sent: int
    file: str | None
    range: str | None
    token: str | None


@dataclass(frozen=True)
class _Fault:
    status: int
    body: bytes
    headers: dict[str, str]
    framing: str


@dataclass(frozen=True)
class _File:
    content: bytes | Path
    size: int
    sha1: str
    sha256: str
    is_large: bool

    @staticmethod
    def of(name: str, content: bytes | Path) -> _File:
        data = content.read_bytes() if isinstance(content, Path) else content
        sha1, sha256 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha256(data).hexdigest()
        is_large = bool(LARGE_FILE_NAMES.fullmatch(name)) or len(data) > LARGE_FILE_BYTES
        return _File(content, len(data), sha1, sha256, is_large and len(data) > 0)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.sha1

    def read(self, start: int, stop: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start:stop]
        with open(self.content, "rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass
class _Repo:
    name: str
    gated: bool
    private: bool
    revisions: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    commits: dict[str, dict[str, _File]] = field(default_factory=dict)

    def commit(self, files: dict[str, _File], revision: str) -> str:
        listing = json.dumps([len(self.commits), sorted((name, file.etag) for name, file in files.items())])
        commit = hashlib.sha1(f"{self.name} {listing}".encode()).hexdigest()
        self.commits[commit] = files
        self.revisions[revision] = commit
        return commit


class HubServer:
    """Repositories behind an address like huggingface.co's, with a log of requests and faults on demand.

    requests: what arrived, in order (but for huggingface_hub's question which coding agents there are).
    uploads: repository -> the files that clients committed to it, name -> bytes.
    ignore_ranges: answer every request with the whole file, as some proxies do.
    accepted_licences: the gated repositories that the owner of TOKEN may read.
    read_only_token: whether TOKEN may not create or commit.
    hung_up: set once a client ended a connection before it had the whole answer.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.ignore_ranges = False
        self.accepted_licences: set[str] = set()
        self.read_only_token = False
        self.hung_up = threading.Event()
        self._repos: dict[str, _Repo] = {}
        self._stored: dict[str, bytes] = {}  # large files that clients sent, by SHA-256
        self._drops: list[int] = []
        self._drop_always: int | None = None
        self._faults: list[tuple[str, _Fault]] = []
        self._lock = threading.Lock()
        self._hub = _Listener(self, _HubHandler)
        self._storage = _Listener(self, _StorageHandler)
        self.url = self._hub.url
        self.storage_url = self._storage.url

    def __enter__(self) -> HubServer:
        self._hub.start()
        self._storage.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the ports: from now on connections are refused, as without a network."""
        self._hub.stop()
        self._storage.stop()

    def add_repo(
        self,
        name: str,
        files: dict[str, bytes | Path],
        gated: bool = False,
        private: bool = False,
        revision: str = "main",
    ) -> str:
        """Create a repository, or give one that exists a new commit; return the commit."""
        repo = self._repos.setdefault(name, _Repo(name, gated, private))
        return repo.commit({path: _File.of(path, content) for path, content in files.items()}, revision)

    def drop_after(self, count: int | None, times: int | None = 1) -> None:
        """Break the connection after `count` bytes of a file, in the next `times` answers longer than that.

        Calls add up, one after the other. times=None breaks all answers; count=None ends that.
        """
        if times is None or count is None:
            self._drops, self._drop_always = [], count
        else:
            self._drops += [count] * times

    def fail(
        self,
        status: int,
        path: str,
        times: int = 1,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        framing: str = "length",
    ) -> None:
        """Answer the next `times` requests whose path contains `path` with a status, and what else is given.

        framing: "length" announces the body's; "close" ends it by closing the connection; "endless" repeats it until
        the client hangs up.
        """
        self._faults += [(path, _Fault(status, body, headers or {}, framing))] * times

    def sent(self, name: str) -> int:
        """The bytes of one file that left for clients so far."""
        return sum(request.sent for request in self.requests if request.file == name)

    def ranges(self, name: str) -> list[str | None]:
        """The Range headers of the requests that were answered with bytes of one file."""
        return [request.range for request in self.requests if request.file == name and request.sent]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables that make huggingface_hub in another process speak to the stand-in and cache below `home`."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def _take_drop(self, length: int) -> int | None:
        with self._lock:
            if self._drop_always is not None:
                return self._drop_always if length > self._drop_always else None
            return self._drops.pop(0) if self._drops and length > self._drops[0] else None

    def _take_fault(self, path: str) -> _Fault | None:
        with self._lock:
            for index, (part, fault) in enumerate(self._faults):
                if part in path:
                    del self._faults[index]
                    return fault
        return None

    def _stored_file(self, sha256: str) -> _File | None:
        for repo in self._repos.values():
            for files in repo.commits.values():
                for file in files.values():
                    if file.sha256 == sha256:
                        return file
        return _File.of("stored.bin", self._stored[sha256]) if sha256 in self._stored else None


class _Listener:
    """One threaded HTTP server on a free port."""

    def __init__(self, hub: HubServer, handler: type[_Handler]) -> None:
        self._server = _Server(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.hang_up()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def hang_up(self) -> None:
        """End the connections that clients keep open for their next request."""
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @cached_property
    def connections(self) -> WeakSet[socket.socket]:
        return WeakSet()


class _Refusal(Exception):
    """An answer with an error status, and the headers by which clients tell errors apart."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer's body waits 40 ms for its header's receipt
    routes: tuple[tuple[str, str, str], ...] = ()  # methods, pattern of the path, name of the method here

    def _serve(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.file: str | None = None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if fault := self.hub._take_fault(self.path):
                self._send_fault(fault)
                return
            for methods, pattern, method in self.routes:
                match = re.fullmatch(pattern, address.path)
                if match and self.command in methods.split():
                    getattr(self, method)(*map(unquote, match.groups()))
                    return
            raise _Refusal(404, "", f"The stand-in does not know {self.command} {self.path}")
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send_json({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send_file(self, file: _File, headers: dict[str, str]) -> None:
        """A file or the range of it that was asked for; HEAD and GET."""
        start, stop, status = 0, file.size, 200
        wanted = self.headers.get("Range")
        if wanted and not self.hub.ignore_ranges:
            start, stop = _parse_range(wanted, file.size)
            if start >= file.size:
                self._send(416, b"", {"Content-Range": f"bytes */{file.size}"})
                return
            status = 206
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}
        self._send(status, file.read(start, stop), headers | {"Accept-Ranges": "bytes"}, may_break=True)

    def _send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, may_break: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        drop = self.hub._take_drop(len(body)) if may_break else None
        if drop is not None:
            body, self.close_connection = body[:drop], True
        self._log(status, len(body))
        try:
            self.wfile.write(body)
        except OSError:
            self.hub.hung_up.set()
            self.close_connection = True

    def _send_fault(self, fault: _Fault) -> None:
        if fault.framing == "length":
            self._send(fault.status, fault.body, fault.headers)
            return
        self.send_response(fault.status)
        for name, value in {**fault.headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        self._log(fault.status, len(fault.body))
        try:
            self.wfile.write(fault.body)
            while fault.framing == "endless":
                self.wfile.write(fault.body)
        except OSError:
            self.hub.hung_up.set()

    def _log(self, status: int, sent: int) -> None:
        if self.path == "/api/agent-harnesses":
            return  # unknown here, as to a Hub of one's own
        path, wanted, token = self.path, self.headers.get("Range"), self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, status, sent, self.file, wanted, token))

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _StorageHandler(_Handler):
    """Where large files lie: addresses are signed there, and a token that arrives was given away."""

    routes = (("GET HEAD", r"/objects/(\w+)", "_get_object"), ("PUT", r"/objects/(\w+)", "_put_object"))

    def _get_object(self, sha256: str) -> None:
        self._refuse_token()
        self.file = self.query.get("filename", [None])[0]
        file = self.hub._stored_file(sha256)
        if file is None:
            raise _Refusal(404)
        self._send_file(file, {"ETag": f'"{sha256}"'})

    def _put_object(self, sha256: str) -> None:
        self._refuse_token()
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise _Refusal(400, "", "The content is not what its name says")
        self.hub._stored[sha256] = self.body
        self._send(200)

    def _refuse_token(self) -> None:
        if "Authorization" in self.headers:
            raise _Refusal(400, "", "Only one auth mechanism allowed")  # as S3 answers


class _HubHandler(_Handler):
    routes = (
        ("GET", r"/api/models/([^/]+/[^/]+)", "_get_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "_get_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "_get_tree"),
        ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "_resolve"),
        ("POST", r"/api/repos/create", "_create"),
        ("POST", r"/api/validate-yaml", "_validate_card"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "_preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "_batch"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", "_verify"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "_commit"),
    )

    # Reading.

    def _get_info(self, name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        commit, files = self._revision(repo, revision)
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(files.items()):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1] |= {"size": file.size, "blobId": file.sha1}
                if file.is_large:
                    siblings[-1]["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
        gated = "auto" if repo.gated else False
        info = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": repo.private, "gated": gated}
        self._send_json(info | {"tags": [], "siblings": siblings})

    def _get_tree(self, name: str, revision: str) -> None:
        commit, files = self._revision(self._repo(name), revision)
        entries: list[dict[str, Any]] = []
        for path, file in sorted(files.items()):
            entries.append({"type": "file", "path": path, "size": file.size, "oid": file.sha1})
            if file.is_large:
                entries[-1]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        self._send_json(entries, headers={"X-Repo-Commit": commit})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        commit, files = self._revision(repo, revision)
        self._check_licence(repo)
        if path not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        file = files[path]
        headers = {"X-Repo-Commit": commit}
        if not file.is_large:
            self.file = path
            self._send_file(file, headers | {"ETag": f'"{file.sha1}"'})
            return
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
        signed = f"{self.hub.storage_url}/objects/{file.sha256}?filename={path}&Signature=abc"
        self._send(302, b"", headers | {"Location": signed})

    def _repo(self, name: str) -> _Repo:
        known = self._knows_token()
        repo = self.hub._repos.get(name)
        if repo is None or (repo.private and not known):
            # To strangers, the Hub does not say which names are taken.
            raise _Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        return repo

    def _revision(self, repo: _Repo, revision: str) -> tuple[str, dict[str, _File]]:
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def _check_licence(self, repo: _Repo) -> None:
        known = self._knows_token()
        if repo.gated and not (known and repo.name in self.hub.accepted_licences):
            message = f"Access to model {repo.name} is restricted."
            raise _Refusal(403 if known else 401, "GatedRepo", message)

    def _knows_token(self) -> bool:
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        return token is not None

    # Writing.

    def _create(self) -> None:
        self._check_may_write()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub._repos:
            answer = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            self._send_json(answer, 409)
            return
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub._repos[name] = _Repo(name, gated=False, private=private)
        self.hub._repos[name].commit({".gitattributes": _File.of(".gitattributes", b"*.bin lfs\n")}, "main")
        self._send_json({"url": f"{self.hub.url}/{name}", "name": name, "id": "0"})

    def _validate_card(self) -> None:
        card = json.loads(self.body)["content"]
        if card.startswith("---"):
            self._send_json({"errors": [], "warnings": []})
        else:
            self._send_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})

    def _preupload(self, name: str, revision: str) -> None:
        self._check_may_write()
        _, files = self._revision(self._repo(name), revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, size = asked["path"], asked["size"]
            is_large = bool(LARGE_FILE_NAMES.fullmatch(path)) or size > LARGE_FILE_BYTES
            answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": files[path].etag} if path in files else {}))
        self._send_json({"files": answers})

    def _batch(self, name: str) -> None:
        self._check_may_write()
        self._repo(name)
        objects: list[dict[str, Any]] = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if self.hub._stored_file(asked["oid"]) is None:
                place = f"{self.hub.storage_url}/objects/{asked['oid']}?Signature=abc"
                verify = f"{self.hub.url}/{name}.git/info/lfs/verify"
                answer["actions"] = {"upload": {"href": place, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def _verify(self, name: str) -> None:
        self._check_may_write()
        asked = json.loads(self.body)
        file = self.hub._stored_file(asked["oid"])
        if file is None or file.size != asked["size"]:
            raise _Refusal(404, "", "Object not found")
        self._send_json({})

    def _commit(self, name: str, revision: str) -> None:
        self._check_may_write()
        repo = self._repo(name)
        _, files = self._revision(repo, revision)
        header, *operations = map(json.loads, self.body.splitlines())
        if header["key"] != "header" or not header["value"]["summary"]:
            raise _Refusal(400, "", "A commit needs a message")
        added = {operation["value"]["path"]: self._committed(operation) for operation in operations}
        commit = repo.commit(files | {path: _File.of(path, content) for path, content in added.items()}, revision)
        self.hub.uploads.setdefault(name, {}).update(added)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _committed(self, operation: dict[str, Any]) -> bytes:
        value = operation["value"]
        if operation["key"] == "file":
            return base64.b64decode(value["content"])
        if operation["key"] != "lfsFile":
            raise _Refusal(400, "", f"The stand-in does not know the operation {operation['key']}")
        file = self.hub._stored_file(value["oid"])
        if file is None:
            raise _Refusal(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
        return file.read(0, file.size)

    def _check_may_write(self) -> None:
        if not self._knows_token():
            raise _Refusal(401, "", "Invalid username or password.")
        if self.hub.read_only_token:
            raise _Refusal(403, "", "You don't have the rights to do this")


def _parse_range(text: str, size: int) -> tuple[int, int]:
    """First and end byte of a Range header: bytes=5-9, bytes=5-, bytes=-5."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", text)
    assert match, text
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def point_at(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub speak to the stand-in, here and in processes started from here.

    It reads its environment once, when it is imported, and some test may have imported it before: both are set.
    """
    from huggingface_hub import close_session, constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in hub.environment(home).items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agents.json"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if getproxies():
        close_session()  # a client made before would keep them; a new one costs 50 ms


def log_in(monkeypatch: pytest.MonkeyPatch, token: str = TOKEN) -> None:
    """Give huggingface_hub a token, here and in processes started from here."""
    monkeypatch.setenv("HF_TOKEN", token)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set HF_HUB_OFFLINE, here and in processes started from here."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty stand-in that huggingface_hub speaks to, with an empty cache below tmp_path / "hf_home"."""
    with HubServer() as server:
        point_at(server, tmp_path / "hf_home", monkeypatch)
        yield server
