"""Guessed and verified tokens against the plain loop's: the same when greedy, the same distribution when sampled."""

import functools
import itertools
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, random_model
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.decoding.compiled_step import CompiledStep
from openelm_mlx.decoding.drafts import Draft
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.decoding.sampling import Sampler, SamplingParams
from openelm_mlx.decoding.speculation_gain import DraftHistory, Gain
from openelm_mlx.decoding.speculative import Guided, Speculative
from openelm_mlx.decoding.step import PlainStep
from openelm_mlx.decoding.tokens import one_by_one
from openelm_mlx.errors import SettingError
from openelm_mlx.generate import stream_generate

WINDOW = 16  # of the gpt-oss fixture's sliding layers
K = 4


@pytest.fixture(scope="module")
def models():
    return {"openelm": random_model(context_length=256), "gpt_oss": load_fixture(FIXTURES / "gpt_oss_tiny")}


@pytest.fixture(scope="module", params=["demo-openelm", "demo-gpt-oss"])
def demo(request):
    return om.load(short_demo(request.param), dtype="float32")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, length).tolist()


class Always(Gain):
    """Guess in every round, so that what a test is about happens whatever the clock says."""

    def pause(self) -> int:
        return 0

    @property
    def num_drafts(self) -> int:
        return self._most_drafts


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr("openelm_mlx.decoding.speculative.Gain", Always)


class Oracle:
    """Guesses from the known answer, wrong where `is_wrong(position in the answer)` says so."""

    def __init__(self, prompt, answer, is_wrong):
        self.prompt, self.answer, self.is_wrong = prompt, answer, is_wrong

    def guess(self, tokens, count, sampler, guide):
        at = len(tokens) - len(self.prompt)
        guesses = self.answer[at : at + count]
        return Draft(
            mx.array([(t + 1) % 500 if self.is_wrong(at + i) else t for i, t in enumerate(guesses)], mx.uint32)
        )


PATTERNS = {
    "all right": lambda i: False,
    "all wrong": lambda i: True,
    "alternating": lambda i: i % 2 == 1,
    "last wrong": lambda i: i % (K + 1) == K - 1,
    "now and then": lambda i: i % 7 == 3,
}


def greedy(model, prompt):
    return Sampler(SamplingParams(), model.spec.vocab_size, model.spec.vocab_size, prompt)


def plain(model, prompt, max_tokens, **options):
    cache = model.make_cache(**options)
    logits = prefill(model, prompt, cache, 8)
    source = one_by_one(PlainStep(model, cache), greedy(model, prompt), logits, max_tokens)
    return [choice.item() for choice in source]


@pytest.fixture(scope="module")
def answer_of(models):
    """The plain loop's answer to `prompt_of(length, length)`: many tests guess at the same ones."""

    @functools.cache
    def answer(family, length, max_tokens, **options):
        return plain(models[family], prompt_of(length, length), max_tokens, **options)

    return answer


def guessed(model, prompt, answer, is_wrong, gain, make_step=PlainStep, **options):
    cache = model.make_cache(room=K, **options)
    logits = prefill(model, prompt, cache, 8)
    step = make_step(model, cache)
    source = Speculative(model, step, greedy(model, prompt), prompt, Oracle(prompt, answer, is_wrong), K, gain=gain)
    tokens = []
    for choice in source.choices(logits, len(answer)):
        tokens.append(choice.item())
        assert len({layer.offset for layer in step.cache}) == 1
    return tokens, source.gain.counts


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("family", "options"), [("gpt_oss", {}), ("gpt_oss", {"kv_bits": 8}), ("openelm", {}), ("openelm", {"window": 16})]
)
def test_greedy_tokens_are_the_plain_loop_s_around_the_window(models, answer_of, family, options, pattern):
    model = models[family]
    for length in (2, *range(WINDOW - K - 1, WINDOW + K + 2, 3), 3 * WINDOW):
        prompt = prompt_of(length, length)
        answer = answer_of(family, length, 24, **options)
        tokens, counts = guessed(model, prompt, answer, PATTERNS[pattern], Always(K), **options)
        assert tokens == answer, length
        assert counts.rounds > 0
        if pattern == "all right":
            assert counts.accepted == counts.drafted
            assert counts.rounds == math.ceil(23 / (K + 1))
        if pattern == "all wrong":
            assert counts.accepted == 0


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("family", ["gpt_oss", "openelm"])
def test_rounds_and_steps_of_the_traced_graph_in_turns(models, family):
    """The graph keeps its position as an array, and rejected guesses stay in the rings' slots."""

    class Mixed(Always):
        def __init__(self):
            super().__init__(K)
            self.turns = itertools.cycle([0, 3, 0, 0, 1, 0, 4])

        def pause(self):
            return next(self.turns)

    model = models[family]
    for length in (5, WINDOW - 1, WINDOW + 1, 40):
        prompt = prompt_of(length, length)
        answer = plain(model, prompt, 20)
        for pattern in ("all wrong", "now and then"):
            make_step = functools.partial(CompiledStep, compile=False)
            assert guessed(model, prompt, answer, PATTERNS[pattern], Mixed(), make_step)[0] == answer


