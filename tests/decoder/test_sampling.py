"""The sampler against a nucleus computed in float64, its frequencies against theory, its seeds."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.decoder import sampling as sampling_module
from magistral_mlx.decoder.sampling import UNSETTLED, Sampler, Sampling, noise_key
from magistral_mlx.errors import SamplingError

MARGIN = 1e-5
"""Nearer to the edge of a nucleus than this, float32 cannot tell on which side an id is."""


class FixedNoiseSampler(Sampler):
    """A sampler with given noise: a test decides which id comes first."""

    def __init__(self, sampling: Sampling, noise: mx.array) -> None:
        super().__init__(sampling, seed=0)
        self.noise = noise

    def _noise(self, position: int, shape: tuple[int, ...]) -> mx.array:
        return self.noise


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """For each id: is it in the nucleus, and is that certain in float32?"""

    inside: np.ndarray
    certain: np.ndarray
    p: np.ndarray


def reference_nucleus(sampling: Sampling, logits: np.ndarray, seen: np.ndarray | None = None) -> Nucleus:
    """The nucleus in float64, from its definition; also with every edge moved slightly either way."""
    x = logits.astype(np.float64)
    if seen is not None:
        penalised = np.where(x > 0, x / sampling.repetition_penalty, x * sampling.repetition_penalty)
        x = np.where(seen, penalised, x)
    x = x / sampling.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    exact, narrow, wide = (_inside(sampling, x, p, sign) for sign in (0, -1, 1))
    return Nucleus(inside=exact, certain=narrow == wide, p=p)


def _inside(sampling: Sampling, x: np.ndarray, p: np.ndarray, sign: int) -> np.ndarray:
    """sign: 0 exact; -1 or 1 with every edge moved inwards or outwards, and neighbours that float32 may not
    tell apart counted as above or not. Equal logits are equal either way: ties are never in doubt.
    """
    down = np.argsort(-x, kind="stable")
    falling = -x[down]
    tolerance = 5e-7 * np.abs(np.where(np.isfinite(x), x, 0))
    count = np.searchsorted(falling, -x, side="left")
    if sign < 0:  # near ties count as above; exact ties never do
        equals = np.searchsorted(falling, -x, side="right") - count
        count = np.maximum(np.searchsorted(falling, -x + tolerance, side="right") - equals, count)
    elif sign > 0:
        count = np.minimum(np.searchsorted(falling, -x - tolerance, side="left"), count)
    above = np.concatenate([[0.0], np.cumsum(p[down])])[count]
    # Nothing is above the likeliest, whatever the rounding.
    inside = (above < sampling.top_p + sign * MARGIN) | ((count == 0) & (sign >= 0))
    if sampling.top_p == 1:
        inside = np.ones_like(inside)
    if sampling.top_k:
        inside &= count < sampling.top_k
    if sampling.min_p:
        inside &= (p >= sampling.min_p * p.max() * (1 - sign * MARGIN)) | (p == p.max())
    return inside & np.isfinite(x)


def random_logits(rng: np.random.Generator, number: int) -> np.ndarray:
    """Random logits: flat, nearly flat, peaked, tied, masked, spread, far from zero, by number."""
    size = int(rng.integers(1, 65))
    kind = number % 8
    if kind == 0:
        x = np.full(size, rng.normal())
    elif kind == 1:
        x = rng.normal(size=size) * 1e-3
    elif kind == 2:
        x = rng.normal(size=size)
        x[rng.integers(size)] += 30
    elif kind == 3:
        x = rng.integers(0, 3, size=size).astype(np.float64)  # many ties, at the edge too
    elif kind == 4:
        x = np.where(rng.random(size) < 0.6, -np.inf, rng.normal(size=size) * 2)
        x[rng.integers(size)] = 1.0
    elif kind == 5:
        x = -np.arange(size) * math.log(2)  # each half the one before: masses that are binary fractions
        rng.shuffle(x)
    elif kind == 6:
        x = rng.normal(size=size) * 20
    else:
        x = rng.normal(size=size) * 3 + rng.choice([-80, 80])
    return x.astype(np.float32)


def random_sampling(rng: np.random.Generator) -> Sampling:
    """Any combination of the filters, most often with top_p."""
    return Sampling(
        temperature=float(rng.choice([0.1, 0.7, 1.0, 1.7])),
        top_p=float(rng.choice([0.05, 0.3, 0.5, 0.9, 0.95, 0.999, 1.0])),
        top_k=int(rng.choice([0, 0, 1, 3, 20])),
        min_p=float(rng.choice([0, 0, 0.02, 0.3, 1.0])),
        repetition_penalty=float(rng.choice([1.0, 1.0, 1.3, 0.8])),
    )


def in_nucleus(sampling: Sampling, logits: np.ndarray, seen: mx.array | None, ids: np.ndarray) -> np.ndarray:
    """Which of `ids` can be sampled: each in turn is given noise that puts it first.

    `draw` must return that id or give up (with one candidate), and `settle` must agree with it.
    """
    x, places = mx.array(logits), mx.arange(logits.size)
    drawn, settled = list[mx.array](), list[mx.array]()
    for target in ids.tolist():
        steered = FixedNoiseSampler(sampling, mx.where(places == target, 1e9, 0.0))
        drawn.append(steered.draw(x, 0, seen))
        settled.append(steered.settle(x, 0, seen))
    found = np.array(mx.stack(drawn))
    masked = np.isneginf(logits[ids])  # no noise can put these first: another id is drawn
    assert (masked | (found == ids) | (found == UNSETTLED)).all()
    np.testing.assert_array_equal(found == ids, np.array(mx.stack(settled)) == ids)
    return found == ids


@pytest.fixture
def one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module, "CANDIDATES", 1)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.9, 0.95, 0.999])
def test_candidates_suffice_for_all_but_one_draw_in_a_thousand(top_p: float):
    count = Sampler(Sampling(top_p=top_p), seed=0)._candidates
    assert count == sampling_module.CANDIDATES or (1 - top_p) ** count <= 1e-3 < (1 - top_p) ** (count - 1)
    assert Sampler(Sampling(top_p=top_p, top_k=5), seed=0)._candidates == sampling_module.CANDIDATES


@pytest.mark.usefixtures("one_candidate")
def test_support_equals_the_nucleus_in_float64():
    rng = np.random.default_rng(2506)
    checked = outside = uncertain = 0
    for number in range(1000):
        logits, sampling = random_logits(rng, number), random_sampling(rng)
        seen = rng.random(logits.size) < 0.3
        expected = reference_nucleus(sampling, logits, seen)
        # Both sides of the edge, both ends, and a random one.
        down = np.argsort(-expected.p, kind="stable")
        edge = int(expected.inside.sum())
        places = {0, edge - 1, edge, logits.size - 1, int(rng.integers(logits.size))}
        ids = down[[place for place in sorted(places) if 0 <= place < logits.size]]
        uncertain += int((~expected.certain[ids]).sum())
        ids = ids[expected.certain[ids]]
        found = in_nucleus(sampling, logits, mx.array(seen), ids)
        assert (found == expected.inside[ids]).all(), (number, sampling, logits[ids], expected.p[ids])
        checked += ids.size
        outside += int((~found).sum())
    assert checked > 3500
    assert outside > 1000
    assert uncertain <= 20, f"{uncertain} ids, of {checked}, are at an edge and were not checked"


@pytest.mark.usefixtures("one_candidate")
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 3.0])
def test_support_at_the_real_vocabulary(scale: float):
    rng = np.random.default_rng(round(scale * 1000))
    logits = (rng.normal(size=131072) * scale).astype(np.float32)
    logits[rng.integers(logits.size, size=1000)] = -np.inf
    for sampling in (Sampling(), Sampling(temperature=1, top_p=0.5, top_k=50_000, min_p=1e-4)):
        expected = reference_nucleus(sampling, logits)
        assert (~expected.certain).sum() < 100
        down = np.argsort(-logits, kind="stable")
        edge = int(expected.inside.sum())
        near = np.clip(edge + np.array([-2000, -50, -10, -1, 0, 10, 50, 2000]), 0, logits.size - 1)
        ids = down[np.append(near, [0, logits.size - 1])]
        ids = ids[expected.certain[ids]]
        assert ids.size >= 6
        np.testing.assert_array_equal(in_nucleus(sampling, logits, None, ids), expected.inside[ids])


@pytest.mark.usefixtures("one_candidate")
def test_top_p_is_taken_after_the_temperature():
    # At temperature 1 the two likeliest hold 0.9 between them; at 0.5 the likeliest alone holds 0.89.
    logits = np.log([0.66, 0.23, 0.11]).astype(np.float32)
    assert in_nucleus(Sampling(temperature=1, top_p=0.8), logits, None, np.arange(3)).tolist() == [
        True,
        True,
        False,
    ]
    assert in_nucleus(Sampling(temperature=0.5, top_p=0.8), logits, None, np.arange(3)).tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("candidates", [1, 4])
def test_draw_equals_settle(candidates: int, monkeypatch: pytest.MonkeyPatch):
    """Real noise: a draw that succeeds without sorting gives the id that sorting gives."""
    monkeypatch.setattr(sampling_module, "CANDIDATES", candidates)
    rng = np.random.default_rng(candidates)
    drawn, settled = list[mx.array](), list[mx.array]()
    for number in range(300):
        logits, sampler = mx.array(random_logits(rng, number)), Sampler(random_sampling(rng), seed=number)
        drawn.append(sampler.draw(logits, number))
        settled.append(sampler.settle(logits, number))
    pairs = list(zip(np.array(mx.stack(drawn)), np.array(mx.stack(settled)), strict=True))
    unsettled = sum(a == UNSETTLED for a, _ in pairs)
    assert all(a in (b, UNSETTLED) for a, b in pairs)
    # Narrow nuclei did leave draws unsettled; with four candidates fewer than with one.
    assert unsettled > 30 if candidates == 1 else unsettled < 25


SETTINGS = {
    "card": Sampling(),
    "plain": Sampling(temperature=1.0, top_p=1.0),
    "hot, narrow": Sampling(temperature=1.5, top_p=0.6),
    "top_k": Sampling(temperature=1.0, top_p=1.0, top_k=3),
    "min_p": Sampling(temperature=1.2, top_p=1.0, min_p=0.2),
    "all": Sampling(temperature=0.9, top_p=0.9, top_k=5, min_p=0.05, repetition_penalty=1.4),
}
LOGITS = np.array([2.0, 1.5, 1.5, 0.3, -0.2, 0.9, -np.inf, -1.0, 1.5, 0.0], np.float32)
SEEN = np.arange(LOGITS.size) % 3 == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_pass_a_chi_square_test(name: str):
    n, sampling = 2000, SETTINGS[name]
    expected = reference_nucleus(sampling, LOGITS, SEEN)
    p = np.where(expected.inside, expected.p, 0)
    p /= p.sum()
    counts = np.bincount(draws(sampling, n), minlength=LOGITS.size)
    assert counts[~expected.inside].sum() == 0
    bins = p > 0
    statistic = ((counts - n * p)[bins] ** 2 / (n * p[bins])).sum()
    assert statistic < chi_square_limit(int(bins.sum()) - 1), (statistic, counts, n * p)


def draws(sampling: Sampling, n: int) -> np.ndarray:
    """`n` draws at positions 0, 1, …, settled where necessary."""
    sampler, x, seen = Sampler(sampling, seed=19), mx.array(LOGITS), mx.array(SEEN)
    found = np.array(mx.stack([sampler.draw(x, position, seen) for position in range(n)]))
    for position in np.flatnonzero(found == UNSETTLED).tolist():
        found[position] = sampler.settle(x, position, seen).item()
    return found


def chi_square_limit(freedom: int) -> float:
    """Passed once in a thousand by chance (Wilson and Hilferty's approximation; 16.27 for 3, exactly)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3


def test_greedy_is_argmax():
    rng = np.random.default_rng(3)
    sampler = Sampler(Sampling(temperature=0, top_p=0.1, top_k=3, min_p=0.5), seed=1)
    for number in range(100):
        logits = random_logits(rng, number)
        assert sampler.draw(mx.array(logits), number).item() == logits.argmax()


def test_repetition_penalty_equals_numpy():
    rng = np.random.default_rng(4)
    for _ in range(100):
        logits, seen = rng.normal(size=40).astype(np.float32) * 3, rng.random(40) < 0.5
        penalty = float(rng.choice([0.5, 1.0, 1.2, 3.0]))
        expected = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
        sampler = Sampler(Sampling(temperature=0, repetition_penalty=penalty), seed=0)
        assert sampler.draw(mx.array(logits), 0, mx.array(seen)).item() == expected.argmax()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(top_p=0.5, repetition_penalty=1.1),
        Sampling(temperature=0, repetition_penalty=1.1),
        Sampling(top_p=1.0),
    ],
)
def test_half_precision_logits_are_drawn_in_float32(dtype: mx.Dtype, sampling: Sampling):
    # In 16 bit a sum of weights would stop growing at 256 or 2048 times their size, and quotients would tie.
    rng = np.random.default_rng(5)
    rows = mx.array(rng.normal(size=(100, 2048)).astype(np.float32) * 3).astype(dtype)
    seen, sampler = mx.array(rng.random(2048) < 0.5), Sampler(sampling, seed=2)
    found = mx.stack([sampler.draw(row, position, seen) for position, row in enumerate(rows)])
    expected = [sampler.draw(row.astype(mx.float32), position, seen) for position, row in enumerate(rows)]
    assert found.dtype == mx.int32
    assert found.tolist() == mx.stack(expected).tolist()


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0), Sampling(top_p=1.0), Sampling(top_p=1.0, top_k=2)]
)
@pytest.mark.parametrize("bad", [0, 2])
def test_nan_is_never_sampled(sampling: Sampling, bad: int):
    logits = np.zeros(5, np.float32)
    logits[bad] = np.nan
    assert Sampler(sampling, seed=0).draw(mx.array(logits), 0).item() == UNSETTLED
    assert Sampler(sampling, seed=0).draw(mx.full(5, math.nan), 0).item() == UNSETTLED


