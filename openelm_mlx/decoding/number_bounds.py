"""Bounds of numbers that the engine can enforce.

The engine (llguidance 1.9) reads every bound as a float and computes with 64-bit integers: the smallest of those has no
positive counterpart, and a range that holds it never returns. Digits beyond a float's are filled with zeros there, a lone
0 passes an open bound at 0, and long fractions overflow. Far out it writes fractions beside an open bound that readers take
for the bound. So each bound is moved inwards to the nearest one that it holds exactly. What it could not hold never reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from .schema_parts import nodes

# The last whole numbers that are both floats and, with either sign, 64-bit integers.
LARGEST = 2**63 - 1024
# Numbers with fractions have at most this many digits in total, and after the point.
_DIGITS = 15
_LARGEST_NUMBER = LARGEST - LARGEST % 10 ** (19 - _DIGITS)
# From here on a float tells no more than the first digits of a fraction.
_FAR = 10**12
# The engine walks through the remainders of a multiple, for minutes where there are more, and computes them in 32 bits.
LARGEST_MULTIPLE = 100_000
# A range with fewer multiples than this is written as a list of them.
_FEW = 8

BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


class Bound(NamedTuple):
    value: Fraction
    is_open: bool


def exact(value: int | float) -> Fraction:
    """A number as its JSON text has it; a float of 2^53 or more, which is whole, as every reader takes that text."""
    return Fraction(value) if abs(value) >= 2**53 else as_written(value)


def as_written(value: int | float) -> Fraction:
    """A number as the digits of its JSON text say."""
    return Fraction(value) if isinstance(value, int) else Fraction(Decimal(repr(value)))


def bounds_of(schema: Mapping[str, Any]) -> tuple[Bound | None, Bound | None]:
    """The narrowest lower and upper bound. Draft 4 has booleans that open the other bound."""
    found: list[Bound | None] = []
    for name, narrowest in (("Minimum", max), ("Maximum", min)):
        closed, opened = schema.get(name.lower()), schema.get(f"exclusive{name}")
        each: list[Bound] = []
        if closed is not None:
            each.append(Bound(exact(closed), opened is True))
        if opened is not None and not isinstance(opened, bool):
            each.append(Bound(exact(opened), True))
        if not each:
            found.append(None)
            continue
        value = narrowest(bound.value for bound in each)
        found.append(Bound(value, any(bound.is_open for bound in each if bound.value == value)))
    return found[0], found[1]


def first_and_last(low: Bound | None, high: Bound | None) -> tuple[int | None, int | None]:
    """The first and the last whole number within bounds; None where there is no bound."""
    first = last = None
    if low is not None:
        first = math.floor(low.value) + 1 if low.is_open else math.ceil(low.value)
    if high is not None:
        last = math.ceil(high.value) - 1 if high.is_open else math.floor(high.value)
    return first, last


def whole_bounds(low: Bound | None, high: Bound | None) -> dict[str, int] | None:
    """Bounds of whole numbers that the engine can hold, as near as it can; None if no number is left."""
    first, last = first_and_last(low, high)
    if (first is not None and first > LARGEST) or (last is not None and last < -LARGEST):
        return None
    if first is not None:
        first = _next_float(max(first, -LARGEST), math.inf)
    if last is not None:
        last = _next_float(min(last, LARGEST), -math.inf)
    # Ranges without another end are written by the number of digits, of which 64 bits have 18.
    if first is not None and last is None and first >= 10**18:
        last = LARGEST
    if last is not None and first is None and last <= -(10**18):
        first = -LARGEST
    if first is not None and last is not None and first > last:
        return None
    return {name: value for name, value in (("minimum", first), ("maximum", last)) if value is not None}


def _next_float(value: int, towards: float) -> int:
    """`value`, or the nearest whole number in this direction that a float holds exactly."""
    as_float = float(value)
    if int(as_float) != value and (int(as_float) < value) == (towards > 0):
        as_float = math.nextafter(as_float, towards)
    return int(as_float)


def fraction_bounds(low: Bound | None, high: Bound | None) -> dict[str, float | int] | None:
    """Bounds of numbers with fractions that the engine can hold, as near as it can; None if no number is left."""
    limit = Fraction(_LARGEST_NUMBER)
    if (low is not None and low.value > limit) or (high is not None and high.value < -limit):
        return None
    if high is None and low is not None and low.value >= 10**17:
        high = Bound(limit, False)
    if low is None and high is not None and high.value <= -(10**17):
        low = Bound(-limit, False)
    first = None if low is None else _inwards(Bound(max(low.value, -limit), low.is_open and low.value > -limit), 1)
    last = None if high is None else _inwards(Bound(min(high.value, limit), high.is_open and high.value < limit), -1)
    first, last = _closed_far_out(first, 1), _closed_far_out(last, -1)
    if first is not None and last is not None:
        if last.value - first.value <= 1:  # both in one unit, where the engine lets an open whole bound pass
            first, last = _closed(first, 1), _closed(last, -1)
        if first.value > last.value or (first.value == last.value and (first.is_open or last.is_open)):
            return None
    bounds: dict[str, float | int] = {}
    for name, bound in (("Minimum", first), ("Maximum", last)):
        if bound is not None:
            value = int(bound.value) if bound.value.denominator == 1 else float(bound.value)
            bounds[f"exclusive{name}" if bound.is_open else name.lower()] = value
    return bounds


def _step(value: Fraction) -> Fraction:
    """The distance between numbers of this size that are told apart."""
    num_digits = len(str(abs(int(value)))) if abs(value) >= 1 else 0
    return Fraction(10) ** (num_digits - _DIGITS)


def _inwards(bound: Bound, towards: int) -> Bound:
    step = _step(bound.value)
    steps = bound.value / step
    if steps.denominator == 1:
        return bound
    return Bound((math.ceil(steps) if towards > 0 else math.floor(steps)) * step, False)


def _closed_far_out(bound: Bound | None, towards: int) -> Bound | None:
    """The bound; a closed one just inside where a fraction beside it may read as the bound itself.

    Nearer ones stay open: of the numbers below 0.999999999999999 the engine does not write 0.9, which these digits begin with.
    """
    if bound is None or not bound.is_open or abs(bound.value) < _FAR:
        return bound
    return Bound(bound.value + towards * _step(bound.value), False)


def _closed(bound: Bound, towards: int) -> Bound:
    """An open bound at a whole number as a closed one just inside."""
    if not bound.is_open or bound.value.denominator != 1:
        return bound
    return Bound(bound.value + towards * _step(bound.value), False)


def far_values(low: Bound | None, high: Bound | None) -> list[float]:
    """Some whole numbers within bounds where the engine has no ranges any more: powers of ten beyond 64 bits."""
    found = []
    for sign in (1, -1):
        for power in range(19, 23):  # up to here they are floats
            value = sign * 10**power
            above = low is None or value > low.value or (value == low.value and not low.is_open)
            below = high is None or value < high.value or (value == high.value and not high.is_open)
            if above and below:
                found.append(float(value))
    return found


def few_multiples(
    low: Bound | None, high: Bound | None, multiple: Fraction, is_whole: bool
) -> list[int | float] | None:
    """The multiples within bounds where there are few, down to none; None where there are many."""
    if low is None or high is None:
        return None
    step = Fraction(multiple.numerator) if is_whole else multiple
    first, last = first_and_last(Bound(low.value / step, low.is_open), Bound(high.value / step, high.is_open))
    assert first is not None
    assert last is not None
    if last - first >= _FEW:
        return None
    values = [number * step for number in range(first, last + 1)]
    return [int(value) if value.denominator == 1 else float(value) for value in values]


def writable(value: Any, may_be_far: bool) -> Any:
    """A value that `is_writable` as the engine takes it.

    Whole numbers go through floats there. may_be_far: numbers beyond 64 bits may stand here; where the engine combines
    them with `integer` they would end the process.
    """
    if isinstance(value, Mapping):
        return {key: writable(item, may_be_far) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [writable(item, may_be_far) for item in value]
    if isinstance(value, float) and value == int(value) and abs(value) <= LARGEST:
        return int(value)
    if may_be_far and isinstance(value, int) and abs(value) > LARGEST:
        return float(value)
    return value


def is_writable(value: Any, may_be_far: bool) -> bool:
    """Whether the engine writes this value exactly."""
    if isinstance(value, Mapping):
        return all(is_writable(item, may_be_far) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_writable(item, may_be_far) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    if isinstance(value, float) and value != int(value):
        return 1e-15 < abs(value) < 10**_DIGITS and _is_read_as_it_is(value)
    if abs(value) <= LARGEST:
        return int(float(value)) == value
    if not may_be_far or abs(value) > 10**300:
        return False
    # There are zeros after a float's own digits there, so both readings have to agree.
    return int(float(value)) == int(value) == as_written(float(value)) and _is_read_as_it_is(float(value))


def _is_read_as_it_is(value: float) -> bool:
    """Whether the engine reads a float's JSON text as this float.

    It reads the digits as a whole number and multiplies it by a power of ten, or divides it by one, all of them floats: of
    more than 15 digits, or far from the point, some come out as a neighbour.
    """
    _, digits, exponent = Decimal(repr(abs(value))).as_tuple()
    assert isinstance(exponent, int)  # it is finite
    number, power = float(int("".join(map(str, digits)))), float(f"1e{abs(exponent)}")
    return (number * power if exponent >= 0 else number / power) == abs(value)


def engine_multiple(value: int | float) -> tuple[int, int] | None:
    """multipleOf as the engine reads it, (coefficient, decimals); None if it would get it wrong."""
    if not value or value > LARGEST_MULTIPLE:
        return None
    number, decimals = float(value), 0
    while number != int(number) and decimals < 16:
        number *= 10.0
        decimals += 1
    is_exact = number == int(number) and number <= LARGEST_MULTIPLE
    if (
        not is_exact
        or (number > 1 and 10 * number + 9 * 10**decimals > 2**32)
        or Fraction(int(number), 10**decimals) != as_written(value)
    ):
        return None
    return int(number), decimals


def common_multiple_is_too_large(schema: Any) -> bool:
    """Whether the engine, which multiplies them where parts are combined, would come to one that is too large."""
    found = {engine_multiple(node["multipleOf"]) for node in nodes(schema) if "multipleOf" in node}
    pairs = sorted(each for each in found if each is not None)
    if len(pairs) < 2 or not any(map(_combines, nodes(schema))):
        return False
    decimals = max(each[1] for each in pairs)
    return math.prod(coefficient * 10 ** (decimals - own) for coefficient, own in pairs) > LARGEST_MULTIPLE


def _combines(node: Mapping[str, Any]) -> bool:
    return "allOf" in node or "$ref" in node or ("anyOf" in node and len(node) > 1)