def test_without_room_the_ring_says_so(models):
    """What mlx-lm is silent about: a guess that cannot be taken back is an error."""
    model, prompt = models["gpt_oss"], prompt_of(40)
    step = PlainStep(model, model.make_cache())
    logits = prefill(model, prompt, step.cache, 8)
    oracle = Oracle(prompt, plain(model, prompt, 24), PATTERNS["all wrong"])
    source = Speculative(model, step, greedy(model, prompt), prompt, oracle, K, gain=Always(K))
    with pytest.raises(ValueError, match="cannot take back"):
        list(source.choices(logits, 24))


def outcome(chunks):
    chunks = list(chunks)
    return [(c.token, c.text, c.channel, c.finish_reason) for c in chunks], [c.logprob for c in chunks]


@pytest.mark.slow(first=1)
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop": ["a"]},
        {"max_tokens": 7},
        {"sampling": SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5)},
    ],
    ids=["to the end", "stop", "max_tokens", "penalties"],
)
def test_with_everything_else_that_a_request_asks_for(demo, options):
    """Stop strings, channels, log-probabilities, the end of text: in the middle of a draft as everywhere."""
    model, tokenizer = demo
    options = {"max_tokens": 40, "logprobs": 2, **options}
    drafts = [om.PromptLookup(num_draft_tokens=5, ngram=1), draft_of(model.spec.family)]
    accepted = 0
    for prompt in ("What is a violin?",):
        expected, logprobs = outcome(stream_generate(model, tokenizer, prompt, **options))
        for draft in drafts:
            chunks = list(stream_generate(model, tokenizer, prompt, draft=draft, **options))
            found, found_logprobs = outcome(chunks)
            assert found == expected
            assert np.allclose(found_logprobs, logprobs, atol=1e-3)
            statistics = chunks[-1].statistics
            assert 0 <= statistics.accepted_tokens <= statistics.drafted_tokens
            accepted += statistics.accepted_tokens
    assert accepted > 0


@functools.cache
def draft_of(family: str):
    """A draft model that is right often: the demo itself with its matrices in 4 bits."""
    name = "demo-openelm" if family == "openelm" else "demo-gpt-oss"
    return om.DraftModel(om.load(short_demo(name), dtype="float32", dense_bits=4)[0])


@pytest.mark.usefixtures("always")
def test_a_draft_model_that_agrees_is_taken_and_one_that_does_not_changes_nothing(models):
    model, prompt = models["gpt_oss"], prompt_of(3 * WINDOW)
    twin, other = load_fixture(FIXTURES / "gpt_oss_tiny"), random_model(vocab_size=512, context_length=256)
    expected = [chunk.token for chunk in stream_generate(model, None, prompt, max_tokens=40)]
    rates = []
    for draft in (twin, other):
        chunks = list(stream_generate(model, None, prompt, max_tokens=40, draft=om.DraftModel(draft)))
        assert [chunk.token for chunk in chunks] == expected
        rates.append(chunks[-1].statistics.accepted_tokens / chunks[-1].statistics.drafted_tokens)
    assert rates[0] == 1.0
    assert rates[1] < 0.5