PROCESS = """
import json, mlx.core as mx, numpy as np
from magistral_mlx.decoder.sampling import Sampler, Sampling
logits = mx.array(np.random.default_rng(8).normal(size=(40, 500)).astype(np.float32) * 2)
sampler = Sampler(Sampling(), seed=7)
print(json.dumps([sampler.draw(row, position).item() for position, row in enumerate(logits)]))
"""


def test_the_same_seed_gives_the_same_ids_in_a_new_process():
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    logits = mx.array(np.random.default_rng(8).normal(size=(40, 500)).astype(np.float32) * 2)

    def in_this_process(seed: int) -> list[object]:
        sampler = Sampler(Sampling(), seed)
        return [sampler.draw(row, position).item() for position, row in enumerate(logits)]

    assert runs[0] == runs[1] == in_this_process(7)
    assert sum(a == b for a, b in zip(in_this_process(7), in_this_process(8), strict=True)) < 10


def test_noise_of_a_seed_never_changes():
    """Recorded: a saved seed must give the same answer again. A change here belongs in the changelog."""
    assert noise_key(7, 3).tolist() == KEY
    noise = Sampler(Sampling(), 7)._noise(3, (3,))
    np.testing.assert_allclose(np.array(noise), NOISE, rtol=1e-4)


KEY = [2863064715, 1524275856]
NOISE = [-0.70074433, -0.16653715, 3.5513694]


