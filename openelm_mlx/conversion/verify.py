"""What was written, read back: checksums, the error of every layer, and how far the next-token distributions moved.

Both models run side by side in float32, a layer at a time, so that no more than one layer of one model (and a tensor of
the other) is in memory. Packed weights are unpacked, exactly: what is measured is the change of the weights alone, the
same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..checkpoint.layouts import Contents, understand
from ..checkpoint.quantize import PARTS, Quantization, unpacked
from ..checkpoint.reader import Checkpoint, open_checkpoint, read_config
from ..checkpoint.writer import file_checksum
from ..errors import CheckpointError, ConversionError
from ..finder import disk_trouble
from ..models import build_model
from ..specs import ModelSpec, spec_from_config
from ..text.tokenizer import Tokenizer
from .planned_weight import rows_in_a_slice

if TYPE_CHECKING:
    from ..models import Model

# The distributions are compared at this many positions at most: on a CPU each costs seconds with OpenELM-3B.
MAX_TOKENS = 128

LARGEST_FLOAT16 = 65504.0

# Lewis Carroll, Alice's Adventures in Wonderland (1865), the beginning; in the public domain.
SAMPLE_TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice \
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is the use \
of a book," thought Alice, "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), \
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when \
suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit say \
to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it occurred to her that she ought \
to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually took a watch out of \
its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet.
"""


@dataclass(frozen=True)
class LayerError:
    """How far one part of the model is from the original: rms of the difference over rms of the original.

    weights: over all of its weights. stream: over the residual stream after it; for the head, over the logits.
    """

    name: str
    weights: float
    stream: float


@dataclass(frozen=True)
class Verification:
    """What reading the written files back gave.

    checksums: SHA-256 of each file of weights, the same as when it was written. kl_divergence: of the original's
    next-token distribution from the converted one's, in nats, the mean over `num_tokens` positions; max_kl_divergence:
    the largest. same_top_token: the share of positions where both find the same token likeliest. sample: what they read.
    """

    checksums: Mapping[str, str]
    layers: tuple[LayerError, ...]
    kl_divergence: float
    max_kl_divergence: float
    same_top_token: float
    num_tokens: int
    sample: str


