"""Who is computed in the engine's next step. No arrays: requests are known by their sizes, and time is handed in.

Requests wait in a queue, and are admitted while fewer than `max_running` run and their memory fits: first come first
served, but those that were submitted together (a client's list of prompts) are not all before whoever comes later. An
admitted request's prompt is computed in chunks, beside one token of every request that decodes; short prompts share a
pass, and where cores share one each has a prompt. The chunks of a pass are together as long as decoding requests can bear
(`ChunkPace`), and as a chunk of the plan when nobody decodes. A very long prompt takes turns with shorter ones that came
after it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar, final

from ..errors import EngineFullError
from .pace import LEAST_CHUNK, ChunkPace

# Prompts in one pass: each has attention of its own.
MOST_PROMPTS = 32
# A prompt lets another go first every other step, if that one has this many times less to compute.
_SHORTER = 4


@final
class Job:
    """A request as the scheduler sees it.

    number: in the order of arrival. chunks: lengths of the prompt's chunks as a request alone has them; a chunk may be
    computed in several pieces, but never across such a border. least, longest: tokens in the shortest and the longest piece.
    group: what it was submitted with; by default it is alone. position: how many tokens are before the next piece.
    """

    def __init__(self, number: int, least: int = 2, group: Hashable = None) -> None:
        self.number, self.least = number, least
        self.longest: int | None = None
        self.group = number if group is None else group
        self.was_put_back = False
        self.turn = 0  # its place among all that have been admitted, from 1
        self.position = 0
        self.chunks: deque[int] = deque()

    @property
    def num_left(self) -> int:
        """Prompt tokens still to be computed."""
        return sum(self.chunks)

    def piece(self, most: int) -> int:
        """The length of its next piece: at most `most` tokens, but at least `least`, and as many are left of the chunk.

        Attention over few tokens may add in another order than over many, and the answer would differ in its last bits.
        A chunk that is shorter by itself stays as it is.
        """
        chunk, most = self.chunks[0], max(self.least, most if self.longest is None else min(most, self.longest))
        if chunk <= max(most, 2 * self.least - 1):
            return chunk
        return min(most, chunk - self.least)

    def take(self, length: int) -> None:
        """A piece of so many tokens has been computed."""
        self.position += length
        self.chunks[0] -= length
        if self.chunks[0] == 0:
            self.chunks.popleft()


J = TypeVar("J", bound="HasJob")


class HasJob:
    """Whoever the scheduler is to decide about."""

    job: Job


@final
class Scheduler(Generic[J]):
    """The queue, the prompts that are being computed, and those who decode; each in the order of arrival.

    max_running: requests admitted at once. max_waiting: requests in the queue.
    """

    def __init__(self, max_running: int, max_waiting: int, pace: ChunkPace | None = None) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.pace = ChunkPace() if pace is None else pace
        self.waiting: list[J] = []
        self.prompts: list[J] = []
        self.following: list[J] = []  # admitted, and waiting for another's prompt that is theirs too
        self.decoding: list[J] = []
        self._num_chunks = self._num_admitted = 0

    @property
    def num_running(self) -> int:
        return len(self.prompts) + len(self.following) + len(self.decoding)

    def running(self) -> Iterator[J]:
        """All that have been admitted."""
        yield from self.prompts
        yield from self.following
        yield from self.decoding

    def check_room(self, num_arriving: int = 0) -> None:
        """Raise EngineFullError when one more would have to wait, and the queue is full.

        num_arriving: requests on their way into the queue.
        """
        num_waiting = len(self.waiting) + num_arriving
        if self.num_running + num_waiting >= self.max_running + self.max_waiting:
            raise EngineFullError(
                f"{self.num_running:,} requests are running and {num_waiting:,} are waiting, as many as the engine takes "
                f"(max_running={self.max_running}, max_waiting={self.max_waiting}): ask again later, or give it a larger "
                "max_waiting."
            )

    def admit(self, fits: Callable[[J], bool]) -> J | None:
        """The next request to begin with, its prompt to be computed; None when there is none, or no room.

        fits: whether its memory does. Whoever is next is not overtaken.
        """
        if not self.waiting or self.num_running >= self.max_running:
            return None
        first = self._next()
        if not fits(first):
            return None
        self.waiting.remove(first)
        self._num_admitted += 1
        first.job.turn = first.job.turn or self._num_admitted
        _insert(self.prompts, first)
        return first

    def _next(self) -> J:
        running = Counter(each.job.group for each in self.running())
        return min(self.waiting, key=lambda each: _place(each, running[each.job.group]))

    def queue(self, arriving: Sequence[J] = ()) -> list[J]:
        """Those who wait in the order in which they would be admitted if nobody ended before. arriving: who is on the way."""
        running = Counter(each.job.group for each in self.running())
        places = {}
        for each in sorted([*self.waiting, *arriving], key=lambda each: (not each.job.was_put_back, each.job.number)):
            places[each] = _place(each, running[each.job.group])
            running[each.job.group] += 1
        return sorted(places, key=places.__getitem__)

    def next_prompts(self, most: int, cores: int = 1, beside: int = 0) -> list[tuple[J, int]]:
        """Whose prompts are gone on with in the next pass, and by how many tokens each: `most` in all, and more on cores
        that would have nothing to do until the others are done.

        most: what memory and device allow at once; where somebody decodes, the pace allows less. Who was admitted first comes
        first, or every other time one that is far shorter; others follow while tokens are left. A piece is on one core.
        beside: see `ChunkPace.length`.
        """
        with_chunks = sorted((each for each in self.prompts if each.job.chunks), key=lambda each: each.job.turn)
        if not with_chunks:
            return []
        first = self._first_of(with_chunks)
        most = min(most, self.pace.longest)
        if self.decoding:
            most = self.pace.length(most, beside, first.job.position)
        found = [(first, first.job.piece(most))]
        loads = [found[0][1], *[0] * (cores - 1)]  # of each core
        left = most - loads[0]
        for each in with_chunks:
            if each is first:
                continue
            least = min(loads)
            room = max(left, max(loads) - least)
            if (least and room < LEAST_CHUNK) or len(found) >= MOST_PROMPTS:
                break
            length = each.job.piece(room)
            if length <= room:
                found.append((each, length))
                loads[loads.index(least)] += length
                left -= length
        self.pace.last = max(loads)
        return found

    def _first_of(self, prompts: Sequence[J]) -> J:
        first = prompts[0]
        self._num_chunks += 1
        if self._num_chunks % 2 == 0:
            for each in prompts[1:]:
                if each.job.num_left * _SHORTER <= first.job.num_left:
                    return each
        return first

    def prompt_is_done(self, request: J) -> None:
        """It decodes from now on."""
        self.forget(request)
        _insert(self.decoding, request)

    def follow(self, request: J) -> None:
        """Its prompt is another's, who is computing it: nothing is computed for it until that is done."""
        self.forget(request)
        _insert(self.following, request)

    def compute_prompt(self, request: J) -> None:
        """Its prompt is computed from now on, or again."""
        self.forget(request)
        _insert(self.prompts, request)

    def put_back(self, request: J) -> None:
        """Out of those running and into the queue again, before all that came after it."""
        self.forget(request)
        request.job.was_put_back = True
        _insert(self.waiting, request)

    def youngest(self, may: Callable[[J], bool] = lambda _: True) -> J | None:
        """Who gives way when memory is short, among those who `may`; never the oldest that is running."""
        running = sorted(self.running(), key=_number)
        return next((each for each in reversed(running[1:]) if may(each)), None)

    def forget(self, request: J) -> None:
        """It has ended, or has been cancelled, wherever it is."""
        for place in (self.waiting, self.prompts, self.following, self.decoding):
            if request in place:
                place.remove(request)


def shared_among(sizes: Sequence[int], cores: int) -> list[list[int]]:
    """Which of so many works each core has, by their numbers, so that about as much is for each; no core without any.

    The largest goes first, each to who has least.
    """
    shares: list[list[int]] = [[] for _ in range(max(1, cores))]
    totals = [0] * len(shares)
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        core = totals.index(min(totals))
        shares[core].append(at)
        totals[core] += sizes[at]
    return sorted(sorted(share) for share in shares if share)


def longest_share(sizes: Sequence[int], cores: int) -> int:
    """How much the core has that has most; 0 where there is no work."""
    return max((sum(sizes[at] for at in share) for share in shared_among(sizes, cores)), default=0)


def _place(request: HasJob, num_running: int) -> tuple[bool, int, int]:
    """What the queue is ordered by: who had begun before, then whose group has the fewest running, then who came first."""
    was_put_back = request.job.was_put_back
    return not was_put_back, 0 if was_put_back else num_running, request.job.number


def _number(request: HasJob) -> int:
    return request.job.number


def _insert(place: list[J], request: J) -> None:
    at = len(place)
    while at and place[at - 1].job.number > request.job.number:
        at -= 1
    place.insert(at, request)
