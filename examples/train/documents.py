"""What prepare.py wrote, as documents for `openelm_mlx train`, with what is learned of them.

    python examples/train/documents.py --data build/demo-openelm

Writes documents.npz and validation.npz beside it. A document is a row of train_openelm_demo.py:
turns of conversations, a paragraph with what follows it, sentences. They are the rows of the first
`--steps` of its steps, so that every kind is seen as often as there; the trainer begins again with
them when it has seen all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from batches import Conversations, Prose, Recipe, Rows, batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--steps", type=int, default=1500, help="of how many steps; few teach the prose by heart")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    write_documents(arguments.data, arguments.steps, arguments.seed)


def write_documents(folder: Path, steps: int, seed: int, recipe: Recipe | None = None) -> None:
    """documents.npz and validation.npz in the folder."""
    recipe = recipe or Recipe()
    conversations = Conversations(folder / "conversations.npz")
    prose = Prose(folder / "prose.npz")
    drawn = islice(batches(conversations, prose, recipe, seed), steps)
    save(folder / "documents.npz", (rows for batch in drawn for rows in (batch.short, batch.long)))
    save(folder / "validation.npz", [prose.validation_rows(recipe.short_length, 400)])


def save(path: Path, pieces: Iterable[Rows]) -> None:
    """Rows without the zeros that fill them, one after the other."""
    tokens, learned, lengths = [], [], []
    for rows in pieces:
        width = rows.tokens.shape[1]
        sizes = width - (rows.tokens[:, ::-1] != 0).argmax(axis=1)
        is_used = np.arange(width) < sizes[:, None]
        tokens.append(rows.tokens[is_used])
        learned.append(rows.learned[is_used])
        lengths.append(sizes)
    starts = np.cumsum([0, *np.concatenate(lengths)[:-1]])
    np.savez_compressed(path, tokens=np.concatenate(tokens), learned=np.concatenate(learned), starts=starts)


if __name__ == "__main__":
    main()
