"""OpenAI's Completions: POST /v1/completions, text that a model goes on with. No template: the form for base models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from json.encoder import encode_basestring
from typing import Annotated, Any, final

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...files import shown
from ..app import Json, services
from ..bodies import WholeNumber, read_body
from ..failures import bad_request
from ..generation import Generation, GenerationRequest, PromptText, collected
from ..parts import Answer, Finished, ItemText, Part, TokenLogprob, Usage, whole_usage
from ..sse import EventStream, begun, unless_gone
from .chunk_events import ChunkEvents
from .ids import new_id
from .sampling import SamplingFields, sampling_params
from .shared import MOST_ANSWERS, StopField, StreamOptions, json_text, now, stops_of, usage_object

# OpenAI's.
DEFAULT_MAX_TOKENS = 16
MOST_PROMPTS = 1024

Prompt = str | list[int]


class CompletionRequest(SamplingFields):
    """The fields that are read."""

    model: str
    prompt: Any = None
    max_tokens: Annotated[WholeNumber, Field(ge=0)] = DEFAULT_MAX_TOKENS
    n: Annotated[WholeNumber, Field(ge=1, le=MOST_ANSWERS)] = 1
    best_of: Annotated[WholeNumber, Field(ge=1)] | None = None
    echo: bool = False
    suffix: Any = None
    logprobs: Annotated[WholeNumber, Field(ge=0, le=20)] | None = None
    stop: StopField = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def generation(self) -> GenerationRequest:
        """What it asks of a model. Raises ApiError."""
        if self.suffix:
            raise bad_request(
                "suffix is given, and these models were not trained to fill in the middle of a text: leave it out.",
                "suffix",
            )
        if self.best_of is not None and self.best_of != self.n:
            raise bad_request(
                f"best_of is {self.best_of} and n is {self.n}: all answers are given, so leave it out.", "best_of"
            )
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens is 0, and echo is not set: nothing would come back.", "max_tokens")
        return GenerationRequest(
            model=self.model,
            prompts=self.prompts,
            sampling=sampling_params(self),
            max_tokens=max(self.max_tokens, 1),
            stop=stops_of(self.stop),
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            n=self.n,
        )

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts: one, or several in a list. Raises ApiError."""
        given = self.prompt
        if given is None:
            raise bad_request("prompt is missing.", "prompt", "missing_required_parameter")
        if isinstance(given, str) or _are_tokens(given):
            return [given]
        if not isinstance(given, list) or not all(isinstance(each, str) or _are_tokens(each) for each in given):
            raise bad_request(f"prompt is {shown(given)}: give text, tokens, or a list of those.", "prompt")
        if not 0 < len(given) <= MOST_PROMPTS:
            raise bad_request(f"prompt is a list of {len(given)}: give 1 to {MOST_PROMPTS:,} of them.", "prompt")
        return given


def _are_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(each) is int for each in prompt)


@final
class _Scores:
    """OpenAI's `logprobs` of a text, and where each of its tokens begins."""

    def __init__(self) -> None:
        self._offset = 0

    def of(self, tokens: Iterable[TokenLogprob], first: str | None = None) -> dict[str, Any]:
        """first: a token before these that has no log-probability."""
        tokens = list(tokens)
        unscored = [] if first is None else [first]
        names = [*unscored, *(token.token for token in tokens)]
        offsets = []
        for name in names:
            offsets.append(self._offset)
            self._offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [*(None for _ in unscored), *(token.logprob for token in tokens)],
            "top_logprobs": [
                *(None for _ in unscored),
                *({each.token: each.logprob for each in (*token.top, token)} for token in tokens),
            ],
            "text_offset": offsets,
        }


@final
class _Text:
    """The text of one choice, from its echo on, piece by piece."""

    def __init__(self, asked: CompletionRequest, echo: PromptText | None) -> None:
        self._scores = None if asked.logprobs is None else _Scores()
        self._is_shown = asked.max_tokens > 0
        self._echo = echo

    def begin(self) -> tuple[str, dict[str, Any] | None] | None:
        """The echo, the first time; None where there is none."""
        echo, self._echo = self._echo, None
        if echo is None:
            return None
        return echo.text, None if self._scores is None else self._scores.of(echo.scored, echo.first)

    def piece(self, text: str, tokens: Iterable[TokenLogprob]) -> tuple[str, dict[str, Any] | None] | None:
        """More text; None where nothing but the echo is wanted."""
        if not self._is_shown:
            return None
        return text, None if self._scores is None else self._scores.of(tokens)


