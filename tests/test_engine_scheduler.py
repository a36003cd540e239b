"""Who is computed next, in simulated time."""

import random
from collections import deque
from math import inf

import numpy as np
import pytest

from openelm_mlx.decoding.prefill import prompt_chunks
from openelm_mlx.engine.pace import LONGEST_GAP, ChunkPace, _most_growth
from openelm_mlx.engine.scheduler import Job, Scheduler
from openelm_mlx.errors import EngineFullError
from openelm_mlx.models.slot_sizes import rows_for


class Request:
    def __init__(self, number, chunks=(), group=None):
        self.job = Job(number, group=group)
        self.job.chunks = deque(chunks)


def scheduler_with(waiting, max_running=4, max_waiting=100):
    scheduler = Scheduler(max_running, max_waiting)
    scheduler.waiting.extend(waiting)
    return scheduler


def test_requests_are_admitted_in_their_order_and_as_many_as_may_run():
    requests = [Request(i, [8]) for i in range(6)]
    scheduler = scheduler_with(requests)
    admitted = []
    while (request := scheduler.admit(lambda _: True)) is not None:
        admitted.append(request)
    assert admitted == requests[:4]
    scheduler.prompt_is_done(requests[1])
    assert scheduler.decoding == [requests[1]]
    scheduler.forget(requests[1])
    assert scheduler.admit(lambda _: True) is requests[4]


def test_many_submitted_together_are_not_all_before_who_comes_later():
    many = [Request(i, [8], group="many") for i in range(10)]
    later, last = Request(10, [8]), Request(11, [8])
    scheduler = scheduler_with(many)
    while scheduler.admit(lambda _: True) is not None:
        pass
    assert scheduler.prompts == many[:4]
    scheduler.waiting += [later, last]
    for ended, wanted in ((many[0], later), (many[1], last), (many[2], many[4]), (later, many[5])):
        scheduler.forget(ended)
        assert scheduler.admit(lambda _: True) is wanted


def test_who_was_put_back_goes_on_before_those_whose_groups_run_less():
    requests = [Request(i, [8], group=group) for i, group in enumerate("aaacc")]
    scheduler = scheduler_with(requests)
    while scheduler.admit(lambda _: True) is not None:
        pass
    assert scheduler.waiting == [requests[2]]
    scheduler.put_back(requests[4])
    for ended in requests[:2]:
        scheduler.forget(ended)
    assert scheduler.queue() == [requests[4], requests[2]]
    assert scheduler.admit(lambda _: True) is requests[4]


@pytest.mark.parametrize("seed", range(5))
def test_the_queue_is_the_order_in_which_requests_are_admitted(seed):
    draw = random.Random(seed)
    scheduler = scheduler_with([Request(i, [8], group=draw.choice("abc")) for i in range(6)], max_running=3)
    while scheduler.admit(lambda _: True) is not None:
        pass
    scheduler.put_back(scheduler.youngest())
    scheduler.waiting += [Request(i, [8], group=draw.choice("abcd")) for i in range(6, 14)]
    arriving = [Request(i, [8], group=draw.choice("ad")) for i in range(14, 17)]
    queue = scheduler.queue(arriving)
    scheduler.waiting += arriving
    scheduler.max_running = 100
    assert queue == [scheduler.admit(lambda _: True) for _ in range(len(queue))]
    assert scheduler.queue() == []


def test_a_prompt_has_its_turn_before_those_that_were_admitted_after_it():
    many = [Request(i, [8], group="many") for i in range(5)]
    later = Request(5, [8])
    scheduler = scheduler_with(many, max_running=2)
    scheduler.admit(lambda _: True), scheduler.admit(lambda _: True)
    scheduler.waiting.append(later)
    for each in many[:2]:
        scheduler.forget(each)
        scheduler.admit(lambda _: True)
    assert set(scheduler.prompts) == {later, many[2]}
    found = [each for each, _ in scheduler.next_prompts(100)]
    assert found == sorted(scheduler.prompts, key=lambda each: each.job.turn)
    scheduler.forget(many[2])
    assert scheduler.admit(lambda _: True) is many[3]
    assert scheduler.next_prompts(100)[0][0] is later


