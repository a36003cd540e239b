"""`--parallel`: the same command on several machines that share the model, of which the first one speaks for all."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import PromptError, SettingError, UserError
from . import INTERRUPTED, output

if TYPE_CHECKING:
    from ..parallel.group import Group

# The launcher ends all processes once one has failed: the first one is to have said why.
LAST_WORDS_SECONDS = 0.5
# MLX has no deadline, and after it has said that another machine is gone it may wait all the same. Seconds until this process
# ends itself then; of silence of the others; and the same where only the first one knows whether somebody reads its output.
GRACE_SECONDS, PATIENCE_SECONDS, PATIENCE_OF_OTHERS_SECONDS = 2.0, 60.0, 3600.0
_OF_MLX = (b"[ring]", b"[jaccl]")


def add_parallel_argument(group: argparse._ActionsContainer) -> None:
    """How the machines share each layer."""
    group.add_argument(
        "--parallel",
        choices=["tensor", "experts"],
        help="under mlx.launch, share heads and columns of each layer, or its experts, over all machines it starts",
    )


def run_on_all(args: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Run the command, which all machines run at once; only the first one is heard. Returns the exit code.

    An error of another machine is shown by the first one, unless that one cannot know of it.
    """
    _check(args)
    from ..parallel.group import is_told
    from ..parallel.joining import check_together, sharing_group

    check_together(vars(args))
    group = sharing_group(args.parallel)
    assert group is not None
    watch = Watch(group, args.worker_timeout)
    if not group.is_first:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler waits for MLX, and MLX for the other machines
    try:
        return run(args)
    except UserError as error:
        group.tell(error)
        if group.is_first:
            watch.has_said = True
            raise
        if is_told(error):
            time.sleep(LAST_WORDS_SECONDS)
            raise SystemExit(2) from None
        output.speak_again()
        raise
    except Exception:
        output.speak_again()
        raise


class Watch:
    """Ends this process where MLX would wait for another machine without end. has_said: the error is known already.

    patience: seconds of silence of the others, while this machine waits for them; None: a minute.
    """

    def __init__(self, group: Group, patience: float | None) -> None:
        self.has_said = False
        self._group = group
        usual = PATIENCE_SECONDS if patience is None else patience
        self._patience = usual if group.is_first else max(usual, PATIENCE_OF_OTHERS_SECONDS)
        self._interrupts, wake = os.pipe()
        for descriptor in (self._interrupts, wake):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        libraries = output.set_libraries_apart(silent=not group.is_first)
        for target in (lambda: self._listen(libraries), self._look):
            threading.Thread(target=target, daemon=True).start()

    def _listen(self, libraries: int) -> None:
        """Hide what MLX says of lost connections, ten lines and more, and act on it."""
        is_lost = False
        with open(libraries, "rb") as stream:
            for line in stream:
                if not line.startswith(_OF_MLX):
                    if self._group.is_first:
                        output.pass_on(line)
                elif not is_lost:
                    is_lost = True
                    threading.Thread(target=self._end_soon, daemon=True).start()

    def _end_soon(self) -> None:
        time.sleep(GRACE_SECONDS)
        if self._group.is_computing or self._group.since is not None:  # else the others have only ended before this one
            self._end("was lost")

    def _look(self) -> None:
        while True:
            time.sleep(min(1.0, self._patience / 4))
            since = self._group.since
            if self._group.is_computing and since is not None and time.monotonic() - since > self._patience:
                self._end(f"has been silent for {self._patience:g} seconds")

    def _end(self, what: str) -> None:
        with contextlib.suppress(BlockingIOError):
            if signal.SIGINT in os.read(self._interrupts, 64):
                os._exit(INTERRUPTED)
        if self._group.is_first and not self.has_said:
            output.end_answer()
            output.error(
                "openelm_mlx",
                f"Another of the {self._group.size} machines {what}: see whether it sleeps or what it said, and start all of "
                "them again.",
            )
        os._exit(2)


def check_same(form: object) -> None:
    """Raise SettingError where another machine has another answer's format: files of one name may differ."""
    import hashlib

    from ..parallel.group import joined

    found = hashlib.sha256(json.dumps(form, sort_keys=True, default=str).encode()).hexdigest()
    joined().agreed({"form": found}, {"form": "another format or other options: give all of them the same files."})


def _check(args: argparse.Namespace) -> None:
    for name in ("draft_model", "prompt_cache"):
        if getattr(args, name) is not None:
            raise SettingError(f"parallel= and {name}= do not go together: leave one of the two out.")
    if args.prompt_lookup:
        raise SettingError("parallel= and prompt_lookup= do not go together: leave one of the two out.")
    text = args.text if args.prompt is None else args.prompt
    if args.prompt_file is None and text in (None, "-"):
        raise PromptError(
            "With --parallel the prompt is an argument or a file, because a launcher never ends its input: give it so."
        )
