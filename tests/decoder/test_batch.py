"""Batched decoding gives each sequence the ids it gets alone, whichever rows are in a pass, come or leave."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.graph_nodes import primitives
from magistral_mlx.decoder import sampling as sampling_module
from magistral_mlx.decoder.batch import Request, Row, feed
from magistral_mlx.decoder.cache import Cache, KVCache, QuantizedKVCache, side_by_side, trim_all
from magistral_mlx.decoder.logprobs import Scorer
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.errors import CheckpointError
from magistral_mlx.wire import Guide
from tests import models
from tests.decoder import test_cache
from tests.decoder.test_engine import FORCED, MASKS, NARROW, Sent, guide, say

# ------------------------------------------------------------------ caches side by side

LENGTHS = (3, 9, 1, 9, 5)
K, D = 2, 32


def rows(L: int, seed: int, heads: int = K) -> mx.array:
    return mx.random.normal((len(LENGTHS), heads, L, D), key=mx.random.key(seed))


@pytest.mark.parametrize(
    "new",
    [KVCache, lambda: QuantizedKVCache(D), lambda: QuantizedKVCache(D, after=4)],
    ids=["plain", "packed", "packed in part"],
)
def test_attention_side_by_side(new: Any):
    """Each row attends to its own past only, through steps of any length, trims, and changing batches."""
    caches, twins = [new() for _ in LENGTHS], [new() for _ in LENGTHS]
    for at, L in enumerate(LENGTHS):
        for cache in (caches[at], twins[at]):
            cache.update(rows(L, 1)[at : at + 1], rows(L, 2)[at : at + 1])
    for step, live in enumerate([[0, 1, 2, 3, 4], [0, 2, 4], [4, 0], [3], [1, 4]]):
        L = 1 + step % 3
        keys, values, queries = rows(L, 10 * step), rows(L, 10 * step + 1), rows(L, 10 * step + 2, 4)
        chosen = mx.array(live)
        [batch] = side_by_side([[caches[row]] for row in live])
        positions = (mx.zeros(len(live), mx.int32) + batch.position).tolist()
        assert positions == [twins[row].offset for row in live]
        found = batch.attend(queries[chosen], keys[chosen], values[chosen], 0.2)
        for at, row in enumerate(live):
            alone = slice(row, row + 1)
            expected = twins[row].attend(queries[alone], keys[alone], values[alone], 0.2)
            np.testing.assert_allclose(np.array(found[at]), np.array(expected[0]), atol=1e-5)
        trim_all([one[row] for one in (caches, twins) for row in live], L - 1)


# ------------------------------------------------------------------ ids in step

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], list(range(40, 80)), [3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 8, 8]]
KINDS = [Sampling(temperature=0), Sampling(), NARROW, Sampling(temperature=1.5, repetition_penalty=1.4)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = replace(models.TINY, n_layers=2)
    return load(open_checkpoint(models.write_hf(tmp_path_factory.mktemp("batch"), config)), mx.float32)


@dataclass
class Wish:
    """A sequence to decode. sent: guides by number of sampled ids; ends: ids in all after which it stops."""

    prompt: list[int]
    sampler: Sampler
    limit: int
    sent: Sent = field(default_factory=dict[int, Any])
    ends: int = 99

    def row(self, model: Any) -> Row:
        caches = model.new_caches()
        logits = test_cache.feed(model, self.prompt, caches)
        return Row(Request(prompt=self.prompt, sampler=self.sampler, limit=self.limit), logits, caches)

    def alone(self, model: Any) -> list[int]:
        return say(model, self.prompt, self.sampler, self.sent, min(self.limit, self.ends))[0]


class Saying:
    """The ids of a `Wish` so far."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.ids = list[int]()
        self.drawn = self.steps = 0

    def hear(self, token: int) -> Guide | None:
        """Add an id; returns the guide for the row, or None if the sequence has ended."""
        self.ids.append(token)
        self.drawn += 1
        how = guide(self.wish.sent, self.drawn)
        if len(self.ids) < min(self.wish.limit, self.wish.ends):
            self.ids += how.forced
        return how if len(self.ids) < self.wish.ends else None


