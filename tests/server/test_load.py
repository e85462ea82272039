"""Many clients at once, some of which disconnect: all others get the right answers, and nothing leaks."""

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
def server() -> Iterator[Running]:
    with Magistral.load("demo") as model, Running(model, running=6, waiting=40) as running:
        yield running


ExpectedAnswers = dict[tuple[str, int, bool], str]
"""A question, a seed, and whether to think → the answer."""


def expected_answers(server: Running, *, think: tuple[bool, ...]) -> ExpectedAnswers:
    """The expected answers: the library's, to the same questions with the same seeds."""
    ask, seeds = server.service.model.ask, range(SEEDS)
    return {
        (question, seed, thinks): ask(question, seed=seed, think=thinks).answer
        for question in QUESTIONS
        for seed in seeds
        for thinks in think
    }


async def send_random_request(client: AsyncOpenAI, rng: random.Random, expected: ExpectedAnswers) -> str:
    """One request of a random kind; returns its outcome: correct, wrong or disconnected."""
    question, seed, think = key = rng.choice(list(expected))
    disconnects = rng.random() < 1 / 3
    request = {"model": "any", "messages": [{"role": "user", "content": question}], "seed": seed}
    request["reasoning_effort"] = "high" if think else "none"
    stream = rng.random() < 0.6
    if disconnects and not stream:
        task = asyncio.create_task(client.chat.completions.create(**request, stream=False))
        await asyncio.sleep(rng.random() * 0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "disconnected"
    if not stream:
        done = await client.chat.completions.create(**request, stream=False)
        return "correct" if done.choices[0].message.content == expected[key] else "wrong"
    chunks, text = await client.chat.completions.create(**request, stream=True), ""
    pieces = rng.randrange(40) if disconnects else 10**9
    async with chunks:
        async for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
            if (pieces := pieces - 1) < 0:
                return "disconnected"
    return "correct" if text == expected[key] else "wrong"


async def run_clients(server: Running, clients: int, requests: int, expected: ExpectedAnswers) -> list[str]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:

        async def client_outcomes(number: int) -> list[str]:
            rng = random.Random(number)
            return [await send_random_request(client, rng, expected) for _ in range(requests // clients)]

        return [
            outcome
            for outcomes in await asyncio.gather(*map(client_outcomes, range(clients)))
            for outcome in outcomes
        ]


def assert_all_served(server: Running, expected: ExpectedAnswers, clients: int, requests: int) -> None:
    asyncio.run(run_clients(server, clients, clients, expected))  # makes all one-time allocations
    before = server.idle_memory()
    outcomes = asyncio.run(run_clients(server, clients, requests, expected))
    assert len(outcomes) == requests
    assert set(outcomes) == {"correct", "disconnected"}
    assert server.idle_memory() - before <= MEGABYTE
    assert server.service.prefixes.nbytes <= server.service.prefixes.limit
    assert (server.service.slots.running, server.service.slots.waiting) == (0, 0)


def test_concurrent_clients_get_their_answers_and_nothing_leaks(server: Running):
    assert_all_served(server, expected_answers(server, think=(False,)), clients=8, requests=32)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_requests_from_20_clients_get_their_answers_and_nothing_leaks(server: Running):
    assert_all_served(server, expected_answers(server, think=(True, False)), clients=20, requests=200)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_memory_stays_bounded_in_a_soak_test(server: Running):
    """Ten minutes, or SOAK_SECONDS: memory is bounded from the first minute to the last."""
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    expected = expected_answers(server, think=(True, False))
    asyncio.run(run_clients(server, 20, 40, expected))
    before, end = server.idle_memory(), time.monotonic() + seconds
    while time.monotonic() < end:
        assert set(asyncio.run(run_clients(server, 20, 100, expected))) == {"correct", "disconnected"}
        assert server.idle_memory() - before <= MEGABYTE
