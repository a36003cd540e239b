"""`python convert.py SOURCE DESTINATION`: the convert command of openelm_mlx, from a copy of the repository."""

import sys

from openelm_mlx.commands import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
