"""Shares of a model for machines that compute every layer together: how it is divided, read, and added up again."""

import json
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import in_threads, random_model, save_folder
from mlx.utils import tree_flatten

import openelm_mlx as om
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint import cuts, reader
from openelm_mlx.checkpoint.layouts import understand
from openelm_mlx.checkpoint.quantize import Quantization
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands import main
from openelm_mlx.errors import SettingError
from openelm_mlx.models.moe import ExpertLinear
from openelm_mlx.models.parallel import SharedExperts, keep_experts, share_experts, share_tensors
from openelm_mlx.models.routing_ways import WAYS
from openelm_mlx.parallel.shares import layer_shares, shared_placement
from openelm_mlx.placement import Placement, dense_packing
from openelm_mlx.specs import spec_from_config
from openelm_mlx.weights import read_model

# Five experts and five blocks of 32 columns for four machines; a window that prompts go past.
GPT_OSS = {
    **released_gpt_oss_config("20b"), "num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 2,
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "num_attention_heads": 8,
    "num_key_value_heads": 4, "sliding_window": 8, "eos_token_id": 95,
}  # fmt: skip
# 4, 6 and 8 kv heads.
OPENELM = {"head_dim": 8, "num_gqa_groups": 1, "model_dim": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each family."""
    top = tmp_path_factory.mktemp("parallel")
    return {
        "gpt_oss": write_random_gpt_oss(top / "gpt-oss", GPT_OSS),
        "openelm": save_folder(top / "openelm", random_model(**OPENELM)),
    }


def placement_of(folder, dtype=mx.float32, **options):
    config, checkpoint = read_config(folder), open_checkpoint(folder)
    return Placement.of(understand(checkpoint, config, spec_from_config(config)), dtype, **options), checkpoint


def parts_of(folder, form, size, totals, **options):
    """The model of each of `size` machines; totals: for each, what adds up."""
    placement, checkpoint = placement_of(folder, **options)
    models = []
    for rank in range(size):
        share = layer_shares(placement.contents.spec, placement.packings, form, rank, size)[0]
        own = shared_placement(placement, form, rank, size)
        if form == "experts":
            models.append(read_model(own, checkpoint, prepare=lambda model, s=share: keep_experts(model, *s.experts)))
            share_experts(models[-1], *share.experts, totals[rank])
        else:
            models.append(read_model(own, checkpoint))
            share_tensors(models[-1], rank == 0, totals[rank])
        mx.eval([layer.prepare_constants() for layer in models[-1].layers])
    return models


class Sums:
    """What adds up over machines that are threads here."""

    def __init__(self, size: int) -> None:
        self.parts, self.barrier = [None] * size, threading.Barrier(size, timeout=20)

    def of(self, rank: int):
        def total(x: mx.array) -> mx.array:
            mx.eval(x)
            self.parts[rank] = x
            self.barrier.wait()
            assert len({(each.shape, each.dtype) for each in self.parts}) == 1
            found = sum(self.parts[1:], self.parts[0])
            mx.eval(found)
            self.barrier.wait()
            return found

        return total


def logits_of_all(folder, form, size, tokens, **options):
    """The logits of a prompt and of one more token, by `size` machines."""
    sums = Sums(size)
    models = parts_of(folder, form, size, [sums.of(rank) for rank in range(size)], **options)

    def work(rank):
        cache = models[rank].make_cache()
        found = [models[rank](tokens, cache), models[rank](tokens[:, :1], cache)]
        mx.eval(found)
        return [np.array(each) for each in found]

    return in_threads(work, size)


def whole_logits(folder, tokens, **options):
    placement, checkpoint = placement_of(folder, **options)
    model = read_model(placement, checkpoint)
    cache = model.make_cache()
    return [np.array(model(tokens, cache)), np.array(model(tokens[:, :1], cache))]


TOKENS = mx.array([[5, 9, 11, 40, 2, 7, 77, 31, 8, 90, 4, 6, 61, 13, 17, 19, 23, 29, 37, 41]])


@pytest.mark.parametrize(
    ("family", "form", "size"), [("openelm", "tensor", 3), ("gpt_oss", "tensor", 4), ("gpt_oss", "experts", 4)]
)
def test_uneven_shares_of_three_and_four_machines_add_up_to_the_whole(folders, family, form, size):
    whole = whole_logits(folders[family], TOKENS)
    for part in logits_of_all(folders[family], form, size, TOKENS):
        for found, expected in zip(part, whole, strict=True):
            if form == "experts":
                assert (found == expected).all()
            else:
                assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
                assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_packed_matrices_are_shared_in_whole_groups(tmp_path):
    """Each group keeps its scale, so that the shares' numbers are the whole's."""
    shape = {"head_dim": 16, "num_gqa_groups": 1, "model_dim": 128, "ffn_dim_divisor": 64}
    wide = {"qkv_multipliers": [2.0, 2.0], "ffn_multipliers": [2.0, 2.0]}
    folder = save_folder(tmp_path / "m", random_model(vocab_size=96, **shape, **wide))
    options = {"dense": dense_packing(8), "on_cpu": True}
    placement, _ = placement_of(folder, **options)
    spec = placement.contents.spec
    shares = [layer_shares(spec, placement.packings, "tensor", rank, 3)[0] for rank in range(3)]
    # 16 heads of 16 columns in groups of 64: four of them go together. 256 columns are four groups.
    assert [each.kv_heads for each in shares] == [(0, 8), (8, 12), (12, 16)]
    assert [each.columns for each in shares] == [(0, 128), (128, 192), (192, 256)]
    whole = whole_logits(folder, TOKENS, **options)
    for part in logits_of_all(folder, "tensor", 3, TOKENS, **options):
        assert np.abs(part[0] - whole[0]).max() < 1e-4 * np.abs(whole[0]).max()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["openelm", "gpt_oss"])
def test_in_half_precision_no_product_is_rounded_before_it_is_added(folders, tmp_path, family, packed):
    """Else a sum over machines is another one than the product that one machine rounds once."""
    folder, options = folders[family], {"dtype": mx.bfloat16, "on_cpu": False}
    if packed and family == "openelm":  # wide enough for groups of 64
        wide = {"head_dim": 16, "num_gqa_groups": 1, "model_dim": 128, "ffn_dim_divisor": 64}
        shape = {"qkv_multipliers": [2.0, 2.0], "ffn_multipliers": [2.0, 2.0]}
        folder = save_folder(tmp_path / "m", random_model(vocab_size=96, **wide, **shape))
    if packed:
        options["dense"] = dense_packing(8)
    seen = []

    def total(x: mx.array) -> mx.array:
        seen.append(x)
        return x

    model = parts_of(folder, "tensor", 2, [total, total], **options)[1]
    mx.eval(model(TOKENS), seen)
    assert len(seen) == 2 * len(model.layers)
    for each in seen:
        assert each.dtype == mx.float32
        rounded = each.astype(mx.bfloat16).astype(mx.float32)
        assert mx.mean(rounded != each).item() > 0.9


def test_in_half_precision_experts_that_are_not_packed_are_not_rounded_either(folders, tmp_path):
    options = {"dtype": mx.bfloat16, "on_cpu": False}
    model = read_model(*placement_of(folders["gpt_oss"], unpacks=True, **options))
    weights = {name: array.astype(mx.bfloat16) for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    config = {name: value for name, value in GPT_OSS.items() if name != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for part in parts_of(tmp_path, "tensor", 2, [lambda y: y] * 2, **options):
        for layer in part.layers:
            experts = layer.mlp.own.experts
            assert isinstance(experts.down_proj, ExpertLinear)
            assert experts.gate_up_proj.weight.dtype == mx.bfloat16
            for rows in (1, 20):
                x = mx.random.normal((1, rows, 64), key=mx.random.key(rows)).astype(mx.bfloat16)
                out = experts(x, mx.broadcast_to(mx.array([0, 3], mx.uint32), (1, rows, 2)))
                assert out.dtype == mx.float32
                assert mx.mean(out.astype(mx.bfloat16).astype(mx.float32) != out).item() > 0.9


def test_the_released_models_are_shared_in_whole_blocks():
    spec = spec_from_config(released_gpt_oss_config("120b"))
    packings = {f"model.layers.{i}.mlp.experts.down_proj": Quantization(4, 32, "mxfp4") for i in range(36)}
    shares = [layer_shares(spec, packings, "tensor", rank, 4)[35] for rank in range(4)]
    assert [(each.columns[1] - each.columns[0]) // 32 for each in shares] == [23, 23, 22, 22]
    assert [each.kv_heads for each in shares] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [share.spec(spec.layers[0]).num_heads for share in shares] == [16] * 4
    experts = [layer_shares(spec, packings, "experts", rank, 3)[0].experts for rank in range(3)]
    assert experts == [(0, 43), (43, 86), (86, 128)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_experts_here_and_there_give_the_same_bits_in_every_way(folders, way, rows):
    placement, checkpoint = placement_of(folders["gpt_oss"])
    whole = read_model(placement, checkpoint).layers[0].mlp.experts
    whole.ways = ((1, way),)
    parts = parts_of(folders["gpt_oss"], "experts", 3, [lambda y: y] * 3)
    x = mx.random.normal((1, rows, 64), key=mx.random.key(rows))
    chosen = mx.argsort(mx.random.uniform(shape=(1, rows, 5), key=mx.random.key(7)), axis=-1)[..., :2].astype(mx.uint32)
    expected, found = whole(x, chosen), 0
    for part in parts:
        experts: SharedExperts = part.layers[0].mlp.experts
        experts.experts.ways = whole.ways
        found = found + experts(x, chosen)
    assert mx.array_equal(found, expected)


@pytest.mark.parametrize("form", ["tensor", "experts"])
def test_a_machine_reads_little_more_than_its_share(folders, form, monkeypatch):
    """Long runs of bytes are read alone; here all runs count as long."""
    placement, checkpoint = placement_of(folders["gpt_oss"])
    own = shared_placement(placement, form, 1, 4)
    expected = {name: array for each in own.decisions for name, array in each.read(checkpoint).items()}
    mx.eval(expected)
    read = []
    opened = reader.open_regular

    def counting(*arguments):
        stream = opened(*arguments)
        original = stream.read
        stream_read = type("Stream", (), {
            "read": staticmethod(lambda n: read.append(n) or original(n)), "seek": staticmethod(stream.seek),
            "__enter__": lambda self: self, "__exit__": lambda self, *_: stream.close(),
        })  # fmt: skip
        return stream_read()

    monkeypatch.setattr(cuts, "LEAST_RUN_BYTES", 1)
    monkeypatch.setattr(reader, "open_regular", counting)
    monkeypatch.setattr(reader, "_lazy_arrays", lambda file: pytest.fail("a whole tensor is read"))
    cut = [each for each in own.decisions if each.parameter.cut is not None and ".experts." in each.parameter.name]
    cut = [each for each in cut if "down_proj" not in each.parameter.name or form == "experts"]
    for decision in cut:
        [(name, found)] = decision.read(checkpoint).items()
        assert mx.array_equal(found, expected[name]), name
    assert sum(read) == sum(each.stored_bytes for each in cut) > 0


def test_what_is_cut_off_does_not_stay_in_memory():
    whole = mx.zeros((64, 4096)) + 1
    mx.eval(whole)
    before = mx.get_active_memory()
    part = cuts.Cut(0, ((3, 5),)).of(whole)
    mx.eval(part)
    del whole
    assert mx.get_active_memory() <= before - 64 * 4096 * 4 + 2**17
    assert part.shape == (2, 4096)


@pytest.mark.parametrize(
    ("family", "form", "size", "said"),
    [
        ("openelm", "experts", 2, 'an OpenELM has none: give parallel="tensor"'),
        ("openelm", "tensor", 5, "layer 0 has 4 groups of heads that go together; start 4 processes"),
        ("gpt_oss", "tensor", 5, "layer 0 has 4 groups of heads"),
        ("gpt_oss", "experts", 6, "layer 0 has 5 experts"),
    ],
)
def test_what_cannot_be_divided_is_refused(folders, family, form, size, said):
    placement, _ = placement_of(folders[family])
    with pytest.raises(SettingError, match=said):
        layer_shares(placement.contents.spec, placement.packings, form, 0, size)


def test_blocks_that_are_too_few_are_refused(folders):
    spec = placement_of(folders["gpt_oss"])[0].contents.spec
    spec = replace(spec, layers=tuple(replace(each, intermediate_size=64) for each in spec.layers))
    packings = {f"model.layers.{i}.mlp.experts.down_proj": Quantization(4, 32, "mxfp4") for i in range(2)}
    with pytest.raises(
        SettingError, match="the feed-forward part of layer 0 has 2 blocks of columns; start 2 processes"
    ):
        layer_shares(spec, packings, "tensor", 0, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parallel": "tensor"}, "this one is alone: start it on every machine with MLX's launcher"),
        ({"parallel": "both"}, 'parallel is \'both\': give "tensor" or "experts"'),
        ({"parallel": "tensor", "workers": "127.0.0.1:1"}, "workers have whole layers"),
        ({"parallel": "experts", "expert_slots": 2}, "have all of it in memory"),
        ({"parallel": "tensor", "adapter": "there"}, "merge it into a copy of the model first"),
    ],
)
def test_loading_says_what_to_do_before_anything_is_read(options, said, tmp_path):
    with pytest.raises(SettingError, match=said):
        om.load(tmp_path / "nothing is here", **options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--parallel is for two or more processes, and this one is alone"),
        (["--prompt-lookup"], "--parallel and --prompt-lookup do not go together"),
        (["--prompt-cache", "file"], "--parallel and --prompt-cache do not go together"),
        (["--workers", "127.0.0.1:1"], "--parallel and --workers do not go together: workers have whole layers"),
        (["--prompt", "-"], "the prompt is an argument or a file"),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments, said, capsys):
    prompt = [] if "--prompt" in arguments else ["--prompt", "Hello"]
    assert main(["generate", "--model", "demo-openelm", "--parallel", "tensor", *prompt, *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
