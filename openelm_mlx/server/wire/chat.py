"""OpenAI's Chat Completions: POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from json.encoder import encode_basestring
from typing import Annotated, Any, final

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...files import shown
from ..app import Json, services
from ..bodies import WholeNumber, Wire, read_body
from ..call_reasoning import CallReasoning
from ..failures import bad_request
from ..generation import AnswerSchema, Effort, GenerationRequest, collected
from ..parts import Answer, Finished, Item, ItemStarted, ItemText, Part, whole_usage
from ..sse import EventStream, begun, unless_gone
from .chunk_events import ChunkEvents
from .ids import new_id
from .responses_tools import Tools, read_tools
from .sampling import SamplingFields, sampling_params
from .shared import (
    MOST_ANSWERS,
    StopField,
    StreamOptions,
    TokenLimit,
    answer_schema_of,
    effort_of,
    json_text,
    logprob_object,
    now,
    stops_of,
    usage_object,
)

# What comes between two texts of one answer, a few words before a call for example.
BETWEEN = "\n\n"


class ResponseFormat(Wire):
    type: str
    json_schema: dict[str, Any] | None = None


class Reasoning(Wire):
    effort: Any = None


class ChatRequest(SamplingFields):
    """The fields that are read; OpenAI's others have no effect on what a model writes."""

    model: str
    messages: list[dict[str, Any]]
    max_completion_tokens: TokenLimit = None
    max_tokens: TokenLimit = None
    n: Annotated[WholeNumber, Field(ge=1, le=MOST_ANSWERS)] = 1
    stop: StopField = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool = False
    top_logprobs: Annotated[WholeNumber, Field(ge=0, le=20)] | None = None
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    reasoning_effort: Any = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def generation(self) -> GenerationRequest:
        """What it asks of a model. Raises ApiError."""
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs is given, and logprobs is not: set it to true.", "top_logprobs")
        tools = self._tools()
        return GenerationRequest(
            model=self.model,
            messages=read_messages(self.messages),
            tools=tools.functions,
            lenient_tools=tools.lenient,
            tool_choice=tools.choice,
            answer_schema=self._answer_schema(),
            sampling=sampling_params(self),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stop=stops_of(self.stop),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            n=self.n,
            reasoning_effort=self._effort(),
            parallel_tool_calls=self.parallel_tool_calls,
        )

    def _tools(self) -> Tools:
        """The functions. Other kinds of tools run elsewhere, and are not the model's to call here."""
        definitions = []
        for at, tool in enumerate(self.tools):
            param = f"tools[{at}]"
            if not isinstance(tool, dict):
                raise bad_request(f"{param} is {shown(tool)}: give an object.", param)
            if tool.get("type", "function") != "function":
                continue
            param += ".function"
            function = tool.get("function")
            if not isinstance(function, dict):
                raise bad_request(f"{param} is missing.", param, "missing_required_parameter")
            definitions.append((param, {**function, "type": "function"}))
        return read_tools(definitions, _flat(self.tool_choice))

    def _answer_schema(self) -> AnswerSchema | None:
        given = self.response_format
        return None if given is None else answer_schema_of(given.type, given.json_schema, "response_format")

    def _effort(self) -> Effort | None:
        for given, param in (
            (self.reasoning_effort, "reasoning_effort"),
            (None if self.reasoning is None else self.reasoning.effort, "reasoning.effort"),
            ((self.chat_template_kwargs or {}).get("reasoning_effort"), "chat_template_kwargs.reasoning_effort"),
        ):
            if given is not None:
                return effort_of(given, param)
        return None


def _flat(choice: Any) -> Any:
    """tool_choice as Responses has it: the name beside the type."""
    if not isinstance(choice, dict):
        return choice
    for kind in ("function", "allowed_tools"):
        if choice.get("type") == kind and isinstance(choice.get(kind), dict):
            inner = choice[kind]
            if isinstance(inner.get("tools"), list):
                inner = {**inner, "tools": [_flat(each) for each in inner["tools"]]}
            return {"type": kind, **inner}
    return choice


