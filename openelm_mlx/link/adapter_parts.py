"""The part of an adapter that belongs to one machine's layers, and as bytes of a message: no file, and no name of one.

Among machines an adapter is known by a number, which no other one ever has: its name here may become another one's while a
request still uses it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, final

import mlx.core as mx

from ..checkpoint.parts import part_name
from ..checks import size as shown_size
from ..errors import MemoryLimitError
from ..models.adapter_sets import Selection
from ..models.low_rank import Adapter, Pair
from .arrays import packed, unpacked
from .framing import LostConnectionError
from .handshake import LARGEST_BODY

_ARRAYS = ("a", "b", "magnitude")


class AdapterKeeper(Protocol):
    """Who has the workers (link/chain.py)."""

    def forget_adapter(self, number: int) -> None:
        """An adapter is not needed any more. Any thread may call it, at any time."""


@final
class KeptAdapter:
    """What the workers have of an adapter. They give it up when nobody has this any more: no pass, and no set of adapters."""

    def __init__(self, keeper: AdapterKeeper, number: int) -> None:
        self._keeper, self.number = weakref.ref(keeper), number  # the keeper knows the set that has this

    def __del__(self) -> None:
        keeper = self._keeper()
        if keeper is not None:
            keeper.forget_adapter(self.number)


def adapter_part(adapter: Adapter, start: int, stop: int) -> Adapter:
    """Of an adapter what is beside layers start ... stop - 1, and with the first part what is beside embedding and head."""
    pairs = {new: pair for name, pair in adapter.pairs.items() if (new := part_name(name, start, stop)) is not None}
    return replace(adapter, pairs=pairs)


def packed_adapter(name: str, number: int, adapter: Adapter, is_planned: bool) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes of an adapter, under its number; the name is for errors.

    is_planned: a worker's plan counts it already. Raises MemoryLimitError where it is more than a message may have.
    """
    nbytes = adapter.nbytes
    if nbytes > LARGEST_BODY:
        raise MemoryLimitError(
            f"The adapter {name} has {shown_size(nbytes)} for the layers of one worker, and {shown_size(LARGEST_BODY)} are the "
            "most that is sent: give one of a smaller rank."
        )
    described, pieces = [], []
    for target, pair in adapter.pairs.items():
        arrays: dict[str, Any] = {}
        for key in _ARRAYS:
            array = getattr(pair, key)
            if array is not None:
                arrays[key], data = packed(mx.contiguous(array))
                pieces.append(data)
        described.append([target, pair.scale, arrays])
    header = {
        "op": "adapter", "name": name, "number": number, "is_planned": is_planned, "ties_head": adapter.ties_head,
        "pairs": described,
    }  # fmt: skip
    return header, b"".join(pieces)


def unpacked_adapter(header: Mapping[str, Any], body: memoryview) -> Adapter:
    """The adapter of a message. Raises LostConnectionError when it is not one."""
    pairs, at = {}, 0
    try:
        for target, scale, arrays in header["pairs"]:
            found: dict[str, mx.array] = {}
            for key in _ARRAYS:
                if key in arrays:
                    size = {"float32": 4, "float16": 2, "bfloat16": 2}[arrays[key]["dtype"]]
                    stop = at + size * math.prod(arrays[key]["shape"])
                    found[key] = unpacked(arrays[key], body[at:stop])
                    at = stop
            pairs[str(target)] = Pair(found["a"], found["b"], float(scale), found.get("magnitude"))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LostConnectionError):
            raise
        raise LostConnectionError(f"What should be an adapter is none: {error}.") from None
    return Adapter(pairs, ties_head=header.get("ties_head") is True)


def adapters_header(selection: Selection) -> dict[str, Any]:
    """What a pass says of the adapters that it uses: nothing, one number, or which of several numbers each row has."""
    numbers = [each.number for each in selection.served.kept]
    if selection.rows is not None:
        return {"adapters": numbers, "adapter_rows": selection.rows.rows.tolist()}
    return {} if selection.which is None else {"adapters": [numbers[selection.which]]}


def adapter_ids_of(header: Mapping[str, Any]) -> list[str | None]:
    """Which adapter each row of a pass has, or the one that all have, as a worker's set knows it.

    Raises LostConnectionError for what makes no sense.
    """
    numbers, rows = header.get("adapters"), header.get("adapter_rows")
    if numbers is None:
        return [None]
    try:
        if rows is None:
            [only] = numbers
            return [str(only)]
        known = [None, *map(str, numbers)]
        return [known[each] for each in rows if each >= 0]
    except (TypeError, ValueError, IndexError):
        raise LostConnectionError("What a pass says of adapters makes no sense.") from None
