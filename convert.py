"""`python convert.py SOURCE DESTINATION`: the convert command of openelm_mlx, from a copy of the repository."""

import sys

try:
    from openelm_mlx.commands import main
except ImportError as error:  # Python is too old, or something is not installed
    sys.stderr.write(f"convert.py: {error}\n")
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
