"""Responses that clients may ask for again or go on from: in memory, limited in number and in bytes, the least used dropped.

A conversation is a chain: each response adds its input and output to the items before it. Items that several responses
share are kept once, as long as one of them is there.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files import shown
from .failures import ApiError

Item = dict[str, Any]

MOST_RESPONSES = 1000
MOST_BYTES = 64_000_000


@dataclass(eq=False)
class _Link:
    """The items that one response added to a conversation. holders: responses and later links that need it."""

    before: _Link | None
    items: list[Item]
    num_bytes: int
    holders: int = 0


@dataclass(frozen=True)
class Stored:
    """A response as it was answered. num_inputs: how many of its link's items were its input; the others are its output."""

    body: dict[str, Any]
    link: _Link
    num_inputs: int

    @property
    def inputs(self) -> list[Item]:
        """The items that were sent with it, without those of the responses before it."""
        return self.link.items[: self.num_inputs]

    @property
    def items(self) -> list[Item]:
        """The whole conversation up to and with its output."""
        links: list[_Link] = []
        link: _Link | None = self.link
        while link is not None:
            links.append(link)
            link = link.before
        return [item for each in reversed(links) for item in each.items]


class ResponseStore:
    """Responses by id, and their items by id. It forgets everything when the server ends.

    Used on the event loop's thread only.
    """

    def __init__(self, most_responses: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self.most_responses, self.most_bytes = most_responses, most_bytes
        self.num_bytes = 0
        self._responses: OrderedDict[str, Stored] = OrderedDict()  # the least recently used first
        self._items: dict[str, tuple[_Link, Item]] = {}

    def __len__(self) -> int:
        return len(self._responses)

    def __iter__(self) -> Iterator[str]:
        return iter(self._responses)

    def add(self, body: Mapping[str, Any], inputs: Sequence[Item], before: Stored | None) -> None:
        """Keep a finished response. inputs: its own; `before`: the response it went on from."""
        items = [*inputs, *body["output"]]
        link = _Link(None if before is None else before.link, items, _num_bytes(items) + _num_bytes(body))
        if link.before is not None:
            link.before.holders += 1
        link.holders = 1
        self.num_bytes += link.num_bytes
        self._items |= {item["id"]: (link, item) for item in items}
        self._responses[body["id"]] = Stored(dict(body), link, len(inputs))
        while self._responses and (len(self) > self.most_responses or self.num_bytes > self.most_bytes):
            self._drop(next(iter(self._responses)))

    def get(self, name: str, param: str | None = None) -> Stored:
        """A response by its id. Raises ApiError, a 404."""
        stored = self._responses.get(name)
        if stored is None:
            message = (
                f"There is no response {shown(name)}: it was not stored (store is false), has been deleted or dropped for "
                "newer ones, or the server was started anew."
            )
            code = "response_not_found" if param is None else "previous_response_not_found"
            raise ApiError(404, message, param=param, code=code)
        self._responses.move_to_end(name)
        return stored

    def item(self, name: str) -> Item | None:
        """An item of any response by its id, input or output."""
        found = self._items.get(name)
        return None if found is None else found[1]

    def delete(self, name: str) -> None:
        """Forget a response. Raises ApiError, a 404."""
        self.get(name)
        self._drop(name)

    def _drop(self, name: str) -> None:
        link: _Link | None = self._responses.pop(name).link
        while link is not None:
            link.holders -= 1
            if link.holders:
                return
            self.num_bytes -= link.num_bytes
            for item in link.items:
                if self._items.get(item["id"], (None,))[0] is link:
                    del self._items[item["id"]]
            link = link.before


def _num_bytes(value: Any) -> int:
    """About what it takes: the length of its JSON."""
    return len(json.dumps(value))
