"""Speculation changes when ids come, never which: against the plain loop, whatever is drafted."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_mlx import CheckpointError, Magistral, Sampling
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.decoder import pace, prefix
from magistral_mlx.decoder import sampling as sampling_module
from magistral_mlx.decoder.cache import KVCache, side_by_side, trim_all
from magistral_mlx.decoder.drafts import Drafter, PromptLookup
from magistral_mlx.decoder.engine import decode
from magistral_mlx.decoder.pace import MOST, Pace
from magistral_mlx.decoder.sampling import Sampler
from magistral_mlx.decoder.speculation import Speculation
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.structured.grammar import Regex
from magistral_mlx.text.sidecars import files
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.wire import Guide
from tests import models
from tests.decoder.test_engine import NARROW, PROMPT, FakeModel, V, cached_ids, start
from tests.decoder.test_sampling import reference_nucleus
from tests.scripted import scripted

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from demo_problems import held_out_problems

GREEDY = Sampling(temperature=0)
FORCED = [7, 3, 11, 11, 2]


class FixedPace(Pace):
    """Drafts as many ids as the test sets, whatever the cost."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.counts = cycle(counts)

    def best(self, chance: float, most: int = MOST) -> int:
        return min(next(self.counts), most) if chance else 0


class OracleDrafter:
    """Drafts the true ids, each with probability `right`, otherwise a wrong one."""

    def __init__(self, truth: Sequence[int], right: float, seed: int = 0) -> None:
        self.truth = truth
        self.right = right
        self.ids = list[int]()
        self.rng = np.random.default_rng(seed)

    def extend(self, ids: Sequence[int]) -> None:
        self.ids += ids

    def rewind(self, n: int) -> None:
        del self.ids[len(self.ids) - n :]

    def chance(self) -> float:
        return 0.5

    def propose(self, most: int) -> mx.array | None:
        follows = [*self.truth[len(self.ids) :], *[0] * most][:most]
        return mx.array([id_ if self.rng.random() < self.right else (id_ + 1) % V for id_ in follows])


def generate(
    decode: Callable[..., Any],
    model: Any,
    sampler: Sampler,
    limit: int,
    forced_after: dict[int, list[int]] | None = None,
    *,
    check: Callable[[list[int], list[KVCache]], None] = lambda *_: None,
) -> tuple[list[int], list[KVCache]]:
    """All ids of a reply; those of `forced_after` are forced, by number of sampled ids."""
    logits, caches = start(model, PROMPT)
    ids, sampled, guide = list[int](), 0, None
    steps = decode(model, logits, caches, sampler=sampler, prompt=PROMPT, limit=limit)
    while True:
        try:
            ids.append(steps.send(guide))
        except StopIteration:
            return ids, caches
        check(ids, caches)
        sampled += 1
        forced = (forced_after or {}).get(sampled, [])
        guide = Guide(forced=forced) if forced else None
        if len(ids) < limit:
            ids += forced


def speculative(drafter: Drafter, *counts: int) -> Callable[..., Any]:
    return Speculation(drafter, FixedPace(*counts)).decode


SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": Sampling(),
    "often unsettled": NARROW,
    "penalty": replace(NARROW, repetition_penalty=1.5),
    "all": Sampling(temperature=2, top_p=1.0),
}


@given(
    seed=st.integers(0, 2**40),
    sampling=st.sampled_from([*SAMPLINGS.values()]),
    counts=st.lists(st.integers(0, MOST), min_size=1, max_size=6),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    forced_after=st.dictionaries(
        st.integers(1, 9), st.lists(st.integers(0, V - 1), min_size=1, max_size=6), max_size=3
    ),
    limit=st.integers(0, 20),
)
@settings(max_examples=25)
def test_ids_are_the_same_whatever_is_drafted(  # noqa: PLR0917 -- hypothesis passes them by name
    seed: int,
    sampling: Sampling,
    counts: list[int],
    right: float,
    forced_after: dict[int, list[int]],
    limit: int,
):
    """Also if ids are forced or the limit is reached amid a draft; the caches hold the ids so far."""

    def check(ids: list[int], caches: list[KVCache]) -> None:
        assert drafter.ids[: len(ids)] == ids
        for cache in caches:
            ids_so_far = [*PROMPT, *ids][: cache.offset]
            assert cached_ids(cache)[: len(ids_so_far)] == ids_so_far
            assert (
                len(PROMPT) + len(ids) - 1
                <= cache.offset
                <= len(PROMPT) + limit + sum(map(len, forced_after.values()))
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "CANDIDATES", 1)
        expected, _ = generate(decode, FakeModel(), Sampler(sampling, seed), limit, forced_after)
        drafter = OracleDrafter(expected, right, seed)
        found, _ = generate(
            speculative(drafter, *counts),
            FakeModel(),
            Sampler(sampling, seed),
            limit,
            forced_after,
            check=check,
        )
    assert found == expected


