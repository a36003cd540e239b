"""Several requests at once: each is answered as it would be alone, and short ones do not wait for long ones."""

import asyncio

import openelm_mlx as om

WORDS = ("banjo", "river", "harbor", "violin")


async def ask(engine: om.Engine, word: str) -> None:
    handle = engine.submit(f"What is a {word}?", max_tokens=24)
    text = ""
    async for chunk in handle:
        text += chunk.text
    print(f"{word}: {text.strip()}")


async def main() -> None:
    model, tokenizer = om.load("demo-openelm")
    with om.Engine(model, tokenizer) as engine:
        await asyncio.gather(*(ask(engine, word) for word in WORDS))


asyncio.run(main())