def read_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat as text/openai_chat.py reads it. Raises ApiError for what is no text."""
    if not messages:
        raise bad_request("messages is an empty list: give at least one message.", "messages")
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _message(message: dict[str, Any], param: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool", "function"):
        raise bad_request(
            f"{param}.role is {shown(role)}: use system, developer, user, assistant or tool.", f"{param}.role"
        )
    content = message.get("content")
    kept: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": _content(content, param)}
    if content is None and role not in ("assistant", "tool", "function"):
        raise bad_request(f"{param}.content is missing.", f"{param}.content", "missing_required_parameter")
    if role == "assistant":
        kept.update(_said_before(message, param))
    for key in ("name", "tool_call_id"):
        value = message.get(key)
        if value is not None and (key != "name" or role != "assistant"):
            if not isinstance(value, str):
                raise bad_request(f"{param}.{key} is {shown(value)}: give text.", f"{param}.{key}")
            kept[key] = value
    return kept


def _said_before(message: Mapping[str, Any], param: str) -> dict[str, Any]:
    """An assistant's reasoning, by whichever name, and its calls."""
    found: dict[str, Any] = {}
    for key in ("reasoning", "reasoning_content", "thinking"):
        if isinstance(message.get(key), str) and message[key]:
            found["reasoning"] = message[key]
            break
    calls = message.get("tool_calls")
    if not calls and isinstance(message.get("function_call"), dict):  # from before there were tool_calls
        calls = [{"function": message["function_call"]}]
    if calls is None:
        return found
    if not isinstance(calls, list):
        raise bad_request(f"{param}.tool_calls is {shown(calls)}: give a list.", f"{param}.tool_calls")
    if calls:
        found["tool_calls"] = [_call(call, f"{param}.tool_calls[{at}]") for at, call in enumerate(calls)]
    return found


def _call(call: Any, param: str) -> dict[str, Any]:
    inner = call.get("function") if isinstance(call, dict) else None
    if inner is None and isinstance(call, dict) and isinstance(call.get("custom"), dict):
        inner = {"name": call["custom"].get("name"), "arguments": call["custom"].get("input")}
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise bad_request(f"{param}.function.name is missing.", f"{param}.function.name", "missing_required_parameter")
    arguments = inner.get("arguments")
    if not isinstance(arguments, (str, dict, type(None))):
        raise bad_request(f"{param}.function.arguments is {shown(arguments)}: give JSON as text.", param)
    call_id = call.get("id")
    if isinstance(call_id, (dict, list)):
        raise bad_request(f"{param}.id is {shown(call_id)}: give text.", f"{param}.id")
    return {
        "id": call_id,
        "function": {"name": inner["name"], "arguments": "{}" if arguments is None else arguments},
    }


