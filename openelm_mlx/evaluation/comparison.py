"""How far one model's predictions are from another's on the same text: KL divergence, the likeliest token, perplexity.

Both models read the same windows, and the distributions are compared a few rows at a time, so that none is stored. Where
two models do not fit into memory, the first one's last hidden states are kept (11 kB a token for gpt-oss-20b, where its
logits would be 800 kB) with nothing of its weights but the head.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from ..arguments import FUNCTION, checked_call
from ..checks import whole_number
from ..decoding.arguments import check_model
from ..decoding.budget import Budget, chunk_of_plan, drop, keeping_to_plan
from ..decoding.prefill import lock_of
from ..engine.prompt import encode_prompt
from ..engine.single import not_finite
from ..errors import PromptError, SettingError, TokenizerError
from ..files import shown
from ..loading import Prepared, prepare
from ..runtime import runtime_of
from ..text.tokenizer import Tokenizer
from ..tokenizers import missing_tokenizer_message
from .borders import Borders, windows
from .likelihood import LEAST_WINDOW
from .requests import TokenRequest
from .scorer import LOGITS_BYTES, read_chunk
from .statistics import Mean, exp_of, mean_of
from .texts import Document

if TYPE_CHECKING:
    from ..hub.names import Progress
    from ..models import Model
    from ..sources import SourceName

# How many arrays of logits the comparison of two has in memory at most.
_COPIES = 8
# In gpt-oss's system message of compared chats, so that a comparison is the same on any day: that of its release.
CHAT_DATE = "2025-08-05"


@dataclass(frozen=True)
class Comparison:
    """What `om.compare` found, over every predicted token.

    kl: of the first model's next-token distribution from the second's, in nats, with its error; max_kl, and kl_quantiles by
    share ("0.5" is the median). same_top: how often both find the same token likeliest. nll, other_nll: of the text's own
    tokens by the first and the second model; perplexity_ratio: the second's perplexity over the first's, with the error of
    the paired difference. probability_change: of the right token, from the first to the second model; its root mean square.
    """

    kl: Mean
    max_kl: float
    kl_quantiles: Mapping[str, float]
    same_top: Mean
    nll: Mean
    other_nll: Mean
    perplexity_ratio: Mean
    probability_change: Mean
    probability_change_rms: float
    num_documents: int
    num_tokens: int
    window: int
    at_a_time: int

    def as_dict(self) -> dict[str, Any]:
        return {name: value.as_dict() if isinstance(value, Mean) else value for name, value in vars(self).items()}


@checked_call("om.compare", progress=FUNCTION)
def compare(
    a: Model | SourceName,
    b: Model | SourceName,
    texts: Document | Sequence[Document],
    *,
    window: int | None = None,
    load_options: Mapping[str, Any] | None = None,
    other_load_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """How far the predictions of `b` are from those of `a`, the reference, on the same texts.

        model, tokenizer = om.load("demo-openelm")
        packed, _ = om.load("demo-openelm", dense_bits=4)
        print(om.compare(model, packed, ["A banjo is a stringed instrument."]).kl)

    Args:
        a: A model as `om.load` returns it, or a source to be loaded. Two sources that do not fit into memory
            together, or that both have workers, are loaded one after the other.
        b: The same. Both must have the same tokenizer.
        texts: Documents, each a string, or a list of chat messages, which go through the model's chat template.
        window: The longest text that is read at once, in tokens; None: the shorter of the two contexts.
        load_options: Keywords of `om.load` for sources.
        other_load_options: Those for `b`; the same as for `a` when it is None.
        progress: Called with (tokens so far, all tokens).

    Raises PromptError for a text without tokens, SettingError for models whose tokens differ, and the errors of `load`.
    """
    for name, given in (("load_options", load_options), ("other_load_options", other_load_options)):
        if given is not None and not isinstance(given, Mapping):
            raise SettingError(f"{name} is {shown(given)}: give a dictionary of keywords of om.load.")
    options = {} if load_options is None else dict(load_options)
    sides = _Side(a, options), _Side(b, options if other_load_options is None else dict(other_load_options))
    requests, number, length = _windows(sides, texts, window)
    # A model that the caller has is the caller's: nothing of it is given up for the other one.
    together = any(side.is_loaded for side in sides) or _fit_together(sides)
    together &= not all(side.has_workers for side in sides)
    total = sum(len(each.inputs) for each in requests) * (1 if together else 2)
    counter = _Counter(progress, total)
    rows = _rows_together(sides, requests, counter) if together else _rows_in_turns(sides, requests, counter)
    return _summary(rows, number, length, 2 if together else 1)


class _Side:
    """One of two models, loaded or not yet."""

    def __init__(self, given: Model | SourceName, options: Mapping[str, Any]) -> None:
        self.prepared: Prepared | None = None
        self.model: Model | None = None
        if isinstance(given, (str, os.PathLike)):
            self.prepared = prepare(given, **options)
            self.let_workers_go()  # the other side may want the same ones
            shape = self.prepared.model
        else:
            check_model(given)
            self.model = shape = given
        self.shape = shape

    @property
    def is_loaded(self) -> bool:
        return self.model is not None

    @property
    def tokenizer(self) -> Tokenizer | None:
        return runtime_of(self.shape).tokenizer

    @property
    def has_workers(self) -> bool:
        return self.prepared is not None and self.prepared.several is not None

    def let_workers_go(self) -> None:
        """Until this side is loaded, which asks them again."""
        if self.prepared is not None and self.prepared.several is not None:
            self.prepared.several.chain.close()

    def load(self) -> Model:
        if self.model is None:
            assert self.prepared is not None
            self.model, _ = self.prepared.read()
        return self.model


def _fit_together(sides: Sequence[_Side]) -> bool:
    """Whether both plans fit into what the machine, or the limit, allows."""
    plans = [runtime_of(side.shape).plan for side in sides]
    known = [plan for plan in plans if plan is not None]
    return len(known) < 2 or sum(plan.process_bytes for plan in known) <= min(plan.memory_limit for plan in known)


def _windows(
    sides: Sequence[_Side], texts: Document | Sequence[Document], window: int | None
) -> tuple[list[TokenRequest], int, int]:
    """What both read, how many documents that is, and the longest window. Raises SettingError where their tokens differ."""
    first, second = sides
    tokenizer = first.tokenizer or second.tokenizer
    if tokenizer is None:
        raise TokenizerError(missing_tokenizer_message(first.shape.spec))
    most = min(side.shape.context_length for side in sides)
    if window is not None:
        whole_number("window", window, LEAST_WINDOW, most, whose="the models' ")
    vocabularies = [side.shape.spec.usable_vocab_size for side in sides]
    if vocabularies[0] != vocabularies[1]:
        raise SettingError(
            f"The models have {vocabularies[0]:,} and {vocabularies[1]:,} tokens, so that their predictions cannot be "
            "compared: give two forms of one model, or two models with the same tokenizer."
        )
    borders = Borders(tokenizer, most if window is None else window)
    requests: list[TokenRequest] = []
    documents = _documents(texts)
    for document in documents:
        tokens = _tokens(borders, first.shape, tokenizer, document)
        other = second.tokenizer
        if other is not None and other is not tokenizer and tokens != _tokens(borders, second.shape, other, document):
            raise SettingError(
                "The two models cut a text into different tokens, so that their predictions cannot be compared: give two "
                "models with the same tokenizer."
            )
        requests += windows(tokens, borders.prefix_token, borders.context_length)
    if not requests:
        raise PromptError("There is no text to compare the models on: it is empty.")
    return requests, len(documents), borders.context_length


def _documents(texts: Document | Sequence[Document]) -> list[Document]:
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise PromptError(f"The texts are {shown(texts)}: give a string, or a list of strings or chats.")
    if texts and all(isinstance(each, Mapping) for each in texts):
        return [cast("Document", texts)]
    for number, each in enumerate(texts, 1):
        is_chat = isinstance(each, Sequence) and bool(each) and all(isinstance(m, Mapping) for m in each)
        if not isinstance(each, str) and not is_chat:
            raise PromptError(f"Text {number} is {shown(each)}: give a string, or a list of chat messages.")
    return [cast("Document", each) for each in texts if not isinstance(each, str) or each.strip()]


def _tokens(borders: Borders, model: Model, tokenizer: Tokenizer, document: Document) -> list[int]:
    """The tokens that are predicted, without the BOS that a window begins with."""
    if isinstance(document, str):
        return borders.encode(document, add_bos=False)
    tokens = encode_prompt(model, tokenizer, cast(Any, document), current_date=CHAT_DATE).tokens
    return tokens[1:] if tokens[:1] == [borders.prefix_token] else tokens


@dataclass
class _Rows:
    """Of some predicted tokens: the divergence, whether the likeliest is the same, and both log-probabilities."""

    kl: np.ndarray
    same_top: np.ndarray
    logprobs: np.ndarray
    other_logprobs: np.ndarray


class _Counter:
    """Tells how many tokens have been read."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _rows_together(sides: Sequence[_Side], requests: Sequence[TokenRequest], counter: _Counter) -> Iterator[_Rows]:
    """Both models, chunk by chunk."""
    models = [side.load() for side in sides]
    chunk = min(chunk_of_plan(model) for model in models)
    for request in requests:
        with ExitStack() as stack:
            readers = [stack.enter_context(_Reader(model)) for model in models]
            for start in range(0, len(request.inputs), chunk):
                stop = min(start + chunk, len(request.inputs))
                states = [reader.read(request.inputs[start:stop]) for reader in readers]
                yield from _compared(models, states, request, start)
                counter.add(stop - start)


