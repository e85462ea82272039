"""Several replies at once say what each says alone: caches side by side, ids in step, and from outside."""

import asyncio
import gc
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx import ClosedError, Magistral, PromptError, Reply, Sampling, SamplingError
from magistral_mlx.decoder import sampling as sampling_module
from magistral_mlx.decoder.cache import KVCache, QuantizedKVCache, stacked, trim_all
from magistral_mlx.decoder.engine import Line, decode_batch
from magistral_mlx.decoder.sampling import Sampler
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.wire import Guide
from tests import models
from tests.decoder.test_cache import feed
from tests.decoder.test_engine import FORCED, MASKS, NARROW, Sent, guide, say

# ------------------------------------------------------------------ caches side by side

LENGTHS = (3, 9, 1, 9, 5)
K, D = 2, 32


def rows(L: int, seed: int, heads: int = K) -> mx.array:
    return mx.random.normal((len(LENGTHS), heads, L, D), key=mx.random.key(seed))


@pytest.mark.parametrize(
    ("new", "exact"),
    [
        (KVCache, 1e-5),
        (lambda: QuantizedKVCache(D), 1e-5),
        (lambda: QuantizedKVCache(D, after=4), 1e-1),  # packs some of them earlier than they would alone
    ],
    ids=["plain", "packed", "packed in part"],
)
def test_attention_side_by_side(new: Any, exact: float):
    """Each row sees its own past and nothing of the padding, through steps, a trim, and others leaving."""
    caches: list[KVCache] = [new() for _ in LENGTHS]
    for at, (cache, L) in enumerate(zip(caches, LENGTHS, strict=True)):
        cache.update(rows(L, 1)[at : at + 1], rows(L, 2)[at : at + 1])
    batch = stacked(caches)
    live = list(range(len(LENGTHS)))
    for step, leaves in enumerate([None, 1, None, 3, 2, None]):  # 1 and 3 are the longest
        if leaves is not None:
            batch.select([at for at, row in enumerate(live) if row != leaves])
            live.remove(leaves)
        L = 1 + step % 3
        keys, values, queries = rows(L, 10 * step), rows(L, 10 * step + 1), rows(L, 10 * step + 2, 4)
        chosen = mx.array(live)
        positions = [caches[row].offset for row in live]
        assert (mx.zeros(len(live), mx.int32) + batch.position).tolist() == positions
        found = batch.attend(queries[chosen], keys[chosen], values[chosen], 0.2)
        for at, row in enumerate(live):
            alone = slice(row, row + 1)
            expected = caches[row].attend(queries[alone], keys[alone], values[alone], 0.2)
            np.testing.assert_allclose(np.array(found[at]), np.array(expected[0]), atol=exact)
        if L > 1:
            trim_all([batch, *(caches[row] for row in live)], 1)
    assert batch.offset == max(caches[row].offset for row in live)


def test_stacking_leaves_the_single_ones_as_they_are():
    cache = KVCache()
    cache.update(rows(3, 1)[:1], rows(3, 2)[:1])
    before = np.array(cache.arrays()[0])
    batch = stacked([cache, cache])
    batch.update(rows(1, 3)[:2], rows(1, 4)[:2])
    np.testing.assert_array_equal(np.array(cache.arrays()[0]), before)
    assert (cache.offset, batch.offset, batch.position) == (3, 4, 4)


# ------------------------------------------------------------------ ids in step

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], list(range(40, 80)), [3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 8, 8]]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = replace(models.TINY, n_layers=2)
    return load(open_checkpoint(models.write_hf(tmp_path_factory.mktemp("batch"), config)), mx.float32)


