"""Train demo-openelm, the pocket dictionary that the package ships, with the library's own model.

    python examples/train/train_openelm_demo.py --data build/demo-openelm --run build/run --minutes 8
    python examples/train/train_openelm_demo.py --data build/demo-openelm --run build/smoke --smoke  # seconds

`--data` is the folder that prepare.py wrote. `--run` holds the newest checkpoint, from which the same command goes on
after an interruption, loss.csv, loss.png (with matplotlib installed) and, at the end, the folder `openelm`: the model,
8-bit, in Apple's Hugging Face layout. docs/training.md tells how the shipped one was made.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from answering import answers, unpacked
from batches import Batch, PackerState, Prose, Recipe, Rows, StreamState, prefetched
from export import write_demo
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from openelm_mlx.models.openelm import OpenELM
from openelm_mlx.specs import ModelSpec, spec_from_config
from openelm_mlx.text.tokenizer import load_tokenizer
from openelm_mlx.training.optimizer import adamw, is_matrix, set_rate

# Apple's rule of layer-wise scaling at a size whose 8-bit weights fit in 12 MiB, everything counted. Wide and shallow,
# because on a CPU the number of layers costs more than their width; every width is a multiple of 128, the group size.
DEMO_CONFIG = {
    "model_type": "openelm",
    "num_transformer_layers": 8,
    "model_dim": 384,
    "head_dim": 32,
    "num_gqa_groups": 4,
    "qkv_multipliers": [0.5, 1.0],
    "ffn_multipliers": [0.5, 3.5],
    "ffn_dim_divisor": 128,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "rope_freq_constant": 10000,
    "max_context_length": 512,
    "vocab_size": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMOKE_CONFIG = DEMO_CONFIG | {"num_transformer_layers": 2, "model_dim": 128}
SMOKE_RECIPE = Recipe(
    short_length=64, short_rows=4, long_length=128, long_conversation_rows=1, prose_rows=1, sentence_rows=1
)


@dataclass(frozen=True)
class Settings:
    """How to train. Whichever of `minutes` and `steps` is given ends the run and sets the pace of the schedule."""

    minutes: float | None
    steps: int | None
    peak_learning_rate: float = 3e-3
    final_learning_rate: float = 3e-5
    warmup_steps: int = 200
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    dtype: str = "bfloat16"  # of the computation; the weights that are trained are float32
    seed: int = 7
    log_every: int = 20
    checkpoint_minutes: float = 2.0
    num_measured: int = 256  # head words asked for at each checkpoint
    num_finally_measured: int = 1000  # and at the end, before and after quantization
    num_validation_rows: int = 400

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
    if mx.default_device() == mx.Device(mx.cpu):
        # The CPU backend has no fast half precision, and compiling its kernels takes longer than they save.
        settings = replace(settings, dtype="float32")
        mx.disable_compile()
    spec, recipe = spec_from_config(DEMO_CONFIG), Recipe()
    if arguments.smoke:
        settings = replace(
            settings, steps=6, warmup_steps=2, log_every=2, num_finally_measured=2, num_validation_rows=2
        )
        spec, recipe = spec_from_config(SMOKE_CONFIG), SMOKE_RECIPE
    run = Run(spec, recipe, settings, arguments.data, arguments.run)
    run.resume()
    run.train()
    run.finish()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare.py wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints, losses and the result")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train this long; the schedule follows the clock")
    length.add_argument("--steps", type=int, help="train this many steps")
    length.add_argument("--smoke", action="store_true", help="a tiny model and a few steps: does it all run?")
    return parser.parse_args()


class Run:
    """One training run: what is trained, the data it sees, and the folder it can be resumed from."""

    def __init__(self, spec: ModelSpec, recipe: Recipe, settings: Settings, data: Path, folder: Path) -> None:
        self.spec, self.recipe, self.settings, self.data, self.folder = spec, recipe, settings, data, folder
        self.tokenizer = load_tokenizer(data)
        self.prose = Prose(data / "prose.npz")
        self.dictionary = [line.split("\t") for line in (data / "dictionary.tsv").read_text().splitlines()]
        mx.random.seed(settings.seed)
        self.model = OpenELM(spec)
        self.model.update(initial_parameters(self.model, spec))
        self.optimizer = adamw((0.9, 0.98), 1e-8, settings.weight_decay, is_matrix)
        self.optimizer.init(self.model.trainable_parameters())
        self.step, self.minutes = 0, 0.0
        self.stream: StreamState | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.log = LossLog(folder / "loss.csv")

    def train(self) -> None:
        """Train to the end of the settings' time or steps, with a checkpoint now and then."""
        train_step = compiled_step(self.model, self.optimizer, self.spec, self.settings)
        source = prefetched(self.data, self.recipe, self.settings.seed, self.stream)
        started, saved = None, self.minutes
        while self.settings.progress(self.step, self.minutes) < 1:
            batch = next(source)
            rate = self.settings.learning_rate(self.step, self.minutes)
            losses = train_step(mx.array(rate), *as_arrays(batch))
            # Dispatched, not awaited: the device works on this step while the host prepares the next.
            mx.async_eval(losses, self.model.state, self.optimizer.state)
            self.step, self.stream = self.step + 1, batch.state
            if self.step % self.settings.log_every == 0:
                self.report(rate, *losses.tolist())  # waits for the device
            if started is None:
                mx.eval(losses)  # the clock starts when the step is compiled, which can take a minute
                started = time.perf_counter() - 60 * self.minutes
            self.minutes = (time.perf_counter() - started) / 60
            if self.minutes - saved > self.settings.checkpoint_minutes:
                self.measure(self.settings.num_measured)
                self.save()
                saved = self.minutes

    def report(self, rate: float, dictionary_loss: float, prose_loss: float) -> None:
        """One line on the terminal and in loss.csv."""
        tokens = self.step * self.recipe.tokens
        done = max(self.settings.progress(self.step, self.minutes), 1e-9)
        self.log.add(self.step, self.minutes, tokens, learning_rate=rate, dictionary=dictionary_loss, prose=prose_loss)
        print(
            f"\rstep {self.step:,}  dictionary {dictionary_loss:.3f}  prose {prose_loss:.3f}  "
            f"{self.log.tokens_per_second():,.0f} tok/s  {self.minutes * (1 / done - 1):.1f} min left   ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def measure(self, count: int) -> float:
        """The share of `count` head words, spread over the list, that get exactly their gloss; also prose loss."""
        chosen = self.dictionary[:: max(1, len(self.dictionary) // count)][:count]
        replies = answers(self.model, self.tokenizer, [question for question, _ in chosen], batch_size=512)
        correct = sum(reply == gloss for reply, (_, gloss) in zip(replies, chosen, strict=True)) / len(chosen)
        rows = self.prose.validation_rows(self.recipe.short_length, self.settings.num_validation_rows)
        validation = validation_loss(self.model, rows)
        tokens = self.step * self.recipe.tokens
        self.log.add(self.step, self.minutes, tokens, validation=validation, correct=correct)
        print(f"\nstep {self.step:,}: {correct:.1%} of {count} words, validation {validation:.3f}", file=sys.stderr)
        return correct

    def save(self) -> None:
        """Write a checkpoint beside the last one, then drop that: a crash leaves one of them whole."""
        final = self.folder / f"checkpoint-{self.step:07d}"
        if final.exists():  # resumed at its very end
            return
        assert self.stream is not None
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        mx.save_safetensors(str(partial / "model.safetensors"), dict(tree_flatten(self.model.parameters())))
        mx.save_safetensors(str(partial / "optimizer.safetensors"), dict(tree_flatten(self.optimizer.state)))
        rng, short, long = self.stream
        np.savez(partial / "stream.npz", *short, *long)
        state = {"step": self.step, "minutes": self.minutes, "rng": rng, "recipe": asdict(self.recipe)}
        (partial / "state.json").write_text(json.dumps(state))
        partial.rename(final)
        for old in self._checkpoints()[:-1]:
            shutil.rmtree(old)

    def resume(self) -> None:
        """Go on from the newest checkpoint in the folder, if there is one."""
        found = self._checkpoints()
        if not found:
            return
        self.model.load_weights(str(found[-1] / "model.safetensors"))
        self.optimizer.state = tree_unflatten(list(mx.load(str(found[-1] / "optimizer.safetensors")).items()))
        state = json.loads((found[-1] / "state.json").read_text())
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{found[-1]} was made with another recipe of batches: choose another --run folder.")
        arrays = list(np.load(found[-1] / "stream.npz").values())
        self.stream = StreamState(state["rng"], PackerState(*arrays[:2]), PackerState(*arrays[2:]))
        self.step, self.minutes = state["step"], state["minutes"]
        self.log.cut_after(self.step)
        print(f"Resuming at step {self.step:,}, {self.minutes:.1f} minutes in.", file=sys.stderr)

    def finish(self) -> None:
        """Measure, save, write the 8-bit model, measure that, and draw the losses."""
        print(file=sys.stderr)
        self.measure(self.settings.num_finally_measured)
        self.save()
        destination = self.folder / "openelm"
        quantized = write_demo(self.model, self.spec, self.data / "tokenizer.model", destination)
        size = sum(file.stat().st_size for file in destination.iterdir())
        print(f"{destination}: {size / 2**20:.2f} MiB", file=sys.stderr)
        self.model = unpacked(quantized)
        self.measure(self.settings.num_finally_measured)
        self.log.plot(self.folder / "loss.png")

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("checkpoint-*") if p.suffix != ".partial")


def initial_parameters(model: OpenELM, spec: ModelSpec) -> dict[str, Any]:
    """OpenELM's own initialisation (CoreNet's `reset_parameters`): normal, narrower where a residual is added to.

    Standard deviation in_features^-0.5, but model_dim^-0.5 (2 L)^-0.5 for out_proj and proj_2; gains are 1.
    """

    def initial(name: str, parameter: mx.array) -> mx.array:
        if parameter.ndim == 1:
            return mx.ones_like(parameter)
        adds_to_residual = "out_proj" in name or "proj_2" in name
        std = (2 * len(spec.layers) * spec.hidden_size) ** -0.5 if adds_to_residual else parameter.shape[1] ** -0.5
        return std * mx.random.normal(parameter.shape)

    return tree_unflatten([(name, initial(name, p)) for name, p in tree_flatten(model.parameters())])


def compiled_step(
    model: OpenELM, optimizer: optim.Optimizer, spec: ModelSpec, settings: Settings
) -> Callable[..., mx.array]:
    """One step of training, compiled: (learning rate, arrays of the batch) -> losses of dictionary and prose, (2,)."""
    dtype = getattr(mx, settings.dtype)
    worker = OpenELM(spec)  # computes with a copy of the weights in `dtype`; gradients flow to the float32 ones

    def loss(parameters: dict[str, Any], *batch: mx.array) -> tuple[mx.array, mx.array]:
        worker.update(tree_map(lambda p: p.astype(dtype), parameters))
        short_tokens, short_learned, long_tokens, long_learned, is_prose = batch
        short, long = token_losses(worker, short_tokens), token_losses(worker, long_tokens)
        prose = (long * long_learned * is_prose).sum(), (long_learned * is_prose).sum()
        dictionary = (
            (short * short_learned).sum() + (long * long_learned * (1 - is_prose)).sum(),
            short_learned.sum() + (long_learned * (1 - is_prose)).sum(),
        )
        mean = (dictionary[0] + prose[0]) / (dictionary[1] + prose[1])
        return mean, mx.stack([dictionary[0] / dictionary[1], prose[0] / prose[1]])

    state = [model.state, optimizer.state]

    def step(rate: mx.array, *batch: mx.array) -> mx.array:
        (_, losses), gradients = mx.value_and_grad(loss)(model.trainable_parameters(), *batch)
        gradients, _ = optim.clip_grad_norm(gradients, settings.max_grad_norm)
        set_rate(optimizer, rate)
        optimizer.update(model, gradients)
        return losses

    return mx.compile(step, inputs=state, outputs=state)


def token_losses(model: OpenELM, tokens: mx.array) -> mx.array:
    """Cross entropy of each token after the first, float32. (R, length + 1) -> (R, length)"""
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:])


