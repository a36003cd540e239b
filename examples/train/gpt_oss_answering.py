"""Greedy completions of many Harmony conversations at once, with the model alone: what the demo is measured with."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from openelm_mlx.models.gpt_oss import GptOss
from openelm_mlx.text.conversation import Message
from openelm_mlx.text.harmony import HarmonyFormat


def completions(
    model: GptOss,
    harmony: HarmonyFormat,
    conversations: Sequence[Sequence[Message]],
    max_tokens: int = 256,
    batch_size: int = 64,
) -> list[list[int]]:
    """The greedy completion of each conversation, up to and with its stop token."""
    prompts = [harmony.render_for_completion(messages) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of like length together: less padding
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, tokens in zip(chosen, _greedy(model, harmony, [prompts[i] for i in chosen], max_tokens), strict=True):
            results[i] = tokens
    return results


def _greedy(model: GptOss, harmony: HarmonyFormat, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Each row's tokens up to its stop token. Rows that are done go on unread until all are."""
    length = max(len(prompt) for prompt in prompts)
    padding = [length - len(prompt) for prompt in prompts]
    cache = model.make_cache(left_padding=padding)
    tokens = mx.array([[harmony.end] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
    rows: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for _ in range(max_tokens):
        h = model.run_layers(model.embed(tokens), cache)
        tokens = mx.argmax(model.head(h[:, -1:])[:, -1], axis=-1)[:, None]
        chosen = tokens[:, 0].tolist()  # the host decides who is done
        for i in list(going):
            rows[i].append(chosen[i])
            if chosen[i] in harmony.stop_tokens:
                going.remove(i)
        if not going:
            break
    return rows
