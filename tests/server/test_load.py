"""Many clients at once, some of which disconnect: all others are served, and nothing leaks."""

import asyncio
import os
import random
import time
from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI

from magistral_mlx import Magistral
from tests.serving import Running

MEGABYTE = 2**20
QUESTIONS = ("What is 48 + 37?", "12 + 5 = ?", "What is 6 × 14?", "48에 37을 더하면?")
SEEDS = 3


@pytest.fixture(scope="module")
def loaded() -> Iterator[Running]:
    with Magistral.load("demo") as model, Running(model, running=6, waiting=40) as running:
        yield running


Right = dict[tuple[str, int, bool], str]
"""A question, a seed, and whether to think → the answer."""


def answers(server: Running, *, think: tuple[bool, ...]) -> Right:
    """The expected answers: the library's, to the same questions with the same seeds."""
    ask, seeds = server.service.model.ask, range(SEEDS)
    return {
        (q, seed, t): ask(q, seed=seed, think=t).answer for q in QUESTIONS for seed in seeds for t in think
    }


async def one(client: AsyncOpenAI, rng: random.Random, right: Right) -> str:
    """One request of any kind; returns how it went."""
    question, seed, think = wanted = rng.choice(list(right))
    leaves = rng.random() < 1 / 3
    asked = {"model": "any", "messages": [{"role": "user", "content": question}], "seed": seed}
    asked["reasoning_effort"] = "high" if think else "none"
    stream = rng.random() < 0.6
    if leaves and not stream:
        task = asyncio.create_task(client.chat.completions.create(**asked, stream=False))
        await asyncio.sleep(rng.random() * 0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "left"
    if not stream:
        done = await client.chat.completions.create(**asked, stream=False)
        return "right" if done.choices[0].message.content == right[wanted] else "wrong"
    told, text = await client.chat.completions.create(**asked, stream=True), ""
    pieces = rng.randrange(40) if leaves else 10**9
    async with told:
        async for chunk in told:
            text += chunk.choices[0].delta.content or ""
            if (pieces := pieces - 1) < 0:
                return "left"
    return "right" if text == right[wanted] else "wrong"


async def crowd(server: Running, clients: int, requests: int, right: Right) -> list[str]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:

        async def busy(number: int) -> list[str]:
            rng = random.Random(number)
            return [await one(client, rng, right) for _ in range(requests // clients)]

        return [went for each in await asyncio.gather(*map(busy, range(clients))) for went in each]


def serve(server: Running, right: Right, clients: int, requests: int) -> None:
    asyncio.run(crowd(server, clients, clients, right))  # everything that is allocated once exists now
    before = server.idle_memory()
    went = asyncio.run(crowd(server, clients, requests, right))
    assert len(went) == requests
    assert set(went) == {"right", "left"}
    assert server.idle_memory() - before <= MEGABYTE
    assert server.service.prefixes.nbytes <= server.service.prefixes.limit
    assert (server.service.slots.running, server.service.slots.waiting) == (0, 0)


def test_a_crowd(loaded: Running):
    serve(loaded, answers(loaded, think=(False,)), clients=8, requests=32)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_requests_from_20_clients(loaded: Running):
    serve(loaded, answers(loaded, think=(True, False)), clients=20, requests=200)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_soak(loaded: Running):
    """Ten minutes, or SOAK_SECONDS: memory is bounded from the first minute to the last."""
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    right = answers(loaded, think=(True, False))
    asyncio.run(crowd(loaded, 20, 40, right))
    before, end = loaded.idle_memory(), time.monotonic() + seconds
    while time.monotonic() < end:
        assert set(asyncio.run(crowd(loaded, 20, 100, right))) == {"right", "left"}
        assert loaded.idle_memory() - before <= MEGABYTE
