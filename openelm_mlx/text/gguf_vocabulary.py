"""Tokenizers in GGUF metadata: written from a tokenizer's files, and converted back to such files.

Two kinds are supported: "llama" (SentencePiece BPE: pairs merged by score, unknown characters as bytes), and "gpt2" with
the pre-tokenizer "gpt-4o" (byte-level BPE: pairs merged by rank).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openelm_mlx.errors import TokenizerError
from openelm_mlx.files import parse_json, read_bytes, shown
from openelm_mlx.text import sentencepiece_file as pieces_file
from openelm_mlx.text.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Pieces
from openelm_mlx.text.tokenizer import Tokenizer
from openelm_mlx.text.tokenizer_files import LARGEST_VOCABULARY, SENTENCEPIECE_FILE

PREFIX = "tokenizer.ggml."
CHAT_TEMPLATE = "tokenizer.chat_template"
# A key of this library: whether the tokenizer itself adds the space.
_ADDS_SPACE = "openelm_mlx.add_space_prefix"
# The regular expression of OpenAI's o200k vocabularies, as in tokenizer.json; llama.cpp calls it gpt-4o.
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULE = "gpt-4o"
# Names for rows of the model beyond the vocabulary.
_PADDING = "[PAD{}]"


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary. kind: "llama" or "gpt2". types: SentencePiece's piece types.

    scores: for "llama". merges: for "gpt2", pairs separated by a space.
    """

    kind: str
    tokens: Sequence[bytes]
    types: Sequence[int]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    bos: int | None = None
    eos: int | None = None
    adds_bos: bool = False
    adds_space: bool = True

    def padded(self, num_rows: int) -> Vocabulary:
        """With a name for every row of the model, and none beyond."""
        missing = range(len(self.tokens), num_rows)
        return replace(
            self,
            tokens=[*self.tokens[:num_rows], *(_PADDING.format(i).encode() for i in missing)],
            types=[*self.types[:num_rows], *(UNUSED for _ in missing)],
            scores=[*self.scores[:num_rows], *(-1e9 for _ in missing)] if self.scores else (),
        )

    def fields(self, for_chat: bool = False) -> dict[str, Any]:
        """Key -> value, as GGUF has them.

        for_chat: prompts come from a chat template, which contains the leading space itself. llama.cpp would add a space
        after every control token too, where OpenELM was trained without one, and demo-openelm answers wrongly then.
        """
        fields: dict[str, Any] = {"model": self.kind, "pre": _RULE if self.kind == "gpt2" else "default"}
        fields |= {"tokens": list(self.tokens), "token_type": list(self.types)}
        if self.scores:
            fields["scores"] = list(self.scores)
        if self.merges:
            fields["merges"] = list(self.merges)
        unknown = self.types.index(UNKNOWN) if UNKNOWN in self.types else None
        for name, token in (("bos", self.bos), ("eos", self.eos), ("unknown", unknown)):
            if token is not None:
                fields[f"{name}_token_id"] = token
        fields["add_bos_token"] = self.adds_bos
        if self.kind == "llama":
            fields |= {"add_eos_token": False, "add_space_prefix": self.adds_space and not for_chat}
        named = {PREFIX + name: value for name, value in fields.items()}
        return named if self.kind != "llama" else named | {_ADDS_SPACE: self.adds_space}


