"""Completions as text: Harmony's channels through the loop, with a model that says what it is told to say."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import FIXTURES

import openelm_mlx as om
from openelm_mlx.engine.prompt import encode_prompt
from openelm_mlx.errors import SettingError, TokenizerError
from openelm_mlx.models.adapter_sets import AdapterSet
from openelm_mlx.models.cache import KVCache
from openelm_mlx.models.precision import KernelChoices
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.streams import HarmonyStream
from openelm_mlx.text.tokenizer import load_tokenizer

THOUGHT_AND_ANSWER = (
    "<|channel|>analysis<|message|>The user says stop here.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Yes. Stop here, please.<|return|>"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(FIXTURES / "harmony" / "tokenizer.json")
    tokenizer.chat_template = "harmony"
    return tokenizer


class Scripted:
    """A model whose likeliest next token is always the script's next one."""

    def __init__(self, tokenizer, script: str) -> None:
        size = tokenizer.vocab_size
        self.spec = SimpleNamespace(vocab_size=size, usable_vocab_size=size, eos_tokens=(), only_layers=False)
        self.context_length = 4096
        self.runtime = self.kv_bits = None
        self.is_followed, self.remote = False, None
        self.choices = KernelChoices(compiled_step=False)
        self.adapters = AdapterSet()
        self.script = iter(HarmonyFormat(tokenizer).encode_markup(script))
        self.size = size

    def make_cache(self, **_):
        return [KVCache()]

    def embed(self, tokens):
        return tokens

    def run_layers(self, h, cache, start=0, stop=None, throttle=None):
        return h

    @property
    def layers(self):
        """One, whose keys say nothing."""
        return [
            SimpleNamespace(
                before_attention=lambda h, offset: [mx.zeros((1, 1, h.shape[1], 8))] * 3,
                attention=SimpleNamespace(attend_over=lambda queries, *_: queries),
                after_attention=lambda h, out: h,
            )
        ]

    def head(self, h):
        return mx.zeros((self.size,)).at[next(self.script, 0)].add(9.0)[None]

    def own(self, tokens, cache, throttle=None):
        return self.head(tokens)


def answer(tokenizer, script: str, **options) -> tuple[dict[str | None, str], str]:
    """Text by what it is, and the finish reason."""
    texts: dict[str, str] = {}
    for chunk in om.stream_generate(Scripted(tokenizer, script), tokenizer, "Hi", **options):
        for name, text in (
            ("final", chunk.text),
            ("analysis", chunk.reasoning),
            ("commentary", chunk.preamble),
            (chunk.recipient, chunk.arguments),
        ):
            if text:
                texts[name] = texts.get(name, "") + text
        reason = chunk.finish_reason
    return texts, reason


def test_reasoning_and_answer_come_in_their_channels(tokenizer):
    texts = {"analysis": "The user says stop here.", "final": "Yes. Stop here, please."}
    assert answer(tokenizer, THOUGHT_AND_ANSWER) == (texts, "stop")
    assert om.generate(Scripted(tokenizer, THOUGHT_AND_ANSWER), tokenizer, "Hi") == texts["final"]


@pytest.mark.parametrize(
    "header", ["user<|channel|>final", "functions.f to=assistant<|channel|>final", "system<|channel|>final"]
)
def test_what_others_say_is_no_answer_on_whatever_channel(tokenizer, header):
    script = THOUGHT_AND_ANSWER.replace("<|return|>", f"<|end|><|start|>{header}<|message|>Mine.<|return|>")
    texts, _ = answer(tokenizer, script)
    assert texts["final"] == "Yes. Stop here, please."
    assert texts["analysis"].endswith("Mine.")


def test_messages_end_where_a_stop_string_ended_the_answer(tokenizer):
    stream = HarmonyStream(tokenizer, ["STOP"])
    script = "<|channel|>final<|message|>ab<|end|><|start|>assistant<|channel|>final<|message|>cdSTOPef"
    for token in HarmonyFormat(tokenizer).encode_markup(script):
        if stream.add(token).is_stopped:
            break
    stream.finish()
    assert [message.text for message in stream.messages] == ["ab", "cd"]


def test_what_others_say_in_a_completion_is_no_part_of_the_answer(tokenizer):
    invented = "<|end|><|start|>user<|message|>And you?<|end|><|start|>functions.f<|message|>7<|return|>"
    script = THOUGHT_AND_ANSWER.replace("<|return|>", invented)
    assert om.generate(Scripted(tokenizer, script), tokenizer, "Hi") == "Yes. Stop here, please."
    assert answer(tokenizer, script)[0]["analysis"].endswith("And you?7")


