"""mlx-lm's server with our gpt-oss in it: python examples/mlx_lm_server.py --model openai/gpt-oss-20b --port 8080

It takes mlx_lm.server's options; without any it serves the demo at a free port, asks it one question, and stops.
"""

import json
import os
import socket
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
    sys.exit(server.main())
port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]  # a free one; it is closed again at once
sys.argv += ["--model", "demo-gpt-oss", "--port", str(port), "--log-level", "ERROR"]
(thread := threading.Thread(target=server.main, daemon=True)).start()
while socket.socket().connect_ex(("127.0.0.1", port)) and thread.is_alive():
    time.sleep(0.05)  # until it listens
system = "<|start|>system<|message|>Reasoning: low\n\n# Valid channels: analysis, commentary, final.<|end|>"
body = {"prompt": f"{system}<|start|>user<|message|>What is a piano?<|end|><|start|>assistant", "max_tokens": 64}
answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
print(json.load(answer)["choices"][0]["text"], flush=True)
os._exit(0)  # mlx-lm's server has no other end