def side_by_side(  # noqa: PLR0917 -- a row of each is one line
    model: Any,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[Sampler],
    limits: Sequence[int],
    sent: Sequence[Sent],
    ends: Sequence[int],
) -> list[list[int]]:
    """All ids of each; after so many drawn, those of `sent` are said in its place, and at `ends` it ends."""
    lines, singles = list[Line](), list[Sequence[KVCache]]()
    for prompt, sampler, limit in zip(prompts, samplers, limits, strict=True):
        singles.append(model.new_caches())
        logits = feed(model, prompt, singles[-1])
        lines.append(Line(prompt=prompt, logits=logits, sampler=sampler, limit=limit))
    caches = [stacked(layer) for layer in zip(*singles, strict=True)]
    ids: list[list[int]] = [[] for _ in lines]
    drawn = [0 for _ in lines]
    steps, told = decode_batch(model, lines, caches), dict[int, Any]()
    while True:
        try:
            found = steps.send(told or None)
        except StopIteration:
            return ids
        assert len({cache.offset for cache in caches}) == 1
        told = dict[int, Guide | None]()
        for number, token in found.items():
            ids[number].append(token)
            drawn[number] += 1
            if drawn[number] == ends[number]:
                told[number] = None
            elif drawn[number] in sent[number] and len(ids[number]) < limits[number]:
                told[number] = how = guide(sent[number], drawn[number])
                ids[number] += how.said


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(), NARROW, Sampling(temperature=1.5, repetition_penalty=1.4)],
    ids=["greedy", "sampled", "often unsettled", "penalty"],
)
def test_eight_side_by_side_are_eight_alone(real: Any, sampling: Sampling, monkeypatch: pytest.MonkeyPatch):
    """Prompts of all lengths, limits, ids sent in, ends: each line as if there were no other."""
    if sampling is NARROW:
        monkeypatch.setattr(sampling_module, "CANDIDATES", 1)
    prompts = [PROMPTS[at % len(PROMPTS)] for at in range(8)]
    samplers = [Sampler(sampling, 100 + at) for at in range(8)]
    limits = [14, 9, 20, 1, 14, 7, 12, 15]
    sent = [{}, {3: FORCED}, {2: [5], 5: FORCED}, {}, MASKS[0], {4: FORCED}, MASKS[1], MASKS[2]]
    ends = [99, 99, 99, 99, 99, 99, 5, 99]
    found = side_by_side(real, prompts, samplers, limits, sent, ends)
    for at in range(8):
        limit = min(limits[at], ends[at])
        expected, _ = say(real, prompts[at], samplers[at], sent[at], limit)
        assert found[at] == expected, at


@pytest.mark.parametrize("seed", range(5))
def test_any_side_by_side_are_as_alone(real: Any, seed: int, monkeypatch: pytest.MonkeyPatch):
    """Drawn at random, and often not settled at once; the longest leaves early as often as the shortest."""
    monkeypatch.setattr(sampling_module, "CANDIDATES", 1)
    rng = random.Random(seed)

    def some(most: int) -> list[int]:
        return [rng.randrange(320) for _ in range(rng.randint(1, most))]

    n = rng.randint(2, 5)
    prompts = [some(12) for _ in range(n)]
    samplers = [Sampler(NARROW, rng.getrandbits(40)) for _ in range(n)]
    limits = [rng.randint(1, 9) for _ in range(n)]
    sent = [{rng.randint(1, 9): some(4) for _ in range(rng.randint(0, 2))} for _ in range(n)]
    found = side_by_side(real, prompts, samplers, limits, sent, [99] * n)
    for at in range(n):
        assert found[at] == say(real, prompts[at], samplers[at], sent[at], limits[at])[0]


