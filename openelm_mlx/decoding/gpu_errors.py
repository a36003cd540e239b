"""What a GPU's errors mean, and how to be rid of those that follow one.

Metal reports the failure of a command buffer as a RuntimeError of whatever waits for it first, once. Buffers that were
committed behind the one that failed fail too, in words of their own, and each of them is reported in its turn: who goes
on without having heard them all is told of an old failure in the middle of new work.
"""

from __future__ import annotations

import mlx.core as mx

# macOS ends GPU work that keeps the screen waiting. What Metal says of the buffer that did, and of those behind it: of
# this program ("submissions ignored"), or of another one whose buffer was the one ("innocent victim").
_WATCHDOG = (
    "callbackerrortimeout", "gpu timeout", "impactinginteractivity", "impacting interactivity",
    "submissionsignored", "submissions ignored", "innocentvictim", "innocent victim",
)  # fmt: skip
# What MLX's backends say when there is no memory left: Metal, its command buffers, CUDA, and the CPU.
_OUT_OF_MEMORY = ("malloc", "insufficient memory", "out of memory", "outofmemory", "unable to allocate", "bad_alloc")

# More command buffers than this are never under way.
_MOST_ERRORS = 1000


def is_watchdog(error: BaseException) -> bool:
    """Whether macOS stopped the GPU because its work took too long at a time."""
    text = str(error).lower()
    return any(words in text for words in _WATCHDOG) and not is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX's error says that there was no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def empty_stream() -> list[RuntimeError]:
    """Wait for this thread's stream until it has nothing more to report; what it reported."""
    found: list[RuntimeError] = []
    while len(found) < _MOST_ERRORS:
        try:
            mx.synchronize(mx.default_stream(mx.default_device()))
        except RuntimeError as error:
            if "no stream" in str(error).lower():
                break  # it is another thread's
            found.append(error)
        else:
            break
    return found
