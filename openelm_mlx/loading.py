"""From a source - a demo's name, a folder, a file, a Hugging Face repository - to a model and its tokenizer."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx import nn

from . import hub
from .checkpoint.layouts import FLOAT_TYPES, Contents, Parameter, understand
from .checkpoint.quantize import NOT_A_SCALE, Quantization, quantization_of
from .checkpoint.reader import ITEM_SIZES, Checkpoint, open_checkpoint, read_config
from .decoding.arguments import refusing_unknown
from .errors import CheckpointError, HubError, SettingError, TokenizerError
from .experts.residency import Streaming, checked_slots
from .files import hears_the_disk
from .finder import disk_trouble, is_macos_own, is_same_name
from .hub import RepoFile, known_name, repo_of
from .memory.calibration import calibrated
from .memory.choices import stored_choices
from .memory.machine import allow_open_files, this_machine
from .memory.plan import Weights, Wish, make_plan, parse_memory
from .memory.presets import preset_bits
from .models import build_model
from .models.moe import Experts
from .models.precision import KernelChoices, by_columns, runs_on_cpu
from .platforms import keep_float32, use_device
from .runtime import runtime_of
from .specs import ModelSpec, checked_kv_bits, spec_from_config
from .text.chat import HARMONY, TemplateChoice, choose_template
from .text.tokenizer import Tokenizer, load_tokenizer
from .text.tokenizer_files import COMPANION_FILES, JSON_FILE, SENTENCEPIECE_FILE

if TYPE_CHECKING:
    from .models import Model
    from .models.gpt_oss import GptOss

Source = str | Path
Progress = Callable[[int, int], None]

TOKENIZER_FILES = (SENTENCEPIECE_FILE, JSON_FILE)

_DEMO_FOLDER = Path(__file__).parent / "demo"
DEMOS = {"demo-openelm": _DEMO_FOLDER / "openelm", "demo-gpt-oss": _DEMO_FOLDER / "gpt_oss"}

# Repositories with the tokenizer that OpenELM was trained with. Those already in the Hugging Face cache are used as they
# are; none is downloaded without being asked for, because Llama 2's is under a licence that its owner must accept.
LLAMA_TOKENIZER_REPOS = (
    "meta-llama/Llama-2-7b-hf",
    "NousResearch/Llama-2-7b-hf",
    "mlx-community/OpenELM-270M-Instruct",
)

# Evaluated this many bytes at a time, so that a cast never holds more than this of the uncast weights.
LOAD_BATCH_BYTES = 64 * 2**20

# On the CPU backend float32 is faster beside packed experts, but not worth twice the memory of a large model's rest.
LARGEST_WIDENED_BYTES = 10**9

# The CPU backend multiplies by 8-bit matrices at 0.4 times the speed that it has for float32 ones (docs/LOG.md). Up to so
# many bytes unpacked, four times the memory is no matter.
LARGEST_UNPACKED_BYTES = 2**28
# Larger matrices stay as they lie: a second copy of one, for a moment, would show in the peak of loading.
LARGEST_TURNED_BYTES = 2**24

DENSE_BITS = (8, 6, 5, 4)

# CoreNet pads 32,001 tokens to 32,128 rows; Harmony's vocabulary ends 1,069 rows before gpt-oss's.
_MOST_PADDING_ROWS = 256

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@hears_the_disk(CheckpointError)
@refusing_unknown("om.load")
def load(
    source: Source,
    *,
    context_length: int | None = None,
    dtype: str | mx.Dtype | None = None,
    preset: str | None = None,
    dense_bits: int | None = None,
    kv_bits: int | None = None,
    expert_slots: int | None = None,
    memory_limit: int | str | None = None,
    wire: bool | None = None,
    tokenizer: Source | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> tuple[Model, Tokenizer | None]:
    """The model and the tokenizer of `source`, ready to generate.

    source: "demo-openelm", a folder, a weight file, or a Hugging Face repository as owner/name (at `revision`).
    context_length: at most the model's own, which is the default. dtype: "float32", "bfloat16", "float16" or an mlx
    type; None keeps the stored one, with the two exceptions of `default_dtype`. preset: "exact" (as released, which is the
    default), "balanced" (dense parts in 8 bits) or "smallest" (in 4), see memory/presets.py; `plan` shows what each takes
    and does. dense_bits: instead, the number of bits itself: matrices that are not packed (attention, embedding and head
    of gpt-oss; all of OpenELM's) are quantized to so many as they are read. kv_bits: 8 halves the memory of keys and
    values in the layers that keep them all; 16 leaves them as they are, which is the default. expert_slots: keep only so
    many of each layer's experts in memory and read the others from the checkpoint's files when they are chosen, with the
    same answers bit for bit (experts/residency.py); the embedding stays on disk too where the head has a matrix of its
    own. memory_limit: bytes or "10GB", for MLX's memory, its buffer cache and the process's own together; experts that do
    not fit stay on disk by themselves, and what fits not even so is refused before a tensor is read. None: what the
    machine has. `model.plan` says what was planned. wire: whether macOS is asked, from the first request until the model
    is gone, not to page any of it out; None: only where it takes most of what the GPU may have. tokenizer: a file, folder
    or repository; without it the search is: the source itself, then Llama tokenizers in the Hugging Face cache; when
    there is none, the second result is None and prompts must be token ids. chat_template: "openelm-instruct", "plain", or
    gpt-oss's "harmony"; else what conversion stored, else what the source's name says. progress: called with (bytes here,
    bytes in all) while something is downloaded.

    Raises the errors of `openelm_mlx.errors`, each with the next step.
    """
    return prepare(
        source,
        context_length=context_length,
        dtype=dtype,
        preset=preset,
        dense_bits=dense_bits,
        kv_bits=kv_bits,
        expert_slots=expert_slots,
        memory_limit=memory_limit,
        wire=wire,
        tokenizer=tokenizer,
        chat_template=chat_template,
        revision=revision,
        progress=progress,
    ).read()


@dataclass
class Prepared:
    """What is known of a source before a tensor is read, which takes half a minute for a large model.

    model: of the same shape, plan, context and settings as the one that `read` returns, for checking requests against;
    its weights are none, and nothing may be computed with it.
    """

    model: Model
    tokenizer: Tokenizer | None
    _read: Callable[[], Model]

    def read(self) -> tuple[Model, Tokenizer | None]:
        """The model with its weights, and the tokenizer: what `load` returns."""
        model, shape = self._read(), self.model
        model.context_length, model.kv_bits = shape.context_length, shape.kv_bits
        runtime = runtime_of(model)
        runtime.plan, runtime.tokenizer = runtime_of(shape).plan, self.tokenizer
        return model, self.tokenizer


def prepare(
    source: Source,
    *,
    context_length: int | None = None,
    dtype: str | mx.Dtype | None = None,
    preset: str | None = None,
    dense_bits: int | None = None,
    kv_bits: int | None = None,
    expert_slots: int | None = None,
    memory_limit: int | str | None = None,
    wire: bool | None = None,
    tokenizer: Source | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """All that `load` does, with the same arguments and errors, but reading the tensors."""
    dense_bits = preset_bits(preset, dense_bits)
    wanted_type = parse_dtype(dtype)
    allow_open_files()
    keep_float32()
    use_device()
    path = locate(source, revision, progress)
    config = read_config(path)
    spec = spec_from_config(config)
    checked_kv_bits(spec, kv_bits)
    if expert_slots is not None:
        checked_slots(spec, expert_slots)
    checkpoint = open_checkpoint(path)
    contents = understand(checkpoint, config, spec)
    wish = Wish(
        memory_limit=parse_memory(memory_limit),
        context_length=None if context_length is None else checked_context_length(context_length, spec),
        kv_bits=checked_kv_bits(spec, kv_bits),
        dense_bits=dense_bits,
        expert_slots=expert_slots,
        wire=checked_wire(wire),
    )
    dense = dense_packing(dense_bits)
    weights, itemsize = memory_weights(contents, wanted_type, dense, folder=path if path.is_dir() else path.parent)
    packed = partial(packed_weights, contents, wanted_type) if dense is None else None
    plan = make_plan(str(source), spec, weights, calibrated(this_machine()), wish, itemsize, packed)
    if not plan.fits:
        raise plan.refusal()
    slots = plan.expert_slots
    streaming = None if slots is None else Streaming(contents, checkpoint, slots)
    # Before the tensors: a tokenizer that does not fit costs no waiting.
    found = find_tokenizer(path, spec, tokenizer, progress)
    if found is not None:
        named = repository(source, revision)
        origin = source if named is None else named[0]
        found.chat_template = stored_template(config, chat_template, origin, spec.family).template
    shape = build_model(spec)  # lazily: no number of it is ever made
    runtime_of(shape).plan = plan
    shape.context_length = checked_context_length(context_length, spec)
    shape.kv_bits = kv_bits
    runtime_of(shape).tokenizer = found
    read = partial(load_model, contents, checkpoint, wanted_type, dense, streaming, stored_choices())
    return Prepared(shape, found, read)


def load_model(
    contents: Contents,
    checkpoint: Checkpoint,
    dtype: mx.Dtype | None = None,
    dense: Quantization | None = None,
    streaming: Streaming | None = None,
    choices: KernelChoices | None = None,
) -> Model:
    """The module with the checkpoint's parameters in it, evaluated; at no time in memory twice.

    dense: how matrices that the checkpoint has unpacked are packed as they are read; None leaves them. streaming: what
    stays on disk; None has all in memory. choices: which of equal ways its kernels take; None: the backend's defaults.
    """
    model = build_model(contents.spec, choices)
    packings = {**contents.quantized, **dense_packings(contents, dense)}
    if dtype is None:
        dtype = default_dtype(contents.spec, _stored_type(contents), packings.keys(), _plain_bytes(contents, packings))
    unpacked = modules_to_unpack(contents, dtype, dense)
    if packings.keys() - unpacked:
        nn.quantize(
            model, class_predicate=lambda path, _: path in packings.keys() - unpacked and packings[path].as_config()
        )
    weights: list[tuple[str, mx.array]] = []
    pending: list[mx.array] = []
    pending_bytes = 0
    for parameter in _in_reading_order(contents):
        if streaming is not None and parameter.name in streaming.on_disk:
            continue
        array = parameter.read(checkpoint)
        if parameter.dtype in FLOAT_TYPES:
            array = array.astype(mx.float32 if contents.spec.keeps_float32(parameter.name) else dtype)
        module = _module(parameter)
        if parameter.name == f"{module}.weight" and module in packings and module not in contents.quantized:
            parts = {f"{module}.{name}": each for name, each in packings[module].quantize(array).items()}
        else:
            turns = array.ndim > 1 and array.dtype == mx.float32 and array.nbytes <= LARGEST_TURNED_BYTES
            if module not in packings and turns and runs_on_cpu():
                array = by_columns(array)
                _evaluate([array], checkpoint)  # one after the other: each has a copy only for a moment
            parts = {parameter.name: array}
        weights += parts.items()
        pending += parts.values()
        pending_bytes += max(array.nbytes, sum(each.nbytes for each in parts.values()))
        if pending_bytes > LOAD_BATCH_BYTES:
            _evaluate(pending, checkpoint)
            pending, pending_bytes = [], 0
    _evaluate(pending, checkpoint)
    pending.clear()
    del array, parts
    _check_scales(weights, packings)
    if unpacked:
        weights = _unpack(weights, {module: packings[module] for module in unpacked})
    if streaming is not None:
        gpt_oss = cast("GptOss", model)
        runtime_of(model).residency, weights = streaming.attach(gpt_oss, weights, packings, dtype)
    model.load_weights(weights)
    del weights, pending
    if streaming is None and model.choices.rows_in_a_tile > 1 and contents.spec.layers[0].num_experts:
        _pad_experts(cast("GptOss", model))
    model.eval()
    for layer in model.layers:  # now, and not by the first of several threads, whose streams the others do not have
        mx.eval(layer.prepare_constants())
    return model


def modules_to_unpack(
    contents: Contents, dtype: mx.Dtype, dense: Quantization | None = None, on_cpu: bool | None = None
) -> set[str]:
    """The modules that a checkpoint has packed and the model has not: all those of a small OpenELM on the CPU backend.

    dense: where bits were asked for, memory is what matters, and nothing is unpacked. on_cpu: as `default_dtype`'s.
    """
    on_cpu = runs_on_cpu() if on_cpu is None else on_cpu
    if not on_cpu or dtype != mx.float32 or dense is not None or contents.spec.layers[0].num_experts:
        return set()
    shapes = contents.spec.parameter_shapes()
    num_bytes = sum(4 * math.prod(shapes[f"{module}.weight"]) for module in contents.quantized)
    return set(contents.quantized) if num_bytes <= LARGEST_UNPACKED_BYTES else set()


def _unpack(weights: list[tuple[str, mx.array]], packings: Mapping[str, Quantization]) -> list[tuple[str, mx.array]]:
    """`weights` with those modules' matrices in float32. The list is emptied: the packed ones go one after the other."""
    found = dict(weights)
    weights.clear()
    for module in sorted(
        packings, key=lambda each: -found[f"{each}.weight"].size
    ):  # the least is in memory at the first
        names = {part: f"{module}.{part}" for part in ("weight", "scales", "biases")}
        parts = {part: found.pop(name) for part, name in names.items() if name in found}
        found[names["weight"]] = by_columns(packings[module].dequantize(parts, mx.float32))
        del parts
        mx.eval(found[names["weight"]])
    return list(found.items())


def _pad_experts(model: GptOss) -> None:
    """`pad_expert_rows` of a model in memory, a matrix at a time."""
    for layer in model.layers:
        down = cast(Experts, layer.mlp.experts).down_proj
        names = {f".experts.down_proj.{part}": part for part in ("weight", "scales", "biases") if part in down}
        for name, part in names.items():
            down[part] = pad_expert_rows({name: down[part]}, model.choices.rows_in_a_tile)[name]


def pad_expert_rows(weights: Mapping[str, mx.array], tile: int) -> dict[str, mx.array]:
    """The weights with rows added to the experts' down projections where that makes prefill faster, a matrix at a time.

    Their 2,880 rows are no whole number of tiles, and a sorted product over them took 24.4 ms on a GPU with MLX's CUDA
    backend, where one over 2,944 rows took 2.3 ms (docs/LOG.md). What the rows hold is never read.

    tile: the number whose multiples the rows are made.
    """
    padded = dict(weights)
    for name in [name for name in padded if ".experts.down_proj." in name and not name.endswith(".bias")]:
        missing = -padded[name].shape[1] % tile
        if missing:
            padded[name] = mx.pad(padded[name], [(0, 0), (0, missing), (0, 0)])
            mx.eval(padded[name])  # one after the other: each has a copy only for a moment
    return padded


def _in_reading_order(contents: Contents) -> list[Parameter]:
    """What is packed or cast as it is read comes first: it is in memory twice for a moment, and there is most room at the
    beginning. So do larger ones, for the same reason.
    """
    return sorted(
        contents.parameters.values(), key=lambda each: (_module(each) in contents.quantized, -math.prod(each.shape))
    )


def memory_weights(
    contents: Contents,
    dtype: mx.Dtype | None = None,
    dense: Quantization | None = None,
    on_cpu: bool | None = None,
    folder: Path | None = None,
) -> tuple[Weights, int]:
    """The bytes of a checkpoint's parameters as `load_model` will have them, and those of a number it computes with.

    on_cpu: whether MLX's CPU backend will compute; as on this machine when it is None. folder: where a tokenizer may be.
    """
    spec = contents.spec
    packings = {**contents.quantized, **dense_packings(contents, dense)}
    if dtype is None:
        plain = _plain_bytes(contents, packings)
        dtype = default_dtype(spec, _stored_type(contents), packings.keys(), plain, on_cpu)
    unpacked, shapes = modules_to_unpack(contents, dtype, dense, on_cpu), spec.parameter_shapes()
    sizes: Counter[str] = Counter()
    loading = 0
    for parameter in _in_reading_order(contents):
        module = _module(parameter)
        if module in unpacked:
            if parameter.name == f"{module}.weight":
                sizes[module] += math.prod(shapes[parameter.name]) * dtype.size
            continue
        kind = "experts" if ".experts." in module and not parameter.name.endswith(".bias") else module
        if module in packings and module not in contents.quantized and parameter.name == f"{module}.weight":
            parts = packings[module].parts(parameter.shape, "F16").values()
            sizes[kind] += sum(
                math.prod(shape) * (4 if type_name == "U32" else 1 if type_name == "U8" else dtype.size)
                for type_name, shape in parts
            )
            loading = max(loading, sum(sizes.values()) + math.prod(parameter.shape) * ITEM_SIZES[parameter.dtype])
            continue
        stored = math.prod(parameter.shape) * ITEM_SIZES[parameter.dtype]
        itemsize = 4 if spec.keeps_float32(parameter.name) else dtype.size
        kept = math.prod(parameter.shape) * itemsize if parameter.dtype in FLOAT_TYPES else stored
        sizes[kind] += kept
        if kept != stored:
            loading = max(loading, sum(sizes.values()) + stored)
    layer, experts = spec.layers[0], sizes.pop("experts", 0)
    can_stream = bool(experts) and contents.layout in ("openai-hf", "openai-original", "openelm-mlx")
    can_stream &= all(module in contents.quantized for module in _expert_modules(contents))
    tokenizer = next((folder / name for name in TOKENIZER_FILES if folder and (folder / name).is_file()), None)
    weights = Weights(
        dense=sum(sizes.values()),
        slot=experts // max(1, layer.num_experts),
        embedding=0 if spec.tied_head or not can_stream else sizes["model.embed_tokens"],
        can_stream=can_stream,
        tokenizer=0 if tokenizer is None else tokenizer.stat().st_size,
        loading=loading,
        looked_up=0 if spec.tied_head else sizes["model.embed_tokens"],
    )
    return weights, dtype.size


def packed_weights(
    contents: Contents, dtype: mx.Dtype | None = None, on_cpu: bool | None = None, folder: Path | None = None
) -> Weights:
    """What `memory_weights` says with dense_bits=8, which a plan may advise."""
    return memory_weights(contents, dtype, dense_packing(8), on_cpu, folder)[0]


def _expert_modules(contents: Contents) -> set[str]:
    return {_module(each) for each in contents.parameters.values() if ".experts." in each.name}


def dense_packing(bits: int | None) -> Quantization | None:
    """What `dense_bits` asks for. Raises SettingError for bits that MLX does not have."""
    if bits is None:
        return None
    if isinstance(bits, bool) or bits not in DENSE_BITS:
        raise SettingError(f"dense_bits is {bits!r}: choose {', '.join(map(str, DENSE_BITS))}, or leave it out.")
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
    on_cpu = mx.default_device() == mx.Device(mx.cpu) if on_cpu is None else on_cpu
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
    raise SettingError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}.")


