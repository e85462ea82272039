"""Prefill and decode: which ids are fed and when, with a fake that records its ids and with a real model."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_mlx.decoder import sampling as sampling_module
from magistral_mlx.decoder.cache import KVCache
from magistral_mlx.decoder.drawing import Drawing
from magistral_mlx.decoder.engine import decode, prefill
from magistral_mlx.decoder.sampling import UNSETTLED, Sampler, Sampling
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.errors import CheckpointError
from magistral_mlx.wire import Guide
from tests import models
from tests.decoder.test_cache import feed

V = 50
NARROW = Sampling(temperature=3.0, top_p=0.1)
"""A nucleus of few ids, of which the noise seldom puts one first."""


class FakeModel:
    """A fake model: its caches hold the ids themselves, and its logits depend on all of them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.table = mx.array(rng.normal(size=(97, V)).astype(np.float32) * 2)
        self.calls = list[int]()  # positions fed by each call

    def new_caches(self) -> list[KVCache]:
        return [KVCache(), KVCache()]

    def __call__(self, ids: mx.array, caches: Sequence[KVCache], *, last: bool = False) -> mx.array:
        self.calls.append(ids.shape[1])
        k = ids.astype(mx.float32).reshape(1, 1, -1, 1)
        for cache in caches:
            before = cache.offset
            past, _ = cache.update(k, k)
        past = past.reshape(1, 1, -1)  # (1, 1, offset)
        places = mx.arange(past.shape[2])
        visible = places <= before + mx.arange(ids.shape[1]).reshape(-1, 1)  # (L, offset): causal
        hidden = mx.sum(mx.where(visible, past * (places % 7 + 1), 0), axis=2, keepdims=True)  # (1, L, 1)
        return hidden[:, -1:] if last else hidden

    def logits(self, h: mx.array) -> mx.array:
        return self.table[h[..., 0].astype(mx.int32) % 97]


class CountingSampler(Sampler):
    """Counts how often sorting was needed."""

    settled = 0

    def settle(self, logits: mx.array, position: int, seen: mx.array | None = None) -> mx.array:
        self.settled += 1
        return super().settle(logits, position, seen)


def cached_ids(cache: KVCache) -> list[int]:
    keys = cache.arrays()[0]
    return [int(key) for key in np.array(keys[0, 0, : cache.offset, 0])]


def start(model: Any, prompt: Sequence[int]) -> tuple[mx.array, list[KVCache]]:
    caches = model.new_caches()
    return feed(model, prompt, caches), caches


def always_sorting(model: Any, prompt: Sequence[int], sampler: Sampler, n: int) -> list[int]:
    """The plain loop: settle, feed, settle, feed."""
    logits, caches = start(model, prompt)
    seen, ids = np.isin(np.arange(logits.size), list(prompt)), list[int]()
    for position in range(len(prompt), len(prompt) + n):
        token = int(sampler.settle(logits, position, mx.array(seen)).item())
        seen[token] = True
        ids.append(token)
        logits = model.logits(model(mx.array([[token]]), caches))[0, -1]
    return ids


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0), NARROW, replace(NARROW, repetition_penalty=1.5)]
)
@pytest.mark.parametrize("limit", [1, 2, 30])
def test_caches_hold_every_emitted_id_at_every_yield(
    sampling: Sampling, limit: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampling_module, "CANDIDATES", 1)
    model, sampler = FakeModel(), CountingSampler(sampling, seed=3)
    logits, caches = start(model, PROMPT)
    ids = list[int]()
    for token in decode(model, logits, caches, sampler=sampler, prompt=PROMPT, limit=limit):
        ids.append(token)
        # Every emitted id has been fed, except the last: the logits after it are not needed.
        fed = [*PROMPT, *ids] if len(ids) < limit else [*PROMPT, *ids[:-1]]
        for cache in caches:
            assert cache.offset == len(fed)
            assert cached_ids(cache) == fed
    assert len(ids) == limit
    # One call for the prompt, one for each id but the last, and one more for each undone step.
    undone = len(model.calls) - limit
    assert sampler.settled - 1 <= undone <= sampler.settled  # the last one undoes nothing
    assert model.calls == [len(PROMPT)] + [1] * (limit - 1 + undone)
    if sampling.top_p == NARROW.top_p and limit == 30:
        assert sampler.settled > 10


