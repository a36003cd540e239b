"""From text to the tokens that are scored, as lm-evaluation-harness's Hugging Face backend cuts them (0.4.13).

Where that backend ends with an assertion (a border that swallows the whole continuation, a context of nothing but
spaces) there is a definition here, and an error where there is nothing to score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from ..checks import whole_number
from ..errors import PromptError, TokenizerError
from ..files import shown
from ..text.tokenizer import Tokenizer
from .requests import TokenRequest


class Borders:
    """Cuts texts into contexts and continuations for one tokenizer.

    context_length: the longest text that the model reads. add_bos: whether texts begin with BOS; None leaves it to the
    tokenizer, which is what the harness does since its pull request 3347. Raises TokenizerError where the vocabulary has
    neither BOS nor an end of text, so that nothing can stand for an empty context.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, add_bos: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self.context_length = whole_number("context_length", context_length)
        self.add_bos = add_bos
        bos, eos = tokenizer.bos_token, tokenizer.eos_tokens[:1]
        if bos is None and not eos:
            raise TokenizerError("The tokenizer names neither a BOS nor an end-of-text token; give the model's own.")
        self.prefix_token: int = eos[0] if bos is None else bos

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Tokens of a text that begins a sequence. A text that spells BOS at its beginning has it, and no second one."""
        name = self._bos_name
        if add_bos is None and name and text.startswith(name):
            assert self.tokenizer.bos_token is not None
            return [self.tokenizer.bos_token, *self.tokenizer.encode(text[len(name) :])]
        add_bos = self.add_bos if add_bos is None else add_bos
        if add_bos is None:
            return self.tokenizer.encode_prompt(text)
        bos = [self.tokenizer.bos_token] if add_bos and self.tokenizer.bos_token is not None else []
        return [*bos, *self.tokenizer.encode(text)]

    def pair(self, context: str, continuation: str) -> TokenRequest:
        """A context and what may follow it.

        Space at the end of the context belongs to the continuation. The continuation's tokens are those that both texts as
        one have beyond the number of the context's own. An empty context is the prefix token. Raises PromptError where the
        continuation has no tokens, or more than the context of the model.
        """
        for name, text in (("context", context), ("continuation", continuation)):
            if not isinstance(text, str):
                raise PromptError(f"A {name} is {shown(text)}: give text.")
        if context == "":
            return self._request([], self.encode(continuation, add_bos=False), continuation)
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        before = self.encode(context)
        whole = self.encode(context + continuation)
        after = whole[len(before) :]
        if not after and continuation:  # the border is inside a token, which the context has too
            after = self.tokenizer.encode(continuation, continuation=True)
        return self._request(before, after, continuation)

    def after_tokens(self, before: Sequence[int], continuation: str) -> TokenRequest:
        """A continuation after tokens: those of a rendered chat."""
        return self._request(before, self.tokenizer.encode(continuation, continuation=True), continuation)

    def rolling(self, text: str, is_harness: bool = True) -> list[TokenRequest]:
        """A whole document in windows of the context's length; each token is predicted once, with as much before it as fits.

        is_harness: a BOS that the tokenizer puts before the text is predicted too, after the prefix token, as its Hugging
        Face backend has it. Otherwise it is the beginning, and not a part of what is predicted.
        """
        tokens = self.encode(text) if is_harness else self.encode(text, add_bos=False)
        return list(windows(tokens, self.prefix_token, self.context_length))

    def _request(self, before: Sequence[int], after: Sequence[int], continuation: str) -> TokenRequest:
        if not before and after:
            # Not twice: a continuation that begins with the prefix token has it already.
            begins = after[0] == self.prefix_token
            before, after = ([after[0]], after[1:]) if begins else ([self.prefix_token], after)
        if not after:
            raise PromptError(
                f"A continuation of no tokens cannot be scored: it is {shown(continuation)}; leave it out, or give it text."
            )
        if len(after) > self.context_length:
            raise PromptError(
                f"A continuation has {len(after):,} tokens and the context holds {self.context_length:,}: shorten it, or "
                "use om.perplexity, which reads a long text in windows."
            )
        return TokenRequest.of(before, after, self.context_length)

    @cached_property
    def _bos_name(self) -> str:
        names = self.tokenizer.special_tokens.items()
        return next((name for name, token in names if token == self.tokenizer.bos_token), "")


def windows(tokens: Sequence[int], prefix_token: int, length: int) -> Iterator[TokenRequest]:
    """Requests of at most `length` inputs that together predict every one of `tokens` once.

    The prefix token stands before the first window only; the last window reaches back for a full context.
    """
    if not tokens:
        return
    count = min(length, len(tokens))
    yield TokenRequest.of([prefix_token], tokens[:count])
    done = count
    while done < len(tokens):
        count = min(len(tokens) - done, length)
        end = done + count
        yield TokenRequest.of(tokens[end - length - 1 : done], tokens[done:end])
        done = end
