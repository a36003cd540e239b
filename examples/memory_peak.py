"""What was planned and what was used: python examples/memory_peak.py SOURCE [--memory-limit 8GB] [--prompt-tokens 16]"""

import argparse

import openelm_mlx as om
from openelm_mlx.memory.machine import process_peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", default="demo-gpt-oss")
    parser.add_argument("--memory-limit")
    parser.add_argument("--dense-bits", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=4)
    args = parser.parse_args()
    context = args.prompt_tokens + args.max_tokens
    model, _ = om.load(
        args.source, memory_limit=args.memory_limit, dense_bits=args.dense_bits, context_length=max(256, context)
    )
    prompt = [(7 * i + 3) % 300 for i in range(args.prompt_tokens)]
    *_, last = om.stream_generate(model, None, prompt, max_tokens=args.max_tokens)
    process = process_peak_bytes()
    plan = model.plan
    print(f"experts in memory: {plan.expert_slots or 'all'}")
    print(f"MLX:     planned {plan.total_bytes / 1e9:.3f} GB, peak {last.statistics.peak_memory_bytes / 1e9:.3f} GB")
    print(f"process: planned {plan.process_bytes / 1e9:.3f} GB, peak {process / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
