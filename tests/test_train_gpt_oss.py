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
from openelm_mlx.loading import load_model
from openelm_mlx.models.gpt_oss import GptOss
from openelm_mlx.specs import spec_from_config

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


def test_the_trained_form_computes_what_the_library_computes(model):
    """Two conversations side by side in a row are two conversations."""
    tokens = mx.random.randint(0, 40, (2, 20))
    together = model(tokens, mx.array([[0] * 9 + [1] * 11] * 2))
    plain = library_model(model, model.parameters())
    apart = mx.concatenate([plain(tokens[:, :9]), plain(tokens[:, 9:])], axis=1)
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
    assert mx.abs(read - worker(tokens, mx.zeros_like(tokens))).max().item() < 2e-4


def test_gradients_reach_every_parameter_as_if_nothing_were_rounded(model):
    tokens = mx.random.randint(0, 40, (4, 20))
    worker = training.TrainingGptOss(model.spec)

    def loss(parameters):
        worker.update(training.rounded(parameters))
        return (worker(tokens, mx.zeros_like(tokens)) ** 2).mean() + worker.balance_loss()

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


def test_every_turn_comes_once_and_whole(tmp_path):
    lengths = np.random.default_rng(2).integers(3, 30, size=200)
    tokens = np.concatenate([np.full(n, i) for i, n in enumerate(lengths)]).astype(np.uint16)
    np.savez(tmp_path / "turns.npz", tokens=tokens, lengths=lengths, learned=np.packbits(tokens % 2 == 1))
    turns = gpt_oss_batches.Turns(tmp_path / "turns.npz")
    seen = []
    for batch, _ in zip(turns.batches(3, 4, 59), range(30), strict=False):
        for row, learned, numbers in zip(*batch, strict=True):
            for number in range(numbers.max() + 1):
                (turn,) = set(row[numbers == number].tolist())
                assert (numbers == number).sum() == lengths[turn]
                assert (learned[numbers == number] == turn % 2).all()
                seen.append(turn)
    assert sorted(seen[:200]) != seen[:200]
    assert len(set(seen[: 200 - gpt_oss_batches.LOOKAHEAD])) == 200 - gpt_oss_batches.LOOKAHEAD


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
