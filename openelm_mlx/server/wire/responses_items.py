"""Items of a Responses conversation: checked and named when they come in, and turned into the chat that the model reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ...files import shown
from ..failures import ApiError, bad_request
from .custom_input import wrapped
from .history import History
from .ids import new_id
from .reasoning_text import decode_reasoning
from .responses_tools import Tools

Item = dict[str, Any]

_TEXTS = ("input_text", "output_text", "text", "refusal")
_ROLES = ("user", "assistant", "system", "developer")
# What tools did that run on OpenAI's servers, or that this server has left out: nothing that the model could read.
_LEFT_OUT = frozenset(
    {
        "file_search_call", "computer_call", "computer_call_output", "web_search_call", "tool_search_call",
        "tool_search_output", "image_generation_call", "code_interpreter_call", "local_shell_call",
        "local_shell_call_output", "shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output",
        "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "mcp_call", "compaction",
        "compaction_trigger", "configuration_update", "program", "program_output", "exec",
    }
)  # fmt: skip
ADDITIONAL_TOOLS = "additional_tools"  # an item that brings tools


def read_input(given: str | Sequence[Any] | None, find: Callable[[str], Item | None]) -> list[Item]:
    """The items of a request's input, complete and with ids. find: an item that was stored, by its id.

    Raises ApiError, a 400 that names the place, or a 404 for a reference to an item that is not stored.
    """
    if given is None:
        return []
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    items = [_item(item, f"input[{number}]", find) for number, item in enumerate(given)]
    return [item for item in items if item is not None]


def chat(instructions: str | None, items: Iterable[Item], tools: Tools) -> list[dict[str, Any]]:
    """The items as chat dicts, the instructions first."""
    history = History()
    if instructions:
        history.instructions(instructions)
    for item in items:
        _READ[item["type"]](history, item, tools)
    return history.finished()


# --- From the wire ------------------------------------------------------------------------------------------------------


def _item(item: Any, place: str, find: Callable[[str], Item | None]) -> Item | None:
    if not isinstance(item, Mapping):
        raise bad_request(f"{place} is {shown(item)}: it should be an object.", place)
    item = {name: value for name, value in item.items() if value is not None}
    kind = item.get("type") or ("message" if "role" in item else "item_reference" if "id" in item else None)
    if kind == "item_reference":
        return _referred(item, place, find)
    if isinstance(kind, str) and kind in _LEFT_OUT:
        return None
    if not isinstance(kind, str) or kind not in _MADE:
        given = "missing" if kind is None else shown(kind)
        raise bad_request(f"{place}.type is {given}: it should be one of {', '.join(_MADE)}.", f"{place}.type")
    made = _MADE[kind](item, place)
    if kind == "reasoning" and not made.get("content") and not decode_reasoning(made.get("encrypted_content")):
        known = find(made["id"])
        made = known if known is not None and known["type"] == kind else made
    return made


def _referred(item: Mapping[str, Any], place: str, find: Callable[[str], Item | None]) -> Item:
    name = _text(item, "id", place)
    known = find(name)
    if known is None:
        message = (
            f"There is no item {shown(name)}: it was not stored (store is false), has been deleted or dropped for newer "
            "ones, or the server was started anew. Send the item itself."
        )
        raise ApiError(404, message, param=f"{place}.id", code="item_not_found")
    return known


def _message(item: Mapping[str, Any], place: str) -> Item:
    role = _text(item, "role", place)
    if role not in _ROLES:
        raise bad_request(f"{place}.role is {shown(role)}: it should be one of {', '.join(_ROLES)}.", f"{place}.role")
    texts = text_of(item, "content", place)
    made = {"id": _id(item, "msg"), "type": "message", "status": "completed", "role": role}
    if role == "assistant":
        parts = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []} for text in texts]
        phase = item.get("phase")
        return {**made, "content": parts, **({"phase": phase} if isinstance(phase, str) else {})}
    return {**made, "content": [{"type": "input_text", "text": text} for text in texts]}


def _reasoning(item: Mapping[str, Any], place: str) -> Item:
    made: Item = {"id": _id(item, "rs"), "type": "reasoning", "summary": [], "status": "completed"}
    for key, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        if item.get(key):
            made[key] = [{"type": kind, "text": text} for text in text_of(item, key, place, (kind, "text"))]
    sealed = item.get("encrypted_content")
    return {**made, **({"encrypted_content": sealed} if isinstance(sealed, str) else {})}


def _call(item: Mapping[str, Any], place: str) -> Item:
    arguments = item.get("arguments", "{}")
    made = {
        "id": _id(item, "fc"),
        "type": "function_call",
        "call_id": _text(item, "call_id", place),
        "name": _text(item, "name", place),
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
        "status": "completed",
    }
    return {**made, **_namespace(item)}


def _custom_call(item: Mapping[str, Any], place: str) -> Item:
    made = {
        "id": _id(item, "ctc"),
        "type": "custom_tool_call",
        "call_id": _text(item, "call_id", place),
        "name": _text(item, "name", place),
        "input": _text(item, "input", place),
        "status": "completed",
    }
    return {**made, **_namespace(item)}


def _namespace(item: Mapping[str, Any]) -> dict[str, str]:
    namespace = item.get("namespace")
    return {"namespace": namespace} if isinstance(namespace, str) and namespace else {}


def _output(item: Mapping[str, Any], place: str) -> Item:
    output = item.get("output")
    if output is None:
        raise bad_request(f"{place}.output is missing.", f"{place}.output", "missing_required_parameter")
    if isinstance(output, (list, tuple)) and all(isinstance(part, Mapping) and "type" in part for part in output):
        output = [{"type": "input_text", "text": _seen(part)} for part in output]
    elif not isinstance(output, str):
        output = json.dumps(output, ensure_ascii=False)
    kind = item["type"]
    return {
        "id": _id(item, "fco" if kind == "function_call_output" else "ctco"),
        "type": kind,
        "call_id": _text(item, "call_id", place),
        "output": output,
        "status": "completed",
    }


def _seen(part: Mapping[str, Any]) -> str:
    """A part of a tool's result. A result with a picture in it must not end the whole conversation."""
    text = part.get("text")
    return text if isinstance(text, str) else f"[{part['type']}: left out, since this model reads text only]"


