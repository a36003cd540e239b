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

    Prompts of one length make a batch, so that none is padded, and what they all begin with is computed once.
    """
    prompts = [harmony.render_for_completion(messages) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for _, same_length in groupby(order, key=lambda i: len(prompts[i])):
        numbers = list(same_length)
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            rows = _greedy(model, harmony, [prompts[i] for i in chosen], max_tokens)
            for i, tokens in zip(chosen, rows, strict=True):
                results[i] = tokens
    return results


def _greedy(model: GptOss, harmony: HarmonyFormat, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Each row's tokens up to its stop token."""
    length = len(prompts[0]) - 1  # the last token of each is left to be run: its logits are needed
    shared = next((i for i in range(length) if len({prompt[i] for prompt in prompts}) > 1), length)
    cache = model.make_cache()
    if shared:
        model.run_layers(model.embed(mx.array([prompts[0][:shared]])), cache)
        cache = chosen_rows(cache, [0] * len(prompts))
    tokens = mx.array([prompt[shared:] for prompt in prompts])
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
