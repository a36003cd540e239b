"""The machines that share a model, as processes of `mx.distributed`: sums inside the graph, and agreements between hosts.

Every machine runs the same program. What could be decided differently on one of them, since its memory or its random
numbers are its own, is agreed upon: the tokens are the first machine's, limits and chunks the smallest of all. An error of
one is told to all of them, so that nobody waits for who has given up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from .. import errors
from ..errors import SettingError, UserError, WorkerError

# One message of each machine: JSON in UTF-8, after its length. Longer errors are cut.
MESSAGE_BYTES = 4096
_LONGEST_ERROR = 1500

HOW_TO_START = (
    'start it on every machine with MLX\'s launcher, "mlx.launch -n 2 -- python -m openelm_mlx.generate MODEL ..." '
    "(docs/several-macs.md)."
)

T = TypeVar("T")


class Group:
    """The machines. rank: this one's number, from 0 on. size: how many they are.

    is_computing: whether sums are being made: what goes wrong with one machine then is noticed by the others when it ends.
    since: when this machine began to wait for the others, by `time.monotonic`; None while it has something else to do.
    """

    is_computing = False
    since: float | None = None

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    @property
    def is_first(self) -> bool:
        """Whether this is the machine that speaks for all."""
        return self.rank == 0

    def total(self, x: mx.array) -> mx.array:
        """The sum of every machine's x, which has the same shape and type on all of them. Lazy."""
        return mx.distributed.all_sum(x, group=self._group)

    def first(self, x: mx.array) -> mx.array:
        """The first machine's x, of an integer type, on every machine. Lazy.

        The others multiply theirs by 0 instead of making zeros: MLX makes sums in the order in which it walks through a
        graph, and that order is the same on all machines only where their graphs have the same form.
        """
        self.since = time.monotonic()
        return self.total(x * mx.array(int(self.is_first), x.dtype))

    def exchange(self, value: Any = None) -> list[Any]:
        """What each machine gave here, in their order; all of them have to come here. value: JSON.

        Raises what a machine has told instead (`tell`), and WorkerError where one was lost.
        """
        return self._swap({"value": value})

    def tell(self, error: UserError) -> None:
        """Have an error of this machine raised on the others, which come to exchange something; not while they make sums."""
        if not (self.is_computing or is_told(error)):
            self._tell(error)

    def _tell(self, error: UserError) -> None:
        mark_told(error)
        try:
            self._swap({"error": type(error).__name__, "text": str(error)[:_LONGEST_ERROR]})
        except UserError:  # ours, or another machine's that had one, too
            return

    @contextmanager
    def agreeing_on_errors(self) -> Iterator[None]:
        """A block that ends on all machines with an error where it does on one of them. No sums are made within it."""
        try:
            yield
        except UserError as error:
            self.tell(error)
            raise
        self.exchange()

    def least(self, call: Callable[[], int]) -> int:
        """The smallest of what `call` gives on the machines. Raises what it raises on one of them."""
        return min(self.together(call))

    def together(self, call: Callable[[], Any]) -> list[Any]:
        """What `call` gives on each machine, JSON. Raises what it raises on one of them."""
        try:
            value = call()
        except UserError as error:
            if not is_told(error):
                self._tell(error)
            raise
        return self.exchange(value)

    def agreed(self, value: Mapping[str, Any], advice: Mapping[str, str]) -> None:
        """Raise SettingError where a machine has another value than the first. advice: for each key, what to do."""
        found = self.exchange(dict(value))
        for key, sentence in advice.items():
            others = [i + 1 for i, each in enumerate(found) if each[key] != found[0][key]]
            if others:
                raise mark_told(SettingError(f"Machine {others[0]} of {self.size} has {sentence}"))

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error of MLX's says that another machine is gone."""
        text = str(error)
        return isinstance(error, RuntimeError) and ("[ring]" in text or "[jaccl]" in text or "peer" in text)

    def lost(self, error: BaseException) -> WorkerError:
        """The error for a person. It was told to nobody: there may be nobody left."""
        return mark_told(
            WorkerError(
                f"Another of the {self.size} machines was lost (MLX says: {error}): see what it said, and start all of them "
                "again."
            )
        )

    def _swap(self, message: Mapping[str, Any]) -> list[Any]:
        self.since = time.monotonic()
        try:
            rows = mx.distributed.all_gather(_packed(message)[None], group=self._group)
            mx.eval(rows)  # the hosts need it
        except RuntimeError as error:
            raise self.lost(error) from None
        found = [_unpacked(row.tobytes()) for row in np.array(rows)]
        for i, each in enumerate(found):
            if "error" in each:
                raise mark_told(_error(each["error"], f"Machine {i + 1} of {self.size}: {each['text']}"))
        return [each["value"] for each in found]


def mark_told(error: T) -> T:
    """The same error, which all machines know of: it is printed by the first one, and not told again."""
    error.is_told = True  # type: ignore[attr-defined]
    return error


def is_told(error: BaseException) -> bool:
    """Whether all machines know of an error."""
    return getattr(error, "is_told", False)


@lru_cache(maxsize=1)
def joined() -> Group:
    """The machines that this process was started with.

    Raises SettingError where it is alone, and WorkerError where one is not there.
    """
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise WorkerError(
            f"The machines could not be connected (MLX says: {str(error).strip()}): {HOW_TO_START}"
        ) from None
    if group.size() < 2:
        raise SettingError(f"parallel is for two or more processes, and this one is alone: {HOW_TO_START}")
    return Group(group)


def _packed(message: Mapping[str, Any]) -> mx.array:
    data = json.dumps(message).encode()
    assert len(data) <= MESSAGE_BYTES - 4, f"a message of {len(data)} bytes"
    return mx.array(np.frombuffer(len(data).to_bytes(4, "little") + data.ljust(MESSAGE_BYTES - 4), np.uint8))


def _unpacked(data: bytes) -> dict[str, Any]:
    """Raises WorkerError for what is not a message: a machine that made another call sent part of a sum."""
    try:
        found = json.loads(data[4 : 4 + int.from_bytes(data[:4], "little")])
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() & {"value", "error"}:
        raise mark_told(
            WorkerError(
                "The machines that share the model have not made the same calls: each has to make all of them, and to evaluate "
                "what it gets, not the first one alone."
            )
        )
    return found


def _error(name: str, text: str) -> UserError:
    kind = getattr(errors, name, WorkerError)
    return kind(text) if isinstance(kind, type) and issubclass(kind, UserError) else WorkerError(text)