@pytest.mark.parametrize("family", ["openelm", "gpt_oss"])
def test_a_draft_model_takes_its_wrong_guesses_back(models, family):
    """Whatever held of the last guess, and however much came since, it guesses as one that sees the text anew."""
    draft, text = models[family], prompt_of(120)
    guesser, sampler = om.DraftModel(draft, num_draft_tokens=K).begin(draft), greedy(draft, text)
    length = WINDOW - 3
    for num_new in (1, 2, K + 1, 1, 3, 30, 1, 1):
        fresh = om.DraftModel(draft, num_draft_tokens=K).begin(draft)
        guesses = [
            each.guess(text[:length], K, sampler, Guided(None, 512)).tokens.tolist() for each in (guesser, fresh)
        ]
        assert guesses[0] == guesses[1]
        text[length : length + num_new - 1] = guesses[0][: num_new - 1]  # so many hold, and another token follows
        length += num_new


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_turns_are_kept_and_taken_up_while_guessing(models):
    model, chat = models["gpt_oss"], prompt_of(40)
    cache, draft = om.PrefixCache(), om.PromptLookup(num_draft_tokens=K, ngram=1)
    for turn in range(3):
        for stop_after in (5, 9):
            stream = stream_generate(model, None, chat, max_tokens=20, draft=draft, prefix_cache=cache)
            begun = [next(stream).token for _ in range(stop_after)]
            stream.close()
            assert begun == plain(model, chat, stop_after)
        chunks = list(stream_generate(model, None, chat, max_tokens=10, draft=draft, prefix_cache=cache))
        assert chunks[-1].statistics.cached_tokens == len(chat) - 1
        assert [chunk.token for chunk in chunks] == plain(model, chat, 10)
        chat = [*chat, *(chunk.token for chunk in chunks), *prompt_of(4, turn)]


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_an_answer_in_a_format_is_the_same(demo):
    model, tokenizer = demo
    schema = {"type": "object", "properties": {"a": {"enum": ["red", "green"]}, "b": {
        "type": "array", "items": {"type": "boolean"}, "maxItems": 2}}, "required": ["a", "b"],
        "additionalProperties": False}  # fmt: skip
    options = {
        "schema": schema,
        "max_tokens": 70,
        "reasoning_effort": "low" if tokenizer.chat_template == "harmony" else None,
    }
    expected = outcome(stream_generate(model, tokenizer, "What is a violin?", **options))[0]
    for draft in (om.PromptLookup(ngram=1), draft_of(model.spec.family)):
        chunks = list(stream_generate(model, tokenizer, "What is a violin?", draft=draft, **options))
        assert outcome(chunks)[0] == expected
        assert chunks[-1].statistics.drafted_tokens > 0


# --- sampled ---

VOCAB = 3


class Markov:
    """A model whose next token depends on the last one: small enough to know its distribution exactly."""

    residency = remote = None
    is_followed = False
    spec = SimpleNamespace(vocab_size=VOCAB, only_layers=False, layers=[SimpleNamespace(num_heads=1, num_kv_heads=1)])

    def __init__(self, seed):
        self.table = mx.array(np.random.default_rng(seed).normal(0, 1.2, (VOCAB, VOCAB)), mx.float32)

    def own(self, tokens, cache, throttle=None):
        cache[0].offset += 1 if tokens.ndim == 1 else tokens.shape[1]
        return self.table[tokens]


class Counter:
    offset = 1

    def rewind(self, count):
        self.offset -= count


class MarkovGuesser:
    """As a draft model guesses: drawn from its own distribution, after the same penalties and filters."""

    def __init__(self, model):
        self.model = model

    def guess(self, tokens, count, sampler, guide):
        token, guesses, probs = mx.array(tokens[-1], mx.uint32), [], []
        for _ in range(count):
            logits = sampler.processed(self.model.table[token])
            probs.append(mx.softmax(logits))
            token = mx.random.categorical(logits, key=sampler.next_key())
            sampler.count(token)
            guesses.append(token)
        return Draft(mx.stack(guesses), probs)


class Constant:
    """As a lookup guesses: certain of what it says."""

    def guess(self, tokens, count, sampler, guide):
        return Draft(mx.array([2, 1, 2][:count], mx.uint32))


def exact_distribution(model, params, length):
    """The probability of each answer of `length` tokens after token 0, by the sampler's own arithmetic."""
    probabilities = {}
    for answer in itertools.product(range(VOCAB), repeat=length):
        sampler, probability, last = Sampler(params, VOCAB, VOCAB, [0]), 1.0, 0
        for token in answer:
            probability *= mx.softmax(sampler.processed(model.table[last]))[token].item()
            sampler.count(token)
            last = token
        probabilities[answer] = probability
    return probabilities


