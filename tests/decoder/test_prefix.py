"""Prefix reuse changes nothing but the time.

Always against a fresh run: logits where the caches are accessible, ids where there is a reply.
"""

import asyncio
import contextlib
import functools
import gc
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_mlx import AnswerToken, Magistral, Reply, Sampling
from magistral_mlx.chat import Conversation
from magistral_mlx.decoder import engine
from magistral_mlx.decoder.model import Block, Transformer
from magistral_mlx.decoder.prefix import Prefix
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.talk.worker import Worker
from magistral_mlx.text.tokenizer import Tokenizer
from tests import models
from tests.decoder.test_cache import feed
from tests.scripted import scripted
from tests.tokenizers import CONTROLS

Open = Callable[[str], Tokenizer]
GREEDY = Sampling(temperature=0)
WORDS = ("one", "two,", "three", "48 + 37", "그리고", "then?", "x = 3.14")


def random_magistral(directory: Path, tokenizer: Tokenizer) -> Magistral:
    """A real `Magistral` with random weights of two layers; it never samples a control token."""
    config = replace(
        models.TINY,
        vocab_size=tokenizer.vocab_size,
        dim=96,
        n_layers=2,
        n_heads=4,
        n_kv_heads=1,
        hidden_dim=128,
    )
    checkpoint = open_checkpoint(models.write_hf(directory, config))
    worker = Worker("tiny")
    model = worker.run(lambda: load(checkpoint, mx.float32))

    def logits(h: mx.array, head: Callable[[mx.array], mx.array] = model.logits) -> mx.array:
        return mx.where(mx.arange(tokenizer.vocab_size) < CONTROLS, -20.0, head(h))

    model.logits = logits  # type: ignore[method-assign]
    return Magistral(checkpoint, tokenizer, worker, model)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Open) -> Iterator[Magistral]:
    with random_magistral(tmp_path_factory.mktemp("prefix"), tiny_tokenizer("v11")) as model:
        yield model


@pytest.fixture(scope="module")
def demo() -> Iterator[Magistral]:
    with Magistral.load("demo", dtype="float32") as model:
        yield model


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    config = replace(models.TINY, n_layers=2, dim=96, n_heads=4, n_kv_heads=1, hidden_dim=128)
    return load(open_checkpoint(models.write_hf(tmp_path_factory.mktemp("bare"), config)), mx.float32)


# ------------------------------------------------------------------ logits


def prefill(model: Transformer, prefix: Prefix, prompt: Sequence[int]) -> mx.array:
    """The last logits of `prompt`, feeding only what the prefix does not hold."""
    before = prefix.rewind(prompt)
    assert 0 <= before < len(prompt)
    assert {cache.offset for cache in prefix.caches} == {before}
    logits = feed(model, prompt[before:], prefix.caches)
    assert {cache.offset for cache in prefix.caches} == {len(prompt)}
    return logits


def assert_fresh(model: Transformer, logits: mx.array, prompt: Sequence[int]) -> None:
    expected = np.array(feed(model, prompt, model.new_caches()))
    assert np.abs(np.array(logits) - expected).max() <= 1e-4 * np.abs(expected).max()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


IDS = np.random.default_rng(5).integers(0, 320, size=300).tolist()


@pytest.mark.parametrize(
    ("second", "reused"),
    [
        (IDS[:60], 59),  # equal: the last id is fed again
        (IDS[:61], 60),
        (IDS[:25], 24),  # shorter
        (IDS[:1], 0),
        ([IDS[0] ^ 1, *IDS[1:60]], 0),  # different from the first id on
        ([*IDS[:30], IDS[30] ^ 1, *IDS[31:300]], 30),  # beyond a step of the cache
        ([*IDS[:59], IDS[59] ^ 1], 59),
    ],
)
def test_rewind_keeps_exactly_the_common_prefix(transformer: Transformer, second: list[int], reused: int):
    prefix = Prefix(transformer.new_caches())
    assert prefix.rewind(IDS[:60]) == 0
    feed(transformer, IDS[:60], prefix.caches)
    assert prefix.fork().rewind(second) == reused
    assert_fresh(transformer, prefill(transformer, prefix, second), second)


