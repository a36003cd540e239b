"""Who decodes in a slot: one buffer a layer, in which the keys and values of many requests lie side by side.

How slots are stored and computed is in models/slots.py; here is who joins, who leaves, and who stays apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from ..models.slots import LONGEST_IN_SLOTS, SlotBank, fits_in_slots
from .active import ActiveRequest
from .memory import BatchMemory

if TYPE_CHECKING:
    from ..models import Model


def slot_bank(model: Model) -> SlotBank:
    """An empty one, as the model's choices have it."""
    choices = model.choices
    return SlotBank(model.spec, choices.spare_places, mx.eval, choices.slot_kernel, mx.synchronize)


def arrange_slots(
    model: Model, bank: SlotBank, memory: BatchMemory, decoding: Iterable[ActiveRequest]
) -> list[ActiveRequest | None]:
    """Who has a token for its slot in the next pass, by slot; those join who can. Empty where slots are not used."""
    if not model.choices.slots:
        return []
    are_too_long = bank.longest > LONGEST_IN_SLOTS
    new = []
    for each in decoding:
        if each.bank is not None and (each.pending is None or each.replay or are_too_long):
            each.leave_slot()
        if each.bank is None and each.has_token_to_feed and fits_in_slots(each.cache, model.spec):
            new.append(each)
    if bank.num_owners + len(new) > 1:
        for each in sorted(new, key=lambda one: -one.position):  # the longest first: nobody is moved for it
            if memory.has_slot_for(each):
                each.join(bank)
    if not bank.num_owners:
        return []
    return [cast("ActiveRequest | None", owner) for owner in bank.owners]