@given(
    ticks=st.lists(st.floats(0, 1), min_size=1, max_size=40),
    seed=st.integers(0, 2**40),
    period=st.integers(1, 9),
)
@settings(max_examples=10)
def test_ids_are_the_same_whatever_the_timings(ticks: list[float], seed: int, period: int):
    """The real pace with a made-up clock; look-ups find many matches in a repetitive reply."""
    at, steps = 0.0, cycle(ticks)

    def clock() -> float:
        nonlocal at
        at += next(steps)
        return at

    sampler = Sampler(Sampling(temperature=0.4, top_p=1), seed)
    expected, _ = generate(decode, PeriodicModel(period), sampler, 40)
    speculation = Speculation(PromptLookup(PROMPT), Pace(), clock)
    found, _ = generate(speculation.decode, PeriodicModel(period), sampler, 40)
    assert found == expected
    assert math.ceil(40 / (MOST + 1)) <= speculation.passes <= 40


class PeriodicModel(FakeModel):
    """Tends to repeat the id `period` positions before."""

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period

    def __call__(self, ids: mx.array, caches: Sequence[KVCache], *, last: bool = False) -> mx.array:
        k = ids.astype(mx.float32).reshape(1, 1, -1, 1)
        for cache in caches:
            cache.update(k, k)
        past = cached_ids(caches[0])
        ends = range(len(past) - ids.shape[1], len(past))
        hidden = mx.array([past[max(end + 1 - self.period, 0)] for end in ends]).reshape(1, -1, 1)
        return hidden[:, -1:] if last else hidden

    def logits(self, h: mx.array) -> mx.array:
        return mx.where(mx.arange(V) == h, 3.0, self.table[h[..., 0] % 97] * 0.3)


def test_passes_if_every_draft_is_right():
    model = FakeModel()
    expected, _ = generate(decode, model, Sampler(GREEDY, 0), 22)
    speculation = Speculation(OracleDrafter(expected, 1.0), FixedPace(4))
    model.calls.clear()
    found, caches = generate(speculation.decode, model, Sampler(GREEDY, 0), 22)
    assert found == expected
    # The first id follows the prompt; then five per pass, as long as the limit allows five.
    assert model.calls == [len(PROMPT), 5, 5, 5, 5, 1]
    assert speculation.passes == 6
    assert cached_ids(caches[0]) == [*PROMPT, *found[:-1]]


def test_passes_if_every_draft_is_wrong():
    model = FakeModel()
    expected, _ = generate(decode, model, Sampler(Sampling(), 1), 12)
    speculation = Speculation(OracleDrafter(expected, 0.0), FixedPace(3))
    found, _ = generate(speculation.decode, model, Sampler(Sampling(), 1), 12)
    assert found == expected
    assert speculation.passes == 12  # never more than without


def test_without_drafts_passes_equal_plain_decoding():
    """The same calls as the plain loop at the same time: each id is fed before it is emitted."""
    plain, ours = FakeModel(), FakeModel()

    def ahead(ids: list[int], caches: list[KVCache]) -> None:
        assert caches[0].offset == len(PROMPT) + min(len(ids), 11)

    assert (
        generate(decode, plain, Sampler(Sampling(), 1), 12, check=ahead)[0]
        == generate(speculative(OracleDrafter([], 0), 0), ours, Sampler(Sampling(), 1), 12, check=ahead)[0]
    )
    assert plain.calls == ours.calls


