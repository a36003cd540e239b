"""examples/train: the model that demo-gpt-oss is trained with is the library's, and what is written is what was trained."""

import random
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from openelm_mlx.checkpoint.layouts import understand
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config
from openelm_mlx.models.gpt_oss import GptOss
from openelm_mlx.specs import spec_from_config
from openelm_mlx.weights import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train"))

import gpt_oss_batches
import gpt_oss_conversations as conversations
import gpt_oss_export as export
import gpt_oss_model as training
import gpt_oss_words as words

TINY = export.CONFIG | {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "experts_per_token": 3,
    "num_experts_per_tok": 3,
    "sliding_window": 4,
    "vocab_size": 40,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


@pytest.fixture
def model():
    mx.random.seed(1)
    model = training.TrainingGptOss(spec_from_config(TINY))
    model.update(tree_map(lambda p: p + 0.3 * mx.random.normal(p.shape), model.parameters()))
    return model


def library_model(model, parameters):
    plain = GptOss(model.spec)
    plain.update(parameters)
    return plain


def alone(tokens):
    """The turns and positions of rows that hold one conversation each."""
    positions = mx.broadcast_to(mx.arange(tokens.shape[1]), tokens.shape)
    return mx.zeros_like(tokens), positions


def test_the_trained_form_computes_what_the_library_computes(model):
    """Two turns side by side behind one beginning are two conversations that begin so."""
    tokens = mx.random.randint(0, 40, (2, 24))
    turns, positions = mx.array([[0] * 5 + [1] * 7 + [2] * 12] * 2), mx.array([[*range(12), *range(5, 17)]] * 2)
    together = model(tokens, turns, positions)
    plain = library_model(model, model.parameters())
    first, second = tokens[:, :12], mx.concatenate([tokens[:, :5], tokens[:, 12:]], axis=1)
    apart = mx.concatenate([plain(first), plain(second)[:, 5:]], axis=1)
    assert mx.abs(together - apart).max().item() < 2e-4


def test_what_is_written_is_what_was_trained(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    export.write_demo(model, tmp_path / "tokenizer.json", tmp_path / "demo", TINY)
    config, checkpoint = read_config(tmp_path / "demo"), open_checkpoint(tmp_path / "demo")
    contents = understand(checkpoint, config, model.spec)
    assert contents.layout == "openai-hf"
    tokens = mx.random.randint(0, 40, (1, 12))
    read = load_model(contents, checkpoint, mx.float32)(tokens)
    worker = training.TrainingGptOss(model.spec)
    worker.update(training.rounded(model.parameters()))
    assert mx.abs(read - worker(tokens, *alone(tokens))).max().item() < 2e-4


def test_gradients_reach_every_parameter_as_if_nothing_were_rounded(model):
    tokens = mx.random.randint(0, 40, (4, 20))
    worker = training.TrainingGptOss(model.spec)

    def loss(parameters):
        worker.update(training.rounded(parameters))
        return (worker(tokens, *alone(tokens)) ** 2).mean() + worker.balance_loss()

    for name, gradient in tree_flatten(mx.grad(loss)(model.parameters())):
        assert mx.isfinite(gradient).all().item(), name
        assert mx.abs(gradient).max().item() > 0, name


def test_balance_is_one_when_all_experts_have_the_same_share(model):
    moe = model.layers[0].mlp
    even = mx.array(np.stack([np.roll([3.0, 2, 1, 0, 0, 0], i) for i in range(6)]), mx.float32)[None]
    weights = moe.all_weights(even)
    assert moe._balance.item() == pytest.approx(1)
    assert ((weights > 0).sum(axis=-1) == 3).all().item()
    moe.all_weights(mx.broadcast_to(even[:, :1], (1, 6, 6)))
    assert moe._balance.item() > 1.2


def test_every_turn_comes_once_and_whole_behind_a_system_message_of_its_kind(tmp_path):
    rng = np.random.default_rng(2)
    lengths, kinds = rng.integers(3, 30, size=300), rng.integers(0, 2, size=300)
    tokens = np.concatenate([np.full(n, i) for i, n in enumerate(lengths)]).astype(np.uint16)
    systems = [[1000], [1001] * 5, [2000] * 4, [2001] * 3]
    np.savez(
        tmp_path / "turns.npz",
        tokens=tokens,
        lengths=lengths,
        learned=np.packbits(tokens % 2 == 1),
        kinds=kinds,
        system_tokens=np.concatenate(systems),
        system_lengths=[len(system) for system in systems],
        systems_per_kind=2,
    )
    turns = gpt_oss_batches.Turns(tmp_path / "turns.npz")
    seen = {0: [], 1: []}
    for batch, _ in zip(turns.batches(3, 4, 59), range(30), strict=False):
        for row, learned, numbers, positions in zip(*batch, strict=True):
            system = row[numbers == 0].tolist()
            assert system in systems
            kind = systems.index(system) // 2
            for number in range(1, numbers.max() + 1):
                here = numbers == number
                (turn,) = set(row[here].tolist())
                assert kinds[turn] == kind
                assert positions[here].tolist() == list(range(len(system), len(system) + lengths[turn]))
                assert (learned[here] == turn % 2).all()
                seen[kind].append(turn)
            assert learned[numbers <= 0].sum() == 0
    for kind, all_seen in seen.items():
        count = (kinds == kind).sum() - gpt_oss_batches.LOOKAHEAD
        assert len(set(all_seen[:count])) == count


def test_an_analysis_says_what_it_names():
    banjo = words.Word(
        "banjo", "common noun", (), "a gloss", "kind", ("stringed instrument", "device", "artifact", "whole")
    )
    assert words.word_analysis(banjo, "low") == "banjo: a kind of stringed instrument."
    for effort, count in (("low", 1), ("medium", 3), ("high", 4)):
        assert words.named_words(words.word_analysis(banjo, effort)) == ("banjo", "kind", list(banjo.chain[:count]))
    assert words.named_words("banjo: a kind of device; and a kind of thing.") == ("", "", [])


def test_sums_are_worked_out_and_some_are_kept_out():
    rng = random.Random(4)
    expressions = [conversations.random_expression(rng) for _ in range(2000)]
    held_out = sum(map(conversations.is_held_out, expressions))
    assert 60 < held_out < 140
    assert conversations.calculate("17 * 3 - 1") == "50"
    assert conversations.sum_answer("17 * 3", '{"result":51}') == "17 * 3 = 51"
    assert conversations.sum_answer("17 * 3", "51\n") == "17 * 3 = 51"
