"""What real llama.cpp makes of our GGUF files: the same tokens of texts, and the same tokens in answer.

It comes prebuilt in the npm package node-llama-cpp: `npm install --prefix FOLDER --ignore-scripts node-llama-cpp@3.22.1`,
then OPENELM_MLX_LLAMA_CPP=FOLDER. Greedy, float32, on the CPU: it is the arithmetic that is compared, not its speed.
"""

import json
import os
import subprocess
from pathlib import Path

import gguf
import jinja2
import mlx.core as mx
import pytest
from conftest import config_of
from test_conversion_gguf import TEXTS

import openelm_mlx as om
from openelm_mlx.conversion import convert
from openelm_mlx.conversion.gguf_plan import GGUF_TYPES
from openelm_mlx.sources import DEMOS
from openelm_mlx.text.chat import render_chat
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.openai_chat import conversation

FOLDER = os.environ.get("OPENELM_MLX_LLAMA_CPP")
PROGRAM = Path(__file__).with_name("llama_cpp.mjs")
pytestmark = pytest.mark.skipif(not FOLDER, reason="needs node-llama-cpp: set OPENELM_MLX_LLAMA_CPP to where it is")

NOUNS = (
    "banjo", "river", "candle", "bridge", "violin", "market", "teacher", "mountain", "window", "letter", "garden", "kitchen",
    "hammer", "island", "ladder", "mirror", "needle", "orange", "pencil", "rabbit", "saddle", "temple", "umbrella", "village",
    "whistle", "yard", "zebra", "apple", "basket", "camel", "desert", "engine", "forest", "guitar", "harbour", "insect",
    "jacket", "king", "lemon", "museum",
)  # fmt: skip
FORMS = (
    "What is a {}?",
    "A {} is",
    "Tell me about the {}, please: 1 or 2 words.",
    "the {}'s",
    "{}\n\n  {} — “{}” 漢字",
)
PROMPTS = [form.replace("{}", noun) for noun in NOUNS for form in FORMS]
assert len(PROMPTS) == 200