@pytest.mark.slow
@pytest.mark.parametrize("guesser", ["model", "certain"])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 2, "presence_penalty": 0.7, "repetition_penalty": 1.4, "logit_bias": {2: 0.8}},
    ],
    ids=["plain", "penalties and filters"],
)
def test_sampled_answers_have_the_model_s_distribution(guesser, params):
    """Chi-square over all answers of four tokens, of which three come through one round of guesses."""
    model = Markov(0)
    guess = MarkovGuesser(Markov(1)) if guesser == "model" else Constant()
    params, trials = SamplingParams(**params, seed=11), 900
    probabilities = exact_distribution(model, params, 4)
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
    seen = dict.fromkeys(probabilities, 0)
    accepted = drafted = 0
    sampler = Sampler(params, VOCAB, VOCAB, [0])
    for _ in range(trials):
        sampler.state = (sampler.state[0], None if sampler.state[1] is None else mx.zeros(VOCAB))
        cache = [Counter()]
        source = Speculative(model, PlainStep(model, cache), sampler, [0], guess, 3, gain=Always(3))
        answer = tuple(choice.item() for choice in source.choices(model.table[0], 4))
        seen[answer] += 1
        accepted, drafted = accepted + source.gain.counts.accepted, drafted + source.gain.counts.drafted
    assert 0.1 < accepted / drafted < 0.95
    assert chi_square_z(probabilities, seen, trials) < 3.5
    # The test would see it if guesses were taken more readily than they may be.
    wrong = exact_distribution(Markov(1), params, 4)
    mixed = {answer: 0.9 * probabilities[answer] + 0.1 * wrong[answer] for answer in seen}
    assert chi_square_z(mixed, seen, trials) > chi_square_z(probabilities, seen, trials)


def chi_square_z(probabilities, seen, trials):
    """How many standard deviations the statistic lies above its mean; rare answers are taken together."""
    assert all(probabilities[answer] > 0 for answer, count in seen.items() if count)
    often = [answer for answer, p in probabilities.items() if p * trials >= 5]
    rest = 1 - sum(probabilities[answer] for answer in often)
    cells = [(probabilities[answer] * trials, seen[answer]) for answer in often]
    if rest * trials >= 5:
        cells.append((rest * trials, trials - sum(count for _, count in cells)))
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    degrees = len(cells) - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


def test_sampling_with_the_same_model_as_draft_takes_every_guess():
    model = Markov(3)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5), VOCAB, VOCAB, [0])
    source = Speculative(model, PlainStep(model, [Counter()]), sampler, [0], MarkovGuesser(model), 3, gain=Always(3))
    assert len(list(source.choices(model.table[0], 101))) == 101
    assert source.gain.counts.accepted == source.gain.counts.drafted == 75


@pytest.mark.usefixtures("always")
def test_sampled_requests_are_repeatable_with_a_seed(models):
    prompt = prompt_of(20)
    sampling = SamplingParams(temperature=0.9, top_p=0.9, seed=3)
    drafts = (om.PromptLookup(ngram=1), om.DraftModel(random_model(vocab_size=512, context_length=256)))
    for draft in drafts:
        runs = [
            [
                c.token
                for c in stream_generate(models["gpt_oss"], None, prompt, sampling=sampling, max_tokens=30, draft=draft)
            ]
            for _ in range(2)
        ]
        assert runs[0] == runs[1]


# --- when it pays ---


def simulated(plain_seconds, round_seconds, tokens_a_round, num_tokens, noise=0.0, history=None):
    """Seconds with the gain's decisions, over those of plain steps alone, and the share of tokens that came by rounds."""
    gain, random = Gain(8, history), np.random.default_rng(0)
    made, seconds, by_rounds = 0, 0.0, 0
    while made < num_tokens:
        pause = gain.pause()
        if pause:
            for _ in range(min(pause, num_tokens - made)):
                took = plain_seconds * (1 + noise * random.random())
                gain.plain_token(took)
                seconds, made = seconds + took, made + 1
            continue
        took = round_seconds * (1 + noise * random.random())
        gain.round(took, tokens_a_round)
        seconds, made, by_rounds = seconds + took, made + tokens_a_round, by_rounds + tokens_a_round
    assert gain.counts.tokens == made
    return seconds / (made * plain_seconds * (1 + noise / 2)), by_rounds / made, gain


def test_guessing_stops_while_it_loses_and_goes_on_while_it_gains():
    for factor in (1.05, 1.3, 2.0, 4.0, 8.0):  # each round gives one token and takes so many steps' time
        slower, _, _ = simulated(0.01, 0.01 * factor, 1, 3000, noise=0.1)
        assert slower < 1 / 0.97, factor
    faster, share, gain = simulated(0.01, 0.012, 3, 3000, noise=0.1)
    assert share > 0.9
    assert faster < 0.46
    assert gain.counts.speedup == pytest.approx(1 / faster, rel=0.05)


