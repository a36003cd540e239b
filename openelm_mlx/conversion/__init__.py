"""Converting a checkpoint: any layout in, Apple's names out, cast and quantized, in the memory of one tensor.

`convert` below goes through all of it: source, plan, tokenizer, weights one by one, the other files, verification, and
the rename that makes the result visible. `plan.py` decides, `planned_weight.py` computes one weight,
`checkpoint/writer.py` writes, `other_files.py` has what stands beside the weights (`card.py` the licence),
`verify.py` compares. A GGUF file is written by `to_gguf.py` and read by `from_gguf.py`; `for_swift.py` says which
models a Swift app can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import mlx.core as mx

from .. import hub
from ..adapters import check_base, locate_adapter, stored_base_hash
from ..arguments import FLAG, FUNCTION, NAME, PATH, Kind, checked_call
from ..checkpoint.adapter_files import read_adapter
from ..checkpoint.destination import check_destination
from ..checkpoint.reader import Checkpoint
from ..checkpoint.safetensors_plan import MAX_FILE_BYTES
from ..checkpoint.writer import CheckpointWriter
from ..errors import CheckpointError, DestinationError, HubError, SettingError
from ..files import expanded, hears_the_disk
from ..finder import files_of
from ..memory.presets import preset_bits
from ..memory.sizes import parse_size
from ..outputs import checked_output
from ..sources import Source, SourceName
from ..text.tokenizer import Tokenizer
from ..tokenizers import find_tokenizer, resolve_chat_template
from .from_gguf import open_source
from .gguf_verify import GgufVerification
from .merge import AdapterToMerge, MergeReport, merged_contents
from .other_files import PROGRAM, other_files
from .plan import ConversionPlan, plan_conversion
from .planned_weight import PlannedTensor, PlannedWeight
from .report import ByteCount, ConversionReport, StageProgress, bytes_of, no_buffer_cache, stage
from .source_state import source_changed
from .to_gguf import GgufOptions, convert_to_gguf, is_gguf, refuse_folder_options
from .verify import LayerError, Verification
from .verify import verify as verify_files

__all__ = [
    "ConversionReport",
    "GgufVerification",
    "LayerError",
    "MergeReport",
    "PlannedTensor",
    "StageProgress",
    "Verification",
    "convert",
    "plan_conversion",
]

# Nothing, where nothing is written, is told in a sentence of its own.
DESTINATION = Kind(lambda value: value in (None, "") or PATH.accepts(value), PATH.wanted)


@hears_the_disk(CheckpointError)
@checked_call(
    "om.convert", destination=DESTINATION, chat_template=NAME, revision=NAME, verify=FLAG, dry_run=FLAG, private=FLAG,
    merge_anyway=FLAG, on_merge=FUNCTION, progress=FUNCTION,
)  # fmt: skip
def convert(
    source: str | Path,
    destination: str | Path | None,
    quantize: str | int | None = None,
    dtype: str | mx.Dtype | None = None,
    *,
    preset: str | None = None,
    group_size: int | None = None,
    target: str | None = None,
    gguf_type: str | None = None,
    gguf_experts: str | None = None,
    tokenizer: str | Path | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    adapter: SourceName | None = None,
    merge_anyway: bool = False,
    on_merge: Callable[[MergeReport], None] | None = None,
    max_file_bytes: int | str = MAX_FILE_BYTES,
    verify: bool = False,
    dry_run: bool = False,
    upload: str | None = None,
    private: bool = False,
    progress: StageProgress | None = None,
) -> ConversionReport:
    """Convert a checkpoint to a folder that this library and, for OpenELM, mlx-lm load, or to a GGUF file.

    Args:
        source: A folder, a file, a Hub repository as owner/name (at `revision`), or a demo, in any layout that
            is read; or a GGUF file of one of the two families.
        destination: A folder that does not exist yet, or a file whose name ends in .gguf; it appears when it is
            whole. After Ctrl-C or a crash the same call goes on where it stopped, from DESTINATION.partial; after
            an error nothing is left.
        quantize: 2, 3, 4, 5, 6 or 8 (bits, with `group_size` 32, 64 or 128), "mxfp4", "mxfp8", "nvfp4", or
            "mixed": 4 bits, and 8 for the embedding and the outer layers.
        preset: "exact" (nothing is quantized), "balanced" (8 bits) or "smallest" (4 bits) instead.
        dtype: "float32", "bfloat16" or "float16" for what is not packed; None keeps the stored type (see
            `plan_conversion` for the exceptions). On a quantized source it unpacks the weights.
        target: "swift": a folder for apps with mlx-swift-lm, q, k and v and gate and up apart; a model that it cannot
            run is refused.
        gguf_type: Of a GGUF file's matrices: "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0" or "mxfp4";
            None keeps the source's numbers, packed ones too where ggml has a type with the same.
        gguf_experts: The same for gpt-oss's experts; None leaves them in MXFP4 where they are.
        tokenizer: As in `load`; both are stored with the weights.
        chat_template: See tokenizer.
        adapter: An adapter that is merged into the weights, as in `load`. It is merged in float32; what the result is
            rounded to follows from `dtype` and `quantize`, and a packed matrix of the source that it changes is
            unpacked, or packed anew, by them. How much of what it changes is kept is measured before anything is
            written, and what would lose more than half is refused: MXFP4 does, with most adapters.
        merge_anyway: Write it all the same.
        on_merge: Called with what is kept (`MergeReport`), before anything is written.
        max_file_bytes: Larger files are divided; bytes or text such as "500MB".
        verify: Read the result back and compare it with the original, before it appears.
        dry_run: Write nothing; of a repository only the headers are fetched.
        upload: A repository to send the folder to, `private` or not.
        progress: Called with a stage ("download", "convert", "verify"), what is done and of how much.

    Raises the errors of `openelm_mlx.errors`, each with the next step.
    """
    quantize = preset_bits(preset, quantize, ('preset="{}"', "quantize"))
    most_bytes = parse_size(max_file_bytes, "max_file_bytes")
    to_gguf = is_gguf(destination)
    if to_gguf:
        refuse_folder_options(
            quantize=quantize,
            dtype=dtype,
            group_size=group_size,
            target=target,
            max_file_bytes=None if most_bytes == MAX_FILE_BYTES else most_bytes,
            upload=upload,
            private=private,
            adapter=adapter,
        )
        place = None if dry_run else checked_output(str(destination), "The GGUF file", overwrite=None)
    else:
        _refuse_gguf_options(gguf_type, gguf_experts)
        place = _checked_request(destination, dry_run, upload, private)
    with open_source(source, revision, stage("download", progress), tokenizer is None) as opened:
        if to_gguf:
            found = find_tokenizer(opened.folder, opened.spec, tokenizer)
            template = _chat_template(opened, chat_template)
            options = GgufOptions(gguf_type, gguf_experts, verify, dry_run)
            return convert_to_gguf(opened, found, template, place, options, progress)
        merging = _merging(opened, adapter)
        plan = plan_conversion(opened.contents, opened.config, quantize, dtype, group_size, most_bytes, target, merging)
        found = find_tokenizer(opened.folder, plan.spec, tokenizer)
        template = _chat_template(opened, chat_template)
        report = _report(opened, plan, found, template)
        if place is not None:
            opened = opened.fetch(place, plan.nbytes, stage("download", progress))
            if merging is not None and merging.contents is not opened.contents:  # its tensors are here now
                merging = _merging(opened, adapter)
                plan = plan_conversion(
                    opened.contents, opened.config, quantize, dtype, group_size, most_bytes, target, merging
                )
        report = replace(report, merge=plan.merge_report(opened.checkpoint if opened.is_here else None))
        if report.merge is not None:
            if on_merge is not None:
                on_merge(report.merge)
            if not merge_anyway:
                report.merge.refuse_drowned()
        if place is None:
            return report
        report = _write_folder(opened, plan, found, report, place, verify, progress)
    url = None if upload is None else hub.upload(place, upload, private, f"Convert {opened.name} with {PROGRAM}")
    return replace(report, upload_url=url)


def _write_folder(
    opened: Source,
    plan: ConversionPlan,
    found: Tokenizer | None,
    report: ConversionReport,
    place: Path,
    verify: bool,
    progress: StageProgress | None,
) -> ConversionReport:
    """Write the planned files, and return the report."""
    fingerprint = plan.fingerprint(opened.checkpoint.files, opened.config)
    with no_buffer_cache(), CheckpointWriter(place, plan.files, fingerprint) as writer:
        num_resumed = writer.num_finished
        _write_weights(plan, opened, writer, progress)
        if plan.fingerprint(opened.checkpoint.files, opened.config) != fingerprint:
            raise source_changed(opened.name)
        folder = writer.assemble(other_files(opened, plan, found, report.chat_template))
        verification = None
        if verify:
            contents = opened.contents if plan.merging is None else merged_contents(plan.merging)
            original = (contents, opened.checkpoint)
            verification = verify_files(folder, writer.checksums, original, found, stage("verify", progress))
        sizes = {path.name: path.stat().st_size for path in sorted(files_of(folder))}
        writer.publish()
    return replace(
        report,
        destination=writer.destination,
        files=sizes,
        checksums=dict(writer.checksums),
        num_resumed=num_resumed,
        verification=verification,
    )


def _merging(opened: Source, adapter: SourceName | None) -> AdapterToMerge | None:
    """The adapter to merge, read and compared with the source. Raises CheckpointError, ConfigError."""
    if adapter is None:
        return None
    place = locate_adapter(adapter)
    found = read_adapter(place, opened.spec)
    if found.base.get("hash") and opened.is_here:
        check_base(found, stored_base_hash(opened.contents, opened.checkpoint))
    return AdapterToMerge(place.name, found, opened.contents)


def _refuse_gguf_options(gguf_type: str | None, gguf_experts: str | None) -> None:
    for name, value in (("gguf_type", gguf_type), ("gguf_experts", gguf_experts)):
        if value is not None:
            raise SettingError(f"{name} is for a GGUF file: name a destination that ends in .gguf, or leave it out.")


def _checked_request(destination: str | Path | None, dry_run: bool, upload: str | None, private: bool) -> Path | None:
    """The folder to write, or None for a dry run. All that can be checked is checked before any work."""
    if private and upload is None:
        raise SettingError("private is about an upload, and there is none: name a repository to upload to.")
    if upload is not None and not (isinstance(upload, str) and hub.is_repo_name(upload)):
        raise HubError(f"{upload!r} is not the name of a Hub repository: write OWNER/NAME.")
    if dry_run:
        return None
    if destination is None or not str(destination):
        raise SettingError("There is no destination: name a folder to write, or ask for a dry run.")
    target = expanded(destination, DestinationError)
    check_destination(target)
    parent = target.absolute().parent
    if not parent.exists():  # usually a typo in the path
        raise DestinationError(
            f"{target} cannot be written: there is no folder {parent} to hold it; make it first, or correct the path."
        )
    return target


def _chat_template(source: Source, asked: str | None) -> str | None:
    # gpt-oss has one format, which needs no name.
    if source.spec.family != "openelm":
        return None
    return resolve_chat_template(source.config, asked, source.template_name).template


def _report(
    source: Source, plan: ConversionPlan, tokenizer: Tokenizer | None, template: str | None
) -> ConversionReport:
    return ConversionReport(
        source=source.name,
        destination=None,
        layout=source.contents.layout,
        tensors=plan.tensors,
        nbytes=plan.nbytes,
        source_nbytes=sum(entry.nbytes for entry in source.checkpoint.entries.values()),
        dtype=plan.dtype,
        quantization=plan.quantization,
        chat_template=template,
        tokenizer=() if tokenizer is None else tuple(file.name for file in tokenizer.files),
    )


# --- weights ----------------------------------------------------------------------------------------------------------


def _write_weights(
    plan: ConversionPlan, source: Source, writer: CheckpointWriter, progress: StageProgress | None
) -> None:
    remaining = writer.remaining
    report = ByteCount(plan.nbytes, plan.nbytes - sum(tensor.nbytes for tensor in remaining), progress)
    for _, tensors in groupby(remaining, key=lambda tensor: plan.weight_of[tensor.name].tensors):
        names = [tensor.name for tensor in tensors]
        _write_weight(plan.weight_of[names[0]], names, source.checkpoint, writer, report)


def _write_weight(
    weight: PlannedWeight, names: list[str], checkpoint: Checkpoint, writer: CheckpointWriter, report: ByteCount
) -> None:
    """Write tensors of one weight: the first slice by slice, the others (scales and biases, which are small) after it."""
    order = [tensor.name for tensor in weight.tensors]
    first, *others = (order.index(name) for name in names)
    held: list[list[memoryview]] = [[] for _ in others]

    def pieces() -> Iterator[memoryview | bytes]:
        for arrays in weight.slices(checkpoint):
            for place, kept in zip(others, held, strict=True):
                kept.append(bytes_of(arrays[place]))
            yield report.add(bytes_of(arrays[first]))

    writer.write(names[0], pieces())
    for name, kept in zip(names[1:], held, strict=True):
        writer.write(name, map(report.add, kept))