@given(st.data())
@settings(max_examples=25)
def test_any_sequence_of_prompts_and_forks(transformer: Transformer, data: st.DataObject):
    """Each prompt differs from the previous one somewhere; exactly what differs is fed."""
    prefixes = [Prefix(transformer.new_caches())]
    prompts: list[list[int]] = [[]]
    for _ in range(data.draw(st.integers(2, 5), label="turns")):
        at = data.draw(st.integers(0, len(prefixes) - 1), label="which")
        if data.draw(st.booleans(), label="fork"):
            prefixes.append(prefixes[at].fork())
            prompts.append(prompts[at])
        kept = prompts[at][: data.draw(st.integers(0, len(prompts[at])), label="kept")]
        prompt = kept + data.draw(st.lists(st.integers(0, 319), min_size=1, max_size=40), label="new")
        expected = min(common(prompts[at], prompt), len(prompt) - 1)
        assert prefixes[at].fork().rewind(prompt) == expected
        assert_fresh(transformer, prefill(transformer, prefixes[at], prompt), prompt)
        prompts[at] = prompt
    for prefix, prompt in zip(prefixes, prompts, strict=True):
        if prompt:  # it does not see what other forks wrote since
            assert_fresh(transformer, prefill(transformer, prefix, [*prompt, 7]), [*prompt, 7])


def test_part_of_a_prompt_is_reused(transformer: Transformer):
    prefix = Prefix(transformer.new_caches())
    prefix.rewind(IDS[:100])
    steps = engine.prefill(transformer, IDS[:100], prefix.caches, chunk=30)
    assert [next(steps), next(steps)] == [30, 60]
    steps.close()
    assert prefix.fork().rewind(IDS[:100]) == 60
    assert_fresh(transformer, prefill(transformer, prefix, IDS[:100]), IDS[:100])


def test_layers_of_unequal_length_after_an_error(transformer: Transformer):
    prefix = Prefix(transformer.new_caches())
    prefill(transformer, prefix, IDS[:40])
    transformer.blocks[0](
        mx.zeros((1, 3, transformer.config.dim)), prefix.caches[0]
    )  # the first layer is ahead
    assert_fresh(transformer, prefill(transformer, prefix, IDS[:50]), IDS[:50])


# ------------------------------------------------------------------ conversations


def assert_as_fresh(model: Magistral, reply: Reply, **options: Any) -> None:
    """The reply equals one to its prompt without a prefix."""
    stream = model.stream_ids(reply.prompt_ids, seed=reply.seed, **options)
    for _ in stream:
        pass
    assert stream.reply.stats.cached_tokens == 0
    assert stream.reply.token_ids == reply.token_ids


def ask_turns(model: Magistral, talk: Conversation, turns: int, **options: Any) -> list[Reply]:
    """Turns that each prefill no more than necessary, and give the ids of a fresh run."""
    draw, replies = random.Random(turns), list[Reply]()
    encode = model.tokenizer.encode
    for turn in range(turns):
        message = " ".join(draw.choices(WORDS, k=draw.randrange(1, 12)))
        reply = talk.ask(message, **options)
        if replies:
            template = (
                2 + 2
            )  # [INST], [/INST]; the end of the answer; an id that merges differently at the seam
            new = len(encode(message)) + len(encode(replies[-1].answer)) + template
            assert reply.stats.prompt_tokens - reply.stats.cached_tokens <= new, turn
            assert reply.stats.cached_tokens >= len(replies[-1].prompt_ids)
        if turn in (1, 2, turns - 1):
            assert_as_fresh(model, reply, **options)
        replies.append(reply)
    return replies


@pytest.mark.parametrize(("keep", "sampling"), [(True, Sampling()), (False, GREEDY)])
def test_ten_turns_of_a_random_model_equal_fresh_runs(tiny: Magistral, keep: bool, sampling: Sampling):
    options = {"sampling": sampling, "max_tokens": 50, "think": False}
    replies = ask_turns(tiny, tiny.conversation(keep_thinking=keep), 10, **options)
    assert all(len(reply.token_ids) == 50 for reply in replies)


