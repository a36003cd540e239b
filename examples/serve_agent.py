"""A function called over Chat Completions, and its result answered. [ADDRESS] of a server; else one is started."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

TOOL = {"name": "calculator", "description": "Evaluates an arithmetic expression.", "parameters": {
    "type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"],
}}  # fmt: skip


@contextlib.contextmanager
def server() -> Iterator[str]:
    command = [sys.executable, "-m", "openelm_mlx", "serve", "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process.stdout.readline().split(" at ")[1].split()[0]
        process.terminate()


def ask(address: str, messages: list) -> dict:
    tools = [{"type": "function", "function": TOOL}]
    body = {"model": "demo-gpt-oss", "messages": messages, "tools": tools, "temperature": 0}
    with urllib.request.urlopen(f"{address}/v1/chat/completions", json.dumps(body).encode()) as answer:
        return json.load(answer)["choices"][0]["message"]


with contextlib.nullcontext(sys.argv[1]) if len(sys.argv) > 1 else server() as address:
    messages = [{"role": "user", "content": "What is 23 * 19?"}]
    while calls := (answer := ask(address, messages)).get("tool_calls"):
        messages.append(answer)  # with its reasoning, which the model reads again
        for call in calls:
            left, right = json.loads(call["function"]["arguments"])["expression"].split("*")
            print(f"{left.strip()} * {right.strip()}, says the model; the result is {int(left) * int(right)}")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": str(int(left) * int(right))})
    print(answer["content"])