def all_said(model: Any, wishes: Sequence[Wish]) -> list[list[int]]:
    sayings = [Saying(wish) for wish in wishes]
    going = [(saying, saying.wish.row(model)) for saying in sayings]
    while going:
        going = step(model, going)
    return [saying.ids for saying in sayings]


def step(model: Any, going: Sequence[tuple[Saying, Row]]) -> list[tuple[Saying, Row]]:
    """One step of each row; returns those that have not ended."""
    feed(model, [row for _, row in going])
    drawn = [row.read(model) for _, row in going]
    told = [
        Guide() if token is None else saying.hear(token)
        for token, (saying, _) in zip(drawn, going, strict=True)
    ]
    return [one for one, how in zip(going, told, strict=True) if one[1].advance(how)]


@pytest.mark.parametrize("sampling", KINDS, ids=["greedy", "sampled", "often unsettled", "penalty"])
def test_eight_side_by_side_are_eight_alone(real: Any, sampling: Sampling, monkeypatch: pytest.MonkeyPatch):
    """Prompts of all lengths, limits, guides, ends: each row gets the ids it gets alone."""
    if sampling is NARROW:
        monkeypatch.setattr(sampling_module, "CANDIDATES", 1)
    limits = [14, 9, 20, 1, 14, 7, 12, 15]
    sent: list[Sent] = [{}, {3: FORCED}, {2: [5], 5: FORCED}, {}, MASKS[0], {4: FORCED}, MASKS[1], MASKS[2]]
    wishes = [
        Wish(PROMPTS[at % len(PROMPTS)], Sampler(sampling, 100 + at), limits[at], sent[at]) for at in range(8)
    ]
    wishes[6].ends = 5
    found = all_said(real, wishes)
    for at, wish in enumerate(wishes):
        assert found[at] == wish.alone(real), at


some_ids = st.lists(st.integers(0, 319), min_size=1, max_size=6)
wishes = st.builds(
    Wish,
    prompt=some_ids,
    sampler=st.builds(Sampler, st.sampled_from(KINDS), st.integers(0, 2**40)),
    limit=st.integers(1, 9),
    sent=st.dictionaries(st.integers(1, 9), some_ids, max_size=2) | st.sampled_from(MASKS),
    ends=st.integers(1, 12),
)


@given(data=st.data(), coming=st.lists(wishes, min_size=2, max_size=4), often_unsettled=st.booleans())
@settings(max_examples=15)
def test_whoever_comes_leaves_or_waits(
    real: Any, data: st.DataObject, coming: list[Wish], often_unsettled: bool
):
    """Each step has other rows; some join late, some skip passes, and each gets the ids it gets alone."""
    with pytest.MonkeyPatch.context() as patch:
        if often_unsettled:
            patch.setattr(sampling_module, "CANDIDATES", 1)
        expected = [wish.alone(real) for wish in coming]
        waiting = [Saying(wish) for wish in coming]
        said, here = list(waiting), list[tuple[Saying, Row]]()
        while waiting or here:
            while waiting and (not here or data.draw(st.booleans())):
                here.append((waiting[0], waiting.pop(0).wish.row(real)))
            now = [one for one in here if data.draw(st.booleans())] or here[:1]
            feed(real, [row for _, row in now])
            for saying, row in data.draw(st.permutations(now)):
                token = row.read(real)
                how = Guide() if token is None else saying.hear(token)
                if not row.advance(how):
                    here.remove((saying, row))
                else:  # the caches hold what was emitted or forced
                    saying.steps += 1
                    assert {cache.offset - len(saying.wish.prompt) for cache in row.caches} == {saying.steps}
        assert [saying.ids for saying in said] == expected