@pytest.mark.parametrize("keep", [True, False])
def test_turns_of_the_demo_equal_fresh_runs(demo: Magistral, keep: bool):
    options = {"sampling": GREEDY, "max_tokens": 60, "think_budget": 12}
    replies = ask_turns(demo, demo.conversation(keep_thinking=keep), 3, **options)
    assert any(reply.thinking for reply in replies)


@pytest.mark.parametrize("version", ["v11", "v13"])
@pytest.mark.parametrize("keep", [True, False])
def test_ten_turns_with_reasoning_equal_fresh_runs(tiny_tokenizer: Open, keep: bool, version: str):
    """Dropped reasoning lies after the point to which the cache is trimmed; kept reasoning is cached."""
    tokenizer = tiny_tokenizer(version)
    thought = "and so on " * 6
    reply_ids = tokenizer.encode(f"<think>\n{thought}\n</think>\n한 answer.")
    if version == "v13":
        reply_ids = [34, *tokenizer.encode(thought), 35, *tokenizer.encode("한 answer.")]
    with scripted(tokenizer, reply_ids) as model:
        replies = ask_turns(model, model.conversation(keep_thinking=keep), 10)
        assert {reply.answer for reply in replies} == {"한 answer."}


@pytest.mark.parametrize("keep", [True, False])
def test_logits_of_ten_turns_equal_fresh_runs(tiny: Magistral, keep: bool):
    """To 1e-4 of their scale, at the end of every prompt."""
    talk = tiny.conversation(keep_thinking=keep, sampling=GREEDY, max_tokens=12, think=False)
    model, checked = tiny.transformer, 0

    def check(twin: Prefix, prompt: list[int]) -> None:
        assert twin.fork().rewind(prompt) > 0
        assert_fresh(model, prefill(model, twin, prompt), prompt)

    for turn in range(10):
        message = f"turn {turn} of ten"
        if talk._prefix:
            tiny.run(functools.partial(check, talk._prefix.fork(), talk._prompt(message, talk.options)))
            checked += 1
        talk.ask(message)
    assert checked == 9


OPTIONS = {"sampling": GREEDY, "max_tokens": 20, "think": False}
"""Without the system prompt, which is long in ids of one byte."""


def begin(model: Magistral, *messages: str) -> Conversation:
    talk = model.conversation(**OPTIONS)
    for message in messages:
        talk.ask(message)
    return talk


def test_edit_undo_retry_and_reset(tiny: Magistral):
    talk = begin(tiny, "one", "two")
    second = tiny.ask([*talk.messages[:2], {"role": "user", "content": "two"}], **OPTIONS)
    assert talk.undo() == "two"
    assert talk.ask("two").token_ids == second.token_ids  # again
    talk.undo()
    for message in ("another", "other still, and longer"):  # edited
        reply = talk.ask(message)
        assert reply.stats.cached_tokens > 0
        assert_as_fresh(tiny, reply, **OPTIONS)
    while talk.undo():
        pass
    assert_as_fresh(tiny, talk.ask("three"), **OPTIONS)
    talk.reset()
    reply = talk.ask("one")
    assert reply.stats.cached_tokens == 0
    assert_as_fresh(tiny, reply, **OPTIONS)


@pytest.mark.parametrize("first", [0, 1])
def test_both_sides_of_a_fork_continue(tiny: Magistral, first: int):
    talk = begin(tiny, "one", "two")
    both = [talk, talk.fork()]
    for turn in range(3):
        for at in (first, 1 - first):
            reply = both[at].ask(f"branch {at}, turn {turn}")
            assert reply.stats.cached_tokens > 20
            assert_as_fresh(tiny, reply, **OPTIONS)
    assert len(talk.messages) == len(both[1].messages) == 10
    assert talk.messages != both[1].messages


