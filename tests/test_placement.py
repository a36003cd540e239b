"""One decision a parameter, planned and carried out: what is counted is what is read, and a source is opened once."""

import gc
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx import placement as module
from openelm_mlx import sources
from openelm_mlx.placement import Placement, dense_packing
from openelm_mlx.sources import DEMOS, Source
from openelm_mlx.weights import read_model

DEMO_NAMES = sorted(DEMOS)


@pytest.mark.parametrize("name", DEMO_NAMES)
@pytest.mark.parametrize("dtype", [None, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_each_decision_reads_the_bytes_that_it_counts(name, dtype, bits, on_cpu):
    opened = Source.open(name)
    for decision in Placement.of(opened.contents, dtype, dense_packing(bits), on_cpu).decisions:
        read = decision.read(opened.checkpoint)
        if decision.unpacked is None:
            assert decision.nbytes == sum(array.nbytes for array in read.values()), decision
        else:
            assert decision.nbytes == (4 * decision.unpacked if decision.parameter.name.endswith(".weight") else 0)


@pytest.mark.parametrize("name", DEMO_NAMES)
@pytest.mark.parametrize("bits", [None, 8])
def test_a_placement_s_weights_are_the_model_s(name, bits):
    opened = Source.open(name)
    placement = Placement.of(opened.contents, None, dense_packing(bits))
    weights = placement.weights()
    parameters = dict(tree_flatten(read_model(placement, opened.checkpoint).parameters()))
    slots = weights.slot * opened.spec.layers[0].num_experts
    assert weights.dense + slots == sum(array.nbytes for array in parameters.values())
    assert parameters.keys() == dict(tree_flatten(om.load(name, dense_bits=bits)[0].parameters())).keys()


def peak_of_reading(placement, checkpoint) -> int:
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    read_model(placement, checkpoint)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("name", "dtype", "bits", "unpacks"),
    [
        ("demo-openelm", None, None, False),  # packed in the file, unpacked, by columns
        ("demo-gpt-oss", None, None, False),  # cast, by columns
        ("demo-gpt-oss", mx.bfloat16, 8, False),  # packed as it is read
        ("demo-gpt-oss", None, 8, False),  # cast, and packed as it is read
        ("demo-gpt-oss", mx.bfloat16, None, False),  # as it is stored, but for what is made of several tensors
        ("demo-gpt-oss", mx.float32, None, True),  # experts unpacked, for training
    ],
)
def test_what_is_in_memory_while_a_model_is_read_is_counted(name, dtype, bits, unpacks):
    """Of a model of one layer that is more than its weights, and more than what computing takes."""
    opened = Source.open(short_demo(name, 1))
    placement = Placement.of(opened.contents, dtype, dense_packing(bits), unpacks=unpacks)
    counted, peak = placement.weights().loading, 0
    for _ in range(15):  # a busy machine's threads give something back early
        peak = max(peak, peak_of_reading(placement, opened.checkpoint))
        if counted <= 1.05 * peak:
            break
    assert peak - 2_000 <= counted <= 1.05 * peak


def test_what_is_packed_as_it_is_read_comes_first_while_there_is_room(monkeypatch):
    monkeypatch.setattr(module, "LOAD_BATCH_BYTES", 2**16)  # as much of a demo as usually of a release
    placement = Placement.of(Source.open("demo-gpt-oss").contents, None, dense_packing(4))
    otherwise = replace(placement, decisions=tuple(reversed(placement.decisions)))
    assert placement.weights().loading < otherwise.weights().loading


def test_what_stays_on_disk_is_not_read():
    opened = Source.open("demo-gpt-oss")
    whole = Placement.of(opened.contents)
    names = [each.parameter.name for each in whole.decisions if ".experts." in each.parameter.name]
    left = whole.leaving_on_disk(names)
    assert [each.parameter.name for each in left.decisions if each.is_on_disk] == names
    assert left.weights() == whole.weights()  # a plan counts slots by itself


def test_a_source_is_opened_once(monkeypatch):
    opened, decided = [], []
    real_open, real_order = sources.open_checkpoint, module._in_reading_order
    monkeypatch.setattr(sources, "open_checkpoint", lambda path: opened.append(path) or real_open(path))
    monkeypatch.setattr(module, "_in_reading_order", lambda contents: decided.append(contents) or real_order(contents))
    om.load("demo-openelm")
    assert (len(opened), len(decided)) == (1, 1)  # what was planned is what is read
    om.plan("demo-openelm", mac="M4 16GB")
    assert len(opened) == 2


def test_a_file_and_the_folder_here_are_known_by_their_folder_s_name(tmp_path, monkeypatch):
    """As converting has it: the name of the file of weights says nothing."""
    folder = tmp_path / "OpenELM-270M-Instruct"
    shutil.copytree(DEMOS["demo-openelm"], folder)
    file = next(folder.glob("*.safetensors"))
    config = (folder / "config.json").read_text().replace('"chat_template"', '"another_field"')
    (folder / "config.json").write_text(config)
    monkeypatch.chdir(folder)
    for source in (folder, file, ".", file.name, f"{folder}/"):
        assert om.load(source)[1].chat_template == "openelm-instruct", source
    assert om.load("demo-openelm", chat_template="plain")[1].chat_template == "plain"
