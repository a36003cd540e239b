"""CoreNet's training checkpoints: PyTorch files, checked first and then read by PyTorch's own weights-only loader.

That loader runs no code, but it would unpack a record of any size and build any storage that the file describes. So the
archive and its pickle are checked first, without PyTorch: records are stored uncompressed, none is larger than the file,
and the pickle names only tensors and plain containers.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from ..errors import CheckpointError
from ..files import open_regular, shown, unreadable
from .reader import TensorEntry

# The pickle of OpenELM-3B's training state, optimizer and averages included, has about 200 kB.
LARGEST_PICKLE = 2 * 2**20
MOST_RECORDS = 100_000

# Everything that a state_dict, and the counters beside it, consist of.
_HARMLESS = re.compile(
    r"collections (OrderedDict|Counter)|__builtin__ (set|complex)|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (\w+Storage|Size|device|(b?float|u?int)\d+)|torch\.nn\.parameter Parameter"
)


class TorchCheckpoint:
    """Tensors of a PyTorch file, memory-mapped so that only what is read is in memory."""

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def __init__(self, file: Path) -> None:
        refuse_harmful(file)
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(
                f"{file.name} is a PyTorch file, and reading it needs PyTorch: pip install 'openelm_mlx[torch]'"
            ) from error
        try:
            # weights_only refuses everything but tensors and plain containers: no code in the file runs.
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # RuntimeError, UnpicklingError, EOFError, ... by what is wrong
            # Not PyTorch's own message, which advises to load the file unsafely.
            raise _unreadable(file, f"PyTorch's safe loader refuses it, {type(error).__name__}") from error
        self.files = (file,)
        self._tensors = _state_dict(loaded, file)
        dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
        self.entries = {
            name: TensorEntry(name, dtypes[t.dtype], tuple(t.shape), file, 0, t.numel() * t.element_size())
            for name, t in self._tensors.items()
            if t.dtype in dtypes
        }
        for name, entry in self.entries.items():
            if entry.nbytes > self._tensors[name].untyped_storage().nbytes():  # one number, shown as billions
                raise _unreadable(file, f"{shown(name)} has fewer bytes than its shape {shown(list(entry.shape))}")

    def read(self, name: str) -> mx.array:
        import torch

        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type
            return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())


def refuse_harmful(file: Path) -> None:
    """Raise CheckpointError for what is not a PyTorch file, or would take more memory than its own size to read."""
    with open_regular(file, CheckpointError) as stream:
        try:
            pickle = _pickle_of(file, stream)
            _refuse_names(file, pickle)
        except CheckpointError:
            raise
        except OSError as error:
            raise unreadable(file, error, CheckpointError) from error
        except Exception as error:  # zipfile and pickletools raise various classes for damaged data
            raise _unreadable(file, f"it is damaged or not an archive of torch.save, {type(error).__name__}") from error


def _pickle_of(file: Path, stream: BinaryIO) -> bytes:
    size = stream.seek(0, 2)
    with zipfile.ZipFile(stream) as archive:
        records = archive.infolist()
        if len(records) > MOST_RECORDS or len({record.filename for record in records}) != len(records):
            raise _unreadable(file, f"its archive has {len(records):,} records, some of them twice or too many")
        packed = next((record for record in records if record.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None or sum(record.file_size for record in records) > size:
            raise _unreadable(file, "its records are compressed or overlap, which torch.save does not do")
        pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
            raise _unreadable(file, f"its archive has no data.pkl of at most {LARGEST_PICKLE:,} bytes")
        return archive.read(pickles[0])


def _refuse_names(file: Path, pickle: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise _unreadable(file, f"its pickle uses {opcode.name}, which torch.save does not")
        if opcode.name == "GLOBAL" and not _HARMLESS.fullmatch(str(argument)):
            raise _unreadable(
                file, f"its pickle names {shown(str(argument))}, which is neither a tensor nor a plain container"
            )


def _unreadable(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a PyTorch checkpoint that can be read safely ({reason}): use a state_dict saved by torch.save, or a "
        "safetensors file."
    )


def _state_dict(loaded: Any, file: Path) -> dict[str, Any]:
    """The name -> tensor dictionary in what torch.load returned: itself, or the model's part of a training checkpoint."""
    import torch

    nested = (
        [loaded.get(key) for key in ("model_state_dict", "state_dict", "model")] if isinstance(loaded, dict) else []
    )
    for candidate in (loaded, *nested):
        if isinstance(candidate, dict) and candidate:
            tensors = {name: t for name, t in candidate.items() if isinstance(t, torch.Tensor)}
            if len(tensors) == len(candidate):
                return {name.removeprefix("module."): t for name, t in tensors.items()}
    raise CheckpointError(f"{file} holds no model's state_dict: expected tensors by name, as CoreNet saves them.")
