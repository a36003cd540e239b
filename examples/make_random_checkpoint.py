"""Write a random gpt-oss in OpenAI's own layout, to measure what cannot be downloaded:

    python examples/make_random_checkpoint.py 20b FOLDER [--original] [--layers N] [--sparse]

Without arguments it writes two layers of a 20b whose tensors are holes, and says what they would be.
"""

import argparse
import tempfile
from pathlib import Path

from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands.info import gather


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", nargs="?", choices=["20b", "120b"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--original", action="store_true", help="as the folder original/ has it")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sparse", action="store_true", help="headers only; the tensors are holes in the files")
    args = parser.parse_args()
    config = released_gpt_oss_config(args.size or "20b")
    config["num_hidden_layers"] = args.layers or (config["num_hidden_layers"] if args.size else 2)
    folder = args.folder or Path(tempfile.mkdtemp()) / "sparse"
    layout = "openai-original" if args.original else "openai-hf"
    written = write_random_gpt_oss(folder, config, layout, sparse=args.sparse or not args.size)
    facts = gather(str(written))
    print(f"{written}: {facts['parameters']:,} parameters, {facts['tensor_bytes']:,} bytes")


if __name__ == "__main__":
    main()
