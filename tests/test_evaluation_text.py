"""Texts cut and scored as lm-evaluation-harness does; perplexity; two models beside each other; the commands for them."""

import json
import math
import os
import random

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, random_model, save_folder
from reference.harness import Reference
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.commands import build_parser, main
from openelm_mlx.commands.evaluate import settings_of
from openelm_mlx.commands.evaluation_options import loading_options
from openelm_mlx.errors import PromptError, SettingError, TokenizerError
from openelm_mlx.evaluation import comparison
from openelm_mlx.evaluation.borders import Borders, windows
from openelm_mlx.evaluation.comparison import _fit_together
from openelm_mlx.evaluation.scorer import Scorer
from openelm_mlx.evaluation.texts import read_documents
from openelm_mlx.runtime import runtime_of
from openelm_mlx.text.tokenizer import load_tokenizer

TEXT = (
    "A banjo is a stringed instrument. It has a long neck and a round body, and is played with the fingers or a pick. "
    "Nobody knows where it comes from; some say from Africa, others from elsewhere."
)
PIECES = [
    "banjo",
    " a",
    "stringed ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "日本",
    "...",
    "Answer:",
    " A",
    "B",
    "1",
    "23",
    "🙂",
    "ing",
]


@pytest.fixture(scope="module")
def model():
    return random_model(context_length=48)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FIXTURES / "tokenizers" / "llama")


def reference(model, tokenizer):
    def logits(tokens):
        rows = model(mx.array(tokens)[None])[0, :, : model.spec.usable_vocab_size]
        return np.array(rows.astype(mx.float32))

    def encode(text):
        return [tokenizer.bos_token, *tokenizer.encode(text)]

    return Reference(encode, tokenizer.encode, "<s>", tokenizer.bos_token, model.context_length, logits)


def nasty_pairs(count: int) -> list[tuple[str, str]]:
    """Contexts that end in space or are empty, borders inside a token, texts longer than the context."""
    drawn = random.Random(0)

    def text(most):
        return "".join(drawn.choice(PIECES) for _ in range(drawn.randrange(most)))

    pairs = [("", " x"), ("", "<s>"), ("<s>A banjo", " is"), ("A ", "banjo"), ("A banjo \n", "B"), ("stri", "nged")]
    pairs += [(text(4) + end, text(4) + "z") for end in ("", " ", "  ", "\n", " \n ") for _ in range(20)]
    pairs += [("word" * 30 + text(30), text(5) + "x") for _ in range(20)]
    pairs += [("", text(5) + "y") for _ in range(20)]
    # Both halves of a word: what is one token together.
    words = TEXT.split()
    for _ in range(count - len(pairs)):
        word = drawn.choice(words)
        at = drawn.randrange(1, len(word) + 1)
        pairs.append((" ".join(drawn.choices(words, k=drawn.randrange(5))) + " " + word[:at], word[at:] or " " + word))
    return pairs


def test_requests_are_those_of_the_harness(model, tokenizer):
    theirs = reference(model, tokenizer)
    pairs = [each for each in nasty_pairs(420) if theirs.pair(*each) is not None]
    assert len(pairs) >= 300
    borders = Borders(tokenizer, model.context_length)
    for pair in pairs:
        before, after = theirs.pair(*pair)
        ours = borders.pair(*pair)
        assert ours.continuation == tuple(after), pair
        assert ours.inputs == tuple([*before, *after][-(model.context_length + 1) :][:-1]), pair


@pytest.mark.slow
def test_scores_are_those_of_the_harness(model, tokenizer):
    theirs = reference(model, tokenizer)
    pairs = [each for each in nasty_pairs(420) if theirs.pair(*each) is not None]
    scores = om.score(model, tokenizer, pairs)
    for pair, (logprob, is_greedy) in zip(pairs, scores, strict=True):
        expected = theirs.score(*theirs.pair(*pair))
        assert logprob == pytest.approx(expected[0], abs=1e-4), pair
        assert is_greedy == expected[1]


@pytest.mark.parametrize("length", [1, 20, 48, 49, 50, 97, 200])
def test_rolling_is_that_of_the_harness(model, tokenizer, length):
    text = tokenizer.decode((tokenizer.encode(TEXT) * 5)[:length])
    borders = Borders(tokenizer, model.context_length)
    requests = borders.rolling(text)
    total = sum(score.logprob for score in Scorer(model).score(requests))
    assert total == pytest.approx(reference(model, tokenizer).rolling(text), abs=2e-4)


