"""Continue a text, three times with different seeds: python examples/continue_text.py "The old man" [SOURCE]"""

import sys

import openelm_mlx as om


def main(text: str = "The old man walked down to the river and", source: str = "demo-openelm") -> None:
    model, tokenizer = om.load(source)
    for seed in range(3):
        sampling = om.SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=seed)
        # raw: the text as it is, without a chat template
        print(text + om.generate(model, tokenizer, text, raw=True, max_tokens=40, sampling=sampling), end="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
