"""Who decodes in a slot: one buffer a layer, in which the keys and values of many requests lie side by side.

How slots are stored and computed is in models/slots.py; here is who joins, who leaves, and who stays apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from ..decoding.batch_step import BatchStep
from ..decoding.pieces import steps_until_traced
from ..models.precision import runs_on_cpu
from ..models.slot_attention import has_kernel_for
from ..models.slot_sizes import LONGEST_IN_SLOTS, SIZES
from ..models.slot_step import fits_in_slots
from ..models.slots import SlotBank
from ..runtime import runtime_of
from .active import ActiveRequest
from .memory import BatchMemory

if TYPE_CHECKING:
    from ..models import Model

# Layers that differ, from which on their products have many shapes.
MANY_WIDTHS = 4


def slot_bank(model: Model) -> SlotBank:
    """An empty one, as the model's choices have it."""
    choices = model.choices
    # Prompts of a model that is on several machines, or whose experts are on disk, go through its layers by themselves.
    is_whole = runtime_of(model).residency is None and not model.is_followed and model.remote is None
    # Without the kernel, attention would copy what a slot holds for each of a prompt's tokens.
    is_fast = runs_on_cpu() or all(has_kernel_for(each.head_dim) for each in model.spec.layers)
    takes_prompts = choices.slots and choices.slot_kernel and choices.prompts_in_slots and is_whole and is_fast
    return SlotBank(model.spec, choices.spare_places, mx.eval, choices.slot_kernel, mx.synchronize, takes_prompts)


def warm_up(model: Model, step: BatchStep) -> None:
    """Compute what passes of requests in slots have, with MLX's CUDA backend: kernels are compiled, or chosen, at first use.

    A step of two requests that are nobody's, until it is traced; and the layers' products for all numbers of rows, on zeros.
    CUDA's library of products looks for the fastest kernel when a shape is new, which takes 0.3 to 0.5 ms (docs/LOG.md).
    Where every layer has a width of its own there are a hundred shapes for each number of rows, so that the first chunk of
    each length took 30 to 50 ms longer, while others waited for their tokens.
    """
    bank = slot_bank(model)
    if runs_on_cpu() or not (bank.takes_prompts and bank.is_in_place and mx.cuda.is_available()):
        return
    for owner in range(2):
        bank.join(owner, model.make_cache())
    for _ in range(steps_until_traced(model)):
        bank.begin()
        logits = step(mx.zeros(2, mx.uint32), [], bank)
        bank.end(logits)
        mx.eval(logits)
    # Packed ones have other kernels.
    is_packed = any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))
    if not is_packed and len(set(model.spec.layers)) >= MANY_WIDTHS:
        for count in SIZES:
            through_products(model, count)
    mx.clear_cache()


def through_products(model: Model, num_rows: int) -> None:
    """So many rows through all layers but for what they see of others."""
    x, positions = model.embed(mx.zeros(num_rows, mx.int32)), mx.zeros(num_rows)
    for layer in model.layers:
        queries, _ = layer.before_slots(x, positions)
        x = layer.after_attention(x, mx.zeros_like(queries))
    mx.eval(x)


def takes_prompt(bank: SlotBank, request: ActiveRequest, model: Model) -> bool:
    """Whether the prompt of a request is computed in a slot, where others run beside it."""
    return (
        bank.takes_prompts
        and request.turn is not None
        and request.is_plain
        and not request.wants_prompt_scores
        and not request.has_answered  # what it has answered is computed again apart
        and request.num_prompt_tokens <= LONGEST_IN_SLOTS
        and fits_in_slots(request.cache, model.spec)
    )


def is_to_join(request: ActiveRequest, model: Model) -> bool:
    """Whether a request that decodes could be in a slot, and is in none."""
    return request.bank is None and request.has_token_to_feed and fits_in_slots(request.cache, model.spec)


def join_prompts(bank: SlotBank, memory: BatchMemory, coming: Sequence[ActiveRequest], running: int) -> None:
    """Those whose prompts are to be computed in slots take theirs, as far as memory has room.

    coming: all of them, those that have one included. running: how many requests there are: the bank is made for all of them
    and for the longest of these prompts at once, where there is room, since a larger one would have to be copied into.
    """
    longest = max((each.num_prompt_tokens for each in coming), default=0)
    for each in coming:
        if each.bank is not None:
            continue
        if memory.has_slot_for(each, running - bank.num_owners, longest):
            each.join(bank, longest, running)
        elif memory.has_slot_for(each):
            each.join(bank)


def arrange_slots(
    model: Model,
    bank: SlotBank,
    memory: BatchMemory,
    decoding: Sequence[ActiveRequest],
    prompts: Sequence[ActiveRequest],
) -> list[ActiveRequest | None]:
    """Who has a token for its slot in the next pass, by slot; those join who can. Empty where slots are not used.

    prompts: who has a piece of its prompt in the pass, in a slot or not.
    """
    if not model.choices.slots:
        return []
    are_too_long = bank.longest > LONGEST_IN_SLOTS
    new = []
    for each in decoding:
        if each.bank is not None and (each.pending is None or each.replay or are_too_long):
            each.leave_slot()
        if is_to_join(each, model):
            new.append(each)
    if bank.num_owners + len(new) > 1:
        for each in sorted(new, key=lambda one: -one.position):  # the longest first: nobody is moved for it
            if memory.has_slot_for(each):
                each.join(bank)
    with_tokens = {each for each in decoding if each.bank is not None}
    if not with_tokens and all(each.bank is None for each in prompts):
        return []
    owners = [cast("ActiveRequest | None", owner) for owner in bank.owners]
    return [owner if owner in with_tokens else None for owner in owners]
