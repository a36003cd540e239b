"""Show how sure the model was of each token, with the runners-up: python examples/logprobs.py [QUESTION] [SOURCE]"""

import math
import sys

import openelm_mlx as om


def main(question: str = "What is a banjo?", source: str = "demo-openelm") -> None:
    model, tokenizer = om.load(source)
    for chunk in om.stream_generate(model, tokenizer, question, max_tokens=24, logprobs=3):
        others = [
            f"{tokenizer.token_bytes(t).decode(errors='replace')!r}" for t in chunk.top_logprobs if t != chunk.token
        ]
        print(f"{chunk.text!r:16} {math.exp(chunk.logprob):6.1%}   rather than {', '.join(others[:2])}")


if __name__ == "__main__":
    main(*sys.argv[1:])
