"""Writing a state_dict as `torch.save` does, without PyTorch: an archive of one pickle and the tensors' bytes.

The pickle is put together from its opcodes (Python's pickletools describes them), because Python's own pickler would want
to import PyTorch for the names in it.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import mlx.core as mx
import numpy as np

_STORAGES = {mx.float32: "FloatStorage", mx.float16: "HalfStorage", mx.bfloat16: "BFloat16Storage"}
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_MARK, _TUPLE, _REDUCE, _PERSISTENT_ID, _SET_ITEMS, _FALSE, _STOP = b"(", b"t", b"R", b"Q", b"u", b"\x89", b"."


def torch_file(stream: BinaryIO, tensors: Mapping[str, mx.array]) -> None:
    """Write these tensors, float32, float16 or bfloat16, by name; their bytes one tensor after the other."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle(tensors))
        archive.writestr("archive/byteorder", "little")
        for number, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{number}", _bytes(array))
        archive.writestr("archive/version", "3\n")


def _bytes(array: mx.array) -> bytes:
    view = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(view)).tobytes()


def _pickle(tensors: Mapping[str, mx.array]) -> bytes:
    items = b"".join(_text(name) + _tensor(array, number) for number, (name, array) in enumerate(tensors.items()))
    return b"\x80\x02" + _ORDERED_DICT + _MARK + items + _SET_ITEMS + _STOP


def _tensor(array: mx.array, number: int) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, offset 0, shape, strides, no gradient, no hooks)"""
    strides = [int(np.prod(array.shape[i + 1 :], dtype=np.int64)) for i in range(array.ndim)]
    storage = [
        _text("storage"),
        f"ctorch\n{_STORAGES[array.dtype]}\n".encode(),
        _text(str(number)),
        _text("cpu"),
        _int(array.size),
    ]
    arguments = [
        _MARK + b"".join(storage) + _TUPLE + _PERSISTENT_ID,
        _int(0),
        _ints(array.shape),
        _ints(strides),
        _FALSE,
        _ORDERED_DICT,
    ]
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _MARK + b"".join(arguments) + _TUPLE + _REDUCE


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _ints(values: Iterable[int]) -> bytes:
    return _MARK + b"".join(map(_int, values)) + _TUPLE