def test_who_was_put_back_is_not_overtaken():
    many = [Request(i, [8], group="many") for i in range(3)]
    scheduler = scheduler_with(many, max_running=3)
    while scheduler.admit(lambda _: True) is not None:
        pass
    scheduler.put_back(many[2])
    scheduler.waiting.append(Request(3, [8]))
    assert scheduler.admit(lambda _: True) is many[2]


def test_who_does_not_fit_is_not_overtaken():
    requests = [Request(i, [8]) for i in range(3)]
    scheduler = scheduler_with(requests)
    assert scheduler.admit(lambda each: each is not requests[0]) is None
    assert scheduler.waiting == requests


def test_who_gives_way_goes_before_all_that_came_after_it():
    requests = [Request(i, [8]) for i in range(5)]
    scheduler = scheduler_with(requests, max_running=3)
    for _ in range(3):
        scheduler.admit(lambda _: True)
    assert scheduler.youngest() is requests[2]
    scheduler.put_back(requests[2])
    assert scheduler.waiting == requests[2:]
    scheduler.put_back(requests[1])
    assert scheduler.youngest() is None  # the last one never gives way
    assert scheduler.waiting == requests[1:]


def test_a_full_queue_says_its_length():
    scheduler = scheduler_with([Request(i) for i in range(3)], max_running=2, max_waiting=2)
    scheduler.check_room()
    with pytest.raises(EngineFullError, match="0 requests are running and 4 are waiting"):
        scheduler.check_room(num_arriving=1)


def test_a_long_prompt_takes_turns_with_shorter_ones():
    long, short, other = Request(0, [512] * 100), Request(1, [512, 88]), Request(2, [512] * 90)
    scheduler = scheduler_with([long, short, other])
    for _ in range(3):
        scheduler.admit(lambda _: True)
    turns = [scheduler.next_prompts(512)[0][0] for _ in range(4)]
    assert turns.count(short) == turns.count(long) == 2  # and the one that is as long waits


def test_short_prompts_share_a_pass():
    requests = [Request(i, [40]) for i in range(5)]
    scheduler = scheduler_with(requests, max_running=5)
    for _ in range(5):
        scheduler.admit(lambda _: True)
    assert scheduler.next_prompts(130) == [(requests[0], 40), (requests[1], 40), (requests[2], 40)]
    for request, length in scheduler.next_prompts(150):
        request.job.take(length)
    assert [request.job.num_left for request in requests] == [0, 0, 0, 10, 40]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 16, 512])
@pytest.mark.parametrize("least", [2, 8])
def test_pieces_are_never_shorter_than_the_least(most, least):
    for length in range(1, 60):
        job = Job(0, least)
        job.chunks = deque([length, 1, 7])
        sizes = []
        while len(job.chunks) == 3:
            sizes.append(job.piece(most))
            job.take(sizes[-1])
        assert sum(sizes) == length
        assert min(sizes) >= min(length, least)
        assert max(sizes) <= max(2 * least - 1, most)


