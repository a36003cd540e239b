"""`python -m openelm_mlx info`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import argparse
from typing import Any

from .output import report, report_json

HELP = "show what a checkpoint holds, without reading its tensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", nargs="?", default="demo-openelm", help="a demo, folder, file or repository")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--layers", action="store_true", help="list the shape of every layer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what is known. Returns the exit code."""
    facts = gather(args.source, args.revision)
    if args.json:
        report_json(facts)
        return 0
    layers = facts.pop("layers")
    for name, value in facts.items():
        text = f"{value:,}" if isinstance(value, int) else value
        report(f"{name.replace('_', ' '):22} {text}")
    if args.layers:
        report("\nlayer  query heads  kv heads  head dim  feed-forward width")
        for i, layer in enumerate(layers):
            heads = f"{layer['num_heads']:11}  {layer['num_kv_heads']:8}  {layer['head_dim']:8}"
            report(f"{i:5}  {heads}  {layer['intermediate_size']:18}")
    return 0


def gather(source: str, revision: str | None = None) -> dict[str, Any]:
    """What the headers and the config say, by name."""
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
    }
