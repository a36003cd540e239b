"""`openelm_mlx train`: a model from nothing by a YAML file, interrupted and resumed, and what a file can get wrong."""

import json
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import yaml
from conftest import FIXTURES, TINY

import openelm_mlx as om
from openelm_mlx.commands import main
from openelm_mlx.errors import ConfigError, DataError, SettingError, TokenizerError
from openelm_mlx.specs import spec_from_config
from openelm_mlx.training.loop import PrefetchedData, Trainer
from openelm_mlx.training.pretraining import TokenRows, TrainingConfig, new_model, train

MODEL = {**TINY, "num_transformer_layers": 2, "vocab_size": 64, "max_context_length": 32}


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [5, 9, 14, 31, 3, 40, 12]
    tokens = np.concatenate([np.arange(n) % 7 + 3 for n in lengths]).astype(np.uint16)
    np.savez(
        tmp_path / "data.npz",
        tokens=tokens,
        starts=np.cumsum([0, *lengths[:-1]]),
        learned=rng.random(len(tokens)) < 0.9,
    )
    fields = {
        "model": MODEL, "data": "data.npz", "validation": "data.npz", "validate_every": 4, "steps": 8, "length": 32, "rows": 3,
        "tokens_at_once": 64, "warmup_steps": 2,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "run.yaml"


def losses(output):
    log = json.loads((output / "training.json").read_text())["log"]
    return [(e["step"], e["loss"], e["norm"], e.get("validation")) for e in log]


@pytest.mark.parametrize("documents", ["packed", "stream"])
def test_a_model_is_trained_from_nothing_and_goes_on_bit_for_bit(config, tmp_path, documents):
    fields = yaml.safe_load(config.read_text()) | {"documents": documents}
    config.write_text(yaml.safe_dump(fields))
    whole = om.train(config, output=tmp_path / "whole")

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, output=tmp_path / "parts", progress=stop)
    parts = train(config, output=tmp_path / "parts")
    assert losses(parts) == losses(whole)
    assert losses(whole)[-1][1] < losses(whole)[0][1] - 0.5
    model, _ = om.load(whole)
    other, _ = om.load(parts)
    tokens = mx.array([[1, 4, 5]])
    assert bool((model(tokens) == other(tokens)).all())


def test_a_validation_that_was_interrupted_is_made_up_for(config, tmp_path, monkeypatch):
    """Its step was kept, and the run went on without what it should have measured."""
    whole = train(config, output=tmp_path / "whole")
    measured = Trainer.measured

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "measured", stop)
    for _ in range(2):  # also of the run that should have made up for it
        with pytest.raises(KeyboardInterrupt):
            train(config, output=tmp_path / "parts")
    monkeypatch.setattr(Trainer, "measured", measured)
    assert losses(train(config, output=tmp_path / "parts")) == losses(whole)