def test_chunks_of_a_prompt_are_those_of_a_request_alone():
    assert prompt_chunks(0, 20, 8, (), False) == [8, 8, 4]
    assert prompt_chunks(0, 20, 8, (), True) == [8, 8, 3, 1]
    assert prompt_chunks(3, 20, 8, (5, 12), False) == [2, 7, 8]
    assert prompt_chunks(19, 20, 8, (), True) == [1]


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("token_seconds", [1e-5, 1e-4, 2e-3, 2e-2])
@pytest.mark.parametrize("fixed", [0.0, 0.004])
def test_decoders_wait_at_most_so_long_for_a_prompt(token_seconds, fixed):
    """A prompt of 8,192 tokens comes in: no step takes more than LONGEST_GAP times the usual one, from the first chunk on.

    On a CPU a prompt's token may cost as much as one of an answer.
    """
    draw = random.Random(3)
    usual = 0.02
    scheduler = scheduler_with([])
    scheduler.pace.prompt_took(fixed + usual + 100 * token_seconds, 100)  # the decoder's own prompt
    scheduler.decoding.append(Request(0))
    for _ in range(20):
        scheduler.pace.step_took(usual * draw.uniform(0.9, 1.1), 0)
    scheduler.waiting.append(Request(1, [2048] * 4))
    prompt = scheduler.admit(lambda _: True)
    gaps, lengths = [], []
    while found := scheduler.next_prompts(2048):
        [(_, length)] = found
        seconds = (usual + fixed + token_seconds * length) * draw.uniform(0.9, 1.1)
        scheduler.pace.step_took(seconds, length)
        prompt.job.take(length)
        gaps.append(seconds / usual)
        lengths.append(length)
    affordable = (LONGEST_GAP * usual - usual - fixed) / token_seconds
    assert max(gaps) <= max(LONGEST_GAP, (usual + fixed + 2 * token_seconds) * 1.1 / usual)
    assert max(lengths) <= 2048
    assert max(lengths) >= min(2048, affordable) / 4  # and it uses the time there is


@pytest.mark.parametrize("compiling", [0.0, 0.8], ids=["at-once", "compiled-first"])
def test_short_chunks_that_save_no_time_are_not_taken(compiling):
    """A step with any chunk takes three times the usual one, whatever its length, on a device that is slow to be told."""
    draw = random.Random(5)
    usual, fixed, token_seconds = 0.008, 0.016, 2e-5
    scheduler = scheduler_with([])
    scheduler.decoding.append(Request(0))
    for _ in range(20):
        scheduler.pace.step_took(usual * draw.uniform(0.9, 1.1), 0)
    scheduler.waiting.append(Request(1, [2048] * 4))
    prompt = scheduler.admit(lambda _: True)
    compiled, lengths = set(), []
    while found := scheduler.next_prompts(2048):
        [(_, length)] = found
        seconds = (usual + fixed + token_seconds * length) * draw.uniform(0.9, 1.1)
        scheduler.pace.step_took(seconds + (compiling if length not in compiled else 0), length)
        compiled.add(length)
        prompt.job.take(length)
        lengths.append(length)
    assert len(lengths) <= 75
    assert max(lengths) >= 192
    for _ in range(3):  # and later prompts begin with what was learned
        scheduler.waiting.append(Request(2, [512]))
        prompt = scheduler.admit(lambda _: True)
        count = 0
        while found := scheduler.next_prompts(2048):
            [(_, length)] = found
            scheduler.pace.step_took((usual + fixed + token_seconds * length) * draw.uniform(0.9, 1.1), length)
            prompt.job.take(length)
            count += 1
        assert count <= 8


def test_a_length_whose_kernels_are_still_to_be_chosen_says_nothing():
    """As seen on an H200, where chunks stayed at four tokens: the first one of eight took four times as long, once."""
    pace = ChunkPace()
    pace.prompt_took(0.077, 64)
    for _ in range(20):
        pace.step_took(0.0059, 0)
    seen = [
        (16, 76.8),
        (4, 35.3),
        (4, 19.9),
        (4, 16.7),
        (2, 18.3),
        (4, 20.6),
        (4, 16.6),
        (4, 19.1),
        (4, 16.9),
        (8, 70.7),
    ]
    seen += [(4, 21.0), (4, 17.3), (4, 23.2), (4, 16.9)]
    for length, milliseconds in seen:
        pace.step_took(milliseconds / 1e3, length)
    assert pace.length(2048) == 8
    for _ in range(3):
        pace.step_took(0.0175, 8)
    assert pace.length(2048) == 16


