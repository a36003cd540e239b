"""How far rounding a model's dense parts to fewer bits moves its next-token distributions, from the weights as they are.

Both models read the same tokens (teacher forcing) and compute in float32, so that what differs is the weights alone. The
demos read what they say themselves, drawn at temperature 1, so that words they are not sure of come as often as in use. Their
answers they know by heart, and hardly anything shows there; free text is the other end. Models of real width have random
weights, which say how errors grow from layer to layer and nothing of a language.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from openelm_mlx.bench.against import random_prompt
from openelm_mlx.bench.random_checkpoint import write_random_checkpoint
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.bench.random_pair import shape_config
from openelm_mlx.conversion import convert
from openelm_mlx.conversion.verify import kl_divergence
from openelm_mlx.decoding.sampling import SamplingParams
from openelm_mlx.engine.prompt import encode_prompt
from openelm_mlx.generate import stream_generate
from openelm_mlx.loading import load

# 16: the weights as they are, computed in bfloat16, which is what everybody does: what is less than that is no loss.
BITS = 16, 8, 6, 4
WORDS = (
    "banjo", "dog", "king", "doctor", "storm", "violin", "river", "apple", "bridge", "winter", "copper", "money", "glacier",
    "tax", "piano", "teacher", "market", "desert", "letter", "engine", "garden", "island", "judge", "knife", "lemon",
    "mirror", "needle", "ocean", "pencil", "queen", "rabbit", "school", "tiger", "uncle", "valley", "window", "youth",
    "zebra", "anger", "basket", "candle", "danger", "empire", "forest", "guitar", "hammer", "insect", "jacket",
)  # fmt: skip
ANSWER_TOKENS = 60
# What a demo says: the text's name, the words before a WORD, and whether they stand alone or in its chat template.
TEXTS = {"answers": ("What is a {}?", False), "free text": ("The {}", True)}
# Random models: a prompt of so many tokens, and of gpt-oss few experts and rows of the vocabulary, which a CPU can do;
# neither changes what a layer does to an error.
PROMPT_TOKENS, FEW_EXPERTS, FEW_ROWS = 96, 8, 16384
# demo-openelm's groups, as its config has them.
DEMO_GROUP, DEMO_STEPS = 128, 255


@dataclass(frozen=True)
class Divergence:
    """One model at so many bits against itself, over `positions` next-token distributions.

    text: what was read. kl, largest_kl: of the original's distribution from the rounded one's, in nats. same_top: the
    share of positions with the same likeliest token. logits_error: rms of the logits' difference over rms of the
    logits, each less its mean.
    """

    model: str
    text: str
    bits: int
    positions: int
    kl: float
    largest_kl: float
    same_top: float
    logits_error: float

    def line(self) -> str:
        """The figures for people."""
        return (
            f"{self.model:30}{self.text:10}{self.bits:5} {self.positions:9,} {self.kl:9.1e} {self.largest_kl:9.1e} "
            f"{self.same_top:8.2%} {self.logits_error:8.2%}"
        )

    def tsv(self, date: str, command: str) -> str:
        """As a line of memory/quality.tsv, which plans read."""
        family = "openelm" if "openelm" in self.model else "gpt_oss"
        numbers = (f"{each:.2e}" for each in (self.kl, self.largest_kl))
        shares = (f"{each:.4f}" for each in (self.same_top, self.logits_error))
        return "\t".join(
            [family, self.model, self.text, str(self.bits), str(self.positions), *numbers, *shares, date, command]
        )


COLUMNS = "family model text bits positions kl largest_kl same_top logits_error date command".replace(" ", "\t")
HEADING = f"{'model':30}{'text':10}{'bits':>5} {'positions':>9} {'KL':>9} {'largest':>9} {'same top':>8} {'logits':>8}"


def divergence(model: str, text: str, bits: int, expected: Sequence[mx.array], found: Sequence[mx.array]) -> Divergence:
    """The figures of a model from (positions, V) logits of several texts, the original's and the rounded one's."""
    a, b = (mx.concatenate([each.astype(mx.float32) for each in texts]) for texts in (expected, found))
    kl, same = kl_divergence(a, b), mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1)
    a, b = (each - mx.mean(each, axis=-1, keepdims=True) for each in (a, b))
    error = mx.sqrt(mx.mean(mx.square(a - b)) / mx.mean(mx.square(a)))
    values = (each.item() for each in (mx.mean(kl), mx.max(kl), mx.mean(same), error))
    return Divergence(model, text, bits, a.shape[0], *(float(each) for each in values))  # type: ignore[arg-type]


def demo_divergences(source: str, bits: Sequence[int] = BITS, words: Sequence[str] = WORDS) -> Iterator[Divergence]:
    """demo-openelm or demo-gpt-oss over what it says itself, a row for each of `TEXTS`.

    demo-openelm comes in 8 bits, which fewer steps would find again: it is unpacked first, and each weight moved at random
    within its step, so that it is as far from any grid as weights are that were never rounded.
    """
    with tempfile.TemporaryDirectory() as place:
        path = source if source == "demo-gpt-oss" else str(_off_the_grid(Path(place)))
        model, tokenizer = load(path, dtype="float32", chat_template=None)
        texts = {name: _texts(model, tokenizer, name, words) for name in TEXTS}

        def logits(model: Any, name: str) -> list[mx.array]:
            found = [model(mx.array([tokens]))[0, start:-1] for tokens, start in texts[name]]
            mx.eval(found)
            return found

        expected = {name: logits(model, name) for name in TEXTS}
        for each in bits:
            rounded = _rounded(path, each)
            for name in TEXTS:
                yield divergence(source, name, each, expected[name], logits(rounded, name))


def _rounded(path: Path | str, bits: int) -> Any:
    """A model with dense parts in so many bits, in float32; of 16 as it is, in bfloat16."""
    return load(path, dtype="bfloat16")[0] if bits == 16 else load(path, dtype="float32", dense_bits=bits)[0]


def _texts(model: Any, tokenizer: Any, name: str, words: Sequence[str]) -> list[tuple[list[int], int]]:
    """Tokens of a text for each word, and the position before the first one that the model drew."""
    found, (before, raw) = [], TEXTS[name]
    for seed, word in enumerate(words):
        prompt = list(encode_prompt(model, tokenizer, before.format(word), raw=raw).tokens)
        sampling = SamplingParams(temperature=1.0, seed=seed)
        said = stream_generate(model, tokenizer, prompt, max_tokens=ANSWER_TOKENS, sampling=sampling)
        found.append((prompt + [chunk.token for chunk in said if chunk.token is not None], len(prompt) - 1))
    return found


def random_divergences(shape: str, num_layers: int, bits: Sequence[int] = BITS) -> Iterator[Divergence]:
    """A released width with random weights and so many layers, over random tokens: how errors grow."""
    config: Mapping[str, Any] = shape_config(shape, num_layers)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model"
        if shape.startswith("gpt-oss"):
            write_random_gpt_oss(
                path, {**config, "num_local_experts": FEW_EXPERTS, "vocab_size": FEW_ROWS, "eos_token_id": 2}
            )
        else:
            write_random_checkpoint(path, config, "bfloat16")
        expected: list[mx.array] = []
        for each in (None, *bits):
            model = load(path, dtype="float32")[0] if each is None else _rounded(path, each)
            logits = model(mx.array([random_prompt(model, PROMPT_TOKENS)]))[0]
            mx.eval(logits)
            del model
            if each is None:
                expected = [logits]
            else:
                yield divergence(f"{shape}, {num_layers} layers", "random", each, expected, [logits])


def _off_the_grid(folder: Path) -> Path:
    """demo-openelm in float32, each weight moved at random by up to half the step that it was rounded to."""
    made = convert("demo-openelm", folder / "m", dtype="float32").destination
    assert made is not None
    for file in made.glob("*.safetensors"):
        weights = mx.load(str(file))
        assert isinstance(weights, dict)
        for number, (name, weight) in enumerate(sorted(weights.items())):
            if weight.ndim == 2:
                groups = weight.reshape(-1, DEMO_GROUP)
                step = (mx.max(groups, axis=-1, keepdims=True) - mx.min(groups, axis=-1, keepdims=True)) / DEMO_STEPS
                noise = mx.random.uniform(-0.5, 0.5, groups.shape, key=mx.random.key(number))
                weights[name] = (groups + step * noise).reshape(weight.shape)
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)
    return made
