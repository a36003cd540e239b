"""`python -m openelm_mlx.generate`: a prompt in, text out as it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import CheckpointError, PromptError, SettingError
from ..files import expanded, parse_json, read_text
from . import INTERRUPTED
from .answering import (
    acceptance_clause,
    add_answer_arguments,
    add_draft_arguments,
    add_form_arguments,
    add_reasoning_arguments,
    answer_options,
)
from .options import (
    add_model_arguments,
    add_overwrite,
    add_sampling_arguments,
    add_worker_arguments,
    bits_asked_for,
    load_options,
    sampling_options,
)
from .output import answer, dimmed, end_answer, end_dimmed, report_json, say, typed
from .parallel import add_parallel_argument, check_same, run_on_all

if TYPE_CHECKING:
    from ..decoding.drafts import Drafts
    from ..decoding.prefix_cache import PrefixCache
    from ..engine.sequence import Chunk
    from ..engine.statistics import Statistics
    from ..experts.statistics import ExpertStatistics
    from ..models import Model
    from ..text.tokenizer import Tokenizer

HELP = "generate text from a prompt"
NO_ANSWER = 2  # as for other mistakes: an option has to be changed

# Far more text than any model's context.
LARGEST_PROMPT = 2**26


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_arguments(parser.add_argument_group("model"))
    several = parser.add_argument_group("several machines")
    add_worker_arguments(several)
    add_parallel_argument(several)

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("text", nargs="?", help="the prompt; the same as --prompt")
    prompt.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; - reads it from standard input")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file")
    prompt.add_argument("--system", metavar="TEXT", help="a system message before the prompt (chat templates only)")
    prompt.add_argument(
        "--reasoning-effort", choices=["low", "medium", "high"], help="how long gpt-oss thinks (default: medium)"
    )
    prompt.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")

    sampling = parser.add_argument_group("sampling")
    add_sampling_arguments(sampling, "256; gpt-oss, which ends by itself: what the context has room for")
    add_answer_arguments(sampling)
    sampling.add_argument(
        "--sliding-window", type=int, metavar="N", help="keep the last N tokens only, and go past the context"
    )
    sampling.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="reuse what FILE has of prompts with the same beginning, if it exists, and save this prompt in it",
    )
    add_overwrite(sampling)

    add_draft_arguments(parser)
    add_form_arguments(parser)

    output = parser.add_argument_group("output")
    output.add_argument(
        "--logprobs", type=int, metavar="N", help="report log-probabilities, and the N likeliest tokens (with --json)"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_reasoning_arguments(output, "when --reasoning-effort is given, and not --quiet")
    output.add_argument("--quiet", "-q", action="store_true", help="no statistics on stderr")


def run(args: argparse.Namespace) -> int:
    """Load, generate, print. Returns the exit code."""
    return _run(args) if args.parallel is None else run_on_all(args, _run)


def _run(args: argparse.Namespace) -> int:
    check_draft_options(args)
    bits_asked_for(args)
    if args.logprobs is not None and not args.json:
        raise SettingError("--logprobs are shown with --json only: add it.")
    prompt = read_prompt(args)
    form = read_form(args)
    if args.parallel is not None:
        check_same([form, answer_options(args), args.raw, args.reasoning_effort])
    if args.prompt_cache is not None:
        from ..decoding.prefix_file import check_readable, check_writable

        place = check_writable(args.prompt_cache, args.overwrite)
        if is_kept(place, args.overwrite):
            check_readable(place)
    from ..decoding.prefix_cache import PrefixCache
    from ..decoding.sampling import SamplingParams
    from ..generate import stream_generate
    from ..loading import prepare

    sampling = SamplingParams(**sampling_options(args))

    def answer_of(
        model: Model, tokenizer: Tokenizer | None, cache: PrefixCache | None, draft: Drafts | None
    ) -> Iterator[Chunk]:
        return stream_generate(
            model,
            tokenizer,
            prompt
            if args.system is None
            else [{"role": "system", "content": args.system}, {"role": "user", "content": prompt}],
            max_tokens=args.max_tokens,
            sampling=sampling,
            logprobs=args.logprobs,
            raw=args.raw,
            reasoning_effort=args.reasoning_effort,
            sliding_window=args.sliding_window,
            prefix_cache=cache,
            draft=draft,
            **answer_options(args),
            **form,
        )

    prepared = prepare(args.model, **load_options(args))
    # Errors are reported before the weights are read, which takes half a minute for a large model.
    draft, load_draft = prepare_draft(args)
    answer_of(prepared.model, prepared.tokenizer, None if args.prompt_cache is None else PrefixCache(), draft)
    model, tokenizer = prepared.read()
    cache = open_prompt_cache(args.prompt_cache, model, args.overwrite)
    chunks = answer_of(model, tokenizer, cache, load_draft())
    exit_code = print_json(chunks, args) if args.json else print_text(chunks, args)
    if cache is not None:
        cast("Generator[Chunk, None, None]", chunks).close()  # puts an interrupted answer into the prompt cache
        cache.save(args.prompt_cache, args.overwrite)
    return exit_code


def check_draft_options(args: argparse.Namespace) -> None:
    """Raise SettingError if the options for speculative decoding do not go together."""
    if args.draft_model is not None and args.prompt_lookup:
        raise SettingError("--draft-model and --prompt-lookup both draft tokens: give one of them.")
    if args.num_draft_tokens is not None and args.draft_model is None and not args.prompt_lookup:
        raise SettingError("--num-draft-tokens is for --draft-model or --prompt-lookup: add one of them.")


def uses_draft(args: argparse.Namespace) -> bool:
    """Whether speculative decoding was requested."""
    return args.draft_model is not None or args.prompt_lookup


def prepare_draft(args: argparse.Namespace) -> tuple[Drafts | None, Callable[[], Drafts | None]]:
    """The draft of speculative decoding, if requested: one for checking the options now, and a function that loads it.

    A draft model of the first has no weights yet, so nothing may be computed with it.
    """
    if not uses_draft(args):
        return None, lambda: None
    from ..decoding.drafts import DraftModel, PromptLookup
    from ..loading import prepare
    from .progress import byte_bar

    count = {} if args.num_draft_tokens is None else {"num_draft_tokens": args.num_draft_tokens}
    if args.prompt_lookup:
        lookup = PromptLookup(**count)
        return lookup, lambda: lookup
    progress = None if args.quiet else byte_bar(args.draft_model)
    prepared = prepare(args.draft_model, dtype=args.dtype, progress=progress)
    unread = DraftModel(prepared.model, prepared.tokenizer, **count)
    return unread, lambda: DraftModel(*prepared.read(), **count)


def open_prompt_cache(name: str | None, model: Model, overwrite: bool = False) -> PrefixCache | None:
    """The prefix cache in a file; an empty one if there is no such file yet, or it is to be replaced."""
    if name is None:
        return None
    from ..decoding.prefix_cache import PrefixCache

    cache = PrefixCache()
    if is_kept(expanded(name, CheckpointError), overwrite):
        cache.load(name, model)
    return cache


def is_kept(path: Path, overwrite: bool) -> bool:
    """Whether there is a prompt cache to load and extend."""
    return not overwrite and path.exists() and path.stat().st_size > 0


def print_text(chunks: Iterator[Chunk], args: argparse.Namespace) -> int:
    """The answer on stdout as it comes, one line of statistics on stderr."""
    last, count, exit_code, is_reasoning = None, 0, 0, False
    show_reasoning = args.show_reasoning
    if show_reasoning is None:  # a user who sets the effort probably wants to see the reasoning
        show_reasoning = args.reasoning_effort is not None and not args.quiet
    try:
        for last in chunks:
            count += 1
            if last.text:
                if is_reasoning:
                    end_dimmed()
                answer(last.text)
                is_reasoning = False
            if show_reasoning and (other := last.reasoning + last.preamble + last.arguments):
                dimmed(other)
                is_reasoning = True
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    end_answer()
    if last is not None and last.statistics is not None and last.statistics.no_answer is not None:
        say(f"[no answer: {typed(last.statistics.no_answer)}]")
        exit_code = NO_ANSWER
    if not args.quiet:
        say(summary(last, count, args.max_tokens, uses_draft(args)))
        for note in last.statistics.notes if last and last.statistics else ():
            say(f"[{note}]")
    return exit_code


def print_json(chunks: Iterator[Chunk], args: argparse.Namespace) -> int:
    """One JSON object with text, tokens, finish_reason, log-probabilities and statistics."""
    received: list[Chunk] = []
    exit_code = 0
    try:
        received.extend(chunks)
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    last = received[-1] if received else None
    reasoning = "".join(chunk.reasoning + chunk.preamble for chunk in received)
    arguments = "".join(chunk.arguments for chunk in received)
    found: dict[str, Any] = {
        "model": args.model,
        "text": "".join(chunk.text for chunk in received),
        **({"reasoning": reasoning} if reasoning else {}),
        **({"call": {"name": _called(received), "arguments": arguments}} if arguments else {}),
        "tokens": [chunk.token for chunk in received],
        "finish_reason": "interrupted" if exit_code else last.finish_reason if last else None,
        "statistics": statistics_as_json(last.statistics) if last and last.statistics else None,
    }
    if args.logprobs is not None:
        found["logprobs"] = [{"token": c.token, "logprob": c.logprob, "top": c.top_logprobs} for c in received]
    if last and last.statistics and last.statistics.no_answer is not None:
        say(f"[no answer: {typed(last.statistics.no_answer)}]")
    report_json(found)
    return exit_code


def _called(chunks: list[Chunk]) -> str | None:
    """The tool that a completion calls at its end, or None."""
    return next((chunk.recipient for chunk in reversed(chunks) if chunk.recipient is not None), None)


def statistics_as_json(statistics: Statistics) -> dict[str, Any]:
    """Statistics as JSON; for experts on disk only the sums."""
    found = dict(vars(statistics))
    for name in ("prompt_experts", "answer_experts"):
        experts: ExpertStatistics | None = found.pop(name)
        if experts is not None:
            sums = {key: value for key, value in experts._asdict().items() if key != "layers"}
            found[name] = {**sums, "hit_rate": experts.hit_rate}
    return found


def experts_read(statistics: Statistics) -> str:
    """What was read from disk, as a clause with a semicolon; empty if all experts are in memory."""
    prompt, answer = statistics.prompt_experts, statistics.answer_experts
    if prompt is None or answer is None:
        return ""
    each = answer.bytes_read / max(1, statistics.completion_tokens - 1)
    return (
        f"experts read: {prompt.bytes_read / 1e6:,.0f} MB for the prompt (waited {prompt.seconds_waited:.2f} s), "
        f"{each / 1e6:,.1f} MB a token ({answer.hit_rate:.0%} were in memory, waited {answer.seconds_waited:.2f} s); "
    )


def summary(last: Chunk | None, count: int, max_tokens: int | None, uses_draft: bool = False) -> str:
    """One line for people: tokens, times, and why the answer ended."""
    from ..engine.request import DEFAULT_MAX_TOKENS

    if last is None or last.statistics is None:
        return f"[interrupted after {count} tokens]"
    s = last.statistics
    end = "end of answer" if last.finish_reason == "stop" else f"stopped at {s.completion_tokens} tokens"
    if last.finish_reason == "length" and max_tokens is None:
        end += ", the default limit: change it with --max-tokens N" if s.max_tokens == DEFAULT_MAX_TOKENS else ""
    elif last.finish_reason == "length" and s.completion_tokens < (max_tokens or 0):
        end += f": the context is full, so --max-tokens {max_tokens} was clipped"
    cached = f" ({s.cached_tokens} from the prompt cache)" if s.cached_tokens else ""
    thought = f" ({s.reasoning_tokens} of them reasoning)" if s.reasoning_tokens else ""
    return (
        f"[{s.prompt_tokens} prompt tokens{cached}, {s.time_to_first_token:.2f} s to the first token; "
        f"{s.completion_tokens} tokens{thought} at {s.decode_tps:.1f} tokens/s; {acceptance_clause(s, uses_draft)}"
        f"{experts_read(s)}peak memory {s.peak_memory_bytes / 1e6:,.0f} MB; {end}]"
    )


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from the argument, a file, or standard input."""
    if sum(each is not None for each in (args.text, args.prompt, args.prompt_file)) > 1:
        raise PromptError("There is more than one prompt: give only one of the argument, --prompt and --prompt-file.")
    if args.prompt_file is not None:
        return read_text(expanded(args.prompt_file, PromptError), PromptError, LARGEST_PROMPT, may_be_pipe=True)
    prompt = args.prompt if args.text is None else args.text
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise PromptError('There is no prompt: give --prompt "What is a banjo?", --prompt-file FILE, or pipe text in.')
    data = sys.stdin.buffer.read(LARGEST_PROMPT + 1)
    if len(data) > LARGEST_PROMPT:
        raise PromptError(f"Standard input has more than {LARGEST_PROMPT:,} bytes, too much for a prompt: give less.")
    return _decoded(data, "standard input")


def read_form(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `stream_generate` for the answer's format, read from files where necessary."""
    form: dict[str, Any] = {}
    if args.json_schema is not None:
        text = read_text(expanded(args.json_schema, SettingError), SettingError, may_be_pipe=True)
        form["schema"] = parse_json(text, f"The JSON Schema file {args.json_schema}", SettingError, "correct it")
    if args.regex is not None:
        form["regex"] = args.regex
    if args.grammar is not None:
        form["grammar"] = read_text(expanded(args.grammar, SettingError), SettingError, may_be_pipe=True)
    if form:
        from ..decoding.grammar import answer_format

        answer_format(**form)  # raises for an invalid format before the model is opened
    return form


def _decoded(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The prompt from {origin} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}. Convert it first, "
            "for example with iconv."
        ) from None
