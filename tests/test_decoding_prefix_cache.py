"""Reused prompts against cold runs: at every cut around the window, for both families, in memory and from disk."""

import itertools
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, random_model
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.decoding import prefix_cache as module
from openelm_mlx.decoding.prefix_cache import Entry, PrefixCache, checkpoint_of, shared
from openelm_mlx.decoding.prefix_file import fingerprint
from openelm_mlx.engine.prompt import encode_prompt, message_borders
from openelm_mlx.errors import CheckpointError, DestinationError, MemoryLimitError, SettingError
from openelm_mlx.generate import stream_generate

WINDOW = 16  # of the gpt-oss fixture's sliding layers
LENGTH = 53
KINDS = ["openelm", "openelm-window", "openelm-8bit", "gpt_oss", "gpt_oss-8bit", "gpt_oss-window"]


@pytest.fixture(scope="module")
def models():
    return {
        "openelm": random_model(context_length=256),
        "openelm-8bit": random_model(context_length=256, head_dim=32),
        "gpt_oss": load_fixture(FIXTURES / "gpt_oss_tiny"),
    }


@pytest.fixture(scope="module")
def gpt_oss(models):
    return models["gpt_oss"]


def case(models, kind: str):
    """A model and the options that its caches are made with."""
    family, _, setting = kind.partition("-")
    options = {"": {}, "window": {"sliding_window": WINDOW}, "8bit": {"kv_bits": 8}}[setting]
    return models[kind if kind in models else family], options


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, length).tolist()


def run(model, prompt, cache=None, max_tokens=6, **options):
    chunks = list(
        stream_generate(
            model, None, prompt, max_tokens=max_tokens, logprobs=0, prefill_chunk=8, prefix_cache=cache, **options
        )
    )
    return [chunk.token for chunk in chunks], [chunk.logprob for chunk in chunks], chunks[-1].statistics


