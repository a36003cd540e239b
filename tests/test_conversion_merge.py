"""An adapter merged by a conversion: the logits that it has beside the weights, and what rounding leaves of it."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture

import openelm_mlx as om
from openelm_mlx.checkpoint.adapter_files import read_adapter, write_adapter
from openelm_mlx.commands import main
from openelm_mlx.commands.spelling import in_flags
from openelm_mlx.errors import CheckpointError, ConversionError, SettingError
from openelm_mlx.models.adapter_targets import targets_of
from openelm_mlx.models.low_rank import Adapter, Pair

ADAPTERS = FIXTURES / "adapters"
CASES = sorted(path.name for path in ADAPTERS.iterdir() if (path / "peft_final").is_dir())


def case_of(name):
    base = json.loads((ADAPTERS / name / "case.json").read_text())["base"]
    return FIXTURES / base, ADAPTERS / name / "peft_final", dict(np.load(ADAPTERS / name / "oracle.npz"))


def small_adapter(spec, size, groups, magnitude=False):
    """One that changes each weight by about `size` of its own norm."""
    rng, pairs = np.random.default_rng(0), {}
    base = dict(load_fixture_weights(spec))
    for name, target in targets_of(spec).items():
        if target.group in groups:
            a, b = (mx.array(rng.normal(size=shape).astype(np.float32)) for shape in target.shapes(2))
            norm = mx.linalg.norm((a @ b).reshape(-1)).item()
            pairs[name] = Pair(a, b, size * base[target.site] / norm * np.sqrt(target.rows / base[target.site, "rows"]))
    return Adapter(pairs)


def load_fixture_weights(spec):
    """Norm and rows of each site's weight."""
    folder = next(
        each for each in ("openelm_tiny", "gpt_oss_tiny") if spec.family == ("openelm" if "elm" in each else "gpt_oss")
    )
    from openelm_mlx.models.adapter_sites import module_at, unpacked

    model = load_fixture(FIXTURES / folder)
    for target in targets_of(spec).values():
        weight = unpacked(module_at(model, target.site)).astype(mx.float32)
        yield target.site, mx.linalg.norm(weight.reshape(-1)).item()
        yield (target.site, "rows"), weight.shape[-2]


@pytest.mark.parametrize("name", CASES)
def test_merged_into_float32(tmp_path, name):
    """PEFT's own merged logits; of the tied embedding the head keeps the base's."""
    base, adapter, known = case_of(name)
    report = om.convert(base, tmp_path / "merged", dtype="float32", adapter=adapter)
    model, _ = om.load(tmp_path / "merged", dtype="float32")
    found = np.array(model(mx.array(known["eval_tokens"])))[..., known["columns"]]
    assert np.abs(found - known.get("logits_merged", known["logits_final"])).max() < 2e-4
    assert report.merge.total.cosine > 0.9999
    assert report.merge.total.error < 1e-4
    assert report.merge.num_weights == len(report.merge.weights)


def test_a_tied_head_is_untied_only_where_it_stays(tmp_path):
    base, adapter, known = case_of("openelm_lora_embedding")
    om.convert(base, tmp_path / "merged", adapter=adapter)
    model, _ = om.load(tmp_path / "merged")
    assert not model.spec.tied_head
    spec = model.spec
    tied = read_adapter(adapter, spec)
    write_adapter(tmp_path / "mlx", Adapter(tied.pairs, ties_head=True), load_fixture(base).spec, "mlx-lm")
    beside, _ = om.load(base, dtype="float32", adapter=tmp_path / "mlx")
    om.convert(base, tmp_path / "tied", dtype="float32", adapter=tmp_path / "mlx")
    merged, _ = om.load(tmp_path / "tied", dtype="float32")
    assert merged.spec.tied_head
    tokens = mx.array(known["eval_tokens"])
    assert mx.allclose(merged(tokens), beside(tokens), atol=2e-4)


@pytest.mark.parametrize(
    ("options", "largest"),
    [({"dtype": "bfloat16"}, 0.2), ({"quantize": 8, "group_size": 32}, 0.5), ({"quantize": "mxfp8"}, 1.0)],
)
def test_experts_leave_mxfp4(tmp_path, options, largest):
    """Only what the adapter changes; how much is kept is what reading it back finds."""
    spec = load_fixture(FIXTURES / "gpt_oss_tiny").spec
    adapter = small_adapter(spec, 0.05, ("experts", "attention"))
    write_adapter(tmp_path / "adapter", adapter, spec)
    told = []
    report = om.convert(
        FIXTURES / "gpt_oss_tiny",
        tmp_path / "merged",
        adapter=tmp_path / "adapter",
        on_merge=told.append,
        merge_anyway=True,
        **options,
    )
    assert told == [report.merge]
    assert 0.045 < report.merge.total.size < 0.055
    assert 0 < report.merge.total.error < largest
    beside, _ = om.load(FIXTURES / "gpt_oss_tiny", dtype="float32", adapter=tmp_path / "adapter")
    merged, _ = om.load(tmp_path / "merged", dtype="float32")
    experts = merged.layers[0].mlp.experts.gate_up_proj
    assert ("scales" in experts) == ("quantize" in options)
    tokens = mx.array(np.random.default_rng(0).integers(0, 500, (1, 30)))
    with_it, base = beside(tokens), None
    with beside.adapters.using(beside.adapters.of("none")):
        base = beside(tokens)
    moved, missed = (mx.linalg.norm((each - with_it).reshape(-1)).item() for each in (base, merged(tokens)))
    assert missed < (2 * largest if largest < 1 else 3) * moved


