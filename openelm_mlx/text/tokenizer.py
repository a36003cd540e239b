"""Text to tokens and back: SentencePiece's `tokenizer.model` and Hugging Face's `tokenizer.json`, without transformers.

What both offer is in tokenizer_base.py; each format has a file of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from openelm_mlx.text.json_tokenizer import JsonTokenizer
from openelm_mlx.text.sentencepiece_tokenizer import SentencePieceTokenizer
from openelm_mlx.text.tokenizer_base import Tokenizer as Tokenizer
from openelm_mlx.text.tokenizer_files import (
    SENTENCEPIECE_FILE,
    find_vocabulary,
    read_settings,
)

if TYPE_CHECKING:
    pass


def load_tokenizer(path: Path, chat_template: str = "plain") -> Tokenizer:
    """Load the tokenizer in a folder, or the one that `path` is a file of; TokenizerError says what is wrong there.

    A folder that holds both `tokenizer.model` and `tokenizer.json` is read from `tokenizer.model`: it is what OpenELM
    was trained with, `tokenizer.json` is a conversion of it, and it loads about twenty times faster. Names of special
    tokens come from `tokenizer_config.json` or `special_tokens_map.json`, more stop tokens from
    `generation_config.json`, if there are such files. chat_template: the one used for prompts.
    """
    vocabulary = find_vocabulary(Path(path))
    settings = read_settings(vocabulary)
    if vocabulary.name == SENTENCEPIECE_FILE:
        return SentencePieceTokenizer(vocabulary, settings, chat_template)
    return JsonTokenizer(vocabulary, settings, chat_template)
