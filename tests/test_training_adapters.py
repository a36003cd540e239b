"""Whole runs beside PyTorch's and PEFT's: losses, norms, log-probabilities and the adapter at the end (fixtures/adapters)."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, oracle
from mlx.utils import tree_flatten

from openelm_mlx.checkpoint.adapter_files import read_adapter
from openelm_mlx.checkpoint.adapter_peft import peft_files
from openelm_mlx.models.adapters import AdapterConfig, attach, trained_adapter
from openelm_mlx.training.batches import Row, make_batch
from openelm_mlx.training.loop import Part, Trainer
from openelm_mlx.training.optimizer import Schedule, adamw
from openelm_mlx.training.steps import Gradients, Objective

CASES = FIXTURES / "adapters"
NAMES = sorted(path.name for path in CASES.iterdir() if (path / "peft_initial").is_dir())


class Known:
    """A fixture as a run's data: the same batches, the same learning rates."""

    def __init__(self, name):
        self.case = json.loads((CASES / name / "case.json").read_text())
        self.oracle, self.folder = oracle(CASES / name), CASES / name
        self.is_preference = "chosen" in self.oracle
        self.together = self.case.get("accumulate", 1)
        self.reference = None

    def parts(self, step):
        if self.is_preference:
            return [Part(self.pairs(step), self.reference[step])]
        found = []
        for i in range(step * self.together, (step + 1) * self.together):
            rows = rows_of(self.oracle["tokens"][i], self.oracle["loss_mask"][i])
            # The fixture takes the mean of the batches' means; by tokens, each batch would count as it has targets.
            count = sum(row.num_targets for row in rows)
            found.append(Part(make_batch(rows, [1 / count] * len(rows))))
        return found

    def pairs(self, step):
        both = [rows_of(self.oracle[k][step], self.oracle[f"{k}_mask"][step]) for k in ("chosen", "rejected")]
        return make_batch([row for pair in zip(*both, strict=True) for row in pair])

    def rate(self, step):
        return self.case["lr"][step]


def rows_of(tokens, mask):
    lengths = [int(row.nonzero()[0].max()) + 1 for row in mask]
    return [Row.of(t[:n], m[:n]) for t, m, n in zip(tokens, mask, lengths, strict=True)]


class Rates(Schedule):
    """A schedule that is written down."""

    def __init__(self, rates):
        super().__init__(0.0, len(rates))
        object.__setattr__(self, "rates", rates)

    def rate(self, step):
        return self.rates[step]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_pytorchs(name, checkpointing):
    known = Known(name)
    case, wanted = known.case, known.oracle
    model = load_fixture(FIXTURES / case["base"])
    model.train()
    objective = Objective(
        case.get("z_loss", 0.0), case.get("loss") if known.is_preference else None, case.get("beta", 0.1)
    )
    gradients = Gradients(model, objective, checkpointing=checkpointing)
    is_noisy = case["optimizer"]["eps"] < 1e-6  # a vanishing gradient's noise becomes a whole step then
    if known.is_preference:
        known.reference = check_reference(known, gradients)
    attach(model, AdapterConfig(), read_adapter(known.folder / "peft_initial", model.spec))
    settings = case["optimizer"]
    trainer = Trainer(
        model, gradients, adamw(tuple(settings["betas"]), settings["eps"], settings["weight_decay"]), Rates(case["lr"]), known,
        max_grad_norm=case["clip"],
    )  # fmt: skip
    if known.is_preference:
        policy = logprobs_of(gradients, known.pairs(0))
        assert np.abs(policy - alternating(wanted, "policy", 0)).max() < 1e-4
    state = trainer.run()
    losses = np.array([entry["loss"] for entry in state.log])
    expected = wanted["losses"].reshape(len(losses), -1).mean(axis=1)
    assert np.abs(losses - expected).max() < (1e-3 if is_noisy else 1e-4)
    norms = np.array([entry["norm"] for entry in state.log])
    assert np.abs(norms / wanted["grad_norms"] - 1).max() < (5e-3 if is_noisy else 2e-4)
    compare_final(known, model, 5e-2 if is_noisy else 2e-3)
    logits = np.array(model(mx.array(wanted["eval_tokens"])))[..., wanted["columns"]]
    assert np.abs(logits - wanted["logits_final"]).max() < (5e-2 if is_noisy else 1e-2)


def compare_final(known, model, tolerance):
    """Each tensor of the adapter, relative to how far it moved."""
    _, found = peft_files(trained_adapter(model), model.spec)
    initial, final = (
        mx.load(str(known.folder / which / "adapter_model.safetensors")) for which in ("peft_initial", "peft_final")
    )
    assert found.keys() == final.keys()
    for name, expected in final.items():
        moved = mx.linalg.norm(expected - initial[name])
        assert float(mx.linalg.norm(found[name] - expected) / moved) < tolerance, name


def check_reference(known, gradients):
    """The reference is the model without its adapter, and its sums of log-probabilities are PyTorch's."""
    steps = range(len(known.case["lr"]))
    found = [logprobs_of(gradients, known.pairs(step)) for step in steps]
    for step in steps:
        assert np.abs(found[step] - alternating(known.oracle, "reference", step)).max() < 1e-4
    return found


def logprobs_of(gradients, batch):
    return np.array(gradients.logprobs(batch, int(batch.owners.max()) + 1))


def alternating(wanted, which, step):
    """The oracle's sums as rows alternate: chosen, rejected, chosen, ..."""
    return np.stack([wanted[f"{which}_{k}_logps"][step] for k in ("chosen", "rejected")], axis=1).ravel()


def test_every_part_of_an_adapter_moves_in_one_step():
    """A loss that moves is no proof that everything learns (mlx-lm-lora#67)."""
    model = load_fixture(FIXTURES / "gpt_oss_tiny")
    model.train()
    model.freeze()
    names = attach(model, AdapterConfig(targets=("attention", "experts", "router", "embedding", "head")))
    before = dict(tree_flatten(model.trainable_parameters()))
    assert sorted(names) == sorted(before)
    rng = np.random.default_rng(0)
    rows = [Row.of(rng.integers(3, 200, 40), np.ones(40, bool)) for _ in range(4)]

    class Data:
        def parts(self, step):
            return [Part(make_batch(rows))]

    trainer = Trainer(model, Gradients(model, Objective()), adamw((0.9, 0.95), 1e-8, 0.0), Schedule(1e-3, 2), Data())
    moved = dict(tree_flatten(trainer.run().parameters))
    assert [name for name in before if bool((moved[name] == before[name]).all())] == []