def test_what_would_drown_is_refused(tmp_path):
    spec = load_fixture(FIXTURES / "gpt_oss_tiny").spec
    write_adapter(tmp_path / "adapter", small_adapter(spec, 0.02, ("experts",)), spec)
    told = []
    with pytest.raises(ConversionError, match=r"would drown: it changes the weights by 2\.0%") as raised:
        om.convert(FIXTURES / "gpt_oss_tiny", tmp_path / "merged", adapter=tmp_path / "adapter", on_merge=told.append)
    typed = in_flags(
        str(raised.value), {"dtype": "--dtype", "quantize": "--quantize", "merge_anyway": "--merge-anyway"}
    )
    assert typed.endswith("with --dtype bfloat16 or --quantize 8, or write it anyway with --merge-anyway.")
    assert told[0].total.error > 1
    assert told[0].worst.error >= told[0].total.error
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "merged.partial").exists()
    report = om.convert(FIXTURES / "gpt_oss_tiny", tmp_path / "merged", adapter=tmp_path / "adapter", merge_anyway=True)
    assert report.merge == told[0]
    assert om.load(tmp_path / "merged")[0].layers[0].mlp.experts.down_proj.mode == "mxfp4"


def test_attention_alone_leaves_experts_as_they_are(tmp_path):
    base, adapter, known = case_of("gpt_oss_attention")
    report = om.convert(base, tmp_path / "merged", adapter=adapter, verify=True)
    assert report.merge.total.error < 0.1  # of 16 bits
    kinds = {tensor.name: tensor.dtype for tensor in report.tensors if ".experts." in tensor.name}
    assert kinds["model.layers.0.mlp.experts.down_proj.weight"] == "U32"
    assert max(layer.weights for layer in report.verification.layers) < 5e-3
    model, _ = om.load(tmp_path / "merged", dtype="float32")
    found = np.array(model(mx.array(known["eval_tokens"])))[..., known["columns"]]
    assert (
        np.abs(found - known["logits_merged"]).max() < 0.2 * np.abs(known["logits_base"] - known["logits_merged"]).max()
    )


def test_verified_against_the_merged_original(tmp_path):
    """Packed on the way: the verification compares with what it should be, not with the base."""
    base, adapter, _ = case_of("openelm_dora")
    report = om.convert(base, tmp_path / "merged", quantize=8, group_size=32, adapter=adapter, verify=True)
    assert max(layer.weights for layer in report.verification.layers) < 0.02
    again = om.convert(tmp_path / "merged", tmp_path / "twice", adapter=adapter, verify=True, merge_anyway=True)
    assert again.quantization is not None  # packed again as it was
    assert max(layer.weights for layer in again.verification.layers) < 0.02


def test_what_does_not_go_together(tmp_path):
    base, adapter, _ = case_of("openelm_lora")
    for options, error, said in [
        ({"target": "swift"}, SettingError, "leave target out"),
        ({"adapter": ADAPTERS / "gpt_oss_experts" / "peft_final"}, CheckpointError, "another model"),
        ({"adapter": tmp_path / "nothing"}, CheckpointError, "no adapter"),
    ]:
        with pytest.raises(error, match=said):
            om.convert(base, tmp_path / "x", **{"adapter": adapter, **options})
    with pytest.raises(SettingError, match="adapter is for a folder"):
        om.convert(base, tmp_path / "x.gguf", adapter=adapter)
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_much_is_kept_first(tmp_path, capsys):
    base, adapter, _ = case_of("openelm_lora")
    given = ["convert", str(base), str(tmp_path / "merged"), "--adapter", str(adapter), "--dtype", "bfloat16", "-q"]
    assert main(given) == 0
    _, err = capsys.readouterr()
    assert "peft_final is merged into 16 weights" in err
    assert "cosine of 1.0000 and a relative error of 0." in err
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "the adapter peft_final is merged into 16 weights" in card
    given[2] = str(tmp_path / "again")
    assert main([*given[:3], "--adapter", str(adapter), "--quantize", "2", "--group-size", "32", "-q"]) == 2
    assert "--merge-anyway" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert (
        main([*given[:3], "--adapter", str(adapter), "--quantize", "2", "--group-size", "32", "-q", "--merge-anyway"])
        == 0
    )
