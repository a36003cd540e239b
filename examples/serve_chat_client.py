"""OpenAI's Responses, streamed: the second turn computes only what is new. [ADDRESS] of a server; else one is started."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def server() -> Iterator[str]:
    command = [sys.executable, "-m", "openelm_mlx", "serve", "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process.stdout.readline().split(" at ")[1].split()[0]
        process.terminate()


def ask(address: str, question: str, previous: str | None = None) -> str:
    body = {
        "model": "demo-gpt-oss",
        "input": question,
        "previous_response_id": previous,
        "temperature": 0,
        "stream": True,
    }
    print(f"> {question}")
    with urllib.request.urlopen(f"{address}/v1/responses", json.dumps(body).encode()) as lines:
        for event in (json.loads(line[6:]) for line in lines if line.startswith(b"data: ")):
            if event["type"] == "response.output_text.delta":
                print(event["delta"], end="", flush=True)
    usage = event["response"]["usage"]
    print(f"\n({usage['input_tokens']} tokens read, {usage['input_tokens_details']['cached_tokens']} of them cached)")
    return event["response"]["id"]


with contextlib.nullcontext(sys.argv[1]) if len(sys.argv) > 1 else server() as address:
    first = ask(address, "What is a harbor?")
    ask(address, "What is a river?", first)
