"""The files of a tokenizer: where the vocabulary is, and what the JSON files beside it say about special tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openelm_mlx.errors import TokenizerError
from openelm_mlx.files import read_bytes, read_object, shown
from openelm_mlx.finder import is_same_name, same_file

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
TOKENIZER_FILES = (SENTENCEPIECE_FILE, JSON_FILE)
# gpt-oss's has 28 MB; with every merge spelled out it would have twice that.
LARGEST_VOCABULARY = 2**28
# Tokens are numbered from 0; no vocabulary in use has a million.
_MOST_TOKENS = 2**24
COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True)
class AddedToken:
    """A token that a fine-tune added to a vocabulary, or marked as special in it."""

    text: str
    is_special: bool


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings in the files beside a vocabulary; `files` are the vocabulary and those of them that belong to it."""

    folder: Path
    files: tuple[Path, ...]
    names: Mapping[str, str]
    """Names of special tokens under `bos_token` and `eos_token`, if there are any."""
    eos_tokens: tuple[int, ...]
    """Numbers from `generation_config.json`."""
    added: Mapping[int, AddedToken]

    def find_token(self, key: str, token_of: Callable[[str], int | None]) -> int | None:
        """The token called so under `key`, None if none is; TokenizerError if the vocabulary lacks its name."""
        name = self.names.get(key)
        if name is None:
            return None
        try:
            token = token_of(name)
        except (TypeError, ValueError):  # half a character, which no vocabulary has
            token = None
        if token is None:
            raise TokenizerError(
                f"The {key} {shown(name)} that {self.folder} names is not in its vocabulary; "
                "the files come from two tokenizers: copy all of them from one place."
            )
        return token


def find_vocabulary(path: Path) -> Path:
    """The vocabulary file of `path`, a folder or a tokenizer's file; TokenizerError if there is none."""
    if not os.path.lexists(path):
        raise TokenizerError(f"{path} does not exist; name a folder that holds tokenizer.model or tokenizer.json.")
    if not path.is_dir():
        for name in TOKENIZER_FILES:
            if path.name == name or (is_same_name(path.name, name) and same_file(path, path.parent / name)):
                return path.parent / name
        if path.name not in COMPANION_FILES:
            raise TokenizerError(
                f"{path} is not called tokenizer.model (SentencePiece) or tokenizer.json (Hugging Face); "
                "rename it, or name the folder that holds such a file."
            )
        path = path.parent
    for name in TOKENIZER_FILES:
        if os.path.lexists(path / name):  # even if it is not a file: reading it raises the error
            return path / name
    raise TokenizerError(
        f"{path} holds neither tokenizer.model nor tokenizer.json; gpt-oss comes with its tokenizer.json, and OpenELM "
        "uses the tokenizer.model of Llama 2, which Apple does not ship: copy it there or name it with --tokenizer; "
        "meta-llama/Llama-2-7b-hf (after accepting its licence) and NousResearch/Llama-2-7b-hf on Hugging Face have it."
    )


def read_vocabulary(path: Path) -> bytes:
    """The bytes of a vocabulary; TokenizerError if it cannot be read, is empty or is a Git LFS pointer."""
    data = read_bytes(path, TokenizerError, LARGEST_VOCABULARY)
    if not data:
        raise TokenizerError(f"{path} is empty; download it again.")
    return data


def read_settings(vocabulary: Path) -> TokenizerSettings:
    """Read the JSON files beside a vocabulary, as far as there are any; TokenizerError if one of them is wrong."""
    folder = vocabulary.parent
    config = _read_json_object(folder / "tokenizer_config.json")
    older = _read_json_object(folder / "special_tokens_map.json")
    names = {key: _token_name(folder, {**older, **config}, key) for key in ("bos_token", "eos_token")}
    # Other programs want tokenizer.json, so a copy has it also where tokenizer.model is the vocabulary.
    beside = (JSON_FILE, *COMPANION_FILES) if vocabulary.name == SENTENCEPIECE_FILE else COMPANION_FILES
    return TokenizerSettings(
        folder=folder,
        files=(vocabulary, *(folder / name for name in beside if (folder / name).is_file())),
        names={key: name for key, name in names.items() if name is not None},
        eos_tokens=_generation_eos(folder / "generation_config.json"),
        added=_added_tokens(folder, config, _read_json_object(folder / "added_tokens.json")),
    )


def _read_json_object(path: Path) -> dict[str, Any]:
    """The object in a companion file, {} if there is no such file."""
    return read_object(path, TokenizerError) if os.path.lexists(path) else {}


def _token_name(folder: Path, config: Mapping[str, Any], key: str) -> str | None:
    """A token's name: a string, or an object with its `content`."""
    match config.get(key):
        case None:
            return None
        case str(name) | {"content": str(name)}:
            return name
        case value:
            raise TokenizerError(
                f"{key} in {folder} is {shown(value)}, and it should be a token's text; correct that file."
            )


def _generation_eos(path: Path) -> tuple[int, ...]:
    match _read_json_object(path).get("eos_token_id"):
        case None:
            return ()
        case int(token) if not isinstance(token, bool):
            return (token,)
        case list(tokens) if all(type(token) is int for token in tokens):
            return tuple(tokens)
        case value:
            raise TokenizerError(
                f"eos_token_id in {path} is {shown(value)}, and it should be a token's number or a list of them; "
                "correct that file."
            )


def _added_tokens(folder: Path, config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens in `added_tokens_decoder` of tokenizer_config.json, and in the older added_tokens.json."""
    try:
        added = {int(token): AddedToken(str(text), is_special=True) for text, token in older.items()}
        for token, entry in (config.get("added_tokens_decoder") or {}).items():
            added[int(token)] = AddedToken(str(entry["content"]), bool(entry.get("special", False)))
        if not all(0 <= token < _MOST_TOKENS for token in added):
            raise ValueError("a number is below 0 or too large")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"The added tokens in {folder} are not a table of numbers and texts ({shown(error)}); "
            "correct tokenizer_config.json or added_tokens.json there, or download them again."
        ) from error
    return added
