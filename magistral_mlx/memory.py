"""The memory plan: bytes of weights, KV cache and activations, against the memory of a machine.

Does not know files or formats: shapes and sizes are passed in. Nothing here sets a limit; where a higher
wired limit would help, the message names the command that sets it.

    weights     as they were loaded
    KV cache    grows with the context, 256 positions at a time
    transient   temporary arrays of one forward pass over a prefill chunk: see `pass_bytes`

The sum agrees with MLX's own counter of peak memory to 10 % (`benchmarks/memory_plan.py`); on Metal this
is not verified yet.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx

from .config import ModelConfig
from .decoder.cache import FEW, STEP, group_size
from .decoder.engine import PREFILL_CHUNK

USUAL_CONTEXT = 40960
"""The model card's recommended context: beyond it the quality drops."""
_FUSED_HEADS = (64, 80, 128)
"""Head widths for which Metal's fused attention never materializes the scores."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine's memory, and the part that arrays may use (`budget`), in bytes.

    metal: it computes on its GPU. estimated: `budget` was not read from the machine.
    """

    memory: int
    budget: int
    metal: bool = True
    estimated: bool = False

    @property
    def highest_limit(self) -> int:
        """How far the GPU's wired limit may be raised: an eighth is left to macOS, and at least 3 GiB."""
        return self.memory - max(3 * 2**30, self.memory // 8) if self.metal else 0


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """A reply that ends at `context` positions, of which `prompt` (None: all) are the prompt.

    weights: bytes. itemsize: bytes of an activation, 2 on Metal, 4 on a CPU. kv_bits: None or 8.
    quantize_after: with `kv_bits`, positions up to which the cache stays unquantized.
    held: bytes in use besides, such as other conversations' caches.
    """

    config: ModelConfig
    weights: int
    context: int
    machine: Machine
    itemsize: int = 2
    kv_bits: int | None = None
    quantize_after: int = 0
    prompt: int | None = None
    chunk: int = PREFILL_CHUNK
    held: int = 0

    @property
    def kv(self) -> int:
        """Bytes of the KV cache at the end."""
        return self._kv(self.context)

    @property
    def cache_bits(self) -> int:
        """Bits per number of the KV cache at the end."""
        return self._bits(self.context) or 8 * self.itemsize

    @property
    def transient(self) -> int:
        """Peak bytes besides the weights and the final KV cache."""
        prompt = self.context if self.prompt is None else self.prompt
        last, longest_kept = prompt % self.chunk, min(self.quantize_after, self.context)
        passes = [(self.chunk, prompt - last), (last, prompt), (1, self.context)]  # (L, T)
        passes.append((self.chunk if longest_kept <= prompt else 1, longest_kept))
        return max(self._kv(T) - self.kv + self._pass(L, T) for L, T in passes if L and T)

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.transient + self.held

    @property
    def fits(self) -> bool:
        return self.total <= self.machine.budget

    @property
    def longest(self) -> int:
        """The longest context that fits, up to the planned one: a multiple of 1024, or 0."""
        return next((n for n in range(self.context // 1024 * 1024, 0, -1024) if self.at(n).fits), 0)

    @property
    def remedies(self) -> list["MemoryPlan"]:
        """Plans that fit where this one does not: with a shorter context, with an 8-bit cache, with both."""
        wanted = [] if self.fits else [self, *self._with_8bit_cache()]
        return [plan if plan.fits else plan.at(plan.longest) for plan in wanted if plan.fits or plan.longest]

    @property
    def wired_limit_mb(self) -> int | None:
        """The `iogpu.wired_limit_mb` that makes this fit; None: it fits already, or no limit suffices."""
        limit = math.ceil(self.total / 2**28) * 2**8
        return limit if not self.fits and limit * 2**20 <= self.machine.highest_limit else None

    @property
    def with_limit(self) -> "MemoryPlan | None":
        """The first plan that a higher limit allows: this, with an 8-bit cache, or with less context too."""
        smaller = [plan.at(n) for plan in self._with_8bit_cache() for n in (self.context, 8192, 1024)]
        return next((plan for plan in (self, *smaller) if plan.wired_limit_mb), None)

    def at(self, context: int) -> "MemoryPlan":
        """The same plan with at most `context` positions."""
        context = min(context, self.context)
        return replace(
            self, context=context, prompt=None if self.prompt is None else min(self.prompt, context)
        )

    def advice(self) -> str:
        """What to do if this does not fit, in one sentence."""
        found = [plan.label() for plan in self.remedies]
        if (plan := self.with_limit) and plan.wired_limit_mb:
            command = f"sudo sysctl iogpu.wired_limit_mb={plan.wired_limit_mb}"
            found.append(f"{plan.label()} after `{command}` (until the next restart)")
        return f"what would fit: {'; or '.join(found)}" if found else "nothing shorter fits either"

    def label(self) -> str:
        return f"{self.context:,} tokens with {self.cache_bits}-bit KV cache, {_gb(self.total)}"

    def excess(self) -> str:
        """The bytes it takes and the budget, for a message."""
        return (
            f"{_gb(self.total)} (weights {_gb(self.weights)}, KV cache {_gb(self.kv)}, computing "
            f"{_gb(self.transient)}{f', held {_gb(self.held)}' if self.held else ''}), "
            f"and this machine can give {_gb(self.machine.budget)}"
        )

    def _with_8bit_cache(self) -> list["MemoryPlan"]:
        possible = self.kv_bits is None and self.config.head_dim % 32 == 0
        return [replace(self, kv_bits=8)] if possible else []

    def _kv(self, positions: int) -> int:
        return kv_bytes(self.config, positions, itemsize=self.itemsize, kv_bits=self._bits(positions))

    def _bits(self, positions: int) -> int | None:
        return self.kv_bits if positions > self.quantize_after else None

    def _pass(self, L: int, T: int) -> int:
        fused = self.machine.metal and self.config.head_dim in _FUSED_HEADS
        return pass_bytes(self.config, L, T, itemsize=self.itemsize, kv_bits=self._bits(T), fused=fused)


def this_machine() -> Machine:
    """Metal's own numbers, or a CPU's physical memory."""
    if mx.metal.is_available():
        memory = cast("int", mx.device_info()["memory_size"])
        return Machine(memory=memory, budget=budget())
    return Machine(memory=budget(), budget=budget(), metal=False)


def mac(memory_gib: int) -> Machine:
    """A Mac with so much memory; the budget estimates what macOS gives the GPU by default."""
    share = 2 / 3 if memory_gib <= 32 else 3 / 4
    return Machine(memory=memory_gib * 2**30, budget=int(memory_gib * 2**30 * share), estimated=True)


def budget() -> int:
    """Bytes this process may use for arrays: Metal's working set, or a CPU's physical memory."""
    if mx.metal.is_available():
        return cast("int", mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_dtype() -> mx.Dtype:
    """bfloat16 on a GPU. On a CPU float32: MLX's bf16 matmuls there are slower and lose precision."""
    return mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32


def kv_bytes(config: ModelConfig, positions: int, *, itemsize: int, kv_bits: int | None = None) -> int:
    """Bytes of all layers' KV caches. In 8 bits, each group of numbers also has a scale and a bias."""
    room = math.ceil(positions / STEP) * STEP
    numbers = room * config.kv_bytes_per_token(1)
    if kv_bits is None:
        return numbers * itemsize
    return numbers * kv_bits // 8 + 2 * itemsize * numbers // group_size(config.head_dim)


def pass_bytes(
    config: ModelConfig, L: int, T: int, *, itemsize: int, kv_bits: int | None = None, fused: bool = True
) -> int:
    """Bytes beyond weights and cache during a forward pass over the last `L` of `T` positions.

    MLX dispatches ahead, so all arrays of one layer exist at once, with some of the next layer's: three of
    the feed-forward's width, six of the model's, eight of the queries', six of the keys' (fitted to runs on a
    CPU). While a layer's cache grows, its old and its new arrays coexist; for a prompt, a quantized layer is
    dequantized as a whole. Decoding (L = 1) also samples: 13 float32 per logit.

    fused: attention never materializes its scores, (H, L, T). True on Metal for heads of 64, 80 or 128; on a
    CPU they exist, with a mask of L x T bytes, and are the largest part for a long prompt.
    """
    D, F = config.dim, config.hidden_dim
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = L * (3 * F + 6 * D + 8 * queries + 6 * keys) * itemsize
    scores = 0 if fused else L * T * (config.n_heads * itemsize + 1)
    growth = kv_bytes(config, T, itemsize=itemsize, kv_bits=kv_bits) // config.n_layers
    dequantized = 2 * T * keys * itemsize if kv_bits and L > FEW else 0
    drawing = 13 * 4 * config.vocab_size if L == 1 else 0
    return layer + scores + growth + dequantized + drawing


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