@pytest.mark.parametrize("position", range(1, 8))
def test_forced_ids_amid_a_draft(position: int):
    """Drafts after them are dropped; one pass feeds the forced ids."""
    expected, _ = generate(decode, FakeModel(), Sampler(GREEDY, 0), 16, {position: FORCED})
    model = FakeModel()
    found, caches = generate(
        speculative(OracleDrafter(expected, 1.0), 7), model, Sampler(GREEDY, 0), 16, {position: FORCED}
    )
    assert found == expected
    assert len(FORCED) in model.calls
    assert cached_ids(caches[0])[: len(PROMPT) + 15] == [*PROMPT, *found[:-1]]


@pytest.mark.parametrize("sampling", [Sampling(), GREEDY, Sampling(top_p=1.0)])
@pytest.mark.parametrize("at", [4, 5, 8])
def test_nan_logits_amid_a_draft_are_refused(sampling: Sampling, at: int):
    class Failing(FakeModel):
        def __call__(self, ids: mx.array, caches: Sequence[KVCache], *, last: bool = False) -> mx.array:
            start = caches[0].offset
            h = super().__call__(ids, caches, last=last)
            places = start + mx.arange(ids.shape[1]).reshape(1, -1, 1)
            return mx.where((places[:, -1:] if last else places) < len(PROMPT) + at, h, math.nan)

        def logits(self, h: mx.array) -> mx.array:
            return mx.where(mx.isnan(h), math.nan, super().logits(mx.where(mx.isnan(h), 0, h)))

    expected, _ = generate(decode, FakeModel(), Sampler(sampling, 0), 20)
    model = Failing()
    logits, caches = start(model, PROMPT)
    ids = speculative(OracleDrafter(expected, 1.0), 3)(
        model, logits, caches, sampler=Sampler(sampling, 0), limit=20
    )
    found = list[int]()
    with pytest.raises(CheckpointError, match="weights are damaged"):
        found += iter(lambda: next(ids), None)
    assert found == expected[: len(found)]


