"""Encoding a prompt: text, token ids, or chat messages through the model's template, as tokens."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, NamedTuple, cast

from ..decoding.grammar import AnswerFormat
from ..errors import PromptError, SettingError, TokenizerError
from ..files import shown
from ..text.chat import HARMONY, PLAIN, render_chat
from ..text.conversation import ResponseFormat, SystemContent
from ..text.harmony import HarmonyFormat
from ..text.openai_chat import conversation
from ..text.streams import FINAL
from ..text.tokenizer import Tokenizer
from ..tokenizers import missing_tokenizer_message
from .calling import Calling

if TYPE_CHECKING:
    from ..models import Model

# The effort with which gpt-oss does not think at all.
NO_REASONING = "none"

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class EncodedPrompt(NamedTuple):
    """A prompt's tokens, the template they went through, and whether the answer continues the prompt's own text.

    channel: of the message that the prompt begins for gpt-oss; None: it begins none.
    """

    tokens: list[int]
    template: str
    continues_text: bool
    channel: str | None = None


def encode_prompt(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    raw: bool = False,
    chat_template: str | None = None,
    reasoning_effort: str | None = None,
    answer: AnswerFormat | None = None,
    calling: Calling | None = None,
    current_date: str | None = None,
) -> EncodedPrompt:
    """The tokens of a prompt in any of its forms. Token ids are taken as they are, already through the template.

    answer: the format of the answer. gpt-oss is told a JSON Schema in its prompt, as it was trained.
    calling: the functions that gpt-oss may call. current_date: in gpt-oss's system message, YYYY-MM-DD; today if None.

    Raises PromptError when the prompt is empty or has ids that the model lacks, TokenizerError when text needs a tokenizer.
    """
    template = PLAIN if raw or tokenizer is None else chat_template or tokenizer.chat_template
    if reasoning_effort is not None and template != HARMONY:
        raise SettingError(
            f"reasoning_effort is {shown(reasoning_effort)}, and only gpt-oss's chat format has one: leave it out."
        )
    if calling is not None and template != HARMONY:
        raise SettingError(
            "The request has tools, and only gpt-oss's chat format has calls: this model was not trained to write them, "
            "so leave tools out, or ask a gpt-oss model."
        )
    if hasattr(prompt, "tolist"):  # an array of mlx or NumPy
        prompt = cast("Prompt", prompt.tolist())
    if not isinstance(prompt, (str, list, tuple)):
        raise PromptError(f"The prompt is a {type(prompt).__name__}: give text, a list of token ids, or chat messages.")
    if not isinstance(prompt, str) and not any(type(item) is not int and isinstance(item, Mapping) for item in prompt):
        if calling is not None:
            raise SettingError("tools are told to the model in a chat's prompt, and this one is token ids already.")
        return EncodedPrompt(_checked_tokens(model, cast("Sequence[int]", prompt)), template, True)
    if tokenizer is None:
        raise TokenizerError(missing_tokenizer_message(model.spec))
    if isinstance(prompt, str) and not prompt.strip():
        raise PromptError("The prompt is empty: give some text.")
    if isinstance(prompt, str) and template == PLAIN:
        return EncodedPrompt(tokenizer.encode_prompt(prompt), template, True)
    chat = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else cast("Sequence[Mapping[str, str]]", prompt)
    )
    if template != HARMONY:
        # The text of an answer in a format is exactly what its tokens spell, including a leading space.
        return EncodedPrompt(render_chat(chat, tokenizer, template), template, answer is not None)
    # The model was trained with the current date in its prompt, as OpenAI's own template prints it.
    may_think = reasoning_effort != NO_REASONING
    effort = (reasoning_effort or "medium") if may_think else "low"
    system = SystemContent(
        current_date=current_date or f"{date.today():%Y-%m-%d}",
        reasoning_effort=effort,
        tools=() if calling is None else calling.built_in,
    )
    schema = None if answer is None else answer.schema
    formats = [] if schema is None else [ResponseFormat("answer", schema)]
    tools = () if calling is None else calling.tools
    messages = conversation(chat, system=system, tools=tools, response_formats=formats)
    # With nothing to call, its answer is begun for it. Where it may call, what it may write is decided in its headers.
    channel = None if may_think or calling is not None else FINAL
    tokens = HarmonyFormat(tokenizer).render_for_completion(messages, channel=channel)
    return EncodedPrompt(tokens, template, False, channel)


def message_borders(tokenizer: Tokenizer | None, prompt: EncodedPrompt) -> list[int]:
    """Offsets in a Harmony prompt up to which other conversations are likely to be equal: after the system and the
    developer message, and before the last message.
    """
    if tokenizer is None or prompt.template != HARMONY:
        return []
    start = HarmonyFormat(tokenizer).start
    starts = [offset for offset, token in enumerate(prompt.tokens) if token == start]
    return sorted({*starts[1:3], *starts[-2:-1]})


def _checked_tokens(model: Model, prompt: Sequence[int]) -> list[int]:
    if not prompt:
        raise PromptError("The prompt is empty: give at least one token.")
    if all(type(token) is int for token in prompt) and min(prompt) >= 0 and max(prompt) < model.spec.vocab_size:
        return list(prompt)
    tokens = []
    for token in prompt:
        try:
            number = -1 if isinstance(token, bool) else operator.index(token)
        except TypeError:
            number = -1
        if isinstance(token, (str, list, tuple)):
            raise PromptError(
                f"The prompt is a list with {shown(token)} in it, where token ids are wanted: give one prompt here; "
                "om.generate takes a list of them."
            )
        if not 0 <= number < model.spec.vocab_size:
            raise PromptError(
                f"The prompt has token {token!r}; the model's tokens are 0 to {model.spec.vocab_size - 1}."
            )
        tokens.append(number)
    return tokens
