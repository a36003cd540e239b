"""The demos without most of their layers: their tokenizers, types and shapes at a fraction of the time.

For tests that compare two ways of computing. What a short demo says means nothing; who needs words takes the whole one.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx

from openelm_mlx.sources import DEMOS

# Lists in a config with an entry for each layer.
_OF_LAYERS = ("layer_types", "ffn_multipliers", "num_kv_heads", "num_query_heads")
# gpt-oss: a layer with a window and one without. OpenELM: two of its multipliers would be a range for all layers.
_LAYERS = {"demo-gpt-oss": 2, "demo-openelm": 3}


@cache
def short_demo(name: str, num_layers: int | None = None) -> Path:
    """The folder of a demo's first layers, made once in a process. It is the caller's to read, not to change."""
    num_layers = num_layers or _LAYERS[name]
    place = Path(tempfile.mkdtemp(prefix="short-demo-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = place / name
    shutil.copytree(DEMOS[name], folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = json.loads((DEMOS[name] / "config.json").read_text(encoding="utf-8"))
    count = "num_hidden_layers" if "num_hidden_layers" in config else "num_transformer_layers"
    shorter = {key: config[key][:num_layers] for key in _OF_LAYERS if key in config}
    (folder / "config.json").write_text(json.dumps({**config, **shorter, count: num_layers}), encoding="utf-8")
    kept = {
        key: array
        for key, array in mx.load(str(DEMOS[name] / "model.safetensors")).items()
        if (found := re.search(r"layers\.(\d+)\.", key)) is None or int(found[1]) < num_layers
    }
    mx.save_safetensors(str(folder / "model.safetensors"), kept, metadata={"format": "mlx"})
    return folder
