"""Make everything that training demo-gpt-oss reads: the tokenizer, the words, and the conversations as tokens.

    python examples/train/gpt_oss_prepare.py --output build/demo-gpt-oss

needs WordNet (Debian's wordnet-base) and the package `tokenizers`; some ten minutes on one core. The folder it writes is
all that a training machine needs besides this repository.

    tokenizer.json        byte-level BPE with Harmony's special tokens, in OpenAI's order, behind the text's
    words.jsonl           each word, its gloss and its chain; see gpt_oss_words.py
    turns.npz             conversations as tokens; see `Turns` in gpt_oss_batches.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
from gpt_oss_conversations import Teacher, Turn, opening, random_calculator, sum_question
from gpt_oss_words import NUM_WORDS, STEPS, Word, choose_words, save_words, word_analysis
from questions import ask, unlisted_words
from wordnet import DEFAULT_FOLDER, read_wordnet

from openelm_mlx.text.conversation import REASONING_EFFORTS, DeveloperContent, Message, SystemContent
from openelm_mlx.text.harmony import HarmonyFormat, developer_text, system_text
from openelm_mlx.text.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 4096
SEED = 6_000

# How many turns of each kind.
QUESTIONS_PER_WORD_AND_EFFORT = 8
SUMS_WITH_TOOL = 32_000
SUMS_WITHOUT_TOOL = 8_000
UNKNOWN_WORDS = 14_000
SMALL_TALK = 6_000
NUM_DATES = 300

# o200k's way to cut a text into pieces, but for numbers, which are cut into digits: sums are copied digit by digit.
_SPLIT = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# gpt-oss's special tokens 199998 to 200018, in their order; ours are the last rows of the vocabulary.
SPECIAL_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|reserved_200001|>", "<|return|>", "<|constrain|>",
    "<|reserved_200004|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|reserved_200009|>",
    "<|reserved_200010|>", "<|reserved_200011|>", "<|call|>", "<|reserved_200013|>", "<|reserved_200014|>",
    "<|reserved_200015|>", "<|reserved_200016|>", "<|reserved_200017|>", "<|endofprompt|>",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wordnet", type=Path, default=DEFAULT_FOLDER, help="folder of WordNet's database files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a few words and sums: does it all run?")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    wordnet = read_wordnet(arguments.wordnet)
    words = choose_words(wordnet, arguments.wordnet, 100 if arguments.smoke else NUM_WORDS)
    save_words(words, arguments.output / "words.jsonl")
    unlisted = unlisted_words(wordnet, [word.entry for word in words], held_out=False)
    taken = wordnet.senses.keys() | {form for word in words for form in word.forms}
    teacher = Teacher(words, unlisted, taken, SEED)
    train_tokenizer(tokenizer_lines(words, unlisted), arguments.output / "tokenizer.json")
    turns = smoke_turns(teacher, words) if arguments.smoke else all_turns(teacher, words)
    save_turns(load_tokenizer(arguments.output), turns, arguments.output / "turns.npz")


def all_turns(teacher: Teacher, words: Sequence[Word]) -> Iterator[Turn]:
    """Every turn to train on, kind after kind."""
    for word in words:
        for effort in REASONING_EFFORTS:
            for _ in range(QUESTIONS_PER_WORD_AND_EFFORT):
                yield teacher.word(word, effort)
    kinds: list[tuple[Callable[[], Turn], int]] = [
        (teacher.sum_with_tool, SUMS_WITH_TOOL),
        (teacher.sum_without_tool, SUMS_WITHOUT_TOOL),
        (teacher.unknown, UNKNOWN_WORDS),
        (teacher.small_talk, SMALL_TALK),
    ]
    for make, count in kinds:
        for _ in range(count):
            yield make()


def smoke_turns(teacher: Teacher, words: Sequence[Word]) -> Iterator[Turn]:
    """A few of each kind."""
    for word in words:
        for effort in REASONING_EFFORTS:
            yield teacher.word(word, effort)
    for make in (teacher.sum_with_tool, teacher.sum_without_tool, teacher.unknown, teacher.small_talk):
        for _ in range(50):
            yield make()


# --- The tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer_lines(words: Sequence[Word], unlisted: Sequence[str]) -> list[str]:
    """The texts that the tokenizer learns its pieces from, often ones more often."""
    rng = random.Random(SEED)
    lines = []
    for word in words:
        lines += 6 * [word.gloss] + [word_analysis(word, effort) for effort in STEPS]
        lines += [ask(word.entry, rng) for _ in range(3)]
    for _ in range(len(words) // 4):
        system, *developer = opening(rng.choice(REASONING_EFFORTS), rng, random_calculator(rng))
        dated = replace(system.content, current_date=rng.choice(dates()))  # type: ignore[type-var]
        lines.append(system_text(dated, has_functions=bool(developer)))
        lines += [developer_text(message.content) for message in developer]
        lines.append(sum_question("1 + 1", rng))
    roles = ["system", "developer", "user", "assistant", "tool", "analysis", "commentary", "final", "json", "python"]
    headers = [*roles, " to=functions.calculator", "functions.calculator", " to=assistant", " to=python"]
    return lines + 2000 * headers + rng.sample(unlisted, min(len(unlisted), 3000))


def train_tokenizer(lines: Iterable[str], path: Path) -> None:
    """A byte-level BPE of VOCAB_SIZE tokens, the last of them Harmony's special ones."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    # A short text has fewer pieces than asked for: the special tokens stand in the last rows all the same.
    tokenizer.add_tokens(
        [f"<|unused_{i}|>" for i in range(VOCAB_SIZE - len(SPECIAL_TOKENS) - tokenizer.get_vocab_size())]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    tokenizer.save(str(path))


# --- Tokens -----------------------------------------------------------------------------------------------------------


class RememberingTokenizer:
    """A tokenizer that encodes no text twice: system messages and headers come again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encode = lru_cache(200_000)(lambda text: tuple(tokenizer.encode(text, continuation=True)))

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._tokenizer.special_tokens

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        assert continuation, "Harmony's texts all follow a control token"
        return list(self._encode(text))

    def token_bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)


def save_turns(tokenizer: Tokenizer, turns: Iterable[Turn], path: Path) -> None:
    """Write every turn without its system message, and the system messages of all kinds, with many dates each.

    Batches put the two together: turns of one kind then share a system message, and it is computed once for them.
    """
    harmony = HarmonyFormat(RememberingTokenizer(tokenizer))
    kinds: dict[tuple[SystemContent, bool], int] = {}
    tokens, learned, lengths, kind_of_turn = [], [], [], []
    for turn in turns:
        turn_tokens, turn_learned = render_turn(harmony, turn)
        system, has_functions = turn.history[0], declares_functions(turn)
        start = len(harmony.render_message(system, has_functions=has_functions))
        tokens.append(np.array(turn_tokens[start:], np.uint16))
        learned.append(np.array(turn_learned[start:], bool))
        lengths.append(len(turn_tokens) - start)
        kind_of_turn.append(kinds.setdefault((system.content, has_functions), len(kinds)))  # type: ignore[arg-type]
    systems = [
        harmony.render_message(Message("system", replace(system, current_date=day)), has_functions=has_functions)
        for system, has_functions in kinds
        for day in dates()
    ]
    np.savez_compressed(
        path,
        tokens=np.concatenate(tokens),
        learned=np.packbits(np.concatenate(learned)),
        lengths=np.array(lengths, np.uint16),
        kinds=np.array(kind_of_turn, np.uint8),
        system_tokens=np.concatenate([np.array(system, np.uint16) for system in systems]),
        system_lengths=np.array([len(system) for system in systems], np.uint16),
        systems_per_kind=len(systems) // len(kinds),
    )


def dates() -> list[str | None]:
    """The dates that system messages are learned with, and in one of four none."""
    rng = random.Random(SEED)
    days = [date(2024, 1, 1) + timedelta(days=rng.randrange(365 * 10)) for _ in range(NUM_DATES)]
    return [*(day.isoformat() for day in days), *(NUM_DATES // 3) * [None]]


def declares_functions(turn: Turn) -> bool:
    """Whether a developer message declares functions; the system message then says where calls go."""
    contents = (message.content for message in turn.history)
    return any(isinstance(content, DeveloperContent) and content.has_functions for content in contents)


def render_turn(harmony: HarmonyFormat, turn: Turn) -> tuple[list[int], list[bool]]:
    """The tokens of the whole conversation, and which of them the model samples: those are what it learns.

    What it samples begins after each `<|start|>assistant` of a prompt; where the assistant goes on after `<|end|>`, it
    writes that beginning itself. The last `<|end|>` is the `<|return|>` that ends the turn.
    """
    tokens = harmony.render_for_completion(turn.history)
    learned = [False] * len(tokens)
    given = tokens[len(harmony.render(turn.history)) :]  # <|start|>assistant
    has_functions, prompted = declares_functions(turn), True
    for message in turn.answer:
        rendered = harmony.render_message(message, has_functions=has_functions)
        is_sampled = message.role == "assistant"
        if is_sampled and prompted:
            rendered = rendered[len(given) :]
        elif not is_sampled:
            rendered = rendered + given
        tokens += rendered
        learned += [is_sampled] * len(rendered)
        prompted = not is_sampled
    tokens[-1] = harmony.return_
    return tokens, learned


if __name__ == "__main__":
    main()