# --- a tokenizer's files -> GGUF --------------------------------------------------------------------------------------


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer. Raises TokenizerError if llama.cpp would split text differently."""
    file = tokenizer.files[0]
    data = read_bytes(file, TokenizerError, LARGEST_VOCABULARY)
    found = _of_pieces(file, data, tokenizer) if file.name == SENTENCEPIECE_FILE else _of_json(file, data)
    adds_bos = tokenizer.encode_prompt("")[:1] == [tokenizer.bos_token]
    eos = tokenizer.eos_tokens[0] if tokenizer.eos_tokens else None
    return replace(found, bos=tokenizer.bos_token, eos=eos, adds_bos=adds_bos)


def _of_pieces(file: Path, data: bytes, tokenizer: Tokenizer) -> Vocabulary:
    found = pieces_file.parse_pieces(data, str(file))
    if not (found.is_bpe and found.is_verbatim):
        raise _unknown_rule(file, "it does not merge pairs by score, or normalizes text")
    names = {token: name.encode() for name, token in tokenizer.special_tokens.items()}
    tokens, types, scores = list(found.texts), list(found.types), list(found.scores)
    for token in range(len(tokens), tokenizer.vocab_size):  # a fine-tune's
        tokens.append(names.get(token) or tokenizer.token_bytes(token) or _PADDING.format(token).encode())
        types.append(CONTROL if token in names else USER_DEFINED)
        scores.append(0.0)
    return Vocabulary("llama", tokens, types, scores, adds_space=found.adds_space)


def _of_json(file: Path, data: bytes) -> Vocabulary:
    content = parse_json(data, str(file), TokenizerError)
    try:
        model, added = content["model"], content.get("added_tokens") or []
        vocab: dict[str, int] = model["vocab"]
        merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        special = {each["id"]: (each["content"], bool(each["special"])) for each in added}
        size = max([*vocab.values(), *special]) + 1
        texts = {token: text for text, token in vocab.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unknown_rule(file, "it is not a BPE vocabulary") from error
    tokens, types = [], []
    for token in range(size):
        text, is_special = special.get(token, (texts.get(token), False))
        tokens.append((_PADDING.format(token) if text is None else text).encode())
        kind = UNUSED if text is None else USER_DEFINED if token in special else NORMAL
        types.append(CONTROL if is_special else kind)
    found = Vocabulary("gpt2", tokens, types, merges=merges)
    if "ByteLevel" in json.dumps(content.get("decoder")):
        _check_rule(file, content.get("pre_tokenizer"), merges)
        return found
    if not model.get("byte_fallback"):
        raise _unknown_rule(file, "it has neither byte-level tokens nor byte fallback")
    return _scored(found, model.get("unk_token"), content)


def _scored(found: Vocabulary, unknown: str | None, content: Mapping[str, Any]) -> Vocabulary:
    """Llama's vocabulary from its tokenizer.json: the earlier a merge, the higher its score."""
    ranks: dict[bytes, int] = {}
    for rank, pair in enumerate(found.merges):
        ranks.setdefault(pair.replace(" ", "").encode(), rank)
    types = []
    for text, kind in zip(found.tokens, found.types, strict=True):
        if unknown is not None and text == unknown.encode():
            types.append(UNKNOWN)
        elif kind == NORMAL and re.fullmatch(rb"<0x[0-9A-Fa-f]{2}>", text):
            types.append(BYTE)
        else:
            types.append(kind)
    scores = [-float(ranks.get(text, len(ranks))) for text in found.tokens]
    prefix = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    adds_space = '"Prepend"' in prefix or ('"Metaspace"' in prefix and '"never"' not in prefix)
    return replace(found, kind="llama", types=types, scores=scores, merges=(), adds_space=adds_space)


