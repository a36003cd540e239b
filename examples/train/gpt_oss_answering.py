"""Greedy completions of many Harmony conversations at once, with the model alone: what the demo is measured with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx

from openelm_mlx.models.cache import Cache
from openelm_mlx.models.gpt_oss import GptOss
from openelm_mlx.text.conversation import Message
from openelm_mlx.text.harmony import HarmonyFormat


def completions(
    model: GptOss,
    harmony: HarmonyFormat,
    conversations: Sequence[Sequence[Message]],
    max_tokens: int = 192,
    batch_size: int = 64,
) -> list[list[int]]:
    """The greedy completion of each conversation, up to and with its stop token.

    Conversations with the same instructions and prompts of one length make a batch: none is padded, and what they begin
    with is computed once.
    """
    instructions = [harmony.render(before_user(messages)) for messages in conversations]
    prompts = [harmony.render_for_completion(messages) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: (instructions[i], len(prompts[i])))
    results: list[list[int]] = [[] for _ in prompts]
    for beginning, sharing in groupby(order, key=lambda i: instructions[i]):
        cache = model.make_cache()
        model.run_layers(model.embed(mx.array([beginning])), cache)
        for _, same_length in groupby(sharing, key=lambda i: len(prompts[i])):
            numbers = list(same_length)
            for start in range(0, len(numbers), batch_size):
                chosen = numbers[start : start + batch_size]
                rests = [prompts[i][len(beginning) :] for i in chosen]
                rows = _greedy(model, harmony, chosen_rows(cache, [0] * len(chosen)), rests, max_tokens)
                for i, tokens in zip(chosen, rows, strict=True):
                    results[i] = tokens
    return results


def before_user(messages: Sequence[Message]) -> Sequence[Message]:
    """What stands before the user's first message: the system message, and the developer's."""
    return messages[: next(i for i, message in enumerate(messages) if message.role == "user")]


def _greedy(
    model: GptOss, harmony: HarmonyFormat, cache: Cache, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Each row's tokens up to its stop token. prompts: what is not in `cache` yet, all of one length."""
    tokens = mx.array(prompts)
    rows: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))  # which row each row of the batch is
    for _ in range(max_tokens):
        h = model.run_layers(model.embed(tokens), cache)
        tokens = mx.argmax(model.head(h[:, -1:])[:, -1], axis=-1)[:, None]
        chosen = tokens[:, 0].tolist()  # the host decides who is done
        for i, token in zip(going, chosen, strict=True):
            rows[i].append(token)
        kept = [j for j, token in enumerate(chosen) if token not in harmony.stop_tokens]
        if not kept:
            break
        if len(kept) < len(going):  # those that are done cost no more time
            going, tokens, cache = [going[j] for j in kept], tokens[mx.array(kept)], chosen_rows(cache, kept)
    return rows


def chosen_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """A cache of these rows of `cache`, which may come more than once."""
    copies, numbers = [copy.copy(layer) for layer in cache], mx.array(rows)
    for layer in copies:
        layer.keys, layer.values = layer.keys[numbers], layer.values[numbers]
    return copies
