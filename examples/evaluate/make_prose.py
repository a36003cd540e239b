"""Writes prose.txt in this folder: prose that demo-openelm has not read, from the first chapter of Tom Sawyer.

    apt-get download golang-github-golang-snappy-dev                      # Debian 12: version 0.0.2-3
    python examples/evaluate/make_prose.py --packages .

Mark Twain's book of 1876 is in the public domain, as the package's copyright file says of this text, a test file of its
own. The demo was trained with none of Mark Twain's texts: ../train/corpus.py names what it has read.
"""

import argparse
import hashlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "train"))

from corpus import paragraphs, read_deb  # noqa: E402  (beside the folder of this file)

PACKAGE = "golang-github-golang-snappy-dev_*.deb"
TEXT = "./usr/share/gocode/src/github.com/golang/snappy/testdata/Mark.Twain-Tom.Sawyer.txt"
SHA256 = "bd8df876d2a05017bb302f506883a37817d256f16f2205a932399276e08a81af"
# Told rather than spoken, without what was said then of other people.
BEGINNINGS = (
    "She did not finish", "She went to the open door", "The old lady whirled", "While Tom was eating",
    "A bit of a scare", '"But you ain\'t too warm', "Aunt Polly was vexed", "She was half sorry", "In a safe place",
    "The summer evenings were long",
)  # fmt: skip


def prose(text: str) -> list[str]:
    """The paragraphs that are taken, each in one line."""
    return [each for each in paragraphs(text) if each.startswith(BEGINNINGS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="the folder with the package")
    archives = sorted(parser.parse_args().packages.glob(PACKAGE))
    if not archives:
        sys.exit("The package is not there: apt-get download golang-github-golang-snappy-dev.")
    content = read_deb(archives[-1], TEXT)
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{archives[-1]} has another text: this takes version 0.0.2-3 of the package.")
    (HERE / "prose.txt").write_text("\n\n".join(prose(content.decode())) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
