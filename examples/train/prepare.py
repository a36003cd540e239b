"""Make everything that training reads: the tokenizer, the conversations and the prose, as arrays of tokens.

    python examples/train/prepare.py --packages packages --output build/demo-openelm

needs WordNet (Debian's wordnet-base) and the archives that corpus.py names; a few minutes on two cores. The folder it
writes, some 15 MB, is all that a training machine needs besides this repository.

    tokenizer.model       SentencePiece, Llama-style: BPE with byte fallback, <unk> 0, <s> 1, </s> 2
    dictionary.tsv        the plain question for each head word, and its gloss
    conversations.npz     questions and answers as tokens; see `Conversations` in batches.py
    prose.npz             paragraphs as tokens; see `Prose` in batches.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from corpus import read_corpus
from headwords import Headword, read_headwords
from questions import (
    Entry,
    WordMaker,
    ask,
    ask_unknown,
    make_entries,
    small_talk,
    standard_question,
    unlisted_words,
)
from wordnet import DEFAULT_FOLDER, WordNet, read_wordnet

from openelm_mlx.text.chat import OPENELM_INSTRUCT, render_chat
from openelm_mlx.text.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 4096
QUESTIONS_PER_WORD = 32
NUM_UNKNOWN = 60_000
NUM_SMALL_TALK = 20_000
SEED = 20_000

# How often a paragraph of each source is drawn: stories more than speeches, the short books more than the long ones.
PROSE_WEIGHTS = {"austen": 1.0, "moby dick": 1.0, "bible": 0.7, "addresses": 0.5, "alice": 2.0, "botchan": 2.0}

# Each role's tag is one token, so that a prompt is short. Apple's template spells them as text; they still are.
ROLE_TAGS = ("<|system|>", "<|user|>", "<|assistant|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder with the archives that corpus.py names")
    parser.add_argument("--wordnet", type=Path, default=DEFAULT_FOLDER, help="folder of WordNet's database files")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    wordnet = read_wordnet(arguments.wordnet)
    headwords = read_headwords()
    entries = make_entries(wordnet, headwords, arguments.wordnet)
    texts = read_corpus(arguments.packages)
    examples = example_sentences(wordnet)
    rng = random.Random(SEED)
    known = [[(ask(entry, rng), entry.gloss) for _ in range(QUESTIONS_PER_WORD)] for entry in entries]
    others = list(islice(unknown_words(wordnet, entries, rng), NUM_UNKNOWN))
    others += [small_talk(entries, rng) for _ in range(NUM_SMALL_TALK)]

    lines = [
        *(paragraph for _, text in texts for paragraph in text),
        *examples,
        *(e.gloss for e in entries for _ in range(4)),
    ]
    lines += [question for word in known for question, _ in word[:8]]
    train_tokenizer(lines, arguments.output / "tokenizer.model")
    tokenizer = load_tokenizer(arguments.output)
    save_dictionary(entries, headwords, arguments.output)
    save_conversations(tokenizer, [pair for word in known for pair in word], others, arguments.output)
    save_prose(tokenizer, texts, examples, arguments.output)


def train_tokenizer(lines: Iterable[str], path: Path) -> None:
    """A SentencePiece model with Llama's settings: no normalization, all spaces kept, digits one by one."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        user_defined_symbols=list(ROLE_TAGS),
        max_sentence_length=20_000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # the same file on every machine
        minloglevel=1,
    )
    path.with_suffix(".vocab").unlink()


def example_sentences(wordnet: WordNet) -> list[str]:
    """WordNet's quoted examples as sentences: four words or more, a capital and a full stop."""
    quoted = dict.fromkeys(example for synset in wordnet.synsets.values() for example in synset.examples)
    return [
        q[0].upper() + q[1:] + ("" if q[-1] in ".!?" else ".") for q in quoted if len(q.split()) >= 4 and q.isascii()
    ]


