"""Exporting a model as a graph that runs without this library, in C++, C or Python, with MLX alone.

`export` loads the model, makes its parameters contiguous, traces it (graph.py), reads the file back and compares its
tokens with the model's, writes the C++ program beside it (program.py), and only then names the folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import __version__
from ..arguments import FUNCTION, NAME, PATH, checked_call
from ..checkpoint.destination import check_destination, check_free_space, folder_beside, put_in_place
from ..checks import is_whole
from ..conversion.card import licence_files
from ..errors import CheckpointError, ConversionError, DestinationError, SettingError
from ..files import expanded, hears_the_disk, one_line, shown
from ..hub import Progress
from ..loading import prepare
from ..models.base import LanguageModel
from ..runtime import runtime_of
from ..sources import Source, SourceName
from ..specs import gpt_oss_config, openelm_config
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_files import SENTENCEPIECE_FILE
from .graph import ExportedModel, cache_type, make_contiguous, write_graph
from .program import SENTENCEPIECE, TOKENIZERS, program_files

# How many tokens the file and the model must agree on, and the text they continue.
NUM_COMPARED = 32
_SAMPLE = "What is a banjo? It is an instrument with strings, and whoever plays it"
_CONFIGS = {"openelm": openelm_config, "gpt_oss": gpt_oss_config}
_GRAPH = "model.mlxfn"
_MOST_SIZES, _MOST_PLACES = 16, 2**20
# In 16 bits two logits may differ by less than rounding; such near ties, relative to the largest logit, are accepted.
_TIE = {mx.float32: 0.0, mx.bfloat16: 2.0**-6, mx.float16: 2.0**-8}


@dataclass(frozen=True)
class ExportReport:
    """What was exported. files: name -> bytes. num_compared: how many greedy tokens were compared and found equal.

    places, lengths: the traced sizes: cached tokens at most, and new tokens in one call.
    """

    destination: Path
    family: str
    dtype: str
    places: tuple[int, ...]
    lengths: tuple[int, ...]
    num_compared: int
    tokenizer: tuple[str, ...]
    files: dict[str, int]


@hears_the_disk(CheckpointError)
@checked_call("om.export", destination=PATH, revision=NAME, chat_template=NAME, progress=FUNCTION)
def export(
    source: SourceName,
    destination: str | Path,
    *,
    places: Sequence[int] = (512, 2048),
    chunk: int = 64,
    dtype: str | mx.Dtype | None = None,
    preset: str | None = None,
    dense_bits: int | None = None,
    memory_limit: int | str | None = None,
    tokenizer: SourceName | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a model to a folder with a graph (.mlxfn), model.json, and a C++ program that runs it.

    The graph holds the weights once, and a trace for each number of places and of new tokens. It runs on the backend
    that it was traced on: for Metal, export on a Mac. A file of one MLX version may not load in another.

    Args:
        source: As in `load`.
        destination: A folder that does not exist yet; it appears when the file was read back and gave the model's
            tokens.
        places: The possible lengths of prompt and answer together; each is traced.
        chunk: How many tokens of a prompt are processed in one call; calls of 8 and 1 tokens are traced too.
        dtype, preset, dense_bits, memory_limit, tokenizer, chat_template, revision, progress: As in `load`.

    Raises the errors of `openelm_mlx.errors`; ConversionError for a model whose experts stay on disk.
    """
    target = expanded(destination, DestinationError)
    _check_folder(target)
    opened = Source.open(source, revision, progress)
    spec = opened.spec
    sizes, lengths = _checked_sizes(places, chunk, spec.context_length)
    prepared = prepare(
        source,
        context_length=sizes[-1],  # keys and values beyond it are never held
        dtype=dtype,
        preset=preset,
        dense_bits=dense_bits,
        memory_limit=memory_limit,
        tokenizer=tokenizer,
        chat_template=chat_template,
        revision=revision,
        opened=opened,
    )
    plan = runtime_of(prepared.model).plan
    assert plan is not None
    if plan.expert_slots is not None:
        raise ConversionError(
            f"{source} does not fit into memory as a whole ({plan.expert_slots} of {spec.layers[0].num_experts} experts a "
            "layer do), and experts that stay on disk cannot be exported: raise memory_limit, or export on a larger machine."
        )
    model, found = prepared.read()
    make_contiguous(model)
    check_free_space(target, sum(array.nbytes for _, array in tree_flatten(model.parameters())))
    with _folder_beside(target) as unfinished:
        description = _describe(model, str(source), sizes, lengths, found)
        write_graph(unfinished / _GRAPH, model, sizes, lengths, description)
        num_compared = _compare(unfinished / _GRAPH, model, sizes, lengths, found)
        _write_others(unfinished, description, model, sizes, lengths, found, opened.folder)
        files = {each.name: each.stat().st_size for each in sorted(unfinished.iterdir())}
    return ExportReport(
        destination=target,
        family=spec.family,
        dtype=description["dtype"],
        places=sizes,
        lengths=lengths,
        num_compared=num_compared,
        tokenizer=() if found is None else tuple(file.name for file in found.files),
        files=files,
    )


