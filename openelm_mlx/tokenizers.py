"""Finding the tokenizer of a model and checking that it belongs to it; its chat template; messages when there is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import hub
from .errors import TokenizerError
from .files import hears_the_disk
from .finder import is_same_name
from .hub import Progress
from .sources import SourceName, path_here, repository
from .specs import ModelSpec
from .text.chat import HARMONY, PLAIN, TemplateChoice, choose_template
from .text.tokenizer import Tokenizer, load_tokenizer
from .text.tokenizer_files import COMPANION_FILES, TOKENIZER_FILES

# Repositories with the tokenizer that OpenELM was trained with. Those already in the Hugging Face cache are used as they
# are; none is downloaded without being asked for, because Llama 2's is under a licence that its owner must accept.
LLAMA_TOKENIZER_REPOS = (
    "meta-llama/Llama-2-7b-hf",
    "NousResearch/Llama-2-7b-hf",
    "mlx-community/OpenELM-270M-Instruct",
)

# CoreNet pads 32,001 tokens to 32,128 rows; Harmony's vocabulary ends 1,069 rows before gpt-oss's.
_MOST_PADDING_ROWS = 256

_MISSING = {
    "openelm": (
        "There is no tokenizer for this model: Apple ships none with OpenELM, and the Llama 2 tokenizer it was trained with "
        "is under a licence of its own. Accept it at https://huggingface.co/meta-llama/Llama-2-7b-hf, run `hf auth login`, "
        "and add --tokenizer meta-llama/Llama-2-7b-hf (tokenizer= in Python); or give any folder or repository that holds "
        "its tokenizer.model. `python convert.py SOURCE DESTINATION --tokenizer ...` stores it with the weights. Without "
        "one, a prompt can only be token ids."
    ),
    "gpt_oss": (
        "There is no tokenizer.json beside this gpt-oss model (nor above its folder original/): copy it from the same "
        "repository, or add --tokenizer openai/gpt-oss-20b (tokenizer= in Python), both sizes have the same. Without one, "
        "a prompt can only be token ids."
    ),
}


def missing_tokenizer_message(spec: ModelSpec) -> str:
    """The error for a model that was loaded without a tokenizer and is given text."""
    return _MISSING[spec.family]


@hears_the_disk(TokenizerError)
def find_tokenizer(
    folder: Path,
    spec: ModelSpec,
    asked: SourceName | None = None,
    progress: Progress | None = None,
    chat_template: str = PLAIN,
) -> Tokenizer | None:
    """The tokenizer to use with the model in `folder`, by the search order of `load`; None when there is none.

    chat_template: from `resolve_chat_template`. Raises TokenizerError for a tokenizer of another model, and when there is none
    at the place that the user named.
    """
    if asked is not None:
        return _checked(load_tokenizer(_tokenizer_path(asked, progress), chat_template), spec, str(asked))
    # OpenAI's repositories have it at the top, above the folder with the original weights.
    for place in (folder, folder.parent) if is_same_name(folder.name, "original") else (folder,):
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return _checked(load_tokenizer(place, chat_template), spec, str(place))
    if spec.family != "openelm":
        return None
    for repo in LLAMA_TOKENIZER_REPOS:
        for name in TOKENIZER_FILES:
            cached = hub.cached_file(repo, name)
            if cached is not None:
                return _checked(load_tokenizer(cached, chat_template), spec, repo)
    return None


def resolve_chat_template(
    config: Mapping[str, Any], asked: str | None, name: str, family: str = "openelm"
) -> TemplateChoice:
    """The chat template to use, and why: the user's choice, else the one stored by conversion, else by the source's name.

    gpt-oss has Harmony and no other. Raises SettingError for a template that does not exist.
    """
    if family == "gpt_oss" and asked in (None, HARMONY):
        return TemplateChoice(HARMONY, "because gpt-oss was trained with no other format")
    ours = config.get("openelm_mlx")
    stored = ours.get("chat_template") if isinstance(ours, Mapping) else None
    return choose_template(asked, stored, name)


def _tokenizer_path(asked: SourceName, progress: Progress | None) -> Path:
    path = path_here(asked)
    if path is not None:
        return path
    found = repository(asked)
    if found is not None:
        wanted = (*TOKENIZER_FILES, *COMPANION_FILES)
        repo, revision = found
        return hub.download(repo, lambda files: [f.name for f in files if f.name in wanted], revision, progress)
    raise TokenizerError(f"There is no tokenizer at {asked}: give a file, a folder, or a Hugging Face repository.")


def _checked(tokenizer: Tokenizer, spec: ModelSpec, origin: str) -> Tokenizer:
    # About a hundred rows without a token are padding; more tokens than rows, or far fewer, mean another vocabulary.
    if not 0 <= spec.vocab_size - tokenizer.vocab_size <= max(_MOST_PADDING_ROWS, spec.vocab_size // 50):
        raise TokenizerError(
            f"The tokenizer at {origin} has {tokenizer.vocab_size:,} tokens and the model {spec.vocab_size:,}: it belongs "
            "to another model; give the right one with --tokenizer."
        )
    if spec.bos_token is not None and tokenizer.bos_token != spec.bos_token:
        raise TokenizerError(
            f"The tokenizer at {origin} begins texts with token {tokenizer.bos_token} and the model expects {spec.bos_token}: "
            "it belongs to another model; give the right one with --tokenizer."
        )
    return tokenizer