def test_noise_of_other_positions_and_seeds_is_unrelated():
    grid = [(seed, position) for seed in (*range(12), -1, 2**70) for position in range(12)]
    assert len({tuple(noise_key(*at).tolist()) for at in grid}) == len(grid)
    noise = np.stack([np.array(Sampler(Sampling(), seed)._noise(at, (4000,))) for seed, at in grid])
    correlation = np.corrcoef(noise) - np.eye(len(grid))
    assert np.abs(correlation).max() < 6 / math.sqrt(4000)  # 14028 pairs: five sigma at most
    assert Counter(np.round(noise[:, 0], 6)).most_common(1)[0][1] == 1
    assert abs(noise.mean() - 0.5772) < 0.01  # Gumbel's mean and variance
    assert abs(noise.var() - math.pi**2 / 6) < 0.03


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", bad) for bad in (-0.1, math.nan, math.inf, "0.7", None)],
        *[("top_p", bad) for bad in (0, -1, 1.5, math.nan, "1")],
        *[("top_k", bad) for bad in (-1, 1.5, math.nan, math.inf, None)],
        *[("min_p", bad) for bad in (-0.1, 2, math.nan)],
        *[("repetition_penalty", bad) for bad in (0, -1, math.nan, math.inf)],
    ],
)
def test_values_out_of_range_are_refused(name: str, value: object):
    with pytest.raises(SamplingError, match=rf"{name} is .*, found {value!r}"):
        replace(Sampling(), **{name: value})