class Watching:
    """A model that notes what it is fed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fed = list[tuple[int, ...]]()

    def __call__(self, ids: mx.array, caches: Sequence[KVCache], **how: bool) -> mx.array:
        self.fed.append(ids.shape)
        return self.model(ids, caches, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def test_whoever_has_ended_leaves_and_no_pass_is_in_vain(real: Any):
    model = Watching(real)
    samplers = [Sampler(Sampling(temperature=0), 0)] * 3
    found = side_by_side(model, PROMPTS[:3], samplers, [5, 2, 9], [{}, {}, {}], [99, 99, 7])
    assert [len(ids) for ids in found] == [5, 2, 7]
    prompts, steps = model.fed[:3], model.fed[3:]
    assert [L for _, L in prompts] == [8, 1, 40]
    # One step ahead: a line is in the pass that was asked for before its last id was known.
    assert [B for B, _ in steps] == [3, 3, 2, 2, 2, 1, 1]
    model.fed.clear()
    side_by_side(model, PROMPTS[:2], samplers[:2], [4, 3], [{}, {}], [99, 99])
    assert [B for B, _ in model.fed[2:]] == [2, 2, 2]  # nobody reads on from the fourth


def test_all_may_end_at_once(real: Any):
    model = Watching(real)
    samplers = [Sampler(Sampling(), 1), Sampler(Sampling(), 2)]
    found = side_by_side(model, PROMPTS[:2], samplers, [50, 50], [{}, {}], [3, 3])
    assert [len(ids) for ids in found] == [3, 3]
    assert len(model.fed) == 2 + 3


# ------------------------------------------------------------------ from outside

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


def said(reply: Reply) -> Any:
    """A reply without what depends on the clock and the company."""
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
def test_many_questions_are_answered_as_one_by_one(demo: Magistral, options: Any):
    found = demo.ask_many(QUESTIONS, seed=20, **options)
    expected = [demo.ask(question, seed=20 + at, **options) for at, question in enumerate(QUESTIONS)]
    assert [said(reply) for reply in found] == [said(reply) for reply in expected]
    assert [reply.seed for reply in found] == [20, 21, 22, 23]
    if "think_budget" in options:
        assert sum(reply.stats.forced_tokens > 0 for reply in found) > 1
    else:
        assert {reply.finish_reason for reply in found} == {"stop"}


def test_eight_replies_to_one_question(demo: Magistral):
    found = demo.ask(QUESTIONS[1], n=8, seed=3, sampling=Sampling(temperature=2), max_tokens=25)
    expected = [
        demo.ask(QUESTIONS[1], seed=3 + at, sampling=Sampling(temperature=2), max_tokens=25)
        for at in range(8)
    ]
    assert [said(reply) for reply in found] == [said(reply) for reply in expected]
    assert len({reply.token_ids for reply in found}) > 1
    prompt = len(found[0].prompt_ids)
    assert [reply.stats.cached_tokens for reply in found] == [0] + [prompt] * 7
    assert all(reply.stats.prefill_seconds and reply.stats.decode_seconds for reply in found)


def test_no_more_at_once_than_asked_for(demo: Magistral, monkeypatch: pytest.MonkeyPatch):
    model = Watching(demo._model)
    monkeypatch.setattr(demo, "_model", model)
    found = demo.ask_many(["What is 2 + 2?"] * 5, at_once=2, seed=1, max_tokens=4)
    assert [len(reply.token_ids) for reply in found] == [4] * 5
    assert [reply.seed for reply in found] == [1, 2, 3, 4, 5]
    assert [B for B, L in model.fed if L == 1] == [2] * 6 + [1] * 3


def test_what_neighbours_share_is_read_once(demo: Magistral):
    found = demo.ask_many(QUESTIONS, max_tokens=1)
    lengths = [len(reply.prompt_ids) for reply in found]
    cached = [reply.stats.cached_tokens for reply in found]
    assert cached[0] == 0
    assert cached[2] == lengths[2]
    assert cached[1] > 40 < cached[3]


def test_one_reply_is_a_list_of_one(demo: Magistral):
    (reply,) = demo.ask(QUESTIONS[0], n=1, seed=4, max_tokens=6)
    assert said(reply) == said(demo.ask(QUESTIONS[0], seed=4, max_tokens=6))
    assert demo.ask_many([]) == []


def test_the_awaited_twins(demo: Magistral):
    async def main() -> tuple[list[Reply], list[Reply]]:
        twice = demo.aask(QUESTIONS[0], n=2, seed=4, max_tokens=6)
        many = demo.aask_many(QUESTIONS[:2], seed=4, max_tokens=6)
        return await asyncio.gather(twice, many)

    twice, many = asyncio.run(main())
    assert said(twice[0]) == said(many[0]) == said(demo.ask(QUESTIONS[0], seed=4, max_tokens=6))
    assert said(many[1]) == said(demo.ask(QUESTIONS[1], seed=5, max_tokens=6))


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
def test_mistakes_are_told(demo: Magistral, ask: Any, error: type[Exception]):
    with pytest.raises(error):
        ask(demo)


def test_a_closed_model_says_so():
    model = Magistral.load("demo")
    model.close()
    with pytest.raises(ClosedError):
        model.ask("What is 2 + 2?", n=2)


def level(model: Magistral) -> int:
    gc.collect()
    return model._worker.run(mx.get_active_memory)


def test_nothing_stays_behind_however_it_ends(demo: Magistral, monkeypatch: pytest.MonkeyPatch):
    demo.ask(QUESTIONS[0], n=2, max_tokens=2)
    before = level(demo)
    demo.ask_many(QUESTIONS, max_tokens=8)
    assert level(demo) - before < 100_000

    async def cancelled() -> None:
        task = asyncio.create_task(demo.aask_many(QUESTIONS, sampling=HOT))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert level(demo) - before < 100_000

    with monkeypatch.context() as patch:
        patch.setattr(type(demo._model), "logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            demo.ask(QUESTIONS[0], n=3)
    assert level(demo) - before < 100_000
    assert len(demo.ask(QUESTIONS[0], n=2, max_tokens=3)) == 2


def test_an_interrupt_leaves_a_usable_model(demo: Magistral):
    before = level(demo)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.ask_many(QUESTIONS * 4, sampling=HOT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert level(demo) - before < 100_000
    assert demo.ask(QUESTIONS[0], n=2, max_tokens=3)[1].token_ids
