"""How long chunks of prompts may be beside those who decode: learned from the times of steps, which are handed in."""

from __future__ import annotations

from collections import deque
from itertools import combinations
from math import inf
from statistics import median
from typing import NamedTuple, final

# A step with a chunk takes at most so many times the usual step of those who decode (checked by `bench --requests`).
LONGEST_GAP = 4.0
# What the chunk's length aims at: below the bound, since a chunk's cost is known only afterwards.
_AIM = 3.0
# Where a chunk's fixed time is not within that, its tokens take this part of it at least: else decoders would wait more
# often, and not less.
_LEAST_SHARE = 0.5
# What is fixed is only an estimate: so much of it is believed.
_BELIEVED = 0.8
# So many tokens before it take at most as long as a token itself: with fewer of them, what it sees says little.
_AS_MUCH_AS_ITSELF = 256
# A chunk's tokens take at most so many times as long as the last one's, since they see more.
_MOST_MORE = 3.0
# Chunks of one length after which one of twice that is tried where it may be a little too long: it tells what is fixed.
_MOST_OF_ONE_LENGTH = 8
# Chunks after which the usual step is measured again; fewer at first, while requests come in.
_MOST_CHUNKS = 32
# A chunk is so many times as long as the last one at most, where that has added no more than such a part of what a chunk
# may add: twice, in coarse steps, also where those are of more than itself. On a device that is slow to be told, what a
# chunk takes shows only from some length on, and then at once.
_MOST_GROWTH = ((0.25, 2.5), (0.45, 2.1), (1.0, 1.6))
# From so many rows on, a longer chunk saves hardly anything, where little of it is fixed; beside one request that decodes
# none is longer then.
_LONG = 256
# A length that was too long is not tried again for so many chunks, twice as many each time.
_FIRST_BAN, _LONGEST_BAN = 64, 1024
# So many times what was expected is far longer.
_SLOW_FIRST = 2.0
# Shorter chunks cost nearly as much as this one: each reads all weights.
LEAST_CHUNK = 16


class _TooLong(NamedTuple):
    """A chunk's length, in tokens, and how long its step took; until which chunk it is not tried again, for `ban` chunks."""

    length: int
    seconds: float
    until: int
    ban: int