def unknown_words(wordnet: WordNet, entries: Sequence[Entry], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions for words that are not in the list, and the answer: half are invented, half only WordNet has."""
    unlisted = unlisted_words(wordnet, entries, held_out=False)
    taken = wordnet.senses.keys() | {form for entry in entries for form in entry.forms}
    maker = WordMaker([entry.word for entry in entries], taken)
    while True:
        word = maker.make(rng) if rng.random() < 0.5 else rng.choice(unlisted)
        yield ask_unknown(word, rng)


def save_dictionary(entries: Sequence[Entry], headwords: Sequence[Headword], folder: Path) -> None:
    """Write what the model is asked while it trains: one line a head word, the question and the answer."""
    questions = [standard_question(h.word, h.part_of_speech) for h in headwords]
    lines = [f"{question}\t{entry.gloss}\n" for question, entry in zip(questions, entries, strict=True)]
    (folder / "dictionary.tsv").write_text("".join(lines), encoding="utf-8")


def save_conversations(
    tokenizer: Tokenizer, known: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]], folder: Path
) -> None:
    """Write every question and answer as one turn of a conversation, known words first, word after word."""
    turns = [turn_tokens(tokenizer, question, answer) for question, answer in (*known, *others)]
    np.savez_compressed(
        folder / "conversations.npz",
        **_flat("turn", [tokens for tokens, _ in turns]),
        answers=np.array([answer for _, answer in turns], dtype=np.uint16),
        questions_per_word=QUESTIONS_PER_WORD,
        num_known=len(known),
        opening=opening_tokens(tokenizer),
        line_break=line_break_tokens(tokenizer),
    )


def turn_tokens(tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    """One turn from its <|user|> tag to the end of the answer, and where in it the answer begins.

    Rendered by the library, so that training and use agree; what stands before a turn depends on its place in the
    conversation (BOS and a space, or a line break) and is added when turns are put together.
    """
    user = {"role": "user", "content": question}
    prompt = render_chat([user], tokenizer, OPENELM_INSTRUCT)
    whole = render_chat(
        [user, {"role": "assistant", "content": answer}], tokenizer, OPENELM_INSTRUCT, add_generation_prompt=False
    )
    opening, closing = opening_tokens(tokenizer), line_break_tokens(tokenizer)
    assert whole[: len(prompt)] == prompt, f"the answer {answer!r} changes the tokens of its question"
    assert whole[: len(opening)] == opening
    assert whole[-len(closing) :] == closing
    return whole[len(opening) : -len(closing)], len(prompt) - len(opening)


def opening_tokens(tokenizer: Tokenizer) -> list[int]:
    """What stands before the first turn: BOS and the space that Llama's tokenizer puts before a text."""
    return tokenizer.encode_prompt(ROLE_TAGS[1])[:-1]


def line_break_tokens(tokenizer: Tokenizer) -> list[int]:
    """What stands before any other turn."""
    return tokenizer.encode("\n", continuation=True)


def save_prose(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, list[str]]], examples: Sequence[str], folder: Path
) -> None:
    """Write the paragraphs twice, as they open a text and as they follow a line break, and the example sentences.

    The last 2 % of each text are for validation.
    """
    paragraphs, weights, validation = [], [], []
    for source, text in texts:
        cut = int(0.98 * len(text))
        paragraphs += text[:cut]
        weights += cut * [PROSE_WEIGHTS[source]]
        validation += text[cut:]
    opening = [tokenizer.encode(paragraph + "\n") for paragraph in paragraphs]
    running = [tokenizer.encode(paragraph + "\n", continuation=True) for paragraph in paragraphs]
    np.savez_compressed(
        folder / "prose.npz",
        **_flat("opening", opening),
        **_flat("running", running),
        **_flat("sentence", [tokenizer.encode(sentence) for sentence in examples]),
        **_flat("validation", [tokenizer.encode(paragraph + "\n", continuation=True) for paragraph in validation]),
        weights=np.array(weights, dtype=np.float32),
    )


def _flat(name: str, lists: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Lists of tokens as one array, and where each list starts (one more than there are lists)."""
    ends = np.cumsum([len(tokens) for tokens in lists])
    return {
        f"{name}_tokens": np.concatenate([np.asarray(tokens, dtype=np.uint16) for tokens in lists]),
        f"{name}_starts": np.concatenate([[0], ends]).astype(np.int32),
    }


if __name__ == "__main__":
    main()
