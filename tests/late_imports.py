"""Names of large packages, imported by the test that first needs one.

Each process of the tests reads all test files, and each of these packages takes a second or more.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from typing import Any


@cache
def late(name: str) -> Any:
    """Of `package.module:name` the object, of a module the module."""
    return pkgutil.resolve_name(name)


@cache
def late_validator(name: str) -> Any:
    """What validates values of a type that is no class, such as a union."""
    from pydantic import TypeAdapter

    return TypeAdapter(late(name))
