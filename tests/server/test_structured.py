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


def test_a_schema_holds_the_answer_and_leaves_the_reasoning_free(served: Running, reply: Reply):
    message = served.post(CHAT, ASK | {"response_format": SCHEMA}).json["choices"][0]["message"]
    assert Sum.model_validate_json(message["content"])
    assert message["reasoning"] == reply.thinking
    pieces = served.post(CHAT, ASK | {"response_format": SCHEMA, "stream": True}).events
    streamed = "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces)
    assert streamed == message["content"]


def test_the_official_client_parses_it(served: Running):
    client = OpenAI(base_url=f"{served.url}/v1", api_key="EMPTY", max_retries=0)
    done = client.chat.completions.parse(model="any", **ASK, response_format=Sum)
    assert isinstance(done.choices[0].message.parsed, Sum)


def test_any_object(served: Running):
    asked = ASK | {"response_format": {"type": "json_object"}, "max_tokens": 300, "temperature": 0}
    choice = served.post(CHAT, asked).json["choices"][0]
    assert choice["message"]["content"].startswith("{")


def test_a_pattern(served: Running):
    asked = ASK | {"response_format": {"type": "regex", "pattern": r"[0-9]"}}
    content = served.post(CHAT, asked).json["choices"][0]["message"]["content"]
    assert re.fullmatch(r"[0-9]", content)
    assert content == served.service.model.ask(QUESTION, seed=1, schema=Regex(r"[0-9]"))


@pytest.mark.parametrize(
    "shape",
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
    ids=lambda shape: str(shape)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
def test_shapes_that_nothing_can_follow(served: Running, shape: dict, stream: bool):
    refused = served.post(CHAT, ASK | {"response_format": shape, "stream": stream})
    assert (refused.status, refused.error["code"]) == (400, "invalid_value")


def test_a_pattern_that_becomes_too_much(served: Running):
    asked = ASK | {"response_format": {"type": "regex", "pattern": "(a{1000}){1000}"}}
    assert served.post(CHAT, asked).status == 400
    last = served.post(CHAT, asked | {"stream": True}).body.decode().strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "invalid_value"


def test_logprobs(served: Running):
    body = served.post(CHAT, ASK | {"logprobs": True, "top_logprobs": 3}).json
    [choice] = body["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content).endswith(choice["message"]["content"])
    for one in content:
        assert bytes(one["bytes"]).decode(errors="replace") == one["token"]
        assert one["logprob"] <= 0
        assert len(one["top_logprobs"]) == 3
        assert math.fsum(math.exp(top["logprob"]) for top in one["top_logprobs"]) <= 1.001
    pieces = served.post(CHAT, ASK | {"logprobs": True, "top_logprobs": 3, "stream": True}).events
    told = [p["choices"][0]["logprobs"] for p in pieces if p["choices"][0]["delta"].get("content")]
    assert json.dumps([one for each in told for one in each["content"]]) == json.dumps(content)


def test_no_logprobs_unless_asked_for(served: Running):
    assert served.post(CHAT, ASK).json["choices"][0]["logprobs"] is None
