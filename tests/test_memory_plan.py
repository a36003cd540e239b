"""The plan: its arithmetic against real models' bytes, what it chooses, what it refuses, and loading by it."""

import json
import subprocess
import sys
from dataclasses import replace

import hub_server
import mlx.core as mx
import pytest
from conftest import random_model, save_folder
from mlx.utils import tree_flatten

import openelm_mlx as om
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.bench.random_pair import shape_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands import main
from openelm_mlx.errors import MemoryLimitError, SettingError
from openelm_mlx.memory.cache_bytes import kv_cache_bytes
from openelm_mlx.memory.machine import find_mac, macs
from openelm_mlx.memory.plan import make_plan
from openelm_mlx.memory.plan_types import PlanRequest, Weights
from openelm_mlx.memory.rates import rounded
from openelm_mlx.memory.sizes import parse_memory
from openelm_mlx.planning import Planned, plans_on
from openelm_mlx.sources import DEMOS
from openelm_mlx.specs import spec_from_config

hub = hub_server.hub

SMALL = {
    **released_gpt_oss_config("20b"), "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": 8, "eos_token_id": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse")
    return {
        size: write_random_gpt_oss(root / size, released_gpt_oss_config(size), sparse=True) for size in ("20b", "120b")
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_random_gpt_oss(tmp_path_factory.mktemp("small") / "m", SMALL)


def bytes_in_memory(model) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"dense_bits": 8}, {"dense_bits": 4}]
)
@pytest.mark.parametrize("source", [*DEMOS, "small", "openelm"])
def test_weights_are_known_to_the_byte(source, options, small, tmp_path):
    path = {"small": small, "openelm": save_folder(tmp_path / "m", random_model())}.get(source, source)
    model, _ = om.load(path, **options)
    assert om.plan(path, **options).weights_bytes == bytes_in_memory(model)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 255, 256, 257, 700])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_keys_and_values_are_known_to_the_byte(small, num_tokens, kv_bits):
    model, _ = om.load(small, dtype="float32")
    cache = model.make_cache(kv_bits=kv_bits)
    model(mx.zeros((1, num_tokens), mx.int32), cache=cache)  # whose logits nobody computes
    mx.eval([layer.buffers for layer in cache])
    predicted = kv_cache_bytes(model.spec, num_tokens, 4, kv_bits=kv_bits)
    assert predicted == sum(layer.nbytes for layer in cache)


def test_the_released_sizes_to_the_byte(sparse):
    plan = om.plan(sparse["20b"], machine=find_mac("M3 Max 64GB"))
    # The published total, plus what is float32 in memory: norms and routers.
    assert plan.weights_bytes == 13_761_264_768 + 282_240 + 4_425_216
    assert plan.kv_cache_bytes == 8192 * 24_576 + 3_145_728
    assert plan.fits
    assert plan.expert_slots is None
    assert (
        om.plan(sparse["20b"], machine=find_mac("M3 Max 64GB"), context_length=131072).kv_cache_bytes == 3_224_371_200
    )
    plan = om.plan(sparse["120b"], machine=find_mac("M3 Ultra 256GB"))
    assert plan.weights_bytes == 65_248_815_744 + 420_480 + 26_551_296


def test_a_20b_on_a_16_gb_mac_keeps_some_experts_on_disk(sparse):
    plan = om.plan(sparse["20b"], mac="M4 16GB")
    assert plan.fits
    assert 16 <= plan.expert_slots < 32
    assert plan.process_bytes <= 12_713_120_000
    with_8_bits = om.plan(sparse["20b"], mac="M4 16GB", dense_bits=8)
    assert with_8_bits.expert_slots is None or with_8_bits.expert_slots > plan.expert_slots


def test_more_memory_never_gives_less(sparse):
    for size, folder in sparse.items():
        looked_at, machine, slots = Planned.look(folder, None, None), find_mac("M3 Max 128GB"), []
        for limit in range(6, 80, 4):
            plan = looked_at.plan(machine, None, memory_limit=f"{limit}GB")
            slots.append(-1 if not plan.fits else 1000 if plan.expert_slots is None else plan.expert_slots)
            if plan.fits:
                assert plan.process_bytes <= limit * 10**9, (size, limit)
        assert slots == sorted(slots)
        assert len(set(slots)) > 3


def test_every_mac_has_a_plan(sparse):
    machines = list(macs())
    for machine, plan in zip(machines, plans_on(machines, sparse["20b"]), strict=True):
        assert plan.fits == (plan.process_bytes <= machine.available_bytes)
        assert plan.decode_tps is None or 0.5 < plan.decode_tps < 200


