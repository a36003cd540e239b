"""What a step's pass is made of: everybody's tokens, in the order of the flat rows, and who chooses the next ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, final

import mlx.core as mx

from ..decoding.batch_sampling import SamplerGroup
from ..decoding.batch_step import BatchStep
from ..decoding.prefill import chunk_throttle, is_throttled, lock_of
from ..models.adapter_sets import Selection
from ..models.cores import compute_at_once, num_cores
from ..models.precision import runs_on_cpu
from ..models.prompt_products import num_padding
from ..models.rows import Rows, flat_logits
from ..models.slot_sizes import rows_for
from ..models.slots import SlotBank
from ..runtime import runtime_of
from .active import ActiveRequest, Pending
from .scheduler import shared_among

if TYPE_CHECKING:
    from ..models import Model


@dataclass
class Part:
    """One request's share of a pass.

    tokens: a scalar or (n,); None where they are its pending one. offset: how many of its tokens had been computed before.
    is_prompt: whether they are a piece of its prompt. slot: where it is in a bank of slots; None: it has its own cache.
    """

    request: ActiveRequest
    rows: Rows
    offset: int
    tokens: mx.array | None = None
    is_prompt: bool = False
    slot: int | None = None


def decoding_part(request: ActiveRequest, tokens: mx.array | None = None) -> Part:
    """One or a few tokens of a request that decodes."""
    length = 1 if tokens is None or tokens.ndim == 0 else tokens.size
    return Part(request, Rows(request.cache, length), request.cache[0].offset, tokens)


def prompt_part(request: ActiveRequest, length: int) -> Part:
    """The next piece of a request's prompt."""
    is_last = len(request.job.chunks) == 1 and request.job.chunks[0] == length
    # Where all of a prompt's logits are wanted, it is no prompt for the pass, but tokens like those of a draft.
    rows = Rows(request.cache, length, not request.wants_prompt_scores, is_last)
    slot = None if request.bank is None else request.bank.slot_of(request)
    return Part(request, rows, request.position, mx.array(request.prompt_piece(length)), True, slot)


def parts_beside_slots(decoding: Sequence[ActiveRequest], prompts: Sequence[tuple[ActiveRequest, int]]) -> list[Part]:
    """What everybody brings to the next pass but those who decode in slots, plain requests first."""
    apart = [each for each in decoding if each.bank is None]
    parts = [decoding_part(each) for each in apart if each.has_token_to_feed]
    for each in apart:
        if each.replay:
            parts.append(decoding_part(each, mx.array(each.replay[0])))
        elif each.forward is not None:
            parts.append(decoding_part(each, each.forward.tokens))
    return [*parts, *(prompt_part(*each) for each in prompts)]


def compute(
    model: Model,
    step: BatchStep,
    bank: SlotBank,
    in_slots: Sequence[ActiveRequest | None],
    parts: Sequence[Part],
) -> mx.array | None:
    """The logits (R, V) of the rows that want any; None where none does. A prompt's keys and values are evaluated.

    in_slots: who has a token for its slot of `bank`; empty where nobody in a slot has anything to compute. Their logits, one
    row for each slot, stand before those of `parts` that are in no slot.
    """
    apart = [each for each in parts if each.slot is None]
    pieces = [each for each in parts if each.slot is not None]
    prompts = [each for each in apart if each.is_prompt]
    used, rows = bank if in_slots else None, [each.rows for each in apart]
    num_rows = len(in_slots) + sum(each.rows.length for each in apart) + sum(each.rows.length - 1 for each in pieces)
    padding = _padding(model, num_rows, bool(pieces)) if pieces or any(each.rows.length > 1 for each in prompts) else 0
    padding_in_slots = padding if pieces else 0
    tokens = joined_tokens(in_slots, parts, padding_in_slots)
    total = sum(each.rows.length for each in (*prompts, *pieces))
    shares = shared_among([each.length for each in rows], num_shares(model))
    with lock_of(model):
        if used is not None:
            used.begin(_counts(in_slots, pieces), padding_in_slots)
        if len(shares) > 1:
            logits = _on_all_cores(model, tokens, rows, shares)
        elif padding or any(each.rows.length > 1 for each in (*prompts, *pieces)):
            throttle = chunk_throttle([each.rows.cache for each in (*prompts, *pieces)], total)
            logits = flat_logits(model, tokens, rows, throttle, used, padding - padding_in_slots)
        else:
            logits = step(tokens, rows, used)
        if pieces and bank.is_in_place and not any(in_slots) and all(each.is_prompt for each in apart):
            mx.eval(logits)  # which nobody else waits for; what is written in place is an effect of computing them
        if prompts or (pieces and not bank.is_in_place):
            mx.eval(
                [layer.buffers for each in prompts for layer in each.rows.cache],
                bank.buffers if pieces else [],
            )
        if used is not None:
            used.end(logits)
    if prompts and is_throttled(total):
        mx.clear_cache()
    return logits


