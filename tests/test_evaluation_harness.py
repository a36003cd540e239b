"""Our model as lm-evaluation-harness's, on small data sets in files; what it reports; tasks and data that are not there."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import FIXTURES, random_model, save_folder

import openelm_mlx as om
from openelm_mlx.commands import main
from openelm_mlx.errors import PromptError, SettingError
from openelm_mlx.evaluation.borders import Borders
from openelm_mlx.evaluation.published import gpt_oss_figure, openelm_figure, published, task_sets
from openelm_mlx.evaluation.scorer import Scorer
from openelm_mlx.text.tokenizer import load_tokenizer

pytest.importorskip("lm_eval", reason="an extra of its own")

from openelm_mlx.evaluation.harness import HarnessModel
from openelm_mlx.evaluation.tasks import quiet, run_tasks, task_manager


@pytest.fixture(scope="module", autouse=True)
def one_description_of_the_machine():
    """The harness describes the machine beside each result (pip's list, lscpu), which takes seconds: here, the first time."""
    from lm_eval import evaluator

    described = {}

    def add_env_info(results):
        if not described:
            describe(described)
        results.update(described)

    with pytest.MonkeyPatch.context() as patch:
        describe = evaluator.add_env_info
        patch.setattr(evaluator, "add_env_info", add_env_info)
        yield


ROWS = [
    {"question": "A banjo is", "choices": ["a stringed instrument", "a fruit", "a sea"], "answer": 0},
    {
        "question": "A river is",
        "choices": ["a large natural stream of water", "a hat", "an idea of somebody"],
        "answer": 0,
    },
    {"question": "A dog is", "choices": ["a colour", "a domestic animal", "a number"], "answer": 1},
    {"question": "A house is", "choices": ["a word", "a liquid", "a building that people live in"], "answer": 2},
]
CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: {shots}
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 3.0}}
"""
ANSWERS = """
task: tiny_answers
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
metadata: {{version: 1.0}}
"""
PROSE = """
task: tiny_prose
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
metadata: {{version: 2.0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files, and their data beside them; nothing is fetched."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.json"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    for name, text in (("choices", CHOICES), ("answers", ANSWERS), ("prose", PROSE)):
        (folder / f"{name}.yaml").write_text(text.format(data=data, shots=0))
    few = CHOICES.format(data=data, shots=2).replace("tiny_choices", "tiny_few")
    (folder / "few.yaml").write_text(few)
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("OPENELM_MLX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model():
    return random_model(context_length=128)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FIXTURES / "tokenizers" / "llama")


@pytest.fixture(scope="module")
def manager(folder):
    return task_manager(str(folder), ["tiny_choices", "tiny_few", "tiny_answers", "tiny_prose"])


def run(lm, manager, *names, **options):
    settings = {
        "shots": None, "limit": None, "seed": 0, "apply_chat_template": False, "fewshot_as_multiturn": False, "system": None,
        "task_set": None, "model_name": "x", "effort": None, **options,
    }  # fmt: skip
    return {(row.task, row.metric): row for row in run_tasks(lm, names, manager, **settings)}


def test_accuracies_are_those_of_the_scores(model, tokenizer, manager):
    rows = run(HarnessModel(model=model, tokenizer=tokenizer), manager, "tiny_choices")
    borders, right = Borders(tokenizer, 128), {"acc": 0, "acc_norm": 0}
    for row in ROWS:
        context = f"Question: {row['question']}\nAnswer:"
        pairs = [borders.pair(context, f" {choice}") for choice in row["choices"]]
        sums = [score.logprob for score in Scorer(model).score(pairs)]
        shares = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        right["acc"] += sums.index(max(sums)) == row["answer"]
        right["acc_norm"] += shares.index(max(shares)) == row["answer"]
    for metric, count in right.items():
        row = rows["tiny_choices", metric]
        p = count / 4
        assert row.value == pytest.approx(100 * p)
        assert row.error == pytest.approx(100 * math.sqrt(p * (1 - p) / 3))
        assert (row.n, row.shots, row.version) == (4, 0, "task version 3.0")


def test_rolling_and_answers_through_the_harness(model, tokenizer, manager):
    lm = HarnessModel(model=model, tokenizer=tokenizer)
    rows = run(lm, manager, "tiny_prose", "tiny_answers")
    total = sum(
        score.logprob for row in ROWS for score in Scorer(model).score(Borders(tokenizer, 128).rolling(row["question"]))
    )
    num_bytes = sum(len(row["question"].encode()) for row in ROWS)
    found = rows["tiny_prose", "bits_per_byte"]
    assert found.value == pytest.approx(-total / num_bytes / math.log(2), rel=1e-4)
    assert not found.is_share
    assert rows["tiny_answers", "exact_match"].value == 0
    assert len(lm.given) == 4
    assert all(each.tokens <= 6 for each in lm.given)


def test_answers_end_at_their_stop_strings_while_they_are_written(model, tokenizer):
    lm = HarnessModel(model=model, tokenizer=tokenizer)
    [whole] = lm.generate_until([SimpleNamespace(args=("A banjo", {"until": [], "max_gen_toks": 12}))])
    assert len(whole) > 4
    stop = whole[2:4]
    [cut] = lm.generate_until([SimpleNamespace(args=("A banjo", {"until": [stop], "max_gen_toks": 12}))])
    assert cut == whole[: whole.index(stop)]
    assert lm.given[1].tokens < lm.given[0].tokens
    assert lm.given[1].finish_reason == "stop"


def test_a_context_longer_than_the_models_is_one_sentence(model, tokenizer):
    lm = HarnessModel(model=model, tokenizer=tokenizer)
    with pytest.raises(PromptError, match=r"Question 1 of 1: The prompt has .* tokens and the context holds 128"):
        lm.generate_until([SimpleNamespace(args=("word " * 300, {"until": ["x"], "max_gen_toks": 5}))])


def test_few_shots_and_chat_templates_come_as_messages():
    openelm, tokenizer = om.load("demo-openelm")
    lm = HarnessModel(model=openelm, tokenizer=tokenizer)
    chat = [
        {"role": "user", "content": "What is a banjo?"}, {"role": "assistant", "content": "an instrument"},
        {"role": "user", "content": "What is </s>?"},
    ]  # fmt: skip
    text = lm.apply_chat_template(chat)
    assert text.startswith("<s>")
    assert text.count("</s>") == 4
    request = lm._pair(text, "a dog")
    # A user who types a control token has typed text.
    assert request.context.count(tokenizer.eos_tokens[0]) == 3
    assert tokenizer.decode(request.continuation, continuation=True) == "a dog"
    begun = lm.apply_chat_template([*chat[:1], {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert lm._prompt(begun)[-len(tokenizer.encode("It is", continuation=True)) :] == tokenizer.encode(
        "It is", continuation=True
    )


def test_harmony_has_its_effort_and_scores_on_the_final_channel():
    gpt_oss, tokenizer = om.load("demo-gpt-oss")
    prompts = {}
    for effort in ("low", "high"):
        lm = HarnessModel(model=gpt_oss, tokenizer=tokenizer, reasoning_effort=effort)
        text = lm.apply_chat_template([{"role": "user", "content": "What is a dog?"}])
        assert f"Reasoning: {effort}" in text
        prompts[effort] = lm._pair(text, "a domestic animal").context
        assert lm._prompt(text) == [{"role": "user", "content": "What is a dog?"}]
        assert lm._options({"until": ["x"]}, 0, True)["reasoning_effort"] == effort
    special = tokenizer.special_tokens
    assert prompts["low"] != prompts["high"]
    assert prompts["low"][-1] == special["<|message|>"]
    assert prompts["low"][-3] == special["<|channel|>"] or special["<|channel|>"] in prompts["low"][-4:]
    lm = HarnessModel(model=gpt_oss, tokenizer=tokenizer, reasoning_effort="low")
    text = lm.apply_chat_template([{"role": "user", "content": "What is 2 plus 3?"}])
    [answer] = lm.generate_until([SimpleNamespace(args=(text, {"until": ["\n\n"], "max_gen_toks": 64}))])
    assert "5" in answer
    assert lm.given[0].analysis_tokens > 0
    # A stop string in the reasoning ends nothing.
    [again] = lm.generate_until([SimpleNamespace(args=(text, {"until": ["sum"], "max_gen_toks": 64}))])
    assert again.startswith(answer[:3])


def test_the_command_reports_and_compares(folder, tmp_path, capsys, model):
    source = save_folder(tmp_path / "model", model, "llama")
    report = tmp_path / "report.json"
    arguments = ["evaluate", str(source), "--tasks", "tiny_few,tiny_choices", "--include-path", str(folder)]
    assert main([*arguments, "--report", str(report), "--markdown", str(tmp_path / "t.md"), "-q"]) == 0
    shown = capsys.readouterr().out
    assert "acc_norm" in shown
    content = json.loads(report.read_text())
    assert {(row["task"], row["shots"]) for row in content["rows"]} == {("tiny_few", 2), ("tiny_choices", 0)}
    for name in ("dtype", "tokenizer", "bos", "seed", "versions", "chat_template", "date"):
        assert content["settings"][name] is not None
    assert "lm_eval 0.4" in content["settings"]["versions"]
    assert not Path(f"{report}.partial").exists()
    assert "| task" in (tmp_path / "t.md").read_text()
    assert main([*arguments, "--limit", "2", "--compare", str(report), "-q"]) == 0
    assert "difference" in capsys.readouterr().out
    assert main([*arguments, "--limit", "2", "--json", "--compare", str(report), "-q"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["rows"][0]["n"] == 2
    assert json.loads(shown.out)["before"] == content
    assert shown.err == ""


def test_the_harness_starts_no_programs_to_describe_the_machine(monkeypatch):
    """Its description, which nobody reads here, is what pip and others say: two seconds of a run."""
    from lm_eval import evaluator

    monkeypatch.setattr(evaluator, "add_env_info", pytest.fail)
    with quiet():
        evaluator.add_env_info({})
    assert evaluator.add_env_info is pytest.fail


def test_what_the_harness_refuses_is_one_sentence(folder, manager, tmp_path, capsys, model, tokenizer, monkeypatch):
    source = save_folder(tmp_path / "model", model, "llama")
    arguments = ["evaluate", str(source), "--tasks", "tiny_few", "--include-path", str(folder), "-q"]
    assert main([*arguments, "--shots", "100"]) == 2
    shown = capsys.readouterr()
    assert "cannot run tiny_few with 100 examples" in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    # A mistake of ours stays one.
    monkeypatch.setattr("openelm_mlx.evaluation.harness.kept_scores", lambda *_: {}["no such"])
    with pytest.raises(KeyError):
        run(HarnessModel(model=model, tokenizer=tokenizer), manager, "tiny_choices")


@pytest.mark.parametrize(
    ("tasks", "told"),
    [("arc_chalenge", "arc_challenge"), ("openelm-zeroshot", "openelm-zero-shot"), ("gpqa_diamnod", "gpqa_diamond")],
)
def test_unknown_tasks_have_nearest_names(tasks, told, capsys, monkeypatch):
    # Reading the thousands of its tasks takes a while.
    known = SimpleNamespace(all_tasks=["arc_challenge", "arc_easy", "hellaswag"])
    monkeypatch.setattr("openelm_mlx.evaluation.run.task_manager", lambda include, names: known)
    assert main(["evaluate", "demo-openelm", "--tasks", tasks]) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert "did you mean" in shown.err
    assert len(shown.err.strip().splitlines()) == 1


def test_data_that_is_not_there_is_one_sentence(tmp_path, capsys, folder):
    text = CHOICES.format(data=tmp_path / "missing.json", shots=0).replace("tiny_choices", "no_data")
    (tmp_path / "no_data.yaml").write_text(text)
    assert main(["evaluate", "demo-openelm", "--tasks", "no_data", "--include-path", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "The data of the task no_data cannot be had" in shown
    assert len(shown.strip().splitlines()) == 1
    with pytest.raises(SettingError, match="no folder"):
        task_manager(str(tmp_path / "nowhere"))


def test_the_harness_finds_the_model_by_its_name(folder):
    from lm_eval.api.registry import get_model

    made = get_model("openelm_mlx").create_from_arg_string(
        "pretrained=demo-openelm,dense_bits=8,add_bos_token=True", {"batch_size": 1, "device": None}
    )
    assert made.borders.add_bos is True
    assert made.loglikelihood([SimpleNamespace(args=("A banjo is", " a"))])[0][0] < 0
    with pytest.raises(SettingError, match="pretrained"):
        get_model("openelm_mlx").create_from_arg_string("", {})


REGISTERS = Path(__file__).parent.parent / "examples" / "evaluate" / "openelm_mlx.yaml"


def test_a_task_file_registers_the_model(monkeypatch):
    from lm_eval.api.registry import get_model, model_registry
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.delitem(model_registry._objs, "openelm_mlx")
    monkeypatch.delitem(sys.modules, "openelm_mlx.evaluation.harness")
    assert load_yaml(REGISTERS, resolve_func=True)["metadata"]["model"] == "openelm_mlx"
    assert get_model("openelm_mlx").__module__ == "openelm_mlx.evaluation.harness"


@pytest.mark.slow
def test_lm_eval_itself_finds_the_model(folder):
    command = "import sys; from lm_eval.__main__ import cli_evaluate; sys.exit(cli_evaluate())"
    arguments = ["--model", "openelm_mlx", "--model_args", "pretrained=demo-openelm"]
    tasks = ["--tasks", f"{REGISTERS},tiny_choices", "--include_path", str(folder), "--limit", "2"]
    ran = subprocess.run(
        [sys.executable, "-c", command, "run", *arguments, *tasks],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REGISTERS.parents[2])}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "|tiny_choices|" in ran.stdout.replace(" ", "")


def test_published_sets_are_apples():
    sets = task_sets()
    assert sets["openelm-zero-shot"] == dict.fromkeys(
        ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "sciq", "winogrande"), 0
    )
    assert sets["llm360"] == {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5}
    assert sets["openllm"] == {**sets["llm360"], "crows_pairs_english": 25, "piqa": 0, "race": 0}
    averages = {"openelm-zero-shot": {"270M": 54.37, "3B-Instruct": 69.15}, "llm360": {"450M": 41.50, "1_1B": 45.93}}
    averages["openllm"] = {"270M": 45.13, "1_1B-Instruct": 54.40}
    for name, known in averages.items():
        figures = published()["openelm"]["sets"][name]["figures"]
        assert len(figures) == 8
        for size, average in known.items():
            assert sum(figures[size].values()) / len(figures[size]) == pytest.approx(average, abs=0.0075)
    assert openelm_figure("apple/OpenELM-1_1B-Instruct", "openllm", "mmlu") == 25.65
    assert openelm_figure("/models/OpenELM-270M-4bit", "openelm-zero-shot", "sciq") == 84.70
    assert openelm_figure("demo-openelm", "openllm", "mmlu") is None
    assert gpt_oss_figure("openai/gpt-oss-20b", "aime25", "high") == 91.7
    assert gpt_oss_figure("demo-gpt-oss", "aime25", "high") is None