def test_no_pass_beyond_the_last_id_consumed():
    for stop_after in (1, 5):
        model = FakeModel()
        logits, caches = start(model, PROMPT)
        ids = decode(model, logits, caches, sampler=Sampler(Sampling(), 1), limit=100)
        for _ in range(stop_after):
            next(ids)
        ids.close()
        assert len(model.calls) == 1 + stop_after  # the last one was dispatched before its id was known
        assert {cache.offset for cache in caches} == {len(PROMPT) + stop_after}


def test_limit_of_zero_feeds_nothing():
    model = FakeModel()
    logits, caches = start(model, PROMPT)
    assert list(decode(model, logits, caches, sampler=Sampler(Sampling(), 1), limit=0)) == []
    assert model.calls == [len(PROMPT)]


@given(
    seed=st.integers(0, 2**40),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.7, 1.5, 4.0]),
        top_p=st.sampled_from([0.02, 0.3, 0.95, 1.0]),
        top_k=st.sampled_from([0, 2]),
        repetition_penalty=st.sampled_from([1.0, 1.4]),
    ),
    candidates=st.integers(1, 4),
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=12),
)
@settings(max_examples=25)
def test_decode_equals_always_sorting(seed: int, sampling: Sampling, candidates: int, prompt: list[int]):
    model, sampler = FakeModel(), Sampler(sampling, seed)
    logits, caches = start(model, prompt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "CANDIDATES", candidates)
        found = list(decode(model, logits, caches, sampler=sampler, prompt=prompt, limit=12))
    assert found == always_sorting(model, prompt, sampler, 12)


def test_decode_of_a_real_model_equals_always_sorting(real: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling_module, "CANDIDATES", 1)
    sampler = CountingSampler(NARROW, seed=5)
    # Starts just below a step of the cache, so that undone positions lie on both sides of its growth.
    prompt = np.random.default_rng(2).integers(0, 320, size=246).tolist()
    logits, caches = start(real, prompt)
    found = list(decode(real, logits, caches, sampler=sampler, limit=20))
    assert sampler.settled > 10
    assert found == always_sorting(real, prompt, Sampler(NARROW, seed=5), 20)
    fresh, expected = start(real, prompt + found[:-1])
    assert fresh.shape == (320,)
    for ours, theirs in zip(caches, expected, strict=True):
        assert ours.offset == theirs.offset == 265
        for a, b in zip(ours.arrays(), theirs.arrays(), strict=True):
            np.testing.assert_allclose(np.array(a[:, :, :265]), np.array(b[:, :, :265]), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(open_checkpoint(models.write_hf(tmp_path_factory.mktemp("engine"))), mx.float32)


def test_same_seed_gives_the_same_ids_for_any_prefill_chunk(real: Any):
    def run(seed: int, chunk: int) -> list[int]:
        caches = real.new_caches()
        logits = feed(real, PROMPT, caches, chunk)
        return list(decode(real, logits, caches, sampler=Sampler(Sampling(), seed), limit=30))

    assert run(7, 2048) == run(7, 2048) == run(7, 3)
    assert run(7, 2048) != run(8, 2048)


def test_continued_sequence_keeps_the_noise_of_its_positions(real: Any):
    """Noise belongs to a position: stopping, and continuing with the ids so far changes nothing."""
    sampler = Sampler(Sampling(), seed=7)
    logits, caches = start(real, PROMPT)
    whole = list(decode(real, logits, caches, sampler=sampler, limit=20))
    logits, caches = start(real, PROMPT + whole[:8])
    assert list(decode(real, logits, caches, sampler=sampler, limit=12)) == whole[8:]


def test_penalty_covers_the_prompt_and_every_id_so_far():
    class Flat(FakeModel):
        def logits(self, h: mx.array) -> mx.array:
            return mx.broadcast_to(mx.arange(V, 0, -1).astype(mx.float32), (*h.shape[:2], V))

    model = Flat()
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1000), seed=0)
    prompt = [0, 2, 3]
    logits, caches = start(model, prompt)
    found = list(decode(model, logits, caches, sampler=sampler, prompt=prompt, limit=10))
    assert found == [1, *range(4, 13)]


