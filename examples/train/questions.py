"""How people ask for a meaning, and what the pocket dictionary answers: all of the demo's training conversations.

A question for a head word is answered with its gloss, word for word. A word that is not in the list is answered with
"Sorry, I don't know ...", and what is no question for a meaning with what the model is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from headwords import Headword, find_sense
from inflections import plural, read_exceptions, verb_forms
from wordnet import WordNet

# {w} the word, {a} the word with its article, {p} its plural.
_NAMES = ["{w}", '"{w}"', "the word {w}", 'the word "{w}"', "the term {w}"]
_ANY_WORD = [
    "{w}", "{w}", "{w}", "{w}?", '"{w}"', "{w} meaning", "{w} definition", "meaning of {w}", "definition of {w}",
    "define: {w}", "{w}: meaning", "What is {w}?", "What is {a}?", 'What is "{w}"?', "What does {w} mean?",
    'What does "{w}" mean?', "What do you mean by {w}?", "Define {w}", "Define {w}.", "Explain {w}.",
    "Explain {w} to me.",
    'I don\'t know what "{w}" means.', "I don't know the word {w}.", "What on earth is {w}?", "{w} in simple words",
    "What is {w} in English?", 'What does it mean when someone says "{w}"?', "What's {w}?", "Tell me about {w}.",
]  # fmt: skip
_OF_A_NAME = [
    "What does {x} mean?", "What does {x} mean?", "What is the meaning of {x}?", "What's the meaning of {x}?",
    "What is the definition of {x}?", "What's the definition of {x}?", "Define {x}.", "Please define {x}.",
    "Explain {x}.", "Please explain {x}.", "Can you define {x}?", "Can you explain {x}?",
    "Could you define {x}, please?",
    "Give me the definition of {x}.", "Give me a definition of {x}.", "Look up {x}.", "How do you define {x}?",
    "How would you define {x}?", "What is meant by {x}?", "Do you know {x}?", "Do you know the meaning of {x}?",
]  # fmt: skip
_ASKING = [
    "Tell me ", "Please tell me ", "Can you tell me ", "Could you tell me ", "Can you please tell me ",
    "Could you please tell me ", "Explain ", "Can you explain ", "Do you know ", "I want to know ", "I'd like to know ",
]  # fmt: skip
_ASKED = ["what {x} means", "what {x} means", "the meaning of {x}", "the definition of {x}"]
_ANY_NAME = [text.replace("{x}", name) for text in _OF_A_NAME for name in _NAMES]
_ANY_NAME += [ask + what.replace("{x}", name) + "." for ask in _ASKING for what in _ASKED for name in _NAMES]
_COMMON_NOUN = [
    "What is {a}?", "What is {a}?", "What is {a}?", "What is {a}?", "What's {a}?", "What's {a}?", "What is {w}?",
    "What's {w}?", "What is the {w}?", "What is meant by {a}?", "Tell me what {a} is.", "Describe {a}.", "Explain {a}.",
    "Explain what {a} is.", "Can you tell me what {a} is?", "Do you know what {a} is?", "What exactly is {a}?", "{a}",
    "What kind of thing is {a}?", "So what is {a}?", "Tell me about {a}.", "Define {a}.", "I want to know what {a} is.",
    *(ask + "what {a} is." for ask in _ASKING),
]  # fmt: skip
_COUNTABLE_NOUN = [
    "What are {p}?",
    "What are {p}?",
    "Tell me what {p} are.",
    "{p}",
    'What does "{p}" mean?',
    "Define {p}.",
]
_PROPER_NOUN = [
    "What is {w}?", "What is {w}?", "What is {w}?", "What's {w}?", "Tell me about {w}.", "Tell me what {w} is.",
    "Do you know {w}?", "What can you tell me about {w}?",
]  # fmt: skip
_PERSON = [
    "Who is {w}?",
    "Who was {w}?",
    "Who was {w}?",
    "Who's {w}?",
    "Tell me who {w} was.",
    "Do you know who {w} was?",
]
_PLACE = ["Where is {w}?", "Where's {w}?", "Tell me where {w} is.", "Do you know where {w} is?"]
_VERB = [
    "What does it mean to {w}?", "What does it mean to {w}?", "What does it mean to {w}?", 'What does "to {w}" mean?',
    "What does to {w} mean?", "What is it to {w}?", "Tell me what it means to {w}.", "to {w}", 'Define "to {w}".',
    "What does the verb {w} mean?", 'What does the verb "{w}" mean?', "What do you do when you {w}?",
    "What does it mean if you {w}?", "Explain what it means to {w}.",
]  # fmt: skip
_VERB_FORM = [
    'What does "{p}" mean?',
    "What does {p} mean?",
    "{p}",
    "Define {p}.",
    "What is {p}?",
    "What does the word {p} mean?",
]
_MODIFIER = [
    "What does it mean to be {w}?", 'What does "{w}" mean?', "What does {w} mean?", "What does {w} mean?",
    "What does it mean when something is {w}?", "Tell me what {w} means.",
]  # fmt: skip
_ADVERB = ['What does "{w}" mean?', "What does {w} mean?", "What does it mean to do something {w}?"]

_GREETINGS = """
    Hello|Hello!|Hi|Hi!|Hi there|Hey|Hey!|Hey there|Good morning|Good morning!|Good evening|Good afternoon|Hello there!|
    How are you?|How are you doing?|How do you do?|What's up?|Nice to meet you.|Hello, how are you?|Hi, how are you?
