"""Several replies decoded together are the same as one by one, and leave no memory in use."""

import asyncio
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_mlx import ClosedError, Magistral, PromptError, Regex, Reply, Sampling, SamplingError
from magistral_mlx.talk.continuous import Member
from magistral_mlx.talk.reply import ReplyBuilder
from tests.decoder.test_batch import RecordingModel

QUESTIONS = [
    "What is 2 + 2?",
    "What is 48 + 37?",
    "What is 48 + 37?",
    "Compute 12 * 3 for me, please, and tell me what it is.",
]
HOT = Sampling(temperature=1.5)


@pytest.fixture(scope="module")
def demo() -> Iterator[Magistral]:
    with Magistral.load("demo", dtype="float32") as model:
        yield model


def comparable(reply: Reply) -> Any:
    """A reply without what depends on time and on the other replies."""
    stats = replace(
        reply.stats,
        cached_tokens=0,
        prefill_seconds=0,
        thinking_seconds=0,
        answer_seconds=0,
        first_token_seconds=0,
        first_answer_seconds=0,
        peak_memory=0,
    )
    return replace(reply, stats=stats)


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": HOT, "think_budget": 6, "max_tokens": 50},
        {"sampling": Sampling(temperature=0), "stop": ["**"], "max_tokens": 60},
    ],
    ids=["budget", "stop string"],
)
def test_batched_replies_equal_single_ones(demo: Magistral, options: Any):
    found = demo.ask_many(QUESTIONS, seed=20, **options)
    expected = [demo.ask(question, seed=20 + at, **options) for at, question in enumerate(QUESTIONS)]
    assert [comparable(reply) for reply in found] == [comparable(reply) for reply in expected]
    assert [reply.seed for reply in found] == [20, 21, 22, 23]
    if "think_budget" in options:
        assert sum(reply.stats.forced_tokens > 0 for reply in found) > 1
    else:
        assert {reply.finish_reason for reply in found} == {"stop"}


SOME_QUESTIONS = [
    "Hi",
    "Hi",
    "Hi there",
    "What is 48 + 37?",
    "Compute 12 * 3 for me, please, and tell me what it is.",
]
OPTION_SETS: list[dict[str, Any]] = [
    {"sampling": HOT, "think_budget": 3, "max_tokens": 14},
    {"sampling": Sampling(repetition_penalty=1.3), "max_tokens": 8, "think": False},
    {"sampling": HOT, "logprobs": 2, "max_tokens": 5},
    {"sampling": Sampling(temperature=0), "stop": ["="], "max_tokens": 12, "system": "Be brief."},
    {"sampling": HOT, "schema": Regex("[0-9]{2,4}"), "max_tokens": 6, "think": False},
    {"max_tokens": 1},
]


@pytest.fixture(scope="module")
def alone(demo: Magistral) -> Callable[[str, int, int], Reply]:
    return cache(
        lambda question, option_set, seed: demo.stream(question, seed=seed, **OPTION_SETS[option_set]).drain()
    )


@given(
    st.lists(st.sampled_from(SOME_QUESTIONS), max_size=5),
    st.integers(0, len(OPTION_SETS) - 1),
    st.integers(1, 3),
)
@settings(max_examples=10)
def test_any_questions_and_options_equal_single_replies(
    demo: Magistral,
    alone: Callable[[str, int, int], Reply],
    questions: list[str],
    option_set: int,
    at_once: int,
):
    found = demo.ask_many(questions, seed=7, at_once=at_once, **OPTION_SETS[option_set])
    for at, (question, reply) in enumerate(zip(questions, found, strict=True)):
        expected = alone(question, option_set, 7 + at)
        assert comparable(replace(reply, logprobs=None)) == comparable(replace(expected, logprobs=None))
        for one, other in zip(reply.logprobs or (), expected.logprobs or (), strict=True):
            assert (one and one.logprob) == pytest.approx(other and other.logprob, abs=1e-4)


def test_cache_is_quantized_exactly_if_it_would_be_alone():
    """Not if the previous reply, which shares a prefix, exceeded `quantize_after`."""
    options: Any = {"sampling": HOT, "max_tokens": 16, "logprobs": 0}
    with Magistral.load("demo", dtype="float32", kv_bits=8, quantize_after=64) as model:
        found = model.ask_many(QUESTIONS, at_once=1, seed=0, **options)
        lengths = [len(reply.prompt_ids) for reply in found]
        assert min(lengths) < 64 < max(lengths)
        assert min(lengths) + 16 > 64
        for at, (question, reply) in enumerate(zip(QUESTIONS, found, strict=True)):
            expected = model.stream(question, seed=at, **options).drain()
            assert reply.token_ids == expected.token_ids
            pairs = zip(reply.logprobs or (), expected.logprobs or (), strict=True)
            assert max(abs(one.logprob - other.logprob) for one, other in pairs if one and other) < 1e-4


