"""Whole runs of `om.finetune` with a tiny model: what is written, resuming bit for bit, and what a user can get wrong."""

import json
import signal
import subprocess
import sys

import mlx.core as mx
import pytest
from conftest import FIXTURES, random_model, save_folder
from mlx.utils import tree_flatten

import openelm_mlx as om
from openelm_mlx.checkpoint.adapter_files import read_adapter
from openelm_mlx.errors import DataError, DestinationError, MemoryLimitError, SettingError, TrainingError
from openelm_mlx.models.adapter_sites import unpacked
from openelm_mlx.training import loop
from openelm_mlx.training.finetuning import Finetuning, finetune
from openelm_mlx.training.settings import settings_from

CHATS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i * 7 % 10}"}]}
    for i in range(6)
]
PAIRS = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(5)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = random_model(context_length=256, num_transformer_layers=2)
    return save_folder(tmp_path_factory.mktemp("models") / "tiny-instruct", model, "llama")


def log_of(output):
    log = json.loads((output / "training.json").read_text())["log"]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]


def arrays_of(output):
    return {name: mx.load(str(file)) for file in output.glob("*.safetensors") for name in [file.name]}


def same_bits(one, other):
    arrays = [dict(tree_flatten(arrays_of(each))) for each in (one, other)]
    assert arrays[0].keys() == arrays[1].keys()
    return all(bool((arrays[0][name] == arrays[1][name]).all()) for name in arrays[0])


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_an_adapter_is_written_that_has_learned(source, tmp_path, method):
    seen = []
    path = om.finetune(source, data=CHATS, output=tmp_path / "out", method=method, steps=12, progress=seen.append)
    assert path == tmp_path / "out"
    assert seen[-1].step == 12
    assert seen[-1].loss < seen[0].loss - 1
    model, _ = om.load(source)
    adapter = read_adapter(path, model.spec)
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["use_rslora"] == (method == "rslora")
    assert adapter.is_dora == (method == "dora")
    assert len(adapter.pairs) == 4 * 2
    assert not (tmp_path / "out.partial").exists()


