"""Streams of chunks, as Chat Completions and Completions have them: each chunk is one choice in what all of them repeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..failures import ApiError
from ..generation import Progress
from ..parts import Finished, Usage, whole_usage
from ..sse import comment
from .shared import json_text, usage_object


class ChunkEvents:
    """What is equal in all chunks is written once. n: answers to each of the prompts."""

    def __init__(self, head: Mapping[str, Any], num_prompts: int, n: int, wants_usage: bool) -> None:
        self._num_answers, self._n, self._wants_usage = num_prompts * n, n, wants_usage
        self._head = "data: " + json_text(head)[:-1] + ',"choices":['
        self._tail = ',"usage":null}\n\n' if wants_usage else "}\n\n"
        self._usages: dict[int, Usage] = {}  # of the answers that have finished

    def keep_alive(self, progress: Progress | None) -> bytes:
        return comment(progress)

    def failure(self, error: ApiError) -> bytes:
        return f"data: {json_text(error.openai_body())}\n\n".encode("utf-8", "replace")

    def _chunk(self, choice: str) -> str:
        """A chunk of one choice, which is JSON already."""
        return f"{self._head}{choice}]{self._tail}"

    def _finished(self, part: Finished) -> str:
        """What comes after an answer's last chunk: the end of the stream, if it was the last answer."""
        self._usages[part.index] = part.usage
        if len(self._usages) < self._num_answers:
            return ""
        end = "data: [DONE]\n\n"
        if not self._wants_usage:
            return end
        usage = whole_usage([self._usages[index] for index in range(self._num_answers)], self._n)
        return f'{self._head}],"usage":{json_text(usage_object(usage))}}}\n\n{end}'
