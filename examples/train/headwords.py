"""Write headwords.txt: the words that the pocket dictionary must know, and the one meaning it gives for each.

The words are the most frequent English words, by the Python package `wordfreq`, that WordNet defines. The meaning is
the sense that WordNet's tagged texts use most. Both are settled here, before any training; a trained model is measured
on the list as it stands, and a word that the model finds hard stays in.

    python examples/train/headwords.py            # needs wordfreq (pip install wordfreq) and WordNet
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from wordnet import DEFAULT_FOLDER, PARTS_OF_SPEECH, Sense, WordNet, read_wordnet

NUM_HEADWORDS = 20_000
HEADWORDS_FILE = Path(__file__).with_name("headwords.txt")

# WordNet has nouns, verbs, adjectives and adverbs only. A word of the other classes that is in it all the same is there
# for a namesake ("he" is helium, "who" the World Health Organization), and that is not the word people ask about.
_CLOSED_CLASS = """
    a about above across after against all along although am among an and another any anybody anyone anything are
    around as at be because been before behind being below beneath beside between beyond both but by can could did do
    does doing down during each either every everybody everyone everything except few for from had has have having he
    her here hers herself him himself his how however i if in inside into is it its itself just least less like many may
    me might mine more most much must my myself near neither no nobody none nor not nothing of off on once one onto or
    other our ours ourselves out outside over own per quite rather shall she should since so some somebody someone
    something such than that the their theirs them themselves then there these they this those though through till to
    too toward towards under until up upon us very via was we well were what when where whether which while who whoever
    whom whose why will with within without would yet you your yours yourself
"""

# How WordNet marks a sense as a slur, an obscenity or a term of abuse: by its domain of usage or in its wording.
_SLUR_USAGES = frozenset({"ethnic slur", "obscenity", "disparagement"})
_SLUR_GLOSS = re.compile(
    r"obscene terms?|terms? of abuse|(offensive|insulting|derogatory|disparaging) (term|name|word)s?|vulgar slang"
    r"|considered offensive|ethnic slur"
)
# Everyday words with such a sense beside an innocent one that WordNet's tagged texts happen not to use.
_INNOCENT = frozenset({"guinea", "shrimp", "taco"})


@dataclass(frozen=True)
class Headword:
    """A word of the list as it is written (Paris, banjo), and which of WordNet's senses is its meaning."""

    word: str
    part_of_speech: str
    sense_number: int


def choose_headwords(wordnet: WordNet, frequency: dict[str, float], count: int) -> list[Headword]:
    """The `count` most frequent lemmas of letters only, most frequent first, ties in alphabetical order."""
    candidates = (lemma for lemma in wordnet.senses if re.fullmatch("[a-z]{2,}", lemma))
    ranked = sorted((lemma for lemma in candidates if frequency[lemma] > 0), key=lambda w: (-frequency[w], w))
    chosen: list[Headword] = []
    for lemma in ranked:
        sense = choose_sense(wordnet, lemma)
        if sense is not None:
            chosen.append(Headword(sense.spelling, sense.part_of_speech, sense.number))
        if len(chosen) == count:
            return chosen
    raise ValueError(f"Only {len(chosen)} of {count} head words were found.")


def choose_sense(wordnet: WordNet, lemma: str) -> Sense | None:
    """The sense of `lemma` that is used most, or None when the word is no head word.

    WordNet's order decides between equal counts: nouns, verbs, adjectives, adverbs, each by sense number.
    """
    if lemma in _CLOSED_CLASS.split():
        return None
    # Two capitals are a chemical symbol, a state or a unit ("He", "LA"), hardly ever the word that was counted.
    senses = [s for s in wordnet.senses[lemma] if len(lemma) > 2 or s.spelling == lemma]
    slurs = [s for s in senses if _is_slur(wordnet, s)]
    clean = [s for s in senses if s not in slurs]
    if not clean:
        return None
    best = min(clean, key=lambda s: (-s.tags, PARTS_OF_SPEECH.index(s.part_of_speech), s.number))
    # A word that is not used in another sense more than as a slur is a slur.
    is_slur = any(slur.tags >= best.tags for slur in slurs) and lemma not in _INNOCENT
    return None if is_slur else best


def _is_slur(wordnet: WordNet, sense: Sense) -> bool:
    return bool(_SLUR_USAGES & set(wordnet.usages(sense)) or _SLUR_GLOSS.search(sense.synset.definition))


def read_headwords(path: Path = HEADWORDS_FILE) -> list[Headword]:
    """The list as it was written: one `word part-of-speech sense-number` a line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Headword(w, p, int(n)) for w, p, n in (line.split() for line in lines if not line.startswith("#"))]


def find_sense(wordnet: WordNet, headword: Headword) -> Sense:
    """The sense that a line of the list names."""
    senses = wordnet.senses[headword.word.lower()]
    return next(s for s in senses if (s.part_of_speech, s.number) == (headword.part_of_speech, headword.sense_number))


_HEADER = """\
# The head words of demo-openelm: the {count:,} most frequent English words that WordNet 3.0 defines, in that order.
# Frequencies: wordfreq {version} (English, its largest list), https://pypi.org/project/wordfreq/. Left out: words of a
# closed class, and words that WordNet marks as slurs or obscenities. Written by headwords.py before training.
# Each line: word, part of speech, and the number of WordNet's sense that is its meaning (the most tagged one).
# This list is made from wordfreq's data and may be redistributed as they are: Creative Commons
# Attribution-ShareAlike 4.0, https://creativecommons.org/licenses/by-sa/4.0/
"""


def main() -> None:
    import wordfreq

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wordnet", type=Path, default=DEFAULT_FOLDER, help="folder of WordNet's database files")
    parser.add_argument("--output", type=Path, default=HEADWORDS_FILE)
    arguments = parser.parse_args()
    wordnet = read_wordnet(arguments.wordnet)
    frequency = {lemma: wordfreq.word_frequency(lemma, "en", wordlist="best") for lemma in wordnet.senses}
    headwords = choose_headwords(wordnet, frequency, NUM_HEADWORDS)
    lines = [f"{h.word} {h.part_of_speech} {h.sense_number}\n" for h in headwords]
    arguments.output.write_text(
        _HEADER.format(count=len(headwords), version=version("wordfreq")) + "".join(lines), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
