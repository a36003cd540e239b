"""The files beside the weights of a converted folder: config, tokenizer, model card, licences and end tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import CheckpointError, ConfigError, TokenizerError
from ..files import read_bytes, read_object
from ..sources import Source
from ..text.tokenizer import Tokenizer
from ..text.unicode import whole_characters
from .card import CardFacts, licence_files, model_card
from .plan import TYPE_WORDS, ConversionPlan

# Who has written the folder, in the words of its card.
PROGRAM = f"openelm_mlx {__version__}"

# Small files that belong to the model and are copied as they are.
_COPIED = ("generation_config.json",)
_TOKENIZER_CONFIG = "tokenizer_config.json"


def other_files(
    source: Source, plan: ConversionPlan, tokenizer: Tokenizer | None, template: str | None
) -> dict[str, bytes | Path]:
    """Name -> content (or the file to copy) of everything but the weights."""
    licences = licence_files(source.folder)
    config = dict(plan.config) | {
        "openelm_mlx": {"version": __version__, "source": source.name, "chat_template": template}
    }
    card = source.folder / "README.md"
    facts = CardFacts(
        title=source.name.split("/")[-1],
        source=source.name,
        repo=source.repo,
        revision=source.revision,
        program=PROGRAM,
        changes=_changes(source, plan),
        tokenizer=_tokenizer_note(tokenizer, plan.spec.family),
        licence_files=[path.name for path in licences],
        is_released_openelm=plan.spec.family == "openelm" and plan.spec.size is not None,
        loads_in_mlx_lm=plan.spec.family == "openelm" or plan.target == "swift",
    )
    stored = read_bytes(card, CheckpointError).decode("utf-8", errors="replace") if card.is_file() else None
    text = model_card(stored, facts)
    copied = [path for name in _COPIED if (path := source.folder / name).is_file()]
    generation: dict[str, bytes | Path] = {}
    if plan.spec.family == "gpt_oss":
        stops = list(dict.fromkeys((*plan.spec.eos_tokens, *(() if tokenizer is None else tokenizer.eos_tokens))))
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
        # Other programs read the end tokens from this file, not from the config.
        for path in copied:
            named = read_object(path, ConfigError)
            if named.get("eos_token_id") != config["eos_token_id"]:
                generation[path.name] = _as_json(named | {"eos_token_id": config["eos_token_id"]})
    return {
        **{path.name: path for path in (*licences, *copied)},
        **generation,
        **_tokenizer_files(tokenizer),
        "README.md": whole_characters(text).encode(),
        "config.json": _as_json(config),
    }


def _as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes | Path]:
    """The tokenizer's files, with a tokenizer_config.json by which other programs know its kind and that it gives BOS."""
    if tokenizer is None:
        return {}
    files: dict[str, bytes | Path] = {path.name: path for path in tokenizer.files}
    stored = next((path for path in tokenizer.files if path.name == _TOKENIZER_CONFIG), None)
    config: dict[str, Any] = {} if stored is None else read_object(stored, TokenizerError)
    begins_with_bos = tokenizer.encode_prompt("")[:1] == [tokenizer.bos_token]
    if stored is None:
        names = {token: name for name, token in tokenizer.special_tokens.items()}
        config = {
            "tokenizer_class": "LlamaTokenizer" if begins_with_bos else "PreTrainedTokenizerFast",
            "bos_token": None if tokenizer.bos_token is None else names.get(tokenizer.bos_token),
            "eos_token": names.get(tokenizer.eos_tokens[0]) if tokenizer.eos_tokens else None,
            "legacy": False,
        }
    if begins_with_bos:
        config["add_bos_token"] = True  # OpenELM needs it, and mlx-lm goes by this field
    if stored is None or config != read_object(stored, TokenizerError):
        files[_TOKENIZER_CONFIG] = whole_characters(json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _tokenizer_note(tokenizer: Tokenizer | None, family: str) -> str:
    if tokenizer is not None:
        return f"The tokenizer is stored with them ({', '.join(file.name for file in tokenizer.files)})."
    if family == "openelm":
        llama = "[Llama 2](https://huggingface.co/meta-llama/Llama-2-7b-hf)"
        return f"No tokenizer is stored with them; OpenELM was trained with that of {llama}."
    return "No tokenizer is stored with them."


def _changes(source: Source, plan: ConversionPlan) -> list[str]:
    """What the conversion changed in the weights, one line each."""
    before, after = source.contents.spec, plan.spec
    changes = []
    if plan.merging is not None:
        changes.append(f"the adapter {plan.merging.name} is merged into {len(plan.merging.merges)} weights")
    if source.contents.layout == "corenet-adapters":
        changes.append("the adapters are merged into the weights")
    if source.contents.layout in ("corenet", "corenet-adapters", "apple-mlx"):
        changes.append("the tensors have the names of Apple's Hugging Face files")
    if after.vocab_size < before.vocab_size:
        changes.append(f"the vocabulary's {before.vocab_size - after.vocab_size} rows of padding are dropped")
    types = sorted({tensor.source_dtype for tensor in plan.tensors if tensor.source_dtype in TYPE_WORDS})
    changes.append(f"type: {' and '.join(TYPE_WORDS[name] for name in types)} before, {plan.dtype} now")
    if plan.quantization is not None:
        kinds = Counter(
            f"{packing.bits} bits ({packing.mode}, groups of {packing.group_size})"
            for packing in plan.packings.values()
        )
        changes.append("quantized: " + ", ".join(f"{count} weights to {kind}" for kind, count in kinds.most_common()))
    return changes
