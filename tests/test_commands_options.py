"""Every option of every command reaches what it names: a table, in which a new option has to be entered."""

import argparse
import importlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from openelm_mlx import commands
from openelm_mlx.commands import COMMANDS


class Reached(Exception):
    """The recorder has what it was called with."""


def options_of(command: str) -> set[str]:
    place = f"openelm_mlx.commands.{COMMANDS[command]}" if command in COMMANDS else command
    module = importlib.import_module(place)
    parser = argparse.ArgumentParser(add_help=False)
    module.add_arguments(parser)
    return {action.option_strings[0] for action in parser._actions if action.option_strings}


# option -> (value, the call that receives it, keyword, what it has to be)
LOAD = {
    "--model": ("demo-gpt-oss", "load", 0, "demo-gpt-oss"),
    "--revision": ("v1", "load", "revision", "v1"),
    "--adapter": ("somewhere", "load", "adapter", "somewhere"),
    "--tokenizer": ("demo-openelm", "load", "tokenizer", "demo-openelm"),
    "--dtype": ("float16", "load", "dtype", "float16"),
    "--preset": ("smallest", "load", "dense_bits", 4),
    "--dense-bits": ("8", "load", "dense_bits", 8),
    "--kv-bits": ("8", "load", "kv_bits", 8),
    "--expert-slots": ("5", "load", "expert_slots", 5),
    "--memory-limit": ("8G", "load", "memory_limit", "8G"),
    "--wire": (None, "load", "wire", True),
    "--context-length": ("99", "load", "context_length", 99),
    "--chat-template": ("plain", "load", "chat_template", "plain"),
    "--workers": ("mac2.local:7777", "load", "workers", "mac2.local:7777"),
    "--secret-file": ("secret", "load", "secret_file", "secret"),
    "--layers": ("3,5", "load", "layers", "3,5"),
    "--worker-timeout": ("4", "load", "worker_timeout", 4.0),
}
PLAN = {
    "--revision": ("v1", "plan", "revision", "v1"),
    "--adapter": ("somewhere", "plan", "adapter", "somewhere"),
    "--mac": ("M4 16GB", "plan", "mac", "M4 16GB"),
    "--memory-limit": ("8G", "plan", "memory_limit", "8G"),
    "--context-length": ("99", "plan", "context_length", 99),
    "--requests": ("3", "plan", "batch_size", 3),
    "--prefill-chunk": ("64", "plan", "prefill_chunk", 64),
    "--kv-bits": ("8", "plan", "kv_bits", 8),
    "--preset": ("balanced", "plan", "dense_bits", 8),
    "--dense-bits": ("4", "plan", "dense_bits", 4),
    "--expert-slots": ("5", "plan", "expert_slots", 5),
    "--dtype": ("float16", "plan", "dtype", "float16"),
}
CONVERT = {
    "--quantize": ("4", "convert", "quantize", "4"),
    "--preset": ("balanced", "convert", "quantize", 8),
    "--group-size": ("32", "convert", "group_size", 32),
    "--for": ("swift", "convert", "target", "swift"),
    "--gguf-type": ("q8_0", "convert", "gguf_type", "q8_0"),
    "--gguf-experts": ("f16", "convert", "gguf_experts", "f16"),
    "--dtype": ("float16", "convert", "dtype", "float16"),
    "--revision": ("v1", "convert", "revision", "v1"),
    "--adapter": ("somewhere", "convert", "adapter", "somewhere"),
    "--merge-anyway": (None, "convert", "merge_anyway", True),
    "--max-file-size": ("500MB", "convert", "max_file_bytes", "500MB"),
    "--tokenizer": ("demo-openelm", "convert", "tokenizer", "demo-openelm"),
    "--chat-template": ("plain", "convert", "chat_template", "plain"),
    "--dry-run": (None, "convert", "dry_run", True),
    "--verify": (None, "convert", "verify", True),
    "--upload": ("me/it", "convert", "upload", "me/it"),
    "--private": (None, "convert", "private", True),
}
EXPORT = {
    "--places": ("64,128", "export", "places", (64, 128)),
    "--chunk": ("32", "export", "chunk", 32),
    "--dtype": ("float16", "export", "dtype", "float16"),
    "--preset": ("balanced", "export", "dense_bits", 8),
    "--dense-bits": ("4", "export", "dense_bits", 4),
    "--memory-limit": ("8G", "export", "memory_limit", "8G"),
    "--revision": ("v1", "export", "revision", "v1"),
    "--tokenizer": ("demo-openelm", "export", "tokenizer", "demo-openelm"),
    "--chat-template": ("plain", "export", "chat_template", "plain"),
}
GENERATE = {
    "--system": (
        "Be brief.",
        "stream",
        "prompt",
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    ),
    "--prompt": ("Ho", "stream", "prompt", "Ho"),
    "--reasoning-effort": ("low", "stream", "reasoning_effort", "low"),
    "--raw": (None, "stream", "raw", True),
    "--max-tokens": ("7", "stream", "max_tokens", 7),
    "--stop": ("x", "stream", "stop", ["x"]),
    "--prefill-chunk": ("64", "stream", "prefill_chunk", 64),
    "--kv-bits": ("8", "stream", "kv_bits", 8),
    "--sliding-window": ("64", "stream", "sliding_window", 64),
    "--regex": ("a+", "stream", "regex", "a+"),
    "--temperature": ("0.5", "sampling", "temperature", 0.5),
    "--top-k": ("3", "sampling", "top_k", 3),
    "--top-p": ("0.5", "sampling", "top_p", 0.5),
    "--min-p": ("0.5", "sampling", "min_p", 0.5),
    "--repetition-penalty": ("1.5", "sampling", "repetition_penalty", 1.5),
    "--presence-penalty": ("0.5", "sampling", "presence_penalty", 0.5),
    "--frequency-penalty": ("0.5", "sampling", "frequency_penalty", 0.5),
    "--logit-bias": ("5=-1", "sampling", "logit_bias", {5: -1.0}),
    "--seed": ("4", "sampling", "seed", 4),
}
_SHARED = ("--reasoning-effort", "--max-tokens")
CHAT = {
    "--system": ("Be brief.", "Chat", "instructions", "Be brief."),
    "--max-rounds": ("3", "Chat", "max_rounds", 3),
    "--time-limit": ("9.5", "Chat", "time_limit", 9.5),
    "--stop": ("x", "options", "stop", ["x"]),
    "--prefill-chunk": ("64", "options", "prefill_chunk", 64),
    "--regex": ("a+", "options", "regex", "a+"),
    **{name: (GENERATE[name][0], "Chat", *GENERATE[name][2:]) for name in _SHARED},
    **{name: entry for name, entry in GENERATE.items() if entry[1] == "sampling"},
}
# What measures: option -> (value, other words, the argument or field of the call below that receives it, what it has to be)
_RANDOM = "--random=openelm-270m"
BENCH = {
    "--model": ("demo-gpt-oss", "", "source", "demo-gpt-oss"),
    "--preset": ("balanced", "", "preset", "balanced"),
    "--adapter": ("somewhere", "", "adapter", "somewhere"),
    "--against": ("nothing", "", "against_mlx_lm", False),
    "--prompt-tokens": ("9", "", "prompt_tokens", 9),
    "--completion-tokens": ("8", "", "completion_tokens", 8),
    "--rounds": ("3", "", "rounds", 3),
    "--random": ("openelm-450m", "", "shape", "openelm-450m"),
    "--bits": ("4", _RANDOM, "bits", 4),
    "--layers": ("2", _RANDOM, "num_layers", 2),
    "--long-context": ("99", _RANDOM, "long_context", 99),
    "--seconds": ("5", _RANDOM, "seconds", 5.0),
    "--apart": (None, _RANDOM, "apart", True),
}
INFO = {"--revision": ("v1", "owner/name", "revision", "v1")}
SELFCHECK = {"--only": ("sandbox", "", "checks", True)}  # those with this in their name, and no others
SERVE_LAYERS = {"--memory-limit": ("8G", "", "memory_limit", 8 * 10**9)}
STREAMING = {
    "--model": ("somewhere", "", "source", "somewhere"),
    "--slots": ("3,5", "", "slots", [3, 5]),
    "--routing": ("own,skewed", "", "routings", ["own", "skewed"]),
    "--cache": ("warm,cold", "", "caches", ["warm", "cold"]),
    "--writes": ("copy", "", "writes", ["copy"]),
    "--at-once": ("2,adapts", "", "strides", [2, None]),
    "--tokens": ("7", "", "num_tokens", 7),
    "--warm-up": ("6", "", "warm_up_tokens", 6),
    "--prefill": ("5", "", "prefill_tokens", 5),
}
MEMORY = {
    "--only": ("OpenELM", "", "shapes", True),
    "--prompt-tokens": ("3,9", "", "prompts", [3, 9]),
    "--folder": (".", "", "folder", "."),
}
# command -> the calls that its options reach, of which one raises
_DATA = "demo-openelm --data=d.jsonl --output=out"
FINETUNE = {
    option: (value, _DATA, option[2:].replace("-", "_"), wanted)
    for option, value, wanted in (
        ("--validation", "0.1", 0.1), ("--learn", "all", "all"), ("--max-length", "9", 9), ("--too-long", "cut", "cut"),
        ("--reasoning-effort", "low", "low"), ("--date", "2026-03-09", "2026-03-09"), ("--method", "dora", "dora"),
        ("--recipe", "apple-dpo", "apple-dpo"), ("--rank", "3", 3), ("--alpha", "5", 5.0), ("--dropout", "0.5", 0.5),
        ("--targets", "q_proj", ["q_proj"]), ("--layers", "1", [1]), ("--preference", "hinge", "hinge"), ("--beta", "2", 2.0),
        ("--steps", "7", 7), ("--epochs", "1.5", 1.5), ("--batch-size", "2", 2), ("--learning-rate", "0.5", 0.5),
        ("--final-learning-rate", "0.1", 0.1), ("--warmup-steps", "4", 4), ("--weight-decay", "0.1", 0.1),
        ("--max-grad-norm", "2", 2.0), ("--z-loss", "0.1", 0.1), ("--validate-every", "3", 3), ("--patience", "2", 2),
        ("--seed", "5", 5), ("--memory-limit", "8GB", "8GB"), ("--checkpointing", None, True), ("--tokens-at-once", "64", 64),
        ("--dtype", "float32", "float32"), ("--tokenizer", "there", "there"), ("--chat-template", "plain", "plain"),
        ("--revision", "v1", "v1"), ("--format", "mlx-lm", "mlx-lm"), ("--restart", None, True), ("--data", "e", "e"),
        ("--output", "other", "other"),
    )
}  # fmt: skip
TRAIN = {
    option: (value, "--config=c.yaml --output=out", option[2:], wanted)
    for option, value, wanted in (("--steps", "7", 7), ("--restart", None, True), ("--output", "other", "other"))
}
MEASURING = {
    "train": (TRAIN, ("openelm_mlx.training.pretraining.train",)),
    "finetune": (FINETUNE, ("openelm_mlx.training.finetuning.prepare_finetuning",)),
    "bench": (BENCH, ("openelm_mlx.bench.benchmark.Settings", "openelm_mlx.bench.against.compare")),
    "info": (INFO, ("openelm_mlx.sources.Source.open",)),
    "selfcheck": (SELFCHECK, ("openelm_mlx.bench.selfcheck.run_checks",)),
    "serve-layers": (SERVE_LAYERS, ("openelm_mlx.workers.parts.Parts",)),
    "benchmarks.streaming": (STREAMING, ("benchmarks.measurements.streaming.Settings",)),
    "benchmarks.memory": (MEMORY, ("openelm_mlx.bench.memory.rows",)),
}
# What stays in the command itself, or needs a file: each has a test of its own in the file that is named.
ELSEWHERE = {
    "serve": {
        "--model": "test_commands_serve.py",
        "--adapter": "test_commands_serve.py",
        "--models-folder": "test_commands_serve.py",
        "--alias": "test_commands_serve.py",
        "--keep-alive": "test_commands_serve.py",
        "--memory-limit": "test_commands_serve.py",
        "--context-length": "test_commands_serve.py",
        "--dtype": "test_commands_serve.py",
        "--preset": "test_commands_serve.py",
        "--dense-bits": "test_commands_serve.py",
        "--kv-bits": "test_commands_serve.py",
        "--expert-slots": "test_commands_serve.py",
        "--wire": "test_commands_serve.py",
        "--max-running": "test_commands_serve.py",
        "--max-waiting": "test_commands_serve.py",
        "--tools": "test_commands_serve.py",
        "--allow-unsandboxed": "test_commands_serve.py",
        "--max-rounds": "test_commands_serve.py",
        "--host": "test_commands_serve.py",
        "--port": "test_commands_serve.py",
        "--api-key-file": "test_commands_serve.py",
        "--allow-host": "test_commands_serve.py",
        "--allow-origin": "test_commands_serve.py",
        "--quiet": "test_commands_serve.py",
        "--workers": "test_commands_serve.py",
        "--secret-file": "test_commands_serve.py",
        "--layers": "test_commands_serve.py",
        "--worker-timeout": "test_commands_serve.py",
    },
    "train": {
        "--config": "test_training_pretraining.py", "--chart": "test_training_pretraining.py",
        "--json": "test_training_pretraining.py", "--quiet": "test_training_pretraining.py",
    },
    "finetune": {
        "--chart": "test_commands_finetune.py", "--dry-run": "test_commands_finetune.py",
        "--json": "test_commands_finetune.py", "--quiet": "test_commands_finetune.py",
    },
    "generate": {
        "--prompt-file": "test_commands_generate.py", "--prompt-cache": "test_commands_generate.py",
        "--draft-model": "test_commands_generate.py", "--prompt-lookup": "test_commands_generate.py",
        "--num-draft-tokens": "test_commands_generate.py", "--json-schema": "test_commands_generate_form.py",
        "--grammar": "test_commands_generate_form.py", "--logprobs": "test_commands_generate.py",
        "--json": "test_commands_generate.py", "--show-reasoning": "test_commands_generate.py",
        "--hide-reasoning": "test_commands_generate.py", "--quiet": "test_commands_generate.py",
        "--parallel": "test_parallel_processes.py",
    },
    "chat": {
        "--tools": "test_commands_chat.py", "--load": "test_commands_chat.py", "--no-history": "test_commands_chat.py",
        "--allow-unsandboxed": "test_tools_python_tool.py", "--draft-model": "test_commands_chat.py",
        "--prompt-lookup": "test_commands_chat.py", "--num-draft-tokens": "test_commands_generate.py",
        "--json-schema": "test_commands_generate_form.py", "--grammar": "test_commands_generate_form.py",
        "--show-reasoning": "test_commands_generate.py", "--hide-reasoning": "test_commands_chat.py",
        "--quiet": "test_commands_chat.py",
    },
    "plan": {
        "--macs": "test_plan_several.py", "--link": "test_plan_several.py", "--layers": "test_plan_several.py",
        "--all-macs": "test_memory_plan.py", "--chart": "test_memory_plan.py", "--json": "test_memory_plan.py",
        "--calibrate": "test_memory_calibration.py",
    },
    "convert": {"--json": "test_commands_convert.py", "--quiet": "test_commands_convert.py"},
    "export": {"--json": "test_exporting.py", "--quiet": "test_exporting.py"},
    "bench": {
        "--chart": "test_bench_benchmark.py", "--json": "test_bench_benchmark.py", "--mixed": "test_bench_requests.py",
        "--requests": "test_bench_requests.py",
    },
    "info": {"--adapter": "test_commands_adapter.py", "--layers": "test_commands.py", "--json": "test_commands.py"},
    "selfcheck": {
        "--workers": "test_several_macs_at_once.py", "--secret-file": "test_several_macs_at_once.py",
        "--no-timings": "test_bench_selfcheck.py", "--keep": "test_bench_selfcheck.py", "--output": "test_bench_selfcheck.py",
        "--json": "test_bench_selfcheck.py",
    },
    "serve-layers": {
        "--model": "test_several_macs_faults.py", "--port": "worker_processes.py", "--host": "test_several_macs_faults.py",
        "--secret-file": "test_several_macs_faults.py", "--quiet": "test_several_macs_faults.py",
    },
    "benchmarks.streaming": {
        "--random": "test_bench_routing.py", "--layers": "test_bench_routing.py", "--folder": "test_bench_routing.py",
        "--record": "test_bench_routing.py", "--trace": "test_bench_routing.py", "--predict": "test_bench_routing.py",
        "--macs": "test_bench_routing.py", "--json": "test_bench_routing.py",
    },
    "benchmarks.memory": {"--json": "test_bench_memory.py"},
}  # fmt: skip
_LOADED = dict.fromkeys(
    (
        "--revision", "--adapter", "--tokenizer", "--dtype", "--preset", "--dense-bits", "--kv-bits", "--expert-slots",
        "--memory-limit", "--context-length", "--json", "--quiet",
    ), "test_evaluation_text.py",
)  # fmt: skip
_WORKERS = dict.fromkeys(("--workers", "--secret-file", "--layers", "--worker-timeout"), "test_evaluation_text.py")
_READ = dict.fromkeys(("--text", "--window"), "test_evaluation_text.py")
ELSEWHERE |= {
    "perplexity": {**_LOADED, **_WORKERS, **_READ},
    "compare": {**_LOADED, **_WORKERS, **_READ},
    "evaluate": {
        **_LOADED,
        **_WORKERS,
        **dict.fromkeys(
            (
                "--tasks", "--limit", "--shots", "--seed", "--include-path", "--data", "--add-bos",
                "--reasoning-effort", "--apply-chat-template", "--chat-template", "--fewshot-as-multiturn",
                "--system", "--max-tokens", "--temperature", "--allow-unsandboxed", "--report",
                "--markdown", "--chart", "--compare",
            ), "test_evaluation_text.py",
        ),
    },
}  # fmt: skip
TABLE = {
    "serve": {},
    "perplexity": {},
    "compare": {},
    "evaluate": {},
    "generate": {**LOAD, **GENERATE},
    "chat": {**LOAD, **CHAT},
    "plan": PLAN,
    "convert": CONVERT,
    "export": EXPORT,
}
CASES = [("generate", *row) for row in [*LOAD.items(), *GENERATE.items()]]
CASES += [(command, *row) for command in ("chat", "plan", "convert", "export") for row in TABLE[command].items()]


