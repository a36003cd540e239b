"""An MCP server without the SDK, so that it can be as wrong as servers are: python mcp_sloppy_server.py ANSWERS.json

ANSWERS: {"tools": the list of tools, "call": {name: the answer to a call of it, or a word for what to do instead}, "before":
what to do before anything is answered}. It needs nothing but a bare Python, and starts at once.
"""

import json
import os
import sys
import time

ANSWERS = json.loads(open(sys.argv[1], encoding="utf-8").read())  # noqa: SIM115


def send(message):
    sys.stdout.write(message if isinstance(message, str) else json.dumps(message) + "\n")
    sys.stdout.flush()


def do(what, number):
    if what == "silence":
        return
    if what == "environment":
        send(
            {
                "jsonrpc": "2.0",
                "id": number,
                "result": {"content": [{"type": "text", "text": json.dumps(dict(os.environ))}]},
            }
        )
    if what == "die":
        sys.stderr.write("\n\nit ran out of apples\n")
        sys.stderr.flush()
        os._exit(3)
    if what == "garbage":
        send("Starting up...\n{\n\x00\xff\n[1]\n" + "[" * 100_000 + '\n{"jsonrpc": "2.0", "id": [], "result": 3}\n')
    elif what == "wrong id":
        send({"jsonrpc": "2.0", "id": 98765, "result": {"content": [{"type": "text", "text": "wrong"}]}})
    elif what == "flood":
        for _ in range(200):
            sys.stderr.write("x" * 100_000 + "\n")
        sys.stderr.write("the last of it")
        sys.stderr.flush()
        send("y" * 3_000_000 + "\n")
    if what in ("garbage", "flood"):
        send({"jsonrpc": "2.0", "id": number, "result": {"content": [{"type": "text", "text": "all the same"}]}})


if ANSWERS.get("before") == "stay":  # it does not answer, and does not end with its input either
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(10_000)
for line in sys.stdin:
    message = json.loads(line)
    number, method, given = message.get("id"), message.get("method"), message.get("params") or {}
    if number is None:
        continue
    if method == "initialize":
        info = {"name": "sloppy", "version": "1"}
        result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
    elif method == "tools/list":
        result = {"tools": ANSWERS["tools"], **ANSWERS.get("page", {})}
    elif method == "tools/call":
        answer = ANSWERS["call"].get(
            given["name"], {"content": [{"type": "text", "text": json.dumps(given["arguments"])}]}
        )
        if isinstance(answer, str):
            do(answer, number)
            continue
        result = answer
    else:
        send({"jsonrpc": "2.0", "id": number, "error": {"code": -32601, "message": "Method not found"}})
        continue
    send({"jsonrpc": "2.0", "id": number, "result": result})
