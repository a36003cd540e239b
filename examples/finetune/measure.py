"""Teach both demos something new, and count what they know before and after.

    python examples/finetune/measure.py --output build/finetune

demo-openelm learns to talk like a pirate from 32 short chats (style.jsonl), demo-gpt-oss ten words that do not exist
(data.jsonl). Each is asked what it was taught, and the same in words that were not in its lessons. Adapters, loss charts and
results.json go to the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import openelm_mlx as om
from openelm_mlx.commands.training_progress import draw_losses

HERE = Path(__file__).parent
NEW_PLACES = ("farm", "valley", "beach", "tower", "palace", "theatre", "school", "lighthouse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for adapters, charts and results")
    parser.add_argument("--steps", type=int, help="of each run; the defaults take some minutes each")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = [
        measure("demo-openelm", HERE / "style.jsonl", style_questions(), arguments.output / "style", arguments.steps),
        measure("demo-gpt-oss", HERE / "data.jsonl", word_questions(), arguments.output / "words", arguments.steps),
    ]
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print("| model | asked | right before | right after | time |\n|---|---|---|---|---|")
    for result in results:
        for kind, (count, before, after) in result["right"].items():
            print(f"| {result['model']} | {count} {kind} | {before} | {after} | {result['seconds'] / 60:.1f} min |")


def measure(source: str, data: Path, questions: dict, output: Path, steps: int | None) -> dict:
    """The right answers before and after training on `data`."""
    before = {kind: count_right(source, pairs, None) for kind, pairs in questions.items()}
    begun = time.monotonic()
    log: list = []
    adapter = om.finetune(source, data=data, output=output, steps=steps, progress=log.append)
    seconds = time.monotonic() - begun
    after = {kind: count_right(source, pairs, adapter) for kind, pairs in questions.items()}
    draw_losses(output.with_suffix(".png"), source, [{"step": e.step, "loss": e.loss} for e in log], overwrite=True)
    right = {kind: (len(pairs), before[kind], after[kind]) for kind, pairs in questions.items()}
    return {"model": source, "seconds": seconds, "steps": len(log), "loss": [log[0].loss, log[-1].loss], "right": right}


def count_right(source: str, pairs: list, adapter: Path | None) -> int:
    """How many questions get the wanted answer, or its beginning where it is a style."""
    model, tokenizer = om.load(source, adapter=adapter)
    sampling = om.SamplingParams(temperature=0.0)
    answers = om.generate(model, tokenizer, [question for question, _ in pairs], max_tokens=48, sampling=sampling)
    return sum(
        answer.strip().lower().startswith(wanted.lower()) for answer, (_, wanted) in zip(answers, pairs, strict=True)
    )


def style_questions() -> dict[str, list[tuple[str, str]]]:
    """The chats themselves, and places that are in none of them."""
    taught = [json.loads(line)["messages"] for line in (HERE / "style.jsonl").read_text().splitlines()]
    return {
        "taught": [(chat[0]["content"], chat[1]["content"]) for chat in taught],
        "new": [(f"Tell me about the {place}.", "Arr, the") for place in NEW_PLACES],
    }


def word_questions() -> dict[str, list[tuple[str, str]]]:
    """The words as they were taught, and in a question that was not."""
    words = json.loads((HERE / "words.json").read_text())
    return {
        "taught": [(f"What is the meaning of {word}?", gloss) for word, gloss in words.items()],
        "new": [(f"Please tell me what {word} means.", gloss) for word, gloss in words.items()],
    }


if __name__ == "__main__":
    main()