def assert_as_cold(model, prompt, cache, max_tokens=6, cold_run=None, **options):
    """The same tokens and log-probabilities as without a prefix cache; returns the warm run's statistics.

    cold_run: what `run` gave without a cache, where it is known.
    """
    tokens, logprobs, statistics = run(model, prompt, cache, max_tokens, **options)
    cold_tokens, cold_logprobs, cold = cold_run or run(model, prompt, None, max_tokens, **options)
    assert tokens == cold_tokens
    assert np.allclose(logprobs, cold_logprobs, atol=1e-4)
    assert cold.cached_tokens == 0
    return statistics


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_equals_a_cold_run(models, kind):
    model, options = case(models, kind)
    first = prompt_of(LENGTH)
    cold_first = run(model, first, None, **options)
    for cut in (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, LENGTH - 1):
        cache = PrefixCache()
        run(model, first, cache, **options)
        other = [*first[:cut], *prompt_of(9, seed=cut)]
        other[cut] = (first[cut] + 1) % 500 if cut < LENGTH else other[cut]
        statistics = assert_as_cold(model, other, cache, **options)
        # Chunks of 8 tokens are the borders at which rings are taken up; one that has lost nothing yet is cut anywhere.
        has_rings = kind.startswith("gpt_oss") or kind.endswith("window")
        is_border = cut <= WINDOW or cut == LENGTH - 1
        assert statistics.cached_tokens == (cut if is_border or not has_rings else cut // 8 * 8)
        assert len(cache) == (1 if cut == LENGTH - 1 else 2)
        assert_as_cold(model, first, cache, cold_run=cold_first, **options)  # and the first one is as it was


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_again_feeds_its_last_token_only(models, kind):
    model, options = case(models, kind)
    for length in (1, 2, WINDOW, WINDOW + 1, LENGTH):
        cache, prompt = PrefixCache(), prompt_of(length)
        cold_run = run(model, prompt, None, **options)
        for _ in range(2 if length > 1 else 3):
            statistics = assert_as_cold(model, prompt, cache, cold_run=cold_run, **options)
        assert statistics.cached_tokens == length - 1
        assert (statistics.prompt_tokens, len(cache)) == (length, 1 if length > 1 else 3)


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_that_grows_pays_for_what_is_new(models, kind):
    model, options = case(models, kind)
    cache, chat = PrefixCache(), prompt_of(30)
    for turn in range(4):
        tokens, _, statistics = run(model, chat, cache, **options)
        assert statistics.cached_tokens == (
            0 if turn == 0 else len(chat) - 6
        )  # the last answer's last token was not fed
        chat = [*chat, *tokens, *prompt_of(5, seed=turn)]
    assert len(cache) == 1
    assert_as_cold(model, chat, cache, **options)


def test_a_system_prompt_is_computed_once_for_all_conversations(gpt_oss):
    """Two requests part somewhere in a chunk; from the third on that place is a checkpoint."""
    cache, system = PrefixCache(), prompt_of(43)
    cached = [assert_as_cold(gpt_oss, [*system, 400 + i, *prompt_of(7, seed=i)], cache).cached_tokens for i in range(4)]
    assert cached == [0, 40, 43, 43]
    assert len(cache) == 4


def test_an_edited_middle_is_reused_up_to_the_edit(gpt_oss):
    cache, prompt = PrefixCache(), prompt_of(LENGTH)
    run(gpt_oss, prompt, cache)
    edited = [*prompt[:33], 499, *prompt[34:]]
    assert assert_as_cold(gpt_oss, edited, cache).cached_tokens == 32
    assert assert_as_cold(gpt_oss, prompt, cache).cached_tokens == LENGTH - 1


def test_conversations_that_run_at_the_same_time_do_not_meet(gpt_oss):
    """Each of two streams has its own cache, whichever of them began first and whoever gets the kept one."""
    cache, prompt = PrefixCache(), prompt_of(40)
    expected = run(gpt_oss, prompt)[0]
    run(gpt_oss, prompt, cache)
    other = [*prompt[:36], 17, 18, 19]
    streams = [
        stream_generate(gpt_oss, None, each, max_tokens=6, prefix_cache=cache) for each in (prompt, other, prompt)
    ]
    rounds = [[chunk.token for chunk in each] for each in itertools.zip_longest(*streams)]
    answers = [list(each) for each in zip(*rounds, strict=True)]
    assert answers == [expected, run(gpt_oss, other)[0], expected]


def test_a_stream_that_is_closed_early_is_kept_and_one_that_fails_is_not(gpt_oss):
    cache, prompt = PrefixCache(), prompt_of(40)
    stream = stream_generate(gpt_oss, None, prompt, max_tokens=20, prefix_cache=cache)
    begun = [next(stream).token for _ in range(3)]
    stream.close()
    assert len(cache) == 1
    assert assert_as_cold(gpt_oss, [*prompt, *begun, 5], cache).cached_tokens == 43
    failing = stream_generate(gpt_oss, None, [*prompt, *begun, 5], max_tokens=20, prefix_cache=cache)
    next(failing)
    with pytest.raises(ValueError, match="mine"):
        failing.throw(ValueError("mine"))
    assert len(cache) == 0
    assert_as_cold(gpt_oss, prompt, cache)


@pytest.mark.parametrize("kind", ["openelm", "gpt_oss"])
def test_ctrl_c_keeps_the_prompt(models, kind):
    model, prompt, cache = models[kind], prompt_of(40), PrefixCache()
    stream = stream_generate(model, None, prompt, max_tokens=40, prefix_cache=cache)
    for _ in range(25):
        next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert assert_as_cold(model, [*prompt, 7, 8], cache).cached_tokens == 39


def test_what_is_kept_stays_within_bytes_and_buffers(gpt_oss):
    one = PrefixCache()
    run(gpt_oss, prompt_of(40), one)
    cache = PrefixCache(max_bytes=int(3.5 * one.nbytes))
    for seed in range(5):
        run(gpt_oss, prompt_of(40, seed), cache)
        assert cache.nbytes <= cache.max_bytes
    assert len(cache) == 3
    run(gpt_oss, prompt_of(40, 2), cache)  # used again, so the third is the oldest now
    run(gpt_oss, prompt_of(40, 5), cache)
    assert [run(gpt_oss, prompt_of(40, seed), cache)[2].cached_tokens for seed in (2, 3)] == [39, 0]
    few = PrefixCache(max_buffers=one.num_buffers + 3)
    for seed in range(3):
        run(gpt_oss, prompt_of(40, seed), few)
        assert few.num_buffers <= few.max_buffers
    assert len(few) == 1
    nothing = PrefixCache(max_bytes=0)
    assert [run(gpt_oss, prompt_of(40), nothing)[2].cached_tokens for _ in range(2)] == [0, 0]
    assert (len(nothing), nothing.nbytes) == (0, 0)


def test_a_long_cache_is_given_over_where_two_have_no_room(gpt_oss):
    one = PrefixCache()
    run(gpt_oss, prompt_of(40), one)
    cache = PrefixCache(max_bytes=int(1.5 * one.nbytes))
    run(gpt_oss, prompt_of(40), cache)
    assert assert_as_cold(gpt_oss, [*prompt_of(40)[:25], *prompt_of(9, 1)], cache).cached_tokens == 24
    assert len(cache) == 1


def test_checkpoints_of_a_long_prompt_are_bounded_and_spread(gpt_oss):
    cache = PrefixCache()
    run(gpt_oss, prompt_of(400), cache)
    (entry,) = cache._entries
    offsets = [each.offset for each in entry.checkpoints]
    assert len(offsets) <= module.MAX_CHECKPOINTS + 1
    assert offsets == sorted(offsets)
    assert offsets[-2:] == [399, 405]
    assert max(np.diff([0, *offsets])) <= 64
    for cut in (100, 250):
        assert_as_cold(gpt_oss, [*prompt_of(400)[:cut], 7, 8, 9], cache)


def test_memory_is_made_where_a_new_request_has_none(gpt_oss, monkeypatch):
    cache = PrefixCache()
    for seed in range(3):
        run(gpt_oss, prompt_of(40, seed), cache)
    seen = []

    def check(*_):
        seen.append(len(cache))
        if len(cache) > 1:
            raise MemoryLimitError("too much")

    monkeypatch.setattr("openelm_mlx.engine.request.check_room", check)
    run(gpt_oss, prompt_of(10, 9), cache)
    assert seen == [3, 2, 1]
    monkeypatch.setattr(
        "openelm_mlx.engine.request.check_room", lambda *_: (_ for _ in ()).throw(MemoryLimitError("ever"))
    )
    with pytest.raises(MemoryLimitError, match="ever"):
        run(gpt_oss, prompt_of(10, 9), cache)


def test_other_settings_and_other_models_share_nothing(models):
    cache, model, prompt = PrefixCache(), models["openelm-8bit"], prompt_of(40)
    run(model, prompt, cache)
    for options in ({"kv_bits": 8}, {"sliding_window": 16}, {"sliding_window": 20}):
        assert assert_as_cold(model, prompt, cache, **options).cached_tokens == 0
    assert assert_as_cold(model, prompt, cache, kv_bits=16).cached_tokens == 39
    with pytest.raises(SettingError, match="another model"):
        run(models["gpt_oss"], prompt, cache)
    for bad in (-1, True, 1.5, None):
        with pytest.raises(SettingError, match="max_bytes"):
            PrefixCache(max_bytes=bad)


def test_a_snapshot_is_not_changed_by_what_follows(gpt_oss):
    cache = gpt_oss.make_cache()
    tokens = mx.array([prompt_of(60)])
    gpt_oss(tokens[:, :30], cache=cache)
    here = checkpoint_of(cache)
    forks = [layer.fork(snapshot) for layer, snapshot in zip(cache, here.layers, strict=True)]
    expected = gpt_oss(tokens[:, :34], cache=None)[0, 30:]
    for step in range(30, 60):
        gpt_oss(tokens[:, step : step + 1], cache=cache)
    for again in (forks, cache):
        if again is cache:
            for layer, snapshot in zip(cache, here.layers, strict=True):
                layer.restore(snapshot)
        assert mx.allclose(gpt_oss(tokens[:, 30:34], cache=again)[0], expected, atol=1e-4)


# --- on disk ---


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_serves_after_a_restart(models, kind, tmp_path):
    model, options = case(models, kind)
    cache, prompts = PrefixCache(), [prompt_of(40), prompt_of(60, 1)]
    for prompt in prompts:
        run(model, prompt, cache, **options)
    file = tmp_path / "cache.safetensors"
    cache.save(file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    again = PrefixCache()
    again.load(file, model)
    assert len(again) == 2
    assert again.nbytes <= cache.nbytes
    for prompt in prompts:
        assert assert_as_cold(model, prompt, again, **options).cached_tokens == len(prompt) - 1
    cut = [*prompts[1][:21], 3, 4, 5]
    assert assert_as_cold(model, cut, again, **options).cached_tokens in (16, 21)


def test_bfloat16_and_an_empty_cache_are_saved_too(tmp_path):
    model = load_fixture(FIXTURES / "gpt_oss_tiny", mx.bfloat16)
    cache = PrefixCache()
    cache.save(tmp_path / "empty")
    cache.load(tmp_path / "empty", model)
    assert len(cache) == 0
    first = run(model, prompt_of(40), cache)
    cache.save(tmp_path / "file")
    again = PrefixCache()
    again.load(tmp_path / "file", model)
    assert again._entries[0].cache[0].keys.dtype == mx.bfloat16
    second = run(model, prompt_of(40), again)
    assert second[2].cached_tokens == 39
    assert second[0] == first[0]


def test_a_file_of_another_model_is_refused(models, tmp_path):
    cache = PrefixCache()
    run(models["openelm"], prompt_of(20), cache)
    cache.save(tmp_path / "file")
    for other in (random_model(context_length=256, seed=1), models["gpt_oss"], random_model(context_length=128)):
        with pytest.raises(CheckpointError, match="another model, other weights or another dtype"):
            PrefixCache().load(tmp_path / "file", other)
    half = random_model(context_length=256)
    assert fingerprint(half) == fingerprint(models["openelm"])
    half.set_dtype(mx.float16)
    assert fingerprint(half) != fingerprint(models["openelm"])


def test_a_damaged_file_is_one_sentence(models, tmp_path):
    model, cache, file = models["openelm"], PrefixCache(), tmp_path / "file"
    run(model, prompt_of(20), cache)
    cache.save(file)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    contents = json.loads(header["__metadata__"]["contents"])
    contents["entries"][0]["tokens"][3] += 1
    header["__metadata__"]["contents"] = json.dumps(contents)
    edited = json.dumps(header).encode()
    damages = {
        "empty": b"", "no header": b"\x00" * 50, "text": b"hello, world, this is a text", "cut": whole[:-10],
        "cut in the header": whole[: length // 2], "one bit": whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:],
        "another token": len(edited).to_bytes(8, "little") + edited + whole[8 + length :],
    }  # fmt: skip
    for name, data in damages.items():
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"damaged \(.*delete it, and it will be made again") as error:
            PrefixCache().load(file, model)
        assert str(error.value).count("\n") == 0, name
    header["__metadata__"]["version"] = "99"
    edited = json.dumps(header).encode()
    file.write_bytes(len(edited).to_bytes(8, "little") + edited + whole[8 + length :])
    with pytest.raises(CheckpointError, match="version 99"):
        PrefixCache().load(file, model)
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"a": mx.zeros(3)}, {"format": "mlx"})
    with pytest.raises(CheckpointError, match="not a prompt cache"):
        PrefixCache().load(tmp_path / "weights.safetensors", model)
    with pytest.raises(CheckpointError, match="cannot be read"):
        PrefixCache().load(tmp_path / "missing", model)