@pytest.mark.parametrize("kind", ["likeliest", "random"])
def test_sampled_ids_are_distributed_as_the_nucleus(kind: str):
    """Against frequencies in float64, with a drafter that is biased."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=24).astype(np.float32) * 1.5
    sampling = Sampling(temperature=0.9, top_p=0.8)

    class ConstantModel(FakeModel):
        def __call__(self, ids: mx.array, caches: Sequence[KVCache], *, last: bool = False) -> mx.array:
            k = mx.zeros((1, 1, ids.shape[1], 1))
            for cache in caches:
                cache.update(k, k)
            return mx.zeros((1, 1 if last else ids.shape[1], 1))

        def logits(self, h: mx.array) -> mx.array:
            return mx.broadcast_to(mx.array(scores), (*h.shape[:2], scores.size))

    class BiasedDrafter(OracleDrafter):
        def propose(self, most: int) -> mx.array | None:
            if kind == "likeliest":
                return mx.array([int(scores.argmax())] * most)
            return mx.array(self.rng.integers(0, scores.size, size=most))

    n = 1000
    speculation = Speculation(BiasedDrafter([], 0), FixedPace(2))
    found, _ = generate(speculation.decode, ConstantModel(), Sampler(sampling, 11), n)
    if kind == "likeliest":
        assert speculation.passes < 0.9 * n
    nucleus = reference_nucleus(sampling, scores)
    expected = np.where(nucleus.inside, nucleus.p, 0)
    expected = n * expected / expected.sum()
    counts = np.bincount(found, minlength=scores.size)
    assert not counts[~nucleus.inside].any()
    inside = nucleus.inside
    chi = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    freedom = inside.sum() - 1
    # Wilson and Hilferty: the cube root of chi² / freedom is nearly normal; 3.3 deviations are one in 2000.
    spread = 2 / (9 * freedom)
    assert ((chi / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5 < 3.3


def test_batched_caches_can_be_trimmed(tmp_path: Path):
    """Batched replies are decoded without speculation, but their caches would allow it."""
    model = load(open_checkpoint(models.write_hf(tmp_path)), mx.float32)
    rows = [start(model, PROMPT[:length])[1] for length in (3, 5, 8)]
    fed = mx.array([[5, 6, 7, 8]] * 3)
    expected = model.logits(model(fed, side_by_side(rows)))
    for row in rows:
        trim_all(row, 4)
    model(mx.array([[5, 6, 99, 98]] * 3), side_by_side(rows))
    for row in rows:
        trim_all(row, 2)
    found = model.logits(model(fed[:, 2:], side_by_side(rows)))
    np.testing.assert_allclose(np.array(found), np.array(expected[:, 2:]), atol=2e-4, rtol=1e-4)


class TimedModel:
    """Generates a given text, and advances a clock by the assumed cost of each pass."""

    def __init__(self, prompt: Sequence[int], text: Sequence[int], each_row: float) -> None:
        self.ids = mx.array([*prompt, *text, 0])
        self.each_row = each_row
        self.seconds = 0.0

    def new_caches(self) -> list[KVCache]:
        return [KVCache()]

    def __call__(self, ids: mx.array, caches: Sequence[KVCache], *, last: bool = False) -> mx.array:
        L, start = ids.shape[1], caches[0].offset
        caches[0].offset += L
        self.seconds += 1 + self.each_row * (L - 1)
        follows = self.ids[start + 1 : start + L + 1].reshape(1, -1, 1)
        return follows[:, -1:] if last else follows

    def logits(self, h: mx.array) -> mx.array:
        return mx.where(mx.arange(256) == h, 9.0, 0.0)


SOURCE = [*Path(__file__).read_bytes()[:2000]]
TEXTS = {
    "dissimilar": (SOURCE[:200], SOURCE[1000:1600]),
    "copy of the prompt": (SOURCE[:600], SOURCE[:600]),
    "random": ([1, 2, 3], np.random.default_rng(0).integers(0, 256, size=600).tolist()),
    "repetition": ([1, 2, 3], SOURCE[700:740] * 15),
}


@pytest.mark.parametrize("each_row", [0.0, 0.3, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("text", TEXTS)
def test_cost_is_under_5_percent_where_speculation_does_not_pay(text: str, each_row: float):
    """With a made-up clock: no reply takes 5 % longer; copied text is fast if extra rows are cheap."""
    prompt, expected = TEXTS[text]
    model = TimedModel(prompt, expected, each_row)
    caches = model.new_caches()
    logits = model.logits(model(mx.array([prompt]), caches, last=True))[0, 0]
    model.seconds = 0.0
    speculation = Speculation(PromptLookup(prompt), Pace(), lambda: model.seconds)
    found = speculation.decode(model, logits, caches, sampler=Sampler(GREEDY, 0), limit=len(expected))
    assert list(found) == expected
    assert (len(expected) - 1) / model.seconds > 0.95
    if each_row <= 0.3 and text in ("copy of the prompt", "repetition"):
        assert len(expected) / speculation.passes > 3
        assert (len(expected) - 1) / model.seconds > 1.5


# ------------------------------------------------------------------ whole replies


@pytest.fixture
def always_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft whenever the drafter can, whatever it costs on this machine."""
    monkeypatch.setattr(pace.Pace, "best", lambda _, chance, most: min(most, 5) if chance else 0)


@pytest.fixture(scope="module")
def demo() -> Iterator[Magistral]:
    with Magistral.load("demo") as model:
        yield model


def repeated_question(model: Magistral, question: str, **options: Any) -> list[int]:
    """A prompt that already contains the question and its answer, so much of the reply."""
    talk = model.conversation(keep_thinking=True, **options)
    talk.ask(question)
    return talk._prompt(question, talk.options)


def check_same_ids(model: Magistral, prompts: Sequence[Sequence[int]], **options: Any) -> tuple[int, int]:
    """Each prompt at temperatures 0 and 0.7, with and without speculation; returns tokens and passes."""
    tokens = passes = 0
    for seed, prompt in enumerate(prompts):
        for temperature in (0.0, 0.7):
            chosen = {"sampling": Sampling(temperature=temperature), "seed": seed, **options}
            plain = model.stream_ids(prompt, **chosen, speculate=False).drain()
            drafted = model.stream_ids(prompt, **chosen, speculate=True).drain()
            assert drafted.token_ids == plain.token_ids
            assert plain.stats.tokens_per_pass == 1
            tokens += len(drafted.token_ids)
            passes += drafted.stats.forward_passes
    return tokens, passes


