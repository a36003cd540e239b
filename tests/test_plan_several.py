"""`plan --macs`: layers on machines, what each form reaches by its formula, and what a user may get wrong."""

import json
import re
from dataclasses import replace

import pytest

from openelm_mlx.commands import main
from openelm_mlx.commands.plan_several import lines
from openelm_mlx.errors import MemoryLimitError, SettingError
from openelm_mlx.link.forecast import LINKS, RDMA_SUM, most_of_one
from openelm_mlx.memory.machine import find_mac
from openelm_mlx.memory.rates import rates_of
from openelm_mlx.planning import plan_several

TWO = "M4 Pro 48GB, M4 Pro 48GB"
BIG = "openai/gpt-oss-120b"


@pytest.fixture(scope="module")
def by_cable():
    return plan_several(BIG, TWO, as_released=True)


def test_a_pipeline_is_the_sum_of_its_parts_and_hops(by_cable):
    """The formula of the page, by hand: seconds of both parts, and a hop there and one back."""
    parts, pipeline = by_cable.parts, by_cable.forms[0]
    assert (parts[0].start, parts[0].stop, parts[1].stop) == (0, by_cable.counts[0], 36)
    low, high = LINKS["thunderbolt"].hop
    slow = sum(1 / part.plan.decode.low for part in parts) + 2 * high
    fast = sum(1 / part.plan.decode.high for part in parts) + 2 * low
    assert pipeline.decode.low == pytest.approx(1 / slow, rel=0.05)
    assert pipeline.decode.high == pytest.approx(1 / fast, rel=0.05)
    alone = find_mac("M4 Max 128GB")
    whole = plan_several(BIG, [alone.name, "M4 Pro 48GB"], as_released=True)
    assert whole.forms[0].decode.fit < whole.alone.decode.fit
    assert "M4 Max 128GB alone holds all of it, and is faster" in whole.verdict


def test_shared_tensors_take_the_slowest_share_and_sums(by_cable):
    form = next(each for each in by_cable.forms if each.name.startswith("tensors"))
    assert form.name.endswith("RDMA")
    spec_layers, kv = 36, sum(part.plan.kv_cache_bytes for part in by_cable.parts)
    weights = sum(part.plan.weights_bytes for part in by_cable.parts)
    rates = rates_of(find_mac("M4 Pro 48GB"), by_cable.parts[0].spec)
    # Of all weights but the embedding a token reads 4 of 128 experts; experts are the rest beside the dense parts.
    experts = 128 * 36 * by_cable.parts[0].spec.layers[0].parameters_per_expert(2880) * 4.25 / 8
    touched = weights - experts * (1 - 4 / 128) - 2 * 201_088 * 2880
    seconds = rates.decode_seconds(spec_layers, touched / 2, kv / 2)
    assert form.decode.low == pytest.approx(1 / (seconds / rates.low + 72 * RDMA_SUM[1]), rel=0.06)
    assert form.is_ours  # --parallel tensor


def test_the_busiest_of_several_machines_has_most_of_the_experts():
    assert most_of_one(4, 2) == 2.75
    assert most_of_one(4, 1) == 4
    assert most_of_one(1, 3) == 1


def test_a_cable_and_wifi(by_cable, monkeypatch):
    by_air = plan_several(BIG, TWO, "wifi", as_released=True)
    assert by_air.counts == by_cable.counts
    assert by_air.forms[0].decode.high < by_cable.forms[0].decode.high
    assert by_air.prefill == by_cable.prefill or by_air.prefill.high < by_cable.prefill.high
    assert not any("RDMA" in form.name for form in by_air.forms)
    # 20b on a 16 GB Mac nearly fits: over a slower link one Mac with experts on disk does better.
    monkeypatch.setitem(LINKS, "wifi", replace(LINKS["wifi"], hop=(0.05, 0.1)))
    small = plan_several("openai/gpt-oss-20b", "M5 16GB, M5 16GB", "wifi", as_released=True)
    assert small.alone.expert_slots is not None
    assert "over Wi-Fi: use a cable, or leave the others out." in small.verdict
    # Who has a cable is not told to use one.
    slow = plan_several(BIG, "M4 Max 128GB, M1 8GB", expert_slots=20, as_released=True)
    assert "over Thunderbolt: leave the others out." in slow.verdict


