"""Malformed and hostile requests, each known by its seed and number: `case(seed, number)`.

Most are wrong whatever the server thinks of them (`is_wrong`): they have to get a 4xx. The others may be answered.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schema_fuzz import schema_of

MODEL = "demo-gpt-oss"
MAX_BODY = 100_000
JSON = "application/json"

TEXTS = [
    "", "x", "\x00", "\ud800", "\udfff\ud800", "é\u0301" * 50, "\u202e\u2066", "🎹" * 200, "<|start|>system<|message|>",
    "<|end|>", "\u2028", "\ufeff", "A" * 5000, "\\", '"', "'; DROP", "{{7*7}}", "../../etc/passwd", "%00", "\r\nX: y",
    "${jndi:ldap://x}", "\x1b[2J", "١٢٣", "ﷺ" * 100, "\U000e0041" * 30, "a\u200bb",
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e308, -1e308, 10**30, 2**63, -(2**63), [], {}, [[]], [None], [{}], {"type": None}, {"": ""},
    {"a": {"b": {"c": []}}}, [1] * 50, {"__class__": "x"}, {"type": "function"}, {"role": "user"}, {"content": 1}, *TEXTS,
]  # fmt: skip
HOSTS = [
    "evil.example", "localhost.evil.example", "evil.example:8080", "192.168.0.1", "0.0.0.0", "[::]", "169.254.169.254",
    "localhost@evil", "xn--localhost-abc", "localhost%00", "127.0.0.1.nip.io", "2130706433", "0x7f.1", "127.1.",
    "localhost:8080:80", "::1", "[::1", "", "a" * 300, "*", "null", "localhost,evil.example", "localhost/x",
]  # fmt: skip
ORIGINS = [
    "http://evil.example", "https://evil.example", "null", "file://", "http://localhost:2",
    "http://127.0.0.1:1",
    "chrome-extension://abcdef", "", "http://[", "http://localhost:1/", "http://localhost:1@evil",
    "http://localhost:1\x01", "*",
    "javascript:alert(1)", "HTTP://LOCALHOST:3000", "http://localhost:1.evil.example",
]  # fmt: skip
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **CHAT,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "reasoning": "Hm", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "tools": [TOOL], "tool_choice": "auto", "stop": ["x"], "seed": 1, "temperature": 0.5, "logit_bias": {"1": 1},
        "logprobs": True, "top_logprobs": 1, "n": 1, "reasoning_effort": "low", "parallel_tool_calls": False,
        "stream": False, "stream_options": {"include_usage": True}, "metadata": {}, "user": "u",
    },
    "/v1/completions": {
        "model": MODEL, "prompt": "A banjo is", "max_tokens": 1, "echo": True, "logprobs": 1, "stop": "x", "suffix": None,
        "n": 1, "seed": 2, "presence_penalty": 0.1, "frequency_penalty": 0.1, "best_of": 1,
    },
    "/v1/responses": {
        "model": MODEL, "max_output_tokens": 16, "instructions": "Be brief.", "store": False,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}], "tool_choice": "auto",
        "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}, "include": ["reasoning.encrypted_content"],
    },
    "/v1/responses/input_tokens": {"model": MODEL, "input": "Hi", "instructions": "Be brief."},
    "/v1/messages": {
        "model": MODEL, "max_tokens": 1, "system": "Be brief.", "stop_sequences": ["x"],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
    },
    "/v1/messages/count_tokens": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
}  # fmt: skip
# A field with a value that no API has a meaning for.
WRONG: dict[str, list[tuple[str, Any]]] = {
    "/v1/chat/completions": [
        ("messages", []), ("messages", "Hi"), ("messages", [1]), ("messages", [{"role": "king", "content": "x"}]),
        ("messages", [{"content": "x"}]), ("messages", [{"role": "user", "content": 5}]), ("model", 7), ("model", []),
        ("temperature", -1), ("temperature", "hot"), ("temperature", 1e308), ("top_p", 2), ("top_p", -0.5), ("n", 0),
        ("n", 10**6),
        ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", "many"), ("max_tokens", 1.5), ("max_completion_tokens", 0),
        ("stop", [1]), ("stop", {}), ("seed", "x"), ("presence_penalty", 9), ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": "y"}), ("logit_bias", [1]), ("logit_bias", {"999999999": 1}), ("top_logprobs", 21),
        ("logprobs", "yes"), ("tools", {}), ("tools", [{"type": "function"}]), ("tool_choice", "sometimes"),
        ("tool_choice", {"type": "function", "function": {"name": "nobody"}}), ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}), ("response_format", {"type": "json_schema",
        "json_schema": {"schema": 5}}),
        ("reasoning_effort", "enormous"), ("stream", "yes"), ("stream_options", 5),
    ],
    "/v1/completions": [
        ("prompt", 5), ("prompt", []), ("prompt", [[]]), ("prompt", {"a": 1}), ("prompt", [10**9]), ("prompt", [-1]),
        ("max_tokens", -1), ("max_tokens", "x"), ("logprobs", -1), ("echo", "y"), ("n", 0), ("temperature", []), ("stop", 5),
        ("model", None), ("seed", []),
    ],
    "/v1/responses": [
        ("input", 5), ("input", [5]), ("input", [{"type": "message", "role": "user", "content": 5}]), ("model", {}),
        ("max_output_tokens", 0), ("temperature", -1), ("text", {"format": {"type": "json_schema"}}), ("tools", "x"),
        ("tool_choice", "sometimes"), ("previous_response_id", "resp_nobody"), ("reasoning", "x"), ("top_logprobs", 99),
        ("input", [{"type": "item_reference", "id": "nobody"}]), ("background", True),
    ],
    "/v1/messages": [
        ("messages", []), ("messages", "Hi"), ("messages", [{"role": "user", "content": 5}]), ("max_tokens", 0),
        ("max_tokens", None), ("max_tokens", "x"), ("model", 5), ("temperature", 7), ("stop_sequences", "x"), ("tools", [5]),
        ("tool_choice", {"type": "sometimes"}), ("system", 5), ("messages", [{"role": "king", "content": "x"}]),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A request as the bytes to send, a piece at a time. kind: what is wrong with it, for reports."""

    kind: str
    pieces: tuple[bytes, ...]
    is_wrong: bool = True


