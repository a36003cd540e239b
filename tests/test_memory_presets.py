"""Presets: one table that every command and call reads, and what a plan shows of them."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import random_model, save_folder
from mlx.utils import tree_flatten

import openelm_mlx as om
from benchmarks.measurements.quality import COLUMNS
from openelm_mlx.bench.benchmark import mlx_lm_model
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands import build_parser, main
from openelm_mlx.commands.plan import RELEASED
from openelm_mlx.commands.plan_macs import table
from openelm_mlx.errors import SettingError
from openelm_mlx.memory.machine import find_mac, macs
from openelm_mlx.memory.presets import KEPT, PRESETS, preset_bits
from openelm_mlx.memory.quality import measured_quality, percent, quality_of
from openelm_mlx.planning import plan, plans_on

COMMANDS = ("generate", "chat", "bench", "plan", "convert")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return write_random_gpt_oss(tmp_path_factory.mktemp("sparse") / "20b", released_gpt_oss_config("20b"), sparse=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("plain") / "m", random_model())


def shapes(model):
    return {name: (array.shape, array.dtype) for name, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize("source", ["demo-gpt-oss", "plain"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_what_its_bits_load(source, name, plain):
    path = plain if source == "plain" else source
    asked = om.load(path, preset=name)[0]
    assert shapes(asked) == shapes(om.load(path, dense_bits=PRESETS[name].dense_bits)[0])
    assert asked.plan.dense_bits == PRESETS[name].dense_bits


def test_no_preset_touches_experts_or_keys_and_values():
    exact, smallest = (om.load("demo-gpt-oss", preset=name)[0] for name in ("exact", "smallest"))
    experts = [{n: s for n, s in shapes(each).items() if ".experts." in n} for each in (exact, smallest)]
    assert experts[0] == experts[1]
    assert experts[0]
    assert shapes(exact) != shapes(smallest)
    assert smallest.kv_bits is None


def test_a_converted_preset_is_the_recipe_of_its_bits(plain, tmp_path):
    for name, preset in PRESETS.items():
        asked, same = (
            om.convert(plain, None, dry_run=True, **each)
            for each in ({"preset": name}, {"quantize": preset.dense_bits})
        )
        assert asked.tensors == same.tensors
    assert main(["convert", str(plain), str(tmp_path / "out"), "--preset", "smallest", "--quiet"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4


@pytest.mark.parametrize("name", ["balanced", "smallest"])
def test_bench_packs_mlx_lm_s_model_alike(plain, name):
    """Else the comparison would be one of 16 bits with 8."""
    ours, theirs = om.load(plain, preset=name)[0], mlx_lm_model(plain, name)
    packed = [
        sorted(array.shape for name, array in tree_flatten(each.parameters()) if array.dtype == mx.uint32)
        for each in (ours, theirs)
    ]
    assert packed[0] == packed[1]
    assert packed[0]


# --- what is refused ---


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [("generate", "--dense-bits", "8"), ("chat", "--dense-bits", "4"), ("plan", "--dense-bits", "8"),
     ("bench", "--bits", "8"), ("convert", "--quantize", "mixed")],
)  # fmt: skip
def test_a_preset_and_the_bits_themselves_are_one_too_many(command, flag, value, capsys, tmp_path):
    place = {"convert": ["demo-gpt-oss", str(tmp_path / "out")], "bench": ["--random", "openelm-270m"]}.get(command, [])
    assert main([command, *place, "--preset", "exact", flag, value]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert (
        f"--preset exact says the bits of dense parts, and so does {flag} ({value}): give one of them." in captured.err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "call", [om.load, om.plan, lambda source, **options: om.convert(source, None, dry_run=True, **options)]
)
def test_python_spells_it_as_python_does(call):
    bits = {"quantize": 8} if call not in (om.load, om.plan) else {"dense_bits": 8}
    with pytest.raises(SettingError, match=r'preset="balanced" says the bits .* so does \w+ \(8\): give one'):
        call("demo-gpt-oss", preset="balanced", **bits)
    for wrong in ("fast", "", 8, True, ["exact"]):
        with pytest.raises(SettingError, match="choose exact, balanced, smallest"):
            call("demo-gpt-oss", preset=wrong)


def test_other_options_go_with_a_preset(capsys):
    assert main(["plan", "demo-gpt-oss", "--preset", "smallest", "--kv-bits", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dense_bits"], found["kv_bits"]) == (4, 8)
    assert preset_bits(None, 6) == 6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_explains_them(command, capsys):
    with pytest.raises(SystemExit):
        build_parser("p", [command]).parse_args([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--preset {exact,balanced,smallest}" in text
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.meaning}" in text
        assert name == "exact" or f"{preset.meaning} ({KEPT[name]} of the demos' likeliest tokens stay)" in text


@pytest.mark.parametrize("name", KEPT)
def test_the_help_s_figures_are_those_that_were_measured(name):
    shares = sorted(100 * quality_of(family, PRESETS[name].dense_bits).same_top for family in ("gpt_oss", "openelm"))
    assert KEPT[name] == f"{shares[0]:.0f} to {shares[1]:.0f} %"


# --- measured quality ---


def test_what_was_measured_is_whole():
    rows = measured_quality()
    assert "\t".join(vars(rows[0])) == "family\t" + COLUMNS.partition("\t")[2]
    for row in rows:
        assert row.family in ("gpt_oss", "openelm")
        assert 0 <= row.same_top <= 1
        assert 0 <= row.kl <= row.largest_kl
        assert row.positions > 90
        assert row.command.startswith("python -m benchmarks.quality --words ")
    for family in ("gpt_oss", "openelm"):
        found = [quality_of(family, bits) for bits in (8, 6, 4)]
        assert [row.bits for row in found] == [8, 6, 4]
        assert found[0].kl < found[1].kl < found[2].kl
        assert quality_of(family, None) is None
        assert quality_of(family, 5) is None


def test_shares_are_whole_only_where_they_are():
    assert [percent(each) for each in (1.0, 0.99999, 0.9912, 0.98299, 0.5)] == [
        "100 %",
        "99.99 %",
        "99.12 %",
        "98.3 %",
        "50.0 %",
    ]


# --- what a plan shows ---


def test_a_plan_has_every_preset_as_its_own_plan_would_be(sparse):
    for mac, asked in (("M4 Pro 24GB", (None, 8)), ("M4 16GB", (6,)), ("M1 8GB", (None,))):
        for bits in asked:
            found = plan(sparse, mac=mac, dense_bits=bits)
            assert [each.name for each in found.variants] == [*PRESETS, *(["6 bits"] if bits == 6 else [])]
            for each in found.variants:
                alone = plan(sparse, mac=mac, dense_bits=each.dense_bits)
                assert (each.process_bytes, each.expert_slots, each.fits) == (
                    alone.process_bytes, alone.expert_slots, alone.fits
                )  # fmt: skip
                assert each.decode == alone.decode


def test_eight_bits_are_advised_on_macs_and_four_never(sparse):
    for mac in ("M1 8GB", "M3 Pro 18GB", "M5 Max 128GB"):
        found = plan(sparse, mac=mac)
        assert [each.name for each in found.variants if each.is_advised] == ["balanced"], mac
    for mac, least, most in [("M1 Pro 32GB", 1.25, 1.45), ("M4 Pro 48GB", 1.25, 1.45), ("M3 Ultra 256GB", 1.1, 1.3)]:
        exact, balanced, _ = plan(sparse, mac=mac).variants
        assert least < balanced.gain < most
        assert 1.0e9 < exact.process_bytes - balanced.process_bytes < 1.8e9


def test_nothing_is_advised_where_eight_bits_are_slower(sparse):
    cpu = replace(find_mac("M4 Max 64GB"), backend="cpu", chip="", bandwidth=None)
    assert [each.name for each in plan(sparse, machine=cpu).variants if each.is_advised] == ["exact"]


@pytest.mark.parametrize("options", [[], ["--preset=smallest"], ["--preset=balanced"], ["--dense-bits=6"]])
def test_a_packed_source_has_nothing_to_choose_and_that_is_said(options, capsys):
    command = ["plan", "demo-openelm", "--mac", "M4 16GB", *options]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["variants"] == []
    assert "packed already" in found["note"]
    assert main(command) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  presets")]
    assert line.endswith(found["note"])
    assert max(map(len, [line])) <= 120


def test_what_is_not_packed_has_no_such_note(sparse):
    assert plan(sparse, mac="M4 16GB").note is None
    assert plan("demo-gpt-oss", mac="M4 16GB").note is None


def test_text_and_json_say_the_same(sparse, capsys):
    command = ["plan", str(sparse), "--mac", "M4 Pro 24GB"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "tokens/s at 8,192" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()[:1] and line.split()[0] in PRESETS}
    assert "as released" in lines["exact"]
    assert "balanced *" in lines["balanced"]
    for each in found["variants"][1:]:
        line = lines[each["name"]]
        assert f"{each['process_bytes'] / 1e9:.2f} GB" in line
        assert f"{each['decode']['low']:.0f} to {each['decode']['high']:.0f}" in line
        assert percent(each["quality"]["same_top"]) in line  # 4 bits are never offered without their figure
        assert each["decode"]["tokens"] == 8192
    assert max(map(len, lines.values())) <= 84


# --- every Mac ---


@pytest.fixture(scope="module")
def every():
    """The models on every fourth Mac."""
    return [plans_on(list(macs())[::4], source, as_released=True) for source in RELEASED]


@pytest.mark.parametrize("columns", [80, 120])
def test_all_models_on_all_macs_are_one_table(every, columns):
    lines, names = table(every, columns), [each.machine.name for each in every[0]]
    assert max(map(len, lines)) <= columns
    assert [line[:14].strip() for line in lines if line[:1] == "M" and "GB" in line[:14]] == names
    head = " ".join(lines[:2])
    assert "8,192 tokens of context (gpt-oss)" in head
    assert "2,048 tokens of context (OpenELM)" in head
    assert "as released" in head
    rows = {line[:14].strip(): line.split()[-6:] for line in lines if line[:1] == "M"}
    for column, row in enumerate(every):
        for found in row:
            shown = rows[found.machine.name][column]
            assert (shown == "-") == (not found.fits)
            if found.fits:
                assert shown.endswith(("?", "d")) == (found.decode.basis == "no run")  # nobody has published one
                assert shown.endswith("d") == (found.expert_slots is not None)
                assert shown.rstrip("d?") == str(found.decode).replace(" to ", "-")
    legend = " ".join(lines)
    assert "d: only some experts fit into memory, and the others are read from the Mac's disk" in legend
    assert "packed already" not in legend
    assert any("d" in cell for row in rows.values() for cell in row)
    assert any(cell == "-" for row in rows.values() for cell in row)


def test_the_table_says_of_a_packed_source_that_presets_are_the_same():
    lines = table(
        [plans_on([find_mac("M4 16GB")], source, preset="balanced") for source in ("demo-openelm", "demo-gpt-oss")]
    )
    assert "demo-openelm: no preset rounds anything" in " ".join(lines)
    assert "demo-gpt-oss: no preset" not in " ".join(lines)


def test_only_memories_of_which_nobody_reported_a_working_set_are_marked():
    """What has to be said of a source stands in every plan of it, and is nothing of the Macs."""
    note = "these are the sizes that x was released with"
    machines = [replace(each, notes=(*each.notes, note)) for each in map(find_mac, ("M1 8GB", "M1 16GB", "M4 24GB"))]
    lines = table([plans_on(machines, "demo-gpt-oss")])
    rows = [line for line in lines if line[:1] == "M" and line[1].isdigit()]
    marked = {line.rsplit(None, 2)[0].strip(): "~" in line for line in rows}
    assert marked == {"M1 8GB": True, "M1 16GB": False, "M4 24GB": False}
    assert " ".join(lines).count(f"demo-gpt-oss: {note}.") == 1
    assert "working set of 8 GB is estimated" not in " ".join(lines)  # the legend says that
    assert "~: what macOS gives the GPU there is estimated." in lines
    assert not any("~" in line for line in table([plans_on(machines[1:], "demo-gpt-oss")]))


def test_the_table_says_that_nobody_published_a_run_as_released():
    def text(preset):
        found = [plans_on([find_mac("M4 Max 128GB")], each, as_released=True, preset=preset) for each in RELEASED[:3]]
        return " ".join(table(found, 200))

    told = "gpt-oss-20b, gpt-oss-120b: by runs with dense parts in 8 or 4 bits; nobody has published one as released"
    assert told in text("exact")
    assert "nobody has published one as released" not in text("balanced")


def test_the_table_needs_no_hub(monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    one = find_mac("M1 8GB")
    monkeypatch.setattr("openelm_mlx.memory.machine.macs", lambda: iter([one]))
    assert main(["plan", "--all-macs", "--preset", "balanced"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "dense parts in 8 bits" in captured.out


def test_names_that_are_long_or_alike_stay_apart(every):
    rows = [[replace(each, source="/a/very/long/folder-name-that-goes-on-and-on") for each in row] for row in every[:2]]
    assert max(map(len, table(rows, 80))) <= 80
