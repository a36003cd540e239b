"""From a source (a demo's name, a folder, a file, a Hugging Face repository) to a model and its tokenizer.

Read `prepare` first: it opens the source (sources.py), decides how each parameter is kept (placement.py), plans the memory
(memory/plan.py; over several machines link/several.py) and finds a tokenizer (tokenizers.py). `Prepared.read` then reads the
tensors (weights.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from .adapters import Adapters, adapter_id, check_base, given_adapters, planned_bytes, put_adapter, stored_base_hash
from .arguments import FUNCTION, NAME, checked_call
from .checkpoint.reader import Checkpoint
from .checks import whole_number
from .errors import CheckpointError, SettingError
from .experts.residency import Streaming, checked_slots
from .files import hears_the_disk, shown
from .hub import Progress
from .link.several import Several, checked_workers, spread_out
from .link.team import DEADLINE
from .memory.admission import MOST_REQUESTS
from .memory.calibration import calibrated
from .memory.choices import stored_choices
from .memory.machine import Machine, allow_open_files, backend_name, this_machine
from .memory.plan import make_plan
from .memory.plan_types import MemoryPlan, PlanRequest, Weights
from .memory.presets import preset_bits
from .memory.sizes import parse_memory
from .models import build_model
from .models.adapter_sets import Served
from .models.low_rank import Adapter
from .parallel.joining import agreeing, share_out, sharing_group
from .placement import Placement, dense_packing, packed_weights, parse_dtype
from .platforms import keep_float32, use_device
from .runtime import runtime_of
from .sources import Source, SourceName
from .specs import ModelSpec, checked_kv_bits
from .text.tokenizer import Tokenizer
from .tokenizers import find_tokenizer, resolve_chat_template
from .weights import read_model

if TYPE_CHECKING:
    from .models import Model


@hears_the_disk(CheckpointError)
@checked_call("om.load", revision=NAME, chat_template=NAME, progress=FUNCTION)
def load(
    source: SourceName,
    *,
    context_length: int | None = None,
    dtype: str | mx.Dtype | None = None,
    preset: str | None = None,
    dense_bits: int | None = None,
    kv_bits: int | None = None,
    expert_slots: int | None = None,
    memory_limit: int | str | None = None,
    batch_size: int = 1,
    wire: bool | None = None,
    tokenizer: SourceName | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    adapter: Adapters | None = None,
    progress: Progress | None = None,
    workers: str | Sequence[str] | None = None,
    secret_file: str | os.PathLike[str] | None = None,
    layers: str | Sequence[int] | None = None,
    worker_timeout: float = DEADLINE,
    parallel: str | None = None,
) -> tuple[Model, Tokenizer | None]:
    """The model and the tokenizer of `source`, ready to generate.

    Args:
        source: "demo-openelm", a folder, a weight file, or a Hugging Face repository as owner/name (at
            `revision`).
        context_length: At most the model's own, which is the default.
        dtype: "float32", "bfloat16", "float16" or an mlx type; None keeps the stored one, with the two
            exceptions of `default_dtype`.
        preset: "exact" (as released, which is the default), "balanced" (dense parts in 8 bits) or "smallest"
            (in 4), see memory/presets.py; `plan` shows what each takes and does.
        dense_bits: Instead, the number of bits itself: matrices that are not packed (attention, embedding and
            head of gpt-oss; all of OpenELM's) are quantized to this many bits as they are read.
        kv_bits: 8 halves the memory of keys and values in the layers that keep them all; 16 leaves them as they
            are, which is the default.
        expert_slots: Keep only this many of each layer's experts in memory and read the others from the
            checkpoint's files when they are chosen, with the same answers bit for bit (experts/residency.py);
            the embedding stays on disk too where the head has a matrix of its own.
        memory_limit: Bytes or "10GB", for MLX's memory, its buffer cache and the process's own together;
            experts that do not fit are left on disk, and a model that still does not fit is refused before a
            tensor is read. None: what the machine has. `model.plan` says what was planned.
        batch_size: How many requests will be at work at once: the prompt's chunk, the experts in memory and the
            buffers that MLX keeps are chosen with room for each one's keys and values, as `plan` says with it.
        wire: Whether macOS is asked to keep the model in memory (wired, never paged out) from the first request
            until the model is deleted; None: only where it takes most of what the GPU may use.
        tokenizer: A file, folder or repository; without it the search is: the source itself, then Llama
            tokenizers in the Hugging Face cache; when there is none, the second result is None and prompts must
            be token ids.
        chat_template: "openelm-instruct", "plain", or gpt-oss's "harmony"; else what conversion stored, else
            what the source's name says.
        progress: Called with (bytes so far, total bytes) while something is downloaded, and while several machines
            read their layers.
        workers: Other machines that have the layers which this one has no room for, as "host:port"; each runs
            `openelm_mlx serve-layers` and has its own copy of the files (docs/several-macs.md).
        secret_file: A file with the secret that all of them share; without it only this very machine is reached.
        layers: How many layers each machine gets, this one first, such as (20, 16); None: the fastest is filled first.
        worker_timeout: Seconds of silence after which a worker is given up. It says every second that it is at work.
        parallel: "tensor" or "experts" where `mlx.launch` started this program on several machines: each of them has
            its share of every layer, and all of them have to make the same calls (docs/several-macs.md).

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
        batch_size=batch_size,
        wire=wire,
        tokenizer=tokenizer,
        chat_template=chat_template,
        revision=revision,
        adapter=adapter,
        progress=progress,
        workers=workers,
        secret_file=secret_file,
        layers=layers,
        worker_timeout=worker_timeout,
        parallel=parallel,
    ).read()


