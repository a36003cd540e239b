"""Asking the engine (llguidance) whether it accepts a schema."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

HALF_A_CHARACTER = "half of a surrogate pair is not a character"


@lru_cache(maxsize=512)
def engine_refusal(definition: str) -> str | None:
    """Why the engine refuses a JSON Schema, given as text; None if it accepts it."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(definition)
    except ValueError:
        return HALF_A_CHARACTER
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed and "hex escape" in messages[0]:
        return HALF_A_CHARACTER
    return " ".join(messages[0].split()) if failed else None


@lru_cache(maxsize=1)
def bytes_tokenizer() -> Any:
    """A tokenizer of llguidance with a token for each byte."""
    import llguidance

    class Bytes:
        eos_token_id, bos_token_id = 256, None
        tokens = (*(bytes([byte]) for byte in range(256)), b"<|end|>")
        special_token_ids = (256,)

        def __call__(self, text: str | bytes) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