def _rows_in_turns(sides: Sequence[_Side], requests: Sequence[TokenRequest], counter: _Counter) -> Iterator[_Rows]:
    """The first model over everything, of which its last hidden states and its head stay; then the second one."""
    kept: list[mx.array] = []
    first = sides[0].load()
    for request in requests:
        kept.append(mx.concatenate(list(_whole(first, request, counter))))
        mx.eval(kept[-1])
    sides[0].let_workers_go()
    del first.layers[1:]  # the head asks the first one for its type
    runtime_of(first).residency = None
    mx.clear_cache()
    second = sides[1].load()
    for request, states in zip(requests, kept, strict=True):
        start = 0
        for other in _whole(second, request, counter):
            count = other.shape[0]
            yield from _compared([first, second], [states[start : start + count], other], request, start)
            start += count


def _whole(model: Model, request: TokenRequest, counter: _Counter) -> Iterator[mx.array]:
    chunk = chunk_of_plan(model)
    with _Reader(model) as reader:
        for start in range(0, len(request.inputs), chunk):
            tokens = request.inputs[start : start + chunk]
            yield reader.read(tokens)
            counter.add(len(tokens))


class _Reader:
    """A model that reads a text chunk by chunk, within its plan."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._cache = model.make_cache()
        self._stack = ExitStack()
        self._budget: Budget | None = None

    def __enter__(self) -> _Reader:
        self._budget, _ = self._stack.enter_context(keeping_to_plan(self.model, self._cache))
        return self

    def __exit__(self, *error: Any) -> None:
        drop(self._cache)
        self._stack.__exit__(*error)

    def read(self, tokens: Sequence[int]) -> mx.array:
        """The residual stream (L, hidden_size) after the last layer, of the next tokens."""
        assert self._budget is not None
        found, start = [], 0
        while start < len(tokens):
            length = self._budget.chunk_of_prompt(len(tokens), len(tokens) - start)
            with lock_of(self.model):
                found.append(read_chunk(self.model, tokens[start : start + length], self._cache))
            self._budget.chunk_is_done(length)
            start += length
        return found[0] if len(found) == 1 else mx.concatenate(found)


def _compared(
    models: Sequence[Model], states: Sequence[mx.array], request: TokenRequest, start: int
) -> Iterator[_Rows]:
    """The rows of a chunk that predict something; `start` is its first token's place."""
    begin = len(request.context) - 1
    first = max(start, begin)
    stop = min(start + states[0].shape[0], begin + len(request.continuation))
    step = max(1, LOGITS_BYTES // (_COPIES * 4 * models[0].spec.vocab_size))
    for at in range(first, stop, step):
        end = min(at + step, stop)
        targets = mx.array(list(request.continuation[at - begin : end - begin]))
        yield _compare_rows(models, [each[at - start : end - start] for each in states], targets)


def _compare_rows(models: Sequence[Model], states: Sequence[mx.array], targets: mx.array) -> _Rows:
    """states: two of (W, hidden_size); targets (W,)."""
    p, q = (
        model.head(h)[:, : model.spec.usable_vocab_size].astype(mx.float32)
        for model, h in zip(models, states, strict=True)
    )
    same = mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)
    p, q = (each - mx.logsumexp(each, axis=-1, keepdims=True) for each in (p, q))
    kl = mx.maximum(mx.sum(mx.exp(p) * (p - q), axis=-1), 0.0)
    chosen = [mx.take_along_axis(each, targets[:, None], axis=-1)[:, 0] for each in (p, q)]
    mx.eval(kl, same, *chosen)  # both models' logits are freed
    rows = _Rows(*(np.array(each) for each in (kl, same, *chosen)))
    if not np.isfinite(rows.kl).all() or not np.isfinite(rows.logprobs).all():
        raise not_finite()
    return rows


def _summary(rows: Iterator[_Rows], num_documents: int, window: int, at_a_time: int) -> Comparison:
    found = list(rows)
    kl, same, a, b = (
        np.concatenate([getattr(each, name) for each in found]).astype(np.float64)
        for name in ("kl", "same_top", "logprobs", "other_logprobs")
    )
    change = np.exp(b) - np.exp(a)
    shares = (0.5, 0.9, 0.95, 0.99, 0.999)
    quantiles = np.quantile(kl, shares).tolist()
    return Comparison(
        kl=mean_of(kl.tolist()),
        max_kl=float(kl.max()),
        kl_quantiles={str(share): value for share, value in zip(shares, quantiles, strict=True)},
        same_top=mean_of(same.tolist()),
        nll=mean_of((-a).tolist()),
        other_nll=mean_of((-b).tolist()),
        perplexity_ratio=exp_of(mean_of((a - b).tolist())),
        probability_change=mean_of(change.tolist()),
        probability_change_rms=float(np.sqrt(np.mean(change**2))),
        num_documents=num_documents,
        num_tokens=len(kl),
        window=window,
        at_a_time=at_a_time,
    )