def verify(
    folder: Path,
    checksums: Mapping[str, str],
    original: tuple[Contents, Checkpoint],
    tokenizer: Tokenizer | None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare the checkpoint in `folder` with the files that were meant, and with the original.

    Raises ConversionError when a file is not as it was written or the converted model computes no finite numbers (in
    float16: numbers that float16 does not have), CheckpointError when the original does not.
    """
    for name, checksum in checksums.items():
        if file_checksum(folder / name) != checksum:
            raise ConversionError(
                f"{name} does not read back as it was written, and was removed: the disk may be failing; convert again, "
                "to another disk if you have one."
            )
    config = read_config(folder)
    checkpoint = open_checkpoint(folder)
    converted = understand(checkpoint, config, spec_from_config(config))
    tokens, sample = sample_tokens(converted.spec, tokenizer)
    before, after = _Half(*original), _Half(converted, checkpoint)
    layers = _run(before, after, tokens, progress)
    divergence = kl_divergence(before.stream, after.stream)
    same = mx.mean(mx.argmax(before.stream, axis=-1) == mx.argmax(after.stream, axis=-1))
    return Verification(
        checksums=dict(checksums),
        layers=tuple(layers),
        kl_divergence=_number(mx.mean(divergence)),
        max_kl_divergence=_number(mx.max(divergence)),
        same_top_token=_number(same),
        num_tokens=len(tokens),
        sample=sample,
    )


def sample_tokens(spec: ModelSpec, tokenizer: Tokenizer | None) -> tuple[list[int], str]:
    """The tokens that both models read, and what they are: a text, or without a tokenizer random tokens, always the same."""
    length = min(MAX_TOKENS, spec.context_length)
    if tokenizer is not None:
        return tokenizer.encode_prompt(SAMPLE_TEXT)[:length], "the beginning of Alice's Adventures in Wonderland"
    numbers = random.Random(0)
    bos = [] if spec.bos_token is None else [spec.bos_token]
    drawn = [numbers.randrange(spec.usable_vocab_size) for _ in range(length - len(bos))]
    return bos + drawn, "random tokens, for want of a tokenizer"


def kl_divergence(logits: mx.array, other: mx.array) -> mx.array:
    """KL(P || Q) in nats at each position, P and Q the softmax of two (..., V) logits -> (...)."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    log_q = other - mx.logsumexp(other, axis=-1, keepdims=True)
    return mx.maximum(mx.sum(mx.exp(log_p) * (log_p - log_q), axis=-1), 0.0)


# --- both models, a part at a time ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """The embedding, one layer, or the head: its weights, and its forward pass in a model that has no other parts.

    names: in that model -> in the checkpoint.
    """

    title: str
    layer: int | None
    names: Mapping[str, str]
    run: Callable[[Model, mx.array], mx.array]

    def spec(self, whole: ModelSpec) -> ModelSpec:
        return replace(whole, layers=() if self.layer is None else (whole.layers[self.layer],))


class _Half:
    """One of the two models: the source of its weights, and its residual stream so far, (1, L, hidden_size) float32."""

    def __init__(self, contents: Contents, checkpoint: Checkpoint) -> None:
        self.contents, self.checkpoint = contents, checkpoint
        self.stream = mx.array(0.0)

    def weight(self, name: str) -> mx.array:
        """A parameter in float32, unpacked where it is packed; evaluated."""
        module = name.removesuffix(".weight")
        packing = self.contents.quantized.get(module) if name.endswith(".weight") else None
        try:
            if packing is not None:
                return self._unpacked(module, packing)
            array = self.contents.parameters[name].read(self.checkpoint).astype(mx.float32)
            mx.eval(array)
        except RuntimeError as error:  # MLX reads the file here
            trouble = disk_trouble(self.checkpoint.files)
            raise CheckpointError(
                trouble or f"{name} could not be read to its end ({error}): copy the source again."
            ) from error
        return array

    def _unpacked(self, module: str, packing: Quantization) -> mx.array:
        """A packed weight in float32, some rows at a time: unpacking needs room for three of what it gives."""
        parameters = self.contents.parameters
        names = {part: f"{module}.{part}" for part in PARTS}
        parts = {part: parameters[n].read(self.checkpoint) for part, n in names.items() if n in parameters}
        shape = self.contents.spec.parameter_shapes()[f"{module}.weight"]
        array = mx.zeros(shape)
        mx.eval(array, *parts.values())
        step = rows_in_a_slice(shape)
        for start in range(0, shape[0], step):
            rows = {part: packed[start : start + step] for part, packed in parts.items()}
            array[start : start + step] = unpacked(packing, rows)
            mx.eval(array)  # now, while nothing else holds it: it is changed in place
        return array

    def run(self, part: _Part, weights: Mapping[str, mx.array]) -> None:
        """Send the residual stream through one part of the model."""
        model = build_model(part.spec(self.contents.spec))
        model.load_weights(list(weights.items()), strict=False)  # what the part does not use is never allocated
        model.eval()
        self.stream = part.run(model, self.stream)
        mx.eval(self.stream)  # evaluated now, so that these weights are freed before the next ones are read


def _run(
    original: _Half, converted: _Half, tokens: Sequence[int], progress: Callable[[int, int], None] | None
) -> list[LayerError]:
    """Every part's error; afterwards the streams are the logits, (1, L, V) over the ids that both models have."""
    parts = _parts(converted.contents.spec, mx.array(list(tokens))[None])
    errors = []
    for number, part in enumerate(parts):
        if progress is not None:
            progress(number, len(parts))
        errors.append(_run_part(part, original, converted))
    if progress is not None:
        progress(len(parts), len(parts))
    return errors


def _run_part(part: _Part, original: _Half, converted: _Half) -> LayerError:
    weights = {name: original.weight(stored) for name, stored in part.names.items()}
    original.run(part, weights)
    weights_error = _Error()
    for name, stored in part.names.items():
        ours = converted.weight(stored)
        weights_error.add(weights[name][: ours.shape[0]], ours)
        weights[name] = ours  # frees the original's layer: one is in memory, not two
    converted.run(part, weights)
    _check_finite(part, original, converted)
    stream_error = _Error()
    stream_error.add(original.stream[0], converted.stream[0])
    return LayerError(part.title, weights_error.relative, stream_error.relative)


def _parts(spec: ModelSpec, tokens: mx.array) -> list[_Part]:
    ends = list(spec.parameter_shapes())
    embedding, last = ends[0], [name for name in ends[1:] if ".layers." not in name]
    head = [*last, embedding] if spec.tied_head else last
    vocab_size = spec.usable_vocab_size
    return [
        _Part("embedding", None, {embedding: embedding}, lambda model, _: model.embed(tokens)),
        *(_layer(spec, number) for number in range(len(spec.layers))),
        _Part("head", None, {name: name for name in head}, lambda model, h: model.head(h)[..., :vocab_size]),
    ]


def _layer(spec: ModelSpec, number: int) -> _Part:
    alone = replace(spec, layers=(spec.layers[number],)).parameter_shapes()
    names = {name: name.replace(".layers.0.", f".layers.{number}.", 1) for name in alone if ".layers.0." in name}
    return _Part(f"layer {number}", number, names, lambda model, h: model.run_layers(h))


class _Error:
    """The rms of a difference over the rms of the original, of several arrays together."""

    def __init__(self) -> None:
        self._difference = self._original = 0.0

    def add(self, original: mx.array, other: mx.array) -> None:
        step = rows_in_a_slice(original.shape)
        for start in range(0, original.shape[0], step):
            a, b = original[start : start + step], other[start : start + step]
            self._difference += _number(mx.sum(mx.square(a - b)))
            self._original += _number(mx.sum(mx.square(a)))

    @property
    def relative(self) -> float:
        return (self._difference / self._original) ** 0.5 if self._original else float(self._difference > 0)


def _check_finite(part: _Part, original: _Half, converted: _Half) -> None:
    if not mx.all(mx.isfinite(original.stream)).item():
        raise CheckpointError(
            f"The original model computes no finite numbers in its {part.title}: its weights are damaged, or their training "
            "diverged; download or copy them again."
        )
    largest = _number(mx.max(mx.abs(converted.stream)))
    has_float16 = any(parameter.dtype == "F16" for parameter in converted.contents.parameters.values())
    if not largest < (LARGEST_FLOAT16 if has_float16 else float("inf")):
        raise ConversionError(
            f"In its {part.title} the converted model reaches {largest:.3g}, which its numbers cannot hold: use bfloat16."
        )


def _number(array: mx.array) -> float:
    return float(np.array(array))
