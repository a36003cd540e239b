"""What fewer bits of the dense parts do to a model: python examples/dense_quality.py [WORDS [all [TABLE]]]

"all" adds random models of the released widths, which take an hour on a slow CPU; TABLE is a file for what `plan` shows.
"""

import shlex
import sys
import time
from pathlib import Path

from openelm_mlx.bench.quality import COLUMNS, HEADING, WORDS, demo_divergences, random_divergences

WIDTHS = {"gpt-oss-20b": 6, "openelm-270m": 16, "openelm-3b": 6}  # shape: layers of it


def main(num_words: str = "2", what: str = "demos", table: str | None = None) -> None:
    print(HEADING)
    rows = []
    for source in ("demo-gpt-oss", "demo-openelm"):
        for row in demo_divergences(source, words=WORDS[: int(num_words)]):
            rows.append(row)
            print(row.line(), flush=True)
    for shape, num_layers in WIDTHS.items() if what == "all" else ():
        for row in random_divergences(shape, num_layers):
            rows.append(row)
            print(row.line(), flush=True)
    if table is not None:
        command = f"python examples/dense_quality.py {shlex.join([num_words, what])}"
        lines = [COLUMNS, *(row.tsv(time.strftime("%Y-%m-%d"), command) for row in rows)]
        Path(table).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
