"""`openelm_mlx evaluate`: the tasks of the papers, with the published figures beside ours."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SettingError
from . import INTERRUPTED, output
from .evaluation_options import add_evaluated_model, add_workers, loading_options
from .options import add_overwrite
from .output import report, report_json, say

if TYPE_CHECKING:
    from ..evaluation.report import Report
    from ..evaluation.requests import StageProgress

HELP = "evaluate a model on tasks: Apple's sets, OpenAI's protocol, lm-evaluation-harness's tasks, files of questions"
WHAT = "The report"
# Seconds between two lines of progress where no bar can be drawn.
_PERIOD = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="SOURCE", help="demo-openelm, a folder, or a Hugging Face repository")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks", required=True, metavar="NAME[,NAME...]",
        help="openelm-zero-shot, llm360, openllm (Apple's sets); gpqa_diamond, aime25 (OpenAI's protocol); "
        "humaneval_sandboxed; rg:NAME (reasoning-gym); FILE.jsonl; any task of lm-evaluation-harness",
    )  # fmt: skip
    tasks.add_argument("--limit", type=int, metavar="N", help="only N questions of each task: to try it out")
    tasks.add_argument("--shots", type=int, metavar="N", help="examples before each question (default: the task's)")
    tasks.add_argument("--seed", type=int, default=0, metavar="N", help="of examples and sampling (default: 0)")
    tasks.add_argument("--include-path", metavar="FOLDER", help="more tasks of lm-evaluation-harness (.yaml)")
    tasks.add_argument(
        "--data", action="append", default=[], metavar="TASK=FILE", help="data of gpqa_diamond or aime25 (repeatable)"
    )
    tasks.add_argument(
        "--add-bos", action=argparse.BooleanOptionalAction, default=None,
        help="begin texts with BOS, or not (default: as the tokenizer does)",
    )  # fmt: skip
    chat = parser.add_argument_group("chat and answers")
    chat.add_argument(
        "--reasoning-effort", metavar="EFFORT[,EFFORT...]", help="of gpt-oss: low, medium, high (default: medium)"
    )
    chat.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="put lm-evaluation-harness's questions into the chat template",
    )
    chat.add_argument("--chat-template", metavar="NAME", help="openelm-instruct or plain (default: as stored)")
    chat.add_argument(
        "--fewshot-as-multiturn", action=argparse.BooleanOptionalAction, default=True,
        help="with a chat template, examples are turns of the chat (default), or one text",
    )  # fmt: skip
    chat.add_argument("--system", metavar="TEXT", help="a system message for lm-evaluation-harness's chats")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="of an answer, its reasoning included")
    chat.add_argument("--temperature", type=float, metavar="T", help="in place of the task's own")
    chat.add_argument(
        "--allow-unsandboxed", action="store_true", help="run the model's code without a sandbox where there is none"
    )
    add_evaluated_model(parser)
    add_workers(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--report",
        metavar="FILE.json",
        help="write everything as JSON; the same command goes on where it was interrupted",
    )
    files.add_argument("--markdown", metavar="FILE.md", help="also write the table")
    files.add_argument("--chart", metavar="FILE", help="also draw a chart (.png or .svg)")
    files.add_argument("--compare", metavar="REPORT.json", help="show an earlier report beside this one")
    add_overwrite(files)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print. Returns the exit code."""
    from ..evaluation.report import compared, draw, markdown, read_report, recognized
    from ..evaluation.run import evaluate
    from ..memory.stored import cache_folder
    from ..outputs import checked_output, write_output

    settings = settings_of(args)
    # None: a table tells nothing of who has written it.
    for name, what, is_ours in ((args.report, WHAT, recognized), (args.markdown, "The table", None)):
        if name is not None:
            checked_output(name, what, is_ours, args.overwrite)
    from ..bench.chart import check_chart

    chart = check_chart(args.chart, args.overwrite)
    before = None if args.compare is None else read_report(args.compare)
    options = {**loading_options(args), "chat_template": args.chat_template}
    if args.report is not None:
        kept = Path(f"{args.report}.partial").expanduser()
    else:
        import hashlib

        identity = json.dumps(settings.identity(args.model, options), sort_keys=True).encode()
        kept = cache_folder() / "evaluation" / f"{hashlib.sha256(identity).hexdigest()[:16]}.partial"
        kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        with progress_of(args.quiet) as progress:
            found = evaluate(args.model, settings, load_options=options, store_path=kept, progress=progress)
    except KeyboardInterrupt:
        say("\nInterrupted: the same command goes on where this one stopped.")
        return INTERRUPTED
    if args.report is not None:
        write_output(args.report, found.text(), WHAT, recognized, args.overwrite)
    kept.unlink(missing_ok=True)
    if args.markdown is not None:
        write_output(args.markdown, markdown(found), "The table", None, args.overwrite)
    if chart is not None:
        draw(found, chart, args.overwrite)
    show(found, args.json, before)
    if before is not None and not args.json:
        report()
        for line in compared(before, found):
            report(line)
    return 0


