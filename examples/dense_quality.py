"""What fewer bits of the dense parts do to a model: python examples/dense_quality.py [WORDS [all]]

"all" adds random models of the released widths, which take an hour on a slow CPU.
"""

import sys

from openelm_mlx.bench.quality import HEADING, WORDS, demo_divergences, random_divergences

WIDTHS = {"gpt-oss-20b": 6, "openelm-270m": 16, "openelm-3b": 6}  # shape: layers of it


def main(num_words: str = "2", what: str = "demos") -> None:
    print(HEADING)
    for source in ("demo-gpt-oss", "demo-openelm"):
        for row in demo_divergences(source, words=WORDS[: int(num_words)]):
            print(row.line(), flush=True)
    for shape, num_layers in WIDTHS.items() if what == "all" else ():
        for row in random_divergences(shape, num_layers):
            print(row.line(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
