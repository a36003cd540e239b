"""Score several texts in one padded batch: which sentence does the model find likelier? python examples/batch.py"""

import mlx.core as mx

import openelm_mlx as om

SENTENCES = ["A banjo is a musical instrument.", "A banjo is a kind of soup.", "Instrument banjo a musical is a."]


def main(source: str = "demo-openelm") -> None:
    model, tokenizer = om.load(source)
    rows = [tokenizer.encode_prompt(sentence) for sentence in SENTENCES]
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    tokens = mx.array([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    # Padding stands on the left, and what stands there does not matter.
    logits = model(tokens[:, :-1], left_padding=mx.array(padding)).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    scores = mx.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    for sentence, score, pad in zip(SENTENCES, scores, padding, strict=True):
        print(f"{mx.mean(score[pad:]).item():8.3f} a token   {sentence}")


if __name__ == "__main__":
    main()
