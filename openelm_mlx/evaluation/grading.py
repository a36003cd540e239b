r"""Reading an answer: the option that a text settles on, the number in its last box, a number at its end.

The order of the forms is that of OpenAI's own graders (openai/gpt-oss, gpt_oss/evals), so that the same text gets the
same grade: what is declared as the answer comes before a letter in brackets, and that before a line that begins with one.
"""

from __future__ import annotations

import re

_MARK = r"(?:\*{1,2}|_{1,2})"
_LETTER = "([ABCD])"
_APART = r"(?<![A-Za-z0-9])"
_NO_MORE = r"(?![A-Za-z0-9])"
_SEPARATOR = r"\s*[:\-–]?\s*"
_ANY = re.IGNORECASE
# First to last: the first form that is found anywhere decides.
_FORMS = [
    re.compile(rf"{_MARK}Answers?\s*[:\-–]?{_MARK}\s*{_LETTER}\b", _ANY),
    re.compile(rf"^\s*{_MARK}?Answer:?{_MARK}?\s*:?\s*{_MARK}?{_LETTER}{_MARK}?\s*", _ANY | re.MULTILINE),
    re.compile(rf"\bAnswers?\b{_SEPARATOR}\(\s*{_LETTER}\s*\)", _ANY),
    re.compile(rf"\bAnswers?\b{_SEPARATOR}{_LETTER}\b", _ANY),
    re.compile(rf"\b(?:Option|Choice)\b{_SEPARATOR}{_LETTER}\b", _ANY),
    re.compile(rf"\\boxed\{{[^}}]*?{_LETTER}[^}}]*\}}"),
    re.compile(rf"\\boxed\{{[^}}]*?\\text(?:bf)?\{{[^}}]*?{_LETTER}[^}}]*\}}[^}}]*\}}"),
    re.compile(rf"{_APART}[(\[]\s*{_LETTER}\s*[)\]]{_NO_MORE}"),
    re.compile(rf"{_APART}{_MARK}{_LETTER}{_MARK}{_NO_MORE}"),
    re.compile(rf"\\textbf\{{[^}}]*?{_LETTER}[^}}]*\}}"),
    re.compile(rf"{_APART}{_MARK}\s*{_LETTER}\)[^*_\n]+?{_MARK}{_NO_MORE}"),
    re.compile(rf"^\s*{_MARK}?{_LETTER}{_MARK}?\s*[.)\-–:]?\s*.*$", re.MULTILINE),
]
_ALONE = re.compile(rf"\s*[*_]{{0,2}}\s*{_LETTER}\s*[*_]{{0,2}}\s*[.):\]]?\s*", _ANY)
_BOX = re.compile(r"boxed\{(.*?)\}", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def chosen_option(text: str) -> str | None:
    """Which of A, B, C and D a text answers with; None where it settles on none."""
    for form in _FORMS:
        if (found := form.search(text)) is not None:
            return found[1].upper()
    alone = _ALONE.fullmatch(text)
    return None if alone is None else alone[1].upper()


def boxed_integer(text: str) -> int | None:
    """The whole number in the last box, behind its last comma; without a box the last one in the text; None for none."""
    boxes = [each for each in _BOX.findall(text) if each]
    if boxes:
        said = boxes[-1].split(",")[-1].strip()
    else:
        numbers = re.findall(r"\d+", text)
        said = numbers[-1] if numbers else ""
    try:
        return int(said)
    except ValueError:
        return None


def last_number(text: str) -> float | None:
    """The last number of a text."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def is_same_answer(text: str, expected: str) -> bool:
    """Whether a text says what is expected: the same number at its end, or the same words in the whole."""
    try:
        number = float(expected.replace(",", ""))
    except ValueError:
        return " ".join(text.split()).casefold() == " ".join(expected.split()).casefold()
    return last_number(text) == number


def code_of(text: str) -> str:
    """The Python of an answer: its last fenced block, or the whole where there is none."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return str(blocks[-1]) if blocks else text
