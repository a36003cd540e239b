"""Continue a text to the end of its sentence, three times with different seeds: continue_text.py ["Text" [SOURCE]]"""

import sys

import openelm_mlx as om

TEXT = "The ship sailed out of the harbour, and the captain"


def main(text: str = TEXT, source: str = "demo-openelm") -> None:
    model, tokenizer = om.load(source)
    for seed in range(3):
        sampling = om.SamplingParams(temperature=0.4, top_p=0.9, repetition_penalty=1.1, seed=seed)
        # raw: the text as it is, without a chat template
        print(text + om.generate(model, tokenizer, text, raw=True, max_tokens=60, stop=".", sampling=sampling) + ".")


if __name__ == "__main__":
    main(*sys.argv[1:])