@pytest.mark.parametrize(
    "where", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinite_weights_are_refused(where: str, value: float, tmp_path: Path):
    weights = models.random_weights()
    damaged = np.array(weights[where])
    damaged.flat[7] = value
    path = models.write_hf(tmp_path)
    mx.save_safetensors(str(path / "model.safetensors"), weights | {where: mx.array(damaged)})
    model = load(open_checkpoint(path), mx.float32)
    with pytest.raises(CheckpointError, match="weights are damaged"):
        list(prefill(model, PROMPT, model.new_caches(), chunk=3))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_p=1.0)])
def test_nan_logits_in_mid_reply_are_refused(sampling: Sampling):
    """An overflow in 16 bit, or a damaged row of an embedding that the prompt does not use."""

    class Failing(FakeModel):
        def logits(self, h: mx.array) -> mx.array:
            good = super().logits(h)
            return good if len(self.calls) < 4 else mx.full(good.shape, math.nan)

    model = Failing()
    logits, caches = start(model, PROMPT)
    ids = decode(model, logits, caches, sampler=Sampler(sampling, 0), limit=10)
    assert all(next(ids) != UNSETTLED for _ in range(3))
    with pytest.raises(CheckpointError, match="weights are damaged"):
        next(ids)


def test_prefill_computes_logits_of_one_position():
    """The head of the real model is 1.3 GB: it is never applied to positions whose logits are not needed."""

    shapes = list[tuple[int, ...]]()

    class Heads(FakeModel):
        def logits(self, h: mx.array) -> mx.array:
            shapes.append(h.shape)
            return super().logits(h)

    model = Heads()
    feed(model, PROMPT, model.new_caches(), chunk=3)
    assert model.calls == [3, 3, 2]
    assert shapes == [(1, 1, 1)]


# ------------------------------------------------------------------ guides


Guides: TypeAlias = Mapping[int, list[int] | Guide]
"""Number of sampled ids → ids that are forced then, or a whole guide."""


def guide_at(guides: Guides, sampled: int) -> Guide:
    found = guides.get(sampled, [])
    return found if isinstance(found, Guide) else Guide(forced=found)


def only(*ids: int) -> bytes:
    """A mask over V or more ids."""
    return sum(1 << i for i in ids).to_bytes(40, "little")


def generate(
    model: Any, prompt: Sequence[int], sampler: Sampler, guides: Guides, limit: int
) -> tuple[list[int], list[KVCache]]:
    """All ids of a reply decoded with these guides."""
    logits, caches = start(model, prompt)
    ids, sampled = list[int](), 0
    steps = decode(model, logits, caches, sampler=sampler, prompt=prompt, limit=limit)
    guide: Guide | None = None
    while True:
        try:
            ids.append(steps.send(guide))
        except StopIteration:
            return ids, caches
        sampled += 1
        guide = guide_at(guides, sampled)
        if len(ids) < limit:
            ids += guide.forced


