"""How far 8-bit keys and values move a model's next-token distributions: python examples/kv_quality.py [DTYPE [WORDS]]"""

import sys

import mlx.core as mx

import openelm_mlx as om
from openelm_mlx.conversion.verify import kl_divergence
from openelm_mlx.engine.prompt import encode_prompt

WORDS = ["banjo", "dog", "king", "doctor", "storm", "violin", "river", "apple", "bridge", "winter", "copper", "money"]
CHUNK = 8  # few enough tokens that attention reads the packed numbers


def logits_of(model, tokens: list[int], kv_bits: int) -> mx.array:
    """The logits (L, V) after each token, with keys and values of that many bits."""
    cache, rows = model.make_cache(kv_bits=kv_bits), []
    for start in range(0, len(tokens), CHUNK):
        rows.append(model(mx.array([tokens[start : start + CHUNK]]), cache)[0].astype(mx.float32))
    return mx.concatenate(rows)


def main(dtype: str = "float32", num_words: str = "2") -> None:
    for source in ("demo-openelm", "demo-gpt-oss"):
        model, tokenizer = om.load(source, dtype=dtype)
        kl, same = [], []
        for word in WORDS[: int(num_words)]:
            prompt = encode_prompt(model, tokenizer, f"What is a {word}?").tokens
            answer = [chunk.token for chunk in om.stream_generate(model, tokenizer, prompt, max_tokens=60)]
            plain, packed = (logits_of(model, prompt + answer, bits)[len(prompt) - 1 : -1] for bits in (16, 8))
            kl += kl_divergence(plain, packed).tolist()
            same += (mx.argmax(plain, axis=-1) == mx.argmax(packed, axis=-1)).tolist()
        kl.sort()
        print(f"{source}: {len(kl)} positions, KL mean {sum(kl) / len(kl):.1e}, largest {kl[-1]:.1e} nats;", end=" ")
        print(f"same likeliest token {100 * sum(same) / len(same):.2f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
