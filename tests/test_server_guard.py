"""The guard: hosts, origins, keys, sizes, depth and patience, asked with bytes that no library would send."""

import asyncio
import contextlib
import json
import logging
import socket
import time

import pytest
from server_raw import connect, raw, read_answer, request, serving
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from openelm_mlx.errors import SettingError
from openelm_mlx.server.guard import MAX_DEPTH, Depth, Guard
from openelm_mlx.server.hosts import Hosts, checked_hosts, checked_origins, host_name, is_own
from openelm_mlx.server.settings import ServerSettings

MAX_BODY = 100_000
SHORT = {"header_timeout": 0.4, "body_timeout": 0.4, "write_timeout": 0.4}
# Never reached in a test that ends well, however busy the machine is.
LONG = {"header_timeout": 120.0, "body_timeout": 120.0, "write_timeout": 120.0}
ended: list[str] = []


async def echo(request):
    return PlainTextResponse(str(len(await request.body())))


async def endless(request):
    """A stream larger than any buffer, which notes that it was ended."""

    async def pieces():
        try:
            while True:
                await asyncio.sleep(0)
                yield b"x" * 65536
        finally:
            ended.append("stream")

    return StreamingResponse(pieces())


async def broken(request):
    raise RuntimeError("the secret is 1234")


def app():
    return Starlette(
        routes=[
            Route("/", lambda request: HTMLResponse("<p>page</p>")),
            Route("/echo", echo, methods=["GET", "POST"]),
            Route("/v1/messages", echo, methods=["POST"]),
            Route("/health", lambda request: PlainTextResponse("ok")),
            Route("/endless", endless),
            Route("/broken", broken),
        ]
    )


@contextlib.contextmanager
def guarded(**changes):
    settings = ServerSettings(**{"max_body": MAX_BODY, **LONG, **changes})
    with serving(Guard(app(), settings), settings) as port:
        yield port


@pytest.fixture(scope="module")
def port():
    with guarded() as port:
        yield port


def error_of(answer):
    return json.loads(answer.body)["error"]


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9", "127.0.0.1:8080", "[::1]:8080", "localhost.", "127.0.0.2"]
)
def test_this_machine_s_own_names_are_answered_to(port, host):
    assert raw(port, request(host=host)).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "192.168.1.5", "localhost@evil.example", "",
     "localhost:80:80", "[::1", "::1", "localhost/", "a b", "loc\u0430lhost".encode().decode("latin-1")],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/echo", "/", "/health", "/nothing/here"])
def test_other_names_are_refused_on_every_path(port, host, path):
    answer = raw(port, request(path, host=host))
    assert answer.status in (400, 403), answer
    assert error_of(answer)["code"] in ("host_not_allowed", "invalid_http")


def test_a_refused_host_is_told_how_to_be_allowed(port):
    answer = raw(port, request(host="host.docker.internal:8080"))
    assert answer.status == 403
    assert "--allow-host host.docker.internal" in error_of(answer)["message"]
    with guarded(allow_hosts=checked_hosts(["host.docker.internal"])) as other:
        assert raw(other, request(host="host.docker.internal:8080")).status == 200


def test_no_host_and_two_hosts_are_refused(port):
    assert raw(port, b"GET /echo HTTP/1.1\r\n\r\n").status == 400
    assert raw(port, b"GET /echo HTTP/1.0\r\n\r\n").status == 403
    assert raw(port, b"GET /echo HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n").status in (400, 403)


def test_where_others_may_come_an_address_is_a_name_of_the_server():
    hosts = Hosts(ServerSettings(host="0.0.0.0", allow_hosts=("mac.example",)), own_name="Banjo.lan")
    for allowed in ("192.168.1.5:8080", "[fe80::1]", "banjo.lan", "BANJO.local:80", "mac.example", "localhost"):
        assert hosts.allows(allowed), allowed
    for refused in ("evil.example", "banjo", "x.banjo.lan", "1.2.3.4.evil.example"):
        assert not hosts.allows(refused), refused
    assert not Hosts(ServerSettings()).allows("192.168.1.5")


def test_names_of_hosts():
    assert host_name("LocalHost:80") == "localhost"
    assert host_name("[::1]:80") == "::1"
    assert [host_name(each) for each in ("a:b", "http://a", "", "a:", "a:999999")] == [None] * 5


# --- origins ----------------------------------------------------------------------------------------------------------