def test_fork_waits_for_the_running_step_of_a_closed_stream(tiny: Magistral, monkeypatch: pytest.MonkeyPatch):
    """In mid-step the layers hold unequal numbers of ids: no fork may be taken then."""
    talk = begin(tiny, "one")
    stream = talk.stream("two")
    list(islice(stream, 2))
    reached, resume = threading.Event(), threading.Event()
    second, original = tiny._model.blocks[1], Block.__call__  # type: ignore[union-attr]

    def halting(block: Block, *args: Any, **options: Any) -> mx.array:
        if block is second:
            reached.set()
            resume.wait()
        return original(block, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "__call__", halting)
        stream._request_step()
        reached.wait()
        stream.close()
        forks: list[Conversation] = []
        thread = threading.Thread(target=lambda: forks.append(talk.fork()))
        thread.start()
        thread.join(0.2)  # it would have finished by now if it did not wait
        resume.set()
        thread.join()
    prefix = forks[0]._prefix
    assert prefix is not None
    assert len({cache.offset for cache in prefix.caches}) == 1
    assert prefix.length == prefix.caches[0].offset
    for one in (talk, forks[0]):
        assert_as_fresh(tiny, one.ask("three"), **OPTIONS)


def test_two_streams_of_one_conversation(tiny: Magistral):
    """The second has nothing to reuse while the first is open; each gives the ids it gives alone."""
    talk = begin(tiny, "one")
    streams = [talk.stream("two"), talk.stream("three")]
    left = list(streams)
    while left:
        left = [stream for stream in left if next(stream, None)]
    assert [stream.reply.stats.cached_tokens > 0 for stream in streams] == [True, False]
    for reply in [*(stream.reply for stream in streams), talk.ask("four")]:
        assert_as_fresh(tiny, reply, **OPTIONS)
    assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["one", "two", "three", "four"]


def test_abandoned_stream_drops_its_prefix(tiny: Magistral):
    talk = begin(tiny, "one")
    for at in (0, 1, 5):
        stream = talk.stream("never read to its end")
        list(islice(stream, at))
        del stream
        reply = talk.ask("two")
        assert reply.stats.cached_tokens == 0
        assert_as_fresh(tiny, reply, **OPTIONS)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("seconds", [0.0, 0.002, 0.01])
def test_close_during_prefill_from_another_thread(tiny: Magistral, seconds: float):
    """From another thread, at any point."""
    talk = begin(tiny, "one")
    stream = talk.stream("word " * 80, max_tokens=1)
    threading.Timer(seconds, stream.close).start()
    list(stream)
    for message in ("word " * 70, "word " * 80):
        assert_as_fresh(tiny, talk.ask(message), **OPTIONS)


@pytest.mark.usefixtures("small_chunks")
def test_close_during_prefill_keeps_what_was_prefilled(tiny: Magistral):
    """Step by step: what was prefilled by then is not prefilled again."""
    talk = begin(tiny, "one")
    before = 0
    for steps in (1, 3, 6):
        stream = talk.stream("word " * 100)
        for _ in range(steps):
            step = stream._request_step()
            assert step
            stream._receive(step)
        stream.close()
        assert not stream.reply.token_ids
        assert len(talk.messages) == 2
        assert before <= stream.reply.stats.cached_tokens
        before = stream.reply.stats.cached_tokens
    assert before > 60
    assert_as_fresh(tiny, talk.ask("word " * 100), **OPTIONS)


@pytest.mark.parametrize("keep", [True, False])
def test_close_between_two_ids_keeps_the_prefix(tiny: Magistral, keep: bool):
    talk = tiny.conversation(keep_thinking=keep, **OPTIONS)
    for at in (1, 2, 7, 11):
        with talk.stream(f"message {at}", max_tokens=40) as stream:
            list(islice(stream, at))
        assert stream.reply.finish_reason == "cancelled"
        reply = talk.ask("and?")
        assert reply.stats.cached_tokens >= len(stream.reply.prompt_ids)
        assert_as_fresh(tiny, reply, **OPTIONS)


@pytest.mark.parametrize("where", ["prompt", "first id", "later"])
def test_replies_after_an_error_equal_fresh_runs(
    tiny: Magistral, monkeypatch: pytest.MonkeyPatch, where: str
):
    """The second layer fails, after the first one has written."""
    talk = begin(tiny, "one")
    stream = talk.stream("two")
    list(islice(stream, {"prompt": 0, "first id": 1, "later": 6}[where]))
    broken, original = tiny._model.blocks[1], Block.__call__  # type: ignore[union-attr]

    def fail(block: Block, *args: Any, **options: Any) -> mx.array:
        if block is broken:
            raise MemoryError
        return original(block, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "__call__", fail)
        with pytest.raises(MemoryError):
            list(stream)
    assert stream.reply.finish_reason == "cancelled"
    for message in ("two", "three"):
        assert_as_fresh(tiny, talk.ask(message), **OPTIONS)