@final
class ChunkPace:
    """How long a chunk of a prompt may be while others decode, learned from the steps' times (seconds).

    A chunk adds a fixed time to the usual step and another for each token; both are estimated by rank, so that a step
    that was long once means little. A length's first chunk that took far longer than was expected says nothing: for some
    devices kernels are chosen, or compiled, for each length. Where the fixed time leaves too little of what decoders should
    wait, short chunks would make them wait more often and not less: a chunk is then so long that its tokens take as much
    as what is fixed.

    The usual step is only seen where nobody's prompt is computed, which may never be while requests come and come: so
    `is_usual_due` asks for two steps without a chunk now and then. The first of them hands over what the chunk's step
    computed, and says nothing.

    Where cores share a pass, a chunk is what the core has of prompts that has most.

    first: the first chunk beside somebody who decodes, where nothing is known of what a prompt's token takes.
    """

    def __init__(self, first: int = 64) -> None:
        self.longest = 2**20  # whatever the times say
        self.last = first
        self._first = first
        self.is_one = False  # whether one request decodes
        # Of a step without a chunk: of one request by itself, and of several.
        self._usual_alone: float | None = None
        self._usual_together: float | None = None
        self._per_token_alone: float | None = None  # of a prompt that nobody decoded beside
        self._added: deque[tuple[int, float]] = deque(maxlen=16)  # by the last chunks: their lengths, and seconds
        self._known_lengths: set[int] = set()  # in coarse steps
        self._is_after_chunk = False
        # Steps with a chunk since the usual one was measured, and after how many it is measured again.
        self._num_chunks = self._due_after = 0
        self._fixed, self._per_token = 0.0, 0.0
        self._least_added = inf  # seconds, by any chunk
        # Of the last chunks, in tokens of their prompts: the first has been seen, where the host is a pass ahead.
        self._middles = deque([inf], maxlen=2)
        self._num_seen = 0  # chunks
        # Lengths, in coarse steps, by their last chunks: those within the bound, and those that are not tried again soon.
        self._within: set[int] = set()
        self._beyond: dict[int, _TooLong] = {}
        # Whether chunks of different lengths have told those two apart, and whether the last ones do not.
        self._has_slope, self._are_of_one_length = False, True

    @property
    def _usual(self) -> float | None:
        """A step without a chunk of those who decode now. What one takes by itself is not what it takes beside a prompt."""
        found = (self._usual_alone, self._usual_together)
        first, second = found if self.is_one else found[::-1]
        return second if first is None else first

    @property
    def is_usual_due(self) -> bool:
        """Whether the next step should be one without a chunk, where somebody decodes."""
        return self._num_chunks >= self._due_after

    def _seconds_left(self, usual: float) -> float:
        """What the bound leaves for a chunk's tokens, beside what each chunk adds anyway."""
        return (0.9 * LONGEST_GAP - 1) * usual - self._fixed

    @property
    def _is_mostly_fixed(self) -> bool:
        """Whether that is too little: as where all experts are read from a disk."""
        usual = self._usual
        return usual is not None and self._seconds_left(usual) < _LEAST_SHARE * self._fixed

    def length(self, most: int, beside: int = 0, position: int = 0) -> int:
        """The chunk's length now, at most `most`, in coarse steps, so that shapes are few.

        beside: rows that a pass has anyway, where prompts are rows among them: the coarse steps are those of all rows.
        position: how many tokens are before it, which it sees.
        """
        length = self._length(most, beside, position)
        self._middles.append(position + length / 2)
        return length

    def _length(self, most: int, beside: int, position: int) -> int:
        if self.is_one and not self._is_mostly_fixed:
            most = min(most, max(_LONG // 2, _LONG - beside))
        if not beside:
            return min(most, _in_coarse_steps(self._wanted(position)))
        rows = _in_coarse_steps(max(self._wanted(position) + beside, LEAST_CHUNK))
        while rows - beside < LEAST_CHUNK // 2:
            rows = _in_coarse_steps(2 * rows if rows < 2 * LEAST_CHUNK else 1.5 * rows)
        return min(most, rows - beside)

    def _measured_usual(self, seconds: float, is_alone: bool) -> None:
        known = self._usual_alone if is_alone else self._usual_together
        # Once it was far longer: a kernel had to be compiled.
        known = seconds if known is None else min(known, LONGEST_GAP * seconds)
        known += 0.25 * (seconds - known)
        if is_alone:
            self._usual_alone = known
        else:
            self._usual_together = known
            if self.is_one and self._usual_alone is not None:  # by itself, and in no slot, it takes no longer
                self._usual_alone = min(self._usual_alone, known)
        if self._num_chunks >= self._due_after:
            self._due_after = min(_MOST_CHUNKS, max(1, 2 * self._due_after))
        self._num_chunks = 0

    def _wanted(self, position: int) -> float:
        usual = self._usual
        if not self._added or usual is None:
            if usual is None or self._per_token_alone is None:
                return self._first
            return (_AIM - 1) * usual / self._per_token_alone  # which has its share of what is fixed
        most_seconds = self._seconds_left(usual)
        last, added = max(list(self._added)[-2:])  # the end of a prompt may be short
        growth = _most_growth(last, added / ((LONGEST_GAP - 1) * usual))
        are_many = self._are_of_one_length and len(self._added) >= _MOST_OF_ONE_LENGTH
        if are_many and min(seconds for _, seconds in self._added) > (LONGEST_GAP - 1) * usual:
            # None is within the bound, and nothing tells whether their tokens take so long: another length does.
            return last / 2 if last > LEAST_CHUNK else _MOST_GROWTH[0][1] * last
        if not self._has_slope:
            # All that a chunk adds may be its tokens', or hardly any. A longer one tells, where it is within the bound anyway.
            longer = min(growth * last, most_seconds / max(self._per_token, 1e-9))
            is_nearly = 2 * last * self._per_token <= 1.1 * (LONGEST_GAP - 1) * usual
            if is_nearly and len(self._added) >= _MOST_OF_ONE_LENGTH:
                return growth * last
            if longer >= 1.5 * last:
                return longer
        least_seconds = self._fixed if self._is_mostly_fixed else min(self._fixed, most_seconds)
        seconds = max(least_seconds, (_AIM - 1) * usual - self._fixed)
        length = seconds / max(self._per_token, 1e-9)
        if not self._is_mostly_fixed:
            # All that the last chunk added beside what is fixed grows with its length, and with what its tokens see: faster
            # than that, as measured.
            fixed = _BELIEVED * self._fixed
            sees_more = (position + last / 2 + _AS_MUCH_AS_ITSELF) / (self._middles[0] + _AS_MUCH_AS_ITSELF)
            within = ((0.8 * LONGEST_GAP - 1) * usual - fixed) / max(added - fixed, 1e-9)
            within /= min(_MOST_MORE, max(1.0, sees_more) ** 2)
            length = min(length, last * max(0.5, within))
        if most_seconds > 0:
            length = min(length, self._shortest_beyond(LONGEST_GAP * usual) - 1)
        return max(last / 4, min(growth * last, length))  # what has not been tried is only an estimate

    def _shortest_beyond(self, most_seconds: float) -> float:
        """The shortest chunk that is known to take longer."""
        known = self._beyond.values()
        return min(
            (each.length for each in known if self._num_seen < each.until and each.seconds > most_seconds), default=inf
        )

    def _remember(self, coarse: int, chunk_length: int, seconds: float, usual: float) -> None:
        """Whether a chunk was within the bound. One that was not, of a length that had been, may have been disturbed."""
        if seconds <= LONGEST_GAP * usual:
            self._within.add(coarse)
            self._beyond.pop(coarse, None)
        elif coarse in self._within:
            self._within.remove(coarse)
        else:
            ban = min(_LONGEST_BAN, 2 * self._beyond[coarse].ban) if coarse in self._beyond else _FIRST_BAN
            self._beyond[coarse] = _TooLong(chunk_length, seconds, self._num_seen + ban, ban)

    def halve(self) -> None:
        """The last chunk was too long for the device: from now on, none is longer than half of it."""
        self.longest = max(LEAST_CHUNK, self.last // 2)

    def prompt_took(self, seconds: float, length: int) -> None:
        """Learn from a step in which nobody decoded what a token of a prompt takes."""
        self._is_after_chunk = True
        found, known = seconds / max(1, length), self._per_token_alone
        self._per_token_alone = found if known is None else min(found, 0.5 * (found + known))

    def step_took(self, seconds: float, chunk_length: int, is_alone: bool = False) -> None:
        """Learn from a step in which somebody decoded. chunk_length: 0 for a step without a prompt.

        is_alone: one request by itself.
        """
        was_after_chunk, self._is_after_chunk = self._is_after_chunk, chunk_length > 0
        if chunk_length == 0:
            if not was_after_chunk:
                self._measured_usual(seconds, is_alone)
            return
        self._num_chunks += 1
        coarse = _in_coarse_steps(chunk_length)
        is_first = coarse not in self._known_lengths
        self._known_lengths.add(coarse)
        usual = self._usual
        if usual is None or seconds <= 0:
            return
        expected = self._fixed + self._per_token * chunk_length
        if is_first and len(self._added) > 1 and seconds - usual > _SLOW_FIRST * expected:
            return
        self._num_seen += 1
        if not is_first:
            self._remember(coarse, chunk_length, seconds, usual)
        self._added.append((chunk_length, max(0.0, seconds - usual)))
        slopes = sorted(
            (y - other_y) / (x - other_x)
            for (x, y), (other_x, other_y) in combinations(self._added, 2)
            if max(x, other_x) >= 1.4 * min(x, other_x)
        )
        self._are_of_one_length = not slopes
        if slopes:
            self._has_slope = True
            # The lower quartile: what is hidden in the noise is found out by longer chunks, and not by shorter ones.
            self._per_token = max(0.0, slopes[len(slopes) // 4])
        else:
            # Chunks of one length: no more than all they took, or a first one that took long would keep them short for ever.
            average = median(y / x for x, y in self._added)
            self._per_token = average if len(self._added) == 1 else min(self._per_token, average)
        # No more than the least that any added: later tokens of a prompt take longer, and are not to be taken for more that is
        # fixed. What was seen long ago counts less and less.
        self._least_added = min(self._added[-1][1], 1.002 * self._least_added)
        self._fixed = max(0.0, min(self._least_added, median(y - self._per_token * x for x, y in self._added)))


def _most_growth(length: int, part: float) -> float:
    """How many times as long the next chunk may be, after one that added such a part of what may be added."""
    if length < 0.75 * LEAST_CHUNK:
        return _MOST_GROWTH[0][1]  # hardly any of it was its tokens', and the next step is twice as long
    if length >= _LONG - LEAST_CHUNK:
        return _MOST_GROWTH[-1][1]
    return next((growth for most, growth in _MOST_GROWTH if part <= most), _MOST_GROWTH[-1][1])


def _in_coarse_steps(length: float) -> int:
    """A power of two, or one and a half of it, but below `LEAST_CHUNK` only the former: at most `length`, at least 2."""
    power = 1 << max(1, int(length).bit_length() - 1)
    return power + power // 2 if length >= power + power // 2 and power >= LEAST_CHUNK else power
