"""Train demo-gpt-oss, the small mixture of experts that the package ships, with the library's own model.

    python examples/train/train_gpt_oss_demo.py --data build/demo-gpt-oss --run build/gpt-oss --minutes 8
    python examples/train/train_gpt_oss_demo.py --data build/demo-gpt-oss --run build/smoke --smoke  # a minute

`--data` is the folder that gpt_oss_prepare.py wrote. `--run` gets loss.csv and the folder `gpt_oss`, the model in
OpenAI's layout, written anew every two minutes and at the end. gpt_oss_quality.py measures it.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from gpt_oss_answering import completions
from gpt_oss_batches import Batch, Turns
from gpt_oss_conversations import final
from gpt_oss_export import CONFIG, write_demo
from gpt_oss_model import DenseMoE, TrainingGptOss, rounded
from gpt_oss_words import STEPS, Word, load_words, word_analysis
from mlx import nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from questions import standard_question

from openelm_mlx.models.gpt_oss import GptOss
from openelm_mlx.specs import ModelSpec, spec_from_config
from openelm_mlx.text.conversation import Message, SystemContent
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.tokenizer import load_tokenizer
from openelm_mlx.training.optimizer import adamw, set_rate

SMOKE_CONFIG = CONFIG | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8}
SMOKE_CONFIG["layer_types"] = CONFIG["layer_types"][:2]


@dataclass(frozen=True)
class Settings:
    """How to train. Whichever of `minutes` and `steps` is given ends the run and sets the pace of the schedule."""

    minutes: float | None
    steps: int | None
    num_rows: int = 64
    length: int = 448
    peak_learning_rate: float = 2e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 300
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    balance: float = 0.01  # how much the routers' loss counts
    dtype: str = "float32"  # of the computation; the weights that are trained are float32
    seed: int = 7
    log_every: int = 50
    save_minutes: float = 2.0
    num_measured: int = 250

    def progress(self, step: int, minutes: float) -> float:
        """How much of the run is done, 0 to 1."""
        return min(1.0, step / self.steps if self.steps else minutes / self.minutes)

    def learning_rate(self, step: int, minutes: float) -> float:
        """Linear warm-up, then a cosine from the peak to the final rate."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(step, minutes)))
        rate = self.final_learning_rate + (self.peak_learning_rate - self.final_learning_rate) * cosine
        return rate * min(1.0, (step + 1) / self.warmup_steps)


def main() -> None:
    arguments = parse_arguments()
    settings = Settings(arguments.minutes, arguments.steps)
    settings = replace(settings, **{k: v for k in ("num_rows", "dtype") if (v := getattr(arguments, k)) is not None})
    config = CONFIG
    if arguments.smoke:
        settings = replace(settings, steps=12, num_rows=2, warmup_steps=4, log_every=4, num_measured=4)
        config = SMOKE_CONFIG
    if mx.default_device() == mx.Device(mx.cpu):
        mx.disable_compile()  # compiling the CPU's kernels takes longer than they save
    run = Run(config, settings, arguments.data, arguments.run)
    run.train()
    run.finish()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that gpt_oss_prepare.py wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder for the losses and the result")
    parser.add_argument("--num-rows", type=int, help="rows of a batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="type of the computation")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train this long; the schedule follows the clock")
    length.add_argument("--steps", type=int, help="train this many steps")
    length.add_argument("--smoke", action="store_true", help="a tiny model and a few steps: does it all run?")
    return parser.parse_args()


