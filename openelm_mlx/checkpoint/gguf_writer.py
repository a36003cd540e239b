"""Writing one GGUF file in bounded memory; it appears at its destination when it is complete.

The `gguf` package makes the header. The rest is as for every checkpoint (writer.py): a partial folder beside the
destination, a journal, resuming. A tensor's bytes include its padding to the next multiple of the alignment.
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

# Errors of file systems without hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}


def gguf_package() -> Any:
    """The package `gguf`. Raises ConversionError with the install command when it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ConversionError(
            "GGUF is written with the package gguf, which is not installed: run `pip install 'openelm_mlx[gguf]'`."
        ) from error
    return gguf


@dataclass(frozen=True)
class GgufOutputTensor(OutputTensor):
    """A tensor to be written: `dtype` is the name of a GGUF type, the shape is row-major."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding included."""
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
    """The file with these metadata fields and tensors.

    fields: str, bool, int (stored as uint32), float (float32), and lists of one of these (int as int32; str or bytes).
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
        """The complete file, still in the partial folder."""
        assert not self.remaining
        (file,) = self._files
        with self._explained():
            whole = self._output / file.name
            os.replace(self._unfinished(file), whole)
            sync_folder(self._output)
        return whole

    def publish(self) -> None:
        """Give the complete file its final name, atomically; nothing is overwritten."""
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
