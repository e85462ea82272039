"""One layer of Magistral Small's size with random 4-bit weights: as `model` computes it, and a reference.

The reference, for `doctor`: float32, no fused kernel, no quantized product, weights dequantized block by
block so that 0.3 GB of weights do not become 2 GB. Does not know files or a vocabulary.
"""

import math
import zlib
from dataclasses import replace

import mlx.core as mx

from magistral_mlx.config import MAGISTRAL, Scheme
from magistral_mlx.decoder.cache import KVCache
from magistral_mlx.decoder.matrix import Matrix
from magistral_mlx.decoder.model import Block

CONFIG = replace(MAGISTRAL, n_layers=1)
SCHEME = Scheme(bits=4, group_size=64, mode="affine")
_PATH = "model.layers.0"
_BLOCK = 2048
"""Rows dequantized at once: 256 MiB of the widest matrix."""


class RandomWeights:
    """Random weights seeded by their names: the same each time."""

    def __init__(self, dtype: mx.Dtype) -> None:
        self._dtype = dtype
        self._shapes = dict(CONFIG.matrices())

    def matrix(self, path: str) -> Matrix:
        rows, columns = self._shapes[path]
        key = mx.random.key(zlib.crc32(path.encode()))
        codes = mx.random.randint(-(2**31), 2**31 - 1, (rows, columns // 8), mx.int32, key=key)
        # 16 levels around zero with a variance of 1 / columns, so that activations keep their size.
        step = 1 / (4.6 * math.sqrt(columns))
        scales = mx.full((rows, columns // SCHEME.group_size), step, self._dtype)
        matrix = Matrix(weight=codes.view(mx.uint32), scales=scales, biases=-7.5 * scales, scheme=SCHEME)
        mx.eval(matrix.arrays())
        return matrix

    def vector(self, path: str) -> mx.array:  # noqa: ARG002 -- all are ones
        return mx.ones(CONFIG.dim, self._dtype)


def layer(weights: RandomWeights) -> Block:
    """The layer of `model`."""
    return Block(CONFIG, weights, _PATH)


def spelled_out(weights: RandomWeights, x: mx.array) -> mx.array:
    """The reference: `(L, D)` float32 at positions 0 to L - 1 → `(L, D)`."""
    L, H, K, d = x.shape[0], CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.head_dim

    def times(name: str, x: mx.array) -> mx.array:
        matrix = weights.matrix(f"{_PATH}.{name}_proj")
        rows = matrix.weight.shape[0]
        parts = [x @ matrix.dequantized(at, at + _BLOCK).T for at in range(0, rows, _BLOCK)]
        mx.eval(parts)
        return mx.concatenate(parts, axis=-1)

    def heads(name: str, count: int) -> mx.array:
        return times(f"self_attn.{name}", _normalized(x)).reshape(L, count, d).transpose(1, 0, 2)

    queries, keys, values = _rotated(heads("q", H)), _rotated(heads("k", K)), heads("v", K)
    keys, values = (mx.repeat(array, H // K, axis=0) for array in (keys, values))
    scores = queries @ keys.transpose(0, 2, 1) / math.sqrt(d) + mx.triu(mx.full((L, L), -mx.inf), k=1)
    attended = (mx.softmax(scores, axis=-1) @ values).transpose(1, 0, 2).reshape(L, H * d)
    x = x + times("self_attn.o", attended)
    gate, up = times("mlp.gate", _normalized(x)), times("mlp.up", _normalized(x))
    return x + times("mlp.down", gate / (1 + mx.exp(-gate)) * up)


def computed(weights: RandomWeights, x: mx.array) -> mx.array:
    """`layer` applied to the same `(L, D)`."""
    return layer(weights)(x[None], KVCache())[0]


def _normalized(x: mx.array) -> mx.array:
    return x / mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True) + CONFIG.norm_eps)


def _rotated(x: mx.array) -> mx.array:
    """RoPE: `(H, L, d)` with each pair (i, i + d/2) rotated by its position's angle."""
    half = x.shape[-1] // 2
    speeds = mx.exp(mx.arange(half) * (-math.log(CONFIG.rope_theta) / half))
    angles = mx.arange(x.shape[1])[:, None] * speeds
    cos, sin, a, b = mx.cos(angles), mx.sin(angles), x[..., :half], x[..., half:]
    return mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
