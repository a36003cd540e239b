"""One decision for each parameter of a checkpoint: its type in memory, its packing, and whether it stays on disk.

A plan counts bytes (`weights`) and a loader makes arrays (`Decision.read`) from the same `Placement`, so a model takes
what was planned.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .checkpoint.layouts import FLOAT_TYPES, Contents, Parameter
from .checkpoint.parts import part_name, part_of
from .checkpoint.quantize import Quantization, quantization_of
from .checkpoint.reader import ITEM_SIZES, Checkpoint
from .checks import is_whole
from .errors import SettingError
from .files import shown
from .memory.plan_types import Weights
from .models.precision import by_columns, runs_on_cpu
from .specs import ModelSpec
from .text.tokenizer_files import TOKENIZER_FILES

# On the CPU backend float32 is faster beside packed experts, but not worth twice the memory of a large model's rest.
LARGEST_WIDENED_BYTES = 10**9

# The CPU backend multiplies by 8-bit matrices at 0.4 times the speed that it has for float32 ones (docs/LOG.md). Up to this
# many bytes unpacked, four times the memory does not matter.
LARGEST_UNPACKED_BYTES = 2**28
# Larger matrices keep their layout: even a short-lived second copy of one would raise the peak of loading.
LARGEST_TURNED_BYTES = 2**24
# Evaluated this many bytes at a time, so that a cast never holds more than this of the uncast weights.
LOAD_BATCH_BYTES = 64 * 2**20
# How many arrays of a matrix in float32 there are while MLX's CPU backend unpacks it, which takes several steps there, by its
# bits, and for the formats whose scales are 8 bits (measured). A GPU unpacks in one.
UNPACKING = {2: 2, 3: 4, 4: 2, 5: 6, 6: 7, 8: 2}
UNPACKING_MX = 2.32

DENSE_BITS = (8, 6, 5, 4)

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

# Layouts whose experts' files can be read in place, expert by expert.
_LAYOUTS_IN_PLACE = ("openai-hf", "openai-original", "openelm-mlx")


@dataclass(frozen=True)
class Decision:
    """How one parameter is kept in memory.

    dtype: what its numbers are cast to; None for packed ones, which
    stay as they are stored. packing: how its matrix is packed as it is read. unpacked: of a part of a packed matrix that the
    model has unpacked, how many float32 numbers it stands for (0 for scales and biases). is_by_columns: its matrix lies by
    columns. is_on_disk: it stays there, and is not read.
    """

    parameter: Parameter
    dtype: mx.Dtype | None = None
    packing: Quantization | None = None
    unpacked: int | None = None
    is_by_columns: bool = False
    is_on_disk: bool = False

    @property
    def module(self) -> str:
        """The path of the module that has this parameter."""
        return self.parameter.module

    @property
    def stored_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return math.prod(self.parameter.shape) * ITEM_SIZES[self.parameter.dtype]

    @property
    def cast_bytes(self) -> int:
        """Bytes of the whole parameter once it is cast, before anything is packed or unpacked."""
        return self.stored_bytes if self.dtype is None else math.prod(self.parameter.shape) * self.dtype.size

    @property
    def nbytes(self) -> int:
        """Bytes in memory when the model has been read."""
        if self.unpacked is not None:
            return self.unpacked * mx.float32.size
        if self.packing is None or self.dtype is None:
            return self.cast_bytes
        sizes = {"U32": 4, "U8": 1, "F16": self.dtype.size}
        parts = self.packing.parts(self.parameter.shape, "F16").values()
        return sum(math.prod(shape) * sizes[type_name] for type_name, shape in parts)

    @property
    def read_bytes(self) -> int:
        """Bytes in memory when it has been read, before anything is unpacked."""
        return self.nbytes if self.unpacked is None else self.cast_bytes

    @property
    def reading_bytes(self) -> int:
        """Bytes of all arrays that there are of it while it is read: its parts, as stored, cast, and packed or by columns."""
        parts = self.stored_bytes if len(self.parameter.sources) > 1 else 0
        cast = self.cast_bytes if self.cast_bytes != self.stored_bytes else 0
        kept = self.nbytes if self.packing is not None or self.is_by_columns else 0
        return parts + self.stored_bytes + cast + kept

    def read(self, checkpoint: Checkpoint) -> dict[str, mx.array]:
        """Name -> array of what the model gets for this parameter. Lazy: nothing is read before it is evaluated."""
        array = self.parameter.read(checkpoint)
        if self.dtype is not None:
            array = array.astype(self.dtype)
        if self.packing is not None:
            return {f"{self.module}.{name}": each for name, each in self.packing.quantize(array).items()}
        return {self.parameter.name: by_columns(array) if self.is_by_columns else array}


@dataclass(frozen=True)
class Placement:
    """How a checkpoint's parameters are kept in memory.

    dtype: what the model computes in. packings: module -> packing of each that is packed in the files, or as it is read.
    unpacked: those of them that the model has unpacked. decisions: one a parameter, in the order in which they are read.
    on_cpu: whether MLX's CPU backend computes.
    """

    contents: Contents
    dtype: mx.Dtype
    packings: Mapping[str, Quantization]
    unpacked: frozenset[str]
    decisions: tuple[Decision, ...]
    on_cpu: bool = False

    @classmethod
    def of(
        cls,
        contents: Contents,
        dtype: mx.Dtype | None = None,
        dense: Quantization | None = None,
        on_cpu: bool | None = None,
        unpacks: bool = False,
    ) -> Placement:
        """The placement of a checkpoint.

        dtype: what was asked for; None chooses by `default_dtype`. dense: how matrices that the checkpoint has unpacked are
        packed as they are read; None leaves them. on_cpu: whether MLX's CPU backend will compute; as on this machine when
        it is None. unpacks: no matrix stays packed.
        """
        on_cpu = runs_on_cpu() if on_cpu is None else on_cpu
        packings = {**contents.quantized, **dense_packings(contents, dense)}
        if dtype is None:
            plain = _plain_bytes(contents, packings)
            dtype = default_dtype(contents.spec, _stored_type(contents), packings.keys(), plain, on_cpu)
        unpacked = set(contents.quantized) if unpacks else _modules_to_unpack(contents, dtype, dense, on_cpu)
        shapes = contents.spec.parameter_shapes()

        def decision(parameter: Parameter) -> Decision:
            module = parameter.module
            is_matrix = parameter.name == f"{module}.weight"
            kept = mx.float32 if contents.spec.keeps_float32(parameter.name) else dtype
            found = Decision(parameter, kept if parameter.dtype in FLOAT_TYPES else None)
            if module in unpacked:
                return replace(found, unpacked=math.prod(shapes[parameter.name]) if is_matrix else 0)
            if module not in packings:
                is_small = len(parameter.shape) > 1 and found.cast_bytes <= LARGEST_TURNED_BYTES
                return replace(found, is_by_columns=on_cpu and is_small and found.dtype == mx.float32)
            if is_matrix and module not in contents.quantized:
                return replace(found, packing=packings[module])
            return found

        decisions = tuple(map(decision, _in_reading_order(contents)))
        return cls(contents, dtype, packings, frozenset(unpacked), decisions, on_cpu)

    @property
    def packed(self) -> dict[str, Quantization]:
        """Module -> packing of what the model has packed."""
        return {module: each for module, each in self.packings.items() if module not in self.unpacked}

    def part(self, start: int, stop: int) -> Placement:
        """The same decisions for the model with layers start ... stop - 1 alone: what is decided is decided for the whole."""
        decisions = [
            replace(each, parameter=replace(each.parameter, name=name))
            for each in self.decisions
            if (name := part_name(each.parameter.name, start, stop)) is not None
        ]
        packings = {
            name: each for module, each in self.packings.items() if (name := part_name(module, start, stop)) is not None
        }
        unpacked = (part_name(module, start, stop) for module in self.unpacked)
        contents = part_of(self.contents, start, stop)
        return Placement(
            contents,
            self.dtype,
            packings,
            frozenset(each for each in unpacked if each is not None),
            tuple(decisions),
            self.on_cpu,
        )

    def leaving_on_disk(self, names: Collection[str]) -> Placement:
        """The same with these parameters on disk."""
        decisions = (replace(each, is_on_disk=each.parameter.name in names) for each in self.decisions)
        return replace(self, decisions=tuple(decisions))

    def weights(self, folder: Path | None = None) -> Weights:
        """What a plan has to know: the bytes with everything in memory, and what may stay on disk.

        folder: where a tokenizer may be.
        """
        spec = self.contents.spec
        sizes: Counter[str] = Counter()
        for each in self.decisions:
            is_expert = ".experts." in each.module and not each.parameter.name.endswith(".bias")
            sizes["experts" if is_expert else each.module] += each.nbytes
        experts, embedding = sizes.pop("experts", 0), 0 if spec.tied_head else sizes["model.embed_tokens"]
        can_stream = bool(experts) and self._has_experts_in_place()
        return Weights(
            dense=sum(sizes.values()),
            slot=experts // max(1, spec.layers[0].num_experts),
            embedding=embedding if can_stream else 0,
            can_stream=can_stream,
            tokenizer=_tokenizer_bytes(folder),
            loading=self._most_while_read(),
            untied_embedding=embedding,
            widened=self._widened(),
        )

    def _widened(self) -> int:
        """Bytes in float32 of one layer's experts, where they are multiplied in it and kept in 16 bits (`widen`)."""
        of_layers: Counter[str] = Counter()
        for each in self.decisions:
            layer, _, rest = each.parameter.name.partition(".mlp.experts.")
            is_plain = (
                each.packing is None and each.unpacked is None and each.dtype is not None and each.dtype != mx.float32
            )
            if self.on_cpu and rest.endswith(".weight") and is_plain:
                of_layers[layer] += mx.float32.size * math.prod(each.parameter.shape)
        return max(of_layers.values(), default=0)

    def _most_while_read(self) -> int:
        """The most bytes that there are until the model has been read, as weights.py goes about it."""
        loaded = most = 0
        for batch in read_together(self.decisions):
            most = max(most, loaded + sum(each.reading_bytes for each in batch))
            loaded += sum(each.read_bytes for each in batch)
        parts, numbers = Counter[str](), Counter[str]()
        for each in self.decisions:
            if each.unpacked is not None:
                parts[each.module] += each.read_bytes
                numbers[each.module] += mx.float32.size * each.unpacked
        for module in unpacked_in_turn(numbers):
            packing = self.packings[module]
            copies = UNPACKING[packing.bits] if packing.mode == "affine" else UNPACKING_MX
            most = max(most, loaded + int((copies + 1) * numbers[module]))  # and one by columns
            loaded += numbers[module] - parts[module]
        return most

    def _has_experts_in_place(self) -> bool:
        modules = {each.module for each in self.decisions if ".experts." in each.module}
        return self.contents.layout in _LAYOUTS_IN_PLACE and modules <= self.contents.quantized.keys()


