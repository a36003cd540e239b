"""Several requests at once in a plan: how many fit, how long each may be, how fast they are, and how they are refused."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

import openelm_mlx as om
from openelm_mlx.bench.against import shape_config
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands import main
from openelm_mlx.decoding import prefix_cache
from openelm_mlx.loading import prepare
from openelm_mlx.memory import plan as plan_module
from openelm_mlx.memory.cache_bytes import CacheBytes
from openelm_mlx.memory.machine import find_mac
from openelm_mlx.memory.measured import Calibration, MeasuredRates
from openelm_mlx.memory.plan import make_plan
from openelm_mlx.memory.plan_types import PlanRequest, Weights
from openelm_mlx.specs import spec_from_config

SPECS = {
    "20b": spec_from_config(released_gpt_oss_config("20b")),
    "120b": spec_from_config(released_gpt_oss_config("120b")),
    "3B": spec_from_config(shape_config("openelm-3b")),
}
SLOT = {"20b": 317_260_800, "120b": 475_891_200}
# Bytes of the released weights; of OpenELM-3B those of its matrices in 8 bits.
WEIGHTS = {
    "20b": Weights(
        dense=3_613_626_624, slot=SLOT["20b"], embedding=1_158_266_880, untied_embedding=1_158_266_880, can_stream=True
    ),
    "120b": Weights(
        dense=4_361_714_000, slot=SLOT["120b"], embedding=1_158_266_880, untied_embedding=1_158_266_880, can_stream=True
    ),
    "3B": Weights(dense=3_230_000_000),
}
MACHINES = {
    "20b on 16 GB": ("20b", "M4 16GB"), "20b on 24 GB": ("20b", "M4 Pro 24GB"), "120b on 64 GB": ("120b", "M4 Max 64GB"),
    "3B on 8 GB": ("3B", "M1 8GB"),
}  # fmt: skip


def planned(name, machine, weights=None, **request):
    machine = find_mac(machine) if isinstance(machine, str) else machine
    weights = WEIGHTS[name] if weights is None else weights
    return make_plan(name, SPECS[name], weights, machine, PlanRequest(**request), with_requests=True)


def same(name, mac, plan, **request):
    """With the settings of a plan, other requests."""
    settings = {"expert_slots": plan.expert_slots, "prefill_chunk": plan.prefill_chunk}
    weights = replace(WEIGHTS[name], can_stream=plan.expert_slots is not None)
    return planned(name, mac, weights, **settings, **{"context_length": plan.context_length, **request})


@pytest.mark.parametrize("case", MACHINES)
def test_so_many_fit_as_the_table_says_and_no_more(case):
    name, mac = MACHINES[case]
    plan = planned(name, mac, batch_size=4)
    assert plan.fits
    assert plan.kv_cache_bytes == 4 * CacheBytes(SPECS[name], 2).total(plan.context_length)
    assert (plan.expert_slots is not None) == (case in ("20b on 16 GB", "120b on 64 GB"))
    lengths = [fit.num_tokens for fit in plan.requests.lengths]
    assert lengths == ([1024, 2048] if name == "3B" else [1024, 2048, 8192, 32768])
    for fit in plan.requests.lengths:
        assert fit.most >= 1
        assert same(name, mac, plan, batch_size=fit.most, context_length=fit.num_tokens).fits
        assert not same(name, mac, plan, batch_size=fit.most + 1, context_length=fit.num_tokens).fits
    counts = [fit.most for fit in plan.requests.lengths]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("case", MACHINES)
def test_each_of_those_asked_for_may_be_so_long_and_one_of_them_longer(case):
    name, mac = MACHINES[case]
    spec = SPECS[name]
    plan = planned(name, mac, batch_size=6)
    found = plan.requests
    assert found.longest == plan.max_context_length >= plan.context_length
    assert same(name, mac, plan, batch_size=6, context_length=found.longest).fits
    if found.longest < spec.context_length:
        assert not same(name, mac, plan, batch_size=6, context_length=found.longest + 1).fits
    mixture = found.mixture
    assert mixture.num_others == 5
    assert spec.context_length >= mixture.longest >= found.longest
    # By hand: everything but keys and values is that of six long ones.
    caches, long = CacheBytes(spec, 2), same(name, mac, plan, batch_size=6, context_length=mixture.longest)
    used = long.process_bytes - long.kv_cache_bytes + caches.total(mixture.longest) + 5 * caches.total(mixture.others)
    assert used <= plan.memory_limit
    assert (
        mixture.longest == spec.context_length
        or used + 36 * 2**20 + caches.total(mixture.longest) // 4 > plan.memory_limit
    )


def test_one_request_is_planned_as_before_and_has_no_mixture():
    plan = planned("20b", "M4 Pro 24GB")
    assert plan.kv_cache_bytes == 8192 * 24_576 + 3_145_728
    assert plan.batch_size == plan.requests.num_requests == 1
    assert plan.requests.mixture is None
    assert plan.requests.decode == plan.requests.alone == plan.decode


def test_requests_share_what_a_pass_takes():
    """Each has its keys and values; a chunk of one prompt beside the others' tokens is computed once."""
    one, four = (planned("20b", "M4 Pro 24GB", batch_size=n, prefill_chunk=512) for n in (1, 4))
    assert four.kv_cache_bytes == 4 * one.kv_cache_bytes
    assert one.scratch_bytes <= four.scratch_bytes < 1.1 * one.scratch_bytes


