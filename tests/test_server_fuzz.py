"""Malformed and hostile requests by the hundred: a 4xx with a body each, and everybody else is answered as before.

`OPENELM_MLX_FUZZ=10000` takes as many, with OPENELM_MLX_FUZZ_SEED as their seed.
"""

import collections
import json
import logging
import os
import threading
import time

import pytest
import server_fuzz
from server_fuzz import case
from server_raw import raw, serving

from openelm_mlx.server.names import served_model
from openelm_mlx.server.registry import Registry
from openelm_mlx.server.settings import ServerSettings
from openelm_mlx.server.site import make_site

COUNT = int(os.environ.get("OPENELM_MLX_FUZZ", "250"))
SEED = int(os.environ.get("OPENELM_MLX_FUZZ_SEED", "7"))
# Clients at once that send nothing sound.
HOSTILE = 4
QUESTION = server_fuzz.http(
    "/v1/chat/completions",
    json.dumps({
        "model": server_fuzz.MODEL, "messages": [{"role": "user", "content": "What is a banjo?"}], "temperature": 0,
        "max_tokens": 12, "stream": True,
    }).encode(),
)  # fmt: skip


class Errors(logging.Handler):
    """What a server's log has of failures."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.found = []

    def emit(self, record):
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        self.found.append(f"{record.name}: {record.getMessage()}\n{trace}")


@pytest.fixture
def errors():
    handler = Errors()
    loggers = [logging.getLogger(name) for name in ("openelm_mlx.server", "uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.found
    for logger in loggers:
        logger.removeHandler(handler)


def text_of(answer):
    """The text of a streamed answer, put together."""
    assert answer.status == 200, answer
    found = []
    for line in answer.body.decode().splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                found += [choice["delta"].get(name) or "" for name in ("reasoning", "content")]
    assert b"[DONE]" in answer.body
    return "".join(found)


def fault_of(one, answer):
    """What is wrong with the answer to a case; None if nothing is."""
    if answer.status is None:
        return "no answer"
    if answer.status >= 500 or (one.is_wrong and answer.status < 400):
        return f"{answer.status}"
    if not answer.body and one.pieces[0][:4] != b"HEAD":
        return f"{answer.status} without a body"
    if answer.status >= 400 and answer.body and "message" not in (json.loads(answer.body).get("error") or {}):
        return f"{answer.status} without a message"
    return None


@pytest.mark.slow
def test_hostile_requests_get_a_4xx_and_nobody_else_notices(errors):
    settings = ServerSettings(
        models=(served_model(server_fuzz.MODEL),),
        max_body=server_fuzz.MAX_BODY,
        header_timeout=600.0,
        body_timeout=10.0,  # that of chunks without an end
        load_options={"context_length": 128},  # a long prompt is no hostile one, and takes its time
    )
    registry = Registry(settings)
    faults, statuses, lock = [], collections.Counter(), threading.Lock()
    numbers = iter(range(COUNT))

    def attack(port):
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            one = case(SEED, number)
            try:
                answer = raw(port, *one.pieces)
                fault = fault_of(one, answer)
            except (OSError, ValueError) as error:  # of the client: it may have waited in vain, or read nonsense
                answer, fault = None, f"{type(error).__name__}: {error}"
            with lock:
                statuses[answer and answer.status] += 1
                if fault is not None:
                    sent = b"".join(one.pieces)
                    faults.append(f"{fault} in case {number} ({one.kind}): {sent[:1500]!r} -> {answer}")

    with serving(make_site(settings, registry), settings) as port:
        wanted = text_of(raw(port, QUESTION))
        attackers = [threading.Thread(target=attack, args=(port,)) for _ in range(HOSTILE)]
        for thread in attackers:
            thread.start()
        rounds = 0
        while any(thread.is_alive() for thread in attackers):
            assert text_of(raw(port, QUESTION)) == wanted
            rounds += 1
        assert rounds
        assert not faults, f"{len(faults)} faults:\n" + "\n\n".join(faults[:8])
        assert not errors, f"{len(errors)} errors in the log:\n" + "\n\n".join(errors[:5])
        loaded = registry._slots[server_fuzz.MODEL].loaded
        while loaded.num_leases or loaded.engine.num_running or loaded.engine.num_waiting:
            time.sleep(0.01)  # whoever has its answer is forgotten a moment later
    refused = sum(count for status, count in statuses.items() if status and 400 <= status < 500)
    assert refused > COUNT * 0.7
    assert sum(statuses.values()) == COUNT


def test_a_case_is_known_by_its_number():
    assert [case(3, number) for number in range(50)] == [case(3, number) for number in range(50)]
    kinds = {case(3, number).kind.split(" ")[0] for number in range(400)}
    assert len(kinds) == len(server_fuzz.KINDS)
