"""Structured answers, and log-probabilities, over HTTP."""

import json
import math
import re

import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from magistral_mlx import Regex, Reply
from tests.serving import ASK, QUESTION, Running

CHAT = "/v1/chat/completions"


class Sum(BaseModel):
    model_config = ConfigDict(extra="forbid")
    total: int = Field(ge=0, le=999)
    sure: bool


SCHEMA = {"type": "json_schema", "json_schema": {"name": "sum", "schema": Sum.model_json_schema()}}


def test_a_schema_constrains_the_answer_and_not_the_reasoning(served: Running, reply: Reply):
    message = served.post(CHAT, ASK | {"response_format": SCHEMA}).json["choices"][0]["message"]
    assert Sum.model_validate_json(message["content"])
    assert message["reasoning"] == reply.thinking
    pieces = served.post(CHAT, ASK | {"response_format": SCHEMA, "stream": True}).events
    streamed = "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces)
    assert streamed == message["content"]


def test_the_official_client_parses_a_structured_answer(served: Running):
    client = OpenAI(base_url=f"{served.url}/v1", api_key="EMPTY", max_retries=0)
    done = client.chat.completions.parse(model="any", **ASK, response_format=Sum)
    assert isinstance(done.choices[0].message.parsed, Sum)


def test_json_object_answers_with_an_object(served: Running):
    request = ASK | {"response_format": {"type": "json_object"}, "max_tokens": 300, "temperature": 0}
    choice = served.post(CHAT, request).json["choices"][0]
    assert choice["message"]["content"].startswith("{")


def test_an_answer_matches_a_regular_expression(served: Running):
    request = ASK | {"response_format": {"type": "regex", "pattern": r"[0-9]"}}
    content = served.post(CHAT, request).json["choices"][0]["message"]["content"]
    assert re.fullmatch(r"[0-9]", content)
    assert content == served.service.model.ask(QUESTION, seed=1, schema=Regex(r"[0-9]"))


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}},
        {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 200_000]}}},
        {"type": "regex", "pattern": "("},
        {"type": "poem"},
        {},
    ],
    ids=lambda response_format: str(response_format)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
def test_impossible_response_formats_are_refused(served: Running, response_format: dict, stream: bool):
    refused = served.post(CHAT, ASK | {"response_format": response_format, "stream": stream})
    assert (refused.status, refused.error["code"]) == (400, "invalid_value")


def test_a_too_large_regular_expression_is_refused(served: Running):
    request = ASK | {"response_format": {"type": "regex", "pattern": "(a{1000}){1000}"}}
    assert served.post(CHAT, request).status == 400
    last = served.post(CHAT, request | {"stream": True}).body.decode().strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "invalid_value"


def test_logprobs_cover_the_answer(served: Running):
    body = served.post(CHAT, ASK | {"logprobs": True, "top_logprobs": 3}).json
    [choice] = body["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content).endswith(choice["message"]["content"])
    for entry in content:
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        assert math.fsum(math.exp(top["logprob"]) for top in entry["top_logprobs"]) <= 1.001
    pieces = served.post(CHAT, ASK | {"logprobs": True, "top_logprobs": 3, "stream": True}).events
    streamed = [p["choices"][0]["logprobs"] for p in pieces if p["choices"][0]["delta"].get("content")]
    assert json.dumps([entry for chunk in streamed for entry in chunk["content"]]) == json.dumps(content)


def test_no_logprobs_unless_requested(served: Running):
    assert served.post(CHAT, ASK).json["choices"][0]["logprobs"] is None
