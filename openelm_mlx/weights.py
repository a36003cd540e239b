"""A model with the weights of a checkpoint: read, unpacked or padded, and evaluated piece by piece, so that they are never in
memory twice. What is read in which form is a `Placement`'s decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import mlx.core as mx
from mlx import nn

from .checkpoint.layouts import Contents
from .checkpoint.quantize import NOT_A_SCALE, PARTS, Quantization
from .checkpoint.reader import Checkpoint
from .errors import CheckpointError
from .experts.residency import Streaming
from .finder import disk_trouble
from .hub import Progress
from .memory.machine import backend_name
from .models import build_model
from .models.moe import Experts
from .models.precision import KernelChoices, by_columns
from .placement import Placement, read_together, unpacked_in_turn
from .runtime import runtime_of

if TYPE_CHECKING:
    from .models import Model
    from .models.gpt_oss import GptOss

# The widest group of packed weights that MLX's CUDA backend multiplies with any number of float32 rows.
WIDEST_GROUP = 64


def load_model(
    contents: Contents,
    checkpoint: Checkpoint,
    dtype: mx.Dtype | None = None,
    dense: Quantization | None = None,
    streaming: Streaming | None = None,
    choices: KernelChoices | None = None,
) -> Model:
    """The model of a checkpoint by `Placement.of` of its contents, read by `read_model`."""
    return read_model(Placement.of(contents, dtype, dense), checkpoint, streaming, choices)


def read_model(
    placement: Placement,
    checkpoint: Checkpoint,
    streaming: Streaming | None = None,
    choices: KernelChoices | None = None,
    progress: Progress | None = None,
    prepare: Callable[[Model], None] | None = None,
) -> Model:
    """The module with the checkpoint's parameters, evaluated; they are never in memory twice.

    streaming: what stays on disk; None keeps everything in memory. choices: which of equivalent kernels it uses; None: the
    backend's defaults. progress: called with (bytes read so far, all bytes). prepare: called with the model before anything is
    read into it.
    """
    model = build_model(placement.contents.spec, choices)
    packed = placement.packed
    if packed:
        nn.quantize(model, class_predicate=lambda path, _: path in packed and packed[path].as_config())
    if prepare is not None:
        prepare(model)
    if streaming is not None:
        placement = placement.leaving_on_disk(streaming.on_disk)
    weights = _read_arrays(placement, checkpoint, progress)
    _check_scales(weights, placement.packings)
    if placement.unpacked:
        weights = _unpack(weights, {module: placement.packings[module] for module in placement.unpacked})
    if streaming is not None:
        gpt_oss = cast("GptOss", model)
        runtime_of(model).residency, weights = streaming.attach(gpt_oss, weights, placement.packings, placement.dtype)
    model.load_weights(weights)
    del weights
    if streaming is None and model.choices.rows_in_a_tile > 1 and placement.contents.spec.layers[0].num_experts:
        _pad_experts(cast("GptOss", model))
    if placement.dtype == mx.float32 and backend_name() == "cuda":
        split_wide_groups(model)
    model.eval()
    for layer in model.layers:  # now, and not by the first of several threads, whose streams the others do not have
        mx.eval(layer.prepare_constants())
    return model


def _read_arrays(
    placement: Placement, checkpoint: Checkpoint, progress: Progress | None = None
) -> list[tuple[str, mx.array]]:
    """Name -> array of everything that is read, evaluated batch by batch (`read_together`)."""
    weights: list[tuple[str, mx.array]] = []
    wanted = [each for each in placement.decisions if not each.is_on_disk]
    total, done = sum(each.stored_bytes for each in wanted), 0
    for batch in read_together(wanted):
        parts = [part for decision in batch for part in decision.read(checkpoint).items()]
        _evaluate([array for _, array in parts], checkpoint)
        weights += parts
        done += sum(decision.stored_bytes for decision in batch)
        if progress is not None and done < total:
            progress(done, total)
    if progress is not None:
        progress(total, total)
    return weights


def _unpack(weights: list[tuple[str, mx.array]], packings: Mapping[str, Quantization]) -> list[tuple[str, mx.array]]:
    """`weights` with those modules' matrices in float32. The list is emptied, so packed matrices are freed one by one."""
    found = dict(weights)
    weights.clear()
    numbers = {each: found[f"{each}.weight"].size * 32 // packings[each].bits for each in packings}
    for module in unpacked_in_turn(numbers):
        names = {part: f"{module}.{part}" for part in PARTS}
        parts = {part: found.pop(name) for part, name in names.items() if name in found}
        found[names["weight"]] = by_columns(packings[module].dequantize(parts, mx.float32))
        del parts
        mx.eval(found[names["weight"]])
    return list(found.items())


def _pad_experts(model: GptOss) -> None:
    """`pad_expert_rows` of a model in memory, a matrix at a time."""
    for layer in model.layers:
        down = cast(Experts, layer.mlp.experts).down_proj
        names = {f".experts.down_proj.{part}": part for part in PARTS if part in down}
        for name, part in names.items():
            down[part] = pad_expert_rows({name: down[part]}, model.choices.rows_in_a_tile)[name]


def split_wide_groups(model: nn.Module) -> None:
    """Let groups of 128 numbers be two groups of 64 with the same scale and bias, which are the same numbers.

    MLX's CUDA backend asks for more of a multiprocessor's memory than it may have (64 KiB of 48) where more than 32 rows
    in float32 are multiplied by groups of 128, and its driver refuses: "cuGraphAddKernelNode ... invalid argument".
    """
    for _, module in model.named_modules():
        if module.get("scales") is None or module.group_size <= WIDEST_GROUP:
            continue
        times = module.group_size // WIDEST_GROUP
        for part in ("scales", "biases"):
            if part in module:
                module[part] = mx.repeat(module[part], times, axis=-1)
        module.group_size = WIDEST_GROUP
        mx.eval(module.parameters())


def pad_expert_rows(weights: Mapping[str, mx.array], tile: int) -> dict[str, mx.array]:
    """The weights with rows added to the experts' down projections where that makes prefill faster, a matrix at a time.

    2,880 rows are not a whole number of tiles: a sorted product over them took 24.4 ms on a GPU with MLX's CUDA backend,
    and one over 2,944 rows 2.3 ms (docs/LOG.md). The content of the added rows is never read.

    tile: the number of rows is padded to a multiple of it.
    """
    padded = dict(weights)
    for name in [name for name in padded if ".experts.down_proj." in name and not name.endswith(".bias")]:
        missing = -padded[name].shape[1] % tile
        if missing:
            padded[name] = mx.pad(padded[name], [(0, 0), (0, missing), (0, 0)])
            mx.eval(padded[name])  # one at a time: only one has a second copy at any moment
    return padded


def _check_scales(weights: list[tuple[str, mx.array]], packings: Mapping[str, Quantization]) -> None:
    """Raise CheckpointError for a scale that is NaN: 255 in the shared exponents of MX formats (E8M0)."""
    scales = [
        (name, array)
        for name, array in weights
        if name.endswith(".scales") and packings[name.removesuffix(".scales")].mode in ("mxfp4", "mxfp8")
    ]
    if not scales:
        return
    largest = cast("list[int]", mx.stack([mx.max(array) for _, array in scales]).tolist())
    for (name, _), value in zip(scales, largest, strict=True):
        if value == NOT_A_SCALE:
            raise CheckpointError(
                f"The scales of {name.removesuffix('.scales')} have a byte of 255, which means NaN: the "
                "file is damaged; download or copy it again."
            )


def _evaluate(arrays: list[mx.array], checkpoint: Checkpoint) -> None:
    try:
        mx.eval(arrays)
        mx.clear_cache()  # what a conversion was made from
    except RuntimeError as error:  # MLX reads the file here
        names = ", ".join(file.name for file in checkpoint.files)
        trouble = disk_trouble(checkpoint.files)
        raise CheckpointError(
            trouble or f"{names} could not be read to the end ({error}): download or copy it again."
        ) from error
