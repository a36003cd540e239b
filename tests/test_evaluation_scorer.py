"""Log-likelihoods: each request is what it would be alone, in any order and any size of a pass."""

import itertools
import random
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, random_model
from short_demos import short_demo

from openelm_mlx.checkpoint.adapter_files import write_adapter
from openelm_mlx.conversion import convert
from openelm_mlx.errors import CheckpointError, MemoryLimitError
from openelm_mlx.evaluation import scorer as scorer_module
from openelm_mlx.evaluation.prefixes import Branch, Extend, Prefixes
from openelm_mlx.evaluation.requests import Score, TokenRequest
from openelm_mlx.evaluation.scorer import Scorer
from openelm_mlx.loading import load
from openelm_mlx.models import cores, trees
from openelm_mlx.models.adapter_targets import targets_of
from openelm_mlx.models.low_rank import Adapter, Pair
from openelm_mlx.models.trees import NO_PARENT, Forest, lay_out
from openelm_mlx.runtime import runtime_of


def alone(model, request: TokenRequest) -> Score:
    """One whole row, all of its logits: the slow truth."""
    logits = model(mx.array(list(request.inputs))[None])[0, :, : model.spec.usable_vocab_size].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[-len(request.continuation) :]
    tokens = list(request.continuation)
    likeliest = logprobs.argmax(axis=-1).tolist()
    return Score(float(logprobs[np.arange(len(tokens)), tokens].sum()), likeliest == tokens)


