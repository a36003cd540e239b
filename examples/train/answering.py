"""Greedy answers to many questions at once, with the model alone: what training and the quality check measure with."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from openelm_mlx.models.openelm import OpenELM
from openelm_mlx.text.chat import OPENELM_INSTRUCT, render_chat
from openelm_mlx.text.tokenizer import Tokenizer


def answers(
    model: OpenELM, tokenizer: Tokenizer, questions: Sequence[str], max_tokens: int = 160, batch_size: int = 64
) -> list[str]:
    """The greedy answer to each question, asked as the first of a conversation."""
    prompts = [
        render_chat([{"role": "user", "content": question}], tokenizer, OPENELM_INSTRUCT) for question in questions
    ]
    # Prompts of like length together: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, tokens in zip(chosen, _greedy(model, tokenizer, [prompts[i] for i in chosen], max_tokens), strict=True):
            texts[i] = tokenizer.decode(tokens, continuation=True)
    return texts


def _greedy(model: OpenELM, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The tokens of each row's answer, up to its end-of-text token. Rows that are done go on unread until all are."""
    eos = tokenizer.eos_tokens[0]
    length = max(len(prompt) for prompt in prompts)
    padding = [length - len(prompt) for prompt in prompts]
    cache = model.make_cache(left_padding=padding)
    tokens = mx.array([[eos] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    rows: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(max_tokens):
        tokens = mx.argmax(model(tokens, cache)[:, -1], axis=-1)[:, None]
        for i, token in enumerate(tokens[:, 0].tolist()):  # the host decides who is done
            done[i] = done[i] or token == eos
            if not done[i]:
                rows[i].append(token)
        if all(done):
            break
    return rows


def unpacked(model: OpenELM) -> OpenELM:
    """The same model with its packed weights written out in float32: many rows at once go faster that way on a CPU."""
    dense = OpenELM(model.spec)
    weights = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            packed = [weights.pop(f"{path}.{name}") for name in ("weight", "scales", "biases")]
            weights[f"{path}.weight"] = mx.dequantize(*packed, module.group_size, module.bits)
    dense.load_weights([(name, array.astype(mx.float32)) for name, array in weights.items()])
    return dense
