"""A Harmony conversation as a training example: its tokens, and what the assistant has to write at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from openelm_mlx.text.conversation import DeveloperContent, Message, check_conversation, without_old_analysis
from openelm_mlx.text.harmony import HarmonyFormat

_OF_A_TURN = ("assistant", "tool")


@dataclass(frozen=True)
class HarmonyPiece:
    """Consecutive tokens of a conversation.

    written: what the assistant writes there, as long as `tokens`: the tokens themselves, but for the end of an answer in the
    history, which stands there as `<|end|>` and was written as `<|return|>`; None where somebody else writes. turn: counts the
    assistant's turns from 0 on.
    """

    tokens: list[int]
    written: list[int] | None
    turn: int


def training_pieces(harmony: HarmonyFormat, messages: Sequence[Message]) -> list[HarmonyPiece]:
    """The conversation as the model sees and continues it, in pieces.

    Reasoning of earlier turns is left out, as in every prompt: only the last turn's is learned. Where it was left out, the
    header of the answer is not learned either, since the model would have begun with its reasoning. The first message of a
    turn is written from behind `<|start|>assistant` on, with which a prompt ends; further ones of the turn with it. A call
    ends in `<|call|>`; results of tools are read, not written. Raises PromptError when the messages break a rule of the format.
    """
    check_conversation(messages)
    begin = _last_turn(messages)
    kept = [*without_old_analysis(messages[:begin]), *messages[begin:]]
    has_functions = any(isinstance(m.content, DeveloperContent) and m.content.has_functions for m in messages)
    has_lost = _that_lost_reasoning(messages, kept)
    pieces: list[HarmonyPiece] = []
    turn = -1
    before: Message | None = None
    for i, message in enumerate(kept):
        tokens = harmony.render_message(message, has_functions=has_functions)
        if message.role != "assistant":
            pieces.append(HarmonyPiece(tokens, None, turn))
            before = message
            continue
        follows_own = before is not None and before.role == "assistant" and not _ends_a_round(before)
        if before is None or before.role not in _OF_A_TURN:
            turn += 1
        start = 0 if follows_own else 1 + len(harmony.tokenizer.encode("assistant", continuation=True))
        if i in has_lost:
            start = tokens.index(harmony.message) + 1
        written = list(tokens)
        is_answer = message.channel == "final"
        if is_answer:
            written[-1] = harmony.return_
            if i == len(kept) - 1:
                tokens[-1] = harmony.return_
        if start:
            pieces.append(HarmonyPiece(tokens[:start], None, turn))
        pieces.append(HarmonyPiece(tokens[start:], written[start:], turn))
        before = message
    return pieces


def _last_turn(messages: Sequence[Message]) -> int:
    """Where the assistant's last turn begins: its thoughts, calls, their results, and its answer."""
    own = [i for i, message in enumerate(messages) if message.role == "assistant"]
    begin = own[-1] if own else len(messages)
    while begin and messages[begin - 1].role in _OF_A_TURN:
        begin -= 1
    return begin


def _ends_a_round(message: Message) -> bool:
    """Whether the model stops after this message of the assistant."""
    return message.is_call or message.channel in ("final", None)


def _that_lost_reasoning(messages: Sequence[Message], kept: Sequence[Message]) -> set[int]:
    """The numbers, among `kept`, of the messages right before which reasoning was left out."""
    places = {id(message): i for i, message in enumerate(kept)}
    return {
        places[id(after)]
        for before, after in pairwise(messages)
        if id(before) not in places and id(after) in places and after.role == "assistant"
    }
