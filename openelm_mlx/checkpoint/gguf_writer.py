"""Writing one GGUF file in bounded memory: its header by the `gguf` package, its tensors as they come, shown when whole.

The way is that of every checkpoint (writer.py): beside the destination, resumable, checked by a journal. A tensor's bytes
here are its blocks and what fills them up to the next multiple of the alignment.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConversionError, DestinationError
from ..finder import sync_folder
from .gguf_blocks import TYPES
from .gguf_file import ALIGNMENT
from .safetensors_plan import OutputFile, OutputTensor
from .writer import CheckpointWriter

# What a disk says that knows no second name for a file.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}


def gguf_package() -> Any:
    """The package `gguf`. Raises ConversionError with what to install where it is not there."""
    try:
        import gguf
    except ImportError as error:
        raise ConversionError(
            "GGUF is written with the package gguf, which is not installed: run `pip install 'openelm_mlx[gguf]'`."
        ) from error
    return gguf


@dataclass(frozen=True)
class GgufOutputTensor(OutputTensor):
    """A tensor to be written: `dtype` is ggml's name of its type, the shape has rows first."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file, what fills up to the next tensor included."""
        return -(-TYPES[self.dtype].nbytes(self.shape) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class GgufOutputFile(OutputFile):
    """The file to be written, with its header."""

    start: bytes = b""

    @property
    def header(self) -> bytes:
        return self.start


def output_file(
    name: str, architecture: str, fields: Mapping[str, Any], tensors: Sequence[GgufOutputTensor]
) -> OutputFile:
    """The file of that name with these fields and tensors.

    fields: text, truth values, whole numbers (uint32), other numbers (float32), and lists of one of them (of whole numbers:
    int32; of text: str or bytes).
    """
    gguf = gguf_package()
    kinds = gguf.GGUFValueType
    single = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, bytes: kinds.STRING}
    several = single | {int: kinds.INT32}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(None, architecture)
        for key, value in fields.items():
            if isinstance(value, list):
                writer.add_key_value(key, value, kinds.ARRAY, sub_type=several[type(value[0])])
            else:
                writer.add_key_value(key, value, single[type(value)])
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.dtype]
            writer.add_tensor_info(tensor.name, tensor.shape, None, TYPES[tensor.dtype].nbytes(tensor.shape), kind)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        start = path.read_bytes()
    start += bytes(-len(start) % ALIGNMENT)
    return GgufOutputFile(name, tuple(tensors), start)


class GgufWriter(CheckpointWriter):
    """Writes the one file beside `destination`, and gives it that name at the end."""

    def __enter__(self) -> GgufWriter:
        super().__enter__()
        return self

    def finish(self) -> Path:
        """The file, whole, and not yet at its place."""
        assert not self.remaining
        (file,) = self._files
        with self._explained():
            whole = self._output / file.name
            os.replace(self._unfinished(file), whole)
            sync_folder(self._output)
        return whole

    def publish(self) -> None:
        """Name the file as the destination: from one moment to the next it is there, and whole; nothing is overwritten."""
        (file,) = self._files
        whole = self._output / file.name
        with self._explained():
            try:
                os.link(whole, self.destination)
            except FileExistsError as error:
                raise self._appeared() from error
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if os.path.lexists(self.destination):
                    raise self._appeared() from error
                os.rename(whole, self.destination)
            sync_folder(self.destination.parent)
        self._remove()

    def _appeared(self) -> DestinationError:
        return DestinationError(
            f"{self.destination} appeared while it was being written, and nothing is overwritten: choose another "
            "destination."
        )
