"""What the engine itself says of a schema: whether it takes it, and whether a pattern matches a text."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

HALF_A_CHARACTER = "half of a surrogate pair is no character"


@lru_cache(maxsize=512)
def engine_refusal(definition: str) -> str | None:
    """Why the engine refuses a JSON Schema, given as text; None if it does not."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(definition)
    except ValueError:
        return HALF_A_CHARACTER
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed and "hex escape" in messages[0]:
        return HALF_A_CHARACTER
    return " ".join(messages[0].split()) if failed else None


def fits(pattern: str, text: str) -> bool:
    """Whether JSON Schema's `pattern` matches `text`; one that the engine cannot read matches nothing."""
    return matches(pattern, text) is True


@lru_cache(maxsize=4096)
def matches(pattern: str, text: str) -> bool | None:
    """Whether JSON Schema's `pattern` is found in `text`, in linear time and in the engine's own reading of it.

    None where the engine cannot say: it does not read the pattern, or gives up on its size.
    """
    from llguidance import LLMatcher

    definition = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
    matcher = LLMatcher(_bytes_tokenizer(), definition, log_level=0)
    if matcher.is_error():
        return None
    data = json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")
    is_match = matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()
    return None if matcher.is_error() else is_match


@lru_cache(maxsize=1)
def _bytes_tokenizer() -> Any:
    import llguidance

    class Bytes:
        eos_token_id, bos_token_id = 256, None
        tokens = (*(bytes([byte]) for byte in range(256)), b"<|end|>")
        special_token_ids = (256,)

        def __call__(self, text: str | bytes) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
