"""Score several answers in one padded batch: which does the model find likeliest? python examples/batch.py [SOURCE]"""

import sys

import mlx.core as mx

import openelm_mlx as om
from openelm_mlx.text.chat import render_chat

QUESTION = "What is a banjo?"
ANSWERS = ["a stringed instrument", "a keyboard instrument", "a kind of soup", "instrument stringed a"]


def main(source: str = "demo-openelm") -> None:
    model, tokenizer = om.load(source)
    prompt = render_chat([{"role": "user", "content": QUESTION}], tokenizer, tokenizer.chat_template)
    answers = [tokenizer.encode(answer, continuation=True) for answer in ANSWERS]
    width = max(map(len, answers))
    padding = [width - len(answer) for answer in answers]
    tokens = mx.array([[0] * pad + prompt + answer for pad, answer in zip(padding, answers, strict=True)])
    # Padding stands on the left, and what stands there does not matter.
    logits = model(tokens[:, :-1], left_padding=mx.array(padding)).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    scores = mx.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    means = [mx.mean(score[-len(answer) :]).item() for score, answer in zip(scores, answers, strict=True)]
    print(QUESTION)
    for mean, answer in sorted(zip(means, ANSWERS, strict=True), reverse=True):
        print(f"{mean:8.3f} a token   {answer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
