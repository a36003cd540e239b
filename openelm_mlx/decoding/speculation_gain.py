"""Whether guessing ahead pays: measured seconds a token of both ways, and the decision that follows. No arrays."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

# Rounds looked at together; the first after a pause, or with more guesses than before, may compile kernels: left out.
_ROUNDS, _WARM_UP = 12, 1
# How many rounds say whether it pays, unless so many plain steps' time is lost before.
_ENOUGH, _TOO_MUCH = 3, 1.5
# The first trial guesses this many tokens, so that it costs little; more are tried while it gains.
_FIRST_DRAFTS = 2
_BEFORE_GROWING = 4
# Trials may cost this share of the time in all: a trial that lost is followed by so long a pause.
_COST_OF_TRIALS = 0.012
_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 4096
# Plain steps get slower as the context grows, so they are measured again after so many tokens.
_MEASURE_EVERY, _MEASURED = 512, 8


@dataclass
class DraftHistory:
    """What one request leaves to the next: plain tokens still to be made after a trial that lost, and how many to guess."""

    pause: int = 0
    num_drafts: int = _FIRST_DRAFTS


@dataclass
class Counts:
    """What speculation did in one request. seconds: from its first plain step on."""

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    tokens: int = 0
    seconds: float = 0.0
    plain_seconds_per_token: float = 0.0

    @property
    def speedup(self) -> float | None:
        """Times as fast as plain steps alone, as far as measured; None before anything was."""
        if not self.seconds or not self.plain_seconds_per_token:
            return None
        return self.plain_seconds_per_token * self.tokens / self.seconds


class Gain:
    """Hears how long plain tokens and rounds took, and says how many plain tokens come next and how many to guess.

    most_drafts: never guess more. history: of the requests before this one.
    """

    def __init__(self, most_drafts: int, history: DraftHistory | None = None) -> None:
        self.counts = Counts()
        self._most_drafts = most_drafts
        self._history = DraftHistory() if history is None else history
        self._plain: deque[float] = deque(maxlen=32)
        self._median: float | None = None  # worked out when it is asked for, which is not for every token
        self._rounds: deque[tuple[float, int]] = deque(maxlen=_ROUNDS)
        self._num_rounds = 0  # since the last pause, or since the number of guesses changed
        self._lost = self._lost_warming_up = 0.0
        self._since_measured = 0
        self._pause = max(_MEASURED, self._history.pause)
        self._rate_before: float | None = None  # tokens a second with fewer guesses
        self._is_settled = False

    @property
    def plain_seconds(self) -> float:
        """Seconds a plain token takes; a disturbance now and then does not move it."""
        if self._median is None:
            self._median = median(self._plain) if self._plain else 0.0
        return self._median

    @property
    def num_drafts(self) -> int:
        """How many tokens to guess in a round."""
        return min(self._history.num_drafts, self._most_drafts)

    def pause(self) -> int:
        """How many plain tokens to make now; 0: guess."""
        num_tokens, self._pause = self._pause, 0
        return num_tokens

    def plain_token(self, seconds: float) -> None:
        """A plain token took so long."""
        self._plain.append(seconds)
        self._median = None
        self.counts.tokens += 1
        self.counts.seconds += seconds
        if self.counts.tokens % _MEASURED == 0 or len(self._plain) < _MEASURED:
            self.counts.plain_seconds_per_token = self.plain_seconds
        self._since_measured = 0
        self._history.pause = max(0, self._history.pause - 1)

    def round(self, seconds: float, num_tokens: int) -> None:
        """A round of guesses gave `num_tokens`."""
        self._count(seconds, num_tokens)
        self._num_rounds += 1
        self._since_measured += num_tokens
        if self._num_rounds <= _WARM_UP:
            lost = min(seconds, 10 * self.plain_seconds) - num_tokens * self.plain_seconds
            self._lost_warming_up += max(0.0, lost)
            return
        usual = median(each for each, _ in self._rounds) if self._rounds else seconds
        seconds = min(seconds, 3 * usual)  # the reader of the text may have taken a break
        self._rounds.append((seconds, num_tokens))
        self._lost = max(0.0, self._lost + seconds - num_tokens * self.plain_seconds)
        if self._is_losing():
            self._stop()
        elif self._since_measured >= _MEASURE_EVERY:
            self._plain.clear()
            self._median = None
            self._pause = _MEASURED
        elif not self._is_settled and len(self._rounds) >= _BEFORE_GROWING:
            self._try_more()

    def _is_losing(self) -> bool:
        if not self._plain:
            return False
        is_known = len(self._rounds) >= _ENOUGH or self._lost > _TOO_MUCH * self.plain_seconds
        return is_known and self._rate() * self.plain_seconds < 1

    def _stop(self) -> None:
        """Make plain tokens until what the trial lost is a small share of the time."""
        lost = self._lost + self._lost_warming_up
        pause = lost / (_COST_OF_TRIALS * max(self.plain_seconds, 1e-9))
        self._pause = self._history.pause = round(min(max(pause, _SHORTEST_PAUSE), _LONGEST_PAUSE))
        self._begin_with(_FIRST_DRAFTS)
        self._rate_before, self._is_settled = None, False
        self._lost = self._lost_warming_up = 0.0

    def _try_more(self) -> None:
        """Twice as many guesses while that is faster; half as many once it was not."""
        if self._rate_before is not None and self._rate() < self._rate_before:
            self._is_settled = True
            self._begin_with(self.num_drafts // 2)
        elif self.num_drafts >= self._most_drafts:
            self._is_settled = True
        else:
            self._rate_before = self._rate()
            self._begin_with(2 * self.num_drafts)

    def _begin_with(self, num_drafts: int) -> None:
        self._history.num_drafts = num_drafts
        self._rounds.clear()
        self._num_rounds = 0

    def _rate(self) -> float:
        """Tokens a second of the rounds looked at."""
        seconds, num_tokens = (sum(each) for each in zip(*self._rounds, strict=True))
        return num_tokens / max(seconds, 1e-9)

    def _count(self, seconds: float, num_tokens: int) -> None:
        self.counts.tokens += num_tokens
        self.counts.seconds += seconds
        self.counts.plain_seconds_per_token = self.plain_seconds