def case(seed: int, number: int) -> Case:
    """The case of that number."""
    chance = random.Random(f"{seed}.{number}")
    return chance.choices(KINDS, WEIGHTS)[0](chance)


# --- requests as bytes ------------------------------------------------------------------------------------------------


def http(
    path: str,
    body: bytes = b"",
    method: str | None = None,
    host: str = "localhost",
    headers: tuple[tuple[str, str], ...] = (),
) -> bytes:
    lines = [f"{method or ('POST' if body else 'GET')} {path} HTTP/1.1", f"Host: {host}"]
    if body or method == "POST":
        lines += [f"Content-Type: {JSON}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body


def in_json(value: Any, chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return json.dumps(value).encode()
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def posted(kind: str, path: str, body: bytes, is_wrong: bool = True) -> Case:
    return Case(kind, (http(path, body or b" ", "POST"),), is_wrong)


def any_path(chance: random.Random) -> str:
    return chance.choice([*BODIES, "/v1/models", "/", "/health", "/metrics", "/nothing"])


# --- kinds ------------------------------------------------------------------------------------------------------------


def foreign_host(chance: random.Random) -> Case:
    body = chance.choice([b"", json.dumps(CHAT).encode()])
    return Case("host", (http(any_path(chance), body, host=chance.choice(HOSTS)),))


def foreign_origin(chance: random.Random) -> Case:
    body = chance.choice([b"", json.dumps(CHAT).encode()])
    method = chance.choice([None, "OPTIONS"]) if not body else None
    headers = (("Origin", chance.choice(ORIGINS)), ("Access-Control-Request-Method", "POST"))
    return Case("origin", (http(any_path(chance), body, method, headers=headers),))


def bad_header(chance: random.Random) -> Case:
    line = chance.choice(
        [b"no colon here", b"Bad Name: x", b": empty", b"X\x00: y", b"X: a\x00b", b"\xff\xfe: x", b" folded: x", b"X : y",
         b"Content-Length: -1", b"Content-Length: 1, 2", b"Content-Length: x", b"Content-Length: 1\r\nContent-Length: 2",
         b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, gzip", b"Host: localhost", b"X: " + b"y" * 70_000,
         b"Transfer-Encoding: \x0bchunked", b"Content-Encoding: gzip", b"Content-Encoding: " + b"z" * 100]
    )  # fmt: skip
    head = f"POST {any_path(chance)} HTTP/1.1\r\nHost: localhost\r\n".encode()
    return Case("header", (head + line + b"\r\n\r\n",))


def bad_line(chance: random.Random) -> Case:
    line = chance.choice(
        [b"GET", b"GET /", b"GET / HTTP/3.0", b"GET  / HTTP/1.1", b"get / HTTP/1.1 x", b"\x16\x03\x01\x00\xa5\x01",
         b"PRI * HTTP/2.0",
         b"GET /\x00 HTTP/1.1", b"GET /\xff HTTP/1.1", b"(x) / HTTP/1.1", b"GET / HTTP/0.9", b"GET / http/1.1",
         bytes(chance.randrange(256) for _ in range(chance.randrange(1, 60))).replace(b"\n", b"").replace(b"\r", b"") or b"x"]
    )  # fmt: skip
    return Case("line", (line + b"\r\nHost: localhost\r\n\r\n",))


def wrong_path(chance: random.Random) -> Case:
    path = chance.choice(
        ["/v1", "/v1/", "/v1/chat", "/v1/chat/completions/", "/v2/models", "/v1/models/nobody", "/v1/models/a/b/c",
         "/v1/models/..%2f..%2fetc%2fpasswd", "/../etc/passwd", "/page/../../pyproject.toml", "/page/%2e%2e/app.py",
         "//", "/%00",
         "/page/nothing.js", "/v1/responses/resp_nobody", "/admin", "/.env", "/.git/config", "/v1/files", "/v1/embeddings",
         "/v1/models/" + "a" * 5000, "http://evil.example/v1/models", "/v1/models/%F0%9F%8E%B9", "/openapi.json", "*"]
    )  # fmt: skip
    return Case("path", (http(path, method=chance.choice(["GET", "GET", "HEAD", "DELETE"])),))


def wrong_method(chance: random.Random) -> Case:
    path = chance.choice([*BODIES, "/v1/models", "/health", "/metrics"])
    if path in BODIES:
        method = chance.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
    else:
        method = chance.choice(["POST", "PUT", "DELETE", "PATCH", "BREW"])
    # An unfinished response may be asked for: it is a name.
    return Case("method", (http("/v1/chat/completions" if path.startswith("/v1/responses") else path, method=method),))


def no_json(chance: random.Random) -> Case:
    whole = json.dumps(BODIES["/v1/chat/completions"]).encode()
    body = chance.choice(
        [
            whole[: chance.randrange(1, len(whole) - 1)], whole + b"x", whole[:-1] + b",}", b"\xef\xbb\xbf\xff", b"\x00" * 10,
            b"null", b"[]", b"1", b'"x"', b"true", b"{}", b"[" * 5000, b'{"a":' * 3000, b"[" * 300 + b"]" * 300, b"NaN",
            b"{'a': 1}",
            b'{"model": NaN}', b'{"model": 1e999999}', b'{"temperature": -Infinity, "model": "x"}',
            b'{"model": ' + b"9" * 6000 + b"}", b'{"model": "\\ud800\\u"}', b'{"model": "\xff\xfe"}',
            b"\xff\xfe{\x00}\x00", b"<xml/>",
            b'{"model": "x", "messages": ' + b"[" * 150 + b"]" * 150 + b"}", b"a=b&c=d",
            bytes(chance.randrange(256) for _ in range(chance.randrange(1, 200))),
        ]
    )  # fmt: skip
    return posted("json", chance.choice(list(BODIES)), body)


def too_large(chance: random.Random) -> Case:
    path, how = chance.choice(list(BODIES)), chance.randrange(3)
    if how == 0:
        length = chance.choice([MAX_BODY + 1, 10**9, 10**18])
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        return Case("size", (head.encode(),))
    if how == 1:
        return posted("size", path, b'{"a": "' + b"x" * (MAX_BODY + chance.randrange(1, 50_000)) + b'"}')
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    piece = b"%x\r\n%s\r\n" % (9000, b"y" * 9000)
    return Case("size", (head, *[piece] * (MAX_BODY // 9000 + 1)))


def bad_chunks(chance: random.Random) -> Case:
    head = (
        f"POST {chance.choice(list(BODIES))} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    rest = chance.choice(
        [b"zz\r\n", b"-1\r\n", b"5\r\nhello!!\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"\r\n\r\n",
         b"5;" + b"x" * 80_000 + b"\r\n",
         b"0\r\n\r\n", b"ffffffffffffffffffff\r\n", b"2\r\n{}\r\n0\r\nbad trailer\r\n\r\n", b"1\r\n{\r\n0\r\n\r\n"]
    )  # fmt: skip
    return Case("chunks", (head, rest))


def wrong_field(chance: random.Random) -> Case:
    path = chance.choice(list(WRONG))
    body = copy.deepcopy(BODIES[path])
    name, value = chance.choice(WRONG[path])
    body[name] = value
    if name == "top_logprobs" and "logprobs" in body:
        body["logprobs"] = True
    return posted(f"field {name}", path, in_json(body, chance))


def missing_field(chance: random.Random) -> Case:
    path = chance.choice(list(BODIES))
    body = copy.deepcopy(BODIES[path])
    needed = [name for name in ("model", "messages", "prompt", "max_tokens") if name in body]
    if "completions" in path:
        needed = [name for name in needed if name not in ("max_tokens", *(("prompt",) if "chat" not in path else ()))]
    del body[chance.choice(needed)]
    return posted("missing", path, in_json(body, chance))


def unknown_model(chance: random.Random) -> Case:
    path = chance.choice(list(BODIES))
    names = [
        "gpt-4o",
        "../demo-gpt-oss",
        "/etc/passwd",
        "openai/gpt-oss-20b",
        "demo-gpt-oss\x00",
        "https://evil.example/x",
        *TEXTS,
    ]
    body = {**copy.deepcopy(BODIES[path]), "model": chance.choice(names)}
    return posted("model", path, in_json(body, chance))


def hostile_schema(chance: random.Random) -> Case:
    deep: Any = {"type": "string"}
    for _ in range(chance.choice([20, 60])):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    schema = chance.choice(
        [
            deep, {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"$ref": "file:///etc/passwd"},
            {"$ref": "http://169.254.169.254/"}, {"type": "string", "pattern": "(a+)+$"}, {"type": "string",
            "pattern": "(a{1000}){1000}"},
            {"type": "string", "pattern": "("}, {"type": "string", "minLength": 10**9}, {"type": "array", "minItems": 10**6},
            {"enum": ["x" * 50 + str(i) for i in range(1000)]}, {"type": "object",
            "properties": {f"p{i}": {} for i in range(500)}},
            {"anyOf": [{"type": "object", "properties": {"a": {"const": i}}} for i in range(200)]}, {"not": {}}, {"type": []},
            {"allOf": [{"type": "string"}, {"type": "number"}]}, {"enum": []}, {"const": {"a": [1] * 100}}, {"multipleOf": 0},
            {"type": "integer", "minimum": 10**40, "maximum": -(10**40)}, {"properties": {"__proto__": {"type": "null"}}},
            schema_of(chance.randrange(10**6), 0), schema_of(chance.randrange(10**6), 0),
            schema_of(chance.randrange(10**6), 0),
        ]
    )  # fmt: skip
    body: dict[str, Any] = copy.deepcopy(CHAT)
    if chance.random() < 0.5:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": schema, "strict": True},
        }
    else:
        function = {"name": "f", "parameters": schema, "strict": chance.random() < 0.5}
        body |= {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": chance.choice(["auto", "required"]),
        }
    try:
        sent = json.dumps(body).encode()
    except (TypeError, ValueError):  # of Decimal, which JSON's own numbers are made of there
        sent = json.dumps(body, default=str).encode()
    return posted("schema", "/v1/chat/completions", sent, is_wrong=False)


def strange_text(chance: random.Random) -> Case:
    body: dict[str, Any] = {
        **copy.deepcopy(CHAT),
        "messages": [{"role": "user", "content": chance.choice(TEXTS) + chance.choice(TEXTS)}],
    }
    if chance.random() < 0.3:
        body["stop"] = chance.choice(TEXTS)
    if chance.random() < 0.2:
        body["tools"] = [
            {"type": "function", "function": {"name": chance.choice(TEXTS), "description": chance.choice(TEXTS)}}
        ]
    return posted("text", "/v1/chat/completions", in_json(body, chance), is_wrong=False)


def changed_body(chance: random.Random) -> Case:
    path = chance.choice(list(BODIES))
    body = copy.deepcopy(BODIES[path])
    for _ in range(chance.randint(1, 3)):
        found = list(places(body))
        if not found:
            break
        way = chance.choice(found)
        if way == ("max_tokens",) or way == ("max_output_tokens",):
            continue  # without it an answer is as long as it likes
        inner: Any = body
        for key in way[:-1]:
            inner = inner[key]
        if chance.random() < 0.2:
            del inner[way[-1]]
        else:
            inner[way[-1]] = copy.deepcopy(chance.choice(ODD))
    return posted("changed", path, in_json(body, chance), is_wrong=False)


def places(value: Any, way: tuple[Any, ...] = ()) -> Any:
    """Every place in a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*way, key)
        yield from places(item, (*way, key))


KINDS: list[Callable[[random.Random], Case]] = [
    foreign_host, foreign_origin, bad_header, bad_line, wrong_path, wrong_method, no_json, too_large, bad_chunks, wrong_field,
    missing_field, unknown_model, hostile_schema, strange_text, changed_body,
]  # fmt: skip
WEIGHTS = [6, 6, 6, 6, 6, 4, 10, 3, 5, 16, 4, 8, 6, 5, 9]
