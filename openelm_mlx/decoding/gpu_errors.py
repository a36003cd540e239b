"""What a GPU's errors mean, and clearing the errors that follow one.

Metal reports the failure of a command buffer once, as a RuntimeError of the first call that waits for it. Buffers that
were committed after it fail too, each with its own message, and each is reported in turn. If they are not all collected,
an old failure appears in the middle of new work.
"""

from __future__ import annotations

import mlx.core as mx

# macOS ends GPU work that keeps the screen waiting. Parts of Metal's messages about that command buffer, and about later
# ones of the same program ("submissions ignored") or of another program ("innocent victim").
_WATCHDOG = (
    "callbackerrortimeout", "gpu timeout", "impactinginteractivity", "impacting interactivity",
    "submissionsignored", "submissions ignored", "innocentvictim", "innocent victim",
)  # fmt: skip
# Parts of messages of MLX's backends when memory runs out: Metal, its command buffers, CUDA, and the CPU.
_OUT_OF_MEMORY = ("malloc", "insufficient memory", "out of memory", "outofmemory", "unable to allocate", "bad_alloc")

# There are never more command buffers in flight than this.
_MOST_ERRORS = 1000


def is_watchdog(error: BaseException) -> bool:
    """Whether macOS stopped the GPU because a command buffer took too long."""
    text = str(error).lower()
    return any(words in text for words in _WATCHDOG) and not is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX's error says that there was no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def empty_stream() -> list[RuntimeError]:
    """Wait for this thread's stream until it reports no more errors; return the errors."""
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
