"""Anthropic's messages, each a list of blocks, as the chat that the model reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...files import shown
from ..call_reasoning import CallReasoning
from ..failures import ApiError, bad_request
from .history import History
from .reasoning_text import decode_reasoning

# Claude Code's first block of instructions is for Anthropic's accounts. It changes with every request, and what changes at
# the beginning of a prompt makes all of it new.
_ACCOUNTING = "x-anthropic-billing-header:"


def chat(system: str | list[Any] | None, messages: list[Any], known: CallReasoning) -> list[dict[str, Any]]:
    """The messages as chat dicts, the instructions first. Raises ApiError, a 400 that names the place."""
    history = History()
    texts = _instructions(system, "system")
    if texts:
        history.instructions("\n\n".join(texts))
    if not messages:
        raise bad_request("messages is empty: give at least one message of the user.", "messages")
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise bad_request(f"{place} is {shown(message)}: it should be an object.", place)
        role = message.get("role")
        if role == "system":
            history.instructions("\n\n".join(_instructions(message.get("content"), f"{place}.content")))
        elif role == "user":
            _user(history, _blocks(message.get("content"), f"{place}.content"))
        elif role == "assistant":
            _assistant(history, _blocks(message.get("content"), f"{place}.content"), known)
        else:
            given = "missing" if role is None else shown(role)
            raise bad_request(f'{place}.role is {given}: it should be "user" or "assistant".', f"{place}.role")
    if messages[-1]["role"] == "assistant":
        message = "The last message is the assistant's, and these models do not go on with one: end with the user's."
        raise bad_request(message, "messages")
    return history.finished()


def _instructions(content: Any, place: str) -> list[str]:
    if content is None:
        return []
    texts = [_text(block, "text", at) for at, block in _blocks(content, place, only="text")]
    return [text for text in texts if text and not text.startswith(_ACCOUNTING)]


def _blocks(content: Any, place: str, only: str | None = None) -> list[tuple[str, Mapping[str, Any]]]:
    """The blocks of a content, each with its place. only: the one type that they may have."""
    if isinstance(content, str):
        return [(place, {"type": "text", "text": content})]
    if not isinstance(content, list):
        given = "missing" if content is None else shown(content)
        raise bad_request(f"{place} is {given}: it should be a string or a list of blocks.", place)
    blocks = []
    for number, block in enumerate(content):
        at = f"{place}[{number}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if not isinstance(kind, str) or (only is not None and kind != only):
            wanted = "an object with a type" if only is None else f"a block of type {only}"
            raise bad_request(f"{at} is {shown(block)}: it should be {wanted}.", at)
        blocks.append((at, block))
    return blocks


def _text(block: Mapping[str, Any], key: str, place: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        given = "missing" if value is None else shown(value)
        raise bad_request(f"{place}.{key} is {given}: it should be a string.", f"{place}.{key}")
    return value


# --- The user's blocks --------------------------------------------------------------------------------------------------


def _user(history: History, blocks: list[tuple[str, Mapping[str, Any]]]) -> None:
    """Results of tools are messages of their own; texts between them are one."""
    texts: list[str] = []
    for place, block in blocks:
        if block["type"] == "tool_result":
            if texts:
                history.user("\n\n".join(texts))
                texts = []
            history.result(_text(block, "tool_use_id", place), _result(block, place))
            continue
        text = _readable(block, place)
        if text is None:
            raise _unreadable(block, place)
        texts.append(text)
    if texts:
        history.user("\n\n".join(texts))


def _unreadable(block: Mapping[str, Any], place: str) -> ApiError:
    message = f"{place} is a block of type {shown(block['type'])}: the models here read text only."
    return bad_request(message, place, "unsupported_content_type")


def _readable(block: Mapping[str, Any], place: str) -> str | None:
    """The text of a block; None where it has none."""
    if block["type"] == "text":
        return _text(block, "text", place)
    if block["type"] == "search_result":
        content, headings = block.get("content"), (block.get("title"), block.get("source"))
    elif block["type"] == "document" and isinstance(source := block.get("source"), Mapping):
        content = source.get("data") if source.get("type") == "text" else source.get("content")
        headings = (block.get("title"), block.get("context"))
    else:
        return None
    if not content:
        return None
    parts = [_readable(part, at) for at, part in _blocks(content, place)]
    if None in parts:
        return None
    return "\n\n".join(text for text in (*headings, *parts) if isinstance(text, str) and text)


def _result(block: Mapping[str, Any], place: str) -> str:
    """A tool's result as text. A picture in one must not end the whole conversation: the model is told of it."""
    content = block.get("content")
    parts = [] if content is None else _blocks(content, f"{place}.content")
    texts = [_readable(part, at) for at, part in parts]
    read = [
        f"[{part['type']}: left out, since this model reads text only]" if text is None else text
        for (_, part), text in zip(parts, texts, strict=True)
    ]
    text = "\n\n".join(read)
    is_error = block.get("is_error") is True and not text.lower().startswith("error")
    return f"Error: {text}" if is_error else text


# --- The assistant's ----------------------------------------------------------------------------------------------------


def _assistant(history: History, blocks: list[tuple[str, Mapping[str, Any]]], known: CallReasoning) -> None:
    """Blocks of tools that ran at Anthropic are left out."""
    thoughts = {place: _thought(block, place) for place, block in blocks}
    calls = [block.get("id") for _, block in blocks if block["type"] == "tool_use"]
    if not any(thoughts.values()) and (hidden := known.before(calls)):
        history.reasoning(hidden)
    for place, block, texts in _with_texts_joined(blocks):
        if texts:
            history.said("\n\n".join(texts))
        elif thoughts[place]:
            history.reasoning(thoughts[place])
        elif block["type"] == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            history.call(_text(block, "id", place), _text(block, "name", place), arguments)


def _thought(block: Mapping[str, Any], place: str) -> str:
    if block["type"] == "thinking":
        signature = block.get("signature")
        return _text(block, "thinking", place) or decode_reasoning(signature if isinstance(signature, str) else None)
    if block["type"] == "redacted_thinking":
        return decode_reasoning(_text(block, "data", place))
    return ""


def _with_texts_joined(
    blocks: list[tuple[str, Mapping[str, Any]]],
) -> Iterator[tuple[str, Mapping[str, Any], list[str]]]:
    """The blocks; of texts that follow each other only the last, with all of them."""
    texts: list[str] = []
    for number, (place, block) in enumerate(blocks):
        if block["type"] != "text":
            yield place, block, []
            continue
        texts.append(_text(block, "text", place))
        if number + 1 == len(blocks) or blocks[number + 1][1]["type"] != "text":
            yield place, block, [text for text in texts if text]
            texts = []
