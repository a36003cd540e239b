"""Chat with the tools of the library: calls are held to their schemas while they are written, and reach the tools."""

import json
import sys
from pathlib import Path

import pytest

import openelm_mlx as om
from openelm_mlx.conversation import Answer, Chat, ToolResult
from openelm_mlx.conversation import turn as chats
from openelm_mlx.engine.single import new_sequence
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.tools import sandbox
from openelm_mlx.tools.calls import run
from openelm_mlx.tools.toolbox import Toolbox


@pytest.fixture(scope="module")
def demo():
    return om.load("demo-gpt-oss")


@pytest.mark.slow
def test_the_demo_calls_python_in_the_sandbox(demo):
    if sys.platform != "linux" or sandbox.namespaces_fail():
        pytest.skip("no sandbox")
    with Toolbox("python") as box:
        events = list(Chat(*demo, tools=box.tools, max_tokens=300).stream("What is 4321 + 1234?"))
    results = [event.text for event in events if isinstance(event, ToolResult)]
    assert results == ["5555"]
    assert "5555" in "".join(event.text for event in events if isinstance(event, Answer))


def test_calls_follow_their_schema_whatever_the_model_would_write(demo, monkeypatch):
    """A tool the demo never saw: the call's arguments are valid all the same."""
    model, tokenizer = demo
    harmony = HarmonyFormat(tokenizer)
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
    }
    opening = harmony.encode_markup(
        "<|start|>assistant<|channel|>commentary to=functions.w <|constrain|>json<|message|>"
    )
    prompt = [*harmony.render_for_completion([])[:-2], *opening[: opening.index(harmony.channel)]]
    sampling = om.SamplingParams(temperature=1.5, seed=2, logit_bias=dict.fromkeys(harmony.encode_markup("{}[]"), -5.0))
    from openelm_mlx.decoding.constraint import HarmonyConstraint
    from openelm_mlx.decoding.grammar import answer_format, engine_of
    from openelm_mlx.decoding.sampling import Sampler
    from openelm_mlx.decoding.step import PlainStep
    from openelm_mlx.decoding.tokens import constrained_source, drive
    from openelm_mlx.generate import prefill

    constraint = HarmonyConstraint(harmony, engine_of(tokenizer), None, {"functions.w": answer_format(schema)}, 80)
    header = opening[opening.index(harmony.channel) :]
    for token in header:
        assert constraint.accept(token)
    step = PlainStep(model, model.make_cache())
    logits = prefill(model, [*prompt, *header], step.cache, 512)
    sampler = Sampler(sampling, model.spec.vocab_size, tokenizer.vocab_size)
    tokens = [choice.item() for choice in drive(step, constrained_source(step, sampler, logits, 60, constraint))]
    assert tokens[-1] == harmony.call
    arguments = json.loads(tokenizer.decode(tokens[:-1], continuation=True))
    assert arguments["city"] in ("Oslo", "Rome")
    assert 1 <= arguments["days"] <= 9


def test_chat_hands_its_schemas_over(demo, monkeypatch, tmp_path):
    seen = []

    def record(*arguments, **options):
        seen.append(options.get("tool_schemas"))
        return new_sequence(*arguments, **options)

    monkeypatch.setattr(chats, "new_sequence", record)
    monkeypatch.setattr(chats, "run", lambda *_: iter(()))
    with Toolbox(f"calculator,patch={tmp_path},files={tmp_path}") as box:
        list(Chat(*demo, tools=box.tools).stream("Hi"))
    names = {"functions.calculator", "functions.apply_patch", "browser.search", "browser.open", "browser.find"}
    assert set(seen[0]) == names


def test_a_patch_and_a_file_reach_their_tools_through_a_chat(demo, tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    with Toolbox(f"patch={tmp_path},files={tmp_path}") as box:
        patch, browse = box.tools[0], box.tools[2]
        text = "*** Begin Patch\n*** Update File: a.txt\n@@\n-one\n+two\n*** End Patch"
        assert run(patch, json.dumps({"patch": text})) == "M a.txt"
        assert "L0: two" in run(browse, '{"id": "a.txt"}')
    assert (tmp_path / "a.txt").read_text() == "two\n"
    assert Path(tmp_path).exists()
