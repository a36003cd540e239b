"""Which headers gpt-oss may write where calls are asked for, ruled out, or limited to known functions.

The headers are those that it writes by itself, in both orders, as a graph of bytes and control tokens. A token is allowed
where its bytes lie on the graph, so the model spells a header as it likes and never writes a name that nobody knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import final

import numpy as np

from ..text.harmony import HarmonyFormat
from .vocabulary import Vocabulary

# After so many messages without a call, a call that is required has to come.
_LAST_STAGE = 2


@dataclass(frozen=True)
class HeaderRule:
    """What a completion may consist of.

    Attributes:
        recipients: Tools that may be called: "functions.f".
        is_required: Whether one of them has to be.
        may_think: Whether there may be reasoning.
        has_format: Whether the answer has a format, which its header may then name.
    """

    recipients: tuple[str, ...] = ()
    is_required: bool = False
    may_think: bool = True
    has_format: bool = False

    def stage(self, num_messages: int) -> int:
        """Messages that count: a required call may come after reasoning and a few words to the user, and no more."""
        return min(num_messages, _LAST_STAGE) if self.is_required else 0

    def channels(self, stage: int) -> list[str]:
        """The channels of messages that are no calls."""
        every = ["analysis", "commentary", "final"]
        if self.is_required:
            every = every[stage:_LAST_STAGE]
        # An answer in a format is the whole of what the user is told: no word comes before it.
        without = [*([] if self.may_think else ["analysis"]), *(["commentary"] if self.has_format else [])]
        return [each for each in every if each not in without]


class Node:
    """A place in the graph: what may follow, by byte or by control token."""

    __slots__ = ("bytes", "controls", "words")

    def __init__(self) -> None:
        self.bytes: dict[int, Node] = {}
        self.controls: dict[int, Node] = {}
        self.words: np.ndarray | None = None  # the mask, once it has been asked for

    def spell(self, text: str) -> Node:
        """The node after `text`."""
        node = self
        for byte in text.encode():
            node = node.bytes.setdefault(byte, Node())
        return node

    def control(self, token: int, end: Node | None = None) -> Node:
        """The node after a control token."""
        return self.controls.setdefault(token, Node() if end is None else end)


@final
class Headers:
    """The headers that a rule allows, as graphs: `begin` is where one begins, `after` where a token leads to."""

    def __init__(self, rule: HeaderRule, harmony: HarmonyFormat, vocabulary: Vocabulary) -> None:
        self.rule = rule
        self._harmony, self._vocabulary = harmony, vocabulary
        self._begins: dict[tuple[bool, int], Node] = {}
        self.end = Node()

    def begin(self, has_role: bool, num_messages: int) -> Node:
        """Where a header begins. has_role: whether "assistant" stands before it already, as in a prompt."""
        stage = self.rule.stage(num_messages)
        key = (has_role, stage)
        if key not in self._begins:
            first = Node()
            node = first if has_role else first.spell("assistant")
            self._channel_first(node, stage)
            self._recipient_first(node)
            self._begins[key] = first
        return self._begins[key]

    def after(self, node: Node, token: int) -> Node | None:
        """The node after a token; None where it may not follow."""
        if token in node.controls:
            return node.controls[token]
        if token in self._harmony.control_tokens:
            return None
        found: Node | None = node
        for byte in self._harmony.token_bytes(token):
            found = None if found is None else found.bytes.get(byte)
        return None if found is node else found

    def tokens(self, node: Node) -> list[int]:
        """The tokens that may follow."""
        found, places = list(node.controls), [(node, b"")]
        while places:
            place, before = places.pop()
            for byte, following in place.bytes.items():
                data = before + bytes((byte,))
                token = self._vocabulary.token_of(data)
                if token is not None:
                    found.append(token)
                if len(data) < self._vocabulary.longest:
                    places.append((following, data))
        return found

    def _channel_first(self, node: Node, stage: int) -> None:
        harmony = self._harmony
        channel = node.control(harmony.channel)
        for name in self.rule.channels(stage):
            place = channel.spell(name)
            place.control(harmony.message, self.end)
            if name == "final" and self.rule.has_format:
                self._content_types(place, ("json",))
        if self.rule.recipients:
            tail = Node()
            tail.control(harmony.message, self.end)
            self._content_types(tail, ("json", "code"))
            self._recipients((channel.spell(name).spell(" to=") for name in ("analysis", "commentary")), tail)

    def _recipient_first(self, node: Node) -> None:
        if not self.rule.recipients:
            return
        tail, harmony = Node(), self._harmony
        channel = tail.control(harmony.channel)
        for name in ("analysis", "commentary"):
            place = channel.spell(name)
            place.control(harmony.message, self.end)
            self._content_types(place, ("json", "code"))
        self._recipients([node.spell(" to=")], tail)

    def _recipients(self, places: Iterable[Node], tail: Node) -> None:
        """Names of tools, all of which lead to `tail`. A name may be the beginning of another one."""
        for place in places:
            for name in self.rule.recipients:
                last = place.spell(name)
                last.bytes.update(tail.bytes)
                last.controls.update(tail.controls)

    def _content_types(self, node: Node, names: Collection[str]) -> None:
        harmony = self._harmony
        for name in names:
            node.spell(f" {name}").control(harmony.message, self.end)
        # The control token may touch what is before it, or follow a space.
        for place in (node, node.spell(" ")):
            place.control(harmony.constrain).spell("json").control(harmony.message, self.end)
