"""Teach both demos something new, and count what they know before and after.

    python examples/finetune/measure.py --output build/finetune

demo-openelm learns to talk like a pirate from 32 short chats (style.jsonl), demo-gpt-oss ten words that do not exist
(data.jsonl), both with the defaults of `finetune`. Each is asked what it was taught, and the same in words that were not in its
lessons. Adapters, loss charts and results.json, with all answers, go to the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import openelm_mlx as om
from openelm_mlx.commands.training_progress import draw_losses

HERE = Path(__file__).parent
NEW_PLACES = ("farm", "valley", "beach", "tower", "palace", "theatre", "school", "lighthouse")
# A question, and how its answer begins.
Questions = dict[str, list[tuple[str, str]]]


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
    print("| model | questions | right before | right after | loss | time |\n|---|---|---|---|---|---|")
    for result in results:
        first, last = result["loss"]
        spent = f"{first:.1f} -> {last:.3f} | {result['steps']} steps, {result['seconds'] / 60:.1f} min"
        for kind, asked in result["asked"].items():
            right = [sum(each[f"right {when}"] for each in asked) for when in ("before", "after")]
            print(f"| {result['model']} | {len(asked)} {kind} | {right[0]} | {right[1]} | {spent} |")
    print("\n| asked | before | after |\n|---|---|---|")
    for result in results:
        for asked in result["asked"].values():
            print("\n".join(f"| {each['question']} | {each['before']} | {each['after']} |" for each in asked[:2]))


def measure(source: str, data: Path, questions: Questions, output: Path, steps: int | None) -> dict[str, Any]:
    """All answers before and after training on `data`, the time it took, and the losses."""
    before = {kind: answers(source, pairs, None) for kind, pairs in questions.items()}
    log: list[Any] = []
    begun = time.monotonic()
    adapter = om.finetune(source, data=data, output=output, steps=steps, progress=log.append)
    seconds = time.monotonic() - begun
    after = {kind: answers(source, pairs, adapter) for kind, pairs in questions.items()}
    draw_losses(output.with_suffix(".png"), source, [{"step": e.step, "loss": e.loss} for e in log], overwrite=True)
    asked = {
        kind: [
            {
                "question": question, "before": one, "after": other,
                "right before": is_right(one, wanted), "right after": is_right(other, wanted),
            }
            for (question, wanted), one, other in zip(pairs, before[kind], after[kind], strict=True)
        ]
        for kind, pairs in questions.items()
    }  # fmt: skip
    return {"model": source, "seconds": seconds, "steps": len(log), "loss": [log[0].loss, log[-1].loss], "asked": asked}


def answers(source: str, pairs: list[tuple[str, str]], adapter: Path | None) -> list[str]:
    """What the model says to each question, greedily."""
    model, tokenizer = om.load(source, adapter=adapter)
    sampling = om.SamplingParams(temperature=0.0)
    said = om.generate(model, tokenizer, [question for question, _ in pairs], max_tokens=48, sampling=sampling)
    return [" ".join(each.split()) for each in said]


def is_right(answer: str, wanted: str) -> bool:
    """Whether the answer is the wanted one, or begins with it where it is a style."""
    return answer.lower().startswith(wanted.lower())


def style_questions() -> Questions:
    """The chats themselves, and places that are in none of them."""
    taught = [json.loads(line)["messages"] for line in (HERE / "style.jsonl").read_text().splitlines()]
    return {
        "taught": [(chat[0]["content"], chat[1]["content"]) for chat in taught],
        "new": [(f"Tell me about the {place}.", "Arr, the") for place in NEW_PLACES],
    }


def word_questions() -> Questions:
    """The words as they were taught, and in a question that was not."""
    words = json.loads((HERE / "words.json").read_text())
    return {
        "taught": [(f"What is the meaning of {word}?", gloss) for word, gloss in words.items()],
        "new": [(f"Please tell me what {word} means.", gloss) for word, gloss in words.items()],
    }


if __name__ == "__main__":
    main()
