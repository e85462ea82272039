"""What attention has already seen: one `KVCache` a layer, keys and values with RoPE applied.

Knows shapes, offsets and how attention reads what it keeps. Does not know which ids were fed, nor why.

    >>> cache = KVCache()
    >>> keys, values = cache.update(k, v)      # k, v (1, 8, 5, 128): five positions at once
    >>> cache.offset, keys.shape               # room is taken 256 positions at a time
    (5, (1, 8, 5, 128))
    >>> cache.trim(2); cache.offset            # the last two never happened
    3

Shapes: B sequences, L new positions, T = offset positions so far, H query heads, K key/value heads of D.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Self

import mlx.core as mx

from magistral_mlx.errors import ConfigError

STEP = 256
"""Room grows by so many positions: 40 layers x 256 positions are 40 MiB at Magistral's shape."""
_PLAIN = ("keys", "values")
_PACKED = tuple(f"{array}.{part}" for array in _PLAIN for part in ("codes", "scales", "biases"))
FEW = 8
"""Up to so many queries at once (decoding, checking drafts) packed keys and values are multiplied as they
are. More (a prompt) are worth unpacking one layer's for: MLX's fused attention then never holds the scores,
which for 2048 queries over 40,960 positions are 5.4 GB in 16 bit; the unpacked layer is 0.17 GB."""