@pytest.mark.parametrize("count", range(1, 30))
def test_windows_predict_each_token_once(count):
    found = list(windows(list(range(100, 100 + count)), 1, 7))
    assert [token for each in found for token in each.continuation] == list(range(100, 100 + count))
    assert [1 in each.context for each in found] == [True] + [False] * (len(found) - 1)
    for each in found[1:]:
        assert len(each.inputs) == 7
        together = (*each.context, *each.continuation)
        assert together == tuple(range(together[0], together[0] + 8))


def test_what_the_harness_does_not_answer_is_defined(model, tokenizer):
    borders = Borders(tokenizer, model.context_length)
    with pytest.raises(PromptError, match="no tokens"):
        borders.pair("A banjo", "")
    with pytest.raises(PromptError, match="no tokens"):
        borders.pair("", "")
    with pytest.raises(PromptError, match="the context holds 48"):
        borders.pair("A", " word" * 100)
    with pytest.raises(PromptError, match=r"Request 2 of 2: .*no tokens"):
        om.score(model, tokenizer, [("a", " b"), ("a", "")])
    with pytest.raises(PromptError, match="Request 1 is"):
        om.score(model, tokenizer, ["ab"])
    with pytest.raises(TokenizerError):
        om.score(model, None, [("a", "b")])
    # A border inside a token that leaves nothing: the continuation alone.
    swallowed = [(a, b) for a, b in nasty_pairs(420) if a.strip() and reference(model, tokenizer).pair(a, b) is None]
    for context, continuation in swallowed:
        if len(tokenizer.encode(continuation)) <= 48:
            assert borders.pair(context, continuation).continuation == tuple(
                tokenizer.encode(continuation, continuation=True)
            )


def test_bos_is_there_once_or_as_asked(tokenizer):
    bos = tokenizer.bos_token
    default, without = Borders(tokenizer, 48), Borders(tokenizer, 48, add_bos=False)
    assert default.pair("A banjo", " is").context[0] == bos
    assert default.pair("<s>A banjo", " is").inputs == default.pair("A banjo", " is").inputs
    assert bos not in without.pair("A banjo", " is").inputs
    assert without.pair("", " is").context == (bos,)


def test_gpt_oss_begins_without_bos():
    tokenizer = (
        load_tokenizer(FIXTURES / "tokenizers" / "gpt_oss")
        if (FIXTURES / "tokenizers" / "gpt_oss").is_dir()
        else om.load("demo-gpt-oss")[1]
    )
    borders = Borders(tokenizer, 128)
    assert borders.pair("One", " two").context == tuple(tokenizer.encode("One"))
    assert borders.pair("", " two").context == (borders.prefix_token,)


# --- perplexity -------------------------------------------------------------------------------------------------------


def test_perplexity_counts_each_token_once(model, tokenizer):
    found = om.perplexity(model, tokenizer, [TEXT, "Another one."])
    tokens = [tokenizer.encode(each) for each in (TEXT, "Another one.")]
    assert found.num_tokens == sum(map(len, tokens))
    total = sum(
        score.logprob
        for each in tokens
        for score in Scorer(model).score(list(windows(each, tokenizer.bos_token, model.context_length)))
    )
    assert found.nll.value == pytest.approx(-total / found.num_tokens, abs=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(found.nll.value))
    num_bytes = len((TEXT + "Another one.").encode())
    assert found.bits_per_byte == pytest.approx(-total / num_bytes / math.log(2), rel=1e-5)
    assert found.nll.error > 0


def test_a_shorter_window_knows_less(model, tokenizer):
    short = om.perplexity(model, tokenizer, TEXT, window=2)
    assert short.num_tokens == om.perplexity(model, tokenizer, TEXT).num_tokens
    assert short.window == 2
    for wrong in (1, 49, "x"):
        with pytest.raises(SettingError, match="window"):
            om.perplexity(model, tokenizer, TEXT, window=wrong)
    for wrong in ("", ["  "], [3], 7):
        with pytest.raises(PromptError):
            om.perplexity(model, tokenizer, wrong)


# --- two models -------------------------------------------------------------------------------------------------------


