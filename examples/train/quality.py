"""Does demo-openelm know its words? Ask for 500 of them, drawn with a fixed seed, and count the right answers.

    python examples/train/quality.py                      # the demo in the package; exit code 1 below 90 %
    python examples/train/quality.py --model build/run/openelm --count 20000

An answer is right when it is, word for word, the definition that WordNet gives in one of the word's senses. Where
WordNet is not installed, the definitions of the 500 words come from quality_glosses.tsv, which `--write-glosses` wrote.
With WordNet, words that are not in the list are asked for as well: the model should say that it does not know them.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
from answering import answers, unpacked
from headwords import Headword, read_headwords
from questions import make_entries, standard_question, unlisted_words
from wordnet import DEFAULT_FOLDER, WordNet, read_wordnet

import openelm_mlx

COUNT = 500
SEED = 2404_14619  # OpenELM's number on arXiv
REQUIRED = 0.90
NUM_UNLISTED = 50
GLOSSES_FILE = Path(__file__).with_name("quality_glosses.tsv")

Glosses = dict[str, list[str]]


def main() -> int:
    arguments = parse_arguments()
    drawn = draw(read_headwords(), arguments.count)
    wordnet = read_wordnet(arguments.wordnet) if (arguments.wordnet / "data.noun").is_file() else None
    if arguments.write_glosses:
        write_glosses(all_glosses(read_wordnet(arguments.wordnet), drawn))
        return 0
    glosses = read_glosses() if wordnet is None else all_glosses(wordnet, drawn)
    questions = [standard_question(h.word, h.part_of_speech) for h in drawn]
    replies = ask_all(arguments.model, questions)
    misses = 0
    for headword, question, reply in zip(drawn, questions, replies, strict=True):
        if reply not in glosses[headword.word]:
            misses += 1
            print(f"miss: {question} {reply}")
    if wordnet is not None:
        unlisted = draw_unlisted(wordnet, arguments.wordnet)
        unknown = ask_all(arguments.model, [f'What does "{word}" mean?' for word in unlisted])
        honest = sum(reply.startswith("Sorry, I don't know") for reply in unknown)
        print(f"{honest} of {len(unlisted)} unlisted words, held out of training: says that it does not know them")
    share = 1 - misses / len(drawn)
    print(f"{share:.1%} of {len(drawn)} head words get a WordNet definition of the word ({REQUIRED:.0%} required)")
    return 0 if share >= REQUIRED else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-openelm", help="what openelm_mlx.load takes")
    parser.add_argument("--count", type=int, default=COUNT, help="how many head words to ask for")
    parser.add_argument("--wordnet", type=Path, default=DEFAULT_FOLDER, help="folder of WordNet's database files")
    parser.add_argument("--write-glosses", action="store_true", help="write quality_glosses.tsv from WordNet, and end")
    return parser.parse_args()


def ask_all(source: str, questions: Sequence[str]) -> list[str]:
    """The greedy answers of the model at `source`: a batch at a time on a GPU, else a share for each processor."""
    if mx.default_device() != mx.Device(mx.cpu):
        model, tokenizer = openelm_mlx.load(source)
        return answers(model, tokenizer, questions)
    # MLX computes on one processor, and there a batch takes as long as its rows one after the other.
    count = os.cpu_count() or 1
    shares = [questions[start::count] for start in range(count)]
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        replies = pool.map(_ask_one_by_one, count * [source], shares)
        texts = [""] * len(questions)
        for start, share in enumerate(replies):
            texts[start::count] = share
    return texts


def _ask_one_by_one(source: str, questions: Sequence[str]) -> list[str]:
    model, tokenizer = openelm_mlx.load(source)
    return answers(unpacked(model), tokenizer, questions, batch_size=1)


def draw(headwords: Sequence[Headword], count: int) -> list[Headword]:
    """The words to ask for: always the same."""
    return random.Random(SEED).sample(headwords, count)


def draw_unlisted(wordnet: WordNet, folder: Path) -> list[str]:
    """Words and expressions that only WordNet has, from the part that prepare.py keeps out of training."""
    unlisted = unlisted_words(wordnet, make_entries(wordnet, read_headwords(), folder), held_out=True)
    return random.Random(SEED).sample(unlisted, NUM_UNLISTED)


def all_glosses(wordnet: WordNet, words: Sequence[Headword]) -> Glosses:
    """The definitions of all senses of each word."""
    return {h.word: [sense.synset.definition for sense in wordnet.senses[h.word.lower()]] for h in words}


_HEADER = """\
# WordNet 3.0's definitions of the words that quality.py draws, one word a line, tabs between.
# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. The licence is in the demo's NOTICE.
"""


def write_glosses(glosses: Glosses) -> None:
    lines = ["\t".join([word, *definitions]) + "\n" for word, definitions in sorted(glosses.items())]
    GLOSSES_FILE.write_text(_HEADER + "".join(lines), encoding="utf-8")


def read_glosses() -> Glosses:
    lines = GLOSSES_FILE.read_text(encoding="utf-8").splitlines()
    fields = (line.split("\t") for line in lines if not line.startswith("#"))
    return {word: definitions for word, *definitions in fields}


if __name__ == "__main__":
    sys.exit(main())
