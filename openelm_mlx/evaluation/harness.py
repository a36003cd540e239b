"""Our models as a model of lm-evaluation-harness; importing this needs `lm_eval`, which takes seconds.

A program that imports this module has the model registered. The harness's command `lm_eval` does so for a task file in which
a `!function` names something of this module, as `examples/evaluate/openelm_mlx.yaml` does; `python -m openelm_mlx.evaluation`
is that command with the module imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ..decoding.sampling import SamplingParams
from ..errors import SettingError
from ..loading import load
from ..text.chat import HARMONY
from ..text.tokenizer import Tokenizer
from .answers import Answer, answers, seeded
from .chats import chat_tokens
from .likelihood import borders_of
from .requests import OnDone, Score, StageProgress, TokenRequest
from .scorer import Scorer, kept_scores
from .store import Store

if TYPE_CHECKING:
    from ..models import Model

# By which the harness knows the model; a task file that names it has this module imported.
MODEL_NAME = "openelm_mlx"
# What the harness gives a task that says nothing.
MAX_GEN_TOKS = 256
# Its words for a request that have no meaning here.
_WITHOUT_MEANING = {"batch_size", "max_batch_size", "device", "trust_remote_code", "parallelize"}
# Marks a chat whose last message was begun for the model.
_PREFIX = "prefix"


@register_model(MODEL_NAME)
class HarnessModel(LM):
    """pretrained: a source for `om.load`, with its keywords; or model and tokenizer, as it gave them.

    add_bos_token: whether texts begin with BOS; None leaves it to the tokenizer. reasoning_effort: of gpt-oss, for the
    system message of tasks with a chat template. store: answers of an interrupted run. progress: told how far it is.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        model: Model | None = None,
        tokenizer: Any = None,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        reasoning_effort: str | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        store: Store | None = None,
        progress: StageProgress | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        options = {name: value for name, value in options.items() if name not in _WITHOUT_MEANING}
        if model is None:
            if pretrained is None:
                raise SettingError("The model is missing: give pretrained=SOURCE.")
            model, tokenizer = load(pretrained, tokenizer=tokenizer, **options)
        elif options:
            raise SettingError(f"{min(options)} is for a model that is loaded here, and it is there already.")
        self.model, self.our_tokenizer = model, tokenizer
        self.borders = borders_of(model, tokenizer, max_length, add_bos_token)
        self.reasoning_effort, self.max_gen_toks = reasoning_effort, max_gen_toks
        self.store = Store(None, {}) if store is None else store
        self._progress = progress
        self._chats: dict[str, list[dict[str, Any]]] = {}
        self.scorer = Scorer(model)
        self.given: list[Answer] = []  # to questions, in the order of the calls

    # --- what the harness asks ---

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each (context, continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        scores = self._scores("loglikelihood", pairs, [request.args for request in requests])
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, tuple(score))
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text."""
        windows: list[TokenRequest] = []
        counts = []
        for request in requests:
            found = self.borders.rolling(request.args[0])
            counts.append(len(found))
            windows += found
        names = [(request.args[0], i) for request, count in zip(requests, counts, strict=True) for i in range(count)]
        scores = iter(self._scores("rolling", windows, names))
        sums = [sum(next(scores).logprob for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, without reasoning, ended by the first of its stop strings."""
        prompts, options, keys = [], [], []
        for request in requests:
            context, given = request.args
            prompts.append(self._prompt(context))
            keys.append(self.store.key("generate", context, given, self.reasoning_effort))
            number = int(keys[-1].rsplit("-", 1)[1]) - 1
            options.append(self._options(given, number, isinstance(prompts[-1][0], Mapping)))
        told = self._told("generate_until", len(requests))
        found = answers(self.model, self.our_tokenizer, prompts, options, self.store, keys, told)
        self.given += found
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return [answer.text for answer in found]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat. The tokens that the model reads are made of the messages: no content becomes a control token."""
        messages = [dict(each) for each in chat_history]
        if not add_generation_prompt:
            messages.append({"role": _PREFIX})
        text = _with_markup(self._tokenizer, self._chat_tokens(messages))
        self._chats[text] = messages
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the template that `apply_chat_template` uses."""
        return self._tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer and template from others, for the harness's cache of requests."""
        return f"openelm_mlx-{self._tokenizer.vocab_size}-{self._tokenizer.chat_template}"

    # --- how it is done ---

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.our_tokenizer is not None
        found: Tokenizer = self.our_tokenizer
        return found

    def _pair(self, context: str, continuation: str) -> TokenRequest:
        chat = self._chats.get(context)
        if chat is None:
            return self.borders.pair(context, continuation)
        # gpt-oss answers in channels: the choice is scored where its answer would stand.
        return self.borders.after_tokens(self._chat_tokens(chat, is_scored=True), continuation)

    def _scores(self, kind: str, requests: Sequence[TokenRequest], names: Sequence[Any]) -> list[Score]:
        keys = [self.store.key(kind, *name) for name in names]
        return kept_scores(self.scorer, requests, self.store, keys, self._told(kind, len(requests)))

    def _told(self, kind: str, count: int) -> OnDone:
        progress = self._progress
        return (lambda more: None) if progress is None else (lambda more: progress(kind, more, count))

    def _prompt(self, context: str) -> Any:
        chat = self._chats.get(context)
        if chat is None:
            return self.borders.encode(context)
        if chat[-1]["role"] != _PREFIX and self._tokenizer.chat_template == HARMONY:
            return chat
        return self._chat_tokens(chat)

    def _options(self, given: Mapping[str, Any], number: int, is_chat: bool) -> dict[str, Any]:
        """The harness's words for a generation as ours."""
        until = given.get("until") or []
        stops = tuple(each for each in ([until] if isinstance(until, str) else until) if each)
        temperature = float(given.get("temperature", 0.0) or 0.0)
        if given.get("do_sample") is False:
            temperature = 0.0
        sampling = SamplingParams(temperature=temperature)
        if temperature:
            sampling = SamplingParams(
                temperature=temperature, top_p=float(given.get("top_p", 1.0)), top_k=int(given.get("top_k", 0) or 0)
            )
            sampling = seeded(sampling, number)
        most = given.get("max_gen_toks", given.get("max_new_tokens", given.get("max_tokens", self.max_gen_toks)))
        options: dict[str, Any] = {"stop": stops, "max_tokens": int(most), "sampling": sampling}
        if is_chat and self.reasoning_effort is not None:
            options["reasoning_effort"] = self.reasoning_effort
        return options

    def _chat_tokens(self, chat: list[dict[str, Any]], is_scored: bool = False) -> list[int]:
        """A chat's tokens; a chat that ends with the mark of a prefix has an answer that was begun for the model."""
        messages, begun = chat, None
        if chat[-1]["role"] == _PREFIX:
            messages, begun = chat[:-2], str(chat[-2]["content"])
        effort, day = self.reasoning_effort, self.store.date
        return chat_tokens(self.model, self._tokenizer, messages, begun, is_scored, effort, day)


def _with_markup(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Tokens as text, control tokens spelled."""
    names = {token: name.encode() for name, token in tokenizer.special_tokens.items()}
    return b"".join(names.get(token) or tokenizer.token_bytes(token) for token in tokens).decode("utf-8", "replace")