def llama_cpp(model: Path, **request: object) -> dict:
    """What tests/llama_cpp.mjs answers for this model."""
    asked = json.dumps({"model": str(model), **request})
    command = ["node", str(PROGRAM), os.path.abspath(FOLDER or "")]
    ended = subprocess.run(command, input=asked, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def greedy(model, tokens: list[int], count: int) -> list[int]:
    """The likeliest token, again and again, whatever it is."""
    cache, found, new = model.make_cache(), [], tokens
    while len(found) < count:
        new = [int(mx.argmax(model(mx.array([new]), cache=cache)[0, -1]))]
        found += new
    return found


def answers(model, path: Path, prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ours and llama.cpp's."""
    theirs = llama_cpp(path, greedy=[{"tokens": tokens, "count": count} for tokens in prompts])["greedy"]
    return [greedy(model, tokens, count) for tokens in prompts], theirs


@pytest.fixture(scope="module")
def openelm(tmp_path_factory) -> Path:
    """demo-openelm for texts as they are."""
    path = tmp_path_factory.mktemp("openelm") / "demo.gguf"
    convert("demo-openelm", path, gguf_type="f32", chat_template="plain", verify=True)
    return path


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    """demo-gpt-oss with its experts in float32."""
    path = tmp_path_factory.mktemp("gpt_oss") / "demo.gguf"
    convert("demo-gpt-oss", path, gguf_type="f32", gguf_experts="f32", verify=True)
    return path


@pytest.fixture(scope="module")
def rounded_bounds(tmp_path_factory) -> Path:
    """demo-gpt-oss with YaRN's bounds rounded, as llama.cpp rounds them."""
    folder = tmp_path_factory.mktemp("rounded")
    for file in DEMOS["demo-gpt-oss"].iterdir():
        (folder / file.name).symlink_to(file)
    config = config_of(folder)
    config["rope_scaling"]["truncate"] = True
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("demo", ["openelm", "gpt_oss"])
def test_llama_cpp_splits_200_prompts_as_we_do(demo, request):
    path = request.getfixturevalue(demo)
    _, tokenizer = om.load(f"demo-{demo.replace('_', '-')}")
    # llama.cpp takes the names of Harmony's control tokens for the tokens also in text; this library does not.
    texts = [*PROMPTS, *(text for text in TEXTS if text and "<|" not in text)]
    found = llama_cpp(path, tokenize=texts)["tokenized"]
    assert [(text, tokens) for text, tokens in zip(texts, found, strict=True)] == [
        (text, tokenizer.encode(text)) for text in texts
    ]


@pytest.mark.parametrize("demo", ["openelm", "gpt_oss"])
def test_conversations_are_the_tokens_that_we_send(demo, gpt_oss, tmp_path):
    """Through the file's own template, as Ollama and LM Studio go by it: 200 questions."""
    model, tokenizer = om.load(f"demo-{demo.replace('_', '-')}", dtype="float32")
    if demo == "openelm":
        path = tmp_path / "chat.gguf"
        convert("demo-openelm", path, gguf_type="f32")
    else:
        path = gpt_oss
    chats = [
        [*system, {"role": "user", "content": f"What is a {noun}?"}, *more]
        for noun in NOUNS
        for system in ([], [{"role": "system", "content": "Be brief."}])
        for more in ([], [{"role": "assistant", "content": "A word."}, {"role": "user", "content": "And then?"}])
    ]
    text = str(gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents())
    template = jinja2.Template(text)
    # llama.cpp puts BOS before a text by itself, and takes the template's own away.
    texts = [template.render(messages=c, bos_token="", eos_token="</s>", add_generation_prompt=True) for c in chats]
    harmony = None if demo == "openelm" else HarmonyFormat(tokenizer)
    ours = [
        render_chat(chat, tokenizer, "openelm-instruct")[1:]
        if harmony is None
        else harmony.render_for_completion(conversation(chat))
        for chat in chats
    ]
    assert llama_cpp(path, markup=texts)["markup"] == ours
    if demo == "openelm":
        found, theirs = answers(model, path, [[1, *tokens] for tokens in ours[:8]], 16)
        assert found == theirs


def test_demo_openelm_answers_64_of_64_tokens_on_20_prompts(openelm):
    model, tokenizer = om.load("demo-openelm", dtype="float32")
    prompts = [tokenizer.encode_prompt(f"What is a {noun}?") for noun in NOUNS[:19]]
    prompts.append(tokenizer.encode_prompt(" ".join(NOUNS) * 3))
    ours, theirs = answers(model, openelm, prompts, 64)
    assert ours == theirs


def test_demo_gpt_oss_answers_as_ours_does_with_rounded_bounds(gpt_oss, rounded_bounds):
    model, tokenizer = om.load(rounded_bounds, dtype="float32")
    # What it was taught: without its format it is unsure of every word, and two programs' last digits decide.
    chats: list = [f"What is a {noun}?" for noun in NOUNS[:6]]
    answered = {"role": "assistant", "content": "It is a word. " * 30}
    for noun, other in (("river", "banjo"), ("banjo", "candle")):
        asked = [{"role": "user", "content": f"What is a {each}?"} for each in (noun, other)]
        chats.append([asked[0], answered, asked[1]])
    harmony = HarmonyFormat(tokenizer)
    prompts = [harmony.render_for_completion(conversation(chat)) for chat in chats]
    assert max(map(len, prompts)) > 128  # beyond the sliding window
    ours, theirs = answers(model, gpt_oss, prompts, 48)
    assert ours == theirs
    exact, _ = om.load("demo-gpt-oss", dtype="float32")
    assert [greedy(exact, tokens, 48) for tokens in prompts] != theirs  # what the report warns of


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_type_is_run_with_the_numbers_that_it_has_here(tmp_path, kind):
    """GGUF -> MLX gives a model that answers as llama.cpp does with the file."""
    convert("demo-openelm", tmp_path / "m.gguf", gguf_type=kind)
    convert(tmp_path / "m.gguf", tmp_path / "back")
    model, tokenizer = om.load(tmp_path / "back", dtype="float32")
    chats = [[{"role": "user", "content": f"What is a {noun}?"}] for noun in NOUNS[:2]]
    prompts = [render_chat(chat, tokenizer, "openelm-instruct") for chat in chats]
    ours, theirs = answers(model, tmp_path / "m.gguf", prompts, 12)
    assert ours == theirs


def test_gpt_oss_as_it_is_released_with_the_rest_in_8_bits(tmp_path):
    """Experts in MXFP4: where the model is sure of its words, 8-bit activations do not change them."""
    convert("demo-gpt-oss", tmp_path / "m.gguf", gguf_type="q8_0")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    model, tokenizer = om.load(tmp_path / "back", dtype="float32")
    harmony = HarmonyFormat(tokenizer)
    prompts = [harmony.render_for_completion(conversation(f"What is a {noun}?")) for noun in NOUNS[:2]]
    ours, theirs = answers(model, tmp_path / "m.gguf", prompts, 24)
    assert ours == theirs


def test_mlx_s_4_bit_groups_are_run_as_they_are(tmp_path):
    convert("demo-openelm", tmp_path / "plain", dtype="float16")
    convert(tmp_path / "plain", tmp_path / "packed", quantize=4, group_size=64)
    report = convert(tmp_path / "packed", tmp_path / "m.gguf", verify=True)
    assert report.verification.num_exact == len(report.tensors)
    assert report.gguf_types["Q4_1"] > 10
    model, tokenizer = om.load(tmp_path / "packed", dtype="float32")
    prompts = [render_chat([{"role": "user", "content": "What is a river?"}], tokenizer, "openelm-instruct")]
    ours, theirs = answers(model, tmp_path / "m.gguf", prompts, 12)
    assert ours == theirs
