"""`python -m openelm_mlx.generate`: a prompt in, text out as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import PromptError, SettingError
from .options import add_model_arguments, add_sampling_arguments, load_options, sampling_options

if TYPE_CHECKING:
    from ..decoding.drafts import Drafts
    from ..decoding.prefix_cache import PrefixCache
    from ..generate import Chunk, Statistics
    from ..memory.expert_statistics import ExpertStatistics
    from ..models import Model

HELP = "generate text from a prompt"
INTERRUPTED = 130

# None: a model without channels.
ANSWER_CHANNELS = (None, "final")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_arguments(parser.add_argument_group("model"))

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
    add_sampling_arguments(sampling, max_tokens=256)
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)"
    )
    sampling.add_argument(
        "--sliding-window", type=int, metavar="N", help="keep the last N tokens only, and go past the context"
    )
    sampling.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="prompt tokens in flight at once (default: what memory allows)"
    )
    sampling.add_argument(
        "--kv-bits",
        type=int,
        choices=[8, 16],
        help="8: keys and values in half the memory (default: 16, or the plan's)",
    )

    sampling.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="take what was computed of prompts that begin alike from FILE if it is there, and keep this one's in it",
    )

    guess = parser.add_argument_group("guessing ahead (the answer stays the same; off while it does not pay)")
    guess.add_argument("--draft-model", metavar="SOURCE", help="a smaller model with the same tokenizer guesses")
    guess.add_argument(
        "--prompt-lookup", action="store_true", help="guess that what followed the same words follows again"
    )
    guess.add_argument(
        "--num-draft-tokens", type=int, metavar="N", help="guess N tokens at once (default: 4, or 8 looked up)"
    )

    form = parser.add_argument_group("form of the answer")
    form.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that follows the JSON Schema in FILE")
    form.add_argument("--regex", metavar="PATTERN", help="the whole answer matches this regular expression")
    form.add_argument("--grammar", metavar="FILE", help="the answer follows the grammar in FILE, in Lark's syntax")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--logprobs", type=int, metavar="N", help="report log-probabilities, and the N likeliest tokens (with --json)"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    output.add_argument(
        "--show-reasoning", action=argparse.BooleanOptionalAction,
        help="show gpt-oss's reasoning, dimmed, on stderr (default: when --reasoning-effort is given, and not --quiet)",
    )  # fmt: skip
    output.add_argument("--quiet", "-q", action="store_true", help="no statistics on stderr")


def run(args: argparse.Namespace) -> int:
    """Load, generate, print. Returns the exit code."""
    check_draft_options(args)
    if args.logprobs is not None and not args.json:
        raise SettingError("--logprobs are shown with --json only: add it.")
    prompt = read_prompt(args)
    form = read_form(args)
    from ..decoding.sampling import SamplingParams
    from ..generate import stream_generate
    from ..loading import load

    sampling = SamplingParams(**sampling_options(args))  # before the weights are read: a bad option costs no waiting
    model, tokenizer = load(args.model, **load_options(args))
    cache = open_prompt_cache(args.prompt_cache, model)
    draft = load_draft(args)
    chunks = stream_generate(
        model,
        tokenizer,
        prompt
        if args.system is None
        else [{"role": "system", "content": args.system}, {"role": "user", "content": prompt}],
        max_tokens=args.max_tokens,
        sampling=sampling,
        stop=args.stop,
        logprobs=args.logprobs,
        raw=args.raw,
        reasoning_effort=args.reasoning_effort,
        sliding_window=args.sliding_window,
        prefill_chunk=args.prefill_chunk,
        kv_bits=args.kv_bits,
        prefix_cache=cache,
        draft=draft,
        **form,
    )
    exit_code = print_json(chunks, args) if args.json else print_text(chunks, args)
    if cache is not None:
        cast("Generator[Chunk, None, None]", chunks).close()  # an answer that was cut short is kept now
        cache.save(args.prompt_cache)
    return exit_code


def check_draft_options(args: argparse.Namespace) -> None:
    """Raise SettingError where the options for guessing do not go together."""
    if args.draft_model is not None and args.prompt_lookup:
        raise SettingError("--draft-model and --prompt-lookup both guess: give one of them.")
    if args.num_draft_tokens is not None and args.draft_model is None and not args.prompt_lookup:
        raise SettingError("--num-draft-tokens is for --draft-model or --prompt-lookup: add one of them.")


def load_draft(args: argparse.Namespace) -> Drafts | None:
    """What guesses the next tokens, if anything does."""
    if args.draft_model is None and not args.prompt_lookup:
        return None
    from ..decoding.drafts import DraftModel, PromptLookup
    from ..loading import load
    from .progress import byte_bar

    count = {} if args.num_draft_tokens is None else {"num_draft_tokens": args.num_draft_tokens}
    if args.prompt_lookup:
        return PromptLookup(**count)
    progress = None if args.quiet else byte_bar(args.draft_model)
    model, tokenizer = load(args.draft_model, dtype=args.dtype, progress=progress)
    return DraftModel(model, tokenizer, **count)


def open_prompt_cache(name: str | None, model: Model) -> PrefixCache | None:
    """The prefix cache of a file, an empty one when there is no such file yet."""
    if name is None:
        return None
    from ..decoding.prefix_cache import PrefixCache

    cache = PrefixCache()
    if Path(name).expanduser().exists():
        cache.load(name, model)
    return cache


def print_text(chunks: Iterator[Chunk], args: argparse.Namespace) -> int:
    """The answer on stdout as it comes, one line of statistics on stderr."""
    last, count, exit_code, is_reasoning = None, 0, 0, False
    show_reasoning = args.show_reasoning
    if show_reasoning is None:  # who says how long it is to think wants to see it
        show_reasoning = args.reasoning_effort is not None and not args.quiet
    try:
        for last in chunks:
            count += 1
            if not last.text:
                continue
            if last.channel in ANSWER_CHANNELS:
                if is_reasoning:
                    print(file=sys.stderr)
                sys.stdout.write(last.text)
                sys.stdout.flush()
            elif show_reasoning:
                print_dimmed(last.text)
            is_reasoning = show_reasoning and last.channel not in ANSWER_CHANNELS
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    sys.stdout.write("\n")
    sys.stdout.flush()
    if not args.quiet:
        print(summary(last, count, args.max_tokens), file=sys.stderr)
        for note in last.statistics.notes if last and last.statistics else ():
            print(f"[{note}]", file=sys.stderr)
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
    reasoning = "".join(chunk.text for chunk in received if chunk.channel not in ANSWER_CHANNELS)
    answer: dict[str, Any] = {
        "model": args.model,
        "text": "".join(chunk.text for chunk in received if chunk.channel in ANSWER_CHANNELS),
        **({"reasoning": reasoning} if reasoning else {}),
        "tokens": [chunk.token for chunk in received],
        "finish_reason": "interrupted" if exit_code else last.finish_reason if last else None,
        "statistics": statistics_as_json(last.statistics) if last and last.statistics else None,
    }
    if args.logprobs is not None:
        answer["logprobs"] = [{"token": c.token, "logprob": c.logprob, "top": c.top_logprobs} for c in received]
    print(json.dumps(answer, ensure_ascii=False))
    return exit_code


def statistics_as_json(statistics: Statistics) -> dict[str, Any]:
    """Their names and numbers; of experts on disk the sums."""
    found = dict(vars(statistics))
    for name in ("prompt_experts", "answer_experts"):
        experts: ExpertStatistics | None = found.pop(name)
        if experts is not None:
            sums = {key: value for key, value in experts._asdict().items() if key != "layers"}
            found[name] = {**sums, "hit_rate": experts.hit_rate}
    return found


def experts_read(statistics: Statistics) -> str:
    """What was read from disk, in words and with a semicolon; nothing where all is in memory."""
    prompt, answer = statistics.prompt_experts, statistics.answer_experts
    if prompt is None or answer is None:
        return ""
    each = answer.bytes_read / max(1, statistics.completion_tokens - 1)
    return (
        f"experts read: {prompt.bytes_read / 1e6:,.0f} MB for the prompt (waited {prompt.seconds_waited:.2f} s), "
        f"{each / 1e6:,.1f} MB a token ({answer.hit_rate:.0%} were in memory, waited {answer.seconds_waited:.2f} s); "
    )


def print_dimmed(text: str) -> None:
    """Text that is not the answer, on stderr; grey where that is a terminal."""
    sys.stderr.write(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text)
    sys.stderr.flush()


def summary(last: Chunk | None, count: int, max_tokens: int) -> str:
    """One line for people: what it took and why it ended."""
    if last is None or last.statistics is None:
        return f"[interrupted after {count} tokens]"
    s = last.statistics
    end = "end of answer" if last.finish_reason == "stop" else f"stopped at {s.completion_tokens} tokens"
    if last.finish_reason == "length" and s.completion_tokens < max_tokens:
        end += f": the context is full, so --max-tokens {max_tokens} was clipped"
    cached = f" ({s.cached_tokens} from the prompt cache)" if s.cached_tokens else ""
    guessed = f"{s.accepted_tokens} of {s.drafted_tokens} guesses right; " if s.drafted_tokens else ""
    return (
        f"[{s.prompt_tokens} prompt tokens{cached}, {s.time_to_first_token:.2f} s to the first token; "
        f"{s.completion_tokens} tokens at {s.decode_tps:.1f} tokens/s; {guessed}{experts_read(s)}"
        f"peak memory {s.peak_memory_bytes / 1e6:,.0f} MB; {end}]"
    )


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from the argument, a file, or standard input."""
    if sum(each is not None for each in (args.text, args.prompt, args.prompt_file)) > 1:
        raise PromptError("There are two prompts, of the argument, --prompt and --prompt-file: give one.")
    if args.prompt_file is not None:
        path = Path(args.prompt_file).expanduser()
        try:
            return _decoded(path.read_bytes(), str(path))
        except OSError as error:
            raise PromptError(f"The prompt file {path} cannot be read: {error.strerror}.") from error
    prompt = args.prompt if args.text is None else args.text
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise PromptError('There is no prompt: give --prompt "What is a banjo?", --prompt-file FILE, or pipe text in.')
    return _decoded(sys.stdin.buffer.read(), "standard input")


def read_form(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `stream_generate` for the answer's form, from files where they are given so."""
    form: dict[str, Any] = {}
    if args.json_schema is not None:
        text = _read_file(args.json_schema, "JSON Schema")
        try:
            form["schema"] = json.loads(text)
        except ValueError as error:
            raise SettingError(f"The JSON Schema file {args.json_schema} is not JSON: {error}.") from None
    if args.regex is not None:
        form["regex"] = args.regex
    if args.grammar is not None:
        form["grammar"] = _read_file(args.grammar, "grammar")
    if form:
        from ..decoding.grammar import answer_format

        answer_format(**form)  # what is wrong with it is said before the weights are read
    return form


def _read_file(name: str, what: str) -> str:
    path = Path(name).expanduser()
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise SettingError(f"The {what} file {path} cannot be read: {error.strerror}.") from error


def _decoded(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The prompt from {origin} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}. Convert it first, "
            "for example with iconv."
        ) from None