def _content(content: Any, param: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{param}.content is {shown(content)}: give text, or a list of parts.", f"{param}.content")
    parts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise bad_request(
                f"{param}.content[{at}] is of type {shown(kind)}: the model reads text only.",
                f"{param}.content[{at}]",
            )
        parts.append({"type": "text", "text": text})
    return parts


# --- Answers ----------------------------------------------------------------------------------------------------------


def completion(
    answers: list[Answer], asked: ChatRequest, created: int, call_reasoning: CallReasoning
) -> dict[str, Any]:
    """A whole `chat.completion`. call_reasoning: remembers what was thought before its calls."""
    return {
        "id": new_id("chatcmpl", "-"),
        "object": "chat.completion",
        "created": created,
        "model": asked.model,
        "choices": [_choice(answer, asked, call_reasoning) for answer in answers],
        "usage": usage_object(whole_usage([answer.usage for answer in answers], asked.n)),
    }


def _choice(answer: Answer, asked: ChatRequest, call_reasoning: CallReasoning) -> dict[str, Any]:
    logprobs = None
    if asked.logprobs:
        tokens = [logprob_object(token) for item in answer.items for token in item.logprobs]
        logprobs = {"content": tokens, "refusal": None}
    message = _answer_message(answer.items)
    if "tool_calls" in message:
        call_reasoning.keep(message["tool_calls"][0]["id"], message.get("reasoning", ""))
    return {
        "index": answer.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": answer.reason,
    }


def _answer_message(items: list[Item]) -> dict[str, Any]:
    content = BETWEEN.join(item.text for item in items if item.kind == "message")
    reasoning = BETWEEN.join(item.text for item in items if item.kind == "reasoning")
    calls = [
        {"id": new_id("call"), "type": "function", "function": {"name": item.name, "arguments": item.text}}
        for item in items
        if item.kind == "call"
    ]
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if reasoning:
        message["reasoning"] = message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


@final
class ChatEvents(ChunkEvents):
    """A streamed `chat.completion`: one chunk a delta."""

    def __init__(self, asked: ChatRequest, created: int, call_reasoning: CallReasoning) -> None:
        head = {
            "id": new_id("chatcmpl", "-"),
            "object": "chat.completion.chunk",
            "created": created,
            "model": asked.model,
        }
        super().__init__(head, 1, asked.n, asked.stream_options.include_usage)
        self._call_reasoning, self._wants_logprobs = call_reasoning, asked.logprobs
        self._reasoning = [""] * self._n
        # Of each answer: kinds of items that have had text, what is to come before the next text, and how many calls.
        self._said: list[set[str]] = [set() for _ in range(self._n)]
        self._kind = [""] * self._n
        self._before = [""] * self._n
        self._num_calls = [0] * self._n

    def start(self) -> bytes:
        return "".join(
            self._delta(i, '{"role":"assistant","content":"","refusal":null}') for i in range(self._n)
        ).encode()

    def more(self, parts: list[Part]) -> bytes:
        return "".join(map(self._event, parts)).encode("utf-8", "replace")

    def _event(self, part: Part) -> str:
        if isinstance(part, ItemText):
            return self._text(part)
        if isinstance(part, ItemStarted):
            return self._started(part)
        if isinstance(part, Finished):
            return self._delta(part.index, "{}", finish=f'"{part.reason}"') + self._finished(part)
        return ""

    def _started(self, part: ItemStarted) -> str:
        index = part.index
        self._kind[index] = part.kind
        self._before[index] = BETWEEN if part.kind in self._said[index] else ""
        if part.kind != "call":
            return ""
        number = self._num_calls[index]
        self._num_calls[index] += 1
        name, call_id = encode_basestring(part.name or ""), new_id("call")
        if number == 0:
            self._call_reasoning.keep(call_id, self._reasoning[index])
        return self._delta(
            index,
            f'{{"tool_calls":[{{"index":{number},"id":"{call_id}","type":"function",'
            f'"function":{{"name":{name},"arguments":""}}}}]}}',
        )

    def _text(self, part: ItemText) -> str:
        index, kind = part.index, self._kind[part.index]
        if kind == "call":
            number = self._num_calls[index] - 1
            text = encode_basestring(part.text)
            return self._delta(index, f'{{"tool_calls":[{{"index":{number},"function":{{"arguments":{text}}}}}]}}')
        said = self._before[index] + part.text
        text = encode_basestring(said)
        self._before[index] = ""
        self._said[index].add(kind)
        if kind == "reasoning":
            self._reasoning[index] += said
            return self._delta(index, f'{{"reasoning":{text},"reasoning_content":{text}}}')
        logprobs = "null"
        if self._wants_logprobs:
            logprobs = json_text({"content": [logprob_object(each) for each in part.logprobs], "refusal": None})
        return self._delta(index, f'{{"content":{text}}}', logprobs)

    def _delta(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> str:
        return self._chunk(f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}')


async def create(request: Request) -> Response:
    """POST /v1/chat/completions."""
    asked = await read_body(request, ChatRequest)
    own, created = services(request), now()
    wanted = asked.generation()
    wanted = replace(wanted, messages=own.call_reasoning.completed(wanted.messages or ()))
    start = own.generations.start(wanted)
    if asked.stream:
        return EventStream(await begun(request, start), lambda _: ChatEvents(asked, created, own.call_reasoning))
    generation = await unless_gone(request, start)
    async with generation:
        answers = await unless_gone(request, collected(generation))
    return Json(completion(answers, asked, created, own.call_reasoning))


def routes() -> list[Route]:
    """The route of Chat Completions."""
    return [Route("/v1/chat/completions", create, methods=["POST"])]
