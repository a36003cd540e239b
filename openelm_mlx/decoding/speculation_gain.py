"""Whether guessing ahead pays: measured seconds a token of both ways, and the decision that follows. No arrays."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

# Rounds looked at together; the first of them compile kernels and are left out.
_ROUNDS, _WARM_UP = 12, 1
_ENOUGH = 3
# Trials may cost this share of the time in all: a trial that lost is followed by so long a pause.
_COST_OF_TRIALS = 0.012
_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 4096
# Plain steps get slower as the context grows, so they are measured again after so many tokens.
_MEASURE_EVERY, _MEASURED = 512, 8


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
    """Hears how long plain tokens and rounds took, and says how many plain tokens come next."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._plain: deque[float] = deque(maxlen=32)
        self._rounds: deque[tuple[float, int]] = deque(maxlen=_ROUNDS)
        self._num_rounds = 0  # since the last pause
        self._lost = 0.0
        self._since_measured = 0
        self._pause = _MEASURED

    @property
    def plain_seconds(self) -> float:
        """Seconds a plain token takes; a disturbance now and then does not move it."""
        return median(self._plain) if self._plain else 0.0

    def pause(self) -> int:
        """How many plain tokens to make now; 0: guess."""
        num_tokens, self._pause = self._pause, 0
        return num_tokens

    def plain_token(self, seconds: float) -> None:
        """A plain token took so long."""
        self._plain.append(seconds)
        self._count(seconds, 1)
        self._since_measured = 0

    def round(self, seconds: float, num_tokens: int) -> None:
        """A round of guesses gave `num_tokens`."""
        self._count(seconds, num_tokens)
        self._num_rounds += 1
        self._since_measured += num_tokens
        if self._num_rounds <= _WARM_UP:
            self._lost = max(0.0, min(seconds, 10 * self.plain_seconds) - num_tokens * self.plain_seconds)
            return
        usual = median(each for each, _ in self._rounds) if self._rounds else seconds
        seconds = min(seconds, 3 * usual)  # the reader of the text may have taken a break
        self._rounds.append((seconds, num_tokens))
        self._lost = max(0.0, self._lost + seconds - num_tokens * self.plain_seconds)
        if self._is_losing():
            pause = self._lost / (_COST_OF_TRIALS * max(self.plain_seconds, 1e-9))
            self._pause = round(min(max(pause, _SHORTEST_PAUSE), _LONGEST_PAUSE))
            self._rounds.clear()
            self._num_rounds, self._lost = 0, 0.0
        elif self._since_measured >= _MEASURE_EVERY:
            self._plain.clear()
            self._pause = _MEASURED

    def _is_losing(self) -> bool:
        if not self._plain:
            return False
        seconds, num_tokens = (sum(each) for each in zip(*self._rounds, strict=True))
        is_known = len(self._rounds) >= _ENOUGH or self._lost > _ENOUGH * self.plain_seconds
        return is_known and seconds > num_tokens * self.plain_seconds

    def _count(self, seconds: float, num_tokens: int) -> None:
        self.counts.tokens += num_tokens
        self.counts.seconds += seconds
        self.counts.plain_seconds_per_token = self.plain_seconds