def test_eight_replies_to_one_question(demo: Magistral):
    found = demo.ask(QUESTIONS[1], n=8, seed=3, sampling=Sampling(temperature=2), max_tokens=25)
    expected = [
        demo.ask(QUESTIONS[1], seed=3 + at, sampling=Sampling(temperature=2), max_tokens=25)
        for at in range(8)
    ]
    assert [comparable(reply) for reply in found] == [comparable(reply) for reply in expected]
    assert len({reply.token_ids for reply in found}) > 1
    prompt = len(found[0].prompt_ids)
    assert [reply.stats.cached_tokens for reply in found] == [0] + [prompt] * 7
    assert all(reply.stats.prefill_seconds and reply.stats.decode_seconds for reply in found)


def test_at_once_limits_the_batch_size(demo: Magistral, monkeypatch: pytest.MonkeyPatch):
    model = RecordingModel(demo._model)
    monkeypatch.setattr(demo, "_model", model)
    found = demo.ask_many(["What is 2 + 2?"] * 5, at_once=2, seed=1, max_tokens=4)
    assert [len(reply.token_ids) for reply in found] == [4] * 5
    assert [reply.seed for reply in found] == [1, 2, 3, 4, 5]
    assert [B for B, L in model.shapes if L == 1] == [2] * 6 + [1] * 3


def test_next_reply_begins_when_one_ends(demo: Magistral, monkeypatch: pytest.MonkeyPatch):
    """A long reply beside short ones: none waits for it, and no more than `at_once` are active."""
    questions = ["What is 48 + 37?", *["What is 2 + 2?"] * 4]
    expected = [demo.ask(question, seed=at, think_budget=12) for at, question in enumerate(questions)]
    model = RecordingModel(demo._model)
    monkeypatch.setattr(demo, "_model", model)
    found = demo.ask_many(questions, at_once=2, seed=0, think_budget=12)
    assert [comparable(reply) for reply in found] == [comparable(reply) for reply in expected]
    passes = [B for B, L in model.shapes if L == 1]
    assert max(passes) == 2
    longest_first = sum(len(reply.token_ids) for reply in found) / 2
    assert len(passes) < 1.2 * longest_first


def test_waiting_replies_are_not_polled_at_each_iteration(demo: Magistral, monkeypatch: pytest.MonkeyPatch):
    polls = list[Member]()
    runnable = Member.runnable.fget
    monkeypatch.setattr(Member, "runnable", property(lambda member: polls.append(member) or runnable(member)))  # type: ignore[misc]
    demo.ask_many(["Hi"] * 40, at_once=1, max_tokens=1, think=False)
    assert len(polls) < 40 * 20  # not 40 in every iteration


def test_prefix_shared_by_adjacent_prompts_is_prefilled_once(demo: Magistral):
    found = demo.ask_many(QUESTIONS, max_tokens=1)
    lengths = [len(reply.prompt_ids) for reply in found]
    cached = [reply.stats.cached_tokens for reply in found]
    assert cached[0] == 0
    assert cached[2] == lengths[2]
    assert cached[1] > 40 < cached[3]


def test_n_of_one_gives_a_list_of_one(demo: Magistral):
    (reply,) = demo.ask(QUESTIONS[0], n=1, seed=4, max_tokens=6)
    assert comparable(reply) == comparable(demo.ask(QUESTIONS[0], seed=4, max_tokens=6))
    assert demo.ask_many([]) == []


def test_async_methods_equal_blocking_ones(demo: Magistral):
    async def main() -> tuple[list[Reply], list[Reply]]:
        two = demo.aask(QUESTIONS[0], n=2, seed=4, max_tokens=6)
        many = demo.aask_many(QUESTIONS[:2], seed=4, max_tokens=6)
        return await asyncio.gather(two, many)

    two, many = asyncio.run(main())
    assert (
        comparable(two[0]) == comparable(many[0]) == comparable(demo.ask(QUESTIONS[0], seed=4, max_tokens=6))
    )
    assert comparable(many[1]) == comparable(demo.ask(QUESTIONS[1], seed=5, max_tokens=6))


