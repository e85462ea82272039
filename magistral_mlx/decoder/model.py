"""The Mistral decoder: grouped-query attention with RoPE, SwiGLU feed-forward, RMSNorm before each.

Reads top-down like the paper. Weights are looked up by mlx-lm's names (`checkpoint` provides them, already
checked). Does not know files, text, or how ids are sampled.

Shapes: B sequences, L new positions, D = dim, H query heads, K key/value heads, d = head_dim, V ids.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from magistral_mlx.config import ModelConfig

from .cache import Cache, KVCache, QuantizedKVCache
from .matrix import Matrix, Stack


class Weights(Protocol):
    """Where a layer gets its weights from."""

    def matrix(self, path: str) -> Matrix: ...
    def vector(self, path: str) -> mx.array: ...


class Attention:
    """Grouped-query attention: H query heads share K heads of keys and values."""

    def __init__(self, config: ModelConfig, weights: Weights, path: str) -> None:
        self.config = config
        self.qkv = Stack(*(weights.matrix(f"{path}.{name}_proj") for name in "qkv"))
        self.out = weights.matrix(f"{path}.o_proj")

    def __call__(self, x: mx.array, cache: Cache, *, last: bool = False) -> mx.array:
        """`(B, L, D)` → `(B, L, D)`; with `last` only the last position has a query, `(B, 1, D)`."""
        H, K = self.config.n_heads, self.config.n_kv_heads
        heads = _split_heads(self.qkv(x), H + 2 * K)
        to_rotate, values = mx.split(heads, [H + K], axis=1)
        queries, keys = mx.split(self._rope(to_rotate, cache.position), [H], axis=1)
        queries = queries[:, :, -1:] if last else queries
        return self.out(_merge_heads(cache.attend(queries, keys, values, self.config.head_dim**-0.5)))

    def _rope(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x, self.config.head_dim, traditional=False, base=self.config.rope_theta, scale=1.0, offset=offset
        )


def _split_heads(x: mx.array, heads: int) -> mx.array:
    """`(B, L, heads * d)` → `(B, heads, L, d)`. With L = 1 a reshape does it, without a transpose."""
    B, L, _ = x.shape
    return x.reshape(B, heads, 1, -1) if L == 1 else x.reshape(B, L, heads, -1).transpose(0, 2, 1, 3)


def _merge_heads(x: mx.array) -> mx.array:
    """`(B, H, L, d)` → `(B, L, H * d)`."""
    B, _, L, _ = x.shape
    return (x if L == 1 else x.transpose(0, 2, 1, 3)).reshape(B, L, -1)


class FeedForward:
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Weights, path: str) -> None:
        self.gate_up = Stack(weights.matrix(f"{path}.gate_proj"), weights.matrix(f"{path}.up_proj"))
        self.down = weights.matrix(f"{path}.down_proj")
        # One fused kernel on a GPU. On a CPU, compiling needs a C++ compiler, and is slower without one.
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        self._gated = mx.compile(_gated, shapeless=True) if on_gpu else _gated

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up(x), 2, axis=-1)  # (B, L, hidden_dim) each
        return self.down(self._gated(gate, up))


def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class Block:
    """One layer: attention, then feed-forward, each with a norm before it and a residual around it."""

    def __init__(self, config: ModelConfig, weights: Weights, path: str) -> None:
        self.eps = config.norm_eps
        self.attention_norm = weights.vector(f"{path}.input_layernorm.weight")
        self.attention = Attention(config, weights, f"{path}.self_attn")
        self.ffn_norm = weights.vector(f"{path}.post_attention_layernorm.weight")
        self.feed_forward = FeedForward(weights, f"{path}.mlp")

    def __call__(self, x: mx.array, cache: Cache, *, last: bool = False) -> mx.array:
        attended = self.attention(mx.fast.rms_norm(x, self.attention_norm, self.eps), cache, last=last)
        h = (x[:, -1:] if last else x) + attended
        return h + self.feed_forward(mx.fast.rms_norm(h, self.ffn_norm, self.eps))


class Transformer:
    """Ids in, hidden states out; `logits` applies the head to the positions that are needed.

    Kept apart because the head is `(V, D)` = 131072 x 5120 here: a prefill needs only its last position.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.embedding = weights.matrix("model.embed_tokens")
        self.blocks = [Block(config, weights, f"model.layers.{n}") for n in range(config.n_layers)]
        self.norm = weights.vector("model.norm.weight")
        self.head = self.embedding if config.tie_embeddings else weights.matrix("lm_head")

    def __call__(self, ids: mx.array, caches: Sequence[Cache], *, last: bool = False) -> mx.array:
        """`(B, L)` ids that follow what the caches hold → `(B, L, D)`; appends them to the caches.

        last: return only the last position, `(B, 1, D)`; the top layer skips the others' outputs.
        """
        # A quantized embedding may dequantize to another dtype than the one the model computes in.
        h = self.embedding.rows(ids).astype(self.norm.dtype)
        for block, cache in zip(self.blocks, caches, strict=True):
            h = block(h, cache, last=last and block is self.blocks[-1])
        return mx.fast.rms_norm(h, self.norm, self.config.norm_eps)

    @property
    def dtype(self) -> mx.Dtype:
        """Of activations, and of unquantized keys and values."""
        return self.norm.dtype

    def logits(self, h: mx.array) -> mx.array:
        """`(…, D)` → `(…, V)`, unnormalised."""
        return self.head(h)

    def new_caches(self, kv_bits: int | None = None, *, quantize_after: int = 0) -> list[KVCache]:
        """Empty caches; with `kv_bits=8` quantized to half the memory once longer than `quantize_after`."""
        if kv_bits is None:
            return [KVCache() for _ in self.blocks]
        head_dim = self.config.head_dim
        return [QuantizedKVCache(head_dim, bits=kv_bits, after=quantize_after) for _ in self.blocks]
