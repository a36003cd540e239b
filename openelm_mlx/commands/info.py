"""`python -m openelm_mlx info`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .output import report, report_json

if TYPE_CHECKING:
    from ..specs import ModelSpec

HELP = "show what a checkpoint holds, without reading its tensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", nargs="?", default="demo-openelm", help="a demo, folder, file or repository")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--adapter", metavar="PATH", help="also what this adapter of the model holds")
    parser.add_argument("--layers", action="store_true", help="list the shape of every layer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what is known. Returns the exit code."""
    facts = gather(args.source, args.revision, args.adapter)
    if args.json:
        report_json(facts)
        return 0
    layers, adapter = facts.pop("layers"), facts.pop("adapter", None)
    for name, value in (facts | {f"adapter_{name}": each for name, each in (adapter or {}).items()}).items():
        text = f"{value:,}" if isinstance(value, int) else value
        report(f"{name.replace('_', ' '):22} {text}")
    if args.layers:
        report("\nlayer  query heads  kv heads  head dim  feed-forward width")
        for i, layer in enumerate(layers):
            heads = f"{layer['num_heads']:11}  {layer['num_kv_heads']:8}  {layer['head_dim']:8}"
            report(f"{i:5}  {heads}  {layer['intermediate_size']:18}")
    return 0


def gather(source: str, revision: str | None = None, adapter: str | None = None) -> dict[str, Any]:
    """What the headers and the config say, by name, and what an adapter of the model holds."""
    from ..sources import Source
    from ..tokenizers import resolve_chat_template

    opened = Source.open(source, revision)
    spec, contents, checkpoint = opened.spec, opened.contents, opened.checkpoint
    choice = resolve_chat_template(opened.config, None, opened.template_name, spec.family)
    quantizations = sorted({f"{q.bits} bits, {q.mode}, groups of {q.group_size}" for q in contents.quantized.values()})
    return {
        "path": str(opened.path),
        "family": spec.family,
        "size": spec.size or "not a released one",
        "layout": contents.layout,
        "parameters": spec.num_parameters(),
        "tensors": len(checkpoint.entries),
        "tensor_bytes": sum(entry.nbytes for entry in checkpoint.entries.values()),
        "types": ", ".join(sorted({entry.dtype for entry in checkpoint.entries.values()})),
        "quantized": "; ".join(quantizations) or "no",
        "vocabulary_rows": spec.vocab_size,
        "context_length": spec.context_length,
        "kv_cache_per_token": f"{spec.kv_cache_bytes(1):,} bytes in 16 bit",
        "chat_template": f"{choice.template} ({choice.reason})",
        "layers": [vars(layer) for layer in spec.layers],
    } | ({} if adapter is None else {"adapter": of_adapter(adapter, spec)})


def of_adapter(source: str, spec: ModelSpec) -> dict[str, Any]:
    """What an adapter holds, by name. Raises CheckpointError where it belongs to another model."""
    from ..adapters import bytes_of, locate_adapter
    from ..checkpoint.adapter_files import adapter_format, read_adapter
    from ..models.adapter_targets import targets_of

    place = locate_adapter(source)
    found, targets = read_adapter(place, spec), targets_of(spec)
    layers = [layer for name in found.pairs if (layer := targets[name].layer) is not None]
    kind = "DoRA" if found.is_dora else "rsLoRA" if found.use_rslora else "LoRA"
    return {
        "format": adapter_format(place)[0],
        "kind": kind,
        "ranks": ", ".join(map(str, sorted({pair.rank for pair in found.pairs.values()}))),
        "factors": ", ".join(f"{scale:.6g}" for scale in sorted({pair.scale for pair in found.pairs.values()})),
        "matrices": ", ".join(dict.fromkeys(targets[name].part for name in found.pairs)),
        "layers": f"{len(set(layers))} of {len(spec.layers)}",
        "parameters": found.num_parameters,
        "bytes_in_memory": bytes_of(spec, {"": found}),
        "base": found.base.get("name", "not said"),
    }