@pytest.mark.usefixtures("always_draft")
def test_demo_replies_are_the_same(demo: Magistral):
    questions = [problem.question for problem in held_out_problems(3, 50)]
    check_same_ids(demo, [demo.encode(question) for question in questions[:2]], max_tokens=30)
    again = repeated_question(demo, questions[2], seed=1, max_tokens=150)
    tokens, passes = check_same_ids(demo, [again], max_tokens=40)
    assert tokens / passes > 1.5


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("always_draft")
def test_demo_replies_to_200_prompts_are_the_same(demo: Magistral):
    questions = [problem.question for problem in held_out_problems(200, 51)]
    prompts = [demo.encode(question) for question in questions[:100]]
    prompts += [repeated_question(demo, question, seed=2, max_tokens=200) for question in questions[100:]]
    tokens, passes = check_same_ids(demo, prompts, max_tokens=400)
    assert tokens / passes > 1.5


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_demo_replies_at_the_real_pace_are_the_same(demo: Magistral):
    questions = [problem.question for problem in held_out_problems(40, 52)]
    check_same_ids(
        demo, [repeated_question(demo, question, seed=2, max_tokens=200) for question in questions]
    )


def plain_and_drafted(model: Magistral, prompt: Sequence[int], **options: Any) -> tuple[Any, Any]:
    plain = model.stream_ids(prompt, **options, speculate=False).drain()
    return plain, model.stream_ids(prompt, **options, speculate=True).drain()


@pytest.fixture(scope="module")
def prompt(demo: Magistral) -> list[int]:
    return repeated_question(demo, "What is 48 + 37?", seed=1)


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize(
    "options",
    [
        *({"think_budget": budget} for budget in (0, 7, 20)),
        *({"max_tokens": most} for most in (1, 2, 13, 14)),
        {"stop": "= **"},
        {"sampling": Sampling(repetition_penalty=1.1), "max_tokens": 40},
    ],
    ids=str,
)
def test_reply_ends_at_the_same_id(demo: Magistral, prompt: list[int], options: dict[str, Any]):
    """Budgets, limits and stop strings that fall into a draft."""
    plain, drafted = plain_and_drafted(demo, prompt, seed=3, **options)
    assert (drafted.token_ids, drafted.finish_reason) == (plain.token_ids, plain.finish_reason)
    assert (drafted.thinking, drafted.answer) == (plain.thinking, plain.answer)
    assert drafted.stats.forward_passes <= plain.stats.forward_passes
    if plain.stats.forward_passes > 10 and "sampling" not in options:
        assert drafted.stats.forward_passes < plain.stats.forward_passes


@pytest.mark.usefixtures("always_draft")
def test_logprobs_of_drafted_ids(demo: Magistral, prompt: list[int]):
    plain, drafted = plain_and_drafted(demo, prompt, seed=3, max_tokens=30, logprobs=2)
    assert drafted.stats.tokens_per_pass > 1.5
    assert [score.id for score in drafted.logprobs] == list(drafted.token_ids)
    for ours, theirs in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert [id_ for id_, _ in ours.top] == [id_ for id_, _ in theirs.top]
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


@pytest.mark.usefixtures("always_draft")
def test_constrained_answer_is_decoded_without_drafts(demo: Magistral, prompt: list[int]):
    plain, drafted = plain_and_drafted(
        demo, prompt, seed=3, think_budget=10, max_tokens=80, schema=Regex("[0-9]{1,4}")
    )
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.tokens_per_pass == 1


@pytest.mark.usefixtures("always_draft")
def test_stop_thinking_amid_a_draft(demo: Magistral, prompt: list[int]):
    def ids(speculate: bool) -> tuple[int, ...]:
        with demo.stream_ids(prompt, seed=3, speculate=speculate) as stream:
            for n, _ in enumerate(stream):
                if n == 10:
                    stream.stop_thinking()
        return stream.reply.token_ids

    assert ids(speculate=True) == ids(speculate=False)


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_prefix_is_right_after_speculation(demo: Magistral, prompt: list[int], kv_bits: int | None):
    """Finished, or cancelled amid a draft: the logits after the ids so far are those of a fresh run."""
    for ids_until in (None, 9, 11):
        held = demo.new_prefix(kv_bits)
        with demo.stream_ids(prompt, prefix=held, seed=3, speculate=True, max_tokens=50) as stream:
            for _ in stream:
                if ids_until and len(stream.reply.token_ids) >= ids_until:
                    break
        generated = list(stream.reply.token_ids)
        assert held.ids == prompt + generated
        following = [*prompt, *generated, 7, 8, 9]
        found, expected = demo.run(
            lambda h=held, f=following: (logits_after(demo, h, f), logits_after(demo, None, f, kv_bits))
        )
        np.testing.assert_allclose(found, expected, atol=1e-3 if kv_bits is None else 3e-2, rtol=0)