def completion(
    answers: list[Answer], echoes: list[PromptText], asked: CompletionRequest, created: int
) -> dict[str, Any]:
    """A whole `text_completion`. echoes: of the prompts, where they are wanted."""
    texts = [_Text(asked, echoes[answer.index // asked.n] if asked.echo else None) for answer in answers]
    usages = [_counted(answer.usage, asked) for answer in answers]
    return {
        "id": new_id("cmpl", "-"),
        "object": "text_completion",
        "created": created,
        "model": asked.model,
        "choices": [_choice(answer, text) for answer, text in zip(answers, texts, strict=True)],
        "usage": usage_object(whole_usage(usages, asked.n)),
    }


def _choice(answer: Answer, text: _Text) -> dict[str, Any]:
    tokens = [token for item in answer.items for token in item.logprobs]
    found = [text.begin(), text.piece("".join(item.text for item in answer.items), tokens)]
    pieces = [piece for piece in found if piece is not None]
    scores = [each for _, each in pieces if each is not None]
    logprobs = {key: [value for each in scores for value in each[key]] for key in scores[0]} if scores else None
    whole = "".join(piece for piece, _ in pieces)
    return {"index": answer.index, "text": whole, "logprobs": logprobs, "finish_reason": answer.reason}


def _counted(usage: Usage, asked: CompletionRequest) -> Usage:
    """The engine always writes one token, also where only the echo is wanted."""
    return usage if asked.max_tokens > 0 else replace(usage, completion_tokens=0)


@final
class CompletionEvents(ChunkEvents):
    """A streamed `text_completion`."""

    def __init__(self, generation: Generation | None, asked: CompletionRequest, created: int) -> None:
        head = {"id": new_id("cmpl", "-"), "object": "text_completion", "created": created, "model": asked.model}
        super().__init__(head, len(asked.prompts), asked.n, asked.stream_options.include_usage)
        self._generation, self._asked = generation, asked
        self._texts: list[_Text] = []

    def start(self) -> bytes:
        return b""

    def more(self, parts: list[Part]) -> bytes:
        begun = ""
        if not self._texts:  # from now on, the prompt's log-probabilities are known
            generation = self._generation
            echoes = generation.prompt_texts() if self._asked.echo and generation is not None else None
            for index in range(self._num_answers):
                self._texts.append(_Text(self._asked, None if echoes is None else echoes[index // self._n]))
                begun += self._piece(index, self._texts[index].begin())
        return (begun + "".join(map(self._event, parts))).encode("utf-8", "replace")

    def _event(self, part: Part) -> str:
        if isinstance(part, ItemText):
            return self._piece(part.index, self._texts[part.index].piece(part.text, part.logprobs))
        if not isinstance(part, Finished):
            return ""
        part = replace(part, usage=_counted(part.usage, self._asked))
        return self._text(part.index, "", finish=f'"{part.reason}"') + self._finished(part)

    def _piece(self, index: int, piece: tuple[str, dict[str, Any] | None] | None) -> str:
        if piece is None:
            return ""
        text, scores = piece
        return self._text(index, text, "null" if scores is None else json_text(scores))

    def _text(self, index: int, text: str, logprobs: str = "null", finish: str = "null") -> str:
        text = encode_basestring(text)
        return self._chunk(f'{{"index":{index},"text":{text},"logprobs":{logprobs},"finish_reason":{finish}}}')


async def create(request: Request) -> Response:
    """POST /v1/completions."""
    asked = await read_body(request, CompletionRequest)
    wanted = asked.generation()
    created = now()
    start = services(request).generations.start(wanted)
    if asked.stream:
        return EventStream(await begun(request, start), lambda own: CompletionEvents(own, asked, created))
    generation = await unless_gone(request, start)
    async with generation:
        answers = await unless_gone(request, collected(generation))
        echoes = generation.prompt_texts() if asked.echo else []
    return Json(completion(answers, echoes, asked, created))


def routes() -> list[Route]:
    """The route of Completions."""
    return [Route("/v1/completions", create, methods=["POST"])]