class KVCache:
    """Keys and values of one layer, `(B, K, room, D)` each; `offset` positions of the room are filled.

    Arrays are values in MLX: a fork shares them until one side writes, so a fork costs nothing.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._arrays: list[mx.array] = []  # each (B, K, room, …); a list is replaced, never changed
        self._shared = False  # the arrays are handles that a fork holds too
        self._pads: list[int] = []  # for each row, how many positions at its beginning are nobody's

    @property
    def position(self) -> int | mx.array:
        """Where the next id stands in its sequence: the same for all, or `(B,)`."""
        return self.offset - mx.array(self._pads) if self._pads else self.offset

    def stack(self, caches: Sequence["KVCache"]) -> Self:
        """Become the one cache of several sequences; see `stacked`."""
        end, kept = max(cache.offset for cache in caches), max(len(cache.arrays()) for cache in caches)
        pads = [end - cache.offset for cache in caches]
        self._arrays = []
        for rows in zip(*(cache.arrays_as(kept) for cache in caches), strict=True):
            array = mx.repeat(_room_for(rows[0], end + 1), len(rows), axis=0)
            for at, (row, pad) in enumerate(zip(rows, pads, strict=True)):
                array[at : at + 1, :, pad:end] = row[:, :, : end - pad]
            self._arrays.append(array)
        self.offset, self._shared, self._pads = end, False, pads if any(pads) else []
        return self

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        pads = [self._pads[row] for row in rows] if self._pads else [0]
        spare, chosen = min(pads), mx.array(list(rows))  # spare: the longest one has left
        self._arrays = [array[:, :, spare:][chosen] for array in self._arrays]
        self._pads = [pad - spare for pad in pads] if any(pad > spare for pad in pads) else []
        self.offset, self._shared = self.offset - spare, False

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Append `(B, K, L, D)` keys and values; what queries `(B, H, L, D)` see of all so far."""
        keys, values = self.update(keys, values)
        L = queries.shape[2]
        mask = self._visible(L) if self._pads else "causal" if L > 1 else None
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `(B, K, L, D)` and return all that is cached so far, `(B, K, T, D)`."""
        keys, values = self._append([keys, values])
        return keys, values

    def trim(self, n: int) -> None:
        """Forget the last `n` positions; what follows overwrites them."""
        assert 0 <= n <= self.offset
        self.offset -= n

    def shrink(self) -> None:
        """Give back the room that trimming left over."""
        if self._arrays and self._arrays[0].shape[2] > _room(self.offset):
            kept, self._arrays = self._arrays, [_room_for(array, self.offset) for array in self._arrays]
            for array, old in zip(self._arrays, kept, strict=True):
                array[:, :, : self.offset] = old[:, :, : self.offset]
            self._shared = False

    def fork(self) -> Self:
        """An independent cache with the same past. Makes no array, so any thread may ask for it."""
        self._shared = True
        return copy.copy(self)

    def emptied(self) -> Self:
        """A cache of the same kind that has seen nothing."""
        empty = copy.copy(self)
        vars(empty).update(offset=0, _arrays=[], _shared=False)
        return empty

    def arrays(self) -> list[mx.array]:
        """What must be evaluated for the positions so far to be durable."""
        return list(self._arrays)

    def state(self, positions: int) -> dict[str, mx.array]:
        """What is kept of the first `positions`, by the names of `state_layout`."""
        names = _PACKED if len(self._arrays) > 2 else _PLAIN
        return {name: array[:, :, :positions] for name, array in zip(names, self._arrays, strict=True)}

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """Become what `state` was taken from."""
        self._arrays = [state[name] for name in (_PACKED if len(state) > 2 else _PLAIN)]
        self.offset = self._arrays[0].shape[2]

    def arrays_as(self, count: int) -> list[mx.array]:
        """What is kept, as so many arrays (packing makes more of them)."""
        assert count == len(self._arrays)
        return self._arrays

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self._arrays)

    def _visible(self, L: int) -> mx.array | None:
        """What the last `L` queries may see: bool, broadcasts to `(B, H, L, T)`. None: everything."""
        places = mx.arange(self.offset)
        # The query at l stands at position T - L + l.
        seen = places[self.offset - L :, None] >= places if L > 1 else None  # (L, T)
        if not self._pads:
            return seen
        somebodys = (places >= mx.array(self._pads)[:, None])[:, None, None]  # (B, 1, 1, T)
        return somebodys if seen is None else somebodys & seen

    def _append(self, parts: Sequence[mx.array]) -> list[mx.array]:
        """Write `parts`, `(B, K, L, …)` each, behind what is there; returns all of it, `(B, K, T, …)`."""
        start, end = self.offset, self.offset + parts[0].shape[2]
        if not self._arrays:
            self._arrays = [_room_for(part, end) for part in parts]
        elif end > self._arrays[0].shape[2]:
            self._arrays = [
                mx.concatenate([array[:, :, :start], _room_for(part, end - start)], axis=2)
                for array, part in zip(self._arrays, parts, strict=True)
            ]
        elif self._shared:  # an item assignment changes the handle it is made on: take handles of our own
            self._arrays = [array[:] for array in self._arrays]
        self._shared = False
        for array, part in zip(self._arrays, parts, strict=True):
            array[:, :, start:end] = part
        self.offset = end
        return [array[:, :, :end] for array in self._arrays]


class QuantizedKVCache(KVCache):
    """The same in 8 bits a number: half the memory. Affine, in groups along each head.

    after: up to so many positions are kept as they are; the write that passes them packs everything, and
    trimming does not unpack. At Magistral's shape a position takes 85 KiB instead of 160.
    """

    def __init__(self, head_dim: int, *, bits: int = 8, after: int = 0) -> None:
        super().__init__()
        if bits != 8:
            raise ConfigError(f"a KV cache is kept in 16 or in 8 bits, found {bits}")
        self.bits = bits
        self._group = group_size(head_dim)
        self.after = after

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        if queries.shape[2] > FEW or not self._packs(keys.shape[2]):
            return super().attend(queries, keys, values, scale)
        parts = self._append_packed(keys, values)
        return self._attend_packed(queries * scale, parts[:3], parts[3:])

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As `KVCache.update`, with all of the past unpacked: for a prompt, not for every id."""
        if not self._packs(keys.shape[2]):
            return super().update(keys, values)
        parts = self._append_packed(keys, values)
        return self._unpack(*parts[:3]), self._unpack(*parts[3:])

    def _packs(self, L: int) -> bool:
        """Whether what is kept is packed once `L` more positions are in it."""
        return len(self._arrays) > 2 or self.offset + L > self.after

    def arrays_as(self, count: int) -> list[mx.array]:
        return self._arrays if count == len(self._arrays) else self._pack(*self._arrays)

    def _append_packed(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Append; returns codes, scales and biases of all keys, then of all values."""
        if len(self._arrays) == 2:  # unpacked so far
            self._arrays = self._pack(*self._arrays)
        return self._append(self._pack(keys, values))

    def _pack(self, *arrays: mx.array) -> list[mx.array]:
        pack = partial(mx.quantize, group_size=self._group, bits=self.bits)
        return [part for array in arrays for part in pack(array)]

    def _unpack(self, codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(codes, scales, biases, group_size=self._group, bits=self.bits)

    def _attend_packed(
        self, queries: mx.array, keys: Sequence[mx.array], values: Sequence[mx.array]
    ) -> mx.array:
        """The heads that share keys are rows of one product, so that packed keys are read once for them."""
        B, H, L, D = queries.shape
        _, K, T, _ = keys[0].shape
        rows = queries.reshape(B, K, H // K * L, D)
        multiply = partial(mx.quantized_matmul, group_size=self._group, bits=self.bits)
        scores = multiply(rows, *keys, transpose=True)
        if (seen := self._visible(L)) is not None:
            seen = mx.broadcast_to(seen, (B, 1, L, T))[:, :, None]
            scores = mx.where(seen, scores.reshape(B, K, H // K, L, T), -mx.inf).reshape(scores.shape)
        weights = mx.softmax(scores, axis=-1, precise=True)  # (B, K, H / K * L, T)
        return multiply(weights, *values, transpose=False).reshape(B, H, L, D)


def group_size(head_dim: int) -> int:
    """Numbers that share a scale in an 8-bit cache: 64, or 32 where a head divides by no more."""
    if head_dim % 32:
        raise ConfigError(f"an 8-bit KV cache needs heads of a multiple of 32 wide, found {head_dim}")
    return 64 if head_dim % 64 == 0 else 32


def state_layout(
    heads: int, head_dim: int, positions: int, dtype: mx.Dtype, *, packed: bool
) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
    """Name → (dtype, shape) of one layer's `KVCache.state`."""
    stem = (1, heads, positions)
    if not packed:
        return dict.fromkeys(_PLAIN, (dtype, (*stem, head_dim)))
    groups = (dtype, (*stem, head_dim // group_size(head_dim)))
    codes = (mx.uint32, (*stem, head_dim // 4))
    return {name: codes if name.endswith("codes") else groups for name in _PACKED}


def stacked(caches: Sequence[KVCache]) -> KVCache:
    """One cache of several sequences from one of each: `(1, …)` each → `(B, …)`, copied.

    All end at the same place, and grow together from there on; shorter ones are padded on the left:

        What is 2 + 2?      · · 8 3 5 2 2 6    position = offset - 2
        What is 48 + 37?    8 3 5 4 9 2 7 6    position = offset
    """
    return caches[0].fork().stack(caches)


def trim_all(caches: Sequence[KVCache], n: int) -> None:
    """Forget the last `n` positions in every layer."""
    for cache in caches:
        cache.trim(n)


def _room_for(like: mx.array, positions: int) -> mx.array:
    B, K, _, D = like.shape
    return mx.zeros((B, K, _room(positions), D), like.dtype)


def _room(positions: int) -> int:
    """Positions that room is taken for."""
    return -(-positions // STEP) * STEP