@dataclass
class Prepared:
    """What is known about a source before its tensors are read, which takes half a minute for a large model.

    model: has the same shape, plan, context and settings as the one that `read` returns, so requests can be checked
    against it. It has no weights, and nothing may be computed with it. several: the machines that
    it goes over.
    """

    model: Model
    tokenizer: Tokenizer | None
    _read: Callable[[], Model]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    several: Several | None = None

    @property
    def plan(self) -> MemoryPlan | None:
        """What the model will take."""
        return runtime_of(self.model).plan

    def read(self) -> tuple[Model, Tokenizer | None]:
        """The model with its weights, and the tokenizer: what `load` returns. To be called once."""
        model, shape = self._read(), self.model
        model.context_length, model.kv_bits = shape.context_length, shape.kv_bits
        runtime = runtime_of(model)
        runtime.plan, runtime.tokenizer = runtime_of(shape).plan, self.tokenizer
        served = shape.adapters.served
        for name, id in zip(served.names, served.ids, strict=True):
            found = self.adapters.pop(name)  # each is given up once it stands beside the weights
            put_adapter(model, name, found, name == shape.adapters.active, id, is_planned=True)
        return model, self.tokenizer

    def serving(self, adapters: dict[str, Adapter], given: Adapters | None) -> Prepared:
        """The same with these adapters, which `given` named; requests are checked against their names."""
        self.adapters = adapters
        served = self.model.adapters
        served.served = Served(tuple(adapters), tuple(map(adapter_id, adapters.values())))
        served.active = None if isinstance(given, Mapping) else next(iter(adapters), None)
        return self


