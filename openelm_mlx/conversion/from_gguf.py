"""A GGUF file as a source: its tensors as a checkpoint, its tokenizer and licences in a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.gguf_checkpoint import GgufCheckpoint
from ..checkpoint.layouts import understand
from ..hub import Progress
from ..sources import Source, SourceName, path_here
from ..specs import spec_from_config
from ..text.gguf_vocabulary import tokenizer_files
from .card import LICENCE_FILES
from .gguf_fields import LICENCES, TEMPLATE_NAME
from .to_gguf import is_gguf


@contextmanager
def open_source(
    source: SourceName, revision: str | None = None, progress: Progress | None = None, own_tokenizer: bool = True
) -> Iterator[Source]:
    """`Source.open` with `headers_only`, or a local GGUF file as a source.

    own_tokenizer: whether to use the tokenizer in a GGUF file. Raises the errors of `Source.open` and `GgufCheckpoint`.
    """
    path = path_here(source) if is_gguf(str(source)) else None
    if path is None or path.is_dir():
        yield Source.open(source, revision, progress, headers_only=True)
        return
    checkpoint = GgufCheckpoint(path)
    metadata = checkpoint.gguf.metadata
    config = dict(checkpoint.config)
    if isinstance(metadata.get(TEMPLATE_NAME), str):
        config["openelm_mlx"] = {"chat_template": metadata[TEMPLATE_NAME]}
    contents = understand(checkpoint, config, spec_from_config(config))
    with tempfile.TemporaryDirectory() as unpacked:
        folder = Path(unpacked)
        files = tokenizer_files(metadata, str(path)) if own_tokenizer else {}
        for name, content in {**_licences(metadata.get(LICENCES)), **files}.items():
            (folder / name).write_bytes(content)
        name = str(metadata.get("general.name") or path.stem)
        yield Source(path.stem, name, path, folder, config, checkpoint, contents)


def _licences(stored: object) -> dict[str, bytes]:
    """Name -> text of the licences that this library stored; anything else under that key is ignored."""
    if not isinstance(stored, list) or not all(isinstance(each, str) for each in stored):
        return {}
    pairs = dict(zip(stored[::2], stored[1::2], strict=False))
    return {
        name: text.encode("utf-8", "surrogateescape")
        for name, text in pairs.items()
        if LICENCE_FILES.fullmatch(name) and Path(name).name == name and len(name) < 200 and name.isprintable()
    }