def divergence(a, b, tokens, inputs):
    p, q = (np.array(m(mx.array(inputs)[None])[0].astype(mx.float32)).astype(np.float64) for m in (a, b))
    p, q = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        for x in (p, q)
    )
    return (
        (np.exp(p) * (p - q)).sum(-1),
        p.argmax(-1) == q.argmax(-1),
        p[np.arange(len(tokens)), tokens],
        q[np.arange(len(tokens)), tokens],
    )


@pytest.fixture(scope="module")
def other():
    return random_model(context_length=48, seed=1)


def test_a_comparison_is_the_sum_over_the_vocabulary(model, other, tokenizer):
    runtime_of(model).tokenizer = tokenizer
    found = om.compare(model, other, TEXT[:60])
    tokens = tokenizer.encode(TEXT[:60])
    assert len(tokens) <= 48
    kl, same, p, q = divergence(model, other, tokens, [tokenizer.bos_token, *tokens[:-1]])
    assert found.num_tokens == len(tokens)
    assert found.kl.value == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl.error == pytest.approx(kl.std(ddof=1) / math.sqrt(len(kl)), rel=1e-4)
    assert found.max_kl == pytest.approx(kl.max(), rel=1e-4)
    assert found.same_top.value == pytest.approx(same.mean())
    assert found.perplexity_ratio.value == pytest.approx(math.exp((p - q).mean()), rel=1e-4)
    assert found.probability_change.value == pytest.approx((np.exp(q) - np.exp(p)).mean(), abs=1e-6)
    assert found.kl_quantiles["0.5"] == pytest.approx(np.quantile(kl, 0.5), rel=1e-4)


def test_a_model_is_equal_to_itself(model, tokenizer):
    runtime_of(model).tokenizer = tokenizer
    found = om.compare(model, model, [TEXT, TEXT[:40]])
    assert found.kl.value == 0
    assert found.same_top.value == 1
    assert found.perplexity_ratio.value == 1
    assert found.num_documents == 2


def test_models_that_do_not_fit_together_are_loaded_one_after_the_other(tmp_path, model, other, tokenizer, monkeypatch):
    a, b = save_folder(tmp_path / "a", model, "llama"), save_folder(tmp_path / "b", other, "llama")
    together = om.compare(a, b, [TEXT, "Short."], window=20)
    assert together.at_a_time == 2
    monkeypatch.setattr("openelm_mlx.evaluation.comparison._fit_together", lambda sides: False)
    apart = om.compare(a, b, [TEXT, "Short."], window=20)
    assert apart.at_a_time == 1
    assert apart.kl.value == pytest.approx(together.kl.value, rel=1e-5)
    assert apart.perplexity_ratio.value == pytest.approx(together.perplexity_ratio.value, rel=1e-5)
    mine, _ = om.load(a)
    count = len(mine.layers)
    assert om.compare(mine, b, [TEXT, "Short."], window=20).at_a_time == 2
    assert len(mine.layers) == count  # the caller goes on with it


def test_whether_two_models_fit_is_the_plans_sum(tmp_path, model):
    from types import SimpleNamespace

    def side(process, limit):
        plan = SimpleNamespace(process_bytes=process, memory_limit=limit)
        return SimpleNamespace(shape=SimpleNamespace(runtime=SimpleNamespace(plan=plan)))

    assert _fit_together([side(4, 10), side(6, 10)])
    assert not _fit_together([side(4, 10), side(7, 10)])


def test_models_with_other_tokens_are_not_compared(model, tokenizer):
    runtime_of(model).tokenizer = tokenizer
    with pytest.raises(SettingError, match="cannot be compared"):
        om.compare(model, random_model(vocab_size=601, context_length=48), TEXT)
    with pytest.raises(PromptError, match="empty"):
        om.compare(model, model, [" "])
    with pytest.raises(PromptError, match="Text 2"):
        om.compare(model, model, ["a", 3])
    with pytest.raises(SettingError, match="window"):
        om.compare(model, model, "a", window=100)


def test_gpt_oss_is_compared_on_rendered_chats():
    gpt_oss, tokenizer = om.load(short_demo("demo-gpt-oss"))
    chat = [{"role": "user", "content": "What is a dog?"}]
    found = om.compare(gpt_oss, gpt_oss, [chat])
    assert found.kl.value == 0
    assert found.num_tokens > len(tokenizer.encode("What is a dog?"))
    assert om.compare(gpt_oss, gpt_oss, chat).num_tokens == found.num_tokens