def questions(vocab_size: int, count: int, longest: int, seed: int = 0) -> list[TokenRequest]:
    """Questions of four choices; some share a long beginning, some choices begin alike or are one token."""
    drawn = random.Random(seed)
    beginning = [drawn.randrange(3, vocab_size) for _ in range(longest // 3)]
    found = []
    for _ in range(count):
        own = [drawn.randrange(3, vocab_size) for _ in range(drawn.randrange(1, longest // 2))]
        context = [1, *beginning[: drawn.choice([0, 3, len(beginning)])], *own]
        first = drawn.randrange(3, vocab_size)
        for _ in range(4):
            choice = [drawn.randrange(3, vocab_size) for _ in range(drawn.randrange(1, 7))]
            found.append(TokenRequest.of(context, [first, *choice] if drawn.random() < 0.5 else choice))
    return found


def difference(ours: list[Score], theirs: list[Score]) -> float:
    assert [each.is_greedy for each in ours] == [each.is_greedy for each in theirs]
    return max(abs(a.logprob - b.logprob) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def openelm():
    return random_model()


@pytest.fixture(scope="module")
def gpt_oss():
    return load_fixture(FIXTURES / "gpt_oss_tiny")


@pytest.mark.parametrize("at_once", [1, 40, 4096])
def test_openelm_scores_each_request_as_if_alone(openelm, at_once):
    requests = questions(600, 8 if at_once > 1 else 2, 60)  # a token a pass takes a pass for each
    assert difference(Scorer(openelm, at_once).score(requests), [alone(openelm, each) for each in requests]) < 5e-5


@pytest.mark.parametrize("at_once", [5, 64, 4096])
def test_gpt_oss_scores_each_request_as_if_alone(gpt_oss, at_once):
    """The window of its sliding layers is shorter than the texts."""
    window = min(layer.window for layer in gpt_oss.spec.layers if layer.window)
    requests = questions(gpt_oss.spec.usable_vocab_size, 8 if at_once > 5 else 3, 5 * window)
    assert max(len(each.inputs) for each in requests) > 2 * window
    assert difference(Scorer(gpt_oss, at_once).score(requests), [alone(gpt_oss, each) for each in requests]) < 1e-4


@pytest.mark.parametrize("family", ["openelm", "gpt_oss"])
def test_a_gpu_with_a_program_for_every_shape_attends_by_products(family, request, monkeypatch):
    """As prompts in an engine do there: each pass has shapes of its own."""
    model = request.getfixturevalue(family)
    calls = []
    by_products = trees.attend_by_products
    monkeypatch.setattr(trees, "attend_by_products", lambda *given: calls.append(given) or by_products(*given))
    requests = questions(model.spec.usable_vocab_size, 4, 40)
    truth = Scorer(model, 40).score(requests)
    assert not calls
    monkeypatch.setattr(model, "choices", replace(model.choices, prompt_products_to=2**25))
    assert difference(Scorer(model, 40).score(requests), truth) < 5e-5
    assert any(given[0].shape[2] < given[1].shape[2] for given in calls)  # some of them over a trunk
    calls.clear()
    monkeypatch.setattr(model, "choices", replace(model.choices, prompt_products_to=100))
    assert Scorer(model, 40).score(requests) == truth
    assert not calls


@pytest.mark.parametrize("family", ["openelm", "gpt_oss"])
def test_passes_on_all_cores_change_no_bit_and_leave_the_model_as_it_was(family, request, monkeypatch):
    model = request.getfixturevalue(family)
    requests = questions(model.spec.usable_vocab_size, 4, 40)
    modules, updates = dict(model.named_modules()), model.num_updates
    kinds = [type(module) for module in modules.values()]
    found = []
    for count in (1, 3):
        monkeypatch.setattr(cores, "num_cores", lambda count=count: count)
        monkeypatch.setattr(cores, "_of_thread", threading.local())
        found.append(Scorer(model, 100).score(requests))
    assert found[0] == found[1]
    monkeypatch.setattr(scorer_module, "target_logprobs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Scorer(model).score(requests)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[path] is module for path, module in modules.items())
    assert [type(module) for module in after.values()] == kinds
    assert model.num_updates == updates


def test_the_order_of_requests_does_not_matter_and_equal_ones_are_computed_once(openelm):
    requests = questions(600, 6, 40)
    scorer, twice = Scorer(openelm, 32), Scorer(openelm, 32)
    scores = scorer.score(requests)
    mixed = list(range(len(requests)))
    random.Random(1).shuffle(mixed)
    assert twice.score([requests[i] for i in mixed] * 2) == [scores[i] for i in mixed] * 2
    assert twice.num_tokens == scorer.num_tokens


def test_what_texts_share_is_computed_once(openelm):
    beginning = [1, *range(100, 130)]
    requests = [TokenRequest.of([*beginning, first], [7, 8]) for first in range(200, 240)]
    scorer = Scorer(openelm, 16)
    scores = scorer.score(requests)
    assert scorer.num_tokens == len(beginning) + 2 * len(requests)
    assert difference(scores, [alone(openelm, each) for each in requests]) < 5e-5


def test_choices_of_one_token_need_the_context_alone(openelm):
    context = [1, 50, 60, 70]
    scorer = Scorer(openelm)
    scores = scorer.score([TokenRequest.of(context, [letter]) for letter in (10, 11, 12, 13)])
    assert scorer.num_tokens == len(context)
    assert scorer.num_passes == 1
    assert scores[2].logprob == pytest.approx(alone(openelm, TokenRequest.of(context, [12])).logprob, abs=5e-5)


def test_the_likeliest_continuation_is_greedy(openelm):
    tokens = [1, 30]
    for _ in range(5):
        tokens.append(int(mx.argmax(openelm(mx.array([tokens]))[0, -1]).item()))
    found, other = Scorer(openelm).score([TokenRequest.of(tokens[:2], tokens[2:]), TokenRequest.of([1, 30], [5, 6])])
    assert found.is_greedy
    assert not other.is_greedy


def test_a_text_longer_than_a_pass_is_read_chunk_by_chunk(openelm):
    """A rolling window: everything but its first token is scored, in the chunks of the trunk itself."""
    tokens = list(range(1, 61))
    scorer = Scorer(openelm, 8)
    [score] = scorer.score([TokenRequest.of(tokens[:1], tokens[1:])])
    assert scorer.num_tokens == len(tokens) - 1
    assert score.logprob == pytest.approx(alone(openelm, TokenRequest.of(tokens[:1], tokens[1:])).logprob, abs=1e-4)


def test_too_long_a_request_loses_its_beginning():
    long = TokenRequest.of(list(range(100)), [200, 201], context_length=64)
    assert long.inputs == (*range(37, 100), 200)
    assert long.continuation == (200, 201)
    only_choice = TokenRequest.of([1], list(range(70)), context_length=64)
    assert len(only_choice.inputs) == 64
    assert only_choice.continuation == tuple(range(6, 70))


@pytest.mark.parametrize("stop_after", [1, 3, 10])
def test_an_interrupted_run_goes_on_with_the_same_result(openelm, stop_after):
    requests = questions(600, 8, 60)
    uninterrupted = Scorer(openelm, 24)
    whole = uninterrupted.score(requests)
    known: dict[int, Score] = {}
    calls = itertools.count(1)

    def note(scores):
        known.update(scores)
        if next(calls) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Scorer(openelm, 24).score(requests, on_scores=note)
    assert 0 < len(known) < len(requests)
    again = Scorer(openelm, 24)
    assert again.score(requests, known) == whole
    assert again.num_tokens < uninterrupted.num_tokens


def test_everything_known_computes_nothing(openelm):
    requests = questions(600, 2, 20)
    known = dict(enumerate(Scorer(openelm).score(requests)))
    scorer = Scorer(openelm)
    assert scorer.score(requests, known) == list(known.values())
    assert scorer.num_passes == 0
    assert Scorer(openelm).score([]) == []


def test_logits_are_made_a_few_rows_at_a_time(openelm, monkeypatch):
    requests = questions(600, 4, 30)
    expected = Scorer(openelm).score(requests)
    sizes = []
    head = openelm.head
    monkeypatch.setattr(scorer_module, "LOGITS_BYTES", 4 * scorer_module.LOGITS_COPIES * 600 * 3)
    monkeypatch.setattr(type(openelm), "head", lambda self, h: sizes.append(h.shape[0]) or head(h))
    assert difference(Scorer(openelm).score(requests), expected) < 5e-5
    assert max(sizes) == 3


def test_packed_keys_are_scored_as_they_would_be_read():
    """With kv_bits=8 a result does not depend on what was in the cache and what beside it."""
    model = random_model(head_dim=32)
    requests = questions(600, 3, 60)
    exact = Scorer(model).score(requests)
    model.kv_bits = 8
    small, large = Scorer(model, 12).score(requests), Scorer(model, 4096).score(requests)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(small, large, strict=True)) < 2e-3
    assert max(abs(a.logprob - b.logprob) for a, b in zip(large, exact, strict=True)) > 0


def test_logits_that_are_no_numbers_are_an_error():
    model = random_model(seed=3)
    model.transformer.norm.weight = model.transformer.norm.weight * mx.nan
    with pytest.raises(CheckpointError, match="not finite"):
        Scorer(model).score([TokenRequest.of([1], [2])])


# --- experts on disk, quantized weights, the memory plan --------------------------------------------------------------


def test_experts_on_disk_score_as_in_memory(fixtures):
    folder = fixtures / "gpt_oss_tiny"
    whole, _ = load(folder, dtype="float32")
    few, _ = load(folder, dtype="float32", expert_slots=4)
    assert few.residency is not None
    requests = questions(whole.spec.usable_vocab_size, 3, 40)
    assert difference(Scorer(few, 48).score(requests), Scorer(whole, 48).score(requests)) < 1e-4


@pytest.mark.parametrize(("name", "bound"), [("openelm_tiny", 5e-5), ("gpt_oss_tiny", 1e-4)])
def test_an_adapter_scores_as_the_merged_weights(tmp_path, fixtures, name, bound):
    base, _ = load(fixtures / name, dtype="float32")
    drawn = np.random.default_rng(0)
    pairs = {
        place: Pair(*(mx.array(drawn.normal(size=shape).astype(np.float32)) for shape in target.shapes(2)), 0.02)
        for place, target in targets_of(base.spec).items()
        if target.group not in ("router", "embedding")
    }
    write_adapter(tmp_path / "adapter", Adapter(pairs), base.spec, "peft")
    convert(fixtures / name, tmp_path / "merged", dtype="float32", adapter=tmp_path / "adapter")
    beside, _ = load(fixtures / name, dtype="float32", adapter=tmp_path / "adapter")
    merged, _ = load(tmp_path / "merged", dtype="float32")
    requests = questions(base.spec.usable_vocab_size, 4, 40)
    scores = Scorer(beside, 32).score(requests)
    assert difference(scores, Scorer(merged, 32).score(requests)) < bound
    assert difference(scores, [alone(beside, each) for each in requests]) < bound
    changed = zip(scores, Scorer(base, 32).score(requests), strict=True)
    assert max(abs(a.logprob - b.logprob) for a, b in changed) > 100 * bound


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("source", ["demo-openelm", "demo-gpt-oss"])
def test_demos_with_packed_weights_keep_their_plan(source):
    model, tokenizer = load(short_demo(source), dense_bits=4)
    requests = questions(tokenizer.vocab_size, 2, 40)
    plan = model.plan
    scorer = Scorer(model)
    scores = scorer.score(requests)
    assert plan.weights_bytes < scorer.peak_memory_bytes <= plan.budget_bytes
    expected = [alone(model, each) for each in requests]
    assert max(abs(a.logprob - b.logprob) for a, b in zip(scores, expected, strict=True)) < 0.2


def test_a_pass_stays_within_what_was_planned_for_a_chunk():
    """A pass of branches takes no more than a prompt's chunk of as many tokens, its logits included."""
    model, _ = load("demo-openelm", dtype="float32")
    plan = model.plan
    requests = questions(4000, 20, 100)
    active = mx.get_active_memory()
    scorer = Scorer(model)
    scorer.score(requests[:40])
    assert active < scorer.peak_memory_bytes <= active + plan.scratch_bytes + plan.kv_cache_bytes


def test_memory_that_gets_short_makes_shorter_passes(openelm):
    requests = questions(600, 4, 60)
    expected = Scorer(openelm).score(requests)
    model = random_model()
    planned, _ = load("demo-openelm", memory_limit="2GB")
    plan = replace(planned.plan, prefill_chunk=1, scratch_bytes=10**6, budget_bytes=mx.get_active_memory() + 60 * 10**6)
    runtime_of(model).plan = plan
    scorer = Scorer(model, 512)
    assert difference(scorer.score(requests), expected) < 5e-5
    assert scorer.num_passes > 1
    runtime_of(model).plan = replace(plan, budget_bytes=1)
    with pytest.raises(MemoryLimitError):
        scorer.score(requests)


# --- decisions --------------------------------------------------------------------------------------------------------


def test_every_token_of_every_text_is_computed_once_at_its_place():
    drawn = random.Random(5)
    for _ in range(60):
        count = drawn.randrange(1, 30)
        letters = drawn.randrange(1, 4)
        texts = sorted({tuple(drawn.randrange(letters) for _ in range(drawn.randrange(1, 25))) for _ in range(count)})
        prefixes = Prefixes(texts)
        most = drawn.randrange(1, 40)
        covered = [set() for _ in texts]
        reached = {0}
        for step in prefixes.passes(most):
            assert step.trunk in reached
            stop = step.stop if isinstance(step, Extend) else None
            for i in range(step.first, step.last):
                assert texts[i][: step.trunk] == texts[step.first][: step.trunk]
                new = range(step.trunk, len(texts[i]) if stop is None else min(stop, len(texts[i])))
                assert not covered[i] & set(new)
                covered[i] |= set(new)
            if stop is not None:
                assert len({text[:stop] for text in texts[step.first : step.last]}) == 1
                reached = {each for each in reached if each <= step.trunk} | {stop}
            else:
                assert prefixes.size(step.first, step.last, step.trunk) <= most
        assert covered == [set(range(len(text))) for text in texts]


def test_a_trunk_is_worth_its_pass():
    few_alike = sorted((0, i, *range(10)) for i in range(20))
    steps = list(Prefixes(few_alike).passes(100))
    assert all(isinstance(step, Branch) for step in steps)
    much_alike = sorted((*range(50), i, 1) for i in range(100))
    assert isinstance(next(Prefixes(much_alike).passes(100)), Extend)


def test_a_layout_shows_each_token_its_ancestors_and_nothing_else():
    parents = np.array([NO_PARENT, 0, 1, 0, 3, NO_PARENT, 5, NO_PARENT])
    depths = np.array([0, 1, 2, 1, 2, 0, 1, 0])
    forest = Forest(np.arange(8), parents, depths)
    for num_before in (0, 100):
        layout = lay_out(forest, num_before)
        width = layout.sources.shape[1]
        for token in range(8):
            ancestors, at = {token}, token
            while (at := int(parents[at])) != NO_PARENT:
                ancestors.add(at)
            row, column = divmod(int(layout.places[token]), width)
            seen = {int(layout.sources[row, c]) for c in np.flatnonzero(layout.visible[row, column])}
            assert seen == ancestors
    assert lay_out(forest, 100).sources.shape == (1, 8)
    assert lay_out(forest, 0).sources.shape == (2, 5)