@pytest.mark.parametrize("name", ["20b", "3B"])
def test_on_cuda_scores_beside_others_are_planned_and_make_no_chunk_shorter(name):
    """A chunk of 32 tokens would read all weights sixteen times as often as one of 512, for the same block of scores."""
    here = replace(find_mac("M4 Max 128GB"), backend="cuda")
    one, eight = (planned(name, here, batch_size=n) for n in (1, 8))
    assert eight.prefill_chunk >= one.prefill_chunk >= 256
    assert eight.scratch_bytes > one.scratch_bytes + 4 * 10**8


def test_a_shorter_context_comes_before_experts_on_disk_where_nobody_asked_for_one():
    plan = planned("20b", "M4 Pro 24GB", batch_size=32)
    assert (plan.context_length, plan.expert_slots) == (4096, None)
    asked = planned("20b", "M4 Pro 24GB", batch_size=32, context_length=8192)
    assert asked.context_length == 8192
    assert asked.expert_slots < 32
    assert planned("20b", "M4 Pro 24GB", batch_size=2).context_length == 8192


# --- speed ---


def bytes_alone(name="M4 Max 64GB", scale=1e9):
    """A machine that does nothing but read: `scale` bytes a second."""
    rates = MeasuredRates(layer_seconds=0.0, weights=scale, keys_values=scale)
    here = replace(find_mac(name), name="reader", chip="")
    return replace(
        here, calibration=Calibration({}, rates={"gpt_oss": rates, "openelm": rates}, speed_date="2026-11-29")
    )


@pytest.mark.parametrize(("rows", "gigabytes"), [(1, 3.91), (2, 5.2), (4, 7.5), (8, 10.7), (16, 14.7), (32, 19.0)])
def test_a_step_of_many_rows_reads_the_bytes_of_its_different_experts(rows, gigabytes):
    """gpt-oss-20b at 8k each, calculated beside (with the dense parts in 16 bits)."""
    found = planned("20b", bytes_alone(), batch_size=rows, context_length=8192, memory_limit=50 * 10**9).requests
    # The fast end is a tenth above the middle of what was measured.
    assert 1.1 * rows / found.decode_total.high == pytest.approx(gigabytes, rel=0.05)
    assert 1.1 / found.decode.high == pytest.approx(gigabytes, rel=0.05)
    assert found.decode_total.low <= found.decode_total.high
    again = 0.9 * rows / found.decode_total.low  # rows that share an expert may read it again
    assert gigabytes * 0.95 <= again <= 1.5 * gigabytes


@pytest.mark.parametrize("case", MACHINES)
def test_more_requests_are_faster_in_all_and_slower_each(case):
    name, mac = MACHINES[case]
    base = planned(name, mac, batch_size=8, context_length=1024)
    found = [same(name, mac, base, batch_size=n).requests for n in (1, 2, 4, 8)]
    for fewer, more in pairwise(found):
        assert more.decode_total.fit > fewer.decode_total.fit
        assert more.decode.fit < fewer.decode.fit
        assert more.alone == fewer.alone == found[0].decode
    assert found[3].decode_total.fit < 8 * found[0].decode.fit


