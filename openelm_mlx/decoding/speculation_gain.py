"""Whether speculative decoding gains time: measured seconds per token with and without drafts, and the decision."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

# Rounds averaged together; the first after a pause, or with more drafts than before, may compile kernels: left out.
_ROUNDS, _WARM_UP = 12, 1
# How many rounds decide whether drafts gain, unless this many plain steps' time is lost before.
_ENOUGH, _TOO_MUCH = 3, 1.5
# The first trial drafts this many tokens, so that it costs little; more are tried while it gains.
_FIRST_DRAFTS = 2
_BEFORE_GROWING = 4
# Trials may cost this share of the total time: the pause after a lost trial is as long as that requires.
_COST_OF_TRIALS = 0.012
_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 4096
# Plain steps get slower as the context grows, so they are measured again after this many tokens.
_MEASURE_EVERY, _MEASURED = 512, 8


@dataclass
class DraftHistory:
    """What one request leaves to the next: how many plain tokens remain of a pause, and how many tokens to draft."""

    pause: int = 0
    num_drafts: int = _FIRST_DRAFTS


@dataclass
class Counts:
    """Drafted and accepted tokens of one request. seconds: from its first plain step on."""

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    tokens: int = 0
    seconds: float = 0.0
    plain_seconds_per_token: float = 0.0

    @property
    def speedup(self) -> float | None:
        """Speed relative to plain steps alone, as far as measured; None before any measurement."""
        if not self.seconds or not self.plain_seconds_per_token:
            return None
        return self.plain_seconds_per_token * self.tokens / self.seconds


class Gain:
    """Measures plain tokens and rounds of drafts, and decides how many plain tokens come next and how many to draft.

    most_drafts: the limit. history: of earlier requests.
    """

    def __init__(self, most_drafts: int, history: DraftHistory | None = None) -> None:
        self.counts = Counts()
        self._most_drafts = most_drafts
        self._history = DraftHistory() if history is None else history
        self._plain: deque[float] = deque(maxlen=32)
        self._median: float | None = None  # computed when needed, which is not for every token
        self._rounds: deque[tuple[float, int]] = deque(maxlen=_ROUNDS)
        self._num_rounds = 0  # since the last pause, or since the number of drafts changed
        self._lost = self._lost_warming_up = 0.0
        self._since_measured = 0
        self._pause = max(_MEASURED, self._history.pause)
        self._rate_before: float | None = None  # tokens a second with fewer drafts
        self._is_settled = False

    @property
    def plain_seconds(self) -> float:
        """The median seconds of a plain token, which single disturbances do not change."""
        if self._median is None:
            self._median = median(self._plain) if self._plain else 0.0
        return self._median

    @property
    def num_drafts(self) -> int:
        """How many tokens to draft in a round."""
        return min(self._history.num_drafts, self._most_drafts)

    def pause(self) -> int:
        """How many plain tokens to generate now; 0: draft."""
        num_tokens, self._pause = self._pause, 0
        return num_tokens

    def plain_token(self, seconds: float) -> None:
        """Note the time of a plain token."""
        self._plain.append(seconds)
        self._median = None
        self.counts.tokens += 1
        self.counts.seconds += seconds
        if self.counts.tokens % _MEASURED == 0 or len(self._plain) < _MEASURED:
            self.counts.plain_seconds_per_token = self.plain_seconds
        self._since_measured = 0
        self._history.pause = max(0, self._history.pause - 1)

    def round(self, seconds: float, num_tokens: int) -> None:
        """Note the time of a round of drafts that gave `num_tokens`."""
        self._count(seconds, num_tokens)
        self._num_rounds += 1
        self._since_measured += num_tokens
        if self._num_rounds <= _WARM_UP:
            lost = min(seconds, 10 * self.plain_seconds) - num_tokens * self.plain_seconds
            self._lost_warming_up += max(0.0, lost)
            return
        usual = median(each for each, _ in self._rounds) if self._rounds else seconds
        seconds = min(seconds, 3 * usual)  # the caller may have paused
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
        """Pause until the time lost by the trial is a small share of the total."""
        lost = self._lost + self._lost_warming_up
        pause = lost / (_COST_OF_TRIALS * max(self.plain_seconds, 1e-9))
        self._pause = self._history.pause = round(min(max(pause, _SHORTEST_PAUSE), _LONGEST_PAUSE))
        self._begin_with(_FIRST_DRAFTS)
        self._rate_before, self._is_settled = None, False
        self._lost = self._lost_warming_up = 0.0

    def _try_more(self) -> None:
        """Double the number of drafts while that is faster; halve it once it was not."""
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
        """Tokens a second of the latest rounds."""
        seconds, num_tokens = (sum(each) for each in zip(*self._rounds, strict=True))
        return num_tokens / max(seconds, 1e-9)

    def _count(self, seconds: float, num_tokens: int) -> None:
        self.counts.tokens += num_tokens
        self.counts.seconds += seconds
        self.counts.plain_seconds_per_token = self.plain_seconds
