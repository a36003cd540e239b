"""What demo-gpt-oss knows of its words: the meaning, and the chain of more general words that it thinks over.

The words are the most frequent ones of headwords.txt. A noun's or verb's chain goes up WordNet's hypernyms, first
pointer first, one word of each; an adjective or adverb has none, and names words of like meaning instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headwords import find_sense, read_headwords
from questions import Entry, make_entries
from wordnet import PARTS_OF_SPEECH, Sense, Synset, WordNet

NUM_WORDS = 6_000
MOST_STEPS = 6
STEPS = {"low": 1, "medium": 3, "high": MOST_STEPS}  # how many of them a reasoning effort takes

HYPERNYM, INSTANCE, SIMILAR, PERTAINS = "@", "@i", "&", "\\"  # pointer symbols, wninput(5WN)


@dataclass(frozen=True)
class Word:
    """A head word, its gloss, and up to MOST_STEPS related words; `relation` says how the first of them is related."""

    word: str
    kind: str
    forms: tuple[str, ...]
    gloss: str
    relation: str  # "kind", "instance", "way", "like", or "" where WordNet has nothing to say
    chain: tuple[str, ...]

    @property
    def entry(self) -> Entry:
        """What questions.py asks about it."""
        return Entry(self.word, self.kind, self.forms, self.gloss)


class Relations:
    """WordNet's pointers from synset to synset, which wordnet.py leaves out."""

    def __init__(self, wordnet: WordNet, folder: Path) -> None:
        self._synsets = wordnet.synsets
        self._key = {id(synset): key for key, synset in wordnet.synsets.items()}
        self._pointers: dict[tuple[str, int], list[tuple[str, tuple[str, int]]]] = {}
        for part in PARTS_OF_SPEECH:
            for offset, pointers in _read_pointers(folder / f"data.{part}"):
                self._pointers[part, offset] = pointers

    def targets(self, synset: Synset, *symbols: str) -> list[Synset]:
        """The synsets that `synset` points to with one of `symbols`, in WordNet's order."""
        pointers = self._pointers[self._key[id(synset)]]
        return [self._synsets[key] for symbol, key in pointers if symbol in symbols]

    def hypernyms(self, synset: Synset) -> list[Synset]:
        """What it is a kind or an instance of, directly."""
        return self.targets(synset, HYPERNYM, INSTANCE)

    def like(self, synset: Synset) -> list[Synset]:
        """An adjective's or adverb's own synset, those of similar meaning, and what an adverb is made from."""
        return [synset, *self.targets(synset, SIMILAR, PERTAINS)]


def _read_pointers(path: Path) -> Iterator[tuple[int, list[tuple[str, tuple[str, int]]]]]:
    # offset category type word-count word id ... pointer-count symbol offset pos source/target ... | gloss
    part_of_letter = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields = line.split(" | ", 1)[0].split()
        start = 4 + 2 * int(fields[3], 16)
        rows = [fields[start + 1 + 4 * i : start + 4 + 4 * i] for i in range(int(fields[start]))]
        yield int(fields[0]), [(symbol, (part_of_letter[part], int(offset))) for symbol, offset, part in rows]


def choose_words(wordnet: WordNet, folder: Path, count: int = NUM_WORDS) -> list[Word]:
    """The first `count` head words with all that the demo learns about them. folder: WordNet's."""
    headwords = read_headwords()[:count]
    relations = Relations(wordnet, folder)
    words = []
    for headword, entry in zip(headwords, make_entries(wordnet, headwords, folder), strict=True):
        sense = find_sense(wordnet, headword)
        relation, chain = related_words(relations, sense)
        words.append(Word(entry.word, entry.kind, entry.forms, entry.gloss, relation, chain))
    return words


def related_words(relations: Relations, sense: Sense) -> tuple[str, tuple[str, ...]]:
    """How the first related word is related, and the words: up the hypernyms, or sideways where there are none."""
    if sense.part_of_speech in ("adj", "adv"):
        names = dict.fromkeys(name for synset in relations.like(sense.synset) for name in synset.words)
        chain = [name for name in names if name.lower() != sense.lemma][:MOST_STEPS]
        return ("like" if chain else ""), tuple(chain)
    chain, synset = [], sense.synset
    is_instance = bool(relations.targets(synset, INSTANCE))
    while len(chain) < MOST_STEPS and (above := relations.hypernyms(synset)):
        synset = above[0]
        taken = {sense.lemma, *chain}
        chain.append(next((name for name in synset.words if name.lower() not in taken), synset.words[0]))
    kind = "way" if sense.part_of_speech == "verb" else "instance" if is_instance else "kind"
    return (kind if chain else ""), tuple(chain)


def save_words(words: Sequence[Word], path: Path) -> None:
    """Write the words as JSON, one a line."""
    path.write_text("".join(json.dumps(asdict(word), ensure_ascii=False) + "\n" for word in words), encoding="utf-8")


def load_words(path: Path) -> list[Word]:
    """What `save_words` wrote."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [Word(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}) for row in rows]


# --- The analysis of a word, as text ----------------------------------------------------------------------------------

_FIRST = {"kind": "a kind of", "instance": "an instance of", "way": "a way to", "like": "like"}
_NEXT = {"kind": "that is a kind of", "instance": "that is a kind of", "way": "that is a way to", "like": "like"}


def word_analysis(word: Word, effort: str) -> str:
    """The thought about a word: so many of its related words as the effort allows.

    >>> word_analysis(banjo, "medium")
    'banjo: a kind of stringed instrument; that is a kind of musical instrument; that is a kind of device.'
    """
    names = word.chain[: STEPS[effort]]
    if not names:
        return f"{word.word}: no word stands above it."
    steps = [f"{(_NEXT if i else _FIRST)[word.relation]} {name}" for i, name in enumerate(names)]
    return f"{word.word}: {'; '.join(steps)}."


def named_words(analysis: str) -> tuple[str, str, list[str]]:
    """The word, the relation and the related words that an analysis names; ("", "", []) when it is no such text."""
    word, colon, rest = analysis.removesuffix(".").partition(": ")
    if not colon:
        return "", "", []
    relation = next((relation for relation, start in _FIRST.items() if rest.startswith(start + " ")), "")
    if not relation:
        return word, "", []
    names = []
    for i, step in enumerate(rest.split("; ")):
        start = (_NEXT if i else _FIRST)[relation] + " "
        if not step.startswith(start):
            return "", "", []
        names.append(step.removeprefix(start))
    return word, relation, names


def is_chain(wordnet: WordNet, relations: Relations, word: str, relation: str, names: Sequence[str]) -> bool:
    """Whether WordNet says so: each name a word of a hypernym of what the name before it means, in one of its senses.

    For "like": each name a word of the same or of a similar meaning.
    """
    senses = wordnet.senses.get(word.lower(), [])
    if relation == "like":
        return any(
            set(names) <= {name for synset in relations.like(sense.synset) for name in synset.words} for sense in senses
        )
    reached = [sense.synset for sense in senses]
    for name in names:
        reached = [above for synset in reached for above in relations.hypernyms(synset) if name in above.words]
    return bool(reached)
