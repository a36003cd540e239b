"""Many requests at once, measured: ours beside mlx-lm's in turns in one process, and what they do to one another.

A model of ours and one of mlx-lm's with the same weights (None: ours alone) are measured part by part, a row at a time as
it is known. Each part has a share of the seconds that there are, and what it leaves is the next one's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..engine.many import Engine
from ..errors import SettingError
from ..generate import stream_generate
from ..models.precision import runs_on_cpu
from .against import LEFT_OUT
from .request_rows import PARTS, SHARES, Row, Settings, number
from .request_runs import (
    Load,
    Timeline,
    Window,
    aligned_load,
    mixed_load,
    read_prompt,
    run_batches,
    run_engine,
    without_ends,
)

if TYPE_CHECKING:
    from ..models import Model

OURS, THEIRS = "ours", "mlx-lm"
# One after the other, so many requests say how fast that is.
MOST_IN_TURN = 8
# A run is given this part of what its part of the whole has, and so many seconds, however few are left.
LEAST_SHARE, LEAST_SECONDS = 0.25, 2.0
# A run is looked at from outside, and on a busy machine late: nobody may have come to an end meanwhile.
SLACK = 256
NO_TIME = "not measured, no time was left: give more --seconds"
# Tokens whose gaps are the usual ones, before a long prompt comes in.
USUAL_GAPS = 32


def run_parts(model: Model, other: Any, settings: Settings, say: Callable[[str], None]) -> Iterator[Row]:
    """All the rows, each as soon as it is known. other: mlx-lm's model of the same weights, or None.

    say: is told every sample as it comes, so that a run that is cut off leaves what it had. A part that fails is a row
    with an error. The model knows no end of text afterwards.
    """
    settings = fitting(without_ends(model), settings)
    end = time.perf_counter() + settings.seconds
    parts = [each for each in PARTS if each in settings.parts]
    for place, name in enumerate(parts):
        rest = sum(SHARES[each] for each in parts[place:])
        now = time.perf_counter()
        part = _Part(model, other, settings, say, now + max(0.0, end - now) * SHARES[name] / rest)
        try:
            yield from getattr(part, name)()
        except Exception as error:  # noqa: BLE001 - what fails must not end the others
            yield Row(name, name, "", error=f"{type(error).__name__}: {error}")
        mx.clear_cache()


def fitting(model: Model, settings: Settings) -> Settings:
    """With lengths that the context holds."""
    room = model.context_length
    changed = {
        "prompt_tokens": max(2, min(settings.prompt_tokens, room // 4)),
        "completion_tokens": max(2, min(settings.completion_tokens, room // 4)),
        "long_prompt": max(2, min(settings.long_prompt or (512 if runs_on_cpu() else 8192), room - 8)),
    }
    return Settings(**{**vars(settings), **changed})


class _Part:
    """The parts, and until when one may begin something."""

    def __init__(self, model: Model, other: Any, settings: Settings, say: Callable[[str], None], end: float) -> None:
        self.model, self.other, self.settings, self.say, self.end = model, other, settings, say, end
        self.whole = max(0.0, end - time.perf_counter())

    @property
    def left(self) -> float:
        """Seconds that a run may take."""
        return max(LEAST_SECONDS, LEAST_SHARE * self.whole, self.end - time.perf_counter())

    def rounds(self, sides: Sequence[str], end: float, most: int) -> Iterator[tuple[int, str]]:
        """Whose turn it is, and in which round; round 0 warms up. Who goes first alternates; none begins after the end but
        the first that counts.
        """
        for turn in range(most + 1):
            if turn > 1 and time.perf_counter() > end:
                return
            for side in sorted(sides, reverse=bool(turn % 2)):
                yield turn, side

    # --- N requests that decode together ------------------------------------------------------------------------------

    def decode(self) -> Iterator[Row]:
        numbers = list(self.settings.numbers)
        for place, count in enumerate(numbers):
            now = time.perf_counter()
            if place and now > self.end:
                yield Row("decode", f"{count:,}", "", error=NO_TIME)
                continue
            end = now + max(0.0, self.end - now) / (len(numbers) - place)
            try:
                yield self._decode_of(count, end)
            except Exception as error:  # noqa: BLE001 - what fails with many may go well with few
                yield Row("decode", f"{count:,}", "", error=f"{type(error).__name__}: {error}")

    def _decode_of(self, count: int, end: float) -> Row:
        """Ours first: mlx-lm's rows are as long as ours are then on average, and are there all at once."""
        settings, row = self.settings, Row("decode", f"{count:,}", "tokens/s")
        context = settings.prompt_tokens
        sides = [OURS] if self.other is None else [OURS, THEIRS]
        for turn in range(settings.rounds + 1):
            if turn > 1 and time.perf_counter() > end:
                break
            for side in sides[::-1] if turn and turn % 2 == 0 else sides:
                window = Window(settings.completion_tokens if turn else 4, LEFT_OUT if turn else 2)
                if side == OURS:
                    timeline = self._our_window(count, window)
                    context = settings.prompt_tokens + round(window.tokens_before)
                else:
                    timeline = self._their_window(count, window, context)
                if not self._count(row, turn, side, window, timeline):
                    return row
        row.note = f"at {context:,} to {context + settings.completion_tokens:,} tokens each"
        return row

    def _count(self, row: Row, turn: int, side: str, window: Window, timeline: Timeline) -> bool:
        """Take a sample. False where there is none, and there will be none."""
        if window.rate is not None:
            self.say(f"decode of {row.what}: {side} {window.rate:.4g} tokens/s{'' if turn else ' (warming up)'}")
            if turn:
                row.add(side, window.rate)
            return True
        if turn and side in row.samples:
            return True
        row.error = (
            f"{side}: some had ended before all had begun: ask for shorter prompts, or fewer requests"
            if timeline.is_complete
            else f"{side}: {_not_within(timeline)}"
        )
        return False

    def _our_window(self, count: int, window: Window) -> Timeline:
        settings = self.settings
        room = self.model.context_length - settings.prompt_tokens
        # The first ones decode while the others' prompts come in, in pieces of 16 tokens or more.
        lead = count * math.ceil(settings.prompt_tokens / 16)
        new_tokens = min(room, lead + 2 * window.left_out + window.wanted + SLACK)
        load = aligned_load(self.model, count, settings.prompt_tokens, new_tokens)
        return run_engine(self.model, load, self.left, window, max_running=count)

    def _their_window(self, count: int, window: Window, context: int) -> Timeline:
        prompt = aligned_load(self.model, 1, context, 1).prompts[0]
        caches = read_prompt(self.other, prompt[: max(1, context - window.left_out - 1)], count)
        load = aligned_load(self.model, count, 1, 2 * window.left_out + window.wanted + 8)
        return run_batches(self.other, load, self.left, window, max_running=count, caches=caches)

    # --- requests of many lengths -------------------------------------------------------------------------------------

    def mixed(self) -> Iterator[Row]:
        load = mixed_load(self.model, self.settings.num_mixed)
        rows = [
            Row("mixed", "until all are answered", "s"), Row("mixed", "median first token after", "s"),
            Row("mixed", "last first token after", "s"), Row("mixed", "most memory beside the weights", "MB"),
        ]  # fmt: skip
        rows[0].note = f"{load.num_prompt_tokens:,} tokens of prompts, {load.num_new_tokens:,} new ones"
        sides = [OURS] if self.other is None else [OURS, THEIRS]
        is_slow: set[str] = set()
        with Engine(self.model, None, None, len(load.prompts)) as engine:
            for turn, side in self.rounds(sides, self.end, self.settings.rounds):
                if side in is_slow:
                    continue
                timeline = (
                    self._answer(side, load, self.whole, engine)
                    if turn
                    # A GPU's kernels are compiled when they are first used, for lengths and numbers of rows too.
                    else self._answer(
                        side, load.first(4 if runs_on_cpu() else len(load.prompts), 8), LEAST_SHARE * self.whole, engine
                    )
                )
                if not turn:
                    continue
                if not timeline.is_complete:
                    is_slow.add(side)
                    if any(side in row.samples for row in rows):
                        continue  # a round before was complete
                self._count_mixed(rows, side, load, timeline)
        yield from rows

    def _answer(self, side: str, load: Load, seconds: float, engine: Engine) -> Timeline:
        seconds = max(LEAST_SECONDS, seconds)
        if side == OURS:
            return run_engine(self.model, load, seconds, running=engine)
        return run_batches(self.other, load, seconds)

    def _count_mixed(self, rows: Sequence[Row], side: str, load: Load, timeline: Timeline) -> None:
        seconds = timeline.seconds if timeline.given_up_after is None else timeline.given_up_after
        firsts = [min(each, seconds) for each in timeline.first_tokens]
        values = (seconds, statistics.median(firsts), max(firsts), timeline.peak_bytes / 1e6)
        for row, value in zip(rows, values, strict=True):
            row.add(side, value)
        if not timeline.is_complete:
            rows[0].at_least.add(side)
            rows[0].note += f"; {side} was given up after {timeline.num_tokens:,} of them"
            if max(timeline.first_tokens) == math.inf:
                rows[2].at_least.add(side)
            if statistics.median(timeline.first_tokens) == math.inf:
                rows[1].at_least.add(side)
        shown = ", ".join(f"{row.what} {number(value)} {row.unit}" for row, value in zip(rows, values, strict=True))
        self.say(f"{self.settings.num_mixed:,} requests: {side}: {shown}")

    # --- one request --------------------------------------------------------------------------------------------------

    def one(self) -> Iterator[Row]:
        settings = self.settings
        rate = Row("one", "decode", "tokens/s")
        first = Row("one", "first token after", "ms")
        tokens = min(2 * settings.completion_tokens, self.model.context_length - settings.prompt_tokens)
        load = aligned_load(self.model, 1, settings.prompt_tokens, tokens)
        with Engine(self.model, None) as engine:
            for turn, side in self.rounds(("engine", "alone"), self.end, 3 * settings.rounds):
                arrivals = self._one_by(side, load.prompts[0], tokens, engine)
                if not turn:
                    continue
                counted = arrivals[min(LEFT_OUT, len(arrivals) - 2) :]
                rate.add(side, (len(counted) - 1) / (counted[-1] - counted[0]))
                first.add(side, 1e3 * arrivals[0])
        for row in (rate, first):  # the engine over one alone
            row.samples = {side: row.samples[side] for side in ("engine", "alone")}
            yield row

    def _one_by(self, side: str, prompt: list[int], tokens: int, engine: Engine) -> list[float]:
        started = time.perf_counter()
        chunks = (
            stream_generate(self.model, None, prompt, max_tokens=tokens)
            if side == "alone"
            else engine.submit(prompt, max_tokens=tokens)
        )
        return [time.perf_counter() - started for _ in chunks]

    # --- a long prompt beside one that decodes ------------------------------------------------------------------------

    def gap(self) -> Iterator[Row]:
        length = self.settings.long_prompt
        row = Row("gap", f"a prompt of {length:,} tokens", "ms")
        whole = Row("gap", "until its first token", "s")
        with Engine(self.model, None) as engine:
            for turn, _ in self.rounds(("engine",), self.end, self.settings.rounds):
                longest, usual, seconds = self._gaps(engine, length if turn or not runs_on_cpu() else min(length, 256))
                if turn:
                    row.add("longest", 1e3 * longest)
                    row.add("usual", 1e3 * usual)
                    whole.add("beside it", seconds)
                    self.say(
                        f"a prompt of {length:,} tokens: longest gap {1e3 * longest:.4g} ms, usual {1e3 * usual:.4g} ms"
                    )
        yield row
        yield whole

    def _gaps(self, engine: Engine, length: int) -> tuple[float, float, float]:
        """The longest gap of a decoder while a prompt comes in, its median gap before, and how long the prompt took."""
        load = aligned_load(self.model, 1, min(64, self.model.context_length // 4), 1)
        long = aligned_load(self.model, 1, length, 2, seed=1)
        decoder = engine.submit(load.prompts[0], max_tokens=self.model.context_length - len(load.prompts[0]))
        try:
            times = [time.perf_counter() for _ in zip(range(LEFT_OUT + USUAL_GAPS), decoder, strict=False)]
            asked, handle = time.perf_counter(), engine.submit(long.prompts[0], max_tokens=2)
            during = [times[-1]]
            arrived = None
            for _ in decoder:
                during.append(time.perf_counter())
                if arrived is None and not handle.channel.items.empty():
                    arrived = during[-1]
                if handle.is_done:
                    break
            else:
                raise SettingError("The request that decodes came to its end first: ask for a shorter long_prompt.")
            next(handle)  # raises what went wrong with it
        finally:
            decoder.cancel()
        return max(_gaps_of(during)), statistics.median(_gaps_of(times[LEFT_OUT:])), (arrived or during[-1]) - asked

    # --- together, and one after the other ----------------------------------------------------------------------------

    def together(self) -> Iterator[Row]:
        settings, end = self.settings, self.end
        numbers = [each for each in settings.numbers if each > 1]
        for place, count in enumerate(numbers):
            now = time.perf_counter()
            if place and now > end:
                yield Row("together", f"{count:,}", "", error=NO_TIME)
                continue
            yield self._together(count, now + max(0.0, end - now) / (len(numbers) - place))

    def _together(self, count: int, end: float) -> Row:
        settings, row = self.settings, Row("together", f"{count:,}", "tokens/s")
        load = aligned_load(self.model, count, settings.prompt_tokens, settings.completion_tokens)
        for turn, side in self.rounds(("together", "in turn"), end, settings.rounds):
            if turn == 0 and side == "in turn" and "one" in settings.parts:
                continue  # that has been done before
            if side == "together":
                timeline = run_engine(self.model, load if turn else load.first(count, 4), self.left, max_running=count)
                if not timeline.is_complete:
                    row.error = _not_within(timeline)
                    return row
                rate = timeline.num_tokens / timeline.seconds
            else:
                rate = self._in_turn(load if turn else load.first(1, 4))
            if turn:
                row.add(side, rate)
                self.say(f"{count:,} requests {side}: {rate:.4g} tokens/s")
        row.samples = {side: row.samples[side] for side in ("together", "in turn")}
        return row

    def _in_turn(self, load: Load) -> float:
        started, count = time.perf_counter(), 0
        pairs = list(zip(load.prompts, load.new_tokens, strict=True))[:MOST_IN_TURN]
        for prompt, new_tokens in pairs:
            for _ in stream_generate(self.model, None, prompt, max_tokens=new_tokens):
                count += 1
        return count / (time.perf_counter() - started)


def _gaps_of(times: Sequence[float]) -> list[float]:
    return [later - sooner for sooner, later in pairwise(times)]


def _not_within(timeline: Timeline) -> str:
    return f"not within {timeline.given_up_after:.0f} s: give more --seconds"