def test_the_command_trains_draws_and_prints(config, tmp_path, capsys):
    command = ["train", "--config", str(config), "--output", str(tmp_path / "out"), "--steps", "3"]
    assert main([*command, "--chart", str(tmp_path / "loss.png"), "--json"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["log"]) == 3
    assert "time: about" in printed.err
    assert (tmp_path / "loss.png").exists()
    assert main([*command, "-q"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_first_steps_are_those_of_the_whole_run(config, tmp_path):
    whole, few = train(config, output=tmp_path / "whole"), train(config, output=tmp_path / "few", steps=3)
    assert [e[:3] for e in losses(few)] == [e[:3] for e in losses(whole)[:3]]


def test_weights_begin_as_corenets():
    spec = spec_from_config({**MODEL, "model_dim": 64})
    model = new_model(spec, seed=1)
    layer = model.layers[1]
    assert float(mx.std(layer.ffn.proj_1.weight)) == pytest.approx(64**-0.5, rel=0.05)
    assert float(mx.std(layer.ffn.proj_2.weight)) == pytest.approx((2 * 2 * 64) ** -0.5, rel=0.05)
    assert bool((layer.ffn_norm.weight == 1).all())
    assert bool((new_model(spec, 1).layers[0].attn.out_proj.weight == model.layers[0].attn.out_proj.weight).all())


def test_every_document_is_seen_in_each_epoch(config):
    settings = TrainingConfig.read(config)
    rows = TokenRows.read(settings.data, settings, spec_from_config(MODEL))
    seen = [rows._documents_of(i) for i in range(12)]
    per_epoch = len(rows._epoch(0))
    lengths = [len(row) for group in seen[:per_epoch] for row in group]
    assert sorted(lengths) == sorted([4, 8, 13, 30, 2, 32, 11])
    assert all(sum(len(row) for row in group) <= 32 for group in seen)


def test_the_next_step_is_laid_out_while_this_one_is_computed():
    """By a thread that has one at a time, in their order; what goes wrong there is raised by its step."""
    taken = []

    class Data:
        def parts(self, step):
            taken.append((step, threading.current_thread() is threading.main_thread()))
            if step == 6:
                raise DataError("No more.")
            return [step]

    ahead = PrefetchedData(Data())
    assert [ahead.parts(step) for step in (3, 4, 5)] == [[3], [4], [5]]
    with pytest.raises(DataError, match="No more"):
        ahead.parts(6)
    ahead.close()
    assert taken == [(step, False) for step in (3, 4, 5, 6)]


WRONG = [
    ({"stepz": 3}, ConfigError, "has 'stepz'"),
    ({"data": None}, ConfigError, "has no data"),
    ({"data": "none.npz"}, DataError, r"none.npz cannot be read \(No such file"),
    ({"data": "run.yaml"}, DataError, "run.yaml is no .npz file"),
    ({"data": "unlearned.npz"}, DataError, "unlearned.npz has nothing to learn"),
    ({"validation": "unlearned.npz"}, DataError, "unlearned.npz has nothing to learn"),
    ({"steps": "many"}, SettingError, "run.yaml: steps is 'many'"),
    ({"seed": -1}, SettingError, "run.yaml: seed is -1"),
    ({"learning_rate": float("inf")}, SettingError, "learning_rate is inf"),
    ({"betas": 5}, SettingError, "betas is 5: give two numbers"),
    ({"betas": [0.9, 1.0]}, SettingError, "betas is .*: give two numbers"),
    ({"betas": [0.9, "x"]}, SettingError, "betas is .*: give two numbers"),
    ({"checkpointing": "maybe"}, SettingError, "checkpointing is 'maybe': it must be"),
    ({"chat_template": "mine"}, SettingError, "chat_template is 'mine': choose openelm"),
    ({"tokenizer": "nowhere"}, TokenizerError, "nowhere"),
    ({"length": 100}, SettingError, "length is 100: it must be at most the model's context, 32"),
    ({"dtype": "float8"}, SettingError, "dtype is 'float8'"),
    ({"learning_rate": "high"}, SettingError, "learning_rate is 'high'"),
    ({"documents": "heap"}, SettingError, "documents is 'heap'"),
    ({"model": {"model_type": "llama"}}, ConfigError, "llama"),
    ({"model": {**MODEL, "vocab_size": 8}}, DataError, "has token 9"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(each[0])[:30] for each in WRONG])
def test_what_a_file_can_get_wrong(config, tmp_path, wrong, error, message):
    np.savez(tmp_path / "unlearned.npz", tokens=np.arange(9) + 3, learned=np.arange(9) < 1)
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | wrong))
    with pytest.raises(error, match=message):
        train(config, output=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_settings_made_in_python_are_checked_too(config, tmp_path):
    settings = replace(TrainingConfig.read(config), betas=(0.9,))
    with pytest.raises(SettingError, match=r"^betas is"):
        train(settings, output=tmp_path / "out")


def test_numbers_as_people_write_them(config):
    """YAML takes 3e-3 for a text, because it has no point."""
    config.write_text(config.read_text() + "learning_rate: 3e-3\neps: 1e-6\n")
    found = TrainingConfig.read(config)
    assert (found.learning_rate, found.eps) == (0.003, 1e-6)


@pytest.mark.parametrize("documents", ["packed", "stream"])
def test_rows_without_anything_to_learn_are_left_out(config, tmp_path, documents):
    """A step of such rows alone had no mean, hours into a run."""
    learned = np.zeros(99, bool)
    learned[[5, 40, 70]] = True
    tokens, starts = np.arange(99) % 50, np.arange(0, 99, 9)
    np.savez(tmp_path / "data.npz", tokens=tokens, starts=starts, learned=learned)
    fields = yaml.safe_load(config.read_text()) | {"documents": documents, "rows": 1, "length": 9}
    config.write_text(yaml.safe_dump(fields))
    settings = TrainingConfig.read(config)
    rows = TokenRows.read(settings.data, settings, spec_from_config(MODEL))

    def learned_in(parts):
        return sum(float(part.batch.weights.sum()) for part in parts)

    assert [learned_in(rows.parts(step)) for step in range(6)] == [1.0] * 6
    assert learned_in(rows.all_parts()) == 3.0


def test_the_demo_s_file_is_the_demo(tmp_path):
    """Its model is the shipped one's, and its schedule is CoreNet's."""
    found = TrainingConfig.read(FIXTURES.parent.parent / "examples" / "train" / "demo_openelm.yaml")
    assert spec_from_config(dict(found.model)).layers == om.load("demo-openelm")[0].spec.layers
    assert (found.weight_decay, found.z_loss, found.max_grad_norm) == (0.1, 1e-4, 1.0)


def test_texts_are_tokenized(config, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"text": "two words"}\n')
    fields = yaml.safe_load(config.read_text()) | {
        "data": "t.jsonl", "validation": None, "tokenizer": str(FIXTURES / "tokenizers" / "llama"), "steps": 2,
        "model": {**MODEL, "vocab_size": 600},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(fields))
    path = train(config, output=tmp_path / "out")
    assert (path / "tokenizer.model").exists()
    assert om.load(path)[1] is not None