# ------------------------------------------------------------------ early ends, and memory afterwards


class ConsumerError(Exception):
    """The consumer's own."""


def end_early(talk: Conversation, way: str, at: int, draw: random.Random) -> None:
    """A stream that ends early in one of several ways."""
    stream = talk.stream("word " * draw.randrange(1, 12))
    if way == "abandon":
        list(islice(stream, at))
    elif way == "close":
        with stream:
            list(islice(stream, at))
    elif way == "raise":
        with contextlib.suppress(ConsumerError), stream:
            for number, _ in enumerate(stream):
                if number == at:
                    raise ConsumerError
    elif way == "cancel":

        async def main() -> None:
            async def consume() -> None:
                async with stream:
                    async for _ in stream:
                        await asyncio.sleep(0)

            task = asyncio.create_task(consume())
            await asyncio.sleep(draw.random() * 0.03)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())
    else:
        with contextlib.suppress(KeyboardInterrupt), stream:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + draw.random() * 0.03)
            list(stream)
            time.sleep(1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("points", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_streams_ended_at_random_points_free_their_memory(tiny: Magistral, points: int):
    """However a stream ends, its memory is released, and the next reply is right."""
    draw = random.Random(points)
    expected = tiny.ask("and now?", **OPTIONS).token_ids
    gc.collect()
    before, highest = mx.get_active_memory(), 0
    interrupts = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        for number in range(points):
            way = ("abandon", "close", "raise", "cancel", "interrupt")[number % 5]
            talk = begin(tiny, "one") if number % 20 == 0 else tiny.conversation(**OPTIONS)
            end_early(talk, way, draw.randrange(0, 19), draw)
            highest = max(highest, mx.get_active_memory())
            if number % 23 == 0:
                assert_as_fresh(tiny, talk.ask("go on"), **OPTIONS)
            del talk
            if number % 20 >= 15:
                gc.collect()
                assert mx.get_active_memory() - before <= 1_000_000
    finally:
        signal.signal(signal.SIGALRM, interrupts)
    gc.collect()
    assert highest - before > 100_000, "nothing was allocated that could leak"
    assert mx.get_active_memory() - before <= 1_000_000
    assert tiny.ask("and now?", **OPTIONS).token_ids == expected


# ------------------------------------------------------------------ concurrency


def test_ten_threads_take_fair_turns(tiny_tokenizer: Open):
    """When the first one is done, every other one has at least half of its ids."""
    with scripted(tiny_tokenizer("v11"), "a" * 40, step_seconds=0.002) as model:
        counts, at_first_end = [0] * 10, list[int]()
        together = threading.Barrier(10)

        def consume(number: int) -> None:
            stream = model.conversation().stream("?")
            together.wait()
            for event in stream:
                counts[number] += isinstance(event, AnswerToken)
            if not at_first_end:
                at_first_end.extend(counts)

        threads = [threading.Thread(target=consume, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counts == [40] * 10
    assert min(at_first_end) >= 20


def test_blocking_and_async_replies_in_a_running_event_loop(tiny: Magistral):
    """As in a notebook: a blocking call in a thread, streams beside it, one inside of another."""
    options = {"sampling": GREEDY, "max_tokens": 8, "think": False}
    alone = tiny.ask("one", **options)

    async def main() -> list[Reply]:
        talk = tiny.conversation(**options)
        blocking = asyncio.create_task(asyncio.to_thread(tiny.ask, "one", **options))
        async with talk.astream("one") as outer:
            async for _ in outer:
                inner = tiny.astream("one", sampling=GREEDY, max_tokens=3, think=False)
                async for _ in inner:
                    pass
                assert inner.reply.token_ids == alone.token_ids[:3]
        plain = tiny.ask("one", **options)  # blocks the event loop, and must not need it
        return [await blocking, outer.reply, plain]

    assert [reply.token_ids for reply in asyncio.run(main())] == [alone.token_ids] * 3