def test_all_weights_are_written_as_a_model(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_bytes(b"Bud1")  # the Finder has shown this empty folder
    path = finetune(source, data=CHATS, output=tmp_path / "out", method="full", steps=3, learning_rate=1e-3)
    model, tokenizer = om.load(path)
    assert tokenizer is not None
    assert tokenizer.chat_template == "openelm-instruct"
    base = dict(tree_flatten(om.load(source)[0].parameters()))
    trained = dict(tree_flatten(model.parameters()))
    assert all(not bool((trained[name] == base[name]).all()) for name in base if base[name].ndim > 1)


RUNS = {
    "lora": {"data": CHATS, "dropout": 0.2, "validation": CHATS[:2], "validate_every": 2, "patience": 3},
    "full": {"data": CHATS, "method": "full", "weight_decay": 0.1},
    "dpo": {"data": PAIRS, "beta": 0.5, "batch_size": 2},
}


@pytest.mark.parametrize("kind", RUNS)
def test_an_interrupted_run_goes_on_bit_for_bit(source, tmp_path, kind):
    """Losses, norms, weights: resumed = uninterrupted, wherever it was interrupted."""
    options = {"steps": 7, "batch_size": 4, **RUNS[kind]}
    finetune(source, output=tmp_path / "whole", **options)

    def stop_after(step):
        def tell(progress):
            if progress.step == step:
                raise KeyboardInterrupt

        return tell

    for step in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            finetune(source, output=tmp_path / "parts", progress=stop_after(step), **options)
        assert not (tmp_path / "parts").exists()
    finetune(source, output=tmp_path / "parts", **options)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


SCRIPT = """
import sys, openelm_mlx as om
from openelm_mlx.training.loop import Trainer
Trainer.__init__.__kwdefaults__["save_every"] = 0.0
def tell(progress):
    print(progress.step, flush=True)
om.finetune(sys.argv[1], data=sys.argv[2], output=sys.argv[3], steps=int(sys.argv[4]), batch_size=2, progress=tell)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_loses_nothing(source, tmp_path, number):
    """A process that is killed leaves a whole state, and the next one ends with the weights of a run that was not killed."""
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    command = [sys.executable, "-c", SCRIPT]
    command += [str(source), str(tmp_path / "d.jsonl"), str(tmp_path / "parts"), "8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 3:
            process.send_signal(number)
            break
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (tmp_path / "parts").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    first = int(again.stdout.split()[0])
    assert 3 <= first <= 6  # the step before the last one was saved
    finetune(source, data=tmp_path / "d.jsonl", output=tmp_path / "whole", steps=8, batch_size=2)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


def interrupted(source, output, **options):
    def stop(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(source, data=CHATS, output=output, progress=stop, **{"steps": 6, **options})


def test_another_run_does_not_go_on_with_a_state(source, tmp_path):
    interrupted(source, tmp_path / "out")
    with pytest.raises(TrainingError, match=r"with learning_rate 0\.002, and now it is 0\.1: .*restart=True"):
        finetune(source, data=CHATS, output=tmp_path / "out", steps=6, learning_rate=0.1)
    with pytest.raises(TrainingError, match="with data"):
        finetune(source, data=CHATS[1:], output=tmp_path / "out", steps=6)
    path = finetune(source, data=CHATS[1:], output=tmp_path / "out", steps=6, restart=True)
    assert len(log_of(path)) == 6


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_state_before(source, tmp_path, monkeypatch):
    real = loop.global_norm
    calls = []

    def broken(gradients):
        calls.append(1)
        return real(gradients) * (mx.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(loop, "global_norm", broken)
    with pytest.raises(TrainingError, match=r"not a number in step 4, with learning rate .*learning_rate"):
        finetune(source, data=CHATS, output=tmp_path / "out", steps=6)
    assert [each.name for each in (tmp_path / "out.partial").glob("state-*")] == ["state-0000003"]
    monkeypatch.undo()
    assert len(log_of(finetune(source, data=CHATS, output=tmp_path / "out", steps=6))) == 6


def test_a_run_ends_when_validation_no_longer_improves(source, tmp_path):
    """The best adapter is written, not the last one."""
    seen = []
    path = finetune(
        source, data=CHATS[:2], output=tmp_path / "out", validation=CHATS[3:], validate_every=1, patience=2, steps=60,
        learning_rate=0.05, warmup_steps=0, progress=seen.append,
    )  # fmt: skip
    losses = [each.validation for each in seen]
    assert len(losses) < 60
    assert losses[-1] >= min(losses)
    assert losses.index(min(losses)) == len(losses) - 3
    best = read_adapter(path, om.load(source)[0].spec)
    again = finetune(
        source, data=CHATS[:2], output=tmp_path / "again", steps=60, learning_rate=0.05, warmup_steps=0,
        validation=CHATS[3:], validate_every=1, patience=2,
        progress=None,
    )  # fmt: skip
    assert same_bits(path, again)
    assert best.num_parameters > 0


def test_how_rows_are_divided_changes_no_result(source, tmp_path):
    """Tokens at once and recomputing are memory, and nothing else: accumulated = one batch."""
    ways = [{"tokens_at_once": 2048}, {"tokens_at_once": 16}, {"tokens_at_once": 40, "checkpointing": True}]
    logs = []
    for i, way in enumerate(ways):
        logs.append(log_of(finetune(source, data=CHATS, output=tmp_path / f"{i}", steps=3, **way)))
    for log in logs[1:]:
        for name in ("loss", "norm"):
            assert [e[name] for e in log] == pytest.approx([e[name] for e in logs[0]], rel=1e-4)


def test_dropout_is_the_same_where_layers_are_computed_again(source, tmp_path):
    logs = [
        log_of(finetune(source, data=CHATS, output=tmp_path / f"{way}", steps=3, dropout=0.3, checkpointing=way))
        for way in (False, True)
    ]
    assert [e["norm"] for e in logs[0]] == pytest.approx([e["norm"] for e in logs[1]], rel=1e-4)
    plain = log_of(finetune(source, data=CHATS, output=tmp_path / "none", steps=3))
    assert plain[0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=1e-5)  # B is still zero
    assert plain[0]["norm"] != pytest.approx(logs[0][0]["norm"], rel=1e-3)


WRONG = [
    ({"data": []}, DataError, "data has no examples"),
    ({"data": "missing.jsonl"}, DataError, "missing.jsonl cannot be read"),
    ({"method": "qlora"}, SettingError, "method is 'qlora': choose lora"),
    ({"recipe": "apple"}, SettingError, "recipe is 'apple'"),
    ({"steps": 0}, SettingError, "steps is 0"),
    ({"batch_size": 1.5}, SettingError, "batch_size is 1.5"),
    ({"learning_rate": -1}, SettingError, "learning_rate is -1"),
    ({"learning_rate": 1e-4, "final_learning_rate": 1e-3}, SettingError, "final_learning_rate is 0.001"),
    ({"dropout": 1}, SettingError, "dropout is 1"),
    ({"targets": "q_proj"}, SettingError, "targets is 'q_proj': give a list"),
    ({"targets": ["w_proj"]}, SettingError, "'w_proj' matches no matrix"),
    ({"layers": [7]}, SettingError, "layers is 7"),
    ({"max_length": 1000}, SettingError, "max_length is 1,000: it must be at most the model's context, 256"),
    ({"max_length": 8}, DataError, r"data\[0\]: it has \d+ tokens"),
    ({"validation": 0.999}, DataError, "leaves none to learn from"),
    ({"validation": 3}, SettingError, "validation is 3"),
    ({"validation": PAIRS}, DataError, "two kinds"),
    ({"format": "gguf"}, SettingError, "format is 'gguf'"),
    ({"date": "yesterday"}, SettingError, "date is 'yesterday'"),
    ({"memory_limit": "1MB"}, MemoryLimitError, "Training .* does not fit: weights"),
    ({"chat_template": "plain"}, DataError, r"data\[0\]: This model has no chat template"),
    ({"epoch": 3}, SettingError, "Did you mean epochs"),
    ({"output": ""}, SettingError, "output is .*give a path"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(each[0])[:40] for each in WRONG])
def test_what_is_wrong_is_said_before_anything_is_read_or_written(source, tmp_path, wrong, error, message):
    with pytest.raises(error, match=message):
        finetune(source, **{"data": CHATS, "output": tmp_path / "out", **wrong})
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_there_are_left_alone(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(DestinationError, match="exists already"):
            finetune(source, data=CHATS, output=tmp_path / name)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "a").write_text("mine")
    with pytest.raises(TrainingError, match="was not left by a run of training"):
        finetune(source, data=CHATS, output=tmp_path / "out", steps=1)
    assert (tmp_path / "out.partial" / "a").read_text() == "mine"


def test_a_full_disk_keeps_the_state_before(source, tmp_path, monkeypatch):
    import openelm_mlx.training.state as state

    real, saved = state.save_tensors, []

    def full(path, tree):
        saved.append(path)
        if len(saved) > 2:
            raise OSError(28, "No space left on device", str(path))
        real(path, tree)

    monkeypatch.setattr(state, "save_tensors", full)
    monkeypatch.setitem(loop.Trainer.__init__.__kwdefaults__, "save_every", 0.0)
    with pytest.raises(DestinationError, match="is full"):
        finetune(source, data=CHATS, output=tmp_path / "out", steps=5)
    left = [each.name for each in (tmp_path / "out.partial").iterdir()]
    assert "state.new" not in left
    assert "state-0000001" in left
    monkeypatch.undo()
    assert len(log_of(finetune(source, data=CHATS, output=tmp_path / "out", steps=5))) == 5


def test_a_damaged_state_is_said(source, tmp_path):
    interrupted(source, tmp_path / "out")
    state = next((tmp_path / "out.partial").glob("state-*"))
    (state / "parameters.safetensors").write_bytes(b"broken")
    with pytest.raises(TrainingError, match=r"is damaged .*restart=True"):
        finetune(source, data=CHATS, output=tmp_path / "out", steps=6)


def test_two_processes_do_not_train_one_output(source, tmp_path):
    from openelm_mlx.training.state import RunFolder

    prepared = Finetuning.prepare(source, data=CHATS, output=tmp_path / "out", steps=2)
    folder = RunFolder(tmp_path / "out", prepared.what)
    try:
        with pytest.raises(TrainingError, match="Another process"):
            prepared.run()
    finally:
        folder.close()


def test_quantized_weights_take_adapters_and_are_unpacked_for_full(tmp_path, source):
    om.convert(source, tmp_path / "packed", quantize=8, group_size=32)
    from openelm_mlx import placement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "LARGEST_UNPACKED_BYTES", 0)  # as on a GPU, where they stay packed
        options = {"data": CHATS, "steps": 2, "chat_template": "openelm-instruct"}
        assert finetune(tmp_path / "packed", output=tmp_path / "out", **options)
        prepared = Finetuning.prepare(tmp_path / "packed", output=tmp_path / "full", method="full", **options)
        assert prepared.plan.num_trained == prepared.base.spec.num_parameters()
        assert not prepared.base.placement.packed
        stored = om.load(prepared.run())[0]
    assert not any("scales" in module for module in stored.modules())
    packed = om.load(tmp_path / "packed")[0].transformer.layers[0].attn.qkv_proj
    trained = stored.transformer.layers[0].attn.qkv_proj.weight
    assert 0 < float(mx.abs(trained - unpacked(packed)).max()) < 1e-2


def test_all_weights_of_gpt_oss_are_trained_its_packed_experts_too(tmp_path):
    """They become numbers, since words cannot be trained, and the result is a model of its own."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = json.loads((FIXTURES / "gpt_oss_tiny" / "config.json").read_text())
    arrays = mx.load(str(FIXTURES / "gpt_oss_tiny" / "model.safetensors"))
    times = 4096 // config["vocab_size"]  # as many rows as the demo's tokenizer has tokens
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name] = mx.concatenate([arrays[name]] * times)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 4096}))
    options = {"data": [{"text": "abc"}] * 2, "steps": 2, "learning_rate": 1e-3, "tokenizer": "demo-gpt-oss"}
    path = finetune(folder, output=tmp_path / "out", method="full", **options)
    base, trained = om.load(folder)[0], om.load(path)[0]
    before, after = (dict(tree_flatten(each.parameters())) for each in (base, trained))
    assert not any(name.endswith(".scales") for name in after)
    for name, array in after.items():
        if f"{name.removesuffix('weight')}scales" not in before:
            assert not bool((array == before[name]).all()), name
    down, packed = (each.model.layers[0].mlp.experts.down_proj for each in (trained, base))
    assert 0 < float(mx.abs(down.weight - unpacked(packed)).max()) < 1e-2


def test_recipes_are_apples(source, tmp_path):
    data = [{"instruction": "i", "input": "", "output": "o"}]
    found = Finetuning.prepare(source, data=data, output=tmp_path / "a", recipe="apple-peft", max_length=256).settings
    assert (found.rank, found.alpha, found.dropout, found.learning_rate, found.z_loss) == (32, 32.0, 0.1, 3e-4, 1e-4)
    assert found.learn == "all"
    found = Finetuning.prepare(source, data=PAIRS, output=tmp_path / "a", recipe="apple-dpo", max_length=256).settings
    assert (found.method, found.preference, found.beta, found.learning_rate, found.epochs) == (
        "full",
        "hinge",
        0.01,
        2e-5,
        5,
    )
    # openelm-instruct.yaml has warmup_ratio 0.1.
    assert settings_from("apple-dpo", {"steps": 2000}).completed(5, is_preference=True).warmup_steps == 200
    assert settings_from("apple-dpo", {"steps": 2000, "warmup_steps": 7}).completed(5, True).warmup_steps == 7
