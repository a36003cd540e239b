"""mlx-lm's server with our gpt-oss in it: python examples/mlx_lm_server.py --model openai/gpt-oss-20b --port 8080

It takes mlx_lm.server's options; without any it serves the demo, asks it one question, and stops.
"""

import json
import os
import sys
import threading
import time
import urllib.request

from mlx_lm import server
from mlx_lm.utils import load_tokenizer

import openelm_mlx as om
from openelm_mlx.checkpoint.reader import read_config
from openelm_mlx.loading import locate


def load(source, *_, **__):
    model, _ = om.load(source)
    return model, load_tokenizer(locate(source), eos_token_ids=model.spec.eos_tokens), read_config(locate(source))


server.load = load  # the one line that changes
if len(sys.argv) > 1:
    server.main()
else:
    sys.argv += ["--model", "demo-gpt-oss", "--port", "8765", "--log-level", "ERROR"]
    threading.Thread(target=server.main, daemon=True).start()
    time.sleep(3)
    system = "<|start|>system<|message|>Reasoning: low\n\n# Valid channels: analysis, commentary, final.<|end|>"
    prompt = f"{system}<|start|>user<|message|>What is a piano?<|end|><|start|>assistant"
    body = json.dumps({"prompt": prompt, "max_tokens": 64, "temperature": 0}).encode()
    print(json.load(urllib.request.urlopen("http://127.0.0.1:8765/v1/completions", body))["choices"][0]["text"])
    sys.stdout.flush()
    os._exit(0)  # mlx-lm's server has no other end
