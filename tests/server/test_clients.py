"""Clients in common use: the official one, the model card's script, curl, an agent framework."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, OpenAI
from pydantic_ai import Agent, ThinkingPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from magistral_mlx import Reply
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.server.safety import Rules
from tests.serving import ASK, HUB_ID, QUESTION, Running

CARD = (Path(__file__).parents[1] / "card_client.txt").read_text(encoding="utf-8")
"""The client on the model card of Magistral-Small-2506, unchanged."""


@pytest.fixture(scope="module")
def client(served: Running) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="EMPTY", max_retries=0)


def test_openai_client_gets_the_answer_and_the_reasoning(reply: Reply, client: OpenAI):
    done = client.chat.completions.create(model=client.models.list().data[0].id, **ASK)
    assert done.model == HUB_ID
    message = done.choices[0].message
    assert message.content == reply.answer
    assert message.reasoning_content == reply.thinking  # type: ignore[attr-defined]
    assert done.usage
    assert done.usage.completion_tokens_details
    assert done.usage.completion_tokens_details.reasoning_tokens == reply.stats.thinking_tokens


def test_openai_client_streams_the_answer_and_the_reasoning(reply: Reply, client: OpenAI):
    chunks = list(
        client.chat.completions.create(
            model="any", **ASK, stream=True, stream_options={"include_usage": True}, reasoning_effort="high"
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == reply.answer
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == reply.thinking
    assert chunks[-1].usage
    assert chunks[-1].usage.prompt_tokens == reply.stats.prompt_tokens


def test_openai_stream_helper_builds_the_whole_message(reply: Reply, client: OpenAI):
    with client.chat.completions.stream(model="any", **ASK) as stream:
        assert stream.get_final_completion().choices[0].message.content == reply.answer


def test_openai_async_client_gets_the_same_answers(served: Running, reply: Reply):
    async def main() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="EMPTY", max_retries=0) as client:
            requests = (client.chat.completions.create(model="any", **ASK | {"seed": s}) for s in (1, 1))
            answers = [done.choices[0].message.content for done in await asyncio.gather(*requests)]
            stream = await client.chat.completions.create(model="any", **ASK, stream=True)
            return [*answers, "".join([c.choices[0].delta.content or "" async for c in stream])]

    assert asyncio.run(main()) == 3 * [reply.answer]


def test_openai_completions_keep_to_max_tokens(client: OpenAI):
    done = client.completions.create(model="any", prompt="48 + 37 =", max_tokens=5, seed=1)
    assert done.usage
    assert done.usage.completion_tokens <= 5


def test_errors_reach_the_openai_client_as_its_own_exceptions(served: Running, client: OpenAI):
    with pytest.raises(BadRequestError, match="messages") as caught:
        client.chat.completions.create(model="any", messages=[])
    assert caught.value.param == "messages"
    with (
        Running(served.service.model, rules=Rules(key="right")) as server_with_key,
        OpenAI(base_url=f"{server_with_key.url}/v1", api_key="wrong", max_retries=0) as wrong_key_client,
        OpenAI(base_url=f"{server_with_key.url}/v1", api_key="right", max_retries=0) as right_key_client,
    ):
        with pytest.raises(AuthenticationError):
            wrong_key_client.models.list()
        assert right_key_client.models.list().data


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hub's cache as a download leaves it, with the demo model under the name that the card asks for."""
    home, commit = tmp_path_factory.mktemp("hub"), "0" * 40
    repo = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(DEMO, repo / "snapshots" / commit)
    return home


def run_card(base_url: str, hub_cache: Path, **environment: str) -> str:
    script = CARD.replace("http://localhost:8000/v1", base_url)
    assert script != CARD
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.partition("content:")[2]


def test_the_model_cards_script_works_on_both_endpoints(served: Running, hub_cache: Path):
    """Only its address is changed; the system prompt that it fetches and sends is there once, not twice."""
    start_of_reasoning = "<think>\nThis is not small arithmetic."
    raw = run_card(f"{served.url}/raw/v1", hub_cache)
    assert raw.startswith(start_of_reasoning)
    _, closed, answer = raw.partition("\n</think>\n\n")
    assert closed
    assert "demo model" in answer
    without_reasoning = run_card(f"{served.url}/v1", hub_cache)
    assert "demo model" in without_reasoning
    assert "think>" not in without_reasoning


def test_the_cards_system_prompt_is_not_doubled(served: Running):
    model = served.service.model
    system = {"role": "system", "content": model.tokenizer.system_prompt}
    question = {"role": "user", "content": QUESTION}
    token_ids = served.post("/v1/tokenize", {"messages": [system, question]}).json["tokens"]
    assert token_ids == model.encode(QUESTION)


def test_another_system_prompt_does_not_switch_the_thinking_off(served: Running):
    model = served.service.model
    system = {"role": "system", "content": "You are a helpful assistant."}
    question = {"role": "user", "content": [{"type": "text", "text": QUESTION}]}
    token_ids = served.post("/v1/tokenize", {"messages": [system, question]}).json["tokens"]
    assert token_ids == model.encode(QUESTION, system="You are a helpful assistant.")


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_curl_receives_the_stream(served: Running, reply: Reply):
    body = json.dumps(ASK | {"stream": True})
    address = f"{served.url}/v1/chat/completions"
    command = ["curl", "-sSN", address, "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    *_, last = done.stdout.split()
    assert last == "[DONE]"
    assert reply.answer[-1] in done.stdout


def test_pydantic_ai_asks_continues_and_streams(served: Running):
    provider = OpenAIProvider(base_url=f"{served.url}/v1", api_key="EMPTY")
    agent = Agent(OpenAIChatModel(HUB_ID, provider=provider), instructions="Be exact.")

    async def main() -> AsyncIterator[str]:
        first = await agent.run(QUESTION, model_settings={"seed": 1, "temperature": 0.0})
        yield first.output
        thoughts = [part for part in first.all_messages()[-1].parts if isinstance(part, ThinkingPart)]
        yield thoughts[0].content
        again = await agent.run("And 12 + 5?", message_history=first.all_messages())
        yield again.output
        async with agent.run_stream(QUESTION, model_settings={"seed": 1, "temperature": 0.0}) as stream:
            yield "".join([piece async for piece in stream.stream_text(delta=True)])

    async def collected() -> list[str]:
        return [text async for text in main()]

    answer, thinking, again, streamed = asyncio.run(collected())
    assert "7" in answer
    assert thinking
    assert again
    assert streamed == answer
