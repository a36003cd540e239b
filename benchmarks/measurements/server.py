"""What HTTP costs beside the engine that it speaks for, how soon a server listens, and what a chat's second turn computes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection as Pipe
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm_mlx.server.slots import Lease

QUESTION = "What is a harbor, and what is a river, a tower and a lamp?"
TURNS = ("What is a harbor?", "What is a river?", "What is a tower?")
USAGE = re.compile(rb'"completion_tokens":(\d+)')


# --- Listening --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Seconds from the start of `openelm_mlx serve`, a process a round: until it says where it listens, until /health
    answers the first time, and until the model is loaded. first_status: what that first answer says.
    """

    listening: list[float]
    first_health: list[float]
    loaded: list[float]
    first_status: list[str]

    def line(self) -> str:
        return (
            f"start: listening after {median(self.listening):.2f} s, /health ({self.first_status[0]}) after "
            f"{median(self.first_health):.2f} s, loaded after {median(self.loaded):.2f} s; medians of {len(self.loaded)}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {"part": "start", **asdict(self)}


def measure_start(model: str, rounds: int) -> Start:
    """Start the command, as a user does, and ask it how it is."""
    found = Start([], [], [], [])
    for _ in range(rounds):
        command = [sys.executable, "-m", "openelm_mlx", "serve", "--model", model, "--port", "0", "--quiet"]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found.listening.append(time.perf_counter() - began)
            port = int(line.split(" at http://127.0.0.1:")[1].split(" ")[0])
            found.first_status.append(_status(port))
            found.first_health.append(time.perf_counter() - began)
            while _status(port) != "ok":
                time.sleep(0.02)
            found.loaded.append(time.perf_counter() - began)
        finally:
            process.kill()
            process.communicate()
    return found


def _status(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("GET", "/health")
        return str(json.load(connection.getresponse())["status"])
    finally:
        connection.close()


# --- A server in this process, and clients in another ------------------------------------------------------------------


@contextlib.contextmanager
def serving(model: str) -> Iterator[tuple[int, Lease]]:
    """The port of the whole server, guard and all, in a thread of this process; and its model, held."""
    from openelm_mlx.server.connections import Server, listening_socket
    from openelm_mlx.server.names import served_model
    from openelm_mlx.server.registry import Registry
    from openelm_mlx.server.settings import ServerSettings
    from openelm_mlx.server.site import make_site

    settings = ServerSettings(models=(served_model(model),))
    ready: list[tuple[asyncio.AbstractEventLoop, Registry, Server]] = []
    with listening_socket("127.0.0.1", 0) as listening:

        async def main() -> None:
            registry = Registry(settings)
            server = Server(make_site(settings, registry), settings)
            ready.append((asyncio.get_running_loop(), registry, server))
            await server.serve(sockets=[listening])

        thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        thread.start()
        while not ready or not ready[0][2].started:
            time.sleep(0.01)
        loop, registry, server = ready[0]
        lease = asyncio.run_coroutine_threadsafe(registry.acquire(model), loop).result()
        try:
            yield listening.getsockname()[1], lease
        finally:
            loop.call_soon_threadsafe(lease.release)
            loop.call_soon_threadsafe(server.stop)
            thread.join()


async def _stream(port: int, body: bytes) -> int:
    """One client's streamed answer, read to its end. Returns its tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    pieces = []
    while piece := await reader.read(2**16):
        pieces.append(piece)
    writer.close()
    answer = b"".join(pieces)
    found = USAGE.search(answer)
    if found is None or b"data: [DONE]" not in answer:
        raise RuntimeError(f"an answer has no end: {answer[-300:]!r}")
    return int(found[1])


def _clients(port: int, pipe: Pipe) -> None:
    """The process of the clients: bodies come through the pipe, and tokens and seconds go back."""

    async def all_of(bodies: list[bytes]) -> int:
        return sum(await asyncio.gather(*(_stream(port, body) for body in bodies)))

    while bodies := pipe.recv():
        began = time.perf_counter()
        tokens = asyncio.run(all_of(bodies))
        pipe.send((tokens, time.perf_counter() - began))


# --- What HTTP costs --------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """Rounds of one side. cpu: seconds of this process's processors, in which the clients of HTTP are not."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens a second of all clients together, round by round."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    @property
    def cpu_of_tokens(self) -> list[float]:
        """Processor seconds a token, round by round."""
        return [cpu / tokens for cpu, tokens in zip(self.cpu, self.tokens, strict=True)]

    @property
    def tps(self) -> float:
        """The rounds' median."""
        return median(self.rates)

    @property
    def cpu_of_token(self) -> float:
        """The rounds' median."""
        return median(self.cpu_of_tokens)


@dataclass(frozen=True)
class Overhead:
    """Streams through the engine, and the same through HTTP, in turns."""

    clients: int
    engine: Side
    http: Side

    @property
    def overhead(self) -> float:
        """The share of the engine's tokens/s that HTTP costs: the median of neighbouring rounds, as loads come and go."""
        return 1 - median(served / alone for served, alone in zip(self.http.rates, self.engine.rates, strict=True))

    @property
    def cpu_overhead(self) -> float:
        """What HTTP adds to the processor time of a token, which other programs' load moves less."""
        both = zip(self.http.cpu_of_tokens, self.engine.cpu_of_tokens, strict=True)
        return median(served / alone for served, alone in both) - 1

    def line(self) -> str:
        return (
            f"overhead of HTTP, {self.clients} clients of {self.engine.tokens[0] // self.clients} tokens: engine "
            f"{self.engine.tps:.0f}, HTTP {self.http.tps:.0f} tokens/s, {100 * self.overhead:.1f} %; processor time of a token "
            f"{1e3 * self.engine.cpu_of_token:.2f}, {1e3 * self.http.cpu_of_token:.2f} ms, {100 * self.cpu_overhead:+.1f} %; "
            f"medians of {len(self.http.tokens)} rounds in turns"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "part": "overhead", **asdict(self), "overhead": self.overhead, "cpu_overhead": self.cpu_overhead,
        }  # fmt: skip


def measure_overhead(model: str, clients: int, num_tokens: int, rounds: int) -> Overhead:
    """Both sides write the same: chats with a seed each, which go on until num_tokens. One round before is not counted."""
    found = Overhead(clients, Side(), Side())
    with serving(model) as (port, lease), _other_process(port) as pipe:
        ends = {*lease.model.spec.eos_tokens, *(lease.tokenizer.eos_tokens if lease.tokenizer else ())}
        for number in range(rounds + 1):
            for side, one_round in ((found.engine, _by_engine), (found.http, _by_http)):
                cpu = time.process_time()
                tokens, seconds = one_round(lease, pipe, clients, num_tokens, ends)
                if number:
                    side.tokens.append(tokens)
                    side.seconds.append(seconds)
                    side.cpu.append(time.process_time() - cpu)
    return found


@contextlib.contextmanager
def _other_process(port: int) -> Iterator[Pipe]:
    """The pipe to a process of clients."""
    processes = multiprocessing.get_context("spawn")
    own, other = processes.Pipe()
    process = processes.Process(target=_clients, args=(port, other), daemon=True)
    process.start()
    try:
        yield own
    finally:
        own.send(None)
        process.join()


def _by_engine(lease: Lease, pipe: Pipe, clients: int, num_tokens: int, ends: set[int]) -> tuple[int, float]:
    from openelm_mlx import SamplingParams

    began = time.perf_counter()
    handles = [
        lease.engine.submit(
            [{"role": "user", "content": QUESTION}], max_tokens=num_tokens, prefix_cache=lease.prefix_cache,
            sampling=SamplingParams(temperature=1.0, seed=seed, logit_bias=dict.fromkeys(ends, -100.0)),
        )
        for seed in range(clients)
    ]  # fmt: skip
    tokens = sum(sum(1 for chunk in handle if chunk.token is not None) for handle in handles)
    return tokens, time.perf_counter() - began


def _by_http(lease: Lease, pipe: Pipe, clients: int, num_tokens: int, ends: set[int]) -> tuple[int, float]:
    asked = {
        "model": lease.name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": num_tokens,
        "temperature": 1.0, "logit_bias": {str(each): -100 for each in ends}, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    pipe.send([json.dumps({**asked, "seed": seed}).encode() for seed in range(clients)])
    found: tuple[int, float] = pipe.recv()
    return found


# --- A chat's turns ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turns:
    """Tokens of a chat's prompts, turn by turn, and how many of them were there already."""

    prompt_tokens: list[int]
    cached_tokens: list[int]

    def line(self) -> str:
        pairs = zip(self.prompt_tokens, self.cached_tokens, strict=True)
        return "turns: " + "; ".join(f"prompt of {prompt:,}, {cached:,} of them cached" for prompt, cached in pairs)

    def as_dict(self) -> dict[str, Any]:
        return {"part": "turns", **asdict(self)}


def measure_turns(model: str, long_text: str) -> Turns:
    """A chat over HTTP that begins with a long text."""
    found = Turns([], [])
    with serving(model) as (port, _):
        messages = [{"role": "user", "content": f"{long_text}\n\n{TURNS[0]}"}]
        for question in (*TURNS[1:], ""):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            answer = json.load(connection.getresponse())
            connection.close()
            found.prompt_tokens.append(answer["usage"]["prompt_tokens"])
            found.cached_tokens.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            messages += [answer["choices"][0]["message"], {"role": "user", "content": question}]
    return found