def test_a_length_that_stays_slow_is_believed():
    """Also where its second chunk is a little longer or shorter, as the end of a prompt is."""
    pace = ChunkPace()
    for _ in range(20):
        pace.step_took(0.01, 0)
    for _ in range(8):
        pace.step_took(0.02, 64)
    known = pace.length(2048)
    assert known >= 64
    pace.step_took(0.2, 100)
    assert pace.length(2048) == known
    pace.step_took(0.2, 110)
    assert pace.length(2048) < known


def test_a_first_chunk_that_took_long_is_outlived_by_others_of_its_length():
    """As seen on a CPU, where chunks stayed at two tokens: the first one took twice as long as all after it."""
    pace = ChunkPace()
    for _ in range(20):
        pace.step_took(0.0044, 0)
    pace.step_took(0.0108, 2)
    assert pace.length(2048) == 2
    for _ in range(16):
        pace.step_took(0.0075, 2)
    assert pace.length(2048) == 4


def test_chunks_of_one_length_are_followed_by_a_longer_one():
    """As seen on an H200, where they stayed at 14 tokens: nothing told what is fixed from what a token takes."""
    pace, lengths = ChunkPace(), []
    for _ in range(20):
        pace.step_took(0.0029, 0)
    pace.step_took(0.0064, 14)
    for _ in range(8):
        lengths.append(pace.length(2048, beside=2))
        pace.step_took(0.0063 + 1e-5 * lengths[-1], lengths[-1])
    assert lengths[0] == 22  # about as long as it may be if all of it was the tokens'
    assert lengths[-1] >= 100


@pytest.mark.parametrize("fixed", [0.001, 0.004, 0.006])
def test_chunks_whose_later_tokens_take_longer_stay_within_the_bound(fixed):
    """As an attention of our own on an H200 does: 512 tokens after 1,500 take 13 ms in it. Chunks had grown far beyond."""
    draw, pace, done, longest, num_chunks = random.Random(1), ChunkPace(), 0, 0.0, 0
    usual = 0.004
    for _ in range(20):
        pace.step_took(usual * draw.uniform(0.95, 1.05), 0)
    while done < 8000:
        length = pace.length(2048, beside=2, position=done)
        seconds = (usual + fixed + 2e-6 * length + 1.5e-8 * length * (done + length / 2)) * draw.uniform(0.95, 1.05)
        pace.step_took(seconds, length)
        longest, done, num_chunks = max(longest, seconds), done + length, num_chunks + 1
    assert longest <= 1.1 * LONGEST_GAP * usual
    assert num_chunks <= 330  # at the end 128 tokens take as long as four steps


def gpt_oss_on_an_h200(length, done):
    """Seconds on the host and on the device of a pass with a chunk after `done` tokens, as seen with gpt-oss-20b."""
    lengths = [0, 14, 22, 30, 46, 62, 94, 126, 190, 254, 1000]
    on_device = np.interp(length, lengths, [7, 9.5, 12.3, 14.8, 19.5, 24.5, 28, 32, 52, 60, 250])
    return 0.008 if length <= 62 else 0.012, 1e-3 * float(on_device) + 5e-9 * length * done


def openelm_on_an_h200(length, done):
    """As seen with OpenELM-1.1B, where the host waits in a pass with many tokens."""
    on_device = 0.0025 + 3e-6 * length + 1.2e-8 * length * (done + length / 2)
    return 0.0054, on_device + (0.005 if length >= 512 else 0.0)


