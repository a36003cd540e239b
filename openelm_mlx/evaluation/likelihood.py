"""How well a model predicts a text: perplexity, and bits a byte, which can be compared across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arguments import FLAG, FUNCTION, checked_call
from ..checks import whole_number
from ..decoding.arguments import check_model
from ..errors import PromptError, TokenizerError
from ..files import shown
from ..text.tokenizer import Tokenizer
from ..tokenizers import missing_tokenizer_message
from .borders import Borders
from .requests import Score
from .scorer import OnScores, Scorer
from .statistics import Mean, exp_of, mean_of, safe_exp

if TYPE_CHECKING:
    from ..models import Model

# A window at least: shorter ones predict most tokens from almost nothing.
LEAST_WINDOW = 2


@dataclass(frozen=True)
class Perplexity:
    """What `om.perplexity` found.

    nll: the mean negative log-likelihood of a token in nats, its error over the tokens. perplexity: its exponential.
    bits_per_byte: of UTF-8, over the whole text. word_perplexity: by words between white space. window: the longest text
    that a token was predicted from. num_documents, num_tokens, num_bytes, num_words: of what was read.
    """

    nll: Mean
    perplexity: Mean
    bits_per_byte: float
    word_perplexity: float
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_words: int
    window: int

    def as_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "nll": self.nll.as_dict(),
            "perplexity": self.perplexity.as_dict(),
        }


@checked_call("om.score", add_bos=FLAG, on_scores=FUNCTION)
def score(
    model: Model,
    tokenizer: Tokenizer | None,
    requests: Sequence[tuple[str, str]],
    *,
    add_bos: bool | None = None,
    on_scores: OnScores | None = None,
) -> list[Score]:
    """The log-likelihood of each continuation after its context, and whether greedy decoding would give it.

        om.score(model, tokenizer, [("A banjo is", " a stringed instrument"), ("A banjo is", " a fruit")])

    Texts are cut into tokens as lm-evaluation-harness does (docs/evaluation.md); what contexts have in common is computed
    once, so that many requests in one call cost much less than one after the other.

    Args:
        requests: Pairs of context and continuation, in any order. An empty context stands for the beginning of a text.
        add_bos: Whether texts begin with BOS; None: as the tokenizer does by itself.
        on_scores: Called after each pass with the scores that are complete, by the number of the request.

    Raises PromptError for a continuation without tokens or longer than the context, TokenizerError without a tokenizer,
    MemoryLimitError.
    """
    borders = borders_of(model, tokenizer, add_bos=add_bos)
    if isinstance(requests, (str, bytes)) or not isinstance(requests, Sequence):
        raise PromptError(f"requests is {shown(requests)}: give a list of pairs (context, continuation).")
    pairs = []
    for number, pair in enumerate(requests, 1):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise PromptError(f"Request {number} is {shown(pair)}: give a pair (context, continuation).")
        try:
            pairs.append(borders.pair(*pair))
        except PromptError as error:
            raise PromptError(f"Request {number} of {len(requests)}: {error}") from None
    return Scorer(model).score(pairs, on_scores=on_scores)


@checked_call("om.perplexity", on_scores=FUNCTION)
def perplexity(
    model: Model,
    tokenizer: Tokenizer | None,
    text: str | Sequence[str],
    *,
    window: int | None = None,
    on_scores: OnScores | None = None,
) -> Perplexity:
    """How well the model predicts `text`, or several documents, each on its own.

    Each token is predicted once: the first after BOS, or the end of a text where there is no BOS; those of a document
    longer than the window in windows that follow each other, the last one reaching back for a full context.

    Args:
        text: A document, or a list of them.
        window: The longest text that is read at once, in tokens; the model's context when it is None, which is the
            most.
        on_scores: Called after each pass with the windows that are complete, by number.

    Raises PromptError for a text without tokens, SettingError for a window that is no such number, TokenizerError,
    MemoryLimitError.
    """
    borders = borders_of(model, tokenizer, window)
    documents = checked_documents(text)
    requests = [request for document in documents for request in borders.rolling(document, is_harness=False)]
    scores = Scorer(model).token_logprobs(requests, on_scores)
    nll = mean_of([-each for logprobs in scores for each in logprobs])
    num_bytes = sum(len(document.encode()) for document in documents)
    num_words = sum(len(document.split()) for document in documents)
    total = nll.value * nll.n
    return Perplexity(
        nll=nll,
        perplexity=exp_of(nll),
        bits_per_byte=total / num_bytes / math.log(2),
        word_perplexity=safe_exp(total / num_words) if num_words else math.inf,
        num_documents=len(documents),
        num_tokens=nll.n,
        num_bytes=num_bytes,
        num_words=num_words,
        window=borders.context_length,
    )


def borders_of(
    model: Model, tokenizer: Tokenizer | None, window: int | None = None, add_bos: bool | None = None
) -> Borders:
    """How texts are cut for this model. window: at most the context that the model was loaded with."""
    check_model(model, tokenizer)
    if tokenizer is None:
        raise TokenizerError(missing_tokenizer_message(model.spec))
    if window is not None:
        whole_number("window", window, LEAST_WINDOW, model.context_length, whose="the model's ")
    return Borders(tokenizer, model.context_length if window is None else window, add_bos)


def checked_documents(text: str | Sequence[str]) -> list[str]:
    """The documents, at least one of which has text. Raises PromptError."""
    documents = [text] if isinstance(text, str) else text
    if not isinstance(documents, Sequence) or isinstance(documents, bytes):
        raise PromptError(f"The text is {shown(text)}: give a string, or a list of strings.")
    for number, each in enumerate(documents, 1):
        if not isinstance(each, str):
            raise PromptError(f"Document {number} is {shown(each)}: give a string.")
    kept = [each for each in documents if each.strip()]
    if not kept:
        raise PromptError("There is no text to read: it is empty.")
    return kept