def as_arrays(batch: Batch) -> tuple[mx.array, ...]:
    """Tokens and which are learned, short then long, and which long rows are prose, all for `compiled_step`."""

    def tokens_and_learned(rows: Rows) -> tuple[mx.array, mx.array]:
        return mx.array(rows.tokens.astype(np.int32)), mx.array(rows.learned[:, 1:].astype(np.float32))

    # Prose learns its first token after BOS, conversations never do.
    is_prose = batch.long.learned[:, 1:2].astype(np.float32)
    return *tokens_and_learned(batch.short), *tokens_and_learned(batch.long), mx.array(is_prose)


def validation_loss(model: OpenELM, rows: Rows) -> float:
    """Mean loss over the rows' learned tokens."""
    total = 0.0
    for start in range(0, len(rows.tokens), 64):
        tokens, learned = rows.tokens[start : start + 64], rows.learned[start : start + 64, 1:]
        losses = token_losses(model, mx.array(tokens.astype(np.int32)))
        total += (losses * mx.array(learned.astype(np.float32))).sum().item()
    return total / rows.learned[:, 1:].sum()


class LossLog:
    """loss.csv: a row for each report and each measurement, empty where a row has no such number."""

    COLUMNS = ("step", "minutes", "tokens", "learning_rate", "dictionary", "prose", "validation", "correct")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                self._rows = [{k: json.loads(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    def add(self, step: int, minutes: float, tokens: int, **numbers: float) -> None:
        self._rows.append({"step": step, "minutes": round(minutes, 4), "tokens": tokens, **numbers})
        self._write()

    def cut_after(self, step: int) -> None:
        """Forget what was logged after the checkpoint that training goes on from."""
        self._rows = [row for row in self._rows if row["step"] <= step]
        self._write()

    def tokens_per_second(self) -> float:
        """Over the last two reports."""
        last = [row for row in self._rows if "dictionary" in row][-2:]
        if len(last) < 2 or last[1]["minutes"] <= last[0]["minutes"]:
            return 0.0
        return (last[1]["tokens"] - last[0]["tokens"]) / (60 * (last[1]["minutes"] - last[0]["minutes"]))

    def plot(self, path: Path) -> None:
        """Draw the losses; without matplotlib, say how to get it."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("No loss.png: pip install matplotlib draws it from loss.csv.", file=sys.stderr)
            return
        figure = Figure(figsize=(8, 5))
        axes = figure.add_subplot(xlabel="million tokens", ylabel="loss", yscale="log")
        for column, style in (("dictionary", "-"), ("prose", "-"), ("validation", "o--")):
            points = [(row["tokens"] / 1e6, row[column]) for row in self._rows if column in row]
            axes.plot(*zip(*points, strict=True), style, label=column, linewidth=1)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120, bbox_inches="tight")

    def _write(self) -> None:
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)


if __name__ == "__main__":
    main()