def generate_in_pieces(
    model: Any, prompt: Sequence[int], sampler: Sampler, guides: Guides, limit: int
) -> list[int]:
    """The same without guides: stops, and prefills everything again with the forced ids at the end."""
    ids, sampled, allowed = list[int](), 0, None
    for after in [*sorted(guides), limit]:
        wanted = min(after - sampled, limit - len(ids))
        if wanted > 0:
            so_far = [*prompt, *ids]
            logits, caches = start(model, so_far)
            ids += decode(
                model, logits, caches, sampler=sampler, prompt=so_far, limit=wanted, allowed=allowed
            )
        sampled, guide = after, guide_at(guides, after)
        ids += guide.forced if len(ids) < limit else []
        allowed = guide.allowed or allowed
    return ids


FORCED = [7, 3, 11, 11, 2]
FEW, ODD = only(4, 8, 15, 16, 23, 42), only(*range(1, V, 2))
MASKS: list[Guides] = [
    {2: Guide(allowed=FEW)},
    {1: Guide(allowed=FEW), 2: Guide(allowed=ODD), 3: Guide(allowed=FEW), 9: Guide(allowed=b"\xff" * 40)},
    {3: Guide(forced=FORCED, allowed=FEW), 5: [5], 6: Guide(allowed=only(3))},
]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(), NARROW, Sampling(temperature=1.5, repetition_penalty=1.4)],
    ids=["greedy", "sampled", "often unsettled", "penalty"],
)
@pytest.mark.parametrize(
    "guides", [{1: FORCED}, {6: FORCED, 7: [5]}, {4: FORCED * 9, 12: FORCED}, {17: [1]}, *MASKS]
)
def test_guided_reply_equals_fresh_runs(real: Any, sampling: Sampling, guides: Guides):
    """Caches, positions, noise and penalties: all as in a fresh run over prompt, sampled and forced ids."""
    limit = 18 + sum(len(guide_at(guides, at).forced) for at in guides)
    found, caches = generate(real, PROMPT, Sampler(sampling, 9), guides, limit)
    assert found == generate_in_pieces(real, PROMPT, Sampler(sampling, 9), guides, limit)
    assert len(found) == limit
    _, fresh = start(real, [*PROMPT, *found[:-1]])
    for ours, theirs in zip(caches, fresh, strict=True):
        assert ours.offset == theirs.offset == len(PROMPT) + limit - 1
        for a, b in zip(ours.arrays(), theirs.arrays(), strict=True):
            found_past, fresh_past = (np.array(array[:, :, : ours.offset]) for array in (a, b))
            np.testing.assert_allclose(found_past, fresh_past, atol=1e-4, rtol=1e-4)


