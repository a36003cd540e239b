"""`--parallel`: the same command on several machines that share the model, of which the first one speaks for all."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import time
from collections.abc import Callable

from ..errors import PromptError, SettingError, UserError
from . import output

# The launcher ends all processes once one has failed: the first one is to have said why.
LAST_WORDS_SECONDS = 0.5


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
    if not group.is_first:
        output.silence()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler waits for MLX, and MLX for the other machines
    try:
        return run(args)
    except UserError as error:
        group.tell(error)
        if group.is_first:
            raise
        if is_told(error):
            time.sleep(LAST_WORDS_SECONDS)
            raise SystemExit(2) from None
        output.speak_again()
        raise
    except Exception:
        output.speak_again()
        raise


def check_same(form: object) -> None:
    """Raise SettingError where another machine has another answer's format: files of one name may differ."""
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
