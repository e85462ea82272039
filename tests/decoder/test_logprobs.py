"""Log-probabilities against float64, and that each belongs to its id."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx import Magistral, Reply, Sampling, SamplingError, TokenLogprob
from magistral_mlx.decoder.engine import prefill
from magistral_mlx.decoder.logprobs import Scorer

QUESTION = "What is 48 + 37?"


def log_softmax(logits: Any) -> Any:
    x = np.array(logits, np.float64)
    x -= x.max()
    return x - np.log(np.exp(x).sum())


@pytest.mark.parametrize("size", [50, 1256, 131072])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_logprobs_equal_float64(size: int, spread: float, top: int):
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32) * spread
    expected, scorer = log_softmax(logits), Scorer(top)
    for token in (0, size - 1, int(logits.argmax())):
        scorer.note(token, scorer.of(mx.array(logits), mx.array(token)))
        found = scorer.last
        assert found is not None
        assert found.id == token
        assert found.logprob == pytest.approx(expected[token], abs=2e-6 * max(1, abs(expected[token])))
        order = np.argsort(-expected)[:top]
        assert [i for i, _ in found.top] == order.tolist()
        np.testing.assert_allclose([p for _, p in found.top], expected[order], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("top", [-1, 21, 1.5, True])
def test_invalid_top_is_refused(top: Any):
    with pytest.raises(SamplingError, match="logprobs"):
        Scorer(top)


def expected_logprobs(model: Magistral, reply: Reply) -> list[TokenLogprob]:
    """The log-probabilities that one pass over the whole reply gives, in float64."""

    def logits() -> Any:
        ids, caches, rows = [*reply.prompt_ids, *reply.token_ids], model.transformer.new_caches(), list[Any]()
        start = len(reply.prompt_ids)
        for end in range(start, len(ids)):
            fed = ids[:end] if end == start else ids[end - 1 : end]
            steps = prefill(model.transformer, fed, caches)
            try:
                while True:
                    next(steps)
            except StopIteration as done:
                rows.append(np.array(done.value))
        return rows

    found = list[TokenLogprob]()
    for token, row in zip(reply.token_ids, model.run(logits), strict=True):
        p = log_softmax(row)
        top = tuple((int(i), float(p[i])) for i in np.argsort(-p)[:3])
        found.append(TokenLogprob(id=token, logprob=float(p[token]), top=top))
    return found


def check(found: Any, expected: list[TokenLogprob], forced: range) -> None:
    assert len(found) == len(expected)
    for at, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours is None) == (at in forced)
        if ours is not None:
            assert ours.id == theirs.id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], abs=1e-3)


@pytest.fixture(scope="module")
def demo() -> Any:
    with Magistral.load("demo") as model:
        yield model


def forced(reply: Reply) -> range:
    end = reply.stats.thinking_tokens
    return range(end - reply.stats.forced_tokens, end)


@pytest.mark.parametrize("budget", [None, 12])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_logprobs_of_a_stream(demo: Magistral, budget: int | None, temperature: float):
    """Unfiltered, whatever the temperature; None for forced ids; aligned with the ids of the events."""
    sampling, ids = Sampling(temperature=temperature), list[int]()
    with demo.stream(
        QUESTION, seed=3, logprobs=3, think_budget=budget, sampling=sampling, max_tokens=60
    ) as stream:
        for event in stream:
            ids += event.token_ids
            assert len(stream.logprobs) >= len(ids)
    reply = stream.reply
    assert bool(reply.stats.forced_tokens) == (budget is not None)
    check(reply.logprobs, expected_logprobs(demo, reply), forced(reply))
    plain = demo.ask(QUESTION, seed=3, think_budget=budget, sampling=sampling, max_tokens=60)
    assert plain.logprobs is None
    assert plain.token_ids == reply.token_ids


def test_logprobs_of_a_batch(demo: Magistral):
    replies = demo.ask(QUESTION, n=3, seed=5, logprobs=3, think_budget=14, max_tokens=50)
    for reply in replies:
        check(reply.logprobs, expected_logprobs(demo, reply), forced(reply))
    assert len({reply.token_ids for reply in replies}) > 1


def test_logprobs_of_a_constrained_reply(demo: Magistral):
    """Of the unmasked distribution: a mask may force an id that the model finds unlikely."""
    schema = {"type": "string", "maxLength": 4}
    reply = demo.stream(QUESTION, seed=1, schema=schema, logprobs=3).drain()
    check(reply.logprobs, expected_logprobs(demo, reply), range(0))
    assert min(found.logprob for found in reply.logprobs or () if found) < -5
