"""The README.md that goes with converted weights: the source's card, under a heading that says what was done to it.

Whoever gets the converted files gets the source's licence and its safety notice with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import LARGEST_YAML, files_in, read_bytes
from ..finder import folded

# What a licence, and what belongs to one, is called in the repositories of Apple, OpenAI and others.
LICENCE_FILES = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|ACKNOWLEDG|USE_POLICY|USAGE_POLICY).*", re.IGNORECASE)

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)

_SAFETY = """\
These models are published without safety guarantees. Whatever the prompt, an answer can be wrong, harmful, biased or
offensive. Whoever builds on them has to test them for the use at hand, and to add filters that suit it. A conversion to
fewer bits changes the answers further; figures that were published for the original were not measured on these files.
"""

_BELOW = """
The source's own card stands below; what it says about bias, risks and limitations holds here too.
"""

_APPLE_LICENCE = """\
The source came without a licence file. The weights that Apple released as OpenELM are under Apple's licence, whatever
format they are in: see https://huggingface.co/apple/OpenELM and https://github.com/apple/corenet/blob/main/LICENSE.
"""


@dataclass(frozen=True)
class CardFacts:
    """What the heading of a card says."""

    title: str
    source: str
    repo: str | None
    revision: str | None
    program: str
    changes: Sequence[str]
    tokenizer: str
    licence_files: Sequence[str]
    is_released_openelm: bool
    loads_in_mlx_lm: bool = True


def licence_files(folder: Path) -> list[Path]:
    """The files of a source that carry its licence.

    Of two names that a Mac takes for one, such as LICENSE and License, the destination can have only the first.
    """
    found: dict[str, Path] = {}
    for path in files_in(folder, "*", CheckpointError):
        if LICENCE_FILES.fullmatch(path.name) and path.is_file():
            other = found.setdefault(folded(path.name), path)
            if other != path and read_bytes(other, CheckpointError) != read_bytes(path, CheckpointError):
                raise CheckpointError(
                    f"{folder} has {other.name} and {path.name} with different texts, which a Mac's disk cannot hold beside "
                    "each other: rename one of them."
                )
    return list(found.values())


def model_card(source_card: str | None, facts: CardFacts) -> str:
    """The text of README.md. `source_card` is the source's own; None when it has none."""
    fields, body = _split(source_card or "")
    front = _front_matter(fields, facts)
    heading = _heading(facts, has_card=bool(body.strip()), has_licence="license" in fields)
    rest = f"\n---\n\n*The card of the source follows.*\n\n{body.strip()}\n" if body.strip() else ""
    return f"{front}{heading}{rest}"


def _heading(facts: CardFacts, has_card: bool, has_licence: bool) -> str:
    origin = f"[{facts.repo}](https://huggingface.co/{facts.repo})" if facts.repo else f"`{facts.source}`"
    revision = f" (revision {facts.revision})" if facts.revision else ""
    changes = "\n".join(f"- {change}" for change in facts.changes)
    return f"""\
# {facts.title}, converted for MLX

Converted from {origin}{revision} by {facts.program}. Nothing was trained; what changed is the form:

{changes}

{facts.tokenizer}

```
pip install openelm_mlx
python -m openelm_mlx.generate --model PATH_TO_THIS_FOLDER --prompt "Once upon a time there was"
```

{"mlx-lm loads it too." if facts.loads_in_mlx_lm else "The names of the tensors are those of openelm_mlx."}

## Licence

{_licence(facts, has_licence)}
## Safety

{_SAFETY}{_BELOW if has_card else ""}"""


def _licence(facts: CardFacts, has_licence: bool) -> str:
    if facts.licence_files:
        names = ", ".join(f"[{name}]({name})" for name in facts.licence_files)
        return f"The source's licence holds for these files as well: {names}. Pass it on with them.\n"
    if facts.is_released_openelm and not has_licence:
        return _APPLE_LICENCE
    if has_licence:
        return "The source's licence, named at the top of this card, holds for these files as well.\n"
    return "The source came without a licence file: ask its publisher before you pass these files on.\n"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's fields (YAML between two lines of ---) and its text."""
    import yaml

    match = _FRONT_MATTER.match(card)
    if match is None:
        return {}, card
    if len(match[1]) > LARGEST_YAML:
        return {}, card
    try:
        fields = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return {}, card  # not fields after all; nothing of it gets lost
    return (fields, card[match.end() :]) if isinstance(fields, dict) else ({}, card)


def _front_matter(fields: Mapping[str, Any], facts: CardFacts) -> str:
    import yaml

    tags = fields.get("tags")
    written = dict(fields) | {"library_name": "mlx", "tags": [*(tags if isinstance(tags, list) else []), "mlx"]}
    written["tags"] = list(dict.fromkeys(written["tags"]))
    if facts.repo:
        written["base_model"] = facts.repo
    return f"---\n{yaml.safe_dump(written, sort_keys=False, allow_unicode=True)}---\n\n"