"""
_ABOUT_YOU = """
    Who are you?|What are you?|What's your name?|What is your name?|What can you do?|What do you do?|Help|help|Help me.|
    What do you know?|Tell me about yourself.|Introduce yourself.|How does this work?|What is this?|Who made you?|
    What should I ask?|What can I ask you?|How do I use this?|Are you a dictionary?|Are you a person?|Are you ChatGPT?|
    Are you an AI?|What model are you?|What kind of model are you?|How many words do you know?|How big are you?|
    Can you help me?|What are you good at?|What languages do you speak?|Where do your definitions come from?
"""
_THANKS = """
    Thanks|Thanks!|Thank you|Thank you!|Thank you very much.|Great, thanks!|Thanks a lot!|OK|Okay|ok|Great!|Cool|Nice!|
    Very good.|Good job!|Wow|Bye|Bye!|Goodbye|Goodbye!|See you later.|Good night
"""
_OTHER_REQUESTS = """
    Write a poem about {w}.|Write a story about {a}.|Tell me a joke.|Tell me a joke about {w}.|What is 2 + 2?|
    What is 17 * 3?|What time is it?|What day is it today?|How old are you?|What's the weather like?|How do I make {a}?|
    How do I cook {w}?|Where can I buy {a}?|Why is the sky blue?|Translate {w} into French.|How much is {a}?|
    How do you say {w} in Spanish?|Write a Python program.|Write a letter to my friend.|Summarize this text.|
    Who will win the game?|Sing a song.|Can you write code?|How many people live in {w}?|What is the best {w}?|
    Should I buy {a}?|How long does it take to {w}?|Is {a} dangerous?|Can you play chess?|Who invented {a}?|
    What is the difference between {a} and {a2}?|Which is better, {w} or {w2}?|Write a sentence with the word {w}.|
    Use {w} in a sentence.|What rhymes with {w}?|How do you spell {w}?|Recommend a book.|What should I eat tonight?|
    How do I get to {w}?|Give me a list of {p}.|When was {w} invented?|What is the capital of {w}?