def test_a_trial_that_lost_is_remembered_by_the_next_requests():
    """Short answers: only the first of them pays for the trial, and after a while it is tried again."""
    history = DraftHistory()
    shares = [simulated(0.01, 0.05, 1, 100, history=history) for _ in range(60)]
    assert [by_rounds > 0 for _, by_rounds, _ in shares[:6]] == [True] + [False] * 5
    assert 2 <= sum(by_rounds > 0 for _, by_rounds, _ in shares) <= 20
    assert np.mean([slower for slower, _, _ in shares]) < 1 / 0.97


def test_a_hopeless_trial_is_short():
    gain = Gain(8)
    for _ in range(8):
        gain.plain_token(0.01)
    gain.pause()
    assert gain.num_drafts == 2
    rounds = 0
    while not (pause := gain.pause()):
        gain.round(0.04, 1)
        rounds += 1
    assert rounds == 2  # one to warm up, one to see
    assert pause > 200
    for _ in range(pause):
        gain.plain_token(0.01)
    assert gain.pause() == 0  # then it is tried again
    for _ in range(20):
        gain.round(0.01, 3)
        assert gain.pause() == 0


@pytest.mark.parametrize(
    ("costs", "best"), [({2: 12, 4: 14, 8: 18}, 8), ({2: 12, 4: 15, 8: 40}, 4), ({2: 12, 4: 40}, 2)]
)
def test_as_many_are_guessed_as_pays(costs, best):
    """Rounds of 2, 4 and 8 guesses, all of which hold, and what they take."""
    gain = Gain(8)
    for _ in range(8):
        gain.plain_token(0.01)
    gain.pause()
    used = []
    for _ in range(40):
        used.append(gain.num_drafts)
        gain.round(0.001 * costs[gain.num_drafts], gain.num_drafts + 1)
        assert gain.pause() == 0
    assert used[-1] == best
    assert used[:5] == [2] * 5
    assert used[-20:] == [best] * 20


def test_a_reader_s_break_does_not_count():
    gain = Gain(8)
    for _ in range(8):
        gain.plain_token(0.01)
    gain.pause()
    for i in range(40):
        gain.round(30.0 if i == 20 else 0.015, 3)
        assert gain.pause() == 0


def test_the_loop_makes_plain_steps_in_a_pause(models):
    model, prompt = models["openelm"], prompt_of(10)
    answer = plain(model, prompt, 40)

    class Alternating(Gain):
        turns = itertools.cycle([5, 0, 0, 1])

        def pause(self):
            return next(self.turns)

    tokens, counts = guessed(model, prompt, answer, PATTERNS["now and then"], Alternating(K))
    assert tokens == answer
    assert 2 < counts.rounds < 12


# --- what is refused ---


def test_models_that_share_no_tokenizer_are_refused(models, demo):
    with pytest.raises(SettingError, match=r"has 600 tokens and the model 512: a draft model must share"):
        stream_generate(models["gpt_oss"], None, [1, 2], draft=om.DraftModel(models["openelm"]))
    with pytest.raises(SettingError, match="is the model itself"):
        stream_generate(models["gpt_oss"], None, [1, 2], draft=om.DraftModel(models["gpt_oss"]))
    with pytest.raises(SettingError, match=r"draft is a str: give om\.PromptLookup"):
        stream_generate(models["gpt_oss"], None, [1, 2], draft="ngram")
    for bad in (0, 65, 1.5, True):
        with pytest.raises(SettingError, match="num_draft_tokens"):
            om.PromptLookup(num_draft_tokens=bad)
        with pytest.raises(SettingError, match="num_draft_tokens"):
            om.DraftModel(models["openelm"], num_draft_tokens=bad)
    model, tokenizer = demo
    twin, same = om.load("demo-openelm" if model.spec.family == "openelm" else "demo-gpt-oss")
    om.DraftModel(twin, same).check(model, tokenizer)

    class Other(type(same)):
        def token_bytes(self, token):
            return b"other" if token == 300 else super().token_bytes(token)

    same.__class__ = Other
    with pytest.raises(SettingError, match=r"another tokenizer than the model \(token 300 differs\)"):
        om.DraftModel(twin, same).check(model, tokenizer)