def test_the_server_s_own_page_may_ask(port):
    for origin in ("http://localhost:1", "https://localhost:1"):
        answer = raw(port, request(body=b"{}", Origin=origin))
        assert answer.status == 200
        assert "access-control-allow-origin" not in answer.headers
    assert is_own("http://localhost", "localhost:80")
    assert is_own("http://localhost", "localhost")


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://localhost:2", "http://localhost", "file://", "http://localhost:1.evil.example",
     "http://localhost:1@evil.example", "chrome-extension://abc", "", "http://[", "http://localhost:1/"],
)  # fmt: skip
def test_foreign_origins_are_refused_although_no_preflight_was_needed(port, origin):
    answer = raw(port, request(body=b"{}", Origin=origin, Content_Type="text/plain"))
    assert answer.status == 403
    assert error_of(answer)["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in answer.headers


def test_another_site_s_image_is_refused_and_its_link_is_followed(port):
    assert raw(port, request("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")).status == 403
    assert raw(port, request("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")).status == 200


def test_an_origin_can_be_allowed():
    preflight = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization, content-type",
    }
    with guarded(allow_origins=("http://localhost:3000",), api_keys=("k" * 20,)) as port:
        answer = raw(port, request(method="OPTIONS", Origin="http://localhost:3000", **preflight))
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
        assert answer.headers["vary"] == "Origin"
        allowed = raw(port, request(body=b"{}", Origin="http://localhost:3000", Authorization=f"Bearer {'k' * 20}"))
        assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, "http://localhost:3000")
        assert raw(port, request(method="OPTIONS", Origin="http://evil.example", **preflight)).status == 403
        # An error can be read by a page that may ask.
        refused = raw(port, request(body=b"{}", Origin="http://localhost:3000"))
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "http://localhost:3000")


def test_origins_and_hosts_of_the_command_line():
    assert checked_origins(["http://Localhost:3000/"], False) == ("http://localhost:3000",)
    assert checked_origins(["*"], True) == ("*",)
    for wrong in (["*"], ["localhost:3000"], ["http://a/b"], ["null"]):
        with pytest.raises(SettingError, match="--allow-origin"):
            checked_origins(wrong, False)
    with pytest.raises(SettingError, match="--allow-host http://a is not a name"):
        checked_hosts(["http://a"])


# --- keys -------------------------------------------------------------------------------------------------------------

KEYS = ("first-key-0123456789", "second-key-0123456789")


@pytest.fixture(scope="module")
def locked():
    with guarded(api_keys=KEYS) as port:
        yield port


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEYS[0]}"}, {"Authorization": f"bearer  {KEYS[1]}"}, {"x-api-key": KEYS[1]},
     {"Authorization": "Bearer wrong", "x-api-key": KEYS[0]}],
)  # fmt: skip
def test_a_right_key_is_taken_in_both_headers(locked, headers):
    assert raw(locked, request(body=b"{}", **headers)).status == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEYS[0]}, {"Authorization": f"Basic {KEYS[0]}"},
     {"x-api-key": ""}, {"x-api-key": KEYS[0] + "x"}, {"x-api-key": KEYS[0][:-1]}, {"Authorization": "Bearer "},
     {"Cookie": f"key={KEYS[0]}"}, {"x-api-key": "\xff\xfe"}],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/echo", "/nothing", "/page/../echo", "/v1/messages"])
def test_without_a_right_key_nothing_is_done_on_any_path(locked, headers, path):
    answer = raw(locked, request(path, body=b"{}", **headers))
    assert answer.status in (400, 401)
    if answer.status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEYS[0].encode() not in answer.body


def test_the_page_and_health_can_be_read_without_a_key(locked):
    assert [raw(locked, request(path)).status for path in ("/", "/health", "/page/app.js", "/echo")] == [
        200,
        200,
        404,
        401,
    ]
    assert raw(locked, request("/", body=b"{}", method="POST")).status == 401


def test_an_error_on_anthropic_s_path_has_anthropic_s_body(locked):
    answer = raw(locked, request("/v1/messages", body=b"{}"))
    body = json.loads(answer.body)
    assert body["type"] == "error"
    assert body["error"]["type"] == "authentication_error"
    assert body["request_id"] == answer.headers["x-request-id"] == answer.headers["request-id"]


# --- bodies -----------------------------------------------------------------------------------------------------------


def chunked(*pieces):
    return b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in pieces)


CHUNKED = request(method="POST", Transfer_Encoding="chunked")


def test_a_body_is_whole_when_the_application_sees_it(port):
    assert raw(port, request(body=b"x" * 70_000)).body == b"70000"
    assert raw(port, CHUNKED, chunked(b"a" * 30_000, b"b" * 30_000, b""), pause=0.01).body == b"60000"
    assert raw(port, request(body=b"x" * MAX_BODY)).status == 200


def test_a_body_past_the_limit_is_refused_by_its_length_and_by_its_bytes(port):
    by_length = raw(port, request(method="POST", Content_Length=MAX_BODY + 1))
    assert (by_length.status, error_of(by_length)["code"]) == (413, "request_too_large")
    assert raw(port, request(method="POST", Content_Length=10**18)).status == 413
    # Chunks say nothing beforehand, and go on without end.
    by_bytes = raw(port, CHUNKED, *[chunked(b"x" * 20_000)] * 6)
    assert by_bytes.status == 413
    # Whoever sends all of it before reading sees the answer, and may go on with the same connection.
    with connect(port) as connection:
        connection.sendall(request(body=b"x" * 4 * MAX_BODY))
        assert read_answer(connection).status == 413
        connection.sendall(request())
        assert read_answer(connection).status == 200