def settings_of(args: argparse.Namespace) -> Any:
    """The options of the command, checked. Raises SettingError."""
    from ..checks import whole_number
    from ..evaluation.run import Settings

    for name in ("limit", "shots", "seed", "max_tokens"):
        value = getattr(args, name)
        if value is not None:
            whole_number(name, value, low=0 if name in ("shots", "seed") else 1)
    if args.temperature is not None and not 0 <= args.temperature <= 100:
        raise SettingError(f"temperature is {args.temperature}: give a number from 0 on.")
    tasks = tuple(each.strip() for each in args.tasks.split(",") if each.strip())
    if not tasks:
        raise SettingError("--tasks names no task: give one, for example openelm-zero-shot.")
    data = []
    for each in args.data:
        task, equals, file = each.partition("=")
        if not equals or task not in ("gpqa_diamond", "aime25") or not file:
            raise SettingError(
                f"--data {each!r} is not of the form TASK=FILE, with gpqa_diamond or aime25 as the task."
            )
        data.append((task, file))
    efforts = () if args.reasoning_effort is None else tuple(args.reasoning_effort.split(","))
    return Settings(
        tasks=tasks, limit=args.limit, shots=args.shots, seed=args.seed, efforts=efforts, add_bos=args.add_bos,
        apply_chat_template=args.apply_chat_template, fewshot_as_multiturn=args.fewshot_as_multiturn,
        system=args.system, max_tokens=args.max_tokens, temperature=args.temperature,
        include_path=args.include_path, data=tuple(data), allow_unsandboxed=args.allow_unsandboxed,
    )  # fmt: skip


def show(found: Report, as_json: bool, before: Report | None = None) -> None:
    """The report on stdout. before: another one, which is shown beside it; in JSON it is "before"."""
    from ..evaluation.report import markdown

    if as_json:
        report_json({**found.as_dict(), **({} if before is None else {"before": before.as_dict()})})
    else:
        report(markdown(found).rstrip())


@contextmanager
def progress_of(quiet: bool) -> Iterator[StageProgress | None]:
    """How far a run is, with an estimate of the rest: a bar in a terminal, else a line now and then, on stderr."""
    if quiet:
        yield None
        return
    state: dict[str, Any] = {"what": None, "done": 0, "bar": None, "told": time.monotonic(), "started": 0.0, "begun": 0}

    def progress(what: str, more: int, total: int) -> None:
        if what != state["what"] or state["done"] + more > total:
            close()
            state.update(what=what, done=0, started=time.monotonic(), begun=more)
            if output.can_draw_bars():
                state["bar"] = output.bar(what, total, "request", leave=False)
        state["done"] += more
        if state["bar"] is not None:
            state["bar"].update(more)
        elif time.monotonic() - state["told"] > _PERIOD:
            state["told"] = time.monotonic()
            say(f"{what}: {state['done']:,} of {total:,}{_rest(state, total)}")

    def close() -> None:
        if state["bar"] is not None:
            state["bar"].close()
            state["bar"] = None

    try:
        yield progress
    finally:
        close()


def _rest(state: dict[str, Any], total: int) -> str:
    done = state["done"] - state["begun"]
    if done <= 0:
        return ""
    seconds = (time.monotonic() - state["started"]) / done * (total - state["done"])
    return f", about {seconds / 60:,.0f} minutes more" if seconds > 90 else f", about {seconds:,.0f} seconds more"