def test_what_was_asked_for_is_kept_or_refused_and_never_changed(sparse):
    plan = om.plan(sparse["20b"], mac="M4 16GB", expert_slots=32, context_length=131072, prefill_chunk=2048)
    assert not plan.fits
    assert (plan.expert_slots, plan.context_length, plan.prefill_chunk) == (32, 131072, 2048)
    assert {change.setting.split("=")[0] for change in plan.changes} >= {"expert_slots"}
    message = str(plan.refusal())
    assert "131,072 tokens" in message
    assert "12.71 GB are allowed" in message


def test_the_longest_context_is_the_longest(sparse):
    plan = om.plan(sparse["20b"], mac="M1 Max 32GB", context_length=4096)
    longest = plan.max_context_length
    assert longest == 131072 or not om.plan(sparse["20b"], mac="M1 Max 32GB", context_length=longest + 256).fits
    tight = om.plan(sparse["20b"], mac="M4 24GB", memory_limit="14.6GB", expert_slots=32)
    assert om.plan(
        sparse["20b"], mac="M4 24GB", memory_limit="14.6GB", expert_slots=32, context_length=tight.max_context_length
    ).fits


# --- loading by it ---


def test_loading_within_a_limit_streams_experts_and_says_the_same(small):
    """In a process of its own: the limit counts everything in the process, other tests' models too."""
    script = (
        "import sys, openelm_mlx as om\n"
        "whole, _ = om.load(sys.argv[1])\n"
        "assert whole.plan.expert_slots is None\n"
        "prompt = [(7 * i) % 300 for i in range(40)]\n"
        "tokens = lambda model: [chunk.token for chunk in om.stream_generate(model, None, prompt, max_tokens=8)]\n"
        "expected = tokens(whole)\n"
        "del whole\n"
        "limit = om.plan(sys.argv[1], prefill_chunk=16).process_bytes - 20_000\n"
        "model, _ = om.load(sys.argv[1], memory_limit=limit)\n"
        "assert 2 <= model.plan.expert_slots < 8 and model.residency is not None\n"
        "assert tokens(model) == expected\n"
        "print(model.plan.expert_slots)\n"
    )
    finished = subprocess.run([sys.executable, "-c", script, str(small)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_limit_below_the_least_names_it(small, capsys):
    least = om.plan(small).least_bytes
    with pytest.raises(MemoryLimitError, match=r"does not fit.*MB.*at least"):
        om.load(small, memory_limit=least // 2)
    om.load(small, memory_limit=least, context_length=256)
    assert main(["generate", "--model", "demo-openelm", "-p", "hi", "--memory-limit", "20MB"]) == 2
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10GB", 10**10),
        ("1.5 GiB", 3 * 2**29),
        ("800mb", 8 * 10**8),
        (5 * 10**6, 5 * 10**6),
        (None, None),
        ("8G", 8 * 10**9),
        ("8g", 8 * 10**9),
        ("8GB", 8 * 10**9),
        ("8gb", 8 * 10**9),
        ("8GiB", 2**33),
        ("8Gi", 2**33),
        ("8 gib", 2**33),
        (" 8 G ", 8 * 10**9),
        ("1T", 10**12),
        ("1TiB", 2**40),
        ("512M", 512 * 10**6),
        ("512MiB", 2**29),
        ("900000K", 9 * 10**8),
        ("8.G", 8 * 10**9),
        (".5GB", 5 * 10**8),
        ("8000000000", 8 * 10**9),
        ("2000000B", 2 * 10**6),
        ("2000000 bytes", 2 * 10**6),
        (8e9, 8 * 10**9),
    ],
)
def test_sizes(text, number):
    assert parse_memory(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "0GB",
        "-1",
        "10 XB",
        "",
        "GB",
        0,
        -5,
        True,
        [],
        "1e5GB",
        "inf",
        "8 G B",
        "0.1B",
        "\u0668GB",
        b"8GB",
        float("nan"),
    ],
)
def test_sizes_that_are_none(text):
    with pytest.raises(SettingError, match="memory_limit"):
        parse_memory(text)


@pytest.mark.parametrize("number", ["8", 8, "8.5", 16.0, "512", "123", 5000])
def test_bytes_that_nobody_means_are_questioned(number):
    with pytest.raises(SettingError, match=r'which means [\d.,]+ bytes: did you mean "[\d.]+GB"\?'):
        parse_memory(number)
    with pytest.raises(SettingError, match="did you mean"):
        om.plan("demo-gpt-oss", memory_limit=number)
    with pytest.raises(SettingError, match="did you mean"):
        om.load("demo-gpt-oss", memory_limit=number)