def read_together(decisions: Iterable[Decision]) -> Iterator[list[Decision]]:
    """What is read, in what is evaluated together: some 64 MiB, and what is laid by columns by itself, since there are more
    arrays of it at that moment.
    """
    together: list[Decision] = []
    num_bytes = 0
    for each in decisions:
        if each.is_by_columns:
            yield [each]
            continue
        together.append(each)
        num_bytes += max(each.cast_bytes, each.read_bytes)
        if num_bytes > LOAD_BATCH_BYTES:
            yield together
            together, num_bytes = [], 0
    if together:
        yield together


def unpacked_in_turn(sizes: Mapping[str, int]) -> list[str]:
    """The modules that are unpacked, by the sizes of their matrices, in their order: the least is in memory at the first."""
    return sorted(sizes, key=lambda module: -sizes[module])


def packed_weights(
    contents: Contents, dtype: mx.Dtype | None = None, on_cpu: bool | None = None, folder: Path | None = None
) -> Weights:
    """The weights of a placement with dense_bits=8, which a plan may advise."""
    return Placement.of(contents, dtype, dense_packing(8), on_cpu).weights(folder)


def _tokenizer_bytes(folder: Path | None) -> int:
    files = [] if folder is None else [folder / name for name in TOKENIZER_FILES]
    return next((file.stat().st_size for file in files if file.is_file()), 0)


