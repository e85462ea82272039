"""Batched decoding gives each sequence the ids it gets alone, whichever rows are in a pass, join or leave."""

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
from tests.decoder.test_engine import FORCED, MASKS, NARROW, Guides, generate, guide_at

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
def test_batched_attention_equals_that_of_single_rows(new: Any):
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


# ------------------------------------------------------------------ ids of a batch

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], list(range(40, 80)), [3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 8, 8]]
KINDS = [Sampling(temperature=0), Sampling(), NARROW, Sampling(temperature=1.5, repetition_penalty=1.4)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = replace(models.TINY, n_layers=2)
    return load(open_checkpoint(models.write_hf(tmp_path_factory.mktemp("batch"), config)), mx.float32)


@dataclass
class Case:
    """A sequence to decode. guides: by number of sampled ids; stop_after: ids in all after which it stops."""

    prompt: list[int]
    sampler: Sampler
    limit: int
    guides: Guides = field(default_factory=dict[int, Any])
    stop_after: int = 99

    def row(self, model: Any) -> Row:
        caches = model.new_caches()
        logits = test_cache.feed(model, self.prompt, caches)
        return Row(Request(prompt=self.prompt, sampler=self.sampler, limit=self.limit), logits, caches)

    def alone(self, model: Any) -> list[int]:
        return generate(model, self.prompt, self.sampler, self.guides, min(self.limit, self.stop_after))[0]


class State:
    """A `Case` being decoded: its ids so far."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.ids = list[int]()
        self.sampled = self.steps = 0

    def add(self, token: int) -> Guide | None:
        """Add an id; returns the guide for the row, or None if the sequence has ended."""
        self.ids.append(token)
        self.sampled += 1
        guide = guide_at(self.case.guides, self.sampled)
        if len(self.ids) < min(self.case.limit, self.case.stop_after):
            self.ids += guide.forced
        return guide if len(self.ids) < self.case.stop_after else None


def decode_all(model: Any, cases: Sequence[Case]) -> list[list[int]]:
    states = [State(case) for case in cases]
    active = [(state, state.case.row(model)) for state in states]
    while active:
        active = step(model, active)
    return [state.ids for state in states]


def step(model: Any, active: Sequence[tuple[State, Row]]) -> list[tuple[State, Row]]:
    """One step of each row; returns those that have not ended."""
    feed(model, [row for _, row in active])
    sampled = [row.read(model) for _, row in active]
    guides = [
        Guide() if token is None else state.add(token)
        for token, (state, _) in zip(sampled, active, strict=True)
    ]
    return [pair for pair, guide in zip(active, guides, strict=True) if pair[1].advance(guide)]


@pytest.mark.parametrize("sampling", KINDS, ids=["greedy", "sampled", "often unsettled", "penalty"])
def test_eight_batched_rows_equal_eight_single_ones(
    real: Any, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
):
    """Prompts of all lengths, limits, guides, ends: each row gets the ids it gets alone."""
    if sampling is NARROW:
        monkeypatch.setattr(sampling_module, "CANDIDATES", 1)
    limits = [14, 9, 20, 1, 14, 7, 12, 15]
    guides: list[Guides] = [
        {},
        {3: FORCED},
        {2: [5], 5: FORCED},
        {},
        MASKS[0],
        {4: FORCED},
        MASKS[1],
        MASKS[2],
    ]
    cases = [
        Case(PROMPTS[at % len(PROMPTS)], Sampler(sampling, 100 + at), limits[at], guides[at])
        for at in range(8)
    ]
    cases[6].stop_after = 5
    found = decode_all(real, cases)
    for at, case in enumerate(cases):
        assert found[at] == case.alone(real), at


some_ids = st.lists(st.integers(0, 319), min_size=1, max_size=6)
random_cases = st.builds(
    Case,
    prompt=some_ids,
    sampler=st.builds(Sampler, st.sampled_from(KINDS), st.integers(0, 2**40)),
    limit=st.integers(1, 9),
    guides=st.dictionaries(st.integers(1, 9), some_ids, max_size=2) | st.sampled_from(MASKS),
    stop_after=st.integers(1, 12),
)


@given(data=st.data(), cases=st.lists(random_cases, min_size=2, max_size=4), often_unsettled=st.booleans())
@settings(max_examples=15)
def test_rows_may_join_leave_or_pause(
    real: Any, data: st.DataObject, cases: list[Case], often_unsettled: bool
):
    """Each step has other rows; some join late, some skip passes; each gets the ids it gets alone."""
    with pytest.MonkeyPatch.context() as patch:
        if often_unsettled:
            patch.setattr(sampling_module, "CANDIDATES", 1)
        expected = [case.alone(real) for case in cases]
        waiting = [State(case) for case in cases]
        states, active = list(waiting), list[tuple[State, Row]]()
        while waiting or active:
            while waiting and (not active or data.draw(st.booleans())):
                active.append((waiting[0], waiting.pop(0).case.row(real)))
            scheduled = [pair for pair in active if data.draw(st.booleans())] or active[:1]
            feed(real, [row for _, row in scheduled])
            for state, row in data.draw(st.permutations(scheduled)):
                token = row.read(real)
                guide = Guide() if token is None else state.add(token)
                if not row.advance(guide):
                    active.remove((state, row))
                else:  # the caches hold what was emitted or forced
                    state.steps += 1
                    assert {cache.offset - len(state.case.prompt) for cache in row.caches} == {state.steps}
        assert [state.ids for state in states] == expected


class RecordingModel:
    """A model that records the shapes it is fed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shapes = list[tuple[int, ...]]()

    def __call__(self, ids: mx.array, caches: Sequence[Cache], **options: bool) -> mx.array:
        self.shapes.append(ids.shape)
        return self.model(ids, caches, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def greedy(*limits: int, stop_after: int = 99) -> list[Case]:
    sampler = Sampler(Sampling(temperature=0), 0)
    return [
        Case(prompt, sampler, limit, stop_after=stop_after)
        for prompt, limit in zip(PROMPTS, limits, strict=False)
    ]


def test_ended_rows_leave_and_no_pass_is_wasted(real: Any):
    model = RecordingModel(real)
    cases = greedy(5, 2, 9)
    cases[2].stop_after = 7
    assert [len(ids) for ids in decode_all(model, cases)] == [5, 2, 7]
    prompts, steps = model.shapes[:3], model.shapes[3:]
    assert [L for _, L in prompts] == [8, 1, 40]
    # One step ahead; no row's last id is fed, unless it was not known to be the last.
    assert [B for B, _ in steps] == [3, 2, 2, 2, 1, 1, 1]
    model.shapes.clear()
    decode_all(model, greedy(4, 3))
    assert [B for B, _ in model.shapes[2:]] == [2, 2, 1]


def test_all_rows_may_end_at_once(real: Any):
    model = RecordingModel(real)
    assert [len(ids) for ids in decode_all(model, greedy(50, 50, stop_after=3))] == [3, 3]
    assert len(model.shapes) == 2 + 3


def test_error_in_one_row_affects_only_that_row(real: Any):
    """NaN for one sequence only, as after a damaged row of an embedding."""

    class Failing(RecordingModel):
        def logits(self, h: mx.array) -> mx.array:
            logits = self.model.logits(h)
            return mx.where(mx.arange(len(h))[:, None, None] == 1, mx.nan, logits) if len(h) == 3 else logits

    cases = [Case(PROMPTS[at], Sampler(Sampling(), at), 6) for at in range(3)]
    states, batch = [State(case) for case in cases], [case.row(real) for case in cases]
    model = Failing(real)
    feed(model, batch)
    for state, row in zip(states, batch, strict=True):
        row.advance(state.add(row.read(model) or 0))
    feed(model, [*batch[:2], batch[2]])
    with pytest.raises(CheckpointError, match="weights are damaged"):
        batch[1].read(model)
    remaining = [0, 2]
    while remaining:
        for at in remaining:
            state = states[at]
            state.add(batch[at].read(model) or 0)
        remaining = [at for at in remaining if batch[at].advance(Guide())]
        feed(model, [batch[at] for at in remaining])
    assert [states[at].ids for at in (0, 2)] == [cases[at].alone(real) for at in (0, 2)]


# ------------------------------------------------------------------ the graph of a step


def count_nodes(monkeypatch: pytest.MonkeyPatch, model: Any, active: Sequence[Row]) -> int:
    """Graph nodes of a step."""
    counts = list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(mx, "async_eval", lambda *arrays: counts.append(primitives(arrays).total()))
        feed(model, active)
    [nodes] = counts
    return nodes


def test_rows_with_equal_sampling_are_sampled_at_once(real: Any, monkeypatch: pytest.MonkeyPatch):
    def nodes(samplings: Sequence[Sampling], scorer: Scorer | None = None) -> int:
        active = [
            Row(
                Request(prompt=[1], sampler=Sampler(sampling, 5), limit=9, scorer=scorer),
                mx.zeros(320),
                [KVCache() for _ in real.blocks],
            )
            for sampling in samplings
        ]
        return count_nodes(monkeypatch, real, active)

    together, apart = nodes([Sampling()] * 4), nodes([Sampling(top_p=0.9 + at / 100) for at in range(4)])
    assert apart - together > 3 * 40
    assert nodes([Sampling()] * 4, Scorer(0)) > apart  # each has its own scores, and is sampled separately


def test_reading_ids_builds_no_graph(real: Any, monkeypatch: pytest.MonkeyPatch):
    """An array created after the next pass is dispatched would wait for it, and leave the device idle."""
    active = step(real, [(State(case), case.row(real)) for case in greedy(9, 9, 9)])
    evaluated = list[str]()
    for name in ("eval", "async_eval"):
        original = getattr(mx, name)
        monkeypatch.setattr(
            mx, name, lambda *a, original=original, name=name: (evaluated.append(name), original(*a))
        )
    stack = mx.stack
    monkeypatch.setattr(mx, "stack", lambda *a, **k: (evaluated.append("stack"), stack(*a, **k))[1])
    step(real, active)
    assert evaluated == ["stack", "async_eval"]