@pytest.mark.parametrize("sampling", [Sampling(top_p=5e-324), Sampling(top_k=1, top_p=5e-324)])
def test_tiny_top_p_selects_the_likeliest_id(sampling: Sampling):
    logits, sampler = mx.arange(16) / 4, Sampler(sampling, seed=0)
    assert sampler.draw(logits, 0).item() in (UNSETTLED, 15)
    assert sampler.settle(logits, 0).item() == 15


@pytest.mark.parametrize("top_k", [2**31, 2**63, 10**30])
def test_huge_top_k_selects_all_ids(top_k: int):
    logits, all_of_them = mx.arange(16) / 4, Sampler(Sampling(top_p=1, top_k=16), seed=0)
    sampler = Sampler(Sampling(top_p=1, top_k=top_k), seed=0)
    for position in range(5):
        assert sampler.draw(logits, position).item() == all_of_them.draw(logits, position).item()
        assert sampler.settle(logits, position).item() == all_of_them.settle(logits, position).item()


def test_values_at_the_edge_of_their_range_are_accepted():
    Sampling(temperature=0, top_p=1, top_k=0, min_p=1, repetition_penalty=0.01)
    Sampling(temperature=np.float32(0.5), top_p=1e-30, top_k=10**9, min_p=0)
    assert Sampling() == Sampling(temperature=0.7, top_p=0.95, top_k=0, min_p=0, repetition_penalty=1)
