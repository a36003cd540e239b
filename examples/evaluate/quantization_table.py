"""A table of what each kind of quantization costs a model: its size, KL, the likeliest token, the accuracy on questions.

    python examples/evaluate/quantization_table.py demo-openelm --text prose.txt --questions examples/evaluate/wordnet.jsonl

Each mode is a conversion of the source in float32, compared with that; what the library has already is not made again.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import openelm_mlx as om
from openelm_mlx.evaluation.report import markdown_table
from openelm_mlx.evaluation.run import Settings, evaluate
from openelm_mlx.evaluation.texts import read_documents

MODES = ("8", "6", "5", "4", "3", "2", "mixed", "mxfp8", "mxfp4", "nvfp4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument(
        "--text", action="append", required=True, help="what the models read, or chats in a .jsonl file"
    )
    parser.add_argument("--questions", help="a .jsonl file of questions")
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--modes", default=",".join(MODES))
    arguments = parser.parse_args()
    texts = read_documents(arguments.text)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "float32")
        om.convert(arguments.source, whole, dtype="float32")
        for mode in ("float32", *arguments.modes.split(",")):
            place = whole if mode == "float32" else Path(folder, mode)
            if mode != "float32":
                om.convert(whole, place, quantize=mode, group_size=16 if mode == "nvfp4" else 32)
            rows.append(row(mode, whole, place, texts, arguments.questions, arguments.limit))
            sys.stderr.write(" | ".join(rows[-1].values()) + "\n")
    print("\n".join(markdown_table({name: [each[name] for each in rows] for name in rows[0]})))


def row(mode: str, whole: Path, place: Path, texts: list, questions: str | None, limit: int | None) -> dict[str, str]:
    found = om.compare(whole, place, texts)
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    shown = {
        "mode": mode, "MB": f"{size / 1e6:.1f}", "KL": f"{found.kl.value:.4f} ± {found.kl.error:.4f}",
        "same top": f"{found.same_top.value:.1%} ± {found.same_top.error:.1%}",
        "perplexity ratio": f"{found.perplexity_ratio.value:.3f} ± {found.perplexity_ratio.error:.3f}",
    }  # fmt: skip
    if questions is not None:
        [first, *_] = evaluate(str(place), Settings((questions,), limit=limit)).rows
        shown[first.metric] = f"{first.value:.1f} ± {first.error:.1f}"
    return shown


if __name__ == "__main__":
    main()
