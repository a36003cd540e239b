"""Loading from a repository, against a stand-in of the Hub's HTTP API on this machine."""

from pathlib import Path

import hub_server
import pytest
from conftest import FIXTURES, random_model, save_folder
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.commands import main

hub = hub_server.hub  # the fixture


@pytest.fixture
def files(tmp_path) -> dict[str, bytes | Path]:
    folder = save_folder(tmp_path / "made", random_model(), "llama")
    files = {file.name: file for file in folder.iterdir()}
    return {**files, "pytorch_model.bin": b"pickle", "original/model.safetensors": b"another copy", "LICENSE": b"terms"}


def test_a_repository_loads_and_answers_and_only_one_layout_moves(hub, files):
    hub.add_repo("somebody/OpenELM-tiny-Instruct", files)
    model, tokenizer = om.load("somebody/OpenELM-tiny-Instruct")
    assert om.generate(model, tokenizer, "Hello", max_tokens=3)
    assert tokenizer.chat_template == "openelm-instruct"
    assert hub.sent("model.safetensors") > 0
    assert hub.sent("pytorch_model.bin") == hub.sent("original/model.safetensors") == 0
    before = hub.sent("model.safetensors")
    om.load("somebody/OpenELM-tiny-Instruct")
    assert hub.sent("model.safetensors") == before


def test_a_tokenizer_from_another_repository(hub, files):
    without = {name: content for name, content in files.items() if not name.startswith("tokenizer")}
    hub.add_repo("apple/OpenELM-tiny", without)
    hub.add_repo("meta-llama/Llama-2-7b-hf", {"tokenizer.model": FIXTURES / "tokenizers" / "llama" / "tokenizer.model"})
    assert om.load("apple/OpenELM-tiny")[1] is None
    assert om.load("apple/OpenELM-tiny", tokenizer="meta-llama/Llama-2-7b-hf")[1].vocab_size == 600
    # From now on it is in the cache, which is searched last.
    assert om.load("apple/OpenELM-tiny")[1].vocab_size == 600


def test_an_adapter_from_a_repository(hub, tmp_path):
    """Its own files alone move, and it has the repository's name."""
    folder = FIXTURES / "adapters" / "openelm_lora" / "peft_final"
    held = {file.name: file for file in folder.iterdir()}
    hub.add_repo("somebody/my-style", {**held, "optimizer.pt": b"large", "README.md": b"what it is"})
    hub.add_repo("somebody/no-adapter", {"adapter_config.json": b"{}", "README.md": b"nothing else"})
    for _ in range(2):
        model, _ = om.load(FIXTURES / "openelm_tiny", adapter="somebody/my-style")
        assert om.adapter_names(model) == ("my-style",)
    assert hub.sent("adapter_model.safetensors") == (folder / "adapter_model.safetensors").stat().st_size
    assert hub.sent("optimizer.pt") == 0
    om.add_adapter(model, folder / "adapter_config.json")
    assert om.adapter_names(model) == ("my-style", "peft_final")
    with pytest.raises(om.UserError, match="holds no adapter"):
        om.add_adapter(model, "somebody/no-adapter")


@pytest.mark.parametrize(
    ("repo", "said"),
    [
        ("apple/No-Such-Model", "apple/No-Such-Model"),
        ("apple/Gated", "/apple/Gated, log in with `hf auth login`"),
        ("apple/Empty", "no"),
    ],
)
def test_repositories_that_cannot_be_loaded_are_one_sentence(hub, files, capsys, repo, said):
    hub.add_repo("apple/Gated", files, gated=True)
    hub.add_repo("apple/Empty", {"README.md": b"nothing here"})
    assert main(["generate", "--model", repo, "--prompt", "Hello"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert said in captured.err


def test_without_a_network_it_is_one_sentence(hub, files, capsys, monkeypatch):
    hub.add_repo("apple/OpenELM-tiny", files)
    hub.stop()
    monkeypatch.setattr("openelm_mlx.hub.requests._RETRY_SECONDS", ())
    assert main(["generate", "--model", "apple/OpenELM-tiny", "--prompt", "Hello"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_gpt_oss_from_a_repository_with_three_copies_of_its_weights(hub):
    """As openai/gpt-oss-20b is: the shards, original/ and metal/. Only the first is fetched, and it answers."""
    folder = short_demo("demo-gpt-oss")
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    copies = {f"original/{name}": path for name, path in files.items() if name != "tokenizer.json"}
    hub.add_repo("openai/small", {**files, **copies, "metal/model.bin": b"weights" * 1000})
    model, tokenizer = om.load("openai/small")
    expected_model, expected_tokenizer = om.load(folder)
    assert hub.sent("model.safetensors") == files["model.safetensors"].stat().st_size
    assert hub.sent("original/model.safetensors") == hub.sent("metal/model.bin") == 0
    question = "What is a banjo?"
    options = {"max_tokens": 20, "raw": True}
    expected = om.generate(expected_model, expected_tokenizer, question, **options)
    assert om.generate(model, tokenizer, question, **options) == expected != ""
