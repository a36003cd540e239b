"""The training example: WordNet's files, the choice of words, the packing of batches, the export, and the demo itself."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import openelm_mlx
from openelm_mlx.models.openelm import OpenELM
from openelm_mlx.specs import spec_from_config
from openelm_mlx.text.tokenizer import load_tokenizer

TRAIN = Path(__file__).parents[1] / "examples" / "train"
DEMO = Path(openelm_mlx.__file__).parent / "demo" / "openelm"

LICENCE = "  1 This software and database is being provided to you\n"
NOUNS = [
    ("00000001", "06 n 01 banjo 0", 'a stringed instrument; "she plays the banjo"', "banjo"),
    ("00000002", "18 n 02 rascal 0 dolt 0", "a term of abuse for anyone", "rascal"),
    ("00000003", "06 n 01 dolt 0", "a small bolt; holds things together", "dolt"),
]


@pytest.fixture
def train(monkeypatch):
    """Import a module of examples/train, which are scripts beside each other and no package."""
    monkeypatch.syspath_prepend(str(TRAIN))
    yield importlib.import_module
    for name in [n for n, module in sys.modules.items() if str(TRAIN) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.fixture
def wordnet_folder(tmp_path):
    """A WordNet of three nouns, one of which only means an insult."""
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text(LICENCE)
        (tmp_path / f"index.{part}").write_text(LICENCE)
        (tmp_path / f"{part}.exc").write_text("")
    data = [f"{offset} {words} 000 | {gloss}  \n" for offset, words, gloss, _ in NOUNS]
    (tmp_path / "data.noun").write_text(LICENCE + "".join(data))
    index = "banjo n 1 0 1 1 00000001  \nrascal n 1 0 1 0 00000002  \ndolt n 2 0 2 1 00000002 00000003  \n"
    (tmp_path / "index.noun").write_text(LICENCE + index)
    (tmp_path / "cntlist.rev").write_text("banjo%1:06:00:: 1 1\ndolt%1:06:00:: 2 3\n")
    return tmp_path


def test_wordnet_gives_definitions_without_examples_and_tag_counts(train, wordnet_folder):
    wordnet = train("wordnet").read_wordnet(wordnet_folder)
    (banjo,) = wordnet.senses["banjo"]
    assert (banjo.synset.definition, banjo.synset.examples) == ("a stringed instrument", ("she plays the banjo",))
    assert [(s.number, s.tags) for s in wordnet.senses["dolt"]] == [(1, 0), (2, 3)]


def test_headwords_are_ordered_by_frequency_and_hold_no_slurs(train, wordnet_folder):
    headwords = train("headwords")
    wordnet = train("wordnet").read_wordnet(wordnet_folder)
    chosen = headwords.choose_headwords(wordnet, {"banjo": 0.1, "rascal": 0.5, "dolt": 0.3}, 2)
    assert [(h.word, h.sense_number) for h in chosen] == [("dolt", 2), ("banjo", 1)]


def test_headword_list_is_whole(train):
    headwords = train("headwords").read_headwords()
    assert len(headwords) == 20_000
    assert len({h.word.lower() for h in headwords}) == 20_000


def test_quality_draws_the_words_whose_glosses_are_stored(train):
    quality = train("quality")
    drawn = quality.draw(train("headwords").read_headwords(), quality.COUNT)
    assert {h.word for h in drawn} == set(quality.read_glosses())


@pytest.mark.parametrize(
    ("word", "part_of_speech", "question"),
    [
        ("banjo", "noun", "What is a banjo?"),
        ("hour", "noun", "What is an hour?"),
        ("Paris", "noun", "What is Paris?"),
        ("run", "verb", "What does it mean to run?"),
        ("slowly", "adv", "What does slowly mean?"),
    ],
)
def test_standard_question(train, word, part_of_speech, question):
    assert train("questions").standard_question(word, part_of_speech) == question


def test_every_question_names_its_word_and_is_no_small_talk(train):
    import random

    questions = train("questions")
    entry = questions.Entry("hello", "common noun", ("hellos",), "an expression of greeting")
    rng = random.Random(0)
    asked = [questions.ask(entry, rng) for _ in range(500)]
    assert all("hello" in question.lower() for question in asked)
    assert "hello" not in {question.lower().strip("!?.\"'") for question in asked}


def write_conversations(folder: Path, lengths: list[int]) -> None:
    """Turns of the given lengths, one question a word; turn i is made of the token 10 + i, its last third the answer."""
    np.savez(
        folder / "conversations.npz",
        turn_tokens=np.repeat(10 + np.arange(len(lengths)), lengths).astype(np.uint16),
        turn_starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        answers=np.array([2 * n // 3 for n in lengths], np.uint16),
        questions_per_word=1,
        num_known=len(lengths) - 2,
        opening=[1, 5],
        line_break=[6],
    )


def write_prose(folder: Path) -> None:
    """Three paragraphs, which are the sentences and the validation text too."""
    text = np.arange(20, 60, dtype=np.uint16)
    starts = np.array([0, 10, 25, 40], np.int32)
    flat = {f"{name}_{kind}": value for name in ("opening", "running", "sentence", "validation")
            for kind, value in (("tokens", text), ("starts", starts))}  # fmt: skip
    np.savez(folder / "prose.npz", **flat, weights=np.ones(3, np.float32))


def test_rows_hold_whole_turns_and_every_word_once_an_epoch(train, tmp_path):
    batches = train("batches")
    lengths = [6, 9, 4, 12, 7, 9, 5, 8, 10, 6]
    write_conversations(tmp_path, lengths)
    packer = batches.Packer(batches.Conversations(tmp_path / "conversations.npz"), 24, 0.5, unknown_share=0.2)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(40):
        tokens, learned = packer.next_row(rng)
        assert tokens.shape == learned.shape == (25,)
        assert tokens[:2].tolist() == [1, 5]  # every row begins a conversation
        position = 0
        while position < 25 and tokens[position] != 0:
            position += 2 if tokens[position] == 1 else 1
            token, n = tokens[position], lengths[tokens[position] - 10]
            assert set(tokens[position : position + n]) == {token}
            assert learned[position : position + n].tolist() == [False] * (2 * n // 3) + [True] * (n - 2 * n // 3)
            seen.append(int(token))
            position += n
        assert not learned[tokens < 10].any()
    known = [token for token in seen if token < 18]
    assert sorted(known[:8]) == sorted(known[8:16]) == list(range(10, 18))


def test_a_resumed_stream_of_batches_is_the_uninterrupted_one(train, tmp_path):
    batches = train("batches")
    write_conversations(tmp_path, [6, 9, 4, 12, 7, 9, 5, 8])
    write_prose(tmp_path)
    recipe = batches.Recipe(16, 2, 24, 1, 1, 1)
    sources = batches.Conversations(tmp_path / "conversations.npz"), batches.Prose(tmp_path / "prose.npz")
    whole = batches.batches(*sources, recipe, seed=3)
    for _ in range(3):
        batch = next(whole)
    resumed = batches.batches(*sources, recipe, 3, batch.state)
    for _ in range(5):
        expected, got = next(whole), next(resumed)
        np.testing.assert_array_equal(expected.short.tokens, got.short.tokens)
        np.testing.assert_array_equal(expected.long.learned, got.long.learned)
        np.testing.assert_array_equal(expected.long.tokens, got.long.tokens)


def test_documents_are_the_rows_of_the_first_steps(train, tmp_path):
    """Of every kind as many as the old script sees, so that prose is not learned by heart."""
    batches = train("batches")
    write_conversations(tmp_path, [6, 9, 4, 12, 7, 9, 5, 8])
    write_prose(tmp_path)
    recipe = batches.Recipe(16, 2, 24, 1, 1, 1)
    train("documents").write_documents(tmp_path, 3, 5, recipe)
    found = np.load(tmp_path / "documents.npz")
    documents = np.split(found["tokens"], found["starts"][1:])
    learned = np.split(found["learned"], found["starts"][1:])
    sources = batches.Conversations(tmp_path / "conversations.npz"), batches.Prose(tmp_path / "prose.npz")
    drawn = batches.batches(*sources, recipe, seed=5)
    rows = [row for _ in range(3) for rows in next(drawn)[:2] for row in zip(*rows, strict=True)]
    assert len(documents) == len(rows) == 3 * 5
    for document, marks, (tokens, wanted) in zip(documents, learned, rows, strict=True):
        assert document[-1] != 0
        np.testing.assert_array_equal(document, tokens[: len(document)])
        assert not tokens[len(document) :].any()
        np.testing.assert_array_equal(marks, wanted[: len(document)])
    validation = np.load(tmp_path / "validation.npz")
    assert validation["tokens"].tolist() == [1, *range(20, 36), 1, *range(36, 52)]
    assert validation["starts"].tolist() == [0, 17]
    assert validation["learned"].tolist() == 2 * [False, *[True] * 16]


def test_an_exported_model_loads_and_is_the_quantized_one(train, tmp_path):
    mx.random.seed(0)
    config = {
        "model_type": "openelm", "num_transformer_layers": 2, "model_dim": 128, "head_dim": 32, "num_gqa_groups": 4,
        "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [1.0, 2.0], "ffn_dim_divisor": 128, "vocab_size": 4096,
        "normalize_qk_projections": True, "share_input_output_layers": True, "rope_freq_constant": 10000,
        "max_context_length": 64,
    }  # fmt: skip
    spec = spec_from_config(config)
    quantized = train("export").write_demo(OpenELM(spec), spec, DEMO / "tokenizer.model", tmp_path)
    loaded, tokenizer = openelm_mlx.load(tmp_path)
    assert tokenizer.chat_template == "openelm-instruct"
    assert [(layer.num_heads, layer.intermediate_size) for layer in loaded.spec.layers] == [(4, 128), (4, 256)]
    tokens = mx.array([[1, 40, 50, 60]])
    assert mx.abs(loaded(tokens) - quantized(tokens)).max() < 1e-5
    dense = train("answering").unpacked(loaded)
    assert not any("scales" in name for name, _ in tree_flatten(dense.parameters()))
    assert mx.abs(loaded(tokens) - dense(tokens)).max() < 1e-4


def test_answers_in_a_batch_are_those_one_by_one(train):
    answering = train("answering")
    mx.random.seed(1)
    spec = spec_from_config(train("train_openelm_demo").SMOKE_CONFIG)
    model, tokenizer = OpenELM(spec), load_tokenizer(DEMO)
    questions = ["What is a banjo?", "banjo", "What does it mean to go round in circles?"]
    batch = answering.answers(model, tokenizer, questions, max_tokens=6)
    assert batch == [answering.answers(model, tokenizer, [q], max_tokens=6)[0] for q in questions]


def test_the_demo_is_small_and_tells_what_a_banjo_is():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 12 * 2**20
    model, tokenizer = openelm_mlx.load("demo-openelm")
    answer = openelm_mlx.generate(model, tokenizer, "What is a banjo?", max_tokens=40)
    assert answer == "a stringed instrument of the guitar family that has long neck and circular body"
