"""Stop strings in pieces against a search of the whole text."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openelm_mlx.errors import SettingError
from openelm_mlx.text.stops import StopStrings


def search_whole_text(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is shown, and whether it stopped: the obvious form, one character after the other."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


def may_become_a_stop(held: str, stops: list[str]) -> bool:
    return any(stop.startswith(held) and stop != held for stop in stops)


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab🙂", max_size=4), max_size=12),
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=5), max_size=4),
)
@example(pieces=["aab", "aabab"], stops=["aabab"])  # the beginning of a stop inside its own failed match
@example(pieces=["aa", "b"], stops=["aab"])  # the longest beginning is held, not the shortest
@example(pieces=["abc"], stops=["abc", "b"])  # the shorter one is completed first
@example(pieces=["xab"], stops=["b", "ab"])  # both by one character
def test_pieces_give_what_a_search_of_the_whole_text_gives(pieces, stops):
    watcher = StopStrings(stops)
    shown, seen, stopped = "", "", False
    for piece in pieces:
        seen += piece
        text, stopped = watcher.feed(piece)
        shown += text
        expected = search_whole_text(seen, stops)
        assert stopped == expected[1]
        assert expected[0].startswith(shown)
        if stopped:
            break
        held = expected[0][len(shown) :]
        assert not held or may_become_a_stop(held, stops)  # nothing is held back without need
    shown += watcher.finish()
    assert (shown, stopped) == search_whole_text(seen, stops)


def test_the_example_in_the_docstring():
    watcher = StopStrings(["</end>"])
    assert [watcher.feed(piece) for piece in ("a <", "b </e", "nd> c")] == [("a ", False), ("<b ", False), ("", True)]


def test_nothing_follows_a_stop():
    watcher = StopStrings(["stop"])
    assert watcher.feed("go, stop, go") == ("go, ", True)
    assert watcher.feed("more") == ("", True)
    assert watcher.finish() == ""


def test_without_stops_everything_passes_at_once():
    watcher = StopStrings([])
    assert watcher.feed("anything <") == ("anything <", False)
    assert watcher.finish() == ""


def test_one_string_is_one_stop():
    assert StopStrings("end").feed("an end") == ("an ", True)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "", [None], [b"a"]])
def test_stops_that_are_none_are_refused(stops):
    with pytest.raises(SettingError, match="stop string"):
        StopStrings(stops)
