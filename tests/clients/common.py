"""What every client is asked, and how it tells the test what it got: one JSON object on standard output."""

import json
import os
import sys

BASE_URL = os.environ.get("BASE_URL", "http://127.0.0.1:8080")
MODEL = os.environ.get("MODEL", "demo-gpt-oss")
WORD = "What is a harbor?"
SUM = "What is 23 * 19?"
CALCULATOR = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
    "additionalProperties": False,
}
# What the structured answer of the demo is: it knows no other JSON than its calculator's.
CALCULATION = {**CALCULATOR, "title": "Calculation"}


def calculate(expression: str) -> str:
    """Evaluates an arithmetic expression."""
    if set(expression) - set("0123456789+-*/(). "):
        return "not an arithmetic expression"
    return str(eval(expression))


def report(**found: object) -> None:
    json.dump(found, sys.stdout)
    print()
