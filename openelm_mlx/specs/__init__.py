"""The shape of a model, without arrays: its layers, the names and shapes of its parameters, the bytes of its cache.

`spec_from_config` reads every spelling of a config in circulation and gives one `ModelSpec`. The models, the caches,
the checkpoint readers and the memory planner read only that. Nothing here imports mlx or touches a disk.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ConfigError
from ..files import shown
from .cache_bytes import KV_SCORES_BYTES as KV_SCORES_BYTES
from .cache_bytes import KV_STEP as KV_STEP
from .cache_bytes import KV_UNPACK_FROM as KV_UNPACK_FROM
from .cache_bytes import kv_capacity as kv_capacity
from .cache_bytes import kv_group_size as kv_group_size
from .gpt_oss import GptOss
from .gpt_oss import gpt_oss_config as gpt_oss_config
from .model import FAMILIES, Config
from .model import LayerSpec as LayerSpec
from .model import ModelSpec as ModelSpec
from .model import YarnSpec as YarnSpec
from .model import checked_kv_bits as checked_kv_bits
from .openelm import OPENELM_NORM_EPS as OPENELM_NORM_EPS
from .openelm import OpenELM
from .openelm import apple_shape as apple_shape
from .openelm import layer_multipliers as layer_multipliers
from .openelm import make_divisible as make_divisible
from .openelm import openelm_config as openelm_config

FAMILIES.update({"openelm": OpenELM, "gpt_oss": GptOss})


def spec_from_config(config: Config) -> ModelSpec:
    """The model that a config describes.

    It reads Apple's and mlx-lm's config.json, CoreNet's YAML, Apple's MLX config.json, and for gpt-oss the config.json
    of Hugging Face (old and new spelling), of mlx-lm, and of OpenAI's original/ folder.

    Raises ConfigError for an unknown family, a missing field, or a value that no such model can have.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"The model's config is a {type(config).__name__}, not an object with named fields.")
    for family in FAMILIES.values():
        if family.recognises(config):
            return family.spec_from_config(config)
    raise ConfigError(
        f"The config is not of an OpenELM or gpt-oss model (model_type is {shown(config.get('model_type'))}, model_name is "
        f'{shown(config.get("model_name"))}): model_type "openelm" and "gpt_oss", CoreNet\'s "OpenELM-*" names and '
        "OpenAI's original config are supported."
    )