def _check_rule(file: Path, pre_tokenizer: Any, merges: Sequence[str]) -> None:
    """Raise TokenizerError unless the pre-tokenizer is o200k's. Single digits are equivalent if no merge joins digits."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, Mapping) else []
    rules = [step["pattern"].get("Regex") for step in steps if isinstance(step, Mapping) and "pattern" in step]
    digit_by_digit = _O200K.replace(r"\p{N}{1,3}", r"\p{N}")
    joins_digits = any(
        first[-1:].isdigit() and second[:1].isdigit() for first, _, second in (m.partition(" ") for m in merges)
    )
    if rules != [_O200K] and (rules != [digit_by_digit] or joins_digits):
        raise _unknown_rule(file, "it has a pre-tokenizer of its own")


def _unknown_rule(file: Path, reason: str) -> TokenizerError:
    return TokenizerError(
        f"The tokenizer {file} cannot be stored in GGUF, because llama.cpp would split text differently ({reason}): give "
        "Llama 2's or gpt-oss's with tokenizer=."
    )


# --- GGUF -> a tokenizer's files --------------------------------------------------------------------------------------


def tokenizer_files(metadata: Mapping[str, Any], origin: str) -> dict[str, bytes]:
    """Name -> content of the tokenizer files for a GGUF file's metadata; {} if it has no tokenizer.

    Raises TokenizerError for inconsistent metadata, and for kinds that neither family uses.
    """
    if PREFIX + "tokens" not in metadata:
        return {}
    found = _stored(metadata, origin)
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if found.kind == "llama" else "PreTrainedTokenizerFast",
        "bos_token": _name_of(found, found.bos), "eos_token": _name_of(found, found.eos),
        "add_bos_token": found.adds_bos, "add_eos_token": False, "legacy": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    template = metadata.get(CHAT_TEMPLATE)
    if isinstance(template, str):
        config["chat_template"] = template
    written = json.dumps(
        {key: value for key, value in config.items() if value is not None}, indent=2, ensure_ascii=False
    )
    files = {"tokenizer_config.json": (written + "\n").encode("utf-8", "replace")}
    if found.kind == "gpt2":
        return files | {"tokenizer.json": _as_json(found)}
    unknown = found.types.index(UNKNOWN) if UNKNOWN in found.types else -1
    pieces = Pieces(tuple(found.tokens), tuple(found.scores), tuple(found.types), adds_space=found.adds_space)
    bos, eos = (-1 if token is None else token for token in (found.bos, found.eos))
    return files | {SENTENCEPIECE_FILE: pieces_file.write_pieces(pieces, unknown, bos, eos)}


def _stored(metadata: Mapping[str, Any], origin: str) -> Vocabulary:
    kind, rule = metadata.get(PREFIX + "model"), metadata.get(PREFIX + "pre", "default")
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and rule != _RULE):
        raise TokenizerError(
            f"The tokenizer in {origin} is of the kind {shown(kind)} with the pre-tokenizer {shown(rule)}, which neither "
            "family uses: give the right one with tokenizer=."
        )
    tokens = [text.encode("utf-8", "surrogateescape") for text in _list(metadata, "tokens", str, origin)]
    count = len(tokens)
    while count and tokens[count - 1] == _PADDING.format(count - 1).encode():
        count -= 1
    types = _list(metadata, "token_type", int, origin, len(tokens)) or [NORMAL] * len(tokens)
    scores = _list(metadata, "scores", float, origin, len(tokens)) if kind == "llama" else []
    merges = _list(metadata, "merges", str, origin) if kind == "gpt2" else []
    if kind == "llama" and not scores:
        raise _contradiction(origin, "scores")
    bos, eos = (metadata.get(f"{PREFIX}{name}_token_id") for name in ("bos", "eos"))
    for token in (bos, eos):
        if token is not None and not (type(token) is int and 0 <= token < count):
            raise _contradiction(origin, "tokens")
    return Vocabulary(
        kind,
        tokens[:count],
        types[:count],
        scores[:count],
        merges,
        bos,
        eos,
        adds_bos=bool(metadata.get(PREFIX + "add_bos_token", kind == "llama")),
        adds_space=bool(metadata.get(_ADDS_SPACE, metadata.get(PREFIX + "add_space_prefix", True))),
    )


def _list(metadata: Mapping[str, Any], name: str, kind: type, origin: str, count: int | None = None) -> list[Any]:
    values = metadata.get(PREFIX + name, [])
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise _contradiction(origin, name)
    if count is not None and values and len(values) != count:
        raise _contradiction(origin, name)
    return values


def _contradiction(origin: str, name: str) -> TokenizerError:
    return TokenizerError(
        f"The tokenizer in {origin} is inconsistent in its {name}: download or copy the file again, or give a tokenizer "
        "with tokenizer=."
    )


def _name_of(found: Vocabulary, token: int | None) -> str | None:
    return None if token is None else found.tokens[token].decode("utf-8", "replace")


def _as_json(found: Vocabulary) -> bytes:
    """A byte-level tokenizer.json in Hugging Face's format."""
    added, vocab = [], {}
    for token, (text, kind) in enumerate(zip(found.tokens, found.types, strict=True)):
        name = text.decode("utf-8", "replace")
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": token, "content": name, **flags, "special": kind != USER_DEFINED})
        elif kind != UNUSED:
            vocab[name] = token
    split = {"type": "Split", "pattern": {"Regex": _O200K}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
        "merges": [pair.split(" ", 1) for pair in found.merges],
    }  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_only]}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, "model": model,
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