def gaps_beside(pace, draw, usual, takes, num_tokens):
    """What one that decodes waits for its tokens while a prompt comes in, the host being a pass ahead of the device.

    The device begins with a pass while that is dispatched, once it has nothing else to do.
    """
    done, now, free, came, gaps = 0, 0.0, 0.0, 0.0, []
    before = None
    while done < num_tokens or before is not None:
        length = 0
        if done < num_tokens:
            length = min(num_tokens - done, pace.length(2048, beside=2, position=done))
        on_host, on_device = takes(length, done) if length else (1.1 * usual, usual)
        on_host, on_device = (each * draw.uniform(0.94, 1.06) for each in (on_host, on_device))
        free = max(free, now + 0.45 * on_host) + on_device
        dispatched = now = now + on_host
        if before is not None:
            now = max(now, before[2])
            is_seen = now - dispatched >= 0.02 * (now - came)
            pace.step_took(max(before[1], now - came if is_seen else 0.0), before[0])
            gaps.append(now - came)
        came = now
        before = (length, on_host, free) if length else None
        done += length
    return gaps


@pytest.mark.parametrize(
    ("usual", "takes", "num_tokens", "most_seconds"),
    [
        (0.0046, gpt_oss_on_an_h200, 8000, 5.5),
        (0.0062, gpt_oss_on_an_h200, 8000, 5),
        (0.0085, gpt_oss_on_an_h200, 8000, 4),
        (0.0027, openelm_on_an_h200, 2040, 0.08),
        (0.0048, openelm_on_an_h200, 2040, 0.08),
    ],
)
def test_chunks_stay_within_the_bound_where_their_time_is_hidden(usual, takes, num_tokens, most_seconds):
    """While the host is slower than the device, a chunk's own time is not seen, and then it is there at once."""
    draw, pace, longest, whole = random.Random(2), ChunkPace(), [], []
    pace.is_one = True
    pace.prompt_took(0.02, 64)
    for _ in range(6):
        for _ in range(30):
            pace.step_took(usual * draw.uniform(0.95, 1.05), 0, is_alone=True)
        gaps = gaps_beside(pace, draw, usual, takes, num_tokens)
        longest.append(max(gaps) / usual)
        whole.append(sum(gaps))
    assert longest[0] <= 1.2 * LONGEST_GAP  # nothing is known yet
    assert max(longest[1:]) <= LONGEST_GAP
    assert max(whole[1:]) <= most_seconds


def test_lengths_that_were_too_long_are_left_alone():
    """For a while, twice as long each time; unless they had been within the bound, or are by now."""
    pace = ChunkPace()
    for _ in range(20):
        pace.step_took(0.01, 0)
    for _ in range(3):
        pace.step_took(0.02, 64)
        pace.step_took(0.03, 128)
    pace.step_took(0.05, 128)  # disturbed
    assert pace._shortest_beyond(0.04) == inf
    pace.step_took(0.05, 128)
    assert pace._shortest_beyond(0.04) == 128
    assert pace._shortest_beyond(0.05) == inf  # for decoders that take longer
    for _ in range(63):
        assert pace.length(2048) < 128
        pace.step_took(0.02, 64)
    pace.step_took(0.02, 64)
    assert pace._shortest_beyond(0.04) == inf
    pace.step_took(0.05, 128)
    for _ in range(100):
        pace.step_took(0.02, 64)
    assert pace._shortest_beyond(0.04) == 128
    pace.step_took(0.03, 128)
    assert pace._shortest_beyond(0.04) == inf


def test_one_that_decodes_waits_by_what_it_takes_by_itself():
    """Beside a prompt it is in a slot, where a step takes longer, with a chunk or without."""
    pace = ChunkPace()
    for _ in range(20):
        pace.step_took(0.0025, 0, is_alone=True)
        pace.step_took(0.005, 0)
    pace.is_one = True
    pace.prompt_took(0.0625, 100)
    alone = pace.length(2048)
    pace.is_one = False
    assert pace.length(2048) == 2 * alone  # it may take as long again
    pace.step_took(0.012, 64)
    pace.step_took(0.013, 64)
    assert pace.length(2048) >= 64
    pace.is_one = True
    assert pace.length(2048) < 64


