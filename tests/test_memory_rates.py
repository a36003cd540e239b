"""Predicted speeds held to what people have published, and what a plan makes of them."""

import json
import statistics
from dataclasses import replace

import pytest

from openelm_mlx.bench.random_pair import shape_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.memory.chips import CHIPS, DECODE_TERMS, PREFILL_TERMS, chip_of, decode_terms, generation
from openelm_mlx.memory.machine import find_mac, macs
from openelm_mlx.memory.plan import make_plan
from openelm_mlx.memory.plan_types import PlanRequest, Weights
from openelm_mlx.memory.rates import (
    SpeedRange,
    number,
    prefill_seconds,
    published_basis,
    published_speeds,
    rates_of,
    rounded,
)
from openelm_mlx.specs import spec_from_config

SPECS = {size: spec_from_config(released_gpt_oss_config(size)) for size in ("20b", "120b")}
OPENELM = spec_from_config(shape_config("openelm-3b"))
ROWS = published_speeds()


def machine_of(row):
    chip = chip_of(row.chip, row.memory_gb, row.cores)
    like = next(each for each in macs() if each.chip == row.chip)
    return replace(like, bandwidth=chip.bandwidth * 1e9, flops=chip.teraflops * 1e12)


def predicted(row):
    """Tokens/s by the terms alone, without the range around them."""
    spec = SPECS.get(row.model, OPENELM)
    ring = sum(layer.kv_bytes_per_token() * (layer.window or 0) for layer in spec.layers)
    rates = rates_of(machine_of(row), spec)
    seconds = rates.decode_seconds(row.layers, row.gigabytes * 1e9, row.kv_bytes_per_token * row.tokens + ring)
    return 1 / seconds


def errors(rows):
    return [abs(predicted(row) / row.rate - 1) for row in rows]


def decoding(family, trust="AB"):
    return [row for row in ROWS if (row.what, row.family) == ("decode", family) and row.trust in trust]


def test_decode_is_held_to_every_published_run_on_pro_max_and_ultra_chips():
    rows = [row for row in decoding("gpt_oss") if " " in row.chip]
    found = errors(rows)
    assert len(rows) == 49
    assert statistics.median(found) <= 0.08
    assert max(found) <= 0.25


def test_what_one_share_of_the_bandwidth_would_say_is_not_good_enough():
    """The test above has something to find: the formula of before misses M1 Ultra by two thirds."""
    rows = [row for row in decoding("gpt_oss") if " " in row.chip]
    old = [
        abs(1 / (row.gigabytes * 1e9 / (0.45 * machine_of(row).bandwidth) + 50e-6 * row.layers) / row.rate - 1)
        for row in rows
    ]
    assert statistics.median(old) > 0.12
    assert max(old) > 0.5


def test_other_dense_models_on_the_same_chips():
    rows = [row for row in decoding("dense") if row.engine in ("MLX", "mlx-lm")]
    found = sorted(errors(rows))
    assert len(rows) > 30
    assert statistics.median(found) <= 0.08
    assert found[-2] <= 0.25  # the last one is a model of 0.5 B behind a server


@pytest.mark.parametrize("family", ["gpt_oss", "dense"])
def test_the_range_is_where_published_runs_are(family):
    inside, rows = 0, decoding(family)
    for row in rows:
        rates = rates_of(machine_of(row), SPECS.get(row.model, OPENELM), 8)
        fit = predicted(row)
        inside += rates.low * fit <= row.rate <= rates.high * fit
    assert inside >= 0.85 * len(rows)


def test_weak_sources_are_kept_apart_and_lie_below():
    rows = decoding("gpt_oss", "C")
    assert len(rows) >= 7
    for row in rows:
        assert row.rate < 1.0 * predicted(row)
    assert published_basis("M4", SPECS["20b"], 8) == "no run"  # M4 has weak ones only


def test_a_prompt_s_range_is_where_mlx_s_published_runs_are():
    rows = [row for row in ROWS if row.what == "prefill" and row.trust != "C" and "MLX" in row.engine.upper()]
    inside = 0
    for row in rows:
        slow, fast = prefill_seconds(SPECS[row.model], rates_of(machine_of(row), SPECS[row.model]), row.tokens, 2048, 0)
        inside += 0.97 * row.tokens / slow <= row.rate <= 1.03 * row.tokens / fast
    assert len(rows) >= 17
    assert inside >= len(rows) - 1


def test_attention_s_share_grows_with_length():
    rates = rates_of(find_mac("M4 Max 128GB"), SPECS["20b"])
    slow = [n / prefill_seconds(SPECS["20b"], rates, n, 2048, 0)[0] for n in (512, 8192, 32768, 131072)]
    assert slow == sorted(slow, reverse=True)
    assert slow[-1] < 0.5 * slow[0]


def test_every_row_is_whole():
    for row in ROWS:
        assert row.chip in CHIPS
        assert row.what in ("decode", "prefill")
        assert row.trust in ("A", "B", "C")
        assert row.rate > 0
        assert row.source
        assert row.family in ("gpt_oss", "dense")
        assert row.gigabytes > 0


def test_every_chip_has_terms_for_both_families():
    for chip in CHIPS:
        assert generation(chip) in PREFILL_TERMS
        for family in ("gpt_oss", "openelm"):
            terms = decode_terms(family, chip)
            assert 0 < terms.keys_values <= terms.weights < 0.9  # 0.89 is the most that anybody has reached
    assert decode_terms("gpt_oss", "M1 Ultra") == DECODE_TERMS["gpt_oss", "M1 Ultra"]
    assert decode_terms("gpt_oss", "M9") is None


