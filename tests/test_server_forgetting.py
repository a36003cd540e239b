"""Leaving out the oldest turns of a chat that is longer than the context."""

from hypothesis import given
from hypothesis import strategies as st

from openelm_mlx.server.forgetting import most_prompt_tokens, shortened

RULES = {"role": "developer", "content": "Rules."}


def turn(number, *more):
    return [{"role": "user", "content": f"u{number}"}, *more, {"role": "assistant", "content": f"a{number}"}]


def kept(messages, most, sizes=len):
    return [message["content"] for message in shortened(messages, most, sizes)]


def test_whole_turns_go_and_instructions_stay():
    call = {"role": "assistant", "content": "c"}, {"role": "tool", "content": "t"}
    chat = [
        RULES,
        *turn(1, *call),
        {"role": "developer", "content": "Now."},
        *turn(2),
        {"role": "user", "content": "u3"},
    ]
    assert kept(chat, 99) == ["Rules.", "u1", "c", "t", "a1", "Now.", "u2", "a2", "u3"]
    assert kept(chat, 9) == ["Rules.", "u1", "c", "t", "a1", "Now.", "u2", "a2", "u3"]
    assert kept(chat, 8) == ["Rules.", "Now.", "u2", "a2", "u3"]
    assert kept(chat, 4) == ["Rules.", "Now.", "u3"]
    assert kept(chat, 1) == ["Rules.", "Now.", "u3"]  # the last turn stays, however long
    assert kept([RULES], 0) == ["Rules."]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 300))
def test_no_more_turns_go_than_have_to(sizes, most):
    chat = [{"role": "user", "content": size} for size in sizes]
    rest = kept(chat, most, lambda messages: sum(message["content"] for message in messages))
    assert rest == sizes[len(sizes) - len(rest) :]
    assert sum(rest) <= most or len(rest) == 1
    assert len(rest) == len(sizes) or sum(sizes[len(sizes) - len(rest) - 1 :]) > most


def test_an_answer_has_room():
    assert most_prompt_tokens(4096, 100) == 3996
    assert most_prompt_tokens(4096, None) == 3072
    assert most_prompt_tokens(4096, 4096) == 3072
    assert most_prompt_tokens(2, 5) == 1