@agreeing
@hears_the_disk(CheckpointError)
def prepare(
    source: SourceName,
    *,
    context_length: int | None = None,
    dtype: str | mx.Dtype | None = None,
    preset: str | None = None,
    dense_bits: int | None = None,
    kv_bits: int | None = None,
    expert_slots: int | None = None,
    memory_limit: int | str | None = None,
    batch_size: int = 1,
    wire: bool | None = None,
    tokenizer: SourceName | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    adapter: Adapters | None = None,
    progress: Progress | None = None,
    opened: Source | None = None,
    machine: Machine | None = None,
    workers: str | Sequence[str] | None = None,
    secret_file: str | os.PathLike[str] | None = None,
    layers: str | Sequence[int] | None = None,
    worker_timeout: float = DEADLINE,
    parallel: str | None = None,
) -> Prepared:
    """Everything that `load` does except reading the tensors, with the same arguments and errors.

    opened: the source, where it has been opened already. machine: this one, as far as it is known.
    """
    dense_bits = preset_bits(preset, dense_bits)
    wanted_type = parse_dtype(dtype)
    asked = checked_workers(workers, secret_file, layers, worker_timeout)
    allow_open_files()
    keep_float32()
    use_device()
    opened = Source.open(source, revision, progress) if opened is None else opened
    spec, contents = opened.spec, opened.contents
    request = PlanRequest(
        memory_limit=parse_memory(memory_limit),
        context_length=None if context_length is None else checked_context_length(context_length, spec),
        batch_size=checked_batch_size(batch_size),
        kv_bits=checked_kv_bits(spec, kv_bits),
        dense_bits=dense_bits,
        expert_slots=None if expert_slots is None else checked_slots(spec, expert_slots),
        wire=checked_wire(wire),
    )
    adapters = given_adapters(adapter, spec, progress)
    if any(each.base.get("hash") for each in adapters.values()):
        base = stored_base_hash(contents, opened.checkpoint)
        for each in adapters.values():
            check_base(each, base)
    placement = Placement.of(contents, wanted_type, dense_packing(dense_bits))
    adapter_bytes = planned_bytes(spec, adapters, backend_name())
    here = calibrated(this_machine() if machine is None else machine)
    group = sharing_group(parallel)
    several = shared = None
    if asked is not None:
        several = spread_out(opened, placement, request, asked, here, adapter_bytes)
        own, plan = several.own.placement, several.plan
    elif group is not None:
        shared = share_out(opened, placement, request, str(parallel), group, here)
        own, plan = shared.placement, shared.plan
    else:
        own = placement
        weights = placement.weights(opened.folder).with_adapters(*adapter_bytes)

        def with_8_bits() -> Weights:
            return packed_weights(contents, wanted_type).with_adapters(*adapter_bytes)

        packed = with_8_bits if dense_bits is None else None
        plan = make_plan(str(source), spec, weights, here, request, placement.dtype.size, packed)
        if not plan.fits:
            raise plan.refusal()
    shape = build_model(own.contents.spec)  # lazy: its arrays are never evaluated
    if several is not None:
        several.close_with(shape)
    if shared is not None:
        shared.attach(shape)
    slots = plan.expert_slots
    streaming = None if slots is None else Streaming(own.contents, opened.checkpoint, slots)
    # Before the tensors are read: a tokenizer that does not fit is reported at once.
    template = resolve_chat_template(opened.config, chat_template, opened.template_name, spec.family).template
    found = find_tokenizer(opened.folder, spec, tokenizer, progress, template)
    shape.context_length = checked_context_length(context_length, spec)
    shape.kv_bits = kv_bits
    runtime = runtime_of(shape)
    runtime.plan, runtime.tokenizer = plan, found
    read = partial(_read, source, own, opened.checkpoint, streaming)
    if several is not None:
        read = partial(several.read, read, progress)
    if shared is not None:
        read = partial(shared.read, partial(read, prepare=shared.make_room))
    return Prepared(shape, found, read, several=several).serving(adapters, adapter)


@hears_the_disk(CheckpointError)
def _read(
    source: SourceName,
    placement: Placement,
    checkpoint: Checkpoint,
    streaming: Streaming | None,
    progress: Progress | None = None,
    prepare: Callable[[Model], None] | None = None,
) -> Model:
    """The model of a source that was prepared; an error of its disk names the source."""
    return read_model(placement, checkpoint, streaming, stored_choices(), progress, prepare)


def checked_context_length(asked: int | None, spec: ModelSpec) -> int:
    """The context length to work with. Raises SettingError when it is not one, or is longer than the model's."""
    if asked is None:
        return spec.context_length
    return whole_number("context_length", asked, high=spec.context_length, whose="the model's ")


def checked_batch_size(asked: int) -> int:
    """How many requests to plan for. Raises SettingError for what is no whole number or more than a plan speaks of."""
    return whole_number("batch_size", asked, high=MOST_REQUESTS)


def checked_wire(asked: bool | None) -> bool | None:
    """Whether to wire the model's memory. Raises SettingError for anything but True, False and None."""
    if asked is not None and not isinstance(asked, bool):
        raise SettingError(f"wire is {shown(asked)}: it must be True, False, or None, which leaves it to the plan.")
    return asked