def test_many_rows_are_bound_by_their_products():
    rates = MeasuredRates(layer_seconds=0.0, weights=1e15, keys_values=1e15, products=2e12)
    here = replace(bytes_alone(), calibration=Calibration({}, rates={"openelm": rates}))
    plan = planned("3B", here, batch_size=64, context_length=256)
    most = 2e12 / (2 * SPECS["3B"].num_active_parameters())
    assert plan.requests.decode_total.high == pytest.approx(1.1 * most, rel=0.05)


def test_experts_on_disk_cost_what_the_rows_choose():
    plan = planned("120b", "M4 Max 64GB", batch_size=4)
    reads, alone = plan.requests.reads, plan.requests.reads_alone
    assert (reads.rows, alone.rows) == (4, 1)
    assert alone.touched == pytest.approx(4)
    assert reads.touched == pytest.approx(128 * (1 - (1 - 4 / 128) ** 4))
    for each in (reads, alone):
        missing = each.touched * (1 - plan.expert_slots / 128)
        assert each.missing == pytest.approx(missing)
        assert each.num_bytes == pytest.approx(missing * SLOT["120b"], rel=1e-6)
        assert each.slow == pytest.approx(each.num_bytes / plan.machine.ssd[0], rel=1e-6)
        assert each.fast < each.slow
    assert planned("20b", "M4 Pro 24GB", batch_size=4).requests.reads is None


def test_more_requests_leave_fewer_experts_in_memory():
    slots = [planned("20b", "M4 16GB", batch_size=n, context_length=8192).expert_slots for n in (1, 4, 8)]
    assert slots == sorted(slots, reverse=True)
    assert slots[2] < slots[0]


def test_the_buffers_that_mlx_keeps_have_the_logits_of_all_rows():
    assert planned("20b", "M4 Max 64GB", batch_size=4).cache_limit_bytes == 256 * 2**20
    many = planned("20b", "M4 Max 64GB", batch_size=128, context_length=1024)
    assert many.cache_limit_bytes == 3 * 4 * 201_088 * 128
    assert many.process_bytes - many.total_bytes >= many.cache_limit_bytes


def test_kept_prompts_have_what_is_left_and_no_more_than_a_prefix_cache():
    assert prefix_cache.MAX_BYTES == plan_module.KEPT_BYTES
    roomy = planned("20b", "M4 Max 64GB", batch_size=2)
    assert roomy.requests.kept_bytes == plan_module.KEPT_BYTES
    full = planned("20b", "M4 Pro 24GB", batch_size=20, prefill_chunk=1024, context_length=8192)
    assert full.requests.kept_bytes == full.memory_limit - full.process_bytes < 300_000_000


# --- refusals ---


@pytest.mark.parametrize(("case", "count"), [("20b on 24 GB", 60), ("3B on 8 GB", 40)])
def test_too_many_are_refused_with_what_would_fit(case, count):
    name, mac = MACHINES[case]
    plan = planned(name, mac, batch_size=count, context_length=2048, expert_slots=32 if name == "20b" else None)
    changes = {change.setting.split("=")[0]: change for change in plan.changes}
    if name == "20b":
        assert plan.fits  # 60 requests of 2k are what fits beside the weights there
        plan = planned(name, mac, batch_size=count, context_length=8192, expert_slots=32)
        changes = {change.setting.split("=")[0]: change for change in plan.changes}
    assert not plan.fits
    message = str(plan.refusal())
    assert f"keys and values of {count} requests of {plan.context_length:,} tokens" in message
    fewer = int(changes["batch_size"].setting.split("=")[1])
    assert f"batch_size={fewer} (at most {fewer} requests at once)" in message
    longest = int(changes["context_length"].setting.split("=")[1])
    assert f"at most {longest:,} tokens of prompt and answer each" in message
    asked = {"batch_size": count, "context_length": plan.context_length}
    for change in ({"batch_size": fewer}, {"context_length": longest}):
        assert same(name, mac, plan, **{**asked, **change}).fits
    assert not same(name, mac, plan, **{**asked, "batch_size": fewer + 1}).fits


def test_one_at_a_time_is_said_in_words():
    plan = planned("20b", "M4 Pro 24GB", batch_size=2, context_length=131072, expert_slots=32)
    assert not plan.fits
    assert any(change.setting == "batch_size=1" and change.cost == "one request at a time" for change in plan.changes)


