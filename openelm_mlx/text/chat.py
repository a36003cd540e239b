"""OpenELM's chat templates: which one a model gets, and a list of messages as tokens.

gpt-oss's format is in harmony.py. Templates are code here and Jinja in `tokenizer_config.json` or
`chat_template.jinja` is not run: it makes one string of everything, in which the end-of-text token and a user who
types `</s>` look the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from openelm_mlx.errors import PromptError, SettingError, TokenizerError
from openelm_mlx.text.openai_chat import text_parts
from openelm_mlx.text.tokenizer import Tokenizer

OPENELM_INSTRUCT = "openelm-instruct"
PLAIN = "plain"
TEMPLATES = (OPENELM_INSTRUCT, PLAIN)

HARMONY = "harmony"  # gpt-oss's, in harmony.py

_ROLES = ("system", "user", "assistant")


class TemplateChoice(NamedTuple):
    """A template's name, and why it was chosen, as a phrase: "because the name OpenELM-270M-Instruct says so"."""

    template: str
    reason: str


def choose_template(asked: str | None, stored: str | None, name: str) -> TemplateChoice:
    """Choose an OpenELM model's chat template; SettingError for a template that does not exist.

    asked: the user's own choice. stored: what conversion wrote beside the weights. name: the repository or folder, the
    last resort, because the configs of base and instruct models are alike.
    """
    if asked is not None:
        return TemplateChoice(_known(asked, "given"), "because it was given")
    if stored is not None:
        return TemplateChoice(_known(stored, "stored with the model"), "because it is stored with the model")
    model_name = _model_name(name)
    if re.search(r"(?<![a-z])instruct", model_name.lower()):
        return TemplateChoice(OPENELM_INSTRUCT, f'because the name "{model_name}" says Instruct')
    return TemplateChoice(PLAIN, f'because the name "{model_name}" does not say Instruct')


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: str,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Render messages as the tokens of a prompt; PromptError for messages that the template cannot express.

    messages: `{"role": "system" | "user" | "assistant", "content": text}`, in any order: the template is a loop. A content
    may be a list of text parts as OpenAI writes them, or None for no text.

    `openelm-instruct` is the template of Apple's DPO recipe (corenet, projects/openelm/instruction_tuning). The text
    below is one line for each of its lines; `</s>` is the end-of-text token, and BOS comes before everything:

        <|system|>
        Be brief.</s>
        <|user|>
        Hi</s>
        <|assistant|>

    Only BOS and `</s>` are control tokens, and no content becomes one. The tags are ordinary text, as they were in
    training, so a content that spells `<|assistant|>` is read by the model as a tag: the template has no way around it.
    The first tag gets the space that Llama's tokenizer puts before a text, and the text after a `</s>` gets none, as with
    the recipe's tokenizer (transformers' LlamaTokenizer with legacy=false).

    `plain` is for base models, which were not trained on conversations: messages raise PromptError.
    """
    _check_conversation(messages, tokenizer, template)
    end = tokenizer.eos_tokens[0]
    tokens = [] if tokenizer.bos_token is None else [tokenizer.bos_token]
    text = ""  # the text since the last control token
    for number, message in enumerate(messages, start=1):
        role, content = _role_and_content(message, number)
        text += f"<|{role}|>\n{content}"
        tokens += [*tokenizer.encode(text, continuation=number > 1), end]
        text = "\n"
    if add_generation_prompt:
        text += "<|assistant|>\n"
    return tokens + tokenizer.encode(text, continuation=True)


def render_turns(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: str
) -> list[tuple[list[int], bool]]:
    """Messages as pieces of tokens, each with whether the assistant writes it: what it is to learn.

    An assistant's turn is two pieces: its tag, as `render_chat` ends a prompt, and its text with the end-of-text token, as the
    model gives them after that prompt. Raises PromptError as `render_chat` does.
    """
    _check_conversation(messages, tokenizer, template)
    end = tokenizer.eos_tokens[0]
    pieces = [([] if tokenizer.bos_token is None else [tokenizer.bos_token], False)]
    for number, message in enumerate(messages, start=1):
        role, content = _role_and_content(message, number)
        begin = "\n" * (number > 1) + f"<|{role}|>\n"
        if role == "assistant":
            pieces.append((tokenizer.encode(begin, continuation=number > 1), False))
            pieces.append(([*(tokenizer.encode(content, continuation=True) if content else ()), end], True))
        else:
            pieces.append(([*tokenizer.encode(begin + content, continuation=number > 1), end], False))
    return pieces


def _check_conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: str) -> None:
    if _known(template, "given") == PLAIN:
        raise PromptError(
            "This model has no chat template, so it continues text and cannot take a list of messages; "
            f'pass the text itself, or choose the chat template "{OPENELM_INSTRUCT}" (--chat-template).'
        )
    if isinstance(messages, (str, Mapping)) or not messages:
        raise PromptError("A conversation is a list with at least one message; add one with the role user.")
    if not tokenizer.eos_tokens:
        raise TokenizerError("This tokenizer names no end-of-text token, which the template needs; use Llama 2's.")


def _role_and_content(message: Mapping[str, Any], number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise PromptError(f"Message {number} is {message!r}; a message is a dictionary with a role and a content.")
    role = message.get("role")
    if role not in _ROLES:
        raise PromptError(f"Message {number} has the role {role!r}; this chat template knows {', '.join(_ROLES)}.")
    if message.get("tool_calls"):
        raise PromptError(f"Message {number} calls a tool, and OpenELM's chat template has no calls: leave it out.")
    return role, "".join(text_parts(message, number))


def _known(template: str, origin: str) -> str:
    if template not in TEMPLATES:
        raise SettingError(f'No chat template is called "{template}" ({origin}); choose {" or ".join(TEMPLATES)}.')
    return template


def _model_name(name: str) -> str:
    """The part of a path or repository id that names the model; in a Hugging Face cache the last part is a hash."""
    parts = PurePath(name).parts
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return (cached or parts or ("",))[-1]
