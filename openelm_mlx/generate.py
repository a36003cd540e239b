"""From a prompt to text: generate and stream_generate. The decoding loop is in engine/single.py.

This module is also a command, `python -m openelm_mlx.generate`, and callable: `openelm_mlx.generate(model, tokenizer,
prompt)` is `openelm_mlx.generate.generate(...)`, whichever of the two a program imported first.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before anything else is imported: --help is instant, and a machine without MLX gets a sentence, not a traceback.
    from openelm_mlx.commands import main

    sys.exit(main(["generate", *sys.argv[1:]]))

import inspect
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from . import arguments
from .arguments import checked_call, refuse_unknown
from .decoding.drafts import Drafts
from .decoding.prefill import prefill as prefill
from .decoding.prefix_cache import PrefixCache
from .decoding.sampling import SamplingParams
from .engine.many import answers, option_names
from .engine.prompt import Prompt
from .engine.sequence import Chunk
from .engine.single import new_sequence, run
from .errors import NoAnswerWarning, PromptError
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .models import Model


@checked_call("om.generate")
def generate(
    model: Model, tokenizer: Tokenizer | None, prompt: Prompt | Sequence[Prompt] | None = None, **options: Any
) -> Any:
    """The model's answer to `prompt`, as one string, without its reasoning. Takes the options of `stream_generate`.

    A list of prompts (texts, or lists of token ids or of chat messages) gives a list of answers: they are computed
    together by an `om.Engine`, and each is the one that its prompt gets alone. What is wrong with one of them is raised
    with its number.

    When gpt-oss gives no answer, because its reasoning used up the tokens or it called a tool, the string is empty and a
    `NoAnswerWarning` says why and what to change.
    """
    refuse_unknown("om.generate", unknown_options(options), option_names())
    if is_list_of_prompts(prompt):
        found = answers(model, tokenizer, cast("Sequence[Prompt]", prompt), **options)
        for at, (_, statistics) in enumerate(found):
            if statistics is not None and statistics.no_answer is not None:
                told = f"Prompt {at + 1} of {len(found)}: {statistics.no_answer}"
                warnings.warn(told, NoAnswerWarning, stacklevel=_depth_of_caller())
        return [text for text, _ in found]
    prompt = cast("Prompt | None", prompt)
    text, last = "", None
    for last in stream_generate(model, tokenizer, prompt, **options):
        text += last.text
    if last is not None and last.statistics is not None and last.statistics.no_answer is not None:
        warnings.warn(last.statistics.no_answer, NoAnswerWarning, stacklevel=_depth_of_caller())
    return text


def is_list_of_prompts(prompt: Any) -> bool:
    """Whether it is several prompts: texts, or lists. Token ids and chat messages in a list are one.

    Raises PromptError where some of a list are prompts, and others are not.
    """
    if not isinstance(prompt, (list, tuple)):
        return False
    others = [at for at, each in enumerate(prompt) if not _may_be_a_prompt(each)]
    if others and len(others) < len(prompt):
        other = prompt[others[0]]
        raise PromptError(
            f"Number {others[0] + 1} in the list of {len(prompt)} prompts is of type {type(other).__name__}: each has to be "
            "text, a list of token ids, or a list of chat messages."
        )
    return bool(prompt) and not others


def _may_be_a_prompt(each: Any) -> bool:
    return isinstance(each, (str, list, tuple)) or (hasattr(each, "tolist") and each.ndim > 0)


def _depth_of_caller() -> int:
    """The stack level of the caller of `generate`, which is reached through a check and through the module itself."""
    depth = 2
    while sys._getframe(depth).f_code.co_filename in (__file__, arguments.__file__):
        depth += 1
    return depth


@checked_call("om.stream_generate")
def stream_generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt | None = None,
    *,
    max_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: str | Sequence[str] = (),
    logprobs: int | None = None,
    raw: bool = False,
    chat_template: str | None = None,
    reasoning_effort: str | None = None,
    sliding_window: int | None = None,
    prefill_chunk: int | None = None,
    kv_bits: int | None = None,
    schema: Any = None,
    regex: str | None = None,
    grammar: str | None = None,
    tool_schemas: Mapping[str, Any] | None = None,
    tools: Sequence[Any] = (),
    tool_choice: str | None = None,
    prefix_cache: PrefixCache | None = None,
    draft: Drafts | None = None,
    adapter: str | None = None,
) -> Iterator[Chunk]:
    """The model's answer to `prompt`, a chunk for each token; the last chunk has a finish_reason and the
    statistics.

        for chunk in om.stream_generate(model, tokenizer, "What is a banjo?"):
            print(chunk.text, end="", flush=True)  # the answer alone; chunk.reasoning has what gpt-oss thinks

    Args:
        prompt: A string (through the chat template where the model has one; raw=True takes it as it is), token
            ids, or chat messages like {"role": "user", "content": "..."}.
        max_tokens: Limit for reasoning and answer together, clipped to the room that the context leaves. None:
            gpt-oss, which ends by itself, may use all of that room as far as memory allows; other models stop
            at 256.
        stop: Strings that end the answer and are not part of it.
        logprobs: Report each token's log-probability and this many of the likeliest alternatives.
        reasoning_effort: "low", "medium" or "high", how long gpt-oss thinks; with "none" it answers at once.
        sliding_window: Keep only this many tokens of context, so that generation can go on past its end.
        prefill_chunk: Tokens of the prompt in flight at once; the plan's (512 without one), and fewer where
            memory is short, when it is None.
        kv_bits: 8 keeps keys and values in half the memory, 16 as they are computed; the model's own setting
            when it is None.
        schema: What the answer has to be, one of them: a JSON Schema or a Pydantic model's class, a regular
            expression, a grammar in Lark's syntax. It is valid then, and it is finished within max_tokens, cut
            short where need be; gpt-oss thinks as freely as ever.
        regex: See schema.
        grammar: See schema.
        tool_schemas: The same for the arguments of gpt-oss's calls, by recipient: {"functions.f": schema}.
        tools: Functions that gpt-oss may call, as OpenAI writes them; a call's arguments follow its schema, and
            `chunk.arguments` has them. om.Chat runs tools.
        tool_choice: "auto", "none", "required", or one function that has to be called, "functions.f".
        prefix_cache: An `om.PrefixCache`, where what earlier requests computed of a prompt that begins alike is
            taken from and this one's is kept in; the answer is the same.
        draft: `om.PromptLookup()` or `om.DraftModel(small_model)` guesses tokens that the model checks several
            at a time: the same answer when greedy, the same distribution when sampled (but a seed does not
            repeat it, since the clock decides when it guesses), and plain steps while that is faster.
        adapter: The name of one of the model's adapters (`om.load(..., adapter=)`, `om.add_adapter`), or "none"
            for the model without one; the active one when it is None.

    Everything that can be wrong with the request is raised here, before any work: PromptError, SettingError,
    TokenizerError, MemoryLimitError. While it runs, a request that would pass the memory limit after all
    (something else in the process grew) ends with MemoryLimitError, and the model can be used again.
    """
    sequence = new_sequence(
        model, tokenizer, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, logprobs=logprobs, raw=raw,
        chat_template=chat_template, reasoning_effort=reasoning_effort, sliding_window=sliding_window,
        prefill_chunk=prefill_chunk, kv_bits=kv_bits, schema=schema, regex=regex, grammar=grammar,
        tool_schemas=tool_schemas, tools=tools, tool_choice=tool_choice, prefix_cache=prefix_cache, draft=draft,
        adapter=adapter,
    )  # fmt: skip
    return run(model, tokenizer, sequence)


def unknown_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not keywords of `stream_generate`."""
    known = option_names()
    return {name: value for name, value in options.items() if name not in known}


class _CallableModule(types.ModuleType):
    """`openelm_mlx.generate` is this module and the function at once, so no import order makes one hide the other."""

    __signature__ = inspect.signature(generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