def test_many_large_bodies_at_once_do_not_add_up(monkeypatch):
    monkeypatch.setattr("openelm_mlx.server.guard.BODIES_AT_ONCE", 1)
    with guarded() as port, connect(port) as held:
        held.sendall(request(method="POST", Content_Length=MAX_BODY))
        held.sendall(b"x" * (MAX_BODY - 100))
        while (answer := raw(port, request(body=b"x" * 1000))).status == 200:
            time.sleep(0.01)  # the first has not been read yet
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        held.sendall(b"x" * 100)
        assert read_answer(held).status == 200
        assert raw(port, request(body=b"x" * 1000)).status == 200  # what was counted is given back


def nested(depth):
    return b'{"a":' * depth + b"1" + b"}" * depth


def test_json_that_is_nested_too_deeply_is_refused(port):
    assert raw(port, request(body=nested(MAX_DEPTH))).status == 200
    answer = raw(port, request(body=nested(MAX_DEPTH + 1)))
    assert (answer.status, error_of(answer)["code"]) == (400, "invalid_json")
    assert raw(port, request(body=b"[" * 90_000)).status == 400
    # Brackets in strings are text.
    text = json.dumps({"content": "[{" * 1000 + '"\\"[' * 1000}).encode()
    assert raw(port, request(body=text)).status == 200


def depth_of(data, size):
    depth = Depth()
    for at in range(0, len(data), size):
        depth.after(data[at : at + size])
    return depth.deepest


@pytest.mark.parametrize(
    "text", ['{"a": "\\\\", "b": [1, ["\\"[["]]}', '["\\\\\\"[", {}]', '"[[[', "[]{}[[]]", '{"\\u005b": []}', ""]
)
def test_depth_does_not_depend_on_how_a_body_arrives(text):
    data = text.encode()
    wanted = depth_of(data, 10**6)
    assert [depth_of(data, size) for size in (1, 2, 3, 5)] == [wanted] * 4


def test_depth_agrees_with_the_parser():
    def depth(value):
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if children is None else 1 + max(map(depth, children), default=0)

    for value in ({"a": ["x\\", {"b": '"]'}]}, [[], {}, [[]]], 'a\\"[', {"[": {"{": "\\"}}):
        assert depth_of(json.dumps(value).encode(), 4) == depth(value)


def test_packed_bodies_are_refused(port):
    answer = raw(port, request(body=b"{}", Content_Encoding="gzip"))
    assert (answer.status, error_of(answer)["code"]) == (415, "unsupported_encoding")


# --- what is no HTTP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n\r\n\r\nhello\r\n\r\n",
     b"GET /echo HTTP/9.9\r\nHost: localhost\r\n\r\n", b"GET  HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"GET /echo HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
     b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
     b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
     CHUNKED + b"zz\r\n", CHUNKED + b"-5\r\nhello\r\n", b"GET /echo HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000],
)  # fmt: skip
def test_what_is_no_http_gets_a_400_with_a_body(port, sent):
    answer = raw(port, sent)
    assert answer.status == 400, answer
    assert error_of(answer)["code"] == "invalid_http"


def test_garbage_after_an_answer_has_begun_ends_the_connection_and_nothing_else(port):
    ended.clear()
    with connect(port) as connection:
        connection.sendall(request("/endless", method="GET", Transfer_Encoding="chunked"))
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\x00\x01\x02\r\n\r\n")
    assert raw(port, request()).status == 200


def test_requests_in_one_packet_are_answered_in_their_order(port):
    with connect(port) as connection:
        connection.sendall(request(body=b"abc") + request("/health") + request(body=b"abcde"))
        data = b""
        while data.count(b"HTTP/1.1") < 3 or not data.endswith(b"5"):
            data += connection.recv(65536)
        assert [data.index(b"\r\n\r\n3"), data.index(b"ok"), data.index(b"\r\n\r\n5")] == sorted(
            [data.index(b"\r\n\r\n3"), data.index(b"ok"), data.index(b"\r\n\r\n5")]
        )


# --- patience ---------------------------------------------------------------------------------------------------------


def test_whoever_sends_nothing_or_half_a_request_is_told_and_left():
    with guarded(**SHORT) as port:
        for pieces in ((), (b"GET /echo HTTP/1.1\r\n",), (request()[:-2],)):
            answer = raw(port, *pieces)
            assert (answer.status, error_of(answer)["code"]) == (408, "request_timeout")