def test_every_command_is_in_the_table():
    assert {*COMMANDS} <= {*TABLE, *MEASURING}


@pytest.mark.parametrize("command", [*TABLE, *MEASURING])
def test_every_option_has_an_entry(command):
    rows = TABLE[command] if command in TABLE else MEASURING[command][0]
    known = {*rows, *ELSEWHERE[command]}
    aliases = {"-p": "--prompt", "-q": "--quiet"}
    own = {aliases.get(each, each) for each in options_of(command)} - {"--overwrite"}
    assert own <= known, "a new option: enter what it has to reach"
    assert known <= own, "an option that is no more"


@pytest.mark.parametrize(
    ("option", "file"), sorted({row for rows in ELSEWHERE.values() for row in rows.items()}), ids=lambda value: value
)
def test_what_is_tested_elsewhere_is(option, file):
    """The file is there, and has a test that gives the option: in the test itself, or in what it is parametrized with."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    short = {"--quiet": "-q"}.get(option, option)
    assert any(f"{quote}{each}" in text or f" {each}" in text for each in (option, short) for quote in "\"'"), (
        option,
        file,
    )


MEASURED = [(command, *row) for command, (rows, _) in MEASURING.items() for row in rows.items()]


@pytest.mark.parametrize(
    ("command", "option", "entry"), MEASURED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_option_reaches_what_is_measured(command, option, entry, monkeypatch, tmp_path):
    value, more, name, wanted = entry
    seen: dict[str, object] = {}

    def recorder(function):
        signature = inspect.signature(function)

        def record(*args, **keywords):
            bound = signature.bind(*args, **keywords)
            bound.apply_defaults()
            seen.update(bound.arguments)
            seen.update(seen.pop("options", None) or {})
            raise Reached

        return record

    for place in MEASURING[command][1]:
        owner, _, attribute = place.rpartition(".")
        module, _, kind = owner.rpartition(".") if owner.endswith(".Source") else (owner, "", "")
        holder = importlib.import_module(module)
        holder = getattr(holder, kind) if kind else holder
        monkeypatch.setattr(holder, attribute, recorder(getattr(holder, attribute)))
    monkeypatch.setattr(
        "openelm_mlx.loading.prepare", lambda *_, **__: SimpleNamespace(model=SimpleNamespace(context_length=2**20))
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {}\ndata: none.npz\nsteps: 9\n")
    given = [*more.split(), option if value is None else f"{option}={value}"]
    if command == "bench" and option != "--against":
        given.append("--against=nothing")
    if command in COMMANDS:
        args = commands.build_parser("openelm_mlx", [command]).parse_args([command, *given])
        run = args.run
    else:
        parser, module = argparse.ArgumentParser(), importlib.import_module(command)
        module.add_arguments(parser)
        args, run = parser.parse_args(given), module.run
    with pytest.raises(Reached):
        run(args)
    found = seen[name]
    if name in ("checks", "shapes"):
        names = [each if isinstance(each, str) else each.name for each in found]
        found = bool(names) and all(value in each for each in names)
    assert json.loads(json.dumps(found, default=str)) == wanted


@pytest.mark.parametrize(
    ("command", "option", "entry"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_option_reaches_what_it_names(command, option, entry, monkeypatch):
    value, call, keyword, wanted = entry
    seen: dict[str, tuple] = {}

    def recorder(name, result=None):
        def record(*args, **keywords):
            seen[name] = (args, keywords)
            if name == call or result is None:
                raise Reached
            return result

        return record

    prepared = SimpleNamespace(model=None, tokenizer=None, read=lambda: (None, None))
    monkeypatch.setattr("openelm_mlx.loading.prepare", recorder("load", prepared))
    monkeypatch.setattr("openelm_mlx.generate.stream_generate", recorder("stream"))
    monkeypatch.setattr("openelm_mlx.conversation.Chat", recorder("Chat"))
    monkeypatch.setattr("openelm_mlx.planning.plan", recorder("plan"))
    monkeypatch.setattr("openelm_mlx.conversion.convert", recorder("convert"))
    monkeypatch.setattr("openelm_mlx.exporting.export", recorder("export"))
    prompt = [] if option == "--prompt" else ["Hi"]
    words = {
        "generate": prompt, "chat": [], "plan": ["demo-openelm"], "convert": ["demo-openelm", "nowhere"],
        "export": ["demo-openelm", "nowhere"],
    }[command]  # fmt: skip
    given = [option] if value is None else [f"{option}={value}"]
    parser = commands.build_parser("openelm_mlx", [command])
    args = parser.parse_args([command, *words, *given])
    with pytest.raises(Reached):
        args.run(args)
    if call == "sampling":
        found = getattr(seen["Chat" if command == "chat" else "stream"][1]["sampling"], keyword)
    elif call == "options":
        found = seen["Chat"][1]["options"][keyword]
    elif keyword == "prompt":
        found = seen["stream"][0][2]
    else:
        positional, named = seen[call]
        found = positional[keyword] if isinstance(keyword, int) else named[keyword]
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(wanted))