@pytest.mark.parametrize("stray", ["\n", "Hm.", "A line.\n", "Sure!<|end|>", "a<|end|>b"])
@pytest.mark.parametrize("begins", [False, True])
def test_a_stray_line_between_messages_is_not_the_start_of_the_answer(tokenizer, stray, begins):
    thought, rest = THOUGHT_AND_ANSWER.split("<|start|>")
    script = f"{'' if begins else thought}{stray}<|start|>{rest}"
    texts, reason = answer(tokenizer, script, stop=["!!"])
    assert (texts["final"], reason) == ("Yes. Stop here, please.", "stop")
    # Cut anywhere in the thought, nothing of the line is taken for an answer.
    script = f"{stray}<|start|>assistant{THOUGHT_AND_ANSWER}"
    length = len(HarmonyFormat(tokenizer).encode_markup(f"{stray}<|start|>assistant<|channel|>analysis<|message|>The"))
    texts, reason = answer(tokenizer, script, max_tokens=length)
    assert (texts.get("final"), reason) == (None, "length")


@pytest.mark.parametrize("stop", ["Stop here", "top he", ". S"])
def test_stop_strings_count_in_the_final_channel_only(tokenizer, stop):
    texts, reason = answer(tokenizer, THOUGHT_AND_ANSWER, stop=[stop, "user says"])
    whole = "Yes. Stop here, please."
    assert texts == {"analysis": "The user says stop here.", "final": whole[: whole.index(stop)]}
    assert reason == "stop"


def test_what_might_become_a_stop_string_is_not_lost_at_the_end(tokenizer):
    assert answer(tokenizer, THOUGHT_AND_ANSWER, stop=["please.!"])[0]["final"] == "Yes. Stop here, please."
    cut = "<|channel|>final<|message|>ab<|end|><|start|>assistant<|channel|>analysis<|message|>c<|end|>"
    assert answer(tokenizer, cut + "<|return|>", stop=["abc"])[0] == {"final": "ab", "analysis": "c"}


@pytest.mark.parametrize("max_tokens", range(1, 20))
def test_a_truncated_completion_ends_with_length_and_reasoning_stays_reasoning(tokenizer, max_tokens):
    texts, reason = answer(tokenizer, THOUGHT_AND_ANSWER, max_tokens=max_tokens)
    whole = {"analysis": "The user says stop here.", "final": "Yes. Stop here, please."}
    assert reason == "length"
    assert all(whole[channel].startswith(text) for channel, text in texts.items())


def test_the_effort_and_the_date_reach_the_prompt(tokenizer):
    model = Scripted(tokenizer, "")
    harmony = HarmonyFormat(tokenizer)
    for effort in ("low", "medium", "high"):
        text = harmony.decode_markup(encode_prompt(model, tokenizer, "Hi", reasoning_effort=effort).tokens)
        assert f"Reasoning: {effort}\n" in text
        assert "Current date: 20" in text
        assert text.endswith("<|start|>user<|message|>Hi<|end|><|start|>assistant")
    with pytest.raises(SettingError, match="extreme"):
        encode_prompt(model, tokenizer, "Hi", reasoning_effort="extreme")


def test_an_effort_without_harmony_is_refused(tokenizer):
    with pytest.raises(SettingError, match="only gpt-oss"):
        encode_prompt(Scripted(tokenizer, ""), tokenizer, "Hi", raw=True, reasoning_effort="low")


def test_a_tokenizer_without_harmony_s_tokens_is_refused():
    other = load_tokenizer(FIXTURES / "tokenizers" / "llama")
    with pytest.raises(TokenizerError, match="gpt-oss"):
        HarmonyStream(other, [])


@pytest.mark.parametrize("stop", ["<|call|>", "<|return|>", "<|endoftext|>"])
def test_harmony_s_stops_hold_whatever_the_files_say(tokenizer, stop):
    """The scripted model names no stop at all, as the first generation_config.json lacked <|call|>."""
    script = f"<|channel|>commentary to=functions.f<|message|>{{}}{stop}<|start|>functions.f<|message|>invented"
    *_, last = om.stream_generate(Scripted(tokenizer, script), tokenizer, "Hi", max_tokens=60)
    assert last.finish_reason == "stop"
    assert last.token == tokenizer.special_tokens[stop]


def test_raw_text_is_not_read_as_harmony(tokenizer):
    texts, _ = answer(tokenizer, "final words<|return|>", raw=True)
    assert texts == {"final": "final words"}