def dense_packing(bits: int | None) -> Quantization | None:
    """What `dense_bits` asks for. Raises SettingError for bits that MLX does not have."""
    if bits is None:
        return None
    if not is_whole(bits) or bits not in DENSE_BITS:
        raise SettingError(f"dense_bits is {shown(bits)}: choose {', '.join(map(str, DENSE_BITS))}, or leave it out.")
    return Quantization(bits, 64)


def dense_packings(contents: Contents, dense: Quantization | None) -> dict[str, Quantization]:
    """Module -> packing of every matrix that `dense` packs: those that the checkpoint has unpacked, as a recipe would."""
    if dense is None:
        return {}
    found = {}
    for name, shape in contents.spec.parameter_shapes().items():
        module = name.removesuffix(".weight")
        packing = (
            None if module in contents.quantized else quantization_of(("dense", dense), contents.spec, name, shape)
        )
        if packing is not None:
            found[module] = packing
    return found


def default_dtype(
    spec: ModelSpec,
    stored: mx.Dtype,
    packed: Collection[str] = (),
    plain_bytes: int = 0,
    on_cpu: bool | None = None,
) -> mx.Dtype:
    """The type to compute in when none was asked for: the stored one, with two exceptions.

    OpenELM-3B is never read as float16: Apple's MLX README says that it needs bfloat16's range. And on MLX's CPU backend a
    model with packed modules computes in float32, because the 16-bit quantized kernels there are some eight times slower
    (docs/LOG.md), unless only gpt-oss's experts are packed, which compute in float32 anyway, and the rest is large.

    packed: the modules that are. plain_bytes: of the parameters that are not, in 16 bits. on_cpu: whether MLX's CPU
    backend will compute; as on this machine when it is None.
    """
    on_cpu = runs_on_cpu() if on_cpu is None else on_cpu
    if packed and on_cpu:
        only_experts = all(".experts." in module for module in packed)
        return stored if only_experts and plain_bytes > LARGEST_WIDENED_BYTES else mx.float32
    return mx.bfloat16 if spec.size == "3B" and stored == mx.float16 else stored


def parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    """An mlx floating type from its name (or itself). Raises SettingError for any other."""
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise SettingError(f"dtype is {shown(dtype)}: choose one of {', '.join(DTYPES)}.")


def _modules_to_unpack(contents: Contents, dtype: mx.Dtype, dense: Quantization | None, on_cpu: bool) -> set[str]:
    """The modules that a checkpoint has packed and the model has not: all those of a small OpenELM on the CPU backend.

    dense: where bits were asked for, memory is what matters, and nothing is unpacked.
    """
    if not on_cpu or dtype != mx.float32 or dense is not None or contents.spec.layers[0].num_experts:
        return set()
    shapes = contents.spec.parameter_shapes()
    num_bytes = sum(4 * math.prod(shapes[f"{module}.weight"]) for module in contents.quantized)
    return set(contents.quantized) if num_bytes <= LARGEST_UNPACKED_BYTES else set()


def _in_reading_order(contents: Contents) -> list[Parameter]:
    """Parameters that are packed or cast as they are read come first, because they are briefly in memory twice and most room
    is free at the beginning. Among them the larger ones come first, for the same reason.
    """
    return sorted(
        contents.parameters.values(),
        key=lambda each: (each.module in contents.quantized, -math.prod(each.shape)),
    )


def _stored_type(contents: Contents) -> mx.Dtype:
    """The most frequent floating type of the checkpoint's parameters, by their sizes."""
    counts: Counter[str] = Counter()
    for parameter in contents.parameters.values():
        if parameter.dtype in FLOAT_TYPES:
            counts[parameter.dtype] += math.prod(parameter.shape)
    return FLOAT_TYPES[counts.most_common(1)[0][0]]


def _plain_bytes(contents: Contents, packings: Collection[str]) -> int:
    """Bytes, at 16 bits a number, of the parameters that are not part of a packed module."""
    return sum(
        2 * math.prod(parameter.shape) for parameter in contents.parameters.values() if parameter.module not in packings
    )