# --- from outside ---


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    config = {
        **released_gpt_oss_config("20b"), "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 1024, "head_dim": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": 8, "eos_token_id": 3,
    }  # fmt: skip
    return write_random_gpt_oss(tmp_path_factory.mktemp("small") / "m", config)


def test_a_model_is_loaded_for_so_many_requests(small):
    """Slots of experts on disk are chosen with room for each one's keys and values."""
    limit = om.plan(small, prefill_chunk=16, context_length=300).process_bytes - 20_000
    plans = [prepare(small, memory_limit=limit, batch_size=n, context_length=300).model.plan for n in (1, 4)]
    assert [plan.batch_size for plan in plans] == [1, 4]
    one, four = (plan.expert_slots for plan in plans)
    assert four < one
    assert all(plan.process_bytes <= limit for plan in plans)
    with pytest.raises(om.errors.MemoryLimitError, match="requests of"):
        prepare(small, memory_limit=limit, batch_size=4000)
    model, _ = om.load(small, batch_size=3)
    assert model.plan.batch_size == 3
    assert om.plan(small, batch_size=3).kv_cache_bytes == model.plan.kv_cache_bytes


def test_the_command_says_how_many_fit_and_how_fast(small, capsys):
    command = ["plan", str(small), "--mac", "M4 16GB"]
    assert main([*command, "--requests", "4"]) == 0
    text = capsys.readouterr().out
    for part in (
        "for 4 requests of 8,192 tokens", "requests at once\n", "tokens each  fit at once", "tokens/s in all", "for each",
        "32,768", "(4 requests: each up to 131,072 tokens of prompt and answer; or one of up to 131,072 beside 3 others of",
        "(4 requests of 8,192 tokens: ", "tokens/s in all, ", "(prompts kept for later ones have up to 1.00 GB",
    ):  # fmt: skip
        assert part in text
    assert main([*command, "--batch-size", "4"]) == 0
    assert capsys.readouterr().out == text
    assert main(command) == 0
    assert "requests" not in capsys.readouterr().out
    assert main([*command, "--requests", "1"]) == 0
    text = capsys.readouterr().out
    assert "(one request: up to 131,072 tokens of prompt and answer)" in text
    assert main([*command, "--requests", "4", "--expert-slots", "3"]) == 0
    text = capsys.readouterr().out
    assert "requests at once, with 3 of each layer's experts in memory" in text
    assert "the next token of 4 requests chooses 5.5 of each layer's experts, of which 3.4 are not in memory" in text


def test_the_command_gives_it_to_machines(small, capsys):
    assert main(["plan", str(small), "--mac", "M4 16GB", "--requests", "4", "--expert-slots", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    found = plan["requests"]
    assert plan["batch_size"] == found["num_requests"] == 4
    assert found["longest"] == plan["max_context_length"]
    assert found["mixture"] == {"longest": 131072, "num_others": 3, "others": 2048}
    assert [each["num_tokens"] for each in found["lengths"]] == [1024, 2048, 8192, 32768]
    assert found["lengths"][0]["decode_total"]["high"] > found["lengths"][0]["decode"]["high"]
    assert found["reads"]["rows"] == 4
    assert found["reads_alone"]["touched"] == 2


def test_a_plan_that_does_not_fit_says_what_would_as_it_is_typed(small, capsys):
    least = om.plan(small, batch_size=1, context_length=256, mac="M1 8GB").process_bytes
    options = ["--mac", "M1 8GB", "--memory-limit", str(least), "--context-length", "2000", "--expert-slots", "8"]
    assert main(["plan", str(small), *options, "--requests", "4096"]) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "would fit         --context-length " in text or "would fit         --requests " in text
    assert main(["plan", str(small), "--requests", "0"]) == 2
    assert "--requests is 0: it must be a whole number, at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", str(small), "--requests", "four"])
    assert "--requests is 'four', which is not a whole number" in capsys.readouterr().err


def test_the_table_of_all_macs_is_as_it_was(small, capsys):
    assert main(["plan", str(small), "--all-macs"]) == 0
    alone = capsys.readouterr().out
    assert main(["plan", str(small), "--all-macs", "--requests", "1"]) == 0
    assert capsys.readouterr().out == alone
