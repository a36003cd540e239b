"""The part of an adapter that belongs to one machine's layers, and as bytes of a message: no file, and no name of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..checkpoint.parts import part_name
from ..models.adapter_sets import Selection
from ..models.low_rank import Adapter, Pair
from .arrays import packed, unpacked
from .framing import LostConnectionError

_ARRAYS = ("a", "b", "magnitude")


def adapter_part(adapter: Adapter, start: int, stop: int) -> Adapter:
    """Of an adapter what is beside layers start ... stop - 1, and with the first part what is beside embedding and head."""
    pairs = {new: pair for name, pair in adapter.pairs.items() if (new := part_name(name, start, stop)) is not None}
    return replace(adapter, pairs=pairs)


def packed_adapter(name: str, id: str, adapter: Adapter) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes of an adapter."""
    described, pieces = [], []
    for target, pair in adapter.pairs.items():
        arrays: dict[str, Any] = {}
        for key in _ARRAYS:
            array = getattr(pair, key)
            if array is not None:
                arrays[key], data = packed(mx.contiguous(array))
                pieces.append(data)
        described.append([target, pair.scale, arrays])
    return {"op": "adapter", "name": name, "id": id, "ties_head": adapter.ties_head, "pairs": described}, b"".join(
        pieces
    )


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


def told(selection: Selection) -> dict[str, Any]:
    """What a pass says of the adapters that it uses: nothing without one, one id, or which of several ids each row has."""
    if selection.rows is not None:
        return {"adapters": list(selection.served.ids), "adapter_rows": selection.rows.rows.tolist()}
    return {} if selection.which is None else {"adapters": [selection.served.ids[selection.which]]}


def ids_of(header: Mapping[str, Any]) -> list[str | None]:
    """Which adapter each row of a pass has, or the one that all have. Raises LostConnectionError for what makes no sense."""
    ids, rows = header.get("adapters"), header.get("adapter_rows")
    if ids is None:
        return [None]
    try:
        if rows is None:
            [only] = ids
            return [str(only)]
        known = [None, *map(str, ids)]
        return [known[each] for each in rows if each >= 0]
    except (TypeError, ValueError, IndexError):
        raise LostConnectionError("What a pass says of adapters makes no sense.") from None
