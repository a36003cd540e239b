"""Correcting sloppy messages of MCP servers before the SDK parses them: one bad tool must not cost the others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..text.repair import repaired
from ..text.unicode import whole_characters
from .tool import RESERVED

_MOST_NAME = 64
_MOST_DESCRIPTION = 8_000  # characters; the model reads all of it in every chat
_CONTENT_FIELDS: dict[Any, tuple[str, ...]] = {
    "text": ("text",),
    "image": ("data", "mimeType"),
    "audio": ("data", "mimeType"),
    "resource_link": ("uri", "name"),
}

Note = Callable[[str], None]


def whole(value: Any) -> Any:
    """JSON without lone surrogates, for which the SDK, and servers, refuse a message."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, Mapping):
        return {whole(key): whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def cleaned_result(result: Any, note: Note) -> Any:
    """A result (a list of tools, or a tool's output) in a form that the SDK accepts. Others stay as they are."""
    if not isinstance(result, dict):
        return result
    if isinstance(result.get("tools"), list):
        return whole({**result, "tools": cleaned_tools(result["tools"], note)})
    if result.keys() & {"content", "structuredContent", "isError"}:
        result = {**result, "content": _cleaned_content(result.get("content"))}
        if not isinstance(result.get("isError", False), bool):
            result["isError"] = bool(result["isError"])
        if result.get("structuredContent", {}) is None:
            del result["structuredContent"]
    return whole(result)


def cleaned_tools(tools: Iterable[Any], note: Note) -> list[dict[str, Any]]:
    """The tools that can be called, each with a valid schema. `note` gets a sentence for every other tool and every change.

    A tool's output schema is dropped: results go to the model as text.
    """
    kept = []
    for tool in tools:
        name = tool.get("name") if isinstance(tool, Mapping) else None
        if not isinstance(name, str) or not name.strip():
            note(f"a tool without a name is left out ({_short(tool)})")
            continue
        if whole_characters(name) != name:
            note(
                f"the tool {whole_characters(name)!r} is left out: its name is not valid Unicode, so it cannot be called"
            )
            continue
        description = tool.get("description")
        parameters, faults = repaired(tool.get("inputSchema"))
        if faults:
            note(f"the schema of {_short(name)} has faults, which are ignored ({'; '.join(faults[:3])})")
        text = description[:_MOST_DESCRIPTION] if isinstance(description, str) else ""
        kept.append({"name": name, "description": text, "inputSchema": parameters})
    return kept


def name_for_model(name: str) -> str:
    """A tool's name for a header of gpt-oss's format, with `_` for characters that it cannot have."""
    word = re.sub(r"[^\w.-]", "_", name)[:_MOST_NAME]
    return f"{word}_" if word in RESERVED else word


def content_text(part: Any) -> str:
    """A piece of a result as text for the model, which can neither see nor hear."""
    if part.type == "text":
        return part.text
    if part.type == "resource":
        text = getattr(part.resource, "text", None)
        return text if text is not None else f"[a resource, {part.resource.uri}, which is not text]"
    if part.type == "resource_link":
        return f"[a link to {part.name}: {part.uri}]"
    article = "an" if part.type[0] in "aeiou" else "a"
    return f"[{article} {part.type} ({part.mime_type}), which cannot be shown as text]"


def _cleaned_content(content: Any) -> list[Any]:
    if content is None:
        return []
    parts = content if isinstance(content, list) else [content]
    return [part if _is_content(part) else {"type": "text", "text": _as_text(part)} for part in parts]


def _is_content(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    if part.get("type") == "resource":
        resource = part.get("resource")
        return isinstance(resource, Mapping) and isinstance(resource.get("uri"), str) and (
            isinstance(resource.get("text"), str) or isinstance(resource.get("blob"), str)
        )  # fmt: skip
    fields = _CONTENT_FIELDS.get(part.get("type")) if isinstance(part.get("type"), str) else None
    return fields is not None and all(isinstance(part.get(field), str) for field in fields)


def _as_text(part: Any) -> str:
    return part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)


def _short(value: Any) -> str:
    text = whole_characters(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