@hears_the_disk(CheckpointError)
def locate(source: Source, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The folder or file on this machine that holds `source`, downloaded first when it is a repository."""
    if str(source) in DEMOS:
        return DEMOS[str(source)]
    path = existing_path(source)
    if path is not None:
        return path
    found = repository(source, revision)
    if found is not None:
        try:
            return hub.download(found[0], choose_model_files, revision=found[1], progress=progress)
        except HubError as error:
            raise HubError(f"There is no folder {source} here, and as a repository: {error}") from error
    known = known_name(str(source))
    if known is not None:
        raise CheckpointError(f"{source} is another program's name for {known}: give {known}.")
    raise CheckpointError(
        f"There is no file or folder {source}: check the path, or give a Hugging Face repository as owner/name, "
        f"or one of {', '.join(DEMOS)}."
    )


def repository(source: Source, revision: str | None = None) -> tuple[str, str | None] | None:
    """The repository and revision that `source` names, as owner/name or as an address of the Hub; None for a path.

    Raises HubError for an address of something else, and for two revisions that are not the same.
    """
    if not isinstance(source, str) or source in DEMOS or existing_path(source) is not None:
        return None
    found = repo_of(source)
    if found is None:
        return None
    repo, named = found
    if named is not None and revision not in (None, named):
        raise HubError(f"{source} names the revision {named!r} and the revision is {revision!r}: give one of the two.")
    return repo, named if revision is None else revision


def existing_path(source: Source) -> Path | None:
    """The file or folder of that name, if there is one. Raises CheckpointError for what can be no name."""
    if not isinstance(source, (str, Path)):
        raise CheckpointError(
            f"The source is {source!r}: give a folder, a file, or a Hugging Face repository, as text."
        )
    try:
        path = Path(source).expanduser()
        return path if os.path.lexists(path) else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, an unknown user's home
        raise CheckpointError(f"{str(source)[:80]!r} is no path: {error}.") from error


def choose_model_files(files: list[RepoFile]) -> list[str]:
    """The files of a repository that loading and converting need: one layout's weights, config, tokenizer, licence.

    Weights in subfolders are other layouts' copies of the same model, and pickles repeat what safetensors hold.
    """
    top = [file.name for file in files if "/" not in file.name and not is_macos_own(file.name)]
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights:
        weights = [name for name in top if name.endswith((".pt", ".pth"))]
    others = [
        name
        for name in top
        if name.endswith((".json", ".yaml", ".yml", ".jinja", ".md", ".txt")) or name in TOKENIZER_FILES
        or re.match(r"(LICEN[CS]E|NOTICE|ACKNOWLEDG|USA?[GS]?E_POLICY)", name, re.IGNORECASE)
    ]  # fmt: skip
    return sorted({*weights, *others})


@hears_the_disk(TokenizerError)
def find_tokenizer(
    path: Path, spec: ModelSpec, asked: Source | None = None, progress: Progress | None = None
) -> Tokenizer | None:
    """The tokenizer to use with the model at `path`, by the search order of `load`; None when there is none."""
    if asked is not None:
        return _checked_tokenizer(load_tokenizer(_tokenizer_path(asked, progress)), spec, str(asked))
    folder = path if path.is_dir() else path.parent
    # OpenAI's repositories have it at the top, above the folder with the original weights.
    for place in (folder, folder.parent) if is_same_name(folder.name, "original") else (folder,):
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return _checked_tokenizer(load_tokenizer(place), spec, str(place))
    if spec.family != "openelm":
        return None
    for repo in LLAMA_TOKENIZER_REPOS:
        for name in TOKENIZER_FILES:
            cached = hub.cached_file(repo, name)
            if cached is not None:
                return _checked_tokenizer(load_tokenizer(cached), spec, repo)
    return None


def stored_template(
    config: Mapping[str, Any], asked: str | None, source: Source, family: str = "openelm"
) -> TemplateChoice:
    """The chat template to use and why: asked for, else stored by conversion, else by the source's name.

    gpt-oss has Harmony and no other. Raises SettingError for a template that does not exist.
    """
    if family == "gpt_oss" and asked in (None, HARMONY):
        return TemplateChoice(HARMONY, "because gpt-oss was trained with nothing else")
    ours = config.get("openelm_mlx")
    stored = ours.get("chat_template") if isinstance(ours, Mapping) else None
    return choose_template(asked, stored, str(source))


def checked_context_length(asked: int | None, spec: ModelSpec) -> int:
    """The context length to work with. Raises SettingError when it is none or longer than the model's."""
    if asked is None:
        return spec.context_length
    if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= spec.context_length:
        raise SettingError(
            f"context_length is {asked!r}: it must be a whole number, at least 1 and at most the model's "
            f"{spec.context_length:,}."
        )
    return asked


def checked_wire(asked: bool | None) -> bool | None:
    """Whether to wire. Raises SettingError for what is neither True, False nor None."""
    if asked is not None and not isinstance(asked, bool):
        raise SettingError(f"wire is {asked!r}: it must be True, False, or None, which leaves it to the plan.")
    return asked


def _tokenizer_path(asked: Source, progress: Progress | None) -> Path:
    if str(asked) in DEMOS:
        return DEMOS[str(asked)]
    path = existing_path(asked)
    if path is not None:
        return path
    found = repository(asked)
    if found is not None:
        wanted = (*TOKENIZER_FILES, *COMPANION_FILES)
        repo, revision = found
        return hub.download(repo, lambda files: [f.name for f in files if f.name in wanted], revision, progress)
    raise TokenizerError(f"There is no tokenizer at {asked}: give a file, a folder, or a Hugging Face repository.")


def _checked_tokenizer(tokenizer: Tokenizer, spec: ModelSpec, origin: str) -> Tokenizer:
    # Fewer tokens than rows are padding, a hundred or so; more tokens than rows, or far fewer, are another vocabulary.
    if not 0 <= spec.vocab_size - tokenizer.vocab_size <= max(_MOST_PADDING_ROWS, spec.vocab_size // 50):
        raise TokenizerError(
            f"The tokenizer at {origin} has {tokenizer.vocab_size:,} tokens and the model {spec.vocab_size:,}: it belongs "
            "to another model; give the right one with --tokenizer."
        )
    if spec.bos_token is not None and tokenizer.bos_token != spec.bos_token:
        raise TokenizerError(
            f"The tokenizer at {origin} begins texts with token {tokenizer.bos_token} and the model with {spec.bos_token}: "
            "it belongs to another model; give the right one with --tokenizer."
        )
    return tokenizer


def _module(parameter: Parameter) -> str:
    return parameter.name.rpartition(".")[0]


def _stored_type(contents: Contents) -> mx.Dtype:
    """The most frequent floating type of the checkpoint's parameters, by their sizes."""
    counts: Counter[str] = Counter()
    for parameter in contents.parameters.values():
        if parameter.dtype in FLOAT_TYPES:
            counts[parameter.dtype] += math.prod(parameter.shape)
    return FLOAT_TYPES[counts.most_common(1)[0][0]]


def _plain_bytes(contents: Contents, packings: Collection[str]) -> int:
    """Bytes in 16 bits of the parameters that are no part of a packed module."""
    return sum(
        2 * math.prod(parameter.shape)
        for parameter in contents.parameters.values()
        if _module(parameter) not in packings
    )


def _check_scales(weights: list[tuple[str, mx.array]], packings: Mapping[str, Quantization]) -> None:
    """Raise CheckpointError for a scale that stands for no number: 255 in the shared exponents of MX formats (E8M0)."""
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
                f"The scales of {name.removesuffix('.scales')} have a byte of 255, which stands for no number (NaN): the "
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
