"""Writes the questions in this folder: which of four WordNet definitions is right, and sums of small numbers.

    python examples/evaluate/make_questions.py

The words and their definitions are those of ../train/quality_glosses.tsv, which needs no WordNet; the wrong definitions
are of other words of the same part of speech.
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "train"))

NUM_QUESTIONS = 200
NUM_SUMS = 60


def question(word: str, part_of_speech: str) -> str:
    """The standard question of the demo (../train/questions.py)."""
    if part_of_speech != "noun":
        return f"What does it mean to {word}?" if part_of_speech == "verb" else f"What does {word} mean?"
    article = "an" if word[0] in "aeiou" else "a"
    return f"What is {article} {word}?" if word.islower() else f"What is {word}?"


def wordnet_questions() -> list[dict]:
    """Questions with the right definition and three others, in an order that is drawn."""
    drawn = random.Random(0)
    lines = (HERE.parent / "train" / "quality_glosses.tsv").read_text(encoding="utf-8").splitlines()
    glosses = dict(line.split("\t", 1) for line in lines if not line.startswith("#"))
    of_list = {}
    for line in (HERE.parent / "train" / "headwords.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            word, part_of_speech, number = line.rsplit(" ", 2)
            of_list[word] = part_of_speech, int(number)
    definitions = {word: text.split("\t") for word, text in glosses.items() if word in of_list}
    by_part: dict[str, list[str]] = {}
    for word in sorted(definitions):
        by_part.setdefault(of_list[word][0], []).append(word)
    found = []
    for word in drawn.sample(sorted(definitions), NUM_QUESTIONS):
        part_of_speech = of_list[word][0]
        others = [other for other in by_part[part_of_speech] if other != word]
        choices = [meaning(definitions, of_list, each) for each in (word, *drawn.sample(others, 3))]
        right = choices[0]
        drawn.shuffle(choices)
        found.append({"question": question(word, part_of_speech), "choices": choices, "answer": choices.index(right)})
    return found


def meaning(definitions: dict, of_list: dict, word: str) -> str:
    """The definition that the demo learnt, where the file has it at its number; else the first one."""
    known = definitions[word]
    return known[0] if len(known) < of_list[word][1] else known[of_list[word][1] - 1]


def sums() -> list[dict]:
    """Sums, differences and products of numbers up to ten, which demo-gpt-oss does without a tool."""
    drawn = random.Random(0)
    names = {"+": "plus", "-": "minus", "*": "times"}
    pairs = [(a, sign, b) for a in range(11) for b in range(11) for sign in names]
    found = []
    for a, sign, b in drawn.sample(pairs, NUM_SUMS):
        answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
        found.append({"question": f"What is {a} {names[sign]} {b}?", "answer": answer})
    return found


def main() -> None:
    for name, rows in (("wordnet.jsonl", wordnet_questions()), ("sums.jsonl", sums())):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
