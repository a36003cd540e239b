"""A server's models: names, loading on demand, memory given back, leases, and engines that have died."""

import asyncio

import pytest

from openelm_mlx.server.failures import ApiError
from openelm_mlx.server.names import served_model
from openelm_mlx.server.registry import Registry
from openelm_mlx.server.settings import ServerSettings

BOTH = (served_model("demo-gpt-oss"), served_model("demo-openelm"))


def test_models_are_loaded_on_demand_and_answer():
    async def main():
        async with Registry(ServerSettings(models=BOTH)) as registry:
            assert [card.id for card in registry.names()] == ["demo-gpt-oss", "demo-openelm"]
            async with await registry.acquire("demo-openelm") as lease:
                handle = lease.engine.submit("What is a banjo?", max_tokens=4, prefix_cache=lease.prefix_cache)
                assert len([chunk async for chunk in handle]) == 4
            with pytest.raises(ApiError, match="There is no model 'gpt-4o' here") as told:
                await registry.acquire("gpt-4o")
            assert (told.value.status, told.value.code) == (404, "model_not_found")

    asyncio.run(main())
