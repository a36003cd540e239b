"""WordNet's database files, read as documented in wndb(5WN) and senseidx(5WN): synsets, senses and their tag counts.

The files are those of Debian's package `wordnet-base` (WordNet 3.0), under /usr/share/wordnet. Nothing here chooses a
meaning; that is headwords.py's work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_FOLDER = Path("/usr/share/wordnet")
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")

# The digit in a sense key, lemma%DIGIT:... (senseidx(5WN)); 5 is an adjective satellite.
_POS_OF_DIGIT = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
# "galore(ip)" in data.adj: where an adjective may stand.
_ADJECTIVE_MARKER = re.compile(r"\((?:a|p|ip)\)$")
_EXAMPLE = re.compile(r';\s*"')


@dataclass(frozen=True)
class Synset:
    """One meaning: the words that have it, its definition, the examples, and the domain of usage it is filed under."""

    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    usage_offsets: tuple[int, ...]
    category: int  # the lexicographer file, lexnames(5WN): 18 is noun.person, 15 noun.location


@dataclass(frozen=True)
class Sense:
    """One meaning of one lemma. `spelling` is the lemma as the synset writes it (Paris, TV); `tags` its tag count."""

    lemma: str
    part_of_speech: str
    number: int  # 1 for the most frequent one of this part of speech
    spelling: str
    synset: Synset
    tags: int


@dataclass
class WordNet:
    """Every sense of every lemma, lemmas in lower case with spaces; most frequent first within a part of speech."""

    senses: dict[str, list[Sense]] = field(default_factory=dict)
    synsets: dict[tuple[str, int], Synset] = field(default_factory=dict)

    def usages(self, sense: Sense) -> list[str]:
        """The names of the usage domains a sense is filed under, such as "ethnic slur" or "obscenity"."""
        return [self.synsets["noun", offset].words[0] for offset in sense.synset.usage_offsets]


def read_wordnet(folder: Path = DEFAULT_FOLDER) -> WordNet:
    """Read the four data and index files and the tag counts."""
    if not (folder / "data.noun").is_file():
        raise FileNotFoundError(f"{folder} holds no WordNet: install Debian's wordnet-base or name its folder.")
    wordnet = WordNet()
    tags = _read_tags(folder / "cntlist.rev")
    for part in PARTS_OF_SPEECH:
        for offset, synset in _read_synsets(folder / f"data.{part}"):
            wordnet.synsets[part, offset] = synset
    for part in PARTS_OF_SPEECH:
        for lemma, offsets in _read_index(folder / f"index.{part}"):
            for number, offset in enumerate(offsets, 1):
                synset = wordnet.synsets[part, offset]
                spelling = next((w for w in synset.words if w.lower() == lemma), lemma)
                sense = Sense(lemma, part, number, spelling, synset, tags.get((lemma, part, number), 0))
                wordnet.senses.setdefault(lemma, []).append(sense)
    return wordnet


def _read_synsets(path: Path) -> Iterator[tuple[int, Synset]]:
    # offset category type word-count word id ... pointer-count symbol offset pos source/target ... | gloss
    for line in _data_lines(path):
        data, gloss = line.split(" | ", 1)
        fields = data.split()
        num_words = int(fields[3], 16)
        words = tuple(_ADJECTIVE_MARKER.sub("", w).replace("_", " ") for w in fields[4 : 4 + 2 * num_words : 2])
        start = 4 + 2 * num_words
        pointers = fields[start + 1 : start + 1 + 4 * int(fields[start])]
        usage = tuple(int(pointers[i + 1]) for i in range(0, len(pointers), 4) if pointers[i] == ";u")
        definition, examples = split_gloss(gloss)
        yield int(fields[0]), Synset(words, definition, examples, usage, int(fields[1]))


def _read_index(path: Path) -> Iterator[tuple[str, list[int]]]:
    # lemma pos synset-count pointer-count symbol ... sense-count tagged-count offset ...
    for line in _data_lines(path):
        fields = line.split()
        yield fields[0].replace("_", " "), [int(offset) for offset in fields[-int(fields[2]) :]]


def _read_tags(path: Path) -> dict[tuple[str, str, int], int]:
    # lemma%digit:... sense-number tag-count
    tags: dict[tuple[str, str, int], int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, number, count = line.split()
        lemma, rest = key.rsplit("%", 1)
        tags[lemma.replace("_", " "), _POS_OF_DIGIT[rest[0]], int(number)] = int(count)
    return tags


def _data_lines(path: Path) -> Iterator[str]:
    # The licence stands at the head of each file, in lines that begin with two spaces.
    return (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  "))


def split_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """The definition of a gloss, word for word, and its quoted examples without their quotes.

    >>> split_gloss('heave or utter a sigh; breathe deeply and heavily; "She sighed sadly"')
    ('heave or utter a sigh; breathe deeply and heavily', ('She sighed sadly',))
    """
    definition, *rest = _EXAMPLE.split(gloss.strip(), maxsplit=1)
    quoted = re.findall(r'"([^"]+)"', '"' + rest[0]) if rest else []
    return definition.strip().rstrip(";"), tuple(example.strip() for example in quoted)
