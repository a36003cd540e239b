"""Adapters as models of a server: each request gets the answer of the one that it names."""

import asyncio

import mlx.core as mx
import numpy as np
import pytest
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.checkpoint.adapter_files import write_adapter
from openelm_mlx.models.adapter_targets import targets_of
from openelm_mlx.models.low_rank import Adapter, Pair
from openelm_mlx.server.answering import ModelGenerations
from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.generation import GenerationRequest, collected
from openelm_mlx.server.names import with_adapters
from openelm_mlx.server.registry import Registry
from openelm_mlx.server.settings import ServedModel, ServerSettings

QUESTION = [{"role": "user", "content": "What is a banjo?"}]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two that make demo-openelm's first layers say something else."""
    model, _ = om.load(short_demo("demo-openelm"))
    paths = []
    for seed in (3, 4):
        rng, pairs = np.random.default_rng(seed), {}
        for name, target in targets_of(model.spec).items():
            if target.group == "feed-forward":
                a, b = (mx.array(rng.normal(0, 0.3, shape).astype(np.float32)) for shape in target.shapes(4))
                pairs[name] = Pair(a, b, 2.0)
        folder = tmp_path_factory.mktemp("adapters") / f"odd{seed}"
        paths.append(write_adapter(folder, Adapter(pairs, base={"name": "demo-openelm"}), model.spec))
    return paths


def test_requests_name_adapters(adapters):
    first, second = adapters
    model, tokenizer = om.load(short_demo("demo-openelm"), adapter={"a": first, "b": second})
    alone = {name: om.generate(model, tokenizer, QUESTION, max_tokens=6, adapter=name) for name in ("a", "b", "none")}
    assert len(set(alone.values())) == 3

    async def main():
        served = with_adapters(
            [ServedModel("demo-openelm", str(short_demo("demo-openelm")))], [f"a={first}", f"demo-openelm:b={second}"]
        )
        registry = Registry(ServerSettings(models=tuple(served), aliases={"mine": "demo-openelm:b"}))
        async with registry:
            generations = ModelGenerations(registry)

            async def ask(name):
                request = GenerationRequest(model=name, messages=QUESTION, max_tokens=6)
                generation = await generations.start(request)
                async with generation:
                    [answer] = await collected(generation)
                return answer.items[0].text

            wanted = {"demo-openelm": "none", "demo-openelm:a": "a", "demo-openelm:b": "b", "mine": "b"}
            for _ in range(2):  # the second time from what is known of the prompt
                found = await asyncio.gather(*map(ask, wanted))
                assert dict(zip(wanted, found, strict=True)) == {name: alone[each] for name, each in wanted.items()}
            with pytest.raises(ApiError, match="There is no model 'demo-openelm:c' here"):
                await ask("demo-openelm:c")
            assert [card.id for card in registry.names()] == [
                "demo-openelm",
                "demo-openelm:a",
                "demo-openelm:b",
                "mine",
            ]

    asyncio.run(main())
