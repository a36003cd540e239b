"""Streams: what is sent when, and what a client that goes away ends."""

import asyncio

from server_fakes import THOUGHT_AND_ANSWER, FakeGenerations

from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.parts import Part
from openelm_mlx.server.sse import EventStream, comment


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

        await EventStream(generation, Lines())({"type": "http"}, receive, send)
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
