"""A thread that tells the workers, while nobody asks for anything, that the first machine is still there."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Protocol

# Seconds: a worker that hears nothing for several of these gives the connection up.
PING_SECONDS = 3.0


class KeptAlive(Protocol):
    """What has connections to workers (link/chain.py). epoch: of this set of connections."""

    epoch: int

    def send_keep_alive(self) -> bool:
        """Tell the workers. False once they are given up."""


def start_keep_alive(chain: KeptAlive) -> None:
    """Keep this epoch's connections alive, for as long as `chain` is there and has them."""
    threading.Thread(target=_keep_alive, args=(weakref.ref(chain), chain.epoch), daemon=True).start()


def _keep_alive(chain_of: weakref.ref[KeptAlive], epoch: int) -> None:
    while True:
        time.sleep(PING_SECONDS / 3)
        chain = chain_of()
        if chain is None or chain.epoch != epoch or not chain.send_keep_alive():
            return
        del chain