@pytest.mark.parametrize("is_in_slot", [False, True])
@pytest.mark.parametrize("at_first", [0.2, 0.0005])
def test_what_one_that_decodes_takes_is_measured_again_beside_a_prompt(is_in_slot, at_first):
    """Its first steps took long, or the machine is slower by now; in a slot it cannot be measured by itself."""
    draw, pace, lengths = random.Random(5), ChunkPace(), []
    pace.is_one = True
    pace.prompt_took(0.01, 64)
    for _ in range(3):
        pace.step_took(at_first, 0, is_alone=True)
    for _ in range(200):
        while pace.is_usual_due:
            pace.step_took((0.012 if is_in_slot else 0.01) * draw.uniform(0.95, 1.05), 0, is_alone=not is_in_slot)
        lengths.append(pace.length(2048))
        pace.step_took((0.01 + 0.0003 * lengths[-1]) * draw.uniform(0.95, 1.05), lengths[-1])
    if at_first > 0.01:
        assert max(lengths[-50:]) <= 128  # which is within the bound, or hardly beyond it
    if not is_in_slot:
        assert min(lengths[-50:]) >= 32


@pytest.mark.parametrize("beside", [0, 4])
def test_chunks_beside_one_are_long_where_most_of_their_time_is_fixed(beside):
    """As where each of them reads all experts from a disk: 256 tokens would take about as long as a thousand."""
    draw, pace, lengths = random.Random(6), ChunkPace(), []
    pace.is_one = True
    pace.prompt_took(3.1, 64)
    for _ in range(20):
        pace.step_took(0.2, 0, is_alone=True)
    for _ in range(40):
        lengths.append(pace.length(2048, beside=beside))
        pace.step_took((3.2 + 0.002 * lengths[-1]) * draw.uniform(0.95, 1.05), lengths[-1])
    assert min(lengths[-5:]) >= 700


def test_chunks_beside_one_are_not_tiny_where_many_prompts_wait():
    """Their slots are rows too, of which there may be more than a chunk beside one has."""
    pace = ChunkPace()
    pace.is_one = True
    for _ in range(20):
        pace.step_took(0.01, 0, is_alone=True)
    pace.prompt_took(0.01, 1000)
    for beside in (192, 256, 1024):
        assert pace.length(2048, beside=beside) >= 100


def test_prompts_that_begin_are_not_taken_for_ones_that_see_ever_more():
    """The second chunk of a prompt sees three times as many as the first, and both see hardly anything."""
    pace, num_chunks = ChunkPace(), 0
    for _ in range(20):
        pace.step_took(0.004, 0)
    for _ in range(40):
        done = 0
        while done < 200:
            length = min(200 - done, pace.length(2048, beside=4, position=done))
            pace.step_took(0.006 + 8e-5 * length, length)
            done, num_chunks = done + length, num_chunks + 1
    assert num_chunks <= 210  # of 44 tokens; as long as they see, they would be of 28


def test_from_some_length_on_chunks_grow_by_less():
    """A step of twice as many tokens would save hardly anything, and may be far too long."""
    assert _most_growth(8, 2.0) > 2
    assert _most_growth(128, 0.1) > _most_growth(128, 0.3) > _most_growth(128, 0.6) > 1.5
    assert _most_growth(256, 0.1) == _most_growth(128, 0.6)


def test_rows_beside_a_chunk_are_a_part_of_its_coarse_steps():
    """Where prompts are rows of the same pass, the numbers of all its rows are few."""
    pace = ChunkPace(first=100)
    assert pace.length(2048) == 96
    assert pace.length(2048, beside=2) == 94
    assert pace.length(2048, beside=64) == 64  # 128 rows
    assert pace.length(2048, beside=96) == 96  # 192: fewer would be hardly any
    assert pace.length(20, beside=64) == 20
    pace = ChunkPace(first=2)
    assert [pace.length(2048, beside=each) for each in (2, 4, 8, 12, 16, 64)] == [14, 12, 8, 20, 16, 32]
    for beside in (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128):
        for first in (2, 40, 300, 1000):
            rows = beside + ChunkPace(first=first).length(4096, beside)
            assert rows_for(rows) == rows


