"""The KV cache: one `KVCache` per layer, keys and values with RoPE applied.

Knows shapes, offsets and how attention reads the cache. Does not know which ids were fed, nor why.

    >>> cache = KVCache()
    >>> keys, values = cache.update(k, v)      # k, v (1, 8, 5, 128): five positions at once
    >>> cache.offset, keys.shape               # memory is allocated 256 positions at a time
    (5, (1, 8, 5, 128))
    >>> cache.trim(2); cache.offset            # drops the last two
    3

Shapes: B sequences, L new positions, T = offset positions so far, H query heads, K key/value heads of D.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Self, TypeAlias

import mlx.core as mx

from magistral_mlx.errors import ConfigError

STEP = 256
"""Positions allocated at a time: 40 layers x 256 positions are 40 MiB at Magistral's shape."""
_PLAIN = ("keys", "values")
_QUANTIZED = tuple(f"{array}.{part}" for array in _PLAIN for part in ("codes", "scales", "biases"))
FEW = 8
"""Up to this many queries at once (decoding, verifying drafts), quantized keys and values are multiplied
as they are. For more (prefill), a layer's are dequantized first: MLX's fused attention then never holds the
scores, 5.4 GB in 16 bit for 2048 queries over 40,960 positions; the dequantized layer is 0.17 GB."""


class KVCache:
    """Keys and values of one layer, `(B, K, capacity, D)` each, of which `offset` positions are filled.

    A fork shares the arrays until one side writes (MLX copies on write), so forking costs nothing.
    """

    after: float = math.inf
    """Positions up to which the cache stays unquantized."""

    def __init__(self) -> None:
        self.offset = 0
        self._arrays: list[mx.array] = []  # each (B, K, capacity, …); the list is replaced, never mutated
        self._shared = False  # a fork holds the same array handles

    @property
    def position(self) -> int:
        """The position of the next id in its sequence."""
        return self.offset

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Append `(B, K, L, D)` keys and values; attention of `(B, H, L, D)` queries over all so far."""
        keys, values = self.update(keys, values)
        L = queries.shape[2]
        mask = "causal" if L > 1 else None
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `(B, K, L, D)` and return everything cached so far, `(B, K, T, D)`."""
        keys, values = self._append([keys, values])
        return keys, values

    def trim(self, n: int) -> None:
        """Drop the last `n` positions; later updates overwrite them."""
        assert 0 <= n <= self.offset
        self.offset -= n

    def shrink(self) -> None:
        """Release the capacity that trimming left unused."""
        if self._arrays and self._arrays[0].shape[2] > _capacity(self.offset):
            kept, self._arrays = self._arrays, [_zeros(array, self.offset) for array in self._arrays]
            for array, old in zip(self._arrays, kept, strict=True):
                array[:, :, : self.offset] = old[:, :, : self.offset]
            self._shared = False

    def fork(self) -> Self:
        """An independent cache with the same contents. Creates no array, so any thread may call it."""
        self._shared = True
        return copy.copy(self)

    def emptied(self) -> Self:
        """An empty cache of the same kind."""
        empty = copy.copy(self)
        vars(empty).update(offset=0, _arrays=[], _shared=False)
        return empty

    def arrays(self) -> list[mx.array]:
        """What must be evaluated so that the positions so far are computed."""
        return list(self._arrays)

    def state(self, positions: int) -> dict[str, mx.array]:
        """The arrays of the first `positions`, by the names of `state_layout`."""
        names = _QUANTIZED if len(self._arrays) > 2 else _PLAIN
        return {name: array[:, :, :positions] for name, array in zip(names, self._arrays, strict=True)}

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """Take over the contents that `state` returned."""
        self._arrays = [state[name] for name in (_QUANTIZED if len(state) > 2 else _PLAIN)]
        self.offset = self._arrays[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self._arrays)

    def _append(self, parts: Sequence[mx.array]) -> list[mx.array]:
        """Append `parts`, `(B, K, L, …)` each; returns everything so far, `(B, K, T, …)`."""
        start, end = self.offset, self.offset + parts[0].shape[2]
        if not self._arrays:
            self._arrays = [_zeros(part, end) for part in parts]
        elif end > self._arrays[0].shape[2]:
            self._arrays = [
                mx.concatenate([array[:, :, :start], _zeros(part, end - start)], axis=2)
                for array, part in zip(self._arrays, parts, strict=True)
            ]
        elif self._shared:  # item assignment mutates the array handle: make our own handles first
            self._arrays = [array[:] for array in self._arrays]
        self._shared = False
        for array, part in zip(self._arrays, parts, strict=True):
            array[:, :, start:end] = part
        self.offset = end
        return [array[:, :, :end] for array in self._arrays]


