"""Chats as the tokens that a choice, or an answer, comes after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..engine.prompt import encode_prompt
from ..errors import PromptError
from ..text.chat import HARMONY, PLAIN, render_chat
from ..text.conversation import SystemContent
from ..text.harmony import HarmonyFormat
from ..text.openai_chat import conversation
from ..text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..models import Model


def chat_tokens(
    model: Model,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    begun: str | None = None,
    is_scored: bool = False,
    effort: str | None = None,
    day: str | None = None,
) -> list[int]:
    """A chat up to the assistant's next message. begun: the beginning of that message, on gpt-oss's final channel.

    is_scored: what comes next is a choice, which stands where gpt-oss's answer would: on its final channel, without
    analysis. day: the date that gpt-oss is told, YYYY-MM-DD; today if None.

    Raises PromptError for a model without a chat template.
    """
    if tokenizer.chat_template == HARMONY:
        if begun is None and not is_scored:
            encoded = encode_prompt(model, tokenizer, list(messages), reasoning_effort=effort, current_date=day)
            return encoded.tokens
        system = SystemContent(reasoning_effort=effort or "medium")
        return HarmonyFormat(tokenizer).render_for_completion(
            conversation(messages, system=system), channel="final", text=begun or ""
        )
    if tokenizer.chat_template == PLAIN:
        raise PromptError(
            "This model has no chat template: leave --apply-chat-template out, or choose one with --chat-template."
        )
    tokens = render_chat(messages, tokenizer, tokenizer.chat_template)
    return [*tokens, *tokenizer.encode(begun, continuation=True)] if begun else tokens
