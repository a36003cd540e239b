"""`serve --workers`: the answers of one machine over HTTP, and a worker that goes ends one request and not the server."""

import http.client
import json
import os
import subprocess
import sys
import time

from worker_processes import ROOT, Worker

import openelm_mlx as om

QUESTION = [{"role": "user", "content": "What is a banjo?"}]
PATIENCE = 120


class Server:
    """`serve` over this worker, as a user starts it."""

    def __init__(self, worker: Worker) -> None:
        command = [
            sys.executable, "-m", "openelm_mlx", "serve", "--port", "0", "--model", "demo-openelm", "--dtype", "float32",
            "--workers", worker.address, "--layers", "5,3", "--worker-timeout", "20",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT
        )

    def __enter__(self) -> "Server":
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().split(" at http://127.0.0.1:")[1].split(" ")[0])
        while self.ask("GET", "/health")[1].get("status") != "ok":
            time.sleep(0.05)
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()

    def begin(self, method: str, path: str, body: dict | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def ask(self, method: str, path: str, body: dict | None = None) -> tuple[int, dict]:
        answer = self.begin(method, path, body)
        return answer.status, json.loads(answer.read())

    def chat(self, **options) -> http.client.HTTPResponse:
        body = {"model": "demo-openelm", "messages": QUESTION, "temperature": 0, "stream": True, **options}
        return self.begin("POST", "/v1/chat/completions", body)


def events(answer: http.client.HTTPResponse) -> list[dict]:
    lines = answer.read().decode().splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def text(found: list[dict]) -> str:
    return "".join(choice["delta"].get("content") or "" for event in found for choice in event["choices"])


def test_a_server_over_workers_and_one_that_is_killed():
    alone, tokenizer = om.load("demo-openelm", dtype="float32")
    expected = om.generate(alone, tokenizer, QUESTION, max_tokens=12)
    worker = Worker()
    try:
        with Server(worker) as server:
            assert text(events(server.chat(max_tokens=12))) == expected

            # In the middle of an answer: it ends with one sentence, and the next one is told what to do.
            ends = {str(token): -100 for token in tokenizer.eos_tokens}
            answer = server.chat(max_tokens=2000, logit_bias=ends)
            while not answer.readline().startswith(b"data: {"):
                pass
            worker.kill()
            last = events(answer)[-1]
            assert last["error"]["code"] == "worker_lost"
            assert "is gone" in last["error"]["message"]
            body = {"model": "demo-openelm", "messages": QUESTION, "max_tokens": 2}
            status, failed = server.ask("POST", "/v1/chat/completions", body)
            assert status == 503
            assert f"serve-layers --port {worker.port}" in failed["error"]["message"]
            assert server.ask("GET", "/health")[1]["status"] == "ok"

            worker = Worker(port=worker.port)
            assert text(events(server.chat(max_tokens=12))) == expected
    finally:
        worker.kill()
