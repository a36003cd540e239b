"""What prepare.py wrote, as documents for `openelm_mlx train`: conversations and prose with what is learned of them.

    python examples/train/documents.py --data build/demo-openelm

Writes documents.npz and validation.npz beside them. A document is what train_openelm_demo.py puts into a row: turns of a
conversation, a paragraph with what follows it, sentences; `--epochs` of the head words are drawn, as its recipe draws them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from batches import Conversations, Packer, Prose, Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare.py wrote")
    parser.add_argument("--epochs", type=int, default=8, help="how often each head word is asked for")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    write_documents(arguments.data, arguments.epochs, arguments.seed)


def write_documents(folder: Path, epochs: int, seed: int, recipe: Recipe | None = None) -> None:
    """documents.npz and validation.npz in the folder."""
    recipe = recipe or Recipe()
    rng = np.random.default_rng(seed)
    conversations, prose = Conversations(folder / "conversations.npz"), Prose(folder / "prose.npz")
    documents = []
    packer = Packer(conversations, recipe.short_length, recipe.new_conversation, recipe.unknown_share)
    turns = 0
    while turns < epochs * conversations.num_words:
        before = len(packer.state.turns)
        documents.append(packer.next_row(rng))
        turns += max(1, before - len(packer.state.turns)) if before else 1
    of_prose = recipe.prose_rows * recipe.long_length / recipe.tokens
    count = max(1, round(len(documents) * recipe.short_length * of_prose / recipe.long_length))
    paragraphs = prose.paragraph_rows(rng, count, recipe.long_length)
    documents += zip(paragraphs.tokens, paragraphs.learned, strict=True)
    save(folder / "documents.npz", documents)
    rows = prose.validation_rows(recipe.short_length, 400)
    save(folder / "validation.npz", list(zip(rows.tokens, rows.learned, strict=True)))


def save(path: Path, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Rows without the zeros that fill them, one after the other."""
    lengths = [int(tokens.nonzero()[0].max()) + 1 for tokens, _ in rows]
    np.savez_compressed(
        path,
        tokens=np.concatenate([tokens[:n] for (tokens, _), n in zip(rows, lengths, strict=True)]),
        learned=np.concatenate([learned[:n] for (_, learned), n in zip(rows, lengths, strict=True)]),
        starts=np.cumsum([0, *lengths[:-1]]),
    )


if __name__ == "__main__":
    main()
