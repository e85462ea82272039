"""Replies in a continuous batch are the same as alone, whichever join, leave, are read slowly, or fail."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_mlx import ClosedError, Magistral, MemoryLimitError, Regex, Reply, Sampling
from magistral_mlx.talk.continuous import MAX_AHEAD, PREFILL_PIECE, ContinuousBatch, Member
from magistral_mlx.talk.stream import Stream
from tests.decoder.test_batch import RecordingModel

HOT = Sampling(temperature=1.5)
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("What is 2 + 2?", {"sampling": HOT, "think_budget": 6, "max_tokens": 24}),
    ("What is 48 + 37?", {"sampling": HOT, "max_tokens": 9}),
    ("What is 48 + 37?", {"sampling": Sampling(repetition_penalty=1.3), "max_tokens": 12, "logprobs": 2}),
    ("Compute 12 * 3 for me, please.", {"sampling": Sampling(temperature=0), "max_tokens": 20, "stop": "="}),
    ("What is 3 + 4?", {"schema": Regex("[0-9]{2,4}"), "think": False, "max_tokens": 12}),
    ("What is 3 + 4?", {"think": False}),
    ("Is 7 prime?", {"sampling": HOT, "max_tokens": 1}),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Magistral]:
    with Magistral.load("demo", dtype="float32") as model:
        yield model


@pytest.fixture(scope="module")
def alone(demo: Magistral) -> list[Reply]:
    return [
        demo.stream(question, seed=at, **request_options).drain()
        for at, (question, request_options) in enumerate(REQUESTS)
    ]


def join(model: Magistral, batch: ContinuousBatch, at: int, **more: Any) -> Stream:
    question, request_options = REQUESTS[at]
    options: Any = {"seed": at, **request_options, **more}
    return model.stream_ids(model.encode(question, **options), batch=batch, **options)


def assert_same(found: Reply, expected: Reply):
    assert found.token_ids == expected.token_ids
    assert (found.thinking, found.answer) == (expected.thinking, expected.answer)
    assert found.finish_reason == expected.finish_reason
    assert found.stats.answer_tokens == expected.stats.answer_tokens
    if expected.logprobs is not None:
        for one, other in zip(found.logprobs or (), expected.logprobs, strict=True):
            assert (one and one.logprob) == pytest.approx(other and other.logprob, abs=1e-4)


def active_memory(model: Magistral) -> int:
    gc.collect()
    return model.run(mx.get_active_memory)


# ------------------------------------------------------------------ the same ids


@given(data=st.data(), order=st.permutations(range(len(REQUESTS))))
@settings(max_examples=12)
def test_replies_are_the_same_in_any_schedule(
    demo: Magistral, alone: list[Reply], data: st.DataObject, order: list[int]
):
    """Some join while others are being decoded, one is closed, and events are read in any order."""
    batch, streams, closed = demo.new_continuous_batch(), dict[int, Stream](), list[int]()
    waiting = order[: data.draw(st.integers(2, 5))]
    while waiting or streams:
        action = data.draw(st.sampled_from(["join", "read", "read", "read", "rest", "close"]))
        if waiting and (action == "join" or not streams):
            at = waiting.pop()
            streams[at] = join(demo, batch, at)
            continue
        at = data.draw(st.sampled_from(sorted(streams)))
        stream = streams[at]
        if action == "close" and not closed:
            stream.close()
            closed.append(at)
            ids = stream.reply.token_ids
            assert ids == alone[at].token_ids[: len(ids)]
            del streams[at]
        elif action == "rest":
            assert_same(stream.drain(), alone[at])
            del streams[at]
        elif next(stream, None) is None:
            assert_same(stream.reply, alone[at])
            del streams[at]


def test_concurrent_asyncio_replies_are_the_same(demo: Magistral, alone: list[Reply]):
    async def main() -> list[Reply]:
        batch = demo.new_continuous_batch()
        return await asyncio.gather(*(join(demo, batch, at).adrain() for at in range(len(REQUESTS))))

    for found, expected in zip(asyncio.run(main()), alone, strict=True):
        assert_same(found, expected)


# ------------------------------------------------------------------ scheduling


@pytest.fixture
def recorder(demo: Magistral, monkeypatch: pytest.MonkeyPatch) -> RecordingModel:
    model = RecordingModel(demo._model)
    monkeypatch.setattr(demo, "_model", model)
    return model


def start_two(demo: Magistral, batch: ContinuousBatch, **more: Any) -> tuple[Stream, Stream]:
    """Two replies of 40 ids, started."""
    one, other = (join(demo, batch, 0, max_tokens=40, seed=seed, **more) for seed in (1, 2))
    next(one)
    next(other)
    return one, other


@contextmanager
def paused(demo: Magistral) -> Iterator[None]:
    """Hold the model's thread, so that it sees everything requested meanwhile at once."""
    reached, resumed = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        resumed.wait(60)

    demo.submit(wait)
    reached.wait(60)
    try:
        yield
    finally:
        resumed.set()


