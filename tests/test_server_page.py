"""The page's files as a server sends them: their types, their policy, their caching, and that they are what `web/` makes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from openelm_mlx.server.page import POLICY, page_files, page_routes

PACKAGE = Path(__file__).parent.parent / "openelm_mlx" / "server" / "page"
WEB = Path(__file__).parent.parent / "web"
needs_sources = pytest.mark.skipif(not WEB.is_dir(), reason="the page's sources are not a part of an installation")


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=page_routes()))


def test_the_page_is_at_the_root_with_a_strict_policy(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["script-src"] == policy["style-src"] == policy["img-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["object-src"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in POLICY
    assert "*" not in POLICY
    assert "http" not in POLICY
    assert "data:" not in POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_markup_has_no_script_and_no_style_of_its_own():
    html = page_files()["index.html"].body.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert re.findall(r"<script[^>]*>(.*?)</script>", html) == ["", ""]


def test_everything_that_is_named_is_there_and_nothing_is_elsewhere(client):
    html = page_files()["index.html"].body.decode()
    css = page_files()["app.css"].body.decode()
    fonts = [each.strip('"') for each in re.findall(r"url\(([^)]+)\)", css)]
    named = re.findall(r'(?:src|href)="([^"#]+)"', html) + [f"page/{each.removeprefix('./')}" for each in fonts]
    assert len(named) > 20
    for each in named:
        assert client.get(f"/{each}").status_code == 200, each
    assert set(fonts) == {f"./{name}" for name in page_files() if name.startswith("fonts/")}
    assert "@import" not in css
    assert "//" not in html.replace("<!doctype html>", "")


@pytest.mark.parametrize(
    ("name", "type"),
    [
        ("app.js", "text/javascript; charset=utf-8"),
        ("app.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
        ("LICENSES.txt", "text/plain; charset=utf-8"),
    ],
)
def test_a_file_is_sent_once_and_then_only_asked_for(client, name, type):
    first = client.get(f"/page/{name}")
    assert first.headers["content-type"] == type
    assert first.headers["cache-control"] == "no-cache"
    assert first.content == (PACKAGE / name).read_bytes()
    again = client.get(f"/page/{name}", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert again.status_code == 304
    assert again.content == b""
    assert again.headers["etag"] == first.headers["etag"]
    assert client.get(f"/page/{name}", headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head(f"/page/{name}")
    assert head.status_code == 200
    assert head.content == b""


def test_fonts_are_kept_for_good_since_their_names_have_their_hash(client):
    fonts = [name for name in page_files() if name.startswith("fonts/")]
    assert len(fonts) == 20
    assert all(re.search(r"-[A-Z0-9]{8}\.woff2$", name) for name in fonts)
    answer = client.get(f"/page/{fonts[0]}")
    assert answer.headers["content-type"] == "font/woff2"
    assert "immutable" in answer.headers["cache-control"]


@pytest.mark.parametrize(
    "path",
    ["../page.py", "..%2fpage.py", "%2e%2e/page.py", "sources.sha256", "fonts", "fonts/", "", "app.js/", "/etc/passwd"],
)
def test_nothing_but_the_page_is_sent(client, path):
    assert client.get(f"/page/{path}").status_code == 404


def test_the_page_can_only_be_read(client):
    assert client.post("/").status_code == 405
    assert client.delete("/page/app.js").status_code == 405


def test_the_bundle_is_small_enough_to_be_carried():
    assert sum(len(each.body) for each in page_files().values()) < 1_200_000


@needs_sources
def test_the_bundle_was_made_of_these_sources():
    """Whoever changes a source builds the page: `cd web && npm ci && npm run build`."""
    own = [WEB / "build.mjs", WEB / "package-lock.json", WEB / "licences" / "katex-fonts.txt"]
    files = own + [each for each in (WEB / "src").rglob("*") if each.is_file()]
    hashed = hashlib.sha256()
    for name in sorted(each.relative_to(WEB).as_posix() for each in files):
        hashed.update(f"{name}\n".encode())
        hashed.update((WEB / name).read_bytes())
    assert (PACKAGE / "sources.sha256").read_text().strip() == hashed.hexdigest()


@needs_sources
def test_licences_name_each_library_in_its_locked_version():
    locked = json.loads((WEB / "package-lock.json").read_text())["packages"]
    text = (PACKAGE / "LICENSES.txt").read_text()
    named = re.findall(r"^  (\S+) (\d\S+) \((.+)\)$", text, re.MULTILINE)
    assert {"markdown-it", "dompurify", "highlight.js", "katex"} <= {name for name, _, _ in named}
    for name, version, licence in named:
        assert locked[f"node_modules/{name}"]["version"] == version
        assert locked[f"node_modules/{name}"]["license"] in licence
        assert text.count(f"\n{name} {version} ({licence})\n") == 1, "its licence stands below"
    assert "SIL OPEN FONT LICENSE" in text


@needs_sources
def test_the_same_sources_give_the_same_bytes(tmp_path):
    if shutil.which("node") is None or not (WEB / "node_modules" / "esbuild").is_dir():
        pytest.skip("npm ci was not run in web/")
    subprocess.run(["node", "build.mjs", str(tmp_path / "page")], cwd=WEB, check=True, capture_output=True)

    def tree(folder: Path) -> dict[str, bytes]:
        return {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}

    assert tree(tmp_path / "page") == tree(PACKAGE)
