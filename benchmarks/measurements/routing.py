"""What routers chose, recorded to a file, and what other numbers of slots, disks and chips would have made of it.

The simulator replays a trace through the very classes that a streamed model uses, so its hits are the engine's to the
last one. Its times are as good as the rates it is given: calibrate it with one measured run.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from openelm_mlx.errors import SettingError
from openelm_mlx.experts.pace import Pace
from openelm_mlx.experts.residency import Residency
from openelm_mlx.experts.slots import LeastRecentlyUsed, PolicyFactory, SlotTable, rounds_of
from openelm_mlx.files import open_regular, unreadable
from openelm_mlx.memory.chips import READ_BACK_SECONDS
from openelm_mlx.memory.rates import Rates
from openelm_mlx.models.routing_ways import SORT_FROM_ROUTES
from openelm_mlx.outputs import output_file
from openelm_mlx.specs import ModelSpec

# Where a layer was not asked: of a chunk that only fills the cache the last layer's experts are not wanted.
NOT_ASKED = -1
# Places are drawn so often for each that is wanted.
TRIES = 50
# What a trace is called in errors, and how its files are known.
WHAT = "The routing trace"

_ARRAYS = ("num_experts", "lengths", "experts")
_LARGEST_TRACE = 2**30  # bytes unpacked: 4 million tokens of gpt-oss-120b


def is_trace(file: BinaryIO) -> bool:
    """Recognizes an archive of NumPy's that holds a trace's arrays and nothing else."""
    try:
        with zipfile.ZipFile(file) as archive:
            return set(archive.namelist()) == {f"{name}.npy" for name in _ARRAYS}
    except (zipfile.BadZipFile, NotImplementedError):
        return False


@dataclass
class Trace:
    """The experts chosen in each pass through a model, (tokens, layers, k) int16 each, in the order of the passes."""

    num_experts: int
    passes: list[np.ndarray] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        return self.passes[0].shape[1]

    @property
    def experts_per_token(self) -> int:
        return self.passes[0].shape[2]

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write it, compressed: some 4 bytes a layer and token. Raises DestinationError."""
        lengths = [len(each) for each in self.passes]
        with output_file(path, WHAT, is_trace, overwrite) as stream:  # to this name, whatever it ends with
            np.savez_compressed(
                stream, num_experts=self.num_experts, lengths=lengths, experts=np.concatenate(self.passes)
            )

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `save` wrote. Raises SettingError for another file."""
        try:
            with open_regular(path, SettingError) as stream, _unpacked_trace(stream) as arrays:
                experts, lengths, num_experts = arrays["experts"], arrays["lengths"], int(arrays["num_experts"])
        except SettingError:
            raise
        except OSError as error:
            raise unreadable(path, error, SettingError) from error
        except Exception as error:  # zipfile, zlib and NumPy raise what the damage makes of their reading
            raise SettingError(f"{path} is not a routing trace: record one with --record.") from error
        if not _are_choices(experts, lengths, num_experts):
            raise SettingError(
                f"{path} is not a possible routing trace: each token has to have chosen different ones of the experts that "
                "there are, and some tokens have to have been computed one by one. Record one with --record."
            )
        return cls(num_experts, np.split(experts, np.cumsum(lengths)[:-1]))


def _unpacked_trace(stream: BinaryIO) -> Any:
    """The arrays of a trace, which are packed: a small file may stand for any amount of memory. Raises ValueError."""
    with zipfile.ZipFile(stream) as archive:
        if sum(record.file_size for record in archive.infolist()) > _LARGEST_TRACE:
            raise ValueError("it unpacks to too much")
    stream.seek(0)
    return np.load(stream, allow_pickle=False)


def _are_choices(experts: np.ndarray, lengths: np.ndarray, num_experts: int) -> bool:
    """Whether (tokens, layers, k) choices, in passes of so many tokens, can have been recorded."""
    if experts.ndim != 3 or lengths.ndim != 1 or {experts.dtype.kind, lengths.dtype.kind} - set("iu"):
        return False
    if not experts.size or (lengths < 1).any() or lengths.sum() != len(experts) or not (lengths == 1).any():
        return False
    asked = (experts != NOT_ASKED).all(-1)
    chosen = np.sort(experts[asked], axis=-1)
    return bool(
        len(chosen)
        and chosen.min() >= 0
        and chosen.max() < num_experts
        and (chosen[:, 1:] != chosen[:, :-1]).all()
        and (experts[~asked] == NOT_ASKED).all()
    )


@contextmanager
def recording(residency: Residency) -> Iterator[Trace]:
    """The trace of everything that the model computes within the block."""
    trace = Trace(residency.banks[0].num_experts)
    current: dict[int, np.ndarray] = {}

    def end_pass() -> None:
        if current:
            like = next(iter(current.values()))
            layers = []
            for i in range(len(residency.layers)):
                layer, chosen = np.full_like(like, NOT_ASKED), current.get(i)
                if chosen is not None:  # at the end of a prompt the last layer computes the last token alone
                    layer[len(layer) - len(chosen) :] = chosen
                layers.append(layer)
            trace.passes.append(np.stack(layers, axis=1))
            current.clear()

    def note(layer: int, chosen: np.ndarray) -> None:
        if current and layer <= max(current):
            end_pass()
        current[layer] = chosen.reshape(-1, chosen.shape[-1]).astype(np.int16)

    for i, experts in enumerate(residency.layers):
        experts.on_choice = lambda chosen, i=i: note(i, chosen)
    try:
        yield trace
    finally:
        for experts in residency.layers:
            experts.on_choice = None
        end_pass()


class Replay(NamedTuple):
    """What a number of slots made of a trace's single-token passes, and of the others.

    hits, misses: experts asked for in passes of one token. read_backs, replayed_layers: of the optimistic step.
    """

    num_slots: int
    num_tokens: int
    hits: int
    misses: int
    read_backs: int
    replayed_layers: int
    prompt_hits: int
    prompt_misses: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def replay(
    trace: Trace,
    num_slots: int,
    policy: PolicyFactory = LeastRecentlyUsed,
    layers_at_once: int | None = None,
    read_back_cost: float | None = None,
    warm_up: int = 0,
) -> Replay:
    """The hits and misses of `num_slots` slots a layer, as the engine would count them.

    layers_at_once, read_back_cost: see `Pace`. warm_up: so many passes at the beginning fill the slots and are not counted.
    """
    tables = [SlotTable(num_slots, policy) for _ in range(trace.num_layers)]
    counts: Counter[str] = Counter()
    pace = Pace(layers_at_once, read_back_cost)
    for number, each in enumerate(trace.passes):
        if number == warm_up:
            counts.clear()
        if len(each) == 1:
            _replay_step(each[0], tables, pace, counts)
        else:
            _replay_chunk(each, tables, counts)
    names = ("num_tokens", "hits", "misses", "read_backs", "replayed_layers", "prompt_hits", "prompt_misses")
    return Replay(num_slots, *(counts[name] for name in names))


def _replay_step(chosen: np.ndarray, tables: Sequence[SlotTable], pace: Pace, counts: Counter[str]) -> None:
    """One token as `StreamedStep` computes it. chosen (layers, k)"""
    first = 0
    while first < len(tables):
        stop = pace.next(first, len(tables))
        counts["read_backs"] += 1
        for layer in range(first, stop):
            wanted = list(dict.fromkeys(chosen[layer].tolist()))
            num_missing = _serve(wanted, tables[layer])
            counts["misses"] += num_missing
            counts["hits"] += len(wanted) - num_missing
            pace.saw(num_missing > 0)
            first = layer + 1
            if num_missing:
                counts["replayed_layers"] += stop - first
                break
    counts["num_tokens"] += 1


def _replay_chunk(chosen: np.ndarray, tables: Sequence[SlotTable], counts: Counter[str]) -> None:
    """Several tokens at once, chosen (L, layers, k)."""
    for layer, table in enumerate(tables):
        routes = [expert for expert in chosen[:, layer].ravel().tolist() if expert != NOT_ASKED]
        if not routes:
            continue
        for wanted in rounds_of(routes, table, len(routes) >= SORT_FROM_ROUTES):
            num_missing = _serve(wanted, table)
            counts["prompt_misses"] += num_missing
            counts["prompt_hits"] += len(wanted) - num_missing


def _serve(wanted: Sequence[int], table: SlotTable) -> int:
    placed = table.place(wanted)
    table.arrived(placed)
    table.use(wanted)
    return len(placed)


# --- routing of other shapes ------------------------------------------------------------------------------------------


def uniform(num_tokens: int, num_layers: int, num_experts: int, k: int, seed: int = 0) -> Trace:
    """Every token chooses any k experts: what no cache of any size can foresee."""
    random = np.random.default_rng(seed)
    chosen = random.random((num_tokens, num_layers, num_experts)).argsort(-1)[..., :k].astype(np.int16)
    return Trace(num_experts, list(chosen[:, None]))


def alike(trace: Trace, num_tokens: int, num_layers: int, num_experts: int, seed: int = 0) -> Trace:
    """Routing of another shape that comes back to experts as soon as the trace's does.

    How far down in the order of last uses a choice lies, as a share of all experts, is drawn from what the trace has.
    """
    depths = reuse_depths(trace)
    random, k = np.random.default_rng(seed), trace.experts_per_token
    stacks = [random.permutation(num_experts).tolist() for _ in range(num_layers)]
    chosen = np.zeros((num_tokens, num_layers, k), np.int16)
    for token in range(num_tokens):
        for layer, stack in enumerate(stacks):
            places: set[int] = set()
            for _ in range(TRIES * k):
                depth = depths[random.integers(len(depths))]
                places.add(int((depth + random.random()) * num_experts / trace.num_experts))
                if len(places) == k:
                    break
            # Where routing is so narrow that its places fall together in fewer experts: the next ones.
            places |= set(sorted(set(range(num_experts)) - places)[: k - len(places)])
            experts = [stack[place] for place in sorted(places)]
            chosen[token, layer] = experts
            stacks[layer] = [*experts, *(expert for expert in stack if expert not in experts)]
    return Trace(num_experts, list(chosen[:, None]))


def after_a_prompt(trace: Trace) -> Trace:
    """The trace with one pass more before it, of a prompt that uses every expert of every layer: no slot is empty then."""
    each = np.arange(trace.num_experts, dtype=np.int16).reshape(-1, 1, trace.experts_per_token)
    return Trace(trace.num_experts, [each.repeat(trace.num_layers, axis=1), *trace.passes])


def reuse_depths(trace: Trace) -> np.ndarray:
    """For each choice of a single token, how many other experts of its layer were used since it last was."""
    stacks = [list(range(trace.num_experts)) for _ in range(trace.num_layers)]
    depths = []
    for each in trace.passes:
        for token in each:
            for layer, stack in enumerate(stacks):
                experts = [expert for expert in token[layer].tolist() if expert != NOT_ASKED]
                if len(each) == 1:
                    depths += [stack.index(expert) for expert in experts]
                stacks[layer] = [*experts, *(expert for expert in stack if expert not in experts)]
    return np.array(depths or [0])


# --- times ------------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """A machine, as far as streaming is concerned. Seconds, and bytes a second."""

    layer_seconds: float
    rest_seconds: float
    read_back_seconds: float
    read_rate: float


def seconds_per_token(replayed: Replay, num_layers: int, expert_bytes: int, speed: Speed) -> float:
    """The time of a decoded token: the layers, those computed for nothing, the waits for the router, and the reads."""
    tokens = max(1, replayed.num_tokens)
    layers = num_layers + replayed.replayed_layers / tokens
    return (
        speed.rest_seconds
        + layers * speed.layer_seconds
        + replayed.read_backs / tokens * speed.read_back_seconds
        + replayed.misses / tokens * expert_bytes / speed.read_rate
    )


def calibrated(
    measured_seconds: float, waited_seconds: float, replayed: Replay, num_layers: int, expert_bytes: int
) -> Speed:
    """The speed of this machine from one measured run: seconds a token, and those of them that were waits for reads."""
    tokens = max(1, replayed.num_tokens)
    layers = num_layers + replayed.replayed_layers / tokens
    rate = replayed.misses / tokens * expert_bytes / waited_seconds if waited_seconds else float("inf")
    return Speed((measured_seconds - waited_seconds) / layers, 0.0, 0.0, rate)


def speed_of_chip(spec: ModelSpec, rates: Rates, read_rate: float, dense_bytes_per_weight: float = 2.0) -> Speed:
    """The speed of a chip by the terms that a plan has of it, and of its disk in bytes a second.

    dense_bytes_per_weight: of attention and head as they are in memory; 2 for 16 bits.
    """
    layer, width = spec.layers[0], spec.hidden_size
    attention = width * layer.head_dim * (2 * layer.num_heads + 2 * layer.num_kv_heads) * dense_bytes_per_weight
    experts = layer.experts_per_token * expert_bytes_of(spec)
    head = spec.vocab_size * width * dense_bytes_per_weight
    return Speed(
        rates.decode_seconds(1, attention + experts, 0), rates.decode_seconds(0, head, 0), READ_BACK_SECONDS, read_rate
    )


def expert_bytes_of(spec: ModelSpec) -> int:
    """Bytes of one expert in MXFP4: half a byte a weight and one for each 32."""
    weights = 3 * spec.hidden_size * spec.layers[0].intermediate_size
    return weights // 2 + weights // 32