def _counts(in_slots: Sequence[ActiveRequest | None], pieces: Sequence[Part]) -> list[int]:
    """How many tokens each slot is given."""
    counts = [int(each is not None) for each in in_slots]
    for each in pieces:
        counts[_slot_of(each)] = each.rows.length
    return counts


def requests_of_rows(
    in_slots: Sequence[ActiveRequest | None], parts: Sequence[Part]
) -> list[tuple[ActiveRequest | None, int]]:
    """Whose rows stand where in a pass, and how many each time: the slots, what they are given beside, and who is in none."""
    first = list(in_slots)
    pieces = sorted((each for each in parts if each.slot is not None), key=_slot_of)
    for each in pieces:
        first[_slot_of(each)] = each.request
    return [
        *((request, 1) for request in first),
        *((each.request, each.rows.length - 1) for each in pieces),
        *((each.request, each.rows.length) for each in parts if each.slot is None),
    ]


def _slot_of(part: Part) -> int:
    assert part.slot is not None
    return part.slot


def num_shares(model: Model) -> int:
    """How many cores a pass is shared among, if it has as many requests.

    One on a GPU and where requests have slots, and where a pass has to stay whole: experts on disk are read for all of it,
    and other machines compute it.
    """
    are_apart = runs_on_cpu() and not model.choices.slots
    is_whole = runtime_of(model).residency is not None or model.is_followed
    return num_cores() if are_apart and not is_whole else 1


def _on_all_cores(
    model: Model, tokens: mx.array, rows: Sequence[Rows], shares: Sequence[Sequence[int]]
) -> mx.array | None:
    """The logits of all rows, each of the shares computed on a core of its own: a row's bits are the same in any company.

    shares: for each core, which of `rows`.
    """
    selection = model.adapters.selection
    starts = [0, *accumulate(each.length for each in rows)]
    works: list[Callable[[], mx.array | None]] = []
    inputs: list[Any] = [layer.buffers for each in rows for layer in each.cache]
    for share in shares:
        places = [place for at in share for place in range(starts[at], starts[at + 1])]
        own, chosen = tokens[mx.array(places)], selection.taking(places)
        inputs += [own, [] if chosen.rows is None else chosen.rows.rows]
        works.append(partial(_share_of_pass, model, own, [rows[at] for at in share], chosen))
    # Whoever computes a share cannot evaluate what is to be computed on this thread's stream.
    mx.eval(inputs)
    found = [each for each in compute_at_once(works) if each is not None]
    if not found:
        return None
    # Where each row's logits stand now, in the order of the rows.
    first = [0, *accumulate(each.num_logits for each in rows)]
    order = [place for share in shares for at in share for place in range(first[at], first[at + 1])]
    logits = mx.concatenate(found)
    if order == sorted(order):
        return logits
    return logits[mx.array(sorted(range(len(order)), key=order.__getitem__))]


def _share_of_pass(model: Model, tokens: mx.array, rows: Sequence[Rows], selection: Selection) -> mx.array | None:
    """The logits of one share, evaluated, and what it writes.

    It is throttled whatever it has: MLX lets about a hundred operations be on their way in all of a process, and a core whose
    share is dispatched at once would leave none to the others.
    """
    with model.adapters.using(selection):
        logits = flat_logits(model, tokens, rows, chunk_throttle([each.cache for each in rows], tokens.size))
        mx.eval([] if logits is None else logits, [layer.buffers for each in rows for layer in each.cache])
    return logits


def _padding(model: Model, num_rows: int, are_in_slots: bool) -> int:
    """How many rows that are nobody's a pass of so many gets (`KernelChoices.pads_rows`)."""
    is_plain = runtime_of(model).residency is None and model.adapters.selection.rows is None and not model.is_followed
    if not (model.choices.pads_rows and is_plain):
        return 0
    return rows_for(num_rows) - num_rows if are_in_slots else num_padding(num_rows)