def test_a_save_that_fails_leaves_the_old_file(models, tmp_path, monkeypatch):
    cache, file = PrefixCache(), tmp_path / "file"
    run(models["openelm"], prompt_of(20), cache)
    cache.save(file)
    before = file.read_bytes()
    run(models["openelm"], prompt_of(30, 1), cache)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DestinationError, match="the disk is full"):
        cache.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_shared_prefixes():
    for first, second, expected in (([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([4], [4], 1)):
        assert shared(np.array(first), np.array(second)) == expected


# --- chats with gpt-oss ---


@pytest.fixture(scope="module")
def demo():
    return om.load("demo-gpt-oss", dtype="float32")


@pytest.fixture(scope="module")
def short():
    return om.load(short_demo("demo-gpt-oss"), dtype="float32")


@pytest.mark.slow
def test_the_second_turn_of_a_long_chat_prefills_what_is_new_only(demo):
    """Finished turns lose their reasoning, so the last answer's own words are computed again, and nothing before them."""
    model, tokenizer = demo
    cache, words = PrefixCache(), " ".join(f"word {i}" for i in range(40))
    chat = [{"role": "system", "content": f"Use these: {words}"}, {"role": "user", "content": "What is a violin?"}]
    for turn, question in enumerate(("What is a cello?", "And what is a sparrow?", None)):
        chunks = list(stream_generate(model, tokenizer, chat, max_tokens=120, prefix_cache=cache))
        statistics = chunks[-1].statistics
        num_new = statistics.prompt_tokens - statistics.cached_tokens
        if turn:
            answer, asked = chat[-2]["content"], chat[-1]["content"]
            least = len(tokenizer.encode(answer)) + len(tokenizer.encode(asked))
            assert (
                least < num_new <= least + 16
            )  # the markup of the two messages, and the last token of the prompt before
            assert statistics.prompt_tokens > 160
        answer = "".join(chunk.text for chunk in chunks)
        assert answer
        if question is None:
            assert answer == om.generate(model, tokenizer, chat, max_tokens=120)
        chat = [*chat, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]


def test_another_question_after_the_same_system_prompt(short):
    model, tokenizer = short
    cache, words = PrefixCache(), " ".join(f"word {i}" for i in range(40))
    counts = []
    for question in ("What is a violin?", "Do you know a sparrow?", "Tell me what a poodle is."):
        chat = [{"role": "system", "content": words}, {"role": "user", "content": question}]
        (*_, last) = stream_generate(model, tokenizer, chat, max_tokens=4, prefix_cache=cache)
        counts.append(last.statistics.prompt_tokens - last.statistics.cached_tokens)
    assert counts[0] > 120
    assert max(counts[1:]) < 20


def test_prompts_have_borders_after_the_system_message_and_before_the_last_one(short):
    """There other conversations, and other last questions, go apart from this one."""
    model, tokenizer = short
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is a violin?"},
        {"role": "assistant", "content": "A bowed instrument."},
        {"role": "user", "content": "And a cello?"},
    ]
    prompt = encode_prompt(model, tokenizer, chat)
    rests = [tokenizer.decode(prompt.tokens[border:]) for border in message_borders(tokenizer, prompt)]
    assert [rest.split("# Inst")[0].split("What")[0] for rest in rests[:2]] == ["developer", "user"]
    assert rests[2:] == ["userAnd a cello?assistant"]


def test_guesses_that_were_not_taken_are_not_kept(gpt_oss):
    """A round hands over its tokens one by one, and the caller may stop among them: the cache is further than he is."""
    cache, prompt = PrefixCache(), prompt_of(40)
    draft = om.DraftModel(load_fixture(FIXTURES / "gpt_oss_tiny"))  # the same weights: it guesses right
    options = {"max_tokens": 30, "prefix_cache": cache, "draft": draft}
    for num_taken in (10, 11, 12):  # the first nine are plain, to be compared with
        chunks = stream_generate(gpt_oss, None, prompt, **options)
        taken = [chunk.token for chunk in itertools.islice(chunks, num_taken)]
        chunks.close()
        (entry,) = cache._entries
        assert entry.cache[0].offset == len(entry.tokens)
        assert entry.tokens.tolist() == [*prompt, *taken][: len(entry.tokens)]
        cache.clear()


def test_an_entry_counts_every_array_once(gpt_oss):
    cache = gpt_oss.make_cache()
    gpt_oss(mx.array([prompt_of(20)]), cache=cache)
    before = checkpoint_of(cache)
    gpt_oss(mx.array([[5]]), cache=cache)
    entry = Entry(np.arange(21), 20, (None, 16, 0), cache, (before, checkpoint_of(cache)))
    rings = cache[::2]
    assert entry.nbytes == sum(layer.nbytes for layer in cache) + sum(ring.nbytes for ring in rings)
