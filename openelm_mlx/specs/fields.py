"""Fields of a config, checked: each has the right type and is no larger than in any real model."""

from __future__ import annotations

from typing import Any

from ..checks import whole_number
from ..errors import ConfigError
from ..files import shown
from .model import Config

# Far above any real model: a larger value would only cost time and memory before an error.
MOST_LAYERS = 4096
LARGEST_WHOLE = 2**31
LARGEST_NUMBER = 1e12
_MOST_STOPS = 1000


def required(config: Config, *names: str) -> Any:
    """The field of the first of `names` that the config has: one thing under its different spellings."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ConfigError(f'The model\'s config has no "{names[0]}": it is incomplete; download or copy config.json again.')


def integer(config: Config, *names: str, most: int = LARGEST_WHOLE) -> int:
    return whole_number(f'The config\'s "{names[0]}"', required(config, *names), high=most, error=ConfigError)


def is_number(value: Any) -> bool:
    """Whether it is a number above 0 that a model can have: not NaN, infinite or absurdly large."""
    return type(value) in (int, float) and 0 < value <= LARGEST_NUMBER


def numbers(value: Any, name: str) -> list[float]:
    is_list = isinstance(value, (list, tuple)) and 0 < len(value) <= MOST_LAYERS
    if not is_list or not all(map(is_number, value)):
        raise ConfigError(
            f'The config\'s "{name}" is {shown(value)}: it must be a number, or a list of numbers, above 0.'
        )
    return [float(v) for v in value]


def per_layer(config: Config, name: str, num_layers: int) -> list[int]:
    value = config[name]
    values = value if isinstance(value, (list, tuple)) else [value] * num_layers
    if len(values) != num_layers or any(type(v) is not int or not 1 <= v <= LARGEST_WHOLE for v in values):
        raise ConfigError(
            f'The config\'s "{name}" is {shown(value)}: it must hold {num_layers} whole numbers above 0, one a layer.'
        )
    return list(values)


def positive(config: Config, name: str, default: float | None = None) -> float:
    """A number above 0; null and a field that is not there are the default, where there is one."""
    value = default if default is not None and config.get(name) is None else required(config, name)
    if not is_number(value):
        raise ConfigError(f'The config\'s "{name}" is {shown(value)}: it must be a number above 0.')
    return float(value)


def switch(config: Config, name: str, default: bool | None = None) -> bool:
    value = default if default is not None and config.get(name) is None else required(config, name)
    if not isinstance(value, bool):
        raise ConfigError(f'The config\'s "{name}" is {shown(value)}: it must be true or false.')
    return value


def token(config: Config, name: str, value: Any, vocab_size: int) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < vocab_size:
        raise ConfigError(
            f'The config\'s "{name}" is {shown(config.get(name))}: it must be a token, 0 to {vocab_size - 1}.'
        )
    return value


def tokens(config: Config, name: str, default: int | None, vocab_size: int) -> tuple[int, ...]:
    value = config.get(name, default)
    values = value if isinstance(value, (list, tuple)) else [value]
    if len(values) > _MOST_STOPS:
        raise ConfigError(
            f'The config\'s "{name}" names {len(values):,} tokens: it must name those that end an answer.'
        )
    tokens = [token(config, name, v, vocab_size) for v in values]
    return tuple(token for token in tokens if token is not None)