def logits_after(
    demo: Magistral, held: prefix.Prefix | None, ids: list[int], kv_bits: int | None = None
) -> np.ndarray:
    """The logits after `ids`, prefilling what `held` lacks."""
    model, held = demo.transformer, held or demo.new_prefix(kv_bits)
    common = held.rewind(ids)
    assert len(ids) - common <= 5 or common == 0
    hidden = model(mx.array([ids[common:]]), held.caches, last=True)
    return np.array(model.logits(hidden)[0, 0])


@pytest.mark.usefixtures("always_draft")
def test_conversation_is_the_same_with_speculation(demo: Magistral):
    def replies(speculate: bool) -> list[Any]:
        talk = demo.conversation(sampling=GREEDY, speculate=speculate)
        return [talk.ask(text) for text in ("What is 48 + 37?", "Now add 12 to that.", "Now add 5 to that.")]

    for drafted, plain in zip(replies(speculate=True), replies(speculate=False), strict=True):
        assert drafted.token_ids == plain.token_ids
        assert drafted.stats.cached_tokens == plain.stats.cached_tokens


@pytest.mark.usefixtures("always_draft")
def test_reply_with_8_bit_caches_is_the_same(prompt: list[int]):
    with Magistral.load("demo", kv_bits=8) as model:
        plain, drafted = plain_and_drafted(model, prompt, sampling=GREEDY, seed=0, max_tokens=60)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.tokens_per_pass > 1.5


@pytest.mark.usefixtures("always_draft")
def test_reply_that_fills_the_context_is_the_same(tiny_tokenizer: Callable[[str], Tokenizer]):
    tokenizer = tiny_tokenizer("v11")
    with scripted(tokenizer, "<think>\n" + "again and " * 60, max_context=1000) as model:
        prompt = model.encode("hello")
        plain, drafted = plain_and_drafted(model, prompt, seed=0)
    assert len(prompt) + len(drafted.token_ids) == 1000
    assert drafted.token_ids == plain.token_ids
    assert drafted.finish_reason == "length"
    assert drafted.stats.tokens_per_pass > 3


# ------------------------------------------------------------------ a draft model


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speculation") / "4bit"
    sidecar_files = files(DEMO, name="demo", recipe="4bit", context=4096)
    convert(Job(checkpoint=open_checkpoint(DEMO), out=path, sidecars=sidecar_files))
    return path


@pytest.mark.usefixtures("always_draft")
def test_drafts_of_the_model_itself_are_all_right(demo: Magistral):
    """Sampled with the same noise, all of its drafts are right."""
    with Magistral.load("demo", draft_model="demo") as model:
        for seed, sampling in enumerate((GREEDY, Sampling())):
            prompt = model.encode("What is 48 + 37?")
            plain = demo.stream_ids(prompt, seed=seed, sampling=sampling, max_tokens=61).drain()
            drafted = model.stream_ids(prompt, seed=seed, sampling=sampling, max_tokens=61).drain()
            assert drafted.token_ids == plain.token_ids
            assert drafted.stats.forward_passes == 1 + math.ceil((len(plain.token_ids) - 1) / 6)


@pytest.mark.usefixtures("always_draft")
def test_4_bit_draft_model(demo: Magistral, four_bit: Path):
    """A conversation: the draft model's prefix is reused too."""
    with Magistral.load("demo", draft_model=four_bit) as model:
        talk, twin = model.conversation(seed=5), demo.conversation(seed=5)
        for text in ("What is 48 + 37?", "Now add 12 to that."):
            drafted, plain = talk.ask(text), twin.ask(text)
            assert drafted.token_ids == plain.token_ids
            assert drafted.stats.tokens_per_pass > 1.5
        assert talk._prefix.draft.length > 100
        assert talk.ask("What is 1 + 1?", speculate=False).stats.tokens_per_pass == 1


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path):
    path = models.write_hf(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected \d+ ids, found 320"):
        Magistral.load("demo", draft_model=path)