def test_two_replies_decode_in_one_pass(demo: Magistral, recorder: RecordingModel):
    batch = demo.new_continuous_batch()
    one, other = start_two(demo, batch)

    async def drained() -> list[Reply]:
        return await asyncio.gather(one.adrain(), other.adrain())

    found = asyncio.run(drained())
    alone = [len(reply.token_ids) for reply in found]
    assert len([B for B, L in recorder.shapes if L == 1]) < sum(alone) * 0.8
    assert max(B for B, _ in recorder.shapes) == 2


def test_unread_reply_delays_no_other(demo: Magistral, recorder: RecordingModel):
    slow, quick = start_two(demo, demo.new_continuous_batch())
    before = len(slow.reply.token_ids)
    assert len(quick.drain().token_ids) > 2 * MAX_AHEAD
    demo.run(lambda: None)
    assert len(slow.reply.token_ids) <= before + MAX_AHEAD + 1
    shapes = [B for B, L in recorder.shapes if L == 1]
    assert shapes[-MAX_AHEAD:] == [1] * MAX_AHEAD  # it took no part in the last passes
    slow.close()


def test_a_closed_reply_is_in_no_further_pass(demo: Magistral, recorder: RecordingModel):
    one, other = start_two(demo, demo.new_continuous_batch())
    one.close()
    demo.run(lambda: None)  # wait for the running iteration
    recorder.shapes.clear()
    other.drain()
    assert {B for B, _ in recorder.shapes} == {1}


def test_close_from_another_thread_wakes_the_reader(demo: Magistral):
    stream = join(demo, demo.new_continuous_batch(), 0)
    with paused(demo):
        stream.start()
        reading = threading.Thread(target=stream.drain, daemon=True)
        reading.start()
        reading.join(0.05)
        stream.close()
        reading.join(10)
        assert not reading.is_alive()


def test_long_prompt_is_prefilled_in_pieces_between_steps(demo: Magistral, recorder: RecordingModel):
    batch = demo.new_continuous_batch()
    one, other = start_two(demo, batch)
    prompt = [5 + at % 90 for at in range(3 * PREFILL_PIECE)]
    long = demo.stream_ids(prompt, batch=batch, max_tokens=2, seed=1)
    with paused(demo):
        recorder.shapes.clear()
        for stream in (one, other, long):
            stream.start()

    async def main() -> list[Reply]:
        return await asyncio.gather(one.adrain(), other.adrain(), long.adrain())

    asyncio.run(main())
    pieces = [at for at, (_, L) in enumerate(recorder.shapes) if L > 1]
    assert sum(recorder.shapes[at][1] for at in pieces) == len(prompt)
    assert recorder.shapes[pieces[0]] == (1, PREFILL_PIECE)  # a small piece, as others were decoded
    assert pieces[1] - pieces[0] > 1  # which continued between two pieces


