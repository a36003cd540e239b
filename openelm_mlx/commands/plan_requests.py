"""What `plan --requests N` prints: how many requests of which length fit at once, how long each may be, and how fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..memory.plan_types import MemoryPlan
    from ..memory.together import ExpertReads, Together


def request_lines(plan: MemoryPlan) -> list[str]:
    """The table, what was asked for in a sentence, and what it costs to have experts on disk."""
    found = plan.requests
    if found is None:
        return []
    lines = ["  requests at once" + _with_experts(plan)]
    lines += [f"    {line}" for line in _table(found)]
    lines += [f"    ({each})" for each in _about(plan, found)]
    return lines


def _with_experts(plan: MemoryPlan) -> str:
    return "" if plan.expert_slots is None else f", with {plan.expert_slots} of each layer's experts in memory"


def _table(found: Together) -> list[str]:
    from ..memory.admission import MOST_REQUESTS

    rows = [("tokens each", "fit at once", "tokens/s in all", "for each")]
    for fit in found.lengths:
        most = "none" if not fit.most else f"{fit.most:,}" + (" or more" if fit.most == MOST_REQUESTS else "")
        in_all, each = ("-" if not speed else f"{speed}" for speed in (fit.decode_total, fit.decode))
        rows.append((f"{fit.num_tokens:,}", most, in_all, each))
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True)]


def _about(plan: MemoryPlan, found: Together) -> list[str]:
    """Sentences under the table."""
    from ..checks import size

    count = found.num_requests
    what = "one request" if count == 1 else f"{count:,} requests"
    if not found.longest:
        return [f"not even a token fits for {what}"]
    lines = [f"{what}: {'' if count == 1 else 'each '}up to {found.longest:,} tokens of prompt and answer"]
    if found.mixture is not None:
        mixture = found.mixture
        others = "another one" if mixture.num_others == 1 else f"{mixture.num_others:,} others"
        lines[0] += f"; or one of up to {mixture.longest:,} beside {others} of {mixture.others:,}"
    if count > 1 and found.decode is not None:
        lines.append(
            f"{what} of {plan.context_length:,} tokens: {found.decode_total} tokens/s in all, {found.decode} for each; one "
            f"alone: {found.alone}"
        )
    if found.reads is not None and found.reads_alone is not None:
        lines.append(_reads(plan, found.reads))
        if count > 1:
            lines.append(_reads(plan, found.reads_alone))
    if plan.fits:
        lines.append(
            f"prompts kept for later ones have up to {size(found.kept_bytes)} beside these; requests go before them"
        )
    return lines


def _reads(plan: MemoryPlan, reads: ExpertReads) -> str:
    """What a step costs where experts are on disk."""
    from ..checks import size
    from ..memory.rates import number

    assert plan.machine is not None
    rows = "one request" if reads.rows == 1 else f"{reads.rows:,} requests"
    text = (
        f"experts on disk: the next token of {rows} chooses {reads.touched:.1f} of each layer's experts, of which "
        f"{reads.missing:.1f} are not in memory: {size(reads.num_bytes)} to read"
    )
    if reads.slow is None or reads.fast is None:
        return text
    return f"{text}, {number(reads.fast)} to {number(reads.slow)} s"