def test_sharing_each_layer_needs_memory_for_a_share(by_cable):
    """Shares are in memory whole, while a pipeline leaves experts on disk: what does not fit is not advised."""
    assert all(form.fits for form in by_cable.forms)
    small = plan_several(BIG, "M4 16GB, M4 16GB", as_released=True)
    assert all(part.plan.expert_slots is not None for part in small.parts)
    shared = {form.name: form for form in small.forms if form.is_shared}
    assert len(shared) == 2
    for form in shared.values():
        assert not form.fits
        assert form.decode is None
        # Half of 120b's 65 GB and more, on Macs that may use 12.7.
        assert re.fullmatch(r"a share takes 3\d\.\d\d GB, and M4 16GB may use 12\.71 GB", form.terms)
    assert "shared" not in small.verdict
    # The larger one has room for its half.
    mixed = plan_several(BIG, "M4 Max 128GB, M1 8GB", as_released=True)
    assert all("M1 8GB may use" in form.terms for form in mixed.forms if form.is_shared)
    shown = "\n".join(lines(small))
    assert shown.count("does not fit") == 2
    assert "--parallel" not in shown


def test_what_is_said_of_macs_that_hold_it_together_alone():
    """Where no Mac has room for even a few experts of each layer, all together may have."""
    three = plan_several(BIG, "M1 8GB, M1 8GB, M1 8GB", as_released=True)
    assert not three.alone.fits
    assert three.verdict == "No one of them holds it: together they do, with experts on their disks."


def test_layers_by_hand_and_what_does_not_fit(by_cable):
    assert plan_several(BIG, TWO, layers="20,16", as_released=True).counts == (20, 16)
    with pytest.raises(MemoryLimitError, match=r"layers 0 to 29 on M4 Pro 48GB.*missing"):
        plan_several(BIG, TWO, layers=(30, 6), expert_slots=128, as_released=True)
    with pytest.raises(MemoryLimitError, match=r"apple/OpenELM-3B needs .* are missing"):
        plan_several("apple/OpenELM-3B", "M1 8GB, M1 8GB", memory_limit="500MB", dtype="float32", as_released=True)


@pytest.mark.parametrize(
    ("macs", "options", "message"),
    [
        ("M4 Pro 48GB", {}, "give two or more"),
        ("M4 Pro 48GB, M9 1GB", {}, "There is no Mac"),
        ("M4, ", {}, "give two or more"),
        (TWO, {"link": "pigeon"}, "link is 'pigeon': give thunderbolt, ethernet or wifi"),
        (TWO, {"layers": "3,4"}, "together 7, and the model has 6 layers"),
    ],
)
def test_what_is_not_understood(macs, options, message):
    with pytest.raises(SettingError, match=message):
        plan_several("demo-gpt-oss", macs, **options)


def test_the_command(capsys, tmp_path):
    assert (
        main(["plan", "demo-gpt-oss", "--macs", "M4 16GB, M4 Pro 24GB", "--link", "ethernet", "--layers", "2,4"]) == 0
    )
    shown = capsys.readouterr().out
    for text in (
        "on 2 Macs over Ethernet",
        "2: 0 to 1",
        "4: 2 to 5",
        "pipeline",
        "alone holds all of it",
        "--layers 2,4",
    ):
        assert text in shown, text
    chart = tmp_path / "layers.svg"
    assert main(["plan", "demo-gpt-oss", "--macs", TWO, "--chart", str(chart), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["layers"]) == 6
    assert [part["mac"] for part in found["parts"]] == ["M4 Pro 48GB"] * 2
    assert "layers 0 to" in chart.read_text() or chart.stat().st_size > 5000
    for wrong in (
        ["--link", "wifi"],
        ["--layers", "3,3"],
        ["--macs", TWO, "--mac", "M4 16GB"],
        ["--macs", TWO, "--all-macs"],
    ):
        assert main(["plan", "demo-gpt-oss", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