class Watching:
    """A model that records the shapes it is fed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fed = list[tuple[int, ...]]()

    def __call__(self, ids: mx.array, caches: Sequence[Cache], **how: bool) -> mx.array:
        self.fed.append(ids.shape)
        return self.model(ids, caches, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def greedy(*limits: int, ends: int = 99) -> list[Wish]:
    sampler = Sampler(Sampling(temperature=0), 0)
    return [Wish(prompt, sampler, limit, ends=ends) for prompt, limit in zip(PROMPTS, limits, strict=False)]


def test_whoever_has_ended_leaves_and_no_pass_is_in_vain(real: Any):
    model = Watching(real)
    wishes = greedy(5, 2, 9)
    wishes[2].ends = 7
    assert [len(ids) for ids in all_said(model, wishes)] == [5, 2, 7]
    prompts, steps = model.fed[:3], model.fed[3:]
    assert [L for _, L in prompts] == [8, 1, 40]
    # One step ahead; no row's last id is fed, unless it was not known to be the last.
    assert [B for B, _ in steps] == [3, 2, 2, 2, 1, 1, 1]
    model.fed.clear()
    all_said(model, greedy(4, 3))
    assert [B for B, _ in model.fed[2:]] == [2, 2, 1]


def test_all_may_end_at_once(real: Any):
    model = Watching(real)
    assert [len(ids) for ids in all_said(model, greedy(50, 50, ends=3))] == [3, 3]
    assert len(model.fed) == 2 + 3


def test_an_error_in_one_row_is_that_rows(real: Any):
    """NaN for one sequence only, as after a damaged row of an embedding."""

    class Failing(Watching):
        def logits(self, h: mx.array) -> mx.array:
            logits = self.model.logits(h)
            return mx.where(mx.arange(len(h))[:, None, None] == 1, mx.nan, logits) if len(h) == 3 else logits

    wishes = [Wish(PROMPTS[at], Sampler(Sampling(), at), 6) for at in range(3)]
    sayings, here = [Saying(wish) for wish in wishes], [wish.row(real) for wish in wishes]
    model = Failing(real)
    feed(model, here)
    for saying, row in zip(sayings, here, strict=True):
        row.advance(saying.hear(row.read(model) or 0))
    feed(model, [*here[:2], here[2]])
    with pytest.raises(CheckpointError, match="weights are damaged"):
        here[1].read(model)
    going = [0, 2]
    while going:
        for at in going:
            saying = sayings[at]
            saying.hear(here[at].read(model) or 0)
        going = [at for at in going if here[at].advance(Guide())]
        feed(model, [here[at] for at in going])
    assert [sayings[at].ids for at in (0, 2)] == [wishes[at].alone(real) for at in (0, 2)]


# ------------------------------------------------------------------ the graph of a step


def asked(monkeypatch: pytest.MonkeyPatch, model: Any, here: Sequence[Row]) -> int:
    """Graph nodes of a step."""
    found = list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(mx, "async_eval", lambda *arrays: found.append(primitives(arrays).total()))
        feed(model, here)
    [nodes] = found
    return nodes


def test_those_who_sample_alike_are_drawn_at_once(real: Any, monkeypatch: pytest.MonkeyPatch):
    def nodes(samplings: Sequence[Sampling], scorer: Scorer | None = None) -> int:
        here = [
            Row(
                Request(prompt=[1], sampler=Sampler(sampling, 5), limit=9, scorer=scorer),
                mx.zeros(320),
                [KVCache() for _ in real.blocks],
            )
            for sampling in samplings
        ]
        return asked(monkeypatch, real, here)

    alike, apart = nodes([Sampling()] * 4), nodes([Sampling(top_p=0.9 + at / 100) for at in range(4)])
    assert apart - alike > 3 * 40
    assert nodes([Sampling()] * 4, Scorer(0)) > apart  # each has its own scores, and is drawn by itself


def test_ids_are_read_without_a_new_graph(real: Any, monkeypatch: pytest.MonkeyPatch):
    """An array created after the next pass is dispatched would wait for it, and leave the device idle."""
    going = step(real, [(Saying(wish), wish.row(real)) for wish in greedy(9, 9, 9)])
    evaluated = list[str]()
    for name in ("eval", "async_eval"):
        known = getattr(mx, name)
        monkeypatch.setattr(mx, name, lambda *a, known=known, name=name: (evaluated.append(name), known(*a)))
    stack = mx.stack
    monkeypatch.setattr(mx, "stack", lambda *a, **k: (evaluated.append("stack"), stack(*a, **k))[1])
    step(real, going)
    assert evaluated == ["stack", "async_eval"]