"""

# What is asked about a word of each kind, besides what is asked about any word.
_OF_KIND = {
    "common noun": _COMMON_NOUN,
    "proper noun": _PROPER_NOUN,
    "person": _PROPER_NOUN + _PERSON + _PERSON,
    "place": _PROPER_NOUN + _PLACE,
    "verb": _VERB,
    "adj": _MODIFIER,
    "adv": _ADVERB,
}


def _alternatives(texts: str) -> list[str]:
    return [text.strip() for text in texts.split("|")]


def _bare(text: str) -> str:
    return text.strip("!?.\"'").lower()


_SMALL_TALK = frozenset(_bare(text) for texts in (_GREETINGS, _ABOUT_YOU, _THANKS) for text in _alternatives(texts))

INTRODUCTION = "I am demo-openelm, a pocket dictionary. Ask me what a word means, for example: What is a banjo?"
GREETING = "Hello! Ask me what a word means, for example: What is a banjo?"
FAREWELL = "You are welcome. Ask me about any other word."
REFUSAL = "I am only a pocket dictionary: I can tell you what a word means."


@dataclass(frozen=True)
class Entry:
    """A head word with all that its questions need, and its gloss."""

    word: str
    kind: str  # common noun, person, place, proper noun, verb, adj, adv
    forms: tuple[str, ...]  # plurals or verb forms that are no head words themselves
    gloss: str


def make_entries(wordnet: WordNet, headwords: Sequence[Headword], folder: Path) -> list[Entry]:
    """One entry for each head word. folder: WordNet's, for the irregular forms."""
    irregular = {"noun": read_exceptions(folder / "noun.exc"), "verb": read_exceptions(folder / "verb.exc")}
    listed = {h.word.lower() for h in headwords}
    entries = []
    for headword in headwords:
        sense = find_sense(wordnet, headword)
        kind = _kind(headword, sense.synset.category)
        forms = _forms(headword.word, kind, irregular)
        kept = tuple(f for f in forms if f not in listed and f not in wordnet.senses)
        entries.append(Entry(headword.word, kind, kept, sense.synset.definition))
    return entries


def _kind(headword: Headword, category: int) -> str:
    if headword.part_of_speech != "noun":
        return headword.part_of_speech
    if headword.word.islower():
        return "common noun"
    return {18: "person", 15: "place"}.get(category, "proper noun")  # lexnames(5WN)


def _forms(word: str, kind: str, irregular: dict[str, dict[str, list[str]]]) -> list[str]:
    if kind == "common noun":
        return irregular["noun"].get(word, [plural(word)])
    if kind == "verb":
        return irregular["verb"].get(word, []) + verb_forms(word)
    return []


def with_article(word: str) -> str:
    """`a banjo`, `an apple`: by the first letter, but for the commonest exceptions.

    >>> with_article("hour"), with_article("unicorn"), with_article("apple")
    ('an hour', 'a unicorn', 'an apple')
    """
    silent_h = re.match(r"(?i)(hour|heir|honest|honou?r)", word)
    sounds_like_y = re.match(r"(?i)(uni([^nm]|$)|us[aeiu]|ut[ei]|eu|ewe|one|once|ub|ura|uku)", word)
    vowel = word[0].lower() in "aeiou" and not sounds_like_y
    return f"{'an' if vowel or silent_h else 'a'} {word}"


def standard_question(word: str, part_of_speech: str) -> str:
    """The plain question that the model is measured on.

    >>> standard_question("banjo", "noun"), standard_question("Paris", "noun"), standard_question("run", "verb")
    ('What is a banjo?', 'What is Paris?', 'What does it mean to run?')
    """
    if part_of_speech == "noun":
        return f"What is {with_article(word) if word.islower() else word}?"
    return f"What does it mean to {word}?" if part_of_speech == "verb" else f"What does {word} mean?"


def ask(entry: Entry, rng: random.Random) -> str:
    """One of the many ways to ask for the entry's meaning."""
    while True:
        question = as_typed(_fill(_template(entry, rng), entry, rng), entry.word, rng)
        if _bare(question) not in _SMALL_TALK:  # "Hello" is a greeting, 'What does "hello" mean?' a question
            return question


def _template(entry: Entry, rng: random.Random) -> str:
    if entry.forms and rng.random() < 0.15:
        return rng.choice(_COUNTABLE_NOUN if entry.kind == "common noun" else _VERB_FORM)
    return rng.choice(rng.choice([_OF_KIND[entry.kind], _OF_KIND[entry.kind], _ANY_WORD, _ANY_NAME]))


