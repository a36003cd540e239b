"""Streams: what is sent when, and what a client that goes away ends."""

import asyncio

import pytest
from server_fakes import THOUGHT_AND_ANSWER, FakeGenerations
from starlette.testclient import TestClient

from openelm_mlx.server import sse
from openelm_mlx.server.app import Services, make_app
from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.parts import Part
from openelm_mlx.server.sse import EventStream, comment
from openelm_mlx.server.wire import chat, completions, messages, responses

APIS = (chat, completions, responses, messages)


class Lines:
    """Events whose bytes tell which parts they are of."""

    def start(self) -> bytes:
        return b"start\n"

    def more(self, parts: list[Part]) -> bytes:
        return b"".join(type(part).__name__.encode() + b"\n" for part in parts)

    def keep_alive(self, progress) -> bytes:
        return comment(progress)

    def failure(self, error: ApiError) -> bytes:
        return b"failed: " + error.message.encode() + b"\n"


def stream(script, batch=1, gone_after=None, send_fails_after=None):
    """What is written, and the generation. gone_after: seconds until the client goes away."""

    async def run():
        generation = await FakeGenerations(script, batch).start(None)
        written = []

        async def receive():
            await asyncio.sleep(3600 if gone_after is None else gone_after)
            return {"type": "http.disconnect"}

        async def send(message):
            if send_fails_after is not None and len(written) >= send_fails_after:
                raise OSError("gone")
            written.append(message.get("body", b""))

        starting = asyncio.get_running_loop().create_future()
        starting.set_result(generation)
        await EventStream(starting, lambda _: Lines())({"type": "http"}, receive, send)
        return written, generation

    return asyncio.run(run())


def test_parts_that_are_there_go_out_in_one_write():
    written, generation = stream(THOUGHT_AND_ANSWER, batch=100)
    assert written[1] == b"start\n"
    assert written[2].split(b"\n")[:2] == [b"ItemStarted", b"ItemText"]
    assert written[3:] == [b""]
    assert generation.is_closed


def test_a_quiet_stream_says_how_far_it_is():
    written, _ = stream([0.0, *THOUGHT_AND_ANSWER])
    assert written[2] == b": in the queue, 2 before this one\n\n"


def test_a_failure_after_the_first_byte_is_told_in_the_stream():
    error = ApiError(503, "the engine has ended")
    written, generation = stream([*THOUGHT_AND_ANSWER[:2], error], batch=100)
    assert written[-2:] == [b"failed: the engine has ended\n", b""]
    assert generation.is_closed


def test_a_client_that_goes_away_ends_the_generation():
    written, generation = stream([*THOUGHT_AND_ANSWER[:2], 3600.0], gone_after=0.0)
    assert generation.is_closed
    assert b"Finished\n" not in written
    written, generation = stream(THOUGHT_AND_ANSWER, send_fails_after=3)
    assert generation.is_closed
    assert len(written) == 3


def loading(outcome, gone_after=3600.0):
    """What is written while a model is loaded for a while, and the generation. outcome: of the loading."""

    async def run():
        generation = await FakeGenerations(THOUGHT_AND_ANSWER).start(None)
        is_told, written, given = asyncio.Event(), [], []

        async def start():
            await is_told.wait()
            if isinstance(outcome, Exception):
                raise outcome
            return generation

        async def receive():
            await asyncio.sleep(gone_after)
            return {"type": "http.disconnect"}

        async def send(message):
            written.append(message.get("body", b""))
            if b"loaded" in written[-1] and gone_after:
                is_told.set()

        def events(own):
            given.append(own)
            return Lines()

        starting = asyncio.ensure_future(start())
        await EventStream(starting, events)({"type": "http"}, receive, send)
        assert starting.done()
        assert given in ([], [None if isinstance(outcome, Exception) else generation])
        return written[1:], generation

    return asyncio.run(run())


COMMENT = b": the model is being loaded\n\n"


def test_a_stream_says_that_its_model_is_being_loaded():
    written, generation = loading(None)
    assert written[:2] == [COMMENT, b"start\n"]
    assert written[-2:] == [b"Finished\n", b""]
    assert generation.is_closed


def test_a_model_that_cannot_be_loaded_is_told_in_the_stream():
    written, _ = loading(ApiError(503, "it is broken"))
    assert written == [COMMENT, b"start\nfailed: it is broken\n", b""]


def test_an_error_of_ours_while_loading_is_told_without_its_text():
    written, _ = loading(RuntimeError("secret"))
    assert written[1].startswith(b"start\nfailed: The server failed")
    assert b"secret" not in written[1]


def test_a_client_that_goes_away_while_its_model_is_loaded_is_forgotten():
    written, _ = loading(None, gone_after=0.0)
    assert written in ([], [COMMENT])


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
@pytest.mark.parametrize("outcome", ["answer", "failure"])
def test_every_stream_begins_with_comments_where_loading_takes_long(monkeypatch, path, outcome):
    monkeypatch.setattr(sse, "BEFORE_LOADING", 0.0)
    generations = FakeGenerations(THOUGHT_AND_ANSWER)
    start = generations.start

    async def slow(request):
        await asyncio.sleep(0.05)
        if outcome == "failure":
            raise ApiError(503, "it is broken", "server_error")
        return await start(request)

    generations.start = slow
    app = make_app(Services(generations), [route for api in APIS for route in api.routes()])
    body = {"model": "m", "stream": True, "max_tokens": 9}
    body |= (
        {"prompt": "Hi"} if path == "completions" else {"input": "Hi", "messages": [{"role": "user", "content": "Hi"}]}
    )
    with TestClient(app) as http:
        answer = http.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200
    assert answer.text.startswith(COMMENT.decode())
    assert ("it is broken" in answer.text) == (outcome == "failure")
    assert ("2 + 2" in answer.text) == (outcome == "answer")


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_what_is_wrong_at_once_has_a_status_of_its_own(path):
    generations = FakeGenerations(THOUGHT_AND_ANSWER)

    async def refuse(request):
        raise ApiError(404, "There is no such model.", param="model", code="model_not_found")

    generations.start = refuse
    app = make_app(Services(generations), [route for api in APIS for route in api.routes()])
    body = {"model": "m", "stream": True, "max_tokens": 9}
    body |= (
        {"prompt": "Hi"} if path == "completions" else {"input": "Hi", "messages": [{"role": "user", "content": "Hi"}]}
    )
    with TestClient(app) as http:
        assert http.post(f"/v1/{path}", json=body).status_code == 404
