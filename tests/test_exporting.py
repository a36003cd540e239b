"""An exported graph answers as the model does: read back in Python, and built and run in C++."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, random_model, save_folder

import openelm_mlx as om
from openelm_mlx import exporting
from openelm_mlx import hub as hub_module
from openelm_mlx.commands import main
from openelm_mlx.errors import ConversionError, DestinationError, SettingError
from openelm_mlx.exporting.graph import ExportedModel, make_contiguous, step_of
from openelm_mlx.exporting.program import PROGRAM

GPT_OSS = FIXTURES / "gpt_oss_tiny"


@pytest.fixture(autouse=True)
def _no_cached_tokenizers(monkeypatch):
    monkeypatch.setattr(hub_module, "cached_file", lambda *_: None)


@pytest.fixture(scope="module")
def openelm(tmp_path_factory) -> tuple[Path, Path]:
    """A small OpenELM and its export: 48 and 64 places, 16 tokens at once."""
    folder = tmp_path_factory.mktemp("openelm")
    save_folder(folder / "OpenELM-x-Instruct", random_model(), "llama")
    (folder / "OpenELM-x-Instruct" / "LICENSE").write_text("Do as you like.")
    om.export(folder / "OpenELM-x-Instruct", folder / "out", places=(64, 48), chunk=16)
    return folder / "OpenELM-x-Instruct", folder / "out"


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> tuple[Path, Path]:
    """The tiny gpt-oss, whose window is 16, and its export."""
    out = tmp_path_factory.mktemp("gpt_oss") / "out"
    om.export(GPT_OSS, out, places=(64,), chunk=8)
    return GPT_OSS, out


def greedy(step, tokens: list[int], count: int) -> list[int]:
    """The likeliest token, again and again; step: new tokens -> logits (V,)."""
    found, new = [], tokens
    while len(found) < count:
        new = [int(mx.argmax(step(new)))]
        found += new
    return found


def of_model(model):
    cache = model.make_cache()
    return lambda new: model(mx.array([new]), cache=cache)[0, -1]


@pytest.mark.parametrize("name", ["openelm", "gpt_oss"])
@pytest.mark.parametrize("length", [1, 7, 21])
def test_it_answers_as_the_model_does(request, name, length):
    source, out = request.getfixturevalue(name)
    model, _ = om.load(source)
    description = json.loads((out / "model.json").read_text())
    prompt = [1 + 37 * i % 500 for i in range(length)]
    for places in description["places"]:
        exported = ExportedModel(out / "model.mlxfn", model, places, description["lengths"])
        count = min(40, places - length)
        assert greedy(exported, prompt, count) == greedy(of_model(model), prompt, count)


def test_logits_to_the_last_place(openelm):
    source, out = openelm
    model, _ = om.load(source)
    exported = ExportedModel(out / "model.mlxfn", model, 48, (1, 8, 16))
    tokens = [1 + 37 * i % 500 for i in range(48)]
    whole = model(mx.array([tokens]))[0]
    assert mx.allclose(exported(tokens[:20]), whole[19], atol=2e-3)
    assert mx.allclose(exported(tokens[20:]), whole[47], atol=2e-3)


def test_the_file_can_be_run_without_this_library(openelm):
    """What model.json says is enough to call it."""
    source, out = openelm
    script = (
        "import json, sys, mlx.core as mx\n"
        "d = json.load(open(sys.argv[1] + '/model.json'))\n"
        "f, metadata = mx.import_function(sys.argv[1] + '/' + d['graph'], return_metadata=True)\n"
        "assert json.loads(metadata) == d\n"
        "n, L = d['places'][0], d['lengths'][-1]\n"
        "shape = lambda each: [{'places': n, 'length': L}.get(k, k) for k in each['shape']]\n"
        "arrays = [mx.zeros(shape(each), getattr(mx, each['dtype'])) for each in d['inputs']]\n"
        "arrays[0] = mx.arange(1, L + 1)[None].astype(mx.int32)\n"
        "found = f(*arrays)\n"
        "assert [list(a.shape) for a in found] == [shape(each) for each in d['outputs']]\n"
        "assert [str(a.dtype).split('.')[-1] for a in found] == [each['dtype'] for each in d['outputs']]\n"
        "print(mx.argmax(found[0]).item())"
    )
    done = subprocess.run([sys.executable, "-c", script, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, _ = om.load(source)
    assert int(done.stdout) == int(mx.argmax(model(mx.array([list(range(1, 17))]))[0, -1]))


def test_what_is_beside_it(openelm, gpt_oss, tmp_path):
    _, out = openelm
    names = {path.name for path in out.iterdir()}
    assert names == {
        "CMakeLists.txt", "LICENSE", "generate.cpp", "model.h", "model.json", "model.mlxfn", "tokenizer.h", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip
    description = json.loads((out / "model.json").read_text())
    assert description["places"] == [48, 64]
    assert description["lengths"] == [1, 8, 16]
    assert (description["bos_token"], description["stop_tokens"]) == (1, [2])
    assert om.load(openelm[0])[0].spec.layers[0].num_kv_heads == description["inputs"][2]["shape"][1]
    assert "tokenizer.h" not in {path.name for path in gpt_oss[1].iterdir()}
    weights = sum(path.stat().st_size for path in openelm[0].glob("*.safetensors"))
    assert (out / "model.mlxfn").stat().st_size < 1.5 * weights + 500_000  # once, whatever the number of sizes
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_program_has_fewer_than_80_lines():
    assert len(PROGRAM.splitlines()) < 80
    assert max(map(len, PROGRAM.splitlines())) <= 120


# --- what MLX writes wrongly ------------------------------------------------------------------------------------------


def test_mlx_writes_a_constant_s_buffer_as_it_lies(tmp_path):
    """Why parameters are laid out first. Where this fails, MLX was mended, and `make_contiguous` may go."""
    weight = mx.contiguous(mx.arange(12.0).reshape(3, 4).T).T
    mx.eval(weight)
    mx.export_function(str(tmp_path / "f.mlxfn"), lambda x: x @ weight.T, mx.ones((1, 4)))
    (found,) = mx.import_function(str(tmp_path / "f.mlxfn"))(mx.ones((1, 4)))
    assert not mx.array_equal(found, mx.ones((1, 4)) @ weight.T)


@pytest.mark.parametrize("source", ["demo-openelm", GPT_OSS], ids=["openelm", "gpt-oss"])
def test_parameters_are_laid_out_by_rows_and_stay_the_same(source):
    model, _ = om.load(source, dtype="float32")
    tokens = mx.array([[5, 17, 300, 2]])
    before = model(tokens)
    make_contiguous(model)
    assert mx.allclose(model(tokens), before, atol=2e-3)


@pytest.mark.parametrize("name", ["openelm", "gpt_oss"])
def test_other_tokens_are_found_and_nothing_is_kept(request, tmp_path, monkeypatch, name):
    """Without the layout the graph is wrong from the first token on, and MLX says nothing."""
    source, _ = request.getfixturevalue(name)
    monkeypatch.setattr(exporting, "make_contiguous", lambda model: None)
    with pytest.raises(ConversionError, match="does not give the model's tokens"):
        om.export(source, tmp_path / "out", places=(64,), chunk=8, dtype="float32")
    assert not list(tmp_path.iterdir())


def test_a_near_tie_of_16_bits_is_none_of_the_graph_s_faults():
    class Model:
        spec = None

        def make_cache(self):
            return []

        def __call__(self, tokens, cache):
            return mx.array([[[1.0, 0.999, 0.5]]])

    tied, other = (lambda _: mx.array([0.999, 1.0, 0.5])), (lambda _: mx.array([0.0, 0.0, 1.0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "cache_type", lambda model: mx.bfloat16)
        exporting._compare_one(tied, Model(), [1], 3)
        with pytest.raises(ConversionError):
            exporting._compare_one(other, Model(), [1], 3)
        patch.setattr(exporting, "cache_type", lambda model: mx.float32)
        with pytest.raises(ConversionError):
            exporting._compare_one(tied, Model(), [1], 3)


def test_bfloat16_and_packed_models(tmp_path, openelm):
    om.convert(openelm[0], tmp_path / "packed", quantize=4, group_size=32)
    report = om.export(tmp_path / "packed", tmp_path / "a", places=(64,), chunk=8)
    assert report.num_compared == 32
    report = om.export(openelm[0], tmp_path / "b", places=(64,), chunk=8, dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert "kType = mlx::core::bfloat16" in (tmp_path / "b" / "model.h").read_text()


def test_a_trace_has_no_shape_but_those_that_were_asked_for(openelm):
    _, out = openelm
    function = mx.import_function(str(out / "model.mlxfn"))
    with pytest.raises(ValueError):
        function(mx.zeros((1, 5), mx.int32), mx.array(0, mx.int32))


# --- C++ --------------------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")) or not shutil.which("cmake"),
    reason="needs a C++ compiler and cmake",
)


def built(out: Path, build: Path, *options: str) -> Path:
    """The program of an export, by its own CMake file."""
    root = subprocess.run([sys.executable, "-m", "mlx", "--cmake-dir"], capture_output=True, text=True, check=True)
    configure = [
        "cmake",
        "-S",
        str(out),
        "-B",
        str(build),
        f"-DMLX_ROOT={root.stdout.strip()}",
        "-DCMAKE_BUILD_TYPE=Debug",
    ]
    for command in ([*configure, *options], ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return build / "generate"


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, words)], capture_output=True, text=True)


@pytest.mark.slow(first=1)
@needs_compiler
@pytest.mark.parametrize("name", ["openelm", "gpt_oss"])
def test_the_program_is_built_and_answers_as_the_model_does(request, tmp_path, name):
    source, out = request.getfixturevalue(name)
    program = built(out, tmp_path / "build", "-DWITH_TOKENIZER=OFF")
    model, _ = om.load(source)
    stops = json.loads((out / "model.json").read_text())["stop_tokens"]
    for length, count in ((1, 32), (21, 20)):
        prompt = [1 + 37 * i % 500 for i in range(length)]
        expected = greedy(of_model(model), prompt, count)
        stop = next((i for i, token in enumerate(expected) if token in stops), count)
        done = run(program, count, *prompt)
        assert done.returncode == 0, done.stderr
        assert [int(token) for token in done.stdout.split()] == expected[:stop]
    too_long = run(program, 60, *range(1, 10))
    assert too_long.returncode == 2
    assert "places" in too_long.stderr
    for words in ((), (5,), ("many", 1), (-1, 1), (5, "a"), (5, -1), (5, 2**31), (5, model.spec.vocab_size), (5, "")):
        wrong = run(program, *words)
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1), (words, wrong)


def has_sentencepiece() -> bool:
    return any(Path(each, "sentencepiece_processor.h").exists() for each in ("/usr/include", "/opt/homebrew/include"))


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not has_sentencepiece(), reason="needs sentencepiece for C++ (libsentencepiece-dev)")
def test_the_program_with_its_tokenizer(tmp_path):
    om.export("demo-openelm", tmp_path / "out", places=(64,), chunk=16)
    program = built(tmp_path / "out", tmp_path / "build")
    model, tokenizer = om.load("demo-openelm")
    text = "What is a banjo?"
    done = run(program, 24, text)
    assert done.returncode == 0, done.stderr
    wanted = om.generate(model, tokenizer, text, max_tokens=24, raw=True)
    assert done.stdout.strip() == wanted.strip()


def test_the_build_file_names_the_tokenizer_of_its_kind(openelm, tmp_path):
    assert "sentencepiece" in (openelm[1] / "CMakeLists.txt").read_text()
    om.export("demo-gpt-oss", tmp_path / "out", places=(64,), chunk=8)
    text = (tmp_path / "out" / "CMakeLists.txt").read_text()
    assert "tokenizers-cpp" in text
    assert "tokenizer.json" in (tmp_path / "out" / "tokenizer.h").read_text()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_experts_that_stay_on_disk_are_refused(tmp_path):
    def streams(limit: int) -> bool:
        found = om.plan("demo-gpt-oss", memory_limit=limit, context_length=64)
        return found.fits and found.expert_slots is not None

    memory_limit = next(limit for limit in range(200_000_000, 0, -4_000_000) if streams(limit))
    with pytest.raises(ConversionError, match="experts that stay on disk cannot be exported"):
        om.export("demo-gpt-oss", tmp_path / "out", places=(64,), memory_limit=memory_limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"places": ()}, "places has 0 numbers"), ({"places": [9] * 17}, "places has 17 numbers: give 1 to 16"),
        ({"places": 512}, "places is 512: give a list"), ({"places": (32, 0)}, "places has 0 in it.* from 2 to 1,048,576"),
        ({"places": (32, 2**21)}, "places has 2097152 in it"), ({"places": ("512",)}, "places has '512' in it"),
        ({"places": (True,)}, "places has True in it"), ({"chunk": 0}, "chunk is 0"), ({"chunk": 2.5}, "chunk is 2.5"),
        ({"places": (16,), "chunk": 17}, "from 1 to 16, the smallest of places"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(tmp_path, openelm, options, match):
    with pytest.raises(SettingError, match=match):
        om.export(openelm[0], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_no_more_places_than_the_model_has(tmp_path, openelm):
    report = om.export(openelm[0], tmp_path / "out", places=(32, 9999, 5000), chunk=8)
    assert report.places == (32, 64)


def test_an_output_that_exists_and_places_that_cannot_be(tmp_path, openelm):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for name, match in (("file", r"\(a file\)"), ("full", "files in it"), ("no/out", "no folder")):
        with pytest.raises(DestinationError, match=match):
            om.export(openelm[0], tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "x"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_bytes(b"Bud1")  # the Finder has shown it
    om.export(openelm[0], tmp_path / "empty", places=(32,), chunk=8)
    assert (tmp_path / "empty" / "model.mlxfn").exists()


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path, openelm, monkeypatch):
    def appear(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text("mine")
        return compare(*arguments)

    compare = exporting._compare
    monkeypatch.setattr(exporting, "_compare", appear)
    with pytest.raises(DestinationError, match="appeared"):
        om.export(openelm[0], tmp_path / "out", places=(32,), chunk=8)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "x"]


def test_a_full_disk(tmp_path, openelm, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_write_others", full)
    with pytest.raises(DestinationError, match=r"disk of .* is full"):
        om.export(openelm[0], tmp_path / "out", places=(32,), chunk=8)
    monkeypatch.setattr(exporting, "write_graph", lambda *_: mx.load("/nowhere.safetensors"))
    with pytest.raises(ConversionError, match=r"could not be written .*make room on the disk of"):
        om.export(openelm[0], tmp_path / "out", places=(32,), chunk=8)
    assert not list(tmp_path.iterdir())


def test_an_mlx_that_is_too_old(tmp_path, openelm, monkeypatch):
    monkeypatch.setattr(mx, "exporter", lambda file, function, shapeless=False: None)
    with pytest.raises(ConversionError, match=r"MLX 0\.32\.2 or later"):
        om.export(openelm[0], tmp_path / "out", places=(32,), chunk=8)
    assert not list(tmp_path.iterdir())


def test_interrupted_leaves_nothing(tmp_path, openelm, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_compare", stop)
    with pytest.raises(KeyboardInterrupt):
        om.export(openelm[0], tmp_path / "out", places=(32,), chunk=8)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_says_what_is_left(tmp_path, openelm, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_compare", stop)
    out = str(tmp_path / "out")
    assert main(["export", str(openelm[0]), out, "--places", "32", "--chunk", "8"]) == 130
    told = capsys.readouterr()
    assert told.out == ""
    assert f"Interrupted: {out} was not written" in told.err
    assert not list(tmp_path.iterdir())


def test_the_way_to_build_can_be_pasted_whatever_the_folder_is_called(tmp_path, openelm, capsys):
    out = tmp_path / "it's a $graph"
    assert main(["export", str(openelm[0]), str(out), "--places", "32", "--chunk", "8"]) == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if each.startswith("to build: "))
    words = shlex.split(line.removeprefix("to build: "))
    assert words[:5] == ["cmake", "-S", str(out), "-B", str(out / "build")]
    assert words[-2:] == ["--build", str(out / "build")]


def test_the_command(tmp_path, openelm, capsys):
    assert main(["export", str(openelm[0]), str(tmp_path / "out"), "--places", "32,48", "--chunk", "8"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"read back: 16 of 16 tokens|read back: \d+ of \d+ tokens", out)
    assert "-DMLX_ROOT=" in out
    assert main(["export", str(openelm[0]), str(tmp_path / "out")]) == 2
    assert main(["export", str(openelm[0]), str(tmp_path / "b"), "--places", "a"]) == 2
    assert "--places is 'a'" in capsys.readouterr().err
    assert main(["export", str(openelm[0]), str(tmp_path / "b"), "--chunk", "0"]) == 2
    assert "--chunk is 0" in capsys.readouterr().err
    assert (
        main(["export", str(openelm[0]), str(tmp_path / "b"), "--places", "32", "--chunk", "8", "--json", "--quiet"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["num_compared"] == 31  # after a prompt of one token
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "out"]


def test_steps_of_several_lengths_are_one_function(openelm):
    """The traced function by itself, without a file: 3 tokens at once are 3 tokens one by one."""
    model, _ = om.load(openelm[0])
    step = step_of(model)
    caches = exporting.graph.empty_caches(model, 16, mx.float32)
    logits, *after = step(mx.array([[5, 6, 7]]), mx.array(0), *caches)
    for i, token in enumerate((5, 6, 7)):
        one, *caches = step(mx.array([[token]]), mx.array(i), *caches)
    assert mx.allclose(one, logits, atol=2e-3)
    assert all(np.allclose(np.array(a), np.array(b), atol=1e-4) for a, b in zip(after, caches, strict=True))