def joined_tokens(in_slots: Sequence[ActiveRequest | None], parts: Sequence[Part], padding: int = 0) -> mx.array:
    """All the tokens (M,), in the order of `requests_of_rows`; any token for a slot that has none.

    padding: so many more for slots, before those who are in none. Those that were chosen together stay together: where
    nobody came or went, they are the last choice as it is.
    """
    together = None if parts else _chosen_together(in_slots)
    if together is not None:
        return together
    vectors: list[mx.array] = []
    starts: dict[int, int] = {}
    places: list[int] = []

    def place(vector: mx.array, at: int, count: int) -> None:
        if id(vector) not in starts:
            starts[id(vector)] = sum(each.size for each in vectors)
            vectors.append(vector)
        places.extend(range(starts[id(vector)] + at, starts[id(vector)] + at + count))

    pieces = {_slot_of(part): part for part in parts if part.slot is not None}
    for slot, request in enumerate(in_slots):
        if slot in pieces:
            place(_tokens_of(pieces[slot]), 0, 1)
        elif request is None:
            places.append(0)
        else:
            assert request.pending is not None
            place(request.pending.tokens, request.pending.at, 1)
    for slot in sorted(pieces):
        place(_tokens_of(pieces[slot]), 1, pieces[slot].rows.length - 1)
    places += [0] * padding
    for part in parts:
        if part.slot is not None:
            continue
        pending = part.request.pending
        if part.tokens is not None:
            place(part.tokens, 0, part.rows.length)
        else:
            assert pending is not None
            place(pending.tokens, pending.at, 1)
    vectors = [vector if vector.ndim else vector[None] for vector in vectors]
    if len({vector.dtype for vector in vectors}) > 1:
        vectors = [vector.astype(mx.uint32) for vector in vectors]
    tokens = vectors[0] if len(vectors) == 1 else mx.concatenate(vectors)
    return tokens if places == list(range(tokens.size)) else tokens[mx.array(places)]


def _tokens_of(part: Part) -> mx.array:
    assert part.tokens is not None
    return part.tokens


def _chosen_together(in_slots: Sequence[ActiveRequest | None]) -> mx.array | None:
    """The pending tokens of everybody where they are one array (M,) in this order; else None."""
    tokens = None
    for at, request in enumerate(in_slots):
        pending = None if request is None else request.pending
        if pending is None or pending.at != at:
            return None
        if tokens is None:
            tokens = pending.tokens
        elif pending.tokens is not tokens:
            return None
    return tokens if tokens is not None and tokens.ndim and tokens.size == len(in_slots) else None


def pending_arrays(requests: Sequence[ActiveRequest]) -> list[mx.array]:
    """What is to be computed of the pending tokens; those that were chosen together are one array."""
    found: list[mx.array] = []
    for each in requests:
        pending = each.pending
        if pending is None or (found and pending.tokens is found[-1] and pending.choice is pending.is_finite is None):
            continue
        found += pending.arrays
    return found


@final
class SamplerGroups:
    """The samplers of plain requests, by form, for as long as the same requests stand in the same order."""

    def __init__(self) -> None:
        self._requests: list[ActiveRequest | None] = []
        self._groups: list[tuple[SamplerGroup, list[ActiveRequest], list[int]]] = []

    def arrange(self, requests: Sequence[ActiveRequest | None]) -> None:
        """For these requests, in the order of their rows; None for a row that is nobody's."""
        mine = self._requests
        if len(mine) == len(requests) and all(a is b for a, b in zip(mine, requests, strict=True)):
            return
        self.release()
        by_form: dict[object, list[int]] = {}
        for row, each in enumerate(requests):
            if each is not None:
                by_form.setdefault(each.sampler_form, []).append(row)
        self._requests = list(requests)
        for rows in by_form.values():
            members = [each for row in rows if (each := requests[row]) is not None]
            self._groups.append((SamplerGroup([each.sampler for each in members]), members, rows))

    def choose(self, logits: mx.array) -> Iterator[tuple[ActiveRequest, Pending]]:
        """The next token of each, from its own row of the logits (n, V)."""
        for group, members, rows in self._groups:
            mine = logits if len(rows) == logits.shape[0] else logits[mx.array(rows)]
            tokens = group(mine)
            for at, request in enumerate(members):
                scores = request.scored(mine, at, tokens) if request.wants_scores else None
                yield request, Pending(tokens, at, scores)

    def release(self) -> None:
        """Give the samplers their own state back."""
        for group, *_ in self._groups:
            group.release()
        self.forget()

    def forget(self) -> None:
        """As `release`, for samplers that are not used any more."""
        self._requests, self._groups = [], []

    def leave(self, request: ActiveRequest) -> None:
        """One of them goes."""
        if request in self._requests:
            self.release()