def test_bytes_that_nobody_means_are_questioned_on_the_command_line(capsys):
    for command in (["plan", "demo-gpt-oss"], ["generate", "--prompt", "x"], ["chat"]):
        assert main([*command, "--memory-limit", "8"]) == 2
        assert "8 bytes: did you mean" in capsys.readouterr().err


# --- the command ---


def test_the_command_says_it_all(sparse, capsys):
    assert main(["plan", str(sparse["20b"]), "--mac", "M4 16GB"]) == 0
    out = capsys.readouterr().out
    for word in (
        "weights",
        "keys and values",
        "longest context",
        "read from disk",
        "never measured: run plan --calibrate on a Mac",
    ):
        assert word in out
    assert main(["plan", str(sparse["120b"]), "--mac", "M1 8GB"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "would fit" in out
    assert main(["plan", "demo-openelm", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["total_bytes"] == plan["weights_bytes"] + plan["kv_cache_bytes"] + plan["scratch_bytes"]


def test_the_table_and_the_chart(sparse, tmp_path, capsys):
    assert main(["plan", str(sparse["20b"]), "demo-openelm", "--all-macs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [each.name for each in macs()] == [
        line[:14].strip() for line in lines if line[:1] == "M" and "GB" in line[:14]
    ]
    assert main(["plan", str(sparse["20b"]), "--chart", str(tmp_path / "chart.png")]) == 0
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "options",
    [["--mac", "M9"], ["--memory-limit", "0GB"], ["--context-length", "999999999"], ["--batch-size", "0"], ["--kv-bits", "5"],
     ["--dense-bits", "7"], ["--expert-slots", "3"], ["--chart", "chart.pdf"], ["nothing/here/at/all"]],
)  # fmt: skip
def test_mistakes_are_sentences(options, capsys):
    assert main(["plan", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1


def test_a_repository_is_planned_from_its_headers(hub, small):
    files = {file.name: file for file in small.iterdir()}
    hub.add_repo("openai/gpt-oss-small", files)
    plan = om.plan("openai/gpt-oss-small")
    assert plan.weights_bytes == om.plan(small).weights_bytes
    assert hub.sent("model.safetensors") <= 1 << 16


def test_the_spec_needs_no_checkpoint():
    spec = spec_from_config(released_gpt_oss_config("20b"))
    assert kv_cache_bytes(spec, 131072, 2) == 3_224_371_200


# --- without the Hub ---

# As in memory: of gpt-oss routers and norms are float32 there, and the files have some thousandths less.
RELEASED_BYTES = {
    "openai/gpt-oss-20b": 13_765_972_224, "openai/gpt-oss-120b": 65_275_787_520, "apple/OpenELM-270M": 543_054_336,
    "apple/OpenELM-450M-Instruct": 914_358_272, "apple/OpenELM-1_1B": 2_159_782_912, "apple/OpenELM-3B-Instruct": 6_073_294_848,
}  # fmt: skip


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.mark.parametrize("repo", RELEASED_BYTES)
def test_released_models_are_planned_without_the_hub(repo, no_hub):
    plan = om.plan(repo, mac="M3 Ultra 256GB")
    assert plan.weights_bytes == RELEASED_BYTES[repo]
    assert any(f"sizes that {repo} was released with" in note for note in plan.machine.notes)


@pytest.mark.parametrize("options", [{"revision": "abc"}, {}])
def test_other_names_and_other_versions_need_it(options, no_hub):
    name = "openai/gpt-oss-20b" if options else "someone/gpt-oss-20b"
    with pytest.raises(om.errors.HubError):
        om.plan(name, **options)


def test_a_table_of_all_macs_looks_at_a_source_once(monkeypatch, sparse, capsys):
    from openelm_mlx.sources import Source

    seen, real = [], Source.open
    monkeypatch.setattr(Source, "open", staticmethod(lambda *a, **k: seen.append(a) or real(*a, **k)))
    assert main(["plan", str(sparse["20b"]), "--all-macs"]) == 0
    assert len(seen) == 1
    assert len(capsys.readouterr().out.splitlines()) > 50


# --- the chunk ---


def planned(config, machine, **request):
    spec = spec_from_config(config)
    weights = Weights(dense=2 * spec.num_parameters())
    return make_plan("m", spec, weights, machine, PlanRequest(**request), 2)


def test_a_chunk_is_as_long_as_it_costs_little_memory():
    mac = find_mac("M4 Max 64GB")
    chunks = {
        name: planned(shape_config(name), mac).prefill_chunk for name in ("openelm-270m", "openelm-3b", "gpt-oss-20b")
    }
    assert chunks == {"openelm-270m": 256, "openelm-3b": 1024, "gpt-oss-20b": 2048}  # of the latter in 16 bits: 42 GB
    assert planned({**shape_config("openelm-270m", 4), "vocab_size": 512}, mac).prefill_chunk == 64
    for name in chunks:
        plan = planned(shape_config(name), mac)
        assert plan.scratch_bytes <= 0.07 * plan.total_bytes


def test_a_chunk_that_was_asked_for_stays_and_the_cpu_takes_no_longer_ones():
    assert planned(shape_config("openelm-3b"), find_mac("M4 Max 64GB"), prefill_chunk=2048).prefill_chunk == 2048
    here = replace(find_mac("M4 Max 64GB"), backend="cpu")
    assert planned(shape_config("openelm-3b"), here).prefill_chunk == 512


@pytest.mark.parametrize(
    ("name", "mac", "limit"), [("20b", "M4 16GB", "8GB"), ("20b", "M4 16GB", None), ("120b", "M3 Max 36GB", None)]
)
def test_chunks_and_slots_share_memory_so_that_a_usual_request_is_fast(sparse, name, mac, limit):
    """No other chunk, with the slots that it leaves, takes less for 2,048 tokens of a prompt and 256 of an answer."""
    chosen = om.plan(sparse[name], mac=mac, memory_limit=limit)
    num_layers, num_experts, rate = (24, 32, 366) if name == "20b" else (36, 128, 355)
    disk = find_mac(mac).ssd_bandwidth

    def seconds(plan):
        compute, absent = 2048 / rate, (num_experts - plan.expert_slots) * num_layers * 13_219_200 / disk
        prompt = max(compute, 2048 // plan.prefill_chunk * absent)
        return prompt + 256 * 4 / num_experts * absent

    for chunk in (64, 128, 256, 512, 1024, 2048):
        other = om.plan(sparse[name], mac=mac, memory_limit=limit, prefill_chunk=chunk)
        if other.fits:
            assert seconds(chosen) <= 1.05 * seconds(other)
    assert chosen.prefill_chunk == 2048 if name == "120b" else chosen.prefill_chunk <= 1024
    if name == "120b":  # reading takes longer than computing
        absent = (128 - chosen.expert_slots) * num_layers * 13_219_200
        # Each chunk reads all that is absent: by the slowest disk that may be, and no faster than the products allow.
        least = min(2048 / (absent / find_mac(mac).ssd[0]), 200)
        assert chosen.prefill.low == rounded(least)


def test_what_a_cast_takes_while_loading_counts(monkeypatch):
    """A large bf16 matrix that becomes float32 is there twice for a moment, on the CPU backend."""
    spec = spec_from_config(shape_config("openelm-270m"))
    here = replace(find_mac("M4 Max 64GB"), backend="cpu")
    plans = [make_plan("m", spec, Weights(dense=10**9, loading=n), here, PlanRequest(), 2) for n in (0, 2 * 10**9)]
    assert plans[1].process_bytes - plans[0].process_bytes == 2 * 10**9 - plans[0].total_bytes
    assert plans[1].total_bytes == plans[0].total_bytes


# --- advice that holds ---


def test_a_change_that_is_advised_does_fit(sparse, small):
    """Each change is planned as it would be done: what stays on disk is not saved twice, what is packed already not at all."""
    mac = find_mac("M1 8GB")
    tight = om.plan(sparse["20b"], machine=mac, memory_limit="3GB")
    assert not any("dense_bits" in change.setting for change in tight.changes)
    packed = om.plan("demo-openelm", machine=mac, memory_limit="370MB")
    assert not packed.fits
    assert not any("dense_bits" in change.setting for change in packed.changes)
    plain = om.plan(sparse["20b"], machine=mac, memory_limit="12.8GB", expert_slots=32)
    (change,) = [each for each in plain.changes if "dense_bits" in each.setting]
    again = om.plan(
        sparse["20b"],
        machine=mac,
        memory_limit="12.8GB",
        expert_slots=32,
        dense_bits=8,
        prefill_chunk=plain.prefill_chunk,
    )
    assert again.fits
    assert again.total_bytes == change.total_bytes


@pytest.mark.parametrize("limit", [1e-9, 0.4, 0])
def test_less_than_a_byte_is_no_limit(limit):
    with pytest.raises(SettingError, match="bytes above 0"):
        om.plan("demo-openelm", memory_limit=limit)


@pytest.mark.parametrize(
    "options",
    [["--calibrate", "--all-macs"], ["--calibrate", "--mac", "M1 8GB"], ["--mac", "M1 8GB", "--all-macs"]],
)
def test_options_that_exclude_each_other(options, capsys):
    assert main(["plan", "demo-openelm", *options]) == 2
    assert "leave" in capsys.readouterr().err
