"""Four streams at once, each as it would be alone. [ADDRESS] of a server; else one is started."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

WORDS = ("lamp", "river", "harbor", "tower")


@contextlib.contextmanager
def server() -> Iterator[str]:
    command = [sys.executable, "-m", "openelm_mlx", "serve", "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process.stdout.readline().split(" at ")[1].split()[0]
        process.terminate()


def ask(address: str, word: str) -> str:
    chat = [{"role": "user", "content": f"What is a {word}?"}]
    body = {"model": "demo-gpt-oss", "messages": chat, "temperature": 0, "stream": True, "reasoning_effort": "low"}
    text = ""
    with urllib.request.urlopen(f"{address}/v1/chat/completions", json.dumps(body).encode()) as lines:
        for line in lines:
            if line.startswith(b"data: {"):  # other lines say that it is being worked on, or that this is the end
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    return text


with (
    contextlib.nullcontext(sys.argv[1]) if len(sys.argv) > 1 else server() as address,
    ThreadPoolExecutor(len(WORDS)) as pool,
):
    for word, text in zip(WORDS, pool.map(lambda word: ask(address, word), WORDS), strict=True):
        print(f"{word}: {text}")
