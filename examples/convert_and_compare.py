"""Convert a model to 4 bits and see what it costs: python examples/convert_and_compare.py [SOURCE]"""

import sys
import tempfile
from pathlib import Path

import openelm_mlx as om


def main(source: str = "demo-openelm", question: str = "What is a banjo?") -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = om.convert(source, Path(folder) / "bf16", dtype="bfloat16")
        small = om.convert(Path(folder) / "bf16", Path(folder) / "4bit", quantize=4, verify=True)
        print(f"{plain.nbytes:,} bytes in bfloat16, {small.nbytes:,} in 4 bits")
        print(f"KL divergence of the next token: {small.verification.kl_divergence:.4f} nats")
        for name in ("bf16", "4bit"):
            model, tokenizer = om.load(Path(folder) / name)
            print(f"{name:>5}: {om.generate(model, tokenizer, question, max_tokens=32)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
