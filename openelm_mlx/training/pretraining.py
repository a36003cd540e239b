"""Training a model from nothing: a config, tokens, and CoreNet's recipe, through the same steps as fine-tuning."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .. import __version__
from ..arguments import FLAG, FUNCTION, PATH, check_kind, checked_call
from ..checkpoint.destination import write_folder
from ..checks import is_number, whole_number
from ..errors import ConfigError, DataError, SettingError
from ..files import expanded, read_yaml, shown
from ..memory.machine import this_machine
from ..models import build_model
from ..placement import DTYPES
from ..platforms import keep_float32, use_device
from ..specs import ModelSpec, openelm_config, spec_from_config
from ..text.chat import TEMPLATES
from ..text.tokenizer import load_tokenizer
from ..text.tokenizer_files import TOKENIZER_FILES
from .batches import NOT_LEARNED, Row, order_of, rows_of_step
from .full_output import CONFIG, WEIGHTS, as_json
from .loop import Listener, Part, Trainer
from .optimizer import Schedule, adamw, is_matrix
from .products import multiply_both_ways
from .rows import parts_of
from .state import RunFolder, check_output
from .steps import Gradients, Objective

if TYPE_CHECKING:
    from ..models import Model


_NUMBERS = (
    "learning_rate", "final_learning_rate", "eps", "weight_decay", "max_grad_norm", "z_loss",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """A run as a YAML file says it. Paths are relative to the file.

    model: a config.json's fields. data: an .npz with `tokens` (T,), and `starts` where there are documents (and `learned`); or
    a .jsonl of texts, with a tokenizer. tokenizer: copied beside the weights. length: tokens of a row; rows: of a step.
    tokens_at_once: of a step that go through the model at once. decay_norms: see `Settings`. weight decay is none on norms
    unless it is set. documents: "packed" (rows hold whole documents, which do not see each other) or "stream" (as they follow
    each other). validation: of the same form as data. dtype: of the computation; weights are kept in float32.
    """

    model: Mapping[str, Any]
    data: str
    steps: int
    tokenizer: str | None = None
    chat_template: str | None = None
    validation: str | None = None
    validate_every: int = 100
    documents: str = "packed"
    length: int = 512
    rows: int = 16
    tokens_at_once: int = 8192
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-5
    warmup_steps: int = 200
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    z_loss: float = 1e-4
    checkpointing: bool = False
    dtype: str = "float32"
    seed: int = 7

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TrainingConfig:
        """Read and check a file. Raises ConfigError and SettingError."""
        place = expanded(path, ConfigError)
        value = read_yaml(place, ConfigError)
        if not isinstance(value, dict):
            raise ConfigError(f"{place} holds no fields: give at least model, data and steps.")
        known = {each.name for each in fields(cls)}
        for name in value:
            if name not in known:
                raise ConfigError(f"{place} has {shown(name)}: there are {', '.join(sorted(known))}.")
        missing = [name for name in ("model", "data", "steps") if value.get(name) is None]
        if missing:
            raise ConfigError(f"{place} has no {missing[0]}: give it.")
        for name in ("data", "tokenizer", "validation"):
            if value.get(name) is not None:
                value[name] = str(place.parent / expanded(str(value[name]), ConfigError))
        if isinstance(value.get("betas"), list):
            value["betas"] = tuple(value["betas"])
        for name in _NUMBERS:  # in YAML, 3e-3 is a text
            with suppress(KeyError, ValueError, TypeError):
                value[name] = float(value[name]) if isinstance(value[name], str) else value[name]
        found = cls(**value)
        try:
            found.check()
        except SettingError as error:
            raise SettingError(f"{place}: {error}") from error
        return found

    def check(self) -> None:
        """Raise SettingError for what is out of range."""
        for name in ("steps", "validate_every", "rows", "tokens_at_once"):
            whole_number(name, getattr(self, name), high=10**9)
        whole_number("length", self.length, low=2, high=10**6)
        for name in ("warmup_steps", "seed"):
            whole_number(name, getattr(self, name), low=0, high=10**9)
        for name in ("learning_rate", "eps", "max_grad_norm"):
            if not (is_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf):
                raise SettingError(f"{name} is {shown(getattr(self, name))}: it must be a number above 0.")
        for name in ("final_learning_rate", "weight_decay", "z_loss"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < 10):
                raise SettingError(f"{name} is {shown(value)}: it must be a number from 0 to 10.")
        betas = self.betas if isinstance(self.betas, tuple) and len(self.betas) == 2 else ("",)
        if not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
            raise SettingError(f"betas is {shown(self.betas)}: give two numbers from 0 to below 1, as [0.9, 0.95].")
        if not isinstance(self.checkpointing, bool):
            given = shown(self.checkpointing)
            raise SettingError(f"checkpointing is {given}: it must be true or false.")
        if self.chat_template is not None and self.chat_template not in TEMPLATES:
            given = shown(self.chat_template)
            raise SettingError(f"chat_template is {given}: choose {' or '.join(TEMPLATES)}.")
        if self.documents not in ("packed", "stream"):
            raise SettingError(f"documents is {shown(self.documents)}: choose packed or stream.")
        if self.dtype not in DTYPES:
            raise SettingError(f"dtype is {shown(self.dtype)}: choose {', '.join(DTYPES)}.")
        if not isinstance(self.model, Mapping):
            raise SettingError(f"model is {shown(self.model)}: give a config.json's fields.")


@checked_call("om.train", output=PATH, progress=FUNCTION, started=FUNCTION, restart=FLAG)
def train(
    config: str | os.PathLike[str] | TrainingConfig,
    *,
    output: str | os.PathLike[str],
    steps: int | None = None,
    restart: bool = False,
    progress: Listener | None = None,
    started: Callable[[float, int], None] | None = None,
) -> Path:
    """Train a new model by a YAML file (`TrainingConfig`), and write it to the folder `output`, in Apple's layout.

    After Ctrl-C or a crash the same call goes on where it stopped, bit for bit. steps: only so many of the file's; the schedule
    stays that of the whole run. progress: called after each step. started: called with the
    estimated seconds and the step that the run begins after.

    Raises the errors of `openelm_mlx.errors`, each with the next step.
    """
    if not isinstance(config, TrainingConfig):
        check_kind("config", config, PATH)
        config = TrainingConfig.read(config)
    else:
        config.check()
    settings = config
    check_output(output)
    keep_float32()
    use_device()
    spec = spec_from_config(dict(settings.model))
    if spec.family != "openelm":
        raise ConfigError("Only OpenELM models are trained from nothing: give model_type: openelm.")
    if settings.length > spec.context_length:
        raise SettingError(
            f"length is {settings.length}: it must be at most the model's context, {spec.context_length:,}."
        )
    if settings.tokenizer is not None:
        load_tokenizer(Path(settings.tokenizer))  # it is copied at the end, and must be one
    data = TokenRows.read(settings.data, settings, spec)
    validation = TokenRows.read(settings.validation, settings, spec) if settings.validation else None
    what = {
        "version": __version__, "config": json.loads(json.dumps(vars(settings), default=dict)), "data": data.fingerprint,
    }  # fmt: skip
    folder = RunFolder(output, what, restart)
    try:
        model = new_model(spec, settings.seed)
        dtype = None if settings.dtype == "float32" else DTYPES[settings.dtype]
        trainer = Trainer(
            model,
            Gradients(model, Objective(settings.z_loss), dtype, settings.checkpointing),
            adamw(settings.betas, settings.eps, settings.weight_decay, is_matrix),
            Schedule(settings.learning_rate, settings.steps, settings.warmup_steps, settings.final_learning_rate),
            data,
            max_grad_norm=settings.max_grad_norm,
            validation=validation.all_parts() if validation is not None else (),
            validate_every=settings.validate_every,
            seed=settings.seed,
            folder=folder,
            listener=progress,
            last_step=None if steps is None else whole_number("steps", steps, high=settings.steps, whose="the file's "),
            kept_bytes=this_machine().available_bytes // 4,
        )
        if started is not None:
            started(trainer.seconds_left(), trainer.resumed_at)
        state = trainer.run()
        path = _write(output, model, spec, settings, state.log)
        folder.finish()
        return path
    finally:
        folder.close()


class TokenRows:
    """Rows of one length out of arrays of tokens, `rows` of them a step, in an order that follows from the seed.

    tokens (T,); starts (documents,): where each begins; learned (T,): which tokens are learned, all where it is None.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        learned: np.ndarray | None,
        settings: TrainingConfig,
    ) -> None:
        self.tokens, self.starts, self.learned, self.settings = tokens, starts, learned, settings
        if settings.documents == "stream":
            starts = settings.length * np.arange(max(1, (len(tokens) - 1) // settings.length))
            self._sizes = np.minimum(starts + settings.length + 1, len(tokens)) - starts
        else:
            # A document that is longer than a row loses its end.
            self._sizes = np.minimum(np.diff([*starts, len(tokens)]), settings.length + 1)
        self._starts = starts
        # Where nothing is learned, nothing is computed. The first token is nobody's target.
        before = np.cumsum([0, *(np.ones(len(tokens), bool) if learned is None else learned)])
        targets = before[starts + self._sizes] - before[np.minimum(starts + 1, len(tokens))]
        self._usable = np.flatnonzero((self._sizes > 1) & (targets > 0))
        self._packed: tuple[int, list[list[int]]] | None = None
        self._begins: dict[int, int] = {0: 0}  # epoch -> the number of its first row, as far as is known
        digest = hashlib.sha256(tokens.tobytes())
        digest.update(self.starts.tobytes())
        digest.update(b"" if learned is None else learned.tobytes())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def read(cls, path: str, settings: TrainingConfig, spec: ModelSpec) -> TokenRows:
        """From an .npz or a .jsonl. Raises DataError."""
        if path.endswith(".jsonl"):
            tokens, starts, learned = _tokenized(path, settings)
        else:
            tokens, starts, learned = _arrays(path)
        if not len(tokens):
            raise DataError(f"{path} has no tokens: give some text.")
        if int(tokens.max()) >= spec.vocab_size or int(tokens.min()) < 0:
            raise DataError(
                f"{path} has token {int(tokens.max())}, and the model's are 0 to {spec.vocab_size - 1}: it was made for "
                "another one."
            )
        found = cls(tokens.astype(np.int32), starts.astype(np.int64), learned, settings)
        if not len(found._usable):
            raise DataError(f"{path} has nothing to learn: no row has a learned token after its first one.")
        return found

    def parts(self, step: int) -> list[Part]:
        """See `StepData`."""
        if self.settings.documents == "stream":
            chosen = rows_of_step(step, self.settings.rows, len(self._usable), self.settings.seed)
            return self._as_parts([self._document(i) for i in self._usable[chosen].tolist()])
        first = step * self.settings.rows
        return self._as_parts([row for i in range(self.settings.rows) for row in self._documents_of(first + i)])

    def all_parts(self) -> list[Part]:
        """Every token once, for validation."""
        return self._as_parts([self._document(i) for i in self._usable.tolist()])

    def _as_parts(self, rows: list[Row]) -> list[Part]:
        return parts_of(rows, max(self.settings.tokens_at_once, self.settings.length))

    def _row(self, part: slice) -> Row:
        tokens = self.tokens[part]
        learned = np.ones(len(tokens), bool) if self.learned is None else self.learned[part]
        return Row.of(tokens, learned)

    def _document(self, i: int) -> Row:
        start = int(self._starts[i])
        return self._row(slice(start, start + int(self._sizes[i])))

    def _documents_of(self, number: int) -> list[Row]:
        """The documents of the row with this number, counted over all epochs."""
        epoch = max(each for each, first in self._begins.items() if first <= number)
        first = self._begins[epoch]
        while True:
            packed = self._epoch(epoch)
            if number < first + len(packed):
                return [self._document(i) for i in packed[number - first]]
            first, epoch = first + len(packed), epoch + 1
            self._begins[epoch] = first

    def _epoch(self, epoch: int) -> list[list[int]]:
        """An epoch's documents in rows that are as full as they come."""
        if self._packed is None or self._packed[0] != epoch:
            order = self._usable[order_of(len(self._usable), epoch, self.settings.seed)]
            rows: list[list[int]] = []
            room = 0
            for i, size in zip(order.tolist(), (self._sizes[order] - 1).tolist(), strict=True):
                if size > room:
                    rows.append([])
                    room = self.settings.length
                rows[-1].append(i)
                room -= size
            self._packed = epoch, rows
        return self._packed[1]


def new_model(spec: ModelSpec, seed: int) -> Model:
    """A model with OpenELM's own random weights (CoreNet's `reset_parameters`), in training mode.

    Standard deviation in_features^-0.5, but model_dim^-0.5 (2 L)^-0.5 where a residual is added to (out_proj, proj_2); gains
    are 1.
    """
    model = build_model(spec)
    names = sorted(tree_flatten(model.parameters()))
    keys = mx.random.split(mx.random.key(seed), len(names))

    def initial(name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
        if len(shape) == 1:
            return mx.ones(shape)
        adds = name.endswith(("out_proj.weight", "proj_2.weight"))
        std = (2 * len(spec.layers) * spec.hidden_size) ** -0.5 if adds else 1 / math.sqrt(shape[1])
        return std * mx.random.normal(shape, key=key)

    model.update(tree_unflatten([(name, initial(name, p.shape, keys[i])) for i, (name, p) in enumerate(names)]))
    mx.eval(model.parameters())
    multiply_both_ways(model)
    model.train()
    return model


def _arrays(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    try:
        with np.load(path, allow_pickle=False) as found:
            tokens = found["tokens"]
            starts = found["starts"] if "starts" in found else np.zeros(1, np.int64)
            learned = found["learned"].astype(bool) if "learned" in found else None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check that it is there and that you may read it."
        ) from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is no .npz file with an array `tokens` ({error}): give one, or a .jsonl file of texts."
        ) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or (learned is not None and learned.shape != tokens.shape):
        raise DataError(f"{path}: tokens must be whole numbers in one row, and learned as many.")
    if starts.ndim != 1 or starts.dtype.kind not in "iu":
        raise DataError(f"{path}: starts must be whole numbers in one row.")
    if len(starts) == 0 or starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] > len(tokens):
        raise DataError(f"{path}: starts must begin with 0, not decrease, and end within the tokens.")
    return tokens, starts, learned


def _tokenized(path: str, settings: TrainingConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    from .data import read_examples
    from .rendering import Rendering

    if settings.tokenizer is None:
        raise ConfigError("data is text, and there is no tokenizer: name the folder that has one.")
    tokenizer = load_tokenizer(Path(settings.tokenizer))
    rendering = Rendering(tokenizer, settings.chat_template or "plain", 2**31)
    pieces, learned = [], []
    for example in read_examples(path):
        for row in rendering.rows(example):
            last = row.targets[-1]
            pieces.append(np.append(row.tokens, last))
            learned.append(np.append(False, row.targets != NOT_LEARNED))
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    return np.concatenate(pieces), starts, np.concatenate(learned)


def _write(
    output: str | os.PathLike[str], model: Model, spec: ModelSpec, settings: TrainingConfig, log: list[dict[str, Any]]
) -> Path:
    template = {} if settings.chat_template is None else {"openelm_mlx": {"chat_template": settings.chat_template}}
    files: dict[str, bytes | Path] = {"training.json": as_json({"config": vars(settings), "log": log})}
    if settings.tokenizer is not None:
        place = Path(settings.tokenizer)
        found = [place / name for name in TOKENIZER_FILES] if place.is_dir() else [place]
        files |= {each.name: each for each in found if each.is_file()}
    files[CONFIG] = as_json(openelm_config(spec) | template)
    return write_folder(output, WEIGHTS, dict(tree_flatten(model.parameters())), files, {"format": "mlx"})