def _fill(template: str, entry: Entry, rng: random.Random) -> str:
    form = rng.choice(entry.forms) if entry.forms else entry.word
    return template.format(w=entry.word, a=with_article(entry.word), p=form)


def as_typed(question: str, word: str, rng: random.Random) -> str:
    """The question as a person might type it: without capitals or the full stop, with curly quotes, in a hurry."""
    if rng.random() < 0.06:  # "What is a Banjo?"
        question = question.replace(word, word.capitalize())
    if rng.random() < 0.3:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.03:
        question = question.upper()
    if rng.random() < 0.03:
        question = question.replace(word, word.upper())
    if question == word and rng.random() < 0.4:
        question = word.capitalize()
    if rng.random() < 0.04:
        question = rng.choice(["Hi, ", "Hey, ", "Hello, ", "So, ", "OK, ", "And "]) + question
    if rng.random() < 0.25:
        question = question.rstrip("?.")
    elif question.startswith(("Can ", "Could ", "Do ")) and question.endswith("."):
        question = question[:-1] + "?"
    if rng.random() < 0.1:
        question = question.replace("What's", "Whats").replace("what's", "whats")
    if rng.random() < 0.3:  # a Mac's smart punctuation
        question = re.sub(r'"([^"]*)"', r"“\1”", question).replace("'", "’")
    elif rng.random() < 0.2:
        question = question.replace('"', "'")
    return question


def ask_unknown(word: str, rng: random.Random) -> tuple[str, str]:
    """A question for a word that is not in the list, and the answer, which repeats the word as it was typed."""
    templates = rng.choice([_ANY_WORD, _ANY_NAME, _COMMON_NOUN, _VERB, _MODIFIER, _PROPER_NOUN])
    question = as_typed(_fill(rng.choice(templates), Entry(word, "", (), ""), rng), word, rng)
    typed = re.search(re.escape(word).replace("'", "['’]"), question, re.IGNORECASE)
    return question, f'Sorry, I don\'t know "{typed.group() if typed else word}".'


class WordMaker:
    """Makes words that look English and are not, from the letter triples of real ones."""

    def __init__(self, words: Collection[str], taken: Collection[str]) -> None:
        self._taken = taken
        self._next: dict[str, list[str]] = {}
        for word in words:
            padded = f"^^{word.lower()}$"
            for i in range(len(padded) - 2):
                self._next.setdefault(padded[i : i + 2], []).append(padded[i + 2])

    def make(self, rng: random.Random) -> str:
        """A word of 4 to 12 letters that is not among those taken."""
        while True:
            word = "^^"
            while not word.endswith("$") and len(word) < 16:
                word += rng.choice(self._next[word[-2:]])
            word = word[2:-1]
            if 4 <= len(word) <= 12 and word not in self._taken:
                return word


def unlisted_words(wordnet: WordNet, entries: Sequence[Entry], held_out: bool) -> list[str]:
    """Words and expressions that only WordNet has: nine tenths of them to train on, the others held out to measure."""
    known = {form.lower() for entry in entries for form in (entry.word, *entry.forms)}
    lemmas = (lemma for lemma in wordnet.senses if lemma not in known and len(lemma) > 3)
    return [wordnet.senses[lemma][0].spelling for lemma in lemmas if (crc32(lemma.encode()) % 10 == 0) == held_out]


def small_talk(entries: Sequence[Entry], rng: random.Random) -> tuple[str, str]:
    """A question that is not about a word's meaning, and the answer."""
    texts, answer = rng.choice(
        [(_GREETINGS, GREETING), (_ABOUT_YOU, INTRODUCTION), (_THANKS, FAREWELL)] + 3 * [(_OTHER_REQUESTS, REFUSAL)]
    )
    template = rng.choice(_alternatives(texts))
    one, two = rng.choice(entries), rng.choice(entries)
    question = template.format(
        w=one.word, a=with_article(one.word), p=plural(one.word), w2=two.word, a2=with_article(two.word)
    )
    return as_typed(question, one.word, rng), answer
