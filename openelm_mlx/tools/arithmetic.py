"""A calculator tool: only arithmetic, evaluated without `eval`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from ..arguments import TEXT, checked_call
from ..errors import ToolError
from ..files import one_line

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}  # fmt: skip
_NAMES = {"pi": math.pi, "e": math.e, "tau": math.tau}
_FUNCTIONS = {
    name: getattr(math, name)
    for name in ("sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "log", "log2", "log10", "exp", "floor", "ceil")
} | {"abs": abs, "round": round, "min": min, "max": max}

# A power of whole numbers can have more digits than the machine has memory.
MOST_BITS = 4096
MOST_CHARACTERS = 1000


@checked_call("calculator", ToolError, expression=TEXT)
def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression."""
    # The docstring is shown to the model, so it does not mention ToolError.
    if len(expression) > MOST_CHARACTERS:
        raise ToolError(f"the expression has {len(expression)} characters; {MOST_CHARACTERS} are the most")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(f"{expression!r} is not an arithmetic expression") from None
    try:
        return str(_value(tree.body))
    except ToolError:
        raise
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:  # 1/0, sqrt(-1), round()
        raise ToolError(f"{expression!r} cannot be computed: {one_line(error)}") from None


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _binary(node.op, _value(node.left), _value(node.right))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and not node.keywords
    ):
        return _FUNCTIONS[node.func.id](*map(_value, node.args))
    raise ToolError(f"{ast.unparse(node)!r} is not arithmetic")


def _binary(op: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(op, ast.Pow):
        bits = math.log2(abs(left)) * right if left and isinstance(left, int) and isinstance(right, int) else 0
        if abs(bits) > MOST_BITS:
            raise ToolError(f"{left} to the power of {right} has too many digits")
    result = _OPERATORS[type(op)](left, right)
    if isinstance(result, complex):
        raise ToolError("the result is not a real number")
    if isinstance(result, int) and result.bit_length() > MOST_BITS:
        raise ToolError("the result has too many digits")
    return result
