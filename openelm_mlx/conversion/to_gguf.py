"""Converting an open source to a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.gguf_names import ARCHITECTURES
from ..checkpoint.gguf_writer import GgufWriter, gguf_package, output_file
from ..errors import SettingError
from ..outputs import checked_output
from ..sources import Source
from ..specs import ModelSpec
from ..text.tokenizer import Tokenizer
from .gguf_fields import gguf_fields
from .gguf_plan import GgufPlan, plan_gguf
from .gguf_verify import verify_gguf
from .report import ByteCount, ConversionReport, StageProgress, no_buffer_cache, stage
from .source_state import source_changed

SUFFIX = ".gguf"

# docs/export.md says how these were measured.
_YARN_NOTE = (
    "llama.cpp rounds YaRN's two bounds, OpenAI's code does not, and GGUF has no field for it: some rotary frequencies of "
    "gpt-oss differ there, so that answers deviate from the original's, after a long prompt more than after a short one."
)
_MXFP4_NOTE = (
    "llama.cpp rounds activations to 8 bits before it multiplies them with MXFP4 weights, so that answers deviate from this "
    'library\'s even after a short prompt; gguf_experts="f32" avoids that, at eight times the size of the experts.'
)


@dataclass(frozen=True)
class GgufOptions:
    """Options for a GGUF file; see `convert`."""

    gguf_type: str | None = None
    gguf_experts: str | None = None
    verify: bool = False
    dry_run: bool = False


def is_gguf(path: str | Path | None) -> bool:
    """Whether a destination or a source is a GGUF file, by its name."""
    return path is not None and str(path).lower().endswith(SUFFIX)


def refuse_folder_options(**options: object) -> None:
    """Raise SettingError for the first given option that does not apply to a GGUF file."""
    for name, value in options.items():
        if value is not None and value is not False:
            instead = "gguf_type" if name in ("quantize", "preset", "dtype", "group_size") else None
            advice = f"use {instead}" if instead else "leave it out"
            raise SettingError(f"{name} is for a folder, and the destination is a GGUF file: {advice}.")


def convert_to_gguf(
    source: Source,
    tokenizer: Tokenizer | None,
    template: str | None,
    destination: Path | None,
    options: GgufOptions,
    progress: StageProgress | None,
) -> ConversionReport:
    """Write `source` as a GGUF file. The other arguments and the errors are those of `convert`."""
    gguf_package()
    target = None
    if not options.dry_run:
        assert destination is not None
        target = checked_output(destination, "The GGUF file", overwrite=None)
    source_is_here = source.is_here
    plan = plan_gguf(
        source.contents, source.checkpoint if source_is_here else None, options.gguf_type, options.gguf_experts
    )
    report = _report(source, plan, tokenizer, template)
    if target is None:
        return report
    source = source.fetch(target, plan.nbytes, stage("download", progress))
    if not source_is_here:  # the scales can be checked only now
        plan = plan_gguf(source.contents, source.checkpoint, options.gguf_type, options.gguf_experts)
        report = _report(source, plan, tokenizer, template)
    fields = gguf_fields(plan.spec, tokenizer, template, plan.main_type, source.name, source.repo, source.folder)
    file = output_file(target.name, ARCHITECTURES[plan.spec.family], fields, plan.outputs)
    fingerprint = plan.fingerprint(source.checkpoint.files, file.header)
    with no_buffer_cache(), GgufWriter(target, [file], fingerprint) as writer:
        num_resumed = writer.num_finished
        remaining = writer.remaining
        counter = ByteCount(
            sum(tensor.nbytes for tensor in file.tensors),
            sum(tensor.nbytes for tensor in file.tensors) - sum(tensor.nbytes for tensor in remaining),
            progress,
        )
        for tensor in remaining:
            writer.write(tensor.name, _counted(plan, tensor.name, source, counter))
        if plan.fingerprint(source.checkpoint.files, file.header) != fingerprint:
            raise source_changed(source.name)
        whole = writer.finish()
        verification = None
        if options.verify:
            checksum = writer.checksums[file.name]
            verification = verify_gguf(whole, checksum, plan, source.checkpoint, stage("verify", progress))
        writer.publish()
    return replace(
        report,
        destination=writer.destination,
        files={writer.destination.name: file.nbytes},
        checksums=dict(writer.checksums),
        num_resumed=num_resumed,
        verification=verification,
    )


def _counted(plan: GgufPlan, name: str, source: Source, counter: ByteCount) -> Iterator[memoryview | bytes]:
    return map(counter.add, plan.weight_of[name].pieces(source.checkpoint))


def _report(source: Source, plan: GgufPlan, tokenizer: Tokenizer | None, template: str | None) -> ConversionReport:
    return ConversionReport(
        source=source.name,
        destination=None,
        layout=source.contents.layout,
        tensors=plan.tensors,
        nbytes=plan.nbytes,
        source_nbytes=sum(entry.nbytes for entry in source.checkpoint.entries.values()),
        dtype=plan.main_type.lower(),
        quantization=None,
        chat_template=template,
        tokenizer=() if tokenizer is None else tuple(file.name for file in tokenizer.files),
        gguf_types=plan.types,
        notes=tuple(_notes(plan.spec, plan, tokenizer)),
    )


def _notes(spec: ModelSpec, plan: GgufPlan, tokenizer: Tokenizer | None) -> Iterator[str]:
    if tokenizer is None:
        yield "The file has no tokenizer, and llama.cpp needs one: add it with tokenizer=."
    if any(weight.is_unpacked for weight in plan.weights):
        yield (
            "GGUF has no type for some of these packed weights, so they are stored as float32, without rounding; "
            'gguf_type="q8_0" makes the file about a quarter of the size.'
        )
    if spec.family == "gpt_oss" and spec.yarn is not None and not spec.yarn.truncate:
        yield _YARN_NOTE
    if spec.family == "gpt_oss" and any(".ffn_" in tensor.name and tensor.dtype == "MXFP4" for tensor in plan.tensors):
        yield _MXFP4_NOTE
