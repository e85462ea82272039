"""Structured answers through the public interface: with the demo model, and with random logits."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field

from magistral_mlx import AnswerError, Magistral, Regex, Sampling, SchemaError
from magistral_mlx.cli.app import cli
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.talk.worker import Worker
from magistral_mlx.text.tokenizer import Tokenizer
from tests.schemas import schema
from tests.scripted import Script, scripted

QUESTION = "What is 48 + 37?"
THINKING_TOKENS = 120
"""More tokens than reasoning takes with a budget of 30."""


class Sum(BaseModel):
    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)
    total: int = Field(ge=0, le=999)


class Noise(Script):
    """Random logits, different at each position."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        super().__init__([], tokenizer, 0.0)
        self.seed = seed

    def logits(self, h: mx.array) -> mx.array:
        at = int(h[0, -1, 0].item())
        return (
            mx.random.normal((1, 1, self.tokenizer.vocab_size), key=mx.random.key(1000 * self.seed + at)) * 4
        )


def random_logits_model(tokenizer: Tokenizer, seed: int) -> Magistral:
    checkpoint = open_checkpoint(Path(DEMO))
    config = replace(checkpoint.config, max_context=100_000, vocab_size=tokenizer.vocab_size)
    checkpoint = replace(checkpoint, config=config)
    return Magistral(checkpoint, tokenizer, Worker("noise"), Noise(tokenizer, seed))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo() -> Iterator[Magistral]:
    with Magistral.load("demo") as model:
        yield model


def check_valid(model: Magistral, seed: int) -> None:
    """An answer to a random schema, not cut off, is valid."""
    draw = random.Random(seed)
    wanted, longest = schema(draw)
    reply = model.stream(
        QUESTION,
        seed=seed,
        schema=wanted,
        think=draw.random() < 0.7,
        think_budget=30,
        max_tokens=longest + THINKING_TOKENS,
        sampling=Sampling(temperature=draw.choice([0.0, 0.7, 1.5]), top_p=draw.choice([0.95, 1.0])),
    ).drain()
    assert reply.finish_reason == "stop", (seed, wanted, reply.answer)
    jsonschema.validate(reply.parsed, wanted, format_checker=jsonschema.FormatChecker())
    assert reply.parsed == json.loads(reply.answer)


def test_answers_of_the_demo_model_are_valid(demo: Magistral):
    for seed in range(3):
        check_valid(demo, seed)


@pytest.mark.parametrize("version", ["v7", "v11", "v13"])
def test_answers_from_random_logits_are_valid(tiny_tokenizer: Callable[[str], Tokenizer], version: str):
    for seed in range(5):
        with random_logits_model(tiny_tokenizer(version), seed) as model:
            check_valid(model, seed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_300_answers_are_valid(
    demo: Magistral, tiny_tokenizer: Callable[[str], Tokenizer], full_tokenizer: Callable[[str], Tokenizer]
):
    for seed in range(150):
        check_valid(demo, seed)
    for seed in range(150):
        tokenizer = (
            full_tokenizer("v11") if seed % 10 == 0 else tiny_tokenizer(["v7", "v11", "v13"][seed % 3])
        )
        with random_logits_model(tokenizer, seed) as model:
            check_valid(model, seed)


def test_ask_returns_the_parsed_value(demo: Magistral):
    found = demo.ask(QUESTION, schema=Sum, seed=7)
    assert isinstance(found, Sum)
    quick: Any = {"seed": 7, "think": False}
    assert demo.ask(QUESTION, schema=Sum.model_json_schema(), **quick).keys() == {"a", "b", "total"}
    assert demo.ask(QUESTION, schema=Regex(r"\d\d"), **quick).isdecimal()
    assert demo.ask(QUESTION, schema=bool, **quick) in {True, False}
    stream = demo.stream(QUESTION, schema=Sum, seed=7)
    assert stream.drain().parsed == found
    assert "8+7=15" in stream.reply.thinking  # which is unconstrained


def test_thinking_is_the_same_without_a_schema(demo: Magistral):
    free = demo.ask(QUESTION, seed=5)
    held = demo.stream(QUESTION, seed=5, schema=Sum).drain()
    assert held.thinking == free.thinking


@pytest.mark.parametrize("think", [True, False])
def test_schema_that_allows_everything_changes_nothing(demo: Magistral, think: bool):
    for seed in range(2):
        free = demo.ask(QUESTION, seed=seed, think=think, max_tokens=90)
        held = demo.stream(QUESTION, seed=seed, think=think, max_tokens=90, schema=Regex("(?s:.*)")).drain()
        assert held.token_ids == free.token_ids
        assert (held.answer, held.finish_reason) == (free.answer, free.finish_reason)


def test_batched_answers_equal_single_ones(demo: Magistral):
    options: Any = {"schema": Sum, "think_budget": 20}
    together = demo.ask(QUESTION, n=2, seed=4, **options)
    alone = [demo.stream(QUESTION, seed=4 + at, **options).drain() for at in range(2)]
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]
    assert [reply.parsed for reply in together] == [reply.parsed for reply in alone]
    many = demo.ask_many([QUESTION, "12 + 5"], seed=4, **options)
    assert many[0].token_ids == alone[0].token_ids
    assert isinstance(many[1].parsed, Sum)