def test_other_streams_take_turns_with_a_batch(demo: Magistral):
    async def main() -> list[str]:
        order = list[str]()

        async def batch() -> None:
            await demo.aask(QUESTIONS[1], n=3, max_tokens=40, seed=1)
            order.append("batch")

        async def stream() -> None:
            await demo.aask(QUESTIONS[0], max_tokens=5)
            order.append("stream")

        await asyncio.gather(batch(), stream())
        return order

    assert asyncio.run(main()) == ["stream", "batch"]


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda model: model.ask("What is 2 + 2?", n=0), SamplingError),
        (lambda model: model.ask_many("What is 2 + 2?"), PromptError),
        (lambda model: model.ask_many([{"role": "user", "content": "What is 2 + 2?"}]), PromptError),
        (lambda model: model.ask_many(["What is 2 + 2?", ""]), PromptError),
        (lambda model: model.ask_many(["What is 2 + 2?"], at_once=0), SamplingError),
        (lambda model: model.ask("What is 2 + 2?", n=2, max_tokens=0), SamplingError),
        (lambda model: model.ask("What is 2 + 2?", n=2, think_budget=-1), SamplingError),
    ],
)
def test_invalid_arguments_raise(demo: Magistral, ask: Any, error: type[Exception]):
    with pytest.raises(error):
        ask(demo)


def test_closed_model_raises():
    model = Magistral.load("demo")
    model.close()
    with pytest.raises(ClosedError):
        model.ask("What is 2 + 2?", n=2)


def active_memory(model: Magistral) -> int:
    gc.collect()
    return model._worker.run(mx.get_active_memory)


def test_closing_the_model_during_a_batch_raises_once():
    begun, errors = threading.Event(), list[Exception]()

    def ask() -> None:
        try:
            model.ask_many(QUESTIONS * 50, at_once=2, sampling=HOT)
        except ClosedError as error:
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch, Magistral.load("demo") as model:
        patch.setattr(ReplyBuilder, "prefilled", lambda *_: begun.set())
        asking = threading.Thread(target=ask)
        asking.start()
        begun.wait()
        model.close()
        asking.join()
    assert len(errors) == 1


def test_the_cache_of_a_long_prompt_is_not_held_by_later_replies(
    demo: Magistral, monkeypatch: pytest.MonkeyPatch
):
    held = list[int]()
    leave = Member.leave

    def measured(member: Member) -> None:
        held.append(member.generation.prefix.nbytes)
        leave(member)

    monkeypatch.setattr(Member, "leave", measured)
    demo.ask_many(["long " * 300, "Hi", "What is 2 + 2?"], at_once=1, max_tokens=2)
    assert max(held) > 2 * held[-1]


def test_error_in_one_reply_raises_and_ends_all(demo: Magistral, monkeypatch: pytest.MonkeyPatch):
    demo.ask(QUESTIONS[0], n=2, max_tokens=2)
    before = active_memory(demo)
    add = ReplyBuilder.add

    def failing(builder: ReplyBuilder, *step: Any) -> Any:
        return 1 / 0 if builder.reply.seed == 6 else add(builder, *step)

    with monkeypatch.context() as patch:
        patch.setattr(ReplyBuilder, "add", failing)
        with pytest.raises(ZeroDivisionError):
            demo.ask_many(QUESTIONS, at_once=2, seed=5, max_tokens=4)
    assert active_memory(demo) - before < 100_000


def test_memory_is_freed_however_a_batch_ends(demo: Magistral, monkeypatch: pytest.MonkeyPatch):
    demo.ask(QUESTIONS[0], n=2, max_tokens=2)
    before = active_memory(demo)
    demo.ask_many(QUESTIONS, max_tokens=8)
    assert active_memory(demo) - before < 100_000

    async def cancelled() -> None:
        task = asyncio.create_task(demo.aask_many(QUESTIONS, sampling=HOT))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert active_memory(demo) - before < 100_000

    with monkeypatch.context() as patch:
        patch.setattr(type(demo._model), "logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            demo.ask(QUESTIONS[0], n=3)
    assert active_memory(demo) - before < 100_000
    assert len(demo.ask(QUESTIONS[0], n=2, max_tokens=3)) == 2


def test_an_interrupt_leaves_a_usable_model(demo: Magistral):
    before = active_memory(demo)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.ask_many(QUESTIONS * 4, sampling=HOT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert active_memory(demo) - before < 100_000
    assert demo.ask(QUESTIONS[0], n=2, max_tokens=3)[1].token_ids
