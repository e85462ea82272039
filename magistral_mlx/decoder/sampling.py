"""Samples the next id: temperature, then the nucleus, then one draw with noise keyed by (seed, position).

Temperature is applied first and the nucleus taken from the result, as vLLM and mistral-inference do and as
Magistral's recommended values (0.7, 0.95) were tuned; applied last, the same numbers keep a wider nucleus.

Does not know text, caches, or the ids so far (only which of them a repetition penalty affects).

How to sample from the nucleus without sorting 131072 logits: add Gumbel noise. By descending noisy logit, the
ids are draws without replacement from the full softmax, and the first one inside the nucleus is exactly a
draw from the nucleus. Whether an id is inside needs no sorting either: it is if the mass strictly above it
is less than top_p. A few candidates are tried, three with top_p 0.95; then at most one draw in 8000 finds
none, and is repeated over the whole vocabulary by sorting, with the same noise: it is the same draw.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import mlx.core as mx

from magistral_mlx.errors import SamplingError

CANDIDATES = 8
"""At most this many: each costs a pass over the vocabulary at every step, finding none repeats one step."""
UNSETTLED = -1
"""In place of an id when no candidate was inside the nucleus: `Sampler.settle` then finds the id. NaN is
never inside, so logits that contain it never give an id."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ids are sampled; the defaults are the model card's. An id must pass every enabled filter.

    temperature: divides the logits; 0 takes the likeliest id (greedy), which every filter keeps.
    top_p: keep the likeliest ids up to this mass: an id stays if the mass strictly above it is below top_p.
    top_k: keep the k likeliest (0: off; ties for the last place all stay).
    min_p: keep ids at least min_p times as likely as the likeliest (0: off).
    repetition_penalty: divides positive and multiplies negative logits of every id in the prompt or the
        reply (1: off), before the temperature, as in Keskar et al. 2019 (CTRL) and vLLM.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, "0 or more", lambda x: 0 <= x < math.inf)
        _within("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _within("top_k", self.top_k, "a whole number, 0 or more", lambda x: x >= 0 and x % 1 == 0)
        _within("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1)
        _within("repetition_penalty", self.repetition_penalty, "above 0", lambda x: 0 < x < math.inf)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def _within(name: str, value: Any, expected: str, good: Callable[[Any], bool]) -> None:
    if not isinstance(value, Real) or not good(value):
        raise SamplingError(f"{name} is {expected}, found {value!r}")


class Sampler:
    """`Sampling` and a seed, applied to logits: the same (seed, position, logits) give the same id."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self.sampling = sampling
        self.seed = seed

    def draw(self, logits: mx.array, position: int, seen: mx.array | None = None) -> mx.array:
        """The id at `position` from its logits: `(V,)` → `()` int32, or `UNSETTLED`. Lazy.

        seen: `(V,)` bool, the ids that a repetition penalty affects.
        """
        scaled = self._scaled(logits, seen)
        if self.sampling.is_greedy:
            return _likeliest(scaled)
        return self._drawn(scaled, self._noise(position, scaled.shape))

    def draw_each(self, logits: mx.array, places: Sequence[tuple[int, int]]) -> mx.array:
        """`draw` for rows of equal `Sampling`, each with its own seed and position: `(B, V)` → `(B,)`.

        The same ids as one by one, with as many graph nodes as a single draw. Lazy.
        """
        scaled = self._scaled(logits, None)
        if self.sampling.is_greedy:
            return _likeliest(scaled)
        keys = mx.stack([noise_key(seed, position) for seed, position in places])
        return self._drawn(scaled, _noise_of_each(keys, logits.shape[-1]))

    def settle(self, logits: mx.array, position: int, seen: mx.array | None = None) -> mx.array:
        """What `draw` would return if every id were a candidate: the same draw, by sorting."""
        scaled = self._scaled(logits, seen)
        order = mx.argsort(-scaled)
        down, weights = scaled[order], _weights(scaled)[order]
        # Ties share a rank and the mass above them: both are those of the first of them.
        first = mx.cummax(mx.where(mx.concatenate([mx.array([True]), down[1:] < down[:-1]]), _ranks(down), 0))
        keep = mx.array(True)
        if self.sampling.top_p < 1:
            keep = _sums_before(weights)[first] < self.sampling.top_p * sum_by_parts(weights)
        if self.sampling.top_k:
            keep &= first < self._top_k
        if self.sampling.min_p:
            keep &= weights >= self.sampling.min_p
        noisy = down + self._noise(position, scaled.shape)[order]
        return order[mx.argmax(mx.where(keep, noisy, -mx.inf))].astype(mx.int32)

    def keeps(self, logits: mx.array, ids: mx.array) -> mx.array:
        """Which of `ids`, `(n,)`, pass every filter on `(V,)` logits: `(n,)` bool."""
        return self._inside(self._scaled(logits, None), ids)

    def _drawn(self, scaled: mx.array, noise: mx.array) -> mx.array:
        """`(…, V)` both → `(…)`."""
        noisy = scaled + noise
        return self._first_inside(scaled, noisy) if self._filters else _likeliest(noisy)

    @property
    def _filters(self) -> bool:
        return self.sampling.top_p < 1 or self.sampling.top_k > 0 or self.sampling.min_p > 0

    @property
    def _top_k(self) -> int:
        """Clipped to int32, which no vocabulary exceeds."""
        return min(self.sampling.top_k, 2**31 - 1)

    @property
    def _candidates(self) -> int:
        """Enough that at most one draw in 1000 finds none: each misses with probability at most 1 - top_p."""
        if self.sampling.top_k or self.sampling.min_p:  # how much mass they keep is not known
            return CANDIDATES
        return math.ceil(min(CANDIDATES, math.log(1e-3) / math.log1p(-self.sampling.top_p)))

    def _scaled(self, logits: mx.array, seen: mx.array | None) -> mx.array:
        """In float32, penalised, divided by the temperature."""
        x = logits.astype(mx.float32)
        if seen is not None and self.sampling.repetition_penalty != 1:
            penalty = self.sampling.repetition_penalty
            x = mx.where(seen, mx.where(x > 0, x / penalty, x * penalty), x)
        return x if self.sampling.is_greedy else x / self.sampling.temperature

    def _first_inside(self, scaled: mx.array, noisy: mx.array) -> mx.array:
        """The first candidate, by descending `noisy`, that passes every filter: `(…, V)` → `(…)` int32."""
        bests = [mx.argmax(noisy, axis=-1, keepdims=True)]
        while len(bests) < self._candidates:
            noisy = mx.put_along_axis(noisy, bests[-1], mx.array(-mx.inf), axis=-1)
            bests.append(mx.argmax(noisy, axis=-1, keepdims=True))
        best = mx.concatenate(bests, axis=-1).astype(mx.int32)  # (…, n)
        inside = self._inside(scaled, best)
        first = mx.argmax(inside, axis=-1, keepdims=True)  # argmax of bools: the first true one
        found = mx.where(
            mx.take_along_axis(inside, first, -1), mx.take_along_axis(best, first, -1), UNSETTLED
        )
        return found.squeeze(-1)

    def _inside(self, scaled: mx.array, best: mx.array) -> mx.array:
        """Which of the ids `best` pass every filter: `(…, n)` bool, false wherever there is NaN.

        All at once, masked by multiplication: few kernels, and `mx.where` takes five times as long on a CPU.
        """
        weights = _weights(scaled)
        above = scaled[..., None, :] > mx.take_along_axis(scaled, best, axis=-1)[..., None]  # (…, n, V)
        inside = weights[..., :1] >= 0
        # top_p 1 excludes no id, so rounding must not either.
        if self.sampling.top_p < 1:
            limit = self.sampling.top_p * sum_by_parts(weights)[..., None]
            inside = sum_by_parts(weights[..., None, :] * above) < limit
        if self.sampling.top_k:
            inside &= mx.sum(above, axis=-1) < self._top_k
        if self.sampling.min_p:
            inside &= mx.take_along_axis(weights, best, axis=-1) >= self.sampling.min_p
        return inside

    def _noise(self, position: int, shape: tuple[int, ...]) -> mx.array:
        return mx.random.gumbel(shape, key=noise_key(self.seed, position))


def noise_key(seed: int, position: int) -> mx.array:
    """The key of one draw's noise. Hashed, so that neighbouring seeds and positions are unrelated."""
    digest = hashlib.blake2b(b"%d:%d" % (seed, position), digest_size=8).digest()
    return mx.random.key(int.from_bytes(digest, "big"))


def _noise_of_each(keys: mx.array, V: int) -> mx.array:
    """Gumbel noise of each key: `(B, 2)` → `(B, V)`."""

    def noise(key: mx.array) -> mx.array:
        return mx.random.gumbel((V,), key=key)

    return mx.vmap(noise)(keys)


def _likeliest(x: mx.array) -> mx.array:
    """Argmax: `(…, V)` → `(…)` int32, `UNSETTLED` for NaN."""
    best = mx.argmax(x, axis=-1, keepdims=True).astype(mx.int32)
    found = mx.take_along_axis(x, best, axis=-1) > -mx.inf  # false for NaN
    return mx.where(found, best, UNSETTLED).squeeze(-1)


def _weights(scaled: mx.array) -> mx.array:
    """The unnormalised softmax of `(…, V)`; powers of two take a third of the time of `exp` on a CPU."""
    return mx.power(2.0, (scaled - mx.max(scaled, axis=-1, keepdims=True)) * math.log2(math.e))


def _ranks(x: mx.array) -> mx.array:
    return mx.arange(x.shape[0])


def sum_by_parts(x: mx.array) -> mx.array:
    """Sums of `(…, V)` by parts: a single running float32 sum of 131072 weights loses up to 2e-4 on a CPU."""
    return mx.sum(mx.sum(_parts(x), axis=-1), axis=-1)


def _sums_before(x: mx.array) -> mx.array:
    """Exclusive cumulative sums of `(V,)`, by parts for the same reason."""
    parts = _parts(x)
    within = mx.cumsum(parts, axis=1)
    whole = within[:, -1:]
    return (mx.cumsum(whole, axis=0) - whole + within - parts).reshape(x.shape)


def _parts(x: mx.array) -> mx.array:
    return x.reshape(*x.shape[:-1], -1, math.gcd(x.shape[-1], 256))
