"""--adapter on the command line: what it changes, what is said of it, and what is wrong with one in a sentence."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture

import openelm_mlx as om
from openelm_mlx.bench.benchmark import Settings, rate_figures
from openelm_mlx.bench.limits import Limits
from openelm_mlx.checkpoint.adapter_files import write_adapter
from openelm_mlx.commands import main
from openelm_mlx.errors import SettingError
from openelm_mlx.models.adapter_targets import targets_of
from openelm_mlx.models.low_rank import Adapter, Pair

ADAPTERS = FIXTURES / "adapters"
TINY = FIXTURES / "openelm_tiny"


@pytest.fixture(scope="module")
def demo_adapter(tmp_path_factory):
    """One that makes demo-openelm say something else."""
    model, _ = om.load("demo-openelm")
    rng, pairs = np.random.default_rng(3), {}
    for name, target in targets_of(model.spec).items():
        if target.group == "feed-forward":
            a, b = (mx.array(rng.normal(0, 0.3, shape).astype(np.float32)) for shape in target.shapes(4))
            pairs[name] = Pair(a, b, 2.0)
    folder = tmp_path_factory.mktemp("adapters") / "odd"
    return write_adapter(folder, Adapter(pairs, base={"name": "demo-openelm"}), model.spec)


ASK = ["--prompt", "What is a banjo?", "--max-tokens", "12", "-q"]


@pytest.mark.slow
def test_generate_answers_with_it(demo_adapter, capsys):
    answers = []
    for options in ([], ["--adapter", str(demo_adapter)]):
        assert main(["generate", *ASK, *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
    model, tokenizer = om.load("demo-openelm", adapter=demo_adapter)
    assert answers[1].strip() == om.generate(model, tokenizer, "What is a banjo?", max_tokens=12).strip()
    assert (
        answers[0].strip() == om.generate(model, tokenizer, "What is a banjo?", max_tokens=12, adapter="none").strip()
    )


@pytest.mark.slow
def test_a_chat_and_an_engine_use_the_active_one(demo_adapter):
    model, tokenizer = om.load("demo-openelm", adapter=demo_adapter)
    known = om.generate(model, tokenizer, "What is a banjo?", max_tokens=12)
    assert om.generate(model, tokenizer, ["What is a banjo?"] * 2, max_tokens=12) == [known] * 2
    chat = om.Chat(model, tokenizer, max_tokens=12)
    assert chat.ask("What is a banjo?") == known


def test_what_measures_a_model_measures_it_with_the_adapter(demo_adapter, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A banjo is a stringed instrument.")
    options = ["--adapter", str(demo_adapter), "--text", str(text), "--json", "--quiet"]
    assert main(["compare", "demo-openelm", "demo-openelm", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"]["value"] > 1e-6  # only the second one has it
    assert main(["perplexity", "demo-openelm", *options]) == 0
    assert json.loads(capsys.readouterr().out)["nll"]["value"] == pytest.approx(found["other_nll"]["value"], rel=1e-5)


def test_plan_and_info_know_it(demo_adapter, capsys):
    assert main(["plan", "demo-openelm", "--adapter", str(demo_adapter), "--memory-limit", "4GB"]) == 0
    assert "are the adapter" in capsys.readouterr().out
    assert main(["info", "demo-openelm", "--adapter", str(demo_adapter)]) == 0
    told = capsys.readouterr().out
    assert "adapter format         peft" in told
    assert "adapter matrices       proj_1, proj_2" in told
    assert "adapter base           demo-openelm" in told
    assert main(["info", "demo-openelm", "--adapter", str(demo_adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["adapter"]
    model, _ = om.load("demo-openelm", adapter=demo_adapter)
    assert facts["bytes_in_memory"] == sum(each.nbytes for each in model.adapters.served.arrays)
    assert (facts["kind"], facts["ranks"], facts["factors"]) == ("LoRA", "4", "2")


def test_bench_measures_both_sides_with_it(monkeypatch):
    # The machine's true limits take seconds, and no test asks how fast a machine is.
    monkeypatch.setattr("openelm_mlx.bench.benchmark.measured_limits", lambda: Limits(1e10, 1e11))
    adapter = str(ADAPTERS / "openelm_lora" / "peft_final")
    figures = rate_figures(Settings(TINY, 8, 4, 1, adapter=adapter))
    assert figures[0].mlx_lm_samples is not None
    embedding = str(ADAPTERS / "openelm_lora_embedding" / "peft_final")
    with pytest.raises(SettingError, match="tied head"):
        rate_figures(Settings(TINY, 8, 4, 1, adapter=embedding))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["generate", "--adapter", "nowhere", *ASK], "no adapter at nowhere"),
        (["generate", "--adapter", str(TINY), *ASK], "holds no adapter"),
        (["generate", "--adapter", str(ADAPTERS / "gpt_oss_experts" / "peft_final"), *ASK], "belongs to another model"),
        (["generate", "--adapter", str(ADAPTERS / "openelm_lora" / "peft_final"), *ASK], "belongs to another model"),
        (["generate", "--model", str(ADAPTERS / "openelm_lora" / "peft_final"), *ASK], "is an adapter and no model"),
        (["plan", "demo-openelm", "--adapter", ""], "source"),
        (["info", "demo-openelm", "--adapter", "nowhere"], "no adapter at nowhere"),
        (["convert", "demo-openelm", "out", "--adapter", "nowhere"], "no adapter at nowhere"),
        (["bench", "--adapter", "nowhere", "--against", "nothing"], "no adapter at nowhere"),
        (["bench", "--adapter", "x", "--random", "openelm-270m"], "--adapter: not with --random"),
    ],
)
def test_what_is_wrong_is_a_sentence(given, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_prompt_caches_of_the_command_know_it(demo_adapter, tmp_path, capsys):
    kept, ask = str(tmp_path / "kept"), ["--prompt", "What is a banjo?", "--max-tokens", "4", "--json", "-q"]
    counts = []
    for options in ([], ["--adapter", str(demo_adapter)], ["--adapter", str(demo_adapter)], []):
        assert main(["generate", *ask, "--prompt-cache", kept, *options]) == 0
        counts.append(json.loads(capsys.readouterr().out)["statistics"]["cached_tokens"])
    assert counts[0] == counts[1] == 0
    assert counts[2] == counts[3] > 0


def test_a_half_written_adapter_is_never_seen(tmp_path, monkeypatch):
    """A full disk while it is written: the old one stays, and nothing is left beside it."""
    model = load_fixture(TINY)
    adapter = om.adapters.read_adapter(ADAPTERS / "openelm_lora" / "peft_final", model.spec)
    place = write_adapter(tmp_path / "mine", adapter, model.spec)
    before = {each.name: each.read_bytes() for each in place.iterdir()}

    def full(*_: object) -> None:
        raise RuntimeError("[save_safetensors] Unable to write: no space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(om.UserError, match=r"disk of .* is full"):
        write_adapter(place, adapter, model.spec, replace=True)
    assert {each.name: each.read_bytes() for each in place.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]