# --- in a plan ---


def weights_of(size, bits=16):
    spec = SPECS[size]
    experts = sum(layer.num_experts * layer.parameters_per_expert(spec.hidden_size) for layer in spec.layers)
    per_weight = {16: 2.0, 8: 1.0625, 4: 0.5625}[bits]
    dense = int((spec.num_parameters() - experts) * per_weight)
    embedding = int(spec.vocab_size * spec.hidden_size * per_weight)
    return Weights(dense, len(spec.layers) * 13_219_200, embedding, True, untied_embedding=embedding)


def planned(size, mac, bits=16, **request):
    return make_plan(size, SPECS[size], weights_of(size, bits), find_mac(mac), PlanRequest(**request))


@pytest.mark.parametrize(
    ("mac", "size", "tokens", "published"),
    [("M4 Max 128GB", "20b", 329, 121.0), ("M4 Max 128GB", "120b", 21504, 58.3), ("M5 Max 128GB", "20b", 21504, 105.9),
     ("M1 Pro 32GB", "20b", 16384, 33.9), ("M4 Pro 24GB", "20b", 300, 66.5), ("M4 Max 36GB", "20b", 8192, 82.5)],
)  # fmt: skip
def test_a_plan_of_what_was_published_has_it_in_its_range(mac, size, tokens, published):
    plan = planned(size, mac, bits=8, context_length=tokens)
    assert plan.fits
    assert plan.expert_slots is None
    assert plan.decode.low <= published <= plan.decode.high
    assert (plan.decode.tokens, plan.decode.basis) == (tokens, "published")


def test_what_a_plan_rests_on():
    for mac, bits, basis in [
        ("M4 Max 128GB", 8, "published"), ("M4 Max 128GB", 16, "related"), ("M5 Pro 48GB", 8, "no run"),
        ("M4 32GB", 8, "no run"), ("M1 Ultra 64GB", 4, "published"), ("M1 Ultra 64GB", 8, "related"),
    ]:  # fmt: skip
        assert planned("20b", mac, bits).decode.basis == basis, mac
    assert planned("120b", "M3 Max 36GB", 8).decode.basis == "no run"  # from a disk nobody has


def test_base_chips_have_a_middle_of_four_fifths_and_unknown_ones_a_wider_range():
    base, pro, unknown = (rates_of(find_mac(mac), SPECS["20b"], 8) for mac in ("M5 24GB", "M4 Pro 24GB", "M5 Pro 24GB"))
    assert (base.low + base.high) / 2 == pytest.approx(0.8, abs=0.03)
    assert unknown.low < pro.low
    assert unknown.high >= pro.high
    plan = planned("20b", "M5 24GB", 8, context_length=1024)
    assert plan.decode.low <= 32.6 <= plan.decode.high  # the one published run


def test_longer_contexts_are_slower_and_eight_bits_faster():
    for mac in ("M1 Pro 32GB", "M4 Pro 48GB", "M3 Ultra 256GB"):
        plans = [planned("20b", mac, context_length=n) for n in (1, 8192, 32768, 131072)]
        highs = [plan.decode.high for plan in plans]
        assert highs == sorted(highs, reverse=True)
        assert all(plan.decode.low < plan.decode_at_start.high for plan in plans)
    loss = 1 - planned("20b", "M1 Pro 32GB", 8, context_length=8192).decode_tps / (
        planned("20b", "M1 Pro 32GB", 8, context_length=1).decode_tps
    )
    assert 0.1 < loss < 0.2
    for mac, least, most in [("M1 Pro 32GB", 1.25, 1.45), ("M4 Pro 48GB", 1.25, 1.45), ("M3 Ultra 256GB", 1.1, 1.3)]:
        eight, whole = (planned("20b", mac, bits, context_length=512).decode_tps for bits in (8, 16))
        assert least < eight / whole < most


def test_an_embedding_of_which_one_row_is_read_costs_no_time():
    spec, weights = SPECS["20b"], weights_of("20b")
    held = replace(weights, can_stream=False, embedding=0)
    plans = [
        make_plan("m", spec, each, find_mac("M4 Max 64GB"), PlanRequest(context_length=512)) for each in (weights, held)
    ]
    assert plans[0].decode == plans[1].decode
    assert (
        plans[0].decode.high
        > make_plan(
            "m", spec, replace(held, untied_embedding=0), find_mac("M4 Max 64GB"), PlanRequest(context_length=512)
        ).decode.high
    )


def test_what_is_not_known_is_none():
    here = replace(find_mac("M4 16GB"), chip="M9", name="M9 16GB")
    plan = make_plan("m", SPECS["20b"], weights_of("20b"), here, PlanRequest())
    assert (plan.decode, plan.prefill, plan.decode_tps) == (None, None, None)
    json.dumps(plan.as_dict())


def test_numbers_have_two_digits():
    assert [number(each) for each in (0.0567, 0.57, 9.44, 9.96, 46.7, 104, 1349, 12345.0)] == [
        "0.057", "0.57", "9.4", "10", "47", "100", "1,300", "12,000"
    ]  # fmt: skip
    assert str(SpeedRange(rounded(46.7), rounded(47.2), 5, "measured")) == "47"
    assert number(2.0) == "2.0"
    assert str(SpeedRange(0.8, 15.0, 5, "published")) == "0.80 to 15"
    found = SpeedRange.of(46.72, 51.31, 5, "published")
    assert (found.low, found.high, found.middle) == (47, 51, 49)
    assert "fit" not in found.as_dict()