class Run:
    """One training run: what is trained, the data it sees, and the folder the result goes to."""

    def __init__(self, config: dict[str, Any], settings: Settings, data: Path, folder: Path) -> None:
        self.config, self.settings, self.data, self.folder = config, settings, data, folder
        self.spec = spec_from_config(config)
        self.harmony = HarmonyFormat(load_tokenizer(data))
        self.words = load_words(data / "words.jsonl")
        mx.random.seed(settings.seed)
        self.model = TrainingGptOss(self.spec)
        self.model.update(initial_parameters(self.model, self.spec))
        self.optimizer = adamw((0.9, 0.98), 1e-8, settings.weight_decay, is_decayed)
        self.optimizer.init(self.model.trainable_parameters())
        self.step, self.minutes = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self.log = LossLog(folder / "loss.csv")

    def train(self) -> None:
        """Train to the end of the settings' time or steps, and save now and then."""
        settings = self.settings
        train_step = compiled_step(self.model, self.optimizer, self.spec, settings)
        source = prefetched(Turns(self.data / "turns.npz").batches(settings.seed, settings.num_rows, settings.length))
        started, saved, reported = None, 0.0, (0, 0.0)
        while settings.progress(self.step, self.minutes) < 1:
            rate = settings.learning_rate(self.step, self.minutes)
            losses = train_step(mx.array(rate), *map(mx.array, next(source)))
            # Dispatched, not awaited: the device works on this step while the host prepares the next.
            mx.async_eval(losses, self.model.state, self.optimizer.state)
            self.step += 1
            if started is None:
                mx.eval(losses)  # the clock starts when the step is compiled, which can take a minute
                started = time.perf_counter()
            if self.step % settings.log_every == 0:
                values = losses.tolist()  # waits for the device
                steps, minutes = self.step - reported[0], self.minutes - reported[1]
                speed = steps * settings.num_rows * settings.length / max(60 * minutes, 1e-9)
                self.log.add(self.step, self.minutes, rate, values, speed)
                reported = self.step, self.minutes
            self.minutes = (time.perf_counter() - started) / 60
            if self.minutes - saved > settings.save_minutes:
                self.save()
                self.measure(min(100, settings.num_measured))
                saved = self.minutes

    def save(self) -> None:
        """Write the model as it would be shipped."""
        write_demo(self.model, self.data / "tokenizer.json", self.folder / "gpt_oss", self.config)

    def measure(self, count: int) -> None:
        """Print what share of `count` words, spread over the list, get their gloss, and what share their chain."""
        words = self.words[:: max(1, len(self.words) // count)][:count]
        efforts = list(STEPS)
        asked = [(word, efforts[i % len(efforts)]) for i, word in enumerate(words)]
        rows = completions(
            stored_model(self.model, self.spec), self.harmony, [question(*each) for each in asked], 160, 256
        )
        replies = [self.harmony.parse(tokens) for tokens in rows]
        glosses = sum(final(word.gloss) in reply for reply, (word, _) in zip(replies, asked, strict=True))
        chains = sum(
            any(m.text == word_analysis(word, effort) for m in reply)
            for reply, (word, effort) in zip(replies, asked, strict=True)
        )
        print(
            f"step {self.step:,}, {self.minutes:.1f} min: {glosses / count:.1%} glosses, {chains / count:.1%} chains "
            f"of {count}",
            file=sys.stderr,
        )

    def finish(self) -> None:
        """Save, measure, and tell the size."""
        self.save()
        size = sum(file.stat().st_size for file in (self.folder / "gpt_oss").iterdir())
        print(f"{self.folder / 'gpt_oss'}: {size / 2**20:.2f} MiB", file=sys.stderr)
        self.measure(self.settings.num_measured)


def question(word: Word, effort: str) -> Sequence[Message]:
    """The plain question for a word."""
    kinds = {"common noun": "noun", "verb": "verb", "adj": "adj", "adv": "adv"}
    text = standard_question(word.word, kinds.get(word.kind, "noun"))
    return [
        Message("system", SystemContent(current_date="2026-03-09", reasoning_effort=effort)),
        Message("user", text),
    ]


def initial_parameters(model: TrainingGptOss, spec: ModelSpec) -> dict[str, Any]:
    """Normal with standard deviation in_features^-0.5, divided by (2 L)^0.5 where a residual is added to.

    Gains are 1; biases and sinks 0; embeddings and the head have OpenAI's initializer_range, 0.02.
    """

    def initial(name: str, parameter: mx.array) -> mx.array:
        if parameter.ndim == 1 or name.endswith(".bias"):
            return mx.ones_like(parameter) if name.endswith("norm.weight") else mx.zeros_like(parameter)
        if name.startswith(("model.embed_tokens", "lm_head")):
            return 0.02 * mx.random.normal(parameter.shape)
        std = parameter.shape[-1] ** -0.5
        adds_to_residual = "o_proj" in name or "down_proj" in name
        return std * (2 * len(spec.layers)) ** (-0.5 * adds_to_residual) * mx.random.normal(parameter.shape)

    return tree_unflatten([(name, initial(name, p)) for name, p in tree_flatten(model.parameters())])


def is_decayed(name: str, parameter: mx.array) -> bool:
    """Gains, biases and sinks are not."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def compiled_step(
    model: TrainingGptOss, optimizer: optim.Optimizer, spec: ModelSpec, settings: Settings
) -> Callable[..., mx.array]:
    """One step of training, compiled: (learning rate, a batch's four arrays) -> loss and balance loss, (2,)."""
    dtype = getattr(mx, settings.dtype)
    worker = TrainingGptOss(spec)  # computes with the weights as they will be stored; gradients flow to the model's

    def loss(parameters: dict[str, Any], *batch: mx.array) -> tuple[mx.array, mx.array]:
        worker.update(tree_map_with_path(lambda name, p: computed_in(name, p, spec, dtype), rounded(parameters)))
        tokens, learned, turns, positions = batch
        logits = worker(tokens[:, :-1], turns[:, :-1], positions[:, :-1]).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
        mean = (losses * learned[:, 1:]).sum() / learned[:, 1:].sum()
        balance = worker.balance_loss()
        return mean + settings.balance * balance, mx.stack([mean, balance])

    state = [model.state, optimizer.state]

    def step(rate: mx.array, *batch: mx.array) -> mx.array:
        (_, losses), gradients = mx.value_and_grad(loss)(model.trainable_parameters(), *batch)
        gradients, _ = optim.clip_grad_norm(gradients, settings.max_grad_norm)
        set_rate(optimizer, rate)
        optimizer.update(model, gradients)
        return losses

    return mx.compile(step, inputs=state, outputs=state)


def computed_in(name: str, parameter: mx.array, spec: ModelSpec, dtype: mx.Dtype) -> mx.array:
    """A parameter in the type it is computed with: gains and routers stay float32, as in the library."""
    return parameter if spec.keeps_float32(name) else parameter.astype(dtype)


def stored_model(model: TrainingGptOss, spec: ModelSpec) -> GptOss:
    """The model as it would be read back, in float32, fit to generate in large batches."""
    stored = GptOss(spec)
    for layer, layer_spec in zip(stored.layers, spec.layers, strict=True):
        layer.mlp = DenseMoE(spec, layer_spec)
    stored.update(rounded(model.parameters()))
    return stored


def prefetched(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, some made ahead in a thread while the device works."""
    queue: Queue[Batch] = Queue(16)

    def fill() -> None:
        for batch in batches:
            queue.put(batch)

    Thread(target=fill, daemon=True).start()
    while True:
        yield queue.get()


class LossLog:
    """loss.csv, and the same on the terminal."""

    COLUMNS = ("step", "minutes", "learning_rate", "loss", "balance", "tokens_per_second")

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(self.COLUMNS)

    def add(self, step: int, minutes: float, rate: float, losses: Sequence[float], speed: float) -> None:
        """One more row."""
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow(
                [step, f"{minutes:.4f}", f"{rate:.6f}", *(f"{x:.5f}" for x in losses), f"{speed:.0f}"]
            )
        print(
            f"step {step:,}  {minutes:.2f} min  loss {losses[0]:.4f}  balance {losses[1]:.3f}  {speed:,.0f} tok/s",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