def test_whoever_sends_a_header_byte_by_byte_has_one_time_for_all_of_it():
    with guarded(**SHORT) as port, connect(port) as connection:
        with contextlib.suppress(ConnectionError):
            for byte in request()[:-1] * 20:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        assert read_answer(connection).status in (408, None)


def test_half_a_body_is_answered_in_time_and_the_rest_of_the_server_goes_on():
    with guarded(**{**LONG, "body_timeout": 0.4}) as port:
        slow = [connect(port) for _ in range(20)]
        for connection in slow:
            connection.sendall(request(method="POST", Content_Length=1000) + b"x")
        assert raw(port, request(body=b"abc")).body == b"3"
        for connection in slow:
            answer = read_answer(connection)
            assert (answer.status, error_of(answer)["code"]) == (408, "request_timeout")
            connection.close()


def test_a_connection_that_is_kept_open_has_time_for_its_next_request_s_headers_too():
    with guarded(**{**LONG, "header_timeout": 0.4}) as port, connect(port) as connection:
        connection.sendall(request())
        assert read_answer(connection).status == 200
        connection.sendall(request()[:-2])
        assert read_answer(connection).status == 408


def test_an_idle_connection_is_closed_after_a_while():
    with guarded(keep_alive_timeout=1) as port, connect(port) as connection:
        connection.sendall(request())
        assert read_answer(connection).status == 200
        assert connection.recv(1) == b""


def test_an_answer_that_nobody_reads_is_given_up():
    ended.clear()
    with guarded(**{**LONG, "write_timeout": 0.4}) as port, connect(port) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request("/endless"))
        until = time.monotonic() + 60
        while not ended and time.monotonic() < until:
            time.sleep(0.02)
        assert ended == ["stream"]


def test_connections_beyond_the_limit_are_told_to_come_back():
    with guarded(max_connections=2) as port:
        held = [connect(port) for _ in range(2)]
        for connection in held:
            connection.sendall(request())
            assert read_answer(connection).status == 200
        answer = raw(port, request())
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert error_of(answer)["code"] == "overloaded"
        for connection in held:
            connection.close()
        while raw(port, request()).status != 200:
            time.sleep(0.01)


# --- answers and the log ----------------------------------------------------------------------------------------------


def test_every_answer_has_an_id_and_headers_that_browsers_obey(port):
    answers = [raw(port, each) for each in (request(), request("/"), request("/nothing"), request(host="evil.example"))]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len({*ids}) == 4
    assert all(each.startswith("req_") for each in ids)
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in answer.headers
    assert "default-src 'self'" in answers[1].headers["content-security-policy"]
    assert answers[0].headers["cache-control"] == "no-store"


def test_a_failure_of_ours_is_a_500_that_says_nothing(port):
    answer = raw(port, request("/broken"))
    assert answer.status == 500
    assert b"1234" not in answer.body


def test_the_log_has_ids_and_no_text(caplog):
    with caplog.at_level(logging.INFO, "openelm_mlx.server"), guarded() as port:
        answer = raw(port, request("/echo?secret=1", body=b'{"prompt": "my diary"}', Authorization="Bearer sk-123"))
        assert answer.status == 200
        while "/echo" not in caplog.text:
            time.sleep(0.01)
    assert "POST /echo 200" in caplog.text
    for secret in ("diary", "sk-123", "secret"):
        assert secret not in caplog.text


def test_a_path_is_one_short_line_of_the_log(caplog):
    with caplog.at_level(logging.INFO, "openelm_mlx.server"), guarded() as port:
        for path in ("/%0a12:00:00%20GET%20/forged%20200", "/%1b[2J", "/" + "a" * 30_000):
            assert raw(port, request(path)).status == 404
        while len(caplog.records) < 3:
            time.sleep(0.01)
    for record in caplog.records:
        line = record.getMessage()
        assert line.isprintable()
        assert len(line) < 300


def test_an_empty_host_is_called_empty(port):
    answer = raw(port, request(host=""))
    assert answer.status == 403
    assert b"header is empty, which" in answer.body


def test_every_line_of_the_log_can_have_its_request_s_id():
    from openelm_mlx.server.log import request_id

    found = {}

    async def named(scope, receive, send):
        found[scope["request_id"]] = request_id.get()
        await PlainTextResponse("ok")(scope, receive, send)

    with serving(_with_lifespan(Guard(named, ServerSettings())), ServerSettings()) as port:
        answer = raw(port, request())
    assert found == {answer.headers["x-request-id"]: answer.headers["x-request-id"]}
    assert request_id.get() is None


def _with_lifespan(guard):
    async def both(scope, receive, send):
        if scope["type"] != "lifespan":
            await guard(scope, receive, send)
            return
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    return both


def test_a_web_socket_is_refused():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app(), ServerSettings())({"type": "websocket"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1002}]