def _tools_item(item: Mapping[str, Any], place: str) -> Item:
    tools = item.get("tools", [])
    if not isinstance(tools, list):
        raise bad_request(f"{place}.tools is {shown(tools)}: it should be a list.", f"{place}.tools")
    return {"id": _id(item, "at"), "type": ADDITIONAL_TOOLS, "role": "developer", "tools": tools}


_MADE: dict[str, Callable[[Mapping[str, Any], str], Item]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _call,
    "function_call_output": _output,
    "custom_tool_call": _custom_call,
    "custom_tool_call_output": _output,
    ADDITIONAL_TOOLS: _tools_item,
}


def _id(item: Mapping[str, Any], kind: str) -> str:
    own = item.get("id")
    return own if isinstance(own, str) and own else new_id(kind)


def _text(item: Mapping[str, Any], key: str, place: str) -> str:
    value = item.get(key)
    if value is None:
        raise bad_request(f"{place}.{key} is missing.", f"{place}.{key}", "missing_required_parameter")
    if not isinstance(value, str):
        raise bad_request(f"{place}.{key} is {shown(value)}: it should be a string.", f"{place}.{key}")
    return value


def text_of(item: Mapping[str, Any], key: str, place: str, kinds: tuple[str, ...] = _TEXTS) -> list[str]:
    """The texts of a content: a string, or a list of parts of text. Raises ApiError for anything else."""
    content = item.get(key)
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)):
        given = "missing" if content is None else shown(content)
        raise bad_request(f"{place}.{key} is {given}: it should be a string or a list of parts.", f"{place}.{key}")
    texts = []
    for number, part in enumerate(content):
        at = f"{place}.{key}[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in kinds:
            given = shown(part if kind is None else kind)
            message = f"{at} is {given}: the models here read text only, in parts of type {' or '.join(kinds[:2])}."
            raise bad_request(message, at, "unsupported_content_type")
        texts.append(_text(part, "refusal" if kind == "refusal" else "text", at))
    return texts


# --- To the chat --------------------------------------------------------------------------------------------------------


def _read_message(history: History, item: Item, tools: Tools) -> None:
    text = "".join(part["text"] for part in item["content"])
    if item["role"] == "assistant":
        history.said(text, item.get("phase"))
    elif item["role"] == "user":
        history.user(text)
    else:
        history.instructions(text)


def _read_reasoning(history: History, item: Item, tools: Tools) -> None:
    text = "\n\n".join(part["text"] for part in item.get("content") or ())
    text = (
        text or decode_reasoning(item.get("encrypted_content")) or "\n\n".join(part["text"] for part in item["summary"])
    )
    if text:
        history.reasoning(text)


def _read_call(history: History, item: Item, tools: Tools) -> None:
    name = tools.function_name(item["name"], item.get("namespace"))
    history.call(item["call_id"], name, item["arguments"])


def _read_custom_call(history: History, item: Item, tools: Tools) -> None:
    name = tools.function_name(item["name"], item.get("namespace"))
    history.call(item["call_id"], name, wrapped(item["input"]))


def _read_output(history: History, item: Item, tools: Tools) -> None:
    output = item["output"]
    history.result(item["call_id"], output if isinstance(output, str) else "\n".join(part["text"] for part in output))


_READ: dict[str, Callable[[History, Item, Tools], None]] = {
    "message": _read_message,
    "reasoning": _read_reasoning,
    "function_call": _read_call,
    "function_call_output": _read_output,
    "custom_tool_call": _read_custom_call,
    "custom_tool_call_output": _read_output,
    ADDITIONAL_TOOLS: lambda history, item, tools: None,
}
