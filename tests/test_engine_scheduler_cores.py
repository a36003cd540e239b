"""Prompts where several cores share a pass, in simulated time."""

import random
from collections import Counter, deque
from itertools import product

import pytest

from openelm_mlx.engine.pace import LONGEST_GAP
from openelm_mlx.engine.scheduler import Job, Scheduler, longest_share, shared_among

# Seconds of a row, of what a step takes whoever is in it, and of a prompt's token in a chunk of 64 rows; two cores of a CPU.
ROW, FIXED, IN_CHUNK = 2.2e-3, 1e-3, 1.6e-3


class Request:
    def __init__(self, number, chunks=(), least=2):
        self.job = Job(number, least)
        self.job.chunks = deque(chunks)


def scheduler_with(*prompts, decoding=0):
    scheduler = Scheduler(64, 100)
    scheduler.waiting.extend(prompts)
    while scheduler.admit(lambda _: True) is not None:
        pass
    scheduler.decoding.extend(Request(100 + at) for at in range(decoding))
    return scheduler


def with_chunks_of(scheduler, length):
    """A pace that has come to chunks of so many tokens."""
    scheduler.pace.step_took(0.01, 0)
    scheduler.pace.step_took(0.01 + 0.0145 / 2, length // 2)
    for _ in range(16):
        scheduler.pace.step_took(0.01 + 0.0145, length)
    assert scheduler.pace.length(2048) == length
    return scheduler


def test_each_core_gets_about_as_much():
    def sizes(*sizes, cores=2):
        return [[sizes[at] for at in share] for share in shared_among(sizes, cores)]

    assert sizes(1, 1, 1, 1) == [[1, 1], [1, 1]]
    assert sizes(1, 1, 1) == [[1, 1], [1]]
    assert sizes(1, 1, 1, cores=4) == [[1], [1], [1]]
    assert sizes(1, 1, 1, 64) == [[1, 1, 1], [64]]  # who decodes beside a chunk of a prompt
    assert sizes(90, 80, 100, 70) == [[90, 80], [100, 70]]
    assert sizes(*[1] * 6, 6, 6) == [[1, 1, 1, 6], [1, 1, 1, 6]]
    assert sizes(64) == [[64]]
    assert sizes(1, 1, cores=1) == [[1, 1]]
    assert sizes() == []
    assert longest_share([1, 1, 1, 64], 2) == 64
    assert longest_share([6, 6, 5], 2) == 11
    assert longest_share([], 2) == 0


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_everybody_is_in_one_share_and_none_is_much_longer_than_it_must_be(cores):
    draw = random.Random(cores)
    for _ in range(40):
        sizes = [draw.choice((1, 1, 3, 8, 64)) for _ in range(draw.randrange(1, 7))]
        shares = shared_among(sizes, cores)
        assert sorted(at for share in shares for at in share) == list(range(len(sizes)))
        assert len(shares) == min(cores, len(sizes))
        assert all(shares)
        ways = product(range(cores), repeat=len(sizes))
        best = min(max(on_core(way, sizes).values()) for way in ways)
        assert longest_share(sizes, cores) <= 4 / 3 * best


def on_core(way, sizes):
    """How much each core has where work i is on core `way[i]`."""
    found = Counter()
    for core, size in zip(way, sizes, strict=True):
        found[core] += size
    return found


def test_each_core_has_a_prompt_where_nobody_decodes():
    """A third begins where one of them leaves a core without work."""
    requests = [Request(i, [64, 64]) for i in range(3)]
    scheduler = scheduler_with(*requests)
    assert scheduler.next_prompts(64) == [(requests[0], 64)]
    assert scheduler.next_prompts(64, 2) == [(requests[0], 64), (requests[1], 64)]
    assert scheduler.next_prompts(64, 4) == [(each, 64) for each in requests]
    requests[1].job.chunks = deque([40])
    assert scheduler.next_prompts(64, 2) == [(requests[0], 64), (requests[1], 40), (requests[2], 24)]


def test_short_prompts_are_no_more_than_one_core_would_have():
    """So that the first ones have their first tokens soon: all cores together are at them."""
    requests = [Request(i, [16]) for i in range(8)]
    scheduler = scheduler_with(*requests)
    assert scheduler.next_prompts(64, 2) == scheduler.next_prompts(64) == [(each, 16) for each in requests[:4]]


def test_beside_those_who_decode_each_core_has_a_piece_of_equal_length():
    requests = [Request(i, [64]) for i in range(3)]
    scheduler = with_chunks_of(scheduler_with(*requests, decoding=2), 8)
    assert scheduler.next_prompts(64) == [(requests[0], 8)]
    assert scheduler.next_prompts(64, 2) == [(requests[0], 8), (requests[1], 8)]
    assert scheduler.pace.last == 8  # what the core computes that has most


@pytest.mark.parametrize("decoding", [0, 3])
def test_nobody_waits_longer_because_another_core_has_a_prompt_too(decoding):
    """Whatever the lengths, the pieces of a pass take no longer than the first one or what a core may have."""
    draw = random.Random(4)
    requests = [Request(i, [draw.randrange(1, 90)], draw.choice((2, 8))) for i in range(30)]
    scheduler = with_chunks_of(scheduler_with(*requests, decoding=decoding), 4)
    most, num_passes, shared = (4 if decoding else 32), 0, 0
    while found := scheduler.next_prompts(32, 2):
        lengths = [length for _, length in found]
        alone = max(most, found[0][1])
        assert longest_share(lengths, 2) <= alone
        assert scheduler.pace.last <= alone
        shared += len(found) > 1
        num_passes += 1
        for request, length in found:
            request.job.take(length)
    assert shared > num_passes / 2


def simulated(count, cores, prompt_tokens=128, new_tokens=64):
    """Requests that come at once: seconds till all are answered, to the first token of the first, and the steps of those who
    decoded beside prompts, over the usual ones of as many. Two cores compute, whatever the scheduler knows of them.
    """
    draw = random.Random(9)
    scheduler = Scheduler(count, 100)
    requests = [Request(i, [64] * (prompt_tokens // 64)) for i in range(count)]
    scheduler.waiting.extend(requests)
    while scheduler.admit(lambda _: True) is not None:
        pass
    left, pace = dict.fromkeys(requests, new_tokens), scheduler.pace
    seconds, first, gaps = 0.0, None, []

    def step(pieces):
        rows = longest_share([*[1] * len(scheduler.decoding), *pieces], 2)
        return (FIXED + (IN_CHUNK if max(pieces, default=0) >= 32 else ROW) * rows) * draw.uniform(0.95, 1.05)

    while scheduler.prompts or scheduler.decoding:
        decoding = list(scheduler.decoding)
        found = [] if decoding and pace.is_usual_due else scheduler.next_prompts(64, cores)
        pieces = [length for _, length in found]
        took, chunk = step(pieces), longest_share(pieces, cores)
        seconds += took
        if decoding and found:
            gaps.append(took / (FIXED + ROW * -(-len(decoding) // 2)))
        for request, length in found:
            request.job.take(length)
            if not request.job.chunks:
                scheduler.prompt_is_done(request)
                left[request] -= 1
        first = seconds if first is None and scheduler.decoding else first
        for each in decoding:
            left[each] -= 1
            if not left[each]:
                scheduler.forget(each)
        if decoding:
            pace.step_took(took, chunk)
        elif chunk:
            pace.prompt_took(took, chunk)
    return seconds, first, gaps


def test_requests_that_come_at_once_are_answered_sooner_than_one_after_the_other():
    alone, first_alone, _ = simulated(1, 2)
    seconds, first, gaps = simulated(8, 2)
    assert 8 * alone >= 1.5 * seconds
    assert first <= 1.1 * first_alone
    assert max(gaps) <= 1.15 * LONGEST_GAP
    before, *_ = simulated(8, 1)  # a core at a time has prompts
    assert before >= 1.2 * seconds