def test_a_job_has_a_longest_piece():
    job = Job(0)
    job.chunks.extend([700, 1])
    assert job.piece(2048) == 700
    job.longest = 256
    assert [job.piece(2048), job.piece(100)] == [256, 100]
    job.chunks[0] = 257
    assert job.piece(2048) == 255  # and two are left
    job.chunks[0] = 256
    assert job.piece(2048) == 256


def test_the_first_chunk_of_all_is_believed():
    """Nothing was expected of it."""
    pace = ChunkPace()
    for _ in range(20):
        pace.step_took(0.01, 0)
    pace.step_took(1.0, 64)
    assert pace.length(2048) == 16


def test_a_length_is_known_though_nobody_knew_the_usual_step():
    pace = ChunkPace()
    pace.step_took(0.2, 128)
    for _ in range(20):
        pace.step_took(0.01, 0)
    for _ in range(8):
        pace.step_took(0.02, 64)
    known = pace.length(2048)
    pace.step_took(0.2, 128)
    assert pace.length(2048) < known


@pytest.mark.parametrize("fixed", [0.0, 0.012, 0.02])
def test_chunks_grow_while_requests_come_in_one_after_the_other(fixed):
    """Of 64 prompts one is always being computed while others decode: the usual step is measured all the same.

    A step without a chunk hands over what the one before it computed: the first of them is a short one.
    """
    draw = random.Random(7)
    scheduler = Scheduler(64, 100)
    for i in range(64):
        scheduler.waiting.append(Request(i, [draw.randrange(64, 1024)]))
        scheduler.admit(lambda _: True)
    num_tokens = sum(each.job.num_left for each in scheduler.prompts)
    pace, num_chunks, num_plain, unseen = scheduler.pace, 0, 0, 0.0
    while scheduler.prompts:
        usual = 0.006 + 1e-4 * len(scheduler.decoding)
        if scheduler.decoding and pace.is_usual_due:
            pace.step_took(0.002 + unseen, 0)
            unseen, num_plain = usual - 0.002, num_plain + 1
            continue
        found = scheduler.next_prompts(2048)
        length = sum(piece for _, piece in found)
        seconds = unseen + (usual + fixed + 2e-5 * length) * draw.uniform(0.95, 1.05)
        learn = pace.step_took if scheduler.decoding else pace.prompt_took
        for request, piece in found:
            request.job.take(piece)
            if not request.job.chunks:
                scheduler.prompt_is_done(request)
        learn(seconds, length)
        unseen, num_chunks = 0.0, num_chunks + 1
    assert num_chunks < num_tokens / 64 / 3  # chunks as short as the first one would be three times as many
    assert num_plain <= 18


def test_the_first_step_after_a_chunk_does_not_count_as_a_usual_one():
    """It hands over what the chunk's step has computed, and says nothing of what computing takes."""
    pace = ChunkPace()
    pace.step_took(0.02, 64)
    assert pace.is_usual_due
    pace.step_took(0.002, 0)
    assert pace.is_usual_due
    pace.step_took(0.008, 0)
    assert not pace.is_usual_due


def test_a_usual_step_that_was_long_once_is_forgotten():
    pace = ChunkPace()
    pace.step_took(5.0, 0)  # a kernel was compiled
    for _ in range(8):
        pace.step_took(0.008, 0)
    pace.step_took(0.02, 64)
    assert pace.length(2048) <= 128


def test_a_chunk_the_device_stopped_is_halved():
    pace = ChunkPace()
    pace.last = 512
    pace.halve()
    assert pace.longest == 256