@given(
    seed=st.integers(0, 2**40),
    sampling=st.sampled_from([Sampling(), NARROW, Sampling(temperature=2, repetition_penalty=1.4)]),
    guides=st.dictionaries(
        st.integers(1, 9),
        st.lists(st.integers(0, V - 1), min_size=1, max_size=6)
        | st.builds(Guide, forced=st.sampled_from([[], FORCED]), allowed=st.sampled_from([None, FEW, ODD])),
        max_size=3,
    ),
    limit=st.integers(1, 20),
)
@settings(max_examples=20)
def test_forced_ids_and_masks_at_any_position(seed: int, sampling: Sampling, guides: Guides, limit: int):
    """Also at the last id, and beyond the limit: forced ids count, and nothing is sampled after the limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "CANDIDATES", 1)
        found, _ = generate(FakeModel(), PROMPT, Sampler(sampling, seed), guides, limit)
    assert found == generate_in_pieces(FakeModel(), PROMPT, Sampler(sampling, seed), guides, limit)


def test_forced_ids_take_one_pass():
    model = FakeModel()
    found, caches = generate(model, PROMPT, Sampler(Sampling(temperature=0), 0), {3: FORCED}, 12)
    # Three sampled ids, the forced ones together, and all that follow but the last, which is never fed.
    assert model.calls == [len(PROMPT), 1, 1, 1, len(FORCED), 1, 1, 1]
    assert cached_ids(caches[0]) == [*PROMPT, *found[:-1]]


@pytest.mark.parametrize(("limit", "forced"), [(4, [5]), (4, FORCED), (5, [5]), (6, FORCED)])
def test_forced_ids_that_reach_the_limit_are_not_fed(limit: int, forced: list[int]):
    model = FakeModel()
    found, caches = generate(model, PROMPT, Sampler(Sampling(temperature=0), 0), {4: forced}, limit)
    assert found[4:] == (forced if limit > 4 else [])
    assert model.calls == [len(PROMPT)] + [1] * min(4, limit - 1)
    assert cached_ids(caches[0]) == [*PROMPT, *found[: min(4, limit - 1)]]


def test_empty_guides_change_nothing():
    plain, _ = generate(FakeModel(), PROMPT, Sampler(Sampling(), 4), {}, 10)
    logits, caches = start(model := FakeModel(), PROMPT)
    steps = decode(model, logits, caches, sampler=Sampler(Sampling(), 4), limit=10)
    assert [next(steps), *(steps.send(Guide()) for _ in range(9))] == plain


def test_new_mask_takes_no_extra_pass():
    """The logits after the last id are there already: only the sampling is repeated."""
    model = FakeModel()
    found, caches = generate(model, PROMPT, Sampler(Sampling(), 3), MASKS[1], 12)
    assert model.calls == [len(PROMPT)] + [1] * 11
    assert cached_ids(caches[0]) == [*PROMPT, *found[:-1]]
    assert {*found[1:2], *found[3:9]} <= {4, 8, 15, 16, 23, 42}


@pytest.mark.parametrize(
    "sampling", [Sampling(), NARROW, Sampling(temperature=0), Sampling(top_p=1, top_k=3)]
)
@pytest.mark.parametrize("allowed", [{7}, {7, 30}, set(range(0, V, 3))])
def test_only_allowed_ids_are_sampled(sampling: Sampling, allowed: set[int]):
    for seed in range(20):
        logits, caches = start(model := FakeModel(), PROMPT)
        sampler = Sampler(sampling, seed)
        found = decode(model, logits, caches, sampler=sampler, limit=6, allowed=only(*allowed))
        assert set(found) <= allowed


def test_ids_beyond_the_mask_are_not_allowed():
    """As if the output head were wider than the vocabulary."""
    logits, caches = start(model := FakeModel(), PROMPT)
    found = [*decode(model, logits, caches, sampler=Sampler(Sampling(), 1), limit=9, allowed=b"\xff\x01")]
    assert len(found) == 9
    assert max(found) < 9


def test_masked_sampling_uses_the_nucleus_of_the_masked_logits():
    """Against float64: the nucleus is taken from the softmax over the allowed ids only."""
    model, allowed, sampling = FakeModel(), sorted(range(0, V, 4)), Sampling(temperature=1.3, top_p=0.8)
    logits, _ = start(model, PROMPT)
    scaled = np.full(V, -np.inf)
    scaled[allowed] = np.array(logits, np.float64)[allowed] / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    above = np.array([weights[scaled > x].sum() for x in scaled])
    inside = np.where((above < sampling.top_p * weights.sum()) & (weights > 0), weights, 0)
    expected = inside / inside.sum()
    n_draws, counts = 2000, Counter[int]()
    for seed in range(n_draws):
        step = Drawing(Sampler(sampling, seed), only(*allowed), None).draw(logits, 9, None)
        counts[cast("int", step.id.item())] += 1
    kept = np.flatnonzero(expected)
    assert set(counts) <= set(kept.tolist())
    assert 2 < len(kept) < len(allowed)
    observed = np.array([counts[i] for i in kept.tolist()])
    chi2 = float(((observed - n_draws * expected[kept]) ** 2 / (n_draws * expected[kept])).sum())
    assert chi2 < len(kept) - 1 + 5 * math.sqrt(2 * (len(kept) - 1))  # five standard deviations