# --- what was asked for -----------------------------------------------------------------------------------------------


def _check_folder(target: Path) -> None:
    check_destination(target)
    parent = target.absolute().parent
    if not parent.is_dir():
        raise DestinationError(
            f"{target} cannot be written: there is no folder {parent} to hold it; make it first, or correct the path."
        )


def _checked_sizes(places: Sequence[int], chunk: int, context_length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The places in order, limited to the model's context, and the lengths of a call."""
    if not isinstance(places, (list, tuple)):
        raise SettingError(f"places is {shown(places)}: give a list of whole numbers, such as (512, 2048).")
    if not 0 < len(places) <= _MOST_SIZES:
        raise SettingError(f"places has {len(places):,} numbers: give 1 to {_MOST_SIZES} of them.")
    for each in places:
        if not is_whole(each) or not 1 < each <= _MOST_PLACES:
            raise SettingError(f"places has {shown(each)} in it: give whole numbers from 2 to {_MOST_PLACES:,}.")
    if not is_whole(chunk) or not 1 <= chunk <= min(places):
        raise SettingError(
            f"chunk is {shown(chunk)}: it must be a whole number from 1 to {min(places):,}, the smallest of places."
        )
    sizes = sorted({min(each, context_length) for each in places})
    return tuple(sizes), tuple(sorted({1, min(8, chunk), min(chunk, sizes[0])}))


# --- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """A temporary folder beside the destination: renamed to it at the end of the block, removed after an error."""
    place = Path(os.path.realpath(target))
    try:
        with folder_beside(place) as unfinished:
            yield unfinished
            put_in_place(unfinished, place)
    except RuntimeError as error:  # MLX raises it, for a full disk too
        raise ConversionError(
            f"The graph could not be written ({one_line(error)}): make room on the disk of {place.parent}, or choose another "
            "destination."
        ) from error


def _describe(
    model: LanguageModel, name: str, places: Sequence[int], lengths: Sequence[int], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The contents of model.json: all that a program needs to call the graph."""
    spec, dtype = model.spec, str(cache_type(model)).removeprefix("mlx.core.")
    caches = [[1, layer.num_kv_heads, "places", layer.head_dim] for layer in spec.layers]
    stops = spec.eos_tokens if tokenizer is None else (*spec.eos_tokens, *tokenizer.eos_tokens)
    inputs = [
        {"name": "tokens", "shape": [1, "length"], "dtype": "int32"},
        {"name": "offset", "shape": [], "dtype": "int32"},
    ]
    pairs = [
        {"name": f"{part}_{i}", "shape": shape, "dtype": dtype} for i, shape in enumerate(caches) for part in ("K", "V")
    ]
    return {
        "format": "openelm_mlx export",
        "version": 1,
        "openelm_mlx": __version__,
        "mlx": version("mlx"),
        "source": name,
        "graph": _GRAPH,
        "made_on": str(mx.default_device()),
        "dtype": dtype,
        "places": list(places),
        "lengths": list(lengths),
        "inputs": inputs + pairs,
        "outputs": [{"name": "logits", "shape": [spec.vocab_size], "dtype": "float32"}, *pairs],
        "bos_token": None if tokenizer is None else _bos(tokenizer),
        "stop_tokens": list(dict.fromkeys(stops)),
        "tokenizer": [] if tokenizer is None else [file.name for file in tokenizer.files],
        "chat_template": None if tokenizer is None else tokenizer.chat_template,
        "config": _CONFIGS[spec.family](spec),
    }


def _bos(tokenizer: Tokenizer) -> int | None:
    """The token that every prompt begins with, if any."""
    return tokenizer.bos_token if tokenizer.encode_prompt("")[:1] == [tokenizer.bos_token] else None


def _write_others(
    folder: Path,
    description: dict[str, Any],
    model: LanguageModel,
    places: Sequence[int],
    lengths: Sequence[int],
    tokenizer: Tokenizer | None,
    source: Path,
) -> None:
    (folder / "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    kind = None
    if tokenizer is not None:
        kind = SENTENCEPIECE if tokenizer.files[0].name == SENTENCEPIECE_FILE else TOKENIZERS
        for file in tokenizer.files:
            shutil.copyfile(file, folder / file.name)
    for file in licence_files(source):
        shutil.copyfile(file, folder / file.name)
    bos, stops = description["bos_token"], description["stop_tokens"]
    texts = program_files(model.spec, description["dtype"], places, lengths, bos, stops, kind)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


# --- the comparison ---------------------------------------------------------------------------------------------------


def _compare(
    path: Path, model: LanguageModel, places: Sequence[int], lengths: Sequence[int], tokenizer: Tokenizer | None
) -> int:
    """How many tokens were compared and found equal for each number of places. Raises ConversionError if one differs."""
    count = NUM_COMPARED
    for each in places:
        prompt = _prompt(model, tokenizer, max(1, min(each - NUM_COMPARED, max(lengths) + 11)))
        wanted = min(NUM_COMPARED, each - len(prompt))
        _compare_one(ExportedModel(path, model, each, lengths), model, prompt, wanted)
        count = min(count, wanted)
    return count


def _compare_one(
    exported: Callable[[Sequence[int]], mx.array], model: LanguageModel, prompt: list[int], count: int
) -> None:
    cache, new = model.make_cache(), prompt
    for number in range(count):
        ours = model(mx.array([new]), cache=cache)[0, -1].astype(mx.float32)
        theirs = exported(new)
        chosen, other = int(np.array(mx.argmax(ours))), int(np.array(mx.argmax(theirs)))
        if chosen != other:
            gap, largest = float(ours[chosen] - ours[other]), float(mx.max(mx.abs(ours)))
            if not gap <= _TIE.get(cache_type(model), 0.0) * largest:
                raise ConversionError(
                    f"The exported graph does not give the model's tokens (token {number + 1} of {count} is {other} "
                    f"instead of {chosen}), so nothing was kept: please open an issue "
                    f"with MLX's version, {version('mlx')}, and the model's name."
                )
        new = [chosen]


def _prompt(model: LanguageModel, tokenizer: Tokenizer | None, length: int) -> list[int]:
    """A prompt of `length` tokens: a repeated text, or arbitrary tokens without a tokenizer."""
    if tokenizer is None:
        return [1 + i * 7919 % (model.spec.usable_vocab_size - 1) for i in range(length)]
    tokens = tokenizer.encode_prompt(_SAMPLE)
    return (tokens * -(-length // len(tokens)))[:length]