async def _aask(model: Magistral) -> Sum:
    return await model.aask(QUESTION, schema=Sum, seed=7, think=False)


def test_schema_in_async_calls_and_conversations(demo: Magistral, tmp_path: Path):
    import asyncio  # noqa: PLC0415

    found = demo.ask(QUESTION, schema=Sum, seed=7, think=False)
    assert asyncio.run(_aask(demo)) == found
    talk = demo.conversation(schema=Sum, seed=7, think=False)
    reply = talk.ask(QUESTION)
    assert reply.parsed == found
    assert talk.ask(QUESTION, schema=Regex("[ab]")) in {"a", "b"}
    talk.save(tmp_path / "a.talk")
    again = demo.load_conversation(tmp_path / "a.talk")
    assert isinstance(again.options.get("schema"), dict)
    assert Sum.model_validate(again.stream(QUESTION).drain().parsed)


@pytest.mark.parametrize("limit", [20, 45])
def test_parsing_an_answer_cut_off_raises(demo: Magistral, limit: int):
    with pytest.raises(AnswerError, match="max_tokens") as raised:
        demo.ask(QUESTION, schema=Sum, seed=7, max_tokens=limit)
    reply = demo.stream(QUESTION, schema=Sum, seed=7, max_tokens=limit).drain()
    assert reply.finish_reason == "length"
    assert raised.value.answer == reply.answer
    assert len(demo.ask(QUESTION, n=2, schema=Sum, seed=7, max_tokens=limit)) == 2  # only `parsed` raises


def test_parsing_a_stopped_answer_raises(demo: Magistral):
    with pytest.raises(AnswerError):
        demo.ask(QUESTION, schema=Sum, seed=7, stop="}")
    with demo.stream(QUESTION, schema=Sum, seed=7) as stream:
        next(stream)
    with pytest.raises(AnswerError, match="stopped"):
        _ = stream.reply.parsed
    with pytest.raises(AnswerError, match="schema=…"):
        _ = demo.ask(QUESTION, max_tokens=3).parsed


def test_invalid_schemas_raise_before_prefill(demo: Magistral):
    for wrong in ({"not": {}}, {"enum": []}, Regex("("), [int]):
        with pytest.raises(SchemaError):
            demo.stream(QUESTION, schema=wrong)  # type: ignore[arg-type]


def test_closing_id_that_would_begin_the_answer_is_replaced(full_tokenizer: Callable[[str], Tokenizer]):
    """`>The` would begin the answer; the next likeliest end of the tag is sampled instead."""
    tokenizer = full_tokenizer("v11")
    ids = tokenizer.encode("<think>\nso 85\n</think>The sum is 85")
    assert ">The" in map(tokenizer.decode, ([i] for i in ids))

    class Second(Script):
        def logits(self, h: mx.array) -> mx.array:
            return super().logits(h) + 50 * (mx.arange(self.tokenizer.vocab_size) == tokenizer.encode(">")[0])

    with scripted(tokenizer, ids, kind=Second) as model:
        assert model.ask("?").answer == "The sum is 85"
        reply = model.stream("?", schema=Sum, max_tokens=400).drain()
    assert isinstance(reply.parsed, Sum)
    assert reply.thinking == "so 85"


def test_schema_on_the_command_line(tmp_path: Path):
    file = tmp_path / "sum.json"
    file.write_text(json.dumps(Sum.model_json_schema()))
    ask = ["ask", "--model", "demo", "--seed", "7", "--schema", str(file), QUESTION]
    done = CliRunner().invoke(cli, ask)
    assert done.exit_code == 0
    assert Sum.model_validate_json(done.stdout)
    cut = CliRunner().invoke(cli, [*ask, "--max-tokens", "45"])
    assert cut.exit_code == 1
    assert "max_tokens" in cut.stderr
    output = json.loads(CliRunner().invoke(cli, [*ask, "--json"]).stdout)
    assert Sum.model_validate_json(output["answer"])
    for text, expected in (("[", "not JSON"), ("[]", "list"), ('{"not": {}}', "not")):
        file.write_text(text)
        wrong = CliRunner().invoke(cli, ask)
        assert wrong.exit_code != 0
        assert expected in wrong.stderr