def test_compared_chats_are_the_same_on_any_day(monkeypatch):
    model, tokenizer = om.load(short_demo("demo-gpt-oss"))
    asked = []
    encode = comparison.encode_prompt
    monkeypatch.setattr(
        comparison, "encode_prompt", lambda *a, **k: asked.append(encode(*a, **k).tokens) or encode(*a, **k)
    )
    monkeypatch.setattr("openelm_mlx.engine.prompt.date", None)  # no look at the calendar
    om.compare(model, model, [[{"role": "user", "content": "Hi"}]])
    text = b"".join(map(tokenizer.token_bytes, asked[0])).decode()
    assert f"Current date: {comparison.CHAT_DATE}" in text


# --- commands ---------------------------------------------------------------------------------------------------------


def test_perplexity_command(tmp_path, capsys, model):
    folder = save_folder(tmp_path / "model", model, "llama")
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "One."}) + "\n\n" + json.dumps({"text": "Two."}) + "\n")
    files = ["--text", str(tmp_path / "a.txt"), "--text", str(tmp_path / "b.jsonl")]
    assert main(["perplexity", str(folder), *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_documents"] == 3
    assert main(["perplexity", str(folder), *files, "--window", "8"]) == 0
    shown = capsys.readouterr().out
    assert "bits a byte" in shown
    assert "windows of 8" in shown


def test_compare_command(tmp_path, capsys, model, other):
    a, b = save_folder(tmp_path / "a", model, "llama"), save_folder(tmp_path / "b", other, "llama")
    (tmp_path / "a.txt").write_text(TEXT)
    assert main(["compare", str(a), str(b), "--text", str(tmp_path / "a.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"]["value"] > 0
    assert main(["compare", str(a), str(a), "--text", str(tmp_path / "a.txt")]) == 0
    assert "perplexity ratio 1.00000" in capsys.readouterr().out


def test_quantization_options_of_compare_are_of_the_second_model(tmp_path, capsys):
    wide = random_model(context_length=48, head_dim=32, model_dim=128)
    folder = save_folder(tmp_path / "a", wide, "llama")
    (tmp_path / "a.txt").write_text(TEXT)
    arguments = ["compare", str(folder), str(folder), "--text", str(tmp_path / "a.txt"), "--json"]
    assert main([*arguments, "--dense-bits", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"]["value"] > 0


def test_what_makes_another_form_of_a_model_is_said_of_the_second(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    seen = {}

    def note(a, b, documents, **options):
        seen.update(options)
        raise SettingError("enough")

    monkeypatch.setattr("openelm_mlx.evaluation.comparison.compare", note)
    own = ["--adapter", "x", "--dense-bits", "4", "--kv-bits", "8", "--dtype", "float32"]
    assert main(["compare", "a", "b", "--text", str(tmp_path / "a.txt"), *own]) == 2
    of_a, of_b = seen["load_options"], seen["other_load_options"]
    assert [of_b[each] for each in ("adapter", "dense_bits", "kv_bits", "dtype")] == ["x", 4, 8, "float32"]
    assert [of_a[each] for each in ("adapter", "dense_bits", "kv_bits", "dtype")] == [None, None, None, "float32"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b" \n", "holds no text"), ("latin.txt", b"caf\xe9 au lait", "not UTF-8"),
        ("wrong.jsonl", b'{"text": "a"}\n{"text": \n', "Line 2"), ("other.jsonl", b'{"words": 1}\n', "Line 1"),
        ("empty.jsonl", b"\n", "holds no lines"), ("chat.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "plain"),
    ],
)  # fmt: skip
def test_wrong_texts_are_one_sentence(tmp_path, capsys, name, content, told):
    (tmp_path / name).write_bytes(content)
    assert main(["perplexity", "demo-openelm", "--text", str(tmp_path / name)]) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert not shown.out
    assert len(shown.err.strip().splitlines()) == 1


def test_a_text_that_is_not_there(tmp_path, capsys):
    assert main(["compare", "demo-openelm", "demo-openelm", "--text", str(tmp_path / "no.txt")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe.txt")  # that nobody writes to
    assert main(["perplexity", "demo-openelm", "--text", str(tmp_path / "pipe.txt")]) == 2
    assert "is a named pipe" in capsys.readouterr().err


def test_lines_end_where_files_end_them(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (tmp_path / "b.jsonl").write_bytes('{"text": "one\u2028two"}\r\n\r\n{"text": "three"}'.encode())
    found = read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    assert found == ["one\ntwo\nthree\n", "one\u2028two", "three"]


def test_fixture_model_through_score(fixtures, tokenizer):
    gpt_oss = load_fixture(fixtures / "gpt_oss_tiny")
    [request] = windows([5, 6, 7], 1, 100)
    assert Scorer(gpt_oss).score([request])[0].logprob < 0


LOADING = [
    ("--revision", "main", "revision", "main"), ("--tokenizer", "t", "tokenizer", "t"),
    ("--dtype", "float16", "dtype", "float16"),
    ("--preset", "smallest", "dense_bits", 4), ("--dense-bits", "6", "dense_bits", 6), ("--kv-bits", "8", "kv_bits", 8),
    ("--expert-slots", "5", "expert_slots", 5), ("--memory-limit", "3GB", "memory_limit", "3GB"),
    ("--context-length", "77", "context_length", 77), ("--adapter", "a", "adapter", "a"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value", "name", "wanted"), LOADING)
def test_options_reach_what_loads_the_model(option, value, name, wanted):
    for command in (
        ["perplexity", "m", "--text", "t"],
        ["compare", "a", "b", "--text", "t"],
        ["evaluate", "m", "--tasks", "t"],
    ):
        args = build_parser("openelm_mlx", command).parse_args([*command, option, value, "--quiet"])
        assert loading_options(args)[name] == wanted


def test_what_is_measured_may_lie_on_several_machines():
    given = [
        "--workers",
        "mac2.local:7777",
        "--secret-file",
        "S",
        "--layers",
        "4,2",
        "--worker-timeout",
        "3",
        "--quiet",
    ]
    for command in (
        ["perplexity", "m", "--text", "t"],
        ["compare", "a", "b", "--text", "t"],
        ["evaluate", "m", "--tasks", "t"],
    ):
        options = loading_options(build_parser("openelm_mlx", command).parse_args([*command, *given]))
        assert {name: options[name] for name in ("workers", "secret_file", "layers", "worker_timeout")} == {
            "workers": "mac2.local:7777", "secret_file": "S", "layers": "4,2", "worker_timeout": 3.0,
        }  # fmt: skip


OWN = [
    (["--limit", "3"], "limit", 3), (["--shots", "2"], "shots", 2), (["--seed", "7"], "seed", 7),
    (["--include-path", "f"], "include_path", "f"), (["--data", "aime25=f"], "data", (("aime25", "f"),)),
    (["--add-bos"], "add_bos", True), (["--no-add-bos"], "add_bos", False),
    (["--reasoning-effort", "low,high"], "efforts", ("low", "high")), (["--apply-chat-template"], "apply_chat_template", True),
    (["--fewshot-as-multiturn"], "fewshot_as_multiturn", True), (["--no-fewshot-as-multiturn"], "fewshot_as_multiturn", False),
    (["--system", "s"], "system", "s"), (["--max-tokens", "9"], "max_tokens", 9),
    (["--temperature", "0.5"], "temperature", 0.5),
    (["--allow-unsandboxed"], "allow_unsandboxed", True),
]  # fmt: skip


@pytest.mark.parametrize(("given", "name", "wanted"), OWN)
def test_options_of_evaluate_reach_its_settings(given, name, wanted):
    command = ["evaluate", "m", "--tasks", "t", *given]
    assert getattr(settings_of(build_parser("openelm_mlx", command).parse_args(command)), name) == wanted


def test_files_of_evaluate(tmp_path, capsys, model):
    folder, questions = save_folder(tmp_path / "model", model, "llama"), tmp_path / "q.jsonl"
    questions.write_text(
        '{"context": "a", "choices": [" b", " c"], "answer": 0}\n{"context": "b", "choices": [" b", " c"], "answer": 1}'
    )
    one, table = str(tmp_path / "r.json"), str(tmp_path / "t.md")
    command = ["evaluate", str(folder), "--tasks", str(questions), "--chat-template", "plain", "-q"]
    assert main([*command, "--report", one, "--markdown", table, "--chart", str(tmp_path / "c.svg")]) == 0
    written = (tmp_path / "r.json").read_text()
    unknown = ["evaluate", str(folder), "--tasks", "no-such.jsonl", "-q", "--markdown", one]
    assert main(unknown) == 2  # before anything is looked for or asked
    assert "The table is not written" in capsys.readouterr().err
    assert (tmp_path / "r.json").read_text() == written
    assert main([*command, "--compare", one]) == 0
    assert "+0.00" in capsys.readouterr().out
