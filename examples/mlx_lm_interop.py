"""Run our model inside mlx-lm's own generate loop: python examples/mlx_lm_interop.py (needs pip install mlx-lm)"""

from mlx_lm.generate import generate_step

import openelm_mlx as om
from openelm_mlx.text.chat import render_chat


def main(source: str = "demo-openelm", question: str = "What is a banjo?") -> None:
    model, tokenizer = om.load(source)
    prompt = render_chat([{"role": "user", "content": question}], tokenizer, tokenizer.chat_template)
    import mlx.core as mx

    tokens = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=64):
        if token in tokenizer.eos_tokens:
            break
        tokens.append(token)
    print(tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