def test_prompts_are_prefilled_in_turns(demo: Magistral, recorder: RecordingModel):
    """A short prompt that comes later does not wait until a long one is prefilled."""
    batch = demo.new_continuous_batch()
    others = start_two(demo, batch)
    long = demo.stream_ids([7] * 3 * PREFILL_PIECE, batch=batch, max_tokens=2, seed=1)
    short = demo.stream_ids([7] * 9, batch=batch, max_tokens=2, seed=1)
    with paused(demo):
        recorder.shapes.clear()
        for stream in (*others, long, short):
            stream.start()
    short.drain()
    assert [L for _, L in recorder.shapes if L > 1][:2] == [PREFILL_PIECE, 9]
    for stream in (long, *others):
        stream.close()


# ------------------------------------------------------------------ memory


def test_memory_not_yet_allocated_is_counted(demo: Magistral, monkeypatch: pytest.MonkeyPatch):
    """Of two prompts that fit one by one, the second is refused before the first is prefilled."""
    guard, batch, prompt = demo._guard, demo.new_continuous_batch(), [7] * 300
    needs = guard.kv(len(prompt))
    # Other tests' models share the process: their memory must not affect this test.
    monkeypatch.setattr(mx, "get_active_memory", lambda: guard.weights)
    plan = replace(guard._plan, context=len(prompt))
    machine = replace(plan.machine, budget=plan.total + needs // 2)
    monkeypatch.setattr(guard, "_plan", replace(guard._plan, machine=machine))
    with demo.stream_ids(prompt, batch=batch, max_tokens=3) as stream:
        assert batch.unallocated == needs
        with pytest.raises(MemoryLimitError, match="300 tokens"):
            demo.stream_ids(prompt, batch=batch, max_tokens=3)
        next(stream)
        assert batch.unallocated == 0  # it is allocated now, and counted as such


def test_memory_is_freed_however_replies_end(demo: Magistral):
    batch = demo.new_continuous_batch()
    for stream in start_two(demo, batch):
        stream.close()
    before = active_memory(demo)
    for _ in range(3):
        one, other = start_two(demo, batch)
        one.drain()
        other.close()
        del one, other
    assert active_memory(demo) - before <= 2**20


# ------------------------------------------------------------------ errors


def test_error_in_one_reply_affects_only_that_reply(
    demo: Magistral, alone: list[Reply], monkeypatch: pytest.MonkeyPatch
):
    batch = demo.new_continuous_batch()
    good, bad = join(demo, batch, 1), join(demo, batch, 0)
    next(bad)
    next(good)
    monkeypatch.setattr(bad._builder, "add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bad.drain()
    assert not bad.is_open
    assert_same(good.drain(), alone[1])
    assert_same(join(demo, batch, 0).drain(), alone[0])


def test_interrupted_close_can_be_repeated(demo: Magistral, monkeypatch: pytest.MonkeyPatch):
    stream, other = start_two(demo, demo.new_continuous_batch())
    other.close()
    with monkeypatch.context() as patch:
        patch.setattr(Member, "leave", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            stream.close()
    assert stream.is_open  # so that closing it again ends it
    stream.close()
    assert not stream.is_open


def test_error_in_the_pass_is_raised_in_all_replies(demo: Magistral, alone: list[Reply]):
    batch = demo.new_continuous_batch()
    streams = start_two(demo, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(demo._model), "logits", lambda *_: 1 / 0)
        for stream in streams:
            with pytest.raises(ZeroDivisionError):
                stream.drain()
    assert_same(join(demo, batch, 0).drain(), alone[0])


def test_closed_model_raises():
    model = Magistral.load("demo")
    batch = model.new_continuous_batch()
    streams = start_two(model, batch)
    model.close()
    for stream in streams:
        with pytest.raises(ClosedError):
            stream.drain()
