"""The tokenizer of a model: what to say when there is none."""

from __future__ import annotations

from .specs import ModelSpec

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
