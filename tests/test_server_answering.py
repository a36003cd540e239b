"""What a request becomes in an engine."""

from types import SimpleNamespace

import pytest

from openelm_mlx.errors import MemoryLimitError
from openelm_mlx.server import answering


def test_max_tokens_is_cut_to_what_memory_holds():
    asked = []

    def submit_several(prompt, count, **options):
        asked.append(options["max_tokens"])
        if options["max_tokens"] == 32_000 or prompt == "too long":
            raise MemoryLimitError("It does not fit.")
        return ["handle"] * count

    lease = SimpleNamespace(engine=SimpleNamespace(submit_several=submit_several))
    assert answering._submit(lease, "short", 2, {"max_tokens": 32_000}) == ["handle", "handle"]
    assert asked == [32_000, None]
    with pytest.raises(MemoryLimitError):
        answering._submit(lease, "too long", 1, {"max_tokens": 5})
    with pytest.raises(MemoryLimitError):
        answering._submit(lease, "too long", 1, {"max_tokens": None})
    assert asked[2:] == [5, None, None]
