"""Nothing that others wrote moves a cursor, sets a title or a clipboard, or hides a line."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openelm_mlx.text.terminal import TerminalStream, to_json, visible, visible_line

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

HOSTILE = {
    "clipboard": ("\x1b]52;c;cm0gLXJm\x07", "␛]52;c;cm0gLXJm␇"),
    "title": ("\x1b]0;pwned\x1b\\", "␛]0;pwned␛\\"),
    "clear": ("a\x1b[2J\x1b[Hb", "a␛[2J␛[Hb"),
    "8-bit CSI": ("\x9b2J", "\\x9b2J"),
    "8-bit OSC": ("\x9d52;c;x\x9c", "\\x9d52;c;x\\x9c"),
    "a sequence that never ends hides nothing": ("\x1b]0;and so on", "␛]0;and so on"),
    "lone CR": ("rm -rf /\rls       ", "rm -rf /␍ls       "),
    "Windows's lines": ("a\r\nb\r\n", "a\nb\n"),
    "backspaces": ("evil\b\b\b\bgood", "evil␈␈␈␈good"),
    "shifts and DEL": ("\x0e\x0f\x7f\x00", "␎␏␡␀"),
    "vertical": ("a\x0b\x0cb", "a␋␌b"),
    "turned text": ("gpj.\u202eexe", "gpj.\\u202eexe"),
    "isolates": ("\u2066x\u2069", "\\u2066x\\u2069"),
    "separators": ("a\u2028b\x85c", "a\\u2028b\\x85c"),
    "a name that is not UTF-8": ("caf\udce9", "caf\ufffd"),
    "halves of a character": ("\ud83d\ude00 \ude00\ud83d", "😀 \ufffd\ufffd"),
    "plain": ("Grüße,\n\tשלום 👩‍👩‍👧 क्ष", "Grüße,\n\tשלום 👩‍👩‍👧 क्ष"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_visible(name):
    given_text, shown = HOSTILE[name]
    assert visible(given_text) == shown


@pytest.mark.parametrize("name", HOSTILE)
def test_a_stream_divided_anywhere_shows_the_same(name):
    text, shown = HOSTILE[name]
    for cut in range(len(text) + 1):
        stream = TerminalStream()
        assert stream.add(text[:cut]) + stream.add(text[cut:]) + stream.finish() == shown


@given(st.lists(st.text(st.characters())), st.text(st.sampled_from("\r\n\x1b\ud83d\ude00a[")))
def test_whatever_comes_in_whatever_pieces(pieces, last):
    stream = TerminalStream()
    shown = "".join(stream.add(each) for each in [*pieces, *last]) + stream.finish()
    assert shown == visible("".join(pieces) + last)
    assert OBEYED.search(shown) is None
    shown.encode()


def test_one_line():
    assert visible_line(" a\n  b\r\nc\td\u2028e\x1b[1m\n") == "a b c d e␛[1m"


@pytest.mark.parametrize("ascii_only", [False, True])
def test_json_is_harmless_and_says_the_same(ascii_only):
    text = "".join(chr(i) for i in range(0x2100)) + "\u202e\u2066\ud800é"
    shown = to_json({"text": text}, ascii_only=ascii_only)
    assert OBEYED.search(shown) is None
    assert json.loads(shown) == {"text": text}
    shown.encode("ascii" if ascii_only else "utf-8")


def test_json_has_no_numbers_that_json_does_not_know():
    value = {"a": [float("-inf"), 1.5, float("nan")], "b": (float("inf"), {3: float("nan")})}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == {"a": [None, 1.5, None], "b": [None, {"3": None}]}
