"""Ask a model a question and print its answer as it comes: python examples/ask.py "What is a banjo?" [SOURCE]"""

import sys

import openelm_mlx as om


def main(question: str = "What is a banjo?", source: str = "demo-openelm") -> None:
    model, tokenizer = om.load(source)
    for chunk in om.stream_generate(model, tokenizer, question, max_tokens=64):
        print(chunk.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