class QuantizedKVCache(KVCache):
    """A KV cache with 8 bits per number, half the memory: affine quantization in groups along each head.

    after: up to this many positions stay unquantized; the write that exceeds it quantizes everything, and
    trimming does not undo that. At Magistral's shape a position takes 85 KiB instead of 160.
    """

    def __init__(self, head_dim: int, *, bits: int = 8, after: int = 0) -> None:
        super().__init__()
        if bits != 8:
            raise ConfigError(f"a KV cache is kept in 16 or in 8 bits, found {bits}")
        self.bits = bits
        self._group = group_size(head_dim)
        self.after = after

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        if queries.shape[2] > FEW or not self._quantizes(keys.shape[2]):
            return super().attend(queries, keys, values, scale)
        parts = self._append_quantized(keys, values)
        return self._attend_quantized(queries * scale, parts[:3], parts[3:])

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As `KVCache.update`, dequantizing everything: for prefill, not for every decode step."""
        if not self._quantizes(keys.shape[2]):
            return super().update(keys, values)
        parts = self._append_quantized(keys, values)
        return self._dequantize(*parts[:3]), self._dequantize(*parts[3:])

    def _quantizes(self, L: int) -> bool:
        """Whether the cache is quantized once `L` more positions are in it."""
        return len(self._arrays) > 2 or self.offset + L > self.after

    def _append_quantized(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Append; returns codes, scales and biases of all keys, then those of all values."""
        if len(self._arrays) == 2:  # not quantized yet
            self._arrays = self._quantize(*self._arrays)
        return self._append(self._quantize(keys, values))

    def _quantize(self, *arrays: mx.array) -> list[mx.array]:
        quantize = partial(mx.quantize, group_size=self._group, bits=self.bits)
        return [part for array in arrays for part in quantize(array)]

    def _dequantize(self, codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(codes, scales, biases, group_size=self._group, bits=self.bits)

    def _attend_quantized(
        self, queries: mx.array, keys: Sequence[mx.array], values: Sequence[mx.array]
    ) -> mx.array:
        """Query heads that share a key head are rows of one product, so its quantized keys are read once."""
        B, H, L, D = queries.shape
        _, K, T, _ = keys[0].shape
        rows = queries.reshape(B, K, H // K * L, D)
        multiply = partial(mx.quantized_matmul, group_size=self._group, bits=self.bits)
        scores = multiply(rows, *keys, transpose=True)
        if L > 1:
            places = mx.arange(T)
            visible = places[T - L :, None] >= places  # (L, T): the query at l stands at position T - L + l
            scores = mx.where(visible, scores.reshape(B, K, H // K, L, T), -mx.inf).reshape(scores.shape)
        weights = mx.softmax(scores, axis=-1, precise=True)  # (B, K, H / K * L, T)
        return multiply(weights, *values, transpose=False).reshape(B, H, L, D)


class SideBySide:
    """One layer's caches of several sequences, for one batched pass: each row reads and writes its own.

    Nothing is padded or copied, so sequences of any lengths can share a pass, and each pass can have others.
    """

    def __init__(self, rows: Sequence[KVCache], position: mx.array) -> None:
        self.position = position  # (B,)
        self._rows = rows

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """As `KVCache.attend`, `(B, …)`, one row per sequence."""
        split = (mx.split(array, len(self._rows)) for array in (queries, keys, values))
        return mx.concatenate(
            [row.attend(q, k, v, scale) for row, q, k, v in zip(self._rows, *split, strict=True)]
        )


Cache: TypeAlias = KVCache | SideBySide


def side_by_side(sequences: Sequence[Sequence[KVCache]]) -> Sequence[Cache]:
    """Each sequence's caches, one per layer → the caches of a pass over all sequences."""
    if len(sequences) == 1:
        return sequences[0]
    position = mx.array([caches[0].offset for caches in sequences])
    return [SideBySide(layer, position) for layer in zip(*sequences, strict=True)]


def group_size(head_dim: int) -> int:
    """Numbers that share a scale in an 8-bit cache: 64, or 32 if 64 does not divide `head_dim`."""
    if head_dim % 32:
        raise ConfigError(f"an 8-bit KV cache needs heads of a multiple of 32 wide, found {head_dim}")
    return 64 if head_dim % 64 == 0 else 32


def state_layout(
    heads: int, head_dim: int, positions: int, dtype: mx.Dtype, *, quantized: bool
) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
    """Name → (dtype, shape) of one layer's `KVCache.state`."""
    stem = (1, heads, positions)
    if not quantized:
        return dict.fromkeys(_PLAIN, (dtype, (*stem, head_dim)))
    groups = (dtype, (*stem, head_dim // group_size(head_dim)))
    codes = (mx.uint32, (*stem, head_dim // 4))
    return {name: codes if name.endswith("codes") else groups for name in _QUANTIZED}


def trim_all(caches: Sequence[KVCache], n: int) -> None:
    """Drop the last `n` positions in every layer."""
    for cache in caches:
        cache.trim(n)


def _zeros(like: mx.array, positions: int) -> mx.array:
    B, K, _, D = like.shape
    return mx.zeros((B, K, _capacity(positions), D), like.dtype)


def _capacity(positions: int) -> int:
    """Capacity for so many positions: the next multiple of `STEP` beyond them.

    Never just as many: assigning to a whole array would store the assigned view itself, which keeps all that
    it was cut from: a longer cache, or the fused projection (1.5 GB more for 2048 positions at Magistral's
    shape).
    """
    return (positions // STEP + 1) * STEP
